//! Processes full of clients that hold a reservation and only answer, each with a connection of its
//! own, spread over the addresses of 127.0.0.0/8.

use std::{
    io,
    net::Ipv4Addr,
    process::{self, Command},
    time::Duration,
};

use libp2p::{
    Multiaddr, PeerId, Swarm, Transport,
    core::{muxing::StreamMuxerBox, transport::Boxed, upgrade::Version},
    futures::{StreamExt, stream},
    identify,
    identity::Keypair,
    multiaddr::Protocol,
    noise, ping,
    swarm::{self, NetworkBehaviour, SwarmEvent},
    tls, yamux,
};

use crate::common::{HOP, Security, children::Process, messages, tcp_from::TcpFrom, within};

/// The argument of a process.
pub const ROLE: &str = "crowd";

/// How many clients are in a process.
const IN_A_PROCESS: usize = 2500;

/// How many of a process arrive at the same time.
const AT_A_TIME: usize = 64;

// What a process is told to do, and says when it did.
const CONNECT: &str = "connect";
const RESERVE: &str = "reserve";

/// Longer than anybody watches.
const NEVER: Duration = Duration::from_secs(365 * 24 * 60 * 60);

/// Clients in processes of their own, until it is dropped.
pub struct Crowd(Vec<Process>);

impl Crowd {
    /// So many, once each has its reservation.
    pub fn arrives(relay: &Multiaddr, count: usize, security: Security) -> Self {
        let mut crowd = Self::of(relay, count, security);
        crowd.connects();
        crowd.reserves();
        crowd
    }

    /// So many that have yet to connect.
    pub fn of(relay: &Multiaddr, count: usize, security: Security) -> Self {
        let security = match security {
            Security::Noise => "noise",
            Security::Tls => "tls",
        };
        let processes = (0..count).step_by(IN_A_PROCESS).map(|first| {
            let mut command = Command::new(std::env::current_exe().expect("this program"));
            let in_it = (count - first).min(IN_A_PROCESS);
            command.args([ROLE, &relay.to_string()]);
            command.args([&first.to_string(), &in_it.to_string(), security]);
            Process::start(command)
        });
        Self(processes.collect())
    }

    /// All of them connect.
    pub fn connects(&mut self) {
        self.all(CONNECT);
    }

    /// All of them reserve.
    pub fn reserves(&mut self) {
        self.all(RESERVE);
    }

    fn all(&mut self, what: &str) {
        for process in &mut self.0 {
            process.hears(what);
        }
        for process in &mut self.0 {
            process.says(what);
        }
    }
}

#[derive(NetworkBehaviour)]
struct Parts {
    stream: libp2p_stream::Behaviour,
    ping: ping::Behaviour,
    identify: identify::Behaviour,
}

/// What a process does.
pub async fn run(relay: &str, first: &str, count: &str, security: &str) {
    rlimit::increase_nofile_limit(u64::MAX).expect("a limit of open files");
    let relay: Multiaddr = relay.parse().expect("a multiaddr");
    let first: u32 = first.parse().expect("the number of a client");
    let count: u32 = count.parse().expect("a number of clients");
    hears(CONNECT);
    let numbers = stream::iter(first..first + count);
    let arriving = numbers.map(|number| connect(&relay, number, security));
    let controls: Vec<_> = arriving.buffer_unordered(AT_A_TIME).collect().await;
    println!("{CONNECT}");
    let Some(Protocol::P2p(peer)) = relay.iter().last() else {
        panic!("{relay} names no peer");
    };
    hears(RESERVE);
    let reserving = stream::iter(controls).map(|control| reserve(control, peer));
    reserving.buffer_unordered(AT_A_TIME).collect::<()>().await;
    println!("{RESERVE}");
    std::future::pending().await
}

/// Waits until the process is told to. The clients go on meanwhile, on other threads.
fn hears(what: &str) {
    let mut line = String::new();
    io::stdin().read_line(&mut line).expect("text");
    assert_eq!(line.trim(), what);
}

async fn connect(relay: &Multiaddr, number: u32, security: &str) -> libp2p_stream::Control {
    let keypair = Keypair::generate_ed25519();
    let peer = keypair.public().to_peer_id();
    let quiet = ping::Config::new().with_interval(NEVER);
    let who = identify::Config::new("bench".into(), keypair.public()).with_interval(NEVER);
    let parts = Parts {
        stream: libp2p_stream::Behaviour::new(),
        ping: ping::Behaviour::new(quiet),
        identify: identify::Behaviour::new(who),
    };
    // Sixteen to an address, and as many addresses to a /24 as there are.
    let from = Ipv4Addr::from_bits(Ipv4Addr::new(127, 1, 0, 1).to_bits() + number / 16);
    let transport = transport(from, &keypair, security);
    let config = swarm::Config::with_tokio_executor().with_idle_connection_timeout(NEVER);
    let mut swarm = Swarm::new(transport, parts, peer, config);
    let control = swarm.behaviour().stream.new_control();
    swarm.dial(relay.clone()).expect("the relay can be dialed");
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

async fn reserve(mut control: libp2p_stream::Control, relay: PeerId) {
    let mut stream = match within(control.open_stream(relay, HOP)).await {
        Ok(stream) => stream,
        Err(error) => give_up(&error),
    };
    messages::write(&mut stream, &messages::reserve()).await;
    let answer: messages::HopMessage = messages::read(&mut stream).await;
    if answer.status != Some(100) {
        give_up(&answer);
    }
}

/// With one client less, the bench would measure something else than it says.
fn give_up(why: &dyn std::fmt::Debug) -> ! {
    eprintln!("a client lost the relay: {why:?}");
    process::exit(1)
}

fn transport(from: Ipv4Addr, keypair: &Keypair, security: &str) -> Boxed<(PeerId, StreamMuxerBox)> {
    let tcp = TcpFrom(from).upgrade(Version::V1);
    let muxer = yamux::Config::default();
    match security {
        "tls" => {
            let tls = tls::Config::new(keypair).expect("a key for TLS");
            tcp.authenticate(tls).multiplex(muxer).boxed()
        }
        _ => {
            let noise = noise::Config::new(keypair).expect("a key for Noise");
            tcp.authenticate(noise).multiplex(muxer).boxed()
        }
    }
}
