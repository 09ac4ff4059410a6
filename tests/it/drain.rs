//! How the relay lets go of everyone: by signals, against the running program.

use crate::common::{
    Client, HOP, Relay, circuit,
    messages::{connect, reserve, write},
    read_bytes, read_to_end, source_and_target, within,
};
use libp2p::futures::AsyncWriteExt;

/// Long enough for whatever is to happen before its end.
const LONG: &str = "--drain=10m";

#[tokio::test]
async fn sigterm_closes_who_carries_no_circuit_and_leaves_circuits_their_time() {
    let mut relay = Relay::start(&["--drain=8s", "--circuit-bytes=0"]);
    let (mut alice, mut bob) = source_and_target(&relay).await;
    let mut carol = Client::connect(&relay).await;
    carol.reserve().await;
    let (mut there, mut back) = circuit(&mut alice, &mut bob).await;
    relay.signal("TERM");
    relay.wait_for_log("SIGTERM: draining for 8s, then exiting").await;
    carol.wait_for_connections(0).await;
    // The circuit goes on until the time is over.
    there.write_all(b"still here").await.unwrap();
    there.flush().await.unwrap();
    assert_eq!(read_bytes(&mut back, 10).await, b"still here");
    assert!(read_to_end(&mut back).await.0.is_empty());
    assert!(relay.wait().success());
    relay.wait_for_log("drain timeout reached: closing").await;
}

#[tokio::test]
async fn it_ends_when_the_last_circuit_has_ended() {
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
async fn whoever_asks_is_answered_by_the_end_of_its_connection() {
    let relay = Relay::start(&[LONG]);
    let (mut alice, mut bob) = source_and_target(&relay).await;
    relay.signal("USR1");
    relay.wait_for_log("SIGUSR1: draining").await;
    let mut asked = alice.open(HOP).await;
    write(&mut asked, &reserve()).await;
    assert!(read_to_end(&mut asked).await.0.is_empty());
    alice.wait_for_connections(0).await;
    let mut asked = bob.open(HOP).await;
    write(&mut asked, &connect(alice.peer)).await;
    assert!(read_to_end(&mut asked).await.0.is_empty());
    bob.wait_for_connections(0).await;
}

#[tokio::test]
async fn a_second_signal_ends_it_at_once() {
    for second in ["TERM", "INT"] {
        let mut relay = Relay::start(&[LONG]);
        let _alice = Client::connect(&relay).await;
        relay.signal("TERM");
        relay.wait_for_log("draining").await;
        relay.signal(second);
        assert!(relay.wait().success());
    }
}

#[tokio::test]
async fn sigusr1_drains_without_an_end_and_another_one_resumes() {
    let relay = Relay::start(&[LONG]);
    let mut alice = Client::connect(&relay).await;
    alice.reserve().await;
    relay.signal("USR1");
    relay.wait_for_log("no longer listening").await;
    let port = relay.port();
    let refused = within(tokio::net::TcpStream::connect(("127.0.0.1", port))).await;
    assert!(refused.is_err(), "nobody is taken in");
    relay.signal("USR1");
    relay.wait_for_log("SIGUSR1: admitting clients again").await;
    // On the port that it was given before.
    assert_eq!(relay.next_address(), relay.address);
    Client::connect(&relay).await.reserve().await;
}

#[tokio::test]
async fn it_ends_when_the_last_who_holds_no_slot_is_gone() {
    let mut relay = Relay::start(&[LONG]);
    let alice = Client::connect(&relay).await;
    relay.signal("TERM");
    relay.wait_for_log("draining").await;
    alice.leave().await;
    assert!(relay.wait().success());
    relay.wait_for_log("exiting: no connections are left").await;
}

#[tokio::test]
async fn two_signals_in_one_go_drain_and_resume() {
    let folder = tempfile::tempdir().unwrap();
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let listen = format!("/ip4/127.0.0.1/tcp/{}", free.local_addr().unwrap().port());
    drop(free);
    let relay = Relay::start_in(folder, &["--listen", &listen, LONG]);
    let pid = relay.pid().to_string();
    let twice = format!("kill -USR1 {pid}; kill -USR1 {pid}");
    for _ in 0..20 {
        let status = std::process::Command::new("sh").args(["-c", &twice]).status();
        assert!(status.unwrap().success());
    }
    // Two that come before either was seen are one, so it may be in either state; and either way:
    let states = || {
        let lines = relay.log().into_iter();
        lines.filter(|line| line.contains("SIGUSR1: ")).collect::<Vec<_>>()
    };
    within(async {
        let mut before = 0;
        loop {
            let states = states();
            let last = states.last().map_or("", String::as_str);
            match states.len() == before {
                true if last.contains("admitting clients again") => break,
                true if before > 0 => relay.signal("USR1"),
                _ => {}
            }
            before = states.len();
            tokio::time::sleep(std::time::Duration::from_millis(200)).await;
        }
    })
    .await;
    assert!(!states().iter().any(|line| line.contains("listening failed")));
    Client::connect(&relay).await.reserve().await;
}

#[tokio::test]
async fn with_nobody_there_or_no_time_it_ends_at_once() {
    let mut relay = Relay::start(&[LONG]);
    relay.signal("TERM");
    assert!(relay.wait().success());
    let mut relay = Relay::start(&["--drain=0s"]);
    let _alice = Client::connect(&relay).await;
    relay.signal("TERM");
    assert!(relay.wait().success());
}
