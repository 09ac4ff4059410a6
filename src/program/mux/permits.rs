//! Permits for streams: a semaphore for each direction of a connection, and a pool that all connections share.
//!
//! A stream takes a permit of its connection. Beyond the first few of a connection it also takes one of the shared pool.

use std::{
    collections::HashMap,
    fmt::Debug,
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    task::{Context, Poll},
};

use libp2p::futures::task::AtomicWaker;

use crate::{
    address::ClientPrefix,
    relay::quota::{Busiest, Caps, Quota, Scope},
};

/// How many inbound streams of a connection take no permit of the shared pool: enough to reserve, to renew, and to answer
/// pings, whatever other connections do.
pub const OWN: usize = 4;

/// The permits that all connections share: an eighth for one address at most, a quarter for one subnet. When all are
/// taken, an unused stream is reset for one of a prefix with fewer. Clones are the same pool.
#[derive(Clone, Debug)]
pub struct SharedPool(Arc<Mutex<Pool>>);

#[derive(Debug)]
struct Pool {
    quota: Quota,
    taken: HashMap<u64, Taken>,
    last: u64,
}

#[derive(Debug)]
struct Taken {
    prefix: Option<ClientPrefix>,
    usage: Arc<Usage>,
}

/// Whether a stream can be reset for another one: it can until its first request. Atomic, so that a session need not lock
/// the pool.
#[derive(Debug, Default)]
struct Usage {
    is_used: AtomicBool,
    stream: OnceLock<(Weak<dyn Reset>, u64)>,
}

impl Usage {
    fn unused_stream(&self) -> Option<&(Weak<dyn Reset>, u64)> {
        self.stream.get().filter(|_| !self.is_used.load(Ordering::Relaxed))
    }
}

/// A session whose streams can be reset for others.
pub trait Reset: Send + Sync + Debug {
    /// Resets the stream with this serial number.
    fn reset(&self, stream: u64);
}

impl SharedPool {
    /// A pool of this many permits.
    pub fn new(permits: usize) -> Self {
        let caps = Caps {
            total: Some(permits),
            per_subnet: Some((permits / 4).max(1)),
            per_address: Some((permits / 8).max(1)),
        };
        let pool = Pool { quota: Quota::new(caps), taken: HashMap::new(), last: 0 };
        Self(Arc::new(Mutex::new(pool)))
    }

    /// The address that holds the most permits.
    pub fn busiest(&self) -> Option<Busiest> {
        self.pool().quota.busiest()
    }

    /// Takes a shared permit for a stream of this prefix.
    fn take(&self, prefix: Option<ClientPrefix>, usage: Arc<Usage>) -> Option<u64> {
        let mut pool = self.pool();
        let reset = match pool.quota.full(prefix) {
            None => None,
            Some(Scope::Total) => Some(pool.preempt(prefix)?),
            Some(_) => return None,
        };
        pool.quota.add(prefix);
        pool.last += 1;
        let number = pool.last;
        pool.taken.insert(number, Taken { prefix, usage });
        drop(pool); // before a session is locked
        if let Some((session, stream)) = reset
            && let Some(session) = session.upgrade()
        {
            session.reset(stream);
        }
        Some(number)
    }

    fn release(&self, number: u64) {
        let mut pool = self.pool();
        if let Some(taken) = pool.taken.remove(&number) {
            pool.quota.remove(taken.prefix);
        }
    }

    fn pool(&self) -> MutexGuard<'_, Pool> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Pool {
    /// Releases the permit of an unused stream of the heaviest prefix for a stream of this one. Returns the stream to
    /// reset.
    fn preempt(&mut self, prefix: Option<ClientPrefix>) -> Option<(Weak<dyn Reset>, u64)> {
        let candidates = self.taken.iter().filter(|(_, taken)| {
            taken.usage.unused_stream().is_some() && self.quota.yields(taken.prefix, prefix)
        });
        let heaviest = candidates.max_by_key(|(_, taken)| self.quota.load(taken.prefix));
        let number = *heaviest?.0;
        let taken = self.taken.remove(&number)?;
        self.quota.remove(taken.prefix);
        taken.usage.stream.get().cloned()
    }
}

/// The permits of one direction of a connection.
#[derive(Debug)]
pub struct StreamPermits {
    limit: usize,
    free: AtomicUsize,
    /// The pool for permits beyond [`OWN`], and the client prefix of the connection.
    shared: Option<(SharedPool, Option<ClientPrefix>)>,
    waker: AtomicWaker,
}

impl StreamPermits {
    /// This many permits, all of them the connection's own.
    pub fn new(limit: usize) -> Arc<Self> {
        Self::with(limit, None)
    }

    /// This many permits, of which those beyond [`OWN`] depend on the shared pool.
    pub fn shared(limit: usize, pool: SharedPool, prefix: Option<ClientPrefix>) -> Arc<Self> {
        Self::with(limit, Some((pool, prefix)))
    }

    fn with(limit: usize, shared: Option<(SharedPool, Option<ClientPrefix>)>) -> Arc<Self> {
        let (free, waker) = (AtomicUsize::new(limit), AtomicWaker::new());
        Arc::new(Self { limit, free, shared, waker })
    }
}

/// A stream's permit, released when it is dropped.
#[derive(Debug)]
pub struct StreamPermit {
    permits: Arc<StreamPermits>,
    /// A permit of the shared pool that it takes as well.
    shared: Option<(SharedPool, u64, Arc<Usage>)>,
}

impl StreamPermit {
    /// Takes a permit if one is free.
    pub fn take(permits: &Arc<StreamPermits>) -> Option<Self> {
        let one_less = |free: usize| free.checked_sub(1);
        let taken = permits.free.fetch_update(Ordering::AcqRel, Ordering::Acquire, one_less);
        let free = taken.ok()?;
        let mut permit = Self { permits: Arc::clone(permits), shared: None };
        if let Some((pool, prefix)) = &permits.shared
            && permits.limit - free >= OWN
        {
            // Dropping `permit` releases it if the pool has none.
            let usage = Arc::<Usage>::default();
            let number = pool.take(*prefix, Arc::clone(&usage))?;
            permit.shared = Some((pool.clone(), number, usage));
        }
        Some(permit)
    }

    /// Takes a permit as soon as one is free. Only the last task that waits is woken.
    pub fn poll_take(permits: &Arc<StreamPermits>, cx: &Context<'_>) -> Poll<Self> {
        if let Some(permit) = Self::take(permits) {
            return Poll::Ready(permit);
        }
        // A permit may have been released before the waker was registered.
        permits.waker.register(cx.waker());
        Self::take(permits).map_or(Poll::Pending, Poll::Ready)
    }

    /// Lets the pool reset this stream of a session until the stream is [used](Self::mark_used).
    pub fn set_stream(&self, session: Weak<dyn Reset>, stream: u64) {
        if let Some((.., usage)) = &self.shared {
            let _ = usage.stream.set((session, stream)); // it is set once
        }
    }

    /// Records that a request has arrived on the stream.
    pub fn mark_used(&self) {
        if let Some((.., usage)) = &self.shared {
            usage.is_used.store(true, Ordering::Relaxed);
        }
    }
}

impl Drop for StreamPermit {
    fn drop(&mut self) {
        if let Some((pool, number, _)) = &self.shared {
            pool.release(*number);
        }
        self.permits.free.fetch_add(1, Ordering::AcqRel);
        self.permits.waker.wake();
    }
}

#[cfg(test)]
mod tests {
    use std::net::{IpAddr, Ipv4Addr};

    use super::*;

    fn take(permits: &Arc<StreamPermits>, count: usize) -> Vec<StreamPermit> {
        let taken = (0..count).map_while(|_| StreamPermit::take(permits));
        taken.collect()
    }

    /// An address in a /24 of its own.
    fn prefix(n: u8) -> Option<ClientPrefix> {
        Some(IpAddr::from(Ipv4Addr::new(10, 0, n, 1)).into())
    }

    impl Reset for AtomicBool {
        fn reset(&self, _: u64) {
            self.store(true, Ordering::Relaxed);
        }
    }

    #[test]
    fn a_connection_has_reserved_permits_and_a_limit() {
        let pool = SharedPool::new(6);
        let [greedy, late] = [(); 2].map(|()| StreamPermits::shared(OWN + 4, pool.clone(), None));
        let all = take(&greedy, 99);
        assert_eq!(all.len(), OWN + 4);
        let few = take(&late, 99);
        assert_eq!(few.len(), OWN + 2);
        drop(all);
        assert_eq!(take(&late, 99).len(), 2, "up to its limit");
        drop(few);
        assert_eq!(take(&late, 99).len(), OWN + 4);
        assert_eq!(take(&greedy, 99).len(), OWN + 4);
    }

    #[test]
    fn an_address_has_an_eighth_of_the_shared_permits() {
        let pool = SharedPool::new(16);
        let all = [(); 9].map(|()| StreamPermits::shared(OWN + 4, pool.clone(), prefix(1)));
        let taken: Vec<_> = all.iter().flat_map(|permits| take(permits, 99)).collect();
        assert_eq!(taken.len(), 9 * OWN + 2);
    }

    #[test]
    fn an_unused_stream_is_reset_for_one_of_a_prefix_with_fewer() {
        let pool = SharedPool::new(16);
        let of = |n| StreamPermits::shared(OWN + 2, pool.clone(), prefix(n));
        let streams: Vec<_> = (0..16).map(|_| Arc::new(AtomicBool::new(false))).collect();
        let mut permits: Vec<_> = (0..8).flat_map(|n| take(&of(n), 99)).collect();
        permits.retain(|permit| permit.shared.is_some());
        for (permit, stream) in permits.iter().zip(&streams) {
            let stream: Weak<AtomicBool> = Arc::downgrade(stream);
            permit.set_stream(stream, 0);
        }
        let reset = || streams.iter().filter(|it| it.load(Ordering::Relaxed)).count();
        permits.iter().skip(1).for_each(StreamPermit::mark_used);
        let newcomer = take(&of(100), 99);
        assert_eq!((newcomer.len(), reset()), (OWN + 1, 1));
        assert!(streams[0].load(Ordering::Relaxed), "the unused stream was not reset");
        // The remaining streams are in use, so none is reset.
        assert_eq!((take(&of(101), 99).len(), reset()), (OWN, 1));
        drop((permits, newcomer));
        assert!(pool.pool().quota.is_empty());
    }

    #[test]
    fn permits_that_are_not_shared_do_not_depend_on_the_pool() {
        let permits = StreamPermits::new(OWN + 1);
        assert_eq!(take(&permits, 99).len(), OWN + 1);
        assert_eq!(take(&permits, 99).len(), OWN + 1);
    }
}
