//! Limits on connections: in total, of one client prefix, of one peer, and in their handshakes.
//!
//! Sans-IO. A peer is known only after its handshake, and a flood comes from addresses: so before it
//! prefixes and handshakes count (`handshakes.rs`), and after it a peer that holds a slot comes before
//! strangers. A connection counts until it is gone, also while it is being closed.

use std::{
    collections::{HashMap, HashSet},
    error::Error,
    fmt, io,
    time::Instant,
};

use anyhow::Chain;
use libp2p::swarm::ConnectionId;

use super::{
    handshakes::{Handshakes, Progress},
    proxy_header::NoHeader,
};
use crate::{
    address::{ClientPrefix, Subnet},
    relay::quota::{Busiest, Caps, Quota, Scope},
};

/// How many connections that were dialed for the DHT may be open, or on their way, at a time.
///
/// Those that come in have limits of their own. A lookup wants three at once; each stays open until
/// the relay closes it as idle.
pub const DIALED_FOR_DHT: usize = 128;

/// How many AutoNAT clients are dialed at a time; of these one address may have a quarter.
pub const DIALED_FOR_AUTONAT: usize = 64;

/// The limits themselves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// How many connections may be open, beside those in their handshakes. Default 2048.
    ///
    /// An eighth of them is for peers that hold slots, as long as fewer do. Beyond the others a stranger is let
    /// in only in the place of an idle one whose prefix holds more; a peer that holds a slot in that of any
    /// idle one.
    pub max_connections: usize,
    /// How many of them one peer may have. Default 8; zero: no cap.
    ///
    /// Beyond it a peer that holds a slot is let in, and that one of its connections is closed on
    /// which nothing was heard for the longest; any other is turned away.
    pub max_connections_per_peer: usize,
    /// How many of them may come from one address (an IPv6 address counts as its /64). Default: an eighth of
    /// all, at least 16; zero: no cap.
    pub max_connections_per_ip: Option<usize>,
    /// How many of them may come from one subnet, an IPv4 /24 or an IPv6 /48. Default: a quarter of all, at
    /// least 64; zero: no cap.
    pub max_connections_per_subnet: Option<usize>,
    /// How many may be in their handshakes. Default 256; see `handshakes.rs` for which makes room.
    ///
    /// Of these one address may have an eighth, at least 16, and one subnet a quarter; unless there is no cap
    /// on its connections.
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
        cap(self.max_connections_per_ip, (self.max_connections / 8).max(16))
    }

    /// How many connections one subnet may have; `None`: no cap.
    pub fn per_subnet(&self) -> Option<usize> {
        cap(self.max_connections_per_subnet, (self.max_connections / 4).max(64))
    }

    fn connections(&self) -> Caps {
        let [per_address, per_subnet] = [self.per_ip(), self.per_subnet()];
        // Those in their handshakes count as well, and have a total of their own.
        Caps { total: None, per_subnet, per_address }
    }

    fn handshakes(&self) -> Caps {
        let all = self.max_handshakes;
        Caps {
            total: Some(all),
            per_subnet: self.per_subnet().map(|_| (all / 4).max(1)),
            per_address: self.per_ip().map(|_| (all / 8).max(16)),
        }
    }
}

/// A cap that was set, or else the default; zero stands for none.
fn cap(set: Option<usize>, default: usize) -> Option<usize> {
    Some(set.unwrap_or(default)).filter(|cap| *cap > 0)
}

/// What is known of a peer once its handshake is done.
#[derive(Clone, Copy, Debug)]
pub struct Standing {
    /// Whether it holds a slot, be it in grace.
    pub holds_a_slot: bool,
    /// How many connections it has without the new one.
    pub connections: usize,
    /// How many of those are being closed.
    pub closing: usize,
}

/// Which connection makes room for another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Room {
    /// None: there is room.
    Free,
    /// Of the same peer that one on which nothing was heard for the longest.
    OfItsOwn,
    /// The one that has been idle for the longest.
    OfAStranger,
}

/// The connections that come in, as far as they count.
#[derive(Debug)]
pub struct ConnectionLimits {
    limits: Limits,
    /// The incoming connections that were let in, and their clients' prefixes.
    admitted: HashMap<ConnectionId, Option<ClientPrefix>>,
    quota: Quota,
    handshakes: Handshakes<ConnectionId>,
    /// Those whose handshake was dropped, until they are gone.
    dropped: HashSet<ConnectionId>,
}

/// Why a connection was turned away.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Denied {
    /// As many are open as may be.
    Connections,
    /// As many are open of this peer as may be.
    Peer,
    /// As many are open from this address as may be.
    Address(ClientPrefix),
    /// As many are open from this subnet as may be.
    Subnet(Subnet),
    /// As many are in their handshakes as may be.
    Handshakes,
    /// New connections of its address, or of its network, come too fast.
    Rate,
    /// The access rules deny its address or its peer.
    Rules,
    /// It came from a proxy, and its PROXY protocol header did not.
    NoHeader(NoHeader),
}

impl Denied {
    /// The reason in a few words, the same for all cases of it.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Connections => "too many connections",
            Self::Peer => "too many connections of the peer",
            Self::Address(_) => "too many connections of the address",
            Self::Subnet(_) => "too many connections of the subnet",
            Self::Handshakes => "too many handshakes",
            Self::Rate => "connections come too fast",
            Self::Rules => "the rules do not allow it",
            Self::NoHeader(_) => "no PROXY protocol header",
        }
    }
}

impl fmt::Display for Denied {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address(address) => write!(f, "too many connections of {address}"),
            Self::Subnet(subnet) => write!(f, "too many connections of {subnet}"),
            Self::NoHeader(why) => write!(f, "{}: {why}", self.kind()),
            other => f.write_str(other.kind()),
        }
    }
}

impl Error for Denied {}

impl Denied {
    /// The denial that this error stems from, if it stems from one.
    pub fn behind<'a>(error: &'a (dyn Error + 'static)) -> Option<&'a Self> {
        Chain::new(error).find_map(|error| error.downcast_ref())
    }
}

/// A denial as the source of an error: libp2p's layers hand on the sources of what went wrong below
/// them, and not that itself.
#[derive(Debug)]
struct Because(Denied);

impl fmt::Display for Because {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("denied")
    }
}

impl Error for Because {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        Some(&self.0)
    }
}

impl From<Denied> for io::Error {
    fn from(denied: Denied) -> Self {
        Self::other(Because(denied))
    }
}

impl ConnectionLimits {
    /// Nobody is connected yet.
    pub fn new(limits: Limits) -> Self {
        Self {
            limits,
            admitted: HashMap::new(),
            quota: Quota::new(limits.connections()),
            handshakes: Handshakes::new(limits.handshakes()),
            dropped: HashSet::new(),
        }
    }

    /// A connection has come from a prefix that holds so many slots: whether it may begin its handshake,
    /// and which handshake is to end for it.
    ///
    /// # Errors
    ///
    /// When there is no room.
    pub fn admit(
        &mut self,
        id: ConnectionId,
        prefix: Option<ClientPrefix>,
        slots: usize,
        progress: Option<Progress>,
        now: Instant,
    ) -> Result<Option<ConnectionId>, Denied> {
        if let Some(full) = self.quota.full(prefix) {
            return Err(full.into());
        }
        let dropped = self.handshakes.admit(id, prefix, slots, progress, now);
        let dropped = dropped.map_err(|_| Denied::Handshakes)?;
        self.dropped.extend(dropped);
        self.quota.add(prefix);
        self.admitted.insert(id, prefix);
        Ok(dropped)
    }

    /// The handshakes that take too long: they are to be dropped, and make room at once.
    pub fn overdue(&mut self, now: Instant) -> Vec<ConnectionId> {
        let overdue = self.handshakes.overdue(now);
        overdue.iter().for_each(|id| self.handshakes.remove(id));
        self.dropped.extend(&overdue);
        overdue
    }

    /// Its handshake is done, and shows whose it is: whether it may stay, and what goes for it. So many slots
    /// are live.
    ///
    /// # Errors
    ///
    /// When there is no room. It counts until it is [forgotten](Self::forget).
    pub fn establish(
        &mut self,
        id: ConnectionId,
        peer: Standing,
        live: usize,
    ) -> Result<Room, Denied> {
        let per_peer = self.limits.max_connections_per_peer;
        let (all, established) = (self.limits.max_connections, self.established());
        // Strangers leave an eighth to peers that hold slots.
        let kept = if peer.holds_a_slot { 0 } else { (all / 8).saturating_sub(live) };
        let places = all - kept;
        let room = if per_peer > 0 && peer.connections >= per_peer {
            Room::OfItsOwn
        } else if established >= places {
            Room::OfAStranger
        } else {
            Room::Free
        };
        self.handshakes.remove(&id);
        self.dropped.remove(&id);
        match room {
            // One at a time makes room: what is being closed counts.
            Room::OfItsOwn if !peer.holds_a_slot || peer.closing > 0 => Err(Denied::Peer),
            room => Ok(room),
        }
    }

    /// How many are beyond their handshakes.
    fn established(&self) -> usize {
        self.admitted.len() - self.handshakes.count() - self.dropped.len()
    }

    /// How much each prefix holds of the connections.
    pub fn quota(&self) -> &Quota {
        &self.quota
    }

    /// The addresses that have the most connections, and the most handshakes.
    pub fn busiest(&self) -> [Option<Busiest>; 2] {
        [self.quota.busiest(), self.handshakes.busiest()]
    }

    /// How many are let in, how many of them are in their handshakes, and how many prefixes they count
    /// towards.
    #[cfg(test)]
    pub fn counts(&self) -> [usize; 3] {
        [self.admitted.len(), self.handshakes.count(), self.quota.len()]
    }

    /// It is gone, or was not let in.
    pub fn forget(&mut self, id: ConnectionId) {
        self.handshakes.remove(&id);
        self.dropped.remove(&id);
        // Else it was turned away, or dialed by us.
        if let Some(prefix) = self.admitted.remove(&id) {
            self.quota.remove(prefix);
        }
    }
}

impl From<Scope> for Denied {
    fn from(full: Scope) -> Self {
        match full {
            Scope::Address(address) => Self::Address(address),
            Scope::Subnet(subnet) => Self::Subnet(subnet),
            Scope::Total => Self::Handshakes,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        net::{IpAddr, Ipv4Addr},
        time::Duration,
    };

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
        all.admit(id(n), prefix, 0, None, Instant::now()).map(drop)
    }

    const STRANGER: Standing = Standing { holds_a_slot: false, connections: 0, closing: 0 };
    const HOLDER: Standing = Standing { holds_a_slot: true, ..STRANGER };

    /// Comes from a subnet of its own, and is through with its handshake.
    fn come(all: &mut ConnectionLimits, n: usize, peer: Standing) -> Result<Room, Denied> {
        admit(all, n, from(n as u8, 1)).unwrap();
        all.establish(id(n), peer, 0)
    }

    #[test]
    fn an_address_and_a_subnet_have_their_caps_until_what_they_have_is_gone() {
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
        // Beyond their handshakes they count as well.
        for n in [0, 1, 2, 4] {
            assert_eq!(all.establish(id(n), STRANGER, 0), Ok(Room::Free));
        }
        assert!(admit(&mut all, 7, from(1, 3)).is_err());
        all.forget(id(4));
        assert_eq!(admit(&mut all, 8, from(1, 3)), Ok(()));
    }

    #[test]
    fn strangers_leave_an_eighth_to_peers_that_hold_slots() {
        let mut all = limits(16);
        for n in 0..14 {
            assert_eq!(come(&mut all, n, STRANGER), Ok(Room::Free));
        }
        assert_eq!(come(&mut all, 20, STRANGER), Ok(Room::OfAStranger));
        all.forget(id(20));
        for n in 21..23 {
            assert_eq!(come(&mut all, n, HOLDER), Ok(Room::Free));
        }
        assert_eq!(come(&mut all, 23, HOLDER), Ok(Room::OfAStranger));
        // Where as many hold slots, nothing more is kept for them.
        admit(&mut all, 25, from(25, 1)).unwrap();
        all.forget(id(0));
        all.forget(id(23));
        assert_eq!(all.establish(id(25), STRANGER, 1), Ok(Room::OfAStranger));
        all.forget(id(25));
        admit(&mut all, 26, from(26, 1)).unwrap();
        assert_eq!(all.establish(id(26), STRANGER, 2), Ok(Room::Free));
        all.forget(id(26));
        // Connections in their handshakes keep none out.
        all.forget(id(23));
        all.forget(id(0));
        for n in 30..40 {
            admit(&mut all, n, from(n as u8, 1)).unwrap();
        }
        assert_eq!(come(&mut all, 24, HOLDER), Ok(Room::Free));
    }

    #[test]
    fn at_its_cap_a_peer_that_holds_a_slot_replaces_a_connection_one_at_a_time() {
        let has = |peer: Standing, connections, closing| Standing { connections, closing, ..peer };
        let mut all = limits(99);
        assert_eq!(come(&mut all, 1, has(STRANGER, 1, 0)), Ok(Room::Free));
        assert_eq!(come(&mut all, 2, has(STRANGER, 2, 0)), Err(Denied::Peer));
        assert_eq!(come(&mut all, 3, has(HOLDER, 2, 0)), Ok(Room::OfItsOwn));
        assert_eq!(come(&mut all, 4, has(HOLDER, 3, 1)), Err(Denied::Peer));
        assert_eq!(come(&mut all, 5, has(STRANGER, 2, 1)), Err(Denied::Peer));
    }

    #[test]
    fn a_dropped_handshake_makes_room_at_once_and_is_no_open_connection() {
        let mut all = limits(1);
        for n in 0..56 {
            let progress = Some(Progress::default());
            all.admit(id(n), from(n as u8, 1), 0, progress, Instant::now()).unwrap();
        }
        assert_eq!(admit(&mut all, 99, from(99, 1)), Err(Denied::Handshakes));
        assert_eq!(all.overdue(Instant::now() + Duration::from_secs(4)).len(), 56);
        assert_eq!(admit(&mut all, 99, from(99, 1)), Ok(()));
        assert_eq!(all.establish(id(99), STRANGER, 0), Ok(Room::Free));
        (0..100).for_each(|n| all.forget(id(n)));
        assert!(all.counts() == [0; 3] && all.dropped.is_empty());
    }

    #[test]
    fn what_is_gone_leaves_nothing_behind() {
        let mut all = limits(9);
        for n in 1..4 {
            admit(&mut all, n, from(1, 1)).unwrap();
        }
        all.establish(id(1), STRANGER, 0).unwrap();
        for n in [1, 1, 2, 3, 4] {
            all.forget(id(n));
        }
        assert_eq!(all.counts(), [0; 3]);
    }

    #[test]
    fn the_caps_of_prefixes_follow_from_the_total() {
        let default = Limits::default();
        assert_eq!((default.per_ip(), default.per_subnet()), (Some(256), Some(512)));
        let small = Limits { max_connections: 10, ..default };
        assert_eq!((small.per_ip(), small.per_subnet()), (Some(16), Some(64)));
        let none = Limits { max_connections_per_ip: Some(0), ..default };
        assert_eq!((none.per_ip(), none.handshakes().per_address), (None, None));
        assert_eq!(default.handshakes().per_address, Some(32));
    }
}
