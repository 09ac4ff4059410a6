//! Random histories of circuits; the accounts are compared with the sum of all events.

use std::time::Instant;

use libp2p::{Multiaddr, PeerId};
use proptest::{prelude::*, test_runner::RngAlgorithm};
use relaylet::{
    Account, BytesTransferred, CircuitEnd, CircuitId, Config, Event, StopFailed,
    relay::{
        Action, Relay,
        accounts::Counters,
        connections::{Connection, End},
    },
    wire::Request,
};

/// Few, so that histories reuse them.
const PEERS: usize = 4;

/// One step of a history. `which` is an index, modulo the number of candidates.
#[derive(Clone, Debug)]
enum Step {
    /// A peer opens a connection and reserves.
    Connect { peer: usize },
    /// A connection is lost. Unless `reported` is `None`, the open circuits that have their source there end first, and
    /// report that many bytes.
    Lose { which: usize, reported: Option<u16> },
    /// A CONNECT over one connection to a peer.
    Circuit { which: usize, target: usize },
    /// A target answers its stop request.
    Answer { which: usize, accepts: bool },
    /// An open circuit ends, also if one of its peers is disconnected.
    End { which: usize, transferred: (u16, u16) },
}

fn step() -> impl Strategy<Value = Step> {
    let which = 0..64usize;
    prop_oneof![
        3 => (0..PEERS).prop_map(|peer| Step::Connect { peer }),
        3 => (which.clone(), any::<Option<u16>>())
            .prop_map(|(which, reported)| Step::Lose { which, reported }),
        6 => (which.clone(), 0..PEERS)
            .prop_map(|(which, target)| Step::Circuit { which, target }),
        6 => (which.clone(), prop::bool::weighted(0.8))
            .prop_map(|(which, accepts)| Step::Answer { which, accepts }),
        3 => (which, any::<(u16, u16)>()).prop_map(|(which, transferred)| Step::End { which, transferred }),
    ]
}

#[derive(Debug)]
enum Entry {
    /// The peer's last connection was lost.
    Disconnected(PeerId),
    Opened(CircuitId, PeerId, PeerId),
    Closed(CircuitId, BytesTransferred),
}

/// The sans-IO relay, and its peers.
struct World {
    relay: Relay<u32, ()>,
    now: Instant,
    peers: Vec<PeerId>,
    up: Vec<End<u32>>,
    /// Circuits whose targets have a stop request.
    pending: Vec<(CircuitId, Counters)>,
    /// Open circuits, with the connection of their source and their byte counters.
    open: Vec<(CircuitId, End<u32>, Counters)>,
    entries: Vec<Entry>,
    /// The bytes that ended circuits reported.
    reported: BytesTransferred,
    connections: u32,
}

impl World {
    fn new() -> Self {
        let mut config = Config::default();
        config.max_reservations_per_ip = Some(0);
        config.reserve_rate = 0;
        config.connect_rate = 0;
        let now = Instant::now();
        Self {
            relay: Relay::new(config, now).expect("a valid configuration"),
            now,
            peers: (0..PEERS).map(|_| PeerId::random()).collect(),
            up: Vec::new(),
            pending: Vec::new(),
            open: Vec::new(),
            entries: Vec::new(),
            reported: BytesTransferred::default(),
            connections: 0,
        }
    }

    fn next_connection(&mut self) -> u32 {
        self.connections += 1;
        self.connections
    }

    fn apply(&mut self, step: Step) {
        match step {
            Step::Connect { peer } => self.connect(self.peers[peer]),
            Step::Lose { which, reported } => {
                if let Some(gone) = chosen(&self.up, which) {
                    self.lose(gone, reported);
                }
            }
            Step::Circuit { which, target } => {
                let target = self.peers[target];
                let from = chosen(&self.up, which);
                if let Some(from) = from.filter(|from| from.peer != target) {
                    self.request(from, Request::Connect(target));
                }
            }
            Step::Answer { which, accepts } => {
                if let Some((id, counters)) = chosen(&self.pending, which) {
                    self.pending.retain(|(other, _)| *other != id);
                    let answer = accepts.then_some(()).ok_or(StopFailed::Unsupported);
                    let Some(circuit) = self.relay.circuits.records.get(&id) else {
                        return;
                    };
                    let (source, over) = (circuit.source, circuit.target.connection);
                    let opened = self.relay.on_target_answered(id, over, answer, self.now);
                    if opened.is_some() {
                        self.open.push((id, source, counters));
                    }
                }
            }
            Step::End { which, transferred } => {
                if let Some((id, ..)) = self.open.get(which % self.open.len().max(1)) {
                    self.end(*id, transferred);
                }
            }
        }
        self.take_actions();
        self.compare();
    }

    fn connect(&mut self, peer: PeerId) {
        let connection = self.next_connection();
        let end = End { peer, connection };
        let address: Multiaddr = "/ip4/10.0.0.1/tcp/1".parse().expect("an address");
        let new = Connection::new(peer, address, false, 0, self.now);
        self.relay.connections.add(connection, new);
        self.up.push(end);
        self.request(end, Request::Reserve);
    }

    fn request(&mut self, from: End<u32>, request: Request) {
        self.relay.handle_request(from, Ok(request), (), self.now);
    }

    fn lose(&mut self, gone: End<u32>, reported: Option<u16>) {
        let over = self.open.iter().filter(|(_, source, _)| *source == gone);
        let over: Vec<_> = over.map(|(id, ..)| *id).collect();
        for id in over {
            if let Some(reported) = reported {
                self.end(id, (reported, reported / 3));
            }
        }
        self.relay.on_disconnected(gone, self.now);
        self.take_actions();
        self.up.retain(|end| *end != gone);
        if self.up.iter().all(|end| end.peer != gone.peer) {
            self.entries.push(Entry::Disconnected(gone.peer));
        }
    }

    fn end(&mut self, id: CircuitId, (to_target, to_source): (u16, u16)) {
        let mut transferred = BytesTransferred::default();
        (transferred.to_target, transferred.to_source) = (to_target.into(), to_source.into());
        self.reported.to_target += transferred.to_target;
        self.reported.to_source += transferred.to_source;
        let open = self.open.iter().find(|(open, ..)| *open == id);
        let (.., counters) = open.expect("an open circuit");
        counters.add(transferred);
        self.relay.on_circuit_ended(id, CircuitEnd::Finished, self.now);
    }

    fn take_actions(&mut self) {
        while let Some(action) = self.relay.actions.pop_front() {
            match action {
                Action::AskTarget(_, circuit) => self.pending.push((circuit.id, circuit.counters)),
                Action::Report(Event::CircuitOpened { circuit, source, target }) => {
                    self.entries.push(Entry::Opened(circuit, source, target))
                }
                Action::Report(Event::CircuitClosed { circuit, transferred, .. }) => {
                    self.open.retain(|(id, ..)| *id != circuit);
                    self.entries.push(Entry::Closed(circuit, transferred));
                }
                _ => {}
            }
        }
    }

    fn compare(&self) {
        let accounts = &self.relay.accounts;
        for peer in &self.peers {
            assert_eq!(accounts.of(peer), self.account(*peer));
        }
        let with_account = self.peers.iter().filter(|p| self.account(**p).is_some());
        assert_eq!(accounts.iter().count(), with_account.count());

        let count = |is_kind: fn(&Entry) -> bool| {
            let entries = self.entries.iter().filter(|entry| is_kind(entry));
            entries.count() as u64
        };
        let totals = accounts.totals;
        assert_eq!(totals.opened, count(|e| matches!(e, Entry::Opened(..))));
        assert_eq!(totals.closed, count(|e| matches!(e, Entry::Closed(..))));
        assert_eq!(totals.opened - totals.closed, self.open.len() as u64);
        assert_eq!(totals.transferred, self.reported);
        let mut listed: Vec<_> = self.relay.circuits.open().map(|(id, _)| id).collect();
        listed.sort();
        let mut open: Vec<_> = self.open.iter().map(|(id, ..)| *id).collect();
        open.sort();
        assert_eq!(listed, open);
    }

    /// The expected account of a peer, from the circuits that were opened since it last disconnected.
    fn account(&self, peer: PeerId) -> Option<Account> {
        let left = |entry: &Entry| matches!(entry, Entry::Disconnected(other) if *other == peer);
        let stay = self.entries.rsplit(left).next()?;
        let mut account = None;
        for entry in stay {
            let Entry::Opened(id, source, target) = entry else {
                continue;
            };
            if ![source, target].contains(&&peer) {
                continue;
            }
            let account = account.get_or_insert(Account::default());
            let closed = stay.iter().find_map(|entry| match entry {
                Entry::Closed(closed, transferred) if closed == id => Some(*transferred),
                _ => None,
            });
            let transferred = closed.unwrap_or_default();
            if *source == peer {
                account.as_source += 1;
                account.sent += transferred.to_target;
                account.received += transferred.to_source;
            } else {
                account.as_target += 1;
                account.sent += transferred.to_source;
                account.received += transferred.to_target;
            }
        }
        account
    }

    /// Disconnects every peer: no account is left, and every opened circuit has ended.
    fn disconnect_all(&mut self) {
        while let Some(gone) = self.up.first() {
            self.lose(*gone, Some(1));
            self.compare();
        }
        let accounts = &self.relay.accounts;
        assert_eq!(accounts.iter().count(), 0);
        assert_eq!(accounts.totals.opened, accounts.totals.closed);
        assert_eq!(self.relay.circuits.count(), 0);
    }
}

fn chosen<T: Clone>(all: &[T], which: usize) -> Option<T> {
    all.get(which % all.len().max(1)).cloned()
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 500,
        rng_algorithm: RngAlgorithm::XorShift,
        failure_persistence: None, // the history is printed
        ..ProptestConfig::default()
    })]

    #[test]
    fn accounts_match_the_sum_of_all_events(
        history in prop::collection::vec(step(), 1..200),
    ) {
        let mut world = World::new();
        for step in history {
            world.apply(step);
        }
        world.disconnect_all();
    }
}
