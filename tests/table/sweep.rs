//! What a sweep costs, at three sizes, with everybody reserved and idle: while they answer when they
//! are asked, and while they do not and as many newcomers as may wait for their slots.

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

/// The program's.
const IDLE_TIMEOUT: Duration = Duration::from_secs(60);

/// After so many seconds the first questions have been asked and answered.
const SETTLED: usize = 30;
const ROUNDS: usize = 30;

/// As many as may.
const NEWCOMERS: usize = 64;

/// By then all have been silent for long enough to be asked for a newcomer, and not for so long that
/// they are asked anyway.
const SILENT: usize = 15;

/// So many ticks, and nobody has waited for as long as the probe takes.
const TICKS: usize = 29;

/// A relay whose slots are all taken.
struct Full {
    relay: Relay<usize, ()>,
    signs: Vec<ActivityCounter>,
    now: Instant,
    /// Whether its peers answer when they are asked.
    answers: bool,
}

impl Full {
    fn of(size: usize) -> Self {
        let now = Instant::now();
        let mut config = Config::default();
        config.max_reservations = size;
        config.idle_timeout = IDLE_TIMEOUT;
        let mut full = Self {
            relay: Relay::new(config, now).expect("it makes sense"),
            signs: Vec::new(),
            now,
            answers: true,
        };
        (0..size).for_each(|number| full.asks_for_a_slot(&Peer::number(number)));
        full.carry_out();
        full
    }

    fn asks_for_a_slot(&mut self, peer: &Peer) {
        let (id, now) = (peer.connection, self.now);
        let address = Multiaddr::from(peer.address).with(Protocol::Tcp(4001));
        let connection = Connection::new(peer.id, address, false, id as u8, now);
        self.relay.connections.add(id, connection);
        // The handler's, and the transport's.
        let heard = [ActivityCounter::default(), ActivityCounter::default()];
        for signs in &heard {
            self.relay.connections.get_mut(id).unwrap().track(signs.clone());
        }
        self.signs.extend(heard.into_iter().last());
        let from = End { peer: peer.id, connection: id };
        self.relay.handle_request(from, Ok(Request::Reserve), (), now);
    }

    /// Everybody has fallen silent, and somebody waits.
    fn freeze(&mut self) {
        self.answers = false;
        for _ in 0..SILENT {
            self.sweep_after(Duration::from_secs(1));
        }
        let first = self.signs.len();
        for number in first..first + NEWCOMERS {
            self.asks_for_a_slot(&Peer::number(number));
        }
    }

    /// Time passes, and there is one sweep; what it took, in milliseconds.
    fn sweep_after(&mut self, time: Duration) -> f64 {
        self.now += time;
        let time = cpu_time(|| self.relay.sweep(self.now));
        self.carry_out();
        time.as_secs_f64() * 1e3
    }

    fn carry_out(&mut self) {
        while let Some(action) = self.relay.actions.pop_front() {
            match action {
                Action::Grant { request, receipt, .. } => {
                    self.relay.on_delivered(request.from.peer, receipt, true, self.now);
                }
                Action::Probe(to, _) if self.answers => self.signs[to.connection].add(1),
                Action::Probe(..)
                | Action::Refuse(..)
                | Action::Hold(..)
                | Action::Report(Event::ReservationAccepted { .. }) => {}
                other => panic!("nobody leaves: {other:?}"),
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
        assert_eq!(full.relay.waiting.len(), NEWCOMERS, "all the time");
    }
    times
}

/// So many sweeps of each.
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
