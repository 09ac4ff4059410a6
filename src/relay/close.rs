//! Which connections the relay closes: all of them, a few at a time, while it drains; and one for another, when there is
//! no room for both.
//!
//! While it drains, it grants no request. A client whose connection was closed is back within seconds, here or at another
//! relay; one that was refused may stay away for an hour. So a request is answered by closing its connection. The closes
//! are spread over the drain time, because clients that leave together come back together. Circuits stay.

use std::{cmp::Reverse, hash::Hash, time::Instant};

use libp2p::PeerId;

use super::{
    Action, Draining, Relay,
    connections::{CloseReason, Connection, End},
};
use crate::event::{CircuitEnd, Refused};

impl<C: Copy + Ord + Hash, R> Relay<C, R> {
    /// Drains: grants no request from now on, and closes all connections without a circuit by `until`. Without
    /// [`Config::close_silent`](crate::Config::close_silent) it closes only those that hold a slot or carry a circuit now.
    pub fn drain(&mut self, until: Instant, now: Instant) {
        let used =
            self.connections.iter().filter(|(_, up)| up.holds_reservation || up.circuits > 0);
        let used = used.map(|(id, _)| id).collect();
        self.draining = Some(Draining { until, last: now, due: 0.0, unanswered: Vec::new(), used });
        for newcomer in std::mem::take(&mut self.waiting) {
            self.refuse(newcomer.request, Refused::Draining);
        }
        self.bring_sweep_forward(now);
    }

    /// Ends a drain.
    pub fn resume(&mut self) {
        self.draining = None;
    }

    /// Whether the relay drains.
    pub fn is_draining(&self) -> bool {
        self.draining.is_some()
    }

    /// Closes as many connections as are due in a drain, one whose last circuit ended included.
    pub(super) fn close_due(&mut self, now: Instant) {
        let Some(draining) = &mut self.draining else {
            return;
        };
        let unused = self.connections.iter().filter(|(id, up)| {
            let is_own = self.config.close_silent || draining.used.contains(id);
            up.circuits == 0 && up.closing.is_none() && is_own
        });
        let unused = unused.map(|(connection, up)| End { peer: up.origin.peer, connection });
        let mut unused: Vec<_> = unused.collect();
        let mut due = unused.len();
        if now < draining.until {
            // The rate at which those that remain are closed in the time that remains.
            let left = draining.until.saturating_duration_since(draining.last).as_secs_f64();
            let passed = now.saturating_duration_since(draining.last).as_secs_f64();
            draining.due += due as f64 * passed / left;
            draining.last = now;
            due = draining.due as usize;
            draining.due -= due as f64;
        }
        unused.sort_unstable_by_key(|end| end.connection);
        let due = unused.into_iter().take(due);
        due.for_each(|end| self.close(end, CloseReason::Draining));
    }

    /// Answers a request by closing its connection, unless that carries circuits or serves other protocols; then by
    /// resetting its stream.
    pub(super) fn close_unanswered(&mut self, from: End<C>, reply: R) {
        let is_unused = self.connections.get(from.connection).is_some_and(|up| up.circuits == 0);
        if let Some(draining) = &mut self.draining
            && is_unused
            && (self.config.close_silent || draining.used.contains(&from.connection))
        {
            draining.unanswered.push(reply);
            self.close(from, CloseReason::Draining);
        }
    }

    /// Closes a connection, and marks it as closing.
    pub(super) fn close(&mut self, connection: End<C>, reason: CloseReason) {
        log::debug!("closing connection: peer {}: {}", connection.peer, reason.kind());
        self.connections.mark_closing(connection.connection, reason);
        self.actions.push_back(Action::Close(connection));
    }

    /// Makes room for the connection `keep` of `peer`: closes the one of its other connections that has been silent the
    /// longest, and handles it as closed at once.
    pub fn close_longest_silent_of(&mut self, peer: PeerId, keep: C, now: Instant) {
        self.connections.poll_counters(now);
        let others =
            self.connections.of(&peer).filter(|(id, up)| *id != keep && up.closing.is_none());
        // The oldest of several that have been silent for the same time.
        let silent = others.min_by_key(|(_, up)| Reverse(up.liveness.silent_for(now)));
        let Some((connection, _)) = silent else {
            return;
        };
        let replaced = End { peer, connection };
        self.abandon(replaced, CircuitEnd::Replaced, now);
        self.close(replaced, CloseReason::Replaced);
    }

    /// The idle connections of peers that hold no slot, in no order.
    pub fn idle_without_slot(&self) -> impl Iterator<Item = (C, &Connection)> {
        let has_no_slot = |up: &Connection| self.reservations.get(&up.origin.peer).is_none();
        self.connections.idle().filter(move |(_, up)| has_no_slot(up))
    }

    /// Closes an idle connection to make room for another one.
    pub fn preempt(&mut self, idle: End<C>) {
        self.close(idle, CloseReason::Preempted);
    }
}

#[cfg(test)]
mod drain_tests {
    use std::time::Duration;

    use super::*;
    use crate::{config::Config, wire::Request};

    const DRAIN: Duration = Duration::from_secs(8);

    /// A relay with `connections` connections.
    fn relay(connections: u32, now: Instant) -> (Relay<u32, ()>, Vec<End<u32>>) {
        let config = Config { close_silent: true, ..Config::default() };
        let mut relay = Relay::new(config, now).unwrap();
        let connect = |connection| {
            let peer = PeerId::random();
            let address = "/memory/1".parse().unwrap();
            relay.connections.add(connection, Connection::new(peer, address, false, 0, now));
            End { peer, connection }
        };
        let ends = (0..connections).map(connect).collect();
        (relay, ends)
    }

    /// Takes all actions; returns the closed connections, and whether a request was answered.
    fn actions(relay: &mut Relay<u32, ()>) -> (Vec<u32>, bool) {
        let (mut closed, mut answered) = (Vec::new(), false);
        while let Some(action) = relay.actions.pop_front() {
            match action {
                Action::Close(end) => closed.push(end.connection),
                Action::Refuse(..) | Action::Grant { .. } => answered = true,
                _ => {}
            }
        }
        (closed, answered)
    }

    /// Opens a circuit from the first to the second connection.
    fn circuit(relay: &mut Relay<u32, ()>, ends: &[End<u32>], now: Instant) {
        relay.handle_request(ends[1], Ok(Request::Reserve), (), now);
        relay.handle_request(ends[0], Ok(Request::Connect(ends[1].peer)), (), now);
        let (id, _) = relay.circuits.iter().next().expect("an admitted circuit");
        assert!(relay.on_target_answered(id, ends[1].connection, Ok(()), now).is_some());
        actions(relay);
    }

    #[test]
    fn connections_are_closed_evenly_and_all_of_them_in_time() {
        for connections in [1000, 10, 1] {
            for sweep in [1000, 10] {
                let start = Instant::now();
                let (mut relay, _) = relay(connections, start);
                let sweep = Duration::from_millis(sweep);
                let config = Config { close_silent: true, sweep, ..Config::default() };
                relay.set_config(config, start).unwrap();
                relay.drain(start + DRAIN, start);
                let mut closed = 0;
                while relay.sweep_due <= start + DRAIN {
                    let now = relay.sweep_due;
                    relay.sweep(now);
                    closed += actions(&mut relay).0.len();
                    let part = (now - start).as_secs_f64() / DRAIN.as_secs_f64();
                    let due = f64::from(connections) * part;
                    assert!((due - closed as f64).abs() <= 1.001, "{closed} of {due}");
                }
                assert_eq!(closed, connections as usize);
            }
        }
    }

    #[test]
    fn without_close_silent_only_connections_that_the_relay_used_are_closed() {
        let start = Instant::now();
        let (mut relay, ends) = relay(4, start);
        let config = Config::default();
        relay.set_config(config, start).unwrap();
        circuit(&mut relay, &ends, start);
        relay.drain(start + DRAIN, start);
        relay.handle_request(ends[2], Ok(Request::Reserve), (), start);
        relay.sweep(start + DRAIN);
        assert_eq!(actions(&mut relay), (vec![], false));
        let (id, _) = relay.circuits.iter().next().expect("the circuit");
        relay.on_circuit_ended(id, crate::CircuitEnd::Finished, start + DRAIN);
        relay.sweep(start + DRAIN);
        assert_eq!(actions(&mut relay).0, [0, 1]);
    }

    #[test]
    fn a_connection_with_a_circuit_stays_until_the_circuit_ends() {
        let start = Instant::now();
        let (mut relay, ends) = relay(3, start);
        circuit(&mut relay, &ends, start);
        relay.drain(start + DRAIN, start);
        relay.sweep(start + DRAIN);
        assert_eq!(actions(&mut relay).0, [2]);
        let (id, _) = relay.circuits.iter().next().expect("the circuit");
        let ended = crate::CircuitEnd::Finished;
        relay.on_circuit_ended(id, ended, start + DRAIN);
        relay.sweep(start + DRAIN);
        assert_eq!(actions(&mut relay).0, [0, 1]);
    }

    #[test]
    fn a_request_while_draining_closes_its_connection_unless_it_carries_a_circuit() {
        let start = Instant::now();
        let (mut relay, ends) = relay(4, start);
        circuit(&mut relay, &ends, start);
        relay.drain(start + DRAIN, start);
        relay.handle_request(ends[2], Ok(Request::Reserve), (), start);
        relay.handle_request(ends[3], Ok(Request::Connect(ends[1].peer)), (), start);
        relay.handle_request(ends[0], Ok(Request::Reserve), (), start);
        assert_eq!(actions(&mut relay), (vec![2, 3], false));
    }

    #[test]
    fn a_resumed_relay_accepts_clients() {
        let start = Instant::now();
        let (mut relay, ends) = relay(1, start);
        relay.drain(start + DRAIN, start);
        relay.resume();
        relay.sweep(start + DRAIN);
        relay.handle_request(ends[0], Ok(Request::Reserve), (), start + DRAIN);
        assert_eq!(actions(&mut relay), (vec![], true));
    }
}

#[cfg(test)]
mod preemption_tests {
    use std::time::Duration;

    use libp2p::futures::channel::oneshot;

    use super::*;
    use crate::{
        activity::ActivityCounter, config::Config, event::Event, relay::Action, wire::Request,
    };

    /// A relay whose connections are numbered from 0 and open one second apart.
    struct Clients {
        relay: Relay<u32, ()>,
        ends: Vec<End<u32>>,
        activity: Vec<ActivityCounter>,
        now: Instant,
    }

    /// The effects of a step.
    #[derive(Debug, Default, PartialEq)]
    struct Effects {
        closed: Vec<u32>,
        graces_begun: usize,
    }

    fn closed(connection: u32) -> Effects {
        Effects { closed: vec![connection], ..Effects::default() }
    }

    impl Clients {
        fn new() -> Self {
            let now = Instant::now();
            Self {
                relay: Relay::new(Config::default(), now).unwrap(),
                ends: Vec::new(),
                activity: Vec::new(),
                now,
            }
        }

        fn advance_a_second(&mut self) {
            self.now += Duration::from_secs(1);
        }

        fn connect(&mut self, peer: PeerId) -> u32 {
            self.advance_a_second();
            let (connection, address) = (self.ends.len() as u32, "/memory/1".parse().unwrap());
            let up = Connection::new(peer, address, false, 0, self.now);
            let activity = ActivityCounter::default();
            self.relay.connections.add(connection, up);
            self.relay.connections.get_mut(connection).unwrap().track(activity.clone());
            self.activity.push(activity);
            self.ends.push(End { peer, connection });
            connection
        }

        fn reserve(&mut self, connection: u32) {
            let (from, now) = (self.ends[connection as usize], self.now);
            self.relay.handle_request(from, Ok(Request::Reserve), (), now);
            while let Some(action) = self.relay.actions.pop_front() {
                if let Action::Grant { receipt, .. } = action {
                    self.relay.on_delivered(from.peer, receipt, true, now);
                }
            }
            assert_eq!(self.slot_of(from.peer), Some(connection));
        }

        /// Opens a circuit to `target`, which holds a slot; the receiver is cancelled when the circuit is ended.
        fn circuit(&mut self, source: u32, target: PeerId) -> oneshot::Receiver<()> {
            let (from, now) = (self.ends[source as usize], self.now);
            self.relay.handle_request(from, Ok(Request::Connect(target)), (), now);
            let asked = std::iter::from_fn(|| self.relay.actions.pop_front()).find_map(|action| {
                let Action::AskTarget(target, parameters) = action else {
                    return None;
                };
                Some((target.connection, parameters))
            });
            let (over, parameters) = asked.expect("an admitted circuit");
            let opened = self.relay.on_target_answered(parameters.id, over, Ok(()), now);
            self.effects();
            assert!(opened.is_some(), "an open circuit");
            parameters.ended
        }

        fn slot_of(&self, peer: PeerId) -> Option<u32> {
            self.relay.reservations.get(&peer)?.connection
        }

        /// Advances a second, and closes the longest-silent other connection of the peer in favour of `connection`.
        fn replace_with(&mut self, connection: u32) -> Effects {
            self.advance_a_second();
            let (peer, now) = (self.ends[connection as usize].peer, self.now);
            self.relay.close_longest_silent_of(peer, connection, now);
            self.effects()
        }

        /// The idle connections of peers that hold no slot.
        fn idle_without_slot(&self) -> Vec<u32> {
            let mut idle: Vec<_> = self.relay.idle_without_slot().map(|(id, _)| id).collect();
            idle.sort_unstable();
            idle
        }

        fn effects(&mut self) -> Effects {
            let mut effects = Effects::default();
            while let Some(action) = self.relay.actions.pop_front() {
                match action {
                    Action::Close(end) => effects.closed.push(end.connection),
                    Action::Report(Event::GraceBegan { .. }) => effects.graces_begun += 1,
                    _ => {}
                }
            }
            effects
        }
    }

    #[test]
    fn the_longest_silent_connection_is_replaced_and_its_slot_moves_without_grace() {
        let (mut clients, alice) = (Clients::new(), PeerId::random());
        let [first, second] = [0; 2].map(|_| clients.connect(alice));
        clients.reserve(first);
        let third = clients.connect(alice);
        assert_eq!(clients.replace_with(third), closed(first));
        assert_eq!(clients.slot_of(alice), Some(third));
        // A connection that is being closed is not chosen again.
        assert_eq!(clients.replace_with(third), closed(second));
        assert_eq!(clients.slot_of(alice), Some(third));
        // No other connection is left.
        assert_eq!(clients.replace_with(third), Effects::default());
    }

    #[test]
    fn activity_since_the_last_sweep_counts_and_the_slot_does_not_move() {
        let (mut clients, alice) = (Clients::new(), PeerId::random());
        let [first, second] = [0; 2].map(|_| clients.connect(alice));
        clients.reserve(first);
        clients.activity[first as usize].add(1);
        let third = clients.connect(alice);
        assert_eq!(clients.replace_with(third), closed(second));
        assert_eq!(clients.slot_of(alice), Some(first));
    }

    #[test]
    fn among_equally_silent_connections_the_oldest_is_replaced() {
        let (mut clients, alice) = (Clients::new(), PeerId::random());
        let old = [0; 3].map(|_| clients.connect(alice));
        let new = clients.connect(alice);
        clients.relay.connections.record_activity(&alice, clients.now); // on all of them at once
        for old in old {
            assert_eq!(clients.replace_with(new), closed(old));
        }
    }

    #[test]
    fn circuits_of_the_replaced_connection_end_and_others_continue() {
        let mut clients = Clients::new();
        let (alice, bob) = (PeerId::random(), PeerId::random());
        let [first, of_bob] = [alice, bob].map(|peer| clients.connect(peer));
        let carol = clients.connect(PeerId::random());
        clients.reserve(first);
        clients.reserve(of_bob);
        let mut circuits = [alice, bob].map(|target| clients.circuit(carol, target));
        let second = clients.connect(alice);
        assert_eq!(clients.replace_with(second), closed(first));
        let ended = circuits.each_mut().map(|circuit| circuit.try_recv().is_err());
        assert_eq!(ended, [true, false]);
        let _over_the_new_one = clients.circuit(carol, alice); // at once
        let ends = |clients: &Clients, of| {
            let circuits = clients.relay.circuits.over(clients.ends[of as usize]);
            circuits.len()
        };
        assert_eq!(ends(&clients, second), 1);
        assert_eq!(ends(&clients, of_bob), 1);
    }

    #[test]
    fn an_idle_connection_is_evictable_unless_its_peer_holds_a_slot() {
        let mut clients = Clients::new();
        let alice = PeerId::random();
        let holder = clients.connect(alice);
        clients.reserve(holder);
        clients.connect(alice); // one to spare
        let [first, second] = [0; 2].map(|_| clients.connect(PeerId::random()));
        assert_eq!(clients.idle_without_slot(), [first, second]);
        clients.relay.preempt(clients.ends[first as usize]);
        assert_eq!(clients.effects(), closed(first));
        assert_eq!(clients.idle_without_slot(), [second]);
    }
}
