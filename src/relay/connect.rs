//! CONNECT, from the request to the end of the circuit.

use std::{hash::Hash, time::Instant};

use libp2p::PeerId;

use super::{
    Action, CircuitParameters, Pending, PendingConnect, Relay,
    circuits::{Circuit, End, State},
};
use crate::{
    access::Permission,
    event::{CircuitEnd, CircuitId, Event, Refused, StopFailed},
    wire::Limit,
};

impl<C: Copy + Ord + Hash, R> Relay<C, R> {
    pub(super) fn connect(&mut self, request: Pending<C, R>, peer: PeerId, now: Instant) {
        let (connection, limit) = match self.permit_connect(&request, peer, now) {
            Ok(permitted) => permitted,
            Err(reason) => return self.refuse_circuit(request, peer, reason),
        };
        let (source, target) = (request.from, End { peer, connection });
        let prefix = request.origin.prefix;
        let pending = PendingConnect { request, limit };
        let (circuit, ended) = self.circuits.add(source, target, prefix, pending, now);
        for end in [source, target] {
            self.connections.count_circuit(end.connection, 1, now);
        }
        let source = source.peer;
        self.actions.push_back(Action::AskTarget { target, circuit, source, limit, ended });
    }

    /// Returns the connection of the target's reservation, and what a circuit to it may carry. Where there is room
    /// only in the place of another circuit, ends that one.
    fn permit_connect(
        &mut self,
        request: &Pending<C, R>,
        target: PeerId,
        now: Instant,
    ) -> Result<(C, Limit), Refused> {
        let (source, origin) = (request.from.peer, &*request.origin);
        self.permit(origin)?;
        let permission = self.access().may_connect(source, &origin.address, target);
        let Permission::Allow(terms) = permission else {
            return Err(Refused::Denied);
        };
        // Before anything is looked up: asking often is no way to find out who holds a slot.
        self.connect_rates.take(source, origin.prefix, now)?;
        let over = self.reservations.live(&target, now).ok_or(Refused::NoReservation)?;
        if let Err(full) = self.circuits.check_caps(&source, &target, origin.prefix) {
            let Some(ceded) = self.circuits.cede(&full, &target, origin.prefix) else {
                return Err(full);
            };
            if let Some(circuit) = self.circuits.get(ceded) {
                let source = circuit.source.peer;
                log::debug!("circuit {ceded} ends for another one: source {source}");
            }
            self.end_circuit(ceded);
            self.circuits.check_caps(&source, &target, origin.prefix)?;
        }
        Ok((over, self.config.circuit_limit(terms)))
    }

    /// The target of a circuit agreed, or did not. Returns the reply handle and the parameters of the circuit that
    /// is open now, if the source still waits for it.
    pub fn on_target_answered(
        &mut self,
        id: CircuitId,
        answer: Result<(), StopFailed>,
        now: Instant,
    ) -> Option<(R, CircuitParameters)> {
        let circuit = self.circuits.get_mut(id)?;
        let State::Asking(pending) = &mut circuit.state else {
            return None;
        };
        let (source, target) = (circuit.source.peer, circuit.target.peer);
        match (pending.take(), answer) {
            (Some(PendingConnect { request, limit }), Ok(())) => {
                let counters = self.accounts.opened(id, source, target);
                let ended = circuit.begin(now, counters.clone());
                self.tell(Event::CircuitOpened { circuit: id, source, target });
                let (link, ends) = (self.link.clone(), [source, target]);
                Some((request.reply, CircuitParameters { limit, link, ends, counters, ended }))
            }
            (pending, answer) => {
                self.forget_circuit(id, now);
                // Else the source was refused before.
                if let (Some(PendingConnect { request, .. }), Err(failed)) = (pending, answer) {
                    self.refuse_circuit(request, target, Refused::StopFailed(failed));
                }
                None
            }
        }
    }

    /// An open circuit ended.
    pub fn on_circuit_ended(&mut self, id: CircuitId, end: CircuitEnd, now: Instant) {
        let Some(circuit) = self.forget_circuit(id, now) else {
            return;
        };
        if let Some((since, carried)) = circuit.open() {
            let (source, target) = (circuit.source.peer, circuit.target.peer);
            let open_for = now.saturating_duration_since(since);
            self.accounts.closed(id, source, target, carried);
            let end = circuit.end(end);
            let circuit = id;
            self.tell(Event::CircuitClosed { circuit, source, target, end, carried, open_for });
        }
    }

    /// Ends a circuit; its task reports when an open one has ended.
    ///
    /// One that is being set up keeps its place until nothing is left of it at the target: else
    /// sources that ask and leave could ask one target for more than its cap.
    pub(super) fn end_circuit(&mut self, id: CircuitId) {
        let pending = self.circuits.end(id);
        let target = self.circuits.get(id).map(|circuit| circuit.target.peer);
        if let (Some(PendingConnect { request, .. }), Some(target)) = (pending, target) {
            self.refuse_circuit(request, target, Refused::Gone);
        }
    }

    fn forget_circuit(
        &mut self,
        id: CircuitId,
        now: Instant,
    ) -> Option<Circuit<C, PendingConnect<C, R>>> {
        let circuit = self.circuits.remove(id)?;
        for end in [circuit.source, circuit.target] {
            self.connections.count_circuit(end.connection, -1, now);
        }
        Some(circuit)
    }

    fn refuse_circuit(&mut self, request: Pending<C, R>, target: PeerId, reason: Refused) {
        let (source, address) = (request.from.peer, request.origin.address.clone());
        self.turn_down(request, &reason);
        self.tell(Event::CircuitRefused { source, address, target, reason });
    }
}
