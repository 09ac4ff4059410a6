//! The relay without its sockets: what it makes of what happens on its connections.
//!
//! Sans-IO. What happened comes in with `now`, what is to be done goes out as [`Action`]s, and the tables
//! in between are wired together here: [`reservations`] and [`circuits`] decide what a request gets,
//! [`heartbeat`] and [`reclaim`] which peers are gone. `relay/reserve.rs` follows one RESERVE through,
//! `relay/connect.rs` one CONNECT; `relay/sweep.rs` finds what ends by time, `relay/close.rs` says which
//! connections the relay closes, `relay/policy.rs` has what may change while it runs. `C` names a
//! connection, and `R` takes the answer to a request: [`crate::Behaviour`] uses the swarm's `ConnectionId`
//! and a oneshot, tests use numbers.

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
    collections::VecDeque,
    hash::Hash,
    sync::{Arc, PoisonError},
    time::Instant,
};

use libp2p::{Multiaddr, PeerId};

pub use self::action::{Action, CircuitParameters, Pending};
use self::{
    accounts::Accounts,
    bandwidth::Link,
    circuits::{Circuits, End},
    connections::{Connection, Connections, Origin},
    heartbeat::Heartbeat,
    rates::Rates,
    reclaim::Reclaim,
    reservations::Reservations,
};
use crate::{
    access::Access,
    activity::Signs,
    config::{Config, ConfigError},
    event::{CircuitEnd, Event, FreedReason, Refused, StopFailed},
    wire::{BadRequest, Limit, Request},
};

/// One relay.
pub struct Relay<C, R> {
    config: Config,
    connections: Connections<C>,
    reservations: Reservations<C>,
    circuits: Circuits<C, PendingConnect<C, R>>,
    accounts: Accounts,
    /// Decides instead of the configuration's lists.
    access: Option<Box<dyn Access>>,
    reserve_rates: Rates,
    connect_rates: Rates,
    link: Link,
    heartbeat: Heartbeat,
    reclaim: Reclaim<C, R>,
    sweep_due: Instant,
    draining: Option<Draining<R>>,
    /// How many peers were asked for a sign of life so far.
    probes: u64,
    actions: VecDeque<Action<C, R>>,
}

/// A CONNECT whose target has yet to answer.
#[derive(Debug)]
pub struct PendingConnect<C, R> {
    request: Pending<C, R>,
    limit: Limit,
}

/// While it takes nobody in.
#[derive(Debug)]
struct Draining<R> {
    /// When all connections without a circuit are to be closed.
    until: Instant,
    /// When it was last looked how many there are.
    looked: Instant,
    /// The part of a connection that was due then.
    due: f64,
    /// Requests that closing the connection answers: dropped here, their streams would be reset before.
    unanswered: Vec<R>,
}

impl<C: Copy + Ord + Hash, R> Relay<C, R> {
    /// A relay that starts at `now`.
    ///
    /// # Errors
    ///
    /// When the configuration makes no sense: [`Config::validate`].
    pub fn new(config: Config, now: Instant) -> Result<Self, ConfigError> {
        config.validate()?;
        Ok(Self {
            connections: Connections::default(),
            reservations: Reservations::new(&config),
            circuits: Circuits::new(&config),
            accounts: Accounts::default(),
            access: None,
            reserve_rates: Rates::new(config.reserve_rate),
            connect_rates: Rates::new(config.connect_rate),
            link: Link::new(&config, now),
            heartbeat: Heartbeat::new(now),
            reclaim: Reclaim::default(),
            sweep_due: now + config.sweep,
            draining: None,
            probes: 0,
            actions: VecDeque::new(),
            config,
        })
    }

    /// The next thing to be done.
    pub fn next_action(&mut self) -> Option<Action<C, R>> {
        self.actions.pop_front()
    }

    /// When [`Relay::sweep`] is due. Whatever happens may bring it forward.
    pub fn sweep_due(&self) -> Instant {
        self.sweep_due
    }

    /// The configuration that holds.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// The table of reservations, to look at.
    pub fn reservations(&self) -> &Reservations<C> {
        &self.reservations
    }

    /// The table of circuits, to look at.
    pub fn circuits(&self) -> &Circuits<C, PendingConnect<C, R>> {
        &self.circuits
    }

    /// The accounts, to look at.
    pub fn accounts(&self) -> &Accounts {
        &self.accounts
    }

    /// The connections that are up, to look at.
    pub fn connections(&self) -> &Connections<C> {
        &self.connections
    }

    /// How often a peer was asked for a sign of life since the start.
    pub fn probes(&self) -> u64 {
        self.probes
    }

    /// How many newcomers wait for a slot.
    pub fn waiting(&self) -> usize {
        self.reclaim.waiting()
    }

    /// A connection came up.
    pub fn on_connected(&mut self, id: C, connection: Connection) {
        self.connections.add(id, connection);
    }

    /// The peer says under which address it reached the relay over this connection.
    pub fn reported(&mut self, connection: C, address: Multiaddr) {
        if let Some(up) = self.connections.get(connection) {
            *up.origin.reported.lock().unwrap_or_else(PoisonError::into_inner) = Some(address);
        }
    }

    /// Something was heard from `peer`.
    pub fn heard(&mut self, peer: PeerId, now: Instant) {
        self.connections.heard(&peer, now);
    }

    /// Signs of life on this connection are counted here: [`crate::Behaviour::listen_to`].
    pub fn listen_to(&mut self, connection: C, signs: Signs) {
        if let Some(up) = self.connections.get_mut(connection) {
            up.listen_to(signs);
        }
    }

    /// Decides a request, or refuses one that could not be decoded; the answer goes to `reply`.
    pub fn handle_request(
        &mut self,
        from: End<C>,
        asked: Result<Request, BadRequest>,
        reply: R,
        now: Instant,
    ) {
        let Some(connection) = self.connections.get(from.connection) else {
            return; // it is gone by now
        };
        let request = Pending { from, origin: Arc::clone(&connection.origin), reply };
        match asked {
            Ok(Request::Reserve) => self.reserve(request, now),
            Ok(Request::Connect(target)) => self.connect(request, target, now),
            Err(reason) => {
                let address = request.origin.address.clone();
                self.actions.push_back(Action::Refuse(request.reply, reason.status()));
                self.tell(Event::RequestRejected { peer: from.peer, address, reason });
            }
        }
    }

    /// The checks that RESERVE and CONNECT share.
    fn permit(&self, origin: &Origin) -> Result<(), Refused> {
        if self.draining.is_some() {
            return Err(Refused::Draining);
        }
        if origin.relayed { Err(Refused::Relayed) } else { Ok(()) }
    }

    pub(crate) fn access(&self) -> &dyn Access {
        self.access.as_deref().unwrap_or(&self.config.access)
    }

    /// A connection is gone.
    pub fn on_disconnected(&mut self, gone: End<C>, now: Instant) {
        let End { peer, connection } = gone;
        self.connections.remove(connection);
        let left = self.reclaim.withdraw(|request| request.from == gone);
        if !left.is_empty() {
            log::debug!("reservation waits no longer: peer {peer}: its connection is gone");
        }
        for id in self.circuits.over(gone) {
            self.end_circuit(id);
            let circuit = self.circuits.get(id);
            let Some((at_source, is_open)) =
                circuit.map(|circuit| (circuit.source == gone, circuit.open().is_some()))
            else {
                continue;
            };
            match is_open {
                // The target will not answer any more.
                false if !at_source => _ = self.on_target_answered(id, Err(StopFailed::Gone), now),
                // Nothing carries its bytes any more.
                true if at_source => self.on_circuit_ended(id, CircuitEnd::Ended, now),
                _ => {}
            }
        }
        if self.connections.of(&peer).is_empty() {
            self.accounts.left(&peer);
        }
        let up = self.fit_for_a_slot(peer);
        self.reservations.disconnected(peer, connection, &up, FreedReason::Disconnected, now);
        self.tell_changes(now);
    }

    /// Gives up `peer`'s slot and ends its circuits. Whether it held a slot.
    pub fn release(&mut self, peer: PeerId, now: Instant) -> bool {
        let held = self.reservations.release(peer);
        self.tell_changes(now);
        self.end_circuits_of(&peer);
        held
    }

    fn end_circuits_of(&mut self, peer: &PeerId) {
        let circuits: Vec<_> = self.circuits.of(peer).map(|(id, _)| id).collect();
        circuits.into_iter().for_each(|id| self.end_circuit(id));
    }

    /// Where the peer at the other end comes from; empty if the connection is gone.
    fn address_of(&self, connection: C) -> Multiaddr {
        let connection = self.connections.get(connection);
        connection.map_or_else(Multiaddr::empty, |connection| connection.origin.address.clone())
    }

    fn tell(&mut self, event: Event) {
        log::debug!("{event}");
        self.actions.push_back(Action::Tell(event));
    }
}
