//! Streams over one connection: yamux, with limits on open streams and on buffered bytes.
//!
//! [`Muxer`] moves bytes between the connection and a session (`session.rs`), when it is polled; the handles of streams
//! only change the session. A stream that the peer opens beyond its limit is reset; one that this side opens beyond its
//! own limit waits for another to end.
//!
//! The secure channel makes a message, and a system call, of each flush. So it is flushed only when there is nothing
//! more to send, or when a batch is full (write batching): that saves a fifth of the CPU time of a circuit's set-up.

use std::{
    io, iter, mem,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::{Duration, Instant},
};

use futures_timer::Delay;
use libp2p::{
    Multiaddr,
    core::{
        Endpoint,
        muxing::{StreamMuxer, StreamMuxerEvent},
        upgrade::{InboundConnectionUpgrade, OutboundConnectionUpgrade, UpgradeInfo},
    },
    futures::{AsyncRead, AsyncWrite, FutureExt},
};

use super::{
    budget::{Cut, MemoryBudget},
    frame::{Chunk, HEADER, Room},
    negotiation::Negotiation,
    session::{Shared, frames::Frames},
    stream::{QUANTUM, Stream},
    stream_limits::{Budget, Key, StreamAdmission, StreamLimits},
};
use crate::{
    activity::ActivityCounter,
    address::ClientPrefix,
    program::net::{
        admission::handshake_failure::{Reason, Stage, StageError},
        socket::{self, Socket},
    },
};

/// How many bytes are read or written in one poll before it yields, and in how many reads.
const TURN: usize = 256 * 1024;
const TURN_READS: usize = 128;

/// The size of a write batch at first, in bytes. Once Noise has sent a larger message, it keeps buffers for three of
/// that size: batches become large with the first full one for which
/// [`keep_if_plenty`](super::budget::ConnectionBudget::keep_if_plenty) finds memory.
const SMALL_BATCH: usize = 8 * 1024;

/// The largest write batch, in bytes: a whole frame, and the largest message of Noise.
const LARGE_BATCH: usize = QUANTUM + HEADER;

/// How much more memory a connection uses once it has sent large batches.
const LARGE_BATCH_COST: usize = 3 * (LARGE_BATCH - SMALL_BATCH);

/// How often a connection whose socket is full is checked for a write stall.
const STALL_CHECK: Duration = Duration::from_secs(5);

/// The default limit of a write stall; see [`MemoryBudget::set_max_stall`].
const MAX_STALL: Duration = Duration::from_secs(60);

/// How long a connection may take to close gracefully, before it is dropped.
const CLOSING: Duration = Duration::from_secs(3);

/// Upgrades connections to yamux. Clones share the limits on all connections together.
#[derive(Clone, Debug)]
pub struct Multiplex {
    /// The limits on the streams of its connections.
    pub admission: StreamAdmission,
    /// The memory that its connections share.
    pub memory: MemoryBudget,
    activity: ActivityCounter,
    socket: Option<Socket>,
}

impl Multiplex {
    /// A multiplexer with these limits, whose connections each carry at most `circuits` circuits.
    pub fn new(budget: Budget, limits: StreamLimits, circuits: usize) -> Self {
        let per_connection = limits.buffered_per_connection(circuits);
        let (pool, growth) = (limits.buffered(circuits), limits.growth(circuits));
        let memory = MemoryBudget::new(pool, per_connection, growth);
        memory.set_max_stall(MAX_STALL);
        let (admission, activity) = (StreamAdmission::new(budget, limits), Default::default());
        Self { admission, memory, activity, socket: None }
    }

    /// The multiplexer of a connection from `remote` over this socket, whose transport counts its activity.
    pub fn of(
        &self,
        remote: &Multiaddr,
        activity: Option<ActivityCounter>,
        socket: Option<Socket>,
    ) -> Self {
        let (mut all, activity) = (self.clone(), activity.unwrap_or_default());
        all.admission.prefix = ClientPrefix::of(remote);
        Self { activity, socket, ..all }
    }
}

impl UpgradeInfo for Multiplex {
    type Info = &'static str;
    type InfoIter = iter::Once<Self::Info>;

    fn protocol_info(&self) -> Self::InfoIter {
        iter::once("/yamux/1.0.0")
    }
}

impl<C: AsyncRead + AsyncWrite + Unpin> InboundConnectionUpgrade<C> for Multiplex {
    type Output = Muxer<C>;
    type Error = io::Error;
    type Future = std::future::Ready<io::Result<Muxer<C>>>;

    fn upgrade_inbound(self, connection: C, _: Self::Info) -> Self::Future {
        std::future::ready(Ok(Muxer::new(connection, self, Endpoint::Listener)))
    }
}

impl<C: AsyncRead + AsyncWrite + Unpin> OutboundConnectionUpgrade<C> for Multiplex {
    type Output = Muxer<C>;
    type Error = io::Error;
    type Future = std::future::Ready<io::Result<Muxer<C>>>;

    fn upgrade_outbound(self, connection: C, _: Self::Info) -> Self::Future {
        std::future::ready(Ok(Muxer::new(connection, self, Endpoint::Dialer)))
    }
}

/// One connection.
#[derive(Debug)]
pub struct Muxer<C> {
    // Dropped before the socket: see `byte_counters::PendingCounter`.
    connection: C,
    socket: Option<Socket>,
    shared: Arc<Shared>,
    room: Room,
    /// Frames being written, and how many of their bytes were.
    frames: Vec<u8>,
    written: usize,
    /// How much was written since the last flush; whether that includes data, or data comes next.
    unflushed: usize,
    has_data: bool,
    is_flushing: bool,
    /// Whether a stream was accepted in this poll of the connection.
    has_accepted: bool,
    /// The size of the current write batch, and whether a full one with data has been sent.
    batch: usize,
    is_bulk: bool,
    activity: ActivityCounter,
    /// Reading is paused until then, because frames exceeded their rate.
    pause: Option<Delay>,
    /// The write stall, and when to check it next while the socket is full.
    stall: WriteStall,
    next_check: Option<Delay>,
    /// Why the session ended, until the next poll returns it.
    end: Option<io::Error>,
    /// The time limit of a graceful close.
    closing: Option<Delay>,
}

impl<C: AsyncRead + AsyncWrite + Unpin> Muxer<C> {
    fn new(connection: C, multiplex: Multiplex, role: Endpoint) -> Self {
        let Multiplex { admission, memory, activity, socket } = multiplex;
        if let Some(socket) = &socket {
            socket::set_user_timeout(socket, false);
        }
        Self {
            connection,
            socket,
            shared: Shared::new(role, admission, &memory),
            room: Room::default(),
            frames: Vec::new(),
            written: 0,
            unflushed: 0,
            has_data: false,
            is_flushing: false,
            has_accepted: false,
            batch: SMALL_BATCH,
            is_bulk: false,
            activity,
            pause: None,
            stall: WriteStall::default(),
            next_check: None,
            end: None,
            closing: None,
        }
    }

    /// Reads until nothing is left, or a poll's share is used up. Waits neither for writes nor for reads from streams.
    fn poll_read(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if let Some(pause) = &mut self.pause {
            ready!(pause.poll_unpin(cx));
            self.pause = None;
        }
        let mut bytes = 0;
        for _ in 0..TURN_READS {
            let room = self.room.buffer();
            let read = ready!(Pin::new(&mut self.connection).poll_read(cx, room))?;
            if read == 0 {
                return Poll::Ready(Err(io::ErrorKind::ConnectionAborted.into()));
            }
            let now = Instant::now();
            bytes += read;
            let pause = self.shared.with(|session| session.receive(&mut self.room, read, now))?;
            self.shared.budget.pool.enforce(now);
            if !pause.is_zero() {
                self.activity.set_flooding();
                self.activity.add(1); // time in which it is not read is not silence
                self.pause = Some(Delay::new(pause));
            }
            if bytes >= TURN || self.pause.is_some() {
                break;
            }
        }
        cx.waker().wake_by_ref(); // there may be more
        Poll::Ready(Ok(()))
    }

    /// Writes until there is nothing more to send, or a poll's share is used up, and flushes.
    fn poll_write(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut turn = 0;
        loop {
            // 1. Flush a complete batch.
            if self.is_flushing {
                ready!(Pin::new(&mut self.connection).poll_flush(cx))?;
                self.stall.on_written();
                (self.is_flushing, self.unflushed) = (false, 0);
            }
            // 2. Take the next frames, and decide whether what was written before them is flushed first.
            if self.written >= self.frames.len() {
                if turn >= TURN {
                    cx.waker().wake_by_ref();
                    return Poll::Pending;
                }
                let most = self.batch.saturating_sub(HEADER);
                let (frames, now) = (&mut self.frames, Instant::now());
                self.written = 0;
                let kind = self.shared.with(|session| session.take_frames(frames, most, now));
                if kind.is_none() && self.unflushed == 0 {
                    return Poll::Ready(Ok(()));
                }
                // js-libp2p drops data that arrives in one message with a reset.
                let splits = kind == Some(Frames::Resets) && self.has_data;
                let is_full = self.unflushed + self.frames.len() > self.batch;
                self.is_flushing = self.unflushed > 0 && (splits || is_full || kind.is_none());
                self.has_data = kind == Some(Frames::Data) || self.has_data && !self.is_flushing;
                continue;
            }
            // 3. Write them.
            let left = self.frames.get(self.written..).unwrap_or_default();
            let written = ready!(Pin::new(&mut self.connection).poll_write(cx, left))?;
            if written == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.stall.on_written();
            turn += written;
            self.written += written;
            self.unflushed += written;
            // 4. After the first full batch of data, make the next ones large if there is memory.
            let is_full = self.has_data && self.unflushed + HEADER >= self.batch;
            self.is_bulk |= is_full;
            if is_full
                && self.batch == SMALL_BATCH
                && self.shared.budget.keep_if_plenty(LARGE_BATCH_COST)
            {
                self.batch = LARGE_BATCH;
                if let Some(socket) = &self.socket {
                    socket::prepare_for_bulk(socket);
                }
            }
        }
    }

    /// Checks regularly whether a connection whose socket is full is write stalled.
    fn poll_stall(&mut self, cx: &mut Context<'_>) -> io::Result<()> {
        let next_check = self.next_check.get_or_insert_with(|| Delay::new(STALL_CHECK));
        while next_check.poll_unpin(cx).is_ready() {
            next_check.reset(STALL_CHECK);
            let acknowledged = self.socket.as_ref().and_then(|it| socket::acknowledged(it));
            let stalled_for = self.stall.on_waiting(acknowledged, Instant::now());
            let budget = &self.shared.budget;
            if stalled_for >= budget.max_stall().max(STALL_CHECK) {
                budget.count(Cut::WriteStalled);
                let why = format!("write stalled: no progress for {} s", stalled_for.as_secs());
                return Err(io::Error::new(io::ErrorKind::TimedOut, why));
            }
        }
        Ok(())
    }

    /// The handle of a stream; `is_outbound`: the relay has opened it.
    fn substream(&self, key: Key, is_outbound: bool) -> Substream {
        let negotiation = Some(Negotiation { is_outbound, message: Vec::new() });
        Substream { shared: Arc::clone(&self.shared), key, negotiation }
    }

    /// Ends the session. Streams can be read until the next poll, which fails.
    fn end(&mut self, error: io::Error, cx: &mut Context<'_>) {
        let is_unused = self.shared.with(|session| session.end());
        let _ = self.poll_write(cx); // the go-away, if there is one and the socket has room for it
        self.end = Some(match error.kind() {
            // rust-libp2p compares peer ids once the connection is up, and then closes it.
            io::ErrorKind::ConnectionAborted if is_unused => {
                StageError::wrap(Stage::Muxer, Some(Reason::PeerId), error)
            }
            _ => error,
        });
        cx.waker().wake_by_ref();
    }
}

impl<C: AsyncRead + AsyncWrite + Unpin> StreamMuxer for Muxer<C> {
    type Substream = Substream;
    type Error = io::Error;

    fn poll_inbound(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<Substream>> {
        // libp2p-swarm accepts until it is told to wait: without this, all that a peer opens at once would come before
        // other connections.
        let is_second = mem::take(&mut self.has_accepted);
        if is_second && self.shared.with(|session| !session.accepted.is_empty()) {
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        let key = ready!(self.shared.with(|session| session.poll_accept(cx)));
        self.has_accepted = true;
        Poll::Ready(Ok(self.substream(key, false)))
    }

    fn poll_outbound(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<Substream>> {
        if self.end.is_some() {
            return Poll::Pending; // the next poll returns why it ended
        }
        let key = ready!(self.shared.with(|session| session.poll_open(cx, Instant::now())))?;
        Poll::Ready(Ok(self.substream(key, true)))
    }

    fn poll_close(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.shared.with(|session| session.leave(cx));
        let closed = match self.poll_write(cx) {
            Poll::Ready(Ok(())) => Pin::new(&mut self.connection).poll_close(cx),
            other => other,
        };
        // The last of much data may not have arrived. A peer that is gone does not end the connection: that takes `CLOSING`.
        let bulk = self.socket.as_ref().filter(|_| self.is_bulk);
        if closed.is_pending() || bulk.is_some_and(|it| socket::poll_end(it, cx).is_pending()) {
            let closing = self.closing.get_or_insert_with(|| Delay::new(CLOSING));
            ready!(closing.poll_unpin(cx));
        }
        Poll::Ready(Ok(()))
    }

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<StreamMuxerEvent>> {
        if let Some(error) = self.end.take() {
            return Poll::Ready(Err(error));
        }
        self.shared.with(|session| session.set_task(cx));
        let ended = match self.poll_read(cx) {
            Poll::Ready(Err(error)) => Err(error),
            Poll::Ready(Ok(())) | Poll::Pending => match self.poll_write(cx) {
                Poll::Ready(written) => written,
                Poll::Pending => self.poll_stall(cx),
            },
        };
        self.room.chunk = Chunk::default(); // a header that only announces a body uses no memory
        if let Err(error) = ended {
            self.end(error, cx);
        }
        Poll::Pending
    }
}

impl<C> Drop for Muxer<C> {
    fn drop(&mut self) {
        if let Some(socket) = &self.socket {
            socket::set_user_timeout(socket, true); // the kernel still sends what was written
        }
        self.shared.with(|session| session.close_all());
    }
}

/// The handle of a stream. Dropping it before it is closed resets the stream.
#[derive(Debug)]
pub struct Substream {
    shared: Arc<Shared>,
    key: Key,
    /// The negotiation of the protocol, until it is done.
    negotiation: Option<Negotiation>,
}

impl Drop for Substream {
    fn drop(&mut self) {
        self.shared.with(|session| session.change(self.key, Stream::drop_handle));
    }
}

impl AsyncRead for Substream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut [u8],
    ) -> Poll<io::Result<usize>> {
        let (now, is_negotiated) = (Instant::now(), self.negotiation.is_none());
        let read = self.shared.with(|session| {
            let read = |it: &mut Stream| {
                let read = it.poll_read(buffer, now);
                if is_negotiated && matches!(read, Poll::Ready(Ok(1..))) {
                    it.set_used();
                }
                read
            };
            session.poll_stream(self.key, cx, |it| &mut it.reader, read)
        });
        let read = ready!(read)?;
        let bytes = buffer.get(..read).unwrap_or_default();
        if !is_negotiated && !Negotiation::accepts(bytes, buffer.len()) {
            return Poll::Ready(Err(io::ErrorKind::InvalidData.into()));
        }
        self.negotiation.take_if(|it| it.is_outbound && it.parse(bytes));
        Poll::Ready(Ok(read))
    }
}

impl AsyncWrite for Substream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let (key, now) = (self.key, Instant::now());
        let written = self.shared.with(|session| {
            session.poll_stream(key, cx, |it| &mut it.writer, |it| it.poll_write(bytes, now))
        });
        let written = ready!(written)?;
        self.shared.budget.pool.enforce(now);
        let bytes = bytes.get(..written).unwrap_or_default();
        self.negotiation.take_if(|it| !it.is_outbound && it.parse(bytes));
        Poll::Ready(Ok(written))
    }

    /// Ready at once: written data is sent even if the handle is dropped.
    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.shared.with(|session| session.update(self.key, Stream::flush));
        Poll::Ready(Ok(()))
    }

    /// Ready at once: the end of the stream is sent after the written data.
    fn poll_close(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.shared.with(|session| session.change(self.key, Stream::close));
        Poll::Ready(Ok(()))
    }
}

/// Write stall: the peer of a connection acknowledges nothing of what is sent to it. `Some`: since when, and how many
/// bytes it had acknowledged by then.
///
/// Sans-IO. A full socket buffer alone does not mean a stall: on a slow path it may stay full for long. The rule
/// therefore uses the number of bytes that the peer has acknowledged, which only rises. The number of unacknowledged
/// bytes would not change if as many were written meanwhile as acknowledged.
#[derive(Debug, Default)]
struct WriteStall(Option<(Instant, Option<u64>)>);

impl WriteStall {
    /// The socket accepted bytes, or there is nothing to write.
    fn on_written(&mut self) {
        self.0 = None;
    }

    /// Bytes are waiting, and by `now` the peer has acknowledged this many in total; `None` if that is unknown.
    /// Returns how long it has acknowledged nothing.
    fn on_waiting(&mut self, acknowledged: Option<u64>, now: Instant) -> Duration {
        let since = self.0.filter(|(_, before)| *before == acknowledged).map_or(now, |it| it.0);
        self.0 = Some((since, acknowledged));
        now.saturating_duration_since(since)
    }
}

#[cfg(test)]
mod tests;
