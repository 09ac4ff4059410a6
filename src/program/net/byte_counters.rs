//! Counts the bytes received on each TCP connection: the cheapest evidence that a peer is alive.
//!
//! The transport creates a connection before the swarm assigns its id, so a new counter is kept here under the
//! connection's socket addresses until the owner of the swarm takes it.
//!
//! Two connections may have the same addresses: if the relay dials an address twice, because the local address of a
//! dialed connection is not known here, or if a proxy's headers name the same client for both, for example when the
//! client connects twice to the proxy from one port. Their counters cannot be told apart, so neither is handed out, and
//! only activity on the streams of those two connections counts.

use std::{
    collections::{BTreeMap, HashMap},
    net::SocketAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use libp2p::core::ConnectedPoint;

use super::{
    admission::handshakes::Progress,
    multiaddr::{listen_address, without_peer},
    socket::Socket,
};
use crate::activity::{ActivityCounter, TrackedStream};

/// The counters that were not taken yet. Clones share them.
#[derive(Clone, Debug, Default)]
pub struct ByteCounters(Arc<Mutex<Table>>);

#[derive(Debug, Default)]
struct Table {
    pending: BTreeMap<Key, Pending>,
    /// The new ends of renamed connections, by their numbers.
    renamed: HashMap<u64, Ends>,
    /// How many counters were ever created.
    created: u64,
}

/// The local address of an inbound connection, and the remote one; without the zone that an IPv6 link-local address of
/// a socket has: the multiaddrs by which a connection is looked up do not name it.
type Ends = (Option<SocketAddr>, SocketAddr);

/// The number tells apart connections with the same ends.
type Key = (Ends, u64);

/// A connection whose counter was not taken yet.
#[derive(Clone, Debug)]
pub struct Pending {
    /// The progress of its handshake, with the counter.
    pub progress: Progress,
    /// Its socket, to abort the handshake; `None` if it was dialed.
    pub socket: Option<Socket>,
    /// Whether it is a trusted proxy's own request: the access rules are for clients.
    pub is_proxys_own: bool,
}

impl Table {
    /// The pending connection between these ends, if there is exactly one.
    fn only(&self, endpoint: &ConnectedPoint) -> Option<(&Key, &Pending)> {
        let ends = ends_of(endpoint)?;
        let mut candidates = self.pending.range((ends, 0)..=(ends, u64::MAX));
        let only = candidates.next()?;
        candidates.next().is_none().then_some(only)
    }
}

/// The ends of this connection; `None` if one of them is no socket address.
fn ends_of(endpoint: &ConnectedPoint) -> Option<Ends> {
    let socket_address = |address| Some(listen_address(&without_peer(address))?.0);
    match endpoint {
        ConnectedPoint::Dialer { address, .. } => Some((None, socket_address(address)?)),
        ConnectedPoint::Listener { local_addr, send_back_addr } => {
            Some((Some(socket_address(local_addr)?), socket_address(send_back_addr)?))
        }
    }
}

impl ByteCounters {
    /// Counts the bytes received on `stream`.
    pub(crate) fn count<S>(
        &self,
        stream: S,
        local: Option<SocketAddr>,
        remote: SocketAddr,
        socket: Option<Socket>,
    ) -> Counted<S> {
        let progress = Progress::default();
        let activity = progress.activity.clone();
        let without_zone = |socket: SocketAddr| SocketAddr::new(socket.ip(), socket.port());
        let ends = (local.map(without_zone), without_zone(remote));
        let pending = Pending { progress, socket, is_proxys_own: false };
        activity.track(stream, self.insert(ends, pending))
    }

    fn insert(&self, ends: Ends, pending: Pending) -> PendingCounter {
        let mut table = self.table();
        table.created += 1;
        let key = (ends, table.created);
        table.pending.insert(key, pending);
        PendingCounter { key, counters: self.clone() }
    }

    /// Adds a connection that has ended already, so that its failure can be counted. Dropping the guard removes it.
    #[cfg(feature = "websocket")]
    pub(crate) fn add_ended(
        &self,
        endpoint: &ConnectedPoint,
        ended: Pending,
    ) -> Option<PendingCounter> {
        Some(self.insert(ends_of(endpoint)?, ended))
    }

    /// Takes the counter of the connection between these ends; `None` if there are several, or it was taken.
    pub fn take(&self, endpoint: &ConnectedPoint) -> Option<ActivityCounter> {
        let mut table = self.table();
        let key = *table.only(endpoint)?.0;
        table.pending.remove(&key).map(|pending| pending.progress.activity)
    }

    /// The pending connection between these ends; `None` if there are several, or its counter was taken.
    pub fn get(&self, endpoint: &ConnectedPoint) -> Option<Pending> {
        self.table().only(endpoint).map(|(_, pending)| pending.clone())
    }

    /// Records that the connection between these ends is a trusted proxy's own; unless there are several.
    #[cfg(feature = "websocket")]
    pub(crate) fn set_proxys_own(&self, endpoint: &ConnectedPoint) {
        let mut table = self.table();
        let key = table.only(endpoint).map(|(key, _)| *key);
        if let Some(pending) = key.and_then(|key| table.pending.get_mut(&key)) {
            pending.is_proxys_own = true;
        }
    }

    /// Replaces the remote end of the connection between these ends, which is a reverse proxy's, by the client's;
    /// unless there are several, or its counter was taken.
    #[cfg(feature = "websocket")]
    pub(crate) fn rename(&self, endpoint: &ConnectedPoint, client: SocketAddr) {
        let mut table = self.table();
        let Some((&key, _)) = table.only(endpoint) else { return };
        let ((local, _), number) = key;
        if let Some(pending) = table.pending.remove(&key) {
            table.pending.insert(((local, client), number), pending);
            table.renamed.insert(number, (local, client));
        }
    }

    /// How many counters were not taken yet.
    #[cfg(test)]
    pub fn pending(&self) -> usize {
        self.table().pending.len()
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A stream whose received bytes are counted.
pub type Counted<S> = TrackedStream<S, PendingCounter>;

/// Removes the counter of a connection that ended before it was taken.
///
/// Dropped before the socket: once that is closed, another connection may have its addresses.
#[derive(Debug)]
pub struct PendingCounter {
    key: Key,
    counters: ByteCounters,
}

impl Drop for PendingCounter {
    fn drop(&mut self) {
        let (ends, number) = self.key;
        let mut table = self.counters.table();
        let ends = table.renamed.remove(&number).unwrap_or(ends);
        table.pending.remove(&(ends, number));
    }
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddrV6;

    use super::*;

    fn connection(local: &str, remote: &str) -> ConnectedPoint {
        ConnectedPoint::Listener {
            local_addr: local.parse().unwrap(),
            send_back_addr: remote.parse().unwrap(),
        }
    }

    #[test]
    fn a_counter_is_taken_once_by_its_addresses() {
        let counters = ByteCounters::default();
        let (local, remote) = ("192.0.2.1:1".parse().unwrap(), "192.0.2.2:2".parse().unwrap());
        let counted = counters.count((), Some(local), remote, None);
        let elsewhere = connection("/ip4/192.0.2.1/tcp/1", "/ip4/192.0.2.2/tcp/3");
        let here = connection("/ip4/192.0.2.1/tcp/1", "/ip4/192.0.2.2/tcp/2");
        assert!(counters.take(&elsewhere).is_none());
        assert!(counters.take(&here).is_some());
        assert!(counters.take(&here).is_none());
        drop(counted);
        assert_eq!(counters.pending(), 0);
    }

    #[test]
    fn a_counter_of_link_local_addresses_is_found_without_their_zone() {
        let counters = ByteCounters::default();
        let socket = |port| SocketAddrV6::new("fe80::1".parse().unwrap(), port, 0, 2).into();
        let _counted = counters.count((), Some(socket(1)), socket(2), None);
        let here = connection("/ip6/fe80::1/tcp/1", "/ip6/fe80::1/tcp/2");
        assert!(counters.take(&here).is_some());
    }

    #[test]
    fn a_counter_is_found_although_a_proxy_names_the_port_0() {
        let counters = ByteCounters::default();
        let (local, remote) = ("192.0.2.1:1".parse().unwrap(), "192.0.2.2:0".parse().unwrap());
        let _counted = counters.count((), Some(local), remote, None);
        let here = connection("/ip4/192.0.2.1/tcp/1", "/ip4/192.0.2.2/tcp/0");
        assert!(counters.take(&here).is_some());
    }

    #[test]
    fn websocket_suffixes_do_not_affect_the_lookup() {
        let counters = ByteCounters::default();
        for layer in ["/ws", "/tls/ws", "/wss"] {
            let (local, remote) = ("192.0.2.1:1".parse().unwrap(), "192.0.2.2:2".parse().unwrap());
            let counted = counters.count((), Some(local), remote, None);
            let (local, remote) = ("/ip4/192.0.2.1/tcp/1", "/ip4/192.0.2.2/tcp/2");
            let over = connection(&format!("{local}{layer}"), &format!("{remote}{layer}"));
            assert!(counters.take(&over).is_some(), "{layer}");
            drop(counted);
        }
    }

    #[cfg(feature = "websocket")]
    #[test]
    fn a_renamed_connection_is_found_by_its_new_end_and_leaves_nothing_behind() {
        let counters = ByteCounters::default();
        let (local, proxy) = ("192.0.2.1:1".parse().unwrap(), "10.0.0.1:2".parse().unwrap());
        let through = connection("/ip4/192.0.2.1/tcp/1", "/ip4/10.0.0.1/tcp/2/ws");
        let client = connection("/ip4/192.0.2.1/tcp/1", "/ip4/198.51.100.7/tcp/3/ws");
        for is_taken in [true, false] {
            let counted = counters.count((), Some(local), proxy, None);
            counters.rename(&through, "198.51.100.7:3".parse().unwrap());
            assert!(counters.get(&through).is_none());
            assert!(counters.get(&client).is_some());
            assert!(!is_taken || counters.take(&client).is_some());
            drop(counted);
            assert_eq!(counters.pending(), 0);
            assert!(counters.table().renamed.is_empty());
        }
    }

    #[test]
    fn two_connections_with_the_same_addresses_get_no_counter() {
        let counters = ByteCounters::default();
        let (local, remote) = ("192.0.2.1:1".parse().unwrap(), "192.0.2.2:2".parse().unwrap());
        let both = connection("/ip4/192.0.2.1/tcp/1", "/ip4/192.0.2.2/tcp/2");
        let first = counters.count((), Some(local), remote, None);
        let second = counters.count((), Some(local), remote, None);
        assert!(counters.take(&both).is_none());
        drop(first);
        assert!(counters.take(&both).is_some(), "only the second is left");
        assert_eq!(counters.pending(), 0);
        drop(second);
    }
}
