//! A day of 100,000 simulated clients against this relay and three other ways of freeing slots:
//! `cargo bench --bench churn`.
//!
//! Prints a row per policy for each load, and draws `tests/churn.svg`. Exits with status 1 if a peer that answered in
//! time lost its slot, if any state is left after all clients have disconnected, or if this relay evicts no peer.
//! `-- settings` tries it with other timers instead. `-- loss` tries it on links that lose packets, and exits with
//! status 1 only if no live peer is evicted. The clients, and the assumptions about them, are in `churn/trace.rs`; the
//! other relays in `churn/others.rs`.

#[path = "churn/others.rs"]
mod others;
#[path = "churn/plot.rs"]
mod plot;
#[path = "churn/relaylet_model.rs"]
mod relaylet_model;
#[path = "churn/simulation.rs"]
mod simulation;
#[path = "churn/trace.rs"]
mod trace;

use std::{
    env, fs,
    process::ExitCode,
    thread,
    time::{Duration, Instant},
};

use relaylet::Config;

use self::{
    others::{Model, Policy},
    relaylet_model::RelayletModel,
    simulation::{Tally, simulate},
    trace::{DAY, MEASURED_FROM, Trace},
};

const SEED: u64 = 1;

/// The loads, in percent: the mean number of live clients that want a slot, divided by the slots.
const LOADS: [u32; 7] = [50, 75, 90, 100, 110, 125, 150];

const PLOT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/churn.svg");

const RELAYLET: &str = "relaylet";
const OTHERS: [(&str, Policy); 4] = [
    ("term only: js-libp2p, 2 h", Policy::Term),
    ("and disconnect: rust-libp2p, 1 h", Policy::Disconnect),
    ("and 40 s of silence: go-libp2p, 1 h", Policy::Keepalive),
    ("(knows at once which peers are gone)", Policy::AllKnowing),
];
/// relaylet and the others, without `AllKnowing`: it is not a real relay.
const PLOTTED: usize = OTHERS.len();

/// The loads and the shares of lost packets of `-- loss`: without and with newcomers that wait.
const LOSSES_AT: [u32; 2] = [75, 110];
const LOSSES: [f64; 3] = [0.0, 0.1, 0.3];
/// `-- loss` ends the day here.
const LOSSES_UNTIL: Duration = secs(4 * 60 * 60);

type Change = fn(&mut Config);

/// The loads under which other timers are tried, and those timers: all defaults, then one or two changes.
const TRIED_AT: [u32; 3] = [90, 110, 125];
const TRIED: [(&str, Change); 10] = [
    ("the defaults", |_| {}),
    ("probe after 5 s", |c| c.probe_after = secs(5)),
    ("probe after 20 s", |c| c.probe_after = secs(20)),
    ("probe after 30 s", |c| c.probe_after = secs(30)),
    ("probe 2 s", |c| c.probe = secs(2)),
    ("no probe", |c| c.probe = secs(0)),
    ("heartbeat 15 s, silence 30 s", |c| {
        (c.heartbeat, c.silence) = (secs(15), secs(30));
    }),
    ("heartbeat 60 s, silence 120 s", |c| {
        (c.heartbeat, c.silence) = (secs(60), secs(120));
    }),
    ("no grace", |c| c.grace = secs(0)),
    ("grace 120 s", |c| c.grace = secs(120)),
];

const fn secs(n: u64) -> Duration {
    Duration::from_secs(n)
}

fn main() -> ExitCode {
    // `cargo test --all-targets` starts benchmarks too, unoptimized, and without this flag.
    if !env::args().any(|argument| argument == "--bench") {
        return ExitCode::SUCCESS;
    }
    // 1. Simulate.
    let trace = Trace::of_a_day(SEED);
    if env::args().any(|argument| argument == "loss") {
        return print_losses(trace);
    }
    let settings = env::args().any(|argument| argument == "settings");
    let loads = if settings { &TRIED_AT[..] } else { &LOADS };
    println!("A day, seed {SEED}: {:.0} live clients want a slot on average.\n", trace.mean_live());
    println!("{HEAD}");
    let started = Instant::now();
    let results = at_each(loads, |load| {
        let slots = (trace.mean_live() * 100.0 / f64::from(load)).round() as usize;
        let rows = match settings {
            true => TRIED.map(|(name, change)| (name, relaylet(&trace, slots, change))).into(),
            false => policies(&trace, slots),
        };
        (load, slots, rows)
    });
    // 2. Print.
    for (load, slots, rows) in &results {
        for (name, tally) in rows {
            println!("| {load} % of {slots} | {name} | {} |", row(tally));
        }
    }
    let days: usize = results.iter().map(|(_, _, rows)| rows.len()).sum();
    let took = started.elapsed().as_secs_f64();
    println!("\n{days} days in {took:.0} s.");
    // 3. Plot.
    if !settings {
        let line = |n: usize| {
            let points =
                results.iter().map(|(load, _, rows)| (f64::from(*load), refused(&rows[n].1)));
            (results[0].2[n].0, points.collect())
        };
        let lines: Vec<_> = (0..PLOTTED).map(line).collect();
        fs::write(PLOT, plot::refusals(&lines)).expect("the plot is written");
    }
    // 4. Check.
    let evicted: usize = results.iter().map(|(_, _, rows)| rows[0].1.evicted).sum();
    let mut failed = evicted == 0;
    if failed {
        eprintln!("{RELAYLET} evicted no peer, although its table was overfull");
    }
    for (name, tally) in results.iter().flat_map(|(_, _, rows)| rows) {
        if tally.wrong_evictions > 0 {
            eprintln!("{name}: {} peers answered in time and were evicted", tally.wrong_evictions);
        }
        if tally.left_over > 0 {
            eprintln!(
                "{name}: {} slots or connections left after all clients have disconnected",
                tally.left_over
            );
        }
        failed |= tally.wrong_evictions + tally.left_over > 0;
    }
    if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}

/// Prints how many live peers a relay evicts where packets are lost and no client stalls: one that asks its kernel
/// about a connection before it evicts, and one that does not.
fn print_losses(mut trace: Trace) -> ExitCode {
    let live = trace.mean_live();
    let is_stall = |what: &trace::Change| matches!(what, trace::Change::Stall { .. });
    trace.events.retain(|(_, _, what)| !is_stall(what));
    trace.end_at(LOSSES_UNTIL);
    println!("An hour of a day, after {} h.\n", MEASURED_FROM.as_secs() / 3600);
    println!("| load | packets lost | live peers evicted | without asking the kernel | stays |");
    println!("| --- | --- | --- | --- | --- |");
    let evicted = at_each(&LOSSES_AT, |load| {
        let slots = (live * 100.0 / f64::from(load)).round() as usize;
        LOSSES.map(|loss| [true, false].map(|asks| run_relaylet(&trace, slots, |_| {}, asks, loss)))
    });
    for (load, tallies) in LOSSES_AT.iter().zip(&evicted) {
        for (loss, [asks, does_not]) in LOSSES.iter().zip(tallies) {
            let (lost, stays) = (loss * 100.0, asks.stays);
            let (evicted, without) = (asks.evicted, does_not.evicted);
            println!("| {load} % | {lost:.0} % | {evicted} | {without} | {stays} |");
        }
    }
    let evicted = evicted.iter().flatten().flatten().map(|tally| tally.evicted).sum::<usize>();
    if evicted > 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn policies(trace: &Trace, slots: usize) -> Vec<(&'static str, Tally)> {
    let others =
        OTHERS.map(|(name, policy)| (name, simulate(trace, Model::new(policy, slots), None, 0.0)));
    let mut rows = vec![(RELAYLET, relaylet(trace, slots, |_| {}))];
    rows.extend(others);
    rows
}

fn relaylet(trace: &Trace, slots: usize, change: Change) -> Tally {
    run_relaylet(trace, slots, change, false, 0.0)
}

fn run_relaylet(
    trace: &Trace,
    slots: usize,
    change: Change,
    asks_kernel: bool,
    loss: f64,
) -> Tally {
    let mut config = Config::default();
    config.close_silent = true; // as in the program
    config.max_reservations = slots;
    config.max_reservations_per_ip = Some(0);
    config.max_reservations_per_subnet = Some(0);
    change(&mut config);
    // Activity is noticed by the next sweep: the silence counts from there.
    let promise = config.probe_after + config.sweep;
    simulate(trace, RelayletModel::new(config, asks_kernel), Some(promise), loss)
}

/// Runs each load on a thread of its own.
fn at_each<T: Send>(loads: &[u32], run: impl Fn(u32) -> T + Sync) -> Vec<T> {
    thread::scope(|scope| {
        let run = &run;
        let start = |load: &u32| {
            let load = *load;
            scope.spawn(move || run(load))
        };
        let threads: Vec<_> = loads.iter().map(start).collect();
        let end = |thread: thread::ScopedJoinHandle<'_, T>| thread.join().expect("no panic");
        threads.into_iter().map(end).collect()
    })
}

const HEAD: &str = "\
| load | policy | live peers refused | refused though a slot's peer was gone \
| held by gone peers, mean | in grace, mean | live peers evicted | minutes unreachable \
| slot back p50 | p99 |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |";

fn row(tally: &Tally) -> String {
    let measured = (DAY - MEASURED_FROM).as_secs_f64();
    let mut back_after = tally.back_after.clone();
    back_after.sort_unstable();
    let percentile = |percent: usize| {
        let at = back_after.len() * percent / 100;
        back_after.get(at).map_or(0.0, Duration::as_secs_f64)
    };
    format!(
        "{:.1} % | {} | {:.1} | {:.1} | {} | {:.0} | {:.1} s | {:.0} s",
        refused(tally),
        tally.broken.map_or("".into(), |broken| broken.to_string()),
        tally.held_by_gone_peers / measured,
        tally.in_grace / measured,
        tally.evicted,
        tally.unreachable.as_secs_f64() / 60.0,
        percentile(50),
        percentile(99),
    )
}

/// The refused stays in percent of all.
fn refused(tally: &Tally) -> f64 {
    100.0 * tally.refused as f64 / tally.stays as f64
}
