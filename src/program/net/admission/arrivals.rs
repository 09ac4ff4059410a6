//! How fast new connections may come from one address, subnet, or IPv6 /32.
//!
//! As many at once as twice the slots of that scope, so that the clients of a relay that was restarted, or
//! those behind one carrier's NAT, are back at once; then 8 a second from an address, four times that from a
//! subnet, and four times that again from an IPv6 /32. What comes faster waits for a few seconds.

use std::{
    net::IpAddr,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use super::limits::Limits;
use crate::{
    config::Config,
    relay::rates::{Rate, ScopedRates},
};

/// How many connections a second an address may make in the long run.
const PER_SECOND: u32 = 8;

/// How much more a wider scope may than a narrower one.
const WIDER: u32 = 4;

/// The longest that a connection waits for its turn.
const PATIENCE: Duration = Duration::from_secs(5);

/// The rates of new connections. Clones are the same.
#[derive(Clone, Debug)]
pub struct Arrivals {
    rates: Arc<Mutex<ScopedRates>>,
    most_waiting: usize,
}

impl Arrivals {
    /// Those that follow from the slots that a scope may hold; without a cap on its connections a scope has
    /// no rate.
    pub fn new(config: &Config, limits: &Limits) -> Self {
        let all = config.max_reservations;
        let slots = [config.reservations_per_ip(), config.reservations_per_subnet()];
        let [of_address, of_subnet] = slots.map(|slots| slots.unwrap_or(all));
        let rate = |slots: usize, wider: u32| Rate {
            burst: u32::try_from(slots.saturating_mul(2))
                .unwrap_or(u32::MAX)
                .max(PER_SECOND * wider),
            spacing: Duration::from_secs(1) / (PER_SECOND * wider),
        };
        let per_subnet = limits.per_subnet();
        let levels = [
            limits.per_ip().map(|_| rate(of_address, 1)),
            per_subnet.map(|_| rate(of_subnet, WIDER)),
            per_subnet.map(|_| rate(all, WIDER * WIDER)),
        ];
        Self::with(levels, limits.max_handshakes)
    }

    /// No limit, for connections that do not come in.
    pub fn unlimited() -> Self {
        Self::with([None; 3], 0)
    }

    fn with(levels: [Option<Rate>; 3], most_waiting: usize) -> Self {
        Self { rates: Arc::new(Mutex::new(ScopedRates::new(levels))), most_waiting }
    }

    /// How long a connection from this address has to wait while so many wait; `None`: it is turned away.
    pub fn wait(&self, ip: IpAddr, waiting: usize, now: Instant) -> Option<Duration> {
        let patience = if waiting < self.most_waiting { PATIENCE } else { Duration::ZERO };
        let mut rates = self.rates.lock().unwrap_or_else(PoisonError::into_inner);
        rates.take(ip.into(), patience, now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_clients_of_a_restarted_relay_are_back_at_once_and_a_flood_waits_or_is_turned_away() {
        let arrivals = Arrivals::new(&Config::default(), &Limits::default());
        let (now, ip) = (Instant::now(), IpAddr::from([192, 0, 2, 1]));
        let waits: Vec<_> = (0..1000).map(|_| arrivals.wait(ip, 0, now)).collect();
        let at_once = waits.iter().filter(|wait| **wait == Some(Duration::ZERO));
        assert_eq!(at_once.count(), 2 * 64);
        assert_eq!(waits.iter().flatten().count(), 2 * 64 + 5 * 8);
        assert_eq!(arrivals.wait(ip, usize::MAX, now), None);
        assert_eq!(arrivals.wait(ip, 0, now + Duration::from_secs(60)), Some(Duration::ZERO));
    }

    #[test]
    fn no_cap_on_connections_is_no_limit_on_how_fast_they_come() {
        let limits = Limits {
            max_connections_per_ip: Some(0),
            max_connections_per_subnet: Some(0),
            ..Limits::default()
        };
        let arrivals = Arrivals::new(&Config::default(), &limits);
        let ip = IpAddr::from([192, 0, 2, 1]);
        let waits = (0..9999).map(|_| arrivals.wait(ip, 0, Instant::now()));
        assert!(waits.into_iter().all(|wait| wait == Some(Duration::ZERO)));
    }
}
