//! The swarm's view of the relay: events in, commands out.
//!
//! Wires the rooms together and decides nothing itself: what a request gets is decided by
//! [`crate::reservations`] and [`crate::circuits`], what is over by [`crate::sweep`]. A RESERVE is
//! followed through in `behaviour/reserve.rs`, a CONNECT in `behaviour/connect.rs`; what changes
//! while it runs in `behaviour/policy.rs`.

mod connect;
mod policy;
mod reserve;

use std::{
    collections::{HashMap, VecDeque},
    hash::{BuildHasher, RandomState},
    task::{Context, Poll},
    time::{Duration, Instant},
};

use futures_timer::Delay;
use libp2p::{
    Multiaddr, PeerId,
    core::{ConnectedPoint, Endpoint, transport::PortUse},
    futures::FutureExt,
    identity::Keypair,
    swarm::{
        CloseConnection, ConnectionClosed, ConnectionDenied, ConnectionId, DialFailure, FromSwarm,
        ListenFailure, NetworkBehaviour, NotifyHandler, ToSwarm,
        behaviour::{ConnectionEstablished, ExternalAddresses, ListenAddresses},
    },
};

use self::{connect::Asking, reserve::Newcomer};
use crate::{
    access::Access,
    circuit::{Carried, CircuitEnd},
    circuits::{CircuitId, Circuits, End},
    config::{Config, ConfigError},
    connections::{Connection, Connections},
    event::Event,
    handler::{Command, Handler, RequestId, Told},
    heartbeat::Heartbeat,
    rates::Rates,
    reclaim::Reclaim,
    reservations::Reservations,
    signs::Signs,
    stop::StopFailed,
    sweep::{Swept, sweep},
    wire::Request,
};

/// How late a sweep may come before questions count anew.
const LATE: Duration = Duration::from_secs(1);

/// The longest reported address that is kept for a connection, in bytes.
const MAX_REPORTED: usize = 256;

/// The relay as a [`NetworkBehaviour`], for a swarm on any executor.
///
/// It takes the place of `libp2p::relay::Behaviour`; see [`Config`] and [`Event`] for what became
/// of that one's settings and events.
pub struct Behaviour {
    keypair: Keypair,
    peer: PeerId,
    config: Config,
    connections: Connections<ConnectionId>,
    reservations: Reservations<ConnectionId>,
    circuits: Circuits<ConnectionId>,
    /// The CONNECTs whose targets have yet to answer; `None` for those that were given up.
    asking: HashMap<CircuitId, Option<Asking>>,
    confirmed: ExternalAddresses,
    listening: ListenAddresses,
    /// Who decides instead of the configuration's lists.
    access: Option<Box<dyn Access>>,
    reserve_rates: Rates,
    connect_rates: Rates,
    heartbeat: Heartbeat,
    reclaim: Reclaim<Newcomer>,
    /// Whether the next sweep comes early, because a newcomer waits.
    in_a_hurry: bool,
    /// Of connections whose handler was made and that are not up yet.
    signs: HashMap<ConnectionId, Signs>,
    random: RandomState,
    next_sweep: Delay,
    sweep_due: Instant,
    queue: VecDeque<ToSwarm<Event, Command>>,
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
        policy::check(&config, peer)?;
        Ok(Self {
            peer,
            connections: Connections::new(),
            reservations: Reservations::new((&config).into()),
            circuits: Circuits::new((&config).into()),
            asking: HashMap::new(),
            confirmed: ExternalAddresses::default(),
            listening: ListenAddresses::default(),
            access: None,
            reserve_rates: Rates::new(config.reserve_rate),
            connect_rates: Rates::new(config.connect_rate),
            heartbeat: Heartbeat::new((&config).into(), Instant::now()),
            reclaim: Reclaim::new((&config).into()),
            in_a_hurry: false,
            signs: HashMap::new(),
            random: RandomState::new(),
            next_sweep: Delay::new(config.sweep),
            sweep_due: Instant::now() + config.sweep,
            queue: VecDeque::new(),
            keypair,
            config,
        })
    }

    /// The table of reservations, to look at.
    pub fn reservations(&self) -> &Reservations<ConnectionId> {
        &self.reservations
    }

    /// The table of circuits, to look at.
    pub fn circuits(&self) -> &Circuits<ConnectionId> {
        &self.circuits
    }

    /// Says under which address the peer at the other end of this connection reached the relay.
    ///
    /// That is what identify reports as `observed_addr`. It goes into reservations that are made
    /// over this connection, and into no others. Without it a relay behind NAT, none of whose
    /// addresses is announced or confirmed, has only local ones to tell.
    pub fn reported(&mut self, connection: ConnectionId, address: Multiaddr) {
        if address.len() <= MAX_REPORTED {
            self.connections.reported(connection, address);
        }
    }

    /// Says that something was heard from `peer`, on whatever protocol: it is alive.
    ///
    /// By itself the behaviour hears hop, stop, circuit and ping streams only.
    pub fn heard(&mut self, peer: PeerId) {
        self.connections.heard(&peer, Instant::now());
    }

    /// Counts `signs` as signs of life on this connection, from the next sweep on.
    ///
    /// For whoever can count more cheaply than call [`Behaviour::heard`]: a transport, say.
    pub fn listen_to(&mut self, connection: ConnectionId, signs: Signs) {
        self.connections.listen_to(connection, signs);
    }

    /// Gives up `peer`'s slot and ends its circuits, now. Whether it held a slot.
    ///
    /// Its connections stay up: to close them is the swarm's affair.
    pub fn release(&mut self, peer: PeerId) -> bool {
        let held = self.reservations.release(peer);
        self.tell_freed();
        self.end_circuits_of(&peer);
        held
    }

    fn end_circuits_of(&mut self, peer: &PeerId) {
        for (id, circuit) in self.circuits.of(peer) {
            self.end_circuit(id, circuit);
        }
    }

    fn requested(
        &mut self,
        peer: PeerId,
        connection: ConnectionId,
        request: RequestId,
        asked: Request,
    ) {
        let now = Instant::now();
        let from = End { peer, connection };
        match asked {
            Request::Reserve => self.reserve(from, request, now),
            Request::Connect(target) => self.connect(from, request, target, now),
        }
    }

    fn connected(&mut self, established: ConnectionEstablished<'_>) {
        let endpoint = established.endpoint;
        let address = match endpoint {
            ConnectedPoint::Dialer { address, .. } => address,
            ConnectedPoint::Listener { send_back_addr, .. } => send_back_addr,
        };
        let id = established.connection_id;
        let connection = Connection::new(
            established.peer_id,
            address.clone(),
            endpoint.is_relayed(),
            self.random.hash_one(id) as u8,
            Instant::now(),
        );
        self.connections.add(id, connection);
        if let Some(signs) = self.signs.remove(&id) {
            self.connections.listen_to(id, signs);
        }
    }

    fn disconnected(&mut self, peer: PeerId, connection: ConnectionId) {
        let now = Instant::now();
        self.connections.remove(connection);
        self.reclaim
            .withdraw(|newcomer| newcomer.from.connection == connection);
        for (id, circuit) in self.circuits.over(End { peer, connection }) {
            self.end_circuit(id, circuit);
            let at_source = circuit.source.connection == connection;
            match self.asking.contains_key(&id) {
                // The target will not answer any more.
                true if !at_source => self.target_answered(id, Err(StopFailed::Gone)),
                // Its handler has accounted for the circuit, unless it ended without a word: see
                // `Handler::poll_close`.
                false if at_source => {
                    self.circuit_ended(id, CircuitEnd::Ended, Carried::default());
                }
                _ => {}
            }
        }
        let before = self.reservations.connection(&peer);
        let up = self.connections.fit_for_a_slot(&peer);
        let left = self.reservations.disconnected(peer, connection, &up, now);
        self.after_leaving(peer, before, left, now);
    }

    /// Nothing was heard on this connection: as if it were gone, whether or not it is closed.
    fn silent(&mut self, connection: ConnectionId, now: Instant) {
        let Some(silent) = self.connections.get(connection) else {
            return;
        };
        let (peer, address) = (silent.peer, silent.address.clone());
        let silent_for = silent.silent_for(now);
        self.connections.judged(connection, now);
        self.tell(Event::PeerSilent {
            peer,
            address,
            silent_for,
        });
        for (id, circuit) in self.circuits.over(End { peer, connection }) {
            self.end_circuit(id, circuit);
        }
        let before = self.reservations.connection(&peer);
        let mut up = self.connections.fit_for_a_slot(&peer);
        up.retain(|other| *other != connection);
        let left = self.reservations.silent(peer, connection, &up, now);
        self.after_leaving(peer, before, left, now);
        if self.config.close_silent {
            self.close(peer, connection);
        }
    }

    fn close(&mut self, peer_id: PeerId, connection: ConnectionId) {
        self.connections.closing(connection);
        self.queue.push_back(ToSwarm::CloseConnection {
            peer_id,
            connection: CloseConnection::One(connection),
        });
    }

    fn sweep(&mut self) {
        let now = Instant::now();
        // What was answered while the relay stood still may not have been read yet.
        if now > self.sweep_due + LATE {
            self.connections.ask_anew(now);
        }
        self.reserve_rates.forget_full(now);
        self.connect_rates.forget_full(now);
        let timeout = self.config.idle_timeout;
        let Swept { idle, beat } = sweep(
            &mut self.reservations,
            &mut self.connections,
            &mut self.heartbeat,
            timeout,
            now,
        );
        self.tell_freed();
        for (peer_id, connection) in idle {
            log::debug!("connection idle for {timeout:?}: closing that of peer {peer_id}");
            self.close(peer_id, connection);
        }
        if let Some(fault) = beat.fault {
            log::warn!("{fault}");
        }
        for connection in beat.ask {
            self.ask_for_sign(connection);
        }
        for connection in beat.silent {
            self.silent(connection, now);
        }
        self.reclaim(now);
    }

    fn sweep_in(&mut self, interval: Duration) {
        self.sweep_due = Instant::now() + interval;
        self.next_sweep.reset(interval);
    }

    fn ask_for_sign(&mut self, connection: ConnectionId) {
        if let Some(peer) = self.connections.get(connection).map(|c| c.peer) {
            log::debug!("asked for a sign of life: peer {peer}");
            let question = Command::AskForSign(self.config.silence);
            self.command(End { peer, connection }, question);
        }
    }

    fn handler(&mut self, connection: ConnectionId, peer: PeerId) -> Handler {
        let signs = Signs::default();
        self.signs.insert(connection, signs.clone());
        Handler::new(peer, &self.config, signs)
    }

    fn command(&mut self, to: End<ConnectionId>, event: Command) {
        // A connection that is gone takes no commands, and the swarm need not be asked.
        if self.connections.get(to.connection).is_some() {
            self.queue.push_back(ToSwarm::NotifyHandler {
                peer_id: to.peer,
                handler: NotifyHandler::One(to.connection),
                event,
            });
        }
    }

    /// Where the peer at the other end comes from; empty if the connection is gone.
    fn address_of(&self, connection: ConnectionId) -> Multiaddr {
        let connection = self.connections.get(connection);
        connection.map_or_else(Multiaddr::empty, |connection| connection.address.clone())
    }

    fn tell(&mut self, event: Event) {
        log::debug!("{event}");
        self.queue.push_back(ToSwarm::GenerateEvent(event));
    }
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
            FromSwarm::ConnectionClosed(ConnectionClosed {
                peer_id,
                connection_id,
                ..
            }) => self.disconnected(peer_id, connection_id),
            // Another behaviour did not let it in.
            FromSwarm::ListenFailure(ListenFailure { connection_id, .. })
            | FromSwarm::DialFailure(DialFailure { connection_id, .. }) => {
                self.signs.remove(&connection_id);
            }
            _ => {}
        }
    }

    fn on_connection_handler_event(&mut self, peer: PeerId, connection: ConnectionId, told: Told) {
        match told {
            Told::Requested(request, asked) => self.requested(peer, connection, request, asked),
            Told::NotUnderstood(reason) => {
                let address = self.address_of(connection);
                self.tell(Event::RequestRejected {
                    peer,
                    address,
                    reason,
                });
            }
            Told::Answered(_, Ok(())) => self.reservations.delivered(&peer),
            Told::Answered(receipt, Err(_)) => self.undelivered(peer, receipt, Instant::now()),
            Told::TargetAnswered(circuit, answer) => self.target_answered(circuit, answer),
            Told::CircuitEnded(circuit, end, carried) => {
                self.circuit_ended(circuit, end, carried);
            }
        }
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<ToSwarm<Event, Command>> {
        loop {
            if let Some(next) = self.queue.pop_front() {
                return Poll::Ready(next);
            }
            if self.next_sweep.poll_unpin(cx).is_pending() {
                return Poll::Pending;
            }
            self.in_a_hurry = false;
            self.sweep();
            self.sweep_in(self.config.sweep);
            self.hurry();
        }
    }
}
