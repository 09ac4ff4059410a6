//! How many connections are let in: in total, of one peer, from one address, and in their
//! handshakes.
//!
//! Pure. Who a peer is, is known only after the handshake, and a flood comes from addresses: so
//! before it addresses and handshakes count, and after it who holds a slot comes before strangers.

use std::{
    collections::{HashMap, hash_map::Entry},
    error::Error,
    fmt, io,
};

use anyhow::Chain;
use libp2p::swarm::ConnectionId;

use super::proxy_header::NoHeader;
use crate::address::BilledTo;

/// The limits themselves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// How many connections may be open, beside those in their handshakes. Default 2048.
    ///
    /// Beyond it a peer that holds a slot is let in, and the stranger that has been idle for the
    /// longest is closed; any other is turned away.
    pub max_connections: usize,
    /// How many of them one peer may have. Default 8; zero: no cap.
    ///
    /// Beyond it a peer that holds a slot is let in, and that one of its connections is closed on
    /// which nothing was heard for the longest; any other is turned away.
    pub max_connections_per_peer: usize,
    /// How many of them may come from one address (an IPv6 address counts as its /64).
    /// Default 256; zero: no cap.
    pub max_connections_per_ip: usize,
    /// How many may be in their handshakes. Default 256.
    ///
    /// Of these one address may have a quarter, so that it cannot keep everyone else out; unless
    /// there is no cap for addresses.
    pub max_handshakes: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_connections: 2048,
            max_connections_per_peer: 8,
            max_connections_per_ip: 256,
            max_handshakes: 256,
        }
    }
}

/// What is known of a peer once its handshake is done.
#[derive(Clone, Copy, Debug)]
pub struct Standing {
    /// Whether it holds a slot, be it in grace.
    pub holds_a_slot: bool,
    /// How many connections it has that are not being closed, without the new one.
    pub connections: usize,
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
    /// The incoming connections that were let in, and whom each is billed to.
    admitted: HashMap<ConnectionId, Admitted>,
    handshakes: usize,
    billed: HashMap<BilledTo, Bill>,
}

/// What one address has open.
#[derive(Clone, Copy, Debug, Default)]
struct Bill {
    connections: usize,
    handshakes: usize,
}

#[derive(Clone, Copy, Debug)]
struct Admitted {
    billed_to: Option<BilledTo>,
    in_handshake: bool,
}

/// Why a connection was turned away.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Denied {
    /// As many are open as may be.
    Connections,
    /// As many are open of this peer as may be.
    Peer,
    /// As many are open from this address as may be.
    Address(BilledTo),
    /// As many are in their handshakes as may be.
    Handshakes,
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
            Self::Handshakes => "too many handshakes",
            Self::NoHeader(_) => "no PROXY protocol header",
        }
    }
}

impl fmt::Display for Denied {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address(address) => write!(f, "too many connections of {address}"),
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
            handshakes: 0,
            billed: HashMap::new(),
        }
    }

    /// A connection has come, from there: whether it may begin its handshake.
    ///
    /// # Errors
    ///
    /// When there is no room.
    pub fn admit(&mut self, id: ConnectionId, billed_to: Option<BilledTo>) -> Result<(), Denied> {
        if self.handshakes >= self.limits.max_handshakes {
            return Err(Denied::Handshakes);
        }
        let per_ip = self.limits.max_connections_per_ip;
        if let Some(address) = billed_to {
            let handshakes_per_ip = (self.limits.max_handshakes / 4).max(1);
            let bill = self.billed.get(&address).copied().unwrap_or_default();
            if per_ip > 0 && (bill.connections >= per_ip || bill.handshakes >= handshakes_per_ip) {
                return Err(Denied::Address(address));
            }
            let bill = self.billed.entry(address).or_default();
            bill.connections += 1;
            bill.handshakes += 1;
        }
        self.handshakes += 1;
        let admitted = Admitted {
            billed_to,
            in_handshake: true,
        };
        self.admitted.insert(id, admitted);
        Ok(())
    }

    /// Its handshake is done, and shows whose it is: whether it may stay, and what goes for it.
    ///
    /// # Errors
    ///
    /// When there is no room. It counts until it is [forgotten](Self::forget).
    pub fn establish(&mut self, id: ConnectionId, peer: Standing) -> Result<Room, Denied> {
        let (per_peer, established) = (self.limits.max_connections_per_peer, self.established());
        let room = if per_peer > 0 && peer.connections >= per_peer {
            Room::OfItsOwn
        } else if established >= self.limits.max_connections {
            Room::OfAStranger
        } else {
            Room::Free
        };
        self.handshake_done(id);
        match room {
            Room::OfItsOwn if !peer.holds_a_slot => Err(Denied::Peer),
            Room::OfAStranger if !peer.holds_a_slot => Err(Denied::Connections),
            room => Ok(room),
        }
    }

    /// How many are beyond their handshakes.
    fn established(&self) -> usize {
        self.admitted.len() - self.handshakes
    }

    fn handshake_done(&mut self, id: ConnectionId) {
        if let Some(admitted) = self.admitted.get_mut(&id)
            && std::mem::take(&mut admitted.in_handshake)
        {
            self.handshakes -= 1;
            let bill = admitted.billed_to.and_then(|to| self.billed.get_mut(&to));
            if let Some(bill) = bill {
                bill.handshakes -= 1;
            }
        }
    }

    /// How many are let in, how many of them are in their handshakes, and how many addresses they
    /// are from.
    #[cfg(test)]
    pub fn counts(&self) -> [usize; 3] {
        [self.admitted.len(), self.handshakes, self.billed.len()]
    }

    /// It is gone, or was not let in.
    pub fn forget(&mut self, id: ConnectionId) {
        self.handshake_done(id);
        let Some(admitted) = self.admitted.remove(&id) else {
            return; // turned away, or dialed by us
        };
        let billed = admitted.billed_to.map(|to| self.billed.entry(to));
        if let Some(Entry::Occupied(mut bill)) = billed {
            bill.get_mut().connections -= 1;
            if bill.get().connections == 0 {
                bill.remove();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    fn gate(max_connections: usize, per_ip: usize, max_handshakes: usize) -> ConnectionLimits {
        ConnectionLimits::new(Limits {
            max_connections,
            max_connections_per_peer: 2,
            max_connections_per_ip: per_ip,
            max_handshakes,
        })
    }

    fn id(n: usize) -> ConnectionId {
        ConnectionId::new_unchecked(n)
    }

    fn from(n: u8) -> Option<BilledTo> {
        Some(std::net::IpAddr::from(Ipv4Addr::new(10, 0, 0, n)).into())
    }

    #[test]
    fn each_limit_turns_away_the_one_beyond_it() {
        let mut from_one = gate(9, 1, 9);
        assert!(from_one.admit(id(1), from(1)).is_ok());
        let denied = from_one.admit(id(2), from(1)).unwrap_err();
        assert_eq!(denied, Denied::Address(from(1).unwrap()));
        assert!(from_one.admit(id(3), from(2)).is_ok());

        let mut one_by_one = gate(9, 9, 8);
        assert!(one_by_one.admit(id(1), from(1)).is_ok());
        assert!(one_by_one.admit(id(2), from(1)).is_ok());
        let denied = one_by_one.admit(id(3), from(1)).unwrap_err();
        assert_eq!(denied, Denied::Address(from(1).unwrap()));
        assert!(one_by_one.admit(id(3), from(2)).is_ok());
        one_by_one.handshake_done(id(1));
        assert!(one_by_one.admit(id(4), from(1)).is_ok());

        let mut slow = gate(9, 9, 1);
        assert!(slow.admit(id(1), from(1)).is_ok());
        assert_eq!(slow.admit(id(2), from(2)), Err(Denied::Handshakes));
        slow.handshake_done(id(1));
        assert!(slow.admit(id(2), from(2)).is_ok());
    }

    const STRANGER: Standing = Standing {
        holds_a_slot: false,
        connections: 0,
    };
    const HOLDER: Standing = Standing {
        holds_a_slot: true,
        connections: 0,
    };

    /// Comes, and is through with its handshake.
    fn come(gate: &mut ConnectionLimits, n: usize, peer: Standing) -> Result<Room, Denied> {
        gate.admit(id(n), from(n as u8)).unwrap();
        gate.establish(id(n), peer)
    }

    #[test]
    fn beyond_the_limit_who_holds_a_slot_comes_before_a_stranger() {
        let mut gate = gate(2, 9, 9);
        for n in 1..3 {
            assert_eq!(come(&mut gate, n, STRANGER), Ok(Room::Free));
        }
        assert_eq!(come(&mut gate, 3, STRANGER), Err(Denied::Connections));
        gate.forget(id(3));
        assert_eq!(come(&mut gate, 4, HOLDER), Ok(Room::OfAStranger));
        gate.forget(id(1));
        assert_eq!(come(&mut gate, 5, STRANGER), Err(Denied::Connections));
        gate.forget(id(5));
        gate.forget(id(2));
        assert_eq!(come(&mut gate, 6, STRANGER), Ok(Room::Free));
    }

    #[test]
    fn those_in_their_handshakes_keep_nobody_out() {
        let mut gate = gate(1, 9, 2);
        gate.admit(id(1), from(1)).unwrap();
        assert_eq!(come(&mut gate, 2, STRANGER), Ok(Room::Free));
        assert_eq!(gate.establish(id(1), STRANGER), Err(Denied::Connections));
    }

    #[test]
    fn beyond_its_cap_a_peer_that_holds_a_slot_replaces_a_connection_of_its_own() {
        let has = |peer: Standing, connections| Standing {
            connections,
            ..peer
        };
        let mut gate = gate(9, 9, 9);
        assert_eq!(come(&mut gate, 1, has(STRANGER, 1)), Ok(Room::Free));
        assert_eq!(come(&mut gate, 2, has(STRANGER, 2)), Err(Denied::Peer));
        assert_eq!(come(&mut gate, 3, has(HOLDER, 2)), Ok(Room::OfItsOwn));
    }

    #[test]
    fn what_is_gone_leaves_nothing_behind() {
        let mut gate = gate(9, 9, 12);
        for n in 1..4 {
            gate.admit(id(n), from(1)).unwrap();
        }
        gate.handshake_done(id(1));
        for n in 1..5 {
            gate.forget(id(n));
            gate.forget(id(n));
        }
        assert_eq!(gate.counts(), [0; 3]);
    }
}
