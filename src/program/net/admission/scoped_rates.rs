//! Rates by client prefix: how often something may arrive from each address, subnet and IPv6 /32.
//!
//! Sans-IO. GCRA, as [`crate::relay::rates`] has it.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use crate::{
    address::ClientPrefix,
    relay::rates::{FullAt, Rate},
};

/// The most buckets of one level. Beyond that only the wider scopes limit a scope that has no bucket.
const MOST_SCOPES: usize = 65_536;

/// How often full buckets, which are the same as none, are removed: that is a pass over all buckets.
const PURGE_INTERVAL: Duration = Duration::from_secs(1);

/// How often something may arrive from each address, subnet and IPv6 /32.
#[derive(Debug, Default)]
pub struct ScopedRates {
    /// For an address, a subnet, and an IPv6 /32.
    levels: [Level; 3],
    purged_at: Option<Instant>,
}

/// The buckets of all scopes of one width.
#[derive(Debug, Default)]
struct Level {
    /// `None`: no limit.
    rate: Option<Rate>,
    buckets: HashMap<ClientPrefix, FullAt>,
}

/// One bucket, full at the start.
#[derive(Clone, Copy, Debug, Default)]
pub struct Bucket(Option<FullAt>);

impl Bucket {
    /// Takes a token, and returns how long the caller has to wait for it. If that is longer than `max_wait`, takes none and
    /// returns `None`.
    pub fn take(&mut self, rate: Rate, max_wait: Duration, now: Instant) -> Option<Duration> {
        let (full_at, wait) = rate.after_one(self.0, now);
        (wait <= max_wait).then(|| {
            self.0 = Some(full_at);
            wait
        })
    }
}

impl ScopedRates {
    /// `levels` are the rates of an address, a subnet, and an IPv6 /32; `None`: no limit. All buckets are full.
    pub fn new(levels: [Option<Rate>; 3]) -> Self {
        let levels = levels.map(|rate| Level { rate, ..Level::default() });
        Self { levels, purged_at: None }
    }

    /// Replaces the rates; what was taken stays taken.
    pub fn set_rates(&mut self, rates: [Option<Rate>; 3]) {
        self.levels.iter_mut().zip(rates).for_each(|(level, rate)| level.rate = rate);
    }

    /// Takes a token of each scope of this prefix, and returns how long the caller has to wait for them. If that is longer
    /// than `max_wait`, takes none and returns `None`.
    pub fn take(
        &mut self,
        prefix: ClientPrefix,
        max_wait: Duration,
        now: Instant,
    ) -> Option<Duration> {
        if self.purged_at.is_none_or(|at| now >= at + PURGE_INTERVAL) {
            for level in &mut self.levels {
                level.buckets.retain(|_, full_at| *full_at > now);
            }
            self.purged_at = Some(now);
        }
        let scopes = [Some(prefix), Some(prefix.subnet().0), prefix.wide()];
        let (mut longest, mut charged) = (Duration::ZERO, [None, None, None]);
        let levels = self.levels.iter_mut().zip(scopes);
        for ((Level { rate, buckets }, scope), charge) in levels.zip(&mut charged) {
            if let (Some(rate), Some(scope)) = (rate, scope) {
                let (full_at, wait) = rate.after_one(buckets.get(&scope).copied(), now);
                longest = longest.max(wait);
                *charge = Some((buckets, scope, full_at));
            }
        }
        if longest > max_wait {
            return None;
        }
        for (buckets, scope, full_at) in charged.into_iter().flatten() {
            if buckets.len() < MOST_SCOPES || buckets.contains_key(&scope) {
                buckets.insert(scope, full_at);
            }
        }
        Some(longest)
    }
}

#[cfg(test)]
mod tests {
    use std::net::{IpAddr, Ipv4Addr};

    use super::*;

    fn home(n: u8) -> Option<ClientPrefix> {
        Some(IpAddr::from(Ipv4Addr::new(192, 0, 2, n)).into())
    }

    #[test]
    fn a_bucket_has_a_burst_at_once_and_then_one_each_spacing() {
        let rate = Rate { burst: 20, spacing: Duration::from_secs(3) };
        let (mut bucket, start) = (Bucket::default(), Instant::now());
        let mut taken = |spacings: u32| {
            let now = start + rate.spacing * spacings;
            (0..100).filter(|_| bucket.take(rate, Duration::ZERO, now).is_some()).count()
        };
        assert_eq!([0, 1, 11, 1000].map(&mut taken), [20, 1, 10, 20]);
        let now = start + rate.spacing * 1000;
        let waits = [0; 2].map(|_| bucket.take(rate, Duration::MAX, now));
        assert_eq!(waits, [1, 2].map(|nth| Some(rate.spacing * nth)));
    }

    #[test]
    fn excess_requests_wait_for_every_scope() {
        let start = Instant::now();
        let rate = |burst| Some(Rate { burst, spacing: Duration::from_secs(1) });
        let mut rates = ScopedRates::new([rate(2), rate(3), None]);
        let [first, second] = [1, 2].map(|n| home(n).unwrap());
        let max_wait = Duration::from_secs(2);
        let mut take = |prefix, at: u64| {
            let wait = rates.take(prefix, max_wait, start + Duration::from_secs(at));
            wait.map(|wait| wait.as_secs())
        };
        assert_eq!([0; 3].map(|at| take(first, at)), [Some(0), Some(0), Some(1)]);
        // The subnet has had three. The second address has had none: it waits for the subnet only.
        assert_eq!([0; 3].map(|at| take(second, at)), [Some(1), Some(2), None]);
        assert_eq!(take(second, 100), Some(0));
    }

    #[test]
    fn the_number_of_tracked_scopes_is_bounded() {
        let start = Instant::now();
        let rate = Some(Rate { burst: 1, spacing: Duration::from_secs(1) });
        let mut rates = ScopedRates::new([rate, None, None]);
        let address = |n: u32| ClientPrefix::from(IpAddr::from(Ipv4Addr::from_bits(n)));
        for n in 0..MOST_SCOPES as u32 + 10 {
            assert_eq!(rates.take(address(n), Duration::ZERO, start), Some(Duration::ZERO));
        }
        assert_eq!(rates.levels[0].buckets.len(), MOST_SCOPES);
        // A scope with a bucket is still limited. Once its bucket is full again, it makes room.
        assert_eq!(rates.take(address(1), Duration::ZERO, start), None);
        let later = start + Duration::from_secs(9);
        assert!(rates.take(address(u32::MAX), Duration::ZERO, later).is_some());
        assert_eq!(rates.levels[0].buckets.len(), 1);
    }

    #[test]
    fn few_buckets_are_purged_too_once_they_are_full() {
        let start = Instant::now();
        let rate = Some(Rate { burst: 1, spacing: Duration::from_secs(1) });
        let mut rates = ScopedRates::new([rate; 3]);
        for (host, millis, kept) in [(1, 0, 1), (2, 600, 2), (3, 1800, 1)] {
            let now = start + Duration::from_millis(millis);
            assert!(rates.take(home(host).unwrap(), Duration::MAX, now).is_some());
            assert_eq!(rates.levels[0].buckets.len(), kept, "after {millis} ms");
        }
    }

    #[test]
    fn a_flood_of_addresses_has_the_buckets_purged_once_a_second() {
        let start = Instant::now();
        let rate = Some(Rate { burst: 1, spacing: Duration::from_millis(100) });
        let mut rates = ScopedRates::new([rate, None, None]);
        let address = |n: u32| ClientPrefix::from(IpAddr::from(Ipv4Addr::from_bits(n)));
        let most = MOST_SCOPES as u32;
        for n in 0..=most {
            assert!(rates.take(address(n), Duration::ZERO, start).is_some());
        }
        for (millis, kept) in [(500, MOST_SCOPES), (1000, 1)] {
            let now = start + Duration::from_millis(millis);
            assert!(rates.take(address(most + millis as u32), Duration::ZERO, now).is_some());
            assert_eq!(rates.levels[0].buckets.len(), kept, "after {millis} ms");
        }
    }
}
