//! How often, and how much at once, the relay dials for others.
//!
//! Pure. What is dialed is the client's own address only; this keeps the relay from being made to
//! do so all the time, and one client from using up what is there for all.

use std::{
    collections::{HashMap, hash_map::Entry},
    fmt,
    time::{Duration, Instant},
};

use libp2p::PeerId;

use crate::{
    address::ClientPrefix, program::net::admission::limits::DIALED_FOR_AUTONAT, relay::rates::Rates,
};

/// How many times a minute a peer is dialed, all at once if it likes: go-libp2p's limit. Its
/// address, ten times as often for all its peers together.
pub const PER_PEER: u32 = 12;

/// How many times a minute anyone is dialed.
pub const IN_ALL: u32 = 600;

const MINUTE: Duration = Duration::from_secs(60);

/// Who may be dialed now.
#[derive(Debug)]
pub struct Gate {
    rates: Rates,
    /// When there will be a whole minute's worth for all again.
    full_at: Instant,
    tidied: Instant,
    dialing: HashMap<ClientPrefix, usize>,
    at_once: usize,
}

/// Why nobody is dialed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refused {
    /// This peer or its address was dialed often enough within the last minute.
    Client,
    /// All were, together.
    InAll,
    /// As many are being dialed as may be.
    AtOnce,
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Client => "too many dials for the client",
            Self::InAll => "too many dials",
            Self::AtOnce => "too many dials at once",
        })
    }
}

impl Gate {
    /// Nobody was dialed yet.
    pub fn new(now: Instant) -> Self {
        Self {
            rates: Rates::new(PER_PEER),
            full_at: now,
            tidied: now,
            dialing: HashMap::new(),
            at_once: 0,
        }
    }

    /// Lets one dial begin, which is to be [`ended`](Self::ended).
    ///
    /// # Errors
    ///
    /// When it may not begin.
    pub fn begin(&mut self, peer: PeerId, at: ClientPrefix, now: Instant) -> Result<(), Refused> {
        let of_address = self.dialing.get(&at).copied().unwrap_or(0);
        if self.at_once >= DIALED_FOR_AUTONAT || of_address >= DIALED_FOR_AUTONAT / 4 {
            return Err(Refused::AtOnce);
        }
        // Asked first: so no more is remembered than that many.
        let full_at = self.full_at.max(now) + MINUTE / IN_ALL;
        if full_at > now + MINUTE {
            return Err(Refused::InAll);
        }
        if now.saturating_duration_since(self.tidied) >= MINUTE {
            self.rates.forget_full(now);
            self.tidied = now;
        }
        let taken = self.rates.take(peer, Some(at), now);
        taken.map_err(|_| Refused::Client)?;
        self.full_at = full_at;
        self.at_once += 1;
        *self.dialing.entry(at).or_default() += 1;
        Ok(())
    }

    /// One dial that was let begin is over.
    pub fn ended(&mut self, at: ClientPrefix) {
        if let Entry::Occupied(mut dialing) = self.dialing.entry(at) {
            self.at_once -= 1;
            *dialing.get_mut() -= 1;
            if *dialing.get() == 0 {
                dialing.remove();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::{IpAddr, Ipv4Addr};

    use super::*;

    fn at(n: u32) -> ClientPrefix {
        IpAddr::from(Ipv4Addr::from_bits(0x0b00_0000 + n)).into()
    }

    /// Dials that take no time.
    fn dial(gate: &mut Gate, peer: PeerId, at: ClientPrefix, now: Instant) -> Result<(), Refused> {
        gate.begin(peer, at, now).inspect(|()| gate.ended(at))
    }

    #[test]
    fn a_peer_is_dialed_so_often_a_minute() {
        let now = Instant::now();
        let (mut gate, peer) = (Gate::new(now), PeerId::random());
        for _ in 0..PER_PEER {
            assert_eq!(dial(&mut gate, peer, at(1), now), Ok(()));
        }
        assert_eq!(dial(&mut gate, peer, at(2), now), Err(Refused::Client));
        assert_eq!(dial(&mut gate, PeerId::random(), at(1), now), Ok(()));
        let later = now + MINUTE / PER_PEER;
        assert_eq!(dial(&mut gate, peer, at(1), later), Ok(()));
        assert_eq!(dial(&mut gate, peer, at(1), later), Err(Refused::Client));
    }

    #[test]
    fn an_address_is_dialed_ten_times_as_often_whatever_its_peers_are_called() {
        let now = Instant::now();
        let mut gate = Gate::new(now);
        let dialed = |gate: &mut Gate, at| {
            (0..10 * IN_ALL).filter(|_| dial(gate, PeerId::random(), at, now).is_ok()).count()
        };
        assert_eq!(dialed(&mut gate, at(1)), 10 * PER_PEER as usize);
        assert_eq!(dialed(&mut gate, at(2)), 10 * PER_PEER as usize);
    }

    #[test]
    fn all_together_are_dialed_so_often_and_no_more_is_remembered() {
        let start = Instant::now();
        let mut gate = Gate::new(start);
        for minute in 0..5 {
            let now = start + minute * MINUTE;
            let dials = (0..10 * IN_ALL).map(|n| dial(&mut gate, PeerId::random(), at(n), now));
            assert_eq!(dials.filter(Result::is_ok).count(), IN_ALL as usize);
            let refused = dial(&mut gate, PeerId::random(), at(0), now);
            assert_eq!(refused, Err(Refused::InAll));
            assert!(gate.rates.buckets() <= 4 * IN_ALL as usize);
        }
        assert!(gate.dialing.is_empty() && gate.at_once == 0);
    }

    #[test]
    fn so_many_are_dialed_at_once_and_one_address_has_a_quarter_of_them() {
        let now = Instant::now();
        let mut gate = Gate::new(now);
        let begin = |gate: &mut Gate, n| gate.begin(PeerId::random(), at(n), now);
        for n in 0..4 {
            for _ in 0..DIALED_FOR_AUTONAT / 4 {
                assert_eq!(begin(&mut gate, n), Ok(()));
            }
            assert_eq!(begin(&mut gate, n), Err(Refused::AtOnce));
        }
        assert_eq!(begin(&mut gate, 9), Err(Refused::AtOnce));
        gate.ended(at(0));
        assert_eq!(begin(&mut gate, 9), Ok(()));
    }
}
