//! The rates of circuits.
//!
//! Sans-IO. A rate is the number of bytes transferred since the previous update, divided by the time since then.

use std::{collections::HashMap, time::Instant};

use crate::event::{BytesTransferred, CircuitId};

/// The rate of each circuit.
#[derive(Debug, Default)]
pub struct Speeds(HashMap<CircuitId, Speed>);

/// The rate of one counter.
#[derive(Debug)]
pub struct Speed {
    carried: BytesTransferred,
    at: Instant,
    rate: BytesTransferred,
}

impl Speeds {
    /// Updates the rate of a circuit that was opened at `since` and has transferred `carried` bytes. Returns the rate.
    pub fn update(
        &mut self,
        id: CircuitId,
        since: Instant,
        carried: BytesTransferred,
        now: Instant,
    ) -> BytesTransferred {
        self.0.entry(id).or_insert_with(|| Speed::new(since)).update(carried, now)
    }

    /// Forgets the circuits that have ended.
    pub fn forget(&mut self, is_open: impl Fn(CircuitId) -> bool) {
        self.0.retain(|id, _| is_open(*id));
    }
}

impl Speed {
    /// The rate of a counter that is zero now.
    pub fn new(now: Instant) -> Self {
        Self { carried: BytesTransferred::default(), at: now, rate: BytesTransferred::default() }
    }

    /// Returns the bytes a second between the last two updates.
    pub fn rate(&self) -> BytesTransferred {
        self.rate
    }

    /// Updates the rate, given the bytes transferred so far. Returns the rate.
    pub fn update(&mut self, carried: BytesTransferred, now: Instant) -> BytesTransferred {
        let time = now.saturating_duration_since(self.at).as_secs_f64();
        if time > 0.0 {
            let rate =
                |before: u64, after: u64| (after.saturating_sub(before) as f64 / time) as u64;
            self.rate = BytesTransferred {
                to_target: rate(self.carried.to_target, carried.to_target),
                to_source: rate(self.carried.to_source, carried.to_source),
            };
            (self.carried, self.at) = (carried, now);
        }
        self.rate
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn carried(to_target: u64, to_source: u64) -> BytesTransferred {
        BytesTransferred { to_target, to_source }
    }

    #[test]
    fn a_rate_covers_the_bytes_since_the_previous_update() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut speed = Speed::new(start);
        assert_eq!(speed.update(carried(0, 0), start), carried(0, 0));
        assert_eq!(speed.update(carried(100, 10), at(1)), carried(100, 10));
        assert_eq!(speed.update(carried(500, 10), at(3)), carried(200, 0));
        assert_eq!(speed.update(carried(500, 10), at(3)), carried(200, 0), "at once again");
        assert_eq!(speed.update(carried(500, 10), at(4)), carried(0, 0));
    }

    #[test]
    fn the_first_rate_of_a_circuit_covers_its_bytes_since_it_opened() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let (id, mut speeds) = (CircuitId(1), Speeds::default());
        assert_eq!(speeds.update(id, start, carried(30, 3), at(3)), carried(10, 1));
        assert_eq!(speeds.update(id, start, carried(30, 4), at(4)), carried(0, 1));
        speeds.forget(|_| false);
        assert!(speeds.0.is_empty());
    }
}
