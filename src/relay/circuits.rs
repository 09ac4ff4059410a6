//! The table of circuits: one record each, and the caps on how many.
//!
//! Sans-IO, as [`crate::relay::reservations`] is. The bytes that pass through a circuit are not seen here, only
//! their counters: `behaviour/circuit.rs` carries them.

use std::{
    cmp::Reverse,
    collections::{HashMap, hash_map},
    time::{Duration, Instant},
};

use libp2p::{PeerId, futures::channel::oneshot};

use super::{
    accounts::Counters,
    quota::{Caps, Quota, Scope},
};
use crate::{
    address::ClientPrefix,
    config::Config,
    event::{Carried, CircuitEnd, CircuitId, Refused},
};

/// How long a direction may move nothing though bytes wait, while memory is scarce.
const MAX_STALL: Duration = Duration::from_secs(10);

/// The circuits of one relay, those that are being set up included.
///
/// `Q` is the CONNECT that a circuit answers, until it is answered.
#[derive(Debug)]
pub struct Circuits<C, Q> {
    circuits: HashMap<CircuitId, Circuit<C, Q>>,
    /// Those that count, by the prefix of their source.
    quota: Quota,
    per_peer: usize,
    /// The circuits that a peer is part of, in either role.
    by_peer: HashMap<PeerId, Vec<CircuitId>>,
    last: u64,
}

/// A peer, and the connection over which it takes part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct End<C> {
    /// The peer.
    pub peer: PeerId,
    /// One of its connections.
    pub connection: C,
}

/// One circuit: `source` asked for it, `target` holds the reservation.
#[derive(Debug)]
pub struct Circuit<C, Q> {
    /// The peer that asked.
    pub source: End<C>,
    /// The peer that is asked for.
    pub target: End<C>,
    /// How far it has come.
    pub state: State<Q>,
    /// Dropping it ends the exchange with its target, or the open circuit.
    guard: Option<oneshot::Sender<()>>,
    /// The prefix of the source.
    prefix: Option<ClientPrefix>,
    /// How many bytes it had carried at the last sweep, and at which sweep it had last carried some.
    carried: Carried,
    moved: Instant,
    /// Since which sweep each direction, to the target and to the source, has moved nothing though bytes waited.
    stalled: [Option<Instant>; 2],
    /// Why the relay ended it, or ends it if it does.
    end: CircuitEnd,
    /// It was ended for another one, and counts no longer.
    has_ceded: bool,
}

/// How far a circuit has come.
#[derive(Debug)]
pub enum State<Q> {
    /// Its target has yet to answer. `None`: the source was refused meanwhile.
    Asking(Option<Q>),
    /// Bytes pass.
    Open {
        /// Since when.
        since: Instant,
        /// How many.
        counters: Counters,
    },
}

impl<C, Q> Circuit<C, Q> {
    /// Since when it is open, and how many bytes it has carried by now; `None`: it is being set up.
    pub fn open(&self) -> Option<(Instant, Carried)> {
        match &self.state {
            State::Open { since, counters } => Some((*since, counters.read())),
            State::Asking(_) => None,
        }
    }

    /// How it ended, if its task says so: where the relay ended it, why.
    pub fn end(&self, said: CircuitEnd) -> CircuitEnd {
        if said == CircuitEnd::Ended { self.end } else { said }
    }

    /// Opens it. The receiver is cancelled when it is [ended](Circuits::end).
    pub fn begin(&mut self, since: Instant, counters: Counters) -> oneshot::Receiver<()> {
        let (guard, ended) = oneshot::channel();
        self.guard = Some(guard);
        self.state = State::Open { since, counters };
        ended
    }
}

impl<C: Copy + Eq, Q> Circuits<C, Q> {
    /// An empty table.
    pub fn new(config: &Config) -> Self {
        Self {
            circuits: HashMap::new(),
            quota: Quota::new(caps(config)),
            per_peer: config.max_circuits_per_peer,
            by_peer: HashMap::new(),
            last: 0,
        }
    }

    /// This configuration holds from the next circuit on.
    pub fn configure(&mut self, config: &Config) {
        self.quota.set_caps(caps(config));
        self.per_peer = config.max_circuits_per_peer;
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
        self.of(peer).filter(|(_, circuit)| !circuit.has_ceded).count()
    }

    /// How many peers are part of one: the size of the index behind the cap.
    pub fn peers(&self) -> usize {
        self.by_peer.len()
    }

    /// Checks that one more circuit between these two fits under every cap.
    ///
    /// # Errors
    ///
    /// The cap that is reached. One that [`Circuits::cede`] cannot make room under comes first.
    pub fn check_caps(
        &self,
        source: &PeerId,
        target: &PeerId,
        prefix: Option<ClientPrefix>,
    ) -> Result<(), Refused> {
        let full = self.quota.full(prefix);
        match full {
            Some(Scope::Address(address)) => {
                return Err(Refused::TooManyCircuitsOfAddress(address));
            }
            Some(Scope::Subnet(subnet)) => return Err(Refused::TooManyCircuitsOfSubnet(subnet)),
            Some(Scope::Total) | None => {}
        }
        if self.count_of(source) >= self.per_peer {
            return Err(Refused::TooManyCircuitsOfSource);
        }
        // A circuit of the target's that makes room does so in the table as well.
        if self.count_of(target) >= self.per_peer {
            return Err(Refused::TooManyCircuitsOfTarget);
        }
        full.map_or(Ok(()), |_| Err(Refused::TooManyCircuits))
    }

    /// Adds a circuit whose target is to be asked, for a source of this prefix. The receiver is cancelled when
    /// the circuit is [ended](Self::end).
    pub fn add(
        &mut self,
        source: End<C>,
        target: End<C>,
        prefix: Option<ClientPrefix>,
        request: Q,
        now: Instant,
    ) -> (CircuitId, oneshot::Receiver<()>) {
        self.last += 1;
        let id = CircuitId(self.last);
        for peer in [source.peer, target.peer] {
            self.by_peer.entry(peer).or_default().push(id);
        }
        let (guard, ended) = oneshot::channel();
        let circuit = Circuit {
            source,
            target,
            state: State::Asking(Some(request)),
            guard: Some(guard),
            prefix,
            carried: Carried::default(),
            moved: now,
            stalled: [None; 2],
            end: CircuitEnd::Ended,
            has_ceded: false,
        };
        self.circuits.insert(id, circuit);
        self.quota.add(prefix);
        (id, ended)
    }

    /// Where the table, or the target, has as many circuits as it may: the one that ends for another of a
    /// source of this prefix, which counts no longer. Of those under the cap, one of the heaviest prefix
    /// that holds more than the newcomer's would, the one that has carried nothing for the longest. `None`:
    /// there is none such, or more than one would have to end. One that is being set up stays.
    pub fn cede(
        &mut self,
        full: &Refused,
        target: &PeerId,
        prefix: Option<ClientPrefix>,
    ) -> Option<CircuitId> {
        if self.quota.above(None).is_some() || self.count_of(target) > self.per_peer {
            return None;
        }
        let under_cap: Vec<_> = match full {
            Refused::TooManyCircuits => self.iter().collect(),
            Refused::TooManyCircuitsOfTarget => self.of(target).collect(),
            _ => return None,
        };
        let counts = under_cap.into_iter().filter(|(_, circuit)| !circuit.has_ceded);
        let counts: Vec<_> = counts.collect();
        let mut shares = Quota::new(Caps::default());
        counts.iter().for_each(|(_, circuit)| shares.add(circuit.prefix));
        let ceding = counts.into_iter().filter(|(_, circuit)| {
            shares.yields(circuit.prefix, prefix) && circuit.open().is_some()
        });
        let (id, _) = ceding.max_by_key(|(id, circuit)| {
            (shares.load(circuit.prefix), Reverse(circuit.moved), Reverse(*id))
        })?;
        let circuit = self.circuits.get_mut(&id)?;
        circuit.has_ceded = true;
        self.quota.remove(circuit.prefix);
        Some(id)
    }

    /// Looks which circuits have carried something since the last look, and on which bytes wait.
    pub fn look(&mut self, now: Instant) {
        for circuit in self.circuits.values_mut() {
            let State::Open { counters, .. } = &circuit.state else {
                continue;
            };
            let (carried, waiting) = (counters.read(), counters.waiting());
            let before = std::mem::replace(&mut circuit.carried, carried);
            if before != carried {
                circuit.moved = now;
            }
            let stays =
                [before.to_target == carried.to_target, before.to_source == carried.to_source];
            for ((since, waits), stays) in circuit.stalled.iter_mut().zip(waiting).zip(stays) {
                *since = (waits && stays).then(|| since.unwrap_or(now));
            }
        }
    }

    /// The looks came late: stalls count from another time.
    pub fn excuse(&mut self, from: impl Fn(Instant) -> Instant) {
        let stalls = self.circuits.values_mut().flat_map(|circuit| &mut circuit.stalled);
        stalls.flatten().for_each(|since| *since = from(*since));
    }

    /// The circuits one of whose directions had moved nothing for [`MAX_STALL`] at the last look though bytes
    /// waited, in the order of their admission. From now on that is why they end, if the relay ends them.
    pub fn stalled(&mut self, now: Instant) -> Vec<CircuitId> {
        let is_long = |since: &Instant| now.saturating_duration_since(*since) >= MAX_STALL;
        let stalled = self.circuits.iter_mut().filter_map(|(id, circuit)| {
            let is_stalled =
                circuit.guard.is_some() && circuit.stalled.iter().flatten().any(is_long);
            circuit.end = if is_stalled { CircuitEnd::Stalled } else { circuit.end };
            is_stalled.then_some(*id)
        });
        let mut stalled: Vec<_> = stalled.collect();
        stalled.sort_unstable();
        stalled
    }

    /// Ends a circuit by dropping its guard, which cancels the receiver. It counts until its end is reported.
    ///
    /// Returns the CONNECT that was not answered yet.
    pub fn end(&mut self, id: CircuitId) -> Option<Q> {
        let circuit = self.circuits.get_mut(&id)?;
        circuit.guard = None;
        match &mut circuit.state {
            State::Asking(request) => request.take(),
            State::Open { .. } => None,
        }
    }

    /// The circuit of this name.
    pub fn get(&self, id: CircuitId) -> Option<&Circuit<C, Q>> {
        self.circuits.get(&id)
    }

    /// As [`Circuits::get`], to change.
    pub fn get_mut(&mut self, id: CircuitId) -> Option<&mut Circuit<C, Q>> {
        self.circuits.get_mut(&id)
    }

    /// Takes a circuit that ended, or was never set up, out of the table.
    pub fn remove(&mut self, id: CircuitId) -> Option<Circuit<C, Q>> {
        let circuit = self.circuits.remove(&id)?;
        if !circuit.has_ceded {
            self.quota.remove(circuit.prefix);
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
    pub fn of(&self, peer: &PeerId) -> impl Iterator<Item = (CircuitId, &Circuit<C, Q>)> {
        let ids = self.by_peer.get(peer).into_iter().flatten();
        ids.filter_map(|id| Some((*id, self.circuits.get(id)?)))
    }

    /// All circuits, in no order.
    pub fn iter(&self) -> impl Iterator<Item = (CircuitId, &Circuit<C, Q>)> {
        self.circuits.iter().map(|(id, circuit)| (*id, circuit))
    }

    /// Those that are open, and what each has carried so far, in no order.
    pub fn open(&self) -> impl Iterator<Item = (CircuitId, Carried)> {
        self.iter().filter_map(|(id, circuit)| Some((id, circuit.open()?.1)))
    }

    /// The circuits that go over this connection of the peer, in the order of their admission.
    pub fn over(&self, end: End<C>) -> Vec<CircuitId> {
        let over = self.of(&end.peer).filter(|(_, c)| [c.source, c.target].contains(&end));
        over.map(|(id, _)| id).collect()
    }
}

fn caps(config: &Config) -> Caps {
    Caps {
        total: Some(config.max_circuits),
        per_subnet: config.circuits_per_subnet(),
        per_address: config.circuits_per_ip(),
    }
}

#[cfg(test)]
mod tests {
    use std::net::{IpAddr, Ipv4Addr};

    use super::*;
    use crate::relay::accounts::Accounts;

    fn table(caps: Caps, per_peer: usize) -> Circuits<u32, ()> {
        Circuits { quota: Quota::new(caps), per_peer, ..Circuits::new(&Config::default()) }
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
        circuits: &mut Circuits<u32, ()>,
        source: End<u32>,
        target: End<u32>,
        from: u8,
    ) -> Result<CircuitId, Refused> {
        circuits.check_caps(&source.peer, &target.peer, prefix(from))?;
        Ok(circuits.add(source, target, prefix(from), (), Instant::now()).0)
    }

    /// The target agreed; returns where its bytes are counted.
    fn open(circuits: &mut Circuits<u32, ()>, id: CircuitId) -> Counters {
        let [source, target] = [(); 2].map(|()| PeerId::random());
        let counters = Accounts::default().opened(id, source, target);
        let circuit = circuits.get_mut(id).unwrap();
        assert!(circuit.begin(Instant::now(), counters.clone()).try_recv().is_ok());
        counters
    }

    #[test]
    fn a_peer_is_counted_as_source_and_as_target_together() {
        let mut circuits = table(of_total(10), 2);
        let (alice, bob, carol) = (end(1), end(2), end(3));
        admit(&mut circuits, alice, bob, 1).unwrap();
        admit(&mut circuits, carol, alice, 1).unwrap();
        assert_eq!(admit(&mut circuits, alice, carol, 1), Err(Refused::TooManyCircuitsOfSource));
        assert_eq!(admit(&mut circuits, bob, alice, 1), Err(Refused::TooManyCircuitsOfTarget));
        assert!(admit(&mut circuits, bob, carol, 1).is_ok());
    }

    #[test]
    fn the_total_holds_for_everyone_and_each_prefix_has_its_cap() {
        let caps = Caps { total: Some(3), per_subnet: Some(9), per_address: Some(2) };
        let mut circuits = table(caps, 5);
        for _ in 0..2 {
            admit(&mut circuits, end(1), end(2), 1).unwrap();
        }
        let full = Refused::TooManyCircuitsOfAddress(prefix(1).unwrap());
        assert_eq!(admit(&mut circuits, end(3), end(4), 1), Err(full));
        assert!(admit(&mut circuits, end(3), end(4), 2).is_ok());
        assert_eq!(admit(&mut circuits, end(3), end(4), 3), Err(Refused::TooManyCircuits));
    }

    #[test]
    fn a_full_target_cedes_the_most_idle_circuit_of_the_heaviest_prefix_to_another() {
        let mut circuits = table(of_total(99), 4);
        let (start, target) = (Instant::now(), end(1));
        let ids: Vec<_> =
            (0..4).map(|n| admit(&mut circuits, end(2 + n), target, 1).unwrap()).collect();
        let full = &admit(&mut circuits, end(9), target, 2).unwrap_err();
        assert_eq!(*full, Refused::TooManyCircuitsOfTarget);
        // All but the second have carried something, and the third is being set up.
        for n in [0, 1, 3] {
            let carried = Carried { to_target: u64::from(n != 1), to_source: 0 };
            open(&mut circuits, ids[n]).set(carried);
        }
        circuits.look(start + Duration::from_secs(1));
        let same = circuits.cede(full, &target.peer, prefix(1));
        assert_eq!(same, None, "of the same prefix");
        let ceded = circuits.cede(full, &target.peer, prefix(2)).unwrap();
        assert_eq!((ceded, circuits.count()), (ids[1], 3));
        assert!(admit(&mut circuits, end(9), target, 2).is_ok());
        // Two of one and one of the other are what is fair; the ended one is there until it says so.
        circuits.cede(full, &target.peer, prefix(2)).unwrap();
        assert_eq!(circuits.cede(full, &target.peer, prefix(2)), None);
        assert_eq!(circuits.of(&target.peer).count(), 5);
        assert!(circuits.remove(ceded).is_some());
        assert_eq!((circuits.count(), circuits.count_of(&target.peer)), (3, 3));
    }

    #[test]
    fn a_circuit_is_stalled_that_moves_nothing_for_10_s_one_way_though_bytes_wait() {
        const SECOND: Duration = Duration::from_secs(1);
        let mut circuits = table(of_total(9), 9);
        let mut now = Instant::now();
        let [stalls, moves, idles, reads] = [1, 2, 3, 4].map(|n| {
            let id = admit(&mut circuits, end(n), end(10 + n), 1).unwrap();
            (id, open(&mut circuits, id))
        });
        admit(&mut circuits, end(5), end(15), 1).unwrap(); // is being set up
        for second in 0..30 {
            // The way to the target stands still while the other one moves.
            stalls.1.set(Carried { to_target: 7, to_source: second });
            stalls.1.set_waiting([true, false]);
            moves.1.set(Carried { to_target: second / 9, to_source: 0 });
            moves.1.set_waiting([true, true].map(|waits| waits && second % 9 != 0));
            idles.1.set(Carried { to_target: 7, to_source: 7 });
            reads.1.set_waiting([false, second < 9]);
            circuits.look(now);
            let expected = if second < 11 { vec![] } else { vec![stalls.0] };
            assert_eq!(circuits.stalled(now), expected, "after {second} s");
            now += SECOND;
        }
        // A look that came late says nothing.
        moves.1.set_waiting([false; 2]);
        circuits.look(now);
        circuits.excuse(|_| now);
        assert_eq!(circuits.stalled(now), []);
        assert_eq!(circuits.stalled(now + 10 * SECOND), [stalls.0]);
        circuits.end(stalls.0);
        assert_eq!(circuits.stalled(now + 10 * SECOND), [], "it ends already");
        let end_of = |id, said| circuits.get(id).unwrap().end(said);
        assert_eq!(end_of(stalls.0, CircuitEnd::Ended), CircuitEnd::Stalled);
        assert_eq!(end_of(stalls.0, CircuitEnd::Finished), CircuitEnd::Finished);
        assert_eq!(end_of(idles.0, CircuitEnd::Ended), CircuitEnd::Ended);
    }

    #[test]
    fn a_full_table_cedes_too_and_the_cap_of_a_source_does_not() {
        let mut circuits = table(of_total(3), 9);
        let ends: Vec<_> = (0..3).map(|n| (end(n), end(10 + n))).collect();
        for (source, target) in &ends {
            let id = admit(&mut circuits, *source, *target, 1).unwrap();
            open(&mut circuits, id);
        }
        let (full, nobody) = (&Refused::TooManyCircuits, PeerId::random());
        let of_source = &Refused::TooManyCircuitsOfSource;
        assert_eq!(circuits.cede(of_source, &nobody, prefix(2)), None);
        assert_eq!(circuits.cede(full, &nobody, prefix(1)), None);
        assert!(circuits.cede(full, &nobody, prefix(2)).is_some());
        assert!(admit(&mut circuits, end(8), end(9), 2).is_ok());
    }

    #[test]
    fn ending_a_circuit_cancels_its_receiver_and_returns_the_pending_connect() {
        let mut circuits = table(of_total(9), 9);
        let (id, mut ended) = circuits.add(end(1), end(2), None, (), Instant::now());
        assert_eq!(ended.try_recv(), Ok(None));
        assert_eq!(circuits.end(id), Some(()), "its CONNECT is yet to be answered");
        assert_eq!(circuits.end(id), None);
        assert!(ended.try_recv().is_err());
        assert_eq!(circuits.count(), 1, "until that is reported");
    }

    #[test]
    fn a_circuit_that_ended_leaves_nothing_behind() {
        let mut circuits = table(of_total(1), 1);
        let (alice, bob) = (end(1), end(2));
        let id = admit(&mut circuits, alice, bob, 1).unwrap();
        assert_eq!(circuits.of(&bob.peer).count(), 1);
        assert!(circuits.remove(id).is_some());
        assert!(circuits.remove(id).is_none());
        assert_eq!((circuits.count(), circuits.peers()), (0, 0));
        assert!(circuits.quota().is_empty());
        assert_ne!(admit(&mut circuits, alice, bob, 1), Ok(id));
    }
}
