//! The roles of this program as a child process: rust-libp2p's relay, and idle clients.

use std::{process::ExitCode, time::Duration};

use libp2p::{
    Multiaddr, Swarm, SwarmBuilder,
    futures::{StreamExt, future},
    identify,
    identity::Keypair,
    noise, ping, relay,
    swarm::{NetworkBehaviour, SwarmEvent},
    tcp, yamux,
};
use tokio::runtime::Runtime;

use crate::common::{
    NEVER,
    bench_client::{self, Parts},
    peer_of,
};

// The arguments that select the roles.
pub const RELAY: &str = "a-rust-libp2p-relay";
pub const CLIENTS: &str = "clients";

#[derive(NetworkBehaviour)]
struct RelayParts {
    relay: relay::Behaviour,
    ping: ping::Behaviour,
    identify: identify::Behaviour,
}

/// rust-libp2p's relay with default settings, except for the limits that a thousand peers from one address would reach.
pub fn relay() -> ExitCode {
    let config = relay::Config {
        max_reservations: usize::MAX,
        reservation_rate_limiters: Vec::new(),
        ..relay::Config::default()
    };
    run(async {
        let mut swarm = swarm(Duration::from_secs(10), |keypair| RelayParts {
            relay: relay::Behaviour::new(keypair.public().to_peer_id(), config),
            ping: ping::Behaviour::default(),
            identify: identify::Behaviour::new(identify::Config::new(
                "bench".into(),
                keypair.public(),
            )),
        });
        let any = "/ip4/127.0.0.1/tcp/0".parse().expect("a multiaddr");
        swarm.listen_on(any).expect("a free port");
        loop {
            if let SwarmEvent::NewListenAddr { address, .. } = swarm.select_next_some().await {
                // The relay's protocol is supported only once it has an external address.
                swarm.add_external_address(address.clone());
                println!("listening on {address}/p2p/{}", swarm.local_peer_id());
            }
        }
    })
}

/// This many peers with a reservation on this relay, each with a connection of its own; they connect one after another
/// within this many seconds.
pub fn clients(relay: &str, count: &str, seconds: &str) -> ExitCode {
    let relay: Multiaddr = relay.parse().expect("a multiaddr");
    let count: u32 = count.parse().expect("a number of clients");
    let within = Duration::from_secs(seconds.parse().expect("a number of seconds"));
    rlimit::increase_nofile_limit(u64::MAX).expect("a limit of open files");
    run(async {
        let crowd = (0..count).map(|number| {
            let (relay, comes_in) = (relay.clone(), within / count * number);
            async move {
                tokio::time::sleep(comes_in).await;
                client(relay).await;
            }
        });
        future::join_all(crowd).await;
        println!("ready");
        future::pending().await
    })
}

/// Connects and reserves. After that it only answers.
async fn client(relay: Multiaddr) {
    let peer = peer_of(&relay);
    let control = bench_client::connect(swarm(NEVER, Parts::of), relay).await;
    bench_client::reserve(control, peer).await;
}

fn swarm<B: NetworkBehaviour>(
    idle_timeout: Duration,
    behaviour: impl FnOnce(&Keypair) -> B,
) -> Swarm<B> {
    SwarmBuilder::with_new_identity()
        .with_tokio()
        .with_tcp(tcp::Config::default(), noise::Config::new, yamux::Config::default)
        .expect("TCP")
        .with_behaviour(|keypair| behaviour(keypair))
        .expect("a behaviour")
        .with_swarm_config(|config| config.with_idle_connection_timeout(idle_timeout))
        .build()
}

fn run(role: impl Future<Output = ()>) -> ExitCode {
    Runtime::new().expect("a runtime").block_on(role);
    ExitCode::SUCCESS
}
