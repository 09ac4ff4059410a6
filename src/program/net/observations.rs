//! At which addresses peers observe the relay, and which of these the relay confirms.
//!
//! Sans-IO. In identify each peer names the address at which it reached the relay, and may lie. The relay sends a
//! confirmed address to every client, and clients dial it. Therefore:
//!
//! - An observation counts only if it is of a global IP address with a port that the relay listens on. So a liar can have
//!   clients dial another machine, but no service of its choice there. Names do not count, because their owner can point
//!   them elsewhere later; the operator can announce one.
//! - A peer observes only addresses of the IP version that it connects over. Otherwise a liar with many IPv6 subnets,
//!   which are cheap, could decide on an IPv4 address.
//! - One observation counts for each network (IPv4: a /24; IPv6: a /32, because anyone can get a /48 for free), and one
//!   for each peer.
//! - An address is confirmed when at least [`MIN_OBSERVERS`] observers, and more than half of all, agree on it.
//! - The last observation of a network counts, while its connection is up and for [`OBSERVATION_TTL`] after that: when the
//!   relay's address changes, its clients reconnect and observe the new one.

use std::{
    collections::HashMap,
    net::IpAddr,
    time::{Duration, Instant},
};

use libp2p::{Multiaddr, PeerId, multiaddr::Protocol};

use crate::{
    address::{self, ClientPrefix},
    relay::connections::Origin,
};

/// How many observers have to agree: as many as in go-libp2p.
const MIN_OBSERVERS: usize = 4;

/// How long an observation counts after its connection has closed: longer than most clients stay away, so that the
/// confirmed addresses do not depend on which clients are connected.
const OBSERVATION_TTL: Duration = Duration::from_secs(60 * 60);

/// How many observations are kept for each port and IP version. One more replaces the oldest.
const MAX_OBSERVATIONS: usize = 256;

/// The minimum time between two changes of the confirmed addresses: each change is pushed to all peers.
const CHANGE_INTERVAL: Duration = Duration::from_secs(5 * 60);

/// How often the confirmed addresses are updated and expired observations removed.
const UPDATE_INTERVAL: Duration = Duration::from_secs(60);

/// All observations, and the addresses that they confirm. `C` identifies a connection.
#[derive(Debug)]
pub struct Observations<C> {
    /// By service, then by the observer's network.
    by_service: HashMap<Service, HashMap<ClientPrefix, Observation<C>>>,
    confirmed: Vec<Multiaddr>,
    /// When the confirmed addresses may change again.
    next_change: Instant,
    next_update: Instant,
}

/// The part of an observed address besides the IP address itself: its version, and what follows it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Service {
    is_ipv4: bool,
    rest: Multiaddr,
}

/// The last observation from a network.
#[derive(Debug)]
struct Observation<C> {
    peer: PeerId,
    connection: C,
    ip: IpAddr,
    observed_at: Instant,
    closed_at: Option<Instant>,
}

impl<C: Copy + Eq> Observations<C> {
    /// No observations yet.
    pub fn new(now: Instant) -> Self {
        Self {
            by_service: HashMap::new(),
            confirmed: Vec::new(),
            next_change: now,
            next_update: now + UPDATE_INTERVAL,
        }
    }

    /// The confirmed addresses: at most one for each port and IP version.
    pub fn confirmed(&self) -> &[Multiaddr] {
        &self.confirmed
    }

    /// Adds an observation, if it counts: the peer at `from` reached `relay`, which listens on `listening`, at `address`.
    pub fn add<'a>(
        &mut self,
        connection: C,
        from: &Origin,
        address: &Multiaddr,
        relay: PeerId,
        mut listening: impl Iterator<Item = &'a Multiaddr>,
        now: Instant,
    ) {
        let network = from.prefix.map(|prefix| prefix.wide().unwrap_or(prefix.subnet().0));
        let (Some(network), Some((ip, service))) = (network, parse(address, relay)) else {
            return;
        };
        let is_ours = |own| parse(own, relay).is_some_and(|(_, own)| own == service);
        let is_same_version =
            address::ip(&from.address).is_some_and(|ip| ip.is_ipv4() == service.is_ipv4);
        let counts = is_same_version && !from.relayed && address::is_global(address);
        if !counts || !listening.any(is_ours) {
            return;
        }
        let observations = self.by_service.entry(service).or_default();
        // One for each peer and each network.
        observations.retain(|other, kept| *other == network || kept.peer != from.peer);
        if observations.len() >= MAX_OBSERVATIONS && !observations.contains_key(&network) {
            let oldest = observations.iter().min_by_key(|(_, observation)| observation.observed_at);
            if let Some(network) = oldest.map(|(network, _)| *network) {
                observations.remove(&network);
            }
        }
        let (peer, observed_at) = (from.peer, now);
        let observation = Observation { peer, connection, ip, observed_at, closed_at: None };
        observations.insert(network, observation);
        self.next_update = self.next_update.min(self.next_change.max(now));
    }

    /// Records that a connection was closed.
    pub fn on_connection_closed(&mut self, connection: C, now: Instant) {
        let all = self.by_service.values_mut().flat_map(HashMap::values_mut);
        for observation in all.filter(|observation| observation.connection == connection) {
            observation.closed_at = Some(now);
        }
    }

    /// Updates the confirmed addresses if that is due. Returns those that became confirmed or no longer are.
    pub fn update(&mut self, now: Instant) -> Vec<Multiaddr> {
        if now < self.next_update {
            return Vec::new();
        }
        self.next_update = now + UPDATE_INTERVAL;
        let is_current = |closed_at| now.saturating_duration_since(closed_at) < OBSERVATION_TTL;
        self.by_service.retain(|_, observations| {
            observations.retain(|_, observation| observation.closed_at.is_none_or(is_current));
            !observations.is_empty()
        });
        if now < self.next_change {
            // The confirmed addresses are updated as soon as they may change.
            self.next_update = self.next_update.min(self.next_change);
            return Vec::new();
        }
        let confirmed = self.by_service.iter().filter_map(|(service, observations)| {
            let ip = majority(observations.values().map(|observation| observation.ip))?;
            Some(service.rest.iter().fold(Multiaddr::from(ip), Multiaddr::with))
        });
        let mut confirmed: Vec<_> = confirmed.collect();
        confirmed.sort_unstable();
        let earlier = std::mem::replace(&mut self.confirmed, confirmed);
        let all = earlier.iter().chain(&self.confirmed);
        let changed = all.filter(|own| earlier.contains(own) != self.confirmed.contains(own));
        if changed.clone().next().is_some() {
            self.next_change = now + CHANGE_INTERVAL;
        }
        changed.cloned().collect()
    }
}

/// The address that more than half of all observers agree on, and at least [`MIN_OBSERVERS`].
fn majority(observed: impl Iterator<Item = IpAddr>) -> Option<IpAddr> {
    let (mut votes, mut all) = (HashMap::<_, usize>::new(), 0);
    for ip in observed {
        *votes.entry(ip).or_default() += 1;
        all += 1;
    }
    let is_elected = |count: usize| count >= MIN_OBSERVERS && 2 * count > all;
    votes.into_iter().find_map(|(ip, count)| is_elected(count).then_some(ip))
}

/// Splits an address into its IP address and the rest, without the relay's peer id at its end.
fn parse(address: &Multiaddr, relay: PeerId) -> Option<(IpAddr, Service)> {
    let ip = address::ip(address)?;
    let rest = address.iter().skip(1).filter(|part| *part != Protocol::P2p(relay)).collect();
    Some((ip, Service { is_ipv4: ip.is_ipv4(), rest }))
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: Duration = OBSERVATION_TTL;
    const TRUE: &str = "/ip4/5.5.5.5/tcp/4001";
    const TRUE6: &str = "/ip6/2a00::5/tcp/4001";
    const LIE: &str = "/ip4/6.6.6.6/tcp/4001";

    /// A relay that listens on port 4001, and its observers.
    struct Fixture {
        observations: Observations<u32>,
        relay: PeerId,
        now: Instant,
        connections: u32,
    }

    impl Fixture {
        fn new() -> Self {
            let now = Instant::now();
            Self {
                observations: Observations::new(now),
                relay: PeerId::random(),
                now,
                connections: 0,
            }
        }

        /// A new peer at `from` observes the relay at `reached`.
        fn observe(&mut self, from: &str, reached: &str) -> u32 {
            self.observe_as(PeerId::random(), from, reached)
        }

        fn observe_as(&mut self, peer: PeerId, from: &str, reached: &str) -> u32 {
            self.connections += 1;
            let origin = Origin::new(peer, address(from), from.contains("p2p-circuit"));
            let listening = ["/ip4/10.0.0.2/tcp/4001", "/ip6/fd00::2/tcp/4001"].map(address);
            self.observations.add(
                self.connections,
                &origin,
                &address(reached),
                self.relay,
                listening.iter(),
                self.now,
            );
            self.connections
        }

        /// `count` new peers observe the relay at `reached`, each from a subnet of its own, the first from
        /// `10.<first>.0.0`.
        fn observe_from_subnets(&mut self, first: u8, count: u16, reached: &str) -> Vec<u32> {
            let from = |n: u16| format!("/ip4/10.{first}.{n}.1/tcp/1");
            (0..count).map(|n| self.observe(&from(n), reached)).collect()
        }

        /// As [`Self::observe_from_subnets`], over IPv6; the first network is `2a0<first>::/32`.
        fn observe_from_ipv6_networks(&mut self, first: u8, count: u16, reached: &str) -> Vec<u32> {
            let from = |n: u16| format!("/ip6/2a0{first:x}:{n:x}::1/tcp/1");
            (0..count).map(|n| self.observe(&from(n), reached)).collect()
        }

        fn close(&mut self, connection: u32) {
            self.observations.on_connection_closed(connection, self.now);
        }

        fn pass(&mut self, time: Duration) {
            self.now += time;
        }

        fn confirmed(&mut self) -> Vec<String> {
            self.observations.update(self.now);
            self.observations.confirmed().iter().map(Multiaddr::to_string).collect()
        }
    }

    fn address(text: &str) -> Multiaddr {
        text.parse().expect("a multiaddr")
    }

    #[test]
    fn an_address_is_confirmed_once_enough_subnets_observe_it() {
        let mut fixture = Fixture::new();
        fixture.observe_from_subnets(1, 3, TRUE);
        assert!(fixture.confirmed().is_empty());
        fixture.observe("/ip4/10.2.0.1/tcp/1", TRUE);
        assert_eq!(fixture.confirmed(), [TRUE]);
        assert!(fixture.observations.update(fixture.now).is_empty(), "nothing has changed");
    }

    #[test]
    fn an_update_returns_only_the_addresses_that_changed() {
        let mut fixture = Fixture::new();
        let changed = |fixture: &mut Fixture| {
            fixture.pass(CHANGE_INTERVAL);
            fixture.observations.update(fixture.now)
        };
        fixture.observe_from_subnets(1, 4, TRUE);
        assert_eq!(changed(&mut fixture), [address(TRUE)]);
        fixture.observe_from_ipv6_networks(1, 4, TRUE6);
        assert_eq!(changed(&mut fixture), [address(TRUE6)]);
        fixture.observe_from_ipv6_networks(1, 2, "/ip6/2a00::6/tcp/4001");
        assert_eq!(changed(&mut fixture), [address(TRUE6)], "half are no majority");
        assert_eq!(fixture.confirmed(), [TRUE]);
    }

    #[test]
    fn a_host_with_many_identities_is_one_observer() {
        let mut fixture = Fixture::new();
        for host in 0..200 {
            fixture.observe(&format!("/ip4/192.0.2.{host}/tcp/1"), LIE);
            fixture.observe(&format!("/ip6/2001:db8:1:{host:x}::1/tcp/1"), TRUE6);
        }
        assert!(fixture.confirmed().is_empty());
    }

    /// Providers of tunnels give a /48 to anyone.
    #[test]
    fn an_ipv6_provider_with_many_subnets_is_one_observer() {
        let mut fixture = Fixture::new();
        fixture.observe_from_ipv6_networks(1, 4, TRUE6);
        for subnet in 0..2 * MAX_OBSERVATIONS {
            fixture.observe(&format!("/ip6/2001:470:{subnet:x}::1/tcp/1"), "/ip6/2a00::6/tcp/4001");
        }
        assert_eq!(fixture.confirmed(), [TRUE6]);
    }

    #[test]
    fn an_identity_on_many_hosts_is_one_observer() {
        let mut fixture = Fixture::new();
        let peer = PeerId::random();
        for host in 0..200 {
            fixture.observe_as(peer, &format!("/ip4/10.1.{host}.1/tcp/1"), LIE);
        }
        assert!(fixture.confirmed().is_empty());
        assert_eq!(fixture.observations.by_service.values().next().unwrap().len(), 1);
    }

    #[test]
    fn later_observers_outvote_earlier_liars() {
        let mut fixture = Fixture::new();
        fixture.observe_from_subnets(1, 4, LIE);
        assert_eq!(fixture.confirmed(), [LIE]);
        fixture.observe_from_subnets(2, 4, TRUE);
        fixture.pass(CHANGE_INTERVAL);
        assert!(fixture.confirmed().is_empty(), "half are no majority");
        fixture.observe("/ip4/10.3.0.1/tcp/1", TRUE);
        fixture.pass(CHANGE_INTERVAL);
        assert_eq!(fixture.confirmed(), [TRUE]);
    }

    #[test]
    fn confirmed_addresses_change_once_per_interval() {
        let mut fixture = Fixture::new();
        fixture.observe_from_subnets(1, 4, LIE);
        assert_eq!(fixture.confirmed(), [LIE]);
        fixture.observe_from_subnets(2, 9, TRUE);
        fixture.pass(CHANGE_INTERVAL - Duration::from_millis(1));
        assert_eq!(fixture.confirmed(), [LIE]);
        fixture.pass(Duration::from_millis(1));
        assert_eq!(fixture.confirmed(), [TRUE]);
    }

    #[test]
    fn an_observation_after_a_change_does_not_postpone_the_removal_of_expired_ones() {
        let mut fixture = Fixture::new();
        let closed = fixture.observe("/ip4/10.3.0.1/tcp/1", TRUE);
        fixture.close(closed);
        fixture.pass(OBSERVATION_TTL - Duration::from_secs(1));
        fixture.observe_from_subnets(1, 4, TRUE);
        assert_eq!(fixture.confirmed(), [TRUE]);
        fixture.observe("/ip4/10.2.0.1/tcp/1", TRUE);
        fixture.pass(UPDATE_INTERVAL);
        fixture.confirmed();
        assert_eq!(fixture.observations.by_service.values().next().unwrap().len(), 5);
    }

    #[test]
    fn clients_that_reconnect_confirm_a_new_address() {
        let mut fixture = Fixture::new();
        fixture.observe_from_subnets(1, 10, TRUE);
        assert_eq!(fixture.confirmed(), [TRUE]);
        fixture.pass(CHANGE_INTERVAL);
        fixture.observe_from_subnets(1, 10, LIE);
        assert_eq!(fixture.confirmed(), [LIE]);
    }

    #[test]
    fn only_a_global_address_with_a_port_that_the_relay_listens_on_counts() {
        for reached in [
            "/ip4/5.5.5.5/tcp/25",
            "/ip4/5.5.5.5/udp/4001",
            "/ip4/5.5.5.5/tcp/4001/ws",
            "/ip4/5.5.5.5",
            "/ip4/127.0.0.1/tcp/4001",
            "/ip4/192.168.1.1/tcp/4001",
            "/ip6/fe80::1/tcp/4001",
            "/dns4/relay.example.org/tcp/4001",
            "/ip4/5.5.5.5/tcp/4001/p2p/12D3KooWPGM3wYKMsTHGEqbhcBft6cPjA2F3rQmyWTEDD3wCGS1g",
            "/ip4/5.5.5.5/tcp/4001/p2p-circuit",
            "",
        ] {
            let mut fixture = Fixture::new();
            fixture.observe_from_subnets(1, 9, reached);
            fixture.observe_from_ipv6_networks(1, 9, reached);
            assert!(fixture.confirmed().is_empty(), "{reached}");
            assert!(fixture.observations.by_service.is_empty(), "{reached}");
        }
    }

    #[test]
    fn a_peer_over_a_relayed_connection_is_no_observer() {
        let mut fixture = Fixture::new();
        for n in 0..9 {
            fixture.observe(&format!("/ip4/10.1.{n}.1/tcp/1/p2p-circuit"), TRUE);
        }
        assert!(fixture.confirmed().is_empty());
    }

    #[test]
    fn the_relays_peer_id_at_the_end_makes_no_difference() {
        let mut fixture = Fixture::new();
        fixture.observe_from_subnets(1, 3, TRUE);
        let named = format!("{TRUE}/p2p/{}", fixture.relay);
        fixture.observe("/ip4/10.2.0.1/tcp/1", &named);
        assert_eq!(fixture.confirmed(), [TRUE]);
        // Nor does writing the address as IPv4-mapped.
        let mut fixture = Fixture::new();
        fixture.observe_from_subnets(1, 4, "/ip6/::ffff:5.5.5.5/tcp/4001");
        assert_eq!(fixture.confirmed(), [TRUE]);
    }

    #[test]
    fn each_ip_version_is_confirmed_separately() {
        let mut fixture = Fixture::new();
        fixture.observe_from_subnets(1, 5, TRUE);
        fixture.observe_from_ipv6_networks(2, 4, TRUE6);
        assert_eq!(fixture.confirmed(), [TRUE, TRUE6]);
    }

    #[test]
    fn peers_over_one_ip_version_observe_no_address_of_the_other() {
        let mut fixture = Fixture::new();
        fixture.observe_from_ipv6_networks(1, 9, TRUE);
        fixture.observe_from_subnets(1, 9, TRUE6);
        assert!(fixture.confirmed().is_empty());
        // They do not count towards the majority either.
        fixture.observe_from_subnets(2, 4, TRUE);
        fixture.observe_from_ipv6_networks(2, 4, TRUE6);
        fixture.observe_from_ipv6_networks(3, 9, LIE);
        assert_eq!(fixture.confirmed(), [TRUE, TRUE6]);
    }

    #[test]
    fn a_peer_with_an_ipv4_mapped_address_observes_ipv4() {
        let mut fixture = Fixture::new();
        for n in 0..4 {
            fixture.observe(&format!("/ip6/::ffff:10.1.{n}.1/tcp/1"), TRUE);
        }
        assert_eq!(fixture.confirmed(), [TRUE]);
    }

    #[test]
    fn an_observation_counts_until_an_hour_after_its_connection_closed() {
        let mut fixture = Fixture::new();
        let connections = fixture.observe_from_subnets(1, 4, TRUE);
        assert_eq!(fixture.confirmed(), [TRUE]);
        fixture.pass(24 * HOUR);
        assert_eq!(fixture.confirmed(), [TRUE]);
        fixture.close(connections[0]);
        fixture.pass(HOUR - Duration::from_secs(1));
        assert_eq!(fixture.confirmed(), [TRUE]);
        fixture.pass(UPDATE_INTERVAL);
        assert!(fixture.confirmed().is_empty());
    }

    #[test]
    fn closing_an_old_connection_keeps_the_observation_of_the_new_one() {
        let mut fixture = Fixture::new();
        let old = fixture.observe_from_subnets(1, 4, TRUE);
        fixture.observe_from_subnets(1, 4, TRUE);
        for connection in old {
            fixture.close(connection);
        }
        fixture.pass(2 * HOUR);
        assert_eq!(fixture.confirmed(), [TRUE]);
    }

    #[test]
    fn observations_expire_and_are_bounded() {
        let mut fixture = Fixture::new();
        for first in 0..4 {
            let connections = fixture.observe_from_subnets(first, 256, TRUE);
            for connection in connections {
                fixture.close(connection);
            }
            let kept = fixture.observations.by_service.values().next().unwrap().len();
            assert_eq!(kept, MAX_OBSERVATIONS);
        }
        fixture.pass(HOUR);
        fixture.confirmed();
        assert!(fixture.observations.by_service.is_empty());
    }
}
