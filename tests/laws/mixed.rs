//! Random histories in which everything interacts: slots and circuits of the same peers, access rules that change and
//! whose answers come late, drains, answers that are not delivered, connections that are replaced, caps that change.
//!
//! There is no model. After each step every index and counter agrees with the tables, every request was answered once
//! or went with its connection, and no peer lost a slot or a circuit to a rule that allows it. Once all answers have
//! come, no peer holds what the rules deny; once all peers are gone, nothing is left.

use std::{
    cell::RefCell,
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr},
    rc::Rc,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use libp2p::{
    Multiaddr, PeerId,
    futures::{FutureExt, channel::oneshot},
};
use proptest::{prelude::*, test_runner::RngAlgorithm};
use relaylet::{
    Access, ActivityCounter, CircuitEnd, CircuitId, Config, Event, FreedReason, Permission,
    StopFailed,
    relay::{
        AccessCheck, Action, Relay,
        connections::{Connection, End},
        quota::Scope,
        reservations::Receipt,
    },
    wire::Request,
};

const PEERS: usize = 4;
const ADDRESSES: u8 = 3;

/// One step of a history. `nth` is an index, modulo the number of candidates.
#[derive(Clone, Debug)]
enum Step {
    Connect {
        peer: usize,
        address: u8,
        relayed: bool,
    },
    Disconnect {
        nth: usize,
    },
    Reserve {
        nth: usize,
    },
    Circuit {
        nth: usize,
        target: usize,
    },
    /// The answer of an access check comes.
    Decide {
        nth: usize,
    },
    /// The answer to a RESERVE is delivered, or is not.
    Deliver {
        nth: usize,
        arrived: bool,
    },
    /// A target answers its stop request.
    Answer {
        nth: usize,
        answer: u8,
    },
    /// An open circuit ends.
    End {
        nth: usize,
    },
    Activity {
        nth: usize,
    },
    Release {
        peer: usize,
    },
    /// A newer connection of the peer replaces another one.
    Replace {
        nth: usize,
    },
    DenyPeer {
        peer: usize,
    },
    DenyAddress {
        address: u8,
    },
    AnswerLater {
        later: bool,
    },
    Configure {
        total: usize,
        per_ip: usize,
        circuits: usize,
        grace: bool,
        close_silent: bool,
    },
    Drain {
        seconds: u64,
    },
    Resume,
    Pass {
        millis: u64,
    },
}

fn step() -> impl Strategy<Value = Step> {
    let (nth, peer, address) = (0..64usize, 0..PEERS, 0..ADDRESSES);
    let also = peer.clone();
    prop_oneof![
        5 => (peer.clone(), address.clone(), prop::bool::weighted(0.1))
            .prop_map(|(peer, address, relayed)| Step::Connect { peer, address, relayed }),
        3 => nth.clone().prop_map(|nth| Step::Disconnect { nth }),
        8 => nth.clone().prop_map(|nth| Step::Reserve { nth }),
        6 => (nth.clone(), peer.clone()).prop_map(|(nth, target)| Step::Circuit { nth, target }),
        6 => nth.clone().prop_map(|nth| Step::Decide { nth }),
        6 => (nth.clone(), prop::bool::weighted(0.7))
            .prop_map(|(nth, arrived)| Step::Deliver { nth, arrived }),
        5 => (nth.clone(), 0..5u8).prop_map(|(nth, answer)| Step::Answer { nth, answer }),
        2 => nth.clone().prop_map(|nth| Step::End { nth }),
        3 => nth.clone().prop_map(|nth| Step::Activity { nth }),
        1 => peer.prop_map(|peer| Step::Release { peer }),
        1 => nth.prop_map(|nth| Step::Replace { nth }),
        1 => also.prop_map(|peer| Step::DenyPeer { peer }),
        3 => address.prop_map(|address| Step::DenyAddress { address }),
        2 => prop::bool::weighted(0.8).prop_map(|later| Step::AnswerLater { later }),
        1 => (1..5usize, 0..3usize, 1..5usize, any::<bool>(), any::<bool>()).prop_map(
            |(total, per_ip, circuits, grace, close_silent)| {
                Step::Configure { total, per_ip, circuits, grace, close_silent }
            }
        ),
        1 => (0..60u64).prop_map(|seconds| Step::Drain { seconds }),
        1 => Just(Step::Resume),
        5 => prop_oneof![1..5_000u64, 5_000..100_000u64].prop_map(|millis| Step::Pass { millis }),
    ]
}

/// Which peers and addresses are denied, and whether answers come later.
#[derive(Clone, Debug, Default)]
struct Rules {
    peers: BTreeSet<PeerId>,
    addresses: BTreeSet<IpAddr>,
    later: bool,
}

impl Rules {
    fn allow(&self, peer: PeerId, address: &Multiaddr) -> bool {
        let ip = relaylet::address::ip(address);
        !self.peers.contains(&peer) && ip.is_none_or(|ip| !self.addresses.contains(&ip))
    }
}

#[derive(Clone, Default)]
struct Shared(Arc<Mutex<Rules>>);

impl Shared {
    fn permission(&self, decide: impl Fn(&Rules) -> bool + Send + 'static) -> Permission {
        let rules = self.0.lock().unwrap();
        if !rules.later {
            return decide(&rules).into();
        }
        let shared = self.clone();
        Permission::Later(Box::pin(async move { decide(&shared.0.lock().unwrap()).into() }))
    }
}

impl Access for Shared {
    fn may_reserve(&self, peer: PeerId, address: &Multiaddr) -> Permission {
        let address = address.clone();
        self.permission(move |rules| rules.allow(peer, &address))
    }

    fn may_connect(&self, source: PeerId, address: &Multiaddr, target: PeerId) -> Permission {
        let address = address.clone();
        self.permission(move |rules| {
            rules.allow(source, &address) && !rules.peers.contains(&target)
        })
    }
}

/// What became of a request's reply handle.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Fate {
    Unanswered,
    Answered,
    Dropped,
}

/// By the number of the request; with the connection that it came over.
type Fates = Rc<RefCell<BTreeMap<u64, (u32, Fate)>>>;

/// A reply handle that records what becomes of it.
#[derive(Debug)]
struct Reply(u64, Fates);

impl Reply {
    fn answer(self) {
        let mut fates = self.1.borrow_mut();
        let (_, fate) = fates.get_mut(&self.0).unwrap();
        assert_eq!(*fate, Fate::Unanswered, "a request is answered once");
        *fate = Fate::Answered;
    }
}

impl Drop for Reply {
    fn drop(&mut self) {
        if let Ok(mut fates) = self.1.try_borrow_mut()
            && let Some((_, fate)) = fates.get_mut(&self.0)
            && *fate == Fate::Unanswered
        {
            *fate = Fate::Dropped;
        }
    }
}

struct Up {
    end: End<u32>,
    address: u8,
    closing: bool,
    activity: ActivityCounter,
}

/// The sans-IO relay, its peers, and what its caller does.
struct World {
    relay: Relay<u32, Reply>,
    rules: Shared,
    fates: Fates,
    peers: Vec<PeerId>,
    up: Vec<Up>,
    /// The access checks whose answers have yet to come.
    checks: Vec<(AccessCheck<u32, Reply>, Permission)>,
    /// The grants whose delivery has yet to be reported.
    grants: Vec<(End<u32>, Receipt)>,
    /// The circuits whose targets were asked, with the target's connection.
    asked: Vec<(CircuitId, End<u32>, oneshot::Receiver<()>)>,
    /// The open circuits, with the source's connection.
    open: Vec<(CircuitId, End<u32>, oneshot::Receiver<()>)>,
    /// The rules under which the relay ended circuits that have not reported it.
    ended_under: BTreeMap<CircuitId, Rules>,
    /// The connections whose handlers were told that a slot points at them.
    holds: BTreeSet<u32>,
    /// The connection that each peer's slot pointed at last.
    held_over: BTreeMap<PeerId, u32>,
    /// How many slots were granted and not freed, and how many circuits opened and not closed, by the events.
    slots: i64,
    circuits: i64,
    has_drained: bool,
    start: Instant,
    now: u64,
    connections: u32,
    requests: u64,
}

fn multiaddr(address: u8) -> Multiaddr {
    Multiaddr::from(IpAddr::from(Ipv4Addr::new(10, 0, address / 2, address)))
}

impl World {
    fn new() -> Self {
        let start = Instant::now();
        let mut config = Config::default();
        (config.reserve_rate, config.connect_rate) = (0, 0);
        config.max_reservations = 3;
        config.max_reservations_per_ip = Some(2);
        config.max_circuits_per_peer = 3;
        config.idle_timeout = Duration::from_secs(60);
        let mut relay = Relay::new(config, start).unwrap();
        let rules = Shared::default();
        relay.set_access(Box::new(rules.clone()), start);
        Self {
            relay,
            rules,
            fates: Rc::default(),
            peers: (0..PEERS).map(|_| PeerId::random()).collect(),
            up: Vec::new(),
            checks: Vec::new(),
            grants: Vec::new(),
            asked: Vec::new(),
            open: Vec::new(),
            ended_under: BTreeMap::new(),
            holds: BTreeSet::new(),
            held_over: BTreeMap::new(),
            slots: 0,
            circuits: 0,
            has_drained: false,
            start,
            now: 0,
            connections: 0,
            requests: 0,
        }
    }

    fn instant(&self) -> Instant {
        self.start + Duration::from_millis(self.now)
    }

    fn chosen(&self, nth: usize) -> Option<End<u32>> {
        self.up.get(nth % self.up.len().max(1)).map(|up| up.end)
    }

    fn request(&mut self, from: End<u32>, request: Request) {
        self.requests += 1;
        self.fates.borrow_mut().insert(self.requests, (from.connection, Fate::Unanswered));
        let reply = Reply(self.requests, self.fates.clone());
        let now = self.instant();
        self.relay.handle_request(from, Ok(request), reply, now);
    }

    /// Applies a step, unless it needs something that does not exist, and checks the tables.
    fn apply(&mut self, step: Step) {
        let now = self.instant();
        match step {
            Step::Connect { peer, address, relayed } => {
                self.connections += 1;
                let end = End { peer: self.peers[peer], connection: self.connections };
                let mut up = Connection::new(end.peer, multiaddr(address), relayed, 0, now);
                let activity = ActivityCounter::default();
                up.track(activity.clone());
                self.relay.connections.add(end.connection, up);
                self.up.push(Up { end, address, closing: false, activity });
            }
            Step::Disconnect { nth } => {
                if let Some(end) = self.chosen(nth) {
                    self.disconnect(end);
                }
            }
            Step::Reserve { nth } => {
                if let Some(end) = self.chosen(nth) {
                    self.request(end, Request::Reserve);
                }
            }
            Step::Circuit { nth, target } => {
                let target = self.peers[target];
                if let Some(end) = self.chosen(nth).filter(|end| end.peer != target) {
                    self.request(end, Request::Connect(target));
                }
            }
            Step::Decide { nth } => {
                if !self.checks.is_empty() {
                    self.decide(nth % self.checks.len());
                }
            }
            Step::Deliver { nth, arrived } => {
                if !self.grants.is_empty() {
                    let (end, receipt) = self.grants.remove(nth % self.grants.len());
                    self.relay.on_delivered(end.peer, receipt, arrived, now);
                }
            }
            Step::Answer { nth, answer } => {
                if !self.asked.is_empty() {
                    self.answer(nth % self.asked.len(), answer);
                }
            }
            Step::End { nth } => {
                if !self.open.is_empty() {
                    let (id, ..) = self.open.remove(nth % self.open.len());
                    self.relay.on_circuit_ended(id, CircuitEnd::Disconnected, now);
                }
            }
            Step::Activity { nth } => {
                if let Some(up) = self.up.get(nth % self.up.len().max(1)) {
                    up.activity.add(1);
                }
            }
            Step::Release { peer } => {
                _ = self.relay.release(self.peers[peer], FreedReason::Released, now)
            }
            Step::Replace { nth } => {
                if let Some(end) = self.chosen(nth) {
                    self.relay.close_longest_silent_of(end.peer, end.connection, now);
                }
            }
            Step::DenyPeer { peer } => {
                let peer = self.peers[peer];
                let mut rules = self.rules.0.lock().unwrap();
                if !rules.peers.remove(&peer) {
                    rules.peers.insert(peer);
                }
                drop(rules);
                self.relay.recheck_access(now);
            }
            Step::DenyAddress { address } => {
                let ip = relaylet::address::ip(&multiaddr(address)).unwrap();
                let mut rules = self.rules.0.lock().unwrap();
                if !rules.addresses.remove(&ip) {
                    rules.addresses.insert(ip);
                }
                drop(rules);
                self.relay.recheck_access(now);
            }
            Step::AnswerLater { later } => self.rules.0.lock().unwrap().later = later,
            Step::Configure { total, per_ip, circuits, grace, close_silent } => {
                let mut config = self.relay.config.clone();
                config.max_reservations = total;
                config.max_reservations_per_ip = Some(per_ip);
                config.max_circuits = circuits;
                config.grace = Duration::from_secs(if grace { 30 } else { 0 });
                config.close_silent = close_silent;
                self.relay.set_config(config, now).unwrap();
            }
            Step::Drain { seconds } => {
                self.has_drained = true;
                self.relay.drain(now + Duration::from_secs(seconds), now);
            }
            Step::Resume => self.relay.resume(),
            Step::Pass { millis } => self.pass(self.now + millis),
        }
        self.take_actions();
        self.check();
        // These report their end later, when the rules may be other ones.
        for (id, _, ended) in &mut self.open {
            if ended.try_recv().is_err() {
                let rules = || self.rules.0.lock().unwrap().clone();
                self.ended_under.entry(*id).or_insert_with(rules);
            }
        }
    }

    fn decide(&mut self, nth: usize) {
        let (check, permission) = self.checks.remove(nth);
        let Permission::Later(answer) = permission else { panic!("it comes later") };
        let answer = answer.now_or_never().expect("it is ready");
        let now = self.instant();
        self.relay.on_access_checked(check, answer, now);
    }

    fn answer(&mut self, nth: usize, answer: u8) {
        let (id, end, mut ended) = self.asked.remove(nth);
        let is_cancelled = ended.try_recv().is_err();
        let answer = match answer {
            _ if is_cancelled => Err(StopFailed::Gone),
            0 => Err(StopFailed::Unsupported),
            1 => Err(StopFailed::Io(std::io::ErrorKind::TimedOut)),
            _ => Ok(ended),
        };
        let now = self.instant();
        let source = self.relay.circuits.records.get(&id).map(|circuit| circuit.source);
        if let Some((reply, ended)) = self.relay.on_target_answered(id, end.connection, answer, now)
        {
            reply.answer();
            self.open.push((id, source.unwrap(), ended));
        }
    }

    fn disconnect(&mut self, end: End<u32>) {
        // What its tasks would have reported is lost.
        self.up.retain(|up| up.end != end);
        self.grants.retain(|(over, _)| *over != end);
        self.asked.retain(|(_, over, _)| *over != end);
        self.open.retain(|(_, source, _)| *source != end);
        self.checks.retain(|(check, _)| match check {
            AccessCheck::Request(request, _) => request.from != end,
            _ => true,
        });
        self.holds.remove(&end.connection);
        let now = self.instant();
        self.relay.on_disconnected(end, now);
    }

    fn pass(&mut self, until: u64) {
        loop {
            let due = self.relay.sweep_due.saturating_duration_since(self.start).as_millis() as u64;
            if due > until {
                break;
            }
            self.now = self.now.max(due);
            let now = self.instant();
            self.relay.sweep(now);
            self.take_actions();
            // Connections that are being closed close, and circuits that were ended report that.
            let closing: Vec<_> = self.up.iter().filter(|up| up.closing).map(|up| up.end).collect();
            for end in closing {
                self.disconnect(end);
                self.take_actions();
            }
            self.report_ends();
        }
        self.now = until;
    }

    fn report_ends(&mut self) {
        let now = self.instant();
        while let Some(nth) = self.open.iter_mut().position(|(.., ended)| ended.try_recv().is_err())
        {
            let (id, ..) = self.open.remove(nth);
            self.relay.on_circuit_ended(id, CircuitEnd::Disconnected, now);
            self.take_actions();
        }
        while let Some(nth) =
            self.asked.iter_mut().position(|(.., ended)| ended.try_recv().is_err())
        {
            self.answer(nth, 0);
            self.take_actions();
        }
    }

    fn take_actions(&mut self) {
        while let Some(action) = self.relay.actions.pop_front() {
            match action {
                Action::Grant { request, receipt, .. } => {
                    self.grants.push((request.from, receipt));
                    request.reply.answer();
                }
                Action::CheckAccess(check, permission) => self.checks.push((check, permission)),
                Action::Refuse(reply, _) => reply.answer(),
                Action::AskTarget(end, parameters) => {
                    if self.up.iter().any(|up| up.end == end) {
                        self.asked.push((parameters.id, end, parameters.ended));
                    }
                }
                Action::Hold(end, holds) => {
                    if holds {
                        self.holds.insert(end.connection);
                        self.held_over.insert(end.peer, end.connection);
                    } else {
                        self.holds.remove(&end.connection);
                    }
                }
                Action::Close(end) => {
                    self.up.iter_mut().filter(|up| up.end == end).for_each(|up| up.closing = true)
                }
                Action::Probe(..) => {}
                Action::Report(event) => self.on_event(event),
            }
        }
    }

    fn on_event(&mut self, event: Event) {
        let rules = self.rules.0.lock().unwrap().clone();
        match event {
            Event::ReservationAccepted { renewed: false, .. } => self.slots += 1,
            Event::ReservationFreed { peer, reason, .. } => {
                self.slots -= 1;
                if reason == FreedReason::Denied {
                    let held = self.up.iter().find(|up| up.end.connection == self.held_over[&peer]);
                    let allowed = held.is_some_and(|up| rules.allow(peer, &multiaddr(up.address)));
                    assert!(!allowed, "law: no slot is lost to a rule that allows it");
                }
            }
            Event::CircuitOpened { .. } => self.circuits += 1,
            Event::CircuitClosed { circuit, source, target, end, .. } => {
                self.circuits -= 1;
                let rules = self.ended_under.remove(&circuit).unwrap_or(rules);
                if end == CircuitEnd::Denied {
                    let may_deny = rules.peers.contains(&source)
                        || rules.peers.contains(&target)
                        || !rules.addresses.is_empty();
                    assert!(may_deny, "law: no circuit is lost to a rule that allows it");
                }
            }
            _ => {}
        }
    }

    fn check(&self) {
        let relay = &self.relay;
        let now = self.instant();
        // Slots and connections.
        for up in &self.up {
            let id = up.end.connection;
            let connection = relay.connections.get(id).expect("it is up");
            let slot = relay.reservations.get(&up.end.peer);
            let points = slot.is_some_and(|slot| slot.connection == Some(id));
            assert_eq!(connection.holds_reservation, points, "held");
            let in_grace = slot.is_some_and(|slot| slot.connection.is_none());
            assert!(self.holds.contains(&id) == points || in_grace, "the handler knows");
            let over =
                relay.circuits.iter().filter(|(_, c)| [c.source, c.target].contains(&up.end));
            assert_eq!(connection.circuits as usize, over.count(), "circuits over it");
        }
        assert_eq!(relay.connections.count(), self.up.len());
        for (peer, slot) in relay.reservations.iter() {
            if let Some(id) = slot.connection {
                let up = self.up.iter().find(|up| up.end.connection == id).expect("it is up");
                assert_eq!(up.end.peer, peer);
                assert!(!relay.connections.get(id).unwrap().origin.relayed);
            }
        }
        assert_eq!(relay.reservations.taken() as i64, self.slots, "granted and not freed");
        assert_eq!(relay.reservations.quota.held(Scope::Total), relay.reservations.taken());
        assert_eq!(relay.circuits.open().count() as i64, self.circuits, "opened and not closed");
        let totals = relay.accounts.totals;
        assert_eq!((totals.opened - totals.closed) as i64, self.circuits);
        for (peer, _) in relay.accounts.iter() {
            assert!(self.up.iter().any(|up| up.end.peer == peer), "only connected peers have one");
        }
        // Newcomers.
        let mut waiting: Vec<_> = relay.waiting.iter().map(|w| w.request.from.peer).collect();
        for peer in &waiting {
            let slot = relay.reservations.get(peer);
            assert!(slot.is_none_or(|slot| slot.ends <= now), "a peer that waits has no slot");
        }
        waiting.sort();
        waiting.dedup();
        assert_eq!(waiting.len(), relay.waiting.len(), "a peer waits once");
        // Requests.
        for (connection, fate) in self.fates.borrow().values() {
            let is_up = self.up.iter().any(|up| up.end.connection == *connection && !up.closing);
            assert!(
                *fate != Fate::Dropped || !is_up || self.has_drained,
                "each request is answered"
            );
        }
    }

    /// Has all answers come; asserts that no peer holds what the rules deny then, and that a change asks about all
    /// slots.
    fn settle(&mut self) {
        while !self.checks.is_empty() {
            self.decide(0);
            self.take_actions();
            self.check();
        }
        self.report_ends();
        let rules = self.rules.0.lock().unwrap().clone();
        let address = |id: u32| {
            let up = self.up.iter().find(|up| up.end.connection == id);
            up.map(|up| multiaddr(up.address))
        };
        for (peer, slot) in self.relay.reservations.iter() {
            let from = slot.connection.and_then(address);
            let from = from.unwrap_or_else(|| slot.prefix.unwrap().ip().into());
            assert!(rules.allow(peer, &from), "law: a slot is held that the rules deny");
        }
        for (_, circuit) in self.relay.circuits.iter().filter(|(_, c)| c.open().is_some()) {
            let [from, at] = [circuit.source, circuit.target].map(|end| address(end.connection));
            for (end, from) in [(circuit.source, from), (circuit.target, at)] {
                let is_allowed = from.is_none_or(|from| rules.allow(end.peer, &from));
                assert!(is_allowed, "law: a circuit is open that the rules deny");
            }
        }
        self.rules.0.lock().unwrap().later = true;
        self.relay.recheck_access(self.instant());
        self.take_actions();
        assert!(self.checks.len() >= self.relay.reservations.taken(), "each slot is asked about");
        while !self.checks.is_empty() {
            self.decide(0);
            self.take_actions();
        }
    }

    /// Disconnects every peer and lets every term end: nothing is left.
    fn disconnect_all(&mut self) {
        while let Some(up) = self.up.first() {
            let end = up.end;
            self.disconnect(end);
            self.take_actions();
            self.check();
        }
        self.report_ends();
        self.checks.clear();
        let term = self.relay.config.reservation_ttl.as_millis() as u64;
        self.pass(self.now + term + 20_000);
        let relay = &self.relay;
        assert_eq!((relay.reservations.taken(), relay.reservations.in_grace()), (0, 0));
        assert_eq!((relay.circuits.count(), relay.connections.count()), (0, 0));
        assert_eq!(relay.reservations.quota.scopes() + relay.circuits.quota.scopes(), 0);
        assert_eq!((relay.waiting.len(), relay.accounts.iter().count()), (0, 0));
        for (id, (_, fate)) in self.fates.borrow().iter() {
            assert_ne!(*fate, Fate::Unanswered, "request {id}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 300,
        rng_algorithm: RngAlgorithm::XorShift,
        failure_persistence: None, // the history is printed
        ..ProptestConfig::default()
    })]

    #[test]
    fn in_every_history_the_tables_agree_and_the_rules_apply(
        history in prop::collection::vec(step(), 1..120),
    ) {
        let mut world = World::new();
        for step in history {
            world.apply(step);
        }
        world.settle();
        world.disconnect_all();
    }
}
