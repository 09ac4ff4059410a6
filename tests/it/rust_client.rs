//! rust-libp2p's relay client over its own TCP and yamux, against the running program.

use std::time::Duration;

use crate::common::{
    Client, Relay, Security,
    swarms::{ECHO, drive, echo, until},
    within,
};
use libp2p::{
    Multiaddr, PeerId, Swarm, SwarmBuilder,
    core::ConnectedPoint,
    futures::{AsyncReadExt, AsyncWriteExt},
    identity::Keypair,
    multiaddr::Protocol,
    noise, ping, relay,
    swarm::{NetworkBehaviour, SwarmEvent},
    tcp, tls, yamux,
};

#[derive(NetworkBehaviour)]
struct Parts {
    relay: relay::client::Behaviour,
    stream: libp2p_stream::Behaviour,
    ping: ping::Behaviour,
}

fn client(security: Security) -> Swarm<Parts> {
    let builder = SwarmBuilder::with_new_identity().with_tokio();
    let parts = |_: &Keypair, relay| Parts {
        relay,
        stream: libp2p_stream::Behaviour::new(),
        ping: ping::Behaviour::default(),
    };
    // The connection inside the circuit uses the same secure channel.
    match security {
        Security::Noise => builder
            .with_tcp(tcp::Config::default(), noise::Config::new, yamux::Config::default)
            .unwrap()
            .with_relay_client(noise::Config::new, yamux::Config::default)
            .unwrap()
            .with_behaviour(parts)
            .unwrap()
            .build(),
        Security::Tls => builder
            .with_tcp(tcp::Config::default(), tls::Config::new, yamux::Config::default)
            .unwrap()
            .with_relay_client(tls::Config::new, yamux::Config::default)
            .unwrap()
            .with_behaviour(parts)
            .unwrap()
            .build(),
    }
}

/// Starts a client that holds a reservation and echoes what arrives on [`ECHO`].
async fn target(relay: &Relay, security: Security) -> PeerId {
    let mut swarm = client(security);
    let circuit = relay.address.clone().with(Protocol::P2pCircuit);
    swarm.listen_on(circuit).unwrap();
    let (mut accepted, mut listening) = (false, None);
    until(&mut swarm, |event| {
        match event {
            SwarmEvent::Behaviour(PartsEvent::Relay(
                relay::client::Event::ReservationReqAccepted { renewal, .. },
            )) => accepted = !renewal,
            SwarmEvent::NewListenAddr { address, .. } => listening = Some(address),
            _ => {}
        }
        (accepted && listening.is_some()).then_some(())
    })
    .await;
    let peer = *swarm.local_peer_id();
    echo(swarm.behaviour().stream.new_control().accept(ECHO).unwrap());
    drive(swarm);
    peer
}

fn circuit_address(relay: &Relay, target: PeerId) -> Multiaddr {
    let circuit = relay.address.clone().with(Protocol::P2pCircuit);
    circuit.with(Protocol::P2p(target))
}

/// Connects two clients through the relay, and transfers a megabyte in both directions.
async fn reserve_connect_and_echo(security: Security) {
    let relay = Relay::start(&["--circuit-bytes", "0", "--circuit-duration", "0s"]);
    let target = target(&relay, security).await;
    let mut source = client(security);
    source.dial(circuit_address(&relay, target)).unwrap();
    let endpoint = until(&mut source, |event| match event {
        SwarmEvent::ConnectionEstablished { peer_id, endpoint, .. } if peer_id == target => {
            Some(endpoint)
        }
        SwarmEvent::OutgoingConnectionError { error, .. } => panic!("{error}"),
        _ => None,
    })
    .await;
    assert!(matches!(endpoint, ConnectedPoint::Dialer { ref address, .. }
        if address.iter().any(|part| part == Protocol::P2pCircuit)));

    let mut control = source.behaviour().stream.new_control();
    drive(source);
    let stream = within(control.open_stream(target, ECHO)).await.unwrap();
    let sent: Vec<u8> = (0..1024 * 1024u32).map(|n| ((n * 31) >> 3) as u8).collect();
    let (mut reader, mut writer) = stream.split();
    let write = async {
        writer.write_all(&sent).await.unwrap();
        writer.close().await.unwrap();
    };
    let mut received = Vec::new();
    let ((), read) = within(async { tokio::join!(write, reader.read_to_end(&mut received)) }).await;
    read.unwrap();
    assert!(sent == received, "the echo differs from what was sent");
}

#[tokio::test]
async fn over_noise_clients_reserve_connect_and_transfer_a_megabyte() {
    reserve_connect_and_echo(Security::Noise).await;
}

#[tokio::test]
async fn over_tls_clients_reserve_connect_and_transfer_a_megabyte() {
    reserve_connect_and_echo(Security::Tls).await;
}

#[tokio::test]
async fn clients_renew_before_the_term_ends() {
    let relay = Relay::start(&["--reservation-ttl", "4s", "--max-reservations", "1"]);
    let mut swarm = client(Security::Noise);
    let circuit = relay.address.clone().with(Protocol::P2pCircuit);
    swarm.listen_on(circuit).unwrap();
    let mut renewals = 0;
    until(&mut swarm, |event| {
        match event {
            SwarmEvent::Behaviour(PartsEvent::Relay(
                relay::client::Event::ReservationReqAccepted { renewal, limit, .. },
            )) => {
                renewals += u32::from(renewal);
                let limit = limit.expect("the default limits are sent");
                assert_eq!(limit.data_in_bytes(), Some(128 * 1024));
                assert_eq!(limit.duration(), Some(Duration::from_secs(120)));
            }
            SwarmEvent::ListenerClosed { reason, .. } => panic!("{reason:?}"),
            _ => {}
        }
        (renewals == 2).then_some(())
    })
    .await;
}

#[tokio::test]
async fn a_refusal_closes_the_clients_listener() {
    let relay = Relay::start(&["--max-reservations", "1"]);
    let _holder = target(&relay, Security::Noise).await;
    let mut newcomer = client(Security::Noise);
    let circuit = relay.address.clone().with(Protocol::P2pCircuit);
    newcomer.listen_on(circuit).unwrap();
    let reason = until(&mut newcomer, |event| match event {
        SwarmEvent::ListenerClosed { reason, .. } => Some(reason),
        _ => None,
    })
    .await;
    assert!(reason.is_err(), "{reason:?}");
}

/// Old IPFS nodes have RSA keys, mostly of 2,048 bits.
#[tokio::test]
async fn a_client_with_the_longest_rsa_key_gets_a_slot() {
    let relay = Relay::start(&[]);
    for security in [Security::Noise, Security::Tls] {
        let mut key = include_bytes!("rsa-4096.pk8").to_vec();
        let key = Keypair::rsa_from_pkcs8(&mut key).expect("a key");
        let mut client = Client::connect_as(key, &relay.address, security).await;
        client.reserve().await;
        client.disconnect().await;
    }
}
