//! A day of clients: when each connects, how long it stays, when it stalls, and how it disconnects.
//!
//! The figures are chosen, not measured. What matters is that every way of disconnecting occurs, and that sessions and
//! stalls have long tails, as all measurements of peer-to-peer networks show.

use std::time::Duration;

use rand::{RngExt, SeedableRng, rngs::Xoshiro256PlusPlus};
use rand_distr::{Distribution, Exp, Pareto, Weibull};

/// Clients arrive for a day, uniformly.
pub const DAY: Duration = Duration::from_secs(24 * 60 * 60);
/// The tables fill up until this time: longer than the longest term, js-libp2p's 2 h.
pub const MEASURED_FROM: Duration = Duration::from_secs(3 * 60 * 60);
pub const CLIENTS: usize = 100_000;

/// Sessions: half of them last less than 4 min, 1 in 100 longer than 2.6 h. The scale is chosen so that the mean number
/// of live clients is near 1,024, the default number of slots.
const SESSION: (f64, f64) = (440.0, 0.5);
const LONGEST_SESSION: f64 = 12.0 * 3600.0;

/// One client in two is a phone: it changes networks and stalls, both at any time.
const PHONES: f64 = 0.5;
const NETWORK_FOR: f64 = 20.0 * 60.0;
const STALLS_EVERY: f64 = 10.0 * 60.0;
/// A stall lasts at least 2 s (one in ten over 9 s) and at most 20 s.
const STALL: (f64, f64) = (2.0, 1.5);
const LONGEST_STALL: f64 = 20.0;

/// One client in fifty is in a restart loop for a session: up for 20 s on average, with a long tail. One in two of
/// these uses a new identity each time.
const LOOPING: f64 = 0.02;
const UP_FOR: (f64, f64) = (13.3, 0.6);
/// Most crashes are of the process, for which the kernel sends a FIN; the others are of the machine.
const LOOPS_WITH_FIN: f64 = 0.8;

/// At the end of its session a client closes its connection, or it is switched off or unreachable.
const ENDS_WITH_FIN: f64 = 0.7;
/// For how many seconds a client that changes networks or restarts is disconnected.
const AWAY: std::ops::Range<f64> = 1.0..8.0;
/// The round-trip time, in ms.
const ROUND_TRIP: std::ops::Range<u64> = 20..400;

/// What each client library does by itself.
#[derive(Clone, Copy)]
pub enum Family {
    Go,
    JavaScript,
    Rust,
}

impl Family {
    /// Go's yamux and js-libp2p's connection monitor send keepalives; rust-libp2p sends none.
    pub fn keepalive_interval(self) -> Option<Duration> {
        match self {
            Self::Go => Some(Duration::from_secs(30)),
            Self::JavaScript => Some(Duration::from_secs(10)),
            Self::Rust => None,
        }
    }

    /// The pause after a refusal. Go's autorelay does not ask that relay again for an hour; js-libp2p gives up; with
    /// rust-libp2p it is up to the application: assumed to be 10 s, doubled each time, up to 10 min.
    pub fn retry_after_refusal(self, refusals: u32) -> Option<Duration> {
        match self {
            Self::Go => Some(Duration::from_secs(60 * 60)),
            Self::JavaScript => None,
            Self::Rust => Some(Duration::from_secs((5 << refusals.min(7)).min(600))),
        }
    }

    /// The pause after the relay closed the connection. Go's autorelay searches for relays every 30 s, so half of that
    /// on average; js-libp2p does not reconnect; rust-libp2p as above.
    pub fn reconnect_after_close(self) -> Option<Duration> {
        match self {
            Self::Go => Some(Duration::from_secs(15)),
            Self::JavaScript => None,
            Self::Rust => Some(Duration::from_secs(10)),
        }
    }
}

#[derive(Clone, Copy)]
pub struct Client {
    pub family: Family,
    pub round_trip: Duration,
}

#[derive(Clone, Copy)]
pub enum Change {
    /// A stay begins: the client connects as this peer and wants a slot.
    Start { peer: usize },
    /// The stay ends, with a FIN or silently.
    End { fin: bool },
    /// It neither reads nor answers until this time. Data that arrives meanwhile is not lost.
    Stall { until: Duration },
}

pub struct Trace {
    pub clients: Vec<Client>,
    pub peers: usize,
    /// The time, the client and the change, in order.
    pub events: Vec<(Duration, usize, Change)>,
}

impl Trace {
    pub fn of_a_day(seed: u64) -> Self {
        let mut rng = Xoshiro256PlusPlus::seed_from_u64(seed);
        let (mut clients, mut events, mut peers) = (Vec::new(), Vec::new(), 0);
        for client in 0..CLIENTS {
            let family = [Family::Go, Family::JavaScript, Family::Rust][client % 3];
            let round_trip = Duration::from_millis(rng.random_range(ROUND_TRIP));
            clients.push(Client { family, round_trip });
            session(&mut rng, &mut peers, |at, what| {
                events.push((Duration::from_secs_f64(at), client, what));
            });
        }
        events.sort_by_key(|(at, client, _)| (*at, *client));
        Self { clients, peers, events }
    }

    /// Leaves out what happens after `end`; who is connected then disconnects.
    pub fn end_at(&mut self, end: Duration) {
        let mut is_connected = vec![false; self.clients.len()];
        self.events.retain_mut(|(at, client, what)| {
            let is_start = matches!(what, Change::Start { .. });
            let is_kept = *at < end || (is_connected[*client] && !is_start);
            is_connected[*client] = is_start && is_kept;
            *at = end.min(*at);
            is_kept
        });
    }

    /// How many clients want a slot, on average over the measured time.
    pub fn mean_live(&self) -> f64 {
        let measured = |at: Duration| at.clamp(MEASURED_FROM, DAY).as_secs_f64();
        let live = self.events.iter().map(|(at, _, what)| match what {
            Change::Start { .. } => -measured(*at),
            Change::End { .. } => measured(*at),
            Change::Stall { .. } => 0.0,
        });
        live.sum::<f64>() / (DAY - MEASURED_FROM).as_secs_f64()
    }
}

fn weibull((scale, shape): (f64, f64)) -> Weibull<f64> {
    Weibull::new(scale, shape).expect("positive parameters")
}

fn every(seconds: f64) -> Exp<f64> {
    Exp::new(1.0 / seconds).expect("a positive parameter")
}

/// One client's session. Each stay is on one network and in one process.
fn session(rng: &mut Xoshiro256PlusPlus, peers: &mut usize, mut emit: impl FnMut(f64, Change)) {
    let mut now = rng.random_range(0.0..DAY.as_secs_f64());
    let end = now + weibull(SESSION).sample(rng).min(LONGEST_SESSION);
    let loops = rng.random_bool(LOOPING);
    let phone = !loops && rng.random_bool(PHONES);
    let new_identities = loops && rng.random_bool(0.5);
    let mut peer = *peers;
    *peers += 1;
    while now < end {
        let stay = match (loops, phone) {
            (true, _) => weibull(UP_FOR).sample(rng),
            (false, true) => every(NETWORK_FOR).sample(rng),
            (false, false) => f64::INFINITY,
        };
        let until = end.min(now + stay);
        emit(now, Change::Start { peer });
        if phone {
            stalls(rng, now, until, &mut emit);
        }
        let fin = match (until < end, loops) {
            (true, true) => rng.random_bool(LOOPS_WITH_FIN),
            (true, false) => false, // the old network is unreachable
            (false, _) => rng.random_bool(ENDS_WITH_FIN),
        };
        emit(until, Change::End { fin });
        if new_identities {
            peer = *peers;
            *peers += 1;
        }
        now = until + rng.random_range(AWAY);
    }
}

fn stalls(rng: &mut Xoshiro256PlusPlus, from: f64, to: f64, emit: &mut impl FnMut(f64, Change)) {
    let stall = Pareto::new(STALL.0, STALL.1).expect("positive parameters");
    let mut now = from + every(STALLS_EVERY).sample(rng);
    while now < to {
        let until = to.min(now + stall.sample(rng).min(LONGEST_STALL));
        let stalls = Change::Stall { until: Duration::from_secs_f64(until) };
        emit(now, stalls);
        now = until + every(STALLS_EVERY).sample(rng);
    }
}
