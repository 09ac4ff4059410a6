//! Places for streams: as many as a connection's budget has, and as there are for all connections
//! together beside a few of its own.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll},
};

use libp2p::futures::task::AtomicWaker;

/// How many streams of a peer's each connection has places for whatever others do: to ask for a
/// slot, to renew it, to be asked whether it is alive.
pub const OWN: usize = 4;

/// Places that all connections share. Clones are the same places.
#[derive(Clone, Debug)]
pub struct Commons(Arc<AtomicUsize>);

impl Commons {
    /// All of them are free.
    pub fn new(places: usize) -> Self {
        Self(Arc::new(AtomicUsize::new(places)))
    }
}

/// The places of one direction of a connection.
#[derive(Debug)]
pub struct Places {
    budget: usize,
    free: AtomicUsize,
    /// Where those beyond [`OWN`] are taken from.
    commons: Option<Commons>,
    waker: AtomicWaker,
}

impl Places {
    /// So many, which are its own.
    pub fn new(budget: usize) -> Arc<Self> {
        Self::with(budget, None)
    }

    /// So many, as long as others leave some.
    pub fn shared(budget: usize, commons: Commons) -> Arc<Self> {
        Self::with(budget, Some(commons))
    }

    fn with(budget: usize, commons: Option<Commons>) -> Arc<Self> {
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
    commons: Option<Commons>,
}

impl Place {
    /// One that is free.
    pub fn take(places: &Arc<Places>) -> Option<Self> {
        let free = take(&places.free)?;
        let mut place = Self {
            of: Arc::clone(places),
            commons: None,
        };
        if let Some(commons) = &places.commons
            && places.budget - free >= OWN
        {
            // Without one the other is given back.
            take(&commons.0)?;
            place.commons = Some(commons.clone());
        }
        Some(place)
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
    free.fetch_update(Ordering::AcqRel, Ordering::Acquire, one_less)
        .ok()
}

impl Drop for Place {
    fn drop(&mut self) {
        if let Some(commons) = &self.commons {
            commons.0.fetch_add(1, Ordering::AcqRel);
        }
        self.of.free.fetch_add(1, Ordering::AcqRel);
        self.of.waker.wake();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn take(places: &Arc<Places>, count: usize) -> Vec<Place> {
        let taken = (0..count).map_while(|_| Place::take(places));
        taken.collect()
    }

    #[test]
    fn each_connection_has_a_few_of_its_own_and_its_budget_at_most() {
        let commons = Commons::new(6);
        let [greedy, late] = [(); 2].map(|()| Places::shared(OWN + 4, commons.clone()));
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
    fn what_is_not_shared_is_there_whatever_others_do() {
        let places = Places::new(OWN + 1);
        assert_eq!(take(&places, 99).len(), OWN + 1);
        assert_eq!(take(&places, 99).len(), OWN + 1);
    }
}
