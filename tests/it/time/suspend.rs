//! The relay is stopped for long and continued: liveness timers are reset, terms and grace are not.
//!
//! The stop is ten times the silence limit, which is ten minutes at the default.

use std::time::{Duration, Instant};

use libp2p::futures::future;
use tokio::time::sleep;

use crate::common::{
    Client, Relay,
    client_process::Process,
    messages::{NO_RESERVATION, OK, connect, reserve},
};

const SILENCE: Duration = Duration::from_secs(3);
const FLAGS: [&str; 3] = ["--heartbeat=1s", "--silence=3s", "--grace=1s"];

#[tokio::test]
async fn a_suspend_of_ten_silence_limits_resets_liveness_timers() {
    const CLIENTS: usize = 20;
    let relay = Relay::start(&FLAGS);
    let clients = (0..CLIENTS).map(|_| Client::connect(&relay));
    let mut clients = future::join_all(clients).await;
    for client in &mut clients {
        client.reserve().await;
    }
    let frozen = Process::start_and_reserve(&relay.address).await;
    frozen.signal("STOP");

    relay.signal("STOP");
    // There is no event to wait for: nothing happens meanwhile.
    sleep(10 * SILENCE).await;
    let continued = Instant::now();
    relay.signal("CONT");
    relay.wait_for_log("process was suspended for").await;

    // Live clients are probed again and answer; the frozen one gets the whole silence limit again.
    let timed_out = format!("peer silent: peer {}", frozen.peer);
    relay.wait_for_log(&timed_out).await;
    assert!(continued.elapsed() >= SILENCE, "{:?}", continued.elapsed());
    for client in &clients {
        relay.wait_for_probes(client.peer, 2).await;
    }
    assert_eq!(relay.count_in_log("peer silent"), 1);
    let freed = format!("slot freed: peer {}", frozen.peer);
    relay.wait_for_log(&freed).await;
    assert_eq!(relay.count_in_log("slot freed"), 1);
}

#[tokio::test]
async fn terms_that_ended_during_a_suspend_are_expired() {
    let relay = Relay::start(&["--max-reservations=2", "--reservation-ttl=4s", "--grace=1s"]);
    let mut holder = Client::connect(&relay).await;
    let mut newcomers = [Client::connect(&relay).await, Client::connect(&relay).await];
    let mut in_grace = Client::connect(&relay).await;
    holder.reserve().await;
    in_grace.reserve().await;
    let began = format!("grace began: peer {}", in_grace.peer);
    in_grace.disconnect().await;
    relay.wait_for_log(&began).await;

    relay.signal("STOP");
    // Longer than term and grace, and too short for the sweep to notice the suspend.
    sleep(Duration::from_secs(5)).await;
    relay.signal("CONT");
    for newcomer in &mut newcomers {
        assert_eq!(newcomer.request(&reserve()).await.status, OK);
    }
    let answer = newcomers[0].request(&connect(holder.peer)).await;
    assert_eq!(answer.status, NO_RESERVATION);
    assert_eq!(relay.count_in_log("slot freed"), 2);
}
