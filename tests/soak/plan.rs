//! A day of the churn simulation as it is lived here: compressed, by as many clients as are asked
//! for, and the relay's timers with it.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use relaylet::Config;

use crate::trace::{CLIENTS, DAY, MEASURED_FROM, Trace, What};

/// A day in an hour.
pub const FACTOR: u32 = 24;

/// How much of the day `--quick` lives: so much from when the tables are full, in 275 s.
const QUICK: Duration = Duration::from_secs(110 * 60);

/// Those who were there before it begins come one after the other.
const ONE_BY_ONE: Duration = Duration::from_millis(300);

/// Below it no relay can be told to wait for an answer.
const SHORTEST_PROBE: Duration = Duration::from_millis(500);

/// Slots, in percent of the clients that want one on average: now and then there is none.
const SLOTS: f64 = 98.0;

/// What happens when, by the clock of this machine.
pub struct Plan {
    pub trace: Trace,
    pub events: Vec<(Duration, usize, What)>,
    pub lasts: Duration,
    /// From the end of which quarter on what the relay takes up has to be flat: the C library's heap
    /// has grown to its size by then, which is several times that of what is in it.
    pub settled: usize,
    /// How many want a slot, on average.
    pub mean_live: f64,
    pub config: Config,
}

impl Plan {
    /// That of a trace in which so many are there at a time.
    pub fn of(trace: Trace, clients: usize, quick: bool) -> Self {
        let (from, until) = match quick {
            true => (MEASURED_FROM, MEASURED_FROM + QUICK),
            false => (Duration::ZERO, DAY),
        };
        // One client is as any other: the first ones are a sample.
        let among = (CLIENTS as f64 * clients as f64 / trace.mean_live()) as usize;
        let taken = trace.events.iter().filter(|(_, who, _)| *who < among);
        let events = part(taken.copied(), from, until);
        let full_from = from.max(MEASURED_FROM);
        let mean_live = mean_live(&events, full_from - from, until - from);
        let mut config = compressed(Config::default());
        config.max_reservations = (mean_live * SLOTS / 100.0).round() as usize;
        config.max_reservations_per_ip = Some(0);
        config.max_reservations_per_subnet = Some(0);
        let events = events.into_iter().map(|(at, who, what)| {
            let what = match what {
                What::Stalls { until } => What::Stalls { until: until / FACTOR },
                other => other,
            };
            (at / FACTOR, who, what)
        });
        Self {
            events: events.collect(),
            lasts: (until - from) / FACTOR,
            settled: if quick { 2 } else { 1 },
            trace,
            mean_live,
            config,
        }
    }

    /// What the relay is told.
    pub fn flags(&self) -> Vec<String> {
        let c = &self.config;
        let timers = [
            ("reservation-ttl", c.reservation_ttl),
            ("grace", c.grace),
            ("heartbeat", c.heartbeat),
            ("silence", c.silence),
            ("probe", c.probe),
            ("probe-after", c.probe_after),
            ("sweep", c.sweep),
            ("idle-timeout", c.idle_timeout),
            ("circuit-duration", c.circuit_duration),
        ];
        let timers = timers.map(|(name, time)| format!("--{name}={}us", time.as_micros()));
        let numbers = [
            ("max-reservations", c.max_reservations),
            ("max-reservations-per-ip", 0),
            ("max-reservations-per-subnet", 0),
            ("reserve-rate", c.reserve_rate as usize),
            ("connect-rate", c.connect_rate as usize),
        ];
        let numbers = numbers.map(|(name, number)| format!("--{name}={number}"));
        timers.into_iter().chain(numbers).collect()
    }
}

/// The program's defaults in compressed time. Of all timers only the probe has a bound in its way:
/// it is four times as long as it should be.
fn compressed(mut c: Config) -> Config {
    c.idle_timeout = Duration::from_secs(60); // the program's, not the behaviour's
    for timer in [
        &mut c.reservation_ttl,
        &mut c.grace,
        &mut c.heartbeat,
        &mut c.silence,
        &mut c.probe,
        &mut c.probe_after,
        &mut c.sweep,
        &mut c.idle_timeout,
        &mut c.circuit_duration,
    ] {
        *timer /= FACTOR;
    }
    c.probe = c.probe.max(SHORTEST_PROBE);
    c.reserve_rate *= FACTOR;
    c.connect_rate *= FACTOR;
    c
}

/// What happens from then until then. Who is there already comes at its beginning.
fn part(
    all: impl Iterator<Item = (Duration, usize, What)>,
    from: Duration,
    until: Duration,
) -> Vec<(Duration, usize, What)> {
    let mut there = BTreeMap::new();
    let mut events = Vec::new();
    for (at, who, what) in all.take_while(|(at, ..)| *at < until) {
        if at < from {
            match what {
                What::Comes { peer } => drop(there.insert(who, peer)),
                What::Goes { .. } => drop(there.remove(&who)),
                What::Stalls { .. } => {}
            }
            continue;
        }
        let what = match what {
            What::Stalls { until } => What::Stalls { until: until - from },
            other => other,
        };
        events.push((at - from, who, what));
    }
    let mut goes = BTreeMap::new();
    for (at, who, what) in &events {
        if let What::Goes { .. } = what {
            goes.entry(*who).or_insert(*at);
        }
    }
    for (turn, (who, peer)) in (0..).zip(there) {
        // Who goes before its turn to come does neither.
        let comes = ONE_BY_ONE * turn;
        if goes.get(&who).is_none_or(|goes| *goes > comes) {
            events.push((comes, who, What::Comes { peer }));
        }
    }
    events.sort_by_key(|(at, who, _)| (*at, *who));
    events
}

fn mean_live(events: &[(Duration, usize, What)], from: Duration, until: Duration) -> f64 {
    let measured = |at: Duration| at.clamp(from, until).as_secs_f64();
    let end = until.as_secs_f64();
    let mut there = BTreeSet::new();
    let live = events.iter().map(|(at, who, what)| match what {
        What::Comes { .. } => {
            there.insert(*who);
            end - measured(*at)
        }
        What::Goes { .. } if there.remove(who) => measured(*at) - end,
        What::Goes { .. } | What::Stalls { .. } => 0.0,
    });
    live.sum::<f64>() / (until - from).as_secs_f64()
}
