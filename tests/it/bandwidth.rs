//! Circuits under a bandwidth cap: they are slow and nothing blocks, and a new cap applies at once.
//!
//! Fairness is tested by the unit tests of `src/relay/bandwidth.rs` under a virtual clock, and measured by
//! `cargo bench --bench shares` on the program.

use crate::common::{
    Client, Relay, assert_relayed, by_hand::send, circuit, read_bytes, read_to_end,
    running_node::RunningNode, source_and_target,
};
use libp2p::futures::AsyncWriteExt;
use relaylet::{Config, Event};

/// More than a capped circuit transfers within the time limit of a test, and less than a window.
const BULK: usize = 100_000;

#[tokio::test]
async fn a_cap_of_one_byte_per_second_slows_but_blocks_nothing() {
    let mut relay = Relay::start(&["--bandwidth=1", "--circuit-duration=0s"]);
    let (mut alice, mut bob) = source_and_target(&relay).await;
    let (mut there, mut back) = circuit(&mut alice, &mut bob).await;
    there.write_all(b"slow").await.unwrap();
    send(&mut there, &vec![0; BULK]).await;
    assert_eq!(read_bytes(&mut back, 4).await, b"slow");
    // Meanwhile requests are answered, and other circuits are opened.
    bob.reserve().await;
    let mut carol = Client::connect(&relay).await;
    carol.reserve().await;
    let (mut second, mut arrives) = circuit(&mut bob, &mut carol).await;
    assert_relayed(&mut second, &mut arrives, b"!").await;
    // Bytes that wait for bandwidth are dropped when their peer disconnects.
    alice.disconnect().await;
    assert!(read_to_end(&mut back).await.0.len() < BULK);
    relay.signal("INT");
    assert!(relay.wait().success());
}

#[tokio::test]
async fn a_new_cap_applies_to_open_circuits() {
    let mut config = Config::default();
    config.circuit_bytes = 0;
    config.bandwidth_per_peer = 1;
    let mut relay = RunningNode::start(config).await;
    let (mut alice, mut bob) = relay.source_and_target().await;
    let (mut there, mut back) = circuit(&mut alice, &mut bob).await;
    send(&mut there, &vec![7; BULK]).await;
    assert_eq!(read_bytes(&mut back, 1).await, [7]);
    let lift = |config: &mut Config| config.bandwidth_per_peer = 0;
    relay.change(lift).await.unwrap();
    assert_eq!(read_bytes(&mut back, BULK - 1).await, vec![7; BULK - 1]);

    // A new cap, with data in the other direction.
    let slow = |config: &mut Config| config.bandwidth = 1;
    relay.change(slow).await.unwrap();
    send(&mut back, &vec![8; BULK]).await;
    assert_eq!(read_bytes(&mut there, 2).await, [8; 2]);
    alice.disconnect().await;
    let transferred = |event| match event {
        Event::CircuitClosed { transferred, .. } => Some(transferred.to_source),
        _ => None,
    };
    assert!(relay.until(transferred).await < BULK as u64 / 2);
}

#[tokio::test]
async fn both_directions_of_a_circuit_share_the_bandwidth() {
    let relay = Relay::start(&["--bandwidth=20", "--circuit-duration=0s"]);
    let (mut alice, mut bob) = source_and_target(&relay).await;
    let (mut there, mut back) = circuit(&mut alice, &mut bob).await;
    for stream in [&mut there, &mut back] {
        send(stream, &vec![7; BULK]).await;
    }
    // If one direction had priority, the other would wait for all of it.
    let (at_source, at_target) =
        tokio::join!(read_bytes(&mut there, 10), read_bytes(&mut back, 10));
    assert_eq!(at_source.len(), at_target.len());
}
