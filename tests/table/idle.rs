//! The cost of 1,000 idle peers that hold reservations, for relaylet and for rust-libp2p.
//!
//! Both relays run at the same time, each with a process of clients that only answer. The clients are not counted. The
//! run is shorter than identify's interval of 5 minutes.

use std::{env, process::Command, thread, time::Duration};

use libp2p::{Multiaddr, multiaddr::Protocol};

use super::{bounds::Bounds, roles};
use crate::common::{self, child_process::Process};

const PEERS: usize = 1_000;

/// All peers connect from one address and at once: these flags lift the limits on that. The heartbeat, which is
/// measured, is the default.
const RELAYLET_FLAGS: [&str; 6] = [
    "--listen=/ip4/127.0.0.1/tcp/0",
    "--max-reservations=1000",
    "--max-reservations-per-ip=0",
    "--max-reservations-per-subnet=0",
    "--max-connections-per-ip=0",
    "--reserve-rate=0",
];

/// Within how many seconds all peers connect: two intervals of rust-libp2p's ping. Peers that connect at once would be
/// pinged at once for ever, which is cheaper.
const CONNECT_WITHIN: u32 = 30;

/// As fast as a relay's limit on handshakes from one address allows.
const AT_ONCE: u32 = 2;

/// After this time handshakes and identify are done, and the probes have begun.
const SETTLE_TIME: Duration = Duration::from_secs(30);

/// The size of the IPv4 header, the TCP header, and the TCP timestamps that Linux adds to each segment.
const HEADERS: u64 = 20 + 20 + 12;

pub fn measure(words: &[&str], bounds: &mut Bounds) {
    // Several heartbeats (22.5 to 30 s) and pings (15 s).
    let quick = words.contains(&"--quick");
    let window = Duration::from_secs(if quick { 60 } else { 120 });
    let at_once = words.contains(&"--at-once");
    let arrive = if at_once { AT_ONCE } else { CONNECT_WITHIN };
    let folder = tempfile::tempdir().expect("a temporary folder");
    let mut relaylet = common::command(&folder);
    relaylet.args(RELAYLET_FLAGS).env("RUST_LOG", "error");
    let mut rust = ourselves();
    rust.arg(roles::RELAY);

    let relays = [relaylet, rust].map(Relay::start);
    let mut clients = [&relays[0], &relays[1]].map(|relay| relay.clients(arrive));
    for clients in &mut clients {
        clients.read_value("ready");
    }
    thread::sleep(SETTLE_TIME);
    let before = [&relays[0], &relays[1]].map(Relay::spent);
    thread::sleep(window);
    let after = [&relays[0], &relays[1]].map(Relay::spent);
    let [relaylet, rust] = [0, 1].map(|relay| after[relay].since(&before[relay]));

    let (seconds, peers) = (window.as_secs(), PEERS as f64);
    let minutes = seconds as f64 / 60.0;
    println!(
        "\n{PEERS} idle peers with reservations for {seconds} s, both relays at the same time. The \
         peers had arrived within {arrive} s."
    );
    println!("\n| | relaylet, heartbeat 30 s | rust-libp2p, ping 15 s | ratio |");
    println!("| --- | --- | --- | --- |");
    let row = |what: &str, decimals: usize, per: f64, of: fn(&Spent) -> u64| {
        let [ours, theirs] = [of(&relaylet) as f64 / per, of(&rust) as f64 / per];
        let ratio = ours / theirs;
        println!("| {what} | {ours:.decimals$} | {theirs:.decimals$} | {ratio:.2} |");
        ratio
    };
    let per = 1e6 * peers * minutes;
    let ratio = row("CPU ms a peer and minute", 3, per, |s| s.cpu);
    let per = peers * minutes / 60.0;
    row("bytes a peer and hour, in TCP", 0, per, |s| s.bytes);
    row("TCP segments a peer and hour", 0, per, |s| s.segments);
    row("bytes a peer and hour, with TCP's and IPv4's headers", 0, per, |s| {
        s.bytes + s.segments * HEADERS
    });
    let what = "CPU of 1,000 idle peers: relaylet / rust-libp2p";
    bounds.at_most(what, ratio, 0.65);
}

fn ourselves() -> Command {
    Command::new(env::current_exe().expect("this program"))
}

struct Relay {
    process: Process,
    address: Multiaddr,
}

impl Relay {
    fn start(command: Command) -> Self {
        let mut process = Process::start(command);
        let address = process.listen_address();
        Self { process, address }
    }

    /// Starts this many clients; their process prints a line once each has its reservation.
    fn clients(&self, connect_within: u32) -> Process {
        let mut command = ourselves();
        command.args([roles::CLIENTS, &self.address.to_string()]);
        command.args([PEERS.to_string(), connect_within.to_string()]);
        Process::start(command)
    }

    /// What it has used since its start.
    fn spent(&self) -> Spent {
        let (connections, bytes, segments) = self.traffic();
        assert_eq!(connections, PEERS, "every peer is still connected");
        Spent { cpu: self.process.cpu(), bytes, segments }
    }

    /// The kernel's count of its connections, and of the bytes and segments on them in both directions.
    fn traffic(&self) -> (usize, u64, u64) {
        let port = self.address.iter().find_map(|part| match part {
            Protocol::Tcp(port) => Some(port),
            _ => None,
        });
        let port = port.expect("a TCP address");
        let ss = Command::new("ss")
            .args(["-tinOH", "state", "established"])
            .arg(format!("sport = :{port}"))
            .output()
            .expect("ss, of the package iproute2, is installed");
        let output = String::from_utf8_lossy(&ss.stdout);
        let sum = |names: [&str; 2]| {
            let words = output.split_whitespace();
            let counts = words.filter_map(|word| word.split_once(':'));
            let counts = counts.filter(|(name, _)| names.contains(name));
            counts.filter_map(|(_, count)| count.parse::<u64>().ok()).sum()
        };
        let bytes = sum(["bytes_sent", "bytes_received"]);
        (output.lines().count(), bytes, sum(["segs_in", "segs_out"]))
    }
}

/// What a relay has used for its peers.
struct Spent {
    /// In nanoseconds.
    cpu: u64,
    bytes: u64,
    segments: u64,
}

impl Spent {
    fn since(&self, earlier: &Self) -> Self {
        Self {
            cpu: self.cpu - earlier.cpu,
            bytes: self.bytes - earlier.bytes,
            segments: self.segments - earlier.segments,
        }
    }
}
