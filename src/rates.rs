//! Request rates: how often a peer may ask, and all the peers of one address together.
//!
//! Pure. Each has a token bucket that holds a minute's worth, kept as the one instant at which it
//! will be full again. A full bucket is no different from none: the sweep forgets it, so there are
//! never more than were asked of within the last minute.

use std::{
    collections::HashMap,
    hash::Hash,
    time::{Duration, Instant},
};

use libp2p::PeerId;

use crate::address::BilledTo;

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
    addresses: HashMap<BilledTo, FullAt>,
}

/// When a bucket will be full again.
type FullAt = Instant;

/// Whose bucket is empty.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Spent {
    /// The peer's.
    Peer,
    /// That of its address.
    Address(BilledTo),
}

impl Rates {
    /// All buckets are full. Zero: no limit.
    pub fn new(per_minute: u32) -> Self {
        Self {
            per_minute,
            peers: HashMap::new(),
            addresses: HashMap::new(),
        }
    }

    /// This rate holds from now on.
    pub fn set(&mut self, per_minute: u32) {
        self.per_minute = per_minute;
    }

    /// How many buckets are kept.
    pub fn buckets(&self) -> usize {
        self.peers.len() + self.addresses.len()
    }

    /// Takes one request out of the peer's bucket and out of its address's; from neither if one is
    /// empty.
    pub fn take(
        &mut self,
        peer: PeerId,
        address: Option<BilledTo>,
        now: Instant,
    ) -> Result<(), Spent> {
        let Some(spacing) = self.spacing(1) else {
            return Ok(());
        };
        let peer_full_at = after_one(&self.peers, &peer, spacing, now).ok_or(Spent::Peer)?;
        if let (Some(address), Some(spacing)) = (address, self.spacing(PEERS_PER_ADDRESS)) {
            let full_at = after_one(&self.addresses, &address, spacing, now);
            let full_at = full_at.ok_or(Spent::Address(address))?;
            self.addresses.insert(address, full_at);
        }
        self.peers.insert(peer, peer_full_at);
        Ok(())
    }

    /// Takes one request out of the peer's bucket alone.
    pub fn take_own(&mut self, peer: PeerId, now: Instant) -> Result<(), Spent> {
        self.take(peer, None, now)
    }

    /// Forgets the buckets that are full.
    pub fn forget_full(&mut self, now: Instant) {
        self.peers.retain(|_, full_at| *full_at > now);
        self.addresses.retain(|_, full_at| *full_at > now);
    }

    /// How long it takes until there is one more request to be had, by so many peers together.
    fn spacing(&self, peers: u64) -> Option<Duration> {
        let per_burst = u64::from(self.per_minute) * peers;
        let nanos = (BURST.as_nanos() as u64).checked_div(per_burst)?;
        Some(Duration::from_nanos(nanos))
    }
}

/// When a bucket will be full once a request was taken out of it; `None`: there is none in it.
fn after_one<K: Hash + Eq>(
    buckets: &HashMap<K, FullAt>,
    whose: &K,
    spacing: Duration,
    now: Instant,
) -> Option<FullAt> {
    let full_at = buckets.get(whose).map_or(now, |full_at| now.max(*full_at)) + spacing;
    (full_at <= now + BURST).then_some(full_at)
}

#[cfg(test)]
mod tests {
    use std::net::{IpAddr, Ipv4Addr};

    use super::*;

    fn home(n: u8) -> Option<BilledTo> {
        Some(IpAddr::from(Ipv4Addr::new(192, 0, 2, n)).into())
    }

    /// How often in a row the peer is let through.
    fn takes(rates: &mut Rates, peer: PeerId, now: Instant) -> usize {
        (0..1000)
            .take_while(|_| rates.take_own(peer, now).is_ok())
            .count()
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
    fn an_address_has_ten_times_as_much_for_all_its_peers() {
        let (mut rates, now) = (Rates::new(1), Instant::now());
        for _ in 0..10 {
            assert_eq!(rates.take(PeerId::random(), home(1), now), Ok(()));
        }
        let eleventh = PeerId::random();
        let spent = Spent::Address(home(1).unwrap());
        assert_eq!(rates.take(eleventh, home(1), now), Err(spent));
        // That cost the peer nothing.
        assert_eq!(rates.take(eleventh, home(2), now), Ok(()));
        assert_eq!(rates.take(eleventh, home(2), now), Err(Spent::Peer));
    }

    #[test]
    fn who_pays_its_own_is_not_stopped_by_its_address() {
        let (mut rates, now, peer) = (Rates::new(1), Instant::now(), PeerId::random());
        while rates.take(PeerId::random(), home(1), now).is_ok() {}
        assert_eq!(rates.take_own(peer, now), Ok(()));
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
