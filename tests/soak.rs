//! The day of the churn simulation, compressed into an hour, with hundreds of real clients and the real program:
//! `cargo bench --bench soak`.
//!
//! `-- --quick` runs five minutes of it; `--seed N` chooses another day, `--clients N` another mean number of clients.
//! An observer, which sees only what the clients see and what the relay reports about itself, checks the laws all the
//! time (`soak/observer.rs`). Memory, descriptors and threads must be flat from the first quarter to the end (with
//! `--quick`: from the second quarter), within the bounds of `soak/samples.rs`. The kernel counts the relay's threads
//! but not its tasks: those end with the connections and circuits, which the relay counts itself.
//!
//! Exits with status 1 and one line at the first violation. Prints a Markdown table and writes it to `target/soak.md`.
//!
//! A day takes an hour: everything, including the relay's timers, is 24 times as fast. The exception is `--probe`,
//! which would be 125 ms and has a minimum of 500 ms.

mod common;

#[allow(dead_code)] // round trips are not simulated here
#[path = "churn/trace.rs"]
mod trace;

#[path = "soak/client.rs"]
mod client;
#[path = "soak/observer.rs"]
mod observer;
#[path = "soak/plan.rs"]
mod plan;
#[path = "soak/planted.rs"]
mod planted;
#[path = "soak/report.rs"]
mod report;
#[path = "soak/runner.rs"]
mod runner;
#[path = "soak/samples.rs"]
mod samples;
#[path = "soak/status.rs"]
mod status;

use std::{env, fs, process::ExitCode};

use tokio::runtime::Runtime;

use self::{plan::Plan, trace::Trace};

const SEED: usize = 1;
const CLIENTS: usize = 300;

const TABLE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/target/soak.md");
/// The relay's log, written when a law was violated.
const LOG: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/target/soak.log");

/// More than the greatest number of open files.
const FILES: u64 = 4096;

fn main() -> ExitCode {
    let arguments: Vec<String> = env::args().collect();
    // `cargo test --all-targets` starts benches too, without this argument.
    if !arguments.iter().any(|argument| argument == "--bench") {
        return ExitCode::SUCCESS;
    }
    match soak(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(line) => {
            eprintln!("{line}");
            ExitCode::FAILURE
        }
    }
}

fn soak(arguments: &[String]) -> Result<(), String> {
    planted::self_check()?;
    println!("The observer finds a planted violation of each law.");
    let limit = rlimit::increase_nofile_limit(u64::MAX).map_err(|error| error.to_string())?;
    if limit < FILES {
        return Err(format!(
            "the limit of open files is {limit}, and {FILES} are needed: raise it (ulimit -Hn {FILES})"
        ));
    }
    let quick = arguments.iter().any(|argument| argument == "--quick");
    let seed = number_after("--seed", arguments)?.unwrap_or(SEED);
    let clients = number_after("--clients", arguments)?.unwrap_or(CLIENTS);
    let plan = Plan::of(Trace::of_a_day(seed as u64), clients, quick);
    println!(
        "Seed {seed}: {:.0} clients on average want one of {} slots, for {} s.",
        plan.mean_live,
        plan.config.max_reservations,
        plan.duration.as_secs(),
    );
    println!("{}", plan.flags().join(" "));

    let runtime = Runtime::new().expect("a runtime");
    let (outcome, log) = runtime.block_on(runner::run(&plan, seed as u64));
    // Tasks of clients that are no longer polled are dropped.
    runtime.shutdown_background();
    let table = match outcome {
        Ok(outcome) => outcome,
        Err(line) => {
            fs::write(LOG, log.join("\n")).map_err(|error| error.to_string())?;
            return Err(format!("{line}; the relay's log is in {LOG}"));
        }
    };
    println!("\n{}", table.text);
    fs::write(TABLE, &table.text).map_err(|error| error.to_string())?;
    println!("the table is in {TABLE}");
    table.verdict
}

fn number_after(name: &str, arguments: &[String]) -> Result<Option<usize>, String> {
    let Some(at) = arguments.iter().position(|argument| argument == name) else {
        return Ok(None);
    };
    let number = arguments.get(at + 1).and_then(|number| number.parse().ok());
    let number = number.filter(|number| *number > 0);
    number.map(Some).ok_or_else(|| format!("{name} wants a number, 1 or more"))
}
