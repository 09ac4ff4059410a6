//! The cost of a sweep, at three sizes, with all slots taken by idle peers: while they answer probes, and while they do
//! not and the most newcomers wait for their slots.

use std::time::{Duration, Instant};

use libp2p::{Multiaddr, multiaddr::Protocol};
use relaylet::{
    ActivityCounter, Config, Event,
    relay::{
        Action, Relay,
        connections::{Connection, End},
        reclaim::TICK,
    },
    wire::Request,
};

use super::{
    clock::{Caches, Samples, cpu_time},
    peer::Peer,
};

const SIZES: [usize; 3] = [1_000, 10_000, 100_000];

/// The program's default.
const IDLE_TIMEOUT: Duration = Duration::from_secs(60);

/// After this many seconds the first probes have been sent and answered.
const SETTLED: usize = 30;
const ROUNDS: usize = 30;

/// The most that may wait.
const NEWCOMERS: usize = 64;

/// After this many seconds all peers have been silent long enough to be probed for a newcomer, and not yet for the
/// heartbeat.
const SILENT: usize = 15;

/// In this many sweeps no newcomer waits for the whole probe time.
const TICKS: usize = 29;

/// A relay with a full table.
struct Full {
    relay: Relay<usize, ()>,
    activity: Vec<ActivityCounter>,
    now: Instant,
    /// Whether its peers answer probes.
    answers: bool,
}

impl Full {
    fn of(size: usize) -> Self {
        let now = Instant::now();
        let mut config = Config::default();
        config.close_silent = true; // as in the program
        config.max_reservations = size;
        config.idle_timeout = IDLE_TIMEOUT;
        let mut full = Self {
            relay: Relay::new(config, now).expect("a valid configuration"),
            activity: Vec::new(),
            now,
            answers: true,
        };
        (0..size).for_each(|number| full.reserve(&Peer::number(number)));
        full.take_actions();
        full
    }

    fn reserve(&mut self, peer: &Peer) {
        let (id, now) = (peer.connection, self.now);
        let address = Multiaddr::from(peer.address).with(Protocol::Tcp(4001));
        let connection = Connection::new(peer.id, address, false, id as u8, now);
        self.relay.connections.add(id, connection);
        // The counters of the handler and of the transport.
        let counters = [ActivityCounter::default(), ActivityCounter::default()];
        for activity in &counters {
            self.relay.connections.get_mut(id).unwrap().track(activity.clone());
        }
        self.activity.extend(counters.into_iter().last());
        let from = End { peer: peer.id, connection: id };
        self.relay.handle_request(from, Ok(Request::Reserve), (), now);
    }

    /// All peers are silent from now on, and newcomers wait.
    fn freeze(&mut self) {
        self.answers = false;
        for _ in 0..SILENT {
            self.sweep_after(Duration::from_secs(1));
        }
        let first = self.activity.len();
        for number in first..first + NEWCOMERS {
            self.reserve(&Peer::number(number));
        }
    }

    /// Lets time pass, and runs one sweep; returns how long it took, in milliseconds.
    fn sweep_after(&mut self, time: Duration) -> f64 {
        self.now += time;
        let time = cpu_time(|| self.relay.sweep(self.now));
        self.take_actions();
        time.as_secs_f64() * 1e3
    }

    fn take_actions(&mut self) {
        while let Some(action) = self.relay.actions.pop_front() {
            match action {
                Action::Grant { request, receipt, .. } => {
                    self.relay.on_delivered(request.from.peer, receipt, true, self.now);
                }
                Action::Probe(to, _) if self.answers => self.activity[to.connection].add(1),
                Action::Probe(..)
                | Action::Refuse(..)
                | Action::Hold(..)
                | Action::Report(Event::ReservationAccepted { .. }) => {}
                other => panic!("unexpected: {other:?}"),
            }
        }
    }
}

type Row = [Samples; SIZES.len()];

pub fn measure() {
    println!("\nOne sweep: ms of CPU, the median (and the middle half).");
    println!("\n| all slots taken | 1k slots | 10k | 100k | ns a slot at 100k |");
    println!("| --- | --- | --- | --- | --- |");
    print("all answer", while_all_answer());
    let waiting = format!("none answers, and {NEWCOMERS} newcomers wait");
    print(&waiting, while_newcomers_wait());
}

fn while_all_answer() -> Row {
    let mut relays = SIZES.map(Full::of);
    measure_in_turn(&mut relays, SETTLED, Duration::from_secs(1));
    measure_in_turn(&mut relays, ROUNDS, Duration::from_secs(1))
}

fn while_newcomers_wait() -> Row {
    let mut relays = SIZES.map(Full::of);
    relays.iter_mut().for_each(Full::freeze);
    let times = measure_in_turn(&mut relays, TICKS, TICK);
    for full in &relays {
        assert_eq!(full.relay.waiting.len(), NEWCOMERS, "all of them still wait");
    }
    times
}

/// Runs this many sweeps of each relay in turn.
fn measure_in_turn(relays: &mut [Full; SIZES.len()], sweeps: usize, every: Duration) -> Row {
    let mut caches = Caches::new();
    let mut times = Row::default();
    for _ in 0..sweeps {
        for (relay, times) in relays.iter_mut().zip(&mut times) {
            caches.evict();
            times.push(relay.sweep_after(every));
        }
    }
    times
}

fn print(what: &str, [small, middle, large]: Row) {
    let each = large.median() * 1e6 / SIZES[2] as f64;
    println!("| {what} | {small} | {middle} | {large} | {each:.0} |");
}
