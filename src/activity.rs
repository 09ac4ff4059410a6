//! The activity of a peer: a counter that I/O adds to and the sweep polls.
//!
//! A connection whose counter has grown since the last sweep is alive: any received byte counts.

use std::{
    collections::{HashMap, hash_map::Entry},
    fmt, io,
    pin::Pin,
    sync::{
        Arc, LazyLock, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, ready},
};

use libp2p::{
    PeerId,
    core::{
        ConnectedPoint,
        muxing::{StreamMuxer, StreamMuxerEvent},
    },
    futures::{AsyncRead, AsyncWrite},
};
use portable_atomic::AtomicU64;

use crate::delegate::delegate_write;

/// Counts what is received from a peer. Clones share one counter.
#[derive(Clone, Debug, Default)]
pub struct ActivityCounter(Arc<Shared>);

#[derive(Default)]
struct Shared {
    received: AtomicU64,
    is_flooding: AtomicBool,
    is_lossy: OnceLock<Box<dyn Fn() -> bool + Send + Sync>>,
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} received", self.received)
    }
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

    /// Whether the peer exceeded its rate of frames that carry nothing. A sweep within 8 s closes such a connection
    /// unless it holds a slot or carries a circuit.
    pub(crate) fn is_flooding(&self) -> bool {
        self.0.is_flooding.load(Ordering::Relaxed)
    }

    /// Marks the peer as flooding.
    #[doc(hidden)]
    pub fn set_flooding(&self) {
        self.0.is_flooding.store(true, Ordering::Relaxed);
    }

    /// Has `is_lossy` tell whether the peer may be alive behind a link that loses packets. It is called when the peer is
    /// about to time out. The first call counts.
    #[doc(hidden)]
    pub fn set_lossy(&self, is_lossy: impl Fn() -> bool + Send + Sync + 'static) {
        let _ = self.0.is_lossy.set(Box::new(is_lossy));
    }

    /// What the function given to [`ActivityCounter::set_lossy`] returns; without one, false.
    pub(crate) fn is_lossy(&self) -> bool {
        self.0.is_lossy.get().is_some_and(|is_lossy| is_lossy())
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

/// Counts what arrives on all streams of a connection as activity of its peer. Pass it to the transport's `map`:
///
/// ```
/// # use libp2p::{Transport, core::{transport::MemoryTransport, upgrade::Version}, identity::Keypair, noise, yamux};
/// # let (tcp, keypair) = (MemoryTransport::default(), Keypair::generate_ed25519());
/// let transport = tcp
///     .upgrade(Version::V1Lazy)
///     .authenticate(noise::Config::new(&keypair)?)
///     .multiplex(yamux::Config::default())
///     .map(relaylet::count_activity);
/// # let _ = transport.boxed();
/// # Ok::<_, noise::Error>(())
/// ```
///
/// It has to be the outermost `map`: a counter is found by the connection's addresses, which have to be those that the
/// swarm sees.
pub fn count_activity<M>(
    (peer, muxer): (PeerId, M),
    endpoint: ConnectedPoint,
) -> (PeerId, CountedMuxer<M>) {
    let key = (peer, endpoint);
    // Connections between the same ends share a counter until the last of them closes: the peer is the same.
    let mut counted = counted();
    let (activity, sharing) = counted.entry(key.clone()).or_default();
    *sharing += 1;
    (peer, CountedMuxer { muxer, activity: activity.clone(), key })
}

/// The counter of an open connection whose transport counts.
pub(crate) fn counter_of(peer: PeerId, endpoint: &ConnectedPoint) -> Option<ActivityCounter> {
    counted().get(&(peer, endpoint.clone())).map(|(activity, _)| activity.clone())
}

type Key = (PeerId, ConnectedPoint);
type Counters = HashMap<Key, (ActivityCounter, usize)>;

/// The counters of all open connections whose transports count, and how many connections share each. Global, because a
/// swarm's transport and its behaviour are built separately and share no state.
fn counted() -> MutexGuard<'static, Counters> {
    static COUNTED: LazyLock<Mutex<Counters>> = LazyLock::new(Mutex::default);
    COUNTED.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A connection whose received bytes count as activity, until it is dropped.
#[derive(Debug)]
pub struct CountedMuxer<M> {
    muxer: M,
    activity: ActivityCounter,
    key: Key,
}

impl<M> Drop for CountedMuxer<M> {
    fn drop(&mut self) {
        if let Entry::Occupied(mut entry) = counted().entry(self.key.clone()) {
            entry.get_mut().1 -= 1;
            if entry.get().1 == 0 {
                entry.remove();
            }
        }
    }
}

impl<M: StreamMuxer<Substream: Unpin> + Unpin> StreamMuxer for CountedMuxer<M> {
    type Substream = TrackedStream<M::Substream>;
    type Error = M::Error;

    fn poll_inbound(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Result<Self::Substream, M::Error>> {
        let stream = ready!(Pin::new(&mut self.muxer).poll_inbound(cx));
        self.activity.add(u64::from(stream.is_ok()));
        Poll::Ready(stream.map(|stream| self.activity.track(stream, ())))
    }

    fn poll_outbound(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Result<Self::Substream, M::Error>> {
        let stream = ready!(Pin::new(&mut self.muxer).poll_outbound(cx));
        Poll::Ready(stream.map(|stream| self.activity.track(stream, ())))
    }

    fn poll_close(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<(), M::Error>> {
        Pin::new(&mut self.muxer).poll_close(cx)
    }

    fn poll(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Result<StreamMuxerEvent, M::Error>> {
        Pin::new(&mut self.muxer).poll(cx)
    }
}

#[cfg(test)]
mod tests {
    use libp2p::{Multiaddr, core::Endpoint, core::transport::PortUse};

    use super::*;

    #[test]
    fn connections_with_the_same_ends_share_a_counter_until_the_last_closes() {
        let peer = PeerId::random();
        let endpoint = ConnectedPoint::Dialer {
            address: Multiaddr::empty(),
            role_override: Endpoint::Dialer,
            port_use: PortUse::Reuse,
        };
        let connect = || count_activity((peer, ()), endpoint.clone()).1;
        let count = || counter_of(peer, &endpoint).map(|counter| counter.count());
        let (first, second) = (connect(), connect());
        first.activity.add(1);
        drop(first);
        assert_eq!(count(), Some(1), "the second connection is open");
        second.activity.add(1);
        let third = connect();
        assert_eq!(count(), Some(2));
        drop((second, third));
        assert_eq!(count(), None);
        let _fourth = connect();
        assert_eq!(count(), Some(0), "a counter of its own");
    }
}
