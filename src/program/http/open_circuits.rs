//! The circuits that are open: since when, and how fast they go.
//!
//! Pure. Looked at now and then; a rate is what was carried since the look before.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use libp2p::PeerId;

use super::stats::{Circuit, Shown};
use crate::event::{Carried, CircuitId};

/// What is known of them.
#[derive(Debug, Default)]
pub struct OpenCircuits(HashMap<CircuitId, Open>);

#[derive(Debug)]
struct Open {
    source: PeerId,
    target: PeerId,
    since: Instant,
    speed: Speed,
}

/// How fast something goes that is looked at now and then.
#[derive(Debug)]
pub struct Speed {
    carried: Carried,
    at: Instant,
    rate: Carried,
}

impl OpenCircuits {
    /// A circuit was opened.
    pub fn opened(&mut self, id: CircuitId, source: PeerId, target: PeerId, now: Instant) {
        let open = Open { source, target, since: now, speed: Speed::new(now) };
        self.0.insert(id, open);
    }

    /// A circuit has ended; how long it was open.
    pub fn closed(&mut self, id: CircuitId, now: Instant) -> Option<Duration> {
        let open = self.0.remove(&id)?;
        Some(now.saturating_duration_since(open.since))
    }

    /// Looks at one of them, with what it has carried so far.
    pub fn look(&mut self, id: CircuitId, carried: Carried, now: Instant) -> Option<Circuit> {
        let open = self.0.get_mut(&id)?;
        Some(Circuit {
            id: Shown(id),
            source: Shown(open.source),
            target: Shown(open.target),
            open_for: now.saturating_duration_since(open.since).as_secs(),
            carried: carried.into(),
            rate: open.speed.look(carried, now).into(),
        })
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
    use super::*;
    use crate::{
        config::Config,
        relay::circuits::{Circuits, End},
    };

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
    fn a_circuit_is_shown_from_its_opening_to_its_end() {
        let mut ids = Circuits::new((&Config::default()).into());
        let [source, target] = [0, 1].map(|connection| End { peer: PeerId::random(), connection });
        let id = ids.admit(source, target, None, Instant::now()).unwrap();
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut circuits = OpenCircuits::default();
        circuits.opened(id, source.peer, target.peer, start);
        let shown = circuits.look(id, carried(30, 3), at(3)).unwrap();
        assert_eq!(shown.open_for, 3);
        assert_eq!((shown.rate.to_target, shown.rate.to_source), (10, 1));
        assert_eq!(circuits.closed(id, at(5)), Some(Duration::from_secs(5)));
        assert_eq!(circuits.closed(id, at(5)), None);
        assert!(circuits.look(id, carried(30, 3), at(6)).is_none());
    }
}
