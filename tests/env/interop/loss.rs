//! A link that loses three packets in ten, and clients that get little CPU time: 60 hosts of go-libp2p that hold slots,
//! with its default settings, with and without newcomers that wait for one, of the program and of the behaviour in
//! another swarm (`embedded`).
//!
//! It takes a minute and a half, and ten with `RELAYLET_NETNS=long`. Connections that hosts close themselves
//! (go-yamux waits 10 s for an answer) are no evictions; their number is printed.

use std::{
    env,
    process::{Command, Stdio},
    time::Duration,
};

use libp2p::Multiaddr;
use tokio::{
    task::spawn_blocking,
    time::{Instant, sleep},
};

use super::{ClientProcess, embedded::embedded, go_client};
use crate::common::{
    network::{Host, Network},
    signal,
};

/// As many as there are hosts in the scenario `holders`.
const HOLDERS: usize = 60;

/// What makes it hard for the holders to answer.
#[derive(Clone, Copy, Debug)]
enum Impairment {
    /// Their link loses this percentage of the packets, in both directions.
    Loss(u8),
    /// Their process is stopped for 1.5 s of every 2 s.
    LittleCpu,
}

#[tokio::test]
#[ignore = "needs Go, root, iproute2 and nftables"]
async fn no_go_client_is_evicted_at_30_percent_loss_while_no_newcomer_waits() {
    assert_eq!(evictions(Impairment::Loss(30), false).await, 0);
}

#[tokio::test]
#[ignore = "needs Go, root, iproute2 and nftables"]
async fn at_most_one_of_60_go_clients_is_evicted_at_30_percent_loss_for_newcomers() {
    assert!(evictions(Impairment::Loss(30), true).await <= 1);
}

#[tokio::test]
#[ignore = "needs Go, root, iproute2 and nftables"]
async fn no_go_client_with_little_cpu_time_is_evicted_while_no_newcomer_waits() {
    assert_eq!(evictions(Impairment::LittleCpu, false).await, 0);
}

#[tokio::test]
#[ignore = "needs Go, root, iproute2 and nftables"]
async fn at_most_one_of_60_go_clients_with_little_cpu_time_is_evicted_for_newcomers() {
    assert!(evictions(Impairment::LittleCpu, true).await <= 1);
}

#[tokio::test]
#[ignore = "needs Go, root, iproute2 and nftables"]
async fn the_behaviour_in_another_swarm_evicts_as_few() {
    let (loss, loss_and_newcomers, cpu, cpu_and_newcomers) = tokio::join!(
        evictions_of(embedded, Impairment::Loss(30), false),
        evictions_of(embedded, Impairment::Loss(30), true),
        evictions_of(embedded, Impairment::LittleCpu, false),
        evictions_of(embedded, Impairment::LittleCpu, true),
    );
    assert_eq!((loss, cpu), (0, 0));
    assert!(loss_and_newcomers <= 1, "{loss_and_newcomers}");
    assert!(cpu_and_newcomers <= 1, "{cpu_and_newcomers}");
}

/// Returns how many of the program's holders are evicted, while newcomers wait or not.
async fn evictions(impairment: Impairment, newcomers_wait: bool) -> usize {
    evictions_of(program, impairment, newcomers_wait).await
}

/// The address of a running relay, and a function that counts the lines of its log that contain a text.
pub type Running = (Multiaddr, Box<dyn Fn(&str) -> usize + Send>);

fn program(host: &Host, slots: usize) -> Running {
    let flags = [&format!("--max-reservations={slots}"), "--max-reservations-per-ip=0"];
    let relay = host.relay(&flags);
    (relay.address.clone(), Box::new(move |text| relay.count_in_log(text)))
}

/// Returns how many of the holders of this kind of relay are evicted.
async fn evictions_of(
    kind: fn(&Host, usize) -> Running,
    impairment: Impairment,
    newcomers_wait: bool,
) -> usize {
    spawn_blocking(go_client).await.expect("it is built");
    let mut network = Network::new();
    let (here, there, elsewhere) = (network.host(), network.host(), network.host());
    let slots = if newcomers_wait { HOLDERS } else { 2 * HOLDERS };
    let (relay, count_in_log) = kind(&here, slots);
    let mut holders = start("holders", &there, &relay);
    let holders = spawn_blocking(|| {
        holders.read_value("reserved");
        holders
    });
    let holders = holders.await.expect("all hold a slot");
    if let Impairment::Loss(percent) = impairment {
        there.lose(percent);
    }
    let newcomers = newcomers_wait.then(|| start("newcomers", &elsewhere, &relay));
    let end = Instant::now() + duration();
    while Instant::now() < end {
        match impairment {
            Impairment::Loss(_) => sleep(Duration::from_secs(1)).await,
            Impairment::LittleCpu => {
                signal(holders.client.id(), "STOP");
                sleep(Duration::from_millis(1500)).await;
                signal(holders.client.id(), "CONT");
                sleep(Duration::from_millis(500)).await;
            }
        }
    }
    let evicted = count_in_log("peer silent: ");
    let (probes, closed) = (count_in_log("probe sent: "), count_in_log("closed by the peer"));
    assert!(probes >= HOLDERS, "{probes}");
    let waited = count_in_log("reservation pending: ");
    assert_eq!(waited > 0, newcomers_wait);
    println!(
        "{impairment:?} for {} s: {evicted} of {HOLDERS} evicted; {probes} probes, {waited} newcomers \
         waited, {closed} connections closed by go-libp2p",
        duration().as_secs()
    );
    spawn_blocking(|| {
        holders.wait_for_success();
        newcomers.map(ClientProcess::wait_for_success)
    })
    .await
    .expect("they end well");
    evicted
}

fn start(scenario: &str, host: &Host, relay: &Multiaddr) -> ClientProcess {
    let prefix = host.command_prefix();
    ClientProcess::start(
        Command::new(&prefix[0])
            .args(&prefix[1..])
            .arg(go_client())
            .args([scenario, &relay.to_string()])
            .stdin(Stdio::piped()),
    )
}

fn duration() -> Duration {
    let is_long = env::var("RELAYLET_NETNS").is_ok_and(|how| how == "long");
    Duration::from_secs(if is_long { 600 } else { 90 })
}
