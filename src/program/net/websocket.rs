//! WebSocket over our TCP, with TLS and without: the transport of browsers.
//!
//! The upgrade runs within the connection's handshake, so the limits and deadlines of handshakes hold for it.
//! A connection of a trusted reverse proxy is reported to the swarm only once its request has named the
//! client, because admission decides by the client's address.

pub mod certificate;
mod forwarded;
mod head;
mod stream;
mod upgrade;

use std::{
    collections::HashMap,
    io,
    net::SocketAddr,
    pin::Pin,
    sync::{
        Arc, PoisonError, RwLock,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, ready},
    time::{Duration, Instant, SystemTime},
};

use async_std::io::timeout;
use futures_rustls::rustls::ServerConfig;
use futures_timer::Delay;
use libp2p::{
    Multiaddr, Transport,
    core::{
        ConnectedPoint,
        transport::{DialOpts, ListenerId, TransportError, TransportEvent},
    },
    futures::{
        AsyncRead, AsyncWrite, FutureExt, StreamExt, TryFutureExt, future::BoxFuture,
        stream::FuturesUnordered,
    },
};

pub use self::stream::{LONGEST_MESSAGE, WebSocketStream};
use self::{
    certificate::Certificate,
    forwarded::Unnamed,
    head::{Head, Request},
    upgrade::Requested,
};
use super::{
    admission::{
        connection_rates::ConnectionRates,
        handshake_failure::{Stage, StageError},
        limits::Denied,
        proxies::Proxies,
    },
    byte_counters::ByteCounters,
    multiaddr::{Layer, listen_address, multiaddr},
};
use crate::wall_clock;

/// How long a trusted proxy has for TLS and its request: it is close by, and already has the request.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);

/// The settings that a [`Node`](crate::program::node::Node) can change while it runs. Clones share them.
#[derive(Clone, Debug)]
pub struct Control {
    tls: Arc<RwLock<Option<Arc<ServerConfig>>>>,
    /// The reverse proxies that are trusted to name their clients.
    pub forwarders: Proxies,
    is_draining: Arc<AtomicBool>,
}

impl Control {
    /// No certificate and no trusted proxies yet; at most `max_requests` of their connections may be without
    /// a request.
    pub fn new(max_requests: usize) -> Self {
        Self {
            tls: Arc::default(),
            forwarders: Proxies::new(max_requests),
            is_draining: Arc::default(),
        }
    }

    /// Replaces the certificate that new connections see.
    pub fn set_certificate(&self, certificate: &Certificate) {
        let tls = Some(Arc::clone(&certificate.config));
        *self.tls.write().unwrap_or_else(PoisonError::into_inner) = tls;
    }

    /// Sets whether health checks are told that the relay drains.
    pub fn set_draining(&self, is_draining: bool) {
        self.is_draining.store(is_draining, Ordering::Relaxed);
    }

    /// Returns the transport over `tcp`, which counts its connections in `counters`. The `rates` apply
    /// to the clients that trusted proxies name; to others they apply in `tcp`.
    pub fn over<T: Transport>(
        &self,
        tcp: T,
        counters: ByteCounters,
        rates: ConnectionRates,
    ) -> WebSocket<T> {
        WebSocket {
            tcp,
            control: self.clone(),
            counters,
            rates,
            listeners: HashMap::new(),
            requests: FuturesUnordered::new(),
            warned: Vec::new(),
        }
    }

    /// What health checks are told.
    fn not_serving(&self) -> Option<&'static str> {
        wall_clock::not_serving(self.is_draining.load(Ordering::Relaxed), SystemTime::now())
    }

    fn tls(&self) -> Option<Arc<ServerConfig>> {
        self.tls.read().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

type Upgrade = BoxFuture<'static, io::Result<WebSocketStream>>;
type Event = TransportEvent<Upgrade, io::Error>;

/// WebSocket over `T`, to listen only.
pub struct WebSocket<T: Transport> {
    tcp: T,
    control: Control,
    counters: ByteCounters,
    rates: ConnectionRates,
    listeners: HashMap<ListenerId, Listener>,
    /// Connections of trusted proxies that have not sent their request yet.
    requests: FuturesUnordered<BoxFuture<'static, Introduced<T::Output>>>,
    warned: Vec<Unnamed>,
}

/// The properties of a listener besides its TCP address.
struct Listener {
    /// `/ws`, `/wss` or `/tls/ws`
    suffix: Multiaddr,
    is_secure: bool,
}

/// A connection that a trusted proxy has made, with the client that its request names.
struct Introduced<S> {
    connection: Connection,
    requested: io::Result<Requested<S>>,
    client: Result<SocketAddr, Option<Unnamed>>,
}

/// The ends of a connection: the relay's, and the client's or its proxy's.
struct Connection {
    listener: ListenerId,
    local: Multiaddr,
    remote: Multiaddr,
}

impl<T> WebSocket<T>
where
    T: Transport<Error = io::Error> + Send + Unpin + 'static,
    T::ListenerUpgrade: Send + 'static,
    T::Output: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    /// Handles a new connection over TCP. One of a trusted proxy waits for its request.
    fn on_incoming(
        &mut self,
        connection: Connection,
        upgrade: T::ListenerUpgrade,
    ) -> Option<Event> {
        let listener = self.listeners.get(&connection.listener)?;
        let tls = match listener.is_secure {
            true => Some(self.control.tls()?),
            false => None,
        };
        let (remote, _) = listen_address(&connection.remote)?;
        if !self.control.forwarders.contains(remote.ip()) {
            let (control, socket) = (self.control.clone(), self.socket(&connection));
            let upgrade = async move {
                let requested = Requested::read(upgrade.await?, tls).await?;
                requested.answer(socket, control.not_serving()).await
            };
            return self.incoming(connection, upgrade);
        }
        let permit = match self.control.forwarders.acquire() {
            Ok(permit) => permit,
            Err(full) => return self.incoming(connection, std::future::ready(Err(full.into()))),
        };
        let (forwarders, rates) = (self.control.forwarders.clone(), self.rates.clone());
        self.requests.push(
            async move {
                let _permit = permit;
                let request = async { Requested::read(upgrade.await?, tls).await };
                let mut requested = timeout(REQUEST_TIMEOUT, request).await;
                let client = match &mut requested {
                    Ok(requested) => client_of(&mut requested.head, remote, &forwarders),
                    Err(_) => Err(None),
                };
                let ip = client.as_ref().unwrap_or(&remote).ip();
                match rates.delay(ip, 0, Instant::now()) {
                    Some(wait) => Delay::new(wait).await,
                    None => requested = requested.and(Err(Denied::Rate.into())),
                }
                Introduced { connection, requested, client }
            }
            .boxed(),
        );
        None
    }

    /// Handles a connection whose proxy has sent its request.
    fn on_introduced(&mut self, introduced: Introduced<T::Output>) -> Option<Event> {
        let Introduced { mut connection, requested, client } = introduced;
        let socket = self.socket(&connection);
        match client {
            Ok(client) => {
                self.counters.rename(&connection.endpoint(), client);
                connection.remote = multiaddr(client);
            }
            Err(Some(reason)) => self.warn_once(&connection.remote, reason),
            Err(None) => {}
        }
        let not_serving = self.control.not_serving();
        self.incoming(connection, async move { requested?.answer(socket, not_serving).await })
    }

    /// Reports a connection to the swarm, if its listener still exists.
    fn incoming(
        &self,
        connection: Connection,
        upgrade: impl Future<Output = io::Result<WebSocketStream>> + Send + 'static,
    ) -> Option<Event> {
        let Connection { listener: listener_id, local, remote } = connection;
        let listener = self.listeners.get(&listener_id)?;
        let upgrade = upgrade.map_err(|error| StageError::wrap(Stage::WebSocket, None, error));
        Some(TransportEvent::Incoming {
            listener_id,
            upgrade: upgrade.boxed(),
            local_addr: listener.append_suffix(&local),
            send_back_addr: listener.append_suffix(&remote),
        })
    }

    fn socket(&self, connection: &Connection) -> Option<async_std::net::TcpStream> {
        self.counters.get(&connection.endpoint())?.socket
    }

    fn warn_once(&mut self, proxy: &Multiaddr, reason: Unnamed) {
        if !self.warned.contains(&reason) {
            self.warned.push(reason);
            let consequence = match reason {
                Unnamed::Contradictory => {
                    "such a connection is refused: have the proxy remove the one"
                }
                _ => "the connection counts as the proxy's own: have the proxy add one",
            };
            log::warn!("--trust-forwarded-from: {proxy}: {reason}; {consequence}");
        }
    }

    /// Converts an event of the TCP transport: appends the listener's suffix to its addresses.
    fn on_event(&mut self, event: TransportEvent<T::ListenerUpgrade, io::Error>) -> Option<Event> {
        Some(match event {
            TransportEvent::Incoming { listener_id, upgrade, local_addr, send_back_addr } => {
                let (local, remote) = (local_addr, send_back_addr);
                let connection = Connection { listener: listener_id, local, remote };
                return self.on_incoming(connection, upgrade);
            }
            TransportEvent::NewAddress { listener_id, listen_addr } => {
                let listen_addr = self.listeners.get(&listener_id)?.append_suffix(&listen_addr);
                TransportEvent::NewAddress { listener_id, listen_addr }
            }
            TransportEvent::AddressExpired { listener_id, listen_addr } => {
                let listen_addr = self.listeners.get(&listener_id)?.append_suffix(&listen_addr);
                TransportEvent::AddressExpired { listener_id, listen_addr }
            }
            TransportEvent::ListenerClosed { listener_id, reason } => {
                self.listeners.remove(&listener_id);
                TransportEvent::ListenerClosed { listener_id, reason }
            }
            TransportEvent::ListenerError { listener_id, error } => {
                TransportEvent::ListenerError { listener_id, error }
            }
        })
    }
}

impl Listener {
    fn append_suffix(&self, address: &Multiaddr) -> Multiaddr {
        address.iter().chain(self.suffix.iter()).collect()
    }
}

impl Connection {
    fn endpoint(&self) -> ConnectedPoint {
        ConnectedPoint::Listener {
            local_addr: self.local.clone(),
            send_back_addr: self.remote.clone(),
        }
    }
}

/// Returns the address of the client for which this proxy makes its request, with the proxy's port unless
/// the client's is known.
///
/// # Errors
///
/// If the connection counts as the proxy's own; with the reason if the operator should know it. A proxy also opens
/// connections without a client: for health checks, and for requests that are no upgrade.
fn client_of(
    head: &mut Head,
    proxy: SocketAddr,
    forwarders: &Proxies,
) -> Result<SocketAddr, Option<Unnamed>> {
    if !matches!(head.request, Request::Upgrade(_)) {
        return Err(None);
    }
    let client = head.forwarded.client(|ip| forwarders.contains(ip));
    if client == Err(Unnamed::Contradictory) {
        head.request = Request::Bad("Forwarded and X-Forwarded-For name different clients");
    }
    let (ip, port) = client.map_err(Some)?;
    Ok(SocketAddr::new(ip, port.unwrap_or(proxy.port())))
}

impl<T> Transport for WebSocket<T>
where
    T: Transport<Error = io::Error> + Send + Unpin + 'static,
    T::ListenerUpgrade: Send + 'static,
    T::Output: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    type Output = WebSocketStream;
    type Error = io::Error;
    type ListenerUpgrade = Upgrade;
    type Dial = std::future::Pending<io::Result<WebSocketStream>>;

    fn listen_on(
        &mut self,
        id: ListenerId,
        address: Multiaddr,
    ) -> Result<(), TransportError<io::Error>> {
        let is_secure = match listen_address(&address) {
            Some((_, Layer::WebSocket)) => false,
            Some((_, Layer::SecureWebSocket)) if self.control.tls().is_some() => true,
            _ => return Err(TransportError::MultiaddrNotSupported(address)),
        };
        let tcp = address.iter().take(2).collect();
        let suffix = address.iter().skip(2).collect();
        self.tcp.listen_on(id, tcp)?;
        self.listeners.insert(id, Listener { suffix, is_secure });
        Ok(())
    }

    fn remove_listener(&mut self, id: ListenerId) -> bool {
        self.tcp.remove_listener(id)
    }

    fn dial(
        &mut self,
        address: Multiaddr,
        _: DialOpts,
    ) -> Result<Self::Dial, TransportError<io::Error>> {
        Err(TransportError::MultiaddrNotSupported(address))
    }

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Event> {
        let this = &mut *self;
        loop {
            let event = match this.requests.poll_next_unpin(cx) {
                Poll::Ready(Some(introduced)) => this.on_introduced(introduced),
                _ => {
                    let event = ready!(Pin::new(&mut this.tcp).poll(cx));
                    this.on_event(event)
                }
            };
            if let Some(event) = event {
                return Poll::Ready(event);
            }
        }
    }
}
