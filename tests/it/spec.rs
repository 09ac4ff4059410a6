//! Circuit Relay v2 line by line, over real connections to the running program.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use crate::common::{
    Client, HOP, PATIENCE, Relay, STOP, agree, circuit, circuit_to,
    messages::{self, HopMessage, StopMessage, connect, reserve, stop_status},
    read_bytes, read_to_end, source_and_target, within,
};
use libp2p::{
    Multiaddr, PeerId,
    core::SignedEnvelope,
    futures::{AsyncWriteExt, StreamExt},
};

const RESERVATION_REFUSED: Option<i32> = Some(200);
const RESOURCE_LIMIT_EXCEEDED: Option<i32> = Some(201);
const CONNECTION_FAILED: Option<i32> = Some(203);
const NO_RESERVATION: Option<i32> = Some(204);
const MALFORMED_MESSAGE: Option<i32> = Some(400);
const UNEXPECTED_MESSAGE: Option<i32> = Some(401);

const STATUS: Option<i32> = Some(2);

fn unix_now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs()
}

// ---- Reservations

#[tokio::test]
async fn a_reservation_says_until_when_where_and_what_a_circuit_may_carry() {
    let relay = Relay::start(&[]);
    let mut alice = Client::connect(&relay).await;
    let earliest = unix_now() + 3600;
    let answer = alice.reserve().await;
    let latest = unix_now() + 3600;
    assert_eq!(answer.kind, STATUS);

    let reservation = answer.reservation.unwrap();
    let expire = reservation.expire.unwrap();
    assert!((earliest..=latest).contains(&expire), "{expire} is not in {earliest}..={latest}");
    let addresses: Vec<Multiaddr> =
        reservation.addrs.into_iter().map(|bytes| bytes.try_into().unwrap()).collect();
    assert_eq!(addresses, std::slice::from_ref(&relay.address));
    let limit = answer.limit.unwrap();
    assert_eq!((limit.duration, limit.data), (Some(120), Some(128 * 1024)));
}

#[tokio::test]
async fn the_voucher_is_signed_by_the_relay_and_names_both_peers() {
    #[derive(Clone, PartialEq, prost::Message)]
    struct Voucher {
        #[prost(bytes = "vec", tag = "1")]
        relay: Vec<u8>,
        #[prost(bytes = "vec", tag = "2")]
        peer: Vec<u8>,
        #[prost(uint64, tag = "3")]
        expiration: u64,
    }
    let relay = Relay::start(&[]);
    let mut alice = Client::connect(&relay).await;
    let reservation = alice.reserve().await.reservation.unwrap();
    let envelope = SignedEnvelope::from_protobuf_encoding(&reservation.voucher.unwrap()).unwrap();
    let (payload, signer) =
        envelope.payload_and_signing_key("libp2p-relay-rsvp".into(), &[0x03, 0x02]).unwrap();
    assert_eq!(signer.to_peer_id(), relay.peer);
    let voucher: Voucher = prost::Message::decode(payload).unwrap();
    assert_eq!(voucher.relay, relay.peer.to_bytes());
    assert_eq!(voucher.peer, alice.peer.to_bytes());
    assert_eq!(Some(voucher.expiration), reservation.expire);
}

#[tokio::test]
async fn announced_addresses_stand_instead_of_those_found() {
    let announced = "/dns4/relay.example.org/tcp/4001";
    let relay = Relay::start(&["--announce", announced]);
    let mut alice = Client::connect(&relay).await;
    let reservation = alice.reserve().await.reservation.unwrap();
    let expected: Multiaddr = format!("{announced}/p2p/{}", relay.peer).parse().unwrap();
    assert_eq!(reservation.addrs, [expected.to_vec()]);
}

#[tokio::test]
async fn a_renewal_is_granted_in_a_full_table_and_a_newcomer_is_not() {
    let relay = Relay::start(&["--max-reservations", "1"]);
    let mut alice = Client::connect(&relay).await;
    let mut bob = Client::connect(&relay).await;
    alice.reserve().await;
    assert_eq!(bob.ask(&reserve()).await.status, RESERVATION_REFUSED);
    alice.reserve().await;
}

#[tokio::test]
async fn an_address_gets_as_many_slots_as_it_may_have() {
    let relay = Relay::start(&["--max-reservations-per-ip", "1"]);
    let mut alice = Client::connect(&relay).await;
    let mut bob = Client::connect(&relay).await;
    alice.reserve().await;
    assert_eq!(bob.ask(&reserve()).await.status, RESERVATION_REFUSED);
}

#[tokio::test]
async fn a_newcomer_takes_the_slot_of_a_peer_that_left() {
    let relay = Relay::start(&["--max-reservations", "1", "--grace", "1h"]);
    let mut alice = Client::connect(&relay).await;
    let mut bob = Client::connect(&relay).await;
    alice.reserve().await;
    let (left, taken) = (alice.peer, bob.peer);
    alice.leave().await;
    relay.wait_for_log(&format!("grace began: peer {left}")).await;
    bob.reserve().await;
    relay.wait_for_log(&format!("slot freed: peer {left} at 127.0.0.1: taken by {taken}")).await;
}

// ---- CONNECT and its refusals

#[tokio::test]
async fn the_target_is_asked_for_the_source_under_the_same_limit() {
    let relay = Relay::start(&[]);
    let (mut alice, mut bob) = source_and_target(&relay).await;
    let mut stops = bob.accept(STOP);
    let request = connect(bob.peer);
    let ((answer, _), (question, _)) =
        tokio::join!(alice.ask_for_circuit(&request), agree(&mut stops));
    assert_eq!((answer.kind, answer.status), (STATUS, Some(100)));
    assert_eq!(question.kind, Some(0));
    let source = question.peer.unwrap();
    assert_eq!(source.id, Some(alice.peer.to_bytes()));
    assert!(source.addrs.is_empty());
    assert_eq!(question.limit, answer.limit);
    assert_eq!(answer.limit.unwrap().data, Some(128 * 1024));
}

#[tokio::test]
async fn without_limits_no_limit_is_told() {
    let relay = Relay::start(&["--circuit-bytes", "0", "--circuit-duration", "0s"]);
    let mut alice = Client::connect(&relay).await;
    let mut bob = Client::connect(&relay).await;
    assert_eq!(bob.reserve().await.limit, None);
    let mut stops = bob.accept(STOP);
    let request = connect(bob.peer);
    let ((answer, _), (question, _)) =
        tokio::join!(alice.ask_for_circuit(&request), agree(&mut stops));
    assert_eq!((answer.limit, question.limit), (None, None));
}

#[tokio::test]
async fn nobody_is_reached_without_a_live_reservation() {
    let void_for_long = "--reservation-ttl=1s --sweep=1h --grace=1h --connect-rate=0";
    let relay = Relay::start(&void_for_long.split(' ').collect::<Vec<_>>());
    let mut alice = Client::connect(&relay).await;
    let stranger = PeerId::random();
    assert_eq!(alice.ask(&connect(stranger)).await.status, NO_RESERVATION);

    // Expired, though no sweep has been by: the relay's own clock says when.
    let mut bob = Client::connect(&relay).await;
    let reserved = Instant::now();
    bob.reserve().await;
    let mut stops = bob.accept(STOP);
    while reserved.elapsed() < PATIENCE {
        let request = connect(bob.peer);
        let asked = alice.ask(&request);
        let answer = tokio::select! {
            answer = asked => answer,
            _ = agree(&mut stops) => continue,
        };
        assert_eq!(answer.status, NO_RESERVATION);
        assert!(reserved.elapsed() >= Duration::from_secs(1));
        return;
    }
    panic!("the reservation never expired");
}

#[tokio::test]
async fn a_slot_in_grace_is_void_until_its_peer_reserves_again() {
    let relay = Relay::start(&["--grace", "1h"]);
    let keypair = libp2p::identity::Keypair::generate_ed25519();
    let connect_bob =
        || Client::connect_as(keypair.clone(), &relay.address, crate::common::Security::Noise);
    let mut alice = Client::connect(&relay).await;
    let mut bob = connect_bob().await;
    bob.reserve().await;
    let bobs_id = bob.peer;
    bob.leave().await;
    relay.wait_for_log("grace began").await;
    assert_eq!(alice.ask(&connect(bobs_id)).await.status, NO_RESERVATION);

    let mut bob = connect_bob().await;
    assert_eq!(alice.ask(&connect(bobs_id)).await.status, NO_RESERVATION);
    bob.reserve().await;
    relay.wait_for_log(&format!("reservation renewed: peer {bobs_id}")).await;
    circuit(&mut alice, &mut bob).await;
}

#[tokio::test]
async fn a_target_that_refuses_or_talks_nonsense_is_a_failed_connection() {
    let relay = Relay::start(&[]);
    let (mut alice, mut bob) = source_and_target(&relay).await;
    let request = connect(bob.peer);

    // It does not speak stop at all.
    assert_eq!(alice.ask(&request).await.status, CONNECTION_FAILED);

    let mut stops = bob.accept(STOP);
    let nonsense = StopMessage { kind: Some(9), ..StopMessage::default() };
    for reply in [stop_status(202), nonsense, StopMessage::default()] {
        let answer_stop = async {
            let (_, mut stream) = within(stops.next()).await.unwrap();
            let _: StopMessage = messages::read(&mut stream).await;
            messages::write(&mut stream, &reply).await;
            stream
        };
        let (answer, _) = tokio::join!(alice.ask(&request), answer_stop);
        assert_eq!(answer.status, CONNECTION_FAILED, "after {reply:?}");
    }

    // It hangs up.
    let (answer, ()) = tokio::join!(alice.ask(&request), async {
        drop(within(stops.next()).await);
    });
    assert_eq!(answer.status, CONNECTION_FAILED);
}

#[tokio::test]
async fn a_target_that_never_answers_is_given_up_after_30_seconds() {
    let relay = Relay::start(&[]);
    let (mut alice, mut bob) = source_and_target(&relay).await;
    let mut stops = bob.accept(STOP);
    let asked = Instant::now();
    let request = connect(bob.peer);
    let (answer, _stalled) = tokio::join!(alice.ask(&request), stops.next());
    assert_eq!(answer.status, CONNECTION_FAILED);
    assert!(asked.elapsed() >= Duration::from_secs(29), "{:?}", asked.elapsed());
}

#[tokio::test]
async fn a_target_that_goes_while_it_is_asked_is_a_failed_connection() {
    let relay = Relay::start(&[]);
    let (mut alice, mut bob) = source_and_target(&relay).await;
    let mut stops = bob.accept(STOP);
    let request = connect(bob.peer);
    let (answer, ()) = tokio::join!(alice.ask(&request), async {
        let _stream = within(stops.next()).await.unwrap();
        bob.leave().await;
    });
    assert_eq!(answer.status, CONNECTION_FAILED);
}

#[tokio::test]
async fn a_source_that_goes_while_its_target_is_asked_leaves_nothing_behind() {
    let relay = Relay::start(&["--max-circuits-per-peer", "1"]);
    let (mut alice, mut bob) = source_and_target(&relay).await;
    let mut carol = Client::connect(&relay).await;
    let mut stops = bob.accept(STOP);
    let mut asked = alice.open(HOP).await;
    messages::write(&mut asked, &connect(bob.peer)).await;
    let mut question = within(stops.next()).await.unwrap().1;
    let _: StopMessage = messages::read(&mut question).await;
    alice.leave().await;
    relay.wait_for_log("circuit refused").await;

    // Bob is asked no longer, and may be asked anew, well before the 30 s are over.
    assert!(read_to_end(&mut question).await.0.is_empty());
    circuit_to(&mut carol, bob.peer, &mut stops).await;
}

#[tokio::test]
async fn circuits_are_limited_in_total() {
    let relay = Relay::start(&["--max-circuits", "1"]);
    let (mut alice, mut bob) = source_and_target(&relay).await;
    let mut carol = Client::connect(&relay).await;
    let mut stops = bob.accept(STOP);
    let ends = circuit_to(&mut alice, bob.peer, &mut stops).await;
    let refused = carol.ask(&connect(bob.peer)).await;
    assert_eq!(refused.status, RESOURCE_LIMIT_EXCEEDED);

    // When it ends there is room again.
    drop(ends);
    relay.wait_for_log("circuit 1 closed").await;
    circuit_to(&mut carol, bob.peer, &mut stops).await;
}

#[tokio::test]
async fn circuits_are_limited_for_source_and_target() {
    let relay = Relay::start(&["--max-circuits-per-peer", "1"]);
    let (mut alice, mut bob) = source_and_target(&relay).await;
    let mut carol = Client::connect(&relay).await;
    carol.reserve().await;
    let _open = circuit(&mut alice, &mut bob).await;
    let from_alice = alice.ask(&connect(carol.peer)).await;
    assert_eq!(from_alice.status, RESOURCE_LIMIT_EXCEEDED);
    let to_bob = carol.ask(&connect(bob.peer)).await;
    assert_eq!(to_bob.status, RESOURCE_LIMIT_EXCEEDED);
    // Bob counts as a source as well.
    let from_bob = bob.ask(&connect(carol.peer)).await;
    assert_eq!(from_bob.status, RESOURCE_LIMIT_EXCEEDED);
}

// ---- What is not understood

#[tokio::test]
async fn what_cannot_be_decoded_is_malformed() {
    let relay = Relay::start(&[]);
    let mut alice = Client::connect(&relay).await;
    let oneself = connect(alice.peer);
    let nobody = HopMessage { peer: None, ..oneself.clone() };
    let no_peer_id = HopMessage {
        peer: Some(messages::Peer { id: Some(b"no peer id".to_vec()), addrs: Vec::new() }),
        ..oneself.clone()
    };
    let no_type = HopMessage { kind: None, ..reserve() };
    let unknown_type = HopMessage { kind: Some(7), ..reserve() };
    for request in [oneself, nobody, no_peer_id, no_type, unknown_type] {
        let answer = alice.ask(&request).await;
        assert_eq!(answer.status, MALFORMED_MESSAGE, "to {request:?}");
    }

    let too_long = [&[0x81, 0x20][..], &[0; 4097]].concat(); // 4097, as a varint
    let far_too_long = [0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x01]; // 2^63
    let no_protobuf = [5, 0xff, 0xff, 0xff, 0xff, 0xff];
    for bytes in [&too_long[..], &far_too_long, &no_protobuf] {
        let answer = alice.say(bytes).await;
        assert_eq!((answer.kind, answer.status), (STATUS, MALFORMED_MESSAGE));
    }
    alice.reserve().await; // and nothing was lost
}

#[tokio::test]
async fn a_message_of_4096_bytes_is_read() {
    let relay = Relay::start(&[]);
    let mut alice = Client::connect(&relay).await;
    let mut request = connect(alice.peer);
    let filler = |length| {
        let mut request = reserve();
        request.peer = Some(messages::Peer { id: None, addrs: vec![vec![0; length]] });
        request
    };
    for length in 4080..4096 {
        if prost::Message::encoded_len(&filler(length)) == 4096 {
            request = filler(length);
        }
    }
    assert_eq!(prost::Message::encoded_len(&request), 4096);
    assert_eq!(alice.ask(&request).await.status, Some(100));
}

#[tokio::test]
async fn a_status_is_not_expected_from_a_client() {
    let relay = Relay::start(&[]);
    let mut alice = Client::connect(&relay).await;
    let status = HopMessage { kind: STATUS, ..HopMessage::default() };
    assert_eq!(alice.ask(&status).await.status, UNEXPECTED_MESSAGE);
}

#[tokio::test]
async fn a_request_that_comes_byte_by_byte_is_served_and_one_that_stalls_costs_one_stream() {
    let relay = Relay::start(&[]);
    let mut alice = Client::connect(&relay).await;
    let mut stalled = alice.open(HOP).await;
    stalled.write_all(&[2]).await.unwrap();
    stalled.flush().await.unwrap();

    let mut slow = alice.open(HOP).await;
    for byte in [2, 0x08, 0x00] {
        slow.write_all(&[byte]).await.unwrap();
        slow.flush().await.unwrap();
        tokio::time::sleep(Duration::from_secs(1)).await; // the slowness that is tested
    }
    let answer: HopMessage = messages::read(&mut slow).await;
    assert_eq!(answer.status, Some(100));

    // Half a minute after it began, the stalled one is closed or reset; the connection stays.
    let (bytes, _) = read_to_end(&mut stalled).await;
    assert!(bytes.is_empty(), "{bytes:?}");
    alice.reserve().await;
}

// ---- Circuits

#[tokio::test]
async fn bytes_pass_both_ways() {
    let relay = Relay::start(&[]);
    let (mut alice, mut bob) = source_and_target(&relay).await;
    let (mut there, mut back) = circuit(&mut alice, &mut bob).await;
    there.write_all(b"over there").await.unwrap();
    there.flush().await.unwrap();
    assert_eq!(read_bytes(&mut back, 10).await, b"over there");
    back.write_all(b"and back").await.unwrap();
    back.flush().await.unwrap();
    assert_eq!(read_bytes(&mut there, 8).await, b"and back");
}

#[tokio::test]
async fn what_is_sent_before_the_answer_belongs_to_the_circuit() {
    let relay = Relay::start(&[]);
    let (mut alice, mut bob) = source_and_target(&relay).await;
    let mut stops = bob.accept(STOP);

    // The source sends right behind its CONNECT, the target right behind its STATUS.
    let mut there = alice.open(HOP).await;
    let request = prost::Message::encode_length_delimited_to_vec(&connect(bob.peer));
    there.write_all(&[&request[..], b"early"].concat()).await.unwrap();
    there.flush().await.unwrap();
    let (_, mut back) = within(stops.next()).await.unwrap();
    let _: StopMessage = messages::read(&mut back).await;
    let agreed = prost::Message::encode_length_delimited_to_vec(&stop_status(100));
    back.write_all(&[&agreed[..], b"bird"].concat()).await.unwrap();
    back.flush().await.unwrap();

    let answer: HopMessage = messages::read(&mut there).await;
    assert_eq!(answer.status, Some(100));
    assert_eq!(read_bytes(&mut back, 5).await, b"early");
    assert_eq!(read_bytes(&mut there, 4).await, b"bird");
}

#[tokio::test]
async fn a_half_close_carries_over_and_the_other_direction_flows_on() {
    let relay = Relay::start(&[]);
    let (mut alice, mut bob) = source_and_target(&relay).await;
    let mut stops = bob.accept(STOP);
    for source_first in [true, false] {
        let (there, back) = circuit_to(&mut alice, bob.peer, &mut stops).await;
        let (mut first, mut second) = if source_first { (there, back) } else { (back, there) };
        first.write_all(b"last words").await.unwrap();
        first.close().await.unwrap();
        let (bytes, end) = read_to_end(&mut second).await;
        assert_eq!(bytes, b"last words");
        assert!(end.is_ok());
        second.write_all(b"and an answer").await.unwrap();
        second.close().await.unwrap();
        let (bytes, end) = read_to_end(&mut first).await;
        assert_eq!(bytes, b"and an answer");
        assert!(end.is_ok());
    }
    relay.wait_for_log("finished; 10 bytes to the target, 13 back").await;
    relay.wait_for_log("finished; 13 bytes to the target, 10 back").await;
}

#[tokio::test]
async fn exactly_the_limit_passes_and_the_next_byte_resets() {
    const LIMIT: usize = 100_000;
    let relay = Relay::start(&["--circuit-bytes", &LIMIT.to_string()]);
    let (mut alice, mut bob) = source_and_target(&relay).await;
    let mut stops = bob.accept(STOP);
    for source_sends in [true, false] {
        let (there, back) = circuit_to(&mut alice, bob.peer, &mut stops).await;
        let (mut sender, mut receiver) = if source_sends { (there, back) } else { (back, there) };
        sender.write_all(&[7; LIMIT]).await.unwrap();
        sender.flush().await.unwrap();
        assert_eq!(read_bytes(&mut receiver, LIMIT).await.len(), LIMIT);

        // The other direction has a limit of its own, and both ends are still connected.
        receiver.write_all(&[8; LIMIT]).await.unwrap();
        receiver.flush().await.unwrap();
        assert_eq!(read_bytes(&mut sender, LIMIT).await.len(), LIMIT);

        sender.write_all(&[7]).await.unwrap();
        sender.flush().await.unwrap();
        for end in [&mut sender, &mut receiver] {
            let (bytes, _) = read_to_end(end).await;
            assert!(bytes.is_empty());
            // Reset, not closed: nothing can be written any more either.
            assert!(within(writable_no_more(end)).await);
        }
    }
    relay.wait_for_log(&format!("data limit; {LIMIT} bytes to the target, {LIMIT} back")).await;
}

#[tokio::test]
async fn the_time_limit_resets_both_ends() {
    let relay = Relay::start(&["--circuit-duration", "2s"]);
    let (mut alice, mut bob) = source_and_target(&relay).await;
    let begun = Instant::now();
    let (mut there, mut back) = circuit(&mut alice, &mut bob).await;
    for end in [&mut there, &mut back] {
        let _ = read_to_end(end).await;
        assert!(begun.elapsed() >= Duration::from_secs(2));
        assert!(within(writable_no_more(end)).await);
    }
    relay.wait_for_log("time limit").await;
}

#[tokio::test]
async fn a_reset_on_one_side_resets_the_other() {
    let relay = Relay::start(&[]);
    let (mut alice, mut bob) = source_and_target(&relay).await;
    let mut stops = bob.accept(STOP);
    for source_resets in [true, false] {
        let (there, back) = circuit_to(&mut alice, bob.peer, &mut stops).await;
        let (resetting, mut other) = if source_resets { (there, back) } else { (back, there) };
        drop(resetting); // unclosed: a reset
        let _ = read_to_end(&mut other).await;
        assert!(within(writable_no_more(&mut other)).await);
    }
    relay.wait_for_log("circuit 2 closed").await;
    assert!(relay.wait_for_log("circuit 1 closed").await.contains("reset"));
}

#[tokio::test]
async fn a_circuit_outlives_the_reservation_and_keeps_its_connections() {
    // Long enough for the circuit to be open by then, on a busy machine.
    let flags = ["--reservation-ttl", "8s", "--idle-timeout", "8s", "--circuit-duration", "0s"];
    let relay = Relay::start(&flags);
    let (mut alice, mut bob) = source_and_target(&relay).await;
    let (mut there, mut back) = circuit(&mut alice, &mut bob).await;
    let mut carol = Client::connect(&relay).await;
    relay.wait_for_log(&format!("slot freed: peer {} at 127.0.0.1: expired", bob.peer)).await;
    carol.wait_for_connections(0).await; // idle, and closed for it
    there.write_all(b"still here").await.unwrap();
    there.flush().await.unwrap();
    assert_eq!(read_bytes(&mut back, 10).await, b"still here");
    drop((there, back));
    alice.wait_for_connections(0).await;
    bob.wait_for_connections(0).await;
}

#[tokio::test]
async fn a_stalled_stream_does_not_keep_a_stranger() {
    let relay = Relay::start(&["--idle-timeout", "2s"]);
    let mut stranger = Client::connect(&relay).await;
    let mut stalled = stranger.open(HOP).await;
    stalled.write_all(&[1]).await.unwrap();
    stalled.flush().await.unwrap();
    stranger.wait_for_connections(0).await;
}

/// Whether the stream takes no more bytes, be it after a few that were still on their way.
async fn writable_no_more(stream: &mut libp2p::Stream) -> bool {
    while stream.write_all(&[0]).await.is_ok() && stream.flush().await.is_ok() {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    true
}
