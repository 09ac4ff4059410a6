//! async-std TCP under libp2p: dialing, who connects, and the options of a socket.
//!
//! WebSocket runs over a TCP of its own (`websocket.rs`); what both listen on is told apart here.
//!
//! Whose connection it is, a proxy says before anyone else sees it: the limits that turn away
//! whoever has too many decide by that.
//!
//! Written here because libp2p's own TCP has come with tokio only since 0.56.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use async_std::net::TcpStream;
use libp2p::{
    Multiaddr, Transport,
    core::transport::{DialOpts, ListenerId, TransportError, TransportEvent},
    futures::{
        FutureExt, StreamExt,
        future::BoxFuture,
        stream::{FuturesUnordered, SelectAll},
    },
    multiaddr::Protocol,
};
use socket2::{SockRef, TcpKeepalive};

use super::{
    listener::{Accepted, Listener, News},
    proxies::{self, Introduction, Proxies},
    traffic::{Counted, Traffic},
};

/// How long what we sent may stay unacknowledged before the kernel gives the connection up.
///
/// Without it a peer that vanished behind a full window holds its socket for a quarter of an hour.
const UNACKNOWLEDGED: Duration = Duration::from_secs(60);
/// After which silence the kernel asks whether the other side is still there, and how often.
const KEEPALIVE: Duration = Duration::from_secs(60);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(15);

/// A connection needs nothing more from TCP.
pub(super) type Upgrade = std::future::Ready<io::Result<Counted<TcpStream>>>;
/// What the swarm is told.
pub(super) type Event = TransportEvent<Upgrade, io::Error>;

/// TCP, IPv4 and IPv6.
pub struct Tcp {
    listeners: SelectAll<Listener>,
    traffic: Traffic,
    proxies: Proxies,
    /// Connections of proxies that have not said yet whom they bring.
    introductions: FuturesUnordered<BoxFuture<'static, (Accepted, io::Result<SocketAddr>)>>,
}

impl Tcp {
    /// TCP that counts what comes in on each connection in `traffic`, and believes `proxies`.
    pub fn new(traffic: Traffic, proxies: Proxies) -> Self {
        Self {
            listeners: SelectAll::new(),
            traffic,
            proxies,
            introductions: FuturesUnordered::new(),
        }
    }

    /// Whether there is still such a listener. Nobody is told of connections of one that is closed,
    /// and libp2p's WebSocket panics over them.
    fn listens(&self, id: ListenerId) -> bool {
        let mut listeners = self.listeners.iter();
        listeners.any(|listener| listener.id() == id && !listener.is_closed())
    }

    /// Takes a connection, if it is a client's. A proxy is asked first whose it is.
    fn accepted(&mut self, accepted: Accepted) -> Option<Event> {
        let remote = accepted.remote;
        if !self.proxies.include(remote.ip()) {
            return Some(accepted.incoming(&self.traffic, Ok(remote)));
        }
        let room = match self.proxies.introduce() {
            Ok(room) => room,
            Err(full) => return Some(accepted.incoming(&self.traffic, Err(full.into()))),
        };
        let introduction = async move {
            let _room: Introduction = room;
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
        let Some((socket_address, Layer::Tcp)) = listen_address(&address) else {
            return Err(TransportError::MultiaddrNotSupported(address));
        };
        let listener = Listener::bind(id, socket_address)
            .map_err(|error| TransportError::Other(with_remedy(&error)))?;
        self.listeners.push(listener);
        Ok(())
    }

    fn remove_listener(&mut self, id: ListenerId) -> bool {
        match self
            .listeners
            .iter_mut()
            .find(|listener| listener.id() == id)
        {
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
        let Some(remote) = dialable(&address) else {
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
                if !this.listens(accepted.listener) {
                    continue;
                }
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

/// What runs over the TCP connections of an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layer {
    /// Nothing: libp2p itself does.
    Tcp,
    /// `/ws`
    WebSocket,
    /// `/tls/ws`, or `/wss`, which is the same.
    SecureWebSocket,
}

/// The socket address to listen on, and for what: an IP address, a TCP port, and WebSocket or
/// nothing behind them.
pub fn listen_address(address: &Multiaddr) -> Option<(SocketAddr, Layer)> {
    let mut parts = address.iter();
    let ip = match parts.next()? {
        Protocol::Ip4(ip) => IpAddr::from(ip),
        Protocol::Ip6(ip) => IpAddr::from(ip),
        _ => return None,
    };
    let Some(Protocol::Tcp(port)) = parts.next() else {
        return None;
    };
    let at_root = |path: &str| path == "/";
    let layer = match (parts.next(), parts.next(), parts.next()) {
        (None, ..) => Layer::Tcp,
        (Some(Protocol::Ws(path)), None, _) if at_root(&path) => Layer::WebSocket,
        (Some(Protocol::Wss(path)), None, _) if at_root(&path) => Layer::SecureWebSocket,
        (Some(Protocol::Tls), Some(Protocol::Ws(path)), None) if at_root(&path) => {
            Layer::SecureWebSocket
        }
        _ => return None,
    };
    Some((SocketAddr::new(ip, port), layer))
}

/// Why an address cannot be listened on at all, and what can.
pub fn unsupported(address: &Multiaddr) -> &'static str {
    const WEBSOCKET: bool = cfg!(feature = "websocket");
    match listen_address(address) {
        Some((_, Layer::WebSocket | Layer::SecureWebSocket)) if !WEBSOCKET => {
            "this relay was built without WebSocket (the feature websocket); try \
             /ip4/0.0.0.0/tcp/4001"
        }
        Some((_, Layer::SecureWebSocket)) => {
            "there is no certificate for TLS; name one with --tls-cert and --tls-key, or listen on \
             /ip4/127.0.0.1/tcp/4002/ws behind a proxy that has one"
        }
        _ if WEBSOCKET => {
            "this relay listens on TCP and WebSocket; try /ip4/0.0.0.0/tcp/4001 or \
             /ip4/0.0.0.0/tcp/4002/ws"
        }
        _ => "this relay listens on TCP; try /ip4/0.0.0.0/tcp/4001",
    }
}

/// The socket address of one side of a connection, and what runs over it: as [`listen_address`],
/// with the peer's id behind it or not.
pub(crate) fn remote_address(address: &Multiaddr) -> Option<(SocketAddr, Layer)> {
    let mut address = address.clone();
    if let Some(Protocol::P2p(_)) = address.iter().last() {
        address.pop();
    }
    listen_address(&address).filter(|(to, _)| to.port() != 0 && !to.ip().is_unspecified())
}

/// The socket address of a TCP address that can be dialed: nothing is dialed over WebSocket.
pub(crate) fn dialable(address: &Multiaddr) -> Option<SocketAddr> {
    match remote_address(address)? {
        (to, Layer::Tcp) => Some(to),
        _ => None,
    }
}

pub(super) fn multiaddr(address: SocketAddr) -> Multiaddr {
    Multiaddr::from(address.ip()).with(Protocol::Tcp(address.port()))
}

/// Said here, because libp2p's boxed transports keep the words of an error and lose its kind.
pub(super) fn with_remedy(error: &io::Error) -> io::Error {
    let remedy = match error.kind() {
        io::ErrorKind::AddrInUse => "stop the program that has it, or listen on another port",
        io::ErrorKind::AddrNotAvailable => "this machine has no such address; try 0.0.0.0 or ::",
        io::ErrorKind::PermissionDenied => "ports below 1024 are for root; try a higher one",
        _ => "try another address",
    };
    io::Error::new(error.kind(), format!("{error}; {remedy}"))
}

/// The options of every connection.
pub(super) fn prepare(stream: &TcpStream) -> io::Result<()> {
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
