//! What a circuit has carried so far, and what all of them have.
//!
//! Counts that are shared between the tasks that carry the bytes and whoever looks now and then.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use crate::circuit::Carried;

/// What all circuits together have carried, the open ones included.
#[derive(Debug, Default)]
pub struct Total(Arc<Counts>);

impl Total {
    /// What was carried so far.
    pub fn read(&self) -> Carried {
        self.0.read()
    }

    /// A meter for one more circuit.
    pub fn meter(&self) -> Meter {
        Meter {
            circuit: Arc::default(),
            all: Arc::clone(&self.0),
        }
    }
}

/// Says what one circuit has carried. Clones share the counts.
#[derive(Clone, Debug)]
pub struct Meter {
    circuit: Arc<Counts>,
    all: Arc<Counts>,
}

impl Meter {
    /// What was carried so far.
    pub fn read(&self) -> Carried {
        self.circuit.read()
    }

    /// So much was carried by now. Only the circuit itself says so.
    pub fn set(&self, carried: Carried) {
        let before = self.read();
        if carried == before {
            return; // what is shared by all stays out of the caches of other cores
        }
        let more = Carried {
            to_target: carried.to_target - before.to_target,
            to_source: carried.to_source - before.to_source,
        };
        self.circuit.add(more);
        self.all.add(more);
    }
}

#[derive(Debug, Default)]
struct Counts {
    to_target: AtomicU64,
    to_source: AtomicU64,
}

impl Counts {
    fn read(&self) -> Carried {
        Carried {
            to_target: self.to_target.load(Ordering::Relaxed),
            to_source: self.to_source.load(Ordering::Relaxed),
        }
    }

    fn add(&self, more: Carried) {
        self.to_target.fetch_add(more.to_target, Ordering::Relaxed);
        self.to_source.fetch_add(more.to_source, Ordering::Relaxed);
    }
}
