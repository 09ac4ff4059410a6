//! Circuits under a bandwidth: slow ones are slow and nothing else, and a new cap holds at once.
//!
//! How fair the shares are is shown by the unit tests of `src/relay/bandwidth.rs`, under a clock of their
//! own, and by `cargo bench --bench shares`, against the program.

use crate::common::{
    Client, Relay, circuit, read_bytes, read_to_end, running::Running, source_and_target,
};
use libp2p::futures::AsyncWriteExt;
use relaylet::{Config, Event};

/// Far more than a slow circuit carries within the patience of these tests, and within a window.
const MUCH: usize = 100_000;

#[tokio::test]
async fn a_byte_a_second_works_slowly_and_hangs_nothing() {
    let mut relay = Relay::start(&["--bandwidth=1", "--circuit-duration=0s"]);
    let (mut alice, mut bob) = source_and_target(&relay).await;
    let (mut there, mut back) = circuit(&mut alice, &mut bob).await;
    there.write_all(b"slow").await.unwrap();
    there.write_all(&vec![0; MUCH]).await.unwrap();
    there.flush().await.unwrap();
    assert_eq!(read_bytes(&mut back, 4).await, b"slow");
    // Meanwhile whoever asks is answered, and other circuits are set up.
    bob.reserve().await;
    let mut carol = Client::connect(&relay).await;
    carol.reserve().await;
    let (mut second, mut arrives) = circuit(&mut bob, &mut carol).await;
    second.write_all(b"!").await.unwrap();
    second.flush().await.unwrap();
    assert_eq!(read_bytes(&mut arrives, 1).await, b"!");
    // What waits for its turn ends with its peer.
    alice.leave().await;
    assert!(read_to_end(&mut back).await.0.len() < MUCH);
    relay.signal("INT");
    assert!(relay.wait().success());
}

#[tokio::test]
async fn a_new_cap_holds_for_circuits_that_are_open() {
    let mut config = Config::default();
    config.circuit_bytes = 0;
    config.bandwidth_per_peer = 1;
    let mut relay = Running::start(config).await;
    let mut alice = relay.connect_somebody().await;
    let mut bob = relay.connect_somebody().await;
    bob.reserve().await;
    let (mut there, mut back) = circuit(&mut alice, &mut bob).await;
    there.write_all(&vec![7; MUCH]).await.unwrap();
    there.flush().await.unwrap();
    assert_eq!(read_bytes(&mut back, 1).await, [7]);
    let lift = |config: &mut Config| config.bandwidth_per_peer = 0;
    relay.change(lift).await.unwrap();
    assert_eq!(read_bytes(&mut back, MUCH - 1).await, vec![7; MUCH - 1]);

    // And the other way round, in the other direction.
    let slow = |config: &mut Config| config.bandwidth = 1;
    relay.change(slow).await.unwrap();
    back.write_all(&vec![8; MUCH]).await.unwrap();
    back.flush().await.unwrap();
    assert_eq!(read_bytes(&mut there, 2).await, [8; 2]);
    alice.leave().await;
    let carried = |event| match event {
        Event::CircuitClosed { transferred, .. } => Some(transferred.to_source),
        _ => None,
    };
    assert!(relay.until(carried).await < MUCH as u64 / 2);
}

#[tokio::test]
async fn both_ways_of_a_circuit_take_turns() {
    let relay = Relay::start(&["--bandwidth=20", "--circuit-duration=0s"]);
    let (mut alice, mut bob) = source_and_target(&relay).await;
    let (mut there, mut back) = circuit(&mut alice, &mut bob).await;
    for stream in [&mut there, &mut back] {
        stream.write_all(&vec![7; MUCH]).await.unwrap();
        stream.flush().await.unwrap();
    }
    // With one in front of the other, the second would wait for all of the first.
    let (at_source, at_target) =
        tokio::join!(read_bytes(&mut there, 10), read_bytes(&mut back, 10));
    assert_eq!(at_source.len(), at_target.len());
}
