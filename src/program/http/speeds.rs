//! How many bytes a second circuits transfer.
//!
//! Sans-IO. A speed is the number of bytes transferred between two updates, divided by the time between them.

use std::{collections::HashMap, time::Instant};

use crate::event::{BytesTransferred, CircuitId};

/// The speed of each circuit.
#[derive(Debug, Default)]
pub struct Speeds(HashMap<CircuitId, Speed>);

/// The speed of one circuit, or of all together.
#[derive(Debug)]
pub struct Speed {
    /// The bytes transferred until the last update, and when that was.
    transferred: BytesTransferred,
    updated_at: Instant,
    per_second: BytesTransferred,
}

impl Speeds {
    /// Updates the speed of a circuit that was opened at `since` and has `transferred` this many bytes. Returns it.
    pub fn update(
        &mut self,
        id: CircuitId,
        since: Instant,
        transferred: BytesTransferred,
        now: Instant,
    ) -> BytesTransferred {
        self.0.entry(id).or_insert_with(|| Speed::new(since)).update(transferred, now)
    }

    /// Forgets the circuits that have ended.
    pub fn forget(&mut self, is_open: impl Fn(CircuitId) -> bool) {
        self.0.retain(|id, _| is_open(*id));
    }
}

impl Speed {
    /// Nothing has been transferred yet.
    pub fn new(now: Instant) -> Self {
        let none = BytesTransferred::default();
        Self { transferred: none, updated_at: now, per_second: none }
    }

    /// The bytes a second between the last two updates.
    pub fn per_second(&self) -> BytesTransferred {
        self.per_second
    }

    /// Updates the speed, given the bytes transferred so far. Returns it, in bytes a second.
    pub fn update(&mut self, after: BytesTransferred, now: Instant) -> BytesTransferred {
        let time = now.saturating_duration_since(self.updated_at).as_secs_f64();
        if time > 0.0 {
            let before = self.transferred;
            let speed =
                |before: u64, after: u64| (after.saturating_sub(before) as f64 / time) as u64;
            self.per_second = BytesTransferred {
                to_target: speed(before.to_target, after.to_target),
                to_source: speed(before.to_source, after.to_source),
            };
            (self.transferred, self.updated_at) = (after, now);
        }
        self.per_second
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn bytes(to_target: u64, to_source: u64) -> BytesTransferred {
        BytesTransferred { to_target, to_source }
    }

    #[test]
    fn a_speed_covers_the_bytes_since_the_previous_update() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut speed = Speed::new(start);
        assert_eq!(speed.update(bytes(0, 0), start), bytes(0, 0));
        assert_eq!(speed.update(bytes(100, 10), at(1)), bytes(100, 10));
        assert_eq!(speed.update(bytes(500, 10), at(3)), bytes(200, 0));
        assert_eq!(speed.update(bytes(500, 10), at(3)), bytes(200, 0), "at once again");
        assert_eq!(speed.update(bytes(500, 10), at(4)), bytes(0, 0));
    }

    #[test]
    fn the_first_speed_of_a_circuit_covers_its_bytes_since_it_opened() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let (id, mut speeds) = (CircuitId(1), Speeds::default());
        assert_eq!(speeds.update(id, start, bytes(30, 3), at(3)), bytes(10, 1));
        assert_eq!(speeds.update(id, start, bytes(30, 4), at(4)), bytes(0, 1));
        speeds.forget(|_| false);
        assert!(speeds.0.is_empty());
    }
}
