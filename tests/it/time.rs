//! Time that does not pass as it should, and a relay that starts anew under all of its clients.
//!
//! Slots and circuits go by the clock that only goes forward, what clients are told by the wall
//! clock: `tests/env/wall_clock.rs` steps the latter.

mod restart;
mod stood_still;
