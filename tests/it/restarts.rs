//! Clients that exit or crash and come back: what happens to their slots.

use std::time::{Duration, Instant};

use crate::common::{
    Client, Relay,
    client_process::{Process, Role},
    messages::{OK, RESERVATION_REFUSED, connect, reserve},
    within,
};
use libp2p::identity::Keypair;

const SLOTS: usize = 8;

#[tokio::test]
async fn a_killed_client_frees_its_slot() {
    let relay = Relay::start(&["--max-reservations=1"]);
    let killed = Process::start_and_reserve(&relay.address).await;
    killed.signal("KILL");
    let began = format!("grace began: peer {}", killed.peer);
    relay.wait_for_log(&began).await;
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
        let client = reconnect(&relay, &keypair).await;
        client.signal("KILL");
        let began = format!("grace began: peer {}", client.peer);
        relay.wait_for_count(&began, round + 1).await;
    }
    assert_eq!(relay.count_in_log("reservation granted"), 1);
    assert_eq!(relay.count_in_log("reservation renewed"), 5);
    assert_eq!(relay.count_in_log("slot freed"), 0);
}

#[tokio::test]
async fn two_hundred_restarts_with_one_identity_use_one_slot() {
    let relay = Relay::start(&["--max-reservations=1", "--reserve-rate=0"]);
    let keypair = Keypair::generate_ed25519();
    let mut frozen = None;
    for round in 0..200 {
        let client = reconnect(&relay, &keypair).await;
        frozen = kill_or_freeze(client, round);
    }
    drop(frozen);
    assert_eq!(relay.count_in_log("reservation granted"), 1);
    assert_eq!(relay.count_in_log("reservation renewed"), 199);
    assert_eq!(relay.count_in_log("slot freed"), 0);
}

#[tokio::test]
async fn two_hundred_restarts_with_new_identities_share_eight_slots() {
    // Clients start every few hundredths of a second, so the sweep runs as often. Without a heartbeat, the slot of a
    // frozen client is freed only when the relay probes it for a newcomer.
    let flags = "--max-reservations=8 --reserve-rate=0 --probe-after=100ms --probe=1s --sweep=50ms --heartbeat=0s";
    let relay = Relay::start(&flags.split(' ').collect::<Vec<_>>());
    // Frozen clients keep their sockets open until they are dropped here.
    let mut frozen = Vec::new();
    for round in 0..200 {
        let client = start_until_reserved(&relay).await;
        frozen.extend(kill_or_freeze(client, round));
        let reclaimed = frozen.len().saturating_sub(SLOTS + 1);
        frozen.drain(..reclaimed);
    }
    assert_eq!(relay.count_in_log("reservation granted"), 200);
}

/// Clients start at a realistic pace: a frozen one has been silent for the default ten seconds by the time its slot is
/// needed.
#[tokio::test]
async fn restarts_with_new_identities_succeed_with_default_settings() {
    const PACE: Duration = Duration::from_millis(1500);
    let relay = Relay::start(&["--max-reservations=8"]);
    let mut frozen = Vec::new();
    for round in 0..3 * SLOTS {
        let client = start_until_reserved(&relay).await;
        frozen.extend(kill_or_freeze(client, round));
        tokio::time::sleep(PACE).await;
    }
    // The probes were sent for waiting newcomers, and not by the heartbeat, which takes a minute.
    let log = relay.log().into_iter();
    let silences = log.filter_map(|line| {
        let silence = line.split_once("peer silent: ")?.1.split_once("nothing heard for ")?.1;
        silence.trim_end_matches(" s").parse::<u64>().ok()
    });
    let shortest = silences.min().expect("a frozen client lost its slot");
    assert!((10..60).contains(&shortest), "{shortest} s");
}

#[tokio::test]
async fn a_newcomer_to_a_full_table_is_refused_and_no_slot_is_lost() {
    let relay = Relay::start(&["--max-reservations=2", "--probe-after=0s"]);
    let holders = [
        Process::start_and_reserve(&relay.address).await,
        Process::start_and_reserve(&relay.address).await,
    ];
    let mut newcomer = Client::connect(&relay).await;
    let start = Instant::now();
    assert_eq!(newcomer.request(&reserve()).await.status, RESERVATION_REFUSED);
    // The relay takes about a second; js-libp2p gives up 5 s after its dial.
    println!("a newcomer to a full table is refused after {:?}", start.elapsed());
    assert_ne!(relay.count_in_log("probe sent"), 0);
    assert_eq!(relay.count_in_log("peer silent"), 0);
    for holder in holders {
        assert_eq!(newcomer.request(&connect(holder.peer)).await.status, OK);
    }
}

/// Starts new peers until one gets a slot: a relay that gets no CPU defers timeouts and refuses.
async fn start_until_reserved(relay: &Relay) -> Process {
    let attempts = async {
        loop {
            let client = Process::start(&relay.address, Role::default()).await;
            match client.status {
                OK => return client,
                status => assert_eq!(status, RESERVATION_REFUSED),
            }
        }
    };
    within(attempts).await
}

/// Starts a client with this identity, which must get a slot.
async fn reconnect(relay: &Relay, keypair: &Keypair) -> Process {
    let role = Role { keypair: Some(keypair.clone()), ..Role::default() };
    let client = Process::start(&relay.address, role).await;
    assert_eq!(client.status, OK);
    client
}

/// Kills the client in even rounds, so that its connection closes; freezes it in odd ones, so that it stays open.
fn kill_or_freeze(client: Process, round: usize) -> Option<Process> {
    if round.is_multiple_of(2) {
        client.signal("KILL");
        return None;
    }
    client.signal("STOP");
    Some(client)
}
