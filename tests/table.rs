//! What the table, the sweep and the heartbeat cost, beside rust-libp2p's and go-libp2p's way of it.
//!
//! `cargo bench --bench table` prints Markdown tables and, last, the bounds that hold; with one
//! missed it ends with status 1. Absolute times are the machine's: only ratios of what was measured
//! side by side, in CPU time, are held to a bound. `-- --quick` watches the idle relays for one
//! minute instead of two; `--at-once` lets their peers arrive together; `reserve`, `sweep`, `heap`
//! or `idle` measures that alone.
//!
//! All of it is built with the bench profile, which is the release profile under another name: the
//! program as it is shipped (for size, see `Cargo.toml`), and the others likewise.

mod common;

mod table {
    pub mod bounds;
    pub mod clock;
    pub mod heap;
    pub mod idle;
    pub mod others;
    pub mod peer;
    pub mod reserve;
    pub mod roles;
    pub mod sweep;
}

use std::{env, process::ExitCode};

use table::{bounds::Bounds, heap, idle, reserve, roles, sweep};

fn main() -> ExitCode {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    // This program starts itself for whatever needs a process of its own.
    match words[..] {
        [heap::ROLE, case, count] => return heap::role(case, count),
        [roles::RELAY] => return roles::relay(),
        [roles::CLIENTS, relay, count, seconds] => return roles::clients(relay, count, seconds),
        _ => {}
    }

    let parts = ["reserve", "sweep", "heap", "idle"];
    let all = !words.iter().any(|word| parts.contains(word));
    let wanted = |part| all || words.contains(&part);
    let mut bounds = Bounds::default();
    if wanted("reserve") {
        reserve::measure(&mut bounds);
    }
    if wanted("sweep") {
        sweep::measure();
    }
    if wanted("heap") {
        heap::measure(&mut bounds);
    }
    if wanted("idle") {
        idle::measure(&words, &mut bounds);
    }
    bounds.print()
}
