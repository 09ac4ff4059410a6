//! Shares of the link: how many payload bytes a second all circuits may carry together, and how
//! many those of one peer.
//!
//! Sans-IO. A circuit pays afterwards: it carries a piece, and carries the next one when all that was
//! carried before it, by anyone, is paid for. So everyone who wants more than there is has one piece
//! at a time in the queue, and gets as much as the others; and who wants little never waits longer
//! than one round of pieces. The queue is a single instant: when everything in it will be paid for.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use libp2p::PeerId;

use crate::config::Config;

/// How long it takes to pay for one piece of everyone who waits.
///
/// Short, because a circuit that begins carries its first piece before anyone has paid for it.
const ROUND: Duration = Duration::from_millis(50);

/// No piece gets smaller than this, in bytes, unless all of a round is: it would be mostly headers.
const LEAST_PIECE: u64 = 1024;

/// What was not used for so long may be made up for: timers come late.
const BURST: Duration = Duration::from_millis(50);

/// The link of one relay.
#[derive(Debug)]
pub struct Bandwidth {
    /// How much all circuits may carry together, and those of one peer, in bytes a second; zero: no cap.
    caps: [u64; 2],
    all: Queue,
    /// Of the peers whose circuits carried something a moment ago.
    peers: HashMap<PeerId, Queue>,
}

/// The link of one relay, which its circuits use wherever they run.
#[derive(Clone, Debug)]
pub struct Link(Arc<Mutex<Bandwidth>>);

impl Link {
    pub(crate) fn new(config: &Config, now: Instant) -> Self {
        Self(Arc::new(Mutex::new(Bandwidth::new(config, now))))
    }

    pub(crate) fn bandwidth(&self) -> MutexGuard<'_, Bandwidth> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What was carried under one cap, and is being paid for.
#[derive(Clone, Copy, Debug)]
struct Queue {
    /// When all of it will be.
    paid_at: Instant,
    /// How many circuits wait for that.
    waiting: u32,
}

/// The source and the target of a circuit.
pub type Ends = [PeerId; 2];

impl Bandwidth {
    /// Nothing was carried yet.
    pub fn new(config: &Config, now: Instant) -> Self {
        let caps = [config.bandwidth, config.bandwidth_per_peer];
        Self { caps, all: Queue::new(now), peers: HashMap::new() }
    }

    /// This configuration holds from the next piece of each circuit on.
    pub fn configure(&mut self, config: &Config, now: Instant) {
        self.caps = [config.bandwidth, config.bandwidth_per_peer];
        // What is owed was counted at the old price.
        for queue in self.peers.values_mut().chain([&mut self.all]) {
            queue.paid_at = queue.paid_at.min(now);
        }
    }

    /// How many bytes a circuit may carry at a time; `None`: there is no cap.
    pub fn piece(&self, ends: Ends) -> Option<usize> {
        let [total, per_peer] = self.caps;
        let total = self.all.piece(total);
        let of = |peer| match self.peers.get(peer) {
            Some(queue) => queue.piece(per_peer),
            None => whole_round(per_peer),
        };
        let least = ends.iter().filter_map(of).chain(total).min()?;
        Some(usize::try_from(least).unwrap_or(usize::MAX))
    }

    /// A circuit carried so many bytes. When it may carry more, if it has to wait for that: until
    /// [`Bandwidth::waited`] it counts as waiting.
    pub fn carried(&mut self, ends: Ends, bytes: usize, now: Instant) -> Option<Instant> {
        let [total, per_peer] = self.caps;
        let mut next = self.all.charge(bytes, total, now);
        if per_peer > 0 {
            for peer in ends {
                let queue = self.peers.entry(peer).or_insert(Queue::new(now));
                next = next.max(queue.charge(bytes, per_peer, now));
            }
        }
        (next > now).then(|| {
            self.each(ends, |queue| queue.waiting += 1);
            next
        })
    }

    /// A circuit that had to wait does so no longer.
    pub fn waited(&mut self, ends: Ends) {
        self.each(ends, |queue| queue.waiting = queue.waiting.saturating_sub(1));
    }

    fn each(&mut self, ends: Ends, change: impl Fn(&mut Queue)) {
        change(&mut self.all);
        for peer in ends {
            if let Some(queue) = self.peers.get_mut(&peer) {
                change(queue);
            }
        }
    }

    /// Forgets the peers who owe nothing.
    pub fn forget_paid(&mut self, now: Instant) {
        self.peers.retain(|_, queue| queue.waiting > 0 || queue.paid_at + BURST > now);
    }

    /// How many peers are remembered.
    pub fn peers(&self) -> usize {
        self.peers.len()
    }
}

impl Queue {
    fn new(now: Instant) -> Self {
        Self { paid_at: now, waiting: 0 }
    }

    /// The part of a round for one more than wait already.
    fn piece(&self, rate: u64) -> Option<u64> {
        let round = whole_round(rate)?;
        let piece = round / (u64::from(self.waiting) + 1);
        Some(piece.max(LEAST_PIECE.min(round)))
    }

    /// When these bytes will be paid for; at once, where there is no cap.
    fn charge(&mut self, bytes: usize, rate: u64, now: Instant) -> Instant {
        let nanos = (bytes as u64).saturating_mul(1_000_000_000).checked_div(rate);
        let Some(nanos) = nanos else {
            return now;
        };
        let earliest = now.checked_sub(BURST).unwrap_or(now);
        self.paid_at = self.paid_at.max(earliest) + Duration::from_nanos(nanos);
        self.paid_at
    }
}

/// How many bytes are carried in a round, at least one; `None`: there is no cap.
fn whole_round(rate: u64) -> Option<u64> {
    let rounds_per_second = 1000 / ROUND.as_millis() as u64;
    (rate > 0).then(|| (rate / rounds_per_second).max(1))
}

#[cfg(test)]
mod tests {
    use std::{cmp::Reverse, collections::BinaryHeap};

    use super::*;

    const MB: u64 = 1_000_000;

    /// A circuit that would send so many bytes a second, or any number.
    struct Circuit {
        ends: Ends,
        wants: Option<u64>,
        carried: u64,
    }

    fn caps(bandwidth: u64, bandwidth_per_peer: u64) -> Config {
        Config { bandwidth, bandwidth_per_peer, ..Config::default() }
    }

    /// Circuits over one link, and a clock of milliseconds.
    struct World {
        bandwidth: Bandwidth,
        circuits: Vec<Circuit>,
        start: Instant,
        /// How much later than it should a timer goes off.
        late: Duration,
    }

    impl World {
        fn new(total: u64, per_peer: u64) -> Self {
            let start = Instant::now();
            Self {
                bandwidth: Bandwidth::new(&caps(total, per_peer), start),
                circuits: Vec::new(),
                start,
                late: Duration::from_millis(1),
            }
        }

        fn circuit(&mut self, wants: Option<u64>) {
            self.circuit_between([PeerId::random(), PeerId::random()], wants);
        }

        fn circuit_between(&mut self, ends: Ends, wants: Option<u64>) {
            self.circuits.push(Circuit { ends, wants, carried: 0 });
        }

        /// How many bytes a second each circuit carried in so many seconds.
        fn run(&mut self, seconds: u64) -> Vec<u64> {
            let end = self.start + Duration::from_secs(seconds);
            let mut turns: BinaryHeap<_> =
                (0..self.circuits.len()).map(|who| Reverse((self.start, false, who))).collect();
            while let Some(Reverse((now, waited, who))) = turns.pop() {
                if now >= end {
                    break;
                }
                let circuit = &mut self.circuits[who];
                if waited {
                    self.bandwidth.waited(circuit.ends);
                }
                let piece = self.bandwidth.piece(circuit.ends).expect("a cap") as u64;
                let there = circuit.wants.map_or(piece, |rate| {
                    let sent = (now - self.start).as_secs_f64() * rate as f64;
                    sent as u64 - circuit.carried
                });
                let bytes = piece.min(there);
                circuit.carried += bytes;
                let next = match bytes {
                    0 => None,
                    _ => self.bandwidth.carried(circuit.ends, bytes as usize, now),
                };
                let next = match next {
                    Some(then) => (then + self.late, true, who),
                    None => (now + Duration::from_millis(1), false, who),
                };
                turns.push(Reverse(next));
            }
            let rate = |circuit: &Circuit| circuit.carried / seconds;
            self.circuits.iter().map(rate).collect()
        }
    }

    /// Jain's index: 1 where all get the same, 1/n where one gets everything.
    fn fairness(rates: &[u64]) -> f64 {
        let sum: f64 = rates.iter().map(|rate| *rate as f64).sum();
        let squares: f64 = rates.iter().map(|rate| (*rate as f64).powi(2)).sum();
        sum * sum / (rates.len() as f64 * squares)
    }

    fn within(figure: u64, goal: u64, percent: u64) -> bool {
        figure.abs_diff(goal) * 100 <= goal * percent
    }

    #[test]
    fn ten_who_want_everything_get_the_same_and_together_the_whole() {
        let mut world = World::new(MB, 0);
        (0..10).for_each(|_| world.circuit(None));
        let rates = world.run(5);
        assert!(fairness(&rates) >= 0.99, "{rates:?}");
        assert!(within(rates.iter().sum(), MB, 5), "{rates:?}");
    }

    #[test]
    fn nine_who_want_little_get_it_all_beside_one_who_wants_everything() {
        let mut world = World::new(MB, 0);
        (0..9).for_each(|_| world.circuit(Some(80_000)));
        world.circuit(None);
        let rates = world.run(5);
        let (greedy, modest) = rates.split_last().unwrap();
        assert!(modest.iter().all(|rate| within(*rate, 80_000, 2)), "{rates:?}");
        assert!(within(*greedy, MB - 9 * 80_000, 10), "{rates:?}");
        assert!(within(rates.iter().sum(), MB, 5), "{rates:?}");
    }

    #[test]
    fn one_alone_gets_the_whole_though_timers_come_late() {
        for rate in [100, MB, 1000 * MB] {
            let mut world = World::new(rate, 0);
            world.late = Duration::from_millis(15);
            world.circuit(None);
            let rates = world.run(10);
            assert!(within(rates[0], rate, 5), "{rates:?}");
        }
    }

    #[test]
    fn a_thousand_share_as_well() {
        let mut world = World::new(10 * MB, 0);
        (0..1000).for_each(|_| world.circuit(None));
        let rates = world.run(20);
        assert!(fairness(&rates) >= 0.95);
        assert!(within(rates.iter().sum(), 10 * MB, 5));
    }

    #[test]
    fn a_peer_s_circuits_share_what_a_peer_may_have_as_source_and_as_target() {
        let [alice, bob, carol] = [(); 3].map(|()| PeerId::random());
        let mut world = World::new(0, MB);
        world.circuit_between([alice, bob], None);
        world.circuit_between([carol, alice], None);
        world.circuit(None);
        let rates = world.run(5);
        assert!(within(rates[0], MB / 2, 5), "{rates:?}");
        assert!(within(rates[1], MB / 2, 5), "{rates:?}");
        assert!(within(rates[2], MB, 5), "others have theirs: {rates:?}");
    }

    #[test]
    fn who_is_held_back_by_its_own_cap_leaves_the_rest_to_others() {
        let [alice, bob] = [(); 2].map(|()| PeerId::random());
        let mut world = World::new(MB, 300_000);
        (0..8).for_each(|_| world.circuit_between([alice, bob], None));
        (0..4).for_each(|_| world.circuit(None));
        let rates = world.run(5);
        let alices: u64 = rates[..8].iter().sum();
        assert!(alices <= 310_000, "{rates:?}");
        assert!(within(rates.iter().sum(), MB, 5), "{rates:?}");
        assert!(fairness(&rates[8..]) >= 0.99, "{rates:?}");
    }

    #[test]
    fn a_byte_a_second_is_a_byte_a_second() {
        let mut world = World::new(1, 0);
        world.circuit(None);
        world.circuit(None);
        world.run(100);
        let carried: u64 = world.circuits.iter().map(|circuit| circuit.carried).sum();
        assert!((99..=103).contains(&carried), "{carried}");
        assert!(world.circuits[0].carried.abs_diff(world.circuits[1].carried) <= 2);
    }

    #[test]
    fn without_a_cap_nobody_waits_and_nothing_is_remembered() {
        let now = Instant::now();
        let ends = [PeerId::random(), PeerId::random()];
        let mut bandwidth = Bandwidth::new(&caps(0, 0), now);
        assert_eq!(bandwidth.piece(ends), None);
        assert_eq!(bandwidth.carried(ends, usize::MAX, now), None);
        assert_eq!(bandwidth.peers(), 0);
        // The largest there is does not overflow either.
        bandwidth.configure(&caps(u64::MAX, u64::MAX), now);
        assert!(bandwidth.piece(ends).is_some());
        assert_eq!(bandwidth.carried(ends, 65_536, now), None);
    }

    #[test]
    fn who_owes_nothing_is_forgotten_and_who_waits_is_not() {
        let now = Instant::now();
        let ends = [PeerId::random(), PeerId::random()];
        let mut bandwidth = Bandwidth::new(&caps(0, 10), now);
        let next = bandwidth.carried(ends, 20, now).expect("it has to wait");
        bandwidth.forget_paid(next + BURST);
        assert_eq!(bandwidth.peers(), 2);
        bandwidth.waited(ends);
        bandwidth.forget_paid(next);
        assert_eq!(bandwidth.peers(), 2);
        bandwidth.forget_paid(next + BURST);
        assert_eq!(bandwidth.peers(), 0);
    }

    #[test]
    fn a_new_price_is_not_asked_for_what_was_carried_before() {
        let now = Instant::now();
        let ends = [PeerId::random(), PeerId::random()];
        let mut bandwidth = Bandwidth::new(&caps(1, 0), now);
        assert!(bandwidth.carried(ends, 1000, now).is_some());
        bandwidth.configure(&caps(MB, 0), now);
        bandwidth.waited(ends);
        let next = bandwidth.carried(ends, 1000, now);
        assert_eq!(next, Some(now + Duration::from_millis(1)));
    }
}
