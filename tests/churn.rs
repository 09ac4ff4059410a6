//! A day of 100,000 clients against this relay and three other ways of giving slots back:
//! `cargo bench --bench churn`.
//!
//! Prints a row a policy for each load, and draws `tests/churn.svg`. Fails if a peer that answered
//! in time lost its slot, or if anything is left when all are gone. With `-- settings` behind it,
//! it tries this relay with other timers instead. The clients, and what is assumed of them, are in
//! `churn/trace.rs`; the other relays in `churn/others.rs`.

#[path = "churn/others.rs"]
mod others;
#[path = "churn/plot.rs"]
mod plot;
#[path = "churn/rooms.rs"]
mod rooms;
#[path = "churn/trace.rs"]
mod trace;
#[path = "churn/world.rs"]
mod world;

use std::{
    env, fs,
    process::ExitCode,
    thread,
    time::{Duration, Instant},
};

use relaylet::Config;

use self::{
    others::{Model, Policy},
    rooms::Rooms,
    trace::{DAY, MEASURED_FROM, Trace},
    world::{Tally, play},
};

const SEED: u64 = 1;

/// In percent: the mean number of live clients that want a slot, by slots.
const LOADS: [u32; 7] = [50, 75, 90, 100, 110, 125, 150];

const PLOT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/churn.svg");

const RELAYLET: &str = "relaylet";
const OTHERS: [(&str, Policy); 4] = [
    ("term only: js-libp2p, 2 h", Policy::Term),
    ("and disconnect: rust-libp2p, 1 h", Policy::Disconnect),
    ("and 40 s of silence: go-libp2p, 1 h", Policy::Keepalive),
    ("(knows at once who is gone)", Policy::AllKnowing),
];
/// The all-knowing one is no relay: it is left out of the plot.
const PLOTTED: usize = OTHERS.len();

type Change = fn(&mut Config);

/// Under which loads other timers are tried, and which: all defaults, then one or two changed.
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
    let trace = Trace::of_a_day(SEED);
    let settings = env::args().any(|argument| argument == "settings");
    let loads = if settings { &TRIED_AT[..] } else { &LOADS };
    println!("A day, seed {SEED}: {:.0} live clients want a slot on average.\n", trace.mean_live());
    println!("{HEAD}");
    let began = Instant::now();
    let results = at_each(loads, |load| {
        let slots = (trace.mean_live() * 100.0 / f64::from(load)).round() as usize;
        let rows = match settings {
            true => TRIED.map(|(name, change)| (name, relaylet(&trace, slots, change))).into(),
            false => policies(&trace, slots),
        };
        (load, slots, rows)
    });
    for (load, slots, rows) in &results {
        for (name, tally) in rows {
            println!("| {load} % of {slots} | {name} | {} |", row(tally));
        }
    }
    let days: usize = results.iter().map(|(_, _, rows)| rows.len()).sum();
    let took = began.elapsed().as_secs_f64();
    println!("\n{days} days in {took:.0} s.");
    if !settings {
        let line = |n: usize| {
            let points =
                results.iter().map(|(load, _, rows)| (f64::from(*load), refused(&rows[n].1)));
            (results[0].2[n].0, points.collect())
        };
        let lines: Vec<_> = (0..PLOTTED).map(line).collect();
        fs::write(PLOT, plot::refusals(&lines)).expect("its folder can be written to");
    }

    let mut failed = false;
    for (name, tally) in results.iter().flat_map(|(_, _, rows)| rows) {
        if tally.unjust > 0 {
            eprintln!("{name}: {} peers answered in time and were evicted", tally.unjust);
        }
        if tally.left_over > 0 {
            eprintln!("{name}: {} things left when all were gone", tally.left_over);
        }
        failed |= tally.unjust + tally.left_over > 0;
    }
    if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}

fn policies(trace: &Trace, slots: usize) -> Vec<(&'static str, Tally)> {
    let others = OTHERS.map(|(name, policy)| (name, play(trace, Model::new(policy, slots), None)));
    let mut rows = vec![(RELAYLET, relaylet(trace, slots, |_| {}))];
    rows.extend(others);
    rows
}

fn relaylet(trace: &Trace, slots: usize, change: Change) -> Tally {
    let mut config = Config::default();
    config.max_reservations = slots;
    config.max_reservations_per_ip = Some(0);
    config.max_reservations_per_subnet = Some(0);
    change(&mut config);
    // What came in is noticed by the next sweep: the silence counts from there.
    let promise = config.probe_after + config.sweep;
    play(trace, Rooms::new(config), Some(promise))
}

/// One load beside the other: they have nothing in common but the trace.
fn at_each<T: Send>(loads: &[u32], run: impl Fn(u32) -> T + Sync) -> Vec<T> {
    thread::scope(|scope| {
        let run = &run;
        let start = |load: &u32| {
            let load = *load;
            scope.spawn(move || run(load))
        };
        let threads: Vec<_> = loads.iter().map(start).collect();
        let end = |thread: thread::ScopedJoinHandle<'_, T>| thread.join().expect("no bug");
        threads.into_iter().map(end).collect()
    })
}

const HEAD: &str = "\
| load | policy | live peers refused | refused against the promise \
| held by the dead, mean | in grace, mean | live peers evicted | minutes unreachable \
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
        tally.held_by_the_dead / measured,
        tally.in_grace / measured,
        tally.evicted,
        tally.unreachable.as_secs_f64() / 60.0,
        percentile(50),
        percentile(99),
    )
}

/// In percent of the stays.
fn refused(tally: &Tally) -> f64 {
    100.0 * tally.refused as f64 / tally.stays as f64
}
