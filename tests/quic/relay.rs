//! A relay that supports QUIC: the behaviour in a tokio swarm over TCP and QUIC.
//!
//!     cargo run --features quic-example --example quic
//!
//! The program has no QUIC because libp2p's needs tokio. An embedder chooses the runtime and the transports: the
//! behaviour works with any.

use std::{error::Error, time::Duration};

use libp2p::{
    Swarm, SwarmBuilder,
    futures::StreamExt,
    identify,
    identity::Keypair,
    noise,
    swarm::{NetworkBehaviour, SwarmEvent},
    tcp, yamux,
};

/// The relay, and identify, which lists the relay's protocol.
#[derive(NetworkBehaviour)]
pub(crate) struct Parts {
    relay: relaylet::Behaviour,
    identify: identify::Behaviour,
}

/// A swarm that relays between clients over TCP and QUIC.
pub(crate) fn swarm(
    keypair: Keypair,
    config: relaylet::Config,
) -> Result<Swarm<Parts>, Box<dyn Error>> {
    let swarm = SwarmBuilder::with_existing_identity(keypair)
        .with_tokio()
        .with_tcp(tcp::Config::default(), noise::Config::new, yamux::Config::default)?
        .with_quic()
        .with_behaviour(|keypair| {
            let identify = identify::Config::new("my/1.0.0".into(), keypair.public());
            Ok(Parts {
                relay: relaylet::Behaviour::new(keypair.clone(), config)?,
                identify: identify::Behaviour::new(identify),
            })
        })?
        // For connections without slot or circuit; the others stay open.
        .with_swarm_config(|config| config.with_idle_connection_timeout(Duration::from_secs(60)))
        .build();
    Ok(swarm)
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn Error>> {
    let mut swarm = swarm(Keypair::generate_ed25519(), relaylet::Config::default())?;
    swarm.listen_on("/ip4/0.0.0.0/tcp/4001".parse()?)?;
    swarm.listen_on("/ip4/0.0.0.0/udp/4001/quic-v1".parse()?)?;
    loop {
        match swarm.select_next_some().await {
            SwarmEvent::NewListenAddr { address, .. } => {
                println!("listening on {address}/p2p/{}", swarm.local_peer_id());
            }
            SwarmEvent::Behaviour(PartsEvent::Identify(identify::Event::Received {
                connection_id,
                info,
                ..
            })) => {
                let relay = &mut swarm.behaviour_mut().relay;
                relay.set_reported_address(connection_id, info.observed_addr);
            }
            SwarmEvent::Behaviour(PartsEvent::Relay(event)) => println!("{event}"),
            _ => {}
        }
    }
}
