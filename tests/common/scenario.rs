//! A scenario with one of each event that a relay counts: slots granted, renewed, refused and freed, circuits with
//! each end, a malformed request.

use libp2p::{
    PeerId, Stream,
    futures::{AsyncWriteExt as _, StreamExt, future},
    identity::Keypair,
};

use super::{
    Client, Relay, STOP, Security, assert_relayed,
    by_hand::send,
    circuit, circuit_to,
    http::ON_ANY_PORT,
    messages::{self, HopMessage, MALFORMED_MESSAGE, connect, stop_status},
    read_to_end, within,
};

/// Sends a request, and returns the status of the answer.
async fn status_of(client: &mut Client, request: &HopMessage) -> i32 {
    client.request(request).await.status.expect("a status")
}

/// Makes each event happen once. Returns the peer that holds the last slot, the source of the last circuit, and both
/// ends of that circuit.
pub async fn run(relay: &Relay) -> (Client, Client, (Stream, Stream)) {
    let known = async |name| Client::connect_as(key(name), &relay.address, Security::Noise).await;
    let (mut alice, mut bob, mut carol) = (known(1).await, known(2).await, known(3).await);
    // Slots.
    alice.reserve().await;
    alice.reserve().await; // renewed
    bob.reserve().await;
    assert_eq!(status_of(&mut carol, &messages::reserve()).await, 200);
    let mut guest = Client::connect_as(key(GUEST), &relay.address, Security::Tls).await;
    assert_eq!(status_of(&mut guest, &messages::reserve()).await, 202);
    for status in [100, 201] {
        assert_eq!(status_of(&mut alice, &messages::reserve()).await, status);
    }
    // Circuits.
    let to_peer_without_slot = connect(carol.peer);
    assert_eq!(status_of(&mut alice, &to_peer_without_slot).await, 204);
    assert_eq!(status_of(&mut guest, &connect(PeerId::random())).await, 202);
    let without_target = HopMessage { peer: None, ..connect(alice.peer) };
    assert_eq!(status_of(&mut carol, &without_target).await, 400);
    let mut stops = alice.accept(STOP);
    let to_alice = connect(alice.peer);
    let refusal = async {
        let (_, mut stop) = within(stops.next()).await.unwrap();
        let _: messages::StopMessage = messages::read(&mut stop).await;
        messages::write(&mut stop, &stop_status(203)).await;
    };
    let (status, ()) = future::join(status_of(&mut carol, &to_alice), refusal).await;
    assert_eq!(status, 203);
    // A circuit that both ends close.
    let (mut there, mut back) = circuit_to(&mut carol, alice.peer, &mut stops).await;
    assert_relayed(&mut there, &mut back, &[7; 700]).await;
    assert_relayed(&mut back, &mut there, &[7; 30]).await;
    for stream in [&mut there, &mut back] {
        stream.close().await.unwrap();
    }
    read_to_end(&mut there).await.1.unwrap();
    // A circuit that reaches its byte limit.
    let (mut there, mut back) = circuit_to(&mut carol, alice.peer, &mut stops).await;
    send(&mut there, &[7; 1001]).await;
    assert_eq!(read_to_end(&mut back).await.0.len(), 1000);
    // A circuit that stays open.
    let (mut there, mut back) = circuit(&mut carol, &mut bob).await;
    assert_relayed(&mut there, &mut back, &[7; 4]).await;
    // A malformed message, and a freed slot.
    assert_eq!(carol.send_raw(&[3, 0xff, 0xff, 0xff]).await.status, MALFORMED_MESSAGE);
    alice.disconnect().await;
    relay.wait_for_log("slot freed").await;
    (bob, carol, (there, back))
}

/// The peer that may connect to others but not reserve.
const GUEST: u8 = 7;

/// The key of a peer that [`relay`] allows.
fn key(name: u8) -> Keypair {
    Keypair::ed25519_from_bytes([name; 32]).unwrap()
}

/// A relay with limits so low that [`run`] reaches each of them.
pub fn relay() -> Relay {
    let [alice, bob, carol, guest] = [1, 2, 3, GUEST].map(|name| key(name).public().to_peer_id());
    Relay::start(&[
        ON_ANY_PORT,
        "--threads=2",
        "--max-reservations=2",
        "--max-reservations-per-ip=0",
        "--reserve-rate=3",
        "--probe=0s",
        "--grace=0s",
        "--circuit-bytes=1000",
        &format!("--allow-peer={alice},{bob},{carol}"),
        &format!("--allow-connect-peer={guest}"),
    ])
}
