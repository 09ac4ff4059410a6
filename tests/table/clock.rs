//! How time is taken: CPU time of this thread, many times over, in caches that were put to other use.

use std::{fmt, hint::black_box, time::Duration};

use rustix::time::{ClockId, clock_gettime};

/// More than the caches of most machines hold, in bytes.
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

/// The processor's caches, to be filled with something else.
pub struct Caches(Vec<u8>);

impl Caches {
    pub fn new() -> Self {
        Self(vec![1; MORE_THAN_CACHES])
    }

    /// In a relay a handshake, or a second of other work, lies between two looks at the table.
    pub fn evict(&mut self) {
        for line in self.0.chunks_mut(CACHE_LINE) {
            line[0] = line[0].wrapping_add(1);
        }
        black_box(&self.0);
    }
}

/// All that was measured of one thing.
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

/// The median, and between what the middle half lies.
impl fmt::Display for Samples {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (low, high) = (self.0[self.0.len() / 4], self.0[self.0.len() * 3 / 4]);
        let decimals = if self.median() < 100.0 { 2 } else { 0 };
        write!(f, "{:.decimals$} ({low:.decimals$}-{high:.decimals$})", self.median())
    }
}
