//! How many bytes came in on each TCP connection: the cheapest sign that a peer is alive.
//!
//! The transport makes a connection before the swarm gives it a name, so the counters wait here,
//! under their socket addresses, until the owner of the swarm claims them.

use std::{
    collections::HashMap,
    io,
    net::SocketAddr,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll},
};

use libp2p::{
    core::ConnectedPoint,
    futures::{AsyncRead, AsyncWrite},
};

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
        Counted {
            _unclaimed: Unclaimed {
                key,
                traffic: self.clone(),
            },
            stream: signs.listen_to(stream),
        }
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
pub struct Counted<S> {
    // Dropped before the socket: once that is closed, its address may name another connection.
    _unclaimed: Unclaimed,
    stream: Heard<S>,
}

/// Takes the counter of a connection that ended before it was claimed back out of the table.
struct Unclaimed {
    key: Key,
    traffic: Traffic,
}

impl Drop for Unclaimed {
    fn drop(&mut self) {
        self.traffic.counters().remove(&self.key);
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Counted<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut [u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_read(cx, buffer)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Counted<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buffer)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffers: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, buffers)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_close(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_close(cx)
    }
}
