//! Access rules: which peers may reserve a slot, and which may connect to which.
//!
//! An app decides by implementing [`Access`]; otherwise [`Lists`] of peers and subnets decide.

use std::{collections::HashSet, fmt, net::IpAddr, time::Duration};

use ipnet::IpNet;
use libp2p::{Multiaddr, PeerId, futures::future::BoxFuture};

use crate::address::{self, ClientPrefix};

/// How long the answer of an app may take. After that it counts as [`Permission::Deny`].
pub(crate) const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

/// Decides which peers may use the relay.
///
/// It is asked at each request; again about each peer that holds a slot or is part of a circuit after
/// [`Behaviour::recheck_access`](crate::Behaviour::recheck_access); and about the other connections of a peer when its
/// slot or a stop request may move to one of them. It runs in the swarm's task and must not block:
/// [`Permission::Later`] lets a database or a service decide.
///
/// ```
/// use std::{collections::HashSet, sync::{Arc, RwLock}};
///
/// use libp2p::{Multiaddr, PeerId, identity::Keypair};
/// use relaylet::{Access, Behaviour, Config, Permission};
///
/// struct Members(Arc<RwLock<HashSet<PeerId>>>);
///
/// impl Access for Members {
///     fn may_reserve(&self, peer: PeerId, _from: &Multiaddr) -> Permission {
///         self.0.read().unwrap().contains(&peer).into()
///     }
///
///     fn may_connect(&self, source: PeerId, _from: &Multiaddr, _target: PeerId) -> Permission {
///         self.0.read().unwrap().contains(&source).into()
///     }
/// }
///
/// let members = Arc::new(RwLock::new(HashSet::new()));
/// let mut relay = Behaviour::new(Keypair::generate_ed25519(), Config::default())?;
/// relay.set_access(Members(members.clone()));
/// members.write().unwrap().clear();
/// relay.recheck_access();
/// # Ok::<_, relaylet::ConfigError>(())
/// ```
///
/// With a database that is asked over the network:
///
/// ```
/// # use libp2p::{Multiaddr, PeerId};
/// # use relaylet::{Access, Permission};
/// # #[derive(Clone)]
/// # struct Store;
/// # impl Store {
/// #     async fn has_member(&self, _: PeerId) -> Result<bool, std::io::Error> {
/// #         Ok(true)
/// #     }
/// # }
/// struct Members(Store);
///
/// impl Access for Members {
///     fn may_reserve(&self, peer: PeerId, _from: &Multiaddr) -> Permission {
///         let store = self.0.clone();
///         Permission::Later(Box::pin(async move {
///             store.has_member(peer).await.unwrap_or(false).into()
///         }))
///     }
///
///     fn may_connect(&self, source: PeerId, from: &Multiaddr, _target: PeerId) -> Permission {
///         self.may_reserve(source, from)
///     }
/// }
/// ```
pub trait Access: Send {
    /// Whether `peer`, which comes from `address`, may hold a slot.
    ///
    /// A peer in grace has no connection. If the relay asks again about it, `address` is the first one of the prefix
    /// that its slot counts towards, without a port; it is empty if there is no such prefix.
    fn may_reserve(&self, peer: PeerId, address: &Multiaddr) -> Permission;

    /// Whether `source`, which comes from `address`, may be connected to `target`.
    fn may_connect(&self, source: PeerId, address: &Multiaddr, target: PeerId) -> Permission;

    /// Whether the program accepts a connection from `address`. It asks twice: before the handshake without a peer, and
    /// after it with the peer. Default: yes. The behaviour alone, in another swarm, does not ask.
    fn may_enter(&self, _peer: Option<PeerId>, _address: &Multiaddr) -> bool {
        true
    }
}

/// The decision about a request.
pub enum Permission {
    /// Refuse with PERMISSION_DENIED.
    Deny,
    /// Allow on these terms; `Terms::default()` are those of the configuration.
    Allow(Terms),
    /// Decide as this future does, which is polled in the swarm's task. Deny if it is not ready within 10 s.
    ///
    /// The request waits for the answer, and counts towards its rate before. The future is dropped when the client
    /// disconnects, and may never be polled. While a renewal waits, its slot is kept for up to 10 s, once a term.
    Later(BoxFuture<'static, Permission>),
}

impl fmt::Debug for Permission {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Deny => f.write_str("Deny"),
            Self::Allow(terms) => f.debug_tuple("Allow").field(terms).finish(),
            Self::Later(_) => f.write_str("Later"),
        }
    }
}

impl From<bool> for Permission {
    /// Allowed on the configured terms, or denied.
    fn from(allowed: bool) -> Self {
        if allowed { Self::Allow(Terms::default()) } else { Self::Deny }
    }
}

/// Limits for one reservation or circuit that differ from the configuration.
///
/// `None`: as configured. A time between zero and 1 s counts as 1 s, and one over a year as a year.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Terms {
    /// For how long the reservation is granted. It has no effect on a circuit.
    pub reservation_ttl: Option<Duration>,
    /// How long a circuit may stay open; zero: no limit.
    ///
    /// For a reservation this is only what its holder is told: a circuit gets the terms of [`Access::may_connect`].
    pub circuit_duration: Option<Duration>,
    /// How many bytes a circuit may carry in each direction; zero: no limit. For a reservation as above.
    pub circuit_bytes: Option<u64>,
}

/// Lists of peers and subnets that decide who may use the relay, unless an app does. Empty lists allow every peer.
///
/// They apply to peers that reserve, that connect, and that are connected to. A list that denies takes precedence over
/// one that allows; if both peers and subnets are listed as allowed, a peer has to match both. An IPv6 address that
/// contains an IPv4 one (mapped, NAT64, 6to4) is in the subnets of both.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Lists {
    /// If there are any, only these peers.
    pub allow_peer: HashSet<PeerId>,
    /// Not these peers.
    pub deny_peer: HashSet<PeerId>,
    /// If there are any, only peers that come from these subnets.
    pub allow_subnet: Vec<IpNet>,
    /// No peers that come from these subnets.
    pub deny_subnet: Vec<IpNet>,
    /// These peers may connect to others, whether or not they are in `allow_peer`. If there are any, and `allow_peer`
    /// is empty, only these may connect, and all may reserve.
    pub allow_connect_peer: HashSet<PeerId>,
    /// Whether the subnets are sorted and do not overlap: only in the relay's own copy, which nothing changes.
    pub(crate) is_sorted: bool,
}

impl Lists {
    /// The same lists with their subnets merged and sorted: binary search in many thousands takes at most 1 µs.
    pub(crate) fn sorted(&self) -> Self {
        let [allow_subnet, deny_subnet] =
            [&self.allow_subnet, &self.deny_subnet].map(IpNet::aggregate);
        Self { allow_subnet, deny_subnet, is_sorted: true, ..self.clone() }
    }

    fn allows_address(&self, address: &Multiaddr) -> bool {
        // An IPv4 address that the IPv6 one contains is looked up, too: the client's slots count towards it.
        let ip = address::ip(address);
        let ipv6 = ip.filter(IpAddr::is_ipv6);
        let within = ipv6.map(|ip| ClientPrefix::from(ip).ip()).filter(IpAddr::is_ipv4);
        let is_in = |list| ip.into_iter().chain(within).any(|ip| self.contains(list, ip));
        !is_in(&self.deny_subnet) && (self.allow_subnet.is_empty() || is_in(&self.allow_subnet))
    }

    fn contains(&self, mut list: &[IpNet], ip: IpAddr) -> bool {
        if self.is_sorted {
            let at = list.partition_point(|net| net.broadcast() < ip);
            list = list.get(at..=at).unwrap_or_default(); // the only one that may contain it
        }
        list.iter().any(|net| net.contains(&ip))
    }

    fn allows_peer(&self, peer: &PeerId) -> bool {
        !self.deny_peer.contains(peer)
            && (self.allow_peer.is_empty() || self.allow_peer.contains(peer))
    }

    fn allows_source(&self, source: &PeerId) -> bool {
        let [may_reserve, may_connect] = [&self.allow_peer, &self.allow_connect_peer];
        let is_open = may_reserve.is_empty() && may_connect.is_empty();
        let is_listed = may_reserve.contains(source) || may_connect.contains(source);
        !self.deny_peer.contains(source) && (is_open || is_listed)
    }
}

impl Access for Lists {
    fn may_reserve(&self, peer: PeerId, address: &Multiaddr) -> Permission {
        (self.allows_peer(&peer) && self.allows_address(address)).into()
    }

    fn may_connect(&self, source: PeerId, address: &Multiaddr, target: PeerId) -> Permission {
        let source_may = self.allows_source(&source) && self.allows_address(address);
        (source_may && self.allows_peer(&target)).into()
    }

    fn may_enter(&self, peer: Option<PeerId>, address: &Multiaddr) -> bool {
        let may_do_something = |peer| self.allows_peer(&peer) || self.allows_source(&peer);
        self.allows_address(address) && peer.is_none_or(may_do_something)
    }
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, Ipv6Addr};

    use proptest::{collection::vec, prelude::*};

    use super::*;

    const HOME: &str = "/ip4/192.0.2.7/tcp/1";
    const AWAY: &str = "/ip6/2001:db8::1/tcp/1";

    fn net(text: &str) -> IpNet {
        text.parse().expect("a subnet")
    }

    fn reserves(lists: &Lists, peer: PeerId, from: &str) -> bool {
        !matches!(lists.may_reserve(peer, &from.parse().unwrap()), Permission::Deny)
    }

    fn connects(lists: &Lists, source: PeerId, from: &str, target: PeerId) -> bool {
        !matches!(lists.may_connect(source, &from.parse().unwrap(), target), Permission::Deny)
    }

    #[test]
    fn empty_lists_allow_every_peer() {
        let (alice, bob) = (PeerId::random(), PeerId::random());
        assert!(reserves(&Lists::default(), alice, "/memory/7"));
        assert!(connects(&Lists::default(), alice, HOME, bob));
    }

    #[test]
    fn a_denied_peer_is_neither_source_nor_target() {
        let (alice, bob) = (PeerId::random(), PeerId::random());
        let lists = Lists { deny_peer: [alice].into(), ..Lists::default() };
        assert!(!reserves(&lists, alice, HOME));
        assert!(!connects(&lists, alice, HOME, bob));
        assert!(!connects(&lists, bob, HOME, alice));
        assert!(reserves(&lists, bob, HOME));
    }

    #[test]
    fn allow_lists_must_all_match_and_deny_lists_win() {
        let (alice, bob) = (PeerId::random(), PeerId::random());
        let lists = Lists {
            allow_peer: [alice].into(),
            allow_subnet: vec![net("192.0.2.0/24"), net("2001:db8::/32")],
            deny_subnet: vec![net("2001:db8:dead::/48")],
            ..Lists::default()
        };
        assert!(reserves(&lists, alice, HOME) && reserves(&lists, alice, AWAY));
        assert!(reserves(&lists, alice, "/ip6/::ffff:192.0.2.7/tcp/1"));
        assert!(!reserves(&lists, bob, HOME));
        assert!(!reserves(&lists, alice, "/ip4/198.51.100.1/tcp/1"));
        assert!(!reserves(&lists, alice, "/ip6/2001:db8:dead::1/tcp/1"));
        assert!(!reserves(&lists, alice, "/memory/7"));
    }

    #[test]
    fn an_ipv6_address_that_contains_an_ipv4_one_is_in_the_subnets_of_both() {
        let alice = PeerId::random();
        for from in ["::ffff:192.0.2.7", "64:ff9b::192.0.2.7", "2002:c000:207::1"] {
            let from = format!("/ip6/{from}/tcp/1");
            for (subnet, is_in) in [("192.0.2.0/24", true), ("198.51.100.0/24", false)] {
                let denied = Lists { deny_subnet: vec![net(subnet)], ..Lists::default() };
                let allowed = Lists { allow_subnet: vec![net(subnet)], ..Lists::default() };
                assert_eq!(reserves(&denied, alice, &from), !is_in, "{from}");
                assert_eq!(reserves(&allowed, alice, &from), is_in, "{from}");
            }
        }
        let denied = Lists { deny_subnet: vec![net("64:ff9b::/96")], ..Lists::default() };
        assert!(!reserves(&denied, alice, "/ip6/64:ff9b::192.0.2.7"));
        assert!(reserves(&denied, alice, "/ip4/192.0.2.7"));
        // An IPv6 address without an IPv4 one is looked up itself, and not the first address of its /64.
        let denied = Lists { deny_subnet: vec![net("2001:db8::/128")], ..Lists::default() };
        assert!(reserves(&denied, alice, AWAY));
    }

    #[test]
    fn allow_connect_peer_permits_connect_but_not_reserve() {
        let (device, app, stranger) = (PeerId::random(), PeerId::random(), PeerId::random());
        let mut lists = Lists {
            allow_peer: [device].into(),
            allow_connect_peer: [app].into(),
            ..Lists::default()
        };
        assert!(connects(&lists, app, HOME, device) && !reserves(&lists, app, HOME));
        assert!(!connects(&lists, device, HOME, app));
        assert!(!connects(&lists, stranger, HOME, device));
        // An empty allow_peer list lets every peer reserve; CONNECT stays restricted to allow_connect_peer.
        lists.allow_peer.clear();
        assert!(reserves(&lists, device, HOME));
        assert!(connects(&lists, app, HOME, device));
        assert!(!connects(&lists, device, HOME, stranger));
    }

    /// An IPv4 or IPv6 address, or an IPv6 address that contains an IPv4 one; some are close to each other.
    fn addresses() -> impl Strategy<Value = IpAddr> {
        let bits = prop_oneof![Just(0), Just(u32::MAX), any::<u32>(), 0xc000_0200_u32..0xc000_0300];
        (bits, 0_u8..6, 0_u64..4).prop_map(|(bits, kind, host)| {
            let (ip, bits) = (Ipv4Addr::from_bits(bits), u128::from(bits));
            IpAddr::from(Ipv6Addr::from_bits(match kind {
                0 => return ip.into(),
                1 => ip.to_ipv6_mapped().to_bits(),
                2 => 0x64_ff9b << 96 | bits,
                3 => 0x2002 << 112 | bits << 80 | u128::from(host),
                4 => bits << 96 | u128::from(host) << 62,
                _ => u128::MAX - u128::from(host),
            }))
        })
    }

    fn subnets() -> impl Strategy<Value = Vec<IpNet>> {
        let subnet = (addresses(), 0_u8..=128).prop_map(|(ip, length)| {
            let most = if ip.is_ipv4() { 32 } else { 128 };
            // Half of the subnets are narrow, so that few addresses are in them.
            let length = if length > 64 { most.min(most - length % 8) } else { most.min(length) };
            IpNet::new(ip, length).unwrap().trunc()
        });
        vec(subnet, 0..12)
    }

    proptest! {
        #[test]
        fn sorted_lists_allow_the_same_addresses_as_the_given_ones(
            allow_subnet in subnets(),
            deny_subnet in subnets(),
            addresses in vec(addresses(), 1..20),
        ) {
            let lists = Lists { allow_subnet, deny_subnet, ..Lists::default() };
            let sorted = lists.sorted();
            let ends = [&lists.allow_subnet, &lists.deny_subnet].map(|list| {
                list.iter().flat_map(|net| [net.network(), net.broadcast()])
            });
            for ip in addresses.into_iter().chain(ends.into_iter().flatten()) {
                let address = Multiaddr::from(ip);
                prop_assert_eq!(sorted.allows_address(&address), lists.allows_address(&address), "{}", ip);
            }
            prop_assert!(sorted.sorted() == sorted);
        }
    }
}
