//! Write stall: the peer of a connection acknowledges nothing of what is sent to it.
//!
//! Sans-IO. A full socket buffer alone does not mean a stall: on a slow path it may stay full for long. The rule
//! therefore uses the number of bytes that the peer has acknowledged, which only rises. The number of unacknowledged
//! bytes would not change if as many were written meanwhile as acknowledged.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

/// The longest stall while memory is scarce.
const WHILE_SCARCE: Duration = Duration::from_secs(30);

/// How long a connection may be write stalled: as long as a peer may be silent. Clones share the value.
#[derive(Clone, Debug)]
pub struct StallLimit(Arc<AtomicU64>);

impl StallLimit {
    /// A limit of this duration.
    pub fn new(limit: Duration) -> Self {
        let all = Self(Arc::default());
        all.set(limit);
        all
    }

    /// Changes the limit.
    pub fn set(&self, limit: Duration) {
        let millis = u64::try_from(limit.as_millis()).unwrap_or(u64::MAX);
        self.0.store(millis, Ordering::Relaxed);
    }

    /// The limit in effect, which is shorter while memory is scarce.
    pub fn get(&self, is_scarce: bool) -> Duration {
        let limit = Duration::from_millis(self.0.load(Ordering::Relaxed));
        if is_scarce { limit.min(WHILE_SCARCE) } else { limit }
    }
}

/// The start of the write stall, if the connection is stalled.
#[derive(Debug, Default)]
pub struct WriteStall(Option<Stalled>);

#[derive(Debug)]
struct Stalled {
    since: Instant,
    acknowledged: Option<u64>,
}

impl WriteStall {
    /// The socket accepted bytes, or there is nothing to write.
    pub fn on_written(&mut self) {
        self.0 = None;
    }

    /// Bytes are waiting, and by `now` the peer has acknowledged `acknowledged` in total; `None` if that is unknown.
    /// Returns how long it has acknowledged nothing.
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
