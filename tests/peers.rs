//! The cost of a circuit and of an idle slot, compared with rust-libp2p's and go-libp2p's relay.
//!
//! `cargo bench --bench peers` builds the other two relays (`tests/peers/rust`, `tests/peers/go`; needs Go), starts all
//! three as processes, drives them with the same clients, and interleaves them round by round. It prints a Markdown
//! table, writes it to `target/peers.md`, and exits with status 1 if a ratio is above its goal. `-- --quick` measures a
//! subset in about a minute; the name of a group of rows (`bulk`, `setup`, `echo`, `idle`, `stalled`, `watched`)
//! measures only that; `--rounds N` sets the number of rounds; `--only relaylet` leaves out the others; `--flags "…"`
//! adds flags to relaylet.
//!
//! CPU time is the kernel's count for the relay's threads (schedstat), memory its count for the relay's pages
//! (smaps_rollup); neither includes the clients. Each figure is the median of the rounds. Each relay runs as many
//! threads as relaylet's default.

mod common;

mod peers {
    pub mod bulk;
    pub mod contestants;
    pub mod echo;
    pub mod floor;
    pub mod idle;
    pub mod idle_clients;
    pub mod rounds;
    pub mod setup;
    pub mod stalled;
    pub mod watched;
}

use std::{env, process::ExitCode};

use tokio::runtime::Runtime;

use common::Security;
use peers::{
    bulk,
    contestants::{Contestant, Contestants},
    echo, floor, idle, idle_clients,
    rounds::Rounds,
    setup, stalled,
    watched::{self, Callers},
};

const TABLE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/target/peers.md");

fn main() -> ExitCode {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let runtime = Runtime::new().expect("a runtime");
    // The program starts itself for clients that need a process of their own.
    match words[..] {
        [echo::FLAT_OUT, relay, circuits] => {
            runtime.block_on(echo::run_flat_out(relay, circuits));
        }
        [idle_clients::ROLE, relay, first, count, security] => {
            runtime.block_on(idle_clients::run(relay, first, count, security));
        }
        [watched::ROLE, port, how] => runtime.block_on(watched::run(port, how)),
        _ => {}
    }
    Bench::of(&words).run(&runtime)
}

/// What is measured, and how much of it.
struct Bench<'a> {
    groups: Vec<&'a str>,
    selected: Vec<Contestant>,
    contestants: Contestants,
    rounds: usize,
    quick: bool,
}

impl<'a> Bench<'a> {
    fn of(words: &[&'a str]) -> Self {
        const GROUPS: [&str; 6] = ["bulk", "setup", "echo", "idle", "stalled", "watched"];
        let value_of = |name| {
            let at = words.iter().position(|word| *word == name)?;
            words.get(at + 1).copied()
        };
        let quick = words.contains(&"--quick");
        let mut groups: Vec<_> = GROUPS.into_iter().filter(|g| words.contains(g)).collect();
        if groups.is_empty() {
            groups = if quick { vec!["bulk", "setup", "echo"] } else { GROUPS.to_vec() };
        }
        let selected: Vec<_> = match value_of("--only") {
            Some(name) => Contestant::ALL.into_iter().filter(|c| c.name() == name).collect(),
            None => Contestant::ALL.to_vec(),
        };
        let rounds = value_of("--rounds").map(|rounds| rounds.parse().expect("a number of rounds"));
        Self {
            groups,
            contestants: Contestants::build(&selected, value_of("--flags").unwrap_or_default()),
            selected,
            rounds: rounds.unwrap_or(if quick { 1 } else { 5 }),
            quick,
        }
    }

    fn run(&self, runtime: &Runtime) -> ExitCode {
        let mut table = Rounds::default();
        for group in &self.groups {
            match *group {
                "bulk" => self.bulk(&mut table),
                "setup" => self.setup(runtime, &mut table),
                "echo" => self.echo(runtime, &mut table),
                "idle" => self.idle(&mut table),
                "stalled" => self.stalled(runtime, &mut table),
                _ => self.watched(runtime, &mut table),
            }
        }
        table.print(TABLE)
    }

    /// Measures every contestant once a round, in an order that rotates.
    fn rounds(&self, mut measure: impl FnMut(Contestant)) {
        for round in 0..self.rounds {
            let start = round % self.selected.len();
            let (later, first) = self.selected.split_at(start);
            for contestant in first.iter().chain(later) {
                measure(*contestant);
            }
        }
    }

    fn bulk(&self, table: &mut Rounds) {
        let bytes = if self.quick { 256 << 20 } else { 1_000_000_000 };
        for (security, what, goals) in [
            (Security::Noise, "CPU per relayed GB, Noise, 4 circuits", [0.65, 0.40]),
            (Security::Tls, "CPU per relayed GB, TLS 1.3, 4 circuits", [0.60, 0.40]),
        ] {
            let row = table.row(what, "s", goals);
            let beyond = table.row(&format!("{what}, beyond the ciphers"), "s", [f64::INFINITY; 2]);
            self.rounds(|contestant| {
                // Measured in each round, because the machine's speed changes.
                let floor = floor::seconds_per_gigabyte(security, bytes);
                let relay = self.contestants.start(contestant);
                let client = self.contestants.go();
                let figure = bulk::seconds_per_gigabyte(&relay, client, security, bytes);
                table.add(row, contestant, figure);
                table.add(beyond, contestant, figure - floor);
            });
        }
    }

    fn setup(&self, runtime: &Runtime, table: &mut Rounds) {
        let circuits = if self.quick { 400 } else { 2000 };
        let row = table.row("CPU per circuit set up and torn down", "ms", [0.8, 0.6]);
        self.rounds(|contestant| {
            let relay = self.contestants.start(contestant);
            let figure = setup::milliseconds_per_circuit(&relay, circuits);
            table.add(row, contestant, runtime.block_on(figure));
        });
    }

    fn echo(&self, runtime: &Runtime, table: &mut Rounds) {
        let count = if self.quick { 1000 } else { 5000 };
        let what = |which| format!("added latency of a 1 KiB echo, {which}");
        let idle50 = table.row(&what("idle relay, p50"), "µs", [1.0, 1.0]);
        let idle99 = table.row(&what("idle relay, p99"), "µs", [1.0, 1.0]);
        let busy99 = [
            (1, "another circuit flat out", 0.5),
            (4, "4 circuits flat out", f64::INFINITY),
            (16, "16 circuits flat out", f64::INFINITY),
        ]
        .map(|(circuits, beside, goal)| {
            let what = format!("added latency of a 1 KiB echo, {beside}, p99");
            (circuits, table.row(&what, "µs", [goal; 2]))
        });
        // What the relay cannot change: the busy circuit's share of the CPU.
        let what = what("a circuit of another such relay flat out, p99");
        let elsewhere = table.row(&what, "µs", [f64::INFINITY; 2]);
        self.rounds(|contestant| {
            let base = runtime.block_on(echo::direct(count));
            let relay = self.contestants.start(contestant);
            let idle = runtime.block_on(echo::relayed(&relay, count)).above(base);
            table.add(idle50, contestant, idle.p50);
            table.add(idle99, contestant, idle.p99);
            for (circuits, row) in busy99 {
                let _flat_out = echo::flat_out(&relay, circuits);
                let busy = runtime.block_on(echo::relayed(&relay, count)).above(base);
                table.add(row, contestant, busy.p99);
            }
            let another = self.contestants.start(contestant);
            let _flat_out = echo::flat_out(&another, 1);
            let busy = runtime.block_on(echo::relayed(&relay, count)).above(base);
            table.add(elsewhere, contestant, busy.p99);
        });
    }

    fn idle(&self, table: &mut Rounds) {
        let peers = if self.quick { 1000 } else { 5000 };
        for (security, name) in [(Security::Noise, "Noise"), (Security::Tls, "TLS")] {
            let what = format!("resident memory per idle reserved peer, {peers} of them, {name}");
            let row = table.row(&what, "KiB", [0.75, 0.75]);
            self.rounds(|contestant| {
                let relay = self.contestants.start(contestant);
                table.add(row, contestant, idle::kilobytes_per_peer(&relay, security, peers));
            });
        }
    }

    fn stalled(&self, runtime: &Runtime, table: &mut Rounds) {
        let row = table.row("memory per stalled circuit", "KiB", [1.0, 1.0]);
        self.rounds(|contestant| {
            let relay = self.contestants.start(contestant);
            let figure = stalled::kilobytes_per_circuit(&relay);
            table.add(row, contestant, runtime.block_on(figure));
        });
    }

    /// Only relaylet: the others have no HTTP port.
    fn watched(&self, runtime: &Runtime, table: &mut Rounds) {
        let count = if self.quick { 1000 } else { 5000 };
        let mut rows = |condition| {
            ["p50", "p99"].map(|which| {
                let what = format!("latency of a 1 KiB echo, {condition}, {which}");
                table.row(&what, "µs", [f64::INFINITY; 2])
            })
        };
        let contestant = Contestant::Relaylet;
        let cases = [
            (rows("not watched"), None),
            (rows("1000 idle HTTP callers"), Some(Callers::Idle)),
            (rows("32 busy HTTP callers"), Some(Callers::Busy)),
        ];
        for round in 0..self.rounds {
            for index in 0..cases.len() {
                let (rows, callers) = &cases[(round + index) % cases.len()];
                let port = common::free_port();
                let flag = format!("--http=127.0.0.1:{port}");
                let flags = callers.map_or(vec![], |_| vec![flag]);
                let relay = self.contestants.start_with(contestant, &flags);
                let _callers = callers.map(|callers| watched::start(port, callers));
                let latency = runtime.block_on(echo::relayed(&relay, count));
                table.add(rows[0], contestant, latency.p50);
                table.add(rows[1], contestant, latency.p99);
            }
        }
    }
}
