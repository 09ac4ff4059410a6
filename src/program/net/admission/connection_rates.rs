//! Rate limits on new connections, by address, subnet and IPv6 /32.
//!
//! A token bucket (GCRA) for each scope. Its burst is twice the slots that the scope may hold, so that after a restart
//! of the relay all clients behind one carrier's NAT can reconnect at once; at least it is what the rate allows in 1 s.
//! The rate is 8 connections a second for an address, 32 for a subnet, and 128 for an IPv6 /32. A connection above the
//! rate is delayed by up to 5 s, or denied if that is not enough.

use std::{
    net::IpAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use super::{limits::Limits, scoped_rates::ScopedRates};
use crate::{config::Config, relay::rates::Rate};

/// How many connections a second an address may open once its burst is used up.
const PER_SECOND: u32 = 8;

/// The ratio between the rate of a scope and that of the next narrower one.
const WIDER: u32 = 4;

/// The longest that a connection is delayed.
const MAX_DELAY: Duration = Duration::from_secs(5);

/// The rate limits on new connections. Clones share them. The default has none, for a transport that only dials.
#[derive(Clone, Debug, Default)]
pub struct ConnectionRates {
    rates: Arc<Mutex<ScopedRates>>,
    /// Which scopes have a cap on their connections, and so a rate; and how many connections may be delayed.
    limits: Limits,
}

impl ConnectionRates {
    /// The rates that follow from the slots of each scope. A scope without a cap on its connections has none.
    pub fn new(config: &Config, limits: Limits) -> Self {
        let rates = Self { rates: Arc::default(), limits };
        rates.configure(config);
        rates
    }

    /// Derives the rates from this configuration. Tokens that were taken stay taken.
    pub fn configure(&self, config: &Config) {
        let (all, caps) = (config.max_reservations, config.slot_caps());
        let rate = |slots: Option<usize>, wider: u32| {
            let burst = u32::try_from(slots.unwrap_or(all).saturating_mul(2)).unwrap_or(u32::MAX);
            let per_second = PER_SECOND * wider;
            Rate { burst: burst.max(per_second), spacing: Duration::from_secs(1) / per_second }
        };
        let per_subnet = self.limits.per_subnet();
        self.lock().set_rates([
            self.limits.per_ip().map(|_| rate(caps.per_address, 1)),
            per_subnet.map(|_| rate(caps.per_subnet, WIDER)),
            per_subnet.map(|_| rate(None, WIDER * WIDER)),
        ]);
    }

    /// Returns how long to delay a connection from this address while this many others are delayed; `None`: it is
    /// denied.
    pub fn delay(&self, ip: IpAddr, delayed: usize, now: Instant) -> Option<Duration> {
        // A delayed connection keeps its socket: there may be as many as handshakes.
        let has_room = delayed < self.limits.max_handshakes;
        let max_delay = if has_room { MAX_DELAY } else { Duration::ZERO };
        self.lock().take(ip.into(), max_delay, now)
    }

    fn lock(&self) -> MutexGuard<'_, ScopedRates> {
        self.rates.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clients_of_a_restarted_relay_reconnect_at_once_and_a_flood_is_delayed_or_denied() {
        let rates = ConnectionRates::new(&Config::default(), Limits::default());
        let (now, ip) = (Instant::now(), IpAddr::from([192, 0, 2, 1]));
        let delays: Vec<_> = (0..1000).map(|_| rates.delay(ip, 0, now)).collect();
        let at_once = delays.iter().filter(|delay| **delay == Some(Duration::ZERO));
        assert_eq!(at_once.count(), 2 * 64);
        assert_eq!(delays.iter().flatten().count(), 2 * 64 + 5 * 8);
        assert_eq!(rates.delay(ip, usize::MAX, now), None);
        assert_eq!(rates.delay(ip, 0, now + Duration::from_secs(60)), Some(Duration::ZERO));
    }

    #[test]
    fn without_a_cap_on_connections_there_is_no_rate_limit() {
        let limits = Limits {
            max_connections_per_ip: Some(0),
            max_connections_per_subnet: Some(0),
            ..Limits::default()
        };
        let rates = ConnectionRates::new(&Config::default(), limits);
        let ip = IpAddr::from([192, 0, 2, 1]);
        let delays = (0..9999).map(|_| rates.delay(ip, 0, Instant::now()));
        assert!(delays.into_iter().all(|delay| delay == Some(Duration::ZERO)));
    }
}
