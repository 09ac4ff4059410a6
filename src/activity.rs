//! The activity of a peer: a counter that I/O adds to and the sweep polls.
//!
//! A connection whose counter has grown since the last sweep is alive, whatever it was that arrived.

use std::{
    io,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, ready},
};

use libp2p::futures::{AsyncRead, AsyncWrite};
use portable_atomic::AtomicU64;

use crate::delegate::delegate_write;

/// Counts what is received from a peer. Clones share one counter.
#[derive(Clone, Debug, Default)]
pub struct ActivityCounter(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    received: AtomicU64,
    is_flooding: AtomicBool,
}

impl ActivityCounter {
    /// Adds received bytes, or 1 for anything else that shows that the peer is alive.
    pub fn add(&self, amount: u64) {
        self.0.received.fetch_add(amount, Ordering::Relaxed);
    }

    /// The sum of what was added.
    #[doc(hidden)]
    pub fn count(&self) -> u64 {
        self.0.received.load(Ordering::Relaxed)
    }

    /// Whether the peer exceeded its rate of frames that carry nothing. The next sweep closes such a connection
    /// unless it holds a slot or carries a circuit.
    pub(crate) fn is_flooding(&self) -> bool {
        self.0.is_flooding.load(Ordering::Relaxed)
    }

    /// Marks the peer as flooding.
    #[doc(hidden)]
    pub fn set_flooding(&self) {
        self.0.is_flooding.store(true, Ordering::Relaxed);
    }

    /// Counts what is read from `stream`; an end or an error of it counts as 1. `guard` is dropped before the stream.
    #[doc(hidden)]
    pub fn track<S, G>(&self, stream: S, guard: G) -> TrackedStream<S, G> {
        TrackedStream { _guard: guard, activity: self.clone(), stream }
    }
}

/// A stream whose received bytes count as activity.
#[derive(Debug)]
pub struct TrackedStream<S, G = ()> {
    // Fields are dropped in this order.
    _guard: G,
    activity: ActivityCounter,
    stream: S,
}

impl<S: AsyncRead + Unpin, G: Unpin> AsyncRead for TrackedStream<S, G> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut [u8],
    ) -> Poll<io::Result<usize>> {
        let read = ready!(Pin::new(&mut self.stream).poll_read(cx, buffer));
        let bytes = read.as_ref().map_or(0, |bytes| *bytes as u64);
        self.activity.add(bytes.max(1));
        Poll::Ready(read)
    }
}

impl<S: AsyncWrite + Unpin, G: Unpin> AsyncWrite for TrackedStream<S, G> {
    delegate_write!(stream);
}
