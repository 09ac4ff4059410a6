//! The command line and the environment, made into a configuration.

#[cfg(feature = "http")]
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use bytesize::ByteSize;
use humantime::Duration;
use ipnet::IpNet;
use libp2p::{Multiaddr, PeerId};
use structopt::{StructOpt, clap::AppSettings};

#[cfg(feature = "autonat")]
use super::autonat;
#[cfg(feature = "dht")]
use super::dht;
use super::{
    command_line::{Origin, in_flags},
    connection_limits::Limits,
    node,
    stream_limits::StreamLimits,
    threads,
    transport::{self, Layer},
    values,
};
use crate::{
    access::{Lists, subnets_make_sense},
    config::{Config, LONGEST},
};

/// Where the relay listens unless told otherwise.
const DEFAULT_LISTEN: [&str; 2] = ["/ip4/0.0.0.0/tcp/4001", "/ip6/::/tcp/4001"];

/// A libp2p circuit relay (v2) whose slots come back.
///
/// Each flag also as RELAYLET_NAME in the environment, lists with commas; a flag wins.
#[derive(Clone, Debug, StructOpt)]
#[structopt(
    name = "relaylet",
    usage = "relaylet [FLAGS]",
    settings = &[AppSettings::UnifiedHelpMessage, AppSettings::NextLineHelp, AppSettings::DeriveDisplayOrder]
)]
pub struct Flags {
    /// Reads settings from a TOML file, under the names of these flags
    ///
    /// A flag wins over the environment, and that over the file. SIGHUP reads it again.
    #[structopt(long, value_name = "FILE", parse(from_os_str))]
    pub config: Option<PathBuf>,

    /// Prints the settings that hold, as such a file, and ends
    #[structopt(long)]
    pub print_config: bool,

    /// Where the others were given, if not here.
    #[structopt(skip)]
    pub(super) origins: Vec<Origin>,

    /// Address to listen on; may be given several times
    ///
    /// Browsers want WebSocket, on a port of its own: /ip4/0.0.0.0/tcp/4002/ws, or /tls/ws in place
    /// of /ws with --tls-cert. [default: /ip4/0.0.0.0/tcp/4001 and /ip6/::/tcp/4001]
    #[structopt(
        long,
        value_name = "MULTIADDR",
        use_delimiter = true,
        parse(try_from_str = values::multiaddr)
    )]
    pub listen: Vec<Multiaddr>,

    /// Address to put into reservations instead of those found; may be given several times
    #[structopt(
        long,
        value_name = "MULTIADDR",
        use_delimiter = true,
        parse(try_from_str = values::multiaddr)
    )]
    pub announce: Vec<Multiaddr>,

    /// Subnet of proxies that send a PROXY protocol header; may be given several times
    ///
    /// A connection from there is the client's that the header names, and is closed without one.
    #[structopt(
        long,
        value_name = "SUBNET",
        use_delimiter = true,
        parse(try_from_str = values::subnet)
    )]
    pub proxy_protocol_from: Vec<IpNet>,

    /// Certificate that /tls/ws shows, its issuers' behind it, in PEM
    ///
    /// Read again when the file changes, and on SIGHUP.
    #[cfg(feature = "websocket")]
    #[structopt(long, value_name = "FILE", parse(from_os_str))]
    pub tls_cert: Option<PathBuf>,

    /// The private key of --tls-cert, in PEM
    #[cfg(feature = "websocket")]
    #[structopt(long, value_name = "FILE", parse(from_os_str))]
    pub tls_key: Option<PathBuf>,
    /// Tells clients whether they can be reached from outside, by dialing them (AutoNAT)
    ///
    /// At the address that they connect from only, and only if that is a global one; a client 12 times
    /// a minute, all together 600 times.
    #[cfg(feature = "autonat")]
    #[structopt(long)]
    pub autonat: bool,

    /// For tests: AutoNAT dials addresses that are not global, too
    #[cfg(feature = "autonat")]
    #[structopt(long, hidden = true)]
    pub autonat_private: bool,

    /// The relay's private key; made on the first run
    #[structopt(
        long,
        value_name = "FILE",
        default_value = "relaylet.key",
        parse(from_os_str)
    )]
    pub identity: PathBuf,

    /// Joins a DHT as a server, so that clients that walk it find the relay
    #[cfg(feature = "dht")]
    #[structopt(long)]
    pub dht: bool,

    /// Node of the DHT to join it by, with its id at the end; may be given several times
    ///
    /// Without any the relay is in the DHT once others join by it.
    #[cfg(feature = "dht")]
    #[structopt(long, value_name = "MULTIADDR", use_delimiter = true)]
    pub bootstrap: Vec<Multiaddr>,

    /// What the nodes of the DHT speak
    #[cfg(feature = "dht")]
    #[structopt(long, value_name = "PROTOCOL", default_value = "/ipfs/kad/1.0.0")]
    pub dht_protocol: String,

    /// How many peers may hold a slot at a time
    #[structopt(
        long,
        value_name = "N",
        default_value = "1024",
        parse(try_from_str = values::number)
    )]
    pub max_reservations: usize,

    /// How many slots one IP address (IPv6: one /64) may have; 0: no cap
    ///
    /// [default: a sixteenth of --max-reservations, at least 8]
    #[structopt(long, value_name = "N", parse(try_from_str = values::number))]
    pub max_reservations_per_ip: Option<usize>,

    /// How many slots one subnet (IPv4: a /24, IPv6: a /48) may have; 0: no cap
    ///
    /// [default: a quarter of --max-reservations, at least 64]
    #[structopt(long, value_name = "N", parse(try_from_str = values::number))]
    pub max_reservations_per_subnet: Option<usize>,

    /// For how long a reservation is granted, and renewed
    #[structopt(
        long,
        value_name = "DURATION",
        default_value = "1h",
        parse(try_from_str = values::duration)
    )]
    pub reservation_ttl: Duration,

    /// How long a peer that disconnected keeps its claim to the slot; 0s: none
    #[structopt(
        long,
        value_name = "DURATION",
        default_value = "30s",
        parse(try_from_str = values::duration)
    )]
    pub grace: Duration,

    /// After how much silence a peer with a slot or circuit is asked for a sign of life; 0s: only
    /// when a newcomer waits
    #[structopt(
        long,
        value_name = "DURATION",
        default_value = "30s",
        parse(try_from_str = values::duration)
    )]
    pub heartbeat: Duration,

    /// After how much silence a peer that was asked is given up
    #[structopt(
        long,
        value_name = "DURATION",
        default_value = "1m",
        parse(try_from_str = values::duration)
    )]
    pub silence: Duration,

    /// How long a silent peer has to answer when a newcomer waits for its slot; 0s: none is asked
    #[structopt(
        long,
        value_name = "DURATION",
        default_value = "3s",
        parse(try_from_str = values::duration)
    )]
    pub probe: Duration,

    /// After how much silence a peer is asked when a newcomer waits for its slot
    #[structopt(
        long,
        value_name = "DURATION",
        default_value = "10s",
        parse(try_from_str = values::duration)
    )]
    pub probe_after: Duration,

    /// How often to look for slots whose time is over
    #[structopt(
        long,
        value_name = "DURATION",
        default_value = "1s",
        parse(try_from_str = values::duration)
    )]
    pub sweep: Duration,

    /// After which time a connection without a reservation or a circuit is closed; 0s: never
    #[structopt(
        long,
        value_name = "DURATION",
        default_value = "1m",
        parse(try_from_str = values::duration)
    )]
    pub idle_timeout: Duration,

    /// How many circuits may be open at a time
    #[structopt(
        long,
        value_name = "N",
        default_value = "1024",
        parse(try_from_str = values::number)
    )]
    pub max_circuits: usize,

    /// How many circuits one peer may be part of, as source and as target together
    #[structopt(long, value_name = "N", default_value = "64", parse(try_from_str = values::number))]
    pub max_circuits_per_peer: usize,

    /// How long a circuit may stay open; 0s: no limit
    #[structopt(
        long,
        value_name = "DURATION",
        default_value = "2m",
        parse(try_from_str = values::duration)
    )]
    pub circuit_duration: Duration,

    /// How many bytes a circuit may carry in each direction; 0: no limit
    #[structopt(
        long,
        value_name = "SIZE",
        default_value = "128KiB",
        parse(try_from_str = values::size)
    )]
    pub circuit_bytes: ByteSize,

    /// How many payload bytes a second all circuits may carry together; 0: no cap
    #[structopt(long, value_name = "SIZE", default_value = "0", parse(try_from_str = values::size))]
    pub bandwidth: ByteSize,

    /// How many of them one peer may send and receive through its circuits; 0: no cap
    #[structopt(long, value_name = "SIZE", default_value = "0", parse(try_from_str = values::size))]
    pub bandwidth_per_peer: ByteSize,

    /// How many times a minute a peer may send a RESERVE, its address ten times as often; 0: no limit
    #[structopt(long, value_name = "N", default_value = "30", parse(try_from_str = values::number))]
    pub reserve_rate: u32,

    /// How many times a minute a peer may send a CONNECT, its address ten times as often; 0: no limit
    #[structopt(long, value_name = "N", default_value = "30", parse(try_from_str = values::number))]
    pub connect_rate: u32,

    /// Peer that may use the relay, all others may not; may be given several times
    #[structopt(
        long,
        value_name = "PEER",
        use_delimiter = true,
        parse(try_from_str = values::peer)
    )]
    pub allow_peer: Vec<PeerId>,

    /// Peer that may not use the relay; may be given several times
    #[structopt(
        long,
        value_name = "PEER",
        use_delimiter = true,
        parse(try_from_str = values::peer)
    )]
    pub deny_peer: Vec<PeerId>,

    /// Subnet whose peers may use the relay, all others may not; may be given several times
    #[structopt(
        long,
        value_name = "SUBNET",
        use_delimiter = true,
        parse(try_from_str = values::subnet)
    )]
    pub allow_subnet: Vec<IpNet>,

    /// Subnet whose peers may not use the relay; may be given several times
    #[structopt(
        long,
        value_name = "SUBNET",
        use_delimiter = true,
        parse(try_from_str = values::subnet)
    )]
    pub deny_subnet: Vec<IpNet>,

    /// Peer that may connect to others without being on --allow-peer; may be given several times
    ///
    /// Without --allow-peer everyone may reserve, and only these may connect.
    #[structopt(
        long,
        value_name = "PEER",
        use_delimiter = true,
        parse(try_from_str = values::peer)
    )]
    pub allow_connect_peer: Vec<PeerId>,

    /// The key of a private network, in the format of go-ipfs; who has another gets nowhere
    #[cfg(feature = "pnet")]
    #[structopt(long, value_name = "FILE", parse(from_os_str))]
    pub swarm_key: Option<PathBuf>,

    /// How many connections may be open at a time, beside those in their handshakes
    ///
    /// Beyond it a peer that holds a slot takes the place of the stranger that was idle the longest.
    /// [default: twice --max-reservations, at least 1024]
    #[structopt(long, value_name = "N", parse(try_from_str = values::number))]
    pub max_connections: Option<usize>,

    /// How many connections one peer may have; 0: no cap
    ///
    /// Beyond it a peer that holds a slot gets a new one in the place of an old one.
    #[structopt(long, value_name = "N", default_value = "8", parse(try_from_str = values::number))]
    pub max_connections_per_peer: usize,

    /// How many connections one IP address (IPv6: one /64) may have; 0: no cap
    #[structopt(
        long,
        value_name = "N",
        default_value = "256",
        parse(try_from_str = values::number)
    )]
    pub max_connections_per_ip: usize,

    /// How many connections may be in their handshakes, which take 10 s at most
    #[structopt(
        long,
        value_name = "N",
        default_value = "256",
        parse(try_from_str = values::number)
    )]
    pub max_handshakes: usize,

    /// How many streams the peers may have open at a time, beside four of each connection
    ///
    /// [default: four times --max-circuits, at least 1024]
    #[structopt(long, value_name = "N", parse(try_from_str = values::number))]
    pub max_streams: Option<usize>,

    /// How many streams a peer may have open on one connection
    ///
    /// [default: 32 more than --max-circuits-per-peer]
    #[structopt(long, value_name = "N", parse(try_from_str = values::number))]
    pub max_streams_per_connection: Option<usize>,

    /// How many bytes may wait in the relay to be read by a peer, or to be taken by one
    ///
    /// Beyond it the stream is reset on which most has been waiting for the longest.
    #[structopt(
        long,
        value_name = "SIZE",
        default_value = "80MiB",
        parse(try_from_str = values::size)
    )]
    pub max_buffered: ByteSize,

    /// How many of them one connection may hold
    #[structopt(
        long,
        value_name = "SIZE",
        default_value = "8MiB",
        parse(try_from_str = values::size)
    )]
    pub max_buffered_per_connection: ByteSize,

    /// How long circuits may go on once SIGTERM came; 0s: not at all
    ///
    /// Meanwhile all other connections are closed, a few at a time. A second SIGTERM ends it at once.
    #[structopt(
        long,
        value_name = "DURATION",
        default_value = "8s",
        parse(try_from_str = values::duration)
    )]
    pub drain: Duration,

    /// How many threads do the work
    ///
    /// [default: half of the machine's cores, at least 1]
    #[structopt(long, value_name = "N", parse(try_from_str = values::number))]
    pub threads: Option<usize>,

    /// Where to be watched over HTTP: /metrics, /healthz, /status.json, and a page
    ///
    /// [default: nowhere]
    #[cfg(feature = "http")]
    #[structopt(long, value_name = "ADDR:PORT", parse(try_from_str = values::place))]
    pub http: Option<SocketAddr>,
}

impl Flags {
    /// How many threads there are to be.
    pub fn threads(&self) -> usize {
        self.threads.unwrap_or_else(threads::default)
    }

    /// The relay's configuration.
    pub fn config(&self) -> Config {
        Config {
            max_reservations: self.max_reservations,
            max_reservations_per_ip: self.max_reservations_per_ip,
            max_reservations_per_subnet: self.max_reservations_per_subnet,
            reservation_ttl: self.reservation_ttl.into(),
            grace: self.grace.into(),
            heartbeat: self.heartbeat.into(),
            silence: self.silence.into(),
            probe: self.probe.into(),
            probe_after: self.probe_after.into(),
            sweep: self.sweep.into(),
            idle_timeout: self.idle_timeout.into(),
            max_circuits: self.max_circuits,
            max_circuits_per_peer: self.max_circuits_per_peer,
            circuit_duration: self.circuit_duration.into(),
            circuit_bytes: self.circuit_bytes.as_u64(),
            bandwidth: self.bandwidth.as_u64(),
            bandwidth_per_peer: self.bandwidth_per_peer.as_u64(),
            reserve_rate: self.reserve_rate,
            connect_rate: self.connect_rate,
            access: self.access(),
            announce: self.announce.clone(),
            ..Config::default()
        }
    }

    fn access(&self) -> Lists {
        Lists {
            allow_peer: self.allow_peer.iter().copied().collect(),
            deny_peer: self.deny_peer.iter().copied().collect(),
            allow_subnet: self.allow_subnet.clone(),
            deny_subnet: self.deny_subnet.clone(),
            allow_connect_peer: self.allow_connect_peer.iter().copied().collect(),
        }
    }

    /// How many connections may be open at a time.
    pub fn max_connections(&self) -> usize {
        let default = || self.max_reservations.saturating_mul(2).max(1024);
        self.max_connections.unwrap_or_else(default)
    }

    /// The limits on connections.
    pub fn limits(&self) -> Limits {
        Limits {
            max_connections: self.max_connections(),
            max_connections_per_peer: self.max_connections_per_peer,
            max_connections_per_ip: self.max_connections_per_ip,
            max_handshakes: self.max_handshakes,
        }
    }

    /// How many streams the peers may have open at a time.
    pub fn max_streams(&self) -> usize {
        let default = || self.max_circuits.saturating_mul(4).max(1024);
        self.max_streams.unwrap_or_else(default)
    }

    /// How many of them on one connection.
    pub fn max_streams_per_connection(&self) -> usize {
        let default = || {
            self.max_circuits_per_peer
                .saturating_add(node::SPARE_STREAMS)
        };
        self.max_streams_per_connection.unwrap_or_else(default)
    }

    /// The limits on streams.
    pub fn stream_limits(&self) -> StreamLimits {
        let size = |size: ByteSize| usize::try_from(size.as_u64()).unwrap_or(usize::MAX);
        StreamLimits {
            max_streams: self.max_streams(),
            max_streams_per_connection: self.max_streams_per_connection,
            max_buffered: size(self.max_buffered),
            max_buffered_per_connection: size(self.max_buffered_per_connection),
        }
    }

    /// How many connections it may dial for the DHT, at a time.
    pub fn dials(&self) -> usize {
        #[cfg(feature = "dht")]
        let dials = if self.dht { dht::MOST_DIALED } else { 0 };
        #[cfg(not(feature = "dht"))]
        let dials = 0;
        dials
    }

    /// How many it may dial to say whether clients can be reached, at a time.
    pub fn dials_back(&self) -> usize {
        #[cfg(feature = "autonat")]
        let dials = if self.autonat {
            autonat::MOST_DIALED
        } else {
            0
        };
        #[cfg(not(feature = "autonat"))]
        let dials = 0;
        dials
    }

    /// The DHT to join, if any.
    ///
    /// # Errors
    ///
    /// What makes no sense about it, in one line with its name and the remedy.
    #[cfg(feature = "dht")]
    pub fn joins(&self) -> Result<Option<dht::Config>, String> {
        let config = dht::Config::new(&self.dht_protocol, &self.bootstrap)?;
        match (self.dht, self.bootstrap.first()) {
            (false, Some(address)) => Err(format!(
                "--bootstrap {address}: is for a DHT; add --dht, or leave it out"
            )),
            // The connections that a walk dials would stay open for ever.
            (true, _) if self.idle_timeout.is_zero() => Err(
                "--idle-timeout 0s: connections of the DHT have to end; try 1m, or leave out --dht"
                    .into(),
            ),
            (joins, _) => Ok(joins.then_some(config)),
        }
    }

    /// The addresses to listen on, and whether they were asked for.
    pub fn listen_addresses(&self) -> (Vec<Multiaddr>, bool) {
        if !self.listen.is_empty() {
            return (self.listen.clone(), true);
        }
        let default = DEFAULT_LISTEN.iter().filter_map(|text| text.parse().ok());
        (default.collect(), false)
    }

    /// Whether clients may come over WebSocket.
    pub fn listens_on_websocket(&self) -> bool {
        let mut layers = self.listen.iter().filter_map(transport::listen_address);
        layers.any(|(_, layer)| layer != Layer::Tcp)
    }

    /// Whether they make sense as a whole.
    ///
    /// # Errors
    ///
    /// The first that does not, in one line with its name and the remedy.
    pub(super) fn check(&self) -> Result<(), String> {
        self.config().validate().map_err(|error| in_flags(&error))?;
        subnets_make_sense("proxy_protocol_from", &self.proxy_protocol_from)
            .map_err(|error| in_flags(&error))?;
        node::streams(self.max_circuits_per_peer).map_err(|error| in_flags(&error))?;
        if *self.drain > LONGEST {
            return Err("--drain: is over a year; try 8s".into());
        }
        self.stream_limits()
            .check()
            .map_err(|error| in_flags(&error))?;
        for (flag, value) in [
            ("--max-connections", self.max_connections()),
            ("--max-handshakes", self.max_handshakes),
        ] {
            if value == 0 {
                return Err(format!("{flag} 0: lets nobody in; try 1 or more"));
            }
        }
        if !(1..=threads::MOST).contains(&self.threads()) {
            let (asked, most) = (self.threads(), threads::MOST);
            return Err(format!(
                "--threads {asked}: try 1 to {most}, or leave it out"
            ));
        }
        #[cfg(feature = "dht")]
        self.joins()?;
        self.has_a_whole_certificate()?;
        #[cfg(all(feature = "autonat", feature = "pnet"))]
        if self.autonat && self.swarm_key.is_some() {
            return Err(
                "--autonat: cannot dial within a private network; leave --swarm-key out, or this"
                    .into(),
            );
        }
        for address in &self.listen {
            let supported = match transport::listen_address(address) {
                Some((_, Layer::Tcp)) => true,
                Some((_, Layer::WebSocket)) => cfg!(feature = "websocket"),
                Some((_, Layer::SecureWebSocket)) => self.has_certificate(),
                None => false,
            };
            if !supported {
                let problem = transport::unsupported(address);
                return Err(format!("--listen {address}: {problem}"));
            }
        }
        Ok(())
    }

    fn has_a_whole_certificate(&self) -> Result<(), String> {
        match self.certificate_files() {
            (Some(cert), None) => Err(format!(
                "--tls-cert {}: has no use without its private key; name that with --tls-key",
                cert.display()
            )),
            (None, Some(key)) => Err(format!(
                "--tls-key {}: has no use without its certificate; name that with --tls-cert",
                key.display()
            )),
            _ => Ok(()),
        }
    }

    /// Whether it has a certificate to show.
    pub fn has_certificate(&self) -> bool {
        self.certificate_files().0.is_some()
    }

    /// The certificate's file, and its key's.
    #[cfg(feature = "websocket")]
    pub fn certificate_files(&self) -> (Option<&Path>, Option<&Path>) {
        (self.tls_cert.as_deref(), self.tls_key.as_deref())
    }

    /// There are none.
    #[cfg(not(feature = "websocket"))]
    pub fn certificate_files(&self) -> (Option<&Path>, Option<&Path>) {
        (None, None)
    }
}

#[cfg(test)]
mod tests {
    use std::{ffi::OsString, time::Duration};

    use super::*;
    use crate::program::command_line::Stop;

    const PEER: &str = "12D3KooWPGM3wYKMsTHGEqbhcBft6cPjA2F3rQmyWTEDD3wCGS1g";

    fn read(arguments: &[&str]) -> Result<Flags, Stop> {
        let program = std::iter::once("relaylet");
        let arguments = program.chain(arguments.iter().copied());
        Flags::read(arguments.map(OsString::from), |_| None)
    }

    fn usage(arguments: &[&str]) -> String {
        match read(arguments) {
            Err(Stop::Usage(line)) => line,
            other => panic!("{arguments:?} should be refused: {other:?}"),
        }
    }

    #[test]
    fn without_flags_the_defaults_hold() {
        let flags = read(&[]).unwrap();
        let expected = Config {
            idle_timeout: Duration::from_secs(60),
            ..Config::default()
        };
        assert_eq!(flags.config(), expected);
        assert_eq!(flags.limits(), Limits::default());
        assert_eq!(flags.stream_limits(), StreamLimits::default());
        let (addresses, asked_for) = flags.listen_addresses();
        assert_eq!((addresses.len(), asked_for), (2, false));
    }

    #[test]
    fn sizes_durations_and_lists_are_read_as_people_write_them() {
        let flags = read(&[
            "--circuit-bytes",
            "1MiB",
            "--circuit-duration",
            "1h 30m",
            "--listen",
            "/ip4/127.0.0.1/tcp/0,/ip6/::1/tcp/0",
            "--listen",
            "/ip4/127.0.0.2/tcp/0",
        ])
        .unwrap();
        assert_eq!(flags.config().circuit_bytes, 1024 * 1024);
        assert_eq!(
            flags.config().circuit_duration,
            Duration::from_secs(90 * 60)
        );
        assert_eq!(flags.listen.len(), 3);
    }

    #[cfg(feature = "websocket")]
    #[test]
    fn websocket_is_listened_on_beside_tcp_and_in_tls_with_a_certificate() {
        let tcp = "/ip4/0.0.0.0/tcp/4001";
        let beside = format!("--listen={tcp},/ip4/0.0.0.0/tcp/4002/ws");
        assert_eq!(read(&[&beside]).unwrap().listen.len(), 2);
        for address in ["/ip6/::/tcp/443/tls/ws", "/ip4/0.0.0.0/tcp/443/wss"] {
            let certificate = ["--tls-cert", "cert.pem", "--tls-key", "key.pem"];
            let arguments = [&["--listen", address][..], &certificate].concat();
            assert_eq!(read(&arguments).unwrap().listen.len(), 1);
        }
    }

    #[test]
    fn what_makes_no_sense_is_one_line_that_names_the_flag() {
        for (arguments, flag) in [
            (&["--grace", "soon"][..], "--grace"),
            (&["--sweep", "0s"], "--sweep"),
            (&["--circuit-bytes", "a lot"], "--circuit-bytes"),
            (&["--circuit-bytes", "99999999TiB"], "--circuit-bytes"),
            (&["--bandwidth", "fast"], "--bandwidth"),
            (&["--bandwidth", "99999999TB"], "--bandwidth"),
            (&["--bandwidth-per-peer", "-1"], "-1"),
            (&["--reserve-rate", "4294967296"], "--reserve-rate"),
            (&["--connect-rate", "99999999999"], "--connect-rate"),
            (&["--max-reservations", "0"], "--max-reservations"),
            (&["--max-reservations", "-1"], "-1"),
            (
                &["--max-circuits", "99999999999999999999"],
                "--max-circuits",
            ),
            (&["--max-connections", "0"], "--max-connections"),
            (&["--threads", "0"], "--threads"),
            (&["--threads", "1025"], "--threads"),
            #[cfg(feature = "http")]
            (&["--http", "9180"], "try 127.0.0.1:9180"),
            #[cfg(not(feature = "http"))]
            (&["--http", "127.0.0.1:9180"], "feature http"),
            #[cfg(feature = "autonat")]
            (&["--autonat=perhaps"], "--autonat"),
            #[cfg(feature = "autonat")]
            (&["--autonat", "true"], "true"),
            #[cfg(not(feature = "autonat"))]
            (&["--autonat"], "feature autonat"),
            (&["--deny-peer", "alice"], "--deny-peer"),
            (&["--allow-subnet", "192.0.2.1"], "--allow-subnet"),
            (&["--deny-subnet", "192.0.2.1/24"], "try 192.0.2.0/24"),
            (&["--allow-peer", PEER, "--deny-peer", PEER], "--allow-peer"),
            (
                &["--proxy-protocol-from", "10.0.0.1"],
                "--proxy-protocol-from",
            ),
            (
                &["--proxy-protocol-from", "10.0.0.1/8"],
                "--proxy-protocol-from: 10.0.0.1/8",
            ),
            (&["--reserve-rate", "-1"], "-1"),
            (&["--probe", "4s"], "--probe"),
            (&["--heartbeat", "1m"], "--silence"),
            (&["--listen", "/ip4/0.0.0.0/udp/4001"], "--listen"),
            (&["--listen", "/ip4/0.0.0.0/tcp/4001/ws/ws"], "--listen"),
            (&["--listen", "/ip4/0.0.0.0/tcp/4001/tls"], "--listen"),
            (&["--listen", "/dns4/example.org/tcp/4001/ws"], "--listen"),
            (&["--listen", "/ip4/0.0.0.0/tcp/4001/tls/ws"], "tls"),
            (&["--listen", "/ip4/0.0.0.0/tcp/4001/wss"], "--listen"),
            #[cfg(feature = "websocket")]
            (&["--listen", "/ip4/0.0.0.0/tcp/4001/tls/ws"], "--tls-cert"),
            #[cfg(feature = "websocket")]
            (&["--tls-cert", "cert.pem"], "--tls-key"),
            #[cfg(feature = "websocket")]
            (&["--tls-key", "key.pem"], "--tls-cert"),
            #[cfg(not(feature = "websocket"))]
            (
                &["--listen", "/ip4/0.0.0.0/tcp/4001/ws"],
                "feature websocket",
            ),
            #[cfg(not(feature = "websocket"))]
            (&["--tls-cert", "cert.pem"], "feature websocket"),
            (&["--listen", "127.0.0.1:4001"], "--listen"),
            (&["--announce", "/ip4/0.0.0.0/tcp/4001"], "--announce"),
            (&["--circuit-bites", "1"], "--circuit-bites"),
            (&["stray"], "stray"),
            (&["--max-reservations"], "--max-reservations"),
            (&["--grace", "--sweep", "2s"], "--grace"),
            (&["--drain", "500000000000y"], "--drain"),
            (&["--drain", "2y"], "--drain"),
            (&["--max-circuits-per-peer", "70000"], "try 65503 or less"),
            (
                &["--max-streams-per-connection", "2"],
                "--max-streams-per-connection",
            ),
            (
                &["--max-streams-per-connection", "70000"],
                "--max-streams-per-connection",
            ),
            (&["--max-buffered", "1MB"], "--max-buffered: "),
            (
                &["--max-buffered-per-connection", "0"],
                "--max-buffered-per-connection",
            ),
        ] {
            let line = usage(arguments);
            assert!(line.contains(flag), "{arguments:?}: {line}");
            assert_eq!(line.lines().count(), 1, "{line}");
        }
    }
}
