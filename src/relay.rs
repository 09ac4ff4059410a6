//! The relay as a state machine, without sockets and clocks.
//!
//! Sans-IO: methods take what happened and `now`; what is to be done is appended to [`Relay::actions`]. This file connects
//! the tables: [`reservations`] and [`circuits`] decide what a request gets, [`heartbeat`] and [`reclaim`] which peers are
//! gone. `relay/reserve.rs` is one RESERVE, `relay/connect.rs` one CONNECT, `relay/sweep.rs` what ends by time,
//! `relay/close.rs` which connections the relay closes, `relay/policy.rs` what may change while it runs. `C` identifies a
//! connection and `R` takes the answer to a request: [`crate::Behaviour`] uses the swarm's `ConnectionId` and a oneshot,
//! tests use numbers.

pub mod accounts;
mod action;
pub mod bandwidth;
pub mod circuits;
mod close;
mod connect;
pub mod connections;
pub mod heartbeat;
mod policy;
pub mod quota;
pub mod rates;
pub mod reclaim;
pub mod reservations;
mod reserve;
mod sweep;

use std::{
    collections::{HashSet, VecDeque},
    hash::Hash,
    sync::Arc,
    time::Instant,
};

use libp2p::PeerId;

pub use self::action::{AccessCheck, Action, CircuitParameters};
use self::{
    accounts::Accounts,
    bandwidth::Link,
    circuits::Circuits,
    connections::{Connections, End, PendingRequest},
    heartbeat::Heartbeat,
    rates::Rates,
    reclaim::PendingReservation,
    reservations::Reservations,
};
use crate::{
    access::{Access, Terms},
    config::{Config, ConfigError, LONGEST, SHORTEST},
    event::{CircuitEnd, Event, FreedReason, Refused},
    wire::{BadRequest, Limit, Request},
};

/// One relay. A caller reads its fields, and changes [`Relay::connections`] only: adds those that came up.
pub struct Relay<C, R> {
    /// The configuration in force.
    pub config: Config,
    /// The connections that are up.
    pub connections: Connections<C>,
    /// The slots.
    pub reservations: Reservations<C>,
    /// The circuits.
    pub circuits: Circuits<C, R>,
    /// How much each peer, and all together, used the relay for.
    pub accounts: Accounts,
    /// Decides who may use the relay, instead of the configuration's lists.
    own_access: Option<Box<dyn Access>>,
    /// How often the access rules have changed.
    rules: u64,
    /// How many answers about slots and circuits have yet to come, and whether to ask again after the last.
    open_checks: usize,
    check_again: bool,
    reserve_rates: Rates,
    connect_rates: Rates,
    link: Link,
    heartbeat: Heartbeat,
    /// The newcomers that wait for a slot, in the order of their arrival.
    pub waiting: VecDeque<PendingReservation<C, R>>,
    /// When [`Relay::sweep`] is due. Any method may bring it forward.
    pub sweep_due: Instant,
    draining: Option<Draining<C, R>>,
    /// How many probes were sent since the start.
    pub probes: u64,
    /// What is to be done, oldest first, until the caller takes it.
    pub actions: VecDeque<Action<C, R>>,
}

/// The progress of a drain.
#[derive(Debug)]
struct Draining<C, R> {
    /// When all connections without a circuit are to be closed.
    until: Instant,
    /// When some were last closed.
    last: Instant,
    /// The fraction of a connection that was due then.
    due: f64,
    /// Requests that are answered by closing their connection: dropping a reply handle would reset its stream first.
    unanswered: Vec<R>,
    /// The connections that were in use when it began. In a foreign swarm, no others are closed.
    used: HashSet<C>,
}

impl<C: Copy + Ord + Hash, R> Relay<C, R> {
    /// A relay that starts at `now`.
    ///
    /// # Errors
    ///
    /// When the configuration is invalid: [`Config::validate`].
    pub fn new(config: Config, now: Instant) -> Result<Self, ConfigError> {
        config.validate()?;
        let relay = Self {
            connections: Connections::default(),
            reservations: Reservations::new(&config),
            circuits: Circuits::new(&config),
            accounts: Accounts::default(),
            own_access: None,
            rules: 0,
            open_checks: 0,
            check_again: false,
            reserve_rates: Rates::new(config.reserve_rate),
            connect_rates: Rates::new(config.connect_rate),
            link: Link::default(),
            heartbeat: Heartbeat::new(now),
            waiting: VecDeque::new(),
            sweep_due: now + config.sweep,
            draining: None,
            probes: 0,
            actions: VecDeque::new(),
            config,
        };
        relay.link.lock().configure(&relay.config, now);
        Ok(relay)
    }

    /// Handles a request, or one that could not be decoded. The answer goes to `reply`.
    pub fn handle_request(
        &mut self,
        from: End<C>,
        request: Result<Request, BadRequest>,
        reply: R,
        now: Instant,
    ) {
        let Some(connection) = self.connections.get(from.connection) else {
            return; // it closed meanwhile
        };
        let origin = Arc::clone(&connection.origin);
        let request = match request {
            Ok(request) => PendingRequest { from, origin, request, reply },
            Err(reason) => {
                self.actions.push_back(Action::Refuse(reply, reason.status()));
                let address = origin.address.clone();
                return self.report(Event::RequestRejected { peer: from.peer, address, reason });
            }
        };
        if self.draining.is_some() {
            self.refuse(request, Refused::Draining);
        } else if request.origin.relayed {
            self.refuse(request, Refused::Relayed);
        } else {
            self.check_request(request, now);
        }
    }

    /// Refuses a request with its status; while the relay drains, by closing its connection.
    fn refuse(&mut self, request: PendingRequest<C, R>, reason: Refused) {
        let PendingRequest { from, origin, request, reply } = request;
        match reason.status() {
            Some(status) => self.actions.push_back(Action::Refuse(reply, status)),
            None => self.close_unanswered(from, reply),
        }
        let (peer, address) = (from.peer, origin.address.clone());
        self.report(match request {
            Request::Reserve => Event::ReservationRefused { peer, address, reason },
            Request::Connect(target) => {
                Event::CircuitRefused { source: peer, address, target, reason }
            }
        });
    }

    /// Handles a connection that closed.
    pub fn on_disconnected(&mut self, gone: End<C>, now: Instant) {
        // 1. Forget it, and its request that waits for a slot.
        self.connections.remove(gone.connection);
        self.waiting.retain(|waiting| waiting.request.from != gone);
        // 2. End its circuits, but for those whose target can be asked elsewhere. The tasks of the connection are gone, and
        //    report nothing any more.
        for id in self.circuits.over(gone) {
            if self.ask_over_another(id, gone, now) {
                continue;
            }
            self.end_circuit(id, CircuitEnd::Disconnected);
            // The source's connection runs an open one, the target's one that is being set up.
            let circuit = self.circuits.get(id);
            if circuit.is_some_and(|it| it.opened_at.is_some() == (it.source == gone)) {
                self.on_circuit_ended(id, CircuitEnd::Disconnected, now);
            }
        }
        // 3. Move its reservation, or begin the grace.
        if self.connections.of(&gone.peer).next().is_none() {
            self.accounts.remove(&gone.peer);
        }
        self.abandon(gone, CircuitEnd::Disconnected, now);
    }

    /// Frees `peer`'s slot and ends its circuits; returns whether it held a slot.
    pub fn release(&mut self, peer: PeerId, reason: FreedReason, now: Instant) -> bool {
        let held = self.reservations.free(peer, reason);
        self.apply_changes(now);
        let circuits: Vec<_> = self.circuits.of(&peer).map(|(id, _)| id).collect();
        let is_denied = reason == FreedReason::Denied;
        let end = if is_denied { CircuitEnd::Denied } else { CircuitEnd::Released };
        circuits.into_iter().for_each(|id| self.end_circuit(id, end));
        held
    }

    /// What a circuit may carry on these terms.
    fn circuit_limit(&self, terms: Terms) -> Limit {
        let duration = terms.circuit_duration.unwrap_or(self.config.circuit_duration);
        let bytes = terms.circuit_bytes.unwrap_or(self.config.circuit_bytes);
        let duration = (!duration.is_zero()).then_some(duration.clamp(SHORTEST, LONGEST));
        Limit { duration, bytes: (bytes > 0).then_some(bytes) }
    }

    /// Logs an event, and reports it to the embedder.
    fn report(&mut self, event: Event) {
        log::debug!("{event}");
        self.actions.push_back(Action::Report(event));
    }
}
