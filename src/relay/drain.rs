//! Draining: nobody is taken in any more, and the connections are given back, a few at a time.
//!
//! A client whose connection went is back within seconds, here or elsewhere; one that was refused
//! may stay away for an hour. So whoever asks is answered by closing its connection. Spread out,
//! because those who leave together come back together. Circuits stay for as long as they may.

use std::{hash::Hash, time::Instant};

use super::{Command, Order, Relay, RequestId};
use crate::{circuits::End, event::Refused};

/// While it takes nobody in.
#[derive(Clone, Copy, Debug)]
pub(super) struct Draining {
    /// When all connections without a circuit are to be closed.
    until: Instant,
    /// When it was last looked how many there are.
    looked: Instant,
    /// The part of a connection that was due then.
    due: f64,
}

impl Draining {
    /// How many of `unused` connections are due: with those that remain, as many in the same time
    /// from now on.
    fn due(&mut self, unused: usize, now: Instant) -> usize {
        if now >= self.until {
            return unused;
        }
        let since = now.saturating_duration_since(self.looked);
        let left = self.until.saturating_duration_since(self.looked);
        self.due += unused as f64 * since.as_secs_f64() / left.as_secs_f64();
        self.looked = now;
        let due = self.due.floor();
        self.due -= due;
        due as usize
    }
}

impl<C: Copy + Ord + Hash, S> Relay<C, S> {
    /// Takes nobody in from now on, and closes all connections without a circuit until then.
    pub fn drain(&mut self, until: Instant, now: Instant) {
        self.draining = Some(Draining {
            until,
            looked: now,
            due: 0.0,
        });
        for waiting in self.reclaim.take() {
            let newcomer = waiting.newcomer;
            self.refuse(newcomer.from, newcomer.request, Refused::Draining);
        }
        self.hurry(now);
    }

    /// Takes clients in again.
    pub fn resume(&mut self) {
        self.draining = None;
    }

    /// Whether it takes nobody in.
    pub fn is_draining(&self) -> bool {
        self.draining.is_some()
    }

    /// Closes as many connections as are due. One whose last circuit ends is one of them.
    pub(super) fn give_back(&mut self, now: Instant) {
        let Some(draining) = &mut self.draining else {
            return;
        };
        let mut unused = self.connections.without_circuits();
        let due = draining.due(unused.len(), now);
        unused.sort_unstable_by_key(|(_, connection)| *connection);
        for (peer, connection) in unused.into_iter().take(due) {
            self.close(End { peer, connection });
        }
    }

    /// Turns a request down: with its status, or, where there is none for it, without a word.
    pub(super) fn turn_down(&mut self, from: End<C>, request: RequestId, reason: &Refused) {
        if let Some(status) = reason.status() {
            self.command(from, Command::Refuse(request, status));
        } else if self.connections.carries_circuits(from.connection) {
            self.command(from, Command::Drop(request));
        } else {
            self.close(from);
        }
    }

    /// Has a connection closed; from now on it counts as one that closes.
    pub(super) fn close(&mut self, connection: End<C>) {
        self.connections.closing(connection.connection);
        self.orders.push_back(Order::Close(connection));
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use libp2p::PeerId;

    use super::*;
    use crate::{config::Config, connections::Connection, wire::Request};

    const DRAIN: Duration = Duration::from_secs(8);

    /// A relay with so many connections.
    fn relay(connections: u32, now: Instant) -> (Relay<u32, ()>, Vec<End<u32>>) {
        let mut relay = Relay::new(Config::default(), now).unwrap();
        let connect = |connection| {
            let peer = PeerId::random();
            let address = "/memory/1".parse().unwrap();
            relay.connected(connection, Connection::new(peer, address, false, 0, now));
            End { peer, connection }
        };
        let ends = (0..connections).map(connect).collect();
        (relay, ends)
    }

    /// The connections that are closed, and whether anything was answered.
    fn orders(relay: &mut Relay<u32, ()>) -> (Vec<u32>, bool) {
        let (mut closed, mut answered) = (Vec::new(), false);
        while let Some(order) = relay.next_order() {
            match order {
                Order::Close(end) => closed.push(end.connection),
                Order::Command(_, Command::Refuse(..)) | Order::Grant(_) => answered = true,
                _ => {}
            }
        }
        (closed, answered)
    }

    /// Two of its connections become the ends of a circuit.
    fn circuit(relay: &mut Relay<u32, ()>, ends: &[End<u32>], now: Instant) {
        relay.requested(ends[1], RequestId(1), Request::Reserve, now);
        let connect = Request::Connect(ends[1].peer);
        relay.requested(ends[0], RequestId(1), connect, now);
        let (id, _) = relay.circuits().iter().next().expect("it is admitted");
        relay.target_answered(id, Ok(()), now);
        orders(relay);
    }

    #[test]
    fn connections_are_closed_evenly_and_all_of_them_in_time() {
        for connections in [1000, 10, 1] {
            for sweep in [1000, 10] {
                let start = Instant::now();
                let (mut relay, _) = relay(connections, start);
                let sweep = Duration::from_millis(sweep);
                let config = Config {
                    sweep,
                    ..Config::default()
                };
                relay.set_config(config, start).unwrap();
                relay.drain(start + DRAIN, start);
                let mut closed = 0;
                while relay.sweep_due() <= start + DRAIN {
                    let now = relay.sweep_due();
                    relay.sweep(now);
                    closed += orders(&mut relay).0.len();
                    let part = (now - start).as_secs_f64() / DRAIN.as_secs_f64();
                    let due = f64::from(connections) * part;
                    assert!((due - closed as f64).abs() <= 1.001, "{closed} of {due}");
                }
                assert_eq!(closed, connections as usize);
            }
        }
    }

    #[test]
    fn who_carries_a_circuit_stays_until_it_ends() {
        let start = Instant::now();
        let (mut relay, ends) = relay(3, start);
        circuit(&mut relay, &ends, start);
        relay.drain(start + DRAIN, start);
        relay.sweep(start + DRAIN);
        assert_eq!(orders(&mut relay).0, [2]);
        let (id, _) = relay.circuits().iter().next().expect("it is still there");
        let ended = crate::CircuitEnd::Finished;
        relay.circuit_ended(id, ended, crate::Carried::default(), start + DRAIN);
        relay.sweep(start + DRAIN);
        assert_eq!(orders(&mut relay).0, [0, 1]);
    }

    #[test]
    fn who_asks_is_answered_by_the_end_of_its_connection_unless_that_carries_a_circuit() {
        let start = Instant::now();
        let (mut relay, ends) = relay(4, start);
        circuit(&mut relay, &ends, start);
        relay.drain(start + DRAIN, start);
        relay.requested(ends[2], RequestId(2), Request::Reserve, start);
        let connect = Request::Connect(ends[1].peer);
        relay.requested(ends[3], RequestId(2), connect, start);
        relay.requested(ends[0], RequestId(2), Request::Reserve, start);
        assert_eq!(orders(&mut relay), (vec![2, 3], false));
    }

    #[test]
    fn a_relay_that_resumes_takes_clients_in() {
        let start = Instant::now();
        let (mut relay, ends) = relay(1, start);
        relay.drain(start + DRAIN, start);
        relay.resume();
        relay.sweep(start + DRAIN);
        relay.requested(ends[0], RequestId(1), Request::Reserve, start + DRAIN);
        assert_eq!(orders(&mut relay), (vec![], true));
    }
}
