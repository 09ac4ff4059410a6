//! Streams over one connection: yamux, with budgets.
//!
//! A `StreamMuxer` over the yamux crate itself, because libp2p's own lets a peer break the whole
//! connection by opening one stream too many, and cannot tell a reset from an end of file.
//!
//! Budgets: yamux ends the connection when it knows of more streams than it may, so it is never
//! let come that far. A stream that the peer opens beyond its budget is reset, one that we want
//! beyond ours waits for another to end.

use std::{
    collections::VecDeque,
    io, iter,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll, Waker, ready},
};

use libp2p::{
    core::{
        muxing::{StreamMuxer, StreamMuxerEvent},
        upgrade::{InboundConnectionUpgrade, OutboundConnectionUpgrade, UpgradeInfo},
    },
    futures::{AsyncRead, AsyncWrite, task::AtomicWaker},
};

use super::corked::{Cork, Corked, cork};
use crate::buffer;

/// The window that yamux grants every stream from its start, in bytes.
const INITIAL_WINDOW: usize = yamux::DEFAULT_CREDIT as usize;

/// The longest frame that yamux reads, in bytes; it ends the connection over a longer one.
const LONGEST_FRAME: usize = 1024 * 1024;

/// By how much the windows of one connection may grow in all beyond the initial ones, in bytes.
///
/// js-libp2p sends as much as the window holds in a single frame, so no window may get larger than
/// the longest frame. That is enough for 80 Mbit/s over a round trip of 100 ms.
const WINDOW_GROWTH: usize = LONGEST_FRAME - INITIAL_WINDOW;

/// How many streams yamux lets us open before the peer acknowledged the first.
const ACK_BACKLOG: usize = 256;

/// The largest budget in either direction: more would not fit what yamux counts.
pub const MOST_STREAMS: usize = {
    let addressable = usize::MAX / (4 * INITIAL_WINDOW);
    let named = u16::MAX as usize;
    if addressable < named {
        addressable
    } else {
        named
    }
};

/// How many streams may be open on one connection.
#[derive(Clone, Copy, Debug)]
pub struct Budget {
    /// Those that the peer opened.
    pub inbound: usize,
    /// Those that the relay opened.
    pub outbound: usize,
}

impl Budget {
    /// Yamux forgets a stream that we dropped only once it could write so, and until then counts
    /// it: of ours, all that were acknowledged and all that still may be. Beside those that are
    /// open, that many must fit, so that nobody's connection breaks because others asked for it.
    fn known_to_yamux(self) -> usize {
        self.inbound + 2 * self.outbound + ACK_BACKLOG
    }

    fn yamux(self) -> yamux::Config {
        let streams = self.known_to_yamux();
        let mut config = yamux::Config::default();
        // First the window, then the number: each is checked against the other.
        config.set_max_connection_receive_window(None);
        config.set_max_num_streams(streams);
        // A frame of ours is one message of Noise, and one write: four times fewer of them than
        // with yamux's 16 KiB.
        config.set_split_send_size(buffer::SIZE);
        let window = streams * INITIAL_WINDOW + WINDOW_GROWTH;
        config.set_max_connection_receive_window(Some(window));
        config
    }
}

impl UpgradeInfo for Budget {
    type Info = &'static str;
    type InfoIter = iter::Once<Self::Info>;

    fn protocol_info(&self) -> Self::InfoIter {
        iter::once("/yamux/1.0.0")
    }
}

impl<C: AsyncRead + AsyncWrite + Unpin> InboundConnectionUpgrade<C> for Budget {
    type Output = Muxer<C>;
    type Error = io::Error;
    type Future = std::future::Ready<io::Result<Muxer<C>>>;

    fn upgrade_inbound(self, connection: C, _: Self::Info) -> Self::Future {
        std::future::ready(Ok(Muxer::new(connection, self, yamux::Mode::Server)))
    }
}

impl<C: AsyncRead + AsyncWrite + Unpin> OutboundConnectionUpgrade<C> for Budget {
    type Output = Muxer<C>;
    type Error = io::Error;
    type Future = std::future::Ready<io::Result<Muxer<C>>>;

    fn upgrade_outbound(self, connection: C, _: Self::Info) -> Self::Future {
        std::future::ready(Ok(Muxer::new(connection, self, yamux::Mode::Client)))
    }
}

/// One connection.
pub struct Muxer<C> {
    connection: yamux::Connection<Corked<C>>,
    cork: Cork<C>,
    inbound: Arc<Places>,
    outbound: Arc<Places>,
    /// Streams that came in while nobody asked for one. Each holds a place, so they are few.
    waiting: VecDeque<Substream>,
    wants_inbound: Option<Waker>,
}

impl<C: AsyncRead + AsyncWrite + Unpin> Muxer<C> {
    fn new(connection: C, budget: Budget, mode: yamux::Mode) -> Self {
        let (connection, cork) = cork(connection);
        Self {
            connection: yamux::Connection::new(connection, budget.yamux(), mode),
            cork,
            inbound: Places::new(budget.inbound),
            outbound: Places::new(budget.outbound),
            waiting: VecDeque::new(),
            wants_inbound: None,
        }
    }

    /// Lets the connection make progress. A new stream within the budget is handed over.
    fn progress(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Option<Substream>>> {
        let progress = self.connection.poll_next_inbound(cx);
        // Where the socket takes no more, it calls when it does.
        let _ = self.cork.poll_flush(cx)?;
        match ready!(progress) {
            None => Poll::Ready(Err(io::ErrorKind::ConnectionAborted.into())),
            Some(Err(error)) => Poll::Ready(Err(into_io(error))),
            // Dropping a stream resets it.
            Some(Ok(stream)) => Poll::Ready(Ok(
                Place::take(&self.inbound).map(|place| Substream::new(stream, place))
            )),
        }
    }
}

impl<C: AsyncRead + AsyncWrite + Unpin> StreamMuxer for Muxer<C> {
    type Substream = Substream;
    type Error = io::Error;

    fn poll_inbound(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<Substream>> {
        if let Some(stream) = self.waiting.pop_front() {
            return Poll::Ready(Ok(stream));
        }
        if let Poll::Ready(progress) = self.progress(cx)? {
            match progress {
                Some(stream) => return Poll::Ready(Ok(stream)),
                // Come back at once, but let others run first.
                None => cx.waker().wake_by_ref(),
            }
        }
        self.wants_inbound = Some(cx.waker().clone());
        Poll::Pending
    }

    fn poll_outbound(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<io::Result<Substream>> {
        let place = ready!(Place::poll_take(&self.outbound, cx));
        let stream = ready!(self.connection.poll_new_outbound(cx)).map_err(into_io)?;
        Poll::Ready(Ok(Substream::new(stream, place)))
    }

    fn poll_close(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.waiting.clear();
        self.connection.poll_close(cx).map_err(into_io)
    }

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<StreamMuxerEvent>> {
        if let Some(stream) = ready!(self.progress(cx))? {
            self.waiting.push_back(stream);
            if let Some(waker) = self.wants_inbound.take() {
                waker.wake();
            }
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }
}

fn into_io(error: yamux::ConnectionError) -> io::Error {
    match error {
        yamux::ConnectionError::Io(error) => error,
        other => io::Error::other(other),
    }
}

/// One stream.
#[derive(Debug)]
pub struct Substream {
    stream: yamux::Stream,
    /// Whether we closed our half: after that yamux knows no reset from the peer's own close.
    closed: bool,
    _place: Place,
}

impl Substream {
    fn new(stream: yamux::Stream, place: Place) -> Self {
        Self {
            stream,
            closed: false,
            _place: place,
        }
    }
}

impl AsyncRead for Substream {
    /// A stream that was reset reads as an end of file in yamux; here as the error that it is.
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut [u8],
    ) -> Poll<io::Result<usize>> {
        let read = ready!(Pin::new(&mut self.stream).poll_read(cx, buffer))?;
        if read == 0 && !buffer.is_empty() && !self.closed && self.stream.is_closed() {
            return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()));
        }
        Poll::Ready(Ok(read))
    }
}

impl AsyncWrite for Substream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buffer)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_close(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(Pin::new(&mut self.stream).poll_close(cx))?;
        self.closed = true;
        Poll::Ready(Ok(()))
    }
}

/// The places of one direction: as many as the budget has.
#[derive(Debug)]
struct Places {
    free: AtomicUsize,
    waker: AtomicWaker,
}

impl Places {
    fn new(budget: usize) -> Arc<Self> {
        Arc::new(Self {
            free: AtomicUsize::new(budget),
            waker: AtomicWaker::new(),
        })
    }
}

/// A stream's place in the budget, given back when it is dropped.
#[derive(Debug)]
struct Place(Arc<Places>);

impl Place {
    fn take(places: &Arc<Places>) -> Option<Self> {
        let one_less = |free: usize| free.checked_sub(1);
        places
            .free
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, one_less)
            .ok()
            .map(|_| Self(Arc::clone(places)))
    }

    fn poll_take(places: &Arc<Places>, cx: &Context<'_>) -> Poll<Self> {
        if let Some(place) = Self::take(places) {
            return Poll::Ready(place);
        }
        // A place may have come free before the waker was there to be woken.
        places.waker.register(cx.waker());
        Self::take(places).map_or(Poll::Pending, Poll::Ready)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.free.fetch_add(1, Ordering::AcqRel);
        self.0.waker.wake();
    }
}
