//! Write stall: the peer of a connection takes nothing of what is sent to it.
//!
//! Sans-IO. That a socket takes no more says little: behind a slow path it may be long before there is room again.
//! So the rule goes by how many bytes the peer has acknowledged. Their number only rises, however much is written
//! meanwhile; that of the unacknowledged ones would look the same after as many were acknowledged as written.

use std::{
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use portable_atomic::AtomicU64;

/// The longest stall while memory is scarce.
const WHILE_SCARCE: Duration = Duration::from_secs(30);

/// How long a connection may be write stalled: as long as a peer may be silent. Clones are the same.
#[derive(Clone, Debug)]
pub struct StallLimit(Arc<AtomicU64>);

impl StallLimit {
    /// So long.
    pub fn new(limit: Duration) -> Self {
        let all = Self(Arc::default());
        all.set(limit);
        all
    }

    /// So long from now on.
    pub fn set(&self, limit: Duration) {
        let millis = u64::try_from(limit.as_millis()).unwrap_or(u64::MAX);
        self.0.store(millis, Ordering::Relaxed);
    }

    /// How long at most, while memory is scarce or is not.
    pub fn get(&self, is_scarce: bool) -> Duration {
        let limit = Duration::from_millis(self.0.load(Ordering::Relaxed));
        if is_scarce { limit.min(WHILE_SCARCE) } else { limit }
    }
}

/// Since when a connection is write stalled, if it is.
#[derive(Debug, Default)]
pub struct WriteStall(Option<Stalled>);

#[derive(Debug)]
struct Stalled {
    since: Instant,
    acknowledged: Option<u64>,
}

impl WriteStall {
    /// The connection took bytes, or there are none to be written.
    pub fn on_written(&mut self) {
        self.0 = None;
    }

    /// Bytes wait to be written, and by `now` the peer has acknowledged so many; `None`: that is not known.
    /// Returns for how long it has acknowledged none.
    pub fn on_waiting(&mut self, acknowledged: Option<u64>, now: Instant) -> Duration {
        let same = self.0.as_ref().filter(|stalled| stalled.acknowledged == acknowledged);
        let since = same.map_or(now, |stalled| stalled.since);
        self.0 = Some(Stalled { since, acknowledged });
        now.saturating_duration_since(since)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn secs(secs: u64) -> Duration {
        Duration::from_secs(secs)
    }

    #[test]
    fn a_peer_that_acknowledges_one_byte_a_minute_is_not_stalled() {
        let (mut stall, start) = (WriteStall::default(), Instant::now());
        for minute in 0..100 {
            let at = start + secs(60 * minute);
            assert_eq!(stall.on_waiting(Some(minute), at), secs(0));
            assert_eq!(stall.on_waiting(Some(minute), at + secs(59)), secs(59));
        }
    }

    #[test]
    fn a_stall_lasts_until_something_is_acknowledged_or_written() {
        let (mut stall, start) = (WriteStall::default(), Instant::now());
        for acknowledged in [Some(7), None] {
            assert_eq!(stall.on_waiting(acknowledged, start), secs(0));
            assert_eq!(stall.on_waiting(acknowledged, start + secs(30)), secs(30));
            assert_eq!(stall.on_waiting(acknowledged, start + secs(61)), secs(61));
            stall.on_written();
            assert_eq!(stall.on_waiting(acknowledged, start + secs(62)), secs(0));
        }
    }

    #[test]
    fn the_limit_is_half_a_minute_at_most_while_memory_is_scarce() {
        let limit = StallLimit::new(secs(60));
        assert_eq!([false, true].map(|is_scarce| limit.get(is_scarce)), [secs(60), secs(30)]);
        limit.clone().set(secs(20));
        assert_eq!([false, true].map(|is_scarce| limit.get(is_scarce)), [secs(20); 2]);
    }
}
