//! The table of circuits: one record for each, and the caps on how many.
//!
//! Sans-IO. `behaviour/circuit.rs` transfers the bytes of a circuit; here are only their counters.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet},
    time::{Duration, Instant},
};

use libp2p::{PeerId, futures::channel::oneshot};

use super::{
    accounts::Counters,
    connections::{End, Origin, PendingRequest},
    quota::{Caps, Quota, Scope},
};
use crate::{
    address::ClientPrefix,
    config::Config,
    event::{BytesTransferred, CircuitEnd, CircuitId, Refused},
    wire::Limit,
};

/// How long a direction may transfer nothing though bytes wait, while memory is scarce.
const MAX_STALL: Duration = Duration::from_secs(10);

/// How long a target may take to answer over one connection, if it has another one.
const RETRY_AFTER: Duration = Duration::from_secs(3);

/// The circuits of one relay, those that are being set up included.
pub struct Circuits<C, R> {
    /// In the order of their admission. Only [`Circuits::add`] and [`Circuits::remove`] add and remove.
    pub records: BTreeMap<CircuitId, Circuit<C, R>>,
    /// How many each prefix has, by source. Circuits that yielded to another one do not count.
    pub quota: Quota,
    pub(super) max_per_peer: usize,
    /// An index: both peers of each circuit, and its id.
    pub by_peer: BTreeSet<(PeerId, CircuitId)>,
    last_id: u64,
}

/// One circuit: `source` asked for it, `target` holds the reservation.
pub struct Circuit<C, R> {
    /// The peer that asked.
    pub source: End<C>,
    /// The peer that holds the reservation, and the connection over which it is asked, or has accepted.
    pub target: End<C>,
    /// The connections over which it was asked before, and since when it is asked over the present one.
    pub(super) asked_before: Vec<C>,
    pub(super) asked_at: Instant,
    /// When it was admitted.
    pub since: Instant,
    /// What it may carry.
    pub limit: Limit,
    /// The CONNECT, until it is answered.
    pub request: Option<PendingRequest<C, R>>,
    /// Since when it is open; `None`: the target has yet to answer.
    pub opened_at: Option<Instant>,
    /// Counts the bytes that it carries.
    pub counters: Counters,
    /// Dropping it ends the exchange with the target, or the open circuit; then why the relay ended it.
    pub(super) guard: Result<oneshot::Sender<()>, CircuitEnd>,
    /// The prefix of the source.
    prefix: Option<ClientPrefix>,
    /// The bytes that it had transferred at the last sweep, and the sweep that last found more than before.
    transferred: BytesTransferred,
    active_at: Instant,
    /// Since which sweep each direction, to the target and to the source, has transferred nothing though bytes waited.
    stalled: [Option<Instant>; 2],
    /// Whether it was ended for another one, and does not count any more.
    has_yielded: bool,
}

impl<C, R> Circuit<C, R> {
    /// Since when it is open, and the bytes that it has transferred; `None`: it is being set up.
    pub fn open(&self) -> Option<(Instant, BytesTransferred)> {
        self.opened_at.map(|since| (since, self.counters.read()))
    }

    /// How it ended, given what its task reported: [`CircuitEnd::Disconnected`] also if the relay ended it.
    pub fn actual_end(&self, reported: CircuitEnd) -> CircuitEnd {
        match self.guard {
            Err(reason) if reported == CircuitEnd::Disconnected => reason,
            _ => reported,
        }
    }
}

impl<C: Copy + Eq, R> Circuits<C, R> {
    /// An empty table.
    pub fn new(config: &Config) -> Self {
        Self {
            records: BTreeMap::new(),
            quota: Quota::new(config.circuit_caps()),
            max_per_peer: config.max_circuits_per_peer,
            by_peer: BTreeSet::new(),
            last_id: 0,
        }
    }

    /// How many count, those that are being set up included.
    pub fn count(&self) -> usize {
        self.quota.held(Scope::Total)
    }

    /// How many of them `peer` is part of, as source and as target together.
    pub fn count_of(&self, peer: &PeerId) -> usize {
        self.of(peer).filter(|(_, circuit)| !circuit.has_yielded).count()
    }

    /// Checks that one more circuit between these two fits under every cap.
    ///
    /// # Errors
    ///
    /// The cap that is reached. One under which [`Circuits::yield_one`] cannot make room comes first.
    pub fn check_caps(&self, source: &Origin, target: &PeerId) -> Result<(), Refused> {
        let is_full = |peer| self.count_of(peer) >= self.max_per_peer;
        match self.quota.full(source.prefix) {
            Some(Scope::Address(prefix)) => Err(Refused::TooManyCircuitsOfAddress(prefix)),
            Some(Scope::Subnet(subnet)) => Err(Refused::TooManyCircuitsOfSubnet(subnet)),
            _ if is_full(&source.peer) => Err(Refused::TooManyCircuitsOfSource),
            // A circuit of the target that yields makes room in the table, too.
            _ if is_full(target) => Err(Refused::TooManyCircuitsOfTarget),
            Some(Scope::Total) => Err(Refused::TooManyCircuits),
            None => Ok(()),
        }
    }

    /// Makes room for a circuit `of` this source under a full cap of the table or of the target: returns the circuit to
    /// end, which does not count any more. It is one of the heaviest prefix, if that would still hold at least as much as
    /// the source's; of those under the cap the one that has transferred nothing for longest. `None` if there is none, or
    /// one is not enough. A circuit that is being set up stays.
    pub fn yield_one(&mut self, full: &Refused, of: &Origin, target: &PeerId) -> Option<CircuitId> {
        if self.quota.above(None).is_some() || self.count_of(target) > self.max_per_peer {
            return None;
        }
        let under_cap: Vec<_> = match full {
            Refused::TooManyCircuits => self.iter().collect(),
            Refused::TooManyCircuitsOfTarget => self.of(target).collect(),
            _ => return None,
        };
        let counting = under_cap.iter().filter(|(_, circuit)| !circuit.has_yielded);
        let mut shares = Quota::new(Caps::default());
        counting.clone().for_each(|(_, circuit)| shares.add(circuit.prefix));
        let yielding = counting.filter(|(_, circuit)| {
            shares.yields(circuit.prefix, of.prefix) && circuit.opened_at.is_some()
        });
        let (id, _) = *yielding.max_by_key(|(id, circuit)| {
            (shares.load(circuit.prefix), Reverse(circuit.active_at), Reverse(*id))
        })?;
        let circuit = self.records.get_mut(&id)?;
        circuit.has_yielded = true;
        self.quota.remove(circuit.prefix);
        Some(id)
    }

    /// Adds a circuit whose target is to be asked. The receiver is cancelled when it is [ended](Self::end), now or once
    /// it is open.
    pub fn add(
        &mut self,
        request: PendingRequest<C, R>,
        target: End<C>,
        limit: Limit,
        counters: Counters,
        now: Instant,
    ) -> (CircuitId, oneshot::Receiver<()>) {
        self.last_id += 1;
        let (id, source, prefix) = (CircuitId(self.last_id), request.from, request.origin.prefix);
        for peer in [source.peer, target.peer] {
            self.by_peer.insert((peer, id));
        }
        self.quota.add(prefix);
        let (guard, ended) = oneshot::channel();
        let circuit = Circuit {
            source,
            target,
            asked_before: Vec::new(),
            asked_at: now,
            since: now,
            limit,
            request: Some(request),
            opened_at: None,
            counters,
            guard: Ok(guard),
            prefix,
            transferred: BytesTransferred::default(),
            active_at: now,
            stalled: [None; 2],
            has_yielded: false,
        };
        self.records.insert(id, circuit);
        (id, ended)
    }

    /// Finds out which circuits have transferred bytes since the last call, and in which bytes wait.
    pub fn poll_counters(&mut self, now: Instant) {
        for circuit in self.records.values_mut() {
            let (after, waiting) = (circuit.counters.read(), circuit.counters.waiting());
            let before = std::mem::replace(&mut circuit.transferred, after);
            if before != after {
                circuit.active_at = now;
            }
            let moved = [before.to_target != after.to_target, before.to_source != after.to_source];
            for ((since, waits), moved) in circuit.stalled.iter_mut().zip(waiting).zip(moved) {
                *since = (waits && !moved).then(|| since.unwrap_or(now));
            }
        }
    }

    /// Shifts since when targets are asked, and the start of each stall, after a sweep that came late.
    pub fn shift_waits(&mut self, shift: impl Fn(Instant) -> Instant) {
        for circuit in self.records.values_mut() {
            let stalls = circuit.stalled.iter_mut().flatten();
            stalls.chain([&mut circuit.asked_at]).for_each(|since| *since = shift(*since));
        }
    }

    /// The circuits whose target has not answered for [`RETRY_AFTER`] while the source waits, each with the connection
    /// over which the target is asked, in the order of their admission.
    pub fn unanswered(&self, now: Instant) -> Vec<(CircuitId, End<C>)> {
        let is_long = |since: Instant| now.saturating_duration_since(since) >= RETRY_AFTER;
        let overdue = self.iter().filter(|(_, it)| it.request.is_some() && is_long(it.asked_at));
        overdue.map(|(id, circuit)| (id, circuit.target)).collect()
    }

    /// The circuits one of whose directions had transferred nothing for [`MAX_STALL`] at the last sweep though bytes
    /// waited, each with both ends, in the order of their admission.
    pub fn stalled(&self, now: Instant) -> Vec<(CircuitId, [End<C>; 2])> {
        let is_long = |since: &Instant| now.saturating_duration_since(*since) >= MAX_STALL;
        let stalled = self.iter().filter(|(_, circuit)| {
            circuit.guard.is_ok() && circuit.stalled.iter().flatten().any(is_long)
        });
        stalled.map(|(id, circuit)| (id, [circuit.source, circuit.target])).collect()
    }

    /// Ends a circuit by dropping its guard, which cancels the receiver. It counts until its end is reported. The reason
    /// of the first call holds.
    ///
    /// Returns the CONNECT that was not answered yet.
    pub fn end(&mut self, id: CircuitId, end: CircuitEnd) -> Option<PendingRequest<C, R>> {
        let circuit = self.records.get_mut(&id)?;
        if circuit.guard.is_ok() {
            circuit.guard = Err(end);
        }
        circuit.request.take()
    }

    /// Removes a circuit that ended, or that was refused.
    pub fn remove(&mut self, id: CircuitId) -> Option<Circuit<C, R>> {
        let circuit = self.records.remove(&id)?;
        if !circuit.has_yielded {
            self.quota.remove(circuit.prefix);
        }
        for peer in [circuit.source.peer, circuit.target.peer] {
            self.by_peer.remove(&(peer, id));
        }
        Some(circuit)
    }

    /// The circuits that `peer` is part of, in either role, in the order of their admission.
    pub fn of(&self, peer: &PeerId) -> impl Iterator<Item = (CircuitId, &Circuit<C, R>)> {
        let ids = self.by_peer.range((*peer, CircuitId(0))..=(*peer, CircuitId(u64::MAX)));
        ids.filter_map(|(_, id)| Some((*id, self.records.get(id)?)))
    }

    /// All circuits, in the order of their admission.
    pub fn iter(&self) -> impl Iterator<Item = (CircuitId, &Circuit<C, R>)> {
        self.records.iter().map(|(id, circuit)| (*id, circuit))
    }

    /// The open circuits and the bytes of each, in the order of their admission.
    pub fn open(&self) -> impl Iterator<Item = (CircuitId, BytesTransferred)> {
        self.iter().filter_map(|(id, circuit)| Some((id, circuit.open()?.1)))
    }

    /// The circuits over this connection of the peer, in the order of their admission.
    pub fn over(&self, end: End<C>) -> Vec<CircuitId> {
        let over = self.of(&end.peer).filter(|(_, it)| [it.source, it.target].contains(&end));
        over.map(|(id, _)| id).collect()
    }
}

#[cfg(test)]
mod tests {
    use std::{
        net::{IpAddr, Ipv4Addr},
        sync::Arc,
    };

    use super::*;
    use crate::{relay::accounts::Accounts, wire::Request};

    fn table(caps: Caps, max_per_peer: usize) -> Circuits<u32, ()> {
        Circuits { quota: Quota::new(caps), max_per_peer, ..Circuits::new(&Config::default()) }
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

    fn origin(peer: PeerId, from: u8) -> Origin {
        Origin::new(peer, prefix(from).unwrap().ip().into(), false)
    }

    fn admit(
        circuits: &mut Circuits<u32, ()>,
        source: End<u32>,
        target: End<u32>,
        from: u8,
    ) -> Result<CircuitId, Refused> {
        circuits.check_caps(&origin(source.peer, from), &target.peer)?;
        Ok(add(circuits, source, target, from).0)
    }

    fn add(
        circuits: &mut Circuits<u32, ()>,
        source: End<u32>,
        target: End<u32>,
        from: u8,
    ) -> (CircuitId, oneshot::Receiver<()>) {
        let origin = Arc::new(origin(source.peer, from));
        let request = Request::Connect(target.peer);
        let request = PendingRequest { from: source, origin, request, reply: () };
        let (limit, counters) = (Limit::default(), Accounts::default().counters());
        circuits.add(request, target, limit, counters, Instant::now())
    }

    /// The target accepts; returns the circuit's byte counters.
    fn open(circuits: &mut Circuits<u32, ()>, id: CircuitId) -> Counters {
        let circuit = circuits.records.get_mut(&id).unwrap();
        circuit.opened_at = Some(Instant::now());
        circuit.counters.clone()
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
    fn the_total_and_the_cap_of_each_prefix_are_enforced() {
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
    fn at_a_full_target_the_most_idle_circuit_of_the_heaviest_prefix_is_evicted() {
        let mut circuits = table(of_total(99), 4);
        let (start, target) = (Instant::now(), end(1));
        let ids: Vec<_> =
            (0..4).map(|n| admit(&mut circuits, end(2 + n), target, 1).unwrap()).collect();
        let full = &admit(&mut circuits, end(9), target, 2).unwrap_err();
        assert_eq!(*full, Refused::TooManyCircuitsOfTarget);
        // All but the second have relayed bytes, and the third is still being set up.
        for n in [0, 1, 3] {
            let bytes = BytesTransferred { to_target: u64::from(n != 1), to_source: 0 };
            open(&mut circuits, ids[n]).add(bytes);
        }
        circuits.poll_counters(start + Duration::from_secs(1));
        let [same, other] = [1, 2].map(|from| origin(end(9).peer, from));
        let same = circuits.yield_one(full, &same, &target.peer);
        assert_eq!(same, None, "no eviction for the same prefix");
        let yielded = circuits.yield_one(full, &other, &target.peer).unwrap();
        assert_eq!((yielded, circuits.count()), (ids[1], 3));
        assert!(admit(&mut circuits, end(9), target, 2).is_ok());
        // Two of one prefix and one of the other are fair shares. An evicted circuit is listed until it is removed.
        circuits.yield_one(full, &other, &target.peer).unwrap();
        assert_eq!(circuits.yield_one(full, &other, &target.peer), None);
        assert_eq!(circuits.of(&target.peer).count(), 5);
        assert!(circuits.remove(yielded).is_some());
        assert_eq!((circuits.count(), circuits.count_of(&target.peer)), (3, 3));
    }

    #[test]
    fn a_circuit_is_stalled_after_10_s_without_progress_on_pending_bytes() {
        const SECOND: Duration = Duration::from_secs(1);
        let mut circuits = table(of_total(9), 9);
        let mut now = Instant::now();
        let [stalled, slow, idle, resumed] = [1, 2, 3, 4].map(|n| {
            let ends = [end(n), end(10 + n)];
            let id = admit(&mut circuits, ends[0], ends[1], 1).unwrap();
            (id, open(&mut circuits, id), ends)
        });
        admit(&mut circuits, end(5), end(15), 1).unwrap(); // is being set up
        let both = BytesTransferred { to_target: 7, to_source: 7 };
        idle.1.add(both);
        stalled.1.add(both);
        for second in 0..30 {
            // No byte reaches the target, while the other direction continues.
            stalled.1.add(BytesTransferred { to_target: 0, to_source: 1 });
            stalled.1.set_waiting([true, false]);
            let moved = u64::from(second > 0 && second % 9 == 0);
            slow.1.add(BytesTransferred { to_target: moved, to_source: 0 });
            slow.1.set_waiting([true, true].map(|waits| waits && second % 9 != 0));
            resumed.1.set_waiting([false, second < 9]);
            circuits.poll_counters(now);
            let expected = if second < 11 { vec![] } else { vec![(stalled.0, stalled.2)] };
            assert_eq!(circuits.stalled(now), expected, "after {second} s");
            now += SECOND;
        }
        // After a late sweep the time starts anew.
        slow.1.set_waiting([false; 2]);
        circuits.poll_counters(now);
        circuits.shift_waits(|_| now);
        assert_eq!(circuits.stalled(now), []);
        assert_eq!(circuits.stalled(now + 10 * SECOND), [(stalled.0, stalled.2)]);
        circuits.end(stalled.0, CircuitEnd::Stalled);
        assert_eq!(circuits.stalled(now + 10 * SECOND), [], "it is already ending");
        circuits.end(stalled.0, CircuitEnd::Silent);
        let end_of = |id, reported| circuits.records.get(&id).unwrap().actual_end(reported);
        assert_eq!(end_of(stalled.0, CircuitEnd::Disconnected), CircuitEnd::Stalled);
        assert_eq!(end_of(stalled.0, CircuitEnd::Finished), CircuitEnd::Finished);
        assert_eq!(end_of(idle.0, CircuitEnd::Disconnected), CircuitEnd::Disconnected);
    }

    #[test]
    fn a_full_table_evicts_a_circuit_and_the_cap_of_a_source_does_not() {
        let mut circuits = table(of_total(3), 9);
        let ends: Vec<_> = (0..3).map(|n| (end(n), end(10 + n))).collect();
        for (source, target) in &ends {
            let id = admit(&mut circuits, *source, *target, 1).unwrap();
            open(&mut circuits, id);
        }
        let (full, target) = (&Refused::TooManyCircuits, PeerId::random());
        let of_source = &Refused::TooManyCircuitsOfSource;
        let [same, other] = [1, 2].map(|from| origin(end(9).peer, from));
        assert_eq!(circuits.yield_one(of_source, &other, &target), None);
        assert_eq!(circuits.yield_one(full, &same, &target), None);
        assert!(circuits.yield_one(full, &other, &target).is_some());
        assert!(admit(&mut circuits, end(8), end(9), 2).is_ok());
    }

    #[test]
    fn ending_a_circuit_cancels_its_receiver_and_returns_the_pending_connect() {
        let mut circuits = table(of_total(9), 9);
        let (id, mut ended) = add(&mut circuits, end(1), end(2), 1);
        assert_eq!(ended.try_recv(), Ok(None));
        let end = CircuitEnd::Released;
        assert!(circuits.end(id, end).is_some(), "the pending CONNECT");
        assert!(circuits.end(id, end).is_none());
        assert!(ended.try_recv().is_err());
        assert_eq!(circuits.count(), 1, "counted until its end is reported");
    }

    #[test]
    fn a_circuit_that_ended_leaves_nothing_behind() {
        let mut circuits = table(of_total(1), 1);
        let (alice, bob) = (end(1), end(2));
        let id = admit(&mut circuits, alice, bob, 1).unwrap();
        assert_eq!(circuits.of(&bob.peer).count(), 1);
        assert!(circuits.remove(id).is_some());
        assert!(circuits.remove(id).is_none());
        assert_eq!((circuits.count(), circuits.by_peer.len()), (0, 0));
        assert_eq!(circuits.quota.scopes(), 0);
        assert_ne!(admit(&mut circuits, alice, bob, 1), Ok(id));
    }
}
