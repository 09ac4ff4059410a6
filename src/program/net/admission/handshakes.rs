//! Connections in their handshakes: how many there may be, and which one makes room for another.
//!
//! Sans-IO. Peers are not known yet, so their progress and their prefixes decide, as in OpenSSH's MaxStartups
//! and PerSourceNetBlockSize. Where all places are taken one is dropped that has not advanced within the
//! last second; of these one that is least far, of these one of the heaviest prefix, and of these any one.
//! So a client with a round trip of 600 ms gets through while silent connections come without end.
//!
//! An eighth of the places is kept for prefixes that hold slots, two for each at most, so that a slot's owner
//! can come back whatever others do. An owner that comes from a new prefix has none of that.

use std::{
    cmp::Reverse,
    collections::HashMap,
    hash::{BuildHasher, Hash, RandomState},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use crate::{
    activity::Signs,
    address::ClientPrefix,
    relay::quota::{Busiest, Caps, Quota, Scope},
};

/// How long a connection may take to its first byte, and to its secure channel.
const FIRST_BYTE: Duration = Duration::from_secs(3);
const SECURED: Duration = Duration::from_secs(8);

/// How long a connection may take to its muxer.
pub const MUXED: Duration = Duration::from_secs(10);

/// How long a handshake that has advanced is not dropped for another, while there is one that has not.
const ADVANCED: Duration = Duration::from_secs(1);

/// How many bytes a client sends at least before it begins the key exchange: the header of
/// multistream-select, and `/noise`.
const NEGOTIATION: u64 = 20 + 8;

/// How many of the kept places one prefix that holds slots may have at most.
const KEPT_PER_PREFIX: usize = 2;

/// How far a handshake is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Stage {
    Silent,
    Negotiates,
    ExchangesKeys,
    Secured,
}

/// What tells how far a connection's handshake is. Clones are of the same connection.
#[derive(Clone, Debug, Default)]
pub struct Progress {
    /// Counts the bytes that come in.
    pub signs: Signs,
    /// Whether the secure channel stands.
    pub is_secured: Arc<AtomicBool>,
}

impl Progress {
    /// The secure channel stands.
    pub fn secured(self) -> Self {
        self.is_secured.store(true, Ordering::Relaxed);
        self
    }

    fn stage(&self) -> Stage {
        if self.is_secured.load(Ordering::Relaxed) {
            return Stage::Secured;
        }
        match self.signs.count() {
            0 => Stage::Silent,
            1..=NEGOTIATION => Stage::Negotiates,
            _ => Stage::ExchangesKeys,
        }
    }
}

/// The connections in their handshakes. `C` names a connection.
#[derive(Debug)]
pub struct Handshakes<C> {
    /// Those in the places for all; the total is without the kept ones.
    quota: Quota,
    kept: Quota,
    of: HashMap<C, Handshake>,
    /// Chooses among equals.
    random: RandomState,
}

#[derive(Debug)]
struct Handshake {
    prefix: Option<ClientPrefix>,
    /// `None`: it cannot be told, and so is not dropped for another.
    progress: Option<Progress>,
    stage: Stage,
    began: Instant,
    advanced: Instant,
    is_kept: bool,
}

impl Handshake {
    fn look(&mut self, now: Instant) {
        let stage = self.progress.as_ref().map_or(Stage::Secured, Progress::stage);
        if stage != self.stage {
            (self.stage, self.advanced) = (stage, now);
        }
    }

    fn is_overdue(&self, now: Instant) -> bool {
        let within = match self.stage {
            Stage::Silent => FIRST_BYTE,
            Stage::Negotiates | Stage::ExchangesKeys => SECURED,
            Stage::Secured => MUXED,
        };
        now.duration_since(self.began) > within
    }
}

impl<C: Copy + Eq + Hash> Handshakes<C> {
    /// None yet.
    pub fn new(caps: Caps) -> Self {
        let kept = caps.total.map(|all| all / 8);
        let places = caps.total.zip(kept).map(|(all, kept)| all - kept);
        let kept_caps = Caps { total: kept, per_subnet: None, per_address: Some(KEPT_PER_PREFIX) };
        Self {
            quota: Quota::new(Caps { total: places, ..caps }),
            kept: Quota::new(kept_caps),
            of: HashMap::new(),
            random: RandomState::new(),
        }
    }

    /// The address that has the most of the places for all.
    pub fn busiest(&self) -> Option<Busiest> {
        self.quota.busiest()
    }

    /// One more begins, from a prefix that holds so many slots. Returns the one that is to be dropped for
    /// it, which does not count from now on.
    ///
    /// # Errors
    ///
    /// The scope that has as many as it may: the total where none can make room for it.
    pub fn admit(
        &mut self,
        id: C,
        prefix: Option<ClientPrefix>,
        slots: usize,
        progress: Option<Progress>,
        now: Instant,
    ) -> Result<Option<C>, Scope> {
        let of_prefix = prefix.map_or(0, |prefix| self.kept.held(Scope::Address(prefix)));
        let is_kept = of_prefix < slots.min(KEPT_PER_PREFIX) && self.kept.full(prefix).is_none();
        let dropped = match self.quota.full(prefix) {
            _ if is_kept => None,
            None => None,
            Some(Scope::Total) => Some(self.least_advanced(prefix, now).ok_or(Scope::Total)?),
            Some(full) => return Err(full),
        };
        if let Some(dropped) = dropped {
            self.remove(&dropped);
        }
        let quota = if is_kept { &mut self.kept } else { &mut self.quota };
        quota.add(prefix);
        let stage = Stage::Silent;
        let new = Handshake { prefix, progress, stage, began: now, advanced: now, is_kept };
        self.of.insert(id, new);
        Ok(dropped)
    }

    /// The one to be dropped for another of this prefix; `None`: that one itself.
    fn least_advanced(&mut self, prefix: Option<ClientPrefix>, now: Instant) -> Option<C> {
        self.of.values_mut().for_each(|handshake| handshake.look(now));
        let Self { quota, of, random, .. } = self;
        let candidates = of.iter().filter(|(_, other)| !other.is_kept && other.progress.is_some());
        let (id, other) = candidates.min_by_key(|(id, other)| {
            let has_advanced = now.duration_since(other.advanced) <= ADVANCED;
            let load = Reverse(quota.load(other.prefix));
            (has_advanced, other.stage, load, random.hash_one(id))
        })?;
        // Where all have just advanced, the new one is one of them.
        let has_advanced = now.duration_since(other.advanced) <= ADVANCED;
        let gives_way = !has_advanced || quota.yields(other.prefix, prefix);
        gives_way.then_some(*id)
    }

    /// Those that take too long.
    pub fn overdue(&mut self, now: Instant) -> Vec<C> {
        let overdue = self.of.iter_mut().filter_map(|(id, handshake)| {
            handshake.look(now);
            handshake.is_overdue(now).then_some(*id)
        });
        overdue.collect()
    }

    /// Its handshake is over.
    pub fn remove(&mut self, id: &C) {
        if let Some(handshake) = self.of.remove(id) {
            let quota = if handshake.is_kept { &mut self.kept } else { &mut self.quota };
            quota.remove(handshake.prefix);
        }
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.of.len()
    }
}

#[cfg(test)]
mod tests {
    use std::net::{IpAddr, Ipv4Addr};

    use super::*;

    const ROUND_TRIP: Duration = Duration::from_millis(600);

    fn handshakes(all: usize) -> Handshakes<usize> {
        let caps = Caps { total: Some(all), per_subnet: Some(all / 4), per_address: Some(all / 8) };
        Handshakes::new(caps)
    }

    /// An address in a /24 of its own.
    fn prefix(n: usize) -> Option<ClientPrefix> {
        Some(IpAddr::from(Ipv4Addr::from_bits(0x0a00_0001 + 256 * n as u32)).into())
    }

    fn come(
        all: &mut Handshakes<usize>,
        n: usize,
        of: usize,
        slots: usize,
        now: Instant,
    ) -> Result<Option<usize>, Scope> {
        all.admit(n, prefix(of), slots, Some(Progress::default()), now)
    }

    #[test]
    fn silent_connections_of_many_prefixes_keep_no_slow_client_out() {
        let (mut all, start) = (handshakes(256), Instant::now());
        for n in 0..300 {
            let _ = come(&mut all, n, n, 0, start); // more than there are places
        }
        assert_eq!(all.count(), 224);
        let mut now = start + ADVANCED + ROUND_TRIP;
        let progress = Progress::default();
        all.admit(999, prefix(999), 0, Some(progress.clone()), now).unwrap();
        // What it sends with each round trip: its proposals, and two messages of the key exchange.
        for round_trip in 0..4 {
            // Each silent one that is dropped or overdue comes back at once.
            for n in 0..300 {
                let at = now + ROUND_TRIP * n as u32 / 300;
                assert_ne!(come(&mut all, 1000 * (round_trip + 1) + n, n, 0, at), Ok(Some(999)));
            }
            now += ROUND_TRIP;
            progress.signs.heard(NEGOTIATION);
            progress.is_secured.store(round_trip == 2, Ordering::Relaxed);
            for overdue in all.overdue(now) {
                assert_ne!(overdue, 999);
                all.remove(&overdue);
            }
        }
        assert!(all.of.contains_key(&999));
    }

    #[test]
    fn the_least_far_of_the_heaviest_prefix_is_dropped() {
        let (mut all, start) = (handshakes(32), Instant::now());
        let progress: Vec<_> = (0..28).map(|_| Progress::default()).collect();
        for (n, of_it) in progress.iter().enumerate() {
            // Four of one prefix, one of each other.
            let prefix = prefix(n.saturating_sub(3));
            assert_eq!(all.admit(n, prefix, 0, Some(of_it.clone()), start), Ok(None));
        }
        let later = start + 2 * ADVANCED;
        progress[0].signs.heard(1);
        progress[1].signs.heard(NEGOTIATION + 1);
        all.overdue(start);
        let dropped = come(&mut all, 100, 100, 0, later).unwrap().unwrap();
        assert!([2, 3].contains(&dropped), "{dropped}");
        // One that has just advanced stays while there is one that has not.
        progress[4..].iter().for_each(|of_it| of_it.signs.heard(1));
        assert!([2, 3].contains(&come(&mut all, 101, 101, 0, later).unwrap().unwrap()));
        // Now 0 and 1 are the only ones that have not; 0 is less far.
        assert_eq!(come(&mut all, 102, 102, 0, later), Ok(Some(0)));
        assert_eq!(come(&mut all, 103, 103, 0, later), Ok(Some(1)));
        // All have advanced: none makes room for one that holds as many.
        assert_eq!(come(&mut all, 104, 104, 0, later), Err(Scope::Total));
    }

    #[test]
    fn one_prefix_has_its_share_and_those_that_hold_slots_have_places_of_their_own() {
        let (mut all, now) = (handshakes(32), Instant::now());
        for n in 0..4 {
            assert_eq!(come(&mut all, n, 0, 0, now), Ok(None));
        }
        let full = Scope::Address(prefix(0).unwrap());
        assert_eq!(come(&mut all, 4, 0, 0, now), Err(full));
        for n in 5..29 {
            assert_eq!(come(&mut all, n, n, 0, now), Ok(None));
        }
        // Two of each prefix at most, and as many as it holds slots; four in all.
        for n in 30..33 {
            assert!(come(&mut all, n, 30, 9, now).is_ok());
        }
        assert_eq!(all.kept.held(Scope::Total), 2);
        for n in 33..40 {
            let _ = come(&mut all, n, n, 1, now);
        }
        assert_eq!(all.kept.held(Scope::Total), 4);
        assert!(all.count() <= 32);
        for n in 0..40 {
            all.remove(&n);
        }
        assert!(all.quota.is_empty() && all.kept.is_empty());
    }

    #[test]
    fn each_stage_has_its_time() {
        let (mut all, start) = (handshakes(32), Instant::now());
        let progress = [(); 4].map(|()| Progress::default());
        for (n, of_it) in progress.iter().enumerate() {
            all.admit(n, prefix(n), 0, Some(of_it.clone()), start).unwrap();
        }
        for of_it in &progress[1..] {
            of_it.signs.heard(1);
        }
        progress[2].signs.heard(NEGOTIATION);
        progress[3].is_secured.store(true, Ordering::Relaxed);
        let mut at = |seconds| {
            let mut overdue = all.overdue(start + Duration::from_secs(seconds));
            overdue.sort_unstable();
            overdue
        };
        assert!(at(3).is_empty());
        assert_eq!(at(4), [0]);
        assert_eq!(at(9), [0, 1, 2]);
        assert_eq!(at(11), [0, 1, 2, 3]);
    }
}
