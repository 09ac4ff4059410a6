//! How many bytes came in on each TCP connection: the cheapest sign that a peer is alive.
//!
//! The transport makes a connection before the swarm gives it a name, so the counters wait here,
//! under their socket addresses, until the owner of the swarm claims them.

use std::{
    collections::HashMap,
    net::SocketAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use libp2p::core::ConnectedPoint;

use super::transport::socket_address;
use crate::signs::{Heard, Signs};

/// The counters of connections that were not claimed yet.
#[derive(Clone, Debug, Default)]
pub struct Traffic(Arc<Mutex<HashMap<Key, Signs>>>);

/// Our own socket address, where the connection came in, and the peer's.
type Key = (Option<SocketAddr>, SocketAddr);

impl Traffic {
    /// Counts what comes in on `stream`.
    pub(crate) fn count<S>(
        &self,
        stream: S,
        local: Option<SocketAddr>,
        remote: SocketAddr,
    ) -> Counted<S> {
        let signs = Signs::default();
        let key = (local, remote);
        self.counters().insert(key, signs.clone());
        let unclaimed = Unclaimed {
            key,
            traffic: self.clone(),
        };
        signs.listen_with(stream, unclaimed)
    }

    /// The counter of the connection between these two ends.
    pub fn claim(&self, endpoint: &ConnectedPoint) -> Option<Signs> {
        let key = match endpoint {
            ConnectedPoint::Dialer { address, .. } => (None, socket_address(address)?),
            ConnectedPoint::Listener {
                local_addr,
                send_back_addr,
            } => (
                Some(socket_address(local_addr)?),
                socket_address(send_back_addr)?,
            ),
        };
        self.counters().remove(&key)
    }

    /// How many wait to be claimed.
    pub fn unclaimed(&self) -> usize {
        self.counters().len()
    }

    fn counters(&self) -> MutexGuard<'_, HashMap<Key, Signs>> {
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
    key: Key,
    traffic: Traffic,
}

impl Drop for Unclaimed {
    fn drop(&mut self) {
        self.traffic.counters().remove(&self.key);
    }
}
