//! How many slots were live, in grace and free: in the last hour, and in the last day.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

use serde::Serialize;

use super::stats::Slots;

/// How many points a curve has at most: more than a phone has pixels for is no use.
const POINTS: usize = 240;

/// The last hour and the last day.
#[derive(Clone, Debug, Serialize)]
pub struct History {
    hour: Curve,
    day: Curve,
}

/// What was at regular moments, the oldest first.
#[derive(Clone, Debug, Serialize)]
struct Curve {
    /// How many seconds lie between two points.
    every: u64,
    /// Live, in grace, free.
    points: VecDeque<[usize; 3]>,
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

    /// Remembers how it is now, where it is time to. To be called at least as often as every few
    /// seconds.
    pub fn note(&mut self, slots: Slots, now: Instant) {
        for curve in [&mut self.hour, &mut self.day] {
            curve.note([slots.live, slots.grace, slots.free], now);
        }
    }
}

impl Curve {
    fn note(&mut self, point: [usize; 3], now: Instant) {
        if now < self.next {
            return;
        }
        if self.points.len() == POINTS {
            self.points.pop_front();
        }
        self.points.push_back(point);
        let every = Duration::from_secs(self.every);
        self.next += every;
        // After a pause the curve goes on from here: it does not catch up.
        if self.next <= now {
            self.next = now + every;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// So many live slots, once a second.
    fn pass(history: &mut History, start: Instant, seconds: std::ops::Range<u64>, live: usize) {
        for second in seconds {
            let slots = Slots { live, ..Slots::default() };
            history.note(slots, start + Duration::from_secs(second));
        }
    }

    fn live(curve: &Curve) -> Vec<usize> {
        curve.points.iter().map(|[live, ..]| *live).collect()
    }

    #[test]
    fn an_hour_and_a_day_have_as_many_points() {
        let start = Instant::now();
        let mut history = History::new(start);
        pass(&mut history, start, 0..3600, 1);
        assert_eq!((history.hour.points.len(), history.day.points.len()), (240, 10));
        pass(&mut history, start, 3600..90_000, 2);
        assert_eq!((history.hour.points.len(), history.day.points.len()), (240, 240));
        assert_eq!(live(&history.hour), [2; 240]);
        // The last day began 25 h ago less one.
        assert_eq!(live(&history.day), [2; 240]);
    }

    #[test]
    fn the_oldest_point_is_the_first() {
        let start = Instant::now();
        let mut history = History::new(start);
        pass(&mut history, start, 0..30, 1);
        pass(&mut history, start, 30..60, 2);
        assert_eq!(live(&history.hour), [1, 1, 2, 2]);
        assert_eq!(live(&history.day), [1]);
    }

    #[test]
    fn a_pause_is_not_caught_up_with() {
        let start = Instant::now();
        let mut history = History::new(start);
        pass(&mut history, start, 0..1, 1);
        pass(&mut history, start, 1000..1016, 2);
        assert_eq!(live(&history.hour), [1, 2, 2]);
    }
}
