//! The budget for buffered bytes: one for all connections, with an account for each, and push-out.
//!
//! Push-out (longest queue drop): above the limit, streams of the client prefix that is the furthest above its fair share
//! of half the pool are reset, those of its heaviest connection, and the heaviest first: a stream weighs its bytes times
//! the time that they have waited. The bytes of a reset stream are freed at once. No connection is read more slowly because
//! of another one. Above three quarters of the limit, memory is scarce for the prefixes above their share, and for no
//! other one.

use std::{
    collections::BTreeMap,
    mem,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use portable_atomic::AtomicU64;

use super::{
    fair_share::{self, Holding},
    stream_limits::{Key, StreamId},
};
use crate::{address::ClientPrefix, relay::quota::Busiest};

/// The smallest window that is granted when the pool fills up, in bytes.
const MIN_WINDOW: usize = 32 * 1024;

/// The longest write stall while memory is scarce.
const STALL_WHILE_SCARCE: Duration = Duration::from_secs(30);

/// How often shares are computed while more than half of the pool is held.
const SHARE_INTERVAL: Duration = Duration::from_millis(100);

/// The budget of all connections: the pool. Clones are the same budget.
#[derive(Clone, Debug)]
pub struct MemoryBudget(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    limit: usize,
    limit_per_connection: usize,
    growth: usize,
    /// How long a connection may be write stalled, in milliseconds.
    max_stall: AtomicU64,
    held: AtomicUsize,
    opened: AtomicU64,
    open: Mutex<BTreeMap<u64, Weak<dyn Connection>>>,
    prefixes: Mutex<Prefixes>,
    /// Held by the thread that pushes out.
    pushing_out: Mutex<()>,
    cut: [AtomicU64; CUTS],
}

/// The client prefixes that have connections, and when their shares were computed.
#[derive(Debug, Default)]
struct Prefixes {
    of: BTreeMap<Option<ClientPrefix>, Arc<Prefix>>,
    shared_at: Option<Instant>,
}

/// What the connections of one client prefix hold.
#[derive(Debug, Default)]
struct Prefix {
    /// Bytes that can be freed, and bytes that are charged until a connection closes.
    held: AtomicUsize,
    kept: AtomicUsize,
    /// Its fair share of half the pool when that was last computed; zero: it has not been.
    share: AtomicUsize,
}

/// A connection that can free memory.
pub trait Connection: Send + Sync + std::fmt::Debug {
    /// The account of the connection.
    fn budget(&self) -> &ConnectionBudget;

    /// Resets its heaviest stream; returns how many bytes that freed.
    fn shed(&self, now: Instant) -> usize;

    /// Resets this stream.
    fn reset(&self, stream: Key);

    /// How many bytes its peer may still send.
    fn credit(&self) -> usize;
}

/// Why a stream was reset, or a connection closed, to free memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cut {
    /// A stream: the pool was full.
    Pool,
    /// A stream: its connection exceeded the limit on unread bytes.
    Connection,
    /// A connection: its peer does not read the refusals of the streams that it opens.
    Refusals,
    /// A connection: its peer reads nothing of what is sent to it.
    WriteStalled,
}

/// The number of reasons.
const CUTS: usize = 4;

impl Cut {
    /// The reasons for streams.
    pub const STREAMS: [Self; 2] = [Self::Pool, Self::Connection];
    /// The reasons for connections.
    pub const CONNECTIONS: [Self; 2] = [Self::Refusals, Self::WriteStalled];

    /// The reason as a label.
    pub fn kind(self) -> &'static str {
        match self {
            Self::Pool => "max-buffered",
            Self::Connection => "max-buffered-per-connection",
            Self::Refusals => "refusals not taken",
            Self::WriteStalled => "write stalled",
        }
    }
}

/// How many bytes are buffered, and what was reset or closed because of them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Buffered {
    /// The buffered bytes.
    pub bytes: usize,
    /// How many bytes the peers may still send on their streams.
    pub credit: usize,
    cut: [u64; CUTS],
}

impl Buffered {
    /// How many streams were reset, or connections closed, for this reason.
    pub fn count(&self, cut: Cut) -> u64 {
        self.cut.get(cut as usize).copied().unwrap_or_default()
    }

    /// How many for any of these reasons.
    pub fn sum(&self, cuts: &[Cut]) -> u64 {
        cuts.iter().map(|cut| self.count(*cut)).sum()
    }
}

/// The account of one connection.
#[derive(Debug)]
pub struct ConnectionBudget {
    /// The pool that it belongs to.
    pub pool: MemoryBudget,
    /// The number of the connection, and its client prefix.
    pub number: u64,
    prefix: (Option<ClientPrefix>, Arc<Prefix>),
    /// Bytes charged to it that it can free.
    held: AtomicUsize,
    /// Bytes that it cannot free, charged until it closes.
    kept: AtomicUsize,
}

impl MemoryBudget {
    /// An empty pool of at most `limit` bytes. One connection may have `limit_per_connection` unread bytes, and its windows
    /// may grow by `growth` bytes in all.
    pub fn new(limit: usize, limit_per_connection: usize, growth: usize) -> Self {
        Self(Arc::new(Inner { limit, limit_per_connection, growth, ..Inner::default() }))
    }

    /// Opens the account of a connection from this prefix. The connection is asked to free memory when the pool is above
    /// its limit.
    pub fn open(
        &self,
        prefix: Option<ClientPrefix>,
        connection: Weak<dyn Connection>,
    ) -> Arc<ConnectionBudget> {
        let number = self.0.opened.fetch_add(1, Ordering::Relaxed);
        self.connections().insert(number, connection);
        let prefix = (prefix, Arc::clone(self.prefixes().of.entry(prefix).or_default()));
        let [held, kept] = [(); 2].map(|()| AtomicUsize::new(0));
        Arc::new(ConnectionBudget { pool: self.clone(), number, prefix, held, kept })
    }

    /// Resets a stream of any connection, whose session's lock it takes: the caller must hold none.
    pub fn reset(&self, (connection, stream): StreamId) {
        let connection = self.connections().get(&connection).and_then(Weak::upgrade);
        if let Some(connection) = connection {
            connection.reset(stream);
        }
    }

    /// Sets how long a connection may be write stalled: as long as a peer may be silent.
    pub fn set_max_stall(&self, limit: Duration) {
        let millis = u64::try_from(limit.as_millis()).unwrap_or(u64::MAX);
        self.0.max_stall.store(millis, Ordering::Relaxed);
    }

    /// Returns the bytes held, the credit granted, and the counts of what was reset or closed. Takes the locks of
    /// sessions, one at a time: the caller must hold none.
    pub fn buffered(&self) -> Buffered {
        Buffered {
            bytes: self.held(),
            credit: self.open_connections().iter().map(|connection| connection.credit()).sum(),
            cut: self.0.cut.each_ref().map(|count| count.load(Ordering::Relaxed)),
        }
    }

    /// Whether more than three quarters of the limit are held, and this prefix holds more than its share.
    pub fn is_scarce_for(&self, prefix: Option<ClientPrefix>) -> bool {
        self.is_scarce() && self.prefixes().of.get(&prefix).is_some_and(|it| it.excess() > 0)
    }

    /// The address whose connections hold the most bytes, and how many; `None`: none holds any.
    pub fn busiest(&self) -> Option<Busiest> {
        let holdings = self.prefixes().holdings().into_iter().filter(|(_, held)| *held > 0);
        holdings.filter_map(|(prefix, held)| Some((prefix?, held))).max_by_key(|(_, held)| *held)
    }

    /// While more than half of the pool is held, computes the shares from time to time. Above the limit, frees memory
    /// down to nine tenths of it. Takes the locks of sessions, one at a time: the caller must hold none.
    pub fn enforce(&self, now: Instant) {
        if self.held() > self.0.limit / 2 {
            self.compute_shares(now);
            self.push_out(now);
        }
    }

    /// Computes the shares, unless that was done within the last [`SHARE_INTERVAL`].
    pub fn compute_shares(&self, now: Instant) {
        let mut prefixes = self.prefixes();
        if prefixes.shared_at.is_some_and(|at| now < at + SHARE_INTERVAL) {
            return;
        }
        prefixes.shared_at = Some(now);
        let holdings = prefixes.holdings();
        let kept = self.held().saturating_sub(holdings.iter().map(|(_, held)| held).sum());
        let shares = fair_share::shares(&holdings, (self.0.limit / 2).saturating_sub(kept));
        for (it, share) in prefixes.of.values().zip(shares) {
            it.share.store(share.max(1), Ordering::Relaxed);
        }
    }

    fn push_out(&self, now: Instant) {
        let pool = &self.0;
        if self.held() <= pool.limit {
            return;
        }
        let Ok(_guard) = pool.pushing_out.try_lock() else { return };
        let open = self.open_connections().into_iter();
        let mut open: Vec<_> = open.map(|it| (it.budget().held(), it)).collect();
        while self.held() > pool.limit / 10 * 9 {
            let heaviest =
                open.iter_mut().filter(|(held, _)| *held > 0).max_by_key(|(held, it)| {
                    let prefix = &it.budget().prefix.1;
                    (prefix.excess(), prefix.held.load(Ordering::Relaxed), *held)
                });
            let Some((held, connection)) = heaviest else { return };
            // A connection with nothing to free has no weight.
            *held = match connection.shed(now) {
                0 => 0,
                freed => held.saturating_sub(freed),
            };
        }
    }

    fn is_scarce(&self) -> bool {
        self.held() > self.0.limit / 4 * 3
    }

    fn held(&self) -> usize {
        self.0.held.load(Ordering::Relaxed)
    }

    fn open_connections(&self) -> Vec<Arc<dyn Connection>> {
        self.connections().values().filter_map(Weak::upgrade).collect()
    }

    fn connections(&self) -> MutexGuard<'_, BTreeMap<u64, Weak<dyn Connection>>> {
        self.0.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn prefixes(&self) -> MutexGuard<'_, Prefixes> {
        self.0.prefixes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Prefixes {
    fn holdings(&self) -> Vec<Holding> {
        self.of.iter().map(|(prefix, it)| (*prefix, it.held.load(Ordering::Relaxed))).collect()
    }
}

impl Prefix {
    /// By how much it holds more than its share.
    fn excess(&self) -> usize {
        match self.share.load(Ordering::Relaxed) {
            0 => 0,
            share => self.held.load(Ordering::Relaxed).saturating_sub(share),
        }
    }
}

impl ConnectionBudget {
    /// By how much its windows may grow in all, in bytes.
    pub fn growth(&self) -> usize {
        self.pool.0.growth
    }

    /// Returns how many of its charged bytes can be freed.
    pub fn held(&self) -> usize {
        self.held.load(Ordering::Relaxed)
    }

    /// Charges `after` bytes in place of `before`.
    pub fn replace_charge(&self, before: usize, after: usize) {
        let more = after.wrapping_sub(before); // atomic additions wrap around
        if more != 0 {
            for held in [&self.held, &self.prefix.1.held, &self.pool.0.held] {
                held.fetch_add(more, Ordering::Relaxed);
            }
        }
    }

    /// Charges this many bytes until the connection closes, if at most half of the pool is held then, and as much of that
    /// half is free as this prefix keeps: one prefix takes half of it at most, the next one half of what is left, and so
    /// on. Returns whether it did.
    pub fn keep_if_plenty(&self, bytes: usize) -> bool {
        let of_prefix = self.prefix.1.kept.load(Ordering::Relaxed);
        let needed = self.pool.held().saturating_add(of_prefix).saturating_add(2 * bytes);
        let is_plenty = needed <= self.pool.0.limit / 2;
        if is_plenty {
            for held in [&self.kept, &self.prefix.1.kept, &self.pool.0.held] {
                held.fetch_add(bytes, Ordering::Relaxed);
            }
        }
        is_plenty
    }

    /// Whether memory is scarce for this connection: see [`MemoryBudget::is_scarce_for`].
    pub fn is_scarce(&self) -> bool {
        self.pool.is_scarce() && self.prefix.1.excess() > 0
    }

    /// How long it may be write stalled now.
    pub fn max_stall(&self) -> Duration {
        let limit = Duration::from_millis(self.pool.0.max_stall.load(Ordering::Relaxed));
        if self.is_scarce() { limit.min(STALL_WHILE_SCARCE) } else { limit }
    }

    /// Whether this many unread bytes exceed the limit on one connection.
    pub fn is_exceeded(&self, unread: usize) -> bool {
        unread > self.pool.0.limit_per_connection
    }

    /// Scales the window of a stream, if its prefix holds more than its share: all of `window` while half of the pool is
    /// free, the smallest window above three quarters, proportional in between.
    pub fn window(&self, window: usize) -> usize {
        if self.prefix.1.excess() == 0 {
            return window;
        }
        let limit = self.pool.0.limit.max(4);
        let above_half = self.pool.held().saturating_sub(limit / 2).min(limit / 4);
        let falls_by = window.saturating_sub(MIN_WINDOW) as u128;
        window - (falls_by * above_half as u128 / (limit / 4) as u128) as usize
    }

    /// Counts a stream that was reset, or a connection that was closed.
    pub fn count(&self, cut: Cut) {
        if let Some(count) = self.pool.0.cut.get(cut as usize) {
            count.fetch_add(1, Ordering::Relaxed);
        }
    }
}

impl Drop for ConnectionBudget {
    fn drop(&mut self) {
        self.pool.connections().remove(&self.number);
        let [held, kept] = [&mut self.held, &mut self.kept].map(|it| *it.get_mut());
        let Self { pool, prefix: (prefix, account), .. } = self;
        account.held.fetch_sub(held, Ordering::Relaxed);
        account.kept.fetch_sub(kept, Ordering::Relaxed);
        pool.0.held.fetch_sub(held + kept, Ordering::Relaxed);
        let mut prefixes = pool.prefixes();
        mem::take(account); // under the lock, so that the last connection of a prefix knows that it is the last
        if prefixes.of.get(prefix).is_some_and(|it| Arc::strong_count(it) == 1) {
            prefixes.of.remove(prefix);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use super::*;

    /// A connection that frees ten bytes at a time, but never the `.1` bytes that it cannot free.
    #[derive(Debug)]
    struct Fixed(Arc<ConnectionBudget>, usize);

    impl Connection for Fixed {
        fn budget(&self) -> &ConnectionBudget {
            &self.0
        }

        fn shed(&self, _: Instant) -> usize {
            let held = self.0.held();
            if held - self.1 < 10 {
                return 0;
            }
            self.0.replace_charge(10, 0);
            self.0.count(Cut::Pool);
            10
        }

        fn reset(&self, _: Key) {}

        fn credit(&self) -> usize {
            7
        }
    }

    fn connection(budget: &MemoryBudget, host: u8, fixed: usize) -> Arc<Fixed> {
        connection_from(budget, [10, 0, 0, host], fixed)
    }

    /// A connection from another subnet.
    fn connection_elsewhere(budget: &MemoryBudget) -> Arc<Fixed> {
        connection_from(budget, [10, 0, 1, 1], 0)
    }

    fn connection_from(budget: &MemoryBudget, ip: [u8; 4], fixed: usize) -> Arc<Fixed> {
        Arc::new_cyclic(|connection: &Weak<Fixed>| {
            let account = budget.open(Some(IpAddr::from(ip).into()), connection.clone());
            account.replace_charge(0, fixed);
            Fixed(account, fixed)
        })
    }

    fn held(connection: &Fixed) -> usize {
        connection.0.held()
    }

    #[test]
    fn the_heaviest_connection_of_the_heaviest_prefix_loses_streams_down_to_nine_tenths() {
        let budget = MemoryBudget::new(1000, 1000, 0);
        let [light, heavy, other] = [1, 2, 2].map(|host| connection(&budget, host, 0));
        light.0.replace_charge(0, 400);
        heavy.0.replace_charge(0, 310);
        other.0.replace_charge(0, 290);
        budget.enforce(Instant::now());
        assert_eq!(budget.buffered().count(Cut::Pool), 0, "nothing is cut at the limit");
        heavy.0.replace_charge(0, 10);
        budget.enforce(Instant::now());
        assert_eq!((held(&light), held(&other), held(&heavy)), (400, 250, 250));
        let expected = Buffered { bytes: 900, credit: 3 * 7, cut: [11, 0, 0, 0] };
        assert_eq!(budget.buffered(), expected);
    }

    #[test]
    fn connections_with_nothing_to_free_are_skipped() {
        let budget = MemoryBudget::new(1000, 1000, 0);
        let [fixed, other] =
            [(1, 900), (2, 0)].map(|(host, fixed)| connection(&budget, host, fixed));
        other.0.replace_charge(0, 200);
        budget.enforce(Instant::now());
        assert_eq!((held(&fixed), held(&other)), (900, 0));
        budget.enforce(Instant::now());
        other.0.replace_charge(0, 500);
        drop(fixed);
        assert_eq!(budget.buffered().bytes, 500);
        assert_eq!(budget.connections().len(), 1);
    }

    #[test]
    fn memory_counts_until_it_is_released_or_its_connection_is_dropped() {
        let budget = MemoryBudget::new(100, 50, 0);
        let [one, other] = [1, 2].map(|host| connection(&budget, host, 0));
        one.0.replace_charge(0, 60);
        other.0.replace_charge(0, 51);
        assert!(!one.0.is_exceeded(50) && other.0.is_exceeded(51));
        other.0.replace_charge(51, 0);
        assert_eq!(budget.buffered().bytes, 60);
        drop(one);
        assert!(other.0.keep_if_plenty(25) && !other.0.keep_if_plenty(1));
        drop(other);
        assert_eq!(budget.buffered().bytes, 0);
        assert!(budget.prefixes().of.is_empty());
    }

    #[test]
    fn each_prefix_leaves_half_of_the_memory_that_may_be_kept_to_the_others() {
        let budget = MemoryBudget::new(4000, 4000, 0);
        let hosts = (1..100).map(|host| connection(&budget, host, 0)).collect::<Vec<_>>();
        let kept =
            hosts.iter().map(|host| (0..999).take_while(|_| host.0.keep_if_plenty(10)).count());
        let kept: Vec<_> = kept.collect();
        assert!(kept[..5] == [100, 50, 25, 12, 6] && kept.is_sorted_by(|a, b| a >= b), "{kept:?}");
    }

    #[test]
    fn windows_shrink_between_half_and_three_quarters_of_the_pool_for_those_above_their_share() {
        const KIB: usize = 1024;
        let budget = MemoryBudget::new(1000 * KIB, 1000 * KIB, 0);
        let [heavy, light] = [1, 2].map(|host| connection(&budget, host, 0));
        light.0.replace_charge(0, 200 * KIB);
        let mut now = Instant::now();
        for (held, window) in [(0, 1024), (500, 1024), (625, 528), (750, 32), (2000, 32)] {
            let held = held.max(200) * KIB - 200 * KIB;
            heavy.0.replace_charge(0, held);
            budget.compute_shares(now);
            assert_eq!(heavy.0.window(1024 * KIB), window * KIB, "{held}");
            assert_eq!(light.0.window(1024 * KIB), 1024 * KIB);
            heavy.0.replace_charge(held, 0);
            now += SHARE_INTERVAL;
        }
        heavy.0.replace_charge(0, 900 * KIB);
        budget.compute_shares(now);
        assert_eq!(heavy.0.window(256 * KIB), 32 * KIB);
        // 251 KiB: more than an equal part of the half.
        light.0.replace_charge(0, 51 * KIB);
        budget.compute_shares(now + SHARE_INTERVAL / 2);
        assert_eq!(light.0.window(256 * KIB), 256 * KIB, "computed from time to time");
        budget.compute_shares(now + SHARE_INTERVAL);
        assert_eq!(light.0.window(256 * KIB), 32 * KIB);
    }

    #[test]
    fn memory_is_scarce_above_three_quarters_of_the_pool_for_those_above_their_share() {
        let budget = MemoryBudget::new(1000, 1000, 0);
        let [heavy, light] = [1, 2].map(|host| connection(&budget, host, 0));
        assert_eq!(budget.busiest(), None);
        light.0.replace_charge(0, 100);
        heavy.0.replace_charge(0, 650);
        budget.enforce(Instant::now());
        assert!(!heavy.0.is_scarce());
        heavy.0.replace_charge(0, 1);
        let [is_scarce, other] = [&heavy, &light].map(|it| it.0.is_scarce());
        assert!(is_scarce && !other);
        for connection in [&heavy, &light] {
            let budget = &connection.0;
            assert_eq!(budget.pool.is_scarce_for(budget.prefix.0), budget.is_scarce());
        }
        assert_eq!(budget.busiest(), heavy.0.prefix.0.map(|prefix| (prefix, 651)));
    }

    #[test]
    fn what_a_prefix_keeps_is_not_counted_against_what_it_buffers() {
        let budget = MemoryBudget::new(1000, 1000, 0);
        let [keeps, heavy] = [connection(&budget, 1, 0), connection_elsewhere(&budget)];
        assert!(keeps.0.keep_if_plenty(250));
        keeps.0.replace_charge(0, 20);
        heavy.0.replace_charge(0, 740);
        budget.enforce(Instant::now());
        assert_eq!((held(&keeps), keeps.0.is_scarce()), (20, false));
        assert_eq!((budget.buffered().bytes, heavy.0.is_scarce()), (900, true));
        drop((keeps, heavy));
        assert_eq!((budget.buffered().bytes, budget.prefixes().of.len()), (0, 0));
    }

    #[test]
    fn a_stall_lasts_half_a_minute_at_most_while_memory_is_scarce() {
        let budget = MemoryBudget::new(1000, 1000, 0);
        let connection = connection(&budget, 1, 0);
        let [minute, half] = [60, 30].map(Duration::from_secs);
        budget.set_max_stall(minute);
        assert_eq!(connection.0.max_stall(), minute);
        connection.0.replace_charge(0, 751);
        budget.enforce(Instant::now());
        assert_eq!(connection.0.max_stall(), half);
        budget.set_max_stall(half / 2);
        assert_eq!(connection.0.max_stall(), half / 2);
    }

    #[test]
    fn many_addresses_of_one_subnet_lose_streams_before_one_that_holds_more_than_each() {
        let budget = MemoryBudget::new(1000, 1000, 0);
        let subnet: Vec<_> = (1..=9).map(|host| connection(&budget, host, 0)).collect();
        let other = connection_elsewhere(&budget);
        other.0.replace_charge(0, 200);
        subnet.iter().for_each(|it| it.0.replace_charge(0, 100));
        budget.enforce(Instant::now());
        assert_eq!((held(&other), budget.buffered().bytes), (200, 900));
        assert!(!other.0.is_scarce() && subnet.iter().all(|it| it.0.is_scarce()));
    }

    #[test]
    fn no_address_loses_streams_below_its_share_while_others_hold_more_than_theirs() {
        let budget = MemoryBudget::new(1000, 1000, 0);
        let subnet: Vec<_> = (1..=10).map(|host| connection(&budget, host, 0)).collect();
        let other = connection_elsewhere(&budget);
        other.0.replace_charge(0, 300);
        subnet.iter().for_each(|it| it.0.replace_charge(0, 75));
        budget.enforce(Instant::now());
        assert_eq!(budget.buffered().bytes, 900);
        assert!(held(&other) >= 250, "{}", held(&other));
    }
}
