//! How costs grow with the number of peers and circuits, on this machine.
//!
//! `cargo bench --bench scale` connects 1,000, 3,000 and 10,000 peers, each time to a new relay, lets them reserve,
//! measures them idle for a minute, and then transfers data through 1,000 circuits at once, between one pair of peers
//! and between many. It prints Markdown tables and writes them to `target/scale.md`. `-- --quick` uses 1,000 peers and
//! fewer circuits, and takes about two minutes; `peers` or `circuits` measures only that; numbers, as in
//! `-- peers 30000`, replace the numbers of peers; `--flags "…"` adds flags to the relay.
//!
//! The clients run on the same cores, in a few processes, so rates per second depend on the machine, and more on the
//! clients than on the relay. CPU time is the kernel's count for the relay's threads (schedstat), memory its count for
//! the relay's pages (smaps_rollup).

mod common;

#[allow(dead_code)] // the other relays are not used here
#[path = "peers/contestants.rs"]
mod contestants;
#[allow(dead_code)]
#[path = "peers/idle_clients.rs"]
mod idle_clients;

mod scale {
    pub mod arrival;
    pub mod circuits;
    pub mod relay;
    pub mod table;
}

use std::{env, fs, process::ExitCode, time::Duration};

use tokio::runtime::Runtime;

use scale::{arrival, circuits, table::Table};

const TABLES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/target/scale.md");

/// How long idle peers are watched: two heartbeats, because each one probes every peer.
const WATCHED: Duration = Duration::from_secs(60);

/// How many files a process has open besides its connections.
const OTHER_FILES: u64 = 200;

fn main() -> ExitCode {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let runtime = Runtime::new().expect("a runtime");
    // The program starts itself for the clients.
    if let [idle_clients::ROLE, relay, first, count, security] = words[..] {
        runtime.block_on(idle_clients::run(relay, first, count, security));
    }

    let quick = words.contains(&"--quick");
    let flags = words.iter().position(|word| *word == "--flags");
    let flags = flags.and_then(|at| words.get(at + 1)).unwrap_or(&"");
    let all = !["peers", "circuits"].iter().any(|part| words.contains(part));
    let mut tables = String::new();
    if all || words.contains(&"peers") {
        let mut sizes: Vec<_> = words.iter().filter_map(|word| word.parse().ok()).collect();
        if sizes.is_empty() {
            sizes = if quick { vec![1000] } else { vec![1000, 3000, 10_000] };
        }
        if let Err(line) = enough_files(*sizes.iter().max().expect("a size")) {
            eprintln!("{line}");
            return ExitCode::FAILURE;
        }
        let names = sizes.iter().map(|size| format!("{} peers", written(*size)));
        let mut table = Table::of(names, true);
        for size in sizes {
            arrival::measure(size, WATCHED, flags, &mut table);
        }
        tables += &table.markdown();
    }
    if all || words.contains(&"circuits") {
        let (circuits, bytes) = match quick {
            true => (200, 512 * 1024),
            false => (1000, 1024 * 1024),
        };
        let pairs = [1, circuits / 10];
        let many = written(circuits);
        let names = pairs.iter().map(|pairs| match pairs {
            1 => format!("{many} circuits of one pair"),
            _ => format!("{many} of {pairs} pairs"),
        });
        let mut table = Table::of(names, false);
        for pairs in pairs {
            let measured = circuits::measure(circuits, pairs, bytes, flags, &mut table);
            runtime.block_on(measured);
        }
        tables += &table.markdown();
    }
    println!("\n{tables}");
    fs::write(TABLES, tables).expect("the folder target exists");
    println!("the tables are in {TABLES}");
    ExitCode::SUCCESS
}

fn written(number: usize) -> String {
    match number {
        0..1000 => number.to_string(),
        _ => format!("{},{:03}", number / 1000, number % 1000),
    }
}

/// Raises the limit on open files: the relay needs one for each connection.
fn enough_files(peers: usize) -> Result<(), String> {
    let needed = peers as u64 + OTHER_FILES;
    let limit = rlimit::increase_nofile_limit(u64::MAX).expect("a limit of open files");
    if limit < needed {
        return Err(format!(
            "{peers} peers need {needed} open files, and the hard limit is {limit}: raise it (ulimit \
             -Hn {needed}), or measure fewer (--quick)"
        ));
    }
    Ok(())
}
