//! CONNECT, from the request to the end of the circuit.

use std::time::Instant;

use libp2p::{PeerId, swarm::ConnectionId};

use super::Behaviour;
use crate::{
    access::Permission,
    circuit::{Carried, CircuitEnd},
    circuits::{Circuit, CircuitId, End},
    event::{Event, Refused},
    handler::{Command, RequestId, Substream},
    stop::StopFailed,
    wire::Limit,
};

/// A CONNECT whose target has yet to answer.
pub(super) struct Asking {
    request: RequestId,
    limit: Limit,
}

impl Behaviour {
    pub(super) fn connect(
        &mut self,
        from: End<ConnectionId>,
        request: RequestId,
        target: PeerId,
        now: Instant,
    ) {
        let Some(connection) = self.connections.get(from.connection) else {
            return;
        };
        if connection.relayed {
            self.refuse_circuit(from, request, target, Refused::Relayed);
            return;
        }
        let billed_to = connection.billed_to();
        let Permission::Allow(terms) = self.may_connect(from, target) else {
            self.refuse_circuit(from, request, target, Refused::Denied);
            return;
        };
        let Some(over) = self.reservations.live(&target, now) else {
            self.refuse_circuit(from, request, target, Refused::NoReservation);
            return;
        };
        let to = End {
            peer: target,
            connection: over,
        };
        if let Err(spent) = self.connect_rates.take(from.peer, billed_to, now) {
            self.refuse_circuit(from, request, target, spent.into());
            return;
        }
        let id = match self.circuits.admit(from, to) {
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

    pub(super) fn target_answered(
        &mut self,
        id: CircuitId,
        answer: Result<Box<Substream>, StopFailed>,
    ) {
        let Some(asking) = self.asking.remove(&id) else {
            return; // ended meanwhile; dropping the stream resets it
        };
        match (asking, answer) {
            (Some(asking), Ok(stream)) => self.open_circuit(id, asking, stream),
            (Some(Asking { request, .. }), Err(failed)) => {
                if let Some(circuit) = self.forget_circuit(id) {
                    let reason = Refused::StopFailed(failed);
                    self.refuse_circuit(circuit.source, request, circuit.target.peer, reason);
                }
            }
            // Given up: the source was refused then.
            (None, _) => {
                self.forget_circuit(id);
            }
        }
    }

    fn open_circuit(&mut self, id: CircuitId, asking: Asking, stream: Box<Substream>) {
        let Some(circuit) = self.circuits.get(id) else {
            return;
        };
        let open = Command::OpenCircuit(asking.request, id, stream, asking.limit);
        self.command(circuit.source, open);
        self.tell(Event::CircuitOpened {
            circuit: id,
            source: circuit.source.peer,
            target: circuit.target.peer,
        });
    }

    pub(super) fn circuit_ended(&mut self, id: CircuitId, end: CircuitEnd, carried: Carried) {
        if let Some(circuit) = self.forget_circuit(id) {
            self.tell(Event::CircuitClosed {
                circuit: id,
                source: circuit.source.peer,
                target: circuit.target.peer,
                end,
                carried,
            });
        }
    }

    /// Ends a circuit by command; an open one reports back what it carried.
    ///
    /// One that is being set up keeps its place until nothing is left of it at the target: else
    /// sources that ask and leave could ask one target for more than its cap.
    pub(super) fn end_circuit(&mut self, id: CircuitId, circuit: Circuit<ConnectionId>) {
        let Some(asking) = self.asking.get_mut(&id) else {
            self.command(circuit.source, Command::EndCircuit(id));
            return;
        };
        if let Some(Asking { request, .. }) = asking.take() {
            self.refuse_circuit(circuit.source, request, circuit.target.peer, Refused::Gone);
            self.command(circuit.target, Command::GiveUpAsking(id));
        }
    }

    fn forget_circuit(&mut self, id: CircuitId) -> Option<Circuit<ConnectionId>> {
        let circuit = self.circuits.remove(id)?;
        let now = Instant::now();
        for end in [circuit.source, circuit.target] {
            self.connections.remove_circuit(end.connection, now);
        }
        Some(circuit)
    }

    fn refuse_circuit(
        &mut self,
        from: End<ConnectionId>,
        request: RequestId,
        target: PeerId,
        reason: Refused,
    ) {
        self.command(from, Command::Refuse(request, reason.status()));
        self.tell(Event::CircuitRefused {
            source: from.peer,
            address: self.address_of(from.connection),
            target,
            reason,
        });
    }
}
