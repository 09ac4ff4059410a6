//! What attackers try against the relay, a function each, while two who have nothing to do with it
//! are watched: their circuit stays, each echo comes back, each renewal is granted, and with
//! everybody gone every count is zero.
//!
//! Each prints a row of the README's table of attacks: `.ci/attacks` runs them all on a release build. Those that take
//! least are run by `cargo test`, too. With `RELAYLET_ATTACKS=long` they go on for as long as they can do harm, in
//! all for half an hour.
//!
//! A row asserts admissions, evictions, counts and bytes. How fast anything is depends on the machine, so it is printed
//! and never asserted.

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
