//! The swarm's view of the relay: events in, commands out.
//!
//! Wires the rooms together and decides nothing itself: what a request gets is decided by
//! [`crate::reservations`] and [`crate::circuits`], what is over by [`crate::sweep`].

use std::{
    collections::{HashMap, VecDeque},
    hash::{BuildHasher, RandomState},
    task::{Context, Poll},
    time::{Instant, SystemTime, UNIX_EPOCH},
};

use futures_timer::Delay;
use libp2p::{
    Multiaddr, PeerId,
    core::{ConnectedPoint, Endpoint, transport::PortUse},
    futures::FutureExt,
    identity::{Keypair, SigningError},
    swarm::{
        CloseConnection, ConnectionClosed, ConnectionDenied, ConnectionId, DialFailure, FromSwarm,
        ListenFailure, NetworkBehaviour, NotifyHandler, ToSwarm,
        behaviour::{ConnectionEstablished, ExternalAddresses, ListenAddresses},
    },
};

use crate::{
    address::{self, Known},
    circuit::{Carried, CircuitEnd},
    circuits::{Circuit, CircuitId, Circuits, End},
    config::{Config, ConfigError},
    connections::{Connection, Connections},
    event::{Event, Refused},
    handler::{Command, Handler, RequestId, Substream, Told},
    heartbeat::Heartbeat,
    reclaim::{Candidate, Prospect, Reclaim, TICK},
    reservations::{Admission, Full, Left, Receipt, Reservations},
    signs::Signs,
    stop::StopFailed,
    sweep::{Swept, sweep},
    voucher,
    wire::{self, Request},
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
    config: Config,
    connections: Connections<ConnectionId>,
    reservations: Reservations<ConnectionId>,
    circuits: Circuits<ConnectionId>,
    /// The CONNECTs whose targets have yet to answer; `None` for those that were given up.
    asking: HashMap<CircuitId, Option<RequestId>>,
    confirmed: ExternalAddresses,
    listening: ListenAddresses,
    heartbeat: Heartbeat,
    reclaim: Reclaim<Newcomer>,
    /// Whether the next sweep comes early, because a newcomer waits.
    in_a_hurry: bool,
    /// Of connections whose handler was made and that are not up yet.
    signs: HashMap<ConnectionId, Signs>,
    random: RandomState,
    next_sweep: Delay,
    queue: VecDeque<ToSwarm<Event, Command>>,
}

/// A RESERVE that is yet to be answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Newcomer {
    from: End<ConnectionId>,
    request: RequestId,
}

impl Behaviour {
    /// A relay of the swarm that owns `keypair`, which signs the vouchers.
    ///
    /// # Errors
    ///
    /// When the configuration makes no sense: [`Config::validate`], or an announced address that
    /// names another peer.
    pub fn new(keypair: Keypair, config: Config) -> Result<Self, ConfigError> {
        config.validate()?;
        let peer = keypair.public().to_peer_id();
        for announced in &config.announce {
            if announced.clone().with_p2p(peer).is_err() {
                let problem = format!("{announced} names another peer; this relay is {peer}");
                return Err(ConfigError::new("announce", problem));
            }
        }
        Ok(Self {
            peer,
            connections: Connections::new(),
            reservations: Reservations::new((&config).into()),
            circuits: Circuits::new((&config).into()),
            asking: HashMap::new(),
            confirmed: ExternalAddresses::default(),
            listening: ListenAddresses::default(),
            heartbeat: Heartbeat::new((&config).into(), Instant::now()),
            reclaim: Reclaim::new((&config).into()),
            in_a_hurry: false,
            signs: HashMap::new(),
            random: RandomState::new(),
            next_sweep: Delay::new(config.sweep),
            queue: VecDeque::new(),
            keypair,
            config,
        })
    }

    /// The configuration that holds.
    pub fn config(&self) -> &Config {
        &self.config
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
        for (id, circuit) in self.circuits.of(&peer) {
            self.end_circuit(id, circuit);
        }
        held
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

    fn reserve(&mut self, from: End<ConnectionId>, request: RequestId, now: Instant) {
        let Some(connection) = self.connections.get(from.connection) else {
            return;
        };
        if connection.relayed {
            self.refuse(from, request, Refused::Relayed);
            return;
        }
        let newcomer = Newcomer { from, request };
        let Err(full) = self.try_reserve(newcomer, now) else {
            return;
        };
        // A peer waits once: what it asked before, from another network maybe, is over.
        for older in self.reclaim.withdraw(|older| older.from.peer == from.peer) {
            self.refuse(older.from, older.request, full.into());
        }
        if !self.reclaim.wait(newcomer, now) {
            self.refuse(from, request, full.into());
        }
        self.hurry();
    }

    /// Decides a RESERVE and answers it, unless a cap leaves no room.
    fn try_reserve(&mut self, newcomer: Newcomer, now: Instant) -> Result<(), Full> {
        let Newcomer { from, request } = newcomer;
        let Some(connection) = self.connections.get(from.connection) else {
            return Ok(()); // nobody to answer
        };
        let (peer, address) = (from.peer, connection.address.clone());
        let before = self.reservations.connection(&peer);
        let billed_to = connection.billed_to();
        let admission = self
            .reservations
            .reserve(peer, from.connection, billed_to, now);
        self.tell_freed();
        let (receipt, renewed) = match admission {
            Admission::Refused(full) => return Err(full),
            Admission::Granted(receipt) => (receipt, false),
            Admission::Renewed(receipt) => (receipt, true),
        };
        self.point(peer, before, now);
        let Ok(answer) = self.reservation_answer(from, now) else {
            self.undelivered(peer, receipt, now);
            self.refuse(from, request, Refused::NotSigned);
            return Ok(());
        };
        self.command(from, Command::Granted(request, receipt, answer));
        self.tell(Event::ReservationAccepted {
            peer,
            address,
            renewed,
        });
        Ok(())
    }

    /// Looks for a slot for each newcomer that waits.
    fn reclaim(&mut self, now: Instant) {
        let mut waiting = Vec::new();
        for newcomer in self.reclaim.take() {
            if let Err(full) = self.try_reserve(newcomer.newcomer, now) {
                waiting.push((newcomer, full));
            }
        }
        if waiting.is_empty() {
            return;
        }
        let silent = self.connections.reserved();
        let candidates = silent.map(|(connection, peer, pulse)| Candidate {
            connection,
            billed_to: self.reservations.bill_of(&peer),
            silent_for: pulse.silent_for(now),
            asked_for: pulse.asked_for(now),
        });
        let caps = waiting.iter().map(|(who, full)| (*full, now - who.since));
        let (prospects, ask) = self.reclaim.decide(caps, candidates.collect());
        for connection in ask {
            self.connections.asked(connection, now);
            self.ask_for_sign(connection);
        }
        for ((waiting, full), prospect) in waiting.into_iter().zip(prospects) {
            let Newcomer { from, request } = waiting.newcomer;
            match prospect {
                Prospect::Refuse => self.refuse(from, request, full.into()),
                Prospect::Wait => self.reclaim.wait_on(waiting),
                Prospect::Judge(connection) => {
                    self.silent(connection, now);
                    // Unless the peer has another connection, there is room now.
                    if self.try_reserve(waiting.newcomer, now).is_err() {
                        self.reclaim.wait_on(waiting);
                    }
                }
            }
        }
    }

    /// Sweeps soon, if a newcomer waits.
    fn hurry(&mut self) {
        if self.reclaim.waiting() > 0 && !self.in_a_hurry {
            self.in_a_hurry = true;
            self.next_sweep.reset(TICK.min(self.config.sweep));
        }
    }

    fn reservation_answer(
        &self,
        to: End<ConnectionId>,
        now: Instant,
    ) -> Result<Vec<u8>, SigningError> {
        let term = self.reservations.expires(&to.peer).unwrap_or(now) - now;
        let wall_clock = SystemTime::now().duration_since(UNIX_EPOCH);
        let expire = (wall_clock.unwrap_or_default() + term).as_secs();
        let listening: Vec<_> = self.listening.iter().cloned().collect();
        let connection = self.connections.get(to.connection);
        let known = Known {
            announced: &self.config.announce,
            confirmed: self.confirmed.as_slice(),
            listening: &listening,
            reported: connection.and_then(|connection| connection.reported.as_ref()),
        };
        let addresses = address::for_reservation(known, self.peer);
        let voucher = voucher::sign(&self.keypair, to.peer, expire)?;
        let limit = self.config.circuit_limit();
        Ok(wire::reserve_ok(expire, &addresses, voucher, limit))
    }

    fn connect(
        &mut self,
        from: End<ConnectionId>,
        request: RequestId,
        target: PeerId,
        now: Instant,
    ) {
        let Some(connection) = self.connections.get(from.connection) else {
            return;
        };
        if connection.relayed {
            self.refuse_circuit(from, request, target, Refused::Relayed);
            return;
        }
        let Some(over) = self.reservations.live(&target, now) else {
            self.refuse_circuit(from, request, target, Refused::NoReservation);
            return;
        };
        let to = End {
            peer: target,
            connection: over,
        };
        let id = match self.circuits.admit(from, to) {
            Ok(id) => id,
            Err(full) => {
                self.refuse_circuit(from, request, target, full.into());
                return;
            }
        };
        self.asking.insert(id, Some(request));
        self.connections.add_circuit(from.connection, now);
        self.connections.add_circuit(to.connection, now);
        let limit = self.config.circuit_limit();
        self.command(to, Command::AskTarget(id, from.peer, limit));
    }

    fn target_answered(&mut self, id: CircuitId, answer: Result<Box<Substream>, StopFailed>) {
        let Some(request) = self.asking.remove(&id) else {
            return; // ended meanwhile; dropping the stream resets it
        };
        match (request, answer) {
            (Some(request), Ok(stream)) => self.open_circuit(id, request, stream),
            (Some(request), Err(failed)) => {
                if let Some(circuit) = self.forget_circuit(id) {
                    let reason = Refused::StopFailed(failed);
                    self.refuse_circuit(circuit.source, request, circuit.target.peer, reason);
                }
            }
            // Given up: the source was refused then.
            (None, _) => {
                self.forget_circuit(id);
            }
        }
    }

    fn open_circuit(&mut self, id: CircuitId, request: RequestId, stream: Box<Substream>) {
        let Some(circuit) = self.circuits.get(id) else {
            return;
        };
        let limit = self.config.circuit_limit();
        let open = Command::OpenCircuit(request, id, stream, limit);
        self.command(circuit.source, open);
        self.tell(Event::CircuitOpened {
            circuit: id,
            source: circuit.source.peer,
            target: circuit.target.peer,
        });
    }

    fn circuit_ended(&mut self, id: CircuitId, end: CircuitEnd, carried: Carried) {
        if let Some(circuit) = self.forget_circuit(id) {
            self.tell(Event::CircuitClosed {
                circuit: id,
                source: circuit.source.peer,
                target: circuit.target.peer,
                end,
                carried,
            });
        }
    }

    /// Ends a circuit by command; an open one reports back what it carried.
    ///
    /// One that is being set up keeps its place until nothing is left of it at the target: else
    /// sources that ask and leave could ask one target for more than its cap.
    fn end_circuit(&mut self, id: CircuitId, circuit: Circuit<ConnectionId>) {
        let Some(request) = self.asking.get_mut(&id) else {
            self.command(circuit.source, Command::EndCircuit(id));
            return;
        };
        if let Some(request) = request.take() {
            self.refuse_circuit(circuit.source, request, circuit.target.peer, Refused::Gone);
            self.command(circuit.target, Command::GiveUpAsking(id));
        }
    }

    fn forget_circuit(&mut self, id: CircuitId) -> Option<Circuit<ConnectionId>> {
        let circuit = self.circuits.remove(id)?;
        let now = Instant::now();
        for end in [circuit.source, circuit.target] {
            self.connections.remove_circuit(end.connection, now);
        }
        Some(circuit)
    }

    fn undelivered(&mut self, peer: PeerId, receipt: Receipt, now: Instant) {
        let before = self.reservations.connection(&peer);
        let up = self.connections.of(&peer);
        let left = self.reservations.undelivered(peer, receipt, up, now);
        self.after_leaving(peer, before, left, now);
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
        for (id, circuit) in self.circuits.of(&peer) {
            if ![circuit.source, circuit.target].contains(&End { peer, connection }) {
                continue;
            }
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
        let up = self.connections.of(&peer);
        let left = self.reservations.disconnected(peer, connection, up, now);
        self.after_leaving(peer, before, left, now);
    }

    fn after_leaving(
        &mut self,
        peer: PeerId,
        before: Option<ConnectionId>,
        left: Left<ConnectionId>,
        now: Instant,
    ) {
        self.tell_freed();
        self.point(peer, before, now);
        if left == Left::Grace {
            self.tell(Event::GraceBegan { peer });
        }
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
        for (id, circuit) in self.circuits.of(&peer) {
            if [circuit.source, circuit.target].contains(&End { peer, connection }) {
                self.end_circuit(id, circuit);
            }
        }
        let before = self.reservations.connection(&peer);
        let mut up = self.connections.of(&peer).to_vec();
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

    fn ask_for_sign(&mut self, connection: ConnectionId) {
        if let Some(peer) = self.connections.get(connection).map(|c| c.peer) {
            log::debug!("asked for a sign of life: peer {peer}");
            let question = Command::AskForSign(self.config.silence);
            self.command(End { peer, connection }, question);
        }
    }

    /// Keeps the connection that `peer`'s reservation points at now, and no longer the one before.
    fn point(&mut self, peer: PeerId, before: Option<ConnectionId>, now: Instant) {
        let after = self.reservations.connection(&peer);
        if let Some(connection) = before.filter(|_| before != after) {
            self.hold(End { peer, connection }, false, now);
        }
        if let Some(connection) = after {
            self.hold(End { peer, connection }, true, now);
        }
    }

    fn hold(&mut self, on: End<ConnectionId>, holds: bool, now: Instant) {
        if self.connections.hold_reservation(on.connection, holds, now) {
            self.command(on, Command::Hold(holds));
        }
    }

    fn tell_freed(&mut self) {
        let now = Instant::now();
        for freed in self.reservations.take_freed() {
            if let Some(connection) = freed.connection {
                let peer = freed.peer;
                self.hold(End { peer, connection }, false, now);
            }
            self.tell(Event::ReservationFreed {
                peer: freed.peer,
                reason: freed.reason,
            });
        }
    }

    fn refuse(&mut self, from: End<ConnectionId>, request: RequestId, reason: Refused) {
        let Some(connection) = self.connections.get(from.connection) else {
            return; // nobody to answer
        };
        let address = connection.address.clone();
        self.command(from, Command::Refuse(request, reason.status()));
        self.tell(Event::ReservationRefused {
            peer: from.peer,
            address,
            reason,
        });
    }

    fn refuse_circuit(
        &mut self,
        from: End<ConnectionId>,
        request: RequestId,
        target: PeerId,
        reason: Refused,
    ) {
        self.command(from, Command::Refuse(request, reason.status()));
        self.tell(Event::CircuitRefused {
            source: from.peer,
            target,
            reason,
        });
    }

    fn handler(&mut self, connection: ConnectionId, peer: PeerId) -> Handler {
        let signs = Signs::default();
        self.signs.insert(connection, signs.clone());
        Handler::new(peer, self.config.answer_ping, signs)
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
            Told::NotUnderstood(reason) => self.tell(Event::RequestRejected { peer, reason }),
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
            self.next_sweep.reset(self.config.sweep);
            self.in_a_hurry = false;
            self.sweep();
            self.hurry();
        }
    }
}
