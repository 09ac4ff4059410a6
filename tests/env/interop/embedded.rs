//! The behaviour in a swarm of libp2p's own transports, on a host of a virtual network.

use std::{sync::mpsc, thread};

use libp2p::{
    Multiaddr, SwarmBuilder,
    futures::StreamExt,
    identify,
    multiaddr::Protocol,
    noise,
    swarm::{NetworkBehaviour, SwarmEvent},
    tcp, yamux,
};
use relaylet::Config;
use tokio::{runtime::Builder, sync::oneshot};

use super::loss::Running;
use crate::common::{NEVER, log_recorder, network::Host, swarms::listen};

#[derive(NetworkBehaviour)]
struct Parts {
    relay: relaylet::Behaviour,
    identify: identify::Behaviour,
}

/// Starts a relay with this many slots. It ends when the function that counts lines is dropped.
pub fn embedded(host: &Host, slots: usize) -> Running {
    log_recorder::record();
    let mut config = Config::default();
    config.max_reservations = slots;
    config.max_reservations_per_ip = Some(0);
    let host = host.clone();
    let (listening, address) = mpsc::channel();
    let (stop, stopped) = oneshot::channel::<()>();
    // A thread of its own: its sockets are the host's.
    let relay = thread::spawn(move || {
        host.enter();
        let runtime = Builder::new_current_thread().enable_all().build().expect("a runtime");
        let report = |address| listening.send(address).expect("the test waits for it");
        runtime.block_on(async {
            tokio::select! {
                () = run(&host, config, report) => {}
                _ = stopped => {}
            }
        });
    });
    let count = move |text: &str| {
        let _ = &stop;
        log_recorder::count(|thread, line| thread == relay.thread().id() && line.contains(text))
    };
    (address.recv().expect("it listens"), Box::new(count))
}

async fn run(host: &Host, config: Config, report: impl FnOnce(Multiaddr)) {
    let mut swarm = SwarmBuilder::with_new_identity()
        .with_tokio()
        .with_tcp(tcp::Config::default(), noise::Config::new, yamux::Config::default)
        .expect("a transport")
        .with_behaviour(|keypair| {
            let identify = identify::Config::new("test".into(), keypair.public());
            Ok(Parts {
                relay: relaylet::Behaviour::new(keypair.clone(), config)?,
                identify: identify::Behaviour::new(identify),
            })
        })
        .expect("a behaviour")
        .with_swarm_config(|config| config.with_idle_connection_timeout(NEVER))
        .build();
    let address = Multiaddr::from(host.address).with(Protocol::Tcp(4001));
    let address = listen(&mut swarm, address).await;
    report(address.with_p2p(*swarm.local_peer_id()).expect("it names no other peer"));
    loop {
        // The behaviour logs its events itself, for the recorder with this target.
        if let SwarmEvent::ConnectionClosed { .. } = swarm.select_next_some().await {
            log::info!(target: "relaylet", "closed by the peer");
        }
    }
}
