//! The relay as a whole swarm: TCP and WebSocket, the secure channels, yamux, identify, connection limits.

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
    swarm::{self, ConnectionId, ListenError, NetworkBehaviour, SwarmEvent},
};

#[cfg(feature = "autonat")]
use super::autonat::AutoNat;
#[cfg(feature = "dht")]
use super::dht::{self, Dht};
#[cfg(feature = "pnet")]
use super::net::swarm_key::{self, PreSharedKey};
#[cfg(feature = "websocket")]
use super::net::{
    joined::Joined,
    websocket::{Presented, UntilEnd, WebSocket, certificate::Certificate},
};
use super::{
    mux::{
        budget::Buffered,
        muxer::{self, Multiplex},
        stream_limits::{self, StreamLimits},
    },
    net::{
        admission::{
            arrivals::Arrivals,
            door::Door,
            handshakes::MUXED,
            limits::{Denied, Limits},
            proxies::Proxies,
        },
        boxed::Boxed,
        identify::{Identified, Identify},
        multiaddr,
        observed::Observed,
        read_ahead::ReadAhead,
        security::Security,
        tcp::Tcp,
        traffic::Traffic,
    },
};
use crate::{
    address::{self, Known},
    behaviour::Behaviour,
    config::{Config, ConfigError},
    event::Event,
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
    traffic: Traffic,
    proxies: Proxies,
    multiplex: Multiplex,
    observed: Observed<ConnectionId>,
    certificate_not_after: Option<SystemTime>,
    #[cfg(feature = "websocket")]
    presented: Presented,
    /// What it listens on, as it was asked to.
    listeners: Vec<(ListenerId, Multiaddr)>,
    /// How many circuits of a peer the connections are made for.
    circuits_per_peer: usize,
}

/// What a [`Node`] is made with beside its configuration, and keeps to its end.
#[derive(Clone, Debug, Default)]
pub struct Setup {
    /// The limits on connections.
    pub limits: Limits,
    /// The limits on streams, and on what waits on them.
    pub streams: StreamLimits,
    /// Whether connections are polled with the node, by whoever polls that: cheaper, and never on
    /// more than one core at a time. Else each is a task of async-std's.
    pub one_thread: bool,
    /// The key of the private network that it is in: [`swarm_key::load`]. Without one it is in none.
    #[cfg(feature = "pnet")]
    pub swarm_key: Option<PreSharedKey>,
}

/// What happened at a [`Node`].
#[derive(Debug)]
#[non_exhaustive]
pub enum NodeEvent {
    /// It can be reached at this address.
    Listening(Multiaddr),
    /// It can be reached at this address no longer.
    NotListening(Multiaddr),
    /// A connection was turned away, because as many are open as may be.
    ConnectionDenied {
        /// Where it came from.
        address: Multiaddr,
        /// Which limit was reached.
        reason: Denied,
    },
    /// A connection is gone.
    ConnectionClosed,
    /// Something happened at the relay.
    Relay(Event),
}

#[derive(NetworkBehaviour)]
struct Parts {
    // First, so that it turns a connection away before anyone else hears of it.
    relay: Door,
    identify: Identify,
    #[cfg(feature = "autonat")]
    autonat: Toggle<AutoNat>,
    #[cfg(feature = "dht")]
    dht: Toggle<Boxed<Dht>>,
}

impl Node {
    /// A relay under the identity of `keypair`, with the default [`Setup`].
    ///
    /// libp2p's TLS writes the secrets of each session to the file that the environment variable
    /// `SSLKEYLOGFILE` names. The program never starts with that variable; other programs should not either.
    ///
    /// # Errors
    ///
    /// As [`Node::with_setup`].
    pub fn new(keypair: Keypair, config: Config) -> Result<Self> {
        Self::with_setup(keypair, config, Setup::default())
    }

    /// A relay under the identity of `keypair`.
    ///
    /// # Errors
    ///
    /// A [`ConfigError`] when the configuration or the setup makes no sense; another when the key is of no use.
    pub fn with_setup(keypair: Keypair, config: Config, setup: Setup) -> Result<Self> {
        let limits = setup.limits;
        let peer = keypair.public().to_peer_id();
        let circuits_per_peer = config.max_circuits_per_peer;
        setup.streams.check(circuits_per_peer)?;
        let outbound = stream_limits::per_connection(circuits_per_peer)?;
        let inbound = setup.streams.max_streams_per_connection.unwrap_or(outbound);
        let budget = muxer::Budget { inbound, outbound };
        let multiplex = Multiplex::new(budget, setup.streams, circuits_per_peer);
        multiplex.max_stall().set(config.silence);
        let all = multiplex.clone();
        let traffic = Traffic::default();
        let proxies = Proxies::new(limits.max_handshakes);
        let arrivals = Arrivals::new(&config, &limits);
        let tcp = || {
            let tcp = Tcp::new(traffic.clone(), proxies.clone(), arrivals.clone());
            tcp.map(|stream, _| ReadAhead::new(stream))
        };
        let transport = tcp();
        #[cfg(feature = "websocket")]
        let presented = Presented::default();
        #[cfg(feature = "websocket")]
        let transport = {
            let tcp = tcp().map(|stream, _| Joined::new(stream));
            let websocket = WebSocket::over(tcp, presented.clone());
            transport.or_transport(websocket.map(|stream, _| UntilEnd::new(stream)))
        };
        #[cfg(feature = "pnet")]
        let transport =
            transport.and_then(move |stream, _| swarm_key::enter(setup.swarm_key, stream));
        let counters = traffic.clone();
        let transport = transport
            .upgrade(Version::V1Lazy)
            .authenticate(Security::new(&keypair).context("the key cannot secure connections")?)
            .multiplex_ext(move |_, to| {
                let pending = counters.look_up(to);
                let (signs, socket) =
                    pending.map(|it| (it.progress.secured().signs, it.socket)).unzip();
                multiplex.of(to.get_remote_address(), signs, socket.flatten())
            })
            .timeout(MUXED)
            .boxed();

        let parts = Parts {
            identify: Identify::new(&keypair.public()),
            relay: Door::new(limits, Behaviour::new(keypair, config)?, traffic.clone()),
            #[cfg(feature = "autonat")]
            autonat: None.into(),
            #[cfg(feature = "dht")]
            dht: None.into(),
        };
        let swarm_config = match setup.one_thread {
            true => swarm::Config::without_executor(),
            false => swarm::Config::with_executor(|task| {
                async_std::task::spawn(task);
            }),
        };
        let swarm_config = swarm_config
            // A question goes out together with the name of its protocol: a round trip less, and half
            // as many packets.
            .with_substream_upgrade_protocol_override(Version::V1Lazy);
        let mut node = Self {
            swarm: Swarm::new(transport, Boxed::new(parts), peer, swarm_config),
            traffic,
            proxies,
            multiplex: all,
            observed: Observed::new(Instant::now()),
            certificate_not_after: None,
            #[cfg(feature = "websocket")]
            presented,
            listeners: Vec::new(),
            circuits_per_peer,
        };
        let memory = node.multiplex.memory();
        node.relay_mut().watch_memory(move || memory.is_scarce());
        node.tell_addresses(true);
        Ok(node)
    }

    /// Replaces the relay's configuration while it runs: [`Behaviour::set_config`].
    ///
    /// # Errors
    ///
    /// When it makes no sense, or raises [`Config::max_circuits_per_peer`] above what the node was
    /// started with. Nothing has changed then.
    pub fn set_config(&mut self, config: Config) -> Result<(), ConfigError> {
        if config.max_circuits_per_peer > self.circuits_per_peer {
            let problem = format!(
                "connections are made for {} since the start; restart to raise it",
                self.circuits_per_peer
            );
            return Err(ConfigError::new("max_circuits_per_peer", problem));
        }
        let silence = config.silence;
        self.relay_mut().set_config(config)?;
        self.multiplex.max_stall().set(silence);
        self.tell_addresses(true);
        Ok(())
    }

    /// Makes the announced addresses, or else the confirmed ones, the swarm's external addresses, and
    /// has identify tell peers the announced ones, or else the confirmed and the listening ones. With
    /// `push`, pushes them to all connected peers if they have changed; a reservation has them from its
    /// next renewal on.
    fn tell_addresses(&mut self, push: bool) {
        let announced = self.relay().config().announce.clone();
        let listening: Vec<_> = self.swarm.listeners().cloned().collect();
        let confirmed = self.observed.believed();
        let wanted = if announced.is_empty() { confirmed } else { &announced };
        let told: Vec<_> = self.swarm.external_addresses().cloned().collect();
        for gone in told.iter().filter(|address| !wanted.contains(address)) {
            self.swarm.remove_external_address(gone);
        }
        for come in wanted.iter().filter(|address| !told.contains(address)) {
            self.swarm.add_external_address(come.clone());
        }

        let known =
            Known { announced: &announced, confirmed, listening: &listening, reported: None };
        let addresses = known.best_first().into_iter().cloned().collect();
        let peers = self.swarm.connected_peers().copied().collect();
        let identify = &mut self.swarm.behaviour_mut().identify;
        if identify.set_addresses(addresses) && push {
            identify.push(peers);
        }
    }

    /// Whether peers agree on another address than before, and what follows.
    fn look_at_observed(&mut self, now: Instant) {
        // While it drains it listens nowhere, and nobody is to come.
        if self.relay().is_draining() || !self.observed.look(now) {
            return;
        }
        for address in self.observed.believed() {
            log::info!("peers of several networks reached it at {address}");
        }
        self.tell_addresses(true);
    }

    /// The subnets of the proxies in front of the relay, instead of those named before.
    ///
    /// A connection from there begins with a PROXY protocol header, version 1 or 2, and counts as
    /// the client's that the header names; without one it is closed. At most
    /// [`Limits::max_handshakes`] wait for theirs, beside those in their handshakes.
    pub fn set_proxies(&mut self, subnets: Vec<IpNet>) {
        self.proxies.set(subnets);
    }

    /// The certificate that connections to `/tls/ws` see from now on; those that are open stay.
    ///
    /// Without one [`Node::listen_on`] takes no such address.
    #[cfg(feature = "websocket")]
    pub fn set_certificate(&mut self, certificate: Certificate) {
        self.certificate_not_after = Some(certificate.validity().not_after);
        self.presented.set(certificate);
    }

    /// When the certificate expires that connections to `/tls/ws` see.
    pub fn certificate_not_after(&self) -> Option<SystemTime> {
        self.certificate_not_after
    }

    /// Tells clients whether they can be reached from outside, by dialing them: AutoNAT, versions 1
    /// and 2. It holds for connections to come.
    ///
    /// A client is dialed at the IP address that its connection comes from and at no other, 12 times
    /// a minute at most, its address 120 times, and all clients together 600 times; and only where
    /// that address is global, unless `private` says otherwise, as tests do.
    ///
    /// # Errors
    ///
    /// When the secure channels for it cannot be made.
    #[cfg(feature = "autonat")]
    pub fn serve_autonat(&mut self, private: bool) -> Result<()> {
        let autonat = AutoNat::new(private).context("AutoNAT cannot dial")?;
        self.swarm.behaviour_mut().autonat = Some(autonat).into();
        Ok(())
    }

    /// Joins a DHT as a server, so that those who walk it find the relay. To be called before
    /// [`Node::listen_on`].
    #[cfg(feature = "dht")]
    pub fn join(&mut self, dht: dht::Config) {
        let dht = Dht::new(self.peer_id(), dht);
        let parts = self.swarm.behaviour_mut();
        parts.identify.set_dht(dht.protocol().clone());
        parts.dht = Some(Boxed::new(dht)).into();
    }

    /// Who the relay is.
    pub fn peer_id(&self) -> PeerId {
        *self.swarm.local_peer_id()
    }

    /// The relay's behaviour.
    pub fn relay(&self) -> &Behaviour {
        &self.swarm.behaviour().relay.relay
    }

    /// The relay's behaviour, to give orders to; but see [`Node::set_config`].
    pub fn relay_mut(&mut self) -> &mut Behaviour {
        &mut self.swarm.behaviour_mut().relay.relay
    }

    /// What waits in it to be read by a peer, or to be taken by one.
    pub fn buffered(&self) -> Buffered {
        self.multiplex.memory().buffered()
    }

    /// The address that holds the most of each resource that all share.
    pub(crate) fn busiest(&self) -> [(&'static str, Option<Busiest>); 5] {
        let (relay, [connections, handshakes]) =
            (self.relay(), self.swarm.behaviour().relay.busiest());
        [
            ("slots", relay.reservations().quota().busiest()),
            ("circuits", relay.circuits().quota().busiest()),
            ("connections", connections),
            ("handshakes", handshakes),
            ("streams", self.multiplex.commons().busiest()),
        ]
    }

    /// The addresses it can be reached at.
    pub fn listeners(&self) -> impl Iterator<Item = &Multiaddr> {
        self.swarm.listeners()
    }

    /// Listens on an address: `/ip4/…/tcp/…` or `/ip6/…/tcp/…`, with `/ws` or `/tls/ws` behind it
    /// for WebSocket.
    ///
    /// Port 0 stands for any free one, `0.0.0.0` and `::` for all addresses of the machine; what
    /// comes of it is told as [`NodeEvent::Listening`].
    ///
    /// # Errors
    ///
    /// When the socket cannot be bound, or the address is no such address; and when it is `/tls/ws`,
    /// and there is no certificate.
    pub fn listen_on(&mut self, address: Multiaddr) -> io::Result<()> {
        match self.swarm.listen_on(address.clone()) {
            Ok(id) => {
                self.listeners.push((id, address));
                Ok(())
            }
            Err(TransportError::Other(error)) => Err(error),
            Err(TransportError::MultiaddrNotSupported(address)) => {
                let problem = multiaddr::unsupported(&address, false).unwrap_or("no such address");
                Err(io::Error::new(io::ErrorKind::Unsupported, problem))
            }
        }
    }

    /// Stops listening, and lets go of everyone: [`Behaviour::drain`].
    pub fn drain(&mut self, over: Duration) {
        for (id, _) in &self.listeners {
            self.swarm.remove_listener(*id);
        }
        self.relay_mut().drain(over);
        #[cfg(feature = "dht")]
        self.rest(true);
    }

    /// Listens again where it did before [`Node::drain`], and takes clients in.
    ///
    /// # Errors
    ///
    /// When it cannot listen there any more: then it goes on draining.
    pub fn resume(&mut self) -> io::Result<()> {
        let before = std::mem::take(&mut self.listeners);
        for (_, address) in &before {
            if let Err(error) = self.listen_on(address.clone()) {
                for (id, _) in std::mem::replace(&mut self.listeners, before) {
                    self.swarm.remove_listener(id);
                }
                return Err(error);
            }
        }
        self.relay_mut().resume();
        #[cfg(feature = "dht")]
        self.rest(false);
        Ok(())
    }

    /// After a drain it listens on the same port again, also where that was any free one.
    fn keep_port(&mut self, listener: ListenerId, bound: &Multiaddr) {
        let asked = self.listeners.iter_mut().find(|(id, _)| *id == listener);
        if let Some((_, asked)) = asked
            && let Some((socket, _)) = multiaddr::listen_address(bound)
        {
            *asked = multiaddr::with_port(asked, socket.port());
        }
    }

    #[cfg(feature = "dht")]
    fn rest(&mut self, resting: bool) {
        if let Some(dht) = self.swarm.behaviour_mut().dht.as_mut() {
            dht.rest(resting);
        }
    }

    /// How many connections are up.
    pub fn connections(&self) -> usize {
        let counters = self.swarm.network_info();
        counters.connection_counters().num_established() as usize
    }

    /// Runs the relay until something happens that its owner may want to know.
    pub async fn next(&mut self) -> NodeEvent {
        loop {
            let event = self.swarm.select_next_some().await;
            let told = self.handle(event);
            self.look_at_observed(Instant::now());
            if let Some(event) = told {
                return event;
            }
        }
    }

    fn handle(&mut self, event: SwarmEvent<PartsEvent>) -> Option<NodeEvent> {
        match event {
            SwarmEvent::Behaviour(PartsEvent::Relay(event)) => {
                return Some(NodeEvent::Relay(event));
            }
            SwarmEvent::Behaviour(PartsEvent::Identify(identified)) => {
                self.on_identified(identified);
            }
            // The addresses of the machine's containers come and go, and are of no use to a client:
            // not worth waking every phone.
            SwarmEvent::NewListenAddr { address, listener_id } => {
                self.keep_port(listener_id, &address);
                self.tell_addresses(address::is_global(&address));
                return Some(NodeEvent::Listening(address));
            }
            SwarmEvent::ExpiredListenAddr { address, .. } => {
                self.tell_addresses(address::is_global(&address));
                return Some(NodeEvent::NotListening(address));
            }
            SwarmEvent::ListenerClosed { addresses, .. } => {
                self.tell_addresses(false);
                for address in addresses {
                    log::info!("no longer listening on {address}");
                }
            }
            SwarmEvent::ListenerError { error, .. } => {
                log::error!("connections cannot be accepted, trying again: {error}");
            }
            SwarmEvent::IncomingConnectionError { send_back_addr: address, error, .. } => {
                if let Some(reason) = denied(&error) {
                    log::debug!("connection denied: {address}: {reason}");
                    return Some(NodeEvent::ConnectionDenied { address, reason });
                }
                let error = anyhow::Error::from(error); // it shows its causes
                log::debug!("connection failed: {address}: {error:#}");
            }
            SwarmEvent::ConnectionEstablished { peer_id, connection_id, endpoint, .. } => {
                if let Some(signs) = self.traffic.claim(&endpoint) {
                    self.relay_mut().listen_to(connection_id, signs);
                }
                let address = endpoint.get_remote_address();
                log::debug!("connection {connection_id} opened: peer {peer_id} at {address}");
            }
            SwarmEvent::ConnectionClosed { peer_id, connection_id, endpoint, cause, .. } => {
                let from = endpoint.get_remote_address();
                self.observed.closed(connection_id, from, Instant::now());
                let cause = cause.map_or("closed by the relay".into(), |cause| cause.to_string());
                log::debug!("connection {connection_id} closed: peer {peer_id}: {cause}");
                return Some(NodeEvent::ConnectionClosed);
            }
            _ => {}
        }
        None
    }

    /// Handles a peer's identify message.
    fn on_identified(&mut self, identified: Identified) {
        let Identified { connection, info, .. } = identified;
        #[cfg(feature = "dht")]
        if let Some(serves) = info.supports_dht
            && let Some(dht) = self.swarm.behaviour_mut().dht.as_mut()
        {
            dht.hear(identified.peer, serves, &info.listening);
        }
        if let Some(observed) = info.observed {
            self.reported(connection, observed);
        }
    }

    /// A peer says under which address it reached the relay.
    fn reported(&mut self, connection: ConnectionId, address: Multiaddr) {
        let (peer, now) = (self.peer_id(), Instant::now());
        let relay = &self.swarm.behaviour().relay.relay;
        if let Some(up) = relay.connections().get(connection) {
            let listening = self.swarm.listeners();
            self.observed.say(connection, &up.origin, &address, peer, listening, now);
        }
        self.relay_mut().reported(connection, address);
    }
}

/// Why we denied the connection, if we did.
fn denied(error: &ListenError) -> Option<Denied> {
    match error {
        ListenError::Denied { cause } => cause.downcast_ref().copied(),
        ListenError::Transport(TransportError::Other(error)) => Denied::behind(error).copied(),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use libp2p::swarm::{THandler, THandlerOutEvent};

    use super::*;

    /// What a plain connection carries around for there being others.
    #[cfg(feature = "websocket")]
    #[test]
    fn a_connection_over_tcp_is_as_small_as_without_websocket() {
        use libp2p::{
            core::{ConnectedPoint, transport::map::Map},
            futures::future::Either,
        };

        type Socket = <Tcp as Transport>::Output;
        type Plain = ReadAhead<Socket>;
        type Below = Map<Tcp, fn(Socket, ConnectedPoint) -> Joined<Plain>>;
        type OverWebSocket = UntilEnd<<WebSocket<Below> as Transport>::Output>;
        assert_eq!(size_of::<Either<Plain, OverWebSocket>>(), size_of::<Plain>());
    }

    /// A connection has it once, on the heap.
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
