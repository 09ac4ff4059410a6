//! What the relay holds for its peers, in bytes: what came and nobody has read yet, what is to go and
//! nobody takes.
//!
//! Counted here; `ledger.rs` knows what it is, and gives some of it up where it is too much.

use std::sync::{
    Arc,
    atomic::{AtomicU64, AtomicUsize, Ordering},
};

/// What all connections hold. Clones are the same.
#[derive(Clone, Debug)]
pub struct Pool(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    max: usize,
    max_per_connection: usize,
    held: AtomicUsize,
    /// How many bytes were ever taken: tells for how long something has been held.
    taken: AtomicU64,
}

/// What one connection holds. Clones are the same; it lasts for as long as something is held.
#[derive(Clone, Debug)]
pub struct Account(Arc<Held>);

#[derive(Debug)]
struct Held {
    pool: Pool,
    /// What it can give up.
    bytes: AtomicUsize,
    /// What it keeps until it is closed.
    kept: AtomicUsize,
    /// What of that is to go, and how much had ever been taken by all when there was nothing.
    unsent: AtomicUsize,
    unsent_since: AtomicU64,
    /// How many of its streams went since it was looked.
    went: AtomicUsize,
}

impl Pool {
    /// Nothing is held yet: of so many bytes in all, and by one connection.
    pub fn new(max: usize, max_per_connection: usize) -> Self {
        Self(Arc::new(Shared {
            max,
            max_per_connection,
            held: AtomicUsize::new(0),
            taken: AtomicU64::new(0),
        }))
    }

    /// For one more connection.
    pub fn open(&self) -> Account {
        Account(Arc::new(Held {
            pool: self.clone(),
            bytes: AtomicUsize::new(0),
            kept: AtomicUsize::new(0),
            unsent: AtomicUsize::new(0),
            unsent_since: AtomicU64::new(0),
            went: AtomicUsize::new(0),
        }))
    }

    /// Whether all together hold more than they may.
    pub fn is_over(&self) -> bool {
        self.held() > self.0.max
    }

    /// How many bytes were ever taken.
    pub fn taken(&self) -> u64 {
        self.0.taken.load(Ordering::Acquire)
    }

    /// How many bytes are held.
    pub fn held(&self) -> usize {
        self.0.held.load(Ordering::Acquire)
    }
}

impl Account {
    /// Whom it is a part of.
    pub fn pool(&self) -> &Pool {
        &self.0.pool
    }

    /// Holds so many bytes more.
    pub fn take(&self, bytes: usize) {
        let shared = &self.0.pool.0;
        self.0.bytes.fetch_add(bytes, Ordering::AcqRel);
        shared.held.fetch_add(bytes, Ordering::AcqRel);
        shared.taken.fetch_add(bytes as u64, Ordering::AcqRel);
    }

    /// Holds them no longer.
    pub fn give_back(&self, bytes: usize) {
        self.0.bytes.fetch_sub(bytes, Ordering::AcqRel);
        self.0.pool.0.held.fetch_sub(bytes, Ordering::AcqRel);
    }

    /// Holds so many bytes more that are to go.
    pub fn take_unsent(&self, bytes: usize) {
        if self.0.unsent.fetch_add(bytes, Ordering::AcqRel) == 0 {
            let now = self.0.pool.taken();
            self.0.unsent_since.store(now, Ordering::Release);
        }
        self.take(bytes);
    }

    /// They are gone.
    pub fn give_back_unsent(&self, bytes: usize) {
        self.0.unsent.fetch_sub(bytes, Ordering::AcqRel);
        self.give_back(bytes);
    }

    /// What is to go: how many bytes, and since when there has been something.
    pub fn unsent(&self) -> (usize, u64) {
        let since = self.0.unsent_since.load(Ordering::Acquire);
        (self.0.unsent.load(Ordering::Acquire), since)
    }

    /// Keeps so many bytes until it is closed, if that leaves half of what there may be to others.
    pub fn keep_if_plenty(&self, bytes: usize) -> bool {
        let shared = &self.0.pool.0;
        let plenty = self.0.pool.held().saturating_add(bytes) <= shared.max / 2;
        if plenty {
            self.0.kept.fetch_add(bytes, Ordering::AcqRel);
            shared.held.fetch_add(bytes, Ordering::AcqRel);
        }
        plenty
    }

    /// Whether it holds more than a connection may.
    pub fn is_over(&self) -> bool {
        self.0.bytes.load(Ordering::Acquire) > self.0.pool.0.max_per_connection
    }

    /// One of its streams went: what there is of it can be freed.
    pub fn one_went(&self) {
        self.0.went.fetch_add(1, Ordering::AcqRel);
    }

    /// Whether any went since this was asked last.
    pub fn any_went(&self) -> bool {
        self.0.went.swap(0, Ordering::AcqRel) > 0
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let bytes = *self.bytes.get_mut() + *self.kept.get_mut();
        self.pool.0.held.fetch_sub(bytes, Ordering::AcqRel);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_each_holds_counts_until_it_is_given_back_or_nobody_has_it() {
        let pool = Pool::new(100, 50);
        let [one, other] = [(); 2].map(|()| pool.open());
        one.take(50);
        other.take_unsent(50);
        assert!(!pool.is_over() && !one.is_over() && !other.is_over());
        other.take(1);
        assert!(pool.is_over() && other.is_over() && !one.is_over());
        other.give_back_unsent(50);
        assert!(!pool.is_over() && !other.is_over());
        let its_stream = one.clone();
        drop(one);
        assert_eq!(pool.held(), 51);
        drop(its_stream);
        drop(other);
        assert_eq!((pool.held(), pool.taken()), (0, 101));
    }

    #[test]
    fn what_is_to_go_has_an_age_while_there_is_something() {
        let pool = Pool::new(100, 100);
        let account = pool.open();
        account.take(7);
        account.take_unsent(1);
        account.take_unsent(1);
        assert_eq!(account.unsent(), (2, 7));
        account.give_back_unsent(2);
        account.take_unsent(1);
        assert_eq!(account.unsent(), (1, 9));
    }

    #[test]
    fn what_is_no_need_leaves_half_to_others() {
        let pool = Pool::new(100, 10);
        let account = pool.open();
        assert!(account.keep_if_plenty(50));
        assert!(!account.keep_if_plenty(1));
        assert!(!account.is_over());
        drop(account);
        assert_eq!(pool.held(), 0);
    }
}
