//! The part of the simulated day that is run: compressed, with the requested number of clients, and the relay's timers
//! compressed as well.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use relaylet::Config;

use crate::trace::{CLIENTS, Change, DAY, MEASURED_FROM, Trace};

/// A day takes an hour.
pub const FACTOR: u32 = 24;

/// How much of the day `--quick` runs, starting when the tables are full: 275 s.
const QUICK: Duration = Duration::from_secs(110 * 60);

/// Clients whose stays have begun before the start connect one after another, at this interval.
const START_INTERVAL: Duration = Duration::from_millis(300);

/// The minimum of `--probe`.
const SHORTEST_PROBE: Duration = Duration::from_millis(500);

/// Slots in percent of the mean number of clients that want one: now and then the table is full.
const SLOTS: f64 = 98.0;

/// What is run: the events, in compressed time, and the relay's configuration.
pub struct Plan {
    pub trace: Trace,
    pub events: Vec<(Duration, usize, Change)>,
    pub duration: Duration,
    /// The quarter after which the relay's resources must be flat: by then the C library's heap has grown to several
    /// times its contents.
    pub settled: usize,
    /// The mean number of clients that want a slot.
    pub mean_live: f64,
    pub config: Config,
}

impl Plan {
    /// The plan of a trace with this mean number of clients.
    pub fn of(trace: Trace, clients: usize, quick: bool) -> Self {
        let (from, until) = match quick {
            true => (MEASURED_FROM, MEASURED_FROM + QUICK),
            false => (Duration::ZERO, DAY),
        };
        // Clients are interchangeable: the first ones are a sample.
        let among = (CLIENTS as f64 * clients as f64 / trace.mean_live()) as usize;
        let taken = trace.events.iter().filter(|(_, client, _)| *client < among);
        let events = part(taken.copied(), from, until);
        let full_from = from.max(MEASURED_FROM);
        let mean_live = mean_live(&events, full_from - from, until - from);
        let mut config = compressed(Config::default());
        config.max_reservations = (mean_live * SLOTS / 100.0).round() as usize;
        config.max_reservations_per_ip = Some(0);
        config.max_reservations_per_subnet = Some(0);
        let events = events.into_iter().map(|(at, client, change)| {
            let change = match change {
                Change::Stall { until } => Change::Stall { until: until / FACTOR },
                other => other,
            };
            (at / FACTOR, client, change)
        });
        Self {
            events: events.collect(),
            duration: (until - from) / FACTOR,
            settled: if quick { 2 } else { 1 },
            trace,
            mean_live,
            config,
        }
    }

    /// The relay's flags.
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

/// The program's defaults in compressed time. Only the probe would be below its minimum: it is four times as long as it
/// should be.
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

/// The events of this part of the day. Clients whose stays have begun before it start at its beginning.
fn part(
    all: impl Iterator<Item = (Duration, usize, Change)>,
    from: Duration,
    until: Duration,
) -> Vec<(Duration, usize, Change)> {
    let mut present = BTreeMap::new();
    let mut events = Vec::new();
    for (at, client, change) in all.take_while(|(at, ..)| *at < until) {
        if at < from {
            match change {
                Change::Start { peer } => drop(present.insert(client, peer)),
                Change::End { .. } => drop(present.remove(&client)),
                Change::Stall { .. } => {}
            }
            continue;
        }
        let change = match change {
            Change::Stall { until } => Change::Stall { until: until - from },
            other => other,
        };
        events.push((at - from, client, change));
    }
    let mut ends = BTreeMap::new();
    for (at, client, change) in &events {
        if let Change::End { .. } = change {
            ends.entry(*client).or_insert(*at);
        }
    }
    for (turn, (client, peer)) in (0..).zip(present) {
        // A client that ends before its turn to start is left out.
        let starts = START_INTERVAL * turn;
        if ends.get(&client).is_none_or(|ends| *ends > starts) {
            events.push((starts, client, Change::Start { peer }));
        }
    }
    events.sort_by_key(|(at, client, _)| (*at, *client));
    events
}

fn mean_live(events: &[(Duration, usize, Change)], from: Duration, until: Duration) -> f64 {
    let measured = |at: Duration| at.clamp(from, until).as_secs_f64();
    let end = until.as_secs_f64();
    let mut present = BTreeSet::new();
    let live = events.iter().map(|(at, client, change)| match change {
        Change::Start { .. } => {
            present.insert(*client);
            end - measured(*at)
        }
        Change::End { .. } if present.remove(client) => measured(*at) - end,
        Change::End { .. } | Change::Stall { .. } => 0.0,
    });
    live.sum::<f64>() / (until - from).as_secs_f64()
}
