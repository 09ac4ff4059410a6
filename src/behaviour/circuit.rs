//! The bytes between two streams: limits, half-close, accounting.
//!
//! A circuit ends in one of two ways. Both ends close their writing half, each close is carried
//! over, and it is [`CircuitEnd::Finished`]. Or something cuts it short: then both streams are
//! dropped without being closed, which makes the muxer reset them.
//! See [the specification](https://github.com/libp2p/specs/blob/master/relay/circuit-v2.md#hop-protocol).

use std::{
    future::Future,
    io,
    pin::Pin,
    task::{Context, Poll, ready},
};

use libp2p::futures::{AsyncRead, AsyncWrite, FutureExt, channel::oneshot};

use super::{buffer::Buffer, share::Share, timer::Timeout};
use crate::{
    event::{Carried, CircuitEnd},
    relay::{CircuitParameters, accounts::Counters},
};

/// Carries bytes between a source and a target until the circuit ends; yields how. Counts them as it does.
#[derive(Debug)]
pub(crate) struct Circuit<S, T> {
    source: S,
    target: T,
    to_target: Direction,
    to_source: Direction,
    share: Share,
    counters: Counters,
    deadline: Option<Timeout>,
    /// Is cancelled when the relay ends the circuit.
    ended: oneshot::Receiver<()>,
}

impl<S, T> Circuit<S, T> {
    /// A circuit whose time is over at the deadline.
    pub(crate) fn new(
        source: S,
        target: T,
        parameters: CircuitParameters,
        deadline: Option<Timeout>,
    ) -> Self {
        let CircuitParameters { limit, link, ends, counters, ended } = parameters;
        Self {
            source,
            target,
            to_target: Direction::new(limit.bytes),
            to_source: Direction::new(limit.bytes),
            share: Share::new(link, ends),
            counters,
            deadline,
            ended,
        }
    }

    fn count(&self) {
        let (to_target, to_source) = (self.to_target.delivered, self.to_source.delivered);
        self.counters.set(Carried { to_target, to_source });
        let ways = [&self.to_target, &self.to_source];
        self.counters.set_waiting(ways.map(|way| !way.waiting.is_empty()));
    }
}

impl<S, T> Future for Circuit<S, T>
where
    S: AsyncRead + AsyncWrite + Unpin,
    T: AsyncRead + AsyncWrite + Unpin,
{
    type Output = CircuitEnd;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = &mut *self;
        let end = 'end: {
            if this.ended.poll_unpin(cx).is_ready() {
                break 'end CircuitEnd::Ended;
            }
            let deadline = this.deadline.as_mut();
            if deadline.is_some_and(|deadline| deadline.poll_unpin(cx).is_ready()) {
                break 'end CircuitEnd::TimeLimit;
            }
            let (source, target) = (&mut this.source, &mut this.target);
            let share = &mut this.share;
            let ways = match share.target_first() {
                false => {
                    let there = this.to_target.poll(source, target, share, cx);
                    (there, this.to_source.poll(target, source, share, cx))
                }
                true => {
                    let back = this.to_source.poll(target, source, share, cx);
                    (this.to_target.poll(source, target, share, cx), back)
                }
            };
            match ways {
                (Poll::Ready(Err(end)), _) | (_, Poll::Ready(Err(end))) => end,
                (Poll::Ready(Ok(())), Poll::Ready(Ok(()))) => CircuitEnd::Finished,
                _ => {
                    this.count();
                    return Poll::Pending;
                }
            }
        };
        this.count();
        Poll::Ready(end)
    }
}

/// One of the two ways through a circuit.
#[derive(Debug)]
struct Direction {
    /// What the writer did not take yet. Usually nothing: a circuit that waits holds no memory.
    waiting: Vec<u8>,
    /// How many more bytes may be read; `None`: no limit.
    allowance: Option<u64>,
    delivered: u64,
    state: State,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Open,
    /// There was a byte too many. Those before it are still owed.
    OverLimit,
    /// The reader saw the end; the writer is to be told.
    Closing,
    Closed,
}

impl Direction {
    fn new(allowance: Option<u64>) -> Self {
        Self { waiting: Vec::new(), allowance, delivered: 0, state: State::Open }
    }

    /// Carries what there is; ready when the end was carried over, or cut short.
    fn poll(
        &mut self,
        from: &mut (impl AsyncRead + Unpin),
        to: &mut (impl AsyncWrite + Unpin),
        share: &mut Share,
        cx: &mut Context<'_>,
    ) -> Poll<Result<(), CircuitEnd>> {
        let mut waiting = std::mem::take(&mut self.waiting);
        let left = self.write(&waiting, to, cx)?.len();
        if left > 0 {
            waiting.drain(..waiting.len() - left);
            self.waiting = waiting;
            return Poll::Pending;
        }
        loop {
            match self.state {
                State::Closed => return Poll::Ready(Ok(())),
                State::OverLimit => {
                    ready!(Pin::new(&mut *to).poll_flush(cx)).map_err(reset)?;
                    return Poll::Ready(Err(CircuitEnd::DataLimit));
                }
                State::Closing => {
                    ready!(Pin::new(&mut *to).poll_close(cx)).map_err(reset)?;
                    self.state = State::Closed;
                    return Poll::Ready(Ok(()));
                }
                State::Open => {}
            }
            let mut buffer = Buffer::borrow();
            match poll_read(from, &mut buffer, share, cx) {
                Poll::Ready(Ok(0)) => self.state = State::Closing,
                Poll::Ready(Ok(read)) => {
                    let passing = buffer.get(..self.allowed(read)).unwrap_or_default();
                    let left = self.write(passing, to, cx)?;
                    if !left.is_empty() {
                        self.waiting = left.to_vec();
                        return Poll::Pending;
                    }
                }
                Poll::Ready(Err(error)) => {
                    // What was written before reaches the other end.
                    let _ = Pin::new(&mut *to).poll_flush(cx);
                    return Poll::Ready(Err(reset(error)));
                }
                Poll::Pending => {
                    // Nothing to read now, or not its turn: let what was written reach the other end.
                    let _ = Pin::new(&mut *to).poll_flush(cx).map_err(reset)?;
                    return Poll::Pending;
                }
            }
        }
    }

    /// Writes these bytes; says which of them the writer left when it had to be waited for.
    fn write<'a>(
        &mut self,
        mut bytes: &'a [u8],
        to: &mut (impl AsyncWrite + Unpin),
        cx: &mut Context<'_>,
    ) -> Result<&'a [u8], CircuitEnd> {
        while !bytes.is_empty() {
            match Pin::new(&mut *to).poll_write(cx, bytes).map_err(reset)? {
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

    /// How many of the `read` bytes may pass.
    fn allowed(&mut self, read: usize) -> usize {
        let Some(allowance) = &mut self.allowance else {
            return read;
        };
        if *allowance < read as u64 {
            self.state = State::OverLimit;
        }
        let passing = (*allowance).min(read as u64);
        *allowance -= passing;
        passing as usize
    }
}

/// Reads what there is, as far as the circuit's share of the link goes.
fn poll_read(
    from: &mut (impl AsyncRead + Unpin),
    buffer: &mut [u8],
    share: &mut Share,
    cx: &mut Context<'_>,
) -> Poll<io::Result<usize>> {
    let piece = ready!(share.poll(cx));
    let room = piece.map_or(buffer.len(), |piece| piece.min(buffer.len()));
    let (room, _) = buffer.split_at_mut(room);
    let read = ready!(Pin::new(from).poll_read(cx, room))?;
    if piece.is_some() && read > 0 {
        share.carried(read);
    }
    Poll::Ready(Ok(read))
}

fn reset(error: io::Error) -> CircuitEnd {
    CircuitEnd::Reset(error.kind())
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use libp2p::{PeerId, futures::io::Cursor};

    use super::*;
    use crate::{
        config::Config,
        relay::{
            accounts::Accounts,
            bandwidth::Link,
            circuits::{Circuits, End},
        },
        wire::Limit,
    };

    /// A peer that says this, and takes so many bytes.
    struct Peer {
        says: Cursor<&'static [u8]>,
        takes: usize,
    }

    impl AsyncRead for Peer {
        fn poll_read(
            mut self: Pin<&mut Self>,
            cx: &mut Context<'_>,
            into: &mut [u8],
        ) -> Poll<io::Result<usize>> {
            match Pin::new(&mut self.says).poll_read(cx, into) {
                Poll::Ready(Ok(0)) => Poll::Pending,
                other => other,
            }
        }
    }

    impl AsyncWrite for Peer {
        fn poll_write(
            mut self: Pin<&mut Self>,
            _: &mut Context<'_>,
            bytes: &[u8],
        ) -> Poll<io::Result<usize>> {
            let taken = self.takes.min(bytes.len());
            self.takes -= taken;
            if taken > 0 { Poll::Ready(Ok(taken)) } else { Poll::Pending }
        }

        fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }

        fn poll_close(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }
    }

    #[test]
    fn it_tells_which_way_bytes_wait() {
        let (now, config) = (Instant::now(), Config::default());
        let peers = [(); 2].map(|()| PeerId::random());
        let [source, target] = peers.map(|peer| End { peer, connection: () });
        let mut circuits = Circuits::<(), ()>::new(&config);
        let (id, ended) = circuits.add(source, target, None, (), now);
        let counters = Accounts::default().opened(id, source.peer, target.peer);
        let parameters = CircuitParameters {
            limit: Limit { duration: None, bytes: None },
            link: Link::new(&config, now),
            ends: peers,
            counters: counters.clone(),
            ended,
        };
        let peer = |takes| Peer { says: Cursor::new(b"ten bytes."), takes };
        let mut circuit = Circuit::new(peer(99), peer(4), parameters, None);
        let mut cx = Context::from_waker(std::task::Waker::noop());
        assert!(circuit.poll_unpin(&mut cx).is_pending());
        assert_eq!(counters.read(), Carried { to_target: 4, to_source: 10 });
        assert_eq!(counters.waiting(), [true, false]);
        circuit.target.takes = 99;
        assert!(circuit.poll_unpin(&mut cx).is_pending());
        assert_eq!(counters.waiting(), [false, false]);
    }
}
