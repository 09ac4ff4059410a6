//! WebSocket over the relay's TCP transport, with TLS and without: the transport of browsers.
//!
//! The upgrade runs within the connection's handshake, so the limits and deadlines of handshakes hold for it.
//! A connection of a trusted reverse proxy is reported to the swarm only once its request has named the
//! client, because admission decides by the client's address.

pub mod certificate;
mod forwarded;
mod head;
mod stream;
mod upgrade;
mod write_coalescing;

use std::{
    future::{pending, ready},
    io,
    net::{IpAddr, SocketAddr},
    pin::Pin,
    sync::{
        Arc, PoisonError, RwLock,
        atomic::{AtomicBool, Ordering},
    },
    task::{self, Context, Poll},
    time::{Duration, Instant, SystemTime},
};

use async_lock::Semaphore;
use async_std::future::timeout;
use futures_rustls::rustls::ServerConfig;
use futures_timer::Delay;
use libp2p::{
    Multiaddr, Transport,
    core::{
        ConnectedPoint,
        transport::{DialOpts, ListenerId, TransportError, TransportEvent},
    },
    futures::{FutureExt, StreamExt, TryFutureExt, future::BoxFuture, stream::FuturesUnordered},
};

pub use self::stream::{LONGEST_MESSAGE, WebSocketStream};
use self::{
    certificate::Certificate,
    forwarded::ForwardedError,
    head::{Head, Request},
    upgrade::PendingUpgrade,
    write_coalescing::WriteCoalescing,
};
use super::{
    admission::{
        connection_rates::ConnectionRates,
        handshake_failure::{Reason, Stage, StageError},
        handshakes::Progress,
        limits::Denied,
        proxies::Proxies,
    },
    byte_counters::{ByteCounters, Pending},
    listener,
    multiaddr::{Layer, listen_address, with_layers_of},
    read_buffer::ReadBuffer,
    tcp::Tcp,
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
    /// Whether health checks are told that the relay drains.
    pub is_draining: Arc<AtomicBool>,
}

impl Control {
    /// Replaces the certificate that new connections see.
    pub fn set_certificate(&self, certificate: &Certificate) {
        let tls = Some(Arc::clone(&certificate.config));
        *self.tls.write().unwrap_or_else(PoisonError::into_inner) = tls;
    }

    /// Why health checks are told that the relay does not serve; `None` if it does.
    fn not_serving(&self) -> Option<&'static str> {
        wall_clock::not_serving(self.is_draining.load(Ordering::Relaxed), SystemTime::now())
    }

    fn tls(&self) -> Option<Arc<ServerConfig>> {
        self.tls.read().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

type Upgrade = BoxFuture<'static, io::Result<WebSocketStream>>;
type Event = TransportEvent<Upgrade, io::Error>;

/// What WebSocket runs over.
type Stream = WriteCoalescing<ReadBuffer<<Tcp as Transport>::Output>>;

/// WebSocket over TCP, for listening only.
pub struct WebSocket {
    tcp: Tcp,
    /// Its settings.
    pub control: Control,
    counters: ByteCounters,
    rates: ConnectionRates,
    /// Connections of trusted proxies that have not sent their request yet, or are delayed.
    requests: FuturesUnordered<BoxFuture<'static, ProxiedRequest>>,
    /// Permits for delays by the rate limits; not the permits to wait for a request, all of which one client's delays
    /// could take.
    delays: Arc<Semaphore>,
    warned: Vec<ForwardedError>,
}

/// The client that a proxied request names. `None`: the request is the proxy's own. The reason, if the operator should
/// know it: the proxy's address then stands for the client's.
type Client = Result<SocketAddr, Option<ForwardedError>>;

/// A trusted proxy's connection, its request, and the client.
type ProxiedRequest = (Connection, io::Result<PendingUpgrade<Stream>>, Client);

/// A connection: its listener, its addresses, its progress and its socket.
struct Connection {
    listener_id: ListenerId,
    local_addr: Multiaddr,
    /// The client's address, or its proxy's.
    send_back_addr: Multiaddr,
    /// `None` if another connection has the same addresses.
    pending: Option<Pending>,
}

impl WebSocket {
    /// A transport whose TCP counts received bytes in `counters` and trusts the PROXY protocol headers of `proxies`.
    /// The `rates` apply to connections, or to the clients that trusted reverse proxies name. There is no certificate
    /// and no reverse proxy yet; at most `max_requests` connections of reverse proxies may be without a request, and as
    /// many delayed.
    pub fn new(
        counters: ByteCounters,
        proxies: Proxies,
        rates: ConnectionRates,
        max_requests: usize,
    ) -> Self {
        let forwarders = Proxies::new(max_requests);
        Self {
            tcp: Tcp::new(counters.clone(), proxies, rates.clone(), Some(forwarders.clone())),
            control: Control { tls: Arc::default(), forwarders, is_draining: Arc::default() },
            counters,
            rates,
            requests: FuturesUnordered::new(),
            delays: Arc::new(Semaphore::new(max_requests)),
            warned: Vec::new(),
        }
    }

    /// Handles a new connection over TCP. One of a trusted proxy waits for its request.
    fn on_incoming(
        &mut self,
        mut connection: Connection,
        upgrade: <Tcp as Transport>::ListenerUpgrade,
    ) -> Option<Event> {
        let (remote, layer) = listen_address(&connection.send_back_addr)?;
        let tls = match layer {
            Layer::SecureWebSocket => Some(self.control.tls()?),
            _ => None,
        };
        connection.pending = self.counters.get(&connection.endpoint());
        let progress = connection.pending.as_ref().map(|it| it.progress.clone());
        let request = async move {
            let stream = ReadBuffer::new(upgrade.await?, progress);
            PendingUpgrade::read(WriteCoalescing::new(stream), tls).await
        };
        if !self.control.forwarders.contains(remote.ip()) {
            return self.report(connection, request);
        }
        let permit = match self.control.forwarders.acquire() {
            Ok(permit) => permit,
            Err(full) => return self.report(connection, ready(Err(full.into()))),
        };
        let (forwarders, rates) = (self.control.forwarders.clone(), self.rates.clone());
        let delays = Arc::clone(&self.delays);
        self.requests.push(
            async move {
                // 1. Wait for the request, with a permit.
                let mut request = timeout(REQUEST_TIMEOUT, request).await.unwrap_or_else(|late| {
                    let late = io::Error::new(io::ErrorKind::TimedOut, late);
                    Err(StageError::wrap(Stage::WebSocket, Some(Reason::Timeout), late))
                });
                drop(permit);
                // 2. Charge the client, or the proxy for a request that names none.
                let (mut client, mut charged) = (Err(None), Some(remote.ip()));
                if let Ok(PendingUpgrade { head, .. }) = &mut request {
                    charged = charged_for(head, remote.ip(), &forwarders);
                    client = client_of(head, remote, &forwarders);
                }
                // 3. Delay it, or deny it. Without a permit there is no delay: `usize::MAX` is more than may be
                // delayed.
                let delay_permit = delays.try_acquire_arc();
                let delayed = if delay_permit.is_some() { 0 } else { usize::MAX };
                let rate = |ip| rates.delay(ip, delayed, Instant::now());
                match charged.map_or(Some(Duration::ZERO), rate) {
                    Some(wait) => Delay::new(wait).await,
                    None => request = request.and(Err(Denied::Rate.into())),
                }
                (connection, request, client)
            }
            .boxed(),
        );
        None
    }

    /// Handles the request of a trusted proxy.
    fn on_proxied_request(&mut self, proxied: ProxiedRequest) -> Option<Event> {
        let (mut connection, request, client) = proxied;
        match client {
            Ok(client) => {
                self.counters.rename(&connection.endpoint(), client);
                connection.send_back_addr = with_layers_of(&connection.local_addr, client);
            }
            Err(Some(reason)) => self.warn_once(&connection.send_back_addr, reason),
            Err(None) => self.counters.set_proxys_own(&connection.endpoint()),
        }
        // A failed connection's counter is gone with its stream, and admission needs it to count the failure.
        let ended = connection.pending.take_if(|_| request.is_err());
        let counter =
            ended.and_then(|ended| self.counters.add_ended(&connection.endpoint(), ended));
        self.report(connection, async move {
            let _counter = counter;
            request
        })
    }

    /// Reports a connection to the swarm, if its listener still exists. Its upgrade answers the request.
    fn report(
        &self,
        connection: Connection,
        request: impl Future<Output = io::Result<PendingUpgrade<Stream>>> + Send + 'static,
    ) -> Option<Event> {
        let Connection { listener_id, local_addr, send_back_addr, pending } = connection;
        let (progress, socket) = pending.map(|it| (it.progress, it.socket)).unzip();
        let control = self.control.clone();
        let upgrade = async move {
            let open = request.await?.answer(socket.flatten(), control.not_serving()).await?;
            progress.inspect(Progress::set_upgraded);
            Ok(open)
        };
        let upgrade = upgrade.map_err(|error| StageError::wrap(Stage::WebSocket, None, error));
        let upgrade = upgrade.boxed();
        let event = TransportEvent::Incoming { listener_id, upgrade, local_addr, send_back_addr };
        self.tcp.is_listening(listener_id).then_some(event)
    }

    fn warn_once(&mut self, proxy: &Multiaddr, reason: ForwardedError) {
        if !self.warned.contains(&reason) {
            self.warned.push(reason);
            let consequence = match reason {
                ForwardedError::Contradictory => {
                    "the connection is refused: have the proxy remove the header that it does not set"
                }
                _ => "the proxy's address counts as the client's: have the proxy name the client",
            };
            log::warn!("--trust-forwarded-from: {proxy}: {reason}; {consequence}");
        }
    }

    /// Handles an event of the TCP transport.
    fn on_event(&mut self, event: listener::Event) -> Option<Event> {
        match event {
            TransportEvent::Incoming { listener_id, upgrade, local_addr, send_back_addr } => {
                let pending = None;
                let connection = Connection { listener_id, local_addr, send_back_addr, pending };
                self.on_incoming(connection, upgrade)
            }
            other => Some(other.map_upgrade(|_| pending().boxed())), // none has an upgrade
        }
    }
}

impl Connection {
    fn endpoint(&self) -> ConnectedPoint {
        let (local_addr, send_back_addr) = (self.local_addr.clone(), self.send_back_addr.clone());
        ConnectedPoint::Listener { local_addr, send_back_addr }
    }
}

/// Returns the client for which this proxy makes its request, with the proxy's port unless the client's is known. A
/// proxy also sends requests of its own: health checks, and others that are no upgrade.
fn client_of(head: &mut Head, proxy: SocketAddr, forwarders: &Proxies) -> Client {
    if !matches!(head.request, Request::Upgrade(_)) {
        return Err(None);
    }
    let client = head.forwarded.client(|ip| forwarders.contains(ip));
    if client == Err(ForwardedError::Contradictory) {
        head.request = Request::Bad("Forwarded and X-Forwarded-For name different clients");
    }
    let (ip, port) = client.map_err(Some)?;
    Ok(SocketAddr::new(ip, port.unwrap_or(proxy.port())))
}

/// Whose rate a request of this proxy is charged to: the client's, also if it opens no WebSocket, or else the proxy's;
/// `None` for a health check of the proxy's own, which must not fail because of what clients send through it.
fn charged_for(head: &Head, proxy: IpAddr, forwarders: &Proxies) -> Option<IpAddr> {
    match head.forwarded.client(|ip| forwarders.contains(ip)) {
        Ok((client, _)) => Some(client),
        Err(ForwardedError::Absent) if head.request == Request::Health => None,
        Err(_) => Some(proxy),
    }
}

impl Transport for WebSocket {
    type Output = WebSocketStream;
    type Error = io::Error;
    type ListenerUpgrade = Upgrade;
    type Dial = std::future::Pending<io::Result<WebSocketStream>>;

    fn listen_on(
        &mut self,
        id: ListenerId,
        address: Multiaddr,
    ) -> Result<(), TransportError<io::Error>> {
        let is_secure = matches!(listen_address(&address), Some((_, Layer::SecureWebSocket)));
        if is_secure && self.control.tls().is_none() {
            return Err(TransportError::MultiaddrNotSupported(address));
        }
        self.tcp.listen_on(id, address)
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
                Poll::Ready(Some(proxied)) => this.on_proxied_request(proxied),
                _ => {
                    let event = task::ready!(Pin::new(&mut this.tcp).poll(cx));
                    this.on_event(event)
                }
            };
            if let Some(event) = event {
                return Poll::Ready(event);
            }
        }
    }
}
