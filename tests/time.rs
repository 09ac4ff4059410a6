//! Time that does not pass as it should, and a relay that starts anew under all of its clients.
//!
//! Slots and circuits go by the clock that only goes forward, what clients are told by the wall
//! clock. The tests that step the latter need libfaketime, and are behind the feature `environment`.

mod common;

#[path = "time/restart.rs"]
mod restart;
#[path = "time/stood_still.rs"]
mod stood_still;
#[cfg(feature = "environment")]
#[path = "time/wall_clock.rs"]
mod wall_clock;
