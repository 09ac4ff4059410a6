//! A client for benches with many peers: it reserves, and after that it only answers.

use std::{fmt::Debug, process};

use libp2p::{
    Multiaddr, PeerId, Swarm,
    futures::StreamExt,
    identify,
    identity::Keypair,
    ping,
    swarm::{NetworkBehaviour, SwarmEvent},
};
use libp2p_stream::Control;

use super::{
    HOP, NEVER,
    messages::{self, OK},
    within,
};

#[derive(NetworkBehaviour)]
pub struct Parts {
    stream: libp2p_stream::Behaviour,
    ping: ping::Behaviour,
    identify: identify::Behaviour,
}

impl Parts {
    pub fn of(keypair: &Keypair) -> Self {
        let identify = identify::Config::new("bench".into(), keypair.public());
        Self {
            stream: libp2p_stream::Behaviour::new(),
            ping: ping::Behaviour::new(ping::Config::new().with_interval(NEVER)),
            identify: identify::Behaviour::new(identify.with_interval(NEVER)),
        }
    }
}

/// Connects, and runs the swarm in the background. Exits the process when the connection is lost.
pub async fn connect(mut swarm: Swarm<Parts>, relay: Multiaddr) -> Control {
    let control = swarm.behaviour().stream.new_control();
    swarm.dial(relay).expect("the relay can be dialed");
    loop {
        match within(swarm.select_next_some()).await {
            SwarmEvent::ConnectionEstablished { .. } => break,
            SwarmEvent::OutgoingConnectionError { error, .. } => give_up(&error),
            _ => {}
        }
    }
    tokio::spawn(async move {
        loop {
            if let SwarmEvent::ConnectionClosed { cause, .. } = swarm.select_next_some().await {
                give_up(&cause);
            }
        }
    });
    control
}

/// Reserves, or exits the process.
pub async fn reserve(mut control: Control, relay: PeerId) {
    let mut stream = match within(control.open_stream(relay, HOP)).await {
        Ok(stream) => stream,
        Err(error) => give_up(&error),
    };
    messages::write(&mut stream, &messages::reserve()).await;
    let answer: messages::HopMessage = messages::read(&mut stream).await;
    if answer.status != OK {
        give_up(&answer);
    }
}

/// With one client fewer, the bench would not measure what it reports.
fn give_up(why: &dyn Debug) -> ! {
    eprintln!("a client lost the relay: {why:?}");
    process::exit(1)
}
