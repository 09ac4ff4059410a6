//! Clients that freeze, and a relay that is suspended: which clients keep their slots, and which lose them.

use std::time::{Duration, Instant};

use crate::common::{
    Client, HOP, Relay, STOP, Security, accept_circuit, assert_relayed,
    by_hand::{self, DATA, RST, SYN},
    client_process::Process,
    messages::{HopMessage, OK, RESERVATION_REFUSED, connect, read, reserve, write},
    read_to_end, within,
};
use libp2p::{futures::future, identity::Keypair};

/// Flags with which a silent peer times out within seconds.
const QUICK: [&str; 6] = ["--heartbeat", "1s", "--silence", "3s", "--grace", "1s"];

/// Flags with which a newcomer waits for the only slot, and its holder is probed at once.
const ONE_SLOT: [&str; 6] =
    ["--max-reservations", "1", "--probe-after", "100ms", "--reserve-rate", "0"];

/// The delay of a late answer: well within the probe's 3 s.
const LATE: Duration = Duration::from_secs(2);

#[tokio::test]
async fn a_frozen_client_loses_its_slot_to_a_newcomer() {
    let relay = Relay::start(&[&QUICK[..], &["--max-reservations", "1"]].concat());
    let frozen = Process::start_and_reserve(&relay.address).await;
    frozen.signal("STOP");
    let timed_out = format!("peer silent: peer {}", frozen.peer);
    relay.wait_for_log(&timed_out).await;
    let freed = format!("slot freed: peer {} at 127.0.0.1: grace over", frozen.peer);
    relay.wait_for_log(&freed).await;
    Client::connect(&relay).await.reserve().await;
}

#[tokio::test]
async fn a_client_that_answers_keeps_its_slot() {
    let relay = Relay::start(&[&QUICK[..], &["--max-reservations", "1"]].concat());
    let quiet = Process::start_and_reserve(&relay.address).await;
    relay.wait_for_probes(quiet.peer, 6).await;
    let refused = Client::connect(&relay).await.request(&reserve()).await;
    assert_eq!(refused.status, RESERVATION_REFUSED);
    assert_eq!(relay.count_in_log("peer silent"), 0);
}

#[tokio::test]
async fn a_client_that_does_not_know_ping_keeps_its_slot() {
    let relay = Relay::start(&[&QUICK[..], &["--max-reservations", "1"]].concat());
    let mut refuses = Client::connect_without_ping(&relay.address).await;
    refuses.reserve().await;
    // It is probed again only after an answer, and its only answer is the refusal.
    relay.wait_for_probes(refuses.peer, 6).await;
    let refused = Client::connect(&relay).await.request(&reserve()).await;
    assert_eq!(refused.status, RESERVATION_REFUSED);
    assert_eq!(relay.count_in_log("peer silent"), 0);
    assert_eq!(relay.count_in_log("grace began"), 0);
}

#[tokio::test]
async fn a_client_that_answers_late_keeps_its_slot() {
    let relay = Relay::start(&["--heartbeat=1s", "--silence=8s", "--sweep=100ms"]);
    let stalled = Process::start_and_reserve(&relay.address).await;
    stalled.signal("STOP");
    relay.wait_for_probes(stalled.peer, 1).await;
    // There is no event to wait for: the delay itself is tested.
    tokio::time::sleep(LATE).await;
    stalled.signal("CONT");
    // It is probed again only after an answer. Seven more probes take over five seconds: without the late answer it
    // would have timed out by then.
    relay.wait_for_probes(stalled.peer, 8).await;
    assert_eq!(relay.count_in_log("peer silent"), 0);
    assert_eq!(relay.count_in_log("grace began"), 0);
}

/// The relay's main promise, with every timer at its default.
#[tokio::test]
async fn a_newcomer_gets_a_slot_12_s_after_all_clients_froze() {
    // A relay that gets no CPU defers timeouts, but hardly three times in a row.
    let mut answers = Vec::new();
    for _ in 0..3 {
        let (status, took) = request_slot_of_a_frozen_client().await;
        println!("a newcomer, 12 s after all clients froze: {status:?} after {took:?}");
        if status == OK {
            return;
        }
        answers.push(status);
    }
    panic!("no slot in {} attempts: {answers:?}", answers.len());
}

/// The status of the newcomer's answer, and how long it took.
async fn request_slot_of_a_frozen_client() -> (Option<i32>, Duration) {
    let relay = Relay::start(&["--max-reservations=2"]);
    let frozen = [
        Process::start_and_reserve(&relay.address).await,
        Process::start_and_reserve(&relay.address).await,
    ];
    let mut newcomer = Client::connect(&relay).await;
    for client in &frozen {
        client.signal("STOP");
    }
    // There is no event to wait for: silence is what is tested.
    tokio::time::sleep(Duration::from_secs(12)).await;
    let start = Instant::now();
    let status = newcomer.request(&reserve()).await.status;
    let took = start.elapsed();
    if status == OK {
        let taken = format!("taken by {}", newcomer.peer);
        relay.wait_for_log(&taken).await;
        assert_eq!(relay.count_in_log("peer silent"), 1, "one newcomer, one slot");
    }
    (status, took)
}

#[tokio::test]
async fn a_newcomer_gets_a_slot_of_a_table_full_of_frozen_clients() {
    let relay = Relay::start(&["--max-reservations=2", "--probe-after=1s", "--reserve-rate=0"]);
    let frozen = [
        Process::start_and_reserve(&relay.address).await,
        Process::start_and_reserve(&relay.address).await,
    ];
    for client in &frozen {
        client.signal("STOP");
    }
    // Refused while the clients have been active too recently to be probed.
    let mut newcomer = Client::connect(&relay).await;
    let granted = async { while newcomer.request(&reserve()).await.status != OK {} };
    within(granted).await;
    relay.wait_for_log(&format!("taken by {}", newcomer.peer)).await;
    // Only as many lose their slots as newcomers wait.
    assert_eq!(relay.count_in_log("peer silent"), 1, "{:#?}", relay.log());
}

#[tokio::test]
async fn a_newcomer_is_refused_by_a_table_full_of_responsive_clients() {
    let relay = Relay::start(&[&ONE_SLOT[..], &["--heartbeat", "0s"]].concat());
    let quiet = Process::start_and_reserve(&relay.address).await;
    let mut newcomer = Client::connect(&relay).await;
    let probed = async {
        while relay.count_in_log(&format!("probe sent: peer {}", quiet.peer)) == 0 {
            assert_eq!(newcomer.request(&reserve()).await.status, RESERVATION_REFUSED);
        }
    };
    within(probed).await;
    assert_eq!(relay.count_in_log("peer silent"), 0);
}

#[tokio::test]
async fn a_client_that_answers_a_probe_after_2_s_keeps_its_slot() {
    let relay = Relay::start(&ONE_SLOT);
    let stalled = Process::start_and_reserve(&relay.address).await;
    stalled.signal("STOP");
    let mut newcomer = Client::connect(&relay).await;
    let refused = async {
        // Refused at once while the holder was recently active, later only after the probe.
        while relay.count_in_log("probe sent") == 0 {
            assert_eq!(newcomer.request(&reserve()).await.status, RESERVATION_REFUSED);
        }
    };
    let wakes = async {
        relay.wait_for_probes(stalled.peer, 1).await;
        // There is no event to wait for: the delay itself is tested.
        tokio::time::sleep(LATE).await;
        stalled.signal("CONT");
    };
    future::join(within(refused), wakes).await;
    assert_eq!(relay.count_in_log("peer silent"), 0);
    assert_eq!(relay.count_in_log("grace began"), 0);
    // Its connection is up, and CONNECT reaches it.
    let answer = newcomer.request(&connect(stalled.peer)).await;
    assert_eq!(answer.status, OK);
}

#[tokio::test]
async fn a_newcomer_with_two_requests_waits_once() {
    let relay = Relay::start(&["--max-reservations", "1", "--probe-after", "0s"]);
    let frozen = Process::start_and_reserve(&relay.address).await;
    frozen.signal("STOP");
    let mut newcomer = Client::connect(&relay).await;
    let granted = async {
        loop {
            let (mut first, mut second) = (newcomer.open(HOP).await, newcomer.open(HOP).await);
            write(&mut first, &reserve()).await;
            relay.wait_for_log("probe sent").await;
            write(&mut second, &reserve()).await;
            let answers: [HopMessage; 2] = [read(&mut first).await, read(&mut second).await];
            match answers.map(|answer| answer.status) {
                [RESERVATION_REFUSED, OK] => return,
                // A relay that gets no CPU defers timeouts.
                statuses => assert_eq!(statuses, [RESERVATION_REFUSED; 2]),
            }
        }
    };
    within(granted).await;
}

#[tokio::test]
async fn a_circuit_ends_when_its_source_freezes() {
    let relay = Relay::start(&QUICK);
    let mut target = Client::connect(&relay).await;
    target.reserve().await;
    let mut stops = target.accept(STOP);
    let source = Process::start_and_connect(&relay.address, target.peer);
    let (source, (_, mut circuit)) = future::join(source, accept_circuit(&mut stops)).await;
    source.signal("STOP");
    let timed_out = format!("peer silent: peer {}", source.peer);
    relay.wait_for_log(&timed_out).await;
    assert!(read_to_end(&mut circuit).await.0.is_empty());
    relay.wait_for_log("circuit 1 closed").await;
    // The target is not affected and keeps its slot.
    assert_eq!(relay.count_in_log("grace began"), 0);
}

#[tokio::test]
async fn a_target_whose_reservation_is_on_a_dead_connection_is_reached_over_its_new_one() {
    let relay = Relay::start(&[]);
    // On the connection over which it holds its slot it is frozen.
    let (mut frozen, mut target) = target_with_two_connections(&relay).await;
    let mut stops = target.accept(STOP);
    let mut source = Client::connect(&relay).await;
    let request = connect(target.peer);
    let (answered, accepted) =
        future::join(source.request_circuit(&request), accept_circuit(&mut stops)).await;
    let ((answer, mut source), (_, mut target)) = (answered, accepted);
    assert_eq!(answer.status, OK, "{answer:?}");
    // The stop stream on the frozen connection is reset; an answer on it now has no effect.
    let mut stop = None;
    loop {
        let frame = by_hand::next_frame(&mut frozen).await.expect("a frame");
        if frame.has(SYN) && frame.kind == DATA && is_stop(&frame.body) {
            stop = Some(frame.stream);
        }
        if frame.has(RST) && Some(frame.stream) == stop {
            break;
        }
    }
    let late = by_hand::data(0, stop.expect("a stop stream"), b"\x04\x08\x01\x20\x64");
    by_hand::send(&mut frozen, &late).await;
    assert_relayed(&mut source, &mut target, b"bytes").await;
    assert_relayed(&mut target, &mut source, b"bytes").await;
    relay.wait_for_log("circuit 1 opened").await; // it may be read later than the bytes
    assert_eq!(relay.count_in_log("peer silent"), 0, "its slot is not moved");
    assert_eq!(relay.count_in_log("circuit 1 opened"), 1);
}

#[tokio::test]
async fn a_target_whose_old_connection_closes_while_it_is_asked_is_reached_over_its_new_one() {
    let relay = Relay::start(&[]);
    let (mut old, mut target) = target_with_two_connections(&relay).await;
    let mut stops = target.accept(STOP);
    let mut source = Client::connect(&relay).await;
    let request = connect(target.peer);
    let closes = async move {
        while !is_stop(&by_hand::next_frame(&mut old).await.expect("a frame").body) {}
    };
    let requested = source.request_circuit(&request);
    let ((answer, _), ..) = future::join3(requested, closes, accept_circuit(&mut stops)).await;
    assert_eq!(answer.status, OK, "{answer:?}");
}

/// A peer's connection over which it holds a slot, and its newer one, over which it does not reserve.
async fn target_with_two_connections(relay: &Relay) -> (by_hand::Channel, Client) {
    let keypair = Keypair::generate_ed25519();
    let mut old = by_hand::muxed_as(relay, &keypair).await;
    assert_eq!(by_hand::reserve(&mut old, 1).await, OK);
    (old, Client::connect_as(keypair, &relay.address, Security::Noise).await)
}

fn is_stop(opening: &[u8]) -> bool {
    String::from_utf8_lossy(opening).contains(STOP.as_ref())
}

#[tokio::test]
async fn a_suspended_relay_times_out_no_peer() {
    const CLIENTS: usize = 20;
    let relay = Relay::start(&QUICK);
    let clients = (0..CLIENTS).map(|_| Client::connect(&relay));
    let mut clients = future::join_all(clients).await;
    for client in &mut clients {
        client.reserve().await;
    }
    relay.signal("STOP");
    // Longer than the silence limit: the relay receives nothing meanwhile.
    tokio::time::sleep(Duration::from_secs(6)).await;
    relay.signal("CONT");
    relay.wait_for_log("process was suspended for").await;
    for client in &clients {
        relay.wait_for_probes(client.peer, 2).await;
    }
    assert_eq!(relay.count_in_log("peer silent"), 0);
    assert_eq!(relay.count_in_log("grace began"), 0);
}
