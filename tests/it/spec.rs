//! The Circuit Relay v2 specification, over real connections to the running program.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use crate::common::{
    Client, HOP, Relay, STOP, Security, TEST_TIMEOUT, accept_circuit, assert_relayed,
    by_hand::send,
    circuit, circuit_to,
    messages::{
        self, CONNECTION_FAILED, HopMessage, MALFORMED_MESSAGE, NO_RESERVATION, OK,
        RESERVATION_REFUSED, RESOURCE_LIMIT_EXCEEDED, StopMessage, UNEXPECTED_MESSAGE, connect,
        reserve, stop_status,
    },
    read_bytes, read_to_end, source_and_target, within,
};
use libp2p::{
    Multiaddr, PeerId,
    core::SignedEnvelope,
    futures::{AsyncWriteExt, StreamExt},
};

const STATUS: Option<i32> = Some(2);

fn unix_now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs()
}

// ---- Reservations

#[tokio::test]
async fn a_reservation_has_expiration_addresses_and_limits() {
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
async fn announced_addresses_replace_discovered_ones() {
    let announced = "/dns4/relay.example.org/tcp/4001";
    let relay = Relay::start(&["--announce", announced]);
    let mut alice = Client::connect(&relay).await;
    let reservation = alice.reserve().await.reservation.unwrap();
    let expected: Multiaddr = format!("{announced}/p2p/{}", relay.peer).parse().unwrap();
    assert_eq!(reservation.addrs, [expected.to_vec()]);
}

#[tokio::test]
async fn a_full_table_grants_renewals_and_refuses_newcomers() {
    let relay = Relay::start(&["--max-reservations", "1"]);
    let mut alice = Client::connect(&relay).await;
    let mut bob = Client::connect(&relay).await;
    alice.reserve().await;
    assert_eq!(bob.request(&reserve()).await.status, RESERVATION_REFUSED);
    alice.reserve().await;
}

#[tokio::test]
async fn slots_are_capped_per_address() {
    let relay = Relay::start(&["--max-reservations-per-ip", "1"]);
    let mut alice = Client::connect(&relay).await;
    let mut bob = Client::connect(&relay).await;
    alice.reserve().await;
    assert_eq!(bob.request(&reserve()).await.status, RESERVATION_REFUSED);
}

#[tokio::test]
async fn a_newcomer_takes_a_slot_in_grace() {
    let relay = Relay::start(&["--max-reservations", "1", "--grace", "1h"]);
    let mut alice = Client::connect(&relay).await;
    let mut bob = Client::connect(&relay).await;
    alice.reserve().await;
    let (in_grace, taken) = (alice.peer, bob.peer);
    alice.disconnect().await;
    relay.wait_for_log(&format!("grace began: peer {in_grace}")).await;
    bob.reserve().await;
    relay
        .wait_for_log(&format!("slot freed: peer {in_grace} at 127.0.0.1: taken by {taken}"))
        .await;
}

// ---- CONNECT and its refusals

#[tokio::test]
async fn the_stop_request_names_the_source_and_the_same_limit() {
    let relay = Relay::start(&[]);
    let (mut alice, mut bob) = source_and_target(&relay).await;
    let mut stops = bob.accept(STOP);
    let request = connect(bob.peer);
    let ((answer, _), (stop_request, _)) =
        tokio::join!(alice.request_circuit(&request), accept_circuit(&mut stops));
    assert_eq!((answer.kind, answer.status), (STATUS, OK));
    assert_eq!(stop_request.kind, Some(0));
    let source = stop_request.peer.unwrap();
    assert_eq!(source.id, Some(alice.peer.to_bytes()));
    assert!(source.addrs.is_empty());
    assert_eq!(stop_request.limit, answer.limit);
    assert_eq!(answer.limit.unwrap().data, Some(128 * 1024));
}

#[tokio::test]
async fn without_limits_no_limit_is_sent() {
    let relay = Relay::start(&["--circuit-bytes", "0", "--circuit-duration", "0s"]);
    let mut alice = Client::connect(&relay).await;
    let mut bob = Client::connect(&relay).await;
    assert_eq!(bob.reserve().await.limit, None);
    let mut stops = bob.accept(STOP);
    let request = connect(bob.peer);
    let ((answer, _), (stop_request, _)) =
        tokio::join!(alice.request_circuit(&request), accept_circuit(&mut stops));
    assert_eq!((answer.limit, stop_request.limit), (None, None));
}

#[tokio::test]
async fn connect_to_a_peer_without_reservation_is_no_reservation() {
    // Alice asks as often as the machine can; a sweep comes long after the reservation expires.
    let relay = Relay::start(&[
        "--reservation-ttl=1s",
        "--sweep=1h",
        "--grace=1h",
        "--connect-rate=0",
        "--stream-rate=0",
    ]);
    let mut alice = Client::connect(&relay).await;
    let unknown = PeerId::random();
    assert_eq!(alice.request(&connect(unknown)).await.status, NO_RESERVATION);

    // Expires without a sweep.
    let mut bob = Client::connect(&relay).await;
    let reserved = Instant::now();
    bob.reserve().await;
    let mut stops = bob.accept(STOP);
    while reserved.elapsed() < TEST_TIMEOUT {
        let request = connect(bob.peer);
        let connecting = alice.request(&request);
        let answer = tokio::select! {
            answer = connecting => answer,
            _ = accept_circuit(&mut stops) => continue,
        };
        assert_eq!(answer.status, NO_RESERVATION);
        assert!(reserved.elapsed() >= Duration::from_secs(1));
        return;
    }
    panic!("the reservation never expired");
}

#[tokio::test]
async fn connect_to_a_peer_in_grace_is_no_reservation() {
    let relay = Relay::start(&["--grace", "1h"]);
    let keypair = libp2p::identity::Keypair::generate_ed25519();
    let connect_bob = || Client::connect_as(keypair.clone(), &relay.address, Security::Noise);
    let mut alice = Client::connect(&relay).await;
    let mut bob = connect_bob().await;
    bob.reserve().await;
    let bobs_id = bob.peer;
    bob.disconnect().await;
    relay.wait_for_log("grace began").await;
    assert_eq!(alice.request(&connect(bobs_id)).await.status, NO_RESERVATION);

    let mut bob = connect_bob().await;
    assert_eq!(alice.request(&connect(bobs_id)).await.status, NO_RESERVATION);
    bob.reserve().await;
    relay.wait_for_log(&format!("reservation renewed: peer {bobs_id}")).await;
    circuit(&mut alice, &mut bob).await;
}

#[tokio::test]
async fn a_refusing_or_malformed_target_is_connection_failed() {
    let relay = Relay::start(&[]);
    let (mut alice, mut bob) = source_and_target(&relay).await;
    let request = connect(bob.peer);

    // It does not support the stop protocol.
    assert_eq!(alice.request(&request).await.status, CONNECTION_FAILED);

    let mut stops = bob.accept(STOP);
    let unknown_kind = StopMessage { kind: Some(9), ..StopMessage::default() };
    for reply in [stop_status(202), unknown_kind, StopMessage::default()] {
        let answer_stop = async {
            let (_, mut stream) = within(stops.next()).await.unwrap();
            let _: StopMessage = messages::read(&mut stream).await;
            messages::write(&mut stream, &reply).await;
            stream
        };
        let (answer, _) = tokio::join!(alice.request(&request), answer_stop);
        assert_eq!(answer.status, CONNECTION_FAILED, "after {reply:?}");
    }

    // It closes the stream.
    let (answer, ()) = tokio::join!(alice.request(&request), async {
        drop(within(stops.next()).await);
    });
    assert_eq!(answer.status, CONNECTION_FAILED);
}

#[tokio::test]
async fn an_unanswered_stop_request_fails_after_30_seconds() {
    let relay = Relay::start(&[]);
    let (mut alice, mut bob) = source_and_target(&relay).await;
    let mut stops = bob.accept(STOP);
    let start = Instant::now();
    let request = connect(bob.peer);
    let (answer, _stalled) = tokio::join!(alice.request(&request), stops.next());
    assert_eq!(answer.status, CONNECTION_FAILED);
    assert!(start.elapsed() >= Duration::from_secs(29), "{:?}", start.elapsed());
}

#[tokio::test]
async fn a_target_that_disconnects_during_the_stop_request_is_connection_failed() {
    let relay = Relay::start(&[]);
    let (mut alice, mut bob) = source_and_target(&relay).await;
    let mut stops = bob.accept(STOP);
    let request = connect(bob.peer);
    let (answer, ()) = tokio::join!(alice.request(&request), async {
        let _stream = within(stops.next()).await.unwrap();
        bob.disconnect().await;
    });
    assert_eq!(answer.status, CONNECTION_FAILED);
}

#[tokio::test]
async fn a_source_that_disconnects_during_the_stop_request_leaves_nothing_behind() {
    let relay = Relay::start(&["--max-circuits-per-peer", "1"]);
    let (mut alice, mut bob) = source_and_target(&relay).await;
    let mut carol = Client::connect(&relay).await;
    let mut stops = bob.accept(STOP);
    let mut request = alice.open(HOP).await;
    messages::write(&mut request, &connect(bob.peer)).await;
    let mut stop_request = within(stops.next()).await.unwrap().1;
    let _: StopMessage = messages::read(&mut stop_request).await;
    alice.disconnect().await;
    relay.wait_for_log("circuit refused").await;

    // The stop request to Bob has ended, and there may be another one well before the 30 s are over.
    assert!(read_to_end(&mut stop_request).await.0.is_empty());
    circuit_to(&mut carol, bob.peer, &mut stops).await;
}

#[tokio::test]
async fn circuits_are_limited_in_total() {
    let relay = Relay::start(&["--max-circuits", "1"]);
    let (mut alice, mut bob) = source_and_target(&relay).await;
    let mut carol = Client::connect(&relay).await;
    let mut stops = bob.accept(STOP);
    let ends = circuit_to(&mut alice, bob.peer, &mut stops).await;
    let refused = carol.request(&connect(bob.peer)).await;
    assert_eq!(refused.status, RESOURCE_LIMIT_EXCEEDED);

    // A circuit that ends makes room for another.
    drop(ends);
    relay.wait_for_log("circuit 1 closed").await;
    circuit_to(&mut carol, bob.peer, &mut stops).await;
}

#[tokio::test]
async fn circuits_are_limited_per_source_and_target() {
    let relay = Relay::start(&["--max-circuits-per-peer", "1"]);
    let (mut alice, mut bob) = source_and_target(&relay).await;
    let mut carol = Client::connect(&relay).await;
    carol.reserve().await;
    let _open = circuit(&mut alice, &mut bob).await;
    let from_alice = alice.request(&connect(carol.peer)).await;
    assert_eq!(from_alice.status, RESOURCE_LIMIT_EXCEEDED);
    let to_bob = carol.request(&connect(bob.peer)).await;
    assert_eq!(to_bob.status, RESOURCE_LIMIT_EXCEEDED);
    // Bob's circuit as a target counts for him as a source, too.
    let from_bob = bob.request(&connect(carol.peer)).await;
    assert_eq!(from_bob.status, RESOURCE_LIMIT_EXCEEDED);
}

// ---- Malformed messages

#[tokio::test]
async fn an_undecodable_message_is_malformed() {
    let relay = Relay::start(&[]);
    let mut alice = Client::connect(&relay).await;
    let oneself = connect(alice.peer);
    let without_peer = HopMessage { peer: None, ..oneself.clone() };
    let no_peer_id = HopMessage {
        peer: Some(messages::Peer { id: Some(b"no peer id".to_vec()), addrs: Vec::new() }),
        ..oneself.clone()
    };
    let no_type = HopMessage { kind: None, ..reserve() };
    let unknown_type = HopMessage { kind: Some(7), ..reserve() };
    for request in [oneself, without_peer, no_peer_id, no_type, unknown_type] {
        let answer = alice.request(&request).await;
        assert_eq!(answer.status, MALFORMED_MESSAGE, "to {request:?}");
    }

    let too_long = [&[0x81, 0x20][..], &[0; 4097]].concat(); // 4097, as a varint
    let far_too_long = [0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x01]; // 2^63
    let no_protobuf = [5, 0xff, 0xff, 0xff, 0xff, 0xff];
    for bytes in [&too_long[..], &far_too_long, &no_protobuf] {
        let answer = alice.send_raw(bytes).await;
        assert_eq!((answer.kind, answer.status), (STATUS, MALFORMED_MESSAGE));
    }
    alice.reserve().await; // the connection is still up
}

#[tokio::test]
async fn a_message_of_4096_bytes_is_accepted() {
    let relay = Relay::start(&[]);
    let mut alice = Client::connect(&relay).await;
    let mut requests = (4080..4096).map(|length| {
        let peer = messages::Peer { id: None, addrs: vec![vec![0; length]] };
        HopMessage { peer: Some(peer), ..reserve() }
    });
    let request = requests.find(|it| prost::Message::encoded_len(it) == 4096).unwrap();
    assert_eq!(alice.request(&request).await.status, OK);
}

#[tokio::test]
async fn a_status_from_a_client_is_unexpected() {
    let relay = Relay::start(&[]);
    let mut alice = Client::connect(&relay).await;
    let status = HopMessage { kind: STATUS, ..HopMessage::default() };
    assert_eq!(alice.request(&status).await.status, UNEXPECTED_MESSAGE);
}

#[tokio::test]
async fn a_slow_request_is_served_and_a_stalled_one_loses_only_its_stream() {
    let relay = Relay::start(&[]);
    let mut alice = Client::connect(&relay).await;
    let mut stalled = alice.open(HOP).await;
    send(&mut stalled, &[2]).await;

    let mut slow = alice.open(HOP).await;
    // All of it within the 5 s that a request may take.
    for byte in [2, 0x08, 0x00] {
        tokio::time::sleep(Duration::from_millis(500)).await;
        send(&mut slow, &[byte]).await;
    }
    let answer: HopMessage = messages::read(&mut slow).await;
    assert_eq!(answer.status, OK);

    // The stalled one is reset after 5 s; the connection stays.
    let (bytes, _) = read_to_end(&mut stalled).await;
    assert!(bytes.is_empty(), "{bytes:?}");
    alice.reserve().await;
}

// ---- Circuits

#[tokio::test]
async fn bytes_are_relayed_in_both_directions() {
    let relay = Relay::start(&[]);
    let (mut alice, mut bob) = source_and_target(&relay).await;
    let (mut there, mut back) = circuit(&mut alice, &mut bob).await;
    assert_relayed(&mut there, &mut back, b"over there").await;
    assert_relayed(&mut back, &mut there, b"and back").await;
}

#[tokio::test]
async fn early_data_is_relayed() {
    let relay = Relay::start(&[]);
    let (mut alice, mut bob) = source_and_target(&relay).await;
    let mut stops = bob.accept(STOP);

    // The source sends data directly after its CONNECT, the target after its STATUS.
    let mut there = alice.open(HOP).await;
    let request = prost::Message::encode_length_delimited_to_vec(&connect(bob.peer));
    send(&mut there, &[&request[..], b"early"].concat()).await;
    let (_, mut back) = within(stops.next()).await.unwrap();
    let _: StopMessage = messages::read(&mut back).await;
    let accepted = prost::Message::encode_length_delimited_to_vec(&stop_status(100));
    send(&mut back, &[&accepted[..], b"bird"].concat()).await;

    let answer: HopMessage = messages::read(&mut there).await;
    assert_eq!(answer.status, OK);
    assert_eq!(read_bytes(&mut back, 5).await, b"early");
    assert_eq!(read_bytes(&mut there, 4).await, b"bird");
}

#[tokio::test]
async fn a_half_close_is_relayed_and_the_other_direction_continues() {
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
async fn exactly_the_byte_limit_is_relayed_and_the_next_byte_resets() {
    const LIMIT: usize = 100_000;
    let relay = Relay::start(&["--circuit-bytes", &LIMIT.to_string()]);
    let (mut alice, mut bob) = source_and_target(&relay).await;
    let mut stops = bob.accept(STOP);
    for source_sends in [true, false] {
        let (there, back) = circuit_to(&mut alice, bob.peer, &mut stops).await;
        let (mut sender, mut receiver) = if source_sends { (there, back) } else { (back, there) };
        send(&mut sender, &[7; LIMIT]).await;
        assert_eq!(read_bytes(&mut receiver, LIMIT).await.len(), LIMIT);

        // Each direction has a limit of its own, and the circuit is still open.
        send(&mut receiver, &[8; LIMIT]).await;
        assert_eq!(read_bytes(&mut sender, LIMIT).await.len(), LIMIT);

        send(&mut sender, &[7]).await;
        for end in [&mut sender, &mut receiver] {
            let (bytes, _) = read_to_end(end).await;
            assert!(bytes.is_empty());
            // It is a reset, not a close: writing fails as well.
            within(write_until_error(end)).await;
        }
    }
    relay.wait_for_log(&format!("data limit; {LIMIT} bytes to the target, {LIMIT} back")).await;
}

#[tokio::test]
async fn the_time_limit_resets_both_ends() {
    let relay = Relay::start(&["--circuit-duration", "2s"]);
    let (mut alice, mut bob) = source_and_target(&relay).await;
    let start = Instant::now();
    let (mut there, mut back) = circuit(&mut alice, &mut bob).await;
    for end in [&mut there, &mut back] {
        let _ = read_to_end(end).await;
        assert!(start.elapsed() >= Duration::from_secs(2));
        within(write_until_error(end)).await;
    }
    relay.wait_for_log("time limit").await;
}

#[tokio::test]
async fn a_reset_is_relayed() {
    let relay = Relay::start(&[]);
    let (mut alice, mut bob) = source_and_target(&relay).await;
    let mut stops = bob.accept(STOP);
    for source_resets in [true, false] {
        let (there, back) = circuit_to(&mut alice, bob.peer, &mut stops).await;
        let (resetting, mut other) = if source_resets { (there, back) } else { (back, there) };
        drop(resetting); // without a close: a reset
        let _ = read_to_end(&mut other).await;
        within(write_until_error(&mut other)).await;
    }
    for closed in ["circuit 1 closed: ", "circuit 2 closed: "] {
        let line = relay.wait_for_log(closed).await;
        assert!(line.contains(": reset: "), "{line}");
    }
}

#[tokio::test]
async fn a_circuit_outlives_the_reservation_and_keeps_its_connections_open() {
    // Long enough for the circuit to be open by then on a busy machine.
    let flags = ["--reservation-ttl", "8s", "--idle-timeout", "8s", "--circuit-duration", "0s"];
    let relay = Relay::start(&flags);
    let (mut alice, mut bob) = source_and_target(&relay).await;
    let (mut there, mut back) = circuit(&mut alice, &mut bob).await;
    let mut carol = Client::connect(&relay).await;
    relay.wait_for_log(&format!("slot freed: peer {} at 127.0.0.1: expired", bob.peer)).await;
    carol.wait_for_connections(0).await; // closed as idle
    assert_relayed(&mut there, &mut back, b"still here").await;
    drop((there, back));
    alice.wait_for_connections(0).await;
    bob.wait_for_connections(0).await;
}

#[tokio::test]
async fn a_stalled_stream_does_not_keep_an_idle_connection_open() {
    let relay = Relay::start(&["--idle-timeout", "2s"]);
    let mut unknown = Client::connect(&relay).await;
    let mut stalled = unknown.open(HOP).await;
    send(&mut stalled, &[1]).await;
    unknown.wait_for_connections(0).await;
}

/// Writes until that fails; some bytes may be accepted before the reset arrives.
async fn write_until_error(stream: &mut libp2p::Stream) {
    while stream.write_all(&[0]).await.is_ok() && stream.flush().await.is_ok() {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}
