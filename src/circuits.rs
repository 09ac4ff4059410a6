//! The table of circuits: who is connected to whom, and the caps on how many.
//!
//! Pure, as [`crate::reservations`] is. The bytes that pass through a circuit are not seen here:
//! they are the concern of [`crate::circuit`].

use std::{
    collections::{HashMap, hash_map::Entry},
    fmt,
};

use libp2p::PeerId;

use crate::config::Config;

/// The circuits of one relay, those that are being set up included.
#[derive(Debug)]
pub struct Circuits<C> {
    policy: Policy,
    circuits: HashMap<CircuitId, Circuit<C>>,
    /// The circuits that a peer is part of, in either role.
    by_peer: HashMap<PeerId, Vec<CircuitId>>,
    last: u64,
}

/// The part of [`Config`] that this table follows.
#[derive(Clone, Copy, Debug)]
pub struct Policy {
    total: usize,
    per_peer: usize,
}

impl From<&Config> for Policy {
    fn from(config: &Config) -> Self {
        Self {
            total: config.max_circuits,
            per_peer: config.max_circuits_per_peer,
        }
    }
}

/// Names a circuit, from the CONNECT that asks for it to its end. Never used twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct CircuitId(u64);

impl fmt::Display for CircuitId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A peer, and the connection over which it takes part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct End<C> {
    /// Who.
    pub peer: PeerId,
    /// Over which connection.
    pub connection: C,
}

/// One circuit: `source` asked for it, `target` holds the reservation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Circuit<C> {
    /// Who asked.
    pub source: End<C>,
    /// Who is asked for.
    pub target: End<C>,
}

/// Which cap left no room.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Full {
    /// The relay's own.
    Total,
    /// That of the source.
    Source,
    /// That of the target.
    Target,
}

impl<C: Copy + Eq> Circuits<C> {
    /// An empty table.
    pub fn new(policy: Policy) -> Self {
        Self {
            policy,
            circuits: HashMap::new(),
            by_peer: HashMap::new(),
            last: 0,
        }
    }

    /// This policy holds from the next circuit on.
    pub fn set_policy(&mut self, policy: Policy) {
        self.policy = policy;
    }

    /// How many circuits there are, those that are being set up included.
    pub fn count(&self) -> usize {
        self.circuits.len()
    }

    /// How many of them `peer` is part of, as source and as target together.
    pub fn count_of(&self, peer: &PeerId) -> usize {
        self.by_peer.get(peer).map_or(0, Vec::len)
    }

    /// How many peers are part of one: the size of the index behind the cap.
    pub fn peers(&self) -> usize {
        self.by_peer.len()
    }

    /// Admits a circuit that is yet to be set up, or says which cap is reached.
    pub fn admit(&mut self, source: End<C>, target: End<C>) -> Result<CircuitId, Full> {
        if self.count() >= self.policy.total {
            return Err(Full::Total);
        }
        if self.count_of(&source.peer) >= self.policy.per_peer {
            return Err(Full::Source);
        }
        if self.count_of(&target.peer) >= self.policy.per_peer {
            return Err(Full::Target);
        }
        self.last += 1;
        let id = CircuitId(self.last);
        for peer in [source.peer, target.peer] {
            self.by_peer.entry(peer).or_default().push(id);
        }
        self.circuits.insert(id, Circuit { source, target });
        Ok(id)
    }

    /// The circuit of this name.
    pub fn get(&self, id: CircuitId) -> Option<Circuit<C>> {
        self.circuits.get(&id).copied()
    }

    /// Takes a circuit that ended, or was never set up, out of the table.
    pub fn remove(&mut self, id: CircuitId) -> Option<Circuit<C>> {
        let circuit = self.circuits.remove(&id)?;
        for peer in [circuit.source.peer, circuit.target.peer] {
            let Entry::Occupied(mut ids) = self.by_peer.entry(peer) else {
                continue;
            };
            ids.get_mut().retain(|other| *other != id);
            if ids.get().is_empty() {
                ids.remove();
            }
        }
        Some(circuit)
    }

    /// The circuits that `peer` is part of, in either role, in the order of their admission.
    pub fn of(&self, peer: &PeerId) -> Vec<(CircuitId, Circuit<C>)> {
        let ids = self.by_peer.get(peer).into_iter().flatten();
        ids.filter_map(|id| Some((*id, *self.circuits.get(id)?)))
            .collect()
    }

    /// All circuits, in no order.
    pub fn iter(&self) -> impl Iterator<Item = (CircuitId, Circuit<C>)> {
        self.circuits.iter().map(|(id, circuit)| (*id, *circuit))
    }

    /// The circuits that go over this connection of the peer.
    pub fn over(&self, end: End<C>) -> Vec<(CircuitId, Circuit<C>)> {
        let mut over = self.of(&end.peer);
        over.retain(|(_, circuit)| [circuit.source, circuit.target].contains(&end));
        over
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(total: usize, per_peer: usize) -> Circuits<u32> {
        Circuits::new(Policy { total, per_peer })
    }

    fn end(connection: u32) -> End<u32> {
        End {
            peer: PeerId::random(),
            connection,
        }
    }

    #[test]
    fn a_peer_is_counted_as_source_and_as_target_together() {
        let mut circuits = table(10, 2);
        let (alice, bob, carol) = (end(1), end(2), end(3));
        circuits.admit(alice, bob).unwrap();
        circuits.admit(carol, alice).unwrap();
        assert_eq!(circuits.admit(alice, carol), Err(Full::Source));
        assert_eq!(circuits.admit(bob, alice), Err(Full::Target));
        assert!(circuits.admit(bob, carol).is_ok());
    }

    #[test]
    fn the_total_holds_for_everyone() {
        let mut circuits = table(1, 5);
        circuits.admit(end(1), end(2)).unwrap();
        assert_eq!(circuits.admit(end(3), end(4)), Err(Full::Total));
    }

    #[test]
    fn a_circuit_that_ended_leaves_nothing_behind() {
        let mut circuits = table(1, 1);
        let (alice, bob) = (end(1), end(2));
        let id = circuits.admit(alice, bob).unwrap();
        assert_eq!(circuits.of(&bob.peer).len(), 1);
        assert!(circuits.remove(id).is_some());
        assert!(circuits.remove(id).is_none());
        assert_eq!((circuits.count(), circuits.peers()), (0, 0));
        assert_ne!(circuits.admit(alice, bob), Ok(id));
    }
}
