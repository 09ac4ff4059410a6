//! What attackers try against the relay, a function each, while two who have nothing to do with it
//! are watched: their circuit stays, each echo comes back, each renewal is granted, and with
//! everybody gone every count is zero.
//!
//! Each prints a row of the README's table of attacks:
//!
//! `cargo test --test attacks -- --nocapture --test-threads=1 | grep '^|'`
//!
//! With `RELAYLET_ATTACKS=long` in front of it they go on for as long as they can do harm, in all for
//! half an hour in a debug build. How fast anything is depends on the machine, so nothing is asserted
//! of it.

mod common;

mod attacks {
    pub mod amplification;
    pub mod backlogs;
    pub mod circuits;
    pub mod floods;
    pub mod frames;
    pub mod ground;
    pub mod handshakes;
    pub mod pressure;
    pub mod requests;
    pub mod silence;
    pub mod waiting;
}
