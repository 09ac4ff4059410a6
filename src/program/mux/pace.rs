//! How fast peers may open streams, and send frames that cost the relay more than they cost the peer.
//!
//! Each request is a stream of its own, so this bounds what requests cost: refused ones too, and before
//! anything is looked up. A stream beyond it is reset; its connection goes on.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use crate::{
    address::ClientPrefix,
    relay::rates::{Bucket, Rate, ScopedRates},
};

/// An address may open as many streams at once as in so many seconds: the clients of one carrier's NAT that
/// come back together.
const SECONDS_AT_ONCE: u32 = 16;

/// So many frames that open a stream, reset one or ping are in order for each stream that an address may open.
const FRAMES_PER_STREAM: u32 = 4;

/// How much more a wider scope may than a narrower one.
const WIDER: u32 = 4;

/// What a connection may do whatever others of its prefix do: open streams to identify, reserve and renew and
/// to ping, and send the frames that go with them and with the ends of its circuits.
const OWN_STREAMS: Rate = Rate { burst: 8, spacing: Duration::from_millis(2500) };
const OWN_FRAMES: Rate = Rate { burst: 128, spacing: Duration::from_millis(125) };

/// The longest that a connection is not read because of its frames. Another one may come then.
const PAUSE: Duration = Duration::from_secs(1);

/// The paces of all connections. Clones are the same.
#[derive(Clone, Debug)]
pub struct Paces {
    streams: Arc<Mutex<ScopedRates>>,
    frames: Arc<Mutex<ScopedRates>>,
}

impl Paces {
    /// An address may open so many streams a second in the long run; zero: no limit for anything.
    pub fn new(per_address: u32) -> Self {
        let rates = |per_second: u32| {
            let rate = |wider| Rate {
                burst: per_second.saturating_mul(wider * SECONDS_AT_ONCE),
                spacing: Duration::from_secs(1) / per_second.saturating_mul(wider).max(1),
            };
            let level = |wider| (per_second > 0).then(|| rate(wider));
            Arc::new(Mutex::new(ScopedRates::new([1, WIDER, WIDER * WIDER].map(level))))
        };
        Self {
            streams: rates(per_address),
            frames: rates(per_address.saturating_mul(FRAMES_PER_STREAM)),
        }
    }

    /// That of the streams of one more connection.
    pub fn streams(&self, prefix: Option<ClientPrefix>) -> Pace {
        Pace { own: (OWN_STREAMS, Bucket::default()), all: Arc::clone(&self.streams), prefix }
    }

    /// That of its frames that open a stream, reset one or ping.
    pub fn frames(&self, prefix: Option<ClientPrefix>) -> Pace {
        Pace { own: (OWN_FRAMES, Bucket::default()), all: Arc::clone(&self.frames), prefix }
    }
}

/// How fast one connection may do something.
#[derive(Debug)]
pub struct Pace {
    own: (Rate, Bucket),
    all: Arc<Mutex<ScopedRates>>,
    prefix: Option<ClientPrefix>,
}

impl Pace {
    /// Whether it may do it now. What it may not costs nothing.
    pub fn admits(&mut self, now: Instant) -> bool {
        self.wait(Duration::ZERO, now).is_some()
    }

    /// It does it: for how long it is to rest, if it does it too often.
    pub fn rest(&mut self, now: Instant) -> Option<Duration> {
        let wait = self.wait(PAUSE, now).unwrap_or(PAUSE);
        (!wait.is_zero()).then_some(wait)
    }

    fn wait(&mut self, patience: Duration, now: Instant) -> Option<Duration> {
        let (rate, bucket) = &mut self.own;
        let own = bucket.take(*rate, Duration::ZERO, now);
        own.or_else(|| match self.prefix {
            Some(prefix) => {
                let mut all = self.all.lock().unwrap_or_else(PoisonError::into_inner);
                all.take(prefix, patience, now)
            }
            None => Some(Duration::ZERO), // no prefix to count it under
        })
    }
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use super::*;

    fn prefix(host: u8) -> Option<ClientPrefix> {
        Some(IpAddr::from([192, 0, 2, host]).into())
    }

    fn admitted(pace: &mut Pace, now: Instant) -> u32 {
        (0..9999).filter(|_| pace.admits(now)).count() as u32
    }

    #[test]
    fn each_connection_has_a_few_that_no_other_takes() {
        let (paces, now) = (Paces::new(64), Instant::now());
        let [mut hasty, mut late] = [1; 2].map(|host| paces.streams(prefix(host)));
        assert_eq!(admitted(&mut hasty, now), OWN_STREAMS.burst + 64 * SECONDS_AT_ONCE);
        assert_eq!(admitted(&mut late, now), OWN_STREAMS.burst);
        let later = now + Duration::from_secs(1);
        assert_eq!(admitted(&mut hasty, later), 64);
        // Another address is not held to it, but for what the subnet may.
        let mut other = paces.streams(prefix(2));
        assert_eq!(admitted(&mut other, later), OWN_STREAMS.burst + 64 * SECONDS_AT_ONCE);
    }

    #[test]
    fn a_subnet_may_four_times_as_much_as_an_address() {
        let (paces, now) = (Paces::new(64), Instant::now());
        let all: u32 = (1..20).map(|host| admitted(&mut paces.streams(prefix(host)), now)).sum();
        assert_eq!(all, 19 * OWN_STREAMS.burst + WIDER * 64 * SECONDS_AT_ONCE);
    }

    #[test]
    fn frames_that_come_too_fast_make_their_connection_rest_and_no_other_that_keeps_its_own_pace() {
        let (paces, mut now) = (Paces::new(64), Instant::now());
        let [mut hasty, mut slow] = [1; 2].map(|host| paces.frames(prefix(host)));
        let at_once = OWN_FRAMES.burst + FRAMES_PER_STREAM * 64 * SECONDS_AT_ONCE;
        assert_eq!((0..9999).take_while(|_| hasty.rest(now).is_none()).count() as u32, at_once);
        assert!(hasty.rest(now) <= Some(PAUSE));
        for _ in 0..1000 {
            now += OWN_FRAMES.spacing;
            (0..100).for_each(|_| _ = hasty.rest(now));
            assert_eq!(slow.rest(now), None);
        }
    }

    #[test]
    fn zero_is_no_limit() {
        let (paces, now) = (Paces::new(0), Instant::now());
        assert_eq!(admitted(&mut paces.streams(prefix(1)), now), 9999);
        assert_eq!(paces.frames(prefix(1)).rest(now), None);
    }
}
