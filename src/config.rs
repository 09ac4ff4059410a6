//! Every limit and timer of the relay, its default and unit, and the one place that judges them.

use std::{fmt, time::Duration};

use libp2p::{Multiaddr, multiaddr::Protocol};

use crate::{
    access::{Lists, Terms},
    wire::Limit,
};

/// The longest time that any setting may name: one year.
///
/// It keeps every deadline within what an `Instant` can hold.
pub(crate) const LONGEST: Duration = Duration::from_secs(365 * 24 * 60 * 60);

/// The shortest reservation or circuit: clients are told whole seconds.
const SHORTEST: Duration = Duration::from_secs(1);

/// The shortest probe: a phone far away needs it.
const SHORTEST_PROBE: Duration = Duration::from_millis(500);

/// The longest probe: js-libp2p gives up 5 s after it began to dial.
const LONGEST_PROBE: Duration = Duration::from_millis(3500);

/// The cap on slots of one address is this fraction of the total, unless given.
const SHARE_PER_IP: usize = 16;
/// But never below this: a household or a small office behind one address.
const LEAST_PER_IP: usize = 8;

/// The cap on slots of one subnet is this fraction of the total, unless given.
const SHARE_PER_SUBNET: usize = 4;
/// But never below this: a site, or a corner of a carrier's network.
const LEAST_PER_SUBNET: usize = 64;

/// The caps on circuits of the sources of one address and of one subnet are these fractions of the total,
/// unless given.
const SHARE_OF_CIRCUITS_PER_IP: usize = 8;
const SHARE_OF_CIRCUITS_PER_SUBNET: usize = 4;
/// But never below this: as many as one peer may be part of by default.
const LEAST_CIRCUITS: usize = 64;

/// What the relay grants, to how many and for how long.
///
/// Made with [`Config::default`] and changed field by field; [`crate::Behaviour::new`] refuses one
/// that makes no sense. Who comes from [`libp2p::relay::Config`](https://docs.rs/libp2p-relay)
/// finds its fields under the names below.
///
/// A configuration can be replaced while the relay runs ([`crate::Behaviour::set_config`]). All
/// settings hold from the next request or sweep on, with three exceptions: a term that was granted
/// and a circuit that was admitted keep what they were promised; [`answer_ping`](Self::answer_ping)
/// holds for connections to come; and [`crate::Node`] needs a restart to raise
/// [`max_circuits_per_peer`](Self::max_circuits_per_peer), for which its connections are made.
///
/// | `libp2p::relay::Config` | here |
/// | --- | --- |
/// | `max_reservations` | [`max_reservations`](Self::max_reservations) |
/// | `max_reservations_per_peer` | none: a peer has one slot, by construction; see [`max_reservations_per_ip`](Self::max_reservations_per_ip) |
/// | `reservation_duration` | [`reservation_ttl`](Self::reservation_ttl) |
/// | `max_circuits`, `max_circuits_per_peer` | the same |
/// | `max_circuit_duration` | [`circuit_duration`](Self::circuit_duration) |
/// | `max_circuit_bytes` | [`circuit_bytes`](Self::circuit_bytes), counted for each direction by itself |
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Config {
    /// How many peers may hold a slot at a time. Default 1024.
    pub max_reservations: usize,
    /// How many slots may be billed to one IP address (an IPv6 address counts as its /64).
    ///
    /// Default `None`: a sixteenth of [`max_reservations`](Self::max_reservations), at least 8.
    /// Zero: no cap.
    pub max_reservations_per_ip: Option<usize>,
    /// How many slots may be billed to one subnet: an IPv4 /24, an IPv6 /48.
    ///
    /// Default `None`: a quarter of [`max_reservations`](Self::max_reservations), at least 64.
    /// Zero: no cap.
    pub max_reservations_per_subnet: Option<usize>,
    /// For how long a reservation is granted, and renewed. Default 1 h; at least 1 s.
    pub reservation_ttl: Duration,
    /// How long a peer that disconnected keeps its claim to the slot.
    ///
    /// Default 30 s; zero frees the slot at once.
    pub grace: Duration,
    /// After how much silence a peer that holds a slot or is part of a circuit is asked for a sign
    /// of life, over `/ipfs/ping/1.0.0`; up to a quarter earlier, at random.
    ///
    /// Default 30 s; zero: nobody is asked, and nobody judged silent, but when a newcomer waits
    /// ([`probe`](Self::probe)).
    pub heartbeat: Duration,
    /// After how much silence a peer that was asked is judged, and, by [`crate::Node`], one that for as long takes
    /// nothing of what is sent to it: its circuits end, and its slot
    /// enters grace. Default 60 s; at least 1 s above [`heartbeat`](Self::heartbeat).
    pub silence: Duration,
    /// Whether the connection of a peer that was judged silent is closed. Default true.
    ///
    /// Switch it off where a connection serves other protocols.
    pub close_silent: bool,
    /// How long a peer has to answer when a newcomer waits for its slot, and how long the newcomer
    /// waits. At most 64 newcomers wait at a time, at most 8 of them from one address; whoever comes
    /// beyond that is refused at once.
    ///
    /// Default 3 s, at most 3.5 s: js-libp2p gives up 5 s after it began to dial. Zero: a newcomer
    /// to a full table is refused at once.
    pub probe: Duration,
    /// After how much silence a peer is asked when a newcomer waits for its slot. Default 10 s.
    pub probe_after: Duration,
    /// How often the sweep passes over the table. Default 1 s; above zero.
    pub sweep: Duration,
    /// After which time without a reservation or a circuit a connection is closed.
    ///
    /// Default zero: the behaviour closes none, because in a swarm of one's own a connection may
    /// serve other protocols. (The program's default is 1 min.)
    pub idle_timeout: Duration,
    /// How many circuits may be open at a time, those being set up included. Default 1024.
    pub max_circuits: usize,
    /// How many of them the sources of one address may have (an IPv6 address counts as its /64). Default: an
    /// eighth of all, at least 64; `Some(0)`: no cap.
    pub max_circuits_per_ip: Option<usize>,
    /// How many of them the sources of one subnet may have, an IPv4 /24 or an IPv6 /48. Default: a quarter of
    /// all, at least 64; `Some(0)`: no cap.
    pub max_circuits_per_subnet: Option<usize>,
    /// How many circuits one peer may be part of, as source and as target together. Default 64.
    pub max_circuits_per_peer: usize,
    /// How long a circuit may stay open. Default 2 min; zero: no limit. On the wire in whole
    /// seconds, so at least 1 s.
    pub circuit_duration: Duration,
    /// How many bytes a circuit may carry in each direction. Default 128 KiB; zero: no limit.
    pub circuit_bytes: u64,
    /// How many payload bytes a second all circuits may carry together, both directions counted.
    ///
    /// Default zero: no cap. Circuits that want more than there is get the same each; open ones
    /// follow a new cap at once.
    pub bandwidth: u64,
    /// How many payload bytes a second one peer may send and receive together through its circuits,
    /// whether as source or as target. Default zero: no cap. Its circuits share it alike.
    pub bandwidth_per_peer: u64,
    /// How many times a minute a peer may send a RESERVE; its address ten times as often, for all
    /// its peers together. Default 30, all of which may come at once; zero: no limit.
    ///
    /// A peer that renews pays from its own minute only.
    pub reserve_rate: u32,
    /// How many times a minute a peer may send a CONNECT; its address ten times as often.
    /// Default 30; zero: no limit.
    pub connect_rate: u32,
    /// Who may use the relay, unless an app decides ([`crate::Behaviour::set_access`]).
    /// Default: everyone.
    pub access: Lists,
    /// The addresses to put into reservations *instead* of those found. Default: none.
    ///
    /// With or without the relay's `/p2p/…` at the end.
    pub announce: Vec<Multiaddr>,
    /// Whether the behaviour answers `/ipfs/ping/1.0.0`. Default true.
    ///
    /// Switch it off beside a ping behaviour of your own.
    pub answer_ping: bool,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            max_reservations: 1024,
            max_reservations_per_ip: None,
            max_reservations_per_subnet: None,
            reservation_ttl: Duration::from_secs(60 * 60),
            grace: Duration::from_secs(30),
            heartbeat: Duration::from_secs(30),
            silence: Duration::from_secs(60),
            close_silent: true,
            probe: Duration::from_secs(3),
            probe_after: Duration::from_secs(10),
            sweep: Duration::from_secs(1),
            idle_timeout: Duration::ZERO,
            max_circuits: 1024,
            max_circuits_per_ip: None,
            max_circuits_per_subnet: None,
            max_circuits_per_peer: 64,
            circuit_duration: Duration::from_secs(2 * 60),
            circuit_bytes: 128 * 1024,
            bandwidth: 0,
            bandwidth_per_peer: 0,
            reserve_rate: 30,
            connect_rate: 30,
            access: Lists::default(),
            announce: Vec::new(),
            answer_ping: true,
        }
    }
}

impl Config {
    /// Whether this makes sense as a whole.
    ///
    /// # Errors
    ///
    /// The first setting that does not, by name and with the remedy.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let check = |is_wrong, setting, problem: &str| match is_wrong {
            true => Err(ConfigError::new(setting, problem)),
            false => Ok(()),
        };
        let problem = "a relay without slots relays nothing; try 1 or more";
        check(self.max_reservations == 0, "max_reservations", problem)?;
        for (setting, duration) in [
            ("reservation_ttl", self.reservation_ttl),
            ("grace", self.grace),
            ("heartbeat", self.heartbeat),
            ("silence", self.silence),
            ("probe_after", self.probe_after),
            ("sweep", self.sweep),
            ("idle_timeout", self.idle_timeout),
            ("circuit_duration", self.circuit_duration),
        ] {
            check(duration > LONGEST, setting, "is over a year; try 8760h or less")?;
        }
        let problem = "a reservation lasts at least a second; try 1h";
        check(self.reservation_ttl < SHORTEST, "reservation_ttl", problem)?;
        let to_answer = self.silence.saturating_sub(self.heartbeat);
        let is_unanswerable = !self.heartbeat.is_zero() && to_answer < Duration::from_secs(1);
        let problem = "nobody could answer in time; try twice the heartbeat or more";
        check(is_unanswerable, "silence", problem)?;
        let is_short = |time: Duration, shortest| !time.is_zero() && time < shortest;
        let problem = "no peer far away could answer in time; try 3s, or 0s to ask nobody";
        check(is_short(self.probe, SHORTEST_PROBE), "probe", problem)?;
        let problem = "js-libp2p would not wait so long for an answer; try 3500ms or less";
        check(self.probe > LONGEST_PROBE, "probe", problem)?;
        check(self.sweep.is_zero(), "sweep", "without a sweep no slot ever comes back; try 1s")?;
        let problem = "clients are told whole seconds; try 1s or more, or 0s for no limit";
        check(is_short(self.circuit_duration, SHORTEST), "circuit_duration", problem)?;
        self.access.validate()?;
        self.announce.iter().try_for_each(announceable)
    }

    /// The cap on slots billed to one address; `None`: no cap.
    pub(crate) fn reservations_per_ip(&self) -> Option<usize> {
        cap(self.max_reservations_per_ip, self.max_reservations / SHARE_PER_IP, LEAST_PER_IP)
    }

    /// The cap on slots billed to one subnet; `None`: no cap.
    pub(crate) fn reservations_per_subnet(&self) -> Option<usize> {
        let share = self.max_reservations / SHARE_PER_SUBNET;
        cap(self.max_reservations_per_subnet, share, LEAST_PER_SUBNET)
    }

    /// The cap on circuits of the sources of one address; `None`: no cap.
    pub(crate) fn circuits_per_ip(&self) -> Option<usize> {
        let share = self.max_circuits / SHARE_OF_CIRCUITS_PER_IP;
        cap(self.max_circuits_per_ip, share, LEAST_CIRCUITS)
    }

    /// The cap on circuits of the sources of one subnet; `None`: no cap.
    pub(crate) fn circuits_per_subnet(&self) -> Option<usize> {
        let share = self.max_circuits / SHARE_OF_CIRCUITS_PER_SUBNET;
        cap(self.max_circuits_per_subnet, share, LEAST_CIRCUITS)
    }

    /// For how long a reservation is granted on these terms.
    pub(crate) fn ttl(&self, terms: Terms) -> Duration {
        let ttl = terms.reservation_ttl.unwrap_or(self.reservation_ttl);
        ttl.clamp(SHORTEST, LONGEST)
    }

    /// What a circuit may carry on these terms, as it is told and enforced.
    pub(crate) fn circuit_limit(&self, terms: Terms) -> Limit {
        let duration = terms.circuit_duration.unwrap_or(self.circuit_duration);
        let bytes = terms.circuit_bytes.unwrap_or(self.circuit_bytes);
        Limit {
            duration: (!duration.is_zero()).then_some(duration.clamp(SHORTEST, LONGEST)),
            bytes: (bytes > 0).then_some(bytes),
        }
    }
}

/// A cap as people give it, where zero stands for none; or else this share, but at least so many.
fn cap(given: Option<usize>, share: usize, least: usize) -> Option<usize> {
    let cap = given.unwrap_or(share.max(least));
    (cap > 0).then_some(cap)
}

/// Whether clients could be sent to this address at all: it names a host, and a port unless the name stands
/// for whole addresses (dnsaddr).
fn announceable(address: &Multiaddr) -> Result<(), ConfigError> {
    let parts: Vec<_> =
        address.iter().filter(|part| !matches!(part, Protocol::Ip6zone(_))).collect();
    let has_host = match parts.first() {
        Some(Protocol::Ip4(ip)) => !ip.is_unspecified(),
        Some(Protocol::Ip6(ip)) => !ip.is_unspecified(),
        Some(Protocol::Dns(_) | Protocol::Dns4(_) | Protocol::Dns6(_)) => true,
        Some(Protocol::Dnsaddr(_) | Protocol::Memory(_)) => true,
        _ => false,
    };
    let needs_port = !matches!(parts.first(), Some(Protocol::Dnsaddr(_) | Protocol::Memory(_)));
    let has_port = parts.get(1).is_some_and(
        |part| matches!(part, Protocol::Tcp(port) | Protocol::Udp(port) if *port != 0),
    );
    let problem = if parts.contains(&Protocol::P2pCircuit) {
        "leads through another relay; give an address of this one"
    } else if !has_host {
        "names no host that a client can dial; try /dns4/relay.example.org/tcp/4001"
    } else if needs_port && !has_port {
        "names no port; add the one that clients dial: /tcp/4001"
    } else {
        return Ok(());
    };
    let shown = if parts.is_empty() { "an empty address".into() } else { address.to_string() };
    Err(ConfigError::new("announce", format!("{shown} {problem}")))
}

/// A setting that makes no sense, and the remedy, in one line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigError {
    setting: &'static str,
    problem: String,
}

impl ConfigError {
    pub(crate) fn new(setting: &'static str, problem: impl Into<String>) -> Self {
        let problem = problem.into();
        Self { setting, problem }
    }

    /// The field of [`Config`] that is meant.
    pub fn setting(&self) -> &'static str {
        self.setting
    }

    /// What is wrong with it, and what to do.
    pub fn problem(&self) -> &str {
        &self.problem
    }
}

impl From<(&'static str, String)> for ConfigError {
    fn from((setting, problem): (&'static str, String)) -> Self {
        Self { setting, problem }
    }
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.setting, self.problem)
    }
}

impl std::error::Error for ConfigError {}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(change: impl FnOnce(&mut Config)) -> &'static str {
        let mut config = Config::default();
        change(&mut config);
        config.validate().expect_err("it makes no sense").setting()
    }

    #[test]
    fn the_defaults_make_sense() {
        assert_eq!(Config::default().validate(), Ok(()));
    }

    #[test]
    fn what_makes_no_sense_is_refused_by_name() {
        assert_eq!(refused(|c| c.max_reservations = 0), "max_reservations");
        assert_eq!(refused(|c| c.reservation_ttl = Duration::ZERO), "reservation_ttl");
        assert_eq!(refused(|c| c.reservation_ttl = Duration::MAX), "reservation_ttl");
        assert_eq!(refused(|c| c.grace = Duration::MAX), "grace");
        assert_eq!(refused(|c| c.sweep = Duration::ZERO), "sweep");
        let short = Duration::from_millis(10);
        assert_eq!(refused(|c| c.circuit_duration = short), "circuit_duration");
    }

    #[test]
    fn an_announced_address_names_a_host_and_a_port() {
        let announced = |text: &str| {
            let announce = vec![text.parse().unwrap()];
            Config { announce, ..Config::default() }.validate().map_err(|error| error.to_string())
        };
        for (text, problem) in [
            ("", "names no host"),
            ("/ip4/0.0.0.0/tcp/4001", "names no host"),
            ("/ip6/::/tcp/4001", "names no host"),
            ("/tcp/4001", "names no host"),
            ("/unix/x", "names no host"),
            ("/dns4/relay.example.org", "names no port"),
            ("/ip4/198.51.100.7", "names no port"),
            ("/ip4/198.51.100.7/tcp/0", "names no port"),
            ("/ip4/198.51.100.7/tls/ws", "names no port"),
        ] {
            let error = announced(text).unwrap_err();
            assert!(error.starts_with("announce: ") && error.contains(problem), "{error}");
        }
        for text in [
            "/dnsaddr/relay.example.org",
            "/dns6/relay.example.org/tcp/443/tls/ws",
            "/ip6zone/eth0/ip6/fe80::1/tcp/4001",
            "/ip4/198.51.100.7/udp/4001/quic-v1",
        ] {
            assert_eq!(announced(text), Ok(()), "{text}");
        }
    }

    #[test]
    fn the_caps_by_address_and_subnet_follow_the_total_unless_given() {
        let caps = |total, given| {
            let config = Config {
                max_reservations: total,
                max_reservations_per_ip: given,
                max_reservations_per_subnet: given,
                ..Config::default()
            };
            (config.reservations_per_ip(), config.reservations_per_subnet())
        };
        assert_eq!(caps(1024, None), (Some(64), Some(256)));
        assert_eq!(caps(10, None), (Some(8), Some(64)));
        assert_eq!(caps(1024, Some(3)), (Some(3), Some(3)));
        assert_eq!(caps(1024, Some(0)), (None, None));
    }
}
