//! Random histories of reservations, in the relay and in a naive model.
//!
//! The relay is `relaylet::relay`, without sockets. After each step relay and model must have given the same answers,
//! probed the same peers, freed the same slots for the same reasons, and hold the same slots. Each counter of the
//! relay is compared with a count from scratch.
//!
//! Two laws are checked without the model, which might share a mistake: no peer times out without its time to answer,
//! and no step except a change of the policy makes a cap exceeded.

use std::{
    collections::HashMap,
    net::{IpAddr, Ipv4Addr},
    time::{Duration, Instant},
};

use libp2p::PeerId;
use proptest::{prelude::*, test_runner::RngAlgorithm};
use relaylet::{
    ActivityCounter, Config, Event, FreedReason,
    address::ClientPrefix,
    relay::{
        Action, Relay,
        connections::{Connection, End},
        quota::Scope,
        reservations::Receipt,
    },
    wire::{Request, Status},
};

use super::model::{self, Answer, Model, Policy, Reason, State};

/// Few peers and addresses, so that they interact, and enough peers for the rule about simultaneous silence.
const PEERS: usize = 12;
const ADDRESSES: u8 = 4;

/// One step of a history. `which` is an index, modulo the number of the peer's connections.
#[derive(Clone, Debug)]
enum Step {
    Connect {
        peer: usize,
        address: u8,
    },
    Reserve {
        peer: usize,
        which: usize,
    },
    /// All peers connect from one address at once and reserve.
    Rush {
        address: u8,
    },
    Delivered {
        peer: usize,
    },
    Undelivered {
        peer: usize,
        older: bool,
    },
    Disconnect {
        peer: usize,
        which: usize,
    },
    /// Bytes arrive on a connection, not as an answer.
    Activity {
        peer: usize,
        which: usize,
    },
    /// The embedder records activity of the peer.
    RecordActivity {
        peer: usize,
    },
    /// The peer answers probes after this many milliseconds from now on, or not at all.
    Answers {
        peer: usize,
        after: Option<u64>,
    },
    /// The same for all peers at once.
    AllAnswer {
        after: Option<u64>,
    },
    Release {
        peer: usize,
    },
    /// Time passes, with sweeps when they are due.
    Pass {
        millis: u64,
    },
    /// Time passes while the relay is suspended.
    Suspend {
        millis: u64,
    },
    Configure(Policy),
}

fn step() -> impl Strategy<Value = Step> {
    let peer = 0..PEERS;
    let which = 0..3usize;
    let millis = prop_oneof![4 => 1..4_000u64, 3 => 4_000..40_000u64, 1 => 40_000..130_000u64];
    let after = prop_oneof![
        3 => Just(Some(50u64)),
        2 => (1_000..70_000u64).prop_map(Some),
        3 => Just(None),
    ];
    prop_oneof![
        4 => (peer.clone(), 0..ADDRESSES)
            .prop_map(|(peer, address)| Step::Connect { peer, address }),
        8 => (peer.clone(), which.clone()).prop_map(|(peer, which)| Step::Reserve { peer, which }),
        1 => (0..ADDRESSES).prop_map(|address| Step::Rush { address }),
        4 => peer.clone().prop_map(|peer| Step::Delivered { peer }),
        1 => (peer.clone(), any::<bool>())
            .prop_map(|(peer, older)| Step::Undelivered { peer, older }),
        3 => (peer.clone(), which.clone())
            .prop_map(|(peer, which)| Step::Disconnect { peer, which }),
        2 => (peer.clone(), which).prop_map(|(peer, which)| Step::Activity { peer, which }),
        1 => peer.clone().prop_map(|peer| Step::RecordActivity { peer }),
        3 => (peer.clone(), after.clone())
            .prop_map(|(peer, after)| Step::Answers { peer, after }),
        1 => after.prop_map(|after| Step::AllAnswer { after }),
        1 => peer.prop_map(|peer| Step::Release { peer }),
        6 => millis.prop_map(|millis| Step::Pass { millis }),
        1 => (500..100_000u64).prop_map(|millis| Step::Suspend { millis }),
        1 => policy().prop_map(Step::Configure),
    ]
}

fn policy() -> impl Strategy<Value = Policy> {
    let total = prop_oneof![2 => 1..5usize, 1 => 9..14usize];
    let caps = (total, prop_oneof![0..4usize, Just(0)], prop_oneof![0..5usize, Just(0)]);
    let grace = prop_oneof![Just(0), Just(30_000)];
    let heartbeat = prop_oneof![1 => Just(0), 4 => Just(30_000)];
    let probe = prop_oneof![1 => Just(0), 4 => Just(3_000)];
    let times = (
        prop_oneof![Just(120_000), Just(45_000)],
        prop_oneof![2 => Just(60_000), 1 => Just(35_000), 1 => Just(90_000)],
        prop_oneof![Just(10_000), Just(5_000), Just(40_000)],
    );
    let sweep = prop_oneof![3 => Just(2_000), 2 => Just(7_000), 1 => Just(50_000)];
    let rate = prop_oneof![3 => Just(0), 1 => Just(1), 1 => Just(4)];
    let denied = prop_oneof![4 => Just(None), 1 => (0..PEERS).prop_map(Some)];
    (caps, times, grace, heartbeat, probe, sweep, rate, denied, any::<bool>()).prop_map(
        |(caps, times, grace, heartbeat, probe, sweep, rate, denied, close_silent)| Policy {
            total: caps.0,
            per_ip: caps.1,
            per_subnet: caps.2,
            ttl: times.0,
            grace,
            heartbeat,
            silence: times.1,
            close_silent,
            probe,
            probe_after: times.2,
            sweep,
            rate,
            denied,
        },
    )
}

fn config(policy: Policy, peers: &[PeerId]) -> Config {
    let millis = Duration::from_millis;
    let mut config = Config::default();
    config.max_reservations = policy.total;
    config.max_reservations_per_ip = Some(policy.per_ip);
    config.max_reservations_per_subnet = Some(policy.per_subnet);
    config.reservation_ttl = millis(policy.ttl);
    config.grace = millis(policy.grace);
    config.heartbeat = millis(policy.heartbeat);
    config.silence = millis(policy.silence);
    config.close_silent = policy.close_silent;
    config.probe = millis(policy.probe);
    config.probe_after = millis(policy.probe_after);
    config.sweep = millis(policy.sweep);
    config.reserve_rate = policy.rate as u32;
    config.access.deny_peer = policy.denied.iter().map(|peer| peers[*peer]).collect();
    config
}

fn ip(address: u8) -> IpAddr {
    Ipv4Addr::new(10, 0, model::subnet(address), address).into()
}

fn prefix(address: u8) -> ClientPrefix {
    ip(address).into()
}

/// The relay, the model, and the peers of both.
struct World {
    relay: Relay<u32, u64>,
    model: Model,
    peers: Vec<PeerId>,
    start: Instant,
    now: u64,
    activity: HashMap<u32, ActivityCounter>,
    /// The receipts of each peer's grants, oldest first.
    receipts: Vec<Vec<(u64, Receipt)>>,
    answers_after: Vec<Option<u64>>,
    /// Since when a probe on a connection has been unanswered.
    unanswered: HashMap<u32, u64>,
    /// Answers to probes that have not arrived yet: when they arrive, and over which connection.
    answers_in_flight: Vec<(u64, u32)>,
    connections: u32,
    requests: u64,
    /// How many probes were sent.
    probes: u64,
}

/// The actions of the relay.
#[derive(Default)]
struct Actions {
    answers: Vec<(u64, Answer)>,
    freed: Vec<(usize, Reason)>,
    probed: Vec<u32>,
    timed_out: Vec<usize>,
    closed: usize,
}

impl World {
    fn new(policy: Policy) -> Self {
        let peers: Vec<_> = (0..PEERS).map(|_| PeerId::random()).collect();
        let start = Instant::now();
        Self {
            relay: Relay::new(config(policy, &peers), start).expect("a valid configuration"),
            model: Model::new(policy),
            peers,
            start,
            now: 0,
            activity: HashMap::new(),
            receipts: vec![Vec::new(); PEERS],
            answers_after: vec![Some(50); PEERS],
            unanswered: HashMap::new(),
            answers_in_flight: Vec::new(),
            connections: 0,
            requests: 0,
            probes: 0,
        }
    }

    fn instant(&self) -> Instant {
        self.start + Duration::from_millis(self.now)
    }

    fn index_of(&self, peer: PeerId) -> usize {
        let found = self.peers.iter().position(|other| *other == peer);
        found.expect("a peer of this history")
    }

    fn end(&self, connection: u32) -> End<u32> {
        let mut all = self.model.connections.iter();
        let peer = all.find(|c| c.id == connection).expect("a connection that is up").peer;
        End { peer: self.peers[peer], connection }
    }

    fn choose(&self, peer: usize, which: usize) -> Option<u32> {
        let all = self.model.connections.iter().filter(|c| c.peer == peer);
        let all: Vec<_> = all.map(|c| c.id).collect();
        all.get(which % all.len().max(1)).copied()
    }

    fn apply(&mut self, step: Step) {
        let policy_changes = matches!(step, Step::Configure(_));
        let before = self.over_caps();
        self.apply_step(step);
        let actions = self.take_actions();
        self.compare(actions);
        self.compare_tables();
        let after = self.over_caps().into_iter().zip(before);
        for (after, before) in after.filter(|_| !policy_changes) {
            assert!(after <= before, "a cap is exceeded");
        }
    }

    /// By how much each cap is exceeded: of addresses, of subnets, and the total.
    fn over_caps(&self) -> Vec<usize> {
        let Policy { total, per_ip, per_subnet, .. } = self.model.policy;
        let table = &self.relay.reservations;
        let above = |held: usize, cap| match cap {
            0 => 0,
            cap => held.saturating_sub(cap),
        };
        let each = (0..ADDRESSES).map(prefix).flat_map(|prefix| {
            let of_subnet = table.quota.held(Scope::Subnet(prefix.subnet()));
            [above(table.quota.held(Scope::Address(prefix)), per_ip), above(of_subnet, per_subnet)]
        });
        let all: Vec<_> = each.chain([above(table.taken(), total)]).collect();
        all
    }

    fn apply_step(&mut self, step: Step) {
        let now = self.instant();
        match step {
            Step::Connect { peer, address } => _ = self.connect(peer, address),
            Step::Reserve { peer, which } => {
                let chosen = self.choose(peer, which);
                let connection = chosen.unwrap_or_else(|| self.connect(peer, 0));
                self.reserve(connection);
            }
            Step::Rush { address } => {
                for peer in 0..PEERS {
                    let connection = self.connect(peer, address);
                    self.reserve(connection);
                }
            }
            Step::Delivered { peer } => {
                if let Some((_, receipt)) = self.receipts[peer].last() {
                    self.relay.on_delivered(self.peers[peer], *receipt, true, now);
                    self.model.delivered(peer);
                }
            }
            Step::Undelivered { peer, older } => {
                let mut granted = self.receipts[peer].iter().rev();
                if let Some((request, receipt)) = granted.nth(usize::from(older)) {
                    self.relay.on_delivered(self.peers[peer], *receipt, false, now);
                    self.model.undelivered(peer, *request, self.now);
                }
            }
            Step::Disconnect { peer, which } => {
                if let Some(connection) = self.choose(peer, which) {
                    self.disconnect(connection);
                }
            }
            Step::Activity { peer, which } => {
                if let Some(connection) = self.choose(peer, which) {
                    self.record_activity(connection);
                }
            }
            Step::RecordActivity { peer } => {
                self.relay.connections.record_activity(&self.peers[peer], now);
                for connection in self.model.connections.iter_mut().filter(|c| c.peer == peer) {
                    connection.last_heard = self.now;
                    connection.probed = None;
                    connection.heard = true;
                    self.unanswered.remove(&connection.id);
                }
            }
            Step::Answers { peer, after } => self.answers_after[peer] = after,
            Step::AllAnswer { after } => self.answers_after.fill(after),
            Step::Release { peer } => {
                self.relay.release(self.peers[peer], FreedReason::Released, now);
                self.model.release(peer);
            }
            Step::Pass { millis } => self.pass(self.now + millis),
            Step::Suspend { millis } => {
                self.now += millis;
                self.sweep();
            }
            Step::Configure(policy) => {
                let config = config(policy, &self.peers);
                self.relay.set_config(config, now).expect("a valid configuration");
                self.model.configure(policy, self.now);
            }
        }
    }

    fn connect(&mut self, peer: usize, address: u8) -> u32 {
        self.connections += 1;
        let (id, now) = (self.connections, self.instant());
        let connection = Connection::new(self.peers[peer], ip(address).into(), false, 0, now);
        self.relay.connections.add(id, connection);
        let activity = ActivityCounter::default();
        self.relay.connections.get_mut(id).unwrap().track(activity.clone());
        self.activity.insert(id, activity);
        self.model.connect(id, peer, address, self.now);
        id
    }

    fn reserve(&mut self, connection: u32) {
        self.requests += 1;
        let (from, now) = (self.end(connection), self.instant());
        self.relay.handle_request(from, Ok(Request::Reserve), self.requests, now);
        self.model.reserve(connection, self.requests, self.now);
    }

    fn disconnect(&mut self, connection: u32) {
        self.relay.on_disconnected(self.end(connection), self.instant());
        self.model.disconnect(connection, self.now);
    }

    fn record_activity(&mut self, id: u32) {
        let connection = self.model.connections.iter_mut().find(|c| c.id == id);
        if let Some(connection) = connection {
            connection.unseen = true;
            self.activity[&id].add(1);
            self.unanswered.remove(&id);
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
            self.sweep();
        }
        self.now = until;
    }

    fn sweep(&mut self) {
        let now = self.now;
        let (arrived, rest) = self.answers_in_flight.iter().partition(|(when, _)| *when <= now);
        self.answers_in_flight = rest;
        let arrived: Vec<_> = arrived;
        for (_, connection) in arrived {
            self.record_activity(connection);
        }
        let due = self.relay.sweep_due.saturating_duration_since(self.start);
        let newcomers_wait = !self.relay.waiting.is_empty();
        self.relay.sweep(self.instant());
        let actions = self.take_actions();
        for peer in &actions.timed_out {
            let time = self.model.policy.time_to_answer(newcomers_wait);
            // A peer is watched on the connection that its slot points at.
            let slot = self.model.slots.iter().find(|slot| slot.peer == *peer);
            let probed = slot.and_then(|slot| match slot.state {
                State::Live(over) => self.unanswered.get(&over),
                State::Grace(..) => None,
            });
            assert!(
                probed.is_some_and(|probed| now - probed >= time),
                "law 1: it had its time to answer"
            );
        }
        let closed = if self.model.policy.close_silent { actions.timed_out.len() } else { 0 };
        assert_eq!(
            actions.closed, closed,
            "peers that time out are closed if `close_silent` is on"
        );
        self.model.sweep(due.as_millis() as u64, &actions.timed_out, now);
        let next = self.relay.sweep_due.saturating_duration_since(self.start);
        assert_eq!(next.as_millis() as u64, self.model.next_sweep(now));
        self.compare(actions);
    }

    fn take_actions(&mut self) -> Actions {
        let mut actions = Actions::default();
        while let Some(action) = self.relay.actions.pop_front() {
            match action {
                Action::Grant { request, receipt, expires, .. } => {
                    actions.answers.push((request.reply, Answer::Granted));
                    let peer = self.index_of(request.from.peer);
                    let ttl = Duration::from_millis(self.model.policy.ttl);
                    assert_eq!(expires, self.instant() + ttl, "the expiration that is sent");
                    self.receipts[peer].push((request.reply, receipt));
                }
                Action::Refuse(request, status) => actions.answers.push((request, answer(status))),
                Action::Probe(to, _) => {
                    actions.probed.push(to.connection);
                    self.unanswered.entry(to.connection).or_insert(self.now);
                    self.probes += 1;
                    if let Some(after) = self.answers_after[self.index_of(to.peer)] {
                        self.answers_in_flight.push((self.now + after, to.connection));
                    }
                }
                Action::Close(_) => actions.closed += 1,
                Action::Report(Event::PeerSilent { peer, .. }) => {
                    actions.timed_out.push(self.index_of(peer))
                }
                Action::Report(Event::ReservationFreed { peer, reason, .. }) => {
                    actions.freed.push((self.index_of(peer), self.reason_of(reason)));
                }
                _ => {}
            }
        }
        actions
    }

    fn reason_of(&self, reason: FreedReason) -> Reason {
        match reason {
            FreedReason::Expired => Reason::Expired,
            FreedReason::GraceOver => Reason::GraceOver,
            FreedReason::Disconnected => Reason::Disconnected,
            FreedReason::Silent => Reason::Silent,
            FreedReason::TakenBy { peer } => Reason::Taken(self.index_of(peer)),
            FreedReason::Undelivered => Reason::Undelivered,
            FreedReason::Denied => Reason::Denied,
            FreedReason::Released => Reason::Released,
            other => panic!("the model does not know {other}"),
        }
    }

    /// Asserts that the relay and the model have done the same.
    fn compare(&mut self, actions: Actions) {
        let model = &mut self.model;
        assert_eq!(sorted(actions.answers), sorted(std::mem::take(&mut model.answers)));
        assert_eq!(sorted(actions.freed), sorted(std::mem::take(&mut model.freed)));
        assert_eq!(sorted(actions.probed), sorted(std::mem::take(&mut model.probed)));
    }

    /// Asserts that the relay and the model hold the same slots.
    fn compare_tables(&self) {
        let (now, table) = (self.instant(), &self.relay.reservations);
        for (index, peer) in self.peers.iter().enumerate() {
            let slot = self.model.slots.iter().find(|slot| slot.peer == index);
            let held = table.get(peer);
            let holds = slot.is_some_and(|slot| !self.model.is_over(slot, self.now));
            assert_eq!(held.is_some_and(|held| now < held.ends), holds);
            let connection = slot.and_then(|slot| match slot.state {
                State::Live(connection) => Some(connection),
                State::Grace(..) => None,
            });
            assert_eq!(held.and_then(|held| held.connection), connection);
            let prefix = slot.map(|slot| prefix(slot.address));
            assert_eq!(held.and_then(|held| held.prefix), prefix);
            let ends = slot.map(|slot| self.start + Duration::from_millis(self.model.end(slot)));
            assert_eq!(held.map(|held| held.ends), ends);
            let live = connection.filter(|_| slot.is_some_and(|slot| slot.expires > self.now));
            assert_eq!(held.and_then(|held| held.live(now)), live);
        }
        self.count();
    }

    /// Compares each counter of the relay with a count from scratch.
    fn count(&self) {
        let (table, slots) = (&self.relay.reservations, &self.model.slots);
        assert_eq!(table.taken(), slots.len());
        assert_eq!(table.iter().count(), slots.len());
        let in_grace = slots.iter().filter(|slot| matches!(slot.state, State::Grace(..)));
        assert_eq!(table.in_grace(), in_grace.count());
        assert_eq!(self.relay.waiting.len(), self.model.waiting());
        assert_eq!(self.relay.probes, self.probes);
        assert_eq!(self.relay.connections.count(), self.model.connections.len());
        for address in 0..ADDRESSES {
            let at = |same: fn(u8, u8) -> bool| {
                let there = slots.iter().filter(|slot| same(slot.address, address));
                there.count()
            };
            let prefix = prefix(address);
            assert_eq!(table.quota.held(Scope::Address(prefix)), at(|one, other| one == other));
            let of_subnet = table.quota.held(Scope::Subnet(prefix.subnet()));
            let same = |one, other| model::subnet(one) == model::subnet(other);
            assert_eq!(of_subnet, at(same));
        }
    }

    /// Disconnects every peer and lets every term end: nothing is left.
    fn disconnect_all(&mut self) {
        let all: Vec<_> = self.model.connections.iter().map(|c| c.id).collect();
        for connection in all {
            self.disconnect(connection);
            let actions = self.take_actions();
            self.compare(actions);
            self.compare_tables();
        }
        self.pass(self.now + self.model.policy.ttl + self.model.policy.sweep);
        let table = &self.relay.reservations;
        assert_eq!((table.taken(), table.in_grace(), table.quota.scopes()), (0, 0, 0));
        assert_eq!((self.relay.waiting.len(), self.relay.connections.count()), (0, 0));
    }
}

fn answer(status: Status) -> Answer {
    match status {
        Status::ReservationRefused => Answer::Refused,
        Status::ResourceLimitExceeded => Answer::TooOften,
        Status::PermissionDenied => Answer::Denied,
        other => panic!("the model does not know {other:?}"),
    }
}

fn sorted<T: Ord>(mut list: Vec<T>) -> Vec<T> {
    list.sort();
    list
}

proptest! {
    // The default generator is a cipher, which takes most of the time in an unoptimized build.
    #![proptest_config(ProptestConfig {
        cases: 2000,
        rng_algorithm: RngAlgorithm::XorShift,
        failure_persistence: None, // the history is printed
        ..ProptestConfig::default()
    })]

    #[test]
    fn the_relay_matches_a_naive_model(
        policy in policy(),
        history in prop::collection::vec(step(), 1..400),
    ) {
        let mut world = World::new(policy);
        for step in history {
            world.apply(step);
        }
        world.disconnect_all();
    }
}
