//! CONNECT, from the request to the end of the circuit.

use std::{hash::Hash, time::Instant};

use libp2p::{PeerId, futures::channel::oneshot};

use super::{
    Action, CircuitParameters, Relay,
    circuits::Circuit,
    connections::{Connection, End, PendingRequest},
};
use crate::{
    access::Terms,
    event::{CircuitEnd, CircuitId, Event, Refused, StopFailed},
};

impl<C: Copy + Ord + Hash, R> Relay<C, R> {
    /// Asks the target of an allowed CONNECT, or refuses the request.
    pub(super) fn connect(
        &mut self,
        request: PendingRequest<C, R>,
        target: PeerId,
        terms: Terms,
        now: Instant,
    ) {
        // 1. A live reservation of the target.
        let slot = self.reservations.get(&target);
        let Some(connection) = slot.and_then(|slot| slot.live(now)) else {
            return self.refuse(request, Refused::NoReservation);
        };
        // 2. Room under the caps, if need be by ending another circuit.
        if let Err(full) = self.circuits.check_caps(&request.origin, &target) {
            let Some(yielded) = self.circuits.yield_one(&full, &request.origin, &target) else {
                return self.refuse(request, full);
            };
            log::debug!("circuit {yielded} preempted: a prefix with fewer circuits needs the room");
            self.end_circuit(yielded, CircuitEnd::Preempted);
        }
        // 3. The stop request.
        let (source, target) = (request.from, End { peer: target, connection });
        self.count_circuits([source, target], 1, now);
        let (limit, counters) = (self.circuit_limit(terms), self.accounts.counters());
        let (id, ended) = self.circuits.add(request, target, limit, counters, now);
        self.ask_target(id, ended);
    }

    fn ask_target(&mut self, id: CircuitId, ended: oneshot::Receiver<()>) {
        if let Some(circuit) = self.circuits.records.get(&id) {
            let &Circuit { source, target, since, limit, ref counters, .. } = circuit;
            let (counters, ends) = (counters.clone(), [source.peer, target.peer]);
            let link = self.link.clone();
            let parameters = CircuitParameters { id, since, limit, link, ends, counters, ended };
            self.actions.push_back(Action::AskTarget(target, Box::new(parameters)));
        }
    }

    /// Asks a circuit's target over another connection in place of `over`; returns that other one, if there is one. A
    /// target is asked over one connection at a time, and over each at most once.
    pub(super) fn ask_elsewhere(&mut self, id: CircuitId, over: End<C>, now: Instant) -> Option<C> {
        // 1. If the source still waits for the answer over this connection: the target's others, not used before.
        let is_waiting = |it: &&Circuit<C, R>| it.request.is_some() && it.target == over;
        let asked_before = &self.circuits.records.get(&id).filter(is_waiting)?.asked_before;
        let is_other = |it| it != over.connection && !asked_before.contains(&it);
        let others = self.fit_for_a_slot(over.peer, &is_other);
        // 2. The most recently active of them; of several, the newest.
        let silent_for = |it: &C| Some(self.connections.get(*it)?.liveness.silent_for(now));
        let connection = others.into_iter().rev().min_by_key(silent_for)?;
        // 3. Move the circuit to it, which cancels the open stop request.
        log::debug!("circuit {id}: no answer from peer {}: trying another connection", over.peer);
        let (guard, ended) = oneshot::channel();
        let other = End { connection, ..over };
        let circuit = self.circuits.records.get_mut(&id)?;
        circuit.asked_before.push(over.connection);
        circuit.target = other;
        circuit.asked_at = now;
        circuit.guard = Ok(guard);
        let source = circuit.source.peer;
        self.count_circuits([over], -1, now);
        self.count_circuits([other], 1, now);
        self.ask_target(id, ended);
        self.recheck(Some(source), now); // the access rules may answer later for the new connection
        Some(connection)
    }

    fn count_circuits(&mut self, over: impl IntoIterator<Item = End<C>>, by: i32, now: Instant) {
        let add = |up: &mut Connection| up.circuits = up.circuits.saturating_add_signed(by);
        for End { connection, .. } in over {
            self.connections.update(connection, now, add);
        }
    }

    /// Handles the target's answer over this connection, with the opened stream if the target accepted. If the source
    /// still waits, and the target has not been asked over another connection since, opens the circuit, and returns the
    /// stream with the source's reply handle. If the connection or the stream failed before an answer, asks over
    /// another connection.
    pub fn on_target_answered<T>(
        &mut self,
        id: CircuitId,
        over: C,
        answer: Result<T, StopFailed>,
        now: Instant,
    ) -> Option<(R, T)> {
        let is_asked = |it: &&Circuit<C, R>| it.opened_at.is_none() && it.target.connection == over;
        let target = self.circuits.records.get(&id).filter(is_asked)?.target;
        let is_unanswered = matches!(answer, Err(StopFailed::Gone | StopFailed::Io(_)));
        if is_unanswered && self.ask_elsewhere(id, target, now).is_some() {
            return None;
        }
        let circuit = self.circuits.records.get_mut(&id)?;
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
        self.on_circuit_ended(id, CircuitEnd::Disconnected, now);
        None
    }

    /// Handles the end of a circuit, whether or not it was open.
    pub fn on_circuit_ended(&mut self, id: CircuitId, end: CircuitEnd, now: Instant) {
        let Some(removed) = self.circuits.remove(id) else { return };
        self.count_circuits([removed.source, removed.target], -1, now);
        let Some((since, transferred)) = removed.open() else { return };
        let ends @ [source, target] = [removed.source.peer, removed.target.peer];
        self.accounts.on_closed(id, ends, transferred);
        let (circuit, end) = (id, removed.actual_end(end));
        let open_for = now.saturating_duration_since(since);
        self.report(Event::CircuitClosed { circuit, source, target, end, transferred, open_for });
    }

    /// Ends a circuit. The task of an open one reports when it has ended.
    ///
    /// A circuit that is being set up counts until its stop request has ended: otherwise sources that request circuits
    /// and disconnect could have the relay send one target more requests than its cap.
    pub(super) fn end_circuit(&mut self, id: CircuitId, end: CircuitEnd) {
        if let Some(request) = self.circuits.end(id, end) {
            let is_denied = end == CircuitEnd::Denied;
            self.refuse(request, if is_denied { Refused::Denied } else { Refused::Gone });
        }
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
    struct Fixture {
        relay: Relay<u32, ()>,
        source: End<u32>,
        target: PeerId,
        start: Instant,
    }

    /// A stop request to the target.
    struct StopRequest {
        circuit: CircuitId,
        over: u32,
        since: Instant,
        ended: oneshot::Receiver<()>,
    }

    impl StopRequest {
        fn is_cancelled(&mut self) -> bool {
            self.ended.try_recv().is_err()
        }
    }

    impl Fixture {
        fn new() -> Self {
            let start = Instant::now();
            let relay = Relay::new(Config::default(), start).unwrap();
            let [source, target] = [(); 2].map(|()| PeerId::random());
            let source = End { peer: source, connection: 0 };
            let mut fixture = Self { relay, source, target, start };
            fixture.add_connection(source.peer, 0);
            fixture.add_connection(target, 1);
            let from = End { peer: target, connection: 1 };
            fixture.relay.handle_request(from, Ok(Request::Reserve), (), start);
            fixture
        }

        fn add_connection(&mut self, peer: PeerId, connection: u32) {
            let up = Connection::new(peer, "/memory/1".parse().unwrap(), false, 0, self.start);
            self.relay.connections.add(connection, up);
        }

        fn stop_requests(&mut self) -> Vec<StopRequest> {
            let actions = std::iter::from_fn(|| self.relay.actions.pop_front());
            let requests = actions.filter_map(|action| match action {
                Action::AskTarget(target, parameters) => {
                    let CircuitParameters { id, since, ended, .. } = *parameters;
                    Some(StopRequest { circuit: id, over: target.connection, since, ended })
                }
                _ => None,
            });
            requests.collect()
        }

        /// The source requests a circuit; returns the one stop request.
        fn connect(&mut self) -> StopRequest {
            let request = Ok(Request::Connect(self.target));
            self.relay.handle_request(self.source, request, (), self.start);
            let mut requests = self.stop_requests();
            assert_eq!(requests.len(), 1);
            requests.remove(0)
        }

        /// Sweeps this long after the start. Returns the stop request that the sweep sends, if any.
        fn sweep(&mut self, after: Duration) -> Option<StopRequest> {
            let now = self.start + after;
            self.relay.sweep_due = now;
            self.relay.sweep(now);
            self.stop_requests().pop()
        }

        fn circuits_over(&self, connection: u32) -> u32 {
            self.relay.connections.get(connection).unwrap().circuits
        }

        fn accept(&mut self, request: &StopRequest) -> bool {
            let now = self.start;
            self.relay.on_target_answered(request.circuit, request.over, Ok(()), now).is_some()
        }
    }

    #[test]
    fn a_target_that_does_not_answer_is_asked_over_its_other_connection_and_accepts_once() {
        let mut fixture = Fixture::new();
        fixture.add_connection(fixture.target, 2);
        let mut first = fixture.connect();
        assert_eq!(first.over, 1);
        assert!(fixture.sweep(RETRY_AFTER - Duration::from_millis(1)).is_none());
        assert!(!first.is_cancelled());
        let mut second = fixture.sweep(RETRY_AFTER).expect("a second stop request");
        assert_eq!((second.circuit, second.over, second.since), (first.circuit, 2, first.since));
        assert!(first.is_cancelled() && !second.is_cancelled());
        assert_eq!([1, 2].map(|connection| fixture.circuits_over(connection)), [0, 1]);
        // Any answer to the first request is late.
        assert!(!fixture.accept(&first));
        let gone: Result<(), _> = Err(StopFailed::Gone);
        fixture.relay.on_target_answered(first.circuit, first.over, gone, fixture.start);
        assert!(fixture.accept(&second));
        assert!(!fixture.accept(&first) && !fixture.accept(&second));
        assert_eq!(fixture.relay.circuits.open().count(), 1);
        assert_eq!(fixture.circuits_over(0), 1);
    }

    #[test]
    fn a_target_that_reconnects_is_asked_over_each_new_connection_once() {
        let mut fixture = Fixture::new();
        let mut request = fixture.connect();
        assert!(fixture.sweep(4 * RETRY_AFTER).is_none(), "no other connection");
        assert!(!request.is_cancelled());
        fixture.add_connection(fixture.target, 2);
        fixture.add_connection(fixture.target, 3);
        // The most recently active connection first.
        fixture
            .relay
            .connections
            .get_mut(2)
            .unwrap()
            .liveness
            .on_activity(fixture.start + RETRY_AFTER);
        request = fixture.sweep(5 * RETRY_AFTER).expect("a stop request over a new connection");
        assert_eq!(request.over, 2);
        assert!(fixture.sweep(6 * RETRY_AFTER - Duration::from_millis(1)).is_none());
        request = fixture.sweep(6 * RETRY_AFTER).expect("a stop request over the last connection");
        assert_eq!((request.over, request.since), (3, fixture.start));
        assert!(fixture.sweep(9 * RETRY_AFTER).is_none(), "each connection is used once");
        assert!(fixture.accept(&request));
    }

    #[test]
    fn of_equally_active_connections_the_newest_is_used() {
        let mut fixture = Fixture::new();
        fixture.connect();
        [2, 3]
            .into_iter()
            .for_each(|connection| fixture.add_connection(fixture.target, connection));
        let request = fixture.sweep(RETRY_AFTER).expect("a stop request over another connection");
        assert_eq!(request.over, 3);
    }

    #[test]
    fn a_target_whose_connection_closes_is_asked_over_its_other_connection() {
        for is_reported_first in [false, true] {
            let mut fixture = Fixture::new();
            fixture.add_connection(fixture.target, 2);
            let (mut request, gone) = (fixture.connect(), Err::<(), _>(StopFailed::Gone));
            let [first, second] = [1, 2].map(|connection| End { peer: fixture.target, connection });
            if is_reported_first {
                let (id, start) = (request.circuit, fixture.start);
                fixture.relay.on_target_answered(id, first.connection, gone, start);
            }
            fixture.relay.on_disconnected(first, fixture.start);
            assert!(request.is_cancelled());
            let requests = fixture.stop_requests();
            assert_eq!(requests.iter().map(|it| it.over).collect::<Vec<_>>(), [2]);
            assert_eq!(fixture.circuits_over(2), 1);
            // Until none is left.
            fixture.relay.on_disconnected(second, fixture.start);
            assert!(fixture.stop_requests().is_empty());
            assert_eq!(fixture.relay.circuits.count(), 0);
            assert_eq!(fixture.circuits_over(0), 0);
        }
    }

    #[test]
    fn a_target_that_times_out_on_a_connection_or_replaces_it_is_asked_over_its_other_one() {
        for is_replaced in [false, true] {
            let mut fixture = Fixture::new();
            fixture.add_connection(fixture.target, 2);
            let (mut request, start) = (fixture.connect(), fixture.start);
            match is_replaced {
                true => fixture.relay.close_longest_silent_of(fixture.target, 2, start),
                false => fixture.relay.time_out(1, start),
            }
            assert!(request.is_cancelled());
            request = fixture.stop_requests().pop().expect("a stop request over the other one");
            assert_eq!(request.over, 2);
            assert!(fixture.accept(&request));
        }
    }

    #[test]
    fn a_target_whose_stream_fails_is_asked_over_its_other_connection() {
        let mut fixture = Fixture::new();
        fixture.add_connection(fixture.target, 2);
        let request = fixture.connect();
        let failed: Result<(), _> = Err(StopFailed::Io(std::io::ErrorKind::ConnectionAborted));
        fixture.relay.on_target_answered(request.circuit, request.over, failed, fixture.start);
        let request = fixture.stop_requests().pop().expect("a stop request over the other one");
        assert!(fixture.accept(&request));
        // An answer is final, whatever it is.
        let request = fixture.connect();
        let refused: Result<(), _> = Err(StopFailed::Refused(202));
        fixture.relay.on_target_answered(request.circuit, request.over, refused, fixture.start);
        assert!(fixture.stop_requests().is_empty());
    }

    #[test]
    fn a_late_sweep_restarts_the_time_to_answer() {
        let mut fixture = Fixture::new();
        fixture.add_connection(fixture.target, 2);
        fixture.connect();
        let late = fixture.start + 100 * RETRY_AFTER;
        fixture.relay.sweep(late);
        assert!(fixture.stop_requests().is_empty());
        assert!(fixture.sweep(101 * RETRY_AFTER).is_some());
    }

    #[test]
    fn refused_requests_and_open_circuits_are_not_retried() {
        let mut fixture = Fixture::new();
        fixture.add_connection(fixture.target, 2);
        let [gone, open] = [(); 2].map(|()| fixture.connect());
        assert!(fixture.accept(&open));
        fixture.relay.end_circuit(gone.circuit, CircuitEnd::Disconnected);
        assert!(fixture.sweep(2 * RETRY_AFTER).is_none());
    }
}
