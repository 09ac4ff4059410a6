//! What a stranger may send at any layer: it gets an answer or an end, and nobody else notices.

use std::{collections::BTreeSet, time::Instant};

use crate::common::{
    Client, HOP, PATIENCE, Relay,
    by_hand::{
        ACK, DATA, FIN, Frame, GO_AWAY, PING, RST, SYN, WINDOW, WINDOW_UPDATE, behind_its_length,
        data, frame, hear, line, muxed, muxed_as, next_frame, proposal, reserve, say_and_hang_up,
        secured, send, tcp, until_closed,
    },
    bystanders::Bystanders,
    children::resident,
    messages::{self, HopMessage, connect},
    strangers::Heard,
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

const OK: Option<i32> = Some(100);
const NO_RESERVATION: Option<i32> = Some(204);
const MALFORMED_MESSAGE: Option<i32> = Some(400);
const UNEXPECTED_MESSAGE: Option<i32> = Some(401);

const IDENTIFY_PUSH: StreamProtocol = StreamProtocol::new("/ipfs/id/push/1.0.0");

// ---- Before there is a secure channel

#[tokio::test]
async fn a_protocol_with_a_name_that_nobody_has_is_not_let_come() {
    let relay = Relay::start(&[]);
    let mut channel = muxed(&relay).await;
    let header = line("/multistream/1.0.0");
    // Of 16,383 bytes, for which room would be made at once.
    let announced = [&header[..], &[0xff, 0x7f]].concat();
    let refused = [&header[..], &line("/unknown"), &[0xff, 0x7f]].concat();
    for (stream, said) in [(1, announced), (3, refused)] {
        send(&mut channel, &data(SYN, stream, &said)).await;
        assert_eq!(hear(&mut channel, stream).await, None);
    }
    assert_eq!(reserve(&mut channel, 5).await, Some(100));
}

#[tokio::test]
async fn random_bytes_on_tcp_end_their_connection() {
    let mut bystanders = Bystanders::gather(&[]).await;
    let header = line("/multistream/1.0.0");
    let openings = [
        vec![],
        header.clone(),
        [&header[..], &[0xff, 0x7f]].concat(), // the longest line there may be
        [&header[..], &[0xff; 10]].concat(),   // and a longer one
        [header, line("/who/knows/this").repeat(1000)].concat(),
        proposal("/tls/1.0.0"),
        proposal("/noise"),
        [&proposal("/noise")[..], &[0xff; 2]].concat(), // the longest message
    ];

    // Says nothing at all, and does not hang up either: until the handshake's time is over.
    let mut silent = tcp(&bystanders.relay).await;
    for opening in &openings {
        let garbage = samples(20, vec(any::<u8>(), 0..2000));
        let strangers = garbage.into_iter().map(async |garbage| {
            let stranger = tcp(&bystanders.relay).await;
            say_and_hang_up(stranger, &[&opening[..], &garbage].concat()).await;
        });
        future::join_all(strangers).await;
    }
    until_closed(&mut silent).await;
    bystanders.are_unharmed().await;
}

// ---- On the secure channel

#[tokio::test]
async fn random_bytes_after_noise_end_their_connection() {
    let mut bystanders = Bystanders::gather(&[]).await;
    for garbage in samples(30, vec(any::<u8>(), 0..2000)) {
        let no_muxer = secured(&bystanders.relay, &Keypair::generate_ed25519()).await;
        say_and_hang_up(no_muxer, &garbage).await;
        let no_frames = muxed(&bystanders.relay).await;
        say_and_hang_up(no_frames, &garbage).await;
    }
    bystanders.are_unharmed().await;
}

#[tokio::test]
async fn frames_in_any_order_end_at_most_their_connection() {
    let mut bystanders = Bystanders::gather(&[]).await;
    // Few streams, so that the frames meet.
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
        say_and_hang_up(stranger, &[opened.clone(), frames.concat()].concat()).await;
    }
    bystanders.are_unharmed().await;
}

#[tokio::test]
async fn frames_against_the_rules_are_told_to_go_away() {
    let mut bystanders = Bystanders::gather(&[]).await;
    let beyond_the_window = vec![0; WINDOW + 1];
    for broken in [
        frame(DATA, 0, 1, 1 << 31),             // longer than any frame
        frame(DATA, SYN, 3, u32::MAX),          // and as the first of its stream
        data(SYN, 3, &beyond_the_window),       // more than there is room for, from the start
        frame(WINDOW_UPDATE, 0, 1, u32::MAX),   // room that cannot be counted
        frame(WINDOW_UPDATE, SYN, 3, u32::MAX), // and from the start
        frame(DATA, SYN, 1, 0),                 // opened twice
        frame(WINDOW_UPDATE, SYN, 2, 0),        // the relay's to open
        frame(DATA, SYN, 0, 0),                 // nobody's to open
        frame(PING, ACK, 0, 4711),              // not what was asked
        frame(9, 0, 1, 0),                      // no kind of frame
        [1; 12].to_vec(),                       // no version
    ] {
        let mut stranger = muxed(&bystanders.relay).await;
        let opened = frame(DATA, SYN, 1, 0);
        // The relay may close it before all is written.
        let _ = stranger.write_all(&[opened, broken].concat()).await;
        let _ = stranger.flush().await;
        let goes_on = |frame: Frame| frame.kind != GO_AWAY;
        while next_frame(&mut stranger).await.is_some_and(goes_on) {}
    }
    bystanders.are_unharmed().await;
}

#[tokio::test]
async fn frames_for_unknown_streams_are_passed_over() {
    let mut bystanders = Bystanders::gather(&[]).await;
    let mut stranger = muxed(&bystanders.relay).await;
    for stream in [0, 1, 4, 4711, u32::MAX] {
        for flags in [0, ACK, FIN, RST] {
            send(&mut stranger, &data(flags, stream, b"who is there?")).await;
            let window = frame(WINDOW_UPDATE, flags, stream, u32::MAX);
            send(&mut stranger, &window).await;
        }
    }
    assert_eq!(reserve(&mut stranger, 5).await, OK);
    bystanders.are_unharmed().await;
}

#[tokio::test]
async fn two_thousand_streams_do_not_break_a_connection() {
    const STREAMS: u32 = 2000;
    const BUDGET: u32 = 64 + 32; // circuits of a peer, and the spare ones
    let mut bystanders = Bystanders::gather(&[]).await;
    let mut stranger = muxed(&bystanders.relay).await;
    let ids = (0..STREAMS).map(|number| 2 * number + 1);
    let opened: Vec<_> = ids.flat_map(|id| frame(DATA, SYN, id, 0)).collect();
    send(&mut stranger, &opened).await;
    let mut reset = 0;
    while reset < STREAMS - BUDGET {
        let frame = next_frame(&mut stranger).await.expect("it goes on");
        assert_ne!(frame.kind, GO_AWAY);
        reset += u32::from(frame.has(RST));
    }

    // When some of those within the budget end, there is room again.
    for id in 0..BUDGET {
        send(&mut stranger, &frame(DATA, RST, 2 * id + 1, 0)).await;
    }
    let mut next = 2 * STREAMS + 1;
    let start = Instant::now();
    while reserve(&mut stranger, next).await != OK {
        assert!(start.elapsed() < PATIENCE, "there is no room again");
        next += 2;
    }
    bystanders.are_unharmed().await;
}

#[tokio::test]
async fn stop_streams_that_nobody_answers_do_not_break_a_connection() {
    const CIRCUITS: usize = 64; // of one peer
    let mut bystanders = Bystanders::gather(&[]).await;
    let keypair = Keypair::generate_ed25519();
    let request = connect(keypair.public().to_peer_id()).encode_length_delimited_to_vec();
    let mut target = muxed_as(&bystanders.relay, &keypair).await;
    assert_eq!(reserve(&mut target, 1).await, OK);
    for _ in 0..5 {
        let mut source = Client::connect(&bystanders.relay).await;
        let mut asked = Vec::new();
        for _ in 0..CIRCUITS + 1 {
            let mut stream = source.open(HOP).await;
            send(&mut stream, &request).await;
            asked.push(stream);
        }
        let one_too_many = format!("circuit refused: peer {}", source.peer);
        bystanders.relay.wait_for_log(&one_too_many).await;
        let gone = format!("closed: peer {}", source.peer);
        source.leave().await;
        bystanders.relay.wait_for_log(&gone).await;
    }
    assert_eq!(reserve(&mut target, 3).await, OK);
    bystanders.are_unharmed().await;
}

#[tokio::test]
async fn of_a_flood_of_pings_the_newest_is_answered() {
    const PINGS: u32 = 20_000;
    let mut bystanders = Bystanders::gather(&["--stream-rate=0"]).await;
    let (mut answers, mut flood) = muxed(&bystanders.relay).await.split();
    let ask = async {
        let pings: Vec<_> = (0..PINGS).flat_map(|id| frame(PING, SYN, 0, id)).collect();
        send(&mut flood, &pings).await;
    };
    let hear = async {
        let mut last = None;
        while last != Some(PINGS - 1) {
            let frame = next_frame(&mut answers).await.expect("it goes on");
            if (frame.kind, frame.flags) == (PING, ACK) {
                assert!(Some(frame.length) > last, "each once, and in order");
                last = Some(frame.length);
            }
        }
    };
    tokio::join!(ask, hear);
    bystanders.are_unharmed().await;
}

#[tokio::test]
async fn a_peer_that_never_reads_is_read_on_and_takes_no_memory() {
    const ROUNDS: usize = 100;
    const MOST_KIB: u64 = 4 * 1024;
    let mut bystanders = Bystanders::gather(&["--stream-rate=0"]).await;
    let mut stranger = muxed(&bystanders.relay).await;
    let before = resident(bystanders.relay.pid());
    let pings = frame(PING, SYN, 0, 0).repeat(10_000);
    for _ in 0..ROUNDS {
        send(&mut stranger, &pings).await;
    }
    let grown = resident(bystanders.relay.pid()).saturating_sub(before);
    assert!(grown <= MOST_KIB, "{grown} KiB");
    bystanders.are_unharmed().await;
}

// ---- On a stream

#[tokio::test]
async fn random_bytes_as_a_hop_message_get_a_status_or_an_end() {
    let mut bystanders = Bystanders::gather(&[]).await;
    let mut stranger = Client::connect(&bystanders.relay).await;
    let answers = [MALFORMED_MESSAGE, UNEXPECTED_MESSAGE];
    for garbage in samples(100, vec(any::<u8>(), 0..300)) {
        let status = stranger.say(&behind_its_length(&garbage)).await.status;
        assert!(answers.contains(&status), "{status:?} to {garbage:?}");

        let answer = say_and_hang_up(stranger.open(HOP).await, &garbage).await;
        if answer.is_empty() {
            continue; // an end
        }
        let answer = HopMessage::decode_length_delimited(&*answer).unwrap();
        assert!(answers.contains(&answer.status), "{answer:?} to {garbage:?}");
    }
    stranger.reserve().await;
    bystanders.are_unharmed().await;
}

#[tokio::test]
async fn a_request_with_any_bit_flipped_gets_a_status() {
    let mut bystanders = Bystanders::gather(&["--connect-rate=0"]).await;
    let mut stranger = Client::connect(&bystanders.relay).await;
    let request = connect(PeerId::random()).encode_to_vec();
    // CONNECT and RESERVE differ by one bit.
    let answers = [OK, NO_RESERVATION, MALFORMED_MESSAGE, UNEXPECTED_MESSAGE];
    for bit in 0..request.len() * 8 {
        let mut flipped = request.clone();
        flipped[bit / 8] ^= 1 << (bit % 8);
        let status = stranger.say(&behind_its_length(&flipped)).await.status;
        assert!(answers.contains(&status), "{status:?} to {flipped:?}");
    }
    bystanders.are_unharmed().await;
}

#[tokio::test]
async fn random_bytes_in_place_of_a_protocol_end_their_stream() {
    let mut bystanders = Bystanders::gather(&[]).await;
    let mut stranger = muxed(&bystanders.relay).await;
    let mut id = 1;
    for garbage in samples(100, vec(any::<u8>(), 0..2000)) {
        send(&mut stranger, &data(SYN | FIN, id, &garbage)).await;
        hear(&mut stranger, id).await;
        id += 2;
    }
    assert_eq!(reserve(&mut stranger, id).await, OK);
    bystanders.are_unharmed().await;
}

#[tokio::test]
async fn random_bytes_to_identify_end_their_stream() {
    let mut bystanders = Bystanders::gather(&[]).await;
    let mut pushing = Client::connect(&bystanders.relay).await;
    for garbage in samples(30, vec(any::<u8>(), 0..2000)) {
        for bytes in [behind_its_length(&garbage), garbage] {
            let push = pushing.open(IDENTIFY_PUSH).await;
            say_and_hang_up(push, &bytes).await;

            // The relay asks who is there, on its first stream, and hears this.
            let mut asked = muxed(&bystanders.relay).await;
            while next_frame(&mut asked).await.expect("it asks").stream != 2 {}
            let answer = [proposal("/ipfs/id/1.0.0"), bytes].concat();
            send(&mut asked, &data(ACK | FIN, 2, &answer)).await;
            assert_eq!(reserve(&mut asked, 1).await, OK);
        }
    }
    bystanders.are_unharmed().await;
}

#[tokio::test]
async fn silent_requests_cost_their_streams_alone() {
    const SERVED: usize = 300;
    const BEYOND: usize = 20;
    // As many streams as the muxer would let through, so that the handler has to count them.
    let mut bystanders = Bystanders::gather(&["--max-circuits-per-peer", "300"]).await;
    let mut stranger = muxed(&bystanders.relay).await;
    let streams = (1..).step_by(2).take(SERVED + BEYOND);
    let silent = streams.clone().flat_map(|stream| data(SYN, stream, &proposal(HOP.as_ref())));
    send(&mut stranger, &silent.collect::<Vec<_>>()).await;
    let mut heard = Heard::default();
    let mut reset = BTreeSet::new();
    while reset.len() < BEYOND {
        let frame = next_frame(&mut stranger).await.expect("it goes on");
        assert!(heard.message::<HopMessage>(&HOP, &frame).is_none());
        if frame.has(RST) {
            reset.insert(frame.stream);
        }
    }

    let served: Vec<_> = streams.filter(|stream| !reset.contains(stream)).collect();
    assert_eq!(served.len(), SERVED);
    let finds_words = served[SERVED - 1];
    let request = messages::reserve().encode_length_delimited_to_vec();
    send(&mut stranger, &data(0, finds_words, &request)).await;
    let answer: HopMessage = loop {
        let frame = next_frame(&mut stranger).await.expect("it goes on");
        if let Some(answer) = heard.message(&HOP, &frame) {
            break answer;
        }
    };
    assert_eq!(answer.status, OK);
    bystanders.are_unharmed().await;
}

#[tokio::test]
async fn two_pings_of_a_connection_are_served_and_no_more() {
    const PAYLOAD: [u8; 32] = [7; 32];
    let mut bystanders = Bystanders::gather(&[]).await;
    let mut stranger = muxed(&bystanders.relay).await;
    let ping = [proposal("/ipfs/ping/1.0.0"), PAYLOAD.to_vec()].concat();
    for number in 0..10 {
        send(&mut stranger, &data(SYN, 2 * number + 1, &ping)).await;
    }
    let (mut served, mut refused) = (0, 0);
    while served + refused < 10 {
        let frame = next_frame(&mut stranger).await.expect("it goes on");
        served += u32::from(frame.body.ends_with(&PAYLOAD));
        refused += u32::from(frame.has(RST));
    }
    assert_eq!((served, refused), (2, 8));
    assert_eq!(reserve(&mut stranger, 21).await, OK);
    bystanders.are_unharmed().await;
}

/// So many of these, the same in every run.
fn samples<S: Strategy>(count: usize, strategy: S) -> Vec<S::Value> {
    let mut runner = TestRunner::deterministic();
    let mut sample = || strategy.new_tree(&mut runner).unwrap().current();
    (0..count).map(|_| sample()).collect()
}
