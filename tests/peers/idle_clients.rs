//! Processes with many clients that hold a reservation and otherwise only answer. Each has a connection of its own;
//! they are spread over the addresses of 127.0.0.0/8.

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
    bench_client::{self, Parts},
    child_process::Process,
    peer_of,
    tcp_from::TcpFrom,
};

/// The argument that makes this program such a process.
pub const ROLE: &str = "idle_clients";

/// How many clients are in a process.
const PER_PROCESS: usize = 2500;

/// How many clients of a process connect at the same time.
const AT_A_TIME: usize = 64;

// The commands to a process, which it repeats once they are done.
const CONNECT: &str = "connect";
const RESERVE: &str = "reserve";

/// Client processes, killed when dropped.
pub struct IdleClients(Vec<Process>);

impl IdleClients {
    /// Starts this many clients, and waits until each has its reservation.
    pub fn start_reserved(relay: &Multiaddr, count: usize, security: Security) -> Self {
        let mut idle_clients = Self::of(relay, count, security);
        idle_clients.connect_all();
        idle_clients.reserve_all();
        idle_clients
    }

    /// Starts this many clients that are not connected yet.
    pub fn of(relay: &Multiaddr, count: usize, security: Security) -> Self {
        let security = match security {
            Security::Noise => "noise",
            Security::Tls => "tls",
        };
        let processes = (0..count).step_by(PER_PROCESS).map(|first| {
            let mut command = Command::new(std::env::current_exe().expect("this program"));
            let in_process = (count - first).min(PER_PROCESS);
            command.args([ROLE, &relay.to_string()]);
            command.args([&first.to_string(), &in_process.to_string(), security]);
            Process::start(command)
        });
        Self(processes.collect())
    }

    /// Connects all clients.
    pub fn connect_all(&mut self) {
        self.run_in_all(CONNECT);
    }

    /// Lets all clients reserve.
    pub fn reserve_all(&mut self) {
        self.run_in_all(RESERVE);
    }

    fn run_in_all(&mut self, what: &str) {
        for process in &mut self.0 {
            process.write_line(what);
        }
        for process in &mut self.0 {
            process.read_value(what);
        }
    }
}

/// The body of such a process.
pub async fn run(relay: &str, first: &str, count: &str, security: &str) {
    rlimit::increase_nofile_limit(u64::MAX).expect("a limit of open files");
    let relay: Multiaddr = relay.parse().expect("a multiaddr");
    let first: u32 = first.parse().expect("the number of a client");
    let count: u32 = count.parse().expect("a number of clients");
    wait_for_command(CONNECT);
    let numbers = stream::iter(first..first + count);
    let connecting = numbers.map(|number| connect(&relay, number, security));
    let controls: Vec<_> = connecting.buffer_unordered(AT_A_TIME).collect().await;
    println!("{CONNECT}");
    let peer = peer_of(&relay);
    wait_for_command(RESERVE);
    let reserving = stream::iter(controls).map(|control| bench_client::reserve(control, peer));
    reserving.buffer_unordered(AT_A_TIME).collect::<()>().await;
    println!("{RESERVE}");
    std::future::pending().await
}

/// Waits for this command. The clients run on other threads meanwhile.
fn wait_for_command(what: &str) {
    let mut line = String::new();
    io::stdin().read_line(&mut line).expect("text");
    assert_eq!(line.trim(), what);
}

async fn connect(relay: &Multiaddr, number: u32, security: &str) -> libp2p_stream::Control {
    let keypair = Keypair::generate_ed25519();
    // Sixteen clients share an address, and all addresses of a /24 are used.
    let from = Ipv4Addr::from_bits(Ipv4Addr::new(127, 1, 0, 1).to_bits() + number / 16);
    let transport = transport(from, &keypair, security);
    let config = swarm::Config::with_tokio_executor().with_idle_connection_timeout(NEVER);
    let peer = keypair.public().to_peer_id();
    bench_client::connect(Swarm::new(transport, Parts::of(&keypair), peer, config), relay.clone())
        .await
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
