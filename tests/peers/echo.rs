//! How long a kilobyte takes to a peer and back: through a relay, and without one between.

use std::{process::Command, time::Instant};

use libp2p::{
    Stream, StreamProtocol, SwarmBuilder,
    futures::{AsyncReadExt, AsyncWriteExt, StreamExt},
    noise,
    swarm::SwarmEvent,
    tcp, yamux,
};

use super::{bulk, contestants::Relay};
use crate::common::{Security, children::Process, within};

/// The argument of a process that keeps a circuit busy.
pub const FLAT_OUT: &str = "flat-out";

const ECHO: StreamProtocol = StreamProtocol::new("/echo");
const SIZE: usize = 1024;
const WARM_UP: usize = 200;

/// The median and the 99th percentile of so many round trips, in microseconds.
#[derive(Clone, Copy, Debug)]
pub struct Latency {
    pub p50: f64,
    pub p99: f64,
}

impl Latency {
    /// What lies between the two.
    pub fn beyond(self, base: Self) -> Self {
        Self { p50: self.p50 - base.p50, p99: self.p99 - base.p99 }
    }
}

/// Through a relay.
pub async fn relayed(relay: &Relay, count: usize) -> Latency {
    let (source, target, _clients) = bulk::pair(&relay.address, Security::Noise).await.apart();
    echoes(source, target, count).await
}

/// Between the same kind of peers, connected to each other.
pub async fn direct(count: usize) -> Latency {
    let mut listener = swarm();
    let any = "/ip4/127.0.0.1/tcp/0".parse().expect("a multiaddr");
    listener.listen_on(any).expect("a free port");
    let address = loop {
        if let SwarmEvent::NewListenAddr { address, .. } = listener.select_next_some().await {
            break address;
        }
    };
    let peer = *listener.local_peer_id();
    let mut echoes_of = listener.behaviour().new_control();
    let mut incoming = echoes_of.accept(ECHO).expect("it is not taken yet");
    let mut dialer = swarm();
    dialer.dial(address.with_p2p(peer).expect("no peer in it")).expect("it can be dialed");
    let mut control = dialer.behaviour().new_control();
    for mut swarm in [listener, dialer] {
        tokio::spawn(async move {
            loop {
                swarm.select_next_some().await;
            }
        });
    }
    let source = loop {
        // There is no connection yet, the first time.
        if let Ok(stream) = within(control.open_stream(peer, ECHO)).await {
            break stream;
        }
    };
    let (_, target) = within(incoming.next()).await.expect("the stream comes");
    echoes(source, target, count).await
}

fn swarm() -> libp2p::Swarm<libp2p_stream::Behaviour> {
    SwarmBuilder::with_new_identity()
        .with_tokio()
        .with_tcp(tcp::Config::default(), noise::Config::new, yamux::Config::default)
        .expect("TCP")
        .with_behaviour(|_| libp2p_stream::Behaviour::new())
        .expect("a behaviour")
        .with_swarm_config(|config| config.with_idle_connection_timeout(crate::common::PATIENCE))
        .build()
}

async fn echoes(mut source: Stream, mut target: Stream, count: usize) -> Latency {
    let echo = tokio::spawn(async move {
        let mut bytes = [0; SIZE];
        while target.read_exact(&mut bytes).await.is_ok() {
            target.write_all(&bytes).await.expect("it is read");
            target.flush().await.expect("it is read");
        }
    });
    let mut bytes = [0; SIZE];
    let mut took = Vec::with_capacity(count);
    for number in 0..WARM_UP + count {
        let start = Instant::now();
        source.write_all(&bytes).await.expect("it is read");
        source.flush().await.expect("it is read");
        within(source.read_exact(&mut bytes)).await.expect("it comes back");
        if number >= WARM_UP {
            took.push(start.elapsed().as_secs_f64() * 1e6);
        }
    }
    echo.abort();
    took.sort_by(f64::total_cmp);
    let at = |share: f64| took[(took.len() as f64 * share) as usize];
    Latency { p50: at(0.5), p99: at(0.99) }
}

/// A process that keeps one circuit through the relay as busy as it can, until it is dropped.
pub fn flat_out(relay: &Relay) -> Process {
    // It gets what the others leave of the cores. Else their turns on them would be measured.
    let mut command = Command::new("nice");
    command.args(["-n", "19"]);
    command.arg(std::env::current_exe().expect("this program"));
    command.args([FLAT_OUT, &relay.address.to_string()]);
    let mut process = Process::start(command);
    process.says("running");
    process
}

/// What that process does.
pub async fn run_flat_out(relay: &str) {
    const PART: u64 = 4 * 1024 * 1024;
    let relay = relay.parse().expect("a multiaddr");
    let mut pair = bulk::pair(&relay, Security::Noise).await;
    pair.carry(PART).await;
    println!("running");
    loop {
        pair.carry(PART).await;
    }
}
