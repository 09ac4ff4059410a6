//! Clients that freeze, and a relay that does: who keeps its slot, and who loses it.

use std::time::{Duration, Instant};

use crate::common::{
    Client, HOP, Relay, STOP, Security, agree,
    by_hand::{self, DATA, RST, SYN},
    messages::{HopMessage, connect, read, reserve, write},
    process::Process,
    read_bytes, read_to_end, within,
};
use libp2p::{PeerId, futures::future, identity::Keypair};

const OK: Option<i32> = Some(100);
const RESERVATION_REFUSED: Option<i32> = Some(200);

/// Judged within seconds.
const QUICK: [&str; 6] = ["--heartbeat", "1s", "--silence", "3s", "--grace", "1s"];

/// Where a newcomer waits for the one slot, and its holder is asked at once.
const ONE_SLOT: [&str; 6] =
    ["--max-reservations", "1", "--probe-after", "100ms", "--reserve-rate", "0"];

/// How late an answer comes that is late: of the probe's 3 s a good part, and not too much.
const LATE: Duration = Duration::from_secs(2);

#[tokio::test]
async fn a_client_that_freezes_loses_its_slot_to_the_next() {
    let relay = Relay::start(&[&QUICK[..], &["--max-reservations", "1"]].concat());
    let frozen = Process::that_reserves(&relay.address).await;
    frozen.signal("STOP");
    let judged = format!("peer silent: peer {}", frozen.peer);
    relay.wait_for_log(&judged).await;
    let freed = format!("slot freed: peer {} at 127.0.0.1: grace over", frozen.peer);
    relay.wait_for_log(&freed).await;
    Client::connect(&relay).await.reserve().await;
}

#[tokio::test]
async fn a_client_that_answers_keeps_its_slot() {
    let relay = Relay::start(&[&QUICK[..], &["--max-reservations", "1"]].concat());
    let quiet = Process::that_reserves(&relay.address).await;
    asked_times(&relay, quiet.peer, 6).await;
    let refused = Client::connect(&relay).await.ask(&reserve()).await;
    assert_eq!(refused.status, RESERVATION_REFUSED);
    assert!(!says(&relay, "peer silent"));
}

#[tokio::test]
async fn a_client_that_does_not_know_ping_keeps_its_slot() {
    let relay = Relay::start(&[&QUICK[..], &["--max-reservations", "1"]].concat());
    let mut refuses = Client::connect_without_ping(&relay.address).await;
    refuses.reserve().await;
    // It is asked anew only once something came back, and nothing does but its refusal.
    asked_times(&relay, refuses.peer, 6).await;
    let refused = Client::connect(&relay).await.ask(&reserve()).await;
    assert_eq!(refused.status, RESERVATION_REFUSED);
    assert!(!says(&relay, "peer silent"));
    assert!(!says(&relay, "grace began"));
}

#[tokio::test]
async fn a_client_that_answers_late_keeps_its_slot() {
    let relay = Relay::start(&["--heartbeat=1s", "--silence=8s", "--sweep=100ms"]);
    let stalled = Process::that_reserves(&relay.address).await;
    stalled.signal("STOP");
    asked_times(&relay, stalled.peer, 1).await;
    // No event to wait for: that it is late is what is tested.
    tokio::time::sleep(LATE).await;
    stalled.signal("CONT");
    // It is asked anew only once it has answered. Seven times take more than five seconds: it would
    // have been judged by now, had its silence gone on.
    asked_times(&relay, stalled.peer, 8).await;
    assert!(!says(&relay, "peer silent"));
    assert!(!says(&relay, "grace began"));
}

/// What this relay is for: with every timer at its default, and the first time that it asks.
#[tokio::test]
async fn a_newcomer_to_a_table_that_froze_12_s_ago_has_a_slot() {
    // A relay that is starved of time judges nobody in it, but it is not starved each time.
    let mut answers = Vec::new();
    for _ in 0..3 {
        let (status, took) = ask_for_the_slot_of_a_frozen_client().await;
        println!("a newcomer to a table that froze 12 s ago: {status:?} after {took:?}");
        if status == OK {
            return;
        }
        answers.push(status);
    }
    panic!("not once: {answers:?}");
}

/// How the newcomer is answered, and how long that takes.
async fn ask_for_the_slot_of_a_frozen_client() -> (Option<i32>, Duration) {
    let relay = Relay::start(&["--max-reservations=2"]);
    let frozen = [
        Process::that_reserves(&relay.address).await,
        Process::that_reserves(&relay.address).await,
    ];
    let mut newcomer = Client::connect(&relay).await;
    for client in &frozen {
        client.signal("STOP");
    }
    // There is no event to wait for: that nothing is heard is the point.
    tokio::time::sleep(Duration::from_secs(12)).await;
    let asked = Instant::now();
    let status = newcomer.ask(&reserve()).await.status;
    let took = asked.elapsed();
    if status == OK {
        let taken = format!("taken by {}", newcomer.peer);
        relay.wait_for_log(&taken).await;
        assert_eq!(said(&relay, "peer silent"), 1, "one newcomer, one slot");
    }
    (status, took)
}

#[tokio::test]
async fn a_newcomer_to_a_table_full_of_frozen_clients_gets_a_slot() {
    let relay = Relay::start(&["--max-reservations=2", "--probe-after=1s", "--reserve-rate=0"]);
    let frozen = [
        Process::that_reserves(&relay.address).await,
        Process::that_reserves(&relay.address).await,
    ];
    for client in &frozen {
        client.signal("STOP");
    }
    // Refused for as long as they were heard of lately.
    let mut newcomer = Client::connect(&relay).await;
    let granted = async { while newcomer.ask(&reserve()).await.status != OK {} };
    within(granted).await;
    relay.wait_for_log(&format!("taken by {}", newcomer.peer)).await;
    // One of them lost its slot: as many as newcomers waited.
    assert_eq!(said(&relay, "peer silent"), 1, "{:#?}", relay.log());
}

#[tokio::test]
async fn a_newcomer_to_a_table_full_of_clients_that_answer_is_refused() {
    let relay = Relay::start(&[&ONE_SLOT[..], &["--heartbeat", "0s"]].concat());
    let quiet = Process::that_reserves(&relay.address).await;
    let mut newcomer = Client::connect(&relay).await;
    while !says(&relay, &format!("probe sent: peer {}", quiet.peer)) {
        let refused = within(newcomer.ask(&reserve())).await;
        assert_eq!(refused.status, RESERVATION_REFUSED);
    }
    assert!(!says(&relay, "peer silent"));
}

#[tokio::test]
async fn a_client_that_answers_after_2_s_of_the_probe_keeps_its_slot() {
    let relay = Relay::start(&ONE_SLOT);
    let stalled = Process::that_reserves(&relay.address).await;
    stalled.signal("STOP");
    let mut newcomer = Client::connect(&relay).await;
    let refused = async {
        // Silent for a moment at first, for long enough then.
        while !says(&relay, "probe sent") {
            assert_eq!(newcomer.ask(&reserve()).await.status, RESERVATION_REFUSED);
        }
    };
    let wakes = async {
        asked_times(&relay, stalled.peer, 1).await;
        // No event to wait for: that it is late is what is tested.
        tokio::time::sleep(LATE).await;
        stalled.signal("CONT");
    };
    future::join(within(refused), wakes).await;
    assert!(!says(&relay, "peer silent"));
    assert!(!says(&relay, "grace began"));
    // It is there, and can be reached.
    let answer = newcomer.ask(&connect(stalled.peer)).await;
    assert_eq!(answer.status, OK);
}

#[tokio::test]
async fn a_newcomer_that_asks_twice_waits_once() {
    let relay = Relay::start(&["--max-reservations", "1", "--probe-after", "0s"]);
    let frozen = Process::that_reserves(&relay.address).await;
    frozen.signal("STOP");
    let mut newcomer = Client::connect(&relay).await;
    loop {
        let (mut first, mut second) = (newcomer.open(HOP).await, newcomer.open(HOP).await);
        write(&mut first, &reserve()).await;
        relay.wait_for_log("probe sent").await;
        write(&mut second, &reserve()).await;
        let answers: [HopMessage; 2] = [read(&mut first).await, read(&mut second).await];
        match answers.map(|answer| answer.status) {
            [RESERVATION_REFUSED, OK] => return,
            // A relay that is starved of time judges nobody in it.
            statuses => assert_eq!(statuses, [RESERVATION_REFUSED; 2]),
        }
    }
}

#[tokio::test]
async fn a_circuit_whose_source_freezes_ends() {
    let relay = Relay::start(&QUICK);
    let mut target = Client::connect(&relay).await;
    target.reserve().await;
    let mut stops = target.accept(STOP);
    let source = Process::that_connects(&relay.address, target.peer);
    let (source, (_, mut circuit)) = future::join(source, agree(&mut stops)).await;
    source.signal("STOP");
    let judged = format!("peer silent: peer {}", source.peer);
    relay.wait_for_log(&judged).await;
    assert!(read_to_end(&mut circuit).await.0.is_empty());
    relay.wait_for_log("circuit 1 closed").await;
    // The target is well, and keeps its slot.
    assert!(!says(&relay, "grace began"));
}

#[tokio::test]
async fn a_target_whose_reservation_is_on_a_dead_connection_is_reached_over_its_new_one() {
    let relay = Relay::start(&[]);
    let keypair = Keypair::generate_ed25519();
    // It holds its slot over a connection on which it is frozen, and does not reserve over the other one.
    let mut frozen = by_hand::muxed_as(&relay, &keypair).await;
    assert_eq!(by_hand::reserve(&mut frozen, 1).await, OK);
    let mut target = Client::connect_as(keypair, &relay.address, Security::Noise).await;
    let mut stops = target.accept(STOP);
    let mut source = Client::connect(&relay).await;
    let question = connect(target.peer);
    let (asked, agreed) = future::join(source.ask_for_circuit(&question), agree(&mut stops)).await;
    let ((answer, mut source), (_, mut target)) = (asked, agreed);
    assert_eq!(answer.status, OK, "{answer:?}");
    // The stream over the dead one was asked on, and is reset; what is said there now comes to nothing.
    let mut stop = None;
    loop {
        let frame = by_hand::next_frame(&mut frozen).await.expect("it is up");
        if frame.has(SYN) && frame.kind == DATA && is_stop(&frame.body) {
            stop = Some(frame.stream);
        }
        if frame.has(RST) && Some(frame.stream) == stop {
            break;
        }
    }
    let late = by_hand::data(0, stop.expect("it was asked"), b"\x04\x08\x01\x20\x64");
    by_hand::send(&mut frozen, &late).await;
    for (from, to) in [(0, 1), (1, 0)] {
        let mut ends = [&mut source, &mut target];
        by_hand::send(&mut ends[from], b"bytes").await;
        assert_eq!(read_bytes(ends[to], 5).await, b"bytes");
    }
    assert!(!says(&relay, "peer silent"), "its slot is where it was");
    assert_eq!(said(&relay, "circuit 1 opened"), 1);
}

fn is_stop(opening: &[u8]) -> bool {
    String::from_utf8_lossy(opening).contains(STOP.as_ref())
}

#[tokio::test]
async fn a_relay_that_stood_still_judges_nobody() {
    const CLIENTS: usize = 20;
    let relay = Relay::start(&QUICK);
    let clients = (0..CLIENTS).map(|_| Client::connect(&relay));
    let mut clients = future::join_all(clients).await;
    for client in &mut clients {
        client.reserve().await;
    }
    relay.signal("STOP");
    // Longer than the silence limit: nobody could be heard meanwhile.
    tokio::time::sleep(Duration::from_secs(6)).await;
    relay.signal("CONT");
    relay.wait_for_log("process was suspended for").await;
    for client in &clients {
        asked_times(&relay, client.peer, 2).await;
    }
    assert!(!says(&relay, "peer silent"));
    assert!(!says(&relay, "grace began"));
}

fn says(relay: &Relay, text: &str) -> bool {
    said(relay, text) > 0
}

/// In how many lines of its log it says so.
fn said(relay: &Relay, text: &str) -> usize {
    let log = relay.log();
    log.iter().filter(|line| line.contains(text)).count()
}

/// Waits until a peer has been probed so many times.
async fn asked_times(relay: &Relay, peer: PeerId, times: usize) {
    let asked = format!("probe sent: peer {peer}");
    let count = async {
        while said(relay, &asked) < times {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    within(count).await;
}
