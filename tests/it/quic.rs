//! The behaviour in a swarm over TCP and QUIC, that of `tests/quic/relay.rs`: reservations and circuits over both.

#[allow(dead_code, reason = "its `main` is not used here")]
#[path = "../quic/relay.rs"]
mod example;

use crate::common::{
    HOP,
    messages::{self, HopMessage, reserve},
    swarms::{drive, listen, until},
    within,
};
use libp2p::{
    Multiaddr, PeerId, Swarm, SwarmBuilder,
    core::ConnectedPoint,
    identity::Keypair,
    multiaddr::Protocol,
    noise, ping, relay,
    swarm::{NetworkBehaviour, SwarmEvent},
    tcp, yamux,
};

/// The behaviour of [`client`].
#[derive(NetworkBehaviour)]
struct Parts {
    relay: relay::client::Behaviour,
    ping: ping::Behaviour,
}

/// A rust-libp2p client over TCP and QUIC.
fn client() -> Swarm<Parts> {
    SwarmBuilder::with_new_identity()
        .with_tokio()
        .with_tcp(tcp::Config::default(), noise::Config::new, yamux::Config::default)
        .unwrap()
        .with_quic()
        .with_relay_client(noise::Config::new, yamux::Config::default)
        .unwrap()
        .with_behaviour(|_, relay| Parts { relay, ping: ping::Behaviour::default() })
        .unwrap()
        .build()
}

/// Runs the example's swarm; returns its TCP and its QUIC address.
async fn relay() -> [Multiaddr; 2] {
    let keypair = Keypair::generate_ed25519();
    let mut swarm = example::swarm(keypair, relaylet::Config::default()).unwrap();
    let mut addresses = Vec::new();
    for address in ["/ip4/127.0.0.1/tcp/0", "/ip4/127.0.0.1/udp/0/quic-v1"] {
        let address = listen(&mut swarm, address.parse().unwrap()).await;
        // Set here, so that the reservations do not depend on observed addresses.
        swarm.add_external_address(address.clone());
        addresses.push(address.with_p2p(*swarm.local_peer_id()).unwrap());
    }
    drive(swarm);
    addresses.try_into().unwrap()
}

/// Starts a client that reserves a slot at this address of the relay; returns its peer id.
async fn target(relay: &Multiaddr) -> PeerId {
    let mut swarm = client();
    let circuit = relay.clone().with(Protocol::P2pCircuit);
    swarm.listen_on(circuit).unwrap();
    let mut endpoint_of_relay = None;
    until(&mut swarm, |event| {
        match event {
            SwarmEvent::ConnectionEstablished { endpoint, .. } => {
                endpoint_of_relay = Some(endpoint)
            }
            SwarmEvent::Behaviour(PartsEvent::Relay(
                relay::client::Event::ReservationReqAccepted { .. },
            )) => return Some(()),
            _ => {}
        }
        None
    })
    .await;
    assert_eq!(endpoint_of_relay.expect("a connection").get_remote_address(), relay);
    let peer = *swarm.local_peer_id();
    drive(swarm);
    peer
}

/// Asserts that the target answers a ping over a circuit through this address of the relay.
async fn assert_pings(relay: &Multiaddr, target: PeerId) {
    let mut swarm = client();
    let circuit = relay.clone().with(Protocol::P2pCircuit);
    swarm.dial(circuit.with(Protocol::P2p(target))).unwrap();
    let (mut direct, mut relayed) = (None, false);
    until(&mut swarm, |event| {
        match event {
            SwarmEvent::ConnectionEstablished { peer_id, endpoint, .. } => match endpoint {
                ConnectedPoint::Dialer { address, .. } if peer_id != target => {
                    direct = Some(address);
                }
                endpoint => relayed = endpoint.is_relayed(),
            },
            SwarmEvent::Behaviour(PartsEvent::Ping(ping::Event {
                peer, result: Ok(_), ..
            })) if peer == target => return Some(()),
            SwarmEvent::OutgoingConnectionError { error, .. } => panic!("{error}"),
            _ => {}
        }
        None
    })
    .await;
    assert_eq!(direct.as_ref(), Some(relay));
    assert!(relayed);
}

#[tokio::test]
async fn a_slot_reserved_over_quic_is_reachable_over_quic_and_tcp() {
    let [tcp, quic] = relay().await;
    let target = target(&quic).await;
    assert_pings(&quic, target).await;
    assert_pings(&tcp, target).await;
}

#[tokio::test]
async fn a_slot_reserved_over_tcp_is_reachable_over_quic() {
    let [tcp, quic] = relay().await;
    let target = target(&tcp).await;
    assert_pings(&quic, target).await;
}

/// The client sends no identify message: the relay knows only its own end of the connection, which over QUIC is the
/// address of the listener.
#[tokio::test]
async fn a_reservation_of_a_relay_that_listens_on_all_addresses_has_no_unspecified_one() {
    let keypair = Keypair::generate_ed25519();
    let mut relay = example::swarm(keypair, relaylet::Config::default()).unwrap();
    let peer = *relay.local_peer_id();
    let address = listen(&mut relay, "/ip4/0.0.0.0/udp/0/quic-v1".parse().unwrap()).await;
    drive(relay);
    let mut client = SwarmBuilder::with_new_identity()
        .with_tokio()
        .with_quic()
        .with_behaviour(|_| libp2p_stream::Behaviour::new())
        .unwrap()
        .build();
    let mut control = client.behaviour().new_control();
    client.dial(address.with_p2p(peer).unwrap()).unwrap();
    drive(client);
    let mut stream = within(control.open_stream(peer, HOP)).await.unwrap();
    messages::write(&mut stream, &reserve()).await;
    let answer: HopMessage = messages::read(&mut stream).await;
    let addresses = answer.reservation.expect("a slot").addrs.into_iter();
    let addresses: Vec<_> = addresses.map(|bytes| Multiaddr::try_from(bytes).unwrap()).collect();
    let is_unspecified = |address: &Multiaddr| address.to_string().starts_with("/ip4/0.0.0.0/");
    assert!(!addresses.is_empty() && !addresses.iter().any(is_unspecified), "{addresses:?}");
}
