//! Limits on AutoNAT's dials: how often, and how many at once.
//!
//! Sans-IO. A client can have only its own address dialed; these limits keep clients from having the relay dial without
//! end, and one client from using up the dials of all.

use std::time::{Duration, Instant};

use libp2p::PeerId;

use crate::{
    address::ClientPrefix,
    program::net::admission::{limits::DIALED_FOR_AUTONAT, scoped_rates::Bucket},
    relay::{
        quota::{Caps, Quota},
        rates::{Rate, Rates},
    },
};

/// How many times a minute a peer is dialed, with a burst of as many: go-libp2p's limit. All peers of an address
/// together: ten times as often.
pub const PER_PEER: u32 = 12;

/// How many times a minute all peers together are dialed, with a burst of as many.
pub const TOTAL: u32 = 600;

const MINUTE: Duration = Duration::from_secs(60);

/// The rates, and the dials in progress.
#[derive(Debug)]
pub struct DialLimits {
    rates: Rates,
    total: Bucket,
    in_progress: Quota,
}

/// Which limit a dial would exceed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Exceeded {
    /// The rate of the peer or of its address.
    #[error("too many dials for the client")]
    Client,
    /// The rate of all peers together.
    #[error("too many dials")]
    Total,
    /// The number of dials in progress, of the address or in total.
    #[error("too many dials at once")]
    InProgress,
}

impl DialLimits {
    /// No dials yet.
    pub fn new() -> Self {
        let (total, per_address) = (Some(DIALED_FOR_AUTONAT), Some(DIALED_FOR_AUTONAT / 4));
        Self {
            rates: Rates::new(PER_PEER),
            total: Bucket::default(),
            in_progress: Quota::new(Caps { total, per_subnet: None, per_address }),
        }
    }

    /// Begins a dial, to be [released](Self::release) when it ends.
    ///
    /// # Errors
    ///
    /// The limit that it would exceed. It counts towards none then.
    pub fn acquire(
        &mut self,
        peer: PeerId,
        prefix: ClientPrefix,
        now: Instant,
    ) -> Result<(), Exceeded> {
        if self.in_progress.full(Some(prefix)).is_some() {
            return Err(Exceeded::InProgress);
        }
        // Before the rates by peer, whose table so grows by at most `TOTAL` entries a minute.
        let (mut total, rate) = (self.total, Rate { burst: TOTAL, spacing: MINUTE / TOTAL });
        total.take(rate, Duration::ZERO, now).ok_or(Exceeded::Total)?;
        self.rates.take(peer, Some(prefix), now).map_err(|_| Exceeded::Client)?;
        self.rates.forget_full(now); // at most `TOTAL` times a minute
        self.total = total;
        self.in_progress.add(Some(prefix));
        Ok(())
    }

    /// Ends a dial.
    pub fn release(&mut self, prefix: ClientPrefix) {
        self.in_progress.remove(Some(prefix));
    }
}

#[cfg(test)]
mod tests {
    use std::net::{IpAddr, Ipv4Addr};

    use super::*;

    fn at(n: u32) -> ClientPrefix {
        IpAddr::from(Ipv4Addr::from_bits(0x0b00_0000 + n)).into()
    }

    /// A dial that ends at once.
    fn dial(
        limits: &mut DialLimits,
        peer: PeerId,
        at: ClientPrefix,
        now: Instant,
    ) -> Result<(), Exceeded> {
        limits.acquire(peer, at, now).inspect(|()| limits.release(at))
    }

    #[test]
    fn each_peer_has_a_rate_limit() {
        let now = Instant::now();
        let (mut limits, peer) = (DialLimits::new(), PeerId::random());
        for _ in 0..PER_PEER {
            assert_eq!(dial(&mut limits, peer, at(1), now), Ok(()));
        }
        assert_eq!(dial(&mut limits, peer, at(2), now), Err(Exceeded::Client));
        assert_eq!(dial(&mut limits, PeerId::random(), at(1), now), Ok(()));
        let later = now + MINUTE / PER_PEER;
        assert_eq!(dial(&mut limits, peer, at(1), later), Ok(()));
        assert_eq!(dial(&mut limits, peer, at(1), later), Err(Exceeded::Client));
    }

    #[test]
    fn an_address_has_ten_times_the_rate_of_a_peer() {
        let now = Instant::now();
        let mut limits = DialLimits::new();
        let dialed = |limits: &mut DialLimits, at| {
            (0..10 * TOTAL).filter(|_| dial(limits, PeerId::random(), at, now).is_ok()).count()
        };
        assert_eq!(dialed(&mut limits, at(1)), 10 * PER_PEER as usize);
        assert_eq!(dialed(&mut limits, at(2)), 10 * PER_PEER as usize);
    }

    #[test]
    fn all_peers_share_a_rate_limit_and_the_table_is_bounded() {
        let start = Instant::now();
        let mut limits = DialLimits::new();
        for minute in 0..5 {
            let now = start + minute * MINUTE;
            let dials = (0..10 * TOTAL).map(|n| dial(&mut limits, PeerId::random(), at(n), now));
            assert_eq!(dials.filter(Result::is_ok).count(), TOTAL as usize);
            let exceeded = dial(&mut limits, PeerId::random(), at(0), now);
            assert_eq!(exceeded, Err(Exceeded::Total));
            assert!(limits.rates.buckets() <= 4 * TOTAL as usize);
        }
        assert!(limits.in_progress.scopes() == 0);
    }

    #[test]
    fn dials_in_progress_are_capped_in_total_and_by_address() {
        let now = Instant::now();
        let mut limits = DialLimits::new();
        let acquire = |limits: &mut DialLimits, n| limits.acquire(PeerId::random(), at(n), now);
        for n in 0..4 {
            for _ in 0..DIALED_FOR_AUTONAT / 4 {
                assert_eq!(acquire(&mut limits, n), Ok(()));
            }
            assert_eq!(acquire(&mut limits, n), Err(Exceeded::InProgress));
        }
        assert_eq!(acquire(&mut limits, 9), Err(Exceeded::InProgress));
        limits.release(at(0));
        assert_eq!(acquire(&mut limits, 9), Ok(()));
    }
}
