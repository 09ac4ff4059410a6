//! How circuits and connections end: each with its reason, in the log and in the metrics.

use std::fs;

use crate::common::{
    Client, Relay, circuit,
    client_process::Process,
    http::{ON_ANY_PORT, wait_for_sample},
    messages::{OK, connect},
    source_and_target,
};
use tempfile::TempDir;

/// Waits until this many circuits have ended in this way.
async fn circuits(relay: &Relay, end: &str, expected: u64) {
    let sample = format!("relaylet_circuits_closed_total{{end=\"{end}\"}} {expected}");
    wait_for_sample(relay, &sample).await;
}

/// Waits until this many connections have ended for this reason.
async fn connections(relay: &Relay, reason: &str, expected: u64) {
    let sample = format!("relaylet_connections_closed_total{{reason=\"{reason}\"}} {expected}");
    wait_for_sample(relay, &sample).await;
}

#[tokio::test]
async fn a_client_that_closes_its_connection_has_disconnected() {
    let relay = Relay::start(&[ON_ANY_PORT]);
    for (round, source_leaves) in [true, false].into_iter().enumerate() {
        let (mut source, mut target) = source_and_target(&relay).await;
        let _ends = circuit(&mut source, &mut target).await;
        let closed = format!("closed: {} to {}: disconnected; ", source.peer, target.peer);
        let (leaves, stays) = match source_leaves {
            true => (source, target),
            false => (target, source),
        };
        let connection = format!("closed: peer {}: closed by the peer", leaves.peer);
        leaves.disconnect().await;
        relay.wait_for_log(&closed).await;
        relay.wait_for_log(&connection).await;
        circuits(&relay, "disconnected", round as u64 + 1).await;
        stays.disconnect().await;
    }
    connections(&relay, "closed by the peer", 4).await;
    circuits(&relay, "reset", 0).await;
}

#[tokio::test]
async fn a_client_that_is_killed_has_disconnected_and_one_that_freezes_is_silent() {
    let relay = Relay::start(&[ON_ANY_PORT, "--heartbeat=1s", "--silence=3s", "--grace=1s"]);
    for (signal, end, reason) in
        [("KILL", "disconnected", "closed by the peer"), ("STOP", "silent", "silent")]
    {
        let target = Process::start_and_reserve(&relay.address).await;
        let mut source = Client::connect(&relay).await;
        let (answer, _circuit) = source.request_circuit(&connect(target.peer)).await;
        assert_eq!(answer.status, OK);
        target.signal(signal);
        let closed = format!("closed: {} to {}: {end}; ", source.peer, target.peer);
        relay.wait_for_log(&closed).await;
        relay.wait_for_log(&format!("closed: peer {}: {reason}", target.peer)).await;
        circuits(&relay, end, 1).await;
    }
    connections(&relay, "silent", 1).await;
}

#[tokio::test]
async fn a_circuit_whose_peer_is_denied_ends_as_denied() {
    let folder = TempDir::new().unwrap();
    let file = folder.path().join("relaylet.toml");
    fs::write(&file, "").unwrap();
    let listen = ["--listen=/ip4/127.0.0.1/tcp/0", "--config=relaylet.toml", ON_ANY_PORT];
    let relay = Relay::start_in(folder, &listen);
    let (mut source, mut target) = source_and_target(&relay).await;
    let _ends = circuit(&mut source, &mut target).await;
    fs::write(&file, format!("deny-peer = \"{}\"\n", source.peer)).unwrap();
    relay.signal("HUP");
    let closed = format!("closed: {} to {}: denied; ", source.peer, target.peer);
    relay.wait_for_log(&closed).await;
    circuits(&relay, "denied", 1).await;
}

#[tokio::test]
async fn a_connection_that_the_relay_closes_has_the_relays_reason() {
    let relay = Relay::start(&[ON_ANY_PORT, "--idle-timeout=1s"]);
    let idle = Client::connect(&relay).await;
    relay.wait_for_log(&format!("closed: peer {}: idle", idle.peer)).await;
    connections(&relay, "idle", 1).await;
    let relay = Relay::start(&[ON_ANY_PORT, "--drain=1s"]);
    let drained = Client::connect(&relay).await;
    relay.signal("USR1");
    relay.wait_for_log(&format!("closed: peer {}: draining", drained.peer)).await;
    connections(&relay, "draining", 1).await;
}
