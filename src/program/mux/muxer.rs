//! Streams over one connection: yamux, with limits on what a peer may have open and have waiting.
//!
//! [`Muxer`] moves bytes between the connection and a session (`session.rs`); `poll` alone does that. A
//! stream that the peer opens beyond its limit is reset, one that we want beyond ours waits for another to end.
//!
//! The secure channel makes a message, and a system call, of each flush. So a flush comes when there is
//! nothing more to send, or as much as goes into a message of Noise (write batching): it saves a fifth of the
//! CPU time of a circuit's set-up.

use std::{
    io, iter,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::{Duration, Instant},
};

use async_std::net::TcpStream;
use futures_timer::Delay;
use libp2p::{
    Multiaddr,
    core::{
        muxing::{StreamMuxer, StreamMuxerEvent},
        upgrade::{InboundConnectionUpgrade, OutboundConnectionUpgrade, UpgradeInfo},
    },
    futures::{AsyncRead, AsyncWrite, FutureExt},
};

use super::{
    budget::{Cut, MemoryBudget, Shed},
    frame::HEADER,
    permits::{SharedPool, StreamPermit, StreamPermits},
    rates::{MuxRates, RateLimiter},
    session::{
        End, Role,
        receive::{Received, Room},
        send::Frames,
    },
    stall::{StallLimit, WriteStall},
    stream::QUANTUM,
    stream_limits::StreamLimits,
    substream::{OpenedBy, Shared, Substream},
};
use crate::{activity::ActivityCounter, address::ClientPrefix, program::net::socket};

/// How much is read, or written, before others have their turn, in bytes; and in how many reads.
const TURN: usize = 256 * 1024;
const TURN_READS: usize = 128;

/// How much goes out in one message where memory is short, in bytes. Noise has room for three such messages
/// for ever, once there was one.
const SMALL_BATCH: usize = 8 * 1024;

/// How much goes out in one message at most, in bytes: a whole frame, and the largest message of Noise.
const LARGE_BATCH: usize = QUANTUM + HEADER;

/// How much more memory a connection takes with large batches.
const LARGE_BATCH_COST: usize = 3 * (LARGE_BATCH - SMALL_BATCH);

/// How often it is looked whether a connection that takes no more is write stalled.
const LOOK: Duration = Duration::from_secs(5);

/// How long a connection may be write stalled, unless that is [set](StallLimit::set).
const MAX_STALL: Duration = Duration::from_secs(60);

/// How long a connection may take to close in good order, before it is dropped.
const CLOSING: Duration = Duration::from_secs(3);

/// How many streams may be open on one connection.
#[derive(Clone, Copy, Debug)]
pub struct Budget {
    /// Those that the peer opened.
    pub inbound: usize,
    /// Those that the relay opened.
    pub outbound: usize,
}

/// Where a connection comes from, its activity counter, and the socket below it.
#[derive(Clone, Debug, Default)]
struct Client {
    prefix: Option<ClientPrefix>,
    activity: ActivityCounter,
    socket: Option<TcpStream>,
}

/// Makes connections carry streams. Clones share what all connections may have together.
#[derive(Clone, Debug)]
pub struct Multiplex {
    budget: Budget,
    shared_pool: SharedPool,
    rates: MuxRates,
    memory: MemoryBudget,
    max_stall: StallLimit,
    client: Client,
}

impl Multiplex {
    /// Within these limits, each connection for so many circuits.
    pub fn new(budget: Budget, limits: StreamLimits, circuits: usize) -> Self {
        let pool = limits.buffered(circuits);
        let (per_connection, growth) =
            (limits.buffered_per_connection(circuits), limits.growth(circuits));
        Self {
            budget,
            shared_pool: SharedPool::new(limits.max_streams),
            rates: MuxRates::new(limits.stream_rate),
            memory: MemoryBudget::new(pool, per_connection, growth),
            max_stall: StallLimit::new(MAX_STALL),
            client: Client::default(),
        }
    }

    /// For a connection from `remote` over this socket, whose transport counts its activity.
    pub fn of(
        &self,
        remote: &Multiaddr,
        activity: Option<ActivityCounter>,
        socket: Option<TcpStream>,
    ) -> Self {
        let (prefix, activity) = (ClientPrefix::of(remote), activity.unwrap_or_default());
        let client = Client { prefix, activity, socket };
        Self { client, ..self.clone() }
    }

    /// The permits that the streams of its connections share.
    pub fn shared_pool(&self) -> SharedPool {
        self.shared_pool.clone()
    }

    /// How long its connections may be write stalled.
    pub fn max_stall(&self) -> StallLimit {
        self.max_stall.clone()
    }

    /// The memory that its connections share.
    pub fn memory(&self) -> MemoryBudget {
        self.memory.clone()
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
        std::future::ready(Ok(Muxer::new(connection, &self, Role::Server)))
    }
}

impl<C: AsyncRead + AsyncWrite + Unpin> OutboundConnectionUpgrade<C> for Multiplex {
    type Output = Muxer<C>;
    type Error = io::Error;
    type Future = std::future::Ready<io::Result<Muxer<C>>>;

    fn upgrade_outbound(self, connection: C, _: Self::Info) -> Self::Future {
        std::future::ready(Ok(Muxer::new(connection, &self, Role::Client)))
    }
}

/// One connection.
#[derive(Debug)]
pub struct Muxer<C> {
    // Before the socket: see `Unclaimed` of the transport.
    connection: C,
    socket: Option<TcpStream>,
    shared: Arc<Shared>,
    room: Room,
    /// Frames that are being written, how much of them was, and what they are.
    frames: Vec<u8>,
    written: usize,
    kind: Frames,
    /// How much was written since the last flush; whether data is among it.
    unflushed: usize,
    has_data: bool,
    is_flushing: bool,
    /// How much may be written before a flush.
    batch: usize,
    inbound: Arc<StreamPermits>,
    outbound: Arc<StreamPermits>,
    /// How fast the peer may open streams, and send frames that open streams, reset them, or ping.
    stream_limiter: RateLimiter,
    frame_limiter: RateLimiter,
    activity: ActivityCounter,
    /// Until then it is not read, because such frames came faster.
    pause: Option<Delay>,
    /// Since when it takes nothing; and when to look next, once it took nothing.
    stall: WriteStall,
    max_stall: StallLimit,
    look: Option<Delay>,
    /// Why it ends, once everybody was told.
    end: Option<io::Error>,
    /// Until then it may close in good order.
    closing: Option<Delay>,
}

impl<C> Muxer<C> {
    fn new(connection: C, multiplex: &Multiplex, role: Role) -> Self {
        let Multiplex { budget, shared_pool, rates, memory, max_stall, client } = multiplex;
        let prefix = client.prefix;
        if let Some(socket) = &client.socket {
            socket::leave_to_mux(socket, true);
        }
        Self {
            connection,
            socket: client.socket.clone(),
            shared: Shared::new(role, memory, prefix),
            room: Room::default(),
            frames: Vec::new(),
            written: 0,
            kind: Frames::Control,
            unflushed: 0,
            has_data: false,
            is_flushing: false,
            batch: SMALL_BATCH,
            inbound: StreamPermits::shared(budget.inbound, shared_pool.clone(), prefix),
            outbound: StreamPermits::new(budget.outbound),
            stream_limiter: rates.streams(prefix),
            frame_limiter: rates.frames(prefix),
            activity: client.activity.clone(),
            pause: None,
            stall: WriteStall::default(),
            max_stall: max_stall.clone(),
            look: None,
            end: None,
            closing: None,
        }
    }
}

impl<C: AsyncRead + AsyncWrite + Unpin> Muxer<C> {
    /// Reads what there is, for a turn. Never waits for what is to be written, or for a stream to be read.
    fn poll_read(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), End>> {
        if let Some(pause) = &mut self.pause {
            ready!(pause.poll_unpin(cx));
            self.pause = None;
        }
        let mut bytes = 0;
        for _ in 0..TURN_READS {
            if self.room.buffer().is_empty() {
                self.shared.with(|session| session.lend(&mut self.room));
            }
            let room = self.room.buffer();
            let Poll::Ready(read) = Pin::new(&mut self.connection).poll_read(cx, room) else {
                if self.room.has_chunk() {
                    self.shared.with(|session| session.reclaim(&mut self.room));
                }
                return Poll::Pending;
            };
            let (read, now) = (read?, Instant::now());
            if read == 0 {
                return Poll::Ready(Err(End::Left));
            }
            bytes += read;
            let received =
                self.shared.with(|session| session.receive(&mut self.room, read, now))?;
            self.shared.budget().pool().push_out(now);
            if let Received::Opened(stream) = received {
                let is_admitted = self.stream_limiter.try_take(now);
                let permit = is_admitted.then(|| StreamPermit::take(&self.inbound)).flatten();
                self.shared.with(|session| session.admit(stream, permit))?;
            }
            if received != Received::Cheap
                && let Some(pause) = self.frame_limiter.take_or_pause(now)
            {
                self.activity.set_flooding();
                self.pause = Some(Delay::new(pause));
            }
            if bytes >= TURN || self.pause.is_some() {
                break;
            }
        }
        cx.waker().wake_by_ref(); // there may be more
        Poll::Ready(Ok(()))
    }

    /// Writes what there is to be sent, for a turn, and flushes it.
    fn poll_write(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut turn = 0;
        loop {
            if self.is_flushing {
                ready!(Pin::new(&mut self.connection).poll_flush(cx))?;
                self.stall.on_written();
                (self.is_flushing, self.has_data, self.unflushed) = (false, false, 0);
            }
            if self.written >= self.frames.len() {
                if turn >= TURN {
                    cx.waker().wake_by_ref();
                    return Poll::Pending;
                }
                let most = self.batch.saturating_sub(HEADER);
                let (frames, now) = (&mut self.frames, Instant::now());
                self.written = 0;
                let taken = self.shared.with(|session| session.take_frames(frames, most, now));
                let Some(kind) = taken else {
                    self.frames = Vec::new();
                    if self.unflushed == 0 {
                        return Poll::Ready(Ok(()));
                    }
                    self.is_flushing = true;
                    continue;
                };
                self.kind = kind;
            }
            let left = self.frames.get(self.written..).unwrap_or_default();
            // js-libp2p drops data that comes with a reset in one message.
            let splits = self.kind == Frames::Resets && self.has_data;
            if self.unflushed > 0 && (splits || self.unflushed + left.len() > self.batch) {
                self.is_flushing = true;
                continue;
            }
            let written = ready!(Pin::new(&mut self.connection).poll_write(cx, left))?;
            if written == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.stall.on_written();
            turn += written;
            self.written += written;
            self.unflushed += written;
            self.has_data |= self.kind == Frames::Data;
            let budget = self.shared.budget();
            if self.kind == Frames::Data
                && self.unflushed + HEADER >= self.batch
                && self.batch == SMALL_BATCH
                && budget.keep_if_plenty(LARGE_BATCH_COST)
            {
                self.batch = LARGE_BATCH;
            }
        }
    }

    /// Looks from time to time whether a connection is write stalled that takes no more.
    fn poll_stall(&mut self, cx: &mut Context<'_>) -> Result<(), End> {
        let look = self.look.get_or_insert_with(|| Delay::new(LOOK));
        while look.poll_unpin(cx).is_ready() {
            look.reset(LOOK);
            let acknowledged = self.socket.as_ref().and_then(socket::acknowledged);
            let lasts = self.stall.on_waiting(acknowledged, Instant::now());
            let budget = self.shared.budget();
            if lasts >= self.max_stall.get(budget.pool().is_scarce()).max(LOOK) {
                budget.count(Cut::WriteStalled);
                let why = format!("write stalled: took nothing for {} s", lasts.as_secs());
                return Err(io::Error::new(io::ErrorKind::TimedOut, why).into());
            }
        }
        Ok(())
    }

    /// The session ends. What was received may still be read until the next poll, which fails.
    fn end(&mut self, end: End, cx: &mut Context<'_>) {
        self.shared.with(|session| session.end(&end));
        let _ = self.poll_write(cx); // the go-away, if there is one, and room for it
        self.end = Some(match end {
            End::Left => io::ErrorKind::ConnectionAborted.into(),
            End::Broken(_, why) => io::Error::other(why),
            End::Failed(error) => error,
        });
        cx.waker().wake_by_ref();
    }
}

impl<C: AsyncRead + AsyncWrite + Unpin> StreamMuxer for Muxer<C> {
    type Substream = Substream;
    type Error = io::Error;

    fn poll_inbound(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<Substream>> {
        let serial = ready!(self.shared.with(|session| session.poll_accept(cx)));
        Poll::Ready(Ok(Substream::new(&self.shared, serial, OpenedBy::Peer)))
    }

    fn poll_outbound(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<Substream>> {
        ready!(self.shared.with(|session| session.poll_open(cx)));
        let permit = ready!(StreamPermit::poll_take(&self.outbound, cx));
        let serial = self.shared.with(|session| session.open(permit, Instant::now()))?;
        Poll::Ready(Ok(Substream::new(&self.shared, serial, OpenedBy::Relay)))
    }

    fn poll_close(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        this.shared.with(|session| {
            session.set_driver(cx);
            session.leave();
        });
        let closed = match this.poll_write(cx) {
            Poll::Ready(Ok(())) => Pin::new(&mut this.connection).poll_close(cx),
            other => other,
        };
        if closed.is_pending() {
            let closing = this.closing.get_or_insert_with(|| Delay::new(CLOSING));
            ready!(closing.poll_unpin(cx));
        }
        Poll::Ready(Ok(()))
    }

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<StreamMuxerEvent>> {
        if let Some(error) = self.end.take() {
            return Poll::Ready(Err(error));
        }
        self.shared.with(|session| session.set_driver(cx));
        match self.poll_read(cx) {
            Poll::Ready(Err(end)) => self.end(end, cx),
            Poll::Ready(Ok(())) | Poll::Pending => match self.poll_write(cx) {
                Poll::Ready(Ok(())) => {}
                Poll::Ready(Err(error)) => self.end(error.into(), cx),
                Poll::Pending => {
                    if let Err(end) = self.poll_stall(cx) {
                        self.end(end, cx);
                    }
                }
            },
        }
        Poll::Pending
    }
}

impl<C> Drop for Muxer<C> {
    fn drop(&mut self) {
        if let Some(socket) = &self.socket {
            socket::leave_to_mux(socket, false); // what it still has to send is the kernel's
        }
        self.shared.with(|session| {
            session.reclaim(&mut self.room);
            session.close_all();
        });
    }
}

#[cfg(test)]
mod tests;
