//! How many bytes came in on each TCP connection: the cheapest sign that a peer is alive.
//!
//! The transport makes a connection before the swarm gives it a name, so the counters wait here,
//! under their socket addresses, until the owner of the swarm claims them.
//!
//! Two connections have the same addresses only if a proxy says so, which it may in good faith: a
//! client reached it twice from one port. Which counter is whose cannot be told then, so neither is
//! handed out, and the relay hears of those two only what it hears on their streams.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use async_std::net::TcpStream;
use libp2p::core::ConnectedPoint;

use super::{admission::handshakes::Progress, multiaddr::remote_address};
use crate::activity::{Heard, Signs};

/// The counters of connections that were not claimed yet.
#[derive(Clone, Debug, Default)]
pub struct Traffic(Arc<Mutex<Counters>>);

#[derive(Debug, Default)]
struct Counters {
    unclaimed: BTreeMap<(Ends, u64), Pending>,
    /// How many there were ever: tells apart those with the same ends.
    made: u64,
}

/// A connection that is not claimed yet.
#[derive(Clone, Debug)]
pub struct Pending {
    /// How far its handshake is, and the counter of what comes in.
    pub progress: Progress,
    /// Its socket, to end the handshake with.
    pub socket: Option<TcpStream>,
}

/// Our own socket address, where the connection came in, and the peer's.
type Ends = (Option<SocketAddr>, SocketAddr);

impl Counters {
    /// The counter with these ends, unless there are several.
    fn only(&self, ends: Ends) -> Option<(&(Ends, u64), &Pending)> {
        let mut candidates = self.unclaimed.range((ends, 0)..=(ends, u64::MAX));
        let only = candidates.next()?;
        candidates.next().is_none().then_some(only)
    }
}

fn ends(endpoint: &ConnectedPoint) -> Option<Ends> {
    let socket_address = |address| remote_address(address).map(|(socket, _)| socket);
    Some(match endpoint {
        ConnectedPoint::Dialer { address, .. } => (None, socket_address(address)?),
        ConnectedPoint::Listener { local_addr, send_back_addr } => {
            (Some(socket_address(local_addr)?), socket_address(send_back_addr)?)
        }
    })
}

impl Traffic {
    /// Counts what comes in on `stream`.
    pub(crate) fn count<S>(
        &self,
        stream: S,
        local: Option<SocketAddr>,
        remote: SocketAddr,
        socket: Option<TcpStream>,
    ) -> Counted<S> {
        let progress = Progress::default();
        let signs = progress.signs.clone();
        let mut counters = self.counters();
        counters.made += 1;
        let key = ((local, remote), counters.made);
        counters.unclaimed.insert(key, Pending { progress, socket });
        drop(counters);
        let unclaimed = Unclaimed { key, traffic: self.clone() };
        signs.listen_with(stream, unclaimed)
    }

    /// The counter of the connection between these two ends, unless there are several.
    pub fn claim(&self, endpoint: &ConnectedPoint) -> Option<Signs> {
        let ends = ends(endpoint)?;
        let mut counters = self.counters();
        let key = *counters.only(ends)?.0;
        counters.unclaimed.remove(&key).map(|pending| pending.progress.signs)
    }

    /// The connection between these two ends, unless there are several or it is claimed.
    pub fn look_up(&self, endpoint: &ConnectedPoint) -> Option<Pending> {
        let counters = self.counters();
        ends(endpoint).and_then(|ends| counters.only(ends)).map(|(_, pending)| pending.clone())
    }

    /// How many wait to be claimed.
    pub fn unclaimed(&self) -> usize {
        self.counters().unclaimed.len()
    }

    fn counters(&self) -> MutexGuard<'_, Counters> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A connection whose incoming bytes are counted.
pub type Counted<S> = Heard<S, Unclaimed>;

/// Takes the counter of a connection that ended before it was claimed back out of the table.
///
/// Dropped before the socket: once that is closed, its address may name another connection.
#[derive(Debug)]
pub struct Unclaimed {
    key: (Ends, u64),
    traffic: Traffic,
}

impl Drop for Unclaimed {
    fn drop(&mut self) {
        self.traffic.counters().unclaimed.remove(&self.key);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn connection(local: &str, remote: &str) -> ConnectedPoint {
        ConnectedPoint::Listener {
            local_addr: local.parse().unwrap(),
            send_back_addr: remote.parse().unwrap(),
        }
    }

    #[test]
    fn a_counter_is_claimed_once_by_its_addresses() {
        let traffic = Traffic::default();
        let (local, remote) = ("192.0.2.1:1".parse().unwrap(), "192.0.2.2:2".parse().unwrap());
        let counted = traffic.count((), Some(local), remote, None);
        let elsewhere = connection("/ip4/192.0.2.1/tcp/1", "/ip4/192.0.2.2/tcp/3");
        let here = connection("/ip4/192.0.2.1/tcp/1", "/ip4/192.0.2.2/tcp/2");
        assert!(traffic.claim(&elsewhere).is_none());
        assert!(traffic.claim(&here).is_some());
        assert!(traffic.claim(&here).is_none());
        drop(counted);
        assert_eq!(traffic.unclaimed(), 0);
    }

    #[test]
    fn what_runs_over_a_connection_does_not_hide_it() {
        let traffic = Traffic::default();
        for layer in ["/ws", "/tls/ws", "/wss"] {
            let (local, remote) = ("192.0.2.1:1".parse().unwrap(), "192.0.2.2:2".parse().unwrap());
            let counted = traffic.count((), Some(local), remote, None);
            let (local, remote) = ("/ip4/192.0.2.1/tcp/1", "/ip4/192.0.2.2/tcp/2");
            let over = connection(&format!("{local}{layer}"), &format!("{remote}{layer}"));
            assert!(traffic.claim(&over).is_some(), "{layer}");
            drop(counted);
        }
    }

    #[test]
    fn of_two_with_the_same_addresses_none_gets_the_others_counter() {
        let traffic = Traffic::default();
        let (local, remote) = ("192.0.2.1:1".parse().unwrap(), "192.0.2.2:2".parse().unwrap());
        let both = connection("/ip4/192.0.2.1/tcp/1", "/ip4/192.0.2.2/tcp/2");
        let first = traffic.count((), Some(local), remote, None);
        let second = traffic.count((), Some(local), remote, None);
        assert!(traffic.claim(&both).is_none());
        drop(first);
        assert!(traffic.claim(&both).is_some(), "it is the second's now");
        assert_eq!(traffic.unclaimed(), 0);
        drop(second);
    }
}
