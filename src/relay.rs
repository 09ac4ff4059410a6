//! The relay as a state machine, without sockets and clocks.
//!
//! Sans-IO: methods take what happened and `now`; what is to be done is appended to [`Relay::actions`]. This file
//! connects the tables: [`reservations`] and [`circuits`] decide what a request gets, [`heartbeat`] and [`reclaim`]
//! which peers are gone. `relay/reserve.rs` is one RESERVE, `relay/connect.rs` one CONNECT, `relay/sweep.rs` what ends
//! by time and which connections the relay closes, `relay/policy.rs` what may change while it runs. `C` identifies a
//! connection and `R` takes the answer to a request: [`crate::Behaviour`] uses the swarm's `ConnectionId` and a
//! oneshot, tests use numbers.

pub mod accounts;
pub mod bandwidth;
pub mod circuits;
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
    time::{Duration, Instant},
};

use libp2p::{PeerId, futures::channel::oneshot};

use self::{
    accounts::{Accounts, Counters},
    bandwidth::Link,
    circuits::Circuits,
    connections::{Connections, End, PendingRequest},
    heartbeat::Heartbeat,
    rates::Rates,
    reclaim::PendingReservation,
    reservations::{Receipt, Reservations},
};
use crate::{
    access::{Access, Lists, Permission, Terms},
    config::{Config, ConfigError, LONGEST, SHORTEST},
    event::{CircuitEnd, CircuitId, Event, FreedReason, Refused},
    wire::{BadRequest, Limit, Request, Status},
};

/// One relay. A caller reads its fields and takes its [`actions`](Relay::actions). It changes only
/// [`Relay::connections`]: adds those that came up, and records what it learns of them.
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
    /// The embedder's access rules, which decide instead of the configuration's lists.
    embedder_access: Option<Box<dyn Access>>,
    /// The configuration's lists with their subnets sorted.
    lists: Lists,
    /// How often the access rules have changed, or may have.
    rule_changes: u64,
    /// How many answers of the access rules about slots and circuits have yet to come.
    open_checks: usize,
    /// The peers to ask about again after the last of them, sorted; `None`: all peers.
    check_again: Vec<Option<PeerId>>,
    reserve_rates: Rates,
    connect_rates: Rates,
    /// Divides the bandwidth among the circuits.
    link: Link,
    heartbeat: Heartbeat,
    /// The newcomers that wait for a slot, in the order of their arrival.
    pub waiting: VecDeque<PendingReservation<C, R>>,
    /// When [`Relay::sweep`] is due. Any method may bring it forward.
    pub sweep_due: Instant,
    draining: Option<Draining<C, R>>,
    /// How many probes have been sent since the start.
    pub probes: u64,
    /// What is to be done, oldest first, until the caller takes it.
    pub actions: VecDeque<Action<C, R>>,
}

/// Something that the caller is to do. `R` is the reply handle of a request.
#[derive(Debug)]
pub enum Action<C, R> {
    /// Answer a RESERVE with OK. Then report whether the answer arrived ([`Relay::on_delivered`]), or that its voucher
    /// could not be signed ([`Relay::on_sign_failed`]).
    Grant {
        /// The request.
        request: PendingRequest<C, R>,
        /// Identifies the answer in that report.
        receipt: Receipt,
        /// The limits of circuits to the peer.
        limit: Limit,
        /// When the reservation's term ends.
        expires: Instant,
    },
    /// Await a [`Permission::Later`], and report the answer: [`Relay::on_access_checked`].
    CheckAccess(AccessCheck<C, R>, Permission),
    /// Answer a request with a status other than OK.
    Refuse(R, Status),
    /// Ask `target` on a stop stream whether it accepts a circuit, and report its answer over this connection:
    /// [`Relay::on_target_answered`].
    ///
    /// The end is the target's: over the connection of its reservation, or over another one if the target did not
    /// answer there.
    AskTarget(End<C>, Box<CircuitParameters>),
    /// Probe the peer over this connection, and wait this long for the answer.
    Probe(End<C>, Duration),
    /// `true`: keep the connection open, because the peer's slot points at it; `false`: no longer. Nothing changes
    /// while the slot is in grace, because the peer may be heard again over the connection.
    Hold(End<C>, bool),
    /// Close a connection.
    Close(End<C>),
    /// Report an event to the embedder.
    Report(Event),
}

/// What an answer of the access rules that comes later is about.
#[derive(Debug)]
pub enum AccessCheck<C, R> {
    /// A request, and how often the rules had changed when they were asked.
    Request(PendingRequest<C, R>, u64),
    /// The slot of a peer, and the connection that it points at, if any.
    Slot(PeerId, Option<C>),
    /// A circuit that is open or being set up.
    Circuit(CircuitId),
}

/// What the tasks of one circuit need.
#[derive(Debug)]
pub struct CircuitParameters {
    /// The circuit.
    pub id: CircuitId,
    /// When the circuit was admitted.
    pub since: Instant,
    /// The limits, as told to both peers.
    pub limit: Limit,
    /// Divides the bandwidth among this circuit and the others.
    pub link: Link,
    /// Its source and its target.
    pub ends: [PeerId; 2],
    /// Counts the bytes that it carries.
    pub counters: Counters,
    /// Cancelled when the relay ends the circuit, or asks the target over another connection.
    pub ended: oneshot::Receiver<()>,
}

/// The progress of a drain.
struct Draining<C, R> {
    /// By when all connections without a circuit are to be closed.
    until: Instant,
    /// When `due` was last updated.
    last: Instant,
    /// The fraction of a connection that was due to be closed then: only whole ones can be.
    due: f64,
    /// The requests that are answered by closing their connection, with their reply handles: to drop one would reset
    /// its stream first.
    unanswered: Vec<(C, R)>,
    /// The connections that held a slot or carried a circuit when the drain began. In an embedder's swarm only these
    /// and those that hold a slot since are closed.
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
            embedder_access: None,
            lists: config.access.sorted(),
            rule_changes: 0,
            open_checks: 0,
            check_again: Vec::new(),
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

    /// Handles a request; `Err`: one that could not be decoded. The answer goes to `reply`.
    pub fn handle_request(
        &mut self,
        from: End<C>,
        request: Result<Request, BadRequest>,
        reply: R,
        now: Instant,
    ) {
        let Some(origin) = self.connections.get(from.connection).map(|up| up.origin.clone()) else {
            return; // the connection closed meanwhile
        };
        let request = match request {
            Ok(request) => PendingRequest { from, origin, request, reply },
            Err(reason) => {
                self.actions.push_back(Action::Refuse(reply, reason.status()));
                let address = origin.address.clone();
                return self.report(Event::RequestRejected { peer: from.peer, address, reason });
            }
        };
        if self.is_draining() {
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
        let (source, address) = (from.peer, origin.address.clone());
        self.report(match request {
            Request::Reserve => Event::ReservationRefused { peer: source, address, reason },
            Request::Connect(target) => Event::CircuitRefused { source, address, target, reason },
        });
    }

    /// Handles a connection that closed.
    pub fn on_disconnected(&mut self, gone: End<C>, now: Instant) {
        // 1. Forget the connection, and its request if that waits for a slot.
        self.connections.remove(gone.connection);
        self.waiting.retain(|waiting| waiting.request.from != gone);
        // 2. End its circuits, or ask their targets elsewhere. Move the slot to another connection, or begin its grace.
        self.abandon(gone, CircuitEnd::Disconnected, now);
        // 3. Remove the circuits whose task ran on this connection: that is gone, and reports nothing any more. An open
        //    circuit's task runs on the source's connection, that of one being set up on the target's.
        for id in self.circuits.over(gone) {
            let Some(circuit) = self.circuits.records.get(&id) else { continue };
            let runs_on = if circuit.opened_at.is_some() { circuit.source } else { circuit.target };
            if runs_on == gone {
                self.on_circuit_ended(id, CircuitEnd::Disconnected, now);
            }
        }
        if self.connections.of(&gone.peer).next().is_none() {
            self.accounts.remove(&gone.peer);
        }
    }

    /// Frees `peer`'s slot and ends its circuits; returns whether it held a slot.
    pub fn release(&mut self, peer: PeerId, reason: FreedReason, now: Instant) -> bool {
        let held = self.reservations.free(peer, reason);
        self.apply_changes(now);
        // If it is denied, the circuits that it opened stay: the rules are asked about each of them by itself, because
        // a peer that may hold no slot may be allowed to connect.
        let is_denied = reason == FreedReason::Denied;
        let of_it = self.circuits.of(&peer).filter(|(_, it)| !is_denied || it.target.peer == peer);
        let circuits: Vec<_> = of_it.map(|(id, _)| id).collect();
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

    /// Logs an event, and has it reported to the embedder.
    fn report(&mut self, event: Event) {
        log::debug!("{event}");
        self.actions.push_back(Action::Report(event));
    }
}
