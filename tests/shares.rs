//! How fairly circuits share a narrow link, measured on the running program.
//!
//! `cargo bench --bench shares` measures each case over five seconds, prints a Markdown table, and exits with status 1
//! if a share misses its goal.

mod common;

use std::{
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use common::{Relay, circuit, source_and_target};
use libp2p::{
    Stream,
    futures::{AsyncReadExt, AsyncWriteExt},
};
use tokio::time::{Instant, interval, sleep};

/// The relay's bandwidth cap, in bytes per second.
const CAP: u64 = 4_000_000;

/// The demand of a light circuit: a little less than a tenth.
const LIGHT: u64 = 350_000;

/// After this time windows have grown and all circuits transfer.
const SETTLE_TIME: Duration = Duration::from_secs(2);

const MEASURED: Duration = Duration::from_secs(5);

#[tokio::main]
async fn main() -> ExitCode {
    println!("| under `--bandwidth 4MB`, over 5 s | measured | promised | |");
    println!("| --- | --- | --- | --- |");
    let mut kept = true;
    let mut row = |what: &str, figure: f64, promised: &str, holds: bool| {
        let verdict = if holds { "" } else { "BROKEN" };
        println!("| {what} | {figure:.3} | {promised} | {verdict} |");
        kept &= holds;
    };

    let rates = rates(&[None; 10]).await;
    let jain = fairness(&rates);
    row("ten greedy circuits: Jain's index", jain, "at least 0.95", jain >= 0.95);
    let of_cap = of_cap(&rates);
    row("together, of the cap", of_cap, "0.95 to 1.05", within_5_percent(of_cap));

    let mut demands = [Some(LIGHT); 10];
    demands[0] = None;
    let rates = self::rates(&demands).await;
    let least = rates[1..].iter().copied().fold(f64::INFINITY, f64::min) / LIGHT as f64;
    row(
        "one greedy, nine modest: the least a modest one got, of what it asked for",
        least,
        "0.95 or more",
        least >= 0.95,
    );
    let of_cap = self::of_cap(&rates);
    row("together, of the cap", of_cap, "0.95 to 1.05", within_5_percent(of_cap));
    match kept {
        true => ExitCode::SUCCESS,
        false => ExitCode::FAILURE,
    }
}

/// The rate of each of these circuits in bytes per second; each is between two peers of its own. `None` is unlimited
/// demand.
async fn rates(demands: &[Option<u64>]) -> Vec<f64> {
    let flags =
        "--bandwidth=4MB --circuit-bytes=0 --circuit-duration=0s --max-reservations-per-ip=0";
    let relay = Relay::start(&flags.split(' ').collect::<Vec<_>>());
    let mut clients = Vec::new();
    let mut arrived = Vec::new();
    for demand in demands {
        let (mut source, mut target) = source_and_target(&relay).await;
        let (from, to) = circuit(&mut source, &mut target).await;
        clients.extend([source, target]);
        let count = Arc::new(AtomicU64::new(0));
        arrived.push(Arc::clone(&count));
        tokio::spawn(send(from, *demand));
        tokio::spawn(receive(to, count));
    }
    sleep(SETTLE_TIME).await;
    let count = || arrived.iter().map(|count| count.load(Ordering::Relaxed)).collect::<Vec<_>>();
    let (start, before) = (Instant::now(), count());
    sleep(MEASURED).await;
    let (took, after) = (start.elapsed().as_secs_f64(), count());
    let of = |(after, before): (u64, u64)| (after - before) as f64 / took;
    after.into_iter().zip(before).map(of).collect()
}

async fn send(mut stream: Stream, demand: Option<u64>) {
    const TICKS: u64 = 100;
    let piece = vec![7; demand.map_or(64 * 1024, |rate| (rate / TICKS) as usize)];
    let mut tick = interval(Duration::from_millis(1000 / TICKS));
    loop {
        if demand.is_some() {
            tick.tick().await;
        }
        if stream.write_all(&piece).await.is_err() || stream.flush().await.is_err() {
            return; // the relay has exited
        }
    }
}

async fn receive(mut stream: Stream, count: Arc<AtomicU64>) {
    let mut buffer = vec![0; 64 * 1024];
    while let Ok(read @ 1..) = stream.read(&mut buffer).await {
        count.fetch_add(read as u64, Ordering::Relaxed);
    }
}

fn of_cap(rates: &[f64]) -> f64 {
    rates.iter().sum::<f64>() / CAP as f64
}

fn within_5_percent(of_cap: f64) -> bool {
    (0.95..=1.05).contains(&of_cap)
}

/// Jain's fairness index: 1 if all rates are equal, 1/n if one circuit gets everything.
fn fairness(rates: &[f64]) -> f64 {
    let sum: f64 = rates.iter().sum();
    let squares: f64 = rates.iter().map(|rate| rate * rate).sum();
    sum * sum / (rates.len() as f64 * squares)
}
