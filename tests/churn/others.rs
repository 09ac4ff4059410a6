//! How the other relays give slots back, in a few lines each.
//!
//! Only that is modelled, and rather too well than not: all of them hold one slot a peer, renew it
//! whatever the table looks like, and forget a slot the moment its term is over. (rust-libp2p
//! refuses renewals in a full table, and counts a slot for each connection of a peer; go-libp2p
//! honours terms for up to a minute longer.)

use std::{
    collections::{BTreeSet, HashMap},
    time::Duration,
};

use crate::world::{Act, Relay};

const HOUR: Duration = Duration::from_secs(60 * 60);

/// go-yamux asks on each connection every 30 s, and closes it if no answer comes for 10 s: a dead
/// peer is found after 40 s at most, and a live one that stalls at the wrong time for over 10 s is
/// lost.
const KEEPALIVE: Duration = Duration::from_secs(30);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);

/// rust-libp2p does nothing about a ping that fails. But the ping is data, and Linux gives up after
/// 15 retransmissions of it (`tcp_retries2`), which take 924 s; 7 s until the next ping at 15 s.
const TCP_GIVES_UP: Duration = Duration::from_secs(924 + 7);

/// What frees a slot, beside the end of its term.
#[derive(Clone, Copy)]
pub enum Policy {
    /// js-libp2p: nothing but the end of the term frees a slot.
    Term,
    /// rust-libp2p: the slot goes with the connection.
    Disconnect,
    /// go-libp2p: the same, and connections are kept alive.
    Keepalive,
    /// No relay: it knows at once who is gone, and takes nobody who stalls for dead. Whoever
    /// refuses fewer has turned live peers out for it.
    AllKnowing,
}

pub struct Model {
    policy: Policy,
    slots: usize,
    /// Whose they are, since when.
    connections: HashMap<usize, (usize, Duration)>,
    reservations: HashMap<usize, Reservation>,
    due: BTreeSet<(Duration, Due)>,
    acts: Vec<Act>,
}

struct Reservation {
    connection: usize,
    expires: Duration,
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Due {
    /// The term of this peer's reservation may be over.
    Expires(usize),
    /// This connection is found out.
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
            acts: Vec::new(),
        }
    }

    fn free(&mut self, peer: usize) {
        self.reservations.remove(&peer);
        self.acts.push(Act::Freed(peer));
    }
}

impl Relay for Model {
    fn term(&self) -> Duration {
        match self.policy {
            Policy::Term => 2 * HOUR,
            Policy::Disconnect | Policy::Keepalive | Policy::AllKnowing => HOUR,
        }
    }

    fn connected(&mut self, connection: usize, peer: usize, now: Duration) {
        self.connections.insert(connection, (peer, now));
    }

    fn disconnected(&mut self, connection: usize, _: Duration) {
        let Some((peer, _)) = self.connections.remove(&connection) else {
            return;
        };
        let held = self.reservations.get(&peer);
        let held_over_it = held.is_some_and(|held| held.connection == connection);
        if held_over_it && !matches!(self.policy, Policy::Term) {
            self.free(peer);
        }
    }

    fn reserve(&mut self, connection: usize, now: Duration) {
        let Some((peer, _)) = self.connections.get(&connection).copied() else {
            return;
        };
        if !self.reservations.contains_key(&peer) && self.reservations.len() >= self.slots {
            self.acts.push(Act::Refused(connection));
            return;
        }
        let expires = now + self.term();
        let reservation = Reservation { connection, expires };
        self.reservations.insert(peer, reservation);
        self.due.insert((expires, Due::Expires(peer)));
        self.acts.push(Act::Granted(connection));
    }

    fn heard(&mut self, _: usize) {}

    fn froze(&mut self, connection: usize, until: Option<Duration>, now: Duration) {
        let Some((_, up_since)) = self.connections.get(&connection) else {
            return;
        };
        let found = match self.policy {
            Policy::Term => return,
            Policy::AllKnowing if until.is_some() => return,
            Policy::AllKnowing => now,
            Policy::Disconnect => now + TCP_GIVES_UP,
            Policy::Keepalive => {
                let asked = (now - *up_since).as_nanos() / KEEPALIVE.as_nanos() + 1;
                *up_since + KEEPALIVE * asked as u32 + KEEPALIVE_TIMEOUT
            }
        };
        if until.is_none_or(|until| until > found) {
            self.due.insert((found, Due::Dead(connection)));
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
                self.acts.push(Act::Closed(connection));
                self.disconnected(connection, now);
            }
            _ => {}
        }
    }

    fn take_acts(&mut self) -> Vec<Act> {
        std::mem::take(&mut self.acts)
    }

    fn left_over(&self) -> usize {
        self.reservations.len()
    }
}
