//! How fast circuits go.
//!
//! Sans-IO. Looked at now and then; a rate is what was carried since the look before.

use std::{collections::HashMap, time::Instant};

use crate::event::{Carried, CircuitId};

/// That of each circuit that was looked at.
#[derive(Debug, Default)]
pub struct Speeds(HashMap<CircuitId, Speed>);

/// How fast something goes that is looked at now and then.
#[derive(Debug)]
pub struct Speed {
    carried: Carried,
    at: Instant,
    rate: Carried,
}

impl Speeds {
    /// Looks at a circuit that is open since then, with what it has carried so far; returns the rate.
    pub fn look(
        &mut self,
        id: CircuitId,
        since: Instant,
        carried: Carried,
        now: Instant,
    ) -> Carried {
        self.0.entry(id).or_insert_with(|| Speed::new(since)).look(carried, now)
    }

    /// Forgets the circuits that have ended.
    pub fn forget(&mut self, is_open: impl Fn(CircuitId) -> bool) {
        self.0.retain(|id, _| is_open(*id));
    }
}

impl Speed {
    /// Of something that begins now.
    pub fn new(now: Instant) -> Self {
        Self { carried: Carried::default(), at: now, rate: Carried::default() }
    }

    /// How many bytes a second it was between the last two looks.
    pub fn rate(&self) -> Carried {
        self.rate
    }

    /// So much was carried by now; what that makes the rate.
    pub fn look(&mut self, carried: Carried, now: Instant) -> Carried {
        let time = now.saturating_duration_since(self.at).as_secs_f64();
        if time > 0.0 {
            let rate =
                |before: u64, after: u64| (after.saturating_sub(before) as f64 / time) as u64;
            self.rate = Carried {
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

    fn carried(to_target: u64, to_source: u64) -> Carried {
        Carried { to_target, to_source }
    }

    #[test]
    fn a_rate_is_what_was_carried_since_the_look_before() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut speed = Speed::new(start);
        assert_eq!(speed.look(carried(0, 0), start), carried(0, 0));
        assert_eq!(speed.look(carried(100, 10), at(1)), carried(100, 10));
        assert_eq!(speed.look(carried(500, 10), at(3)), carried(200, 0));
        assert_eq!(speed.look(carried(500, 10), at(3)), carried(200, 0), "at once again");
        assert_eq!(speed.look(carried(500, 10), at(4)), carried(0, 0));
    }

    #[test]
    fn the_first_rate_of_a_circuit_is_that_since_it_was_opened() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let (id, mut speeds) = (CircuitId(1), Speeds::default());
        assert_eq!(speeds.look(id, start, carried(30, 3), at(3)), carried(10, 1));
        assert_eq!(speeds.look(id, start, carried(30, 4), at(4)), carried(0, 1));
        speeds.forget(|_| false);
        assert!(speeds.0.is_empty());
    }
}
