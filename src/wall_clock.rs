//! Whether the machine's wall clock is set.
//!
//! A device without a battery for its clock starts in 1970, and NTP sets the clock once the network is up. A reservation
//! ends at a time of day: go-libp2p refuses one that has expired, and its AutoRelay stays away for an hour then.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// 2026-01-01T00:00:00Z. This source is later, and so is every clock that is right.
const EARLIEST: Duration = Duration::from_secs(1_767_225_600);

/// Returns whether a clock that shows `now` is set. One that is wrong by less is not noticed.
pub fn is_set(now: SystemTime) -> bool {
    now.duration_since(UNIX_EPOCH).is_ok_and(|since| since >= EARLIEST)
}

/// Returns why a relay does not serve, for health checks; `None` if it does.
#[cfg(feature = "program")]
pub fn not_serving(is_draining: bool, now: SystemTime) -> Option<&'static str> {
    let unset = (!is_set(now)).then_some("clock not set");
    is_draining.then_some("draining").or(unset)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_is_set_from_2026_on() {
        let day = Duration::from_secs(24 * 60 * 60);
        let new_year = UNIX_EPOCH + 20_454 * day; // 56 years of which 14 have a leap day
        for (now, expected) in [
            (UNIX_EPOCH - day, false),
            (UNIX_EPOCH, false),
            (UNIX_EPOCH + 30 * 365 * day, false),
            (new_year - Duration::from_secs(1), false),
            (new_year, true),
            (SystemTime::now(), true),
            (UNIX_EPOCH + 200 * 365 * day, true),
        ] {
            assert_eq!(is_set(now), expected, "{now:?}");
        }
    }

    #[cfg(feature = "program")]
    #[test]
    fn health_checks_are_told_why_a_relay_does_not_serve() {
        let (unset, set) = (UNIX_EPOCH, UNIX_EPOCH + EARLIEST);
        assert_eq!(not_serving(false, set), None);
        assert_eq!(not_serving(false, unset), Some("clock not set"));
        for now in [unset, set] {
            assert_eq!(not_serving(true, now), Some("draining"));
        }
    }
}
