//! Processes full of clients that hold a reservation and only answer, each with a connection of its
//! own, spread over the addresses of 127.0.0.0/8.

use std::{io, net::Ipv4Addr, process::Command};

use libp2p::{
    Multiaddr, PeerId, Swarm, Transport,
    core::{muxing::StreamMuxerBox, transport::Boxed, upgrade::Version},
    futures::{StreamExt, stream},
    identity::Keypair,
    noise, swarm, tls, yamux,
};

use crate::common::{
    NEVER, Security,
    children::Process,
    silent::{self, Parts},
    tcp_from::TcpFrom,
};

/// The argument of a process.
pub const ROLE: &str = "crowd";

/// How many clients are in a process.
const IN_A_PROCESS: usize = 2500;

/// How many of a process arrive at the same time.
const AT_A_TIME: usize = 64;

// What a process is told to do, and says when it did.
const CONNECT: &str = "connect";
const RESERVE: &str = "reserve";

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
    let peer = silent::peer_of(&relay);
    hears(RESERVE);
    let reserving = stream::iter(controls).map(|control| silent::reserve(control, peer));
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
    // Sixteen to an address, and as many addresses to a /24 as there are.
    let from = Ipv4Addr::from_bits(Ipv4Addr::new(127, 1, 0, 1).to_bits() + number / 16);
    let transport = transport(from, &keypair, security);
    let config = swarm::Config::with_tokio_executor().with_idle_connection_timeout(NEVER);
    let peer = keypair.public().to_peer_id();
    silent::connect(Swarm::new(transport, Parts::of(&keypair), peer, config), relay.clone()).await
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
