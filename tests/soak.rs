//! The day of the churn simulation, compressed, lived by hundreds of real clients with the real
//! program, for an hour: `cargo bench --bench soak`.
//!
//! Five minutes of it with `-- --quick`; `--seed N` is another day, `--clients N` another number of
//! clients at a time. Somebody who sees only what the clients see and what the relay shows of itself
//! checks the laws all the time (`soak/observer.rs`); memory, descriptors and threads have to be flat from
//! the first quarter to the end (of five minutes: from half of them on), within what `soak/samples.rs`
//! says. The kernel knows the relay's threads, not its tasks: those go with the connections and circuits,
//! which the relay counts itself.
//! Ends with status 1 and one line at the first thing that is not as promised. Prints a Markdown table
//! and writes it to `target/soak.md`.
//!
//! A day is an hour here: everything that takes time is 24 times as fast, the relay's timers too. But
//! for `--probe`, which has to be 500 ms at least and is 125 ms then.

mod common;

#[allow(dead_code)] // the round trips are this machine's own
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
#[path = "soak/samples.rs"]
mod samples;
#[path = "soak/stage.rs"]
mod stage;
#[path = "soak/watching.rs"]
mod watching;

use std::{env, fs, process::ExitCode};

use tokio::runtime::Runtime;

use self::{plan::Plan, trace::Trace};

const SEED: usize = 1;
const CLIENTS: usize = 300;

const TABLE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/target/soak.md");
/// What the relay said, when something was wrong.
const LOG: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/target/soak.log");

/// More than ever are open here at a time.
const FILES: u64 = 4096;

fn main() -> ExitCode {
    let arguments: Vec<String> = env::args().collect();
    // `cargo test --all-targets` starts benches too, without this.
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
    let seed = number_behind("--seed", arguments)?.unwrap_or(SEED);
    let clients = number_behind("--clients", arguments)?.unwrap_or(CLIENTS);
    let plan = Plan::of(Trace::of_a_day(seed as u64), clients, quick);
    println!(
        "Seed {seed}: {:.0} clients on average want one of {} slots, for {} s.",
        plan.mean_live,
        plan.config.max_reservations,
        plan.lasts.as_secs(),
    );
    println!("{}", plan.flags().join(" "));

    let runtime = Runtime::new().expect("a runtime");
    let (soaked, log) = runtime.block_on(stage::live(&plan, seed as u64));
    // Clients that are left unpolled wait for nobody.
    runtime.shutdown_background();
    let table = match soaked {
        Ok(soaked) => soaked,
        Err(line) => {
            fs::write(LOG, log.join("\n")).map_err(|error| error.to_string())?;
            return Err(format!("{line}; the relay's log is in {LOG}"));
        }
    };
    println!("\n{}", table.text);
    fs::write(TABLE, &table.text).map_err(|error| error.to_string())?;
    println!("the table is in {TABLE}");
    table.sound
}

fn number_behind(name: &str, arguments: &[String]) -> Result<Option<usize>, String> {
    let Some(at) = arguments.iter().position(|argument| argument == name) else {
        return Ok(None);
    };
    let number = arguments.get(at + 1).and_then(|number| number.parse().ok());
    let number = number.filter(|number| *number > 0);
    number.map(Some).ok_or_else(|| format!("{name} wants a number, 1 or more"))
}
