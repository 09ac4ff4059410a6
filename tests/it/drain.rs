//! Draining and exiting on signals, tested on the running program.

use crate::common::{
    Client, HOP, Relay, assert_relayed, circuit, free_port,
    messages::{connect, reserve, write},
    read_to_end, source_and_target, within,
};
use libp2p::futures::AsyncWriteExt;

/// A drain timeout that no test reaches.
const LONG_DRAIN: &str = "--drain=10m";

/// By default a circuit ends after two minutes, and a slow test may take longer.
const NO_TIME_LIMIT: &str = "--circuit-duration=0s";

#[tokio::test]
async fn sigterm_closes_connections_without_circuits_and_lets_circuits_finish() {
    let mut relay = Relay::start(&["--drain=8s", "--circuit-bytes=0"]);
    let (mut alice, mut bob) = source_and_target(&relay).await;
    let mut carol = Client::connect(&relay).await;
    carol.reserve().await;
    let (mut there, mut back) = circuit(&mut alice, &mut bob).await;
    relay.signal("TERM");
    relay.wait_for_log("SIGTERM: draining for 8s, then exiting").await;
    carol.wait_for_connections(0).await;
    // The circuit stays open until the drain timeout.
    assert_relayed(&mut there, &mut back, b"still here").await;
    assert!(read_to_end(&mut back).await.0.is_empty());
    assert!(relay.wait().success());
    relay.wait_for_log("drain timeout reached: closing 2 connections with 1 circuits").await;
}

#[tokio::test]
async fn the_drain_ends_with_the_last_circuit() {
    let mut relay = Relay::start(&["--drain=60s"]);
    let (mut alice, mut bob) = source_and_target(&relay).await;
    let (mut there, mut back) = circuit(&mut alice, &mut bob).await;
    relay.signal("TERM");
    relay.wait_for_log("draining").await;
    there.close().await.unwrap();
    back.close().await.unwrap();
    for end in [&mut there, &mut back] {
        assert!(read_to_end(end).await.1.is_ok());
    }
    assert!(relay.wait().success());
    relay.wait_for_log("exiting: no connections are left").await;
}

#[tokio::test]
async fn a_request_while_draining_closes_its_connection() {
    let relay = Relay::start(&[LONG_DRAIN]);
    let (mut alice, mut bob) = source_and_target(&relay).await;
    relay.signal("USR1");
    relay.wait_for_log("SIGUSR1: draining").await;
    let mut stream = alice.open(HOP).await;
    write(&mut stream, &reserve()).await;
    assert!(read_to_end(&mut stream).await.0.is_empty());
    alice.wait_for_connections(0).await;
    let mut stream = bob.open(HOP).await;
    write(&mut stream, &connect(alice.peer)).await;
    assert!(read_to_end(&mut stream).await.0.is_empty());
    bob.wait_for_connections(0).await;
}

#[tokio::test]
async fn a_second_signal_exits_at_once() {
    for second in ["TERM", "INT"] {
        let mut relay = Relay::start(&[LONG_DRAIN, NO_TIME_LIMIT]);
        let (mut alice, mut bob) = source_and_target(&relay).await;
        let _ends = circuit(&mut alice, &mut bob).await; // the drain would wait for it
        relay.signal("TERM");
        relay.wait_for_log("draining").await;
        relay.signal(second);
        assert!(relay.wait().success());
        relay.wait_for_log(&format!("exiting: SIG{second}")).await;
    }
}

#[tokio::test]
async fn sigusr1_drains_indefinitely_and_a_second_one_resumes() {
    let relay = Relay::start(&[LONG_DRAIN]);
    let mut alice = Client::connect(&relay).await;
    alice.reserve().await;
    relay.signal("USR1");
    relay.wait_for_log("no longer listening").await;
    let port = relay.port();
    let refused = within(tokio::net::TcpStream::connect(("127.0.0.1", port))).await;
    assert!(refused.is_err(), "no connection is accepted");
    relay.signal("USR1");
    relay.wait_for_log("SIGUSR1: admitting clients again").await;
    // It listens on the same port as before.
    assert_eq!(relay.next_address(), relay.address);
    Client::connect(&relay).await.reserve().await;
}

#[tokio::test]
async fn the_drain_ends_with_the_last_connection_even_without_a_slot() {
    let mut relay = Relay::start(&[LONG_DRAIN]);
    let alice = Client::connect(&relay).await;
    relay.signal("TERM");
    relay.wait_for_log("draining").await;
    alice.disconnect().await;
    assert!(relay.wait().success());
    relay.wait_for_log("exiting: no connections are left").await;
}

#[tokio::test]
async fn signals_in_quick_succession_drain_and_resume() {
    let listen = format!("--listen=/ip4/127.0.0.1/tcp/{}", free_port());
    let relay = Relay::start_listening(&[&listen, LONG_DRAIN]);
    let pid = relay.pid().to_string();
    let twice = format!("kill -USR1 {pid}; kill -USR1 {pid}");
    for _ in 0..20 {
        let status = std::process::Command::new("sh").args(["-c", &twice]).status();
        assert!(status.unwrap().success());
    }
    // Signals that arrive before the previous one was handled are merged, so the relay may be in either state. It has
    // handled all of them once it has handled a later one.
    relay.signal("HUP");
    relay.wait_for_log("SIGHUP: no file to reload").await;
    let lines = ["SIGUSR1: draining", "SIGUSR1: admitting clients again"];
    let [drained, resumed] = lines.map(|line| relay.count_in_log(line));
    if drained > resumed {
        relay.signal("USR1");
        relay.wait_for_count(lines[1], resumed + 1).await;
    }
    assert_eq!(relay.count_in_log("listening failed"), 0);
    Client::connect(&relay).await.reserve().await;
}

#[tokio::test]
async fn without_connections_or_drain_time_sigterm_exits_at_once() {
    let mut relay = Relay::start(&[LONG_DRAIN]);
    relay.signal("TERM");
    assert!(relay.wait().success());
    let mut relay = Relay::start(&["--drain=0s", NO_TIME_LIMIT]);
    let (mut alice, mut bob) = source_and_target(&relay).await;
    let _ends = circuit(&mut alice, &mut bob).await;
    relay.signal("TERM");
    assert!(relay.wait().success());
    relay.wait_for_log("drain timeout reached: closing 2 connections with 1 circuits").await;
}
