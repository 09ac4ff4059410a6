//! CONNECT, from the request to the end of the circuit.

use std::{hash::Hash, time::Instant};

use libp2p::PeerId;

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
            self.connections.update(end.connection, now, |up| up.circuits += 1);
        }
        let (counters, link) = (self.accounts.counters(), self.link.clone());
        let (id, ended) = self.circuits.add(request, target, counters.clone(), now);
        let ends = [source.peer, peer];
        let parameters = CircuitParameters { id, limit, link, ends, counters, ended };
        self.actions.push_back(Action::AskTarget(target, Box::new(parameters)));
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
            self.end_circuit(yielded);
        }
        Ok((connection, self.circuit_limit(terms)))
    }

    /// Handles the target's answer, with what was opened to it if it agreed. If the source still waits, opens the circuit
    /// and returns that with the source's reply handle.
    pub fn on_target_answered<T>(
        &mut self,
        id: CircuitId,
        answer: Result<T, StopFailed>,
        now: Instant,
    ) -> Option<(R, T)> {
        let circuit = self.circuits.get_mut(id).filter(|circuit| circuit.opened_at.is_none())?;
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
    pub(super) fn end_circuit(&mut self, id: CircuitId) {
        if let Some(request) = self.circuits.end(id) {
            self.refuse(request, Refused::Gone);
        }
    }

    fn remove_circuit(&mut self, id: CircuitId, now: Instant) -> Option<Circuit<C, R>> {
        let circuit = self.circuits.remove(id)?;
        for end in [circuit.source, circuit.target] {
            let count = |circuits: u32| circuits.saturating_sub(1);
            self.connections.update(end.connection, now, |up| up.circuits = count(up.circuits));
        }
        Some(circuit)
    }
}
