//! Rate limits on streams that peers open, and on frames that cost the relay more than they cost the peer.
//!
//! Each request is a stream of its own, so this bounds the work for requests, refused ones included, before anything is
//! looked up. A stream above the rate is reset; its connection stays open.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use crate::{
    address::ClientPrefix,
    program::net::admission::scoped_rates::{Bucket, ScopedRates},
    relay::rates::Rate,
};

/// The burst of an address, in seconds of its rate: for clients behind one carrier's NAT that reconnect together.
const BURST_SECONDS: u32 = 16;

/// How many frames that open a stream, reset one or ping are allowed for each stream that an address may open.
const FRAMES_PER_STREAM: u32 = 4;

/// The ratio between the rate of a scope and that of the next narrower one.
const WIDER: u32 = 4;

/// What each connection may do regardless of others of its prefix: the streams for identify, reservations and pings, and
/// the frames for these and for the ends of its circuits.
const OWN_STREAMS: Rate = Rate { burst: 8, spacing: Duration::from_millis(2500) };
const OWN_FRAMES: Rate = Rate { burst: 128, spacing: Duration::from_millis(125) };

/// The longest that a connection is not read because of its frames. The next one may begin at once.
const MAX_PAUSE: Duration = Duration::from_secs(1);

/// The rates of all connections, by scope. Clones share them.
#[derive(Clone, Debug)]
pub struct MuxRates {
    streams: Arc<Mutex<ScopedRates>>,
    frames: Arc<Mutex<ScopedRates>>,
}

impl MuxRates {
    /// An address may open this many streams a second in the long run. Zero: no limit on streams or frames.
    pub fn new(per_address: u32) -> Self {
        let rates = |per_second: u32| {
            let rate = |wider| Rate {
                burst: per_second.saturating_mul(wider * BURST_SECONDS),
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

    /// The limiter of the streams of one more connection.
    pub fn streams(&self, prefix: Option<ClientPrefix>) -> RateLimiter {
        let (own, all) = ((OWN_STREAMS, Bucket::default()), Arc::clone(&self.streams));
        RateLimiter { own, all, prefix }
    }

    /// The limiter of its frames that open a stream, reset one or ping.
    pub fn frames(&self, prefix: Option<ClientPrefix>) -> RateLimiter {
        let (own, all) = ((OWN_FRAMES, Bucket::default()), Arc::clone(&self.frames));
        RateLimiter { own, all, prefix }
    }
}

/// Limits one connection: by a token bucket of its own, and beyond that by those of its scopes.
#[derive(Debug)]
pub struct RateLimiter {
    own: (Rate, Bucket),
    all: Arc<Mutex<ScopedRates>>,
    prefix: Option<ClientPrefix>,
}

impl RateLimiter {
    /// Takes a token if there is one. Returns whether there was.
    pub fn try_take(&mut self, now: Instant) -> bool {
        self.take(Duration::ZERO, now).is_some()
    }

    /// Takes a token. Returns how long to pause if there is none.
    pub fn take_or_pause(&mut self, now: Instant) -> Option<Duration> {
        let pause = self.take(MAX_PAUSE, now).unwrap_or(MAX_PAUSE);
        (!pause.is_zero()).then_some(pause)
    }

    /// Takes a token that is there within `max_wait`. Returns after which time.
    fn take(&mut self, max_wait: Duration, now: Instant) -> Option<Duration> {
        let (rate, bucket) = &mut self.own;
        let own = bucket.take(*rate, Duration::ZERO, now);
        own.or_else(|| match self.prefix {
            Some(prefix) => {
                let mut all = self.all.lock().unwrap_or_else(PoisonError::into_inner);
                all.take(prefix, max_wait, now)
            }
            None => Some(Duration::ZERO), // an unknown address has no scope to limit
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

    fn admitted(limiter: &mut RateLimiter, now: Instant) -> u32 {
        (0..9999).filter(|_| limiter.try_take(now)).count() as u32
    }

    #[test]
    fn each_connection_has_a_rate_of_its_own() {
        let (rates, now) = (MuxRates::new(64), Instant::now());
        let [mut fast, mut late] = [1; 2].map(|host| rates.streams(prefix(host)));
        assert_eq!(admitted(&mut fast, now), OWN_STREAMS.burst + 64 * BURST_SECONDS);
        assert_eq!(admitted(&mut late, now), OWN_STREAMS.burst);
        let later = now + Duration::from_secs(1);
        assert_eq!(admitted(&mut fast, later), 64);
        // Another address has its own rate, within that of the subnet.
        let mut other = rates.streams(prefix(2));
        assert_eq!(admitted(&mut other, later), OWN_STREAMS.burst + 64 * BURST_SECONDS);
    }

    #[test]
    fn a_subnet_has_four_times_the_rate_of_an_address() {
        let (rates, now) = (MuxRates::new(64), Instant::now());
        let all: u32 = (1..20).map(|host| admitted(&mut rates.streams(prefix(host)), now)).sum();
        assert_eq!(all, 19 * OWN_STREAMS.burst + WIDER * 64 * BURST_SECONDS);
    }

    #[test]
    fn frames_above_the_rate_pause_their_connection_and_no_other_that_stays_within_its_own() {
        let (rates, mut now) = (MuxRates::new(64), Instant::now());
        let [mut fast, mut slow] = [1; 2].map(|host| rates.frames(prefix(host)));
        let burst = OWN_FRAMES.burst + FRAMES_PER_STREAM * 64 * BURST_SECONDS;
        assert_eq!(
            (0..9999).take_while(|_| fast.take_or_pause(now).is_none()).count() as u32,
            burst
        );
        assert!(fast.take_or_pause(now) <= Some(MAX_PAUSE));
        for _ in 0..1000 {
            now += OWN_FRAMES.spacing;
            (0..100).for_each(|_| _ = fast.take_or_pause(now));
            assert_eq!(slow.take_or_pause(now), None);
        }
    }

    #[test]
    fn zero_means_unlimited() {
        let (rates, now) = (MuxRates::new(0), Instant::now());
        assert_eq!(admitted(&mut rates.streams(prefix(1)), now), 9999);
        assert_eq!(rates.frames(prefix(1)).take_or_pause(now), None);
    }
}
