//! What the relay holds for its peers, in bytes: what came and nobody has read yet, what is to go and
//! nobody takes.
//!
//! Counted here; `ledger.rs` knows what it is, and gives some of it up where it is too much.

use std::sync::{
    Arc, Mutex, PoisonError,
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
    /// What of that is to go.
    unsent: AtomicUsize,
    /// Which of its streams went since it was looked.
    went: Mutex<Vec<u32>>,
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
            went: Mutex::default(),
        }))
    }

    /// How many bytes all together may hold.
    pub fn max(&self) -> usize {
        self.0.max
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
        self.0.unsent.fetch_add(bytes, Ordering::AcqRel);
        self.take(bytes);
    }

    /// They are gone.
    pub fn give_back_unsent(&self, bytes: usize) {
        self.0.unsent.fetch_sub(bytes, Ordering::AcqRel);
        self.give_back(bytes);
    }

    /// How many bytes are to go.
    pub fn unsent(&self) -> usize {
        self.0.unsent.load(Ordering::Acquire)
    }

    /// How many bytes it holds that it can give up.
    pub fn held(&self) -> usize {
        self.0.bytes.load(Ordering::Acquire)
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

    /// Whether more came than a connection may hold; what is to go has a limit of its own.
    pub fn is_over(&self) -> bool {
        self.held().saturating_sub(self.unsent()) > self.0.pool.0.max_per_connection
    }

    /// This stream went: what there is of it can be freed.
    pub fn went(&self, stream: u32) {
        self.0.went.lock().unwrap_or_else(PoisonError::into_inner).push(stream);
    }

    /// Those that went since this was asked last.
    pub fn take_went(&self) -> Vec<u32> {
        std::mem::take(&mut self.0.went.lock().unwrap_or_else(PoisonError::into_inner))
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
        other.take(50);
        assert!(!one.is_over() && !other.is_over());
        other.take(1);
        assert!(other.is_over() && !one.is_over());
        other.give_back_unsent(50);
        assert!(other.is_over());
        let its_stream = one.clone();
        drop(one);
        assert_eq!(pool.held(), 101);
        drop(its_stream);
        drop(other);
        assert_eq!((pool.held(), pool.taken()), (0, 151));
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
