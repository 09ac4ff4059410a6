//! How the other relays free slots, in a few lines each.
//!
//! Only that is modelled, and with simplifications in their favour: each holds one slot per peer, renews it even in a
//! full table, and frees it exactly at the end of its term. (rust-libp2p refuses renewals in a full table, and counts a
//! slot for each connection of a peer; go-libp2p honours terms for up to a minute longer.)

use std::{
    collections::{BTreeSet, HashMap},
    time::Duration,
};

use crate::simulation::{Action, Relay};

const HOUR: Duration = Duration::from_secs(60 * 60);

/// go-yamux probes each connection every 30 s, and closes it after 10 s without an answer: a dead peer is found after
/// at most 40 s, and a live one that stalls for over 10 s at the wrong time is disconnected.
const KEEPALIVE: Duration = Duration::from_secs(30);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);

/// rust-libp2p ignores a failed ping. But the ping is data, and Linux gives up after 15 retransmissions of it
/// (`tcp_retries2`), which take 924 s; plus 7 s on average until the next ping, every 15 s.
const TCP_TIMEOUT: Duration = Duration::from_secs(924 + 7);

/// What frees a slot, in addition to the end of its term.
#[derive(Clone, Copy)]
pub enum Policy {
    /// js-libp2p: nothing but the end of the term frees a slot.
    Term,
    /// rust-libp2p: the slot is freed with its connection.
    Disconnect,
    /// go-libp2p: the same, and connections have keepalives.
    Keepalive,
    /// Not a real relay: it knows at once which peers are gone, and never takes a stalled one for dead. A relay that
    /// refuses fewer peers has evicted live ones.
    AllKnowing,
}

pub struct Model {
    policy: Policy,
    slots: usize,
    /// The peer of each connection, and since when it is up.
    connections: HashMap<usize, (usize, Duration)>,
    reservations: HashMap<usize, Reservation>,
    due: BTreeSet<(Duration, Due)>,
    actions: Vec<Action>,
}

struct Reservation {
    connection: usize,
    expires: Duration,
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Due {
    /// The term of this peer's reservation may be over.
    Expires(usize),
    /// This connection is found to be dead.
    Dead(usize),
}

impl Model {
    pub fn new(policy: Policy, slots: usize) -> Self {
        Self {
            policy,
            slots,
            connections: HashMap::new(),
            reservations: HashMap::new(),
            due: BTreeSet::new(),
            actions: Vec::new(),
        }
    }

    fn free(&mut self, peer: usize) {
        self.reservations.remove(&peer);
        self.actions.push(Action::Freed(peer));
    }
}

impl Relay for Model {
    fn term(&self) -> Duration {
        match self.policy {
            Policy::Term => 2 * HOUR,
            Policy::Disconnect | Policy::Keepalive | Policy::AllKnowing => HOUR,
        }
    }

    fn on_connected(&mut self, connection: usize, peer: usize, now: Duration) {
        self.connections.insert(connection, (peer, now));
    }

    fn on_disconnected(&mut self, connection: usize, _: Duration) {
        let Some((peer, _)) = self.connections.remove(&connection) else {
            return;
        };
        let held = self.reservations.get(&peer);
        let was_over_it = held.is_some_and(|held| held.connection == connection);
        if was_over_it && !matches!(self.policy, Policy::Term) {
            self.free(peer);
        }
    }

    fn reserve(&mut self, connection: usize, now: Duration) {
        let Some((peer, _)) = self.connections.get(&connection).copied() else {
            return;
        };
        if !self.reservations.contains_key(&peer) && self.reservations.len() >= self.slots {
            self.actions.push(Action::Refused(connection));
            return;
        }
        let expires = now + self.term();
        let reservation = Reservation { connection, expires };
        self.reservations.insert(peer, reservation);
        self.due.insert((expires, Due::Expires(peer)));
        self.actions.push(Action::Granted(connection));
    }

    fn on_activity(&mut self, _: usize) {}

    fn on_frozen(&mut self, connection: usize, until: Option<Duration>, now: Duration) {
        let Some((_, up_since)) = self.connections.get(&connection) else {
            return;
        };
        let detected = match self.policy {
            Policy::Term => return,
            Policy::AllKnowing if until.is_some() => return,
            Policy::AllKnowing => now,
            Policy::Disconnect => now + TCP_TIMEOUT,
            Policy::Keepalive => {
                let probes = (now - *up_since).as_nanos() / KEEPALIVE.as_nanos() + 1;
                *up_since + KEEPALIVE * probes as u32 + KEEPALIVE_TIMEOUT
            }
        };
        if until.is_none_or(|until| until > detected) {
            self.due.insert((detected, Due::Dead(connection)));
        }
    }

    fn next(&self) -> Option<Duration> {
        self.due.first().map(|(at, _)| *at)
    }

    fn wake(&mut self, now: Duration) {
        match self.due.pop_first() {
            Some((_, Due::Expires(peer))) => {
                let over = self.reservations.get(&peer);
                if over.is_some_and(|reservation| reservation.expires <= now) {
                    self.free(peer);
                }
            }
            Some((_, Due::Dead(connection))) if self.connections.contains_key(&connection) => {
                self.actions.push(Action::Closed(connection));
                self.on_disconnected(connection, now);
            }
            _ => {}
        }
    }

    fn take_actions(&mut self) -> Vec<Action> {
        std::mem::take(&mut self.actions)
    }

    fn left_over(&self) -> usize {
        self.reservations.len()
    }
}
