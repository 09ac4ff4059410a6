//! The swarm's view of the relay: events in, actions out.
//!
//! Hands what happens on the swarm's connections to [`crate::relay`], and carries out what that
//! decides. It decides nothing itself; it has the clock, the key that signs vouchers, and knows the
//! addresses that clients are told.

pub(crate) mod buffer;
mod circuit;
mod handler;
mod hop;
pub(crate) mod inbound;
mod messages;
mod ping;
mod share;
mod stop;
mod timer;
mod voucher;

use std::{
    collections::HashMap,
    convert::Infallible,
    hash::{BuildHasher, RandomState},
    sync::PoisonError,
    task::{Context, Poll},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use futures_timer::Delay;
use libp2p::{
    Multiaddr, PeerId,
    core::{ConnectedPoint, Endpoint, transport::PortUse},
    futures::{FutureExt, StreamExt, channel::mpsc},
    identity::{Keypair, SigningError},
    swarm::{
        CloseConnection, ConnectionClosed, ConnectionDenied, ConnectionId, DialFailure, FromSwarm,
        ListenFailure, NetworkBehaviour, ToSwarm,
        behaviour::{ConnectionEstablished, ExternalAddresses, ListenAddresses},
    },
};

use self::{
    handler::Handler,
    messages::{
        Answer, Events, HandlerCommand, HandlerEvent, Opening, Outbound, Reply, Report, StopRequest,
    },
};
use crate::{
    access::{Access, Terms},
    activity::Signs,
    address::{self, ClientPrefix, Known},
    config::{Config, ConfigError},
    event::{CircuitEnd, Event, StopFailed},
    relay::{
        Action, PendingConnect, Relay,
        accounts::Accounts,
        circuits::{Circuits, End},
        connections::{Connection, Connections, Origin},
        reservations::Reservations,
    },
    wire,
};

/// The longest reported address that is kept for a connection, in bytes.
const MAX_REPORTED: usize = 256;

/// The relay as a [`NetworkBehaviour`], for a swarm on any executor.
///
/// It takes the place of `libp2p::relay::Behaviour`; see [`Config`] and [`Event`] for what became
/// of that one's settings and events.
pub struct Behaviour {
    keypair: Keypair,
    peer: PeerId,
    relay: Relay<ConnectionId, Reply>,
    confirmed: ExternalAddresses,
    listening: ListenAddresses,
    /// To the handlers, and where each counts what is heard until its connection is up.
    handlers: HashMap<ConnectionId, (mpsc::UnboundedSender<HandlerCommand>, Option<Signs>)>,
    /// From the tasks of all connections.
    events: (Events, mpsc::UnboundedReceiver<HandlerEvent>),
    random: RandomState,
    next_sweep: Delay,
    /// What that is set to.
    sweep_due: Instant,
    upkeep: Upkeep,
    /// Whether memory for the bytes in circuits is scarce.
    is_memory_scarce: Box<dyn Fn() -> bool + Send>,
}

/// What a relay did of its own accord since it started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Upkeep {
    /// How often it asked a peer for a sign of life. Those that gave none are
    /// [`Event::PeerSilent`].
    pub questions: u64,
    /// How often it looked at its tables.
    pub sweeps: u64,
    /// How long that took, all sweeps together.
    pub swept_for: Duration,
}

impl Behaviour {
    /// A relay of the swarm that owns `keypair`, which signs the vouchers.
    ///
    /// # Errors
    ///
    /// When the configuration makes no sense: [`Config::validate`], or an announced address that
    /// names another peer.
    pub fn new(keypair: Keypair, config: Config) -> Result<Self, ConfigError> {
        let peer = keypair.public().to_peer_id();
        are_of(peer, &config.announce)?;
        let interval = config.sweep;
        let relay = Relay::new(config, Instant::now())?;
        Ok(Self {
            keypair,
            peer,
            sweep_due: relay.sweep_due(),
            relay,
            confirmed: ExternalAddresses::default(),
            listening: ListenAddresses::default(),
            handlers: HashMap::new(),
            events: mpsc::unbounded(),
            random: RandomState::new(),
            next_sweep: Delay::new(interval),
            upkeep: Upkeep::default(),
            is_memory_scarce: Box::new(|| false),
        })
    }

    /// The configuration that holds.
    pub fn config(&self) -> &Config {
        self.relay.config()
    }

    /// Replaces the configuration while the relay runs. See [`Config`] for what holds from when.
    ///
    /// A lowered cap drops nobody who is live: nobody is admitted until there is room. Whoever the
    /// rules no longer let in loses its slot and its circuits at once.
    ///
    /// # Errors
    ///
    /// As [`Behaviour::new`]. Nothing has changed then.
    pub fn set_config(&mut self, config: Config) -> Result<(), ConfigError> {
        are_of(self.peer, &config.announce)?;
        self.relay.set_config(config, Instant::now())
    }

    /// Lets `access` decide who may use the relay, instead of the lists in [`Config::access`].
    pub fn set_access(&mut self, access: impl Access + 'static) {
        self.relay.set_access(Box::new(access), Instant::now());
    }

    /// Asks again of everyone who holds a slot, waits for one or is part of a circuit, and ends
    /// what is no longer allowed. To be called when [`Access`] would answer otherwise than before.
    pub fn access_changed(&mut self) {
        self.relay.access_changed(Instant::now());
    }

    /// The table of reservations, to look at.
    pub fn reservations(&self) -> &Reservations<ConnectionId> {
        self.relay.reservations()
    }

    /// The table of circuits, to look at.
    pub fn circuits(&self) -> &Circuits<ConnectionId, PendingConnect<ConnectionId, Reply>> {
        self.relay.circuits()
    }

    /// The connections that are up, to look at.
    pub fn connections(&self) -> &Connections<ConnectionId> {
        self.relay.connections()
    }

    /// What the relay did of its own accord since it started.
    pub fn upkeep(&self) -> Upkeep {
        Upkeep { questions: self.relay.probes(), ..self.upkeep }
    }

    /// What circuits carried, to look at: for each peer while it is connected, and in all since the
    /// start. [`Event::CircuitClosed`] says the same of each circuit.
    pub fn accounts(&self) -> &Accounts {
        self.relay.accounts()
    }

    /// Says under which address the peer at the other end of this connection reached the relay.
    ///
    /// That is what identify reports as `observed_addr`. It goes into reservations that are made
    /// over this connection, and into no others. Without it a relay behind NAT, none of whose
    /// addresses is announced or confirmed, has only local ones to tell.
    pub fn reported(&mut self, connection: ConnectionId, address: Multiaddr) {
        if address.len() <= MAX_REPORTED {
            self.relay.reported(connection, address);
        }
    }

    /// Says that something was heard from `peer`, on whatever protocol: it is alive.
    ///
    /// By itself the behaviour hears hop, stop, circuit and ping streams only.
    pub fn heard(&mut self, peer: PeerId) {
        self.relay.heard(peer, Instant::now());
    }

    /// Counts `signs` as signs of life on this connection, from the next sweep on.
    ///
    /// Beside what the behaviour hears by itself; a further call puts others in their place.
    ///
    /// For whoever can count more cheaply than call [`Behaviour::heard`]: a transport, say.
    pub fn listen_to(&mut self, connection: ConnectionId, signs: Signs) {
        self.relay.listen_to(connection, signs);
    }

    /// Gives up `peer`'s slot and ends its circuits, now. Whether it held a slot.
    ///
    /// Its connections stay up: to close them is the swarm's affair.
    pub fn release(&mut self, peer: PeerId) -> bool {
        self.relay.release(peer, Instant::now())
    }

    /// Closes that connection of `peer` but `but` on which nothing was heard for the longest; its
    /// slot moves to another of its connections.
    pub fn close_longest_silent_of(&mut self, peer: PeerId, but: ConnectionId) {
        self.relay.close_longest_silent_of(peer, but, Instant::now());
    }

    /// The connections over which neither slot nor circuit goes, of peers that hold no slot, with their
    /// clients' prefixes and since when they are idle; in no order.
    pub fn idle_strangers(
        &self,
    ) -> impl Iterator<Item = (End<ConnectionId>, Option<ClientPrefix>, Instant)> {
        self.relay.idle_strangers()
    }

    /// Closes one of those, to make room for another.
    pub fn close_stranger(&mut self, stranger: End<ConnectionId>) {
        self.relay.close_stranger(stranger);
    }

    /// Has each sweep ask whether memory for the bytes that wait in circuits is scarce. While it is, a circuit ends
    /// one of whose directions has moved nothing for 10 s though bytes waited: [`CircuitEnd::Stalled`].
    ///
    /// Unless it is called, memory is never scarce.
    pub fn watch_memory(&mut self, is_scarce: impl Fn() -> bool + Send + 'static) {
        self.is_memory_scarce = Box::new(is_scarce);
    }

    /// Whether the access rules let a connection in: [`Access::may_enter`].
    pub fn may_enter(&self, peer: Option<PeerId>, address: &Multiaddr) -> bool {
        self.relay.access().may_enter(peer, address)
    }

    /// Takes nobody in from now on: a RESERVE or CONNECT is answered by closing its connection. All
    /// connections without a circuit are closed, evenly over so much time; one with circuits when
    /// they have ended.
    ///
    /// To be called after the swarm's listeners were removed, or clients come right back.
    pub fn drain(&mut self, over: Duration) {
        let now = Instant::now();
        self.relay.drain(now + over, now);
    }

    /// Takes clients in again after [`Behaviour::drain`].
    pub fn resume(&mut self) {
        self.relay.resume();
    }

    /// Whether it takes nobody in.
    pub fn is_draining(&self) -> bool {
        self.relay.is_draining()
    }

    fn connected(&mut self, established: ConnectionEstablished<'_>) {
        let (id, endpoint) = (established.connection_id, established.endpoint);
        let connection = Connection::new(
            established.peer_id,
            endpoint.get_remote_address().clone(),
            endpoint.is_relayed(),
            self.random.hash_one(id) as u8,
            Instant::now(),
        );
        self.relay.on_connected(id, connection);
        // Until the peer says under which address it reached the relay.
        if let ConnectedPoint::Listener { local_addr, .. } = endpoint {
            self.reported(id, local_addr.clone());
        }
        if let Some(signs) = self.handlers.get_mut(&id).and_then(|(_, signs)| signs.take()) {
            self.relay.listen_to(id, signs);
        }
    }

    fn handler(&mut self, connection: ConnectionId, peer: PeerId) -> Handler {
        let signs = Signs::default();
        let (sender, commands) = mpsc::unbounded();
        self.handlers.insert(connection, (sender, Some(signs.clone())));
        let (end, events) = (End { peer, connection }, self.events.0.clone());
        Handler::new(end, self.relay.config(), signs, commands, events)
    }

    fn carry_out(
        &mut self,
        action: Action<ConnectionId, Reply>,
    ) -> Option<ToSwarm<Event, Infallible>> {
        let now = Instant::now();
        match action {
            Action::Grant { request, receipt, terms, expires } => {
                let Ok(message) = self.reserve_ok(&request.origin, terms, expires) else {
                    self.relay.on_sign_failed(request, receipt, now);
                    return None;
                };
                if request.reply.0.send(Answer::Reserved(message, receipt)).is_err() {
                    self.relay.on_delivered(request.from.peer, receipt, false, now);
                }
            }
            Action::Refuse(reply, status) => _ = reply.0.send(Answer::Refused(status)),
            Action::AskTarget { target, circuit, source, limit, ended } => {
                let gone = HandlerEvent::TargetAnswered(circuit, Err(StopFailed::Gone));
                let report = Report::new(gone, self.events.0.clone());
                let request = StopRequest { circuit, source, limit, since: now, ended, report };
                self.command(target, HandlerCommand::Open(Outbound::Stop(Box::new(request))));
            }
            Action::Probe(to, patience) => {
                self.command(to, HandlerCommand::Open(Outbound::Probe(patience)));
            }
            Action::Hold(on, holds) => self.command(on, HandlerCommand::Hold(holds)),
            Action::Close(End { peer, connection }) => {
                return Some(ToSwarm::CloseConnection {
                    peer_id: peer,
                    connection: CloseConnection::One(connection),
                });
            }
            Action::Tell(event) => return Some(ToSwarm::GenerateEvent(event)),
        }
        None
    }

    fn command(&self, to: End<ConnectionId>, command: HandlerCommand) {
        if let Some((handler, _)) = self.handlers.get(&to.connection) {
            let _ = handler.unbounded_send(command); // or it is closing
        }
    }

    fn on_event(&mut self, event: HandlerEvent) {
        let (relay, now) = (&mut self.relay, Instant::now());
        match event {
            HandlerEvent::Requested(from, asked, reply) => {
                relay.handle_request(from, asked, reply, now);
            }
            HandlerEvent::Delivered(peer, receipt, arrived) => {
                relay.on_delivered(peer, receipt, arrived, now);
            }
            HandlerEvent::TargetAnswered(circuit, answer) => {
                let (target, answer) = match answer {
                    Ok(target) => (Some(target), Ok(())),
                    Err(failed) => (None, Err(failed)),
                };
                let opened = relay.on_target_answered(circuit, answer, now);
                if let (Some(target), Some((reply, parameters))) = (target, opened) {
                    let ended = HandlerEvent::CircuitEnded(circuit, CircuitEnd::Ended);
                    let report = Report::new(ended, self.events.0.clone());
                    let opening = Opening { circuit, target: *target, parameters, report };
                    // Else the source is gone, and the report says so.
                    let _ = reply.0.send(Answer::Connected(Box::new(opening)));
                }
            }
            HandlerEvent::CircuitEnded(circuit, end) => relay.on_circuit_ended(circuit, end, now),
        }
    }

    /// The message that tells a peer of its reservation.
    fn reserve_ok(
        &self,
        to: &Origin,
        terms: Terms,
        expires: Instant,
    ) -> Result<Vec<u8>, SigningError> {
        let term = expires.saturating_duration_since(Instant::now());
        let wall_clock = SystemTime::now().duration_since(UNIX_EPOCH);
        let expire = (wall_clock.unwrap_or_default() + term).as_secs();
        let listening: Vec<_> = self.listening.iter().cloned().collect();
        let reported = to.reported.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let known = Known {
            announced: &self.config().announce,
            confirmed: self.confirmed.as_slice(),
            listening: &listening,
            reported: reported.as_ref(),
        };
        let addresses = address::for_reservation(known, self.peer);
        let voucher = voucher::sign(&self.keypair, to.peer, expire)?;
        Ok(wire::reserve_ok(expire, &addresses, voucher, self.config().circuit_limit(terms)))
    }
}

/// Whether these addresses lead to this relay, as far as they say whom they lead to.
fn are_of(relay: PeerId, announced: &[Multiaddr]) -> Result<(), ConfigError> {
    for address in announced {
        if address.clone().with_p2p(relay).is_err() {
            let problem = format!("{address} names another peer; this relay is {relay}");
            return Err(ConfigError::new("announce", problem));
        }
    }
    Ok(())
}

impl NetworkBehaviour for Behaviour {
    type ConnectionHandler = Handler;
    type ToSwarm = Event;

    fn handle_established_inbound_connection(
        &mut self,
        connection: ConnectionId,
        peer: PeerId,
        _: &Multiaddr,
        _: &Multiaddr,
    ) -> Result<Handler, ConnectionDenied> {
        Ok(self.handler(connection, peer))
    }

    fn handle_established_outbound_connection(
        &mut self,
        connection: ConnectionId,
        peer: PeerId,
        _: &Multiaddr,
        _: Endpoint,
        _: PortUse,
    ) -> Result<Handler, ConnectionDenied> {
        Ok(self.handler(connection, peer))
    }

    fn on_swarm_event(&mut self, event: FromSwarm) {
        self.confirmed.on_swarm_event(&event);
        self.listening.on_swarm_event(&event);
        match event {
            FromSwarm::ConnectionEstablished(established) => self.connected(established),
            FromSwarm::ConnectionClosed(ConnectionClosed { peer_id, connection_id, .. }) => {
                // Its tasks have told what is over before.
                while let Ok(event) = self.events.1.try_recv() {
                    self.on_event(event);
                }
                self.handlers.remove(&connection_id);
                let gone = End { peer: peer_id, connection: connection_id };
                self.relay.on_disconnected(gone, Instant::now());
            }
            // Another behaviour did not let it in.
            FromSwarm::ListenFailure(ListenFailure { connection_id, .. })
            | FromSwarm::DialFailure(DialFailure { connection_id, .. }) => {
                self.handlers.remove(&connection_id);
            }
            _ => {}
        }
    }

    fn on_connection_handler_event(&mut self, _: PeerId, _: ConnectionId, never: Infallible) {
        match never {}
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<ToSwarm<Event, Infallible>> {
        loop {
            while let Some(action) = self.relay.next_action() {
                if let Some(done) = self.carry_out(action) {
                    return Poll::Ready(done);
                }
            }
            let now = Instant::now();
            if self.sweep_due != self.relay.sweep_due() {
                self.sweep_due = self.relay.sweep_due();
                self.next_sweep.reset(self.sweep_due.saturating_duration_since(now));
            }
            if self.next_sweep.poll_unpin(cx).is_pending() {
                match self.events.1.poll_next_unpin(cx) {
                    Poll::Ready(Some(event)) => self.on_event(event),
                    _ => return Poll::Pending,
                }
                continue;
            }
            self.relay.sweep(now);
            if (self.is_memory_scarce)() {
                self.relay.end_stalled(now);
            }
            let took = now.elapsed();
            log::trace!("swept in {} µs", took.as_micros());
            self.upkeep.sweeps += 1;
            self.upkeep.swept_for += took;
        }
    }
}
