//! The numbers of live, grace and free slots over the last hour and the last day.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

use serde::Serialize;

use super::stats::Slots;

/// How many points a curve has at most: a phone has no more pixels across.
const POINTS: usize = 240;

/// Both curves.
#[derive(Clone, Debug, Serialize)]
pub struct History {
    hour: Curve,
    day: Curve,
}

/// Samples at regular intervals, the oldest first.
#[derive(Clone, Debug, Serialize)]
struct Curve {
    /// The interval in seconds.
    every: u64,
    /// Live, in grace, free.
    points: VecDeque<[usize; 3]>,
    /// When the next sample is due.
    #[serde(skip)]
    next: Instant,
}

impl History {
    /// A history that begins now.
    pub fn new(now: Instant) -> Self {
        let curve =
            |span: u64| Curve { every: span / POINTS as u64, points: VecDeque::new(), next: now };
        Self { hour: curve(60 * 60), day: curve(24 * 60 * 60) }
    }

    /// Adds a sample to each curve whose interval is over. To be called every few seconds at least.
    pub fn record(&mut self, slots: Slots, now: Instant) {
        for curve in [&mut self.hour, &mut self.day] {
            curve.record([slots.live, slots.grace, slots.free], now);
        }
    }
}

impl Curve {
    fn record(&mut self, point: [usize; 3], now: Instant) {
        while self.next <= now {
            self.next += Duration::from_secs(self.every);
            // The page dates the points by their number: the previous one fills the time in which the process was
            // stopped.
            let before = self.points.back().copied().filter(|_| self.next <= now);
            if self.points.len() == POINTS {
                self.points.pop_front();
            }
            self.points.push_back(before.unwrap_or(point));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Records `live` slots once a second.
    fn record(history: &mut History, start: Instant, seconds: std::ops::Range<u64>, live: usize) {
        for second in seconds {
            let slots = Slots { live, ..Slots::default() };
            history.record(slots, start + Duration::from_secs(second));
        }
    }

    fn live(curve: &Curve) -> Vec<usize> {
        curve.points.iter().map(|[live, ..]| *live).collect()
    }

    #[test]
    fn each_curve_keeps_its_last_240_points() {
        let start = Instant::now();
        let mut history = History::new(start);
        record(&mut history, start, 0..3600, 1);
        assert_eq!((history.hour.points.len(), history.day.points.len()), (240, 10));
        record(&mut history, start, 3600..90_000, 2);
        assert_eq!((history.hour.points.len(), history.day.points.len()), (240, 240));
        assert_eq!(live(&history.hour), [2; 240]);
        // The first hour of the 25 is no longer part of the last day.
        assert_eq!(live(&history.day), [2; 240]);
    }

    #[test]
    fn the_oldest_point_is_the_first() {
        let start = Instant::now();
        let mut history = History::new(start);
        record(&mut history, start, 0..30, 1);
        record(&mut history, start, 30..60, 2);
        assert_eq!(live(&history.hour), [1, 1, 2, 2]);
        assert_eq!(live(&history.day), [1]);
    }

    #[test]
    fn the_time_in_which_the_process_was_stopped_has_the_sample_from_before_it() {
        let start = Instant::now();
        let mut history = History::new(start);
        record(&mut history, start, 0..16, 1);
        record(&mut history, start, 70..91, 2);
        assert_eq!(live(&history.hour), [1, 1, 1, 1, 2, 2, 2]);
        record(&mut history, start, 1_000_000..1_000_001, 3);
        assert_eq!((live(&history.hour)[0], live(&history.hour)[239]), (2, 3));
        record(&mut history, start, 1_000_005..1_000_006, 4);
        assert_eq!(live(&history.hour)[238..], [3, 4], "a multiple of 15 s since the start");
    }
}
