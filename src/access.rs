//! Who may reserve a slot, and who may connect to whom.
//!
//! An app that knows better implements [`Access`]; without one, [`Lists`] of peers and subnets
//! decide.

use std::{collections::HashSet, net::IpAddr, time::Duration};

use ipnet::IpNet;
use libp2p::{Multiaddr, PeerId};

use crate::address;

/// Decides who may use the relay. Asked at each request, and again of everyone who holds a slot or
/// is part of a circuit when the rules may have changed: [`crate::Behaviour::access_changed`].
///
/// It runs in the swarm's task: what takes time belongs elsewhere.
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
///         Permission::allow_if(self.0.read().unwrap().contains(&peer))
///     }
///
///     fn may_connect(&self, source: PeerId, _from: &Multiaddr, _target: PeerId) -> Permission {
///         Permission::allow_if(self.0.read().unwrap().contains(&source))
///     }
/// }
///
/// let members = Arc::new(RwLock::new(HashSet::new()));
/// let mut relay = Behaviour::new(Keypair::generate_ed25519(), Config::default())?;
/// relay.set_access(Members(members.clone()));
/// members.write().unwrap().clear(); // somebody left
/// relay.access_changed();
/// # Ok::<_, relaylet::ConfigError>(())
/// ```
pub trait Access: Send {
    /// Whether `peer`, which comes from `address`, may hold a slot.
    fn may_reserve(&self, peer: PeerId, address: &Multiaddr) -> Permission;

    /// Whether `source`, which comes from `address`, may be connected to `target`.
    fn may_connect(&self, source: PeerId, address: &Multiaddr, target: PeerId) -> Permission;

    /// Whether the program lets a connection from `address` in: asked without a peer before the handshake, and
    /// with the peer after it. Default: yes. The behaviour alone, in another swarm, does not ask.
    fn may_enter(&self, _peer: Option<PeerId>, _address: &Multiaddr) -> bool {
        true
    }
}

/// What was decided.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Permission {
    /// No: PERMISSION_DENIED.
    Deny,
    /// Yes, on these terms; `Terms::default()` are those of the configuration.
    Allow(Terms),
}

impl Permission {
    /// Allows on the usual terms, or denies.
    pub fn allow_if(allowed: bool) -> Self {
        match allowed {
            true => Self::Allow(Terms::default()),
            false => Self::Deny,
        }
    }
}

/// Limits for one peer or circuit, where they are to differ from the configuration.
///
/// `None` is what the configuration says. A time between zero and 1 s counts as 1 s, and one over
/// a year as a year.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Terms {
    /// For how long the reservation is granted. Of no meaning to a circuit.
    pub reservation_ttl: Option<Duration>,
    /// How long a circuit may stay open; zero: no limit.
    ///
    /// With a reservation this is what its holder is told; what holds for a circuit is what
    /// [`Access::may_connect`] says of it.
    pub circuit_duration: Option<Duration>,
    /// How many bytes a circuit may carry in each direction; zero: no limit. Else as above.
    pub circuit_bytes: Option<u64>,
}

/// Lists of peers and subnets: what decides unless an app does. Empty lists let everyone in.
///
/// They hold for whoever reserves, connects, or is connected to. A list that denies wins over one
/// that allows; where peers and subnets are both listed as allowed, a peer has to match both.
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
    /// These peers may connect to others, whether or not they are in `allow_peer`. If there are
    /// any, and `allow_peer` is empty, only these may connect, and everyone may reserve.
    pub allow_connect_peer: HashSet<PeerId>,
}

/// The setting that makes no sense, what is wrong with it, and the remedy.
pub(crate) type Problem = (&'static str, String);

/// Whether each of these is a whole subnet, in the family that addresses are looked up in.
pub(crate) fn subnets_make_sense(setting: &'static str, subnets: &[IpNet]) -> Result<(), Problem> {
    for subnet in subnets {
        let whole = subnet.trunc();
        if whole != *subnet {
            let problem = format!("{subnet} names one host in it; try {whole}");
            return Err((setting, problem));
        }
        if let IpNet::V6(v6) = subnet
            && v6.addr().to_ipv4_mapped().is_some()
        {
            let problem = format!("{subnet} stands for IPv4; write it as IPv4");
            return Err((setting, problem));
        }
    }
    Ok(())
}

impl Lists {
    /// Whether they make sense together.
    ///
    /// # Errors
    ///
    /// The first that does not, by name and with the remedy.
    pub(crate) fn validate(&self) -> Result<(), Problem> {
        for (setting, allowed) in
            [("allow_peer", &self.allow_peer), ("allow_connect_peer", &self.allow_connect_peer)]
        {
            if let Some(peer) = allowed.intersection(&self.deny_peer).next() {
                let problem = format!("{peer} is denied as well; take it off one of the lists");
                return Err((setting, problem));
            }
        }
        for (setting, subnets) in
            [("allow_subnet", &self.allow_subnet), ("deny_subnet", &self.deny_subnet)]
        {
            subnets_make_sense(setting, subnets)?;
        }
        for allowed in &self.allow_subnet {
            if let Some(denied) = self.deny_subnet.iter().find(|net| net.contains(allowed)) {
                let problem = format!("{allowed} lies in {denied}, which is denied; drop one");
                return Err(("allow_subnet", problem));
            }
        }
        Ok(())
    }

    fn lets_in_from(&self, address: &Multiaddr) -> bool {
        let ip = address::ip(address);
        let among = |subnets: &[IpNet]| {
            let contains = |ip: IpAddr| subnets.iter().any(|subnet| subnet.contains(&ip));
            ip.is_some_and(contains)
        };
        !among(&self.deny_subnet) && (self.allow_subnet.is_empty() || among(&self.allow_subnet))
    }

    fn lets_in(&self, peer: &PeerId) -> bool {
        !self.deny_peer.contains(peer)
            && (self.allow_peer.is_empty() || self.allow_peer.contains(peer))
    }

    fn lets_connect(&self, source: &PeerId) -> bool {
        let unlisted = self.allow_peer.is_empty() && self.allow_connect_peer.is_empty();
        let listed = [&self.allow_peer, &self.allow_connect_peer];
        !self.deny_peer.contains(source)
            && (unlisted || listed.iter().any(|list| list.contains(source)))
    }
}

impl Access for Lists {
    fn may_reserve(&self, peer: PeerId, address: &Multiaddr) -> Permission {
        Permission::allow_if(self.lets_in(&peer) && self.lets_in_from(address))
    }

    fn may_connect(&self, source: PeerId, address: &Multiaddr, target: PeerId) -> Permission {
        let source_may = self.lets_connect(&source) && self.lets_in_from(address);
        Permission::allow_if(source_may && self.lets_in(&target))
    }

    fn may_enter(&self, peer: Option<PeerId>, address: &Multiaddr) -> bool {
        let is_of_use = |peer| self.lets_in(&peer) || self.lets_connect(&peer);
        self.lets_in_from(address) && peer.is_none_or(is_of_use)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOME: &str = "/ip4/192.0.2.7/tcp/1";
    const AWAY: &str = "/ip6/2001:db8::1/tcp/1";

    fn net(text: &str) -> IpNet {
        text.parse().expect("a subnet")
    }

    fn reserves(lists: &Lists, peer: PeerId, from: &str) -> bool {
        lists.may_reserve(peer, &from.parse().unwrap()) != Permission::Deny
    }

    fn connects(lists: &Lists, source: PeerId, from: &str, target: PeerId) -> bool {
        lists.may_connect(source, &from.parse().unwrap(), target) != Permission::Deny
    }

    #[test]
    fn empty_lists_let_everyone_in() {
        let (alice, bob) = (PeerId::random(), PeerId::random());
        assert!(reserves(&Lists::default(), alice, "/memory/7"));
        assert!(connects(&Lists::default(), alice, HOME, bob));
    }

    #[test]
    fn a_peer_that_is_denied_may_be_nothing() {
        let (alice, bob) = (PeerId::random(), PeerId::random());
        let lists = Lists { deny_peer: [alice].into(), ..Lists::default() };
        assert!(!reserves(&lists, alice, HOME));
        assert!(!connects(&lists, alice, HOME, bob));
        assert!(!connects(&lists, bob, HOME, alice));
        assert!(reserves(&lists, bob, HOME));
    }

    #[test]
    fn peers_and_subnets_that_are_allowed_must_both_match_and_denial_wins() {
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
    fn some_may_connect_and_not_reserve() {
        let (device, app, stranger) = (PeerId::random(), PeerId::random(), PeerId::random());
        let mut lists = Lists {
            allow_peer: [device].into(),
            allow_connect_peer: [app].into(),
            ..Lists::default()
        };
        assert!(connects(&lists, app, HOME, device) && !reserves(&lists, app, HOME));
        assert!(!connects(&lists, device, HOME, app));
        assert!(!connects(&lists, stranger, HOME, device));
        // Without a list of who may reserve, everyone may; but only that one may connect.
        lists.allow_peer.clear();
        assert!(reserves(&lists, device, HOME));
        assert!(connects(&lists, app, HOME, device));
        assert!(!connects(&lists, device, HOME, stranger));
    }

    #[test]
    fn what_makes_no_sense_together_is_refused_by_name() {
        let alice = PeerId::random();
        let refused = |lists: Lists| lists.validate().expect_err("no sense").0;
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
            let lists = Lists { deny_subnet: vec![net(subnet)], ..Lists::default() };
            assert_eq!(refused(lists), "deny_subnet", "{subnet}");
        }
        let lists = Lists {
            allow_subnet: vec![net("10.1.0.0/16")],
            deny_subnet: vec![net("10.0.0.0/8")],
            ..Lists::default()
        };
        assert_eq!(refused(lists), "allow_subnet");
    }
}
