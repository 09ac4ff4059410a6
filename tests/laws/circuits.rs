//! Random histories of circuits, applied to the relay and to a naive model of it, which have to agree:
//! sources on a few addresses that open as many circuits as they can, targets that accept, refuse or do not answer and
//! have more than one connection, caps that change, and connections that are being closed.
//!
//! One law is checked without the model: a target is asked over one connection at a time, and accepts a circuit once.
//!
//! The model keeps a list of circuits and counts everything from scratch. It does not model reservations: whether a
//! target holds a slot is read from the relay (`laws/history.rs` checks that).

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr},
    time::{Duration, Instant},
};

use libp2p::{PeerId, futures::channel::oneshot};
use proptest::prelude::*;
use relaylet::{
    ActivityCounter, BytesTransferred, CircuitEnd, CircuitId, Config, StopFailed,
    relay::{
        Action, CircuitParameters, Relay,
        accounts::Counters,
        connections::{Connection, End},
    },
    wire::{Request, Status},
};

const PEERS: usize = 9;
/// The first of them hold slots.
const TARGETS: usize = 3;
const ADDRESSES: u8 = 6;
/// After how many milliseconds without an answer a target is asked over another connection, if it has one.
const RETRY_AFTER: u64 = 3_000;

/// `nth` is an index: of the circuits that wait for their target (`Answer`), or of those that are open.
#[derive(Clone, Debug)]
enum Step {
    Connect {
        source: usize,
        target: usize,
    },
    /// The source opens circuits to all targets, until its caps are reached.
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
    /// The peer stops sending, and its connections stay open.
    Freeze {
        peer: usize,
    },
    /// The target opens one more connection, and does not reserve over it.
    AddConnection {
        target: usize,
    },
    /// The peer disconnects, and connects again from this address.
    Reconnect {
        peer: usize,
        address: u8,
    },
    Pass {
        millis: u64,
    },
    Configure(Caps),
}

/// Zero lifts the caps of an address and of a subnet.
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
    let again = target.clone();
    let peer = source.clone();
    prop_oneof![
        8 => (source.clone(), target).prop_map(|(source, target)| Step::Connect { source, target }),
        2 => source.prop_map(|source| Step::ConnectToAll { source }),
        8 => (nth.clone(), prop::bool::weighted(0.8))
            .prop_map(|(nth, accepts)| Step::Answer { nth, accepts }),
        3 => nth.clone().prop_map(|nth| Step::Transfer { nth }),
        2 => nth.prop_map(|nth| Step::End { nth }),
        1 => peer.clone().prop_map(|peer| Step::Freeze { peer }),
        2 => again.prop_map(|target| Step::AddConnection { target }),
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
    /// The connections over which the target was asked, and when it was asked over the last of them.
    asked: Vec<u32>,
    asked_at: u64,
    counters: Counters,
    /// Is cancelled when the relay ends the circuit; `has_noticed`: the model has seen that.
    ended: oneshot::Receiver<()>,
    has_noticed: bool,
    carried: u64,
    /// `carried` at the last sweep, and when a sweep last saw it change.
    seen: u64,
    moved: u64,
}

#[derive(Debug)]
enum State {
    Pending,
    /// Its source has disconnected or was refused, and the target has not answered yet.
    Abandoned,
    Open,
    /// The relay has ended it to make room for another one, and it has not reported its end yet.
    Yielded,
}

impl Record {
    fn counts(&self) -> bool {
        !matches!(self.state, State::Yielded)
    }

    fn is_of(&self, peer: usize) -> bool {
        self.source == peer || self.target == peer
    }
}

struct Peer {
    id: PeerId,
    connection: u32,
    /// The connections that it opened after that one.
    others: Vec<u32>,
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
    /// The connections on which a peer that froze has timed out.
    timed_out: BTreeSet<u32>,
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
            others: Vec::new(),
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
            timed_out: BTreeSet::new(),
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
        let known = &mut self.peers[peer];
        (known.connection, known.is_frozen) = (self.connections, false);
        known.activity = ActivityCounter::default();
        known.others.clear();
        self.add_connection(peer);
        if peer < TARGETS {
            self.requests += 1;
            let (from, request) = (self.end(peer), self.requests);
            self.relay.handle_request(from, Ok(Request::Reserve), request, now);
            self.take_actions();
        }
    }

    /// Adds the connection with the latest id, as one of this peer.
    fn add_connection(&mut self, peer: usize) {
        let (now, known) = (self.instant(), &self.peers[peer]);
        let ip: IpAddr = Ipv4Addr::new(10, 0, subnet(known.address), known.address).into();
        let connection = Connection::new(known.id, ip.into(), false, 0, now);
        self.relay.connections.add(self.connections, connection);
        let up = self.relay.connections.get_mut(self.connections).unwrap();
        up.track(known.activity.clone());
    }

    /// Closes all connections of a peer.
    fn disconnect(&mut self, peer: usize) {
        let (now, first) = (self.instant(), self.end(peer));
        self.relay.on_disconnected(first, now);
        for connection in std::mem::take(&mut self.peers[peer].others) {
            self.relay.on_disconnected(End { connection, ..first }, now);
        }
    }

    fn silent_for(&self, connection: u32) -> Duration {
        let up = self.relay.connections.get(connection).expect("it is up");
        up.liveness.silent_for(self.instant())
    }

    /// The connections over which this circuit's target may still be asked.
    fn others(&self, record: &Record) -> Vec<u32> {
        let target = &self.peers[record.target];
        let all = [target.connection].into_iter().chain(target.others.iter().copied());
        let open =
            |id: &u32| self.relay.connections.get(*id).is_some_and(|up| up.closing.is_none());
        let usable = |id: &u32| open(id) && !self.timed_out.contains(id);
        all.filter(|id| !record.asked.contains(id) && usable(id)).collect()
    }

    /// The circuits that are overdue, each with the connections over which its target may be asked instead.
    fn overdue(&self) -> Vec<(CircuitId, Vec<u32>)> {
        let overdue = self.circuits.iter().filter(|record| {
            matches!(record.state, State::Pending) && self.now - record.asked_at >= RETRY_AFTER
        });
        overdue.map(|record| (record.id, self.others(record))).collect()
    }

    /// Records which targets a sweep asked over another connection; asserts that their circuits were overdue, or that
    /// they are silent: these time out on the connection over which they were asked.
    fn on_asked_again(&mut self, overdue: &[(CircuitId, Vec<u32>)]) {
        for action in self.take_actions() {
            let Action::AskTarget(target, parameters) = action else {
                continue;
            };
            let CircuitParameters { id: circuit, ended, .. } = *parameters;
            let index = self.circuits.iter().position(|record| record.id == circuit);
            let index = index.expect("the model knows it");
            let others = match overdue.iter().find(|(id, _)| *id == circuit) {
                Some((_, others)) => others.clone(),
                None => {
                    let may_time_out = self.peers[self.circuits[index].target].is_frozen;
                    assert!(may_time_out, "a target that was not overdue is asked again");
                    self.others(&self.circuits[index])
                }
            };
            assert!(
                others.contains(&target.connection),
                "asked over an open connection, for the first time"
            );
            let record = &mut self.circuits[index];
            assert!(record.ended.try_recv().is_err(), "asked over one connection at a time");
            record.asked.push(target.connection);
            (record.asked_at, record.ended) = (self.now, ended);
        }
    }

    /// An answer over a connection other than the last that the target was asked over changes nothing.
    fn assert_late_answers_ignored(&mut self, id: CircuitId, asked: &[u32]) {
        let now = self.instant();
        for over in asked {
            for answer in [Ok(()), Err(StopFailed::Gone)] {
                assert!(self.relay.on_target_answered(id, *over, answer, now).is_none());
            }
        }
    }

    /// Returns the relay's decisions about circuits: targets to ask, and refusals. Carries out its other actions.
    fn take_actions(&mut self) -> Vec<Action<u32, u64>> {
        let mut actions = Vec::new();
        while let Some(action) = self.relay.actions.pop_front() {
            match action {
                Action::Grant { request, receipt, .. } => {
                    let now = self.instant();
                    self.relay.on_delivered(request.from.peer, receipt, true, now);
                }
                Action::AskTarget(..) | Action::Refuse(..) => actions.push(action),
                // A connection that is being closed still counts until it has closed.
                _ => {}
            }
        }
        actions
    }

    /// Returns the circuits that the relay has ended since the last call: first the pending ones, then the open ones.
    fn take_ended(&mut self) -> (Vec<CircuitId>, Vec<CircuitId>) {
        let (mut abandoned, mut ended) = (Vec::new(), Vec::new());
        for record in self.circuits.iter_mut().filter(|record| !record.has_noticed) {
            record.has_noticed = record.ended.try_recv().is_err();
            match record.state {
                _ if !record.has_noticed => {}
                State::Pending | State::Abandoned => abandoned.push(record.id),
                State::Open | State::Yielded => ended.push(record.id),
            }
        }
        (abandoned, ended)
    }

    /// Applies a step to the relay and to the model; none if it needs a circuit that does not exist.
    fn apply(&mut self, step: Step) {
        let now = self.instant();
        match step {
            Step::Connect { source, target } => self.connect_to(source, target),
            Step::ConnectToAll { source } => {
                for nth in 0..3 * TARGETS {
                    self.connect_to(source, nth % TARGETS);
                }
            }
            Step::Answer { nth, accepts } => {
                let is_unanswered =
                    |c: &&Record| matches!(c.state, State::Pending | State::Abandoned);
                let Some(record) = self.circuits.iter().filter(is_unanswered).nth(nth) else {
                    return;
                };
                let (id, mut asked) = (record.id, record.asked.clone());
                let over = asked.pop().expect("it was asked");
                self.assert_late_answers_ignored(id, &asked);
                let answer = if accepts { Ok(()) } else { Err(StopFailed::Unsupported) };
                let opened = self.relay.on_target_answered(id, over, answer, now);
                self.take_actions();
                self.assert_late_answers_ignored(id, &asked);
                let index = self.circuits.iter().position(|record| record.id == id).unwrap();
                let waits = matches!(self.circuits[index].state, State::Pending);
                assert_eq!(
                    opened.is_some(),
                    accepts && waits,
                    "opened only if the target accepts and the source waits"
                );
                match opened {
                    Some(_) => self.circuits[index].state = State::Open,
                    None => _ = self.circuits.remove(index),
                }
            }
            Step::Transfer { nth } => {
                if let Some(record) = self.open().nth(nth) {
                    record.carried += 1;
                    let mut carried = BytesTransferred::default();
                    carried.to_target = 1;
                    record.counters.add(carried);
                }
            }
            Step::End { nth } => {
                let is_open = |c: &Record| matches!(c.state, State::Open | State::Yielded);
                let open = self.circuits.iter().enumerate().filter(|(_, c)| is_open(c));
                if let Some(index) = open.map(|(index, _)| index).nth(nth) {
                    let record = self.circuits.remove(index);
                    self.relay.on_circuit_ended(record.id, CircuitEnd::Disconnected, now);
                }
            }
            Step::Freeze { peer } => self.peers[peer].is_frozen = true,
            Step::AddConnection { target } => {
                if self.peers[target].others.len() < 2 {
                    self.connections += 1;
                    self.peers[target].others.push(self.connections);
                    self.add_connection(target);
                }
            }
            Step::Reconnect { peer, address } => {
                self.disconnect(peer);
                self.peers[peer].address = address;
                self.circuits.retain_mut(|record| match record.state {
                    // The target will not answer any more.
                    State::Pending | State::Abandoned if record.target == peer => false,
                    State::Pending if record.source == peer => {
                        record.state = State::Abandoned;
                        true
                    }
                    State::Open | State::Yielded if record.source == peer => false,
                    _ => true,
                });
                self.assert_only_these_end(|record| record.target == peer);
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
        self.circuits.iter_mut().filter(|c| matches!(c.state, State::Open))
    }

    /// Reports the end of each open circuit that the relay has ended; asserts that `of` holds for it.
    fn assert_only_these_end(&mut self, of: impl Fn(&Record) -> bool) {
        self.take_actions();
        let now = self.instant();
        for id in self.take_ended().1 {
            let index = self.circuits.iter().position(|record| record.id == id);
            let record = self.circuits.remove(index.expect("the model knows it"));
            assert!(of(&record), "{record:?} ends for no reason");
            self.relay.on_circuit_ended(id, CircuitEnd::Disconnected, now);
        }
    }

    /// Lets the time pass until `until`, with the relay's sweeps.
    fn pass(&mut self, until: u64) {
        loop {
            // 1. The next sweep. All peers but the frozen ones are active before it.
            let due = self.relay.sweep_due.saturating_duration_since(self.start);
            let due = due.as_millis() as u64;
            if due > until {
                break;
            }
            self.now = self.now.max(due);
            for peer in self.peers.iter().filter(|peer| !peer.is_frozen) {
                peer.activity.add(1);
            }
            // 2. What the laws need to know from before the sweep.
            let (now, overdue) = (self.now, self.overdue());
            let silence = self.relay.config.silence;
            let frozen = self.peers.iter().filter(|peer| peer.is_frozen);
            let theirs = frozen.flat_map(|peer| peer.others.iter().chain([&peer.connection]));
            let probed_for = |id: &u32| {
                let up = self.relay.connections.get(*id).expect("it is up");
                up.liveness.decisive_probe(Duration::ZERO, self.instant())
            };
            let probed: BTreeMap<_, _> = theirs.map(|id| (*id, probed_for(id))).collect();
            let silent: Vec<_> =
                probed.keys().copied().filter(|id| self.silent_for(*id) >= silence).collect();
            // 3. The sweep.
            self.relay.sweep(self.instant());
            for record in &mut self.circuits {
                let is_open = matches!(record.state, State::Open | State::Yielded);
                if is_open && record.carried != record.seen {
                    (record.seen, record.moved) = (record.carried, now);
                }
            }
            self.on_asked_again(&overdue);
            // 4. The connections on which a peer has timed out.
            // A peer that times out on a connection counts as heard there just now. It had as much time to answer on
            // those that were probed as early.
            for id in silent {
                if self.silent_for(id).is_zero() {
                    let is_of = |it: &&Peer| it.connection == id || it.others.contains(&id);
                    let peer = self.peers.iter().find(is_of).expect("a peer of this history");
                    let all = peer.others.iter().chain([&peer.connection]);
                    let as_early = all.filter(|it| {
                        **it == id || probed[it].is_some() && probed[it] >= probed[&id]
                    });
                    self.timed_out.extend(as_early);
                }
            }
            // 5. The circuits that it ended, and those that are still overdue.
            let (abandoned, ended) = self.take_ended();
            for id in abandoned {
                let record = self.circuits.iter_mut().find(|record| record.id == id);
                record.expect("the model knows it").state = State::Abandoned;
            }
            for (id, after) in self.overdue() {
                let (_, others) = overdue
                    .iter()
                    .find(|(other, _)| *other == id)
                    .expect("it was overdue before the sweep");
                assert!(
                    !others.iter().any(|other| after.contains(other)),
                    "its target could have been asked"
                );
            }
            // The circuits of a silent peer are ended; they have not reported it yet.
            for id in ended {
                let record = self.circuits.iter().find(|record| record.id == id);
                let record = record.expect("the model knows it");
                let silent = [record.source, record.target].map(|peer| self.peers[peer].is_frozen);
                assert!(silent.contains(&true), "{record:?} ends, though both peers are active");
            }
        }
        self.now = until;
    }

    /// Has the relay and the model decide on the same CONNECT; asserts that they agree.
    fn connect_to(&mut self, source: usize, target: usize) {
        if source == target {
            return; // rejected when the request is read
        }
        // 1. The relay decides.
        self.requests += 1;
        let (request, now) = (self.requests, self.instant());
        let asked = Ok(Request::Connect(self.peers[target].id));
        let has_slot = self.relay.reservations.get(&self.peers[target].id);
        let has_slot = has_slot.is_some_and(|slot| slot.live(now).is_some());
        self.relay.handle_request(self.end(source), asked, request, now);
        let mut admitted = None;
        let mut refused = None;
        for action in self.take_actions() {
            match action {
                Action::AskTarget(target, parameters) => {
                    admitted = Some((target.connection, *parameters));
                }
                Action::Refuse(id, status) if id == request => refused = Some(status),
                _ => {}
            }
        }
        let (_, mut ended) = self.take_ended();
        // 2. The model decides; if it refuses, so has the relay.
        let yielded = self.decide(source, target);
        if !has_slot {
            assert!(admitted.is_none());
            assert_eq!(refused, Some(Status::NoReservation));
            return assert!(ended.is_empty());
        }
        let Some(yielded) = yielded else {
            assert!(admitted.is_none());
            assert_eq!(refused, Some(Status::ResourceLimitExceeded));
            return assert!(ended.is_empty(), "no circuit ends for one that is refused");
        };
        // 3. If it admits the circuit, so has the relay, and has ended the same one for it.
        let (over, parameters) = admitted.expect("there is room");
        let CircuitParameters { id, counters, ended: cancelled, .. } = parameters;
        // The circuit that yields may have been ended before, because its peer is silent.
        let is_ending =
            |id: &CircuitId| self.circuits.iter().any(|it| it.id == *id && it.has_noticed);
        ended.extend(yielded.filter(is_ending));
        ended.dedup();
        assert_eq!(ended, Vec::from_iter(yielded), "the circuit that yields");
        let gone = yielded.and_then(|id| self.circuits.iter_mut().find(|record| record.id == id));
        if let Some(record) = gone {
            record.state = State::Yielded;
        }
        self.circuits.push(Record {
            id,
            source,
            target,
            address: self.peers[source].address,
            state: State::Pending,
            asked: vec![over],
            asked_at: self.now,
            counters,
            ended: cancelled,
            has_noticed: false,
            carried: 0,
            seen: 0,
            moved: self.now,
        });
    }

    /// The circuit that ends to make room for this one, if any; `None`: this one is refused.
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
        // Without this circuit, its prefix holds at least as many as the newcomer's prefix does with the new one.
        let yields = |record: &Record| {
            let [of_subnet, of_address] = load(record.address);
            match same_subnet(record) {
                true => of_address > address_load + 1,
                false => of_subnet > subnet_load + 1,
            }
        };
        let open = under.iter().filter(|record| matches!(record.state, State::Open));
        let candidates = open.filter(|record| yields(record));
        let candidates =
            candidates.max_by_key(|c| (load(c.address), Reverse(c.moved), Reverse(c.id)));
        candidates.map(|record| Some(record.id))
    }

    /// Asserts that the relay's circuits and counts are those of the model.
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
        let beyond = |held: usize, cap| if cap == 0 { 0 } else { held.saturating_sub(cap) };
        let mut over = vec![beyond(held(&|_| true), total)];
        over.extend((0..ADDRESSES).flat_map(|address| {
            [
                beyond(held(&|record| record.address == address), per_ip),
                beyond(held(&|record| subnet(record.address) == subnet(address)), per_subnet),
            ]
        }));
        over.extend((0..PEERS).map(|peer| beyond(held(&|record| record.is_of(peer)), per_peer)));
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
            let changes_caps = matches!(step, Step::Configure(_));
            let before = world.over_caps();
            world.apply(step);
            world.compare();
            let over = world.over_caps().into_iter().zip(before);
            for (after, before) in over.filter(|_| !changes_caps) {
                assert!(after <= before, "a cap is exceeded");
            }
        }
        for peer in 0..PEERS {
            world.disconnect(peer);
        }
        prop_assert_eq!(world.relay.circuits.count(), 0);
        prop_assert_eq!(world.relay.circuits.quota.scopes(), 0);
    }
}
