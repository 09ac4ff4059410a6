//! The settings: one struct for the command line, the environment and the file, and the configurations that it yields.

mod limits;

use std::{collections::BTreeMap, net::SocketAddr, path::PathBuf, sync::LazyLock};

use bytesize::ByteSize;
use humantime::Duration;
use ipnet::IpNet;
use libp2p::{Multiaddr, PeerId};
use serde::{Deserialize, Serialize};
use structopt::{StructOpt, clap::AppSettings as Set};
use toml::{Table, Value};

use super::{
    derived::limit::{LIMITS, Limit},
    runtime::MAX_THREADS,
    values::{Parsed, unwrap_all},
};
use crate::{
    access::Lists,
    config::{Config, ConfigError, LONGEST, validate_subnets},
    program::{component::CertificateFiles, mux::stream_limits, net::multiaddr},
};

/// The default of `--listen`.
const DEFAULT_LISTEN: [&str; 2] = ["/ip4/0.0.0.0/tcp/4001", "/ip6/::/tcp/4001"];

const USAGE: &str = "\
relaylet [FLAGS]
    relaylet check <MULTIADDR> [--quick] [--swarm-key <FILE>]    whether clients can use a relay
    relaylet id [--identity <FILE>] [--import <FILE>]            the relay's peer id";

/// The optional features: their names, whether this program has them, and the settings that need them.
const FEATURES: [(&str, bool, &[&str]); 7] = [
    ("autonat", cfg!(feature = "autonat"), &["autonat"]),
    ("check", cfg!(feature = "check"), &[]),
    ("dht", cfg!(feature = "dht"), &["bootstrap", "dht", "dht-protocol"]),
    ("http", cfg!(feature = "http"), &["http", "http-host"]),
    ("pnet", cfg!(feature = "pnet"), &["swarm-key"]),
    ("tls", cfg!(feature = "tls"), &[]),
    ("websocket", cfg!(feature = "websocket"), &["tls-cert", "tls-key", "trust-forwarded-from"]),
];

/// The origin of each setting that is not from the command line: `RELAYLET_GRACE`, `relaylet.toml:3`.
pub type Origins = BTreeMap<String, String>;

/// A libp2p circuit relay (v2) whose slots come back.
///
/// Each flag can also be set as RELAYLET_NAME in the environment, lists with commas; a flag wins.
#[derive(Clone, Debug, PartialEq, StructOpt, Serialize, Deserialize)]
#[serde(default, rename_all = "kebab-case", deny_unknown_fields)]
#[structopt(usage = USAGE, help_message = "Prints help information [group: About]")]
#[structopt(settings = &[Set::UnifiedHelpMessage, Set::NextLineHelp, Set::DeriveDisplayOrder, Set::NoBinaryName])]
pub struct Flags {
    /// Reads settings from a TOML file, under the names of these flags
    ///
    /// A flag wins over the environment, and the environment over the file. SIGHUP reloads it.
    ///
    /// [group: Configuration]
    #[structopt(long, value_name = "FILE")]
    #[serde(skip)]
    pub config: Option<PathBuf>,

    /// Prints the settings in effect, as such a file, and exits
    #[structopt(long)]
    #[serde(skip)]
    pub print_config: bool,

    /// The origins of the settings that are not from the command line.
    #[structopt(skip)]
    #[serde(skip)]
    pub(super) origins: Origins,

    /// Warnings about variables of the environment, to be logged.
    #[structopt(skip)]
    #[serde(skip)]
    pub(super) warnings: Vec<String>,

    /// Address to listen on; may be given several times
    ///
    /// Browsers need WebSocket, on a port of its own: /ip4/0.0.0.0/tcp/4002/ws, or /tls/ws in place
    /// of /ws with --tls-cert. [default: /ip4/0.0.0.0/tcp/4001 and /ip6/::/tcp/4001]
    ///
    /// [group: Identity and addresses]
    #[structopt(long, value_name = "MULTIADDR", use_delimiter = true)]
    // An empty list is the default, which depends on the machine.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub listen: Vec<Parsed<Multiaddr>>,

    /// Address to announce to clients instead of those found; may be given several times
    #[structopt(long, value_name = "MULTIADDR", use_delimiter = true)]
    pub announce: Vec<Parsed<Multiaddr>>,

    /// Subnet of proxies that send a PROXY protocol header; may be given several times
    ///
    /// A connection from there counts towards the limits of the client that the header names, and is closed
    /// without a header.
    #[structopt(long, value_name = "SUBNET", use_delimiter = true)]
    pub proxy_protocol_from: Vec<Parsed<IpNet>>,

    /// Subnet of reverse proxies that name their WebSocket clients; may be given several times
    ///
    /// A connection from there counts towards the limits of the client that Forwarded or X-Forwarded-For
    /// names.
    #[structopt(long, value_name = "SUBNET", use_delimiter = true, hidden = needs("trust-forwarded-from").is_some())]
    pub trust_forwarded_from: Vec<Parsed<IpNet>>,

    /// Certificate of /tls/ws, followed by those of its issuers, in PEM
    ///
    /// Reloaded when the file changes, and on SIGHUP.
    #[structopt(long, value_name = "FILE", hidden = needs("tls-cert").is_some())]
    pub tls_cert: Option<PathBuf>,

    /// Private key of --tls-cert, in PEM
    #[structopt(long, value_name = "FILE", hidden = needs("tls-key").is_some())]
    pub tls_key: Option<PathBuf>,

    /// Serves AutoNAT: tells clients whether they can be reached, by dialing them
    ///
    /// Dials a client only at the address that it connects from, and only if that is global: at most 12
    /// times a minute, and all clients together at most 600 times.
    #[structopt(long, hidden = needs("autonat").is_some())]
    pub autonat: bool,

    /// For tests: AutoNAT dials addresses that are not global, too
    #[structopt(long, hidden = true)]
    #[serde(skip)]
    pub autonat_private: bool,

    /// File with the relay's private key; created on the first run
    ///
    /// Not used if RELAYLET_IDENTITY_KEY has the key, in base64: for containers without a volume.
    #[structopt(long, value_name = "FILE", default_value = "relaylet.key")]
    pub identity: PathBuf,

    /// Joins a DHT as a server, so that clients find the relay in it
    #[structopt(long, hidden = needs("dht").is_some())]
    pub dht: bool,

    /// Bootstrap node of the DHT, with its peer id at the end; may be given several times
    ///
    /// Without any, the relay is in the DHT once other nodes dial it.
    #[structopt(long, value_name = "MULTIADDR", use_delimiter = true, hidden = needs("dht").is_some())]
    pub bootstrap: Vec<Parsed<Multiaddr>>,

    /// Protocol of the DHT
    #[structopt(long, value_name = "PROTOCOL", default_value = "/ipfs/kad/1.0.0", hidden = needs("dht").is_some())]
    pub dht_protocol: String,

    /// How many peers may hold a slot at a time
    ///
    /// [default: 1024]
    ///
    /// [group: Slots]
    #[structopt(long, value_name = "N")]
    pub max_reservations: Option<Parsed<usize>>,

    /// How many slots one IP address (IPv6: one /64) may have; 0: no cap
    ///
    /// [default: a sixteenth of all, half of up to 64, at least 8]
    #[structopt(long, value_name = "N")]
    pub max_reservations_per_ip: Option<Parsed<usize>>,

    /// How many slots one subnet (IPv4: a /24, IPv6: a /48) may have; 0: no cap
    ///
    /// [default: a quarter of --max-reservations, at least 64]
    #[structopt(long, value_name = "N")]
    pub max_reservations_per_subnet: Option<Parsed<usize>>,

    /// How long a reservation lasts unless it is renewed
    #[structopt(long, value_name = "DURATION", default_value = "1h")]
    pub reservation_ttl: Parsed<Duration>,

    /// How long a disconnected peer keeps its slot; 0s: not at all
    #[structopt(long, value_name = "DURATION", default_value = "30s")]
    pub grace: Parsed<Duration>,

    /// After how much silence a peer with a slot or a circuit is probed; 0s: only when a newcomer waits
    ///
    /// [group: Liveness]
    #[structopt(long, value_name = "DURATION", default_value = "30s")]
    pub heartbeat: Parsed<Duration>,

    /// After how much silence a probed peer has timed out and is disconnected
    #[structopt(long, value_name = "DURATION", default_value = "1m")]
    pub silence: Parsed<Duration>,

    /// How long a silent peer has to answer a probe when a newcomer waits for its slot; 0s: no such probes
    #[structopt(long, value_name = "DURATION", default_value = "3s")]
    pub probe: Parsed<Duration>,

    /// After how much silence a peer is probed when a newcomer waits for its slot
    #[structopt(long, value_name = "DURATION", default_value = "10s")]
    pub probe_after: Parsed<Duration>,

    /// How often expired slots and silent peers are looked for
    #[structopt(long, value_name = "DURATION", default_value = "1s")]
    pub sweep: Parsed<Duration>,

    /// How long a connection without a reservation or a circuit stays open; 0s: for ever
    #[structopt(long, value_name = "DURATION", default_value = "1m")]
    pub idle_timeout: Parsed<Duration>,

    /// How many circuits may be open at a time
    ///
    /// [default: twice --max-reservations, 128 to 1024]
    ///
    /// [group: Circuits]
    #[structopt(long, value_name = "N")]
    pub max_circuits: Option<Parsed<usize>>,

    /// How many circuits the sources of one IP address (IPv6: one /64) may have; 0: no cap
    ///
    /// [default: an eighth of all, at least 64]
    #[structopt(long, value_name = "N")]
    pub max_circuits_per_ip: Option<Parsed<usize>>,

    /// How many circuits the sources of one subnet (IPv4: a /24, IPv6: a /48) may have; 0: no cap
    ///
    /// [default: a quarter of all, at least 64]
    #[structopt(long, value_name = "N")]
    pub max_circuits_per_subnet: Option<Parsed<usize>>,

    /// How many circuits one peer may be part of, as source and as target together
    ///
    /// [default: an eighth of --max-reservations, 8 to 64]
    #[structopt(long, value_name = "N")]
    pub max_circuits_per_peer: Option<Parsed<usize>>,

    /// How long a circuit may stay open; 0s: no limit
    #[structopt(long, value_name = "DURATION", default_value = "2m")]
    pub circuit_duration: Parsed<Duration>,

    /// How many bytes a circuit may carry in each direction; 0: no limit
    #[structopt(long, value_name = "SIZE", default_value = "128KiB")]
    pub circuit_bytes: Parsed<ByteSize>,

    /// How many payload bytes a second all circuits may carry together; 0: no cap
    #[structopt(long, value_name = "SIZE", default_value = "0")]
    pub bandwidth: Parsed<ByteSize>,

    /// How many payload bytes a second one peer may send and receive through its circuits; 0: no cap
    #[structopt(long, value_name = "SIZE", default_value = "0")]
    pub bandwidth_per_peer: Parsed<ByteSize>,

    /// How many times a minute a peer may send a RESERVE, its address ten times as often; 0: no limit
    ///
    /// [group: Requests]
    #[structopt(long, value_name = "N", default_value = "30")]
    pub reserve_rate: Parsed<u32>,

    /// How many times a minute a peer may send a CONNECT, its address ten times as often; 0: no limit
    #[structopt(long, value_name = "N", default_value = "30")]
    pub connect_rate: Parsed<u32>,

    /// Peer that may use the relay; all others may not; may be given several times
    ///
    /// [group: Access]
    #[structopt(long, value_name = "PEER", use_delimiter = true)]
    pub allow_peer: Vec<Parsed<PeerId>>,

    /// Peer that may not use the relay; may be given several times
    #[structopt(long, value_name = "PEER", use_delimiter = true)]
    pub deny_peer: Vec<Parsed<PeerId>>,

    /// Subnet whose peers may use the relay; all others may not; may be given several times
    #[structopt(long, value_name = "SUBNET", use_delimiter = true)]
    pub allow_subnet: Vec<Parsed<IpNet>>,

    /// Subnet whose peers may not use the relay; may be given several times
    #[structopt(long, value_name = "SUBNET", use_delimiter = true)]
    pub deny_subnet: Vec<Parsed<IpNet>>,

    /// Peer that may connect to others without being on --allow-peer; may be given several times
    ///
    /// Without --allow-peer every peer may reserve, and only these may connect.
    #[structopt(long, value_name = "PEER", use_delimiter = true)]
    pub allow_connect_peer: Vec<Parsed<PeerId>>,

    /// File with the key of a private network, in the format of go-ipfs; peers with another key cannot connect
    #[structopt(long, value_name = "FILE", hidden = needs("swarm-key").is_some())]
    pub swarm_key: Option<PathBuf>,

    /// How many connections may be open at a time, not counting those in their handshakes
    ///
    /// An eighth is reserved for peers that hold slots. Once the rest is taken, an idle connection of the
    /// address with the most connections is closed for a new one.
    /// [default: twice --max-reservations, at least 128]
    ///
    /// [group: Connections]
    #[structopt(long, value_name = "N")]
    pub max_connections: Option<Parsed<usize>>,

    /// How many connections one peer may have; 0: no cap
    ///
    /// Beyond it, a new connection of a peer that holds a slot replaces the one that was silent the longest.
    #[structopt(long, value_name = "N", default_value = "8")]
    pub max_connections_per_peer: Parsed<usize>,

    /// How many connections one IP address (IPv6: one /64) may have; 0: no cap
    ///
    /// [default: an eighth of all, half of up to 128, at least 16]
    #[structopt(long, value_name = "N")]
    pub max_connections_per_ip: Option<Parsed<usize>>,

    /// How many connections one subnet (IPv4: a /24, IPv6: a /48) may have; 0: no cap
    ///
    /// Beyond it, an idle connection of the address with the most connections is closed for one of an address
    /// with fewer.
    /// [default: a quarter of all, at least 64]
    #[structopt(long, value_name = "N")]
    pub max_connections_per_subnet: Option<Parsed<usize>>,

    /// How many connections may be in their handshakes, which take at most 10 s
    ///
    /// [default: half of --max-reservations, 32 to 256]
    #[structopt(long, value_name = "N")]
    pub max_handshakes: Option<Parsed<usize>>,

    /// How many streams all peers together may have open, not counting four of each connection
    ///
    /// [default: four times --max-circuits]
    #[structopt(long, value_name = "N")]
    pub max_streams: Option<Parsed<usize>>,

    /// How many streams a peer may have open on one connection
    ///
    /// [default: 32 more than --max-circuits-per-peer]
    #[structopt(long, value_name = "N")]
    pub max_streams_per_connection: Option<Parsed<usize>>,

    /// How many streams a second the connections of one IP address (IPv6: one /64) may open together, and those
    /// of a subnet four times as many; 0: no limit
    ///
    /// A few streams of each connection do not count. As many as 16 s of that rate allow may come at once. A
    /// stream beyond that is reset.
    #[structopt(long, value_name = "N", default_value = "64")]
    pub stream_rate: Parsed<u32>,

    /// How many bytes may be buffered for all streams
    ///
    /// Above it, streams of the heaviest connection of the address that is the furthest above its fair share
    /// are reset, those first whose bytes have waited the longest. Between half and three quarters of it
    /// windows shrink to 32KiB: those of addresses that hold more than their fair share.
    ///
    /// It must be at least 4 times --max-buffered-per-connection. The default is also at least 80KiB for each of up to
    /// 1024 slots, and at least 256KiB for each of up to 128.
    ///
    /// [default: 4 times --max-buffered-per-connection]
    #[structopt(long, value_name = "SIZE")]
    pub max_buffered: Option<Parsed<ByteSize>>,

    /// How many received bytes may be buffered for one connection
    ///
    /// It must be at least 256KiB for each circuit that a peer may have, and 256KiB more. Windows may grow by what is
    /// above that, at most by 768KiB.
    ///
    /// [default: 256KiB a circuit of a peer, and up to 1MiB]
    #[structopt(long, value_name = "SIZE")]
    pub max_buffered_per_connection: Option<Parsed<ByteSize>>,

    /// How long circuits may continue after SIGTERM; 0s: not at all
    ///
    /// Meanwhile all other connections are closed, a few at a time. A second SIGTERM exits at once.
    ///
    /// [group: Shutdown]
    #[structopt(long, value_name = "DURATION", default_value = "8s")]
    pub drain: Parsed<Duration>,

    /// How much memory the relay takes at most
    ///
    /// The limits on slots, circuits, connections, handshakes, streams, buffers and threads follow from it unless a
    /// flag sets them; see --print-config.
    ///
    /// [default: what the limits take]
    ///
    /// [group: Resources]
    #[structopt(long, value_name = "SIZE")]
    pub memory: Option<Parsed<ByteSize>>,

    /// How many threads run the relay
    ///
    /// With --memory at most one for each 128MiB of it.
    ///
    /// [default: half of the machine's cores, at least 1]
    #[structopt(long, value_name = "N")]
    pub threads: Option<Parsed<usize>>,

    /// Address of the HTTP server: /metrics, /healthz, /status.json, and a page
    ///
    /// [default: nowhere]
    #[structopt(long, value_name = "ADDR:PORT", hidden = needs("http").is_some())]
    pub http: Option<Parsed<SocketAddr>>,

    /// DNS name under which the page and /status.json are served; may be given several times
    ///
    /// They are also served under localhost and IP addresses. Other names are refused: a web page elsewhere could
    /// have its own name point here, and read them.
    #[structopt(long, value_name = "NAME", use_delimiter = true, hidden = needs("http-host").is_some())]
    pub http_host: Vec<String>,
}

/// The optional features that this program has.
pub fn features() -> impl Iterator<Item = &'static str> {
    FEATURES.iter().filter(|(_, is_built_in, _)| *is_built_in).map(|(name, ..)| *name)
}

/// The error for a setting whose feature the program was built without; `None` if the program has that feature.
pub fn needs(name: &str) -> Option<String> {
    let mut lacking = FEATURES.iter().filter(|(_, is_built_in, _)| !is_built_in);
    let (feature, ..) = lacking.find(|(.., names)| names.contains(&name))?;
    Some(format!("--{name}: this relay was built without it; build it with the feature {feature}"))
}

impl Default for Flags {
    fn default() -> Self {
        // Parsed once: each setting of a file is checked by itself, with the defaults of all others, and a list may
        // have thousands. The iterator has the type of other command lines: clap's parser is compiled once for each
        // type.
        static DEFAULTS: LazyLock<Flags> = LazyLock::new(|| Flags::from_iter(Vec::<String>::new()));
        DEFAULTS.clone()
    }
}

impl Flags {
    /// Returns the settings that have a value, by name.
    ///
    /// # Errors
    ///
    /// When TOML cannot represent one: a path that is not UTF-8.
    pub fn to_table(&self) -> Result<Table, String> {
        Table::try_from(self)
            .map_err(|error| format!("writing a setting as TOML failed: {error}; use UTF-8"))
    }

    /// Returns all settings in effect, those that follow from others included. They are in the order of `--help`,
    /// except that those of the DHT come last. A setting without a value is an empty string.
    ///
    /// # Errors
    ///
    /// As [`Flags::to_table`].
    pub fn settings(&self) -> Result<Table, String> {
        let (config, derived, limits) = (self.config(), self.derived(), self.limits());
        let (slot_caps, circuit_caps) = (config.slot_caps(), config.circuit_caps());
        let number = |limit| Some(Parsed(derived.get(limit)));
        let size = |limit| Some(Parsed(ByteSize::b(derived.get(limit) as u64)));
        let per_connection =
            Parsed(derived.get(Limit::CircuitsPerPeer).saturating_add(stream_limits::SPARE));
        let mut all = Self {
            listen: self.listen_addresses().0.into_iter().map(Parsed).collect(),
            tls_cert: Some(self.tls_cert.clone().unwrap_or_default()),
            tls_key: Some(self.tls_key.clone().unwrap_or_default()),
            max_reservations: number(Limit::Reservations),
            max_reservations_per_ip: slot_caps.per_address.or(Some(0)).map(Parsed),
            max_reservations_per_subnet: slot_caps.per_subnet.or(Some(0)).map(Parsed),
            max_circuits: number(Limit::Circuits),
            max_circuits_per_ip: circuit_caps.per_address.or(Some(0)).map(Parsed),
            max_circuits_per_subnet: circuit_caps.per_subnet.or(Some(0)).map(Parsed),
            max_circuits_per_peer: number(Limit::CircuitsPerPeer),
            swarm_key: Some(self.swarm_key.clone().unwrap_or_default()),
            max_connections: number(Limit::Connections),
            max_connections_per_ip: limits.per_ip().or(Some(0)).map(Parsed),
            max_connections_per_subnet: limits.per_subnet().or(Some(0)).map(Parsed),
            max_handshakes: number(Limit::Handshakes),
            max_streams: number(Limit::Streams),
            max_buffered: size(Limit::Buffered),
            max_buffered_per_connection: size(Limit::BufferedPerConnection),
            max_streams_per_connection: self.max_streams_per_connection.or(Some(per_connection)),
            threads: number(Limit::Threads),
            ..self.clone()
        }
        .to_table()?;
        for name in ["memory", "http"] {
            all.entry(name).or_insert_with(|| Value::from(""));
        }
        let is_of_dht = |name: &str| ["bootstrap", "dht", "dht-protocol"].contains(&name);
        let (dht, others): (Table, Table) = all.into_iter().partition(|(name, _)| is_of_dht(name));
        Ok(others.into_iter().chain(dht).collect())
    }

    /// How many threads run the relay.
    pub fn threads(&self) -> usize {
        self.derived().get(Limit::Threads)
    }

    /// The relay's configuration.
    pub fn config(&self) -> Config {
        let derived = self.derived();
        Config {
            max_reservations: derived.get(Limit::Reservations),
            max_reservations_per_ip: self.max_reservations_per_ip.map(|value| value.0),
            max_reservations_per_subnet: self.max_reservations_per_subnet.map(|value| value.0),
            reservation_ttl: *self.reservation_ttl.0,
            grace: *self.grace.0,
            heartbeat: *self.heartbeat.0,
            silence: *self.silence.0,
            probe: *self.probe.0,
            probe_after: *self.probe_after.0,
            sweep: *self.sweep.0,
            idle_timeout: *self.idle_timeout.0,
            max_circuits: derived.get(Limit::Circuits),
            max_circuits_per_ip: self.max_circuits_per_ip.map(|value| value.0),
            max_circuits_per_subnet: self.max_circuits_per_subnet.map(|value| value.0),
            max_circuits_per_peer: derived.get(Limit::CircuitsPerPeer),
            circuit_duration: *self.circuit_duration.0,
            circuit_bytes: self.circuit_bytes.0.as_u64(),
            bandwidth: self.bandwidth.0.as_u64(),
            bandwidth_per_peer: self.bandwidth_per_peer.0.as_u64(),
            reserve_rate: self.reserve_rate.0,
            connect_rate: self.connect_rate.0,
            access: Lists {
                allow_peer: unwrap_all(&self.allow_peer).collect(),
                deny_peer: unwrap_all(&self.deny_peer).collect(),
                allow_subnet: unwrap_all(&self.allow_subnet).collect(),
                deny_subnet: unwrap_all(&self.deny_subnet).collect(),
                allow_connect_peer: unwrap_all(&self.allow_connect_peer).collect(),
                ..Lists::default()
            },
            announce: unwrap_all(&self.announce).collect(),
            ..Config::default()
        }
    }

    /// The subnets of proxies that send a PROXY protocol header.
    pub fn proxies(&self) -> Vec<IpNet> {
        unwrap_all(&self.proxy_protocol_from).collect()
    }

    /// The subnets of reverse proxies that name their WebSocket clients.
    pub fn forwarders(&self) -> Vec<IpNet> {
        unwrap_all(&self.trust_forwarded_from).collect()
    }

    /// The files of the certificate and of its key, if they are set.
    pub fn certificate_files(&self) -> CertificateFiles<'_> {
        (self.tls_cert.as_deref(), self.tls_key.as_deref())
    }

    /// The DHT to join, if any.
    ///
    /// # Errors
    ///
    /// The invalid setting in one line, with the name of its flag and the remedy.
    #[cfg(feature = "dht")]
    pub fn dht_config(&self) -> Result<Option<crate::program::dht::Config>, String> {
        let bootstrap: Vec<_> = unwrap_all(&self.bootstrap).collect();
        let config = crate::program::dht::Config::new(&self.dht_protocol, &bootstrap)?;
        if let Some(node) = bootstrap.first().filter(|_| !self.dht) {
            return Err(format!(
                "--bootstrap {node}: has no effect without a DHT; add --dht, or leave it out"
            ));
        }
        Ok(self.dht.then_some(config))
    }

    /// The addresses to listen on, and whether they were set; otherwise they are the default.
    pub fn listen_addresses(&self) -> (Vec<Multiaddr>, bool) {
        let default = || DEFAULT_LISTEN.iter().filter_map(|text| text.parse().ok()).collect();
        let set: Vec<_> = unwrap_all(&self.listen).collect();
        if set.is_empty() { (default(), false) } else { (set, true) }
    }

    /// Two of the addresses to listen on that cannot be bound both: a later one, and the one before it.
    fn port_conflict(&self) -> Option<(&Multiaddr, &Multiaddr)> {
        let overlap = |one: SocketAddr, other: SocketAddr| {
            let is_same =
                one.ip() == other.ip() || one.ip().is_unspecified() || other.ip().is_unspecified();
            one.port() == other.port() && one.is_ipv4() == other.is_ipv4() && is_same
        };
        let mut sockets: Vec<(SocketAddr, &Multiaddr)> = Vec::new();
        for Parsed(address) in &self.listen {
            let Some((socket, _)) = multiaddr::listen_address(address) else { continue };
            let before = sockets.iter().find(|(before, _)| overlap(*before, socket));
            if let Some((_, before)) = before.filter(|_| socket.port() != 0) {
                return Some((address, before));
            }
            sockets.push((socket, address));
        }
        None
    }

    /// The layers of the addresses to listen on, if they were set. The default addresses are all TCP.
    pub fn layers(&self) -> impl Iterator<Item = multiaddr::Layer> {
        self.listen.iter().filter_map(|Parsed(set)| Some(multiaddr::listen_address(set)?.1))
    }

    /// Checks all settings.
    ///
    /// # Errors
    ///
    /// The first problem in one line, with the name of its flag and the remedy.
    pub(super) fn check(&self) -> Result<(), String> {
        self.config().validate().map_err(message_with_flag)?;
        validate_subnets("proxy_protocol_from", &self.proxies()).map_err(message_with_flag)?;
        validate_subnets("trust_forwarded_from", &self.forwarders()).map_err(message_with_flag)?;
        let derived = self.derived();
        let circuits = derived.get(Limit::CircuitsPerPeer);
        stream_limits::per_connection(circuits).map_err(message_with_flag)?;
        self.stream_limits().check(circuits).map_err(message_with_flag)?;
        #[cfg(feature = "dht")]
        self.dht_config()?;
        let (threads, (cert, key)) = (self.threads(), self.certificate_files());
        let unsupported =
            |address| Some((multiaddr::unsupported(&address, cert.is_some())?, address));
        Err(if *self.drain.0 > LONGEST {
            "--drain: longer than a year; try 8s".into()
        } else if !(1..=MAX_THREADS).contains(&threads) {
            format!("--threads {threads}: try 1 to {MAX_THREADS}, or leave it out")
        } else if let Some((_, flag)) = LIMITS.iter().find(|(limit, _)| derived.get(*limit) == 0) {
            format!("{flag} 0: admits none; try 1 or more")
        } else if self.dht && self.idle_timeout.0.is_zero() {
            // The connections that a DHT lookup dials would never be closed.
            "--idle-timeout 0s: would never close the connections of the DHT; try 1m, or leave out --dht"
                .into()
        } else if let (Some(file), None) = (cert, key) {
            let problem = "requires its private key; name that with --tls-key";
            format!("--tls-cert {}: {problem}", file.display())
        } else if let (None, Some(file)) = (cert, key) {
            let problem = "requires its certificate; name that with --tls-cert";
            format!("--tls-key {}: {problem}", file.display())
        } else if self.autonat && self.swarm_key.is_some() {
            "--autonat: cannot dial within a private network; leave out --swarm-key or --autonat"
                .into()
        } else if let Some((problem, address)) = unwrap_all(&self.listen).find_map(unsupported) {
            format!("--listen {address}: {problem}")
        } else if let Some(name) = self.http_host.iter().find(|name| !multiaddr::is_dns_name(name))
        {
            format!(
                "--http-host {name}: is not a DNS name; try relay.example.org, without a scheme or a port"
            )
        } else if let Some((one, other)) = self.port_conflict() {
            format!(
                "--listen {one}: has the same port as --listen {other}; change or leave out one of them"
            )
        } else {
            return self.given().check();
        })
    }

    /// Puts the origin of a setting in front of a problem that begins with the name of its flag. Without an origin, the
    /// setting is from the command line, and the problem stays as it is.
    pub fn locate(&self, problem: String) -> String {
        let name = problem.trim_start_matches("--").split([':', ' ']).next();
        let place = name.and_then(|name| self.origins.get(name));
        place.map(|place| format!("{place}: {problem}")).unwrap_or(problem)
    }
}

/// The message of a configuration error, beginning with the name of its flag.
pub fn message_with_flag(error: ConfigError) -> String {
    format!("--{}: {}", error.setting().replace('_', "-"), error.problem)
}

#[cfg(test)]
mod tests {
    use std::{ffi::OsString, time::Duration};

    use super::super::load::Exit;
    use super::*;
    use crate::program::{mux::stream_limits::StreamLimits, net::admission::limits::Limits};

    const PEER: &str = "12D3KooWPGM3wYKMsTHGEqbhcBft6cPjA2F3rQmyWTEDD3wCGS1g";

    fn read(arguments: &[&str]) -> Result<Flags, Exit> {
        let program = std::iter::once("relaylet");
        let arguments = program.chain(arguments.iter().copied());
        Flags::read(arguments.map(OsString::from), [])
    }

    fn usage(arguments: &[&str]) -> String {
        match read(arguments) {
            Err(Exit::Usage(line)) => line,
            other => panic!("{arguments:?} should be an error: {other:?}"),
        }
    }

    #[test]
    fn without_flags_the_defaults_are_in_effect() {
        let flags = read(&[]).unwrap();
        let expected = Config { idle_timeout: Duration::from_secs(60), ..Config::default() };
        assert_eq!(flags.config(), expected);
        assert_eq!(flags.limits(), Limits::default());
        let (streams, default) = (flags.stream_limits(), StreamLimits::default());
        assert_eq!(streams.max_streams, default.max_streams);
        assert_eq!(streams.buffered(64), default.buffered(64));
        let (addresses, are_set) = flags.listen_addresses();
        assert_eq!((addresses.len(), are_set), (2, false));
    }

    #[test]
    fn sizes_durations_and_lists_are_parsed() {
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
        assert_eq!(flags.config().circuit_duration, Duration::from_secs(90 * 60));
        assert_eq!(flags.listen.len(), 3);
    }

    #[cfg(feature = "websocket")]
    #[test]
    fn websocket_may_listen_beside_tcp_and_over_tls_given_a_certificate() {
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
    fn an_invalid_setting_is_a_one_line_error_that_names_the_flag() {
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
            (&["--max-circuits", "99999999999999999999"], "--max-circuits"),
            (&["--max-connections", "0"], "--max-connections 0: "),
            (&["--max-handshakes", "0"], "--max-handshakes 0: "),
            // The page and the metrics show 0 as no limit.
            (&["--max-circuits", "0"], "--max-circuits 0: "),
            (&["--max-circuits-per-peer", "0"], "--max-circuits-per-peer 0: "),
            (&["--max-streams", "0"], "--max-streams 0: "),
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
            (&["--proxy-protocol-from", "10.0.0.1"], "--proxy-protocol-from"),
            (&["--proxy-protocol-from", "10.0.0.1/8"], "--proxy-protocol-from: 10.0.0.1/8"),
            #[cfg(feature = "websocket")]
            (&["--trust-forwarded-from", "10.0.0.1/8"], "--trust-forwarded-from: 10.0.0.1/8"),
            #[cfg(not(feature = "websocket"))]
            (&["--trust-forwarded-from", "10.0.0.0/8"], "feature websocket"),
            #[cfg(feature = "http")]
            (&["--http-host", "relay.example.org:9180"], "without a scheme or a port"),
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
            (&["--listen", "/ip4/0.0.0.0/tcp/4001/ws"], "feature websocket"),
            #[cfg(not(feature = "websocket"))]
            (&["--tls-cert", "cert.pem"], "feature websocket"),
            (&["--listen", "127.0.0.1:4001"], "--listen"),
            (&["--listen=/ip4/0.0.0.0/tcp/1,/ip4/0.0.0.0/tcp/1"], "--listen"),
            (&["--listen=/ip4/127.0.0.1/tcp/1", "--listen=/ip4/0.0.0.0/tcp/1/ws"], "--listen"),
            (&["--announce", "/ip4/0.0.0.0/tcp/4001"], "--announce"),
            (&["--circuit-bites", "1"], "--circuit-bites"),
            (&["stray"], "stray"),
            (&["--max-reservations"], "--max-reservations"),
            (&["--grace", "--sweep", "2s"], "--grace"),
            (&["--drain", "500000000000y"], "--drain"),
            (&["--drain", "2y"], "--drain"),
            (&["--max-circuits-per-peer", "70000"], "try 65503 or less"),
            (&["--max-streams-per-connection", "2"], "--max-streams-per-connection"),
            (&["--max-streams-per-connection", "70000"], "--max-streams-per-connection"),
            (&["--max-buffered", "1MB"], "--max-buffered: "),
            (&["--max-buffered-per-connection", "0"], "--max-buffered-per-connection"),
            (&["--memory", "5MiB"], "--memory 5MiB: is too little; try 1"),
            (&["--memory", "a lot"], "--memory"),
            (
                &["--memory=24MiB", "--max-connections=5000"],
                "--max-connections 5000: is too much for --memory 24MiB; lower it to ",
            ),
        ] {
            let line = usage(arguments);
            assert!(line.contains(flag), "{arguments:?}: {line}");
            assert_eq!(line.lines().count(), 1, "{line}");
        }
    }
}
