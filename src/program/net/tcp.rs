//! async-std TCP under libp2p: dialing, and who connects.
//!
//! WebSocket runs over a TCP of its own (`websocket.rs`); `multiaddr.rs` tells apart what each listens on.
//!
//! Whose connection it is, a proxy says before anyone else sees it: the limits that turn away
//! whoever has too many decide by that.
//!
//! Written here because libp2p's own TCP has come with tokio only since 0.56.

use std::{
    io,
    net::SocketAddr,
    pin::Pin,
    task::{Context, Poll},
    time::{Duration, Instant},
};

use async_std::net::TcpStream;
use futures_timer::Delay;
use libp2p::{
    Multiaddr, Transport,
    core::transport::{DialOpts, ListenerId, TransportError},
    futures::{
        FutureExt, StreamExt,
        future::BoxFuture,
        stream::{FuturesUnordered, SelectAll},
    },
};

use super::{
    admission::{
        arrivals::Arrivals,
        limits::Denied,
        proxies::{self, Introduction, Proxies},
    },
    listener::{Accepted, Event, Listener, News, Upgrade},
    multiaddr::{Layer, dialable, listen_address},
    socket::{prepare, with_remedy},
    traffic::{Counted, Traffic},
};

/// TCP, IPv4 and IPv6.
pub struct Tcp {
    listeners: SelectAll<Listener>,
    traffic: Traffic,
    proxies: Proxies,
    arrivals: Arrivals,
    /// Connections of proxies that have not said yet whom they bring.
    introductions: FuturesUnordered<BoxFuture<'static, (Accepted, io::Result<SocketAddr>)>>,
    /// Connections that come too fast, until it is their turn.
    waiting: FuturesUnordered<BoxFuture<'static, (Accepted, SocketAddr)>>,
}

impl Tcp {
    /// TCP that counts what comes in on each connection in `traffic`, believes `proxies`, and takes
    /// connections as fast as `arrivals` says.
    pub fn new(traffic: Traffic, proxies: Proxies, arrivals: Arrivals) -> Self {
        Self {
            listeners: SelectAll::new(),
            traffic,
            proxies,
            arrivals,
            introductions: FuturesUnordered::new(),
            waiting: FuturesUnordered::new(),
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
            return self.arrived(accepted, Ok(remote));
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

    /// Takes a connection of this client, at once or when it is its turn.
    fn arrived(&mut self, accepted: Accepted, client: io::Result<SocketAddr>) -> Option<Event> {
        let wait = match &client {
            Ok(client) => self.arrivals.wait(client.ip(), self.waiting.len(), Instant::now()),
            Err(_) => Some(Duration::ZERO),
        };
        match (client, wait) {
            (Ok(client), Some(wait)) if !wait.is_zero() => {
                let turn = Delay::new(wait).map(move |()| (accepted, client));
                self.waiting.push(turn.boxed());
                None
            }
            (Ok(_), None) => Some(accepted.incoming(&self.traffic, Err(Denied::Rate.into()))),
            (client, _) => Some(accepted.incoming(&self.traffic, client)),
        }
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
        match self.listeners.iter_mut().find(|listener| listener.id() == id) {
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
            Ok(traffic.count(stream, None, remote, None))
        }
        .boxed())
    }

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Event> {
        let this = &mut *self;
        loop {
            if let Poll::Ready(Some((accepted, client))) = this.introductions.poll_next_unpin(cx) {
                let listens = this.listens(accepted.listener);
                if listens && let Some(event) = this.arrived(accepted, client) {
                    return Poll::Ready(event);
                }
                continue;
            }
            if let Poll::Ready(Some((accepted, client))) = this.waiting.poll_next_unpin(cx) {
                if this.listens(accepted.listener) {
                    return Poll::Ready(accepted.incoming(&this.traffic, Ok(client)));
                }
                continue;
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
