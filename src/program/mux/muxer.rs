//! Streams over one connection: yamux, with budgets.
//!
//! A `StreamMuxer` over the yamux crate itself, because libp2p's own lets a peer break the whole
//! connection by opening one stream too many, and cannot tell a reset from an end of file.
//!
//! Budgets: yamux ends the connection when it knows of more streams than it may, so it is never
//! let come that far. A stream that the peer opens beyond its budget is reset, one that we want
//! beyond ours waits for another to end.
//!
//! Windows cannot be taken back, and all of them together are more than there is memory for. So what
//! they hold is counted (`ledger.rs`), and given up where that gets too much.

use std::{
    collections::VecDeque,
    io, iter,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, Waker, ready},
    time::{Duration, Instant},
};

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
    corked::{Cork, Corked, cork},
    frames::{INITIAL_WINDOW, LONGEST_FRAME},
    held::Pool,
    ledger::{Client, Ledger, Ledgers, Rest},
    metered::Metered,
    pace::{Pace, Paces},
    places::{Commons, Place, Places},
    stream_limits::StreamLimits,
    substream::{OpenedBy, Substream},
};
use crate::{activity::Signs, address::ClientPrefix, behaviour::buffer};

/// By how much the windows of one connection may grow in all beyond the initial ones, in bytes.
///
/// js-libp2p sends as much as the window holds in a single frame, so no window may get larger than
/// the longest frame. That is enough for 80 Mbit/s over a round trip of 100 ms.
const WINDOW_GROWTH: usize = LONGEST_FRAME - INITIAL_WINDOW;

/// How many streams yamux lets us open before the peer acknowledged the first.
const ACK_BACKLOG: usize = 256;

/// How long a connection may take to tell its peer that a stream is given up, once that has to be.
const PATIENCE: Duration = Duration::from_millis(250);

/// For how long a connection is not read that holds more than its share of a pool that is over its limit.
const PAUSE: Duration = Duration::from_millis(10);

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

/// Makes connections carry streams. Clones share what all connections may have together.
#[derive(Clone, Debug)]
pub struct Multiplex {
    budget: Budget,
    commons: Commons,
    paces: Paces,
    ledgers: Ledgers,
    client: Client,
}

impl Multiplex {
    /// Within these limits, each connection for so many circuits.
    pub fn new(budget: Budget, limits: StreamLimits, circuits: usize) -> Self {
        let pool = Pool::new(limits.buffered(circuits), limits.buffered_per_connection(circuits));
        Self {
            budget,
            commons: Commons::new(limits.max_streams),
            paces: Paces::new(limits.stream_rate),
            ledgers: Ledgers::new(pool),
            client: Client::default(),
        }
    }

    /// For a connection from there, of which the transport hears these signs.
    pub fn of(&self, remote: &Multiaddr, signs: Option<Signs>) -> Self {
        let client = Client { prefix: ClientPrefix::of(remote), signs: signs.unwrap_or_default() };
        Self { client, ..self.clone() }
    }

    /// The places that the streams of its connections share.
    pub fn commons(&self) -> Commons {
        self.commons.clone()
    }

    /// The ledgers of its connections.
    pub fn ledgers(&self) -> Ledgers {
        self.ledgers.clone()
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
        std::future::ready(Ok(Muxer::new(connection, &self, yamux::Mode::Server)))
    }
}

impl<C: AsyncRead + AsyncWrite + Unpin> OutboundConnectionUpgrade<C> for Multiplex {
    type Output = Muxer<C>;
    type Error = io::Error;
    type Future = std::future::Ready<io::Result<Muxer<C>>>;

    fn upgrade_outbound(self, connection: C, _: Self::Info) -> Self::Future {
        std::future::ready(Ok(Muxer::new(connection, &self, yamux::Mode::Client)))
    }
}

/// A connection as yamux has it.
type Below<C> = Metered<Corked<C>>;

/// One connection.
pub struct Muxer<C> {
    connection: yamux::Connection<Below<C>>,
    cork: Cork<C>,
    ledger: Arc<Ledger>,
    inbound: Arc<Places>,
    pace: Pace,
    outbound: Arc<Places>,
    /// Streams that came in while nobody asked for one. Each holds a place, so they are few.
    waiting: VecDeque<Substream>,
    /// Until then its peer may still be told of what it gives up.
    patience: Option<Delay>,
    /// Until then it is not read.
    pause: Option<Delay>,
    /// Until then it may close in good order.
    closing: Option<Delay>,
    wants_inbound: Option<Waker>,
}

impl<C: AsyncRead + AsyncWrite + Unpin> Muxer<C> {
    fn new(connection: C, multiplex: &Multiplex, mode: yamux::Mode) -> Self {
        let Multiplex { budget, commons, paces, ledgers, client } = multiplex;
        let ledger = ledgers.open(client.clone());
        let (connection, cork) = cork(connection, ledger.account.clone());
        let connection = Metered::new(connection, Arc::clone(&ledger), paces.frames(client.prefix));
        Self {
            connection: yamux::Connection::new(connection, budget.yamux(), mode),
            cork,
            ledger,
            inbound: Places::shared(budget.inbound, commons.clone(), client.prefix),
            pace: paces.streams(client.prefix),
            outbound: Places::new(budget.outbound),
            waiting: VecDeque::new(),
            patience: None,
            pause: None,
            closing: None,
            wants_inbound: None,
        }
    }

    /// Lets the connection make progress. A new stream within the budget is handed over.
    fn progress(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Option<Substream>>> {
        if !self.ledger.begins(cx) {
            return Poll::Ready(Err(holds_too_much()));
        }
        let progress = self.connection.poll_next_inbound(cx);
        let wrote_all = self.cork.took_all();
        // Where the socket takes no more, it calls when it does.
        let _ = self.cork.poll_flush(cx)?;
        match progress {
            Poll::Pending => self.rest(cx, wrote_all),
            Poll::Ready(None) => Poll::Ready(Err(io::ErrorKind::ConnectionAborted.into())),
            Poll::Ready(Some(Err(error))) => Poll::Ready(Err(into_io(error))),
            Poll::Ready(Some(Ok(stream))) => {
                let is_admitted = self.pace.admits(Instant::now());
                let place = is_admitted.then(|| Place::take(&self.inbound)).flatten();
                let has_place = place.is_some();
                let stream = self.substream(stream, OpenedBy::Peer, place);
                match has_place {
                    true => Poll::Ready(Ok(Some(stream))),
                    // Dropping a stream resets it, once yamux can say so.
                    false if wrote_all => Poll::Ready(Ok(None)),
                    false => Poll::Ready(Err(holds_too_much())),
                }
            }
        }
    }

    /// It can do no more now; but it does not wait for its peer for long while it holds too much.
    fn rest<T>(&mut self, cx: &mut Context<'_>, wrote_all: bool) -> Poll<io::Result<T>> {
        match self.ledger.rests(wrote_all) {
            Rest::Calm => self.patience = None,
            Rest::Paused => {
                let pause = self.pause.get_or_insert_with(|| Delay::new(PAUSE));
                ready!(pause.poll_unpin(cx));
                self.pause = None;
                cx.waker().wake_by_ref();
            }
            Rest::Relieved => {
                self.patience = None;
                cx.waker().wake_by_ref();
            }
            Rest::Blocked => {
                let patience = self.patience.get_or_insert_with(|| Delay::new(PATIENCE));
                ready!(patience.poll_unpin(cx));
                self.ledger.is_closed_instead();
                return Poll::Ready(Err(holds_too_much()));
            }
        }
        Poll::Pending
    }

    fn substream(&self, yamux: yamux::Stream, by: OpenedBy, place: Option<Place>) -> Substream {
        let id = yamux.id();
        let stream = Substream::new(yamux, by, place, self.ledger.account.clone());
        self.ledger.open(id, stream.kept());
        stream
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
        Poll::Ready(Ok(self.substream(stream, OpenedBy::Relay, Some(place))))
    }

    fn poll_close(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.waiting.clear();
        if self.ledger.gives(cx) {
            return Poll::Ready(Err(holds_too_much()));
        }
        if let Poll::Ready(closed) = self.connection.poll_close(cx) {
            return Poll::Ready(closed.map_err(into_io));
        }
        let closing = self.closing.get_or_insert_with(|| Delay::new(CLOSING));
        ready!(closing.poll_unpin(cx));
        Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
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

fn holds_too_much() -> io::Error {
    io::Error::other("it holds more of what others are to read than there is room for")
}
