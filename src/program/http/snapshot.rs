//! The latest snapshot of the relay: its thread publishes it, the thread that serves HTTP reads it.

use std::{
    mem,
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use hyper::body::Bytes;

use super::{stats::Stats, status::Status};

/// A relay that has published no snapshot for longer than this hangs.
pub const STUCK_AFTER: Duration = Duration::from_secs(30);

/// The relay at one moment.
#[derive(Debug)]
pub struct Snapshot {
    pub at: Instant,
    pub stats: Stats,
    /// Only while it is requested, because its lists are long.
    pub status: Option<Status>,
    /// The status as JSON, from the first request for it on.
    pub json: OnceLock<Bytes>,
}

/// The latest snapshot, shared by the relay's thread and the one that serves HTTP. Neither holds the
/// lock for longer than it takes to copy a pointer.
#[derive(Debug)]
pub struct LatestSnapshot {
    snapshot: Mutex<Arc<Snapshot>>,
    status_requested: AtomicBool,
}

impl LatestSnapshot {
    pub fn new(snapshot: Snapshot) -> Self {
        Self { snapshot: Mutex::new(Arc::new(snapshot)), status_requested: AtomicBool::new(false) }
    }

    /// Replaces the snapshot.
    pub fn publish(&self, snapshot: Snapshot) {
        let before = mem::replace(&mut *self.lock(), Arc::new(snapshot));
        drop(before); // outside of the lock, because freeing its lists takes time
    }

    /// Returns the snapshot that was published last.
    pub fn read(&self) -> Arc<Snapshot> {
        Arc::clone(&self.lock())
    }

    /// Requests that the next snapshots have a status.
    pub fn request_status(&self) {
        self.status_requested.store(true, Ordering::Relaxed);
    }

    /// Returns whether a status was requested since the last call.
    pub fn take_request(&self) -> bool {
        self.status_requested.swap(false, Ordering::Relaxed)
    }

    fn lock(&self) -> MutexGuard<'_, Arc<Snapshot>> {
        self.snapshot.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
