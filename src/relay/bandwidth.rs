//! Fair queueing of the link: how many payload bytes a second all circuits may carry together, and how many those of
//! one peer.
//!
//! Sans-IO. A circuit is charged for a quantum after transferring it, and may transfer the next one once everything
//! that was charged before, to any circuit, is paid for. A new circuit waits for that, too. So each circuit that wants
//! more than its fair share has one quantum at a time in the queue and gets as much as the others; one that wants less
//! waits for one round at most. The queue is a single instant: when everything in it will be paid for.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use libp2p::PeerId;

use crate::config::Config;

/// How long it takes to pay for one quantum of each circuit that waits.
///
/// Short, because a new circuit waits for about as long.
const ROUND: Duration = Duration::from_millis(50);

/// The smallest quantum, in bytes: a smaller one would be mostly headers. A round that is smaller is one quantum.
const LEAST_QUANTUM: u64 = 1024;

/// Bandwidth that was not used for up to this long may be used later: timers fire late.
const BURST: Duration = Duration::from_millis(50);

/// The bandwidth of one relay; an unused link without caps by default.
#[derive(Debug, Default)]
pub struct Bandwidth {
    /// The caps of all circuits together and of those of one peer, in bytes a second; zero: no cap.
    caps: [u64; 2],
    /// One for all circuits (`None`) and one for each peer, of those that transferred bytes recently.
    queues: HashMap<Option<PeerId>, Queue>,
}

/// The bandwidth of one relay, shared by its circuits wherever they run.
#[derive(Clone, Debug, Default)]
pub struct Link(Arc<Mutex<Bandwidth>>);

impl Link {
    pub(crate) fn lock(&self) -> MutexGuard<'_, Bandwidth> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The bytes charged to one cap that are not paid for yet.
#[derive(Clone, Copy, Debug)]
struct Queue {
    /// When all of it will be paid for.
    paid_at: Instant,
    /// How many circuits wait for that.
    waiting: u32,
}

impl Bandwidth {
    /// Replaces the caps, from the next quantum of each circuit on.
    pub fn configure(&mut self, config: &Config, now: Instant) {
        self.caps = [config.bandwidth, config.bandwidth_per_peer];
        // Forgive what is not paid for yet: it was charged under the old caps.
        for queue in self.queues.values_mut() {
            queue.paid_at = queue.paid_at.min(now);
        }
    }

    /// The queues that a circuit between these two peers is charged to, and the cap of each.
    fn capped(&self, ends: [PeerId; 2]) -> impl Iterator<Item = (Option<PeerId>, u64)> + use<> {
        let [total, per_peer] = self.caps;
        let of_peers = ends.map(|peer| (Some(peer), per_peer));
        [(None, total)].into_iter().chain(of_peers).filter(|(_, rate)| *rate > 0)
    }

    /// How many bytes a circuit between these two peers may carry at a time; `None`: no cap.
    pub fn quantum(&self, ends: [PeerId; 2]) -> Option<usize> {
        let rounds_per_second = 1000 / ROUND.as_millis() as u64;
        // An equal share of a round for each circuit that waits and for this one.
        let quanta = self.capped(ends).map(|(key, rate)| {
            let waiting = self.queues.get(&key).map_or(0, |queue| queue.waiting);
            let round = (rate / rounds_per_second).max(1);
            (round / (u64::from(waiting) + 1)).max(LEAST_QUANTUM.min(round))
        });
        Some(usize::try_from(quanta.min()?).unwrap_or(usize::MAX))
    }

    /// Charges a circuit for bytes that it transferred. Returns when it may transfer more, if it has to wait; it then
    /// counts as waiting until [`Bandwidth::count_waiting`] is called with -1.
    pub fn charge(&mut self, ends: [PeerId; 2], bytes: usize, now: Instant) -> Option<Instant> {
        let earliest = now.checked_sub(BURST).unwrap_or(now);
        let mut next = now;
        for (key, rate) in self.capped(ends) {
            let queue = self.queues.entry(key).or_insert(Queue { paid_at: earliest, waiting: 0 });
            let nanos = (bytes as u64).saturating_mul(1_000_000_000) / rate;
            queue.paid_at = queue.paid_at.max(earliest) + Duration::from_nanos(nanos);
            next = next.max(queue.paid_at);
        }
        if next <= now {
            return None;
        }
        self.count_waiting(ends, 1);
        Some(next)
    }

    /// Counts a circuit that waits, or with -1 the end of its wait.
    pub fn count_waiting(&mut self, ends: [PeerId; 2], by: i32) {
        for key in [None].into_iter().chain(ends.map(Some)) {
            if let Some(queue) = self.queues.get_mut(&key) {
                queue.waiting = queue.waiting.saturating_add_signed(by);
            }
        }
    }

    /// How many queues are kept.
    #[cfg(test)]
    pub fn queues(&self) -> usize {
        self.queues.len()
    }

    /// Removes the queues whose bytes are all paid for.
    pub fn forget_paid(&mut self, now: Instant) {
        self.queues.retain(|_, queue| queue.waiting > 0 || queue.paid_at + BURST > now);
    }
}

#[cfg(test)]
mod tests {
    use std::{cmp::Reverse, collections::BinaryHeap};

    use super::*;

    const MB: u64 = 1_000_000;

    /// A circuit that would send `wants` bytes a second; as many as it can if `None`.
    struct Circuit {
        ends: [PeerId; 2],
        wants: Option<u64>,
        transferred: u64,
    }

    /// An unused link with these caps.
    fn bandwidth(total: u64, per_peer: u64) -> Bandwidth {
        let mut bandwidth = Bandwidth::default();
        bandwidth.configure(&caps(total, per_peer), Instant::now());
        bandwidth
    }

    fn caps(bandwidth: u64, bandwidth_per_peer: u64) -> Config {
        Config { bandwidth, bandwidth_per_peer, ..Config::default() }
    }

    /// Circuits over one link, with a simulated clock that ticks in milliseconds.
    struct Simulation {
        bandwidth: Bandwidth,
        circuits: Vec<Circuit>,
        start: Instant,
        /// How late timers fire.
        timer_delay: Duration,
    }

    impl Simulation {
        fn new(total: u64, per_peer: u64) -> Self {
            let start = Instant::now();
            Self {
                bandwidth: bandwidth(total, per_peer),
                circuits: Vec::new(),
                start,
                timer_delay: Duration::from_millis(1),
            }
        }

        fn add_circuit(&mut self, wants: Option<u64>) {
            self.add_circuit_between([PeerId::random(), PeerId::random()], wants);
        }

        fn add_circuit_between(&mut self, ends: [PeerId; 2], wants: Option<u64>) {
            self.circuits.push(Circuit { ends, wants, transferred: 0 });
        }

        /// Runs for `seconds`; returns the rate of each circuit in bytes per second.
        fn run(&mut self, seconds: u64) -> Vec<u64> {
            let end = self.start + Duration::from_secs(seconds);
            let mut events: BinaryHeap<_> =
                (0..self.circuits.len()).map(|index| Reverse((self.start, false, index))).collect();
            while let Some(Reverse((now, waited, index))) = events.pop() {
                if now >= end {
                    break;
                }
                let circuit = &mut self.circuits[index];
                if waited {
                    self.bandwidth.count_waiting(circuit.ends, -1);
                }
                let quantum = self.bandwidth.quantum(circuit.ends).expect("a cap") as u64;
                let available = circuit.wants.map_or(quantum, |rate| {
                    let sent = (now - self.start).as_secs_f64() * rate as f64;
                    sent as u64 - circuit.transferred
                });
                let bytes = quantum.min(available);
                circuit.transferred += bytes;
                let next = match bytes {
                    0 => None,
                    _ => self.bandwidth.charge(circuit.ends, bytes as usize, now),
                };
                let next = match next {
                    Some(then) => (then + self.timer_delay, true, index),
                    None => (now + Duration::from_millis(1), false, index),
                };
                events.push(Reverse(next));
            }
            let rate = |circuit: &Circuit| circuit.transferred / seconds;
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
    fn ten_greedy_circuits_share_the_link_equally_and_fully() {
        let mut simulation = Simulation::new(MB, 0);
        (0..10).for_each(|_| simulation.add_circuit(None));
        let rates = simulation.run(5);
        assert!(fairness(&rates) >= 0.99, "{rates:?}");
        assert!(within(rates.iter().sum(), MB, 5), "{rates:?}");
    }

    #[test]
    fn nine_light_circuits_are_not_slowed_by_a_greedy_one() {
        let mut simulation = Simulation::new(MB, 0);
        (0..9).for_each(|_| simulation.add_circuit(Some(80_000)));
        simulation.add_circuit(None);
        let rates = simulation.run(5);
        let (greedy, light) = rates.split_last().unwrap();
        assert!(light.iter().all(|rate| within(*rate, 80_000, 2)), "{rates:?}");
        assert!(within(*greedy, MB - 9 * 80_000, 10), "{rates:?}");
        assert!(within(rates.iter().sum(), MB, 5), "{rates:?}");
    }

    #[test]
    fn a_single_circuit_gets_the_whole_link_despite_late_timers() {
        for rate in [100, MB, 1000 * MB] {
            let mut simulation = Simulation::new(rate, 0);
            simulation.timer_delay = Duration::from_millis(15);
            simulation.add_circuit(None);
            let rates = simulation.run(10);
            assert!(within(rates[0], rate, 5), "{rates:?}");
        }
    }

    #[test]
    fn a_thousand_circuits_share_the_link_equally() {
        let mut simulation = Simulation::new(10 * MB, 0);
        (0..1000).for_each(|_| simulation.add_circuit(None));
        let rates = simulation.run(20);
        assert!(fairness(&rates) >= 0.95);
        assert!(within(rates.iter().sum(), 10 * MB, 5));
    }

    #[test]
    fn the_per_peer_rate_is_shared_by_circuits_in_both_roles() {
        let [alice, bob, carol] = [(); 3].map(|()| PeerId::random());
        let mut simulation = Simulation::new(0, MB);
        simulation.add_circuit_between([alice, bob], None);
        simulation.add_circuit_between([carol, alice], None);
        simulation.add_circuit(None);
        let rates = simulation.run(5);
        assert!(within(rates[0], MB / 2, 5), "{rates:?}");
        assert!(within(rates[1], MB / 2, 5), "{rates:?}");
        assert!(within(rates[2], MB, 5), "other peers are not limited: {rates:?}");
    }

    #[test]
    fn bandwidth_unused_by_a_capped_peer_goes_to_others() {
        let [alice, bob] = [(); 2].map(|()| PeerId::random());
        let mut simulation = Simulation::new(MB, 300_000);
        (0..8).for_each(|_| simulation.add_circuit_between([alice, bob], None));
        (0..4).for_each(|_| simulation.add_circuit(None));
        let rates = simulation.run(5);
        let alices: u64 = rates[..8].iter().sum();
        assert!(alices <= 310_000, "{rates:?}");
        assert!(within(rates.iter().sum(), MB, 5), "{rates:?}");
        assert!(fairness(&rates[8..]) >= 0.99, "{rates:?}");
    }

    #[test]
    fn a_rate_of_one_byte_per_second_is_exact() {
        let mut simulation = Simulation::new(1, 0);
        simulation.add_circuit(None);
        simulation.add_circuit(None);
        simulation.run(100);
        let transferred: u64 = simulation.circuits.iter().map(|circuit| circuit.transferred).sum();
        assert!((99..=103).contains(&transferred), "{transferred}");
        assert!(
            simulation.circuits[0].transferred.abs_diff(simulation.circuits[1].transferred) <= 2
        );
    }

    #[test]
    fn without_a_cap_nothing_waits_and_no_state_is_kept() {
        let now = Instant::now();
        let ends = [PeerId::random(), PeerId::random()];
        let mut bandwidth = bandwidth(0, 0);
        assert_eq!(bandwidth.quantum(ends), None);
        assert_eq!(bandwidth.charge(ends, usize::MAX, now), None);
        assert_eq!(bandwidth.queues.len(), 0);
        // The highest cap does not overflow.
        bandwidth.configure(&caps(u64::MAX, u64::MAX), now);
        assert!(bandwidth.quantum(ends).is_some());
        assert_eq!(bandwidth.charge(ends, 65_536, now), None);
    }

    #[test]
    fn a_quantum_is_the_share_of_a_round_and_no_mere_header() {
        let ends = [PeerId::random(), PeerId::random()];
        for (rate, waiting, expected) in
            [(MB, 0, 50_000), (MB, 4, 10_000), (MB, 99, LEAST_QUANTUM), (1000, 4, 50), (1, 9, 1)]
        {
            let (mut bandwidth, now) = (bandwidth(rate, 0), Instant::now());
            bandwidth.charge(ends, 0, now);
            bandwidth.count_waiting(ends, waiting);
            assert_eq!(bandwidth.quantum(ends), Some(expected as usize), "{waiting} of {rate}");
        }
    }

    #[test]
    fn paid_queues_are_removed_unless_a_circuit_waits() {
        let now = Instant::now();
        let ends = [PeerId::random(), PeerId::random()];
        let mut bandwidth = bandwidth(0, 10);
        let next = bandwidth.charge(ends, 20, now).expect("a cap of 10 bytes per second");
        bandwidth.forget_paid(next + BURST);
        assert_eq!(bandwidth.queues.len(), 2);
        bandwidth.count_waiting(ends, -1);
        bandwidth.forget_paid(next);
        assert_eq!(bandwidth.queues.len(), 2);
        bandwidth.forget_paid(next + BURST);
        assert_eq!(bandwidth.queues.len(), 0);
    }

    #[test]
    fn a_new_cap_does_not_apply_to_bytes_already_transferred() {
        let now = Instant::now();
        let ends = [PeerId::random(), PeerId::random()];
        let mut bandwidth = bandwidth(1, 0);
        assert!(bandwidth.charge(ends, 1000, now).is_some());
        bandwidth.configure(&caps(MB, 0), now);
        bandwidth.count_waiting(ends, -1);
        let next = bandwidth.charge(ends, 1000, now);
        assert_eq!(next, Some(now + Duration::from_millis(1)));
    }
}
