//! How CPU time of this thread is measured: repeatedly, and with caches that other work has used in between.

use std::{fmt, hint::black_box, time::Duration};

use rustix::time::{ClockId, clock_gettime};

/// More than the caches of most machines, in bytes.
const MORE_THAN_CACHES: usize = 64 << 20;
const CACHE_LINE: usize = 64;

/// The CPU time that `work` takes on this thread.
pub fn cpu_time(work: impl FnOnce()) -> Duration {
    let now = || {
        let now = clock_gettime(ClockId::ThreadCPUTime);
        Duration::new(now.tv_sec as u64, now.tv_nsec as u32)
    };
    let start = now();
    work();
    now() - start
}

/// Memory that is touched to evict everything else from the processor's caches.
pub struct Caches(Vec<u8>);

impl Caches {
    pub fn new() -> Self {
        Self(vec![1; MORE_THAN_CACHES])
    }

    /// Evicts the caches, as a handshake or a second of other work does between two uses of the table.
    pub fn evict(&mut self) {
        for line in self.0.chunks_mut(CACHE_LINE) {
            line[0] = line[0].wrapping_add(1);
        }
        black_box(&self.0);
    }
}

/// All measurements of one figure.
#[derive(Clone, Default)]
pub struct Samples(Vec<f64>);

impl Samples {
    pub fn push(&mut self, sample: f64) {
        self.0.push(sample);
        self.0.sort_by(f64::total_cmp);
    }

    pub fn median(&self) -> f64 {
        self.0[self.0.len() / 2]
    }
}

/// The median, and the range of the middle half.
impl fmt::Display for Samples {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (low, high) = (self.0[self.0.len() / 4], self.0[self.0.len() * 3 / 4]);
        let decimals = if self.median() < 100.0 { 2 } else { 0 };
        write!(f, "{:.decimals$} ({low:.decimals$}-{high:.decimals$})", self.median())
    }
}
