//! The table of circuits: who is connected to whom, and the caps on how many.
//!
//! Pure, as [`crate::relay::reservations`] is. The bytes that pass through a circuit are not seen here: they
//! are the concern of `behaviour/circuit.rs`.

use std::{
    cmp::Reverse,
    collections::{HashMap, hash_map},
    time::Instant,
};

use libp2p::PeerId;

use super::quota::{Caps, Quota, Scope};
use crate::{
    address::ClientPrefix,
    config::Config,
    event::{Carried, CircuitId, Refused},
};

/// The circuits of one relay, those that are being set up included.
#[derive(Debug)]
pub struct Circuits<C> {
    policy: Policy,
    circuits: HashMap<CircuitId, Entry<C>>,
    /// Those that count, by the prefix of their source.
    quota: Quota,
    /// The circuits that a peer is part of, in either role.
    by_peer: HashMap<PeerId, Vec<CircuitId>>,
    last: u64,
}

/// The part of [`Config`] that this table follows.
#[derive(Clone, Copy, Debug)]
pub struct Policy {
    caps: Caps,
    per_peer: usize,
}

impl From<&Config> for Policy {
    fn from(config: &Config) -> Self {
        let caps = Caps {
            total: Some(config.max_circuits),
            per_subnet: config.circuits_per_subnet(),
            per_address: config.circuits_per_ip(),
        };
        Self { caps, per_peer: config.max_circuits_per_peer }
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

/// What is kept of a circuit.
#[derive(Debug)]
struct Entry<C> {
    circuit: Circuit<C>,
    /// The prefix of the source.
    prefix: Option<ClientPrefix>,
    /// How many bytes it had carried when it was looked at, and when it was seen to carry some last.
    carried: Carried,
    moved: Instant,
    /// It was ordered to end for another one, and counts no longer.
    has_ceded: bool,
}

/// Which cap left no room.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Full {
    /// The relay's own, or that of the source's address or subnet.
    Scope(Scope),
    /// That of the source.
    Source,
    /// That of the target.
    Target,
}

impl From<Full> for Refused {
    fn from(full: Full) -> Self {
        match full {
            Full::Scope(Scope::Total) => Self::TooManyCircuits,
            Full::Scope(Scope::Address(address)) => Self::TooManyCircuitsOfAddress(address),
            Full::Scope(Scope::Subnet(subnet)) => Self::TooManyCircuitsOfSubnet(subnet),
            Full::Source => Self::TooManyCircuitsOfSource,
            Full::Target => Self::TooManyCircuitsOfTarget,
        }
    }
}

impl<C: Copy + Eq> Circuits<C> {
    /// An empty table.
    pub fn new(policy: Policy) -> Self {
        let quota = Quota::new(policy.caps);
        Self { policy, circuits: HashMap::new(), quota, by_peer: HashMap::new(), last: 0 }
    }

    /// This policy holds from the next circuit on.
    pub fn set_policy(&mut self, policy: Policy) {
        self.policy = policy;
        self.quota.set_caps(policy.caps);
    }

    /// What each prefix holds as a source.
    pub fn quota(&self) -> &Quota {
        &self.quota
    }

    /// How many circuits there are, those that are being set up included.
    pub fn count(&self) -> usize {
        self.quota.held(Scope::Total)
    }

    /// How many of them `peer` is part of, as source and as target together.
    pub fn count_of(&self, peer: &PeerId) -> usize {
        self.entries_of(peer).filter(|(_, entry)| !entry.has_ceded).count()
    }

    /// How many peers are part of one: the size of the index behind the cap.
    pub fn peers(&self) -> usize {
        self.by_peer.len()
    }

    /// Admits a circuit that is yet to be set up, for a source of this prefix, or says which cap is reached.
    ///
    /// # Errors
    ///
    /// The cap.
    pub fn admit(
        &mut self,
        source: End<C>,
        target: End<C>,
        prefix: Option<ClientPrefix>,
        now: Instant,
    ) -> Result<CircuitId, Full> {
        let full = self.quota.full(prefix);
        if let Some(narrow) = full.filter(|full| *full != Scope::Total) {
            return Err(Full::Scope(narrow));
        }
        if self.count_of(&source.peer) >= self.policy.per_peer {
            return Err(Full::Source);
        }
        // A circuit of the target's that makes room does so in the table as well.
        if self.count_of(&target.peer) >= self.policy.per_peer {
            return Err(Full::Target);
        }
        if let Some(total) = full {
            return Err(Full::Scope(total));
        }
        self.last += 1;
        let id = CircuitId(self.last);
        for peer in [source.peer, target.peer] {
            self.by_peer.entry(peer).or_default().push(id);
        }
        let circuit = Circuit { source, target };
        let carried = Carried::default();
        let entry = Entry { circuit, prefix, carried, moved: now, has_ceded: false };
        self.circuits.insert(id, entry);
        self.quota.add(prefix);
        Ok(id)
    }

    /// Where the table, or the target, has as many circuits as it may: the one that ends for another of a
    /// source of this prefix, which counts no longer. Of those under the cap, one of the heaviest prefix
    /// that holds more than the newcomer's would, the one that has carried nothing for the longest. `None`:
    /// there is none such, or more than one would have to end. `is_open` says which are: one that is being set up stays.
    pub fn cede(
        &mut self,
        full: Full,
        target: &PeerId,
        prefix: Option<ClientPrefix>,
        is_open: impl Fn(CircuitId) -> bool,
    ) -> Option<(CircuitId, Circuit<C>)> {
        if self.quota.above(None).is_some() || self.count_of(target) > self.policy.per_peer {
            return None;
        }
        let under_cap: Vec<_> = match full {
            Full::Scope(Scope::Total) => {
                self.circuits.iter().map(|(id, entry)| (*id, entry)).collect()
            }
            Full::Target => self.entries_of(target).collect(),
            Full::Scope(_) | Full::Source => return None,
        };
        let counts = under_cap.into_iter().filter(|(_, entry)| !entry.has_ceded);
        let counts: Vec<_> = counts.collect();
        let mut shares = Quota::new(Caps::default());
        counts.iter().for_each(|(_, entry)| shares.add(entry.prefix));
        let ceding = counts
            .into_iter()
            .filter(|(id, entry)| shares.yields(entry.prefix, prefix) && is_open(*id));
        let (id, _) = ceding.max_by_key(|(id, entry)| {
            (shares.load(entry.prefix), Reverse(entry.moved), Reverse(*id))
        })?;
        let entry = self.circuits.get_mut(&id)?;
        entry.has_ceded = true;
        self.quota.remove(entry.prefix);
        Some((id, entry.circuit))
    }

    /// Looks which circuits have carried something since the last look.
    pub fn look(&mut self, carried: impl Iterator<Item = (CircuitId, Carried)>, now: Instant) {
        for (id, carried) in carried {
            if let Some(entry) = self.circuits.get_mut(&id)
                && entry.carried != carried
            {
                (entry.carried, entry.moved) = (carried, now);
            }
        }
    }

    /// The circuit of this name.
    pub fn get(&self, id: CircuitId) -> Option<Circuit<C>> {
        self.circuits.get(&id).map(|entry| entry.circuit)
    }

    /// Takes a circuit that ended, or was never set up, out of the table.
    pub fn remove(&mut self, id: CircuitId) -> Option<Circuit<C>> {
        let Entry { circuit, prefix, has_ceded, .. } = self.circuits.remove(&id)?;
        if !has_ceded {
            self.quota.remove(prefix);
        }
        for peer in [circuit.source.peer, circuit.target.peer] {
            let hash_map::Entry::Occupied(mut ids) = self.by_peer.entry(peer) else {
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
        self.entries_of(peer).map(|(id, entry)| (id, entry.circuit)).collect()
    }

    fn entries_of(&self, peer: &PeerId) -> impl Iterator<Item = (CircuitId, &Entry<C>)> {
        let ids = self.by_peer.get(peer).into_iter().flatten();
        ids.filter_map(|id| Some((*id, self.circuits.get(id)?)))
    }

    /// All circuits, in no order.
    pub fn iter(&self) -> impl Iterator<Item = (CircuitId, Circuit<C>)> {
        self.circuits.iter().map(|(id, entry)| (*id, entry.circuit))
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
    use std::{
        net::{IpAddr, Ipv4Addr},
        time::Duration,
    };

    use super::*;

    fn table(caps: Caps, per_peer: usize) -> Circuits<u32> {
        Circuits::new(Policy { caps, per_peer })
    }

    fn of_total(total: usize) -> Caps {
        Caps { total: Some(total), ..Caps::default() }
    }

    fn end(connection: u32) -> End<u32> {
        End { peer: PeerId::random(), connection }
    }

    /// An address in a /24 of its own.
    fn prefix(n: u8) -> Option<ClientPrefix> {
        Some(IpAddr::from(Ipv4Addr::new(192, 0, n, 1)).into())
    }

    fn admit(
        circuits: &mut Circuits<u32>,
        source: End<u32>,
        target: End<u32>,
        from: u8,
    ) -> Result<CircuitId, Full> {
        circuits.admit(source, target, prefix(from), Instant::now())
    }

    #[test]
    fn a_peer_is_counted_as_source_and_as_target_together() {
        let mut circuits = table(of_total(10), 2);
        let (alice, bob, carol) = (end(1), end(2), end(3));
        admit(&mut circuits, alice, bob, 1).unwrap();
        admit(&mut circuits, carol, alice, 1).unwrap();
        assert_eq!(admit(&mut circuits, alice, carol, 1), Err(Full::Source));
        assert_eq!(admit(&mut circuits, bob, alice, 1), Err(Full::Target));
        assert!(admit(&mut circuits, bob, carol, 1).is_ok());
    }

    #[test]
    fn the_total_holds_for_everyone_and_each_prefix_has_its_cap() {
        let caps = Caps { total: Some(3), per_subnet: Some(9), per_address: Some(2) };
        let mut circuits = table(caps, 5);
        for _ in 0..2 {
            admit(&mut circuits, end(1), end(2), 1).unwrap();
        }
        let full = Full::Scope(Scope::Address(prefix(1).unwrap()));
        assert_eq!(admit(&mut circuits, end(3), end(4), 1), Err(full));
        assert!(admit(&mut circuits, end(3), end(4), 2).is_ok());
        assert_eq!(admit(&mut circuits, end(3), end(4), 3), Err(Full::Scope(Scope::Total)));
    }

    #[test]
    fn a_full_target_cedes_the_most_idle_circuit_of_the_heaviest_prefix_to_another() {
        let mut circuits = table(of_total(99), 4);
        let (start, target) = (Instant::now(), end(1));
        let ids: Vec<_> =
            (0..4).map(|n| admit(&mut circuits, end(2 + n), target, 1).unwrap()).collect();
        let full = admit(&mut circuits, end(9), target, 2).unwrap_err();
        assert_eq!(full, Full::Target);
        // All but the second have carried something, and the third is being set up.
        let some = Carried { to_target: 1, to_source: 0 };
        let moved = [0, 2, 3].map(|n| (ids[n], some));
        circuits.look(moved.into_iter(), start + Duration::from_secs(1));
        let is_open = |id| id != ids[2];
        let same = circuits.cede(full, &target.peer, prefix(1), is_open);
        assert_eq!(same, None, "of the same prefix");
        let (ceded, _) = circuits.cede(full, &target.peer, prefix(2), is_open).unwrap();
        assert_eq!((ceded, circuits.count()), (ids[1], 3));
        assert!(admit(&mut circuits, end(9), target, 2).is_ok());
        // Two of one and one of the other are what is fair; the ended one is there until it says so.
        circuits.cede(full, &target.peer, prefix(2), is_open).unwrap();
        assert_eq!(circuits.cede(full, &target.peer, prefix(2), is_open), None);
        assert_eq!(circuits.of(&target.peer).len(), 5);
        assert!(circuits.remove(ceded).is_some());
        assert_eq!((circuits.count(), circuits.count_of(&target.peer)), (3, 3));
    }

    #[test]
    fn a_full_table_cedes_too_and_the_cap_of_a_source_does_not() {
        let mut circuits = table(of_total(3), 9);
        let ends: Vec<_> = (0..3).map(|n| (end(n), end(10 + n))).collect();
        for (source, target) in &ends {
            admit(&mut circuits, *source, *target, 1).unwrap();
        }
        let (full, nobody) = (Full::Scope(Scope::Total), PeerId::random());
        assert_eq!(circuits.cede(Full::Source, &nobody, prefix(2), |_| true), None);
        assert_eq!(circuits.cede(full, &nobody, prefix(1), |_| true), None);
        assert!(circuits.cede(full, &nobody, prefix(2), |_| true).is_some());
        assert!(admit(&mut circuits, end(8), end(9), 2).is_ok());
    }

    #[test]
    fn a_circuit_that_ended_leaves_nothing_behind() {
        let mut circuits = table(of_total(1), 1);
        let (alice, bob) = (end(1), end(2));
        let id = admit(&mut circuits, alice, bob, 1).unwrap();
        assert_eq!(circuits.of(&bob.peer).len(), 1);
        assert!(circuits.remove(id).is_some());
        assert!(circuits.remove(id).is_none());
        assert_eq!((circuits.count(), circuits.peers()), (0, 0));
        assert!(circuits.quota().is_empty());
        assert_ne!(admit(&mut circuits, alice, bob, 1), Ok(id));
    }
}
