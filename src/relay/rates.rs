//! Request rates: how often a peer may ask, and all the peers of one address together.
//!
//! Sans-IO. Each has a token bucket that holds a minute's worth, kept as the one instant at which it
//! will be full again. A full bucket is no different from none: the sweep forgets it, so there are
//! never more than were asked of within the last minute.

use std::{
    collections::HashMap,
    hash::Hash,
    time::{Duration, Instant},
};

use libp2p::PeerId;

use crate::{address::ClientPrefix, event::Refused};

/// What a bucket holds, as the time it takes to fill.
const BURST: Duration = Duration::from_secs(60);

/// An address may ask so many times as often as a peer: a household, or a small office.
const PEERS_PER_ADDRESS: u64 = 10;

/// The buckets for one kind of request.
#[derive(Debug)]
pub struct Rates {
    /// How often a peer may ask, in requests a minute; zero: as often as it likes.
    per_minute: u32,
    peers: HashMap<PeerId, FullAt>,
    addresses: HashMap<ClientPrefix, FullAt>,
}

/// When a bucket will be full again.
type FullAt = Instant;

impl Rates {
    /// All buckets are full. Zero: no limit.
    pub fn new(per_minute: u32) -> Self {
        Self { per_minute, peers: HashMap::new(), addresses: HashMap::new() }
    }

    /// This rate holds from now on.
    pub fn set(&mut self, per_minute: u32) {
        self.per_minute = per_minute;
    }

    /// How many buckets are kept.
    pub fn buckets(&self) -> usize {
        self.peers.len() + self.addresses.len()
    }

    /// Takes one request out of the peer's bucket and, if one is given, out of its address's; from neither if
    /// one is empty.
    ///
    /// # Errors
    ///
    /// Which one is.
    pub fn take(
        &mut self,
        peer: PeerId,
        address: Option<ClientPrefix>,
        now: Instant,
    ) -> Result<(), Refused> {
        let Some(rate) = self.rate(1) else {
            return Ok(());
        };
        let peer_full_at = after_one(&self.peers, &peer, rate, now).ok_or(Refused::TooOften)?;
        if let (Some(address), Some(rate)) = (address, self.rate(PEERS_PER_ADDRESS)) {
            let full_at = after_one(&self.addresses, &address, rate, now);
            let full_at = full_at.ok_or(Refused::AddressTooOften(address))?;
            self.addresses.insert(address, full_at);
        }
        self.peers.insert(peer, peer_full_at);
        Ok(())
    }

    /// Forgets the buckets that are full.
    pub fn forget_full(&mut self, now: Instant) {
        self.peers.retain(|_, full_at| *full_at > now);
        self.addresses.retain(|_, full_at| *full_at > now);
    }

    /// That of so many peers together.
    fn rate(&self, peers: u64) -> Option<Rate> {
        let per_burst = u64::from(self.per_minute) * peers;
        let nanos = (BURST.as_nanos() as u64).checked_div(per_burst)?;
        let burst = u32::try_from(per_burst).unwrap_or(u32::MAX);
        Some(Rate { burst, spacing: Duration::from_nanos(nanos) })
    }
}

/// How many scopes of one level have a bucket at most. Beyond that the next wider one counts alone.
const MOST_SCOPES: usize = 65_536;

/// How fast something may come from each address, subnet, and IPv6 /32: GCRA.
#[derive(Debug)]
pub struct ScopedRates {
    /// For an address, a subnet, and an IPv6 /32; `None`: no limit.
    levels: [Option<Rate>; 3],
    buckets: [HashMap<ClientPrefix, FullAt>; 3],
}

/// So many at once, and one more each `spacing`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate {
    /// How many may come at once.
    pub burst: u32,
    /// After how long there may be one more.
    pub spacing: Duration,
}

impl Rate {
    /// When a bucket will be full again once one was taken out of it, and how long that one has to wait.
    fn after_one(self, full_at: Option<FullAt>, now: Instant) -> (FullAt, Duration) {
        let full_at = full_at.map_or(now, |full_at| now.max(full_at)) + self.spacing;
        (full_at, full_at.saturating_duration_since(now + self.spacing * self.burst))
    }
}

/// One bucket, full at first.
#[derive(Clone, Copy, Debug, Default)]
pub struct Bucket(Option<FullAt>);

impl Bucket {
    /// Takes one out: how long it has to wait. `None`: longer than `patience`, and it does not count then.
    pub fn take(&mut self, rate: Rate, patience: Duration, now: Instant) -> Option<Duration> {
        let (full_at, wait) = rate.after_one(self.0, now);
        (wait <= patience).then(|| {
            self.0 = Some(full_at);
            wait
        })
    }
}

impl ScopedRates {
    /// Nothing has come yet. `levels` are those of an address, a subnet, and an IPv6 /32; `None`: no limit.
    pub fn new(levels: [Option<Rate>; 3]) -> Self {
        Self { levels, buckets: [HashMap::new(), HashMap::new(), HashMap::new()] }
    }

    /// One comes from this prefix: how long it has to wait. `None`: longer than `patience`, and it does not
    /// count then.
    pub fn take(
        &mut self,
        prefix: ClientPrefix,
        patience: Duration,
        now: Instant,
    ) -> Option<Duration> {
        let scopes = [Some(prefix), Some(prefix.subnet().into()), prefix.wide()];
        let mut wait = Duration::ZERO;
        let full_at = std::array::from_fn::<_, 3, _>(|level| {
            let (rate, scope) = (self.levels.get(level).copied()??, scopes.get(level).copied()??);
            let before = self.buckets.get(level)?.get(&scope).copied();
            let (full_at, waits) = rate.after_one(before, now);
            wait = wait.max(waits);
            Some((scope, full_at))
        });
        if wait > patience {
            return None;
        }
        for (buckets, bucket) in self.buckets.iter_mut().zip(full_at) {
            let Some((scope, full_at)) = bucket else {
                continue;
            };
            if buckets.len() >= MOST_SCOPES && !buckets.contains_key(&scope) {
                buckets.retain(|_, full_at| *full_at > now);
                if buckets.len() >= MOST_SCOPES {
                    continue;
                }
            }
            buckets.insert(scope, full_at);
        }
        Some(wait)
    }
}

/// When a bucket will be full once a request was taken out of it; `None`: there is none in it.
fn after_one<K: Hash + Eq>(
    buckets: &HashMap<K, FullAt>,
    whose: &K,
    rate: Rate,
    now: Instant,
) -> Option<FullAt> {
    let (full_at, wait) = rate.after_one(buckets.get(whose).copied(), now);
    wait.is_zero().then_some(full_at)
}

#[cfg(test)]
mod tests {
    use std::net::{IpAddr, Ipv4Addr};

    use super::*;

    fn home(n: u8) -> Option<ClientPrefix> {
        Some(IpAddr::from(Ipv4Addr::new(192, 0, 2, n)).into())
    }

    /// How often in a row the peer is let through.
    fn takes(rates: &mut Rates, peer: PeerId, now: Instant) -> usize {
        (0..1000).take_while(|_| rates.take(peer, None, now).is_ok()).count()
    }

    #[test]
    fn a_minutes_worth_at_once_and_then_as_it_comes() {
        let (mut rates, now, peer) = (Rates::new(30), Instant::now(), PeerId::random());
        assert_eq!(takes(&mut rates, peer, now), 30);
        assert_eq!(takes(&mut rates, peer, now + Duration::from_secs(1)), 0);
        assert_eq!(takes(&mut rates, peer, now + Duration::from_secs(2)), 1);
        assert_eq!(takes(&mut rates, peer, now + Duration::from_secs(32)), 15);
        assert_eq!(takes(&mut rates, peer, now + Duration::from_secs(999)), 30);
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
    fn what_comes_too_fast_waits_for_the_narrowest_and_the_wider_scope() {
        let start = Instant::now();
        let rate = |burst| Some(Rate { burst, spacing: Duration::from_secs(1) });
        let mut rates = ScopedRates::new([rate(2), rate(3), None]);
        let [first, second] = [1, 2].map(|n| home(n).unwrap());
        let patience = Duration::from_secs(2);
        let mut take = |prefix, at: u64| {
            let wait = rates.take(prefix, patience, start + Duration::from_secs(at));
            wait.map(|wait| wait.as_secs())
        };
        assert_eq!([0; 3].map(|at| take(first, at)), [Some(0), Some(0), Some(1)]);
        // The subnet has had three, and the address waits for itself no longer than it would else.
        assert_eq!([0; 3].map(|at| take(second, at)), [Some(1), Some(2), None]);
        assert_eq!(take(second, 100), Some(0));
    }

    #[test]
    fn no_more_scopes_are_kept_than_there_is_room_for() {
        let start = Instant::now();
        let rate = Some(Rate { burst: 1, spacing: Duration::from_secs(1) });
        let mut rates = ScopedRates::new([rate, None, None]);
        let address = |n: u32| ClientPrefix::from(IpAddr::from(Ipv4Addr::from_bits(n)));
        for n in 0..MOST_SCOPES as u32 + 10 {
            assert_eq!(rates.take(address(n), Duration::ZERO, start), Some(Duration::ZERO));
        }
        assert_eq!(rates.buckets[0].len(), MOST_SCOPES);
        // Those that are there are still held to it; later they make room.
        assert_eq!(rates.take(address(1), Duration::ZERO, start), None);
        let later = start + Duration::from_secs(9);
        assert!(rates.take(address(u32::MAX), Duration::ZERO, later).is_some());
        assert_eq!(rates.buckets[0].len(), 1);
    }

    #[test]
    fn an_address_has_ten_times_as_much_for_all_its_peers() {
        let (mut rates, now) = (Rates::new(1), Instant::now());
        for _ in 0..10 {
            assert_eq!(rates.take(PeerId::random(), home(1), now), Ok(()));
        }
        let eleventh = PeerId::random();
        let spent = Refused::AddressTooOften(home(1).unwrap());
        assert_eq!(rates.take(eleventh, home(1), now), Err(spent));
        // That cost the peer nothing.
        assert_eq!(rates.take(eleventh, home(2), now), Ok(()));
        assert_eq!(rates.take(eleventh, home(2), now), Err(Refused::TooOften));
    }

    #[test]
    fn who_pays_its_own_is_not_stopped_by_its_address() {
        let (mut rates, now, peer) = (Rates::new(1), Instant::now(), PeerId::random());
        while rates.take(PeerId::random(), home(1), now).is_ok() {}
        assert_eq!(rates.take(peer, None, now), Ok(()));
    }

    #[test]
    fn zero_is_no_limit_and_keeps_nothing() {
        let (mut rates, now, peer) = (Rates::new(0), Instant::now(), PeerId::random());
        assert_eq!(takes(&mut rates, peer, now), 1000);
        assert_eq!(rates.buckets(), 0);
    }

    #[test]
    fn buckets_that_are_full_are_forgotten() {
        let (mut rates, now) = (Rates::new(30), Instant::now());
        rates.take(PeerId::random(), home(1), now).unwrap();
        rates.forget_full(now + Duration::from_secs(1));
        assert_eq!(rates.buckets(), 1, "an address's fills ten times as fast");
        rates.forget_full(now + Duration::from_secs(2));
        assert_eq!(rates.buckets(), 0);
    }

    #[test]
    fn the_fastest_rate_still_counts() {
        let (mut rates, now) = (Rates::new(u32::MAX), Instant::now());
        assert_eq!(rates.take(PeerId::random(), home(1), now), Ok(()));
        assert_eq!(rates.buckets(), 2);
    }
}
