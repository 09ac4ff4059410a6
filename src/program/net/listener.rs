//! One listening socket: accepts connections, reports the addresses it can be reached at, and backs off when the
//! process is out of file descriptors.

use std::{
    collections::VecDeque,
    io,
    net::{SocketAddr, TcpListener},
    pin::Pin,
    task::{Context, Poll, Waker, ready},
    time::{Duration, Instant},
};

use async_io::Async;
use futures_timer::Delay;
use libp2p::{
    Multiaddr,
    core::transport::{ListenerId, TransportEvent},
    futures::{
        FutureExt, Stream, StreamExt,
        stream::{self, BoxStream},
    },
};
use socket2::{Domain, Type};

use super::{
    byte_counters::{ByteCounters, Counted},
    interfaces::{Change, Interfaces},
    multiaddr::with_layers_of,
    socket::Socket,
};

/// How many connections the kernel queues until they are accepted.
const BACKLOG: i32 = 1024;

/// How long to wait after accepting has failed: the first time, and at most. It doubles in between.
///
/// While the process has no file descriptors left, accepting again at once would fail again at once.
const FIRST_BACKOFF: Duration = Duration::from_millis(100);
const MAX_BACKOFF: Duration = Duration::from_secs(2);

/// A failure is reported only if there was no other one for this long: a peer that can make accepting fail can also
/// make it succeed in between, and must not fill the log.
const REPORT_AFTER: Duration = Duration::from_secs(60);

/// The upgrade of an accepted connection: complete from the start.
pub(super) type Upgrade = std::future::Ready<io::Result<Counted<Socket>>>;

/// An event for the swarm.
pub(super) type Event = TransportEvent<Upgrade, io::Error>;

/// What a listener yields.
pub(super) enum Output {
    /// A connection that the swarm does not know yet.
    Accepted(Accepted),
    Event(Event),
}

/// An accepted connection.
pub(super) struct Accepted {
    pub(super) listener: ListenerId,
    pub(super) stream: Socket,
    local: SocketAddr,
    local_addr: Multiaddr,
    pub(super) remote: SocketAddr,
}

impl Accepted {
    /// The event that reports this connection under its client's address; or, if `client` is an error, as failed, under
    /// the remote address.
    pub(super) fn into_event(
        self,
        counters: &ByteCounters,
        client: io::Result<SocketAddr>,
    ) -> Event {
        let Self { listener: listener_id, stream, local, local_addr, remote } = self;
        let send_back_addr = with_layers_of(&local_addr, *client.as_ref().unwrap_or(&remote));
        let socket = Some(stream.clone());
        let upgrade = client.map(|client| counters.count(stream, Some(local), client, socket));
        let upgrade = std::future::ready(upgrade);
        TransportEvent::Incoming { listener_id, upgrade, local_addr, send_back_addr }
    }
}

/// One listening socket.
pub(super) struct Listener {
    pub(super) id: ListenerId,
    /// The address to listen on, as it was given.
    address: Multiaddr,
    bound: SocketAddr,
    incoming: BoxStream<'static, io::Result<(Socket, SocketAddr)>>,
    /// The machine's addresses, if the socket is bound to all of them.
    interfaces: Option<Interfaces>,
    backoff: Option<Delay>,
    /// Grows while accepting fails.
    next_backoff: Duration,
    last_failure: Option<Instant>,
    events: VecDeque<Event>,
    pub(super) is_closed: bool,
    waker: Option<Waker>,
}

impl Listener {
    /// Binds `to`, the socket address in `address`.
    pub(super) fn bind(id: ListenerId, address: Multiaddr, to: SocketAddr) -> io::Result<Self> {
        let socket = socket2::Socket::new(Domain::for_address(to), Type::STREAM, None)?;
        if to.is_ipv6() {
            // Otherwise the IPv4 listener on the same port could not be bound.
            socket.set_only_v6(true)?;
        }
        // So that a relay that was killed can be restarted at once.
        socket.set_reuse_address(true)?;
        socket.bind(&to.into())?;
        socket.listen(BACKLOG)?;
        let listener = Async::new(TcpListener::from(socket))?;
        let bound = listener.get_ref().local_addr()?;

        let interfaces = bound.ip().is_unspecified().then(Interfaces::default);
        let mut events = VecDeque::new();
        if interfaces.is_none() {
            let listen_addr = with_layers_of(&address, bound);
            events.push_back(TransportEvent::NewAddress { listener_id: id, listen_addr });
        }
        let incoming = stream::unfold(listener, |listener| async move {
            let accepted = listener.accept().await;
            Some((accepted.map(|(stream, remote)| (Socket::new(stream), remote)), listener))
        });
        Ok(Self {
            id,
            address,
            bound,
            incoming: incoming.boxed(),
            interfaces,
            backoff: None,
            next_backoff: FIRST_BACKOFF,
            last_failure: None,
            events,
            is_closed: false,
            waker: None,
        })
    }

    /// Closes the socket at once, so that its port can be bound again.
    pub(super) fn close(&mut self) {
        if std::mem::replace(&mut self.is_closed, true) {
            return;
        }
        self.incoming = stream::pending().boxed();
        self.events.clear(); // its address, if that was not reported yet
        let closed = TransportEvent::ListenerClosed { listener_id: self.id, reason: Ok(()) };
        self.events.push_back(closed);
        if let Some(waker) = self.waker.take() {
            waker.wake();
        }
    }

    /// Reports addresses of the machine that are new or gone.
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
            let socket = SocketAddr::new(ip, self.bound.port());
            let listen_addr = with_layers_of(&self.address, socket);
            let listener_id = self.id;
            return Poll::Ready(match change {
                Change::Up(_) => TransportEvent::NewAddress { listener_id, listen_addr },
                Change::Down(_) => TransportEvent::AddressExpired { listener_id, listen_addr },
            });
        }
    }

    /// An accepted connection, with its local address.
    fn accepted(&self, stream: Socket, remote: SocketAddr) -> io::Result<Accepted> {
        let local = stream.get_ref().local_addr()?;
        let local_addr = with_layers_of(&self.address, local);
        Ok(Accepted { listener: self.id, stream, local, local_addr, remote })
    }

    /// Backs off after accepting has failed. Returns an event if there was no other failure for [`REPORT_AFTER`].
    fn on_failure(&mut self, error: io::Error, now: Instant) -> Option<Event> {
        let last = self.last_failure.replace(now);
        let is_new = last.is_none_or(|last| now.duration_since(last) > REPORT_AFTER);
        self.backoff = Some(Delay::new(self.next_backoff));
        self.next_backoff = (self.next_backoff * 2).min(MAX_BACKOFF);
        is_new.then_some(TransportEvent::ListenerError { listener_id: self.id, error })
    }
}

impl Stream for Listener {
    type Item = Output;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Output>> {
        let this = &mut *self;
        if let Some(event) = this.events.pop_front() {
            return Poll::Ready(Some(Output::Event(event)));
        }
        if this.is_closed {
            return Poll::Ready(None);
        }
        this.waker = Some(cx.waker().clone());
        if let Poll::Ready(event) = this.poll_interfaces(cx) {
            return Poll::Ready(Some(Output::Event(event)));
        }
        loop {
            if let Some(backoff) = &mut this.backoff {
                ready!(backoff.poll_unpin(cx));
                this.backoff = None;
            }
            match ready!(this.incoming.poll_next_unpin(cx)) {
                Some(Ok((stream, remote))) => {
                    this.next_backoff = FIRST_BACKOFF;
                    // Fails if the peer reset the connection before it was accepted.
                    if let Ok(accepted) = this.accepted(stream, remote) {
                        return Poll::Ready(Some(Output::Accepted(accepted)));
                    }
                }
                Some(Err(error)) if error.kind() == io::ErrorKind::ConnectionAborted => {}
                Some(Err(error)) => {
                    if let Some(event) = this.on_failure(error, Instant::now()) {
                        return Poll::Ready(Some(Output::Event(event)));
                    }
                }
                None => return Poll::Ready(None),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use async_std::task::block_on;

    use super::*;

    #[test]
    fn a_listener_that_is_closed_at_once_reports_no_address() {
        let to = SocketAddr::from(([127, 0, 0, 1], 0));
        let address = "/ip4/127.0.0.1/tcp/0".parse().unwrap();
        let mut listener = Listener::bind(ListenerId::next(), address, to).unwrap();
        listener.close();
        let events: Vec<_> = block_on(listener.collect());
        let [Output::Event(TransportEvent::ListenerClosed { .. })] = events[..] else {
            panic!("{} events", events.len());
        };
    }
}
