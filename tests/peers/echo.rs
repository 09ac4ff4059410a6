//! The round-trip time of a kilobyte between two peers: through a relay, and without one.

use std::{process::Command, time::Instant};

use libp2p::{
    Stream, StreamProtocol, SwarmBuilder,
    futures::{AsyncReadExt, AsyncWriteExt, StreamExt, future},
    noise,
    swarm::SwarmEvent,
    tcp, yamux,
};

use super::{bulk, contestants::Relay};
use crate::common::{Security, child_process::Process, within};

/// The argument of a process that keeps circuits busy.
pub const FLAT_OUT: &str = "flat-out";

const ECHO: StreamProtocol = StreamProtocol::new("/echo");
const SIZE: usize = 1024;
const WARM_UP: usize = 200;

/// The median and the 99th percentile of round-trip times, in microseconds.
#[derive(Clone, Copy, Debug)]
pub struct Latency {
    pub p50: f64,
    pub p99: f64,
}

impl Latency {
    /// The difference to a base.
    pub fn above(self, base: Self) -> Self {
        Self { p50: self.p50 - base.p50, p99: self.p99 - base.p99 }
    }
}

/// Measures through a relay.
pub async fn relayed(relay: &Relay, count: usize) -> Latency {
    let (source, target, _clients) = bulk::pair(&relay.address, Security::Noise).await.into_parts();
    echoes(source, target, count).await
}

/// Measures between peers that are connected directly.
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
    let mut listener_control = listener.behaviour().new_control();
    let mut incoming = listener_control.accept(ECHO).expect("accept is called once");
    let mut dialer = swarm();
    dialer
        .dial(address.with_p2p(peer).expect("no peer in it"))
        .expect("the listener can be dialed");
    let mut control = dialer.behaviour().new_control();
    for mut swarm in [listener, dialer] {
        tokio::spawn(async move {
            loop {
                swarm.select_next_some().await;
            }
        });
    }
    let source = loop {
        // Fails until the connection is up.
        if let Ok(stream) = within(control.open_stream(peer, ECHO)).await {
            break stream;
        }
    };
    let (_, target) = within(incoming.next()).await.expect("the stream arrives");
    echoes(source, target, count).await
}

fn swarm() -> libp2p::Swarm<libp2p_stream::Behaviour> {
    SwarmBuilder::with_new_identity()
        .with_tokio()
        .with_tcp(tcp::Config::default(), noise::Config::new, yamux::Config::default)
        .expect("TCP")
        .with_behaviour(|_| libp2p_stream::Behaviour::new())
        .expect("a behaviour")
        .with_swarm_config(|config| {
            config.with_idle_connection_timeout(crate::common::TEST_TIMEOUT)
        })
        .build()
}

async fn echoes(mut source: Stream, mut target: Stream, count: usize) -> Latency {
    let echo = tokio::spawn(async move {
        let mut bytes = [0; SIZE];
        while target.read_exact(&mut bytes).await.is_ok() {
            target.write_all(&bytes).await.expect("the stream is open");
            target.flush().await.expect("the stream is open");
        }
    });
    let mut bytes = [0; SIZE];
    let mut took = Vec::with_capacity(count);
    for number in 0..WARM_UP + count {
        let start = Instant::now();
        source.write_all(&bytes).await.expect("the stream is open");
        source.flush().await.expect("the stream is open");
        within(source.read_exact(&mut bytes)).await.expect("an echo");
        if number >= WARM_UP {
            took.push(start.elapsed().as_secs_f64() * 1e6);
        }
    }
    echo.abort();
    took.sort_by(f64::total_cmp);
    let at = |share: f64| took[(took.len() as f64 * share) as usize];
    Latency { p50: at(0.5), p99: at(0.99) }
}

/// A process that keeps this many circuits through the relay as busy as it can, until it is dropped.
pub fn flat_out(relay: &Relay, circuits: usize) -> Process {
    // Lowest priority, so that it does not compete with the measured processes for the CPU.
    let mut command = Command::new("nice");
    command.args(["-n", "19"]);
    command.arg(std::env::current_exe().expect("this program"));
    command.args([FLAT_OUT, &relay.address.to_string(), &circuits.to_string()]);
    let mut process = Process::start(command);
    process.read_value("running");
    process
}

/// The body of that process.
pub async fn run_flat_out(relay: &str, circuits: &str) {
    const PART: u64 = 4 * 1024 * 1024;
    let relay = relay.parse().expect("a multiaddr");
    let circuits: usize = circuits.parse().expect("a number of circuits");
    let mut pairs = Vec::new();
    for _ in 0..circuits {
        pairs.push(bulk::pair(&relay, Security::Noise).await);
    }
    future::join_all(pairs.iter_mut().map(|pair| pair.transfer(PART))).await;
    println!("running");
    future::join_all(pairs.iter_mut().map(|pair| async {
        loop {
            pair.transfer(PART).await;
        }
    }))
    .await;
}
