//! The relay is stopped for long and goes on: silences start anew, terms do not.
//!
//! Ten times as long as it takes to be judged, as ten minutes are with every timer at its default.

use std::time::{Duration, Instant};

use libp2p::futures::future;
use tokio::time::sleep;

use crate::common::{
    Client, Relay,
    messages::{connect, reserve},
    process::Process,
    within,
};

const OK: Option<i32> = Some(100);
const NO_RESERVATION: Option<i32> = Some(204);

const SILENCE: Duration = Duration::from_secs(3);
const FLAGS: [&str; 3] = ["--heartbeat=1s", "--silence=3s", "--grace=1s"];

#[tokio::test]
async fn for_ten_silences_and_each_has_a_whole_one_again() {
    const CLIENTS: usize = 20;
    let relay = Relay::start(&FLAGS);
    let clients = (0..CLIENTS).map(|_| Client::connect(&relay));
    let mut clients = future::join_all(clients).await;
    for client in &mut clients {
        client.reserve().await;
    }
    let frozen = Process::that_reserves(&relay.address).await;
    frozen.signal("STOP");

    relay.signal("STOP");
    // No event to wait for: that none comes is what is tested.
    sleep(10 * SILENCE).await;
    let goes_on = Instant::now();
    relay.signal("CONT");
    relay.wait_for_log("process was suspended for").await;

    // Who is there is asked again, and answers; who froze with the relay has all of its time again.
    let judged = format!("peer silent: peer {}", frozen.peer);
    relay.wait_for_log(&judged).await;
    assert!(goes_on.elapsed() >= SILENCE, "{:?}", goes_on.elapsed());
    for client in &clients {
        let asked = format!("probe sent: peer {}", client.peer);
        let twice = async {
            while relay.count_in_log(&asked) < 2 {
                sleep(Duration::from_millis(20)).await;
            }
        };
        within(twice).await;
    }
    assert_eq!(relay.count_in_log("peer silent"), 1);
    let freed = format!("slot freed: peer {}", frozen.peer);
    relay.wait_for_log(&freed).await;
    assert_eq!(relay.count_in_log("slot freed"), 1);
}

#[tokio::test]
async fn and_what_was_over_meanwhile_is_over() {
    let relay = Relay::start(&["--max-reservations=2", "--reservation-ttl=2s", "--grace=1s"]);
    let mut holder = Client::connect(&relay).await;
    let mut newcomers = [Client::connect(&relay).await, Client::connect(&relay).await];
    let mut away = Client::connect(&relay).await;
    holder.reserve().await;
    away.reserve().await;
    let began = format!("grace began: peer {}", away.peer);
    away.leave().await;
    relay.wait_for_log(&began).await;

    relay.signal("STOP");
    // Longer than both, and no longer than sweeps may be apart: nothing tells the relay.
    sleep(Duration::from_secs(5)).await;
    relay.signal("CONT");
    for newcomer in &mut newcomers {
        assert_eq!(newcomer.ask(&reserve()).await.status, OK);
    }
    let answer = newcomers[0].ask(&connect(holder.peer)).await;
    assert_eq!(answer.status, NO_RESERVATION);
    assert_eq!(relay.count_in_log("slot freed"), 2);
}
