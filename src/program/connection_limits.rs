//! How many connections are let in: in total, from one address, and in their handshakes.
//!
//! libp2p's `connection_limits` counts by peer; but who a peer is, is known only after the
//! handshake, and a flood comes from addresses.

use std::{
    collections::{HashMap, hash_map::Entry},
    convert::Infallible,
    error::Error,
    fmt, io,
    task::{Context, Poll},
};

use anyhow::Chain;
use libp2p::{
    Multiaddr, PeerId,
    core::{Endpoint, transport::PortUse},
    swarm::{
        ConnectionClosed, ConnectionDenied, ConnectionId, FromSwarm, ListenFailure,
        NetworkBehaviour, THandler, THandlerInEvent, THandlerOutEvent, ToSwarm, dummy,
    },
};

use super::proxy_header::NoHeader;
use crate::address::BilledTo;

/// The limits themselves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// How many connections may be open, those in their handshakes included. Default 4096.
    pub max_connections: usize,
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
            max_connections: 4096,
            max_connections_per_ip: 256,
            max_handshakes: 256,
        }
    }
}

/// Turns away what is beyond the limits before a single byte was read from it.
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

    fn admit(&mut self, id: ConnectionId, billed_to: Option<BilledTo>) -> Result<(), Denied> {
        if self.handshakes >= self.limits.max_handshakes {
            return Err(Denied::Handshakes);
        }
        if self.admitted.len() >= self.limits.max_connections {
            return Err(Denied::Connections);
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

    fn forget(&mut self, id: ConnectionId) {
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

impl NetworkBehaviour for ConnectionLimits {
    type ConnectionHandler = dummy::ConnectionHandler;
    type ToSwarm = Infallible;

    fn handle_pending_inbound_connection(
        &mut self,
        id: ConnectionId,
        _: &Multiaddr,
        remote: &Multiaddr,
    ) -> Result<(), ConnectionDenied> {
        self.admit(id, BilledTo::of(remote))
            .map_err(ConnectionDenied::new)
    }

    fn handle_established_inbound_connection(
        &mut self,
        id: ConnectionId,
        _: PeerId,
        _: &Multiaddr,
        _: &Multiaddr,
    ) -> Result<THandler<Self>, ConnectionDenied> {
        self.handshake_done(id);
        Ok(dummy::ConnectionHandler)
    }

    fn handle_established_outbound_connection(
        &mut self,
        _: ConnectionId,
        _: PeerId,
        _: &Multiaddr,
        _: Endpoint,
        _: PortUse,
    ) -> Result<THandler<Self>, ConnectionDenied> {
        Ok(dummy::ConnectionHandler)
    }

    fn on_swarm_event(&mut self, event: FromSwarm) {
        match event {
            FromSwarm::ConnectionClosed(ConnectionClosed { connection_id, .. })
            | FromSwarm::ListenFailure(ListenFailure { connection_id, .. }) => {
                self.forget(connection_id);
            }
            _ => {}
        }
    }

    fn on_connection_handler_event(
        &mut self,
        _: PeerId,
        _: ConnectionId,
        event: THandlerOutEvent<Self>,
    ) {
        match event {}
    }

    fn poll(&mut self, _: &mut Context<'_>) -> Poll<ToSwarm<Infallible, THandlerInEvent<Self>>> {
        Poll::Pending
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    fn gate(max_connections: usize, per_ip: usize, max_handshakes: usize) -> ConnectionLimits {
        ConnectionLimits::new(Limits {
            max_connections,
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
        let mut few = gate(2, 9, 9);
        assert!(few.admit(id(1), from(1)).is_ok() && few.admit(id(2), from(2)).is_ok());
        assert_eq!(few.admit(id(3), from(3)), Err(Denied::Connections));

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
        assert_eq!(
            (gate.admitted.len(), gate.handshakes, gate.billed.len()),
            (0, 0, 0)
        );
    }
}
