//! The bytes between two streams: limits, half-close, fair share of the link, counting.
//!
//! A circuit ends in one of two ways. Both peers close their writing half, each close is passed on, and the circuit is
//! [`CircuitEnd::Finished`]. Or something cuts it short: then both streams are dropped without being closed, which
//! makes the muxer reset them.
//! See [the specification](https://github.com/libp2p/specs/blob/master/relay/circuit-v2.md#hop-protocol).

use std::{
    cell::Cell,
    future::{Future, poll_fn},
    io, mem,
    pin::Pin,
    task::{Context, Poll, ready},
    time::Instant,
};

use futures_timer::Delay;
use libp2p::{
    PeerId,
    futures::{AsyncRead, AsyncWrite, FutureExt},
};

use super::timer::Timeout;
use crate::{
    event::{BytesTransferred, CircuitEnd},
    relay::{CircuitParameters, bandwidth::Link},
};

/// The size of a buffer in bytes: what a secure channel sends in one piece. The largest message of libp2p's Noise
/// carries 64,511 bytes, of which a yamux frame's header takes 12.
pub(crate) const BUFFER_SIZE: usize = 64_511 - 12;

thread_local! {
    static UNUSED: Cell<Option<Box<[u8]>>> = const { Cell::new(None) };
}

/// Transfers bytes between a source and a target until the circuit ends, at the deadline at the latest, and counts
/// them. Yields how it ended; [`CircuitEnd::Disconnected`] also if the relay ended it.
///
/// Not an `async fn`: that would keep the box of `parameters` as long as the circuit lasts.
pub(crate) fn transfer(
    mut source: impl AsyncRead + AsyncWrite + Unpin,
    mut target: impl AsyncRead + AsyncWrite + Unpin,
    parameters: Box<CircuitParameters>,
    mut deadline: Option<Timeout>,
) -> impl Future<Output = CircuitEnd> {
    let CircuitParameters { limit, link, ends, counters, mut ended, .. } = *parameters;
    let [mut to_target, mut to_source] = [(); 2]
        .map(|()| Direction { allowance: limit.bytes.unwrap_or(u64::MAX), ..Direction::default() });
    let mut share = FairShare { link, ends, wait: None, is_target_first: false };
    share.charge(0); // a new circuit waits for its turn, too
    poll_fn(move |cx| {
        // 1. Check whether the relay or the deadline ends it.
        if ended.poll_unpin(cx).is_ready() {
            return Poll::Ready(CircuitEnd::Disconnected);
        }
        if deadline.as_mut().is_some_and(|deadline| deadline.poll_unpin(cx).is_ready()) {
            return Poll::Ready(CircuitEnd::TimeLimit);
        }
        // 2. Transfer, in the order that alternates while bandwidth is short.
        let polled = if share.is_target_first {
            let back = to_source.poll(&mut target, &mut source, &mut share, cx);
            [to_target.poll(&mut source, &mut target, &mut share, cx), back]
        } else {
            let there = to_target.poll(&mut source, &mut target, &mut share, cx);
            [there, to_source.poll(&mut target, &mut source, &mut share, cx)]
        };
        // 3. End a wait that is over. A circuit whose writes stall reads nothing, and so does not end it itself.
        if share.wait.as_mut().is_some_and(|wait| wait.poll_unpin(cx).is_ready()) {
            share.end_wait();
            cx.waker().wake_by_ref();
        }
        // 4. Count once a poll: each write to counters that all circuits share invalidates other cores' caches.
        let directions = [&mut to_target, &mut to_source];
        let waiting = directions.each_ref().map(|it| !it.pending.is_empty());
        let [to_target, to_source] = directions.map(|it| mem::take(&mut it.delivered));
        if to_target + to_source > 0 {
            counters.add(BytesTransferred { to_target, to_source });
        }
        counters.set_waiting(waiting);
        match polled {
            [Poll::Ready(Err(end)), _] | [_, Poll::Ready(Err(end))] => Poll::Ready(end),
            [Poll::Ready(Ok(())), Poll::Ready(Ok(()))] => Poll::Ready(CircuitEnd::Finished),
            _ => Poll::Pending,
        }
    })
}

/// One of the two directions of a circuit.
#[derive(Default)]
struct Direction {
    /// Bytes that the writer did not accept yet. Usually empty: an idle circuit holds no buffer.
    pending: Vec<u8>,
    /// How many more bytes may be read.
    allowance: u64,
    /// Bytes that were written and are not counted yet.
    delivered: u64,
    state: State,
}

#[derive(Clone, Copy, Default)]
enum State {
    #[default]
    Open,
    /// More than the limit was read. The bytes within the limit are still to be delivered.
    OverLimit,
    /// The reader reached the end; the writer is to be closed.
    Closing,
    Closed,
}

impl Direction {
    /// Transfers what there is; ready when the end was passed on, or the circuit cut short.
    fn poll(
        &mut self,
        from: &mut (impl AsyncRead + Unpin),
        to: &mut (impl AsyncWrite + Unpin),
        share: &mut FairShare,
        cx: &mut Context<'_>,
    ) -> Poll<Result<(), CircuitEnd>> {
        // 1. Write what is pending.
        let mut pending = mem::take(&mut self.pending);
        let left = self.write(&pending, to, cx)?.len();
        if left > 0 {
            pending.drain(..pending.len() - left);
            self.pending = pending;
            return Poll::Pending;
        }
        loop {
            // 2. Once the reader has ended, flush or close the writer.
            match self.state {
                State::Closed => return Poll::Ready(Ok(())),
                State::OverLimit => {
                    ready!(Pin::new(&mut *to).poll_flush(cx)).map_err(end_of)?;
                    return Poll::Ready(Err(CircuitEnd::DataLimit));
                }
                State::Closing => {
                    ready!(Pin::new(&mut *to).poll_close(cx)).map_err(end_of)?;
                    self.state = State::Closed;
                    continue;
                }
                State::Open => {}
            }
            // 3. Read one quantum, and write it. What was written is flushed before an error ends the circuit, and
            // before a wait for bytes or for bandwidth.
            let mut buffer = Buffer::borrow();
            match share.poll_read(from, &mut buffer.0, cx) {
                Poll::Ready(Ok(0)) => self.state = State::Closing,
                Poll::Ready(Ok(read)) => {
                    if self.allowance < read as u64 {
                        self.state = State::OverLimit;
                    }
                    let allowed = self.allowance.min(read as u64);
                    self.allowance -= allowed;
                    let allowed = buffer.0.get(..allowed as usize).unwrap_or_default();
                    let left = self.write(allowed, to, cx)?;
                    if !left.is_empty() {
                        self.pending = left.to_vec();
                        return Poll::Pending;
                    }
                }
                Poll::Ready(Err(error)) => {
                    let _ = Pin::new(&mut *to).poll_flush(cx);
                    return Poll::Ready(Err(end_of(error)));
                }
                Poll::Pending => {
                    let _ = Pin::new(&mut *to).poll_flush(cx).map_err(end_of)?;
                    return Poll::Pending;
                }
            }
        }
    }

    /// Writes these bytes; returns those that the writer did not accept.
    fn write<'a>(
        &mut self,
        mut bytes: &'a [u8],
        to: &mut (impl AsyncWrite + Unpin),
        cx: &mut Context<'_>,
    ) -> Result<&'a [u8], CircuitEnd> {
        while !bytes.is_empty() {
            match Pin::new(&mut *to).poll_write(cx, bytes).map_err(end_of)? {
                Poll::Ready(0) => return Err(CircuitEnd::Reset(io::ErrorKind::WriteZero)),
                Poll::Ready(written) => {
                    self.delivered += written as u64;
                    bytes = bytes.get(written..).unwrap_or_default();
                }
                Poll::Pending => break,
            }
        }
        Ok(bytes)
    }
}

/// One circuit's fair share of the link, for both directions: [`crate::relay::bandwidth`].
struct FairShare {
    link: Link,
    /// The source and the target.
    ends: [PeerId; 2],
    /// Set until the circuit may read again.
    wait: Option<Delay>,
    /// Whether the target sends first: the directions take turns.
    is_target_first: bool,
}

impl FairShare {
    /// Reads what there is, at most one quantum.
    fn poll_read(
        &mut self,
        from: &mut (impl AsyncRead + Unpin),
        buffer: &mut [u8],
        cx: &mut Context<'_>,
    ) -> Poll<io::Result<usize>> {
        if let Some(wait) = &mut self.wait {
            ready!(wait.poll_unpin(cx));
            self.end_wait();
        }
        let quantum = self.link.lock().quantum(self.ends);
        let room = quantum.map_or(buffer.len(), |quantum| quantum.min(buffer.len()));
        let (into, _) = buffer.split_at_mut(room);
        let read = ready!(Pin::new(from).poll_read(cx, into))?;
        if quantum.is_some() && read > 0 {
            self.charge(read);
        }
        Poll::Ready(Ok(read))
    }

    fn charge(&mut self, bytes: usize) {
        let now = Instant::now();
        let next = self.link.lock().charge(self.ends, bytes, now);
        if let Some(next) = next {
            self.wait = Some(Delay::new(next.saturating_duration_since(now)));
            self.is_target_first = !self.is_target_first;
        }
    }

    fn end_wait(&mut self) {
        if self.wait.take().is_some() {
            self.link.lock().count_waiting(self.ends, -1);
        }
    }
}

impl Drop for FairShare {
    fn drop(&mut self) {
        self.end_wait();
    }
}

/// How a circuit ends when one of its streams fails: reset by its peer, or with its connection.
pub(super) fn end_of(error: io::Error) -> CircuitEnd {
    match error.kind() {
        io::ErrorKind::ConnectionAborted => CircuitEnd::Disconnected,
        kind => CircuitEnd::Reset(kind),
    }
}

/// The thread's buffer, or a new one while that is borrowed. Returned when it is dropped.
#[derive(Debug)]
pub(crate) struct Buffer(pub(crate) Box<[u8]>);

impl Buffer {
    pub(crate) fn borrow() -> Self {
        Self(UNUSED.take().unwrap_or_else(|| vec![0; BUFFER_SIZE].into()))
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        UNUSED.set(Some(std::mem::take(&mut self.0)));
    }
}

#[cfg(test)]
mod tests {
    use std::{
        sync::{
            Arc,
            atomic::{AtomicUsize, Ordering::Relaxed},
        },
        time::{Duration, Instant},
    };

    use libp2p::futures::{
        channel::oneshot,
        executor::block_on,
        future::{Either, select},
        io::Cursor,
    };

    use super::*;
    use crate::{
        config::Config,
        event::CircuitId,
        relay::{accounts::Accounts, bandwidth::Link},
        wire::Limit,
    };

    /// A peer that sends `sends` and accepts `takes` bytes.
    struct Peer {
        sends: Cursor<&'static [u8]>,
        takes: Arc<AtomicUsize>,
    }

    impl AsyncRead for Peer {
        fn poll_read(
            mut self: Pin<&mut Self>,
            cx: &mut Context<'_>,
            into: &mut [u8],
        ) -> Poll<io::Result<usize>> {
            match Pin::new(&mut self.sends).poll_read(cx, into) {
                Poll::Ready(Ok(0)) => Poll::Pending,
                other => other,
            }
        }
    }

    impl AsyncWrite for Peer {
        fn poll_write(
            self: Pin<&mut Self>,
            _: &mut Context<'_>,
            bytes: &[u8],
        ) -> Poll<io::Result<usize>> {
            let taken = self.takes.load(Relaxed).min(bytes.len());
            self.takes.fetch_sub(taken, Relaxed);
            if taken > 0 { Poll::Ready(Ok(taken)) } else { Poll::Pending }
        }

        fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }

        fn poll_close(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }
    }

    /// What a circuit without limits over this link needs, and the guard that ends it.
    fn parameters(link: Link) -> (oneshot::Sender<()>, Box<CircuitParameters>) {
        let (guard, ended) = oneshot::channel();
        let parameters = CircuitParameters {
            id: CircuitId(1),
            since: Instant::now(),
            limit: Limit::default(),
            link,
            ends: [(); 2].map(|()| PeerId::random()),
            counters: Accounts::default().counters(),
            ended,
        };
        (guard, Box::new(parameters))
    }

    #[test]
    fn the_directions_with_pending_bytes_are_reported() {
        let (_guard, parameters) = parameters(Link::default());
        let counters = parameters.counters.clone();
        let [source, target] = [99, 4].map(|takes| Arc::new(AtomicUsize::new(takes)));
        let peer = |takes| Peer { sends: Cursor::new(b"ten bytes."), takes };
        let (source, other) = (peer(source), peer(target.clone()));
        let mut circuit = transfer(source, other, parameters, None);
        let mut cx = Context::from_waker(std::task::Waker::noop());
        assert!(circuit.poll_unpin(&mut cx).is_pending());
        assert_eq!(counters.read(), BytesTransferred { to_target: 4, to_source: 10 });
        assert_eq!(counters.waiting(), [true, false]);
        target.store(99, Relaxed);
        assert!(circuit.poll_unpin(&mut cx).is_pending());
        assert_eq!(counters.waiting(), [false, false]);
    }

    /// Otherwise clients that open one circuit after another, each for its first bytes, exceed the cap and delay all
    /// others.
    #[test]
    fn a_new_circuit_transfers_nothing_before_what_others_transferred_is_paid_for() {
        let (now, link) = (Instant::now(), Link::default());
        link.lock().configure(&Config { bandwidth: 100, ..Config::default() }, now);
        let transferred = || {
            let (_guard, parameters) = parameters(link.clone());
            let counters = parameters.counters.clone();
            let peer = || Peer { sends: Cursor::new(b"ten bytes."), takes: Arc::new(99.into()) };
            let mut circuit = transfer(peer(), peer(), parameters, None);
            let mut cx = Context::from_waker(std::task::Waker::noop());
            assert!(circuit.poll_unpin(&mut cx).is_pending());
            let BytesTransferred { to_target, to_source } = counters.read();
            to_target + to_source
        };
        assert_ne!(transferred(), 0, "an unused link");
        let others = [(); 2].map(|()| PeerId::random());
        link.lock().charge(others, 1_000_000, now);
        assert_eq!(transferred(), 0);
    }

    /// Otherwise circuits to peers that read slowly make the quantum of all others small.
    #[test]
    fn a_circuit_that_stalls_waits_for_bandwidth_only_until_its_bytes_are_paid_for() {
        let link = Link::default();
        let config = Config { bandwidth: 1_000_000, ..Config::default() };
        link.lock().configure(&config, Instant::now());
        let others = [(); 2].map(|()| PeerId::random());
        let quantum = || link.lock().quantum(others);
        let before = quantum();
        let (_guard, parameters) = parameters(link.clone());
        let peer = || Peer { sends: Cursor::new(&[7; 200_000]), takes: Arc::default() };
        let circuit = transfer(peer(), peer(), parameters, None);
        let stalls = select(circuit, Delay::new(Duration::from_millis(300)));
        let Either::Right((_, _stalled)) = block_on(stalls) else { panic!("it ended") };
        assert_eq!(quantum(), before);
    }
}
