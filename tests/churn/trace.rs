//! A day of clients: who comes when, how long it stays, when it stalls, and how it goes.
//!
//! The figures are chosen, not measured: what matters is that every way of going is in them, and
//! that sessions and stalls have the long tails that all measurements of peer-to-peer networks
//! agree on.

use std::time::Duration;

use rand::{RngExt, SeedableRng, rngs::Xoshiro256PlusPlus};
use rand_distr::{Distribution, Exp, Pareto, Weibull};

/// Clients arrive for a day, one as likely as the next at any time.
pub const DAY: Duration = Duration::from_secs(24 * 60 * 60);
/// The tables fill up until then: longer than the longest term, js-libp2p's 2 h.
pub const MEASURED_FROM: Duration = Duration::from_secs(3 * 60 * 60);
pub const CLIENTS: usize = 100_000;

/// Sessions: half of them are over in 4 min, 1 in 100 is longer than 2.6 h. The scale makes the
/// mean number of live clients come out near 1,024, which is the default number of slots.
const SESSION: (f64, f64) = (440.0, 0.5);
const LONGEST_SESSION: f64 = 12.0 * 3600.0;

/// One client in two is a phone: it changes networks and it stalls, both at any moment.
const PHONES: f64 = 0.5;
const NETWORK_FOR: f64 = 20.0 * 60.0;
const STALLS_EVERY: f64 = 10.0 * 60.0;
/// A stall lasts 2 s at least (one in ten over 9 s) and 20 s at most.
const STALL: (f64, f64) = (2.0, 1.5);
const LONGEST_STALL: f64 = 20.0;

/// One client in fifty is in a restart loop, for a session: up for 20 s on average, with a long
/// tail. One in two of these makes itself a new identity each time.
const LOOPING: f64 = 0.02;
const UP_FOR: (f64, f64) = (13.3, 0.6);
/// Most crashes are of the process, and the kernel says FIN for it; some are of the machine.
const LOOPS_WITH_FIN: f64 = 0.8;

/// At the end of its session a client closes its connection, or it is switched off or out of reach.
const ENDS_WITH_FIN: f64 = 0.7;
/// For how long a client that changes networks or restarts is away.
const AWAY: std::ops::Range<f64> = 1.0..8.0;
/// There and back, in ms.
const ROUND_TRIP: std::ops::Range<u64> = 20..400;

/// What client libraries do by themselves; the design's notes on the peers say how we know.
#[derive(Clone, Copy)]
pub enum Family {
    Go,
    JavaScript,
    Rust,
}

impl Family {
    /// Go's yamux and js-libp2p's connection monitor send keepalives; rust-libp2p sends none.
    pub fn talks_every(self) -> Option<Duration> {
        match self {
            Self::Go => Some(Duration::from_secs(30)),
            Self::JavaScript => Some(Duration::from_secs(10)),
            Self::Rust => None,
        }
    }

    /// Go's autorelay leaves a relay that refused alone for an hour; js-libp2p gives it up; with
    /// rust-libp2p it is the application's affair: taken to be 10 s, doubled each time, to 10 min.
    pub fn asks_again_after(self, refusals: u32) -> Option<Duration> {
        match self {
            Self::Go => Some(Duration::from_secs(60 * 60)),
            Self::JavaScript => None,
            Self::Rust => Some(Duration::from_secs((5 << refusals.min(7)).min(600))),
        }
    }

    /// After its connection was closed by the relay. Go's autorelay looks for relays every 30 s,
    /// so half that on average; js-libp2p does not come back; rust-libp2p as above.
    pub fn returns_after(self) -> Option<Duration> {
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
pub enum What {
    /// It connects and wants a slot, as this peer: a stay begins.
    Comes { peer: usize },
    /// The stay ends, with a FIN or without a word.
    Goes { fin: bool },
    /// It neither sends nor answers until then. What was sent to it meanwhile is not lost.
    Stalls { until: Duration },
}

pub struct Trace {
    pub clients: Vec<Client>,
    pub peers: usize,
    /// What happens when, to which client; in this order.
    pub events: Vec<(Duration, usize, What)>,
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

    /// How many clients want a slot, on average over the time that is measured.
    pub fn mean_live(&self) -> f64 {
        let measured = |at: Duration| at.clamp(MEASURED_FROM, DAY).as_secs_f64();
        let live = self.events.iter().map(|(at, _, what)| match what {
            What::Comes { .. } => -measured(*at),
            What::Goes { .. } => measured(*at),
            What::Stalls { .. } => 0.0,
        });
        live.sum::<f64>() / (DAY - MEASURED_FROM).as_secs_f64()
    }
}

fn weibull((scale, shape): (f64, f64)) -> Weibull<f64> {
    Weibull::new(scale, shape).expect("both are above zero")
}

fn every(seconds: f64) -> Exp<f64> {
    Exp::new(1.0 / seconds).expect("it is above zero")
}

/// All that one client does. Its stays are on one network and in one process each.
fn session(rng: &mut Xoshiro256PlusPlus, peers: &mut usize, mut tell: impl FnMut(f64, What)) {
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
        tell(now, What::Comes { peer });
        if phone {
            stalls(rng, now, until, &mut tell);
        }
        let fin = match (until < end, loops) {
            (true, true) => rng.random_bool(LOOPS_WITH_FIN),
            (true, false) => false, // the old network is out of reach
            (false, _) => rng.random_bool(ENDS_WITH_FIN),
        };
        tell(until, What::Goes { fin });
        if new_identities {
            peer = *peers;
            *peers += 1;
        }
        now = until + rng.random_range(AWAY);
    }
}

fn stalls(rng: &mut Xoshiro256PlusPlus, from: f64, to: f64, tell: &mut impl FnMut(f64, What)) {
    let stall = Pareto::new(STALL.0, STALL.1).expect("both are above zero");
    let mut now = from + every(STALLS_EVERY).sample(rng);
    while now < to {
        let until = to.min(now + stall.sample(rng).min(LONGEST_STALL));
        let stalls = What::Stalls { until: Duration::from_secs_f64(until) };
        tell(now, stalls);
        now = until + every(STALLS_EVERY).sample(rng);
    }
}
