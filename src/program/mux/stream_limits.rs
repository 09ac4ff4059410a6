//! Limits on streams: the settings, and whether a stream that a peer opens is admitted.
//!
//! Each request has its own stream, so stream rates bound the work for requests, even refused ones, before any lookup.
//! A stream above its rate is reset; its connection stays open. Permits bound how many streams are open: beyond the
//! first few of a connection, each takes a permit of a pool that all connections share.
//!
//! Sans-IO.

use std::{
    collections::BTreeSet,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use bytesize::ByteSize;

use super::frame::{INITIAL_WINDOW, MAX_STREAMS, MAX_WINDOW};
use crate::{
    address::ClientPrefix,
    config::ConfigError,
    program::net::admission::scoped_rates::{Bucket, ScopedRates},
    relay::{
        quota::{Busiest, Caps, Quota, Scope},
        rates::Rate,
    },
};

/// Streams of a connection besides those of its circuits: requests, pings, identify, and some to spare.
pub const SPARE: usize = 32;

/// How many inbound streams of a connection take no permit of the pool: enough to reserve, to renew, and to answer
/// pings, whatever other connections do.
pub const FREE_STREAMS: usize = 4;

/// The minimum ratio between the pool of buffered bytes and what one connection may hold: a few connections that fill
/// their buffers lose streams before the others have to share the rest.
const CONNECTIONS_IN_POOL: usize = 4;

const KIB: usize = 1024;

/// How many slots a relay has by default.
pub const DEFAULT_SIZE: usize = 1024;

/// The burst of an address, in seconds of its rate. It lets clients behind one carrier's NAT reconnect together.
const BURST_SECONDS: u32 = 16;

/// The rate of frames that open a stream, reset one or ping, as a multiple of the stream rate.
const FRAMES_PER_STREAM: u32 = 4;

/// The ratio between the rate of a scope and that of the next narrower one.
const WIDER: u32 = 4;

/// The rates that each connection has to itself, whatever others of its prefix do: streams for identify, reservations and
/// pings, and frames for these and for the ends of its circuits.
const OWN_STREAM_RATE: Rate = Rate { burst: 8, spacing: Duration::from_millis(2500) };
const OWN_FRAME_RATE: Rate = Rate { burst: 128, spacing: Duration::from_millis(125) };

/// The longest pause in reading a connection whose frames exceed their rate. The next pause may begin at once.
const MAX_PAUSE: Duration = Duration::from_secs(1);

/// How many streams a connection may have in each direction, for this many circuits.
///
/// # Errors
///
/// When that is more than `MAX_STREAMS`.
pub fn per_connection(circuits: usize) -> Result<usize, ConfigError> {
    const MAX_CIRCUITS: usize = MAX_STREAMS - SPARE;
    if circuits <= MAX_CIRCUITS {
        return Ok(circuits + SPARE);
    }
    let problem = format!("one connection cannot carry so many; try {MAX_CIRCUITS} or less");
    Err(ConfigError::new("max_circuits_per_peer", problem))
}

/// The limits on streams.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StreamLimits {
    /// How many streams all peers together may have open, not counting four of each connection. One address may have an
    /// eighth of them, one subnet a quarter. Default 4096.
    ///
    /// When all, or all of a subnet, are taken, a stream without a request is reset for one of an address with fewer;
    /// otherwise the new one is reset.
    pub max_streams: usize,
    /// How many streams a peer may have open on one connection. Default: 32 more than
    /// [`crate::Config::max_circuits_per_peer`].
    ///
    /// A stream beyond that is reset.
    pub max_streams_per_connection: Option<usize>,
    /// How many streams a second the connections of one address may open together, besides a few of each connection; a
    /// subnet four times, an IPv6 /32 sixteen times as many. The burst is 16 s of the rate. Default 64; zero: no limit.
    ///
    /// A stream beyond that is reset. Frames that open streams, reset them or ping have four times that rate: a connection
    /// above it is read more slowly, and closed unless it has a slot or a circuit.
    pub stream_rate: u32,
    /// How many bytes may be buffered for all streams: received and not read yet, or not sent yet. At least four times
    /// [`StreamLimits::max_buffered_per_connection`]. Default: that, or 80 MiB if that is more.
    ///
    /// Above it, streams of the heaviest connection of the client prefix that is the furthest above its fair share of
    /// half of it are reset, those first whose bytes have waited the longest, until nine tenths of it are in use. No
    /// connection is read more slowly because of another one. Between half and three quarters of it windows shrink, to
    /// 32 KiB: those of client prefixes that hold more than their fair share.
    pub max_buffered: Option<usize>,
    /// How many received bytes may be buffered for one connection. Default: a window of 256 KiB for each of
    /// [`crate::Config::max_circuits_per_peer`], and 1 MiB. The least: such a window for each, and another one. Windows grow
    /// by what is above that, at most by 768 KiB in all.
    ///
    /// Above it, streams of that connection are reset.
    pub max_buffered_per_connection: Option<usize>,
}

impl Default for StreamLimits {
    fn default() -> Self {
        Self {
            max_streams: 4096,
            max_streams_per_connection: None,
            stream_rate: 64,
            max_buffered: None,
            max_buffered_per_connection: None,
        }
    }
}

impl StreamLimits {
    /// Checks the limits, for this many circuits of a peer.
    ///
    /// # Errors
    ///
    /// The first invalid one.
    pub fn check(&self, circuits: usize) -> Result<(), ConfigError> {
        let streams = self.max_streams_per_connection.unwrap_or(FREE_STREAMS);
        // Each circuit may fill the window that it has from the start, and so may another stream.
        let (limit, least) = (self.buffered_per_connection(circuits), initial_windows(circuits));
        let (pool, min_pool) = (self.buffered(circuits), limit.saturating_mul(CONNECTIONS_IN_POOL));
        let of_pool = pool / CONNECTIONS_IN_POOL;
        let (setting, problem) = if !(FREE_STREAMS..=MAX_STREAMS).contains(&streams) {
            let problem = format!("{streams} is out of range; try {FREE_STREAMS} to {MAX_STREAMS}");
            ("max_streams_per_connection", problem)
        } else if limit < least {
            let fit = (limit / INITIAL_WINDOW).saturating_sub(1);
            ("max_buffered_per_connection", too_little(limit, least, circuits, fit))
        } else if pool >= min_pool {
            return Ok(());
        } else if self.max_buffered_per_connection.is_none() || of_pool < least {
            let fit = of_pool.saturating_sub(MAX_WINDOW) / INITIAL_WINDOW;
            // With fewer circuits only the default limit on a connection is lower.
            let fit = self.max_buffered_per_connection.map_or(fit, |_| 0);
            ("max_buffered", too_little(pool, min_pool, circuits, fit))
        } else {
            let problem = format!(
                "{} is below four times --max-buffered-per-connection; try {} or more, or lower that to {}",
                ByteSize::b(pool as u64),
                in_kib(min_pool.div_ceil(KIB)),
                in_kib(of_pool / KIB)
            );
            ("max_buffered", problem)
        };
        Err(ConfigError::new(setting, problem))
    }

    /// The limit on the received bytes of one connection, for this many circuits of a peer.
    pub fn buffered_per_connection(&self, circuits: usize) -> usize {
        self.max_buffered_per_connection.unwrap_or(buffered_per_connection(circuits, DEFAULT_SIZE))
    }

    /// By how much the windows of one connection may grow in all, for this many circuits of a peer: so that they fit into
    /// the limit on its received bytes.
    pub fn growth(&self, circuits: usize) -> usize {
        let left = self.buffered_per_connection(circuits).saturating_sub(initial_windows(circuits));
        left.min(MAX_WINDOW - INITIAL_WINDOW)
    }

    /// The limit on the bytes of all connections, for this many circuits of a peer.
    pub fn buffered(&self, circuits: usize) -> usize {
        let one = self.buffered_per_connection(circuits);
        self.max_buffered.unwrap_or_else(|| buffered(one, DEFAULT_SIZE))
    }
}

/// The default of [`StreamLimits::max_buffered_per_connection`] for this many circuits of a peer, at a relay of `slots`
/// slots: a window for each circuit, and one more that may have grown.
pub fn buffered_per_connection(circuits: usize, slots: usize) -> usize {
    let last_window = slots.saturating_mul(8 * KIB).clamp(INITIAL_WINDOW, MAX_WINDOW);
    circuits.saturating_mul(INITIAL_WINDOW).saturating_add(last_window)
}

/// The default of [`StreamLimits::max_buffered`] for this limit on one connection, at a relay of `slots` slots.
pub fn buffered(per_connection: usize, slots: usize) -> usize {
    // In a small relay one circuit for each slot may fill its window without exceeding the pool.
    let windows = slots.saturating_mul(INITIAL_WINDOW).min(32 * KIB * KIB);
    let pool = per_connection.saturating_mul(CONNECTIONS_IN_POOL);
    pool.max(slots.saturating_mul(80 * KIB)).max(windows)
}

/// How many bytes a connection holds if its circuits and one more stream fill their initial windows.
fn initial_windows(circuits: usize) -> usize {
    circuits.saturating_add(1).saturating_mul(INITIAL_WINDOW)
}

/// Why `limit` bytes do not suffice for so many circuits, and the remedies: `least` bytes, or `fit` circuits (0: none).
fn too_little(limit: usize, least: usize, circuits: usize, fit: usize) -> String {
    let or_lower = match fit {
        0 => String::new(),
        fit => format!(", or lower --max-circuits-per-peer to {fit}"),
    };
    format!(
        "{} is too little for --max-circuits-per-peer {circuits}; try {} or more{or_lower}",
        ByteSize::b(limit as u64),
        in_kib(least.div_ceil(KIB))
    )
}

/// A size in the notation of the flags, not rounded.
pub fn in_kib(kib: usize) -> String {
    if kib.is_multiple_of(KIB) { format!("{}MiB", kib / KIB) } else { format!("{kib}KiB") }
}

/// How many streams may be open on one connection.
#[derive(Clone, Copy, Debug)]
pub struct Budget {
    /// The limit on streams opened by the peer.
    pub inbound: usize,
    /// The limit on streams opened by the relay.
    pub outbound: usize,
}

/// Identifies a stream of a session: its id on the wire, which may be reused, and a serial number, which is not.
pub type Key = (u32, u64);

/// A stream of any session: the number of its connection, and its key.
pub type StreamId = (u64, Key);

/// Admits the streams of a connection. Clones, for other connections, share the pool and the rates of prefixes.
#[derive(Clone, Debug)]
pub struct StreamAdmission {
    /// The limits on its streams.
    pub budget: Budget,
    /// The client prefix of the connection.
    pub prefix: Option<ClientPrefix>,
    permits: Arc<Mutex<Permits>>,
    streams: RateLimiter,
    frames: RateLimiter,
}

impl StreamAdmission {
    /// An admission with these limits.
    pub fn new(budget: Budget, limits: StreamLimits) -> Self {
        let frame_rate = limits.stream_rate.saturating_mul(FRAMES_PER_STREAM);
        Self {
            budget,
            prefix: None,
            permits: Arc::new(Mutex::new(Permits::new(limits.max_streams))),
            streams: RateLimiter::new(OWN_STREAM_RATE, limits.stream_rate),
            frames: RateLimiter::new(OWN_FRAME_RATE, frame_rate),
        }
    }

    /// The address that holds the most permits.
    pub fn busiest(&self) -> Option<Busiest> {
        lock(&self.permits).quota.busiest()
    }

    /// Admits a stream that the peer opens beside `open` others, with a permit of the pool if it needs one. Returns the
    /// permit, and the stream of another connection to reset for it; `None` if this stream is to be reset.
    pub fn admit(
        &mut self,
        stream: StreamId,
        open: usize,
        now: Instant,
    ) -> Option<(Option<Permit>, Option<StreamId>)> {
        let prefix = self.prefix;
        self.streams.take(prefix, Duration::ZERO, now)?;
        if open >= self.budget.inbound {
            return None;
        }
        if open < FREE_STREAMS {
            return Some((None, None));
        }
        let preempted = lock(&self.permits).take(stream, prefix)?;
        let permits = Arc::clone(&self.permits);
        Some((Some(Permit { permits, stream, prefix, is_used: false }), preempted))
    }

    /// Counts a frame that opens a stream, resets one or pings. Returns how long the connection is not to be read.
    pub fn count_frame(&mut self, now: Instant) -> Duration {
        self.frames.take(self.prefix, MAX_PAUSE, now).unwrap_or(MAX_PAUSE)
    }
}

/// The pool of permits that all connections share: an eighth for one address at most, a quarter for one subnet. When all
/// are taken, or all of a subnet, an unused stream of these is reset for one of a prefix with fewer.
#[derive(Debug)]
struct Permits {
    quota: Quota,
    /// The streams that have had no request yet, by prefix: they may be reset for another one.
    unused: BTreeSet<(Option<ClientPrefix>, StreamId)>,
}

impl Permits {
    fn new(permits: usize) -> Self {
        let [per_subnet, per_address] = [4, 8].map(|share| Some((permits / share).max(1)));
        let caps = Caps { total: Some(permits), per_subnet, per_address };
        Self { quota: Quota::new(caps), unused: BTreeSet::new() }
    }

    /// Takes a permit, if there is one. Returns the stream that lost its permit for it, if one did: an unused one of
    /// the heaviest prefix.
    fn take(&mut self, stream: StreamId, prefix: Option<ClientPrefix>) -> Option<Option<StreamId>> {
        let preempted = match self.quota.full(prefix) {
            None => None,
            Some(Scope::Address(_)) => return None,
            Some(full) => {
                // One candidate for each prefix: a few prefixes hold most streams, and these need not be compared.
                let mut last = None;
                let firsts = self.unused.iter().filter(|(it, _)| last.replace(*it) != Some(*it));
                let yields = |it| full.covers(it) && self.quota.yields(it, prefix);
                let candidates = firsts.filter(|(holder, _)| yields(*holder));
                Some(*candidates.max_by_key(|(holder, _)| self.quota.load(*holder))?)
            }
        };
        if let Some(preempted) = preempted {
            self.unused.remove(&preempted);
            self.quota.remove(preempted.0);
        }
        self.quota.add(prefix);
        self.unused.insert((prefix, stream));
        Some(preempted.map(|(_, stream)| stream))
    }
}

/// A stream's permit of the pool, released when it is dropped.
#[derive(Debug)]
pub struct Permit {
    permits: Arc<Mutex<Permits>>,
    stream: StreamId,
    prefix: Option<ClientPrefix>,
    is_used: bool,
}

impl Permit {
    /// Records that a request has arrived on the stream.
    pub fn set_used(&mut self) {
        if !self.is_used {
            self.is_used = lock(&self.permits).unused.remove(&(self.prefix, self.stream));
        }
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        let mut permits = lock(&self.permits);
        if permits.unused.remove(&(self.prefix, self.stream)) || self.is_used {
            permits.quota.remove(self.prefix);
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Limits one connection: by a token bucket of its own, and beyond that by those of its scopes.
#[derive(Clone, Debug)]
struct RateLimiter {
    own: Rate,
    bucket: Bucket,
    scopes: Arc<Mutex<ScopedRates>>,
}

impl RateLimiter {
    /// `per_second` is the rate of an address, on top of each connection's `own`; zero: no limit.
    fn new(own: Rate, per_second: u32) -> Self {
        let level = |wider| {
            let rate = per_second.saturating_mul(wider);
            let burst = rate.saturating_mul(BURST_SECONDS);
            (rate > 0).then(|| Rate { burst, spacing: Duration::from_secs(1) / rate })
        };
        let scopes = ScopedRates::new([1, WIDER, WIDER * WIDER].map(level));
        Self { own, bucket: Bucket::default(), scopes: Arc::new(Mutex::new(scopes)) }
    }

    /// Takes a token if one is available within `max_wait`. Returns how long the caller has to wait for it.
    fn take(
        &mut self,
        prefix: Option<ClientPrefix>,
        max_wait: Duration,
        now: Instant,
    ) -> Option<Duration> {
        let own = self.bucket.take(self.own, Duration::ZERO, now);
        let of_scopes = |prefix| lock(&self.scopes).take(prefix, max_wait, now);
        // An unknown address has no scope to limit.
        own.or_else(|| prefix.map_or(Some(Duration::ZERO), of_scopes))
    }
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use super::*;

    const MIB: usize = KIB * KIB;

    fn problem(pool: Option<usize>, one: Option<usize>, circuits: usize) -> Option<String> {
        let limits = StreamLimits {
            max_buffered: pool,
            max_buffered_per_connection: one,
            ..StreamLimits::default()
        };
        let error = limits.check(circuits).err()?;
        Some(format!("{}: {}", error.setting(), error.problem))
    }

    #[test]
    fn the_buffer_size_named_in_the_error_is_accepted() {
        for circuits in [1, 2, 63, 64, 65] {
            let line = problem(Some(0), None, circuits).unwrap();
            let (_, named) = line.split_once("try ").unwrap();
            let bytes: ByteSize = named.split(' ').next().unwrap().parse().unwrap();
            let least = bytes.as_u64() as usize;
            assert_eq!(problem(Some(least), None, circuits), None, "{line}");
            assert!(problem(Some(least - 1), None, circuits).is_some(), "{line}");
        }
    }

    #[test]
    fn each_remedy_named_in_the_error_is_accepted() {
        for (pool, one, circuits) in [
            (None, Some(65 * MIB / 4 - 1), 64),
            (None, Some(MIB / 4), 64),
            (Some(8 * MIB), None, 64),
            (Some(16 * MIB), Some(17 * MIB), 64),
            (Some(79 * MIB), Some(20 * MIB), 64),
        ] {
            let line = problem(pool, one, circuits).unwrap();
            let after = |words: &str| Some(line.split_once(words)?.1.split(' ').next().unwrap());
            let bytes = |text: &str| Some(text.parse::<ByteSize>().unwrap().as_u64() as usize);
            let more = bytes(after("try ").unwrap());
            let (pool_or_more, one_or_more) = match line.starts_with("max_buffered: ") {
                true => (more, one),
                false => (pool, more),
            };
            assert_eq!(problem(pool_or_more, one_or_more, circuits), None, "{line}");
            if let Some(fewer) = after("--max-circuits-per-peer to ") {
                assert_eq!(problem(pool, one, fewer.parse().unwrap()), None, "{line}");
            }
            if let Some(lower) = after("lower that to ") {
                assert_eq!(problem(pool, bytes(lower), circuits), None, "{line}");
            }
        }
    }

    #[test]
    fn default_budgets_hold_all_windows_of_a_connection_and_four_connections() {
        for circuits in [0, 1, 64, 4096, usize::MAX] {
            assert_eq!(problem(None, None, circuits), None);
        }
        assert_eq!(problem(Some(68 * MIB), Some(17 * MIB), 64), None);
        assert_eq!(problem(Some(5 * MIB), None, 1), None);
        for (pool, one, circuits, expected) in [
            (
                None,
                Some(65 * MIB / 4 - 1),
                64,
                "max_buffered_per_connection: 16.2 MiB is too little for --max-circuits-per-peer 64; try 16640KiB \
                 or more, or lower --max-circuits-per-peer to 63",
            ),
            (
                None,
                Some(MIB / 4),
                64,
                "max_buffered_per_connection: 256.0 KiB is too little for --max-circuits-per-peer 64; try 16640KiB \
                 or more",
            ),
            (
                Some(8 * MIB),
                None,
                64,
                "max_buffered: 8.0 MiB is too little for --max-circuits-per-peer 64; try 68MiB or more, or \
                 lower --max-circuits-per-peer to 4",
            ),
            // A quarter of the pool is too little for one connection.
            (
                Some(16 * MIB),
                Some(17 * MIB),
                64,
                "max_buffered: 16.0 MiB is too little for --max-circuits-per-peer 64; try 68MiB or more",
            ),
            (
                Some(79 * MIB),
                Some(20 * MIB),
                64,
                "max_buffered: 79.0 MiB is below four times --max-buffered-per-connection; try 80MiB or more, \
                 or lower that to 20224KiB",
            ),
        ] {
            assert_eq!(problem(pool, one, circuits).as_deref(), Some(expected));
        }
    }

    /// An address in a /24 of its own.
    fn prefix(subnet: u8) -> Option<ClientPrefix> {
        Some(IpAddr::from([10, 0, subnet, 1]).into())
    }

    fn admission(inbound: usize, max_streams: usize, stream_rate: u32) -> StreamAdmission {
        let limits = StreamLimits { max_streams, stream_rate, ..StreamLimits::default() };
        StreamAdmission::new(Budget { inbound, outbound: 0 }, limits)
    }

    /// A connection, with the streams that it has open and those that were reset for them.
    struct Connection {
        number: u64,
        admission: StreamAdmission,
        open: Vec<Option<Permit>>,
        preempted: Vec<StreamId>,
    }

    impl Connection {
        fn new(number: u64, prefix: Option<ClientPrefix>, admission: &StreamAdmission) -> Self {
            let (open, preempted) = (Vec::new(), Vec::new());
            let admission = StreamAdmission { prefix, ..admission.clone() };
            Self { number, admission, open, preempted }
        }

        /// Opens as many streams as it may.
        fn open_all(&mut self) -> usize {
            let before = self.open.len();
            for serial in self.open.len()..99 {
                let (stream, now) = ((self.number, (0, serial as u64)), Instant::now());
                let admitted = self.admission.admit(stream, self.open.len(), now);
                let Some((permit, preempted)) = admitted else { break };
                self.open.push(permit);
                self.preempted.extend(preempted);
            }
            self.open.len() - before
        }
    }

    #[test]
    fn a_connection_has_streams_without_permits_and_a_limit() {
        let admission = admission(FREE_STREAMS + 4, 6, 0);
        let [mut greedy, mut late] = [1, 2].map(|n| Connection::new(n, None, &admission));
        assert_eq!(greedy.open_all(), FREE_STREAMS + 4);
        assert_eq!(late.open_all(), FREE_STREAMS + 2);
        greedy.open.clear();
        assert_eq!(late.open_all(), 2, "up to its limit");
        late.open.clear();
        assert_eq!(late.open_all(), FREE_STREAMS + 4);
        assert_eq!(greedy.open_all(), FREE_STREAMS + 2);
    }

    #[test]
    fn an_address_has_an_eighth_of_the_shared_permits() {
        let admission = admission(FREE_STREAMS + 4, 16, 0);
        let all = (0..9).map(|n| Connection::new(n, prefix(1), &admission));
        let mut all: Vec<_> = all.collect();
        let opened: usize = all.iter_mut().map(Connection::open_all).sum();
        assert_eq!(opened, 9 * FREE_STREAMS + 2);
    }

    #[test]
    fn an_unused_stream_is_reset_for_one_of_a_prefix_with_fewer() {
        let admission = admission(FREE_STREAMS + 2, 16, 0);
        let all = (0..8).map(|n| Connection::new(n, prefix(n as u8), &admission));
        let mut all: Vec<_> = all.collect();
        let opened: usize = all.iter_mut().map(Connection::open_all).sum();
        assert_eq!(opened, 8 * (FREE_STREAMS + 2));
        let mut permits = all.iter_mut().flat_map(|it| &mut it.open).flatten();
        let unused = permits.next().unwrap().stream;
        permits.for_each(Permit::set_used);
        let mut newcomer = Connection::new(100, prefix(100), &admission);
        assert_eq!(newcomer.open_all(), FREE_STREAMS + 1);
        assert_eq!(newcomer.preempted, [unused]);
        // All others are used: none is reset.
        newcomer.open.iter_mut().flatten().for_each(Permit::set_used);
        let mut other = Connection::new(101, prefix(101), &admission);
        assert_eq!((other.open_all(), other.preempted.len()), (FREE_STREAMS, 0));
        drop((all, newcomer, other));
        let permits = lock(&admission.permits);
        assert!(permits.quota.scopes() == 0 && permits.unused.is_empty());
    }

    #[test]
    fn two_addresses_of_a_subnet_do_not_take_the_permits_of_its_other_addresses() {
        let admission = admission(FREE_STREAMS + 8, 64, 0); // 8 for an address, 16 for a subnet
        let connect = |n: u64| Connection::new(n, host(n as u8), &admission);
        let mut heavy = [1, 2].map(connect);
        let mut used = Connection::new(9, prefix(9), &admission);
        assert_eq!(heavy.each_mut().map(Connection::open_all), [FREE_STREAMS + 8; 2]);
        assert_eq!(used.open_all(), FREE_STREAMS + 8);
        let mut other = connect(3);
        // Its fair share, from both of them in turn.
        assert_eq!((other.open_all(), other.preempted.len()), (FREE_STREAMS + 5, 5));
        assert!(other.preempted.iter().all(|(connection, _)| *connection < 3));
        // Used ones are not reset.
        heavy.iter_mut().flat_map(|it| &mut it.open).flatten().for_each(Permit::set_used);
        let mut late = connect(4);
        assert_eq!((late.open_all(), late.preempted.len()), (FREE_STREAMS + 2, 2));
    }

    #[test]
    fn an_unused_stream_of_the_heaviest_subnet_is_reset_and_only_once() {
        let admission = admission(FREE_STREAMS + 2, 16, 0);
        let heavy = [1, 2].map(|host| Some(IpAddr::from([10, 0, 0, host]).into()));
        let prefixes = heavy.into_iter().chain((1..=6).map(prefix));
        let all = prefixes.zip(0..).map(|(prefix, n)| Connection::new(n, prefix, &admission));
        let mut all: Vec<_> = all.collect();
        let opened: usize = all.iter_mut().map(Connection::open_all).sum();
        assert_eq!(opened, 8 * FREE_STREAMS + 16);
        let preempted = [100, 101].map(|n| {
            let mut newcomer = Connection::new(n, prefix(n as u8), &admission);
            let admitted = newcomer.admission.admit((n, (0, 0)), FREE_STREAMS, Instant::now());
            let (permit, preempted) = admitted.unwrap();
            newcomer.open.push(permit);
            all.push(newcomer);
            preempted.unwrap()
        });
        assert!(preempted.iter().all(|(connection, _)| *connection < 2), "{preempted:?}");
        assert_ne!(preempted[0], preempted[1]);
        all.drain(..2); // four permits, two of which were already lost
        assert_eq!(lock(&admission.permits).quota.held(Scope::Total), 14);
    }

    fn host(host: u8) -> Option<ClientPrefix> {
        Some(IpAddr::from([192, 0, 2, host]).into())
    }

    /// How many streams are within the rate.
    fn admitted(admission: &mut StreamAdmission, host: Option<ClientPrefix>, now: Instant) -> u32 {
        admission.prefix = host;
        (0..9999).filter(|_| admission.admit((0, (0, 0)), 0, now).is_some()).count() as u32
    }

    #[test]
    fn each_connection_has_a_rate_of_its_own() {
        let (all, now) = (admission(9, 9, 64), Instant::now());
        let [mut fast, mut late, mut other] = [(); 3].map(|()| all.clone());
        assert_eq!(admitted(&mut fast, host(1), now), OWN_STREAM_RATE.burst + 64 * BURST_SECONDS);
        assert_eq!(admitted(&mut late, host(1), now), OWN_STREAM_RATE.burst);
        let later = now + Duration::from_secs(1);
        assert_eq!(admitted(&mut fast, host(1), later), 64);
        // Another address has its own rate, within that of the subnet.
        assert_eq!(
            admitted(&mut other, host(2), later),
            OWN_STREAM_RATE.burst + 64 * BURST_SECONDS
        );
    }

    #[test]
    fn a_subnet_has_four_times_the_rate_of_an_address() {
        let (all, now) = (admission(9, 9, 64), Instant::now());
        let sum: u32 = (1..20).map(|n| admitted(&mut all.clone(), host(n), now)).sum();
        assert_eq!(sum, 19 * OWN_STREAM_RATE.burst + WIDER * 64 * BURST_SECONDS);
    }

    #[test]
    fn frames_above_the_rate_pause_only_their_own_connection() {
        let (all, mut now) = (admission(9, 9, 64), Instant::now());
        let all = StreamAdmission { prefix: host(1), ..all };
        let [mut fast, mut slow] = [(); 2].map(|()| all.clone());
        let burst = OWN_FRAME_RATE.burst + FRAMES_PER_STREAM * 64 * BURST_SECONDS;
        let at_once = (0..9999).take_while(|_| fast.count_frame(now).is_zero());
        assert_eq!(at_once.count() as u32, burst);
        assert!(!fast.count_frame(now).is_zero());
        for _ in 0..1000 {
            now += OWN_FRAME_RATE.spacing;
            (0..100).for_each(|_| _ = fast.count_frame(now));
            assert_eq!(slow.count_frame(now), Duration::ZERO);
        }
    }

    #[test]
    fn zero_means_unlimited() {
        let (mut all, now) = (admission(9, 9, 0), Instant::now());
        assert_eq!(admitted(&mut all, host(1), now), 9999);
        assert!((0..9999).all(|_| all.count_frame(now).is_zero()));
    }
}
