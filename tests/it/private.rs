//! A relay in a private network: whoever has its key is served, and nobody else gets anywhere.

use std::{fs, process::Stdio};

use crate::common::{
    PATIENCE, Relay, all_of,
    by_hand::{proposal, say_and_hang_up, tcp},
    command,
    messages::{self, HopMessage},
    swarms::{drive, until},
    wait_for, within,
};
use libp2p::{
    StreamProtocol, Swarm, SwarmBuilder, Transport,
    core::upgrade::Version,
    identity::Keypair,
    noise,
    pnet::{PnetConfig, PreSharedKey},
    swarm::{self, SwarmEvent},
    tcp, yamux,
};
use tempfile::TempDir;

const HOP: StreamProtocol = crate::common::HOP;

/// A relay in the network of this key.
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
            config.with_idle_connection_timeout(PATIENCE * 10)
        })
        .build()
}

/// Whether the relay lets in who has this key.
async fn lets_in(relay: &Relay, key: PreSharedKey) -> bool {
    let mut client = client(key);
    client.dial(relay.address.clone()).unwrap();
    until(&mut client, |event| match event {
        SwarmEvent::ConnectionEstablished { .. } => Some(true),
        SwarmEvent::OutgoingConnectionError { .. } => Some(false),
        _ => None,
    })
    .await
}

/// Reserves as one who has the key.
async fn reserves(relay: &Relay, key: PreSharedKey) {
    let mut client = client(key);
    client.dial(relay.address.clone()).unwrap();
    let mut control = client.behaviour().new_control();
    drive(client);
    let mut stream = within(control.open_stream(relay.peer, HOP)).await.unwrap();
    messages::write(&mut stream, &messages::reserve()).await;
    let answer: HopMessage = messages::read(&mut stream).await;
    assert_eq!(answer.status, Some(100), "{answer:?}");
}

#[tokio::test]
async fn who_has_another_key_or_none_gets_nowhere() {
    let (ours, another) = (PreSharedKey::new([1; 32]), PreSharedKey::new([2; 32]));
    let relay = relay(ours);
    let said = format!("private network {}: ", ours.fingerprint());
    relay.wait_for_log(&said).await;
    assert!(!relay.log().iter().any(|line| line.contains("0101010101")));
    reserves(&relay, ours).await;
    assert!(!lets_in(&relay, another).await);
    // Who knows of no key, who hangs up within the nonce, who sends only that.
    let nonce = [7; 24];
    for bytes in [&proposal("/noise")[..], &nonce[..5], &nonce, &[0; 4096]] {
        say_and_hang_up(tcp(&relay).await, bytes).await;
    }
    reserves(&relay, ours).await;
}

#[test]
fn a_key_that_is_none_keeps_the_relay_from_starting() {
    let folder = TempDir::new().unwrap();
    fs::write(folder.path().join("swarm.key"), "let me in").unwrap();
    for (file, problem) in [
        ("swarm.key", "holds no swarm key; its lines are "),
        ("nowhere.key", "cannot be read; "),
        (".", "cannot be read; "),
    ] {
        let mut relay = command(&folder)
            .arg(format!("--swarm-key={file}"))
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        assert_eq!(wait_for(&mut relay).code(), Some(1));
        let said = all_of(&mut relay.stderr.take().unwrap());
        let line = format!("relaylet: --swarm-key {file}: {problem}");
        let ours: Vec<_> = said.lines().filter(|l| l.starts_with("relaylet: ")).collect();
        assert!(ours.len() == 1 && ours[0].starts_with(&line), "{said}");
    }
}
