//! The cost of the slot table, the sweep and the heartbeat, compared with rust-libp2p's and go-libp2p's.
//!
//! `cargo bench --bench table` prints Markdown tables and then the bounds that hold; if one is exceeded it exits with
//! status 1. Absolute times depend on the machine: only ratios of CPU times that are measured side by side have bounds.
//! `-- --quick` measures the idle relays for one minute instead of two; `--at-once` lets their peers connect together;
//! `reserve`, `sweep`, `heap` or `idle` measures only that.
//!
//! Everything is built with the bench profile, which equals the release profile: the program as it is shipped
//! (optimized for size, see `Cargo.toml`), and the others likewise.

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
    // The program starts itself for parts that need a process of their own.
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
