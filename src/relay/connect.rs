//! CONNECT, from the request to the end of the circuit.

use std::{hash::Hash, time::Instant};

use libp2p::{PeerId, futures::channel::oneshot};

use super::{
    Action, CircuitParameters, Relay,
    circuits::Circuit,
    connections::{End, PendingRequest},
};
use crate::{
    access::Permission,
    event::{CircuitEnd, CircuitId, Event, Refused, StopFailed},
    wire::Limit,
};

impl<C: Copy + Ord + Hash, R> Relay<C, R> {
    pub(super) fn connect(&mut self, request: PendingRequest<C, R>, peer: PeerId, now: Instant) {
        let (connection, limit) = match self.permit_connect(&request, peer, now) {
            Ok(permitted) => permitted,
            Err(reason) => return self.refuse(request, reason),
        };
        let (source, target) = (request.from, End { peer, connection });
        for end in [source, target] {
            self.count_circuits(end.connection, 1, now);
        }
        let counters = self.accounts.counters();
        let (id, ended) = self.circuits.add(request, target, limit, counters, now);
        self.ask_target(id, ended);
    }

    fn ask_target(&mut self, id: CircuitId, ended: oneshot::Receiver<()>) {
        let Some(circuit) = self.circuits.get(id) else {
            return;
        };
        let (target, link, counters) =
            (circuit.target, self.link.clone(), circuit.counters.clone());
        let (since, limit, ends) =
            (circuit.since, circuit.limit, [circuit.source.peer, target.peer]);
        let parameters = CircuitParameters { id, since, limit, link, ends, counters, ended };
        self.actions.push_back(Action::AskTarget(target, Box::new(parameters)));
    }

    /// Asks each target that does not answer over another of its connections, if it has one: it may have come back without
    /// reserving again, and its old connection may be half-open. A target is asked over one connection at a time, and over
    /// each at most once.
    pub(super) fn ask_over_others(&mut self, now: Instant) {
        for (id, silent) in self.circuits.unanswered(now) {
            // 1. First the one that was active last; of several, the one that came up last.
            let mut others = self.fit_for_a_slot(silent.peer);
            others.reverse();
            others.sort_by_key(|id| Some(self.connections.get(*id)?.liveness.silent_for(now)));
            // 2. Move the circuit there, which resets the stop stream that is open.
            let Some((over, ended)) = self.circuits.ask_over(id, &others, now) else {
                continue;
            };
            log::debug!("circuit {id}: no answer from peer {}: asking it elsewhere", silent.peer);
            self.count_circuits(silent.connection, -1, now);
            self.count_circuits(over, 1, now);
            self.ask_target(id, ended);
        }
    }

    fn count_circuits(&mut self, connection: C, by: i32, now: Instant) {
        self.connections.update(connection, now, |up| {
            up.circuits = up.circuits.saturating_add_signed(by);
        });
    }

    /// Returns the connection of the target's reservation, and what a circuit to it may carry. If there is room only in
    /// place of another circuit, ends that one.
    fn permit_connect(
        &mut self,
        request: &PendingRequest<C, R>,
        target: PeerId,
        now: Instant,
    ) -> Result<(C, Limit), Refused> {
        let (source, origin) = (request.from.peer, &*request.origin);
        // 1. Access.
        let permission = self.access.may_connect(source, &origin.address, target);
        let Permission::Allow(terms) = permission else {
            return Err(Refused::Denied);
        };
        // 2. Request rate, before the look-up: frequent requests must not find out who holds a slot.
        self.connect_rates.take(source, origin.prefix, now)?;
        // 3. A live reservation of the target.
        let slot = self.reservations.get(&target);
        let connection = slot.and_then(|slot| slot.live(now)).ok_or(Refused::NoReservation)?;
        // 4. Room.
        if let Err(full) = self.circuits.check_caps(origin, &target) {
            let yielded = self.circuits.yield_one(&full, origin, &target);
            let yielded = yielded.ok_or(full)?;
            log::debug!("circuit {yielded} ends: a prefix with fewer circuits needs one");
            self.end_circuit(yielded, CircuitEnd::Preempted);
        }
        Ok((connection, self.circuit_limit(terms)))
    }

    /// Handles the target's answer over this connection, with what was opened to it if it agreed. If the source still
    /// waits, and the target is not asked over another one meanwhile, opens the circuit and returns that with the
    /// source's reply handle.
    pub fn on_target_answered<T>(
        &mut self,
        id: CircuitId,
        over: C,
        answer: Result<T, StopFailed>,
        now: Instant,
    ) -> Option<(R, T)> {
        let is_asked =
            |it: &&mut Circuit<C, R>| it.opened_at.is_none() && it.target.connection == over;
        let circuit = self.circuits.get_mut(id).filter(is_asked)?;
        match (circuit.request.take(), answer) {
            (Some(request), Ok(opened)) => {
                circuit.opened_at = Some(now);
                let (source, target) = (circuit.source.peer, circuit.target.peer);
                self.accounts.on_opened(id, source, target);
                self.report(Event::CircuitOpened { circuit: id, source, target });
                return Some((request.reply, opened));
            }
            (Some(request), Err(failed)) => self.refuse(request, Refused::StopFailed(failed)),
            (None, _) => {} // the source was refused before
        }
        self.remove_circuit(id, now);
        None
    }

    /// Handles the end of an open circuit.
    pub fn on_circuit_ended(&mut self, id: CircuitId, end: CircuitEnd, now: Instant) {
        if let Some(circuit) = self.remove_circuit(id, now)
            && let Some((since, transferred)) = circuit.open()
        {
            let ends @ [source, target] = [circuit.source.peer, circuit.target.peer];
            self.accounts.on_closed(id, ends, transferred);
            let (circuit, end) = (id, circuit.end(end));
            let open_for = now.saturating_duration_since(since);
            let closed =
                Event::CircuitClosed { circuit, source, target, end, transferred, open_for };
            self.report(closed);
        }
    }

    /// Ends a circuit. The task of an open one reports when it has ended.
    ///
    /// A circuit that is being set up counts until nothing is left of it at the target: else sources that ask and leave
    /// could send one target more requests than its cap.
    pub(super) fn end_circuit(&mut self, id: CircuitId, end: CircuitEnd) {
        if let Some(request) = self.circuits.end(id, end) {
            let is_denied = end == CircuitEnd::Denied;
            self.refuse(request, if is_denied { Refused::Denied } else { Refused::Gone });
        }
    }

    fn remove_circuit(&mut self, id: CircuitId, now: Instant) -> Option<Circuit<C, R>> {
        let circuit = self.circuits.remove(id)?;
        for end in [circuit.source, circuit.target] {
            self.count_circuits(end.connection, -1, now);
        }
        Some(circuit)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use libp2p::futures::channel::oneshot;

    use super::*;
    use crate::{config::Config, relay::connections::Connection, wire::Request};

    const RETRY_AFTER: Duration = Duration::from_secs(3);

    /// A source, and a target whose reservation points at the first of its connections.
    struct World {
        relay: Relay<u32, ()>,
        source: End<u32>,
        target: PeerId,
        start: Instant,
    }

    /// A target was asked.
    struct Asked {
        circuit: CircuitId,
        over: u32,
        since: Instant,
        ended: oneshot::Receiver<()>,
    }

    impl Asked {
        fn is_cancelled(&mut self) -> bool {
            self.ended.try_recv().is_err()
        }
    }

    impl World {
        fn new() -> Self {
            let start = Instant::now();
            let relay = Relay::new(Config::default(), start).unwrap();
            let [source, target] = [(); 2].map(|()| PeerId::random());
            let source = End { peer: source, connection: 0 };
            let mut world = Self { relay, source, target, start };
            world.connects(source.peer, 0);
            world.connects(target, 1);
            let from = End { peer: target, connection: 1 };
            world.relay.handle_request(from, Ok(Request::Reserve), (), start);
            world
        }

        fn connects(&mut self, peer: PeerId, connection: u32) {
            let up = Connection::new(peer, "/memory/1".parse().unwrap(), false, 0, self.start);
            self.relay.connections.add(connection, up);
        }

        fn asked(&mut self) -> Vec<Asked> {
            let actions = std::iter::from_fn(|| self.relay.actions.pop_front());
            let asked = actions.filter_map(|action| match action {
                Action::AskTarget(target, parameters) => {
                    let CircuitParameters { id, since, ended, .. } = *parameters;
                    Some(Asked { circuit: id, over: target.connection, since, ended })
                }
                _ => None,
            });
            asked.collect()
        }

        /// The source asks for a circuit, and the target is asked once.
        fn connect(&mut self) -> Asked {
            let request = Ok(Request::Connect(self.target));
            self.relay.handle_request(self.source, request, (), self.start);
            let mut asked = self.asked();
            assert_eq!(asked.len(), 1);
            asked.remove(0)
        }

        /// Sweeps in turn, this long after the start. Yields over which connection the target is asked.
        fn sweep(&mut self, after: Duration) -> Option<Asked> {
            let now = self.start + after;
            self.relay.sweep_due = now;
            self.relay.sweep(now);
            self.asked().pop()
        }

        fn circuits_over(&self, connection: u32) -> u32 {
            self.relay.connections.get(connection).unwrap().circuits
        }

        fn accepts(&mut self, asked: &Asked) -> bool {
            let now = self.start;
            self.relay.on_target_answered(asked.circuit, asked.over, Ok(()), now).is_some()
        }
    }

    #[test]
    fn a_target_that_does_not_answer_is_asked_over_its_other_connection_and_accepts_once() {
        let mut world = World::new();
        world.connects(world.target, 2);
        let mut first = world.connect();
        assert_eq!(first.over, 1);
        assert!(world.sweep(RETRY_AFTER - Duration::from_millis(1)).is_none());
        assert!(!first.is_cancelled());
        let mut second = world.sweep(RETRY_AFTER).expect("it is asked again");
        assert_eq!((second.circuit, second.over, second.since), (first.circuit, 2, first.since));
        assert!(first.is_cancelled() && !second.is_cancelled());
        assert_eq!([1, 2].map(|connection| world.circuits_over(connection)), [0, 1]);
        // What the first one says is late, whatever it is.
        assert!(!world.accepts(&first));
        let gone: Result<(), _> = Err(StopFailed::Gone);
        world.relay.on_target_answered(first.circuit, first.over, gone, world.start);
        assert!(world.accepts(&second));
        assert!(!world.accepts(&first));
        assert_eq!(world.relay.circuits.open().count(), 1);
        assert_eq!(world.circuits_over(0), 1);
    }

    #[test]
    fn a_target_that_comes_back_while_it_is_asked_is_asked_there_and_over_each_connection_once() {
        let mut world = World::new();
        let mut asked = world.connect();
        assert!(world.sweep(4 * RETRY_AFTER).is_none(), "there is no other connection");
        assert!(!asked.is_cancelled());
        world.connects(world.target, 2);
        world.connects(world.target, 3);
        // The one that was active last, and of two that are equal the one that came up last.
        world.relay.connections.get_mut(2).unwrap().liveness.on_activity(world.start + RETRY_AFTER);
        asked = world.sweep(5 * RETRY_AFTER).expect("now there is");
        assert_eq!(asked.over, 2);
        assert!(world.sweep(6 * RETRY_AFTER - Duration::from_millis(1)).is_none());
        asked = world.sweep(6 * RETRY_AFTER).expect("there is one left");
        assert_eq!((asked.over, asked.since), (3, world.start));
        assert!(world.sweep(9 * RETRY_AFTER).is_none(), "all were asked");
        assert!(world.accepts(&asked));
    }

    #[test]
    fn a_relay_that_stood_still_gives_the_target_its_time() {
        let mut world = World::new();
        world.connects(world.target, 2);
        world.connect();
        let late = world.start + 100 * RETRY_AFTER;
        world.relay.sweep(late);
        assert!(world.asked().is_empty());
        assert!(world.sweep(101 * RETRY_AFTER).is_some());
    }

    #[test]
    fn refused_requests_and_open_circuits_are_not_retried() {
        let mut world = World::new();
        world.connects(world.target, 2);
        let [gone, open] = [(); 2].map(|()| world.connect());
        assert!(world.accepts(&open));
        world.relay.end_circuit(gone.circuit, CircuitEnd::Disconnected);
        assert!(world.sweep(2 * RETRY_AFTER).is_none());
    }
}
