//! The relay without its sockets: what it makes of what happens on its connections.
//!
//! Sans-IO. What happened comes in with `now`, what is to be done goes out as [`Order`]s, and the tables
//! in between are wired together here: [`reservations`] and [`circuits`] decide what a request gets,
//! [`heartbeat`] and [`reclaim`] which peers are gone. `relay/reserve.rs` follows one RESERVE through,
//! `relay/connect.rs` one CONNECT; `relay/sweep.rs` finds what ends by time, `relay/close.rs` says which
//! connections the relay closes, `relay/policy.rs` has what may change while it runs. `C` names a
//! connection: [`crate::Behaviour`] uses the swarm's `ConnectionId`, tests use numbers.

pub mod accounts;
pub mod bandwidth;
pub mod circuits;
mod close;
mod connect;
pub mod connections;
pub mod heartbeat;
mod order;
mod policy;
pub mod quota;
pub mod rates;
pub mod reclaim;
pub mod reservations;
mod reserve;
mod sweep;

use std::{
    collections::{HashMap, VecDeque},
    hash::Hash,
    time::Instant,
};

use libp2p::{Multiaddr, PeerId};

pub use self::order::{Command, Grant, Order, Quota, RequestId};
use self::{
    accounts::Accounts,
    bandwidth::Link,
    circuits::{Circuits, End},
    connections::{Connection, Connections},
    heartbeat::Heartbeat,
    rates::Rates,
    reclaim::Reclaim,
    reservations::Reservations,
};
use crate::{
    access::{Access, Terms},
    activity::Signs,
    config::{Config, ConfigError},
    event::{Carried, CircuitEnd, CircuitId, Event, Refused, StopFailed},
    wire::{BadRequest, Limit, Request},
};

/// One relay.
pub struct Relay<C, S> {
    config: Config,
    connections: Connections<C>,
    reservations: Reservations<C>,
    circuits: Circuits<C>,
    accounts: Accounts,
    /// The CONNECTs whose targets have yet to answer; `None` for those that were given up.
    asking: HashMap<CircuitId, Option<Asking>>,
    /// Who decides instead of the configuration's lists.
    access: Option<Box<dyn Access>>,
    reserve_rates: Rates,
    connect_rates: Rates,
    link: Link,
    heartbeat: Heartbeat,
    reclaim: Reclaim<Newcomer<C>>,
    sweep_due: Instant,
    draining: Option<Draining>,
    /// How many peers were asked for a sign of life so far.
    questions: u64,
    orders: VecDeque<Order<C, S>>,
}

/// A CONNECT whose target has yet to answer.
struct Asking {
    request: RequestId,
    limit: Limit,
}

/// A RESERVE that is yet to be answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Newcomer<C> {
    from: End<C>,
    request: RequestId,
    terms: Terms,
}

/// While it takes nobody in.
#[derive(Clone, Copy, Debug)]
struct Draining {
    /// When all connections without a circuit are to be closed.
    until: Instant,
    /// When it was last looked how many there are.
    looked: Instant,
    /// The part of a connection that was due then.
    due: f64,
}

impl<C: Copy + Ord + Hash, S> Relay<C, S> {
    /// A relay that starts at `now`.
    ///
    /// # Errors
    ///
    /// When the configuration makes no sense: [`Config::validate`].
    pub fn new(config: Config, now: Instant) -> Result<Self, ConfigError> {
        config.validate()?;
        Ok(Self {
            connections: Connections::new(),
            reservations: Reservations::new((&config).into()),
            circuits: Circuits::new((&config).into()),
            accounts: Accounts::new(),
            asking: HashMap::new(),
            access: None,
            reserve_rates: Rates::new(config.reserve_rate),
            connect_rates: Rates::new(config.connect_rate),
            link: Link::new((&config).into(), now),
            heartbeat: Heartbeat::new((&config).into(), now),
            reclaim: Reclaim::new((&config).into()),
            sweep_due: now + config.sweep,
            draining: None,
            questions: 0,
            orders: VecDeque::new(),
            config,
        })
    }

    /// The next thing to be done.
    pub fn next_order(&mut self) -> Option<Order<C, S>> {
        self.orders.pop_front()
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
    pub fn circuits(&self) -> &Circuits<C> {
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
    pub fn questions(&self) -> u64 {
        self.questions
    }

    /// How many newcomers wait for a slot.
    pub fn waiting(&self) -> usize {
        self.reclaim.waiting()
    }

    /// A connection came up.
    pub fn connected(&mut self, id: C, connection: Connection) {
        self.connections.add(id, connection);
    }

    /// The peer says under which address it reached the relay over this connection.
    pub fn reported(&mut self, connection: C, address: Multiaddr) {
        self.connections.reported(connection, address);
    }

    /// Something was heard from `peer`.
    pub fn heard(&mut self, peer: PeerId, now: Instant) {
        self.connections.heard(&peer, now);
    }

    /// Signs of life on this connection are counted here: [`crate::Behaviour::listen_to`].
    pub fn listen_to(&mut self, connection: C, signs: Signs) {
        self.connections.listen_to(connection, signs);
    }

    /// A peer asks for something.
    pub fn requested(&mut self, from: End<C>, request: RequestId, asked: Request, now: Instant) {
        match asked {
            Request::Reserve if self.is_draining() => {
                self.refuse(from, request, Refused::Draining);
            }
            Request::Connect(target) if self.is_draining() => {
                self.refuse_circuit(from, request, target, Refused::Draining);
            }
            Request::Reserve => self.reserve(from, request, now),
            Request::Connect(target) => self.connect(from, request, target, now),
        }
    }

    /// A peer asked for something that was not understood; it has been told.
    pub fn not_understood(&mut self, from: End<C>, reason: BadRequest) {
        let address = self.address_of(from.connection);
        self.tell(Event::RequestRejected { peer: from.peer, address, reason });
    }

    /// A connection is gone.
    pub fn disconnected(&mut self, gone: End<C>, now: Instant) {
        let End { peer, connection } = gone;
        self.connections.remove(connection);
        let left = self.reclaim.withdraw(|newcomer| newcomer.from.connection == connection);
        if !left.is_empty() {
            log::debug!("reservation waits no longer: peer {peer}: its connection is gone");
        }
        for (id, circuit) in self.circuits.over(gone) {
            self.end_circuit(id, circuit);
            let at_source = circuit.source.connection == connection;
            match self.asking.contains_key(&id) {
                // The target will not answer any more.
                true if !at_source => self.target_answered(id, Err(StopFailed::Gone), now),
                // Its handler has said what its circuits carried (`Handler::poll_close`), but for
                // one that it never came to open: nothing was carried there.
                false if at_source => {
                    self.circuit_ended(id, CircuitEnd::Ended, Carried::default(), now);
                }
                _ => {}
            }
        }
        if self.connections.of(&peer).is_empty() {
            self.accounts.left(&peer);
        }
        let before = self.reservations.connection(&peer);
        let up = self.fit_for_a_slot(peer);
        let left = self.reservations.disconnected(peer, connection, &up, now);
        self.after_leaving(peer, before, left, now);
    }

    /// Gives up `peer`'s slot and ends its circuits. Whether it held a slot.
    pub fn release(&mut self, peer: PeerId, now: Instant) -> bool {
        let held = self.reservations.release(peer);
        self.tell_freed(now);
        self.end_circuits_of(&peer);
        held
    }

    fn end_circuits_of(&mut self, peer: &PeerId) {
        for (id, circuit) in self.circuits.of(peer) {
            self.end_circuit(id, circuit);
        }
    }

    fn command(&mut self, to: End<C>, command: Command<S>) {
        // A connection that is gone takes no commands.
        if self.connections.get(to.connection).is_some() {
            self.orders.push_back(Order::Command(to, command));
        }
    }

    /// Where the peer at the other end comes from; empty if the connection is gone.
    fn address_of(&self, connection: C) -> Multiaddr {
        let connection = self.connections.get(connection);
        connection.map_or_else(Multiaddr::empty, |connection| connection.remote.address.clone())
    }

    fn tell(&mut self, event: Event) {
        log::debug!("{event}");
        self.orders.push_back(Order::Tell(event));
    }
}
