//! Admission of connections when the limits are reached: peers that hold slots have priority.

use crate::common::{
    Client, Relay, STOP, Security, accept_circuit, assert_relayed,
    by_hand::{proposal, send_and_close, tcp},
    circuit,
    messages::{NO_RESERVATION, OK, connect as connect_to},
};
use libp2p::{PeerId, identity::Keypair};

/// Connects, and waits until the relay has logged the connection: the client's handshake ends before the relay's.
async fn connect(relay: &Relay, keypair: &Keypair) -> Client {
    let opened = format!("opened: peer {}", keypair.public().to_peer_id());
    let before = relay.count_in_log(&opened);
    let client = Client::connect_as(keypair.clone(), &relay.address, Security::Noise).await;
    relay.wait_for_count(&opened, before + 1).await;
    client
}

/// Connects a new peer, as above.
async fn connect_new(relay: &Relay) -> Client {
    connect(relay, &Keypair::generate_ed25519()).await
}

/// Waits until the relay has closed this client's connection.
async fn wait_until_closed(relay: &Relay, client: &Client) {
    relay.wait_for_log(&format!("closed: peer {}", client.peer)).await;
}

#[tokio::test]
async fn a_peer_with_a_slot_replaces_the_longest_idle_connection() {
    let relay = Relay::start(&["--max-connections=3", "--idle-timeout=0s"]);
    let owner = Keypair::generate_ed25519();
    let mut holder = connect(&relay, &owner).await;
    holder.reserve().await;
    let gone = format!("closed: peer {}", holder.peer);
    holder.disconnect().await;
    relay.wait_for_log(&gone).await; // into grace

    let mut others = Vec::new();
    for _ in 0..3 {
        others.push(connect_new(&relay).await);
    }
    // A newcomer without a slot is denied once its peer id is known.
    assert_next_is_denied(&relay).await;

    let mut holder = connect(&relay, &owner).await;
    wait_until_closed(&relay, &others[0]).await;
    holder.reserve().await;
    for other in &mut others[1..] {
        other.wait_for_connections(1).await;
        other.reserve().await;
    }
    relay.wait_for_log(&format!("closing connection: peer {}: preempted", others[0].peer)).await;
    // All of them hold a slot now: no connection is closed for a newcomer.
    assert_next_is_denied(&relay).await;
    holder.wait_for_connections(1).await;
}

/// Asserts that a connection of a new peer is denied.
async fn assert_next_is_denied(relay: &Relay) {
    let before = relay.count_in_log("connection denied");
    let (keypair, address) = (Keypair::generate_ed25519(), relay.address.clone());
    let attempt =
        tokio::spawn(async move { Client::connect_as(keypair, &address, Security::Noise).await });
    relay.wait_for_count("connection denied", before + 1).await;
    attempt.abort();
}

#[tokio::test]
async fn a_closed_connection_frees_its_permit() {
    let relay = Relay::start(&["--max-connections=2"]);
    let (first, _second) = (connect_new(&relay).await, connect_new(&relay).await);
    assert_next_is_denied(&relay).await;
    let gone = format!("closed: peer {}", first.peer);
    first.disconnect().await;
    relay.wait_for_log(&gone).await;
    connect_new(&relay).await.reserve().await;
}

#[tokio::test]
async fn pending_handshakes_do_not_use_up_connections() {
    let relay = Relay::start(&["--max-connections=1"]);
    let mut silent = Vec::new();
    for _ in 0..3 {
        silent.push(tcp(&relay).await);
    }
    send_and_close(tcp(&relay).await, &proposal("/noise")).await;
    connect_new(&relay).await.reserve().await;
}

#[tokio::test]
async fn a_peer_with_a_slot_at_its_cap_replaces_its_own_connection_and_keeps_the_slot() {
    let relay = Relay::start(&["--max-connections-per-peer=1"]);
    let owner = Keypair::generate_ed25519();
    let mut before = connect(&relay, &owner).await;
    before.reserve().await;
    let mut bob = connect_new(&relay).await;
    bob.reserve().await;
    let mut alice = connect_new(&relay).await;
    let (mut there, mut back) = circuit(&mut alice, &mut bob).await;

    let mut after = connect(&relay, &owner).await;
    before.wait_for_connections(0).await;
    // The slot moves to the new connection at once, without another RESERVE.
    let (mut to, mut from) = circuit(&mut alice, &mut after).await;
    assert_eq!(relay.count_in_log("grace began"), 0);
    // The other circuit is unaffected.
    for (there, back) in [(&mut there, &mut back), (&mut to, &mut from)] {
        assert_relayed(there, back, b"hello").await;
    }
}

#[tokio::test]
async fn a_peer_without_slot_at_its_cap_is_denied_and_keeps_its_connections() {
    let relay = Relay::start(&["--max-connections-per-peer=1"]);
    let owner = Keypair::generate_ed25519();
    let mut first = connect(&relay, &owner).await;
    let (keypair, address) = (owner.clone(), relay.address.clone());
    let second =
        tokio::spawn(async move { Client::connect_as(keypair, &address, Security::Noise).await });
    relay.wait_for_log("too many connections of the peer").await;
    second.abort();
    first.reserve().await;
    // The denied connection is not counted.
    let gone = format!("closed: peer {}", first.peer);
    first.disconnect().await;
    relay.wait_for_log(&gone).await;
    connect(&relay, &owner).await.reserve().await;
}

#[tokio::test]
async fn a_third_connection_replaces_the_longest_silent_one() {
    let relay = Relay::start(&["--max-connections-per-peer=2"]);
    let mut bob = connect_new(&relay).await;
    bob.reserve().await;
    let mut alice = connect_new(&relay).await;
    let (mut there, mut back) = circuit(&mut alice, &mut bob).await;

    let owner = Keypair::generate_ed25519();
    let mut first = connect(&relay, &owner).await;
    first.reserve().await;
    let mut second = connect(&relay, &owner).await;
    // It was active after the first one, which keeps the slot: the target of this CONNECT does not exist.
    let answer = second.request(&connect_to(PeerId::random())).await;
    assert_eq!(answer.status, NO_RESERVATION, "{answer:?}");

    let mut third = connect(&relay, &owner).await;
    first.wait_for_connections(0).await;
    let mut stops = [second.accept(STOP), third.accept(STOP)];
    let [of_second, of_third] = &mut stops;
    let request = connect_to(third.peer);
    // The stop request goes to whichever of the two has the slot now.
    let either = async {
        tokio::select! {
            (_, stream) = accept_circuit(of_second) => stream,
            (_, stream) = accept_circuit(of_third) => stream,
        }
    };
    let ((answer, mut to), mut from) = tokio::join!(alice.request_circuit(&request), either);
    assert_eq!(answer.status, OK, "{answer:?}");
    assert_eq!(relay.count_in_log("grace began"), 0);
    for (there, back) in [(&mut there, &mut back), (&mut to, &mut from)] {
        assert_relayed(there, back, b"hello").await;
    }
    second.wait_for_connections(1).await;
    assert!(third.kept_its_connection() && alice.kept_its_connection());
    assert!(bob.kept_its_connection());
}

#[tokio::test]
async fn denied_connections_leave_no_counts_behind() {
    // If a denied connection still counted, the next one would exceed the cap of its address.
    let relay =
        Relay::start(&["--max-connections=1", "--max-connections-per-ip=2", "--max-handshakes=1"]);
    let first = connect_new(&relay).await;
    for _ in 0..5 {
        assert_next_is_denied(&relay).await;
    }
    // None was denied by the caps on addresses or handshakes.
    let log = relay.log();
    let mut denied = log.iter().filter(|line| line.contains("connection denied"));
    assert!(denied.all(|line| line.ends_with(": too many connections")), "{log:#?}");
    let gone = format!("closed: peer {}", first.peer);
    first.disconnect().await;
    relay.wait_for_log(&gone).await;
    connect_new(&relay).await.reserve().await;
}
