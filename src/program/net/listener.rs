//! One listening socket: it accepts, tells which addresses it can be reached at, and lets be for a
//! while when there are no more file descriptors.

use std::{
    collections::VecDeque,
    io,
    net::SocketAddr,
    pin::Pin,
    task::{Context, Poll, Waker, ready},
    time::{Duration, Instant},
};

use async_std::net::{TcpListener, TcpStream};
use futures_timer::Delay;
use libp2p::{
    core::transport::{ListenerId, TransportEvent},
    futures::{
        FutureExt, Stream, StreamExt,
        stream::{self, BoxStream},
    },
};
use socket2::{Domain, Socket, Type};

use super::{
    interfaces::{Change, Interfaces},
    multiaddr::multiaddr,
    socket::prepare,
    traffic::{Counted, Traffic},
};

/// How many connections the kernel keeps for us until they are accepted.
const BACKLOG: i32 = 1024;

/// How long to leave a listener alone after it failed to accept: the first time, and at most.
///
/// Out of file descriptors, accepting again at once would fail again at once.
const PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);

/// After how long without a failure the next one is told again: whoever can make accepting fail
/// can also make it succeed in between, and is not to fill the log.
const TELL_AGAIN: Duration = Duration::from_secs(60);

/// A connection needs nothing more from TCP.
pub(super) type Upgrade = std::future::Ready<io::Result<Counted<TcpStream>>>;

/// What the swarm is told.
pub(super) type Event = TransportEvent<Upgrade, io::Error>;

/// What comes of a listening socket.
pub(super) enum News {
    Accepted(Accepted),
    Event(Event),
}

/// A connection that nobody was told of yet.
pub(super) struct Accepted {
    pub(super) listener: ListenerId,
    pub(super) stream: TcpStream,
    local: SocketAddr,
    pub(super) remote: SocketAddr,
}

impl Accepted {
    /// Tells whose it is; or that it failed, and is the remote address's.
    pub(super) fn incoming(self, traffic: &Traffic, client: io::Result<SocketAddr>) -> Event {
        let Self { stream, local, .. } = self;
        let send_back_addr = multiaddr(*client.as_ref().unwrap_or(&self.remote));
        let socket = Some(stream.clone());
        let upgrade = client.map(|client| traffic.count(stream, Some(local), client, socket));
        TransportEvent::Incoming {
            listener_id: self.listener,
            upgrade: std::future::ready(upgrade),
            local_addr: multiaddr(local),
            send_back_addr,
        }
    }
}

/// One listening socket.
pub(super) struct Listener {
    id: ListenerId,
    bound: SocketAddr,
    accepted: BoxStream<'static, io::Result<(TcpStream, SocketAddr)>>,
    /// The addresses of the machine, if the socket is bound to all of them.
    interfaces: Option<Interfaces>,
    pause: Option<Delay>,
    /// How long the next pause is; longer than [`PAUSE`] while accepting fails.
    next_pause: Duration,
    /// When accepting failed last.
    failed: Option<Instant>,
    events: VecDeque<Event>,
    closed: bool,
    waker: Option<Waker>,
}

impl Listener {
    pub(super) fn bind(id: ListenerId, address: SocketAddr) -> io::Result<Self> {
        let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
        if address.is_ipv6() {
            // Else the two default listeners would claim the same port.
            socket.set_only_v6(true)?;
        }
        // A relay that was killed can be started again at once.
        socket.set_reuse_address(true)?;
        socket.bind(&address.into())?;
        socket.listen(BACKLOG)?;
        let listener = std::net::TcpListener::from(socket);
        let bound = listener.local_addr()?;

        let mut events = VecDeque::new();
        let interfaces = if bound.ip().is_unspecified() {
            Some(Interfaces::new())
        } else {
            events.push_back(TransportEvent::NewAddress {
                listener_id: id,
                listen_addr: multiaddr(bound),
            });
            None
        };
        let accepted = stream::unfold(TcpListener::from(listener), |listener| async move {
            Some((listener.accept().await, listener))
        });
        Ok(Self {
            id,
            bound,
            accepted: accepted.boxed(),
            interfaces,
            pause: None,
            next_pause: PAUSE,
            failed: None,
            events,
            closed: false,
            waker: None,
        })
    }

    pub(super) fn id(&self) -> ListenerId {
        self.id
    }

    pub(super) fn is_closed(&self) -> bool {
        self.closed
    }

    pub(super) fn close(&mut self) {
        if self.closed {
            return;
        }
        self.closed = true;
        // The socket itself, so that its port can be had again at once.
        self.accepted = stream::pending().boxed();
        self.events
            .push_back(TransportEvent::ListenerClosed { listener_id: self.id, reason: Ok(()) });
        if let Some(waker) = self.waker.take() {
            waker.wake();
        }
    }

    /// An address of the machine came or went.
    fn poll_interfaces(&mut self, cx: &mut Context<'_>) -> Poll<Event> {
        let Some(interfaces) = &mut self.interfaces else {
            return Poll::Pending;
        };
        loop {
            let change = ready!(interfaces.poll(cx));
            let (Change::Up(ip) | Change::Down(ip)) = change;
            if ip.is_ipv4() != self.bound.is_ipv4() {
                continue;
            }
            let listen_addr = multiaddr(SocketAddr::new(ip, self.bound.port()));
            let listener_id = self.id;
            return Poll::Ready(match change {
                Change::Up(_) => TransportEvent::NewAddress { listener_id, listen_addr },
                Change::Down(_) => TransportEvent::AddressExpired { listener_id, listen_addr },
            });
        }
    }

    fn accepted(&self, stream: TcpStream, remote: SocketAddr) -> io::Result<Accepted> {
        prepare(&stream)?;
        Ok(Accepted { listener: self.id, local: stream.local_addr()?, stream, remote })
    }

    /// Accepting failed: leaves the listener alone for a while. Told once for as long as it lasts.
    fn failed(&mut self, error: io::Error, now: Instant) -> Option<Event> {
        let last = self.failed.replace(now);
        let news = last.is_none_or(|last| now.duration_since(last) > TELL_AGAIN);
        self.pause = Some(Delay::new(self.next_pause));
        self.next_pause = (self.next_pause * 2).min(LONGEST_PAUSE);
        news.then_some(TransportEvent::ListenerError { listener_id: self.id, error })
    }
}

impl Stream for Listener {
    type Item = News;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<News>> {
        let this = &mut *self;
        if let Some(event) = this.events.pop_front() {
            return Poll::Ready(Some(News::Event(event)));
        }
        if this.closed {
            return Poll::Ready(None);
        }
        this.waker = Some(cx.waker().clone());
        if let Poll::Ready(event) = this.poll_interfaces(cx) {
            return Poll::Ready(Some(News::Event(event)));
        }
        loop {
            if let Some(pause) = &mut this.pause {
                if pause.poll_unpin(cx).is_pending() {
                    return Poll::Pending;
                }
                this.pause = None;
            }
            match this.accepted.poll_next_unpin(cx) {
                Poll::Ready(Some(Ok((stream, remote)))) => {
                    this.next_pause = PAUSE;
                    // A connection that was reset before it was accepted is nobody's loss.
                    if let Ok(accepted) = this.accepted(stream, remote) {
                        return Poll::Ready(Some(News::Accepted(accepted)));
                    }
                }
                Poll::Ready(Some(Err(error)))
                    if error.kind() == io::ErrorKind::ConnectionAborted => {}
                Poll::Ready(Some(Err(error))) => {
                    if let Some(event) = this.failed(error, Instant::now()) {
                        return Poll::Ready(Some(News::Event(event)));
                    }
                }
                Poll::Ready(None) => return Poll::Ready(None),
                Poll::Pending => return Poll::Pending,
            }
        }
    }
}
