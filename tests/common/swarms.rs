//! Builders and helpers for rust-libp2p swarms.

use libp2p::{
    Multiaddr, StreamProtocol, Swarm, SwarmBuilder,
    futures::{AsyncReadExt, AsyncWriteExt, StreamExt, io},
    identity::Keypair,
    noise,
    swarm::{NetworkBehaviour, SwarmEvent},
    tcp, yamux,
};
use libp2p_stream::IncomingStreams;
use tokio::task::JoinHandle;

use super::{TEST_TIMEOUT, within};

/// The protocol of [`echo`].
pub const ECHO: StreamProtocol = StreamProtocol::new("/test/echo/1.0.0");

/// rust-libp2p with this behaviour and a new identity over TCP, Noise and yamux; it keeps idle connections open.
pub fn swarm<B: NetworkBehaviour>(behaviour: impl FnOnce(&Keypair) -> B) -> Swarm<B> {
    swarm_of(Keypair::generate_ed25519(), behaviour)
}

/// As [`swarm`], under this identity.
pub fn swarm_of<B: NetworkBehaviour>(
    keypair: Keypair,
    behaviour: impl FnOnce(&Keypair) -> B,
) -> Swarm<B> {
    SwarmBuilder::with_existing_identity(keypair)
        .with_tokio()
        .with_tcp(tcp::Config::default(), noise::Config::new, yamux::Config::default)
        .unwrap()
        .with_behaviour(behaviour)
        .unwrap()
        .with_swarm_config(|config| config.with_idle_connection_timeout(TEST_TIMEOUT * 10))
        .build()
}

/// Runs a swarm until it emits an event from which `wanted` returns something.
pub async fn until<B: NetworkBehaviour, T>(
    swarm: &mut Swarm<B>,
    mut wanted: impl FnMut(SwarmEvent<B::ToSwarm>) -> Option<T>,
) -> T {
    within(async {
        loop {
            if let Some(found) = wanted(swarm.select_next_some().await) {
                return found;
            }
        }
    })
    .await
}

/// Listens on this address, and returns the one that the swarm reports.
pub async fn listen<B: NetworkBehaviour>(swarm: &mut Swarm<B>, address: Multiaddr) -> Multiaddr {
    swarm.listen_on(address).expect("an address to listen on");
    until(swarm, |event| match event {
        SwarmEvent::NewListenAddr { address, .. } => Some(address),
        _ => None,
    })
    .await
}

/// Runs a swarm in the background and ignores its events.
pub fn drive<B: NetworkBehaviour<ToSwarm: Send> + Send>(mut swarm: Swarm<B>) -> JoinHandle<()> {
    tokio::spawn(async move {
        loop {
            swarm.select_next_some().await;
        }
    })
}

/// Echoes what arrives on these streams, and closes each after its peer has closed it.
pub fn echo(mut streams: IncomingStreams) {
    tokio::spawn(async move {
        while let Some((_, stream)) = streams.next().await {
            let (reader, mut writer) = stream.split();
            tokio::spawn(async move {
                let _ = io::copy(reader, &mut writer).await;
                let _ = writer.close().await;
            });
        }
    });
}
