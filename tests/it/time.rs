//! A suspended relay, and a relay that restarts with many clients.
//!
//! Slots and circuits use the monotonic clock, expirations sent to clients the wall clock: `tests/env/wall_clock.rs`
//! sets the latter.

mod restart;
mod suspend;
