//! Attacks on the relay, a function each. Two clients that take no part are measured during each attack: their circuit
//! must stay open, each echo arrive and each renewal be granted. Once all clients have disconnected, every count must be
//! zero.
//!
//! Each attack prints a row of the table in `tests/README.md`: `.ci/attacks` runs them all on a release build, and `cargo test`
//! only the shortest ones. With `RELAYLET_ATTACKS=long` each lasts until its effect can grow no more, in all half an
//! hour.
//!
//! An attack asserts admissions, evictions, counts and bytes. Speed depends on the machine: it is printed and never
//! asserted.

mod common;

mod attacks {
    pub mod amplification;
    pub mod backlogs;
    pub mod circuits;
    pub mod floods;
    pub mod frames;
    pub mod full_table;
    pub mod handshakes;
    pub mod requests;
    pub mod silence;
    pub mod testbed;
    pub mod unread;
}
