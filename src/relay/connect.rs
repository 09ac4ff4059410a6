//! CONNECT, from the request to the end of the circuit.

use std::{hash::Hash, time::Instant};

use libp2p::PeerId;

use super::{
    Asking, Command, Quota, Relay, RequestId,
    circuits::{Circuit, End},
};
use crate::{
    access::Permission,
    event::{Carried, CircuitEnd, CircuitId, Event, Refused, StopFailed},
};

impl<C: Copy + Ord + Hash, S> Relay<C, S> {
    pub(super) fn connect(
        &mut self,
        from: End<C>,
        request: RequestId,
        target: PeerId,
        now: Instant,
    ) {
        let Some(connection) = self.connections.get(from.connection) else {
            return;
        };
        if connection.remote.relayed {
            self.refuse_circuit(from, request, target, Refused::Relayed);
            return;
        }
        let billed_to = connection.billed_to();
        let Permission::Allow(terms) = self.may_connect(from, target) else {
            self.refuse_circuit(from, request, target, Refused::Denied);
            return;
        };
        // Before anything is looked up: who holds a slot is not to be had by asking often.
        if let Err(spent) = self.connect_rates.take(from.peer, billed_to, now) {
            self.refuse_circuit(from, request, target, spent.into());
            return;
        }
        let Some(over) = self.reservations.live(&target, now) else {
            self.refuse_circuit(from, request, target, Refused::NoReservation);
            return;
        };
        let to = End { peer: target, connection: over };
        let mut admitted = self.circuits.admit(from, to, billed_to, now);
        if let Err(full) = admitted
            && let Some((id, circuit)) =
                self.circuits.cede(full, &target, billed_to, |id| !self.asking.contains_key(&id))
        {
            log::debug!("circuit {id} ends for another one: source {}", circuit.source.peer);
            self.end_circuit(id, circuit);
            admitted = self.circuits.admit(from, to, billed_to, now);
        }
        let id = match admitted {
            Ok(id) => id,
            Err(full) => {
                self.refuse_circuit(from, request, target, full.into());
                return;
            }
        };
        let limit = self.config.circuit_limit(terms);
        self.asking.insert(id, Some(Asking { request, limit }));
        self.connections.add_circuit(from.connection, now);
        self.connections.add_circuit(to.connection, now);
        self.command(to, Command::AskTarget(id, from.peer, limit));
    }

    /// A target answered, with the stream that the circuit is to go over, or in some other way.
    pub fn target_answered(&mut self, id: CircuitId, answer: Result<S, StopFailed>, now: Instant) {
        let Some(asking) = self.asking.remove(&id) else {
            return; // ended meanwhile; dropping the stream resets it
        };
        match (asking, answer) {
            (Some(asking), Ok(stream)) => self.open_circuit(id, asking, stream),
            (Some(Asking { request, .. }), Err(failed)) => {
                if let Some(circuit) = self.forget_circuit(id, now) {
                    let reason = Refused::StopFailed(failed);
                    self.refuse_circuit(circuit.source, request, circuit.target.peer, reason);
                }
            }
            // Given up: the source was refused then.
            (None, _) => {
                self.forget_circuit(id, now);
            }
        }
    }

    fn open_circuit(&mut self, id: CircuitId, asking: Asking, stream: S) {
        let Some(circuit) = self.circuits.get(id) else {
            return;
        };
        let (source, target) = (circuit.source.peer, circuit.target.peer);
        let quota = Quota {
            limit: asking.limit,
            link: self.link.clone(),
            ends: [source, target],
            meter: self.accounts.opened(id, source, target),
        };
        let open = Command::OpenCircuit(asking.request, id, stream, quota);
        self.command(circuit.source, open);
        self.tell(Event::CircuitOpened { circuit: id, source, target });
    }

    /// A circuit ended, having carried so much.
    pub fn circuit_ended(
        &mut self,
        id: CircuitId,
        end: CircuitEnd,
        carried: Carried,
        now: Instant,
    ) {
        if let Some(circuit) = self.forget_circuit(id, now) {
            let (source, target) = (circuit.source.peer, circuit.target.peer);
            self.accounts.closed(id, source, target, carried);
            self.tell(Event::CircuitClosed { circuit: id, source, target, end, carried });
        }
    }

    /// Ends a circuit by command; an open one reports back what it carried.
    ///
    /// One that is being set up keeps its place until nothing is left of it at the target: else
    /// sources that ask and leave could ask one target for more than its cap.
    pub(super) fn end_circuit(&mut self, id: CircuitId, circuit: Circuit<C>) {
        let Some(asking) = self.asking.get_mut(&id) else {
            self.command(circuit.source, Command::EndCircuit(id));
            return;
        };
        if let Some(Asking { request, .. }) = asking.take() {
            self.refuse_circuit(circuit.source, request, circuit.target.peer, Refused::Gone);
            self.command(circuit.target, Command::GiveUpAsking(id));
        }
    }

    fn forget_circuit(&mut self, id: CircuitId, now: Instant) -> Option<Circuit<C>> {
        let circuit = self.circuits.remove(id)?;
        for end in [circuit.source, circuit.target] {
            self.connections.remove_circuit(end.connection, now);
        }
        Some(circuit)
    }

    pub(super) fn refuse_circuit(
        &mut self,
        from: End<C>,
        request: RequestId,
        target: PeerId,
        reason: Refused,
    ) {
        self.turn_down(from, request, &reason);
        self.tell(Event::CircuitRefused {
            source: from.peer,
            address: self.address_of(from.connection),
            target,
            reason,
        });
    }
}
