//! Limits on AutoNAT's dials: how often, and how many at once.
//!
//! Sans-IO. A client can have only its own address dialed; these limits keep clients from having the relay dial without
//! end, and one client from using up the dials of all.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use libp2p::PeerId;

use crate::{
    address::ClientPrefix,
    program::net::admission::{limits::DIALED_FOR_AUTONAT, scoped_rates::ScopedRates},
    relay::{
        quota::{Caps, Quota},
        rates::{FullAt, Rate},
    },
};

/// How many times a minute a peer is dialed, with a burst of as many: go-libp2p's limit.
pub const PER_PEER: u32 = 12;

/// The same for all peers of an address together, of a subnet, and of an IPv6 /32.
pub const PER_SCOPE: [u32; 3] = [120, TOTAL / 4, TOTAL / 2];

/// The same for all peers.
pub const TOTAL: u32 = 600;

const MINUTE: Duration = Duration::from_secs(60);

fn rate(per_minute: u32) -> Rate {
    Rate { burst: per_minute, spacing: MINUTE / per_minute }
}

/// The rates, and the dials in progress.
#[derive(Debug)]
pub struct DialLimits {
    peers: HashMap<PeerId, FullAt>,
    scopes: ScopedRates,
    total: Option<FullAt>,
    in_progress: Quota,
}

/// Which limit a dial would exceed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Exceeded {
    /// The rate of the peer, or of its address or network.
    #[error("too many dials for the client or its network")]
    Client,
    /// The rate of all peers together.
    #[error("too many dials")]
    Total,
    /// The number of dials in progress: to the address, to its subnet or in total.
    #[error("too many dials at once")]
    InProgress,
}

impl DialLimits {
    /// No dials yet.
    pub fn new() -> Self {
        let [total, per_subnet, per_address] =
            [1, 4, 8].map(|part| Some(DIALED_FOR_AUTONAT / part));
        Self {
            peers: HashMap::new(),
            scopes: ScopedRates::new(PER_SCOPE.map(|times| Some(rate(times)))),
            total: None,
            in_progress: Quota::new(Caps { total, per_subnet, per_address }),
        }
    }

    /// Begins a dial, to be [released](Self::release) when it ends.
    ///
    /// # Errors
    ///
    /// The limit that the dial would exceed. The dial then counts towards none.
    pub fn acquire(
        &mut self,
        peer: PeerId,
        prefix: ClientPrefix,
        now: Instant,
    ) -> Result<(), Exceeded> {
        if self.in_progress.full(Some(prefix)).is_some() {
            return Err(Exceeded::InProgress);
        }
        let (total, wait) = rate(TOTAL).after_one(self.total, now);
        if !wait.is_zero() {
            return Err(Exceeded::Total);
        }
        let (of_peer, wait) = rate(PER_PEER).after_one(self.peers.get(&peer).copied(), now);
        if !wait.is_zero() || self.scopes.take(prefix, Duration::ZERO, now).is_none() {
            return Err(Exceeded::Client);
        }
        self.total = Some(total);
        // A pass over the table, at most `TOTAL` times a minute.
        self.peers.retain(|_, full_at| *full_at > now);
        self.peers.insert(peer, of_peer);
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
        for address in [at(1), at(256)] {
            let dialed = (0..10 * TOTAL).map(|_| dial(&mut limits, PeerId::random(), address, now));
            assert_eq!(dialed.filter(Result::is_ok).count(), 10 * PER_PEER as usize);
        }
    }

    #[test]
    fn one_network_leaves_dials_for_others_whatever_addresses_it_has() {
        let now = Instant::now();
        let networks: [fn(u16) -> ClientPrefix; 2] = [
            |n| at(u32::from(n % 256)),                             // a /24
            |n| IpAddr::from([0x2a00, 1, 1, n, 0, 0, 0, 1]).into(), // a /48
        ];
        for address in networks {
            let mut limits = DialLimits::new();
            let dialed = (0..1000).map(|n| dial(&mut limits, PeerId::random(), address(n), now));
            assert_eq!(dialed.filter(Result::is_ok).count(), TOTAL as usize / 4);
            assert_eq!(dial(&mut limits, PeerId::random(), at(1 << 20), now), Ok(()));
            let mut limits = DialLimits::new();
            let began = (0..1000).map(|n| limits.acquire(PeerId::random(), address(n), now));
            assert_eq!(began.filter(Result::is_ok).count(), DIALED_FOR_AUTONAT / 4);
            assert_eq!(limits.acquire(PeerId::random(), at(1 << 20), now), Ok(()));
        }
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
            assert!(limits.peers.len() <= 2 * TOTAL as usize);
        }
        assert!(limits.in_progress.scopes() == 0);
    }

    #[test]
    fn dials_in_progress_are_capped_in_total_and_by_address() {
        let now = Instant::now();
        let mut limits = DialLimits::new();
        let acquire = |limits: &mut DialLimits, n| limits.acquire(PeerId::random(), at(n), now);
        for n in 0..8 {
            let address = n << 8; // in a subnet of its own
            for _ in 0..DIALED_FOR_AUTONAT / 8 {
                assert_eq!(acquire(&mut limits, address), Ok(()));
            }
            assert_eq!(acquire(&mut limits, address), Err(Exceeded::InProgress));
        }
        assert_eq!(acquire(&mut limits, 9 << 8), Err(Exceeded::InProgress));
        limits.release(at(0));
        assert_eq!(acquire(&mut limits, 9 << 8), Ok(()));
    }
}
