//! The relay as a [`NetworkBehaviour`]: swarm events in, actions out.
//!
//! Passes what happens on the swarm's connections to [`crate::relay`], and carries out the actions that it returns. The
//! behaviour decides only whether to serve; it has the clock, the key that signs vouchers, and the addresses that
//! clients are told.

pub(crate) mod circuit;
mod handler;
mod hop;
mod ping;
#[cfg(target_os = "linux")]
pub(crate) mod tcp_info;
mod timer;

use std::{
    collections::HashMap,
    convert::Infallible,
    hash::{BuildHasher, RandomState},
    mem,
    sync::PoisonError,
    task::{Context, Poll},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use futures_timer::Delay;
use libp2p::{
    Multiaddr, PeerId,
    core::{ConnectedPoint, Endpoint, transport::PortUse},
    futures::{FutureExt, StreamExt, channel::mpsc, future::BoxFuture, stream::FuturesUnordered},
    identity::Keypair,
    swarm::{
        CloseConnection, ConnectionDenied, ConnectionId, FromSwarm, NetworkBehaviour, ToSwarm,
        behaviour::{ConnectionEstablished, ExternalAddresses, ListenAddresses},
    },
};

use self::{
    handler::Handler,
    hop::{Answer, Decided, Events, HandlerCommand, HandlerEvent, Reply, decide},
};
use crate::{
    access::Access,
    activity::{self, ActivityCounter},
    address::ClientPrefix,
    address::{self, Known},
    config::{Config, ConfigError, LONGEST},
    event::{Event, FreedReason, StopFailed},
    relay::{
        Action, Relay,
        accounts::{Account, Totals},
        connections::{Connection, End, Origin},
    },
    wall_clock,
    wire::{self, Limit},
};

/// The longest reported address that is kept for a connection, in bytes.
const MAX_REPORTED: usize = 256;

/// The relay as a [`NetworkBehaviour`], for a swarm on any executor.
///
/// It replaces `libp2p::relay::Behaviour`; see [`Config`] and [`Event`] for its settings and events.
pub struct Behaviour {
    keypair: Keypair,
    peer: PeerId,
    pub(crate) relay: Relay<ConnectionId, Reply>,
    confirmed: ExternalAddresses,
    listening: ListenAddresses,
    /// The command channel of each handler, and its activity counter.
    handlers: HashMap<ConnectionId, (mpsc::UnboundedSender<HandlerCommand>, ActivityCounter)>,
    /// The events of all connections' tasks.
    events: (Events, mpsc::UnboundedReceiver<HandlerEvent>),
    /// Whether to serve; `None`: while an external address is known.
    serving: Option<bool>,
    /// Whether the wall clock was set when it was last checked.
    is_clock_set: bool,
    /// Whether the relay serves, as the handlers were last told.
    is_serving: bool,
    /// The access checks whose answers come later.
    decisions: FuturesUnordered<BoxFuture<'static, Option<Decided>>>,
    /// The timer of the next sweep, and what it is set to. The first poll sets it.
    next_sweep: (Delay, Instant),
    /// How many sweeps there were since the start, and how long all of them took.
    pub(crate) sweeps: (u64, Duration),
    /// Whether memory for waiting bytes is scarce for this client prefix; false in an embedder's swarm, whose muxer has
    /// that memory. A circuit of such a prefix ends if one direction has transferred nothing for 10 s though bytes
    /// waited: [`CircuitEnd::Stalled`](crate::CircuitEnd::Stalled).
    pub(crate) is_memory_scarce: Box<dyn Fn(Option<ClientPrefix>) -> bool + Send>,
}

impl Behaviour {
    /// A relay for the swarm that owns `keypair`, which signs the vouchers.
    ///
    /// # Errors
    ///
    /// When a setting of the configuration is invalid, or an announced address names another peer.
    pub fn new(keypair: Keypair, config: Config) -> Result<Self, ConfigError> {
        let peer = keypair.public().to_peer_id();
        validate_announced(peer, &config.announce)?;
        let mut behaviour = Self {
            keypair,
            peer,
            relay: Relay::new(config, Instant::now())?,
            confirmed: ExternalAddresses::default(),
            listening: ListenAddresses::default(),
            handlers: HashMap::new(),
            events: mpsc::unbounded(),
            serving: Some(true),
            is_clock_set: true,
            is_serving: true,
            decisions: FuturesUnordered::new(),
            next_sweep: (Delay::new(Duration::ZERO), Instant::now()),
            sweeps: (0, Duration::ZERO),
            is_memory_scarce: Box::new(|_| false),
        };
        behaviour.update_serving(SystemTime::now());
        Ok(behaviour)
    }

    /// The configuration in force.
    pub fn config(&self) -> &Config {
        &self.relay.config
    }

    /// Replaces the configuration while the relay runs. See [`Config`] for what applies from when.
    ///
    /// A lowered cap frees no live slot: newcomers are refused until there is room. Peers that the access rules do not
    /// allow any more lose their slots and circuits at once.
    ///
    /// # Errors
    ///
    /// As [`Behaviour::new`]. Nothing has changed then.
    pub fn set_config(&mut self, config: Config) -> Result<(), ConfigError> {
        validate_announced(self.peer, &config.announce)?;
        self.relay.set_config(config, Instant::now())?;
        self.update_serving(SystemTime::now());
        Ok(())
    }

    /// Whether to serve: `true` (the default), `false`, or `None` for the automatic mode, which serves only while an
    /// external address is confirmed (`swarm.add_external_address`, AutoNAT) or announced ([`Config::announce`]). An
    /// address through another relay, as libp2p's relay client confirms it, does not count.
    ///
    /// While the relay does not serve, it does not support the hop protocol, and identify says so: clients choose
    /// another relay instead of being refused by this one. Slots and circuits stay. The same applies while the wall
    /// clock is before 2026, as on a device that NTP has yet to reach.
    ///
    /// If the swarm has a ping behaviour, too, switch [`Config::answer_ping`] off: while one protocol is supported
    /// twice, the swarm does not notice that another one no longer is.
    pub fn set_serving(&mut self, serving: impl Into<Option<bool>>) {
        self.serving = serving.into();
        self.update_serving(SystemTime::now());
    }

    /// Serves only while the wall clock, which shows `now`, is set: a client refuses a reservation that has expired,
    /// and may stay away for an hour then.
    fn update_serving(&mut self, now: SystemTime) {
        // 1. The clock.
        let was_set = mem::replace(&mut self.is_clock_set, wall_clock::is_set(now));
        if was_set && !self.is_clock_set {
            log::warn!(
                "this machine's clock is not set (before 2026): not serving, because clients refuse \
                 reservations that have expired; set the clock, or wait until NTP does"
            );
        }
        // 2. The other conditions. All handlers are told of a change.
        let (announced, confirmed) = (&*self.relay.config.announce, self.confirmed.as_slice());
        let known = Known { announced, confirmed, ..Known::default() };
        // An address through another relay does not count.
        let has_address = || !address::for_reservation(known, self.peer).is_empty();
        // While draining, a relay that owns its connections answers requests by closing them.
        let admits = self.relay.config.close_silent || !self.relay.is_draining();
        let is_serving = self.serving.unwrap_or_else(has_address) && admits && self.is_clock_set;
        if mem::replace(&mut self.is_serving, is_serving) != is_serving {
            log::info!("{}", if is_serving { "serving clients" } else { "not serving clients" });
            for (handler, _) in self.handlers.values() {
                // It fails once the connection closes.
                let _ = handler.unbounded_send(HandlerCommand::Serve(is_serving));
            }
        }
    }

    /// Lets `access` decide who may use the relay, instead of the lists in [`Config::access`].
    pub fn set_access(&mut self, access: impl Access + 'static) {
        self.relay.set_access(Box::new(access), Instant::now());
    }

    /// Asks [`Access`] again about all peers that hold a slot, wait for one or are part of a circuit, and ends what is
    /// denied: [`FreedReason::Denied`], [`CircuitEnd::Denied`](crate::CircuitEnd::Denied). Call it when the rules
    /// change.
    ///
    /// What is decided [later](crate::Permission::Later) stays until the answer comes. At most one answer is awaited
    /// for each slot, and two for each circuit; a call meanwhile asks again once all have come.
    pub fn recheck_access(&mut self) {
        self.relay.recheck_access(Instant::now());
    }

    /// How much `peer` has used the relay since it connected; `None` if it has been part of no circuit or is not
    /// connected.
    pub fn account(&self, peer: &PeerId) -> Option<Account> {
        self.relay.accounts.of(peer)
    }

    /// The accounts of all peers that have one, in no order.
    pub fn accounts(&self) -> impl Iterator<Item = (PeerId, Account)> {
        self.relay.accounts.iter()
    }

    /// How much all peers together have used the relay since it started.
    pub fn totals(&self) -> Totals {
        self.relay.accounts.totals
    }

    /// The tables of the relay, to be read.
    #[doc(hidden)]
    pub fn view(&self) -> &Relay<ConnectionId, Reply> {
        &self.relay
    }

    /// Sets the address at which the peer reached the relay over this connection: what identify reports as
    /// `observed_addr`.
    ///
    /// It appears only in reservations over this connection. A relay behind NAT without announced or confirmed
    /// addresses has only local ones otherwise.
    pub fn set_reported_address(&mut self, connection: ConnectionId, address: Multiaddr) {
        let up = self.relay.connections.get(connection);
        if let Some(up) = up.filter(|_| address.len() <= MAX_REPORTED) {
            *up.origin.reported.lock().unwrap_or_else(PoisonError::into_inner) = Some(address);
        }
    }

    /// Records that `peer` is alive, on whatever protocol. The behaviour itself sees only hop, stop, circuit and ping
    /// streams, unless the transport counts ([`count_activity`](crate::count_activity)).
    pub fn record_activity(&mut self, peer: PeerId) {
        self.relay.connections.record_activity(&peer, Instant::now());
    }

    /// Polls `counter` for activity on this connection, from the next sweep on, beside the behaviour's own. A further
    /// call replaces the counter.
    ///
    /// For a transport that counts on its own; [`count_activity`](crate::count_activity) does it for any. Where no
    /// counter is tracked, a peer times out only after two unanswered probes and the silence limit, and not earlier for
    /// a newcomer.
    pub fn track(&mut self, connection: ConnectionId, counter: ActivityCounter) {
        if let Some(up) = self.relay.connections.get_mut(connection) {
            up.track(counter);
            up.liveness.is_partial = false;
        }
    }

    /// Frees `peer`'s slot and ends its circuits; returns whether it held a slot. Its connections stay open.
    pub fn release(&mut self, peer: PeerId) -> bool {
        self.relay.release(peer, FreedReason::Released, Instant::now())
    }

    /// Drains: answers RESERVE and CONNECT by closing the connection. Closes all connections without a circuit, spread
    /// evenly over this time (at most a year), and those with circuits when these have ended. Without
    /// [`Config::close_silent`] the relay does not serve meanwhile ([`Behaviour::set_serving`]), and closes only
    /// connections that hold a slot or carry a circuit.
    ///
    /// Remove the swarm's listeners first, or clients reconnect at once.
    pub fn drain(&mut self, over: Duration) {
        let now = Instant::now();
        self.relay.drain(now + over.min(LONGEST), now);
        self.update_serving(SystemTime::now());
    }

    /// Ends a [drain](Behaviour::drain): newcomers are admitted again.
    pub fn resume(&mut self) {
        self.relay.resume();
        self.update_serving(SystemTime::now());
    }

    fn on_established(&mut self, established: ConnectionEstablished<'_>) {
        let ConnectionEstablished { peer_id: peer, connection_id: id, endpoint, .. } = established;
        let (address, relayed) = (endpoint.get_remote_address().clone(), endpoint.is_relayed());
        let jitter = RandomState::new().hash_one(id) as u8; // a random number
        let mut connection = Connection::new(peer, address, relayed, jitter, Instant::now());
        if let Some((_, activity)) = self.handlers.get(&id) {
            #[cfg(target_os = "linux")]
            tcp_info::report_losses(endpoint, activity);
            connection.track(activity.clone());
        }
        match activity::counter_of(peer, endpoint) {
            Some(counter) => connection.track(counter),
            None => connection.liveness.is_partial = true,
        }
        self.relay.connections.add(id, connection);
        // Until the peer reports the address at which it reached the relay.
        if let ConnectedPoint::Listener { local_addr, .. } = endpoint {
            self.set_reported_address(id, local_addr.clone());
        }
    }

    /// Carries out an action; returns what the swarm has to do for it.
    fn carry_out(
        &mut self,
        action: Action<ConnectionId, Reply>,
    ) -> Option<ToSwarm<Event, Infallible>> {
        let now = Instant::now();
        let (to, command) = match action {
            Action::Grant { request, receipt, limit, expires } => {
                let Some(message) = self.reserve_ok(&request.origin, limit, expires) else {
                    self.relay.on_sign_failed(request, receipt, now);
                    return None;
                };
                if request.reply.send(Answer::Final(message, Some(receipt))).is_err() {
                    self.relay.on_delivered(request.from.peer, receipt, false, now);
                }
                return None;
            }
            Action::CheckAccess(check, permission) => {
                self.decisions.push(decide(check, permission).boxed());
                return None;
            }
            Action::Refuse(reply, status) => {
                let message = wire::answer(status, Limit::default(), None);
                let _ = reply.send(Answer::Final(message, None)); // fails once the stream is gone
                return None;
            }
            Action::AskTarget(target, parameters) => (target, HandlerCommand::Stop(parameters)),
            Action::Probe(to, timeout) => (to, HandlerCommand::Probe(timeout)),
            Action::Hold(on, holds) => (on, HandlerCommand::Hold(holds)),
            Action::Close(End { peer, connection }) => {
                let connection = CloseConnection::One(connection);
                return Some(ToSwarm::CloseConnection { peer_id: peer, connection });
            }
            Action::Report(event) => return Some(ToSwarm::GenerateEvent(event)),
        };
        // It fails once the connection closes. Until it has closed, nothing else answers a stop request.
        if let Some((handler, _)) = self.handlers.get(&to.connection)
            && let Err(failed) = handler.unbounded_send(command)
            && let HandlerCommand::Stop(circuit) = failed.into_inner()
        {
            let gone = Err(StopFailed::Gone);
            self.on_event(HandlerEvent::TargetAnswered(circuit.id, to.connection, gone));
        }
        None
    }

    fn on_event(&mut self, event: HandlerEvent) {
        let (relay, now) = (&mut self.relay, Instant::now());
        match event {
            HandlerEvent::RequestReceived(from, request, reply) => {
                relay.handle_request(from, request, reply, now);
            }
            HandlerEvent::Delivered(peer, receipt, arrived) => {
                relay.on_delivered(peer, receipt, arrived, now);
            }
            HandlerEvent::TargetAnswered(circuit, over, answer) => {
                let opened = relay.on_target_answered(circuit, over, answer, now);
                if let Some((reply, opening)) = opened {
                    // It fails if the source is gone; the circuit then ends with the source's connection.
                    let _ = reply.send(Answer::Open(opening));
                }
            }
            HandlerEvent::CircuitEnded(circuit, end) => relay.on_circuit_ended(circuit, end, now),
        }
    }

    /// The answer that grants a reservation; `None`: its voucher could not be signed.
    fn reserve_ok(&self, to: &Origin, limit: Limit, expires: Instant) -> Option<Vec<u8>> {
        let term = expires.saturating_duration_since(Instant::now());
        let wall_clock = SystemTime::now().duration_since(UNIX_EPOCH);
        let expire = (wall_clock.unwrap_or_default() + term).as_secs();
        let reported = to.reported.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let addresses = self.addresses(reported.as_ref());
        let voucher = wire::sign_voucher(&self.keypair, to.peer, expire).ok()?;
        Some(wire::reserve_ok(expire, &addresses, voucher, limit))
    }

    /// The addresses of a reservation whose client reached the relay at `reported`.
    pub(crate) fn addresses(&self, reported: Option<&Multiaddr>) -> Vec<Multiaddr> {
        let listening: Vec<_> = self.listening.iter().cloned().collect();
        let (announced, confirmed) = (&self.relay.config.announce, self.confirmed.as_slice());
        let known = Known { announced, confirmed, listening: &listening, reported };
        address::for_reservation(known, self.peer)
    }
}

/// Checks that none of these addresses names another peer than this relay.
fn validate_announced(relay: PeerId, announced: &[Multiaddr]) -> Result<(), ConfigError> {
    let is_foreign = |address: &&Multiaddr| (*address).clone().with_p2p(relay).is_err();
    announced.iter().find(is_foreign).map_or(Ok(()), |address| {
        let problem = format!("{address} names another peer; this relay is {relay}");
        Err(ConfigError::new("announce", problem))
    })
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
        let activity = ActivityCounter::default();
        let (sender, commands) = mpsc::unbounded();
        self.handlers.insert(connection, (sender, activity.clone()));
        let (end, events) = (End { peer, connection }, self.events.0.clone());
        Ok(Handler::new(end, &self.relay.config, self.is_serving, activity, commands, events))
    }

    fn handle_established_outbound_connection(
        &mut self,
        connection: ConnectionId,
        peer: PeerId,
        address: &Multiaddr,
        _: Endpoint,
        _: PortUse,
    ) -> Result<Handler, ConnectionDenied> {
        self.handle_established_inbound_connection(connection, peer, address, address)
    }

    fn on_swarm_event(&mut self, event: FromSwarm) {
        if self.confirmed.on_swarm_event(&event) {
            self.update_serving(SystemTime::now());
        }
        self.listening.on_swarm_event(&event);
        match event {
            FromSwarm::ConnectionEstablished(established) => self.on_established(established),
            FromSwarm::ConnectionClosed(closed) => {
                // Handle first what its tasks reported before it closed.
                while let Ok(event) = self.events.1.try_recv() {
                    self.on_event(event);
                }
                self.handlers.remove(&closed.connection_id);
                let gone = End { peer: closed.peer_id, connection: closed.connection_id };
                self.relay.on_disconnected(gone, Instant::now());
            }
            // Another behaviour denied the connection.
            FromSwarm::ListenFailure(failed) => _ = self.handlers.remove(&failed.connection_id),
            FromSwarm::DialFailure(failed) => _ = self.handlers.remove(&failed.connection_id),
            _ => {}
        }
    }

    fn on_connection_handler_event(&mut self, _: PeerId, _: ConnectionId, never: Infallible) {
        match never {}
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<ToSwarm<Event, Infallible>> {
        loop {
            // 1. Carry out what the relay has decided.
            while let Some(action) = self.relay.actions.pop_front() {
                if let Some(event) = self.carry_out(action) {
                    return Poll::Ready(event);
                }
            }
            // 2. Set the timer to the next sweep.
            let now = Instant::now();
            let (timer, set_to) = &mut self.next_sweep;
            if *set_to != self.relay.sweep_due {
                *set_to = self.relay.sweep_due;
                timer.reset(set_to.saturating_duration_since(now));
            }
            // 3. Sweep if it is due; otherwise pass on one access decision or one event of a task.
            if timer.poll_unpin(cx).is_ready() {
                self.relay.sweep(now);
                self.update_serving(SystemTime::now());
                self.relay.end_stalled(&self.is_memory_scarce, now);
                self.sweeps = (self.sweeps.0 + 1, self.sweeps.1 + now.elapsed());
                continue;
            }
            if let Poll::Ready(Some(decided)) = self.decisions.poll_next_unpin(cx) {
                if let Some((check, permission)) = decided {
                    self.relay.on_access_checked(check, permission, now);
                }
                continue;
            }
            match self.events.1.poll_next_unpin(cx) {
                Poll::Ready(Some(event)) => self.on_event(event),
                _ => return Poll::Pending,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use libp2p::{futures::channel::oneshot, swarm::behaviour::ExternalAddrConfirmed};

    use super::*;
    use crate::wire::Request;

    #[test]
    fn a_relay_serves_only_while_the_clock_is_set() {
        let config = Config::default();
        let mut relay = Behaviour::new(Keypair::generate_ed25519(), config).unwrap();
        let (sender, mut commands) = mpsc::unbounded();
        let connection = ConnectionId::new_unchecked(1);
        relay.handlers.insert(connection, (sender, ActivityCounter::default()));
        let mut next = || match commands.try_recv() {
            Ok(HandlerCommand::Serve(serves)) => Some(serves),
            _ => None,
        };
        let set = SystemTime::now();
        for (now, changed) in [
            (set, None),
            (UNIX_EPOCH, Some(false)),
            (UNIX_EPOCH, None),
            (set, Some(true)),
            (UNIX_EPOCH, Some(false)),
        ] {
            relay.update_serving(now);
            assert_eq!(next(), changed, "{now:?}");
            assert_eq!(relay.is_serving, wall_clock::is_set(now));
        }
        // Two reasons not to serve: the end of one is not enough.
        relay.set_serving(false);
        relay.update_serving(set);
        assert_eq!(next(), None);
        relay.set_serving(true);
        assert_eq!(next(), Some(true));
    }

    #[test]
    fn in_the_automatic_mode_an_address_through_another_relay_does_not_count() {
        let mut relay = Behaviour::new(Keypair::generate_ed25519(), Config::default()).unwrap();
        relay.set_serving(None);
        let direct = "/ip4/8.8.8.8/tcp/1".parse::<Multiaddr>().unwrap();
        // As libp2p's relay client confirms it.
        let relayed = direct.clone().with_p2p(PeerId::random()).unwrap();
        let relayed = relayed.with(libp2p::multiaddr::Protocol::P2pCircuit);
        for (addr, serves) in [(&relayed, false), (&direct, true)] {
            let confirmed = FromSwarm::ExternalAddrConfirmed(ExternalAddrConfirmed { addr });
            relay.on_swarm_event(confirmed);
            assert_eq!(relay.is_serving, serves, "{addr}");
        }
    }

    /// The handler of a connection is dropped before the connection has closed, which may take long.
    #[test]
    fn a_stop_request_to_a_connection_that_is_being_closed_fails_at_once() {
        let (now, config) = (Instant::now(), Config::default());
        let mut relay = Behaviour::new(Keypair::generate_ed25519(), config).unwrap();
        let [source, target] = [1, 2].map(|id| {
            let (peer, connection) = (PeerId::random(), ConnectionId::new_unchecked(id));
            let up = Connection::new(peer, Multiaddr::empty(), false, 0, now);
            relay.relay.connections.add(connection, up);
            let (sender, _) = mpsc::unbounded();
            relay.handlers.insert(connection, (sender, ActivityCounter::default()));
            End { peer, connection }
        });
        let [reserve, connect] =
            [(target, Request::Reserve), (source, Request::Connect(target.peer))].map(
                |(from, request)| {
                    let (reply, answer) = oneshot::channel();
                    relay.relay.handle_request(from, Ok(request), reply, now);
                    while let Some(action) = relay.relay.actions.pop_front() {
                        relay.carry_out(action);
                    }
                    answer
                },
            );
        for answer in [reserve, connect] {
            assert!(matches!(answer.now_or_never(), Some(Ok(Answer::Final(..)))));
        }
        assert_eq!(relay.relay.circuits.count(), 0);
    }

    #[test]
    fn a_drain_of_any_length_is_accepted() {
        let mut relay = Behaviour::new(Keypair::generate_ed25519(), Config::default()).unwrap();
        relay.drain(Duration::MAX);
        assert!(relay.relay.is_draining());
    }
}
