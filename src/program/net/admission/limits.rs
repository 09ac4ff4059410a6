//! Limits on connections: in total, by client prefix, by peer, and on handshakes.
//!
//! Sans-IO. The peer of a connection is known only after the handshake. Until then the caps by prefix and on handshakes
//! (`handshakes.rs`) apply; after it the caps in total and by peer. Under a full total, peer or subnet a new connection may
//! preempt another one. A connection counts until it is closed, also while it is closing; only towards a subnet that is full
//! does one that is preempted stop counting at once, for the new one.

use std::{
    collections::{HashMap, HashSet},
    io,
    time::Instant,
};

use anyhow::Chain;
use libp2p::{
    core::transport::TransportError,
    swarm::{ConnectionId, ListenError},
};

use super::{
    handshakes::{Handshakes, Progress},
    proxy_header::HeaderError,
};
use crate::{
    address::{ClientPrefix, Subnet},
    relay::quota::{Caps, Quota, Scope},
};

/// How many connections for the DHT may be open or being dialed at a time.
///
/// Inbound connections have their own limits. A DHT lookup dials three at once; each stays open until the relay closes
/// it as idle.
pub const DIALED_FOR_DHT: usize = 128;

/// How many AutoNAT clients are dialed at a time; at most an eighth of these at one address, and a quarter in one
/// subnet.
pub const DIALED_FOR_AUTONAT: usize = 64;

/// The limits on connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// How many connections may be open, not counting those in their handshakes. Default 2048.
    ///
    /// An eighth, less the number of live slots, is reserved for peers that hold slots. Once the others are taken, a
    /// new connection of a peer without a slot replaces an idle one of a prefix with more connections, or is denied.
    /// Once all are taken, a new one of a peer with a slot replaces any idle one, or is denied.
    pub max_connections: usize,
    /// How many connections one peer may have. Default 8; zero: no cap.
    ///
    /// Beyond it, a new connection of a peer that holds a slot is admitted and that peer's longest silent one closed; a
    /// new connection of any other peer is denied.
    pub max_connections_per_peer: usize,
    /// How many connections one address may have (IPv6: one /64). Default: the largest of 16, an eighth of
    /// `max_connections`, and half of `max_connections` up to 64; zero: no cap.
    pub max_connections_per_ip: Option<usize>,
    /// How many connections one subnet may have (IPv4: a /24, IPv6: a /48). Default: a quarter of all, at least 64;
    /// zero: no cap. Once all are taken, a new connection replaces an idle one of an address with more connections, or is
    /// denied.
    pub max_connections_per_subnet: Option<usize>,
    /// How many connections may be in their handshakes. Default 256. `handshakes.rs` says which one is dropped for
    /// another.
    ///
    /// One address may have an eighth of these, and one subnet a quarter, each at least 16. Without a cap on the
    /// connections of an address or subnet, its handshakes have no cap either.
    pub max_handshakes: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_connections: 2048,
            max_connections_per_peer: 8,
            max_connections_per_ip: None,
            max_connections_per_subnet: None,
            max_handshakes: 256,
        }
    }
}

impl Limits {
    /// How many connections one address may have; `None`: no cap.
    pub fn per_ip(&self) -> Option<usize> {
        // Half of a small relay is for a site behind one address, as half of its slots are.
        let half_of_small = self.max_connections.min(128) / 2;
        cap(self.max_connections_per_ip, (self.max_connections / 8).max(half_of_small).max(16))
    }

    /// How many connections one subnet may have; `None`: no cap.
    pub fn per_subnet(&self) -> Option<usize> {
        cap(self.max_connections_per_subnet, (self.max_connections / 4).max(64))
    }

    fn handshakes(&self) -> Caps {
        let all = self.max_handshakes;
        Caps {
            total: Some(all),
            per_subnet: self.per_subnet().map(|_| (all / 4).max(16)),
            per_address: self.per_ip().map(|_| (all / 8).max(16)),
        }
    }
}

/// The cap that was set, or else the default; zero: no cap.
fn cap(set: Option<usize>, default: usize) -> Option<usize> {
    Some(set.unwrap_or(default)).filter(|cap| *cap > 0)
}

/// What the relay knows of a peer when the handshake of a new connection is done.
#[derive(Clone, Copy, Debug)]
pub struct PeerStatus {
    /// Whether the peer holds a slot, live or in grace.
    pub holds_slot: bool,
    /// How many other connections the peer has.
    pub connections: usize,
    /// How many of those are closing.
    pub closing: usize,
}

/// Which connection is closed to admit another one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Preemption {
    /// None: the caps have room.
    None,
    /// The same peer's longest silent one.
    OwnConnection,
    /// An idle one.
    IdleConnection,
}

/// The inbound connections, as they count towards the limits.
#[derive(Debug)]
pub struct ConnectionLimits {
    limits: Limits,
    /// The connections that were admitted to their handshakes, until they are closed, or preempted under a full subnet.
    admitted: HashMap<ConnectionId, Option<ClientPrefix>>,
    /// Those that have completed their handshakes, also if they were denied then.
    pub established: HashSet<ConnectionId>,
    /// How many connections each prefix has.
    pub quota: Quota,
    /// Those in their handshakes.
    pub handshakes: Handshakes<ConnectionId>,
}

/// Why a connection was denied.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}", self.kind())]
pub enum Denied {
    /// The cap on all connections is reached.
    Connections,
    /// The cap on the peer's connections is reached.
    Peer,
    /// The cap on the connections of this address is reached.
    #[error("too many connections of {0}")]
    Address(ClientPrefix),
    /// The cap on the connections of this subnet is reached.
    #[error("too many connections of {0}")]
    Subnet(Subnet),
    /// The cap on handshakes is reached.
    Handshakes,
    /// Its address, subnet or IPv6 /32 opens connections above the rate limit.
    Rate,
    /// The access rules deny its address or its peer.
    Rules,
    /// It came from a proxy without a valid PROXY protocol header.
    #[error("no PROXY protocol header: {0}")]
    ProxyHeader(HeaderError),
}

impl Denied {
    /// The reason in a few words, the same for every address and header: a label of metrics.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Connections => "too many connections",
            Self::Peer => "too many connections of the peer",
            Self::Address(_) => "too many connections of the address",
            Self::Subnet(_) => "too many connections of the subnet",
            Self::Handshakes => "too many handshakes",
            Self::Rate => "connections come too fast",
            Self::Rules => "the rules do not allow it",
            Self::ProxyHeader(_) => "no PROXY protocol header",
        }
    }

    /// Why the relay denied a connection; `None` if it failed for another reason.
    pub fn of(error: &ListenError) -> Option<Self> {
        match error {
            ListenError::Denied { cause } => cause.downcast_ref().copied(),
            ListenError::Transport(TransportError::Other(error)) => {
                Chain::new(error).find_map(|cause| cause.downcast_ref().copied())
            }
            _ => None,
        }
    }
}

/// An error whose source is a denial. The source of an [`io::Error`] is not the error in it, but the source of that
/// error.
#[derive(Debug, thiserror::Error)]
#[error("denied")]
struct DeniedError(#[source] Denied);

impl From<Denied> for io::Error {
    fn from(denied: Denied) -> Self {
        Self::other(DeniedError(denied))
    }
}

impl ConnectionLimits {
    /// No connections yet.
    pub fn new(limits: Limits) -> Self {
        let [per_address, per_subnet] = [limits.per_ip(), limits.per_subnet()];
        Self {
            limits,
            admitted: HashMap::new(),
            established: HashSet::new(),
            // Counts handshakes, too, and the total does not: `establish` checks that.
            quota: Quota::new(Caps { total: None, per_subnet, per_address }),
            handshakes: Handshakes::new(limits.handshakes()),
        }
    }

    /// Admits a connection to its handshake; its prefix holds this many slots. Under a full subnet the caller closes
    /// `idle` for it, which does not count towards its prefix any more. Returns the connection whose handshake is to be
    /// dropped for it.
    ///
    /// # Errors
    ///
    /// The cap that is reached.
    pub fn admit(
        &mut self,
        id: ConnectionId,
        prefix: Option<ClientPrefix>,
        slots: usize,
        progress: Option<Progress>,
        idle: Option<ConnectionId>,
        now: Instant,
    ) -> Result<Option<ConnectionId>, Denied> {
        match self.quota.full(prefix) {
            Some(Scope::Address(address)) => return Err(Denied::Address(address)),
            Some(Scope::Subnet(subnet)) if idle.is_none() => return Err(Denied::Subnet(subnet)),
            _ => {}
        }
        let dropped = self.handshakes.admit(id, prefix, slots, progress, now);
        let dropped = dropped.map_err(|_| Denied::Handshakes)?;
        idle.into_iter().for_each(|idle| self.stop_counting(idle));
        self.quota.add(prefix);
        self.admitted.insert(id, prefix);
        Ok(dropped)
    }

    /// Admits a connection that has completed its handshake, while this many slots are live. Returns what is to be
    /// closed for it.
    ///
    /// # Errors
    ///
    /// The cap that is reached. The connection counts until it is [removed](Self::remove) all the same.
    pub fn establish(
        &mut self,
        id: ConnectionId,
        peer: PeerStatus,
        live: usize,
    ) -> Result<Preemption, Denied> {
        let per_peer = self.limits.max_connections_per_peer;
        let (all, established) = (self.limits.max_connections, self.established.len());
        let reserved = if peer.holds_slot { 0 } else { (all / 8).saturating_sub(live) };
        self.handshakes.remove(&id);
        self.established.insert(id);
        match per_peer > 0 && peer.connections >= per_peer {
            // One at a time: while one of the peer's connections is closing, it gets no other.
            true if !peer.holds_slot || peer.closing > 0 => Err(Denied::Peer),
            true => Ok(Preemption::OwnConnection),
            false if established >= all - reserved => Ok(Preemption::IdleConnection),
            false => Ok(Preemption::None),
        }
    }

    /// How many connections are admitted, how many of these are in their handshakes, and how many scopes they count
    /// towards.
    #[cfg(test)]
    pub fn counts(&self) -> [usize; 3] {
        [self.admitted.len(), self.handshakes.count(), self.quota.scopes()]
    }

    /// Removes a connection that was closed or denied. Does nothing for one that was dialed.
    pub fn remove(&mut self, id: ConnectionId) {
        self.handshakes.remove(&id);
        self.established.remove(&id);
        self.stop_counting(id);
    }

    /// Stops counting a connection towards its prefix.
    fn stop_counting(&mut self, id: ConnectionId) {
        if let Some(prefix) = self.admitted.remove(&id) {
            self.quota.remove(prefix);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        collections::BTreeMap,
        net::{IpAddr, Ipv4Addr},
        time::Duration,
    };

    use proptest::{collection::vec, prelude::*};

    use super::*;

    fn limits(max_connections: usize) -> ConnectionLimits {
        ConnectionLimits::new(Limits {
            max_connections,
            max_connections_per_peer: 2,
            max_connections_per_ip: Some(3),
            max_connections_per_subnet: Some(4),
            max_handshakes: 64,
        })
    }

    fn id(n: usize) -> ConnectionId {
        ConnectionId::new_unchecked(n)
    }

    fn from(subnet: u8, host: u8) -> Option<ClientPrefix> {
        Some(IpAddr::from(Ipv4Addr::new(10, 0, subnet, host)).into())
    }

    fn admit(
        all: &mut ConnectionLimits,
        n: usize,
        prefix: Option<ClientPrefix>,
    ) -> Result<(), Denied> {
        all.admit(id(n), prefix, 0, None, None, Instant::now()).map(drop)
    }

    const WITHOUT_SLOT: PeerStatus = PeerStatus { holds_slot: false, connections: 0, closing: 0 };
    const WITH_SLOT: PeerStatus = PeerStatus { holds_slot: true, ..WITHOUT_SLOT };

    /// A connection from a subnet of its own that completes its handshake.
    fn establish(
        all: &mut ConnectionLimits,
        n: usize,
        peer: PeerStatus,
    ) -> Result<Preemption, Denied> {
        admit(all, n, from(n as u8, 1)).unwrap();
        all.establish(id(n), peer, 0)
    }

    #[test]
    fn an_address_and_a_subnet_are_capped_until_a_connection_closes() {
        let mut all = limits(99);
        for n in 0..3 {
            assert_eq!(admit(&mut all, n, from(1, 1)), Ok(()));
        }
        let full = Denied::Address(from(1, 1).unwrap());
        assert_eq!(admit(&mut all, 3, from(1, 1)), Err(full));
        assert_eq!(admit(&mut all, 4, from(1, 2)), Ok(()));
        let full = Denied::Subnet(from(1, 1).unwrap().subnet());
        assert_eq!(admit(&mut all, 5, from(1, 3)), Err(full));
        assert_eq!(admit(&mut all, 6, from(2, 1)), Ok(()));
        // They count after their handshakes, too.
        for n in [0, 1, 2, 4] {
            assert_eq!(all.establish(id(n), WITHOUT_SLOT, 0), Ok(Preemption::None));
        }
        assert!(admit(&mut all, 7, from(1, 3)).is_err());
        all.remove(id(4));
        assert_eq!(admit(&mut all, 8, from(1, 3)), Ok(()));
    }

    #[test]
    fn an_eighth_is_reserved_for_peers_that_hold_slots() {
        let mut all = limits(16);
        for n in 0..14 {
            assert_eq!(establish(&mut all, n, WITHOUT_SLOT), Ok(Preemption::None));
        }
        assert_eq!(establish(&mut all, 20, WITHOUT_SLOT), Ok(Preemption::IdleConnection));
        all.remove(id(20));
        for n in 21..23 {
            assert_eq!(establish(&mut all, n, WITH_SLOT), Ok(Preemption::None));
        }
        assert_eq!(establish(&mut all, 23, WITH_SLOT), Ok(Preemption::IdleConnection));
        // Each live slot makes the reserve smaller by one connection.
        admit(&mut all, 25, from(25, 1)).unwrap();
        all.remove(id(0));
        all.remove(id(23));
        assert_eq!(all.establish(id(25), WITHOUT_SLOT, 1), Ok(Preemption::IdleConnection));
        all.remove(id(25));
        admit(&mut all, 26, from(26, 1)).unwrap();
        assert_eq!(all.establish(id(26), WITHOUT_SLOT, 2), Ok(Preemption::None));
        all.remove(id(26));
        // Connections in their handshakes do not count towards the total.
        for n in 30..40 {
            admit(&mut all, n, from(n as u8, 1)).unwrap();
        }
        assert_eq!(establish(&mut all, 24, WITH_SLOT), Ok(Preemption::None));
    }

    #[test]
    fn at_its_cap_a_peer_with_a_slot_replaces_one_connection_at_a_time() {
        let has =
            |peer: PeerStatus, connections, closing| PeerStatus { connections, closing, ..peer };
        let mut all = limits(99);
        assert_eq!(establish(&mut all, 1, has(WITHOUT_SLOT, 1, 0)), Ok(Preemption::None));
        assert_eq!(establish(&mut all, 2, has(WITHOUT_SLOT, 2, 0)), Err(Denied::Peer));
        assert_eq!(establish(&mut all, 3, has(WITH_SLOT, 2, 0)), Ok(Preemption::OwnConnection));
        assert_eq!(establish(&mut all, 4, has(WITH_SLOT, 3, 1)), Err(Denied::Peer));
        assert_eq!(establish(&mut all, 5, has(WITHOUT_SLOT, 2, 1)), Err(Denied::Peer));
    }

    #[test]
    fn a_dropped_handshake_frees_its_permit_at_once_and_does_not_count_as_established() {
        let mut all = limits(1);
        for n in 0..56 {
            let progress = Some(Progress::default());
            all.admit(id(n), from(n as u8, 1), 0, progress, None, Instant::now()).unwrap();
        }
        assert_eq!(admit(&mut all, 99, from(99, 1)), Err(Denied::Handshakes));
        let later = Instant::now() + Duration::from_secs(4);
        assert_eq!(all.handshakes.take_overdue(later).len(), 56);
        assert_eq!(admit(&mut all, 99, from(99, 1)), Ok(()));
        assert_eq!(all.establish(id(99), WITHOUT_SLOT, 0), Ok(Preemption::None));
        (0..100).for_each(|n| all.remove(id(n)));
        assert!(all.counts() == [0; 3] && all.established.is_empty());
    }

    #[test]
    fn closed_connections_leave_no_counts_behind() {
        let mut all = limits(9);
        for n in 1..4 {
            admit(&mut all, n, from(1, 1)).unwrap();
        }
        all.establish(id(1), WITHOUT_SLOT, 0).unwrap();
        for n in [1, 1, 2, 3, 4] {
            all.remove(id(n));
        }
        assert_eq!(all.counts(), [0; 3]);
    }

    #[test]
    fn the_caps_of_prefixes_follow_from_the_total() {
        let default = Limits::default();
        assert_eq!((default.per_ip(), default.per_subnet()), (Some(256), Some(512)));
        let small = Limits { max_connections: 10, ..default };
        assert_eq!((small.per_ip(), small.per_subnet()), (Some(16), Some(64)));
        let site = Limits { max_connections: 100, ..default };
        assert_eq!((site.per_ip(), site.per_subnet()), (Some(50), Some(64)));
        let none = Limits { max_connections_per_ip: Some(0), ..default };
        assert_eq!((none.per_ip(), none.handshakes().per_address), (None, None));
        assert_eq!(default.handshakes().per_address, Some(32));
        let few = Limits { max_handshakes: 6, ..default }.handshakes();
        assert_eq!((few.per_address, few.per_subnet), (Some(16), Some(16)));
    }

    proptest! {
        #[test]
        fn no_order_of_events_exceeds_a_cap_or_leaves_a_count_behind(
            max_handshakes in 1_usize..12,
            steps in vec((0_u8..6, any::<u8>(), any::<u8>()), 0..200),
        ) {
            let mut all = ConnectionLimits::new(Limits { max_handshakes, ..limits(9).limits });
            // The connections that the swarm knows, with their prefixes and the progress of their handshakes.
            let (mut open, mut now) = (BTreeMap::new(), Instant::now());
            for (n, (kind, one, other)) in steps.into_iter().enumerate() {
                let nth = open.keys().nth(usize::from(one) % open.len().max(1)).copied();
                match (kind, nth) {
                    (0 | 1, _) => {
                        // Connect.
                        let prefix = (one > 9).then(|| from(one % 3, other % 4)).flatten();
                        let progress = (other > 40).then(Progress::default);
                        let slots = usize::from(other % 3);
                        if all.admit(id(n), prefix, slots, progress.clone(), None, now).is_ok() {
                            open.insert(n, (prefix, progress));
                        }
                    }
                    (2, Some(nth)) => {
                        // Make progress in the handshake.
                        let (_, progress) = &open[&nth];
                        progress.iter().for_each(|it| it.activity.add(other.into()));
                    }
                    (3, Some(nth)) => {
                        // Complete the handshake.
                        let (connections, closing) = (usize::from(other % 4), usize::from(other % 2));
                        let peer = PeerStatus { holds_slot: other > 99, connections, closing };
                        if all.establish(id(nth), peer, 0).is_err() {
                            all.remove(id(nth));
                            open.remove(&nth);
                        }
                    }
                    (4, Some(nth)) => {
                        // Close.
                        all.remove(id(nth));
                        open.remove(&nth);
                    }
                    _ => {
                        // Wait.
                        now += Duration::from_millis(u64::from(other) * 20);
                        all.handshakes.take_overdue(now);
                    }
                }
                let [admitted, in_handshakes, _] = all.counts();
                prop_assert_eq!(admitted, open.len());
                prop_assert!(in_handshakes <= max_handshakes);
                for (prefix, _) in open.values() {
                    for (scope, most) in Scope::of(*prefix).zip([3, 4]).take(prefix.map_or(0, |_| 2)) {
                        let held = open.values().filter(|(other, _)| scope.covers(*other)).count();
                        prop_assert!(all.quota.held(scope) == held && held <= most);
                    }
                }
            }
            open.keys().for_each(|nth| all.remove(id(*nth)));
            prop_assert_eq!(all.counts(), [0; 3]);
            prop_assert!(all.established.is_empty() && all.handshakes.shared.scopes() == 0);
        }
    }
}
