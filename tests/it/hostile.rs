//! Malformed input at each layer: it is answered or ends its stream or connection, and affects no other peer.

use std::{collections::BTreeSet, time::Instant};

use crate::common::{
    Client, HOP, Relay, TEST_TIMEOUT,
    by_hand::{
        ACK, DATA, FIN, GO_AWAY, PING, RST, SYN, WINDOW, WINDOW_UPDATE, data, frame,
        length_prefixed, line, muxed, muxed_as, next_frame, proposal, read_stream,
        read_until_closed, reserve, secured, send, send_and_close, tcp,
    },
    bystanders::Bystanders,
    child_process::resident,
    messages::{
        self, HopMessage, MALFORMED_MESSAGE, NO_RESERVATION, OK, UNEXPECTED_MESSAGE, connect,
    },
    raw_peers::Received,
};
use libp2p::{
    PeerId, StreamProtocol,
    futures::{AsyncReadExt, AsyncWriteExt, future},
    identity::Keypair,
};
use proptest::{
    arbitrary::any,
    collection::vec,
    strategy::{Strategy, ValueTree},
    test_runner::TestRunner,
};
use prost::Message;

const IDENTIFY_PUSH: StreamProtocol = StreamProtocol::new("/ipfs/id/push/1.0.0");

// ---- Before the secure channel

#[tokio::test]
async fn an_overlong_protocol_name_is_rejected() {
    let relay = Relay::start(&[]);
    let mut channel = muxed(&relay).await;
    let header = line("/multistream/1.0.0");
    // The length of a name of 16,383 bytes, for which a naive reader would allocate at once.
    let announced = [&header[..], &[0xff, 0x7f]].concat();
    let refused = [&header[..], &line("/unknown"), &[0xff, 0x7f]].concat();
    for (stream, sent) in [(1, announced), (3, refused)] {
        send(&mut channel, &data(SYN, stream, &sent)).await;
        assert_eq!(read_stream(&mut channel, stream).await, None);
    }
    assert_eq!(reserve(&mut channel, 5).await, OK);
}

#[tokio::test]
async fn random_bytes_on_tcp_end_their_connection() {
    let mut bystanders = Bystanders::start(&[]).await;
    let header = line("/multistream/1.0.0");
    let openings = [
        vec![],
        header.clone(),
        [&header[..], &[0xff, 0x7f]].concat(), // the longest length of a line
        [&header[..], &[0xff; 10]].concat(),   // a longer one
        [header, line("/who/knows/this").repeat(1000)].concat(),
        proposal("/tls/1.0.0"),
        proposal("/noise"),
        [&proposal("/noise")[..], &[0xff; 2]].concat(), // the length of the longest message
    ];

    // Sends nothing and stays open until the handshake times out.
    let mut silent = tcp(&bystanders.relay).await;
    for opening in &openings {
        let garbage = samples(20, vec(any::<u8>(), 0..2000));
        let attempts = garbage.into_iter().map(async |garbage| {
            let stranger = tcp(&bystanders.relay).await;
            send_and_close(stranger, &[&opening[..], &garbage].concat()).await;
        });
        future::join_all(attempts).await;
    }
    read_until_closed(&mut silent).await;
    bystanders.assert_unharmed().await;
}

// ---- In the secure channel

#[tokio::test]
async fn random_bytes_after_noise_end_their_connection() {
    let mut bystanders = Bystanders::start(&[]).await;
    for garbage in samples(30, vec(any::<u8>(), 0..2000)) {
        let no_muxer = secured(&bystanders.relay, &Keypair::generate_ed25519()).await;
        send_and_close(no_muxer, &garbage).await;
        let no_frames = muxed(&bystanders.relay).await;
        send_and_close(no_frames, &garbage).await;
    }
    bystanders.assert_unharmed().await;
}

#[tokio::test]
async fn random_frames_end_at_most_their_connection() {
    let mut bystanders = Bystanders::start(&[]).await;
    // Few stream ids, so that frames hit the same streams.
    let bodies = vec(any::<u8>(), 0..40);
    let parts = (0..=PING, 0..16u16, 0..8u32, any::<u32>(), bodies);
    let frames = parts.prop_map(|(kind, flags, stream, length, body)| match kind {
        DATA => data(flags, stream, &body),
        _ => frame(kind, flags, stream, length),
    });
    let hop = proposal(HOP.as_ref());
    let opened = [data(SYN, 1, &hop), data(SYN, 3, &hop)].concat();
    for frames in samples(50, vec(frames, 200)) {
        let stranger = muxed(&bystanders.relay).await;
        send_and_close(stranger, &[opened.clone(), frames.concat()].concat()).await;
    }
    bystanders.assert_unharmed().await;
}

#[tokio::test]
async fn protocol_violations_are_answered_with_go_away() {
    const PROTOCOL_ERROR: u32 = 1;
    let mut bystanders = Bystanders::start(&[]).await;
    let beyond_the_window = vec![0; WINDOW + 1];
    for broken in [
        frame(DATA, 0, 1, 1 << 31),             // longer than the longest frame
        frame(DATA, SYN, 3, u32::MAX),          // the same in a stream's first frame
        data(SYN, 3, &beyond_the_window),       // more than the initial window
        frame(WINDOW_UPDATE, 0, 1, u32::MAX),   // the window overflows
        frame(WINDOW_UPDATE, SYN, 3, u32::MAX), // the same in a stream's first frame
        frame(DATA, SYN, 1, 0),                 // a stream opened twice
        frame(WINDOW_UPDATE, SYN, 2, 0),        // an id that only the relay may open
        frame(DATA, SYN, 0, 0),                 // the session's id
        frame(PING, ACK, 0, 4711),              // the answer to a ping that was not sent
        frame(9, 0, 1, 0),                      // an unknown type
        [1; 12].to_vec(),                       // an unknown version
    ] {
        let mut stranger = muxed(&bystanders.relay).await;
        let opened = frame(DATA, SYN, 1, 0);
        // The relay does not read all of a long one: the connection is reset, and the answer may be lost.
        let is_long = broken.len() > WINDOW;
        let _ = stranger.write_all(&[opened, broken].concat()).await;
        let _ = stranger.flush().await;
        let answer = loop {
            match next_frame(&mut stranger).await {
                Some(frame) if frame.kind != GO_AWAY => {}
                answer => break answer.map(|frame| frame.length),
            }
        };
        assert!(answer == Some(PROTOCOL_ERROR) || is_long && answer.is_none(), "{answer:?}");
    }
    bystanders.assert_unharmed().await;
}

#[tokio::test]
async fn frames_of_unknown_streams_are_skipped() {
    let mut bystanders = Bystanders::start(&[]).await;
    let mut stranger = muxed(&bystanders.relay).await;
    for stream in [0, 1, 4, 4711, u32::MAX] {
        for flags in [0, ACK, FIN, RST] {
            send(&mut stranger, &data(flags, stream, b"who is there?")).await;
            let window = frame(WINDOW_UPDATE, flags, stream, u32::MAX);
            send(&mut stranger, &window).await;
        }
    }
    assert_eq!(reserve(&mut stranger, 5).await, OK);
    bystanders.assert_unharmed().await;
}

#[tokio::test]
async fn two_thousand_streams_do_not_break_a_connection() {
    const STREAMS: u32 = 2000;
    const BUDGET: u32 = 64 + 32; // the circuits of a peer, and the reserved ones
    let mut bystanders = Bystanders::start(&[]).await;
    let mut stranger = muxed(&bystanders.relay).await;
    let ids = (0..STREAMS).map(|number| 2 * number + 1);
    let opened: Vec<_> = ids.flat_map(|id| frame(DATA, SYN, id, 0)).collect();
    send(&mut stranger, &opened).await;
    let mut reset = 0;
    while reset < STREAMS - BUDGET {
        let frame = next_frame(&mut stranger).await.expect("the connection stays up");
        assert_ne!(frame.kind, GO_AWAY);
        reset += u32::from(frame.has(RST));
    }

    // When some of those within the limit end, new ones are accepted.
    for id in 0..BUDGET {
        send(&mut stranger, &frame(DATA, RST, 2 * id + 1, 0)).await;
    }
    let mut next = 2 * STREAMS + 1;
    let start = Instant::now();
    while reserve(&mut stranger, next).await != OK {
        assert!(start.elapsed() < TEST_TIMEOUT, "no new stream is accepted");
        next += 2;
    }
    bystanders.assert_unharmed().await;
}

#[tokio::test]
async fn unanswered_stop_streams_do_not_break_a_connection() {
    const CIRCUITS: usize = 64; // of one peer
    let mut bystanders = Bystanders::start(&[]).await;
    let keypair = Keypair::generate_ed25519();
    let request = connect(keypair.public().to_peer_id()).encode_length_delimited_to_vec();
    let mut target = muxed_as(&bystanders.relay, &keypair).await;
    assert_eq!(reserve(&mut target, 1).await, OK);
    for _ in 0..5 {
        let mut source = Client::connect(&bystanders.relay).await;
        let mut streams = Vec::new();
        for _ in 0..CIRCUITS + 1 {
            let mut stream = source.open(HOP).await;
            send(&mut stream, &request).await;
            streams.push(stream);
        }
        let one_too_many = format!("circuit refused: peer {}", source.peer);
        bystanders.relay.wait_for_log(&one_too_many).await;
        let gone = format!("closed: peer {}", source.peer);
        source.disconnect().await;
        bystanders.relay.wait_for_log(&gone).await;
    }
    assert_eq!(reserve(&mut target, 3).await, OK);
    bystanders.assert_unharmed().await;
}

#[tokio::test]
async fn only_the_newest_ping_of_a_flood_is_answered() {
    const PINGS: u32 = 20_000;
    let mut bystanders = Bystanders::start(&["--stream-rate=0"]).await;
    let (mut answers, mut flood) = muxed(&bystanders.relay).await.split();
    let write = async {
        let pings: Vec<_> = (0..PINGS).flat_map(|id| frame(PING, SYN, 0, id)).collect();
        send(&mut flood, &pings).await;
    };
    let read = async {
        let mut last = None;
        while last != Some(PINGS - 1) {
            let frame = next_frame(&mut answers).await.expect("the connection stays up");
            if (frame.kind, frame.flags) == (PING, ACK) {
                assert!(Some(frame.length) > last, "each is answered at most once, in order");
                last = Some(frame.length);
            }
        }
    };
    tokio::join!(write, read);
    bystanders.assert_unharmed().await;
}

#[tokio::test]
async fn a_peer_that_never_reads_is_still_read_and_uses_no_memory() {
    const ROUNDS: usize = 100;
    const MOST_KIB: u64 = 4 * 1024;
    let mut bystanders = Bystanders::start(&["--stream-rate=0"]).await;
    let mut stranger = muxed(&bystanders.relay).await;
    let before = resident(bystanders.relay.pid());
    let pings = frame(PING, SYN, 0, 0).repeat(10_000);
    for _ in 0..ROUNDS {
        send(&mut stranger, &pings).await;
    }
    let growth = resident(bystanders.relay.pid()).saturating_sub(before);
    assert!(growth <= MOST_KIB, "{growth} KiB");
    bystanders.assert_unharmed().await;
}

// ---- In a stream

#[tokio::test]
async fn random_bytes_as_a_hop_message_get_a_status_or_an_end() {
    let mut bystanders = Bystanders::start(&[]).await;
    let mut stranger = Client::connect(&bystanders.relay).await;
    let answers = [MALFORMED_MESSAGE, UNEXPECTED_MESSAGE];
    for garbage in samples(100, vec(any::<u8>(), 0..300)) {
        let status = stranger.send_raw(&length_prefixed(&garbage)).await.status;
        assert!(answers.contains(&status), "{status:?} to {garbage:?}");

        let answer = send_and_close(stranger.open(HOP).await, &garbage).await;
        if answer.is_empty() {
            continue; // the stream was closed
        }
        let answer = HopMessage::decode_length_delimited(&*answer).unwrap();
        assert!(answers.contains(&answer.status), "{answer:?} to {garbage:?}");
    }
    stranger.reserve().await;
    bystanders.assert_unharmed().await;
}

#[tokio::test]
async fn a_request_with_any_bit_flipped_gets_a_status() {
    let mut bystanders = Bystanders::start(&["--connect-rate=0"]).await;
    let mut stranger = Client::connect(&bystanders.relay).await;
    let request = connect(PeerId::random()).encode_to_vec();
    // CONNECT and RESERVE differ by one bit.
    let answers = [OK, NO_RESERVATION, MALFORMED_MESSAGE, UNEXPECTED_MESSAGE];
    for bit in 0..request.len() * 8 {
        let mut flipped = request.clone();
        flipped[bit / 8] ^= 1 << (bit % 8);
        let status = stranger.send_raw(&length_prefixed(&flipped)).await.status;
        assert!(answers.contains(&status), "{status:?} to {flipped:?}");
    }
    bystanders.assert_unharmed().await;
}

#[tokio::test]
async fn random_bytes_in_protocol_negotiation_end_their_stream() {
    let mut bystanders = Bystanders::start(&[]).await;
    let mut stranger = muxed(&bystanders.relay).await;
    let mut id = 1;
    for garbage in samples(100, vec(any::<u8>(), 0..2000)) {
        send(&mut stranger, &data(SYN | FIN, id, &garbage)).await;
        read_stream(&mut stranger, id).await;
        id += 2;
    }
    assert_eq!(reserve(&mut stranger, id).await, OK);
    bystanders.assert_unharmed().await;
}

#[tokio::test]
async fn random_bytes_to_identify_end_their_stream() {
    let mut bystanders = Bystanders::start(&[]).await;
    let mut pushing = Client::connect(&bystanders.relay).await;
    for garbage in samples(30, vec(any::<u8>(), 0..2000)) {
        for bytes in [length_prefixed(&garbage), garbage] {
            let push = pushing.open(IDENTIFY_PUSH).await;
            send_and_close(push, &bytes).await;

            // The relay opens identify as its first stream, and gets this as the answer.
            let mut identified = muxed(&bystanders.relay).await;
            while next_frame(&mut identified).await.expect("identify is opened").stream != 2 {}
            let answer = [proposal("/ipfs/id/1.0.0"), bytes].concat();
            send(&mut identified, &data(ACK | FIN, 2, &answer)).await;
            assert_eq!(reserve(&mut identified, 1).await, OK);
        }
    }
    bystanders.assert_unharmed().await;
}

#[tokio::test]
async fn silent_requests_lose_only_their_streams() {
    const SERVED: usize = 300;
    const BEYOND: usize = 20;
    // Enough streams for the muxer, so that the handler's limit is reached.
    let mut bystanders = Bystanders::start(&["--max-circuits-per-peer", "300"]).await;
    let mut stranger = muxed(&bystanders.relay).await;
    let streams = (1..).step_by(2).take(SERVED + BEYOND);
    let silent = streams.clone().flat_map(|stream| data(SYN, stream, &proposal(HOP.as_ref())));
    send(&mut stranger, &silent.collect::<Vec<_>>()).await;
    let mut received = Received::default();
    let mut reset = BTreeSet::new();
    while reset.len() < BEYOND {
        let frame = next_frame(&mut stranger).await.expect("the connection stays up");
        assert!(received.message::<HopMessage>(&HOP, &frame).is_none());
        if frame.has(RST) {
            reset.insert(frame.stream);
        }
    }

    let served: Vec<_> = streams.filter(|stream| !reset.contains(stream)).collect();
    assert_eq!(served.len(), SERVED);
    let last_served = served[SERVED - 1];
    let request = messages::reserve().encode_length_delimited_to_vec();
    send(&mut stranger, &data(0, last_served, &request)).await;
    let answer: HopMessage = loop {
        let frame = next_frame(&mut stranger).await.expect("the connection stays up");
        if let Some(answer) = received.message(&HOP, &frame) {
            break answer;
        }
    };
    assert_eq!(answer.status, OK);
    bystanders.assert_unharmed().await;
}

#[tokio::test]
async fn at_most_two_ping_streams_of_a_connection_are_served() {
    const PAYLOAD: [u8; 32] = [7; 32];
    let mut bystanders = Bystanders::start(&[]).await;
    let mut stranger = muxed(&bystanders.relay).await;
    let ping = [proposal("/ipfs/ping/1.0.0"), PAYLOAD.to_vec()].concat();
    for number in 0..10 {
        send(&mut stranger, &data(SYN, 2 * number + 1, &ping)).await;
    }
    let (mut served, mut refused) = (0, 0);
    while served + refused < 10 {
        let frame = next_frame(&mut stranger).await.expect("the connection stays up");
        served += u32::from(frame.body.ends_with(&PAYLOAD));
        refused += u32::from(frame.has(RST));
    }
    assert_eq!((served, refused), (2, 8));
    assert_eq!(reserve(&mut stranger, 21).await, OK);
    bystanders.assert_unharmed().await;
}

/// This many samples, the same ones in every run.
fn samples<S: Strategy>(count: usize, strategy: S) -> Vec<S::Value> {
    let mut runner = TestRunner::deterministic();
    let mut sample = || strategy.new_tree(&mut runner).unwrap().current();
    (0..count).map(|_| sample()).collect()
}
