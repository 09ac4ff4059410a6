//! The behaviour in a swarm of libp2p's own transports, on a host of a virtual network.

use std::{
    cell::RefCell,
    sync::{Arc, Mutex, Once, mpsc},
    thread,
};

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
use crate::common::{NEVER, network::Host, swarms::listen};

#[derive(NetworkBehaviour)]
struct Parts {
    relay: relaylet::Behaviour,
    identify: identify::Behaviour,
}

/// Starts a relay with this many slots. It ends when the function that counts lines is dropped.
pub fn embedded(host: &Host, slots: usize) -> Running {
    record_the_log();
    let mut config = Config::default();
    config.max_reservations = slots;
    config.max_reservations_per_ip = Some(0);
    let log = Arc::default();
    let (host, lines) = (host.clone(), Arc::clone(&log));
    let (listening, address) = mpsc::channel();
    let (stop, stopped) = oneshot::channel::<()>();
    // A thread of its own: its sockets are the host's.
    thread::spawn(move || {
        host.enter();
        LINES.set(Some(lines));
        let runtime = Builder::new_current_thread().enable_all().build().expect("a runtime");
        let report = |address| listening.send(address).expect("the test waits for it");
        runtime.block_on(async {
            tokio::select! {
                () = relay(&host, config, report) => {}
                _ = stopped => {}
            }
        });
    });
    let count = move |text: &str| {
        let _ = &stop;
        let lines: &Mutex<Vec<String>> = &log;
        lines.lock().unwrap().iter().filter(|line| line.contains(text)).count()
    };
    (address.recv().expect("it listens"), Box::new(count))
}

async fn relay(host: &Host, config: Config, report: impl FnOnce(Multiaddr)) {
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
        // The behaviour logs its events itself.
        if let SwarmEvent::ConnectionClosed { .. } = swarm.select_next_some().await {
            log::info!("closed by the peer");
        }
    }
}

thread_local! {
    /// The log of the relay on this thread.
    static LINES: RefCell<Option<Arc<Mutex<Vec<String>>>>> = const { RefCell::new(None) };
}

struct Recorder;

impl log::Log for Recorder {
    fn enabled(&self, _: &log::Metadata<'_>) -> bool {
        LINES.with_borrow(Option::is_some)
    }

    fn log(&self, record: &log::Record<'_>) {
        LINES.with_borrow(|lines| {
            if let Some(lines) = lines {
                lines.lock().unwrap().push(record.args().to_string());
            }
        });
    }

    fn flush(&self) {}
}

fn record_the_log() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        log::set_logger(&Recorder).expect("no other logger");
        log::set_max_level(log::LevelFilter::Debug);
    });
}
