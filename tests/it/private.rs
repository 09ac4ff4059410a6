//! A relay in a private network: clients with its swarm key are served, and no others.

use std::fs;

use crate::common::{
    HOP, Relay, TEST_TIMEOUT,
    by_hand::{proposal, send_and_close, tcp},
    command,
    messages::{self, HopMessage, OK},
    output,
    swarms::{drive, until},
    within,
};
use libp2p::{
    Swarm, SwarmBuilder, Transport,
    core::upgrade::Version,
    identity::Keypair,
    noise,
    pnet::{PnetConfig, PreSharedKey},
    swarm::{self, SwarmEvent},
    tcp, yamux,
};
use tempfile::TempDir;

/// A relay with this swarm key.
fn relay(key: PreSharedKey) -> Relay {
    let folder = TempDir::new().unwrap();
    fs::write(folder.path().join("swarm.key"), key.to_key_file()).unwrap();
    let listen = ["--listen=/ip4/127.0.0.1/tcp/0", "--swarm-key=swarm.key"];
    Relay::start_in(folder, &listen)
}

fn client(key: PreSharedKey) -> Swarm<libp2p_stream::Behaviour> {
    SwarmBuilder::with_existing_identity(Keypair::generate_ed25519())
        .with_tokio()
        .with_other_transport(|keypair| {
            tcp::tokio::Transport::new(tcp::Config::default())
                .and_then(move |stream, _| PnetConfig::new(key).handshake(stream))
                .upgrade(Version::V1Lazy)
                .authenticate(noise::Config::new(keypair).unwrap())
                .multiplex(yamux::Config::default())
        })
        .unwrap()
        .with_behaviour(|_| libp2p_stream::Behaviour::new())
        .unwrap()
        .with_swarm_config(|config: swarm::Config| {
            config.with_idle_connection_timeout(TEST_TIMEOUT * 10)
        })
        .build()
}

/// Whether a client with this key can connect.
async fn admits(relay: &Relay, key: PreSharedKey) -> bool {
    let mut client = client(key);
    client.dial(relay.address.clone()).unwrap();
    until(&mut client, |event| match event {
        SwarmEvent::ConnectionEstablished { .. } => Some(true),
        SwarmEvent::OutgoingConnectionError { .. } => Some(false),
        _ => None,
    })
    .await
}

/// Connects with this key and reserves.
async fn reserve_with(relay: &Relay, key: PreSharedKey) {
    let mut client = client(key);
    client.dial(relay.address.clone()).unwrap();
    let mut control = client.behaviour().new_control();
    drive(client);
    let mut stream = within(control.open_stream(relay.peer, HOP)).await.unwrap();
    messages::write(&mut stream, &messages::reserve()).await;
    let answer: HopMessage = messages::read(&mut stream).await;
    assert_eq!(answer.status, OK, "{answer:?}");
}

#[tokio::test]
async fn clients_with_another_key_or_none_cannot_connect() {
    let (ours, another) = (PreSharedKey::new([1; 32]), PreSharedKey::new([2; 32]));
    let relay = relay(ours);
    let expected = format!("private network {}: ", ours.fingerprint());
    relay.wait_for_log(&expected).await;
    assert_eq!(relay.count_in_log("0101010101"), 0);
    reserve_with(&relay, ours).await;
    assert!(!admits(&relay, another).await);
    // A client without pnet, one that closes within the nonce, one that sends only the nonce, one that sends zeros.
    let nonce = [7; 24];
    for bytes in [&proposal("/noise")[..], &nonce[..5], &nonce, &[0; 4096]] {
        send_and_close(tcp(&relay).await, bytes).await;
    }
    reserve_with(&relay, ours).await;
}

#[test]
fn an_invalid_swarm_key_prevents_the_start() {
    let folder = TempDir::new().unwrap();
    fs::write(folder.path().join("swarm.key"), "let me in").unwrap();
    for (file, problem) in [
        ("swarm.key", "holds no swarm key; its lines are "),
        ("nowhere.key", "cannot be read; "),
        (".", "cannot be read; "),
    ] {
        let output = output(command(&folder).arg(format!("--swarm-key={file}")));
        assert_eq!(output.status.code(), Some(1));
        let log = String::from_utf8(output.stderr).unwrap();
        let line = format!("relaylet: --swarm-key {file}: {problem}");
        let ours: Vec<_> = log.lines().filter(|l| l.starts_with("relaylet: ")).collect();
        assert!(ours.len() == 1 && ours[0].starts_with(&line), "{log}");
    }
}
