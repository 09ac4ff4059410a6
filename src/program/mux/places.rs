//! Places for streams: as many as a connection's budget has, and as there are for all connections
//! together beside a few of its own.

use std::{
    collections::HashMap,
    fmt,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll},
};

use libp2p::futures::task::AtomicWaker;

use crate::{
    address::ClientPrefix,
    relay::quota::{Busiest, Caps, Quota, Scope},
};

/// How many streams of a peer's each connection has places for whatever others do: to ask for a
/// slot, to renew it, to be asked whether it is alive.
pub const OWN: usize = 4;

/// Places that all connections share: an eighth for one address at most, a quarter for one subnet. Where all
/// are taken, a stream on which no request has come is reset for one of a prefix that has fewer. Clones are
/// the same places.
#[derive(Clone, Debug)]
pub struct Commons(Arc<Mutex<Shared>>);

#[derive(Debug)]
struct Shared {
    quota: Quota,
    /// Those that are taken; with the stream as long as no request has come on it.
    taken: HashMap<u64, Taken>,
    last: u64,
}

struct Taken {
    prefix: Option<ClientPrefix>,
    silent: Option<(Weak<dyn Reset>, u64)>,
}

/// A session of which a stream can be reset for another.
pub trait Reset: Send + Sync {
    /// Resets the stream with this serial number.
    fn reset(&self, stream: u64);
}

impl fmt::Debug for Taken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Taken").field("prefix", &self.prefix).finish_non_exhaustive()
    }
}

impl Commons {
    /// All of them are free.
    pub fn new(places: usize) -> Self {
        let caps = Caps {
            total: Some(places),
            per_subnet: Some((places / 4).max(1)),
            per_address: Some((places / 8).max(1)),
        };
        Self(Arc::new(Mutex::new(Shared {
            quota: Quota::new(caps),
            taken: HashMap::new(),
            last: 0,
        })))
    }

    /// The address that has taken the most.
    pub fn busiest(&self) -> Option<Busiest> {
        self.shared().quota.busiest()
    }

    /// Takes one for a stream of this prefix.
    fn take(&self, prefix: Option<ClientPrefix>) -> Option<u64> {
        let mut shared = self.shared();
        let reset = match shared.quota.full(prefix) {
            None => None,
            Some(Scope::Total) => Some(shared.give_way(prefix)?),
            Some(_) => return None,
        };
        shared.quota.add(prefix);
        shared.last += 1;
        let number = shared.last;
        shared.taken.insert(number, Taken { prefix, silent: None });
        drop(shared);
        if let Some((session, stream)) = reset
            && let Some(session) = session.upgrade()
        {
            session.reset(stream);
        }
        Some(number)
    }

    fn free(&self, number: u64) {
        let mut shared = self.shared();
        if let Some(taken) = shared.taken.remove(&number) {
            shared.quota.remove(taken.prefix);
        }
    }

    fn shared(&self) -> MutexGuard<'_, Shared> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Shared {
    /// Frees the place of a silent stream for one of this prefix.
    fn give_way(&mut self, prefix: Option<ClientPrefix>) -> Option<(Weak<dyn Reset>, u64)> {
        let silent = self
            .taken
            .iter()
            .filter(|(_, taken)| taken.silent.is_some() && self.quota.yields(taken.prefix, prefix));
        let heaviest = silent.max_by_key(|(_, taken)| self.quota.load(taken.prefix));
        let number = *heaviest?.0;
        let taken = self.taken.remove(&number)?;
        self.quota.remove(taken.prefix);
        taken.silent
    }
}

/// The places of one direction of a connection.
#[derive(Debug)]
pub struct Places {
    budget: usize,
    free: AtomicUsize,
    /// Where those beyond [`OWN`] are taken from, and the prefix of the connection's client.
    commons: Option<(Commons, Option<ClientPrefix>)>,
    waker: AtomicWaker,
}

impl Places {
    /// So many, which are its own.
    pub fn new(budget: usize) -> Arc<Self> {
        Self::with(budget, None)
    }

    /// So many, as long as others leave some.
    pub fn shared(budget: usize, commons: Commons, prefix: Option<ClientPrefix>) -> Arc<Self> {
        Self::with(budget, Some((commons, prefix)))
    }

    fn with(budget: usize, commons: Option<(Commons, Option<ClientPrefix>)>) -> Arc<Self> {
        Arc::new(Self {
            budget,
            free: AtomicUsize::new(budget),
            commons,
            waker: AtomicWaker::new(),
        })
    }
}

/// A stream's place, given back when it is dropped.
#[derive(Debug)]
pub struct Place {
    of: Arc<Places>,
    /// One of these is taken, too.
    commons: Option<(Commons, u64)>,
}

impl Place {
    /// One that is free.
    pub fn take(places: &Arc<Places>) -> Option<Self> {
        let free = take(&places.free)?;
        let mut place = Self { of: Arc::clone(places), commons: None };
        if let Some((commons, prefix)) = &places.commons
            && places.budget - free >= OWN
        {
            // Without one the other is given back.
            let number = commons.take(*prefix)?;
            place.commons = Some((commons.clone(), number));
        }
        Some(place)
    }

    /// No request has come on its stream yet: it can be reset for another.
    pub fn is_silent(&self, session: Weak<dyn Reset>, stream: u64) {
        self.set_silent(Some((session, stream)));
    }

    /// A request has come on its stream.
    pub fn is_used(&self) {
        self.set_silent(None);
    }

    fn set_silent(&self, silent: Option<(Weak<dyn Reset>, u64)>) {
        if let Some((commons, number)) = &self.commons
            && let Some(taken) = commons.shared().taken.get_mut(number)
        {
            taken.silent = silent;
        }
    }

    /// One as soon as it is free. Only the last who waits is woken.
    pub fn poll_take(places: &Arc<Places>, cx: &Context<'_>) -> Poll<Self> {
        if let Some(place) = Self::take(places) {
            return Poll::Ready(place);
        }
        // A place may have come free before the waker was there to be woken.
        places.waker.register(cx.waker());
        Self::take(places).map_or(Poll::Pending, Poll::Ready)
    }
}

/// Takes one; yields how many there were.
fn take(free: &AtomicUsize) -> Option<usize> {
    let one_less = |free: usize| free.checked_sub(1);
    free.fetch_update(Ordering::AcqRel, Ordering::Acquire, one_less).ok()
}

impl Drop for Place {
    fn drop(&mut self) {
        if let Some((commons, number)) = &self.commons {
            commons.free(*number);
        }
        self.of.free.fetch_add(1, Ordering::AcqRel);
        self.of.waker.wake();
    }
}

#[cfg(test)]
mod tests {
    use std::{
        net::{IpAddr, Ipv4Addr},
        sync::atomic::AtomicBool,
    };

    use super::*;

    fn take(places: &Arc<Places>, count: usize) -> Vec<Place> {
        let taken = (0..count).map_while(|_| Place::take(places));
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
    fn each_connection_has_a_few_of_its_own_and_its_budget_at_most() {
        let commons = Commons::new(6);
        let [greedy, late] = [(); 2].map(|()| Places::shared(OWN + 4, commons.clone(), None));
        let all = take(&greedy, 99);
        assert_eq!(all.len(), OWN + 4);
        let few = take(&late, 99);
        assert_eq!(few.len(), OWN + 2);
        drop(all);
        assert_eq!(take(&late, 99).len(), 2, "the rest of its budget");
        drop(few);
        assert_eq!(take(&late, 99).len(), OWN + 4);
        assert_eq!(take(&greedy, 99).len(), OWN + 4);
    }

    #[test]
    fn an_address_has_an_eighth_of_those_that_are_shared() {
        let commons = Commons::new(16);
        let all = [(); 9].map(|()| Places::shared(OWN + 4, commons.clone(), prefix(1)));
        let taken: Vec<_> = all.iter().flat_map(|places| take(places, 99)).collect();
        assert_eq!(taken.len(), 9 * OWN + 2);
    }

    #[test]
    fn one_without_a_request_gives_way_to_a_prefix_that_has_fewer() {
        let commons = Commons::new(16);
        let of = |n| Places::shared(OWN + 2, commons.clone(), prefix(n));
        let streams: Vec<_> = (0..16).map(|_| Arc::new(AtomicBool::new(false))).collect();
        let mut places: Vec<_> = (0..8).flat_map(|n| take(&of(n), 99)).collect();
        places.retain(|place| place.commons.is_some());
        for (place, stream) in places.iter().zip(&streams) {
            let stream: Weak<AtomicBool> = Arc::downgrade(stream);
            place.is_silent(stream, 0);
        }
        let reset = || streams.iter().filter(|it| it.load(Ordering::Relaxed)).count();
        places.iter().skip(1).for_each(Place::is_used);
        let newcomer = take(&of(100), 99);
        assert_eq!((newcomer.len(), reset()), (OWN + 1, 1));
        assert!(streams[0].load(Ordering::Relaxed), "no request has come on it");
        // All others are used: none gives way any more.
        assert_eq!((take(&of(101), 99).len(), reset()), (OWN, 1));
        drop((places, newcomer));
        assert!(commons.shared().quota.is_empty());
    }

    #[test]
    fn what_is_not_shared_is_there_whatever_others_do() {
        let places = Places::new(OWN + 1);
        assert_eq!(take(&places, 99).len(), OWN + 1);
        assert_eq!(take(&places, 99).len(), OWN + 1);
    }
}
