//! rust-libp2p's relay on tokio, as its users build one; without limits, so that only the work is
//! compared.

use std::time::Duration;

use libp2p::{
    SwarmBuilder,
    futures::StreamExt,
    identify,
    identity::Keypair,
    noise, ping, relay,
    swarm::{NetworkBehaviour, SwarmEvent},
    tcp, tls, yamux,
};

#[derive(NetworkBehaviour)]
struct Behaviour {
    relay: relay::Behaviour,
    ping: ping::Behaviour,
    identify: identify::Behaviour,
}

#[tokio::main]
async fn main() {
    let config = relay::Config {
        max_reservations: usize::MAX,
        max_reservations_per_peer: usize::MAX,
        reservation_rate_limiters: Vec::new(),
        max_circuits: usize::MAX,
        max_circuits_per_peer: usize::MAX,
        max_circuit_duration: Duration::from_secs(24 * 60 * 60),
        max_circuit_bytes: 0, // no limit
        circuit_src_rate_limiters: Vec::new(),
        ..relay::Config::default()
    };
    let behaviour = |keypair: &Keypair| Behaviour {
        relay: relay::Behaviour::new(keypair.public().to_peer_id(), config),
        ping: ping::Behaviour::default(),
        identify: identify::Behaviour::new(identify::Config::new("bench".into(), keypair.public())),
    };
    let mut swarm = SwarmBuilder::with_new_identity()
        .with_tokio()
        .with_tcp(
            tcp::Config::default(),
            (noise::Config::new, tls::Config::new),
            yamux::Config::default,
        )
        .expect("TCP")
        .with_behaviour(behaviour)
        .expect("a behaviour")
        .build();
    let any = "/ip4/127.0.0.1/tcp/0".parse().expect("a multiaddr");
    swarm.listen_on(any).expect("a free port");
    loop {
        if let SwarmEvent::NewListenAddr { address, .. } = swarm.select_next_some().await {
            // It offers the protocol once it has an address to give out.
            swarm.add_external_address(address.clone());
            println!("listening on {address}/p2p/{}", swarm.local_peer_id());
        }
    }
}
