//! Random histories of circuits, in the relay and in a naive model: sources of a few addresses that open as many
//! circuits as they can, targets that accept, refuse or do not answer, caps that change, and connections that are
//! closing.
//!
//! The model keeps a list and counts everything from scratch. Which peers hold slots it takes from the relay:
//! `history.rs` tests those.

use std::{
    cmp::Reverse,
    net::{IpAddr, Ipv4Addr},
    time::{Duration, Instant},
};

use libp2p::{PeerId, futures::channel::oneshot};
use proptest::prelude::*;
use relaylet::{
    ActivityCounter, BytesTransferred, CircuitEnd, CircuitId, Config, StopFailed,
    relay::{
        Action, Relay,
        accounts::Counters,
        connections::{Connection, End},
    },
    wire::{Request, Status},
};

const PEERS: usize = 9;
/// The first of them hold slots.
const TARGETS: usize = 3;
const ADDRESSES: u8 = 6;

/// One step of a history. `nth` chooses among the circuits in the state that the step needs.
#[derive(Clone, Debug)]
enum Step {
    Connect {
        source: usize,
        target: usize,
    },
    /// One peer requests circuits to all targets until the caps stop it.
    ConnectToAll {
        source: usize,
    },
    Answer {
        nth: usize,
        accepts: bool,
    },
    Transfer {
        nth: usize,
    },
    End {
        nth: usize,
    },
    /// The peer is silent from now on.
    Freeze {
        peer: usize,
    },
    /// The peer's connection is lost, and it reconnects from this address.
    Reconnect {
        peer: usize,
        address: u8,
    },
    Pass {
        millis: u64,
    },
    Configure(Caps),
}

/// Zero is no cap, except for the total and the cap per peer.
#[derive(Clone, Copy, Debug)]
struct Caps {
    total: usize,
    per_ip: usize,
    per_subnet: usize,
    per_peer: usize,
}

fn caps() -> impl Strategy<Value = Caps> {
    (1..9usize, 0..5usize, 0..6usize, 1..6usize).prop_map(
        |(total, per_ip, per_subnet, per_peer)| Caps { total, per_ip, per_subnet, per_peer },
    )
}

fn step() -> impl Strategy<Value = Step> {
    let (source, target, nth) = (0..PEERS, 0..TARGETS, 0..9usize);
    let peer = source.clone();
    prop_oneof![
        8 => (source.clone(), target).prop_map(|(source, target)| Step::Connect { source, target }),
        2 => source.prop_map(|source| Step::ConnectToAll { source }),
        8 => (nth.clone(), prop::bool::weighted(0.8))
            .prop_map(|(nth, accepts)| Step::Answer { nth, accepts }),
        3 => nth.clone().prop_map(|nth| Step::Transfer { nth }),
        2 => nth.prop_map(|nth| Step::End { nth }),
        1 => peer.clone().prop_map(|peer| Step::Freeze { peer }),
        2 => (peer, 0..ADDRESSES).prop_map(|(peer, address)| Step::Reconnect { peer, address }),
        4 => (1..40_000u64).prop_map(|millis| Step::Pass { millis }),
        1 => caps().prop_map(Step::Configure),
    ]
}

fn config(caps: Caps) -> Config {
    let mut config = Config::default();
    config.max_circuits = caps.total;
    config.max_circuits_per_ip = Some(caps.per_ip);
    config.max_circuits_per_subnet = Some(caps.per_subnet);
    config.max_circuits_per_peer = caps.per_peer;
    (config.connect_rate, config.reserve_rate) = (0, 0);
    config
}

/// A circuit in the model.
#[derive(Debug)]
struct Record {
    id: CircuitId,
    source: usize,
    target: usize,
    address: u8,
    state: State,
    /// Is cancelled when the relay ends the circuit, and whether the model has seen that.
    ended: oneshot::Receiver<()>,
    has_seen_end: bool,
    transferred: u64,
    /// The bytes at the last sweep, and when they last changed.
    seen: u64,
    moved: u64,
}

#[derive(Debug)]
enum State {
    Pending,
    /// Its source is disconnected or was refused, and the target has not answered yet.
    Abandoned,
    Open(Counters),
    /// It was evicted for another one, and its end is not reported yet.
    Evicted,
}

impl Record {
    fn counts(&self) -> bool {
        !matches!(self.state, State::Evicted)
    }

    fn is_of(&self, peer: usize) -> bool {
        self.source == peer || self.target == peer
    }
}

struct Peer {
    id: PeerId,
    connection: u32,
    address: u8,
    activity: ActivityCounter,
    is_frozen: bool,
}

struct World {
    relay: Relay<u32, u64>,
    caps: Caps,
    peers: Vec<Peer>,
    circuits: Vec<Record>,
    start: Instant,
    now: u64,
    connections: u32,
    requests: u64,
}

fn subnet(address: u8) -> u8 {
    address / 2
}

impl World {
    fn new(caps: Caps) -> Self {
        let start = Instant::now();
        let peers = (0..PEERS).map(|nth| Peer {
            id: PeerId::random(),
            connection: 0,
            address: nth as u8 % ADDRESSES,
            activity: ActivityCounter::default(),
            is_frozen: false,
        });
        let mut world = Self {
            relay: Relay::new(config(caps), start).expect("a valid configuration"),
            caps,
            peers: peers.collect(),
            circuits: Vec::new(),
            start,
            now: 0,
            connections: 0,
            requests: 0,
        };
        (0..PEERS).for_each(|peer| world.connect(peer));
        world
    }

    fn instant(&self) -> Instant {
        self.start + Duration::from_millis(self.now)
    }

    fn end(&self, peer: usize) -> End<u32> {
        let Peer { id, connection, .. } = self.peers[peer];
        End { peer: id, connection }
    }

    fn connect(&mut self, peer: usize) {
        self.connections += 1;
        let now = self.instant();
        let activity = ActivityCounter::default();
        let known = &mut self.peers[peer];
        (known.connection, known.activity, known.is_frozen) =
            (self.connections, activity.clone(), false);
        let ip: IpAddr = Ipv4Addr::new(10, 0, subnet(known.address), known.address).into();
        let connection = Connection::new(known.id, ip.into(), false, 0, now);
        self.relay.connections.add(self.connections, connection);
        self.relay.connections.get_mut(self.connections).unwrap().track(activity);
        if peer < TARGETS {
            self.requests += 1;
            let (from, request) = (self.end(peer), self.requests);
            self.relay.handle_request(from, Ok(Request::Reserve), request, now);
            self.actions();
        }
    }

    /// The actions that concern circuits: stop requests, and refusals.
    fn actions(&mut self) -> Vec<Action<u32, u64>> {
        let mut actions = Vec::new();
        while let Some(action) = self.relay.actions.pop_front() {
            match action {
                Action::Grant { request, receipt, .. } => {
                    let now = self.instant();
                    self.relay.on_delivered(request.from.peer, receipt, true, now);
                }
                Action::AskTarget { .. } | Action::Refuse(..) => actions.push(action),
                // A connection that the relay closes stays up until the history closes it.
                _ => {}
            }
        }
        actions
    }

    /// The circuits that the relay has ended since the last call: pending ones, and open ones.
    fn ended(&mut self) -> (Vec<CircuitId>, Vec<CircuitId>) {
        let (mut abandoned, mut ended) = (Vec::new(), Vec::new());
        for record in self.circuits.iter_mut().filter(|record| !record.has_seen_end) {
            record.has_seen_end = record.ended.try_recv().is_err();
            match record.state {
                _ if !record.has_seen_end => {}
                State::Pending | State::Abandoned => abandoned.push(record.id),
                State::Open(_) | State::Evicted => ended.push(record.id),
            }
        }
        (abandoned, ended)
    }

    fn apply(&mut self, step: Step) {
        let now = self.instant();
        match step {
            Step::Connect { source, target } => self.request_circuit(source, target),
            Step::ConnectToAll { source } => {
                for nth in 0..3 * TARGETS {
                    self.request_circuit(source, nth % TARGETS);
                }
            }
            Step::Answer { nth, accepts } => {
                let pending =
                    |c: &&mut Record| matches!(c.state, State::Pending | State::Abandoned);
                let Some(record) = self.circuits.iter_mut().filter(pending).nth(nth) else {
                    return;
                };
                let id = record.id;
                let answer = if accepts { Ok(()) } else { Err(StopFailed::Gone) };
                let opened = self.relay.on_target_answered(id, answer, now);
                let opened = opened.map(|(_, parameters)| (parameters.counters, parameters.ended));
                self.actions();
                let asking = self.circuits.iter().position(|record| record.id == id).unwrap();
                let waits = matches!(self.circuits[asking].state, State::Pending);
                assert_eq!(
                    opened.is_some(),
                    accepts && waits,
                    "it opens if the source waits and the target accepts"
                );
                match opened {
                    Some((counters, ended)) => {
                        let record = &mut self.circuits[asking];
                        (record.state, record.ended) = (State::Open(counters), ended);
                    }
                    None => _ = self.circuits.remove(asking),
                }
            }
            Step::Transfer { nth } => {
                if let Some(record) = self.open().nth(nth) {
                    record.transferred += 1;
                    let mut transferred = BytesTransferred::default();
                    transferred.to_target = 1;
                    if let State::Open(counters) = &record.state {
                        counters.add(transferred);
                    }
                }
            }
            Step::End { nth } => {
                let is_open = |c: &Record| matches!(c.state, State::Open(_) | State::Evicted);
                let open = self.circuits.iter().enumerate().filter(|(_, c)| is_open(c));
                if let Some(index) = open.map(|(index, _)| index).nth(nth) {
                    let record = self.circuits.remove(index);
                    self.relay.on_circuit_ended(record.id, CircuitEnd::Ended, now);
                }
            }
            Step::Freeze { peer } => self.peers[peer].is_frozen = true,
            Step::Reconnect { peer, address } => {
                self.relay.on_disconnected(self.end(peer), now);
                self.peers[peer].address = address;
                self.circuits.retain_mut(|record| match record.state {
                    // The target cannot answer any more.
                    State::Pending | State::Abandoned if record.target == peer => false,
                    State::Pending if record.source == peer => {
                        record.state = State::Abandoned;
                        true
                    }
                    State::Open(_) | State::Evicted if record.source == peer => false,
                    _ => true,
                });
                self.remove_ended(|record| record.target == peer);
                self.connect(peer);
            }
            Step::Pass { millis } => self.pass(self.now + millis),
            Step::Configure(caps) => {
                self.caps = caps;
                self.relay.set_config(config(caps), now).expect("a valid configuration");
            }
        }
    }

    fn open(&mut self) -> impl Iterator<Item = &mut Record> {
        self.circuits.iter_mut().filter(|c| matches!(c.state, State::Open(_)))
    }

    /// Removes the open circuits that the relay has ended; `of` must hold for each.
    fn remove_ended(&mut self, of: impl Fn(&Record) -> bool) {
        self.actions();
        let now = self.instant();
        for id in self.ended().1 {
            let index = self.circuits.iter().position(|record| record.id == id);
            let record = self.circuits.remove(index.expect("a known circuit"));
            assert!(of(&record), "{record:?} ended without a reason");
            self.relay.on_circuit_ended(id, CircuitEnd::Ended, now);
        }
    }

    fn pass(&mut self, until: u64) {
        loop {
            let due = self.relay.sweep_due.saturating_duration_since(self.start);
            let due = due.as_millis() as u64;
            if due > until {
                break;
            }
            self.now = self.now.max(due);
            for peer in self.peers.iter().filter(|peer| !peer.is_frozen) {
                peer.activity.add(1);
            }
            let now = self.now;
            self.relay.sweep(self.instant());
            for record in &mut self.circuits {
                let is_open = matches!(record.state, State::Open(_) | State::Evicted);
                if is_open && record.transferred != record.seen {
                    (record.seen, record.moved) = (record.transferred, now);
                }
            }
            self.actions();
            let (abandoned, ended) = self.ended();
            for id in abandoned {
                let record = self.circuits.iter_mut().find(|record| record.id == id);
                record.expect("a pending circuit").state = State::Abandoned;
            }
            // A peer that timed out loses its circuits; their ends are not reported yet.
            for id in ended {
                let record = self.circuits.iter().find(|record| record.id == id);
                let record = record.expect("a known circuit");
                let silent = [record.source, record.target].map(|peer| self.peers[peer].is_frozen);
                assert!(silent.contains(&true), "{record:?} ended although both peers are active");
            }
        }
        self.now = until;
    }

    /// Handles one CONNECT in the relay and in the model, and compares the decisions.
    fn request_circuit(&mut self, source: usize, target: usize) {
        if source == target {
            return; // malformed
        }
        self.requests += 1;
        let (request, now) = (self.requests, self.instant());
        let pending = Ok(Request::Connect(self.peers[target].id));
        let has_slot = self.relay.reservations.get(&self.peers[target].id);
        let has_slot = has_slot.is_some_and(|slot| slot.live(now).is_some());
        self.relay.handle_request(self.end(source), pending, request, now);
        let mut admitted = None;
        let mut refused = None;
        for action in self.actions() {
            match action {
                Action::AskTarget { circuit, ended, .. } => admitted = Some((circuit, ended)),
                Action::Refuse(id, status) if id == request => refused = Some(status),
                _ => {}
            }
        }
        let (_, mut ended) = self.ended();
        let evicted = self.decide(source, target);
        if !has_slot {
            assert!(admitted.is_none());
            assert_eq!(refused, Some(Status::NoReservation));
            return assert!(ended.is_empty());
        }
        let Some(evicted) = evicted else {
            assert!(admitted.is_none());
            assert_eq!(refused, Some(Status::ResourceLimitExceeded));
            return assert!(ended.is_empty(), "no circuit ends for a refused request");
        };
        let (id, guard) = admitted.expect("it is admitted");
        // The evicted one may be ending already, because its peer timed out.
        let is_ending = self.circuits.iter().filter(|record| record.has_seen_end);
        ended.extend(
            evicted.filter(|evicted| is_ending.clone().any(|record| record.id == *evicted)),
        );
        ended.dedup();
        assert_eq!(ended, Vec::from_iter(evicted), "exactly the evicted one ends");
        let gone = evicted.and_then(|id| self.circuits.iter_mut().find(|record| record.id == id));
        if let Some(record) = gone {
            record.state = State::Evicted;
        }
        self.circuits.push(Record {
            id,
            source,
            target,
            address: self.peers[source].address,
            state: State::Pending,
            ended: guard,
            has_seen_end: false,
            transferred: 0,
            seen: 0,
            moved: self.now,
        });
    }

    /// `None`: the circuit is refused. `Some(None)`: there is room. `Some(Some(id))`: this circuit is evicted for it.
    fn decide(&self, source: usize, target: usize) -> Option<Option<CircuitId>> {
        let Caps { total, per_ip, per_subnet, per_peer } = self.caps;
        let address = self.peers[source].address;
        let counting: Vec<_> = self.circuits.iter().filter(|record| record.counts()).collect();
        let held = |of: &dyn Fn(&Record) -> bool| counting.iter().filter(|c| of(c)).count();
        let is_full = |held: usize, cap: usize| cap > 0 && held >= cap;
        let same_subnet = |record: &Record| subnet(record.address) == subnet(address);
        if is_full(held(&|record| record.address == address), per_ip)
            || is_full(held(&same_subnet), per_subnet)
            || held(&|record| record.is_of(source)) >= per_peer
        {
            return None;
        }
        let of_target = held(&|record| record.is_of(target));
        if of_target < per_peer && counting.len() < total {
            return Some(None);
        }
        if of_target > per_peer || counting.len() > total {
            return None;
        }
        let under: Vec<_> = match of_target < per_peer {
            true => counting,
            false => counting.into_iter().filter(|record| record.is_of(target)).collect(),
        };
        let load = |of: u8| {
            let in_subnet = under.iter().filter(|c| subnet(c.address) == subnet(of)).count();
            [in_subnet, under.iter().filter(|c| c.address == of).count()]
        };
        let [subnet_load, address_load] = load(address);
        // After the eviction its prefix still has at least as many as the newcomer's.
        let is_evictable = |record: &Record| {
            let [of_subnet, of_address] = load(record.address);
            match same_subnet(record) {
                true => of_address > address_load + 1,
                false => of_subnet > subnet_load + 1,
            }
        };
        let open = under.iter().filter(|record| matches!(record.state, State::Open(_)));
        let candidates = open.filter(|record| is_evictable(record));
        let candidates =
            candidates.max_by_key(|c| (load(c.address), Reverse(c.moved), Reverse(c.id)));
        candidates.map(|record| Some(record.id))
    }

    /// Compares the relay's counts with the list.
    fn compare(&self) {
        let counting: Vec<_> = self.circuits.iter().filter(|record| record.counts()).collect();
        assert_eq!(self.relay.circuits.count(), counting.len());
        let mut ids: Vec<_> = self.relay.circuits.iter().map(|(id, _)| id).collect();
        ids.sort_unstable();
        let known: Vec<_> = self.circuits.iter().map(|record| record.id).collect();
        assert_eq!(ids, known);
        for (index, peer) in self.peers.iter().enumerate() {
            let of_peer = counting.iter().filter(|record| record.is_of(index)).count();
            assert_eq!(self.relay.circuits.count_of(&peer.id), of_peer);
        }
    }

    /// By how much each cap is exceeded.
    fn over_caps(&self) -> Vec<usize> {
        let Caps { total, per_ip, per_subnet, per_peer } = self.caps;
        let held = |of: &dyn Fn(&Record) -> bool| {
            self.circuits.iter().filter(|record| record.counts() && of(record)).count()
        };
        let above = |held: usize, cap| if cap == 0 { 0 } else { held.saturating_sub(cap) };
        let mut over = vec![above(held(&|_| true), total)];
        over.extend((0..ADDRESSES).flat_map(|address| {
            [
                above(held(&|record| record.address == address), per_ip),
                above(held(&|record| subnet(record.address) == subnet(address)), per_subnet),
            ]
        }));
        over.extend((0..PEERS).map(|peer| above(held(&|record| record.is_of(peer)), per_peer)));
        over
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 500, ..ProptestConfig::default() })]

    #[test]
    fn circuits_are_admitted_and_evicted_as_in_a_naive_model(
        caps in caps(),
        steps in prop::collection::vec(step(), 1..80),
    ) {
        let mut world = World::new(caps);
        for step in steps {
            let changes = matches!(step, Step::Configure(_));
            let before = world.over_caps();
            world.apply(step);
            world.compare();
            let over = world.over_caps().into_iter().zip(before);
            for (after, before) in over.filter(|_| !changes) {
                assert!(after <= before, "a cap is exceeded");
            }
        }
        for peer in 0..PEERS {
            let now = world.instant();
            world.relay.on_disconnected(world.end(peer), now);
        }
        prop_assert_eq!(world.relay.circuits.count(), 0);
        prop_assert!(world.relay.circuits.quota.is_empty());
    }
}
