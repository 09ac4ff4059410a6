//! Clients that end and come back, well or badly: what becomes of their slots.

use std::time::{Duration, Instant};

use crate::common::{
    Client, Relay,
    messages::{connect, reserve},
    process::{Process, Role},
    within,
};
use libp2p::identity::Keypair;

const OK: Option<i32> = Some(100);
const RESERVATION_REFUSED: Option<i32> = Some(200);

const SLOTS: usize = 8;

#[tokio::test]
async fn a_client_that_is_killed_makes_room_for_the_next() {
    let relay = Relay::start(&["--max-reservations=1"]);
    let killed = Process::that_reserves(&relay.address).await;
    killed.signal("KILL");
    let left = format!("grace began: peer {}", killed.peer);
    relay.wait_for_log(&left).await;
    let mut next = Client::connect(&relay).await;
    next.reserve().await;
    let taken = format!("taken by {}", next.peer);
    relay.wait_for_log(&taken).await;
}

#[tokio::test]
async fn a_client_that_flaps_within_grace_keeps_its_slot() {
    let relay = Relay::start(&["--max-reservations=2"]);
    let keypair = Keypair::generate_ed25519();
    for round in 0..=5 {
        let client = come_back(&relay, &keypair).await;
        client.signal("KILL");
        let left = format!("grace began: peer {}", client.peer);
        until_said(&relay, &left, round + 1).await;
    }
    assert_eq!(said(&relay, "reservation granted"), 1);
    assert_eq!(said(&relay, "reservation renewed"), 5);
    assert_eq!(said(&relay, "slot freed"), 0);
}

#[tokio::test]
async fn two_hundred_restarts_under_one_identity_take_one_slot() {
    let relay = Relay::start(&["--max-reservations=1", "--reserve-rate=0"]);
    let keypair = Keypair::generate_ed25519();
    let mut frozen = None;
    for round in 0..200 {
        let client = come_back(&relay, &keypair).await;
        frozen = end(client, round);
    }
    drop(frozen);
    assert_eq!(said(&relay, "reservation granted"), 1);
    assert_eq!(said(&relay, "reservation renewed"), 199);
    assert_eq!(said(&relay, "slot freed"), 0);
}

#[tokio::test]
async fn two_hundred_restarts_under_new_identities_go_through_eight_slots() {
    // These come every few hundredths of a second, so the relay looks as often.
    // Without a heartbeat, the slot of a frozen client is free only if the relay probes it for a newcomer.
    let flags = "--max-reservations=8 --reserve-rate=0 --probe-after=100ms --probe=1s --sweep=50ms --heartbeat=0s";
    let relay = Relay::start(&flags.split(' ').collect::<Vec<_>>());
    // Nobody hears of those that are frozen, but their sockets are open as long as they are here.
    let mut frozen = Vec::new();
    for round in 0..200 {
        let client = gets_a_slot(&relay).await;
        frozen.extend(end(client, round));
        let since_reclaimed = frozen.len().saturating_sub(SLOTS + 1);
        frozen.drain(..since_reclaimed);
    }
    assert_eq!(said(&relay, "reservation granted"), 200);
}

/// At the pace of a client that takes a moment to start, so that whoever was frozen has been silent
/// for the default ten seconds by the time its slot is wanted.
#[tokio::test]
async fn restarts_under_new_identities_get_through_with_every_default_on() {
    const PACE: Duration = Duration::from_millis(1500);
    let relay = Relay::start(&["--max-reservations=8"]);
    let mut frozen = Vec::new();
    for round in 0..3 * SLOTS {
        let client = gets_a_slot(&relay).await;
        frozen.extend(end(client, round));
        tokio::time::sleep(PACE).await;
    }
    // Probed because a newcomer waited, and not by the heartbeat, which takes a minute.
    let log = relay.log().into_iter();
    let silences = log.filter_map(|line| {
        let silence = line.split_once("peer silent: ")?.1.split_once("nothing heard for ")?.1;
        silence.trim_end_matches(" s").parse::<u64>().ok()
    });
    let shortest = silences.min().expect("a frozen client lost its slot");
    assert!((10..60).contains(&shortest), "{shortest} s");
}

#[tokio::test]
async fn a_newcomer_to_a_full_table_is_refused_and_nobody_is_harmed() {
    let relay = Relay::start(&["--max-reservations=2", "--probe-after=0s"]);
    let holders = [
        Process::that_reserves(&relay.address).await,
        Process::that_reserves(&relay.address).await,
    ];
    let mut newcomer = Client::connect(&relay).await;
    let start = Instant::now();
    assert_eq!(newcomer.ask(&reserve()).await.status, RESERVATION_REFUSED);
    // The relay's own time is a second or so; js-libp2p waits 5 s from its dial on.
    println!("a newcomer to a full table is refused after {:?}", start.elapsed());
    assert_ne!(said(&relay, "probe sent"), 0);
    assert_eq!(said(&relay, "peer silent"), 0);
    for holder in holders {
        assert_eq!(newcomer.ask(&connect(holder.peer)).await.status, OK);
    }
}

/// A new peer, with a slot. A relay that is starved of time judges nobody in it, so one that is refused makes room
/// for another.
async fn gets_a_slot(relay: &Relay) -> Process {
    let tried = async {
        loop {
            let client = Process::start(&relay.address, Role::default()).await;
            match client.status {
                OK => return client,
                status => assert_eq!(status, RESERVATION_REFUSED),
            }
        }
    };
    within(tried).await
}

/// The owner of `keypair`, with its slot.
async fn come_back(relay: &Relay, keypair: &Keypair) -> Process {
    let role = Role { keypair: Some(keypair.clone()), ..Role::default() };
    let client = Process::start(&relay.address, role).await;
    assert_eq!(client.status, OK);
    client
}

/// Every other time the client is killed, and its kernel says so; else it freezes, and nobody does.
fn end(client: Process, round: usize) -> Option<Process> {
    if round.is_multiple_of(2) {
        client.signal("KILL");
        return None;
    }
    client.signal("STOP");
    Some(client)
}

fn said(relay: &Relay, text: &str) -> usize {
    let log = relay.log();
    log.iter().filter(|line| line.contains(text)).count()
}

async fn until_said(relay: &Relay, text: &str, times: usize) {
    let count = async {
        while said(relay, text) < times {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    within(count).await;
}
