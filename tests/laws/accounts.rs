//! Random histories of circuits, whose accounts are read beside a list of all that happened.

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

/// Few, so that they meet again.
const PEERS: usize = 4;

/// One step of a history. `which` chooses among those that there are.
#[derive(Clone, Debug)]
enum Step {
    /// A peer comes, or opens one more connection, and reserves.
    Come { peer: usize },
    /// A connection is lost; the circuits over it end first, unless they never came to carry anything.
    Lose { which: usize, said: Option<u16> },
    /// Over one connection, to a peer.
    Connect { which: usize, target: usize },
    /// A target that was asked answers.
    Answer { which: usize, agrees: bool },
    /// An open circuit ends, be it that one of its peers is long gone.
    End { which: usize, carried: (u16, u16) },
}

fn step() -> impl Strategy<Value = Step> {
    let which = 0..64usize;
    prop_oneof![
        3 => (0..PEERS).prop_map(|peer| Step::Come { peer }),
        3 => (which.clone(), any::<Option<u16>>())
            .prop_map(|(which, said)| Step::Lose { which, said }),
        6 => (which.clone(), 0..PEERS)
            .prop_map(|(which, target)| Step::Connect { which, target }),
        6 => (which.clone(), prop::bool::weighted(0.8))
            .prop_map(|(which, agrees)| Step::Answer { which, agrees }),
        3 => (which, any::<(u16, u16)>()).prop_map(|(which, carried)| Step::End { which, carried }),
    ]
}

#[derive(Debug)]
enum Happened {
    /// The peer's last connection was lost.
    Left(PeerId),
    Opened(CircuitId, PeerId, PeerId),
    Closed(CircuitId, BytesTransferred),
}

/// The relay, without sockets, and those who use it.
struct World {
    relay: Relay<u32, ()>,
    now: Instant,
    peers: Vec<PeerId>,
    up: Vec<End<u32>>,
    /// Circuits whose targets were asked.
    asked: Vec<(CircuitId, Counters)>,
    /// Circuits that are open, the connections of their sources, and where their bytes are counted.
    open: Vec<(CircuitId, End<u32>, Counters)>,
    happened: Vec<Happened>,
    /// What the circuits that ended carried.
    said: BytesTransferred,
    names: u32,
}

impl World {
    fn new() -> Self {
        let mut config = Config::default();
        config.max_reservations_per_ip = Some(0);
        config.reserve_rate = 0;
        config.connect_rate = 0;
        let now = Instant::now();
        Self {
            relay: Relay::new(config, now).expect("it makes sense"),
            now,
            peers: (0..PEERS).map(|_| PeerId::random()).collect(),
            up: Vec::new(),
            asked: Vec::new(),
            open: Vec::new(),
            happened: Vec::new(),
            said: BytesTransferred::default(),
            names: 0,
        }
    }

    fn name(&mut self) -> u32 {
        self.names += 1;
        self.names
    }

    fn live_through(&mut self, step: Step) {
        match step {
            Step::Come { peer } => self.come(self.peers[peer]),
            Step::Lose { which, said } => {
                if let Some(gone) = chosen(&self.up, which) {
                    self.lose(gone, said);
                }
            }
            Step::Connect { which, target } => {
                let target = self.peers[target];
                let from = chosen(&self.up, which);
                if let Some(from) = from.filter(|from| from.peer != target) {
                    self.request(from, Request::Connect(target));
                }
            }
            Step::Answer { which, agrees } => {
                if let Some((id, counters)) = chosen(&self.asked, which) {
                    self.asked.retain(|(other, _)| *other != id);
                    let answer = agrees.then_some(()).ok_or(StopFailed::Unsupported);
                    let Some(circuit) = self.relay.circuits.get(id) else {
                        return;
                    };
                    let (source, over) = (circuit.source, circuit.target.connection);
                    let opened = self.relay.on_target_answered(id, over, answer, self.now);
                    if opened.is_some() {
                        self.open.push((id, source, counters));
                    }
                }
            }
            Step::End { which, carried } => {
                if let Some((id, ..)) = self.open.get(which % self.open.len().max(1)) {
                    self.end(*id, carried);
                }
            }
        }
        self.carry_out();
        self.compare();
    }

    fn come(&mut self, peer: PeerId) {
        let connection = self.name();
        let end = End { peer, connection };
        let address: Multiaddr = "/ip4/10.0.0.1/tcp/1".parse().expect("an address");
        let new = Connection::new(peer, address, false, 0, self.now);
        self.relay.connections.add(connection, new);
        self.up.push(end);
        self.request(end, Request::Reserve);
    }

    fn request(&mut self, from: End<u32>, asked: Request) {
        self.relay.handle_request(from, Ok(asked), (), self.now);
    }

    fn lose(&mut self, gone: End<u32>, said: Option<u16>) {
        let over = self.open.iter().filter(|(_, source, _)| *source == gone);
        let over: Vec<_> = over.map(|(id, ..)| *id).collect();
        for id in over {
            if let Some(said) = said {
                self.end(id, (said, said / 3));
            }
        }
        self.relay.on_disconnected(gone, self.now);
        self.carry_out();
        self.up.retain(|end| *end != gone);
        if self.up.iter().all(|end| end.peer != gone.peer) {
            self.happened.push(Happened::Left(gone.peer));
        }
    }

    fn end(&mut self, id: CircuitId, (to_target, to_source): (u16, u16)) {
        let mut carried = BytesTransferred::default();
        (carried.to_target, carried.to_source) = (to_target.into(), to_source.into());
        self.said.to_target += carried.to_target;
        self.said.to_source += carried.to_source;
        let open = self.open.iter().find(|(open, ..)| *open == id);
        let (.., counters) = open.expect("it is open");
        counters.add(carried);
        self.relay.on_circuit_ended(id, CircuitEnd::Finished, self.now);
    }

    fn carry_out(&mut self) {
        while let Some(action) = self.relay.actions.pop_front() {
            match action {
                Action::AskTarget(_, circuit) => self.asked.push((circuit.id, circuit.counters)),
                Action::Report(Event::CircuitOpened { circuit, source, target }) => {
                    self.happened.push(Happened::Opened(circuit, source, target))
                }
                Action::Report(Event::CircuitClosed { circuit, transferred: carried, .. }) => {
                    self.open.retain(|(id, ..)| *id != circuit);
                    self.happened.push(Happened::Closed(circuit, carried));
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
        let have = self.peers.iter().filter(|p| self.account(**p).is_some());
        assert_eq!(accounts.iter().count(), have.count());

        let count = |what: fn(&Happened) -> bool| {
            let those = self.happened.iter().filter(|happened| what(happened));
            those.count() as u64
        };
        let totals = accounts.totals;
        assert_eq!(totals.opened, count(|h| matches!(h, Happened::Opened(..))));
        assert_eq!(totals.closed, count(|h| matches!(h, Happened::Closed(..))));
        assert_eq!(totals.opened - totals.closed, self.open.len() as u64);
        assert_eq!(totals.transferred, self.said);
        let mut metered: Vec<_> = self.relay.circuits.open().map(|(id, _)| id).collect();
        metered.sort();
        let mut open: Vec<_> = self.open.iter().map(|(id, ..)| *id).collect();
        open.sort();
        assert_eq!(metered, open);
    }

    /// What a peer's account should be: of the circuits that were opened since it last left.
    fn account(&self, peer: PeerId) -> Option<Account> {
        let left = |happened: &Happened| matches!(happened, Happened::Left(who) if *who == peer);
        let stay = self.happened.rsplit(left).next()?;
        let mut account = None;
        for happened in stay {
            let Happened::Opened(id, source, target) = happened else {
                continue;
            };
            if ![source, target].contains(&&peer) {
                continue;
            }
            let account = account.get_or_insert(Account::default());
            let closed = stay.iter().find_map(|happened| match happened {
                Happened::Closed(closed, carried) if closed == id => Some(*carried),
                _ => None,
            });
            let carried = closed.unwrap_or_default();
            if *source == peer {
                account.as_source += 1;
                account.sent += carried.to_target;
                account.received += carried.to_source;
            } else {
                account.as_target += 1;
                account.sent += carried.to_source;
                account.received += carried.to_target;
            }
        }
        account
    }

    /// With everyone gone there is no account left, and every circuit that was opened has ended.
    fn end_it(&mut self) {
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
        failure_persistence: None, // it prints the history
        ..ProptestConfig::default()
    })]

    #[test]
    fn the_accounts_are_what_the_list_of_all_that_happened_adds_up_to(
        history in prop::collection::vec(step(), 1..200),
    ) {
        let mut world = World::new();
        for step in history {
            world.live_through(step);
        }
        world.end_it();
    }
}
