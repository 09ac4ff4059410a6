//! The relay as a swarm: transports, secure channels, yamux, admission, identify, and optionally AutoNAT and a DHT.

mod event;
mod setup;

#[cfg(feature = "websocket")]
use std::sync::atomic::Ordering;
use std::{
    io,
    time::{Duration, Instant, SystemTime},
};

use anyhow::{Context, Result};
use ipnet::IpNet;
#[cfg(any(feature = "autonat", feature = "dht"))]
use libp2p::swarm::behaviour::toggle::Toggle;
use libp2p::{
    Multiaddr, PeerId, Swarm, Transport,
    core::{
        transport::{ListenerId, TransportError},
        upgrade::Version,
    },
    futures::StreamExt,
    identity::Keypair,
    swarm::{self, ConnectionId, NetworkBehaviour, SwarmEvent},
};

pub use self::{event::NodeEvent, setup::Setup};
#[cfg(feature = "autonat")]
use super::autonat::AutoNat;
#[cfg(feature = "dht")]
use super::dht::{self, Dht};
#[cfg(feature = "pnet")]
use super::net::swarm_key;
#[cfg(feature = "websocket")]
use super::net::websocket::{self, WebSocket, certificate::Certificate};
use super::{
    mux::{budget::Buffered, muxer::Multiplex, stream_limits},
    net::{
        admission::{
            behaviour::Admission, connection_rates::ConnectionRates, handshakes::HANDSHAKE_TIMEOUT,
            limits::Denied, proxies::Proxies,
        },
        boxed::Boxed,
        byte_counters::ByteCounters,
        identify::{Identified, Identify},
        multiaddr,
        observations::Observations,
        read_buffer::ReadBuffer,
        security::Security,
        tcp::Tcp,
    },
};
use crate::{
    address::{self, Known},
    behaviour::Behaviour,
    config::{Config, ConfigError},
    relay::quota::Busiest,
};

/// A whole relay: a swarm that listens, on async-std.
///
/// ```no_run
/// # async_std::task::block_on(async {
/// let keypair = libp2p::identity::Keypair::generate_ed25519();
/// let mut node = relaylet::Node::new(keypair, relaylet::Config::default())?;
/// node.listen_on("/ip4/127.0.0.1/tcp/4001".parse()?)?;
/// loop {
///     println!("{:?}", node.next().await);
/// }
/// # Ok::<_, Box<dyn std::error::Error>>(())
/// # });
/// ```
pub struct Node {
    swarm: Swarm<Boxed<Parts>>,
    counters: ByteCounters,
    proxies: Proxies,
    rates: ConnectionRates,
    multiplex: Multiplex,
    observations: Observations<ConnectionId>,
    certificate_not_after: Option<SystemTime>,
    #[cfg(feature = "websocket")]
    websocket: websocket::Control,
    /// The open listeners, and the address that each was opened with.
    listeners: Vec<(ListenerId, Multiaddr)>,
    /// Addresses of closed listeners, yet to be reported.
    not_listening: Vec<Multiaddr>,
    /// [`Config::max_circuits_per_peer`] at the start: the muxer's limits follow from it.
    circuits_per_peer: usize,
}

#[derive(NetworkBehaviour)]
struct Parts {
    // First, so that the other behaviours see no connection that it denies.
    relay: Admission,
    identify: Identify,
    #[cfg(feature = "autonat")]
    autonat: Toggle<Boxed<AutoNat>>,
    #[cfg(feature = "dht")]
    dht: Toggle<Boxed<Dht>>,
}

impl Node {
    /// A relay with the identity of `keypair` and the default [`Setup`].
    ///
    /// # Errors
    ///
    /// As [`Node::with_setup`].
    pub fn new(keypair: Keypair, config: Config) -> Result<Self> {
        Self::with_setup(keypair, config, Setup::default())
    }

    /// A relay with the identity of `keypair`.
    ///
    /// # Errors
    ///
    /// A [`ConfigError`] when the configuration or the setup is invalid; another error when the key cannot sign.
    pub fn with_setup(keypair: Keypair, mut config: Config, setup: Setup) -> Result<Self> {
        config.close_silent = true; // connections serve the relay alone
        let limits = setup.limits;
        let peer = keypair.public().to_peer_id();
        let circuits_per_peer = config.max_circuits_per_peer;

        // 1. The muxer.
        setup.streams.check(circuits_per_peer)?;
        let outbound = stream_limits::per_connection(circuits_per_peer)?;
        let inbound = setup.streams.max_streams_per_connection.unwrap_or(outbound);
        let budget = stream_limits::Budget { inbound, outbound };
        let multiplex = Multiplex::new(budget, setup.streams, circuits_per_peer);
        multiplex.memory.set_max_stall(config.silence);
        let shared = multiplex.clone();

        // 2. The transport: TCP, WebSocket over another TCP, the private network, the secure channel, the muxer.
        let counters = ByteCounters::default();
        let proxies = Proxies::new(limits.max_handshakes);
        let rates = ConnectionRates::new(&config, limits);
        let by_endpoint = counters.clone();
        let transport = Tcp::new(counters.clone(), proxies.clone(), rates.clone(), None);
        let transport = transport.map(move |stream, endpoint| {
            ReadBuffer::new(stream, by_endpoint.get(&endpoint).map(|it| it.progress))
        });
        #[cfg(feature = "websocket")]
        let (transport, control) = {
            let (counters, proxies, rates) = (counters.clone(), proxies.clone(), rates.clone());
            let websocket = WebSocket::new(counters, proxies, rates, limits.max_handshakes);
            let control = websocket.control.clone();
            (transport.or_transport(websocket), control)
        };
        let is_private = setup.is_private();
        #[cfg(feature = "pnet")]
        let transport =
            transport.and_then(move |stream, _| swarm_key::encrypt(setup.swarm_key, stream));
        let by_endpoint = counters.clone();
        let transport = transport
            .upgrade(Version::V1Lazy)
            .authenticate(Security::new(&keypair).context("the key cannot secure connections")?)
            .multiplex_ext(move |_, endpoint| {
                let pending = by_endpoint.get(endpoint).inspect(|it| it.progress.set_secured());
                let (activity, socket) =
                    pending.map(|it| (it.progress.activity, it.socket)).unzip();
                shared.of(endpoint.get_remote_address(), activity, socket.flatten())
            })
            .timeout(HANDSHAKE_TIMEOUT)
            .boxed();

        // 3. The behaviours.
        let identify = Identify::new(&keypair.public());
        let relay = Behaviour::new(keypair, config)?;
        let parts = Parts {
            identify,
            relay: Admission::new(limits, relay, counters.clone(), is_private),
            #[cfg(feature = "autonat")]
            autonat: None.into(),
            #[cfg(feature = "dht")]
            dht: None.into(),
        };

        // 4. The swarm.
        let swarm_config = match setup.one_thread {
            true => swarm::Config::without_executor(),
            false => swarm::Config::with_executor(|task| {
                async_std::task::spawn(task);
            }),
        };
        // Sends a request together with its protocol's name: saves a round trip and half of the packets.
        let swarm_config = swarm_config.with_substream_upgrade_protocol_override(Version::V1Lazy);
        let mut node = Self {
            swarm: Swarm::new(transport, Boxed(parts), peer, swarm_config),
            counters,
            proxies,
            rates,
            multiplex,
            observations: Observations::new(Instant::now()),
            certificate_not_after: None,
            #[cfg(feature = "websocket")]
            websocket: control,
            listeners: Vec::new(),
            not_listening: Vec::new(),
            circuits_per_peer,
        };
        let memory = node.multiplex.memory.clone();
        node.relay_mut().is_memory_scarce = Box::new(move |prefix| memory.is_scarce_for(prefix));
        node.update_addresses(true);
        Ok(node)
    }

    /// Replaces the relay's configuration while it runs: [`Behaviour::set_config`].
    ///
    /// # Errors
    ///
    /// When it is invalid, or raises [`Config::max_circuits_per_peer`] above its value at the start. The previous
    /// configuration stays in effect then.
    pub fn set_config(&mut self, config: Config) -> Result<(), ConfigError> {
        if config.max_circuits_per_peer > self.circuits_per_peer {
            let problem = format!(
                "the limits on streams were set for {} at the start; restart to raise it",
                self.circuits_per_peer
            );
            return Err(ConfigError::new("max_circuits_per_peer", problem));
        }
        let silence = config.silence;
        self.relay_mut().set_config(Config { close_silent: true, ..config })?;
        self.multiplex.memory.set_max_stall(silence);
        self.rates.configure(self.relay().config());
        self.update_addresses(true);
        Ok(())
    }

    /// Updates the addresses of the relay wherever they are used.
    ///
    /// The announced addresses, or else the confirmed ones, become the swarm's external addresses. Identify sends the
    /// announced ones, or else the confirmed and the listening ones; with `push` it pushes a change to all connected
    /// peers. A reservation contains them from its next renewal on.
    fn update_addresses(&mut self, push: bool) {
        let announced = self.relay().config().announce.clone();
        let listening: Vec<_> = self.swarm.listeners().cloned().collect();
        let confirmed = self.observations.confirmed();
        let wanted = if announced.is_empty() { confirmed } else { &announced };
        let external: Vec<_> = self.swarm.external_addresses().cloned().collect();
        for old in external.iter().filter(|address| !wanted.contains(address)) {
            self.swarm.remove_external_address(old);
        }
        for new in wanted.iter().filter(|address| !external.contains(address)) {
            self.swarm.add_external_address(new.clone());
        }

        let own = Known { announced: &announced, confirmed, listening: &listening, reported: None };
        let addresses = own.best_first().into_iter().cloned().collect();
        let peers = self.swarm.connected_peers().copied().collect();
        let identify = &mut self.swarm.behaviour_mut().0.identify;
        if identify.set_addresses(addresses) && push {
            identify.push(peers);
        }
    }

    /// Updates the relay's addresses if the confirmed ones have changed, and logs the change.
    fn update_confirmed(&mut self, now: Instant) {
        // A draining relay listens nowhere.
        let is_draining = self.relay().view().is_draining();
        let changed = if is_draining { Vec::new() } else { self.observations.update(now) };
        for own in changed {
            let how = match self.observations.confirmed().contains(&own) {
                true => "confirmed: peers of several networks reached the relay at",
                false => "no longer confirmed:",
            };
            log::info!("address {how} {own}");
            self.update_addresses(true);
        }
    }

    /// Replaces the subnets of the proxies in front of the relay.
    ///
    /// A connection from there has to begin with a PROXY protocol header, version 1 or 2, and counts towards the limits
    /// of the client that the header names; without a header it is closed. As many connections may wait for their
    /// headers as [`Setup::limits`] allows handshakes; those in their handshakes do not count.
    pub fn set_proxies(&mut self, subnets: Vec<IpNet>) {
        self.proxies.set(subnets);
    }

    /// Replaces the subnets of the reverse proxies in front of the relay's WebSocket listeners.
    ///
    /// A WebSocket from there counts towards the limits of the client that `Forwarded` or `X-Forwarded-For` names: the
    /// last hop that is in none of these subnets. Without such a header it counts towards those of the proxy's address.
    #[cfg(feature = "websocket")]
    pub fn set_forwarders(&mut self, subnets: Vec<IpNet>) {
        self.websocket.forwarders.set(subnets);
    }

    /// Replaces the certificate of `/tls/ws` for new connections. [`Node::listen_on`] accepts `/tls/ws` addresses only
    /// once there is one.
    #[cfg(feature = "websocket")]
    pub fn set_certificate(&mut self, certificate: Certificate) {
        self.certificate_not_after = Some(certificate.validity.not_after);
        self.websocket.set_certificate(&certificate);
    }

    /// When the certificate of `/tls/ws` expires; `None` if there is none.
    pub fn certificate_not_after(&self) -> Option<SystemTime> {
        self.certificate_not_after
    }

    /// Serves AutoNAT, versions 1 and 2, on new connections: tells clients whether they can be reached, by dialing
    /// them.
    ///
    /// Dials a client only at the IP address of its connection, and only if that is global or `private` is true, as in
    /// tests. Dials a client at most 12 times a minute, its address 120 times, its subnet 150 times, its IPv6 /32 300
    /// times, and all clients together 600 times.
    ///
    /// # Errors
    ///
    /// When the secure channels for dialing cannot be created.
    #[cfg(feature = "autonat")]
    pub fn serve_autonat(&mut self, private: bool) -> Result<()> {
        let autonat = AutoNat::new(private).context("AutoNAT cannot dial")?;
        self.swarm.behaviour_mut().0.autonat = Some(Boxed(autonat)).into();
        Ok(())
    }

    /// Joins a DHT as a server, so that clients find the relay in it. Call it before [`Node::listen_on`].
    #[cfg(feature = "dht")]
    pub fn join(&mut self, dht: dht::Config) {
        let protocol = dht.protocol.clone();
        let dht = Dht::new(self.peer_id(), dht);
        let parts = &mut self.swarm.behaviour_mut().0;
        parts.identify.set_dht(protocol);
        parts.dht = Some(Boxed(dht)).into();
    }

    /// The relay's peer id.
    pub fn peer_id(&self) -> PeerId {
        *self.swarm.local_peer_id()
    }

    /// The relay's behaviour.
    pub fn relay(&self) -> &Behaviour {
        &self.swarm.behaviour().0.relay.relay
    }

    /// The relay's behaviour, mutably. To replace its configuration use [`Node::set_config`].
    pub fn relay_mut(&mut self) -> &mut Behaviour {
        &mut self.swarm.behaviour_mut().0.relay.relay
    }

    /// How many bytes are buffered for streams.
    pub fn buffered(&self) -> Buffered {
        self.multiplex.memory.buffered()
    }

    /// The address that holds the most of each shared resource.
    pub(crate) fn busiest(&self) -> [(&'static str, Option<Busiest>); 6] {
        let relay = self.relay();
        let limits = &self.swarm.behaviour().0.relay.limits;
        [
            ("slots", relay.view().reservations.quota.busiest()),
            ("circuits", relay.view().circuits.quota.busiest()),
            ("connections", limits.quota.busiest()),
            ("handshakes", limits.handshakes.shared.busiest()),
            ("streams", self.multiplex.admission.busiest()),
            ("buffered bytes", self.multiplex.memory.busiest()),
        ]
    }

    /// The addresses that the relay listens on.
    pub fn listeners(&self) -> impl Iterator<Item = &Multiaddr> {
        self.swarm.listeners()
    }

    /// Listens on an address: `/ip4/…/tcp/…` or `/ip6/…/tcp/…`, followed by `/ws` or `/tls/ws` for WebSocket.
    ///
    /// Port 0 selects a free port; `0.0.0.0` and `::` select all addresses of the machine. A [`NodeEvent::Listening`]
    /// reports each address that results.
    ///
    /// # Errors
    ///
    /// When the address has another form, is `/tls/ws` without a certificate, or the socket cannot be bound.
    pub fn listen_on(&mut self, address: Multiaddr) -> io::Result<()> {
        let listening = self.swarm.listen_on(address.clone());
        let id = listening.map_err(|error| match error {
            TransportError::Other(error) => error,
            TransportError::MultiaddrNotSupported(address) => {
                let problem =
                    multiaddr::unsupported(&address, false).unwrap_or("address is not supported");
                io::Error::new(io::ErrorKind::Unsupported, problem)
            }
        })?;
        self.listeners.push((id, address));
        Ok(())
    }

    /// Stops listening, and closes all connections without a circuit within that time: [`Behaviour::drain`].
    pub fn drain(&mut self, over: Duration) {
        for (id, _) in &self.listeners {
            self.swarm.remove_listener(*id);
        }
        self.relay_mut().drain(over);
        self.set_draining(true);
    }

    /// Ends a [`Node::drain`]: listens on the same addresses again, and admits clients.
    ///
    /// # Errors
    ///
    /// When one of the addresses cannot be bound any more; the message begins with that address. The node keeps
    /// draining then.
    pub fn resume(&mut self) -> io::Result<()> {
        let closed = std::mem::take(&mut self.listeners);
        for (_, address) in &closed {
            if let Err(error) = self.listen_on(address.clone()) {
                let error = io::Error::new(error.kind(), format!("{address}: {error}"));
                for (id, _) in std::mem::replace(&mut self.listeners, closed) {
                    self.swarm.remove_listener(id);
                }
                return Err(error);
            }
        }
        self.relay_mut().resume();
        self.set_draining(false);
        Ok(())
    }

    /// Records the port that a listener was bound to, so that [`Node::resume`] binds the same one in place of port 0.
    fn record_port(&mut self, listener: ListenerId, bound: &Multiaddr) {
        let address = self.listeners.iter_mut().find(|(id, _)| *id == listener);
        if let Some((_, address)) = address
            && let Some((mut socket, _)) = multiaddr::listen_address(address)
            && let Some((bound, _)) = multiaddr::listen_address(bound)
        {
            socket.set_port(bound.port());
            *address = multiaddr::with_layers_of(address, socket);
        }
    }

    /// Tells the WebSocket listeners and the DHT whether the relay drains.
    #[allow(unused_variables, reason = "they may not be built in")]
    fn set_draining(&mut self, is_draining: bool) {
        #[cfg(feature = "websocket")]
        self.websocket.is_draining.store(is_draining, Ordering::Relaxed);
        #[cfg(feature = "dht")]
        if let Some(dht) = self.swarm.behaviour_mut().0.dht.as_mut() {
            dht.0.set_paused(is_draining);
        }
    }

    /// How many connections are up.
    pub fn connections(&self) -> usize {
        self.swarm.network_info().connection_counters().num_established() as usize
    }

    /// Runs the relay until its next event.
    pub async fn next(&mut self) -> NodeEvent {
        loop {
            if let Some(address) = self.not_listening.pop() {
                return NodeEvent::NotListening(address);
            }
            let event = self.swarm.select_next_some().await;
            let event = self.on_event(event);
            self.update_confirmed(Instant::now());
            if let Some(event) = event {
                return event;
            }
        }
    }

    fn on_event(&mut self, event: SwarmEvent<PartsEvent>) -> Option<NodeEvent> {
        match event {
            SwarmEvent::Behaviour(PartsEvent::Relay(it)) => return Some(NodeEvent::Relay(it)),
            SwarmEvent::Behaviour(PartsEvent::Identify(message)) => self.on_identified(message),
            // Pushes only global addresses: those of the machine's containers change often, and clients cannot dial
            // them.
            SwarmEvent::NewListenAddr { address, listener_id } => {
                self.record_port(listener_id, &address);
                self.update_addresses(address::is_global(&address));
                return Some(NodeEvent::Listening(address));
            }
            SwarmEvent::ExpiredListenAddr { address, .. } => {
                self.update_addresses(address::is_global(&address));
                return Some(NodeEvent::NotListening(address));
            }
            SwarmEvent::ListenerClosed { addresses, .. } => {
                self.update_addresses(false);
                self.not_listening.extend(addresses);
            }
            SwarmEvent::ListenerError { error, .. } => {
                log::error!("accepting connections failed, trying again: {error}");
            }
            SwarmEvent::IncomingConnectionError { send_back_addr: address, error, .. } => {
                if let Some(reason) = Denied::of(&error) {
                    log::debug!("connection denied: {address}: {reason}");
                    return Some(NodeEvent::ConnectionDenied { address, reason });
                }
                let failure = self.swarm.behaviour_mut().0.relay.failed.take();
                let error = anyhow::Error::from(error); // {:#} shows its sources
                log::debug!("connection failed: {address}: {error:#}");
                return failure.map(|failure| NodeEvent::HandshakeFailed { address, failure });
            }
            SwarmEvent::ConnectionEstablished { peer_id, connection_id, endpoint, .. } => {
                if let Some(activity) = self.counters.take(&endpoint) {
                    self.relay_mut().track(connection_id, activity);
                }
                let address = endpoint.get_remote_address();
                log::debug!("connection {connection_id} opened: peer {peer_id} at {address}");
            }
            SwarmEvent::ConnectionClosed { peer_id, connection_id, endpoint, cause, .. } => {
                self.observations.on_connection_closed(connection_id, Instant::now());
                let by_relay = self.swarm.behaviour_mut().0.relay.closed.take();
                let (event, why) = NodeEvent::closed(&endpoint, by_relay, cause.as_ref());
                log::debug!("connection {connection_id} closed: peer {peer_id}: {why}");
                return Some(event);
            }
            _ => {}
        }
        None
    }

    /// Handles a peer's identify message: whether it serves the DHT, and the address at which it reached the relay.
    fn on_identified(&mut self, identified: Identified) {
        let Identified { connection, info, .. } = identified;
        #[cfg(feature = "dht")]
        if let Some(serves) = info.supports_dht
            && let Some(dht) = self.swarm.behaviour_mut().0.dht.as_mut()
        {
            dht.0.on_identified(identified.peer, serves, &info.listening);
        }
        let Some(observed) = info.observed else { return };
        let (peer, now) = (self.peer_id(), Instant::now());
        let relay = &self.swarm.behaviour().0.relay.relay;
        if let Some(up) = relay.view().connections.get(connection) {
            let listening = self.swarm.listeners();
            self.observations.add(connection, &up.origin, &observed, peer, listening, now);
        }
        self.relay_mut().set_reported_address(connection, observed);
    }
}

#[cfg(test)]
mod tests {
    use async_std::task::block_on;
    use libp2p::swarm::{THandler, THandlerOutEvent};

    use super::*;

    /// A connection is an enum over both transports; WebSocket must not make a TCP connection larger.
    #[cfg(feature = "websocket")]
    #[test]
    fn a_connection_over_tcp_is_as_small_as_without_websocket() {
        use libp2p::futures::future::Either;

        type Plain = ReadBuffer<<Tcp as Transport>::Output>;
        type OverWebSocket = <WebSocket as Transport>::Output;
        assert_eq!(size_of::<Either<Plain, OverWebSocket>>(), size_of::<Plain>());
    }

    /// A node that has listened on this address, and drains.
    fn draining() -> (Node, Multiaddr) {
        let mut node = Node::new(Keypair::generate_ed25519(), Config::default()).unwrap();
        node.listen_on("/ip4/127.0.0.1/tcp/0".parse().unwrap()).unwrap();
        let NodeEvent::Listening(address) = block_on(node.next()) else { panic!("no address") };
        node.drain(Duration::from_secs(60));
        (node, address)
    }

    #[test]
    fn a_node_that_drains_reports_that_it_listens_no_longer() {
        let (mut node, address) = draining();
        let event = block_on(node.next());
        assert!(matches!(&event, NodeEvent::NotListening(it) if *it == address), "{event:?}");
    }

    #[test]
    fn a_node_whose_address_is_taken_names_it_and_keeps_draining() {
        let (mut node, address) = draining();
        let (socket, _) = multiaddr::listen_address(&address).unwrap();
        let _other = std::net::TcpListener::bind(socket).unwrap();
        let error = node.resume().unwrap_err().to_string();
        assert!(error.starts_with(&format!("{address}: ")), "{error}");
        assert!(node.relay().view().is_draining());
    }

    #[test]
    fn an_address_that_may_have_more_slots_since_a_reload_may_open_more_connections_at_once() {
        let config = |slots| Config { max_reservations_per_ip: Some(slots), ..Config::default() };
        let mut node = Node::new(Keypair::generate_ed25519(), config(8)).unwrap();
        let at_once = |node: &Node, host: u8| {
            let (ip, now) = ([192, 0, 2, host].into(), Instant::now());
            let delays = (0..1000).map(|_| node.rates.delay(ip, 0, now));
            delays.filter(|delay| *delay == Some(Duration::ZERO)).count()
        };
        assert_eq!(at_once(&node, 1), 16);
        node.set_config(config(64)).unwrap();
        assert_eq!(at_once(&node, 2), 128);
    }

    /// The handlers of all behaviours take one allocation per connection.
    #[test]
    fn the_handlers_of_a_connection_are_small() {
        let identify = size_of::<THandler<Identify>>();
        let pointer = size_of::<usize>();
        let autonat = if cfg!(feature = "autonat") { pointer } else { 0 };
        let dht = if cfg!(feature = "dht") { pointer } else { 0 };
        assert!(size_of::<THandler<Parts>>() <= identify + 416 + autonat + dht);
        assert_eq!(size_of::<THandler<Boxed<Parts>>>(), pointer);
        assert_eq!(size_of::<THandlerOutEvent<Boxed<Parts>>>(), pointer);
        assert!(identify <= 152, "{identify}");
    }
}
