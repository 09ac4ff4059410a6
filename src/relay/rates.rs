//! Request rates: how often a peer may ask, and all the peers of one address together.
//!
//! Sans-IO. GCRA: a token bucket that holds a minute's worth, kept as the instant at which it will be full again. A full
//! bucket is the same as none, and the sweep forgets it: only those that were used within the last minute are kept.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use libp2p::PeerId;

use crate::{address::ClientPrefix, event::Refused};

/// What a bucket holds, as the time it takes to fill.
const BURST: Duration = Duration::from_secs(60);

/// The rate of an address is this many times that of a peer: a household, or a small office.
const PEERS_PER_ADDRESS: u32 = 10;

/// The buckets for one kind of request.
#[derive(Debug)]
pub struct Rates {
    /// How many requests a minute a peer may send; zero: no limit.
    pub per_minute: u32,
    peers: HashMap<PeerId, FullAt>,
    addresses: HashMap<ClientPrefix, FullAt>,
}

/// When a bucket will be full again.
pub type FullAt = Instant;

impl Rates {
    /// A peer may send this many requests a minute; zero: no limit. All buckets are full.
    pub fn new(per_minute: u32) -> Self {
        Self { per_minute, peers: HashMap::new(), addresses: HashMap::new() }
    }

    /// How many buckets are kept.
    #[cfg(test)]
    pub fn buckets(&self) -> usize {
        self.peers.len() + self.addresses.len()
    }

    /// Takes one request out of the peer's bucket and, if `address` is given, out of its address's; out of neither if
    /// one is empty.
    ///
    /// # Errors
    ///
    /// Which one is empty.
    pub fn take(
        &mut self,
        peer: PeerId,
        address: Option<ClientPrefix>,
        now: Instant,
    ) -> Result<(), Refused> {
        let charge = |bucket: Option<&FullAt>, burst: u32| {
            let rate = Rate { burst, spacing: BURST.checked_div(burst)? };
            let (full_at, wait) = rate.after_one(bucket.copied(), now);
            wait.is_zero().then_some(full_at)
        };
        if self.per_minute == 0 {
            return Ok(());
        }
        let of_peer = charge(self.peers.get(&peer), self.per_minute).ok_or(Refused::TooOften)?;
        if let Some(address) = address {
            let rate = self.per_minute.saturating_mul(PEERS_PER_ADDRESS);
            let full_at = charge(self.addresses.get(&address), rate);
            let full_at = full_at.ok_or(Refused::AddressTooOften(address))?;
            self.addresses.insert(address, full_at);
        }
        self.peers.insert(peer, of_peer);
        Ok(())
    }

    /// Forgets the buckets that are full.
    pub fn forget_full(&mut self, now: Instant) {
        self.peers.retain(|_, full_at| *full_at > now);
        self.addresses.retain(|_, full_at| *full_at > now);
    }
}

/// `burst` at once, and one more each `spacing`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate {
    /// How many may arrive at once.
    pub burst: u32,
    /// The time between two after that.
    pub spacing: Duration,
}

impl Rate {
    /// When a bucket will be full again once one was taken out, and how long that one has to wait.
    pub fn after_one(self, full_at: Option<FullAt>, now: Instant) -> (FullAt, Duration) {
        let full_at = full_at.map_or(now, |full_at| now.max(full_at)) + self.spacing;
        (full_at, full_at.saturating_duration_since(now + self.spacing * self.burst))
    }
}

#[cfg(test)]
mod tests {
    use std::net::{IpAddr, Ipv4Addr};

    use super::*;

    fn home(n: u8) -> Option<ClientPrefix> {
        Some(IpAddr::from(Ipv4Addr::new(192, 0, 2, n)).into())
    }

    /// The number of consecutive requests that are allowed.
    fn count_allowed(rates: &mut Rates, peer: PeerId, now: Instant) -> usize {
        (0..1000).take_while(|_| rates.take(peer, None, now).is_ok()).count()
    }

    #[test]
    fn a_bucket_allows_a_minutes_burst_and_then_the_rate() {
        let (mut rates, now, peer) = (Rates::new(30), Instant::now(), PeerId::random());
        assert_eq!(count_allowed(&mut rates, peer, now), 30);
        assert_eq!(count_allowed(&mut rates, peer, now + Duration::from_secs(1)), 0);
        assert_eq!(count_allowed(&mut rates, peer, now + Duration::from_secs(2)), 1);
        assert_eq!(count_allowed(&mut rates, peer, now + Duration::from_secs(32)), 15);
        assert_eq!(count_allowed(&mut rates, peer, now + Duration::from_secs(999)), 30);
    }

    #[test]
    fn an_address_has_ten_times_the_rate_of_a_peer() {
        let (mut rates, now) = (Rates::new(1), Instant::now());
        for _ in 0..10 {
            assert_eq!(rates.take(PeerId::random(), home(1), now), Ok(()));
        }
        let eleventh = PeerId::random();
        let spent = Refused::AddressTooOften(home(1).unwrap());
        assert_eq!(rates.take(eleventh, home(1), now), Err(spent));
        // The refusal was not charged to the peer's own bucket.
        assert_eq!(rates.take(eleventh, home(2), now), Ok(()));
        assert_eq!(rates.take(eleventh, home(2), now), Err(Refused::TooOften));
    }

    #[test]
    fn a_renewal_is_charged_to_the_peer_and_not_to_its_address() {
        let (mut rates, now, peer) = (Rates::new(1), Instant::now(), PeerId::random());
        while rates.take(PeerId::random(), home(1), now).is_ok() {}
        assert_eq!(rates.take(peer, None, now), Ok(()));
    }

    #[test]
    fn zero_means_unlimited_and_keeps_no_state() {
        let (mut rates, now, peer) = (Rates::new(0), Instant::now(), PeerId::random());
        assert_eq!(count_allowed(&mut rates, peer, now), 1000);
        assert_eq!(rates.buckets(), 0);
    }

    #[test]
    fn full_buckets_are_removed() {
        let (mut rates, now) = (Rates::new(30), Instant::now());
        rates.take(PeerId::random(), home(1), now).unwrap();
        rates.forget_full(now + Duration::from_secs(1));
        assert_eq!(rates.buckets(), 1, "the bucket of an address fills ten times as fast");
        rates.forget_full(now + Duration::from_secs(2));
        assert_eq!(rates.buckets(), 0);
    }

    #[test]
    fn the_highest_rate_still_limits() {
        let (mut rates, now) = (Rates::new(u32::MAX), Instant::now());
        assert_eq!(rates.take(PeerId::random(), home(1), now), Ok(()));
        assert_eq!(rates.buckets(), 2);
    }
}
