//! Connections in their handshakes: how many there may be, and which one is dropped for another.
//!
//! Sans-IO. The peer of a connection is not known yet, so progress and client prefixes decide, as in OpenSSH's
//! MaxStartups and PerSourceNetBlockSize. When all permits are taken, or all of a subnet, a new handshake replaces one of
//! these that has made no progress within the last second: one at the earliest stage, of those one of the heaviest prefix,
//! and of several a random one. If all have made progress, it replaces only one of a heavier prefix than its own; otherwise
//! it is denied. So a client with a round trip of 600 ms completes its handshake during a flood of silent connections, and
//! so does one with 450 ms over WebSocket, which takes more round trips.
//!
//! An eighth of the permits is reserved for prefixes that hold slots: each may take one per slot, at most two, and a
//! subnet a quarter of them; these handshakes are not replaced. So the peer of a slot can reconnect during a flood, unless
//! it comes from another prefix.

use std::{
    cmp::Reverse,
    collections::HashMap,
    hash::{BuildHasher, Hash, RandomState},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use portable_atomic::AtomicU64;

use crate::{
    activity::ActivityCounter,
    address::ClientPrefix,
    relay::quota::{Caps, Quota, Scope},
};

/// How long a connection may take, from its start, until its first byte arrives, and until its secure channel is up.
const FIRST_BYTE_TIMEOUT: Duration = Duration::from_secs(3);
const SECURED_TIMEOUT: Duration = Duration::from_secs(8);

/// How long a connection may take, from its start, until its muxer is up.
pub const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);

/// A handshake that has made progress within this time is dropped only if all others have, too.
const PROGRESS_GRACE: Duration = Duration::from_secs(1);

/// The fewest bytes that a client sends before the key exchange: the header of multistream-select, and `/noise`.
const NEGOTIATION: u64 = 20 + 8;

/// How many of a client's first bytes are kept, to name the protocol of a handshake that failed: as many as the longest
/// signature has, that of the PROXY protocol.
pub const MAX_FIRST_BYTES: usize = 12;

/// The most reserved permits that one prefix may take.
const RESERVED_PER_PREFIX: usize = 2;

/// The stage that a handshake has reached. All but the last follow from the number of received bytes: they are not
/// parsed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Stage {
    Silent,
    Negotiating,
    ExchangingKeys,
    Secured,
}

/// The progress of one connection's handshake. Clones share it.
#[derive(Clone, Debug, Default)]
pub struct Progress {
    /// Counts the bytes received.
    pub activity: ActivityCounter,
    /// How many of these had arrived when the WebSocket was open; 0 without one.
    opening: Arc<AtomicU64>,
    is_secured: Arc<AtomicBool>,
    first_bytes: Arc<Mutex<Vec<u8>>>,
}

impl Progress {
    /// Keeps the first [`MAX_FIRST_BYTES`] of all bytes, given those that were received next. Returns whether it has
    /// them all now. Does not count the bytes.
    pub fn record(&self, bytes: &[u8]) -> bool {
        let mut first = self.first_bytes.lock().unwrap_or_else(PoisonError::into_inner);
        let left = MAX_FIRST_BYTES.saturating_sub(first.len());
        first.extend(bytes.iter().take(left));
        first.len() >= MAX_FIRST_BYTES
    }

    /// The first [`MAX_FIRST_BYTES`] received bytes, or as many as have arrived.
    pub fn first_bytes(&self) -> Vec<u8> {
        self.first_bytes.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Records that the WebSocket is open: the negotiation begins with its first byte.
    pub fn set_upgraded(&self) {
        self.opening.store(self.activity.count(), Ordering::Relaxed);
    }

    /// Records that the secure channel is up.
    pub fn set_secured(&self) {
        self.is_secured.store(true, Ordering::Relaxed);
    }

    /// Whether the secure channel is up.
    pub fn is_secured(&self) -> bool {
        self.is_secured.load(Ordering::Relaxed)
    }

    fn stage(&self) -> Stage {
        let opening = self.opening.load(Ordering::Relaxed);
        match self.activity.count().saturating_sub(opening) {
            _ if self.is_secured() => Stage::Secured,
            0 if opening == 0 => Stage::Silent,
            0..=NEGOTIATION => Stage::Negotiating,
            _ => Stage::ExchangingKeys,
        }
    }
}

/// The connections in their handshakes. `C` identifies a connection.
#[derive(Debug)]
pub struct Handshakes<C> {
    /// Permits that any prefix may take.
    pub shared: Quota,
    /// Permits for prefixes that hold slots.
    reserved: Quota,
    open: HashMap<C, Handshake>,
    /// Breaks ties.
    random: RandomState,
}

#[derive(Debug)]
struct Handshake {
    prefix: Option<ClientPrefix>,
    /// `None`: unknown; the handshake is not dropped for another.
    progress: Option<Progress>,
    stage: Stage,
    began: Instant,
    /// When a change of the stage was last seen; at first its start.
    advanced: Instant,
    /// Whether its permit is a reserved one.
    is_reserved: bool,
}

impl Handshake {
    fn update_stage(&mut self, now: Instant) {
        let stage = self.progress.as_ref().map_or(Stage::Secured, Progress::stage);
        if stage != self.stage {
            (self.stage, self.advanced) = (stage, now);
        }
    }

    fn is_overdue(&self, now: Instant) -> bool {
        let limit = match self.stage {
            Stage::Silent => FIRST_BYTE_TIMEOUT,
            Stage::Negotiating | Stage::ExchangingKeys => SECURED_TIMEOUT,
            Stage::Secured => HANDSHAKE_TIMEOUT,
        };
        now.duration_since(self.began) > limit
    }

    fn has_advanced(&self, now: Instant) -> bool {
        now.duration_since(self.advanced) <= PROGRESS_GRACE
    }
}

impl<C: Copy + Eq + Hash> Handshakes<C> {
    /// No handshakes yet. An eighth of the total cap is reserved.
    pub fn new(caps: Caps) -> Self {
        let reserved = caps.total.map(|all| all / 8);
        let shared = caps.total.map(|all| all - all / 8);
        let quarter = reserved.map(|all| (all / 4).max(RESERVED_PER_PREFIX));
        let per_subnet = quarter.filter(|_| caps.per_subnet.is_some());
        let per_address = Some(RESERVED_PER_PREFIX);
        Self {
            shared: Quota::new(Caps { total: shared, ..caps }),
            reserved: Quota::new(Caps { total: reserved, per_subnet, per_address }),
            open: HashMap::new(),
            random: RandomState::new(),
        }
    }

    /// Adds a handshake of a prefix that holds this many slots. Returns the one that it replaces, for the caller to
    /// drop: it is removed from the table already. A handshake whose progress is unknown replaces none.
    ///
    /// # Errors
    ///
    /// The scope that is at its cap; if that is not the address, there is no other handshake in it to replace.
    pub fn admit(
        &mut self,
        id: C,
        prefix: Option<ClientPrefix>,
        slots: usize,
        progress: Option<Progress>,
        now: Instant,
    ) -> Result<Option<C>, Scope> {
        let of_prefix = prefix.map_or(0, |prefix| self.reserved.held(Scope::Address(prefix)));
        let has_claim = of_prefix < slots.min(RESERVED_PER_PREFIX);
        let is_reserved = has_claim && self.reserved.full(prefix).is_none();
        let dropped = match self.shared.full(prefix) {
            _ if is_reserved => None,
            None => None,
            Some(full @ Scope::Address(_)) => return Err(full),
            // Without known progress it has failed already, or has the same ends as another connection.
            Some(full) if progress.is_none() => return Err(full),
            Some(full) => Some(self.least_advanced(full, prefix, now).ok_or(full)?),
        };
        if let Some(dropped) = dropped {
            self.remove(&dropped);
        }
        let quota = if is_reserved { &mut self.reserved } else { &mut self.shared };
        quota.add(prefix);
        let stage = Stage::Silent;
        let new = Handshake { prefix, progress, stage, began: now, advanced: now, is_reserved };
        self.open.insert(id, new);
        Ok(dropped)
    }

    /// The handshake under this cap that a new one `of` this prefix replaces; `None` if the new one is to be denied.
    fn least_advanced(&mut self, full: Scope, of: Option<ClientPrefix>, now: Instant) -> Option<C> {
        self.open.values_mut().for_each(|handshake| handshake.update_stage(now));
        let Self { shared, open, random, .. } = self;
        let candidates = open.iter().filter(|(_, other)| {
            full.covers(other.prefix) && !other.is_reserved && other.progress.is_some()
        });
        let (id, other) = candidates.min_by_key(|(id, other)| {
            let load = Reverse(shared.load(other.prefix));
            (other.has_advanced(now), other.stage, load, random.hash_one(id))
        })?;
        // When all have just advanced, the new one is at no disadvantage: only the prefixes decide.
        let gives_way = !other.has_advanced(now) || shared.yields(other.prefix, of);
        gives_way.then_some(*id)
    }

    /// Removes the handshakes that have exceeded the time limit of their stage, and returns them to be dropped.
    pub fn take_overdue(&mut self, now: Instant) -> Vec<C> {
        let overdue = self.open.iter_mut().filter_map(|(id, handshake)| {
            handshake.update_stage(now);
            handshake.is_overdue(now).then_some(*id)
        });
        let overdue: Vec<_> = overdue.collect();
        overdue.iter().for_each(|id| self.remove(id));
        overdue
    }

    /// Removes a handshake that has ended; does nothing if it is not in the table.
    pub fn remove(&mut self, id: &C) {
        if let Some(handshake) = self.open.remove(id) {
            let quota = if handshake.is_reserved { &mut self.reserved } else { &mut self.shared };
            quota.remove(handshake.prefix);
        }
    }

    /// How many handshakes there are.
    #[cfg(test)]
    pub fn count(&self) -> usize {
        self.open.len()
    }
}

#[cfg(test)]
mod tests {
    use std::net::{IpAddr, Ipv4Addr};

    use proptest::{collection::vec, prelude::*};

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

    fn start_handshake(
        all: &mut Handshakes<usize>,
        n: usize,
        prefix_number: usize,
        slots: usize,
        now: Instant,
    ) -> Result<Option<usize>, Scope> {
        all.admit(n, prefix(prefix_number), slots, Some(Progress::default()), now)
    }

    #[test]
    fn a_slow_client_completes_its_handshake_during_a_flood_of_silent_connections() {
        let (mut all, start) = (handshakes(256), Instant::now());
        for n in 0..300 {
            let _ = start_handshake(&mut all, n, n, 0, start); // more than there are permits
        }
        assert_eq!(all.count(), 224);
        let mut now = start + PROGRESS_GRACE + ROUND_TRIP;
        let progress = Progress::default();
        all.admit(999, prefix(999), 0, Some(progress.clone()), now).unwrap();
        // One message per round trip: the proposals, then two messages of the key exchange.
        for round_trip in 0..4 {
            flood(&mut all, round_trip, now, ROUND_TRIP);
            now += ROUND_TRIP;
            progress.activity.add(NEGOTIATION);
            progress.is_secured.store(round_trip == 2, Ordering::Relaxed);
            assert!(!all.take_overdue(now).contains(&999));
        }
        assert!(all.open.contains_key(&999));
    }

    /// Opens 300 silent connections, spread over one round trip of the client 999. None of them replaces its handshake.
    fn flood(all: &mut Handshakes<usize>, nth: usize, now: Instant, round_trip: Duration) {
        for n in 0..300 {
            let at = now + round_trip * n as u32 / 300;
            let dropped = start_handshake(all, 1000 * (nth + 1) + n, n, 0, at);
            assert_ne!(dropped, Ok(Some(999)), "after {nth} round trips");
        }
    }

    #[test]
    fn over_websocket_a_slow_client_completes_its_longer_handshake_during_a_flood() {
        const ROUND_TRIP: Duration = Duration::from_millis(450);
        let (mut all, start) = (handshakes(256), Instant::now());
        (0..300).for_each(|n| _ = start_handshake(&mut all, n, n, 0, start));
        let mut now = start + PROGRESS_GRACE + ROUND_TRIP;
        let progress = Progress::default();
        all.admit(999, prefix(999), 0, Some(progress.clone()), now).unwrap();
        // The ClientHello of TLS, the HTTP request, the proposals, and two messages of the key exchange.
        for (round_trip, bytes) in [517, 300, 62, 62, 200].into_iter().enumerate() {
            flood(&mut all, round_trip, now, ROUND_TRIP);
            now += ROUND_TRIP;
            progress.activity.add(bytes);
            if round_trip == 1 {
                progress.set_upgraded();
            }
            progress.is_secured.store(round_trip == 4, Ordering::Relaxed);
            all.take_overdue(now);
        }
        assert!(all.open.contains_key(&999));
    }

    #[test]
    fn the_least_advanced_handshake_of_the_heaviest_prefix_is_dropped() {
        let (mut all, start) = (handshakes(32), Instant::now());
        let progress: Vec<_> = (0..28).map(|_| Progress::default()).collect();
        for (n, handshake) in progress.iter().enumerate() {
            // Four of the first prefix, one of each other prefix.
            let prefix = prefix(n.saturating_sub(3));
            assert_eq!(all.admit(n, prefix, 0, Some(handshake.clone()), start), Ok(None));
        }
        let later = start + 2 * PROGRESS_GRACE;
        progress[0].activity.add(1);
        progress[1].activity.add(NEGOTIATION + 1);
        all.take_overdue(start); // updates the stages
        let dropped = start_handshake(&mut all, 100, 100, 0, later).unwrap().unwrap();
        assert!([2, 3].contains(&dropped), "{dropped}");
        // A handshake that has just advanced is kept while another one has not.
        progress[4..].iter().for_each(|handshake| handshake.activity.add(1));
        assert!([2, 3].contains(&start_handshake(&mut all, 101, 101, 0, later).unwrap().unwrap()));
        // Now only 0 and 1 have not, and 0 is at the earlier stage. A connection that has failed already does not
        // replace it.
        assert_eq!(all.admit(102, prefix(102), 0, None, later), Err(Scope::Total));
        assert_eq!(start_handshake(&mut all, 102, 102, 0, later), Ok(Some(0)));
        assert_eq!(start_handshake(&mut all, 103, 103, 0, later), Ok(Some(1)));
        // All have advanced: a prefix with as many handshakes as the others is denied.
        assert_eq!(start_handshake(&mut all, 104, 104, 0, later), Err(Scope::Total));
    }

    #[test]
    fn two_addresses_of_a_subnet_do_not_keep_its_other_addresses_out() {
        let (mut all, start) = (handshakes(32), Instant::now());
        assert_eq!(start_handshake(&mut all, 100, 100, 0, start), Ok(None));
        let now = start + 2 * PROGRESS_GRACE;
        let mut admit = |n: usize, host: u8| {
            let prefix = Some(IpAddr::from([192, 0, 2, host]).into());
            all.admit(n, prefix, 0, Some(Progress::default()), now)
        };
        (0..8).for_each(|n| assert_eq!(admit(n, 1 + (n / 4) as u8), Ok(None)));
        for n in 8..10 {
            let dropped = admit(n, 3).unwrap();
            assert!(dropped.is_some_and(|dropped| dropped < 8), "{dropped:?}");
        }
        // That is its fair share.
        assert!(matches!(admit(10, 3), Err(Scope::Subnet(_))));
        assert!(all.open.contains_key(&100));
    }

    #[test]
    fn a_prefix_is_capped_and_prefixes_that_hold_slots_have_reserved_permits() {
        let (mut all, now) = (handshakes(32), Instant::now());
        for n in 0..4 {
            assert_eq!(start_handshake(&mut all, n, 0, 0, now), Ok(None));
        }
        let full = Scope::Address(prefix(0).unwrap());
        assert_eq!(start_handshake(&mut all, 4, 0, 0, now), Err(full));
        for n in 5..29 {
            assert_eq!(start_handshake(&mut all, n, n, 0, now), Ok(None));
        }
        // Each prefix has as many reserved permits as slots, at most two; all together have four.
        for n in 30..33 {
            assert!(start_handshake(&mut all, n, 30, 9, now).is_ok());
        }
        assert_eq!(all.reserved.held(Scope::Total), 2);
        for n in 33..40 {
            let _ = start_handshake(&mut all, n, n, 1, now);
        }
        assert_eq!(all.reserved.held(Scope::Total), 4);
        assert!(all.count() <= 32);
        for n in 0..40 {
            all.remove(&n);
        }
        assert_eq!(all.shared.scopes() + all.reserved.scopes(), 0);
    }

    #[test]
    fn a_subnet_has_a_quarter_of_the_reserved_permits() {
        let (mut all, now) = (handshakes(256), Instant::now());
        for host in 0..32_u8 {
            let prefix = Some(IpAddr::from([192, 0, 2, host]).into());
            let progress = Some(Progress::default());
            assert!(all.admit(host.into(), prefix, 2, progress, now).is_ok());
        }
        assert_eq!(all.reserved.held(Scope::Total), 8);
        start_handshake(&mut all, 99, 99, 1, now).unwrap();
        assert_eq!(all.reserved.held(Scope::Total), 9);
    }

    #[test]
    fn each_stage_has_its_time_limit() {
        let (mut all, start) = (handshakes(32), Instant::now());
        let progress = [(); 4].map(|()| Progress::default());
        for (n, handshake) in progress.iter().enumerate() {
            all.admit(n, prefix(n), 0, Some(handshake.clone()), start).unwrap();
        }
        for handshake in &progress[1..] {
            handshake.activity.add(1);
        }
        progress[2].activity.add(NEGOTIATION);
        progress[3].is_secured.store(true, Ordering::Relaxed);
        let mut at = |seconds| {
            let mut overdue = all.take_overdue(start + Duration::from_secs(seconds));
            overdue.sort_unstable();
            overdue
        };
        assert!(at(3).is_empty());
        assert_eq!(at(4), [0]);
        assert_eq!(at(9), [1, 2]);
        assert_eq!(at(11), [3]);
        assert_eq!(all.count(), 0);
    }

    proptest! {
        #[test]
        fn any_first_bytes_are_kept_up_to_the_longest_signature(pieces in vec(vec(any::<u8>(), 0..9), 0..9)) {
            let progress = Progress::default();
            let enough = pieces.iter().fold(false, |_, piece| progress.record(piece));
            let mut all = pieces.concat();
            all.truncate(MAX_FIRST_BYTES);
            prop_assert_eq!(enough, all.len() == MAX_FIRST_BYTES);
            prop_assert_eq!(progress.first_bytes(), all);
        }
    }
}
