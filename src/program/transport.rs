//! async-std TCP under libp2p: listening, dialing, and the options of a socket.
//!
//! Whose connection it is, a proxy says before anyone else sees it: the limits that turn away
//! whoever has too many decide by that.
//!
//! Written here because libp2p's own TCP has come with tokio only since 0.56.

use std::{
    collections::VecDeque,
    io,
    net::{IpAddr, SocketAddr},
    pin::Pin,
    task::{Context, Poll, Waker, ready},
    time::{Duration, Instant},
};

use async_std::net::{TcpListener, TcpStream};
use futures_timer::Delay;
use libp2p::{
    Multiaddr, Transport,
    core::transport::{DialOpts, ListenerId, TransportError, TransportEvent},
    futures::{
        FutureExt, Stream, StreamExt,
        future::BoxFuture,
        stream::{self, BoxStream, FuturesUnordered, SelectAll},
    },
    multiaddr::Protocol,
};
use socket2::{Domain, SockRef, Socket, TcpKeepalive, Type};

use super::{
    connection_limits::Denied,
    interfaces::{Change, Interfaces},
    proxies::{self, Proxies},
    traffic::{Counted, Traffic},
};

/// How many connections the kernel keeps for us until they are accepted.
const BACKLOG: i32 = 1024;

/// How long what we sent may stay unacknowledged before the kernel gives the connection up.
///
/// Without it a peer that vanished behind a full window holds its socket for a quarter of an hour.
const UNACKNOWLEDGED: Duration = Duration::from_secs(60);
/// After which silence the kernel asks whether the other side is still there, and how often.
const KEEPALIVE: Duration = Duration::from_secs(60);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(15);

/// How long to leave a listener alone after it failed to accept: the first time, and at most.
///
/// Out of file descriptors, accepting again at once would fail again at once.
const PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);

/// After how long without a failure the next one is told again: whoever can make accepting fail
/// can also make it succeed in between, and is not to fill the log.
const TELL_AGAIN: Duration = Duration::from_secs(60);

type Upgrade = std::future::Ready<io::Result<Counted<TcpStream>>>;
type Event = TransportEvent<Upgrade, io::Error>;

/// TCP, IPv4 and IPv6.
pub struct Tcp {
    listeners: SelectAll<Listener>,
    traffic: Traffic,
    proxies: Proxies,
    /// Connections of proxies that have not said yet whom they bring, and how many there may be.
    introductions: FuturesUnordered<BoxFuture<'static, (Accepted, io::Result<SocketAddr>)>>,
    most_introductions: usize,
}

impl Tcp {
    /// TCP that counts what comes in on each connection in `traffic`, and believes `proxies`, so
    /// many at a time.
    pub fn new(traffic: Traffic, proxies: Proxies, most_introductions: usize) -> Self {
        Self {
            listeners: SelectAll::new(),
            traffic,
            proxies,
            introductions: FuturesUnordered::new(),
            most_introductions,
        }
    }

    /// Takes a connection, if it is a client's. A proxy is asked first whose it is.
    fn accepted(&mut self, accepted: Accepted) -> Option<Event> {
        let remote = accepted.remote;
        if !self.proxies.include(remote.ip()) {
            return Some(accepted.incoming(&self.traffic, Ok(remote)));
        }
        if self.introductions.len() >= self.most_introductions {
            let full = Err(Denied::Handshakes.into());
            return Some(accepted.incoming(&self.traffic, full));
        }
        let introduction = async move {
            let client = proxies::client_of(&accepted.stream).await;
            let client = client.map(|client| client.unwrap_or(remote));
            (accepted, client)
        };
        self.introductions.push(introduction.boxed());
        None
    }
}

impl Transport for Tcp {
    type Output = Counted<TcpStream>;
    type Error = io::Error;
    type ListenerUpgrade = Upgrade;
    type Dial = BoxFuture<'static, io::Result<Self::Output>>;

    fn listen_on(
        &mut self,
        id: ListenerId,
        address: Multiaddr,
    ) -> Result<(), TransportError<io::Error>> {
        let Some(socket_address) = listen_address(&address) else {
            return Err(TransportError::MultiaddrNotSupported(address));
        };
        let listener = Listener::bind(id, socket_address)
            .map_err(|error| TransportError::Other(with_remedy(&error)))?;
        self.listeners.push(listener);
        Ok(())
    }

    fn remove_listener(&mut self, id: ListenerId) -> bool {
        match self.listeners.iter_mut().find(|listener| listener.id == id) {
            Some(listener) => {
                listener.close();
                true
            }
            None => false,
        }
    }

    fn dial(
        &mut self,
        address: Multiaddr,
        _: DialOpts,
    ) -> Result<Self::Dial, TransportError<io::Error>> {
        let Some(remote) = socket_address(&address) else {
            return Err(TransportError::MultiaddrNotSupported(address));
        };
        let traffic = self.traffic.clone();
        Ok(async move {
            let stream = TcpStream::connect(remote).await?;
            prepare(&stream)?;
            Ok(traffic.count(stream, None, remote))
        }
        .boxed())
    }

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Event> {
        let this = &mut *self;
        loop {
            if let Poll::Ready(Some((accepted, client))) = this.introductions.poll_next_unpin(cx) {
                return Poll::Ready(accepted.incoming(&this.traffic, client));
            }
            let event = match this.listeners.poll_next_unpin(cx) {
                Poll::Ready(Some(News::Accepted(accepted))) => this.accepted(accepted),
                Poll::Ready(Some(News::Event(event))) => Some(event),
                Poll::Ready(None) | Poll::Pending => return Poll::Pending,
            };
            if let Some(event) = event {
                return Poll::Ready(event);
            }
        }
    }
}

/// The socket address to listen on: an IP address and a TCP port, and nothing behind them.
pub fn listen_address(address: &Multiaddr) -> Option<SocketAddr> {
    let mut parts = address.iter();
    let ip = match parts.next()? {
        Protocol::Ip4(ip) => IpAddr::from(ip),
        Protocol::Ip6(ip) => IpAddr::from(ip),
        _ => return None,
    };
    match (parts.next(), parts.next()) {
        (Some(Protocol::Tcp(port)), None) => Some(SocketAddr::new(ip, port)),
        _ => None,
    }
}

/// The socket address to dial: as [`listen_address`], with the peer's id behind it or not.
pub(crate) fn socket_address(address: &Multiaddr) -> Option<SocketAddr> {
    let mut address = address.clone();
    if let Some(Protocol::P2p(_)) = address.iter().last() {
        address.pop();
    }
    listen_address(&address).filter(|to| to.port() != 0 && !to.ip().is_unspecified())
}

fn multiaddr(address: SocketAddr) -> Multiaddr {
    Multiaddr::from(address.ip()).with(Protocol::Tcp(address.port()))
}

/// Said here, because libp2p's boxed transports keep the words of an error and lose its kind.
fn with_remedy(error: &io::Error) -> io::Error {
    let remedy = match error.kind() {
        io::ErrorKind::AddrInUse => "stop the program that has it, or listen on another port",
        io::ErrorKind::AddrNotAvailable => "this machine has no such address; try 0.0.0.0 or ::",
        io::ErrorKind::PermissionDenied => "ports below 1024 are for root; try a higher one",
        _ => "try another address",
    };
    io::Error::new(error.kind(), format!("{error}; {remedy}"))
}

/// The options of every connection.
fn prepare(stream: &TcpStream) -> io::Result<()> {
    let socket = SockRef::from(stream);
    socket.set_tcp_nodelay(true)?;
    let keepalive = TcpKeepalive::new()
        .with_time(KEEPALIVE)
        .with_interval(KEEPALIVE_INTERVAL);
    socket.set_tcp_keepalive(&keepalive)?;
    #[cfg(any(target_os = "android", target_os = "linux"))]
    socket.set_tcp_user_timeout(Some(UNACKNOWLEDGED))?;
    Ok(())
}

/// What comes of a listening socket.
enum News {
    Accepted(Accepted),
    Event(Event),
}

/// A connection that nobody was told of yet.
struct Accepted {
    listener: ListenerId,
    stream: TcpStream,
    local: SocketAddr,
    remote: SocketAddr,
}

impl Accepted {
    /// Tells whose it is; or that it failed, and is the remote address's.
    fn incoming(self, traffic: &Traffic, client: io::Result<SocketAddr>) -> Event {
        let Self { stream, local, .. } = self;
        let send_back_addr = multiaddr(*client.as_ref().unwrap_or(&self.remote));
        let upgrade = client.map(|client| traffic.count(stream, Some(local), client));
        TransportEvent::Incoming {
            listener_id: self.listener,
            upgrade: std::future::ready(upgrade),
            local_addr: multiaddr(local),
            send_back_addr,
        }
    }
}

/// One listening socket.
struct Listener {
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
    fn bind(id: ListenerId, address: SocketAddr) -> io::Result<Self> {
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

    fn close(&mut self) {
        if self.closed {
            return;
        }
        self.closed = true;
        self.events.push_back(TransportEvent::ListenerClosed {
            listener_id: self.id,
            reason: Ok(()),
        });
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
                Change::Up(_) => TransportEvent::NewAddress {
                    listener_id,
                    listen_addr,
                },
                Change::Down(_) => TransportEvent::AddressExpired {
                    listener_id,
                    listen_addr,
                },
            });
        }
    }

    fn accepted(&self, stream: TcpStream, remote: SocketAddr) -> io::Result<Accepted> {
        prepare(&stream)?;
        Ok(Accepted {
            listener: self.id,
            local: stream.local_addr()?,
            stream,
            remote,
        })
    }

    /// Accepting failed: leaves the listener alone for a while. Told once for as long as it lasts.
    fn failed(&mut self, error: io::Error, now: Instant) -> Option<Event> {
        let last = self.failed.replace(now);
        let news = last.is_none_or(|last| now.duration_since(last) > TELL_AGAIN);
        self.pause = Some(Delay::new(self.next_pause));
        self.next_pause = (self.next_pause * 2).min(LONGEST_PAUSE);
        news.then_some(TransportEvent::ListenerError {
            listener_id: self.id,
            error,
        })
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
