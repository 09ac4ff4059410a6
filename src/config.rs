//! Every limit and timer of the relay, with its unit and default, and the one function that validates them.

use std::{
    collections::HashSet,
    iter,
    net::{Ipv4Addr, Ipv6Addr},
    time::Duration,
};

use ipnet::IpNet;
use libp2p::{Multiaddr, multiaddr::Protocol};

use crate::access::Lists;

/// The longest duration of any setting: one year, so that an `Instant` can hold every deadline.
pub(crate) const LONGEST: Duration = Duration::from_secs(365 * 24 * 60 * 60);

/// The shortest reservation or circuit: clients are told whole seconds.
pub(crate) const SHORTEST: Duration = Duration::from_secs(1);

/// The shortest probe: the round trip to a distant phone.
const SHORTEST_PROBE: Duration = Duration::from_millis(500);

/// The longest probe: js-libp2p gives up 5 s after it began to dial.
const LONGEST_PROBE: Duration = Duration::from_millis(3500);

/// The cap on slots of one address is the total divided by this, unless given.
const SHARE_PER_IP: usize = 16;
/// The least such cap: enough for a household or a small office behind one address.
const LEAST_PER_IP: usize = 8;
/// One address may hold half of a table of up to this many slots, and at least half of this number in a larger one: all
/// clients may be at one site.
const SMALL_TABLE: usize = 64;

/// The cap on slots of one subnet, and that on circuits of its sources, are the total divided by this, unless given.
const SHARE_PER_SUBNET: usize = 4;
/// The least such cap: enough for a site, or a part of a carrier's network.
const LEAST_PER_SUBNET: usize = 64;

/// The cap on circuits of the sources of one address is the total divided by this, unless given.
const SHARE_OF_CIRCUITS_PER_IP: usize = 8;
/// The least such cap: as many as one peer may be part of by default.
const LEAST_CIRCUITS_PER_IP: usize = 64;

/// What the relay grants, to how many peers and for how long.
///
/// ```
/// let config = relaylet::Config::default().with(|config| {
///     config.max_reservations = 100;
///     config.circuit_bytes = 0; // no limit
/// });
/// # assert_eq!(config.validate(), Ok(()));
/// ```
///
/// [`Behaviour::new`](crate::Behaviour::new) rejects an invalid one. A configuration can be replaced while the relay
/// runs ([`Behaviour::set_config`](crate::Behaviour::set_config)). All settings apply from the next request or sweep
/// on, with three exceptions: granted terms and admitted circuits keep what they were promised;
/// [`answer_ping`](Self::answer_ping) applies to new connections; and the program's `Node` needs a restart to raise
/// [`max_circuits_per_peer`](Self::max_circuits_per_peer), because its muxer's limits follow from the value at the
/// start.
///
/// The fields of [`libp2p::relay::Config`](https://docs.rs/libp2p-relay) have these names:
///
/// | `libp2p::relay::Config` | here |
/// | --- | --- |
/// | `max_reservations` | [`max_reservations`](Self::max_reservations) |
/// | `max_reservations_per_peer` | none: a peer has one slot; see [`max_reservations_per_ip`](Self::max_reservations_per_ip) |
/// | `reservation_duration` | [`reservation_ttl`](Self::reservation_ttl) |
/// | `max_circuits`, `max_circuits_per_peer` | the same |
/// | `max_circuit_duration` | [`circuit_duration`](Self::circuit_duration) |
/// | `max_circuit_bytes` | [`circuit_bytes`](Self::circuit_bytes), for each direction |
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Config {
    /// How many peers may hold a slot at a time. Default 1024.
    pub max_reservations: usize,
    /// How many slots one IP address may hold; an IPv6 address counts as its /64.
    ///
    /// Default `None`: a sixteenth of [`max_reservations`](Self::max_reservations), at least 32; of fewer than 64 slots
    /// half, at least 8. Zero: no cap.
    pub max_reservations_per_ip: Option<usize>,
    /// How many slots one subnet may hold: an IPv4 /24, an IPv6 /48.
    ///
    /// Default `None`: a quarter of [`max_reservations`](Self::max_reservations), at least 64. Zero: no cap.
    pub max_reservations_per_subnet: Option<usize>,
    /// For how long a reservation is granted, and renewed. Default 1 h; at least 1 s.
    pub reservation_ttl: Duration,
    /// How long a peer that disconnected keeps its claim to its slot.
    ///
    /// Default 30 s; zero frees the slot at once.
    pub grace: Duration,
    /// The silence after which a peer that holds a slot or is part of a circuit is probed over `/ipfs/ping/1.0.0`; up
    /// to a quarter less, at random.
    ///
    /// Default 30 s; zero: peers are probed, and time out, only while a newcomer waits ([`probe`](Self::probe)).
    pub heartbeat: Duration,
    /// The silence after which a peer that was probed has timed out: its circuits end, and its slot enters grace. In
    /// `Node`, a peer that accepts nothing of what is sent to it for as long times out, too.
    ///
    /// Default 60 s; at least 1 s above [`heartbeat`](Self::heartbeat).
    pub silence: Duration,
    /// Whether the connection of a peer that timed out is closed. Default false: connections of an embedding swarm may
    /// serve other protocols. (In the program and its `Node` it is always on.)
    ///
    /// Where it is off, whatever arrives over that connection within the grace makes the slot live again.
    pub close_silent: bool,
    /// How long a peer has to answer a probe while a newcomer waits for its slot, and how long the newcomer waits. At
    /// most 64 newcomers wait at a time, at most 16 of them from one subnet and 8 from one address; others are refused
    /// at once.
    ///
    /// Default 3 s; at least 0.5 s, and at most 3.5 s: js-libp2p gives up 5 s after it began to dial. Zero: a newcomer
    /// to a full table is refused at once.
    pub probe: Duration,
    /// The silence after which a peer is probed while a newcomer waits for its slot. Default 10 s.
    pub probe_after: Duration,
    /// The time between two sweeps. Default 1 s; above zero.
    pub sweep: Duration,
    /// The time without a reservation or a circuit after which a connection is closed.
    ///
    /// Default zero: none is closed, because connections of an embedding swarm may serve other protocols. (The
    /// program's default is 1 min.)
    pub idle_timeout: Duration,
    /// How many circuits may be open at a time, those being set up included. Default 1024.
    pub max_circuits: usize,
    /// How many circuits the sources of one IP address may have open; an IPv6 address counts as its /64.
    ///
    /// Default `None`: an eighth of [`max_circuits`](Self::max_circuits), at least 64. Zero: no cap.
    pub max_circuits_per_ip: Option<usize>,
    /// How many circuits the sources of one subnet may have open: an IPv4 /24, an IPv6 /48.
    ///
    /// Default `None`: a quarter of [`max_circuits`](Self::max_circuits), at least 64. Zero: no cap.
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
    /// Default zero: no cap. Circuits share it by fair queueing; a new cap applies to open ones at once.
    pub bandwidth: u64,
    /// How many payload bytes a second one peer may send and receive together through its circuits,
    /// whether as source or as target. Default zero: no cap. Its circuits share it by fair queueing.
    pub bandwidth_per_peer: u64,
    /// How many RESERVEs a minute a peer may send, all of which may arrive at once; the peers of one address together
    /// ten times as many. Default 30; zero: no limit.
    ///
    /// A renewal counts only towards the rate of its peer.
    pub reserve_rate: u32,
    /// How many CONNECTs a minute a peer may send; the peers of one address together ten times as many. Default 30;
    /// zero: no limit.
    pub connect_rate: u32,
    /// Who may use the relay, unless an app decides ([`Behaviour::set_access`](crate::Behaviour::set_access)). Default:
    /// all peers.
    pub access: Lists,
    /// The addresses that reservations contain, *instead* of those found. Default: none.
    ///
    /// The relay's `/p2p/…` at the end may be left out.
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
            close_silent: false,
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
    /// Changes fields in an expression.
    pub fn with(mut self, change: impl FnOnce(&mut Self)) -> Self {
        change(&mut self);
        self
    }

    /// Checks all settings.
    ///
    /// # Errors
    ///
    /// The first invalid setting, by name and with the remedy.
    #[doc(hidden)]
    pub fn validate(&self) -> Result<(), ConfigError> {
        let check = |is_wrong, setting, problem: &str| {
            if is_wrong { Err(ConfigError::new(setting, problem)) } else { Ok(()) }
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
        let least = self.heartbeat + Duration::from_secs(1);
        let problem = "leaves no time to answer; try twice the heartbeat or more";
        check(!self.heartbeat.is_zero() && self.silence < least, "silence", problem)?;
        let is_short = |time: Duration, shortest| !time.is_zero() && time < shortest;
        let problem = "is too short for distant peers; try 3s, or 0s to probe none";
        check(is_short(self.probe, SHORTEST_PROBE), "probe", problem)?;
        let problem = "is longer than js-libp2p waits for an answer; try 3500ms or less";
        check(self.probe > LONGEST_PROBE, "probe", problem)?;
        check(self.sweep.is_zero(), "sweep", "without a sweep no slot is freed; try 1s")?;
        let problem = "clients are told whole seconds; try 1s or more, or 0s for no limit";
        check(is_short(self.circuit_duration, SHORTEST), "circuit_duration", problem)?;
        validate_lists(&self.access)?;
        self.announce.iter().try_for_each(validate_address)
    }

    /// The caps on slots.
    pub(crate) fn slot_caps(&self) -> Caps {
        let total = self.max_reservations;
        let least = (total.min(SMALL_TABLE) / 2).max(LEAST_PER_IP);
        let per_ip = self.max_reservations_per_ip.unwrap_or((total / SHARE_PER_IP).max(least));
        Caps::new(total, self.max_reservations_per_subnet, per_ip)
    }

    /// The caps on circuits, which count by source.
    pub(crate) fn circuit_caps(&self) -> Caps {
        let share = self.max_circuits / SHARE_OF_CIRCUITS_PER_IP;
        let per_ip = self.max_circuits_per_ip.unwrap_or(share.max(LEAST_CIRCUITS_PER_IP));
        Caps::new(self.max_circuits, self.max_circuits_per_subnet, per_ip)
    }
}

/// How many slots or circuits each scope may hold; `None`: no cap.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Caps {
    /// All together.
    pub total: Option<usize>,
    /// Each subnet.
    pub per_subnet: Option<usize>,
    /// Each address.
    pub per_address: Option<usize>,
}

impl Caps {
    /// For a subnet and an address, zero means no cap.
    fn new(total: usize, per_subnet: Option<usize>, per_address: usize) -> Self {
        let per_subnet = per_subnet.unwrap_or((total / SHARE_PER_SUBNET).max(LEAST_PER_SUBNET));
        let cap = |cap: usize| (cap > 0).then_some(cap);
        Self { total: Some(total), per_subnet: cap(per_subnet), per_address: cap(per_address) }
    }
}

/// Checks that each entry is a whole subnet and not one host in it, and that none is IPv4 written as IPv6: a client's
/// address is looked up as IPv4 then.
pub(crate) fn validate_subnets(setting: &'static str, list: &[IpNet]) -> Result<(), ConfigError> {
    for subnet in list {
        let problem = match subnet.trunc() {
            whole if whole != *subnet => format!("{subnet} names one host in it; try {whole}"),
            IpNet::V6(v6) if v6.addr().to_ipv4_mapped().is_some() => {
                format!("{subnet} stands for IPv4; write it as IPv4")
            }
            _ => continue,
        };
        return Err(ConfigError::new(setting, problem));
    }
    Ok(())
}

/// Checks that the lists have valid subnets and do not contradict each other.
///
/// # Errors
///
/// The first invalid list, by name and with the remedy.
fn validate_lists(lists: &Lists) -> Result<(), ConfigError> {
    let Lists { allow_peer, deny_peer, allow_subnet, deny_subnet, allow_connect_peer, .. } = lists;
    let both = [("allow_peer", allow_peer), ("allow_connect_peer", allow_connect_peer)];
    for (setting, allowed) in both {
        if let Some(peer) = allowed.intersection(deny_peer).next() {
            let problem = format!("{peer} is denied as well; take it off one of the lists");
            return Err(ConfigError::new(setting, problem));
        }
    }
    validate_subnets("allow_subnet", allow_subnet)?;
    validate_subnets("deny_subnet", deny_subnet)?;
    let denied: HashSet<_> = deny_subnet.iter().copied().collect();
    for allowed in allow_subnet {
        let mut wider = iter::successors(Some(*allowed), IpNet::supernet);
        if let Some(denied) = wider.find(|net| denied.contains(net)) {
            let problem = format!("{allowed} lies in {denied}, which is denied; drop one");
            return Err(ConfigError::new("allow_subnet", problem));
        }
    }
    Ok(())
}

/// Checks that clients can dial this address: it names a host, and a port unless the name stands for whole addresses
/// (dnsaddr).
fn validate_address(address: &Multiaddr) -> Result<(), ConfigError> {
    use Protocol::{Dns, Dns4, Dns6, Dnsaddr, Ip4, Ip6, Ip6zone, Memory, P2pCircuit, Tcp, Udp};
    let parts: Vec<_> = address.iter().filter(|part| !matches!(part, Ip6zone(_))).collect();
    let no_host = "names no host that a client can dial; try /dns4/relay.example.org/tcp/4001";
    let problem = match parts.as_slice() {
        [] => return Err(ConfigError::new("announce", format!("an empty address {no_host}"))),
        parts if parts.contains(&P2pCircuit) => {
            "leads through another relay; give an address of this one"
        }
        [Ip4(Ipv4Addr::UNSPECIFIED) | Ip6(Ipv6Addr::UNSPECIFIED), ..] => no_host,
        [Dnsaddr(_) | Memory(_), ..] => return Ok(()),
        [Ip4(_) | Ip6(_) | Dns(_) | Dns4(_) | Dns6(_), rest @ ..] => match rest {
            [Tcp(1..) | Udp(1..), ..] => return Ok(()),
            _ => "names no port; add the one that clients dial: /tcp/4001",
        },
        _ => no_host,
    };
    Err(ConfigError::new("announce", format!("{address} {problem}")))
}

/// An invalid setting and the remedy, in one line.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{setting}: {problem}")]
pub struct ConfigError {
    setting: &'static str,
    /// What is wrong with it, and the remedy.
    pub(crate) problem: String,
}

impl ConfigError {
    pub(crate) fn new(setting: &'static str, problem: impl Into<String>) -> Self {
        Self { setting, problem: problem.into() }
    }

    /// The field of [`Config`].
    #[doc(hidden)]
    pub fn setting(&self) -> &'static str {
        self.setting
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(change: impl FnOnce(&mut Config)) -> &'static str {
        let mut config = Config::default();
        change(&mut config);
        config.validate().expect_err("an invalid value").setting()
    }

    #[test]
    fn the_defaults_are_valid() {
        assert_eq!(Config::default().validate(), Ok(()));
    }

    #[test]
    fn an_invalid_value_is_an_error_that_names_the_setting() {
        assert_eq!(refused(|config| config.max_reservations = 0), "max_reservations");
        assert_eq!(refused(|config| config.reservation_ttl = Duration::ZERO), "reservation_ttl");
        assert_eq!(refused(|config| config.reservation_ttl = Duration::MAX), "reservation_ttl");
        assert_eq!(refused(|config| config.grace = Duration::MAX), "grace");
        assert_eq!(refused(|config| config.sweep = Duration::ZERO), "sweep");
        let short = Duration::from_millis(10);
        assert_eq!(refused(|config| config.circuit_duration = short), "circuit_duration");
    }

    #[test]
    fn an_announced_address_must_have_a_host_and_a_port() {
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
            (config.slot_caps().per_address, config.slot_caps().per_subnet)
        };
        assert_eq!(caps(1024, None), (Some(64), Some(256)));
        assert_eq!(caps(10, None), (Some(8), Some(64)));
        // A site behind one address has half of a small table.
        assert_eq!(caps(64, None), (Some(32), Some(64)));
        assert_eq!(caps(400, None), (Some(32), Some(100)));
        assert_eq!(caps(1024, Some(3)), (Some(3), Some(3)));
        assert_eq!(caps(1024, Some(0)), (None, None));
    }

    #[test]
    fn an_invalid_combination_is_an_error_that_names_the_setting() {
        let alice = libp2p::PeerId::random();
        let refused = |lists: Lists| validate_lists(&lists).expect_err("a contradiction").setting();
        for (setting, allow_peer, allow_connect_peer) in [
            ("allow_peer", HashSet::from([alice]), HashSet::new()),
            ("allow_connect_peer", HashSet::new(), HashSet::from([alice])),
        ] {
            let lists = Lists {
                allow_peer,
                allow_connect_peer,
                deny_peer: [alice].into(),
                ..Lists::default()
            };
            assert_eq!(refused(lists), setting);
        }
        for subnet in ["192.0.2.7/24", "::ffff:192.0.2.0/120"] {
            let lists = Lists { deny_subnet: vec![subnet.parse().unwrap()], ..Lists::default() };
            assert_eq!(refused(lists), "deny_subnet", "{subnet}");
        }
        for (allowed, is_denied) in
            [("10.1.0.0/16", true), ("10.0.0.0/8", true), ("10.0.0.0/7", false)]
        {
            let lists = Lists {
                allow_subnet: vec![allowed.parse().unwrap()],
                deny_subnet: vec!["192.0.2.0/24".parse().unwrap(), "10.0.0.0/8".parse().unwrap()],
                ..Lists::default()
            };
            let config = Config { access: lists, ..Config::default() };
            assert_eq!(config.validate().is_err(), is_denied, "{allowed}");
        }
    }
}
