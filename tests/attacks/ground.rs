//! Where attacks take place: a relay at its defaults, those who are watched, and what is counted.

use std::{
    fs,
    time::{Duration, Instant},
};

use libp2p::futures::{FutureExt, future::BoxFuture};
use tokio::time::sleep;

use crate::common::{
    PATIENCE, Relay,
    bystanders::{Bystanders, Noticed, rests},
    children::resident,
    http::{self, ANYWHERE, get, samples},
    within,
};

/// The limits are the program's own, but for those of the circuit that is watched; and a slot is not
/// kept for long for strangers that are gone.
const FLAGS: [&str; 4] = [ANYWHERE, "--circuit-duration=0s", "--circuit-bytes=0", "--grace=1s"];

/// No attack may take more than this, in KiB.
const MUCH: u64 = 512 * 1024;

/// The metrics of streams and of connections that the relay ended for want of memory.
pub const GIVEN_UP: [&str; 2] =
    [r#"relaylet_given_up_total{what="stream"}"#, r#"relaylet_given_up_total{what="connection"}"#];

/// How often to look again at what is counted once a second.
const LOOK_AGAIN: Duration = Duration::from_millis(100);

/// A relay under attack.
pub struct Ground {
    pub bystanders: Bystanders,
    /// Where the relay is, on 127.0.0.1.
    pub port: u16,
    watched_at: u16,
    /// How many files the relay had open before.
    files: usize,
}

/// What the relay counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Counts {
    pub live: usize,
    pub grace: usize,
    pub circuits: usize,
    pub connections: usize,
}

/// The two who are watched.
const THEM: Counts = Counts { live: 1, grace: 0, circuits: 1, connections: 2 };

const NOBODY: Counts = Counts { live: 0, grace: 0, circuits: 0, connections: 0 };

impl Ground {
    /// A relay with these flags as well.
    pub async fn prepare(flags: &[&str]) -> Self {
        rlimit::increase_nofile_limit(u64::MAX).expect("a limit of open files");
        let relay = Relay::start(&[&FLAGS, flags].concat());
        let bystanders = Bystanders::gather_at(relay, MUCH).await;
        Self {
            port: bystanders.relay.port(),
            files: open_files(&bystanders.relay),
            watched_at: http::port(&bystanders.relay).await,
            bystanders,
        }
    }

    /// Attacks, and prints the row of the table: what is tried, and how hard.
    pub async fn suffer<T: Send + 'static>(
        &mut self,
        what: &str,
        how_hard: &str,
        attack: impl Future<Output = T> + Send + 'static,
    ) -> (T, Noticed) {
        let (attacked, noticed) = self.bystanders.live_through(attack).await;
        let (clients, relay) = (noticed.by_clients(), noticed.by_the_relay());
        println!("\n| {what} | {how_hard} | {clients} | {relay} |");
        (attacked, noticed)
    }

    /// What it counts under this name of the metrics, labels included.
    pub async fn count(&self, name: &'static str) -> f64 {
        self.counting(name)().await
    }

    /// What tells what it counts under this name, in an attack.
    pub fn counting(
        &self,
        name: &'static str,
    ) -> impl Fn() -> BoxFuture<'static, f64> + Send + 'static {
        let port = self.watched_at;
        move || {
            let count = async move {
                let samples = samples(&get(port, "/metrics").await);
                samples.get(name).copied().unwrap_or_default()
            };
            count.boxed()
        }
    }

    /// What tells what it counts, in an attack.
    pub fn watch(&self) -> impl Fn() -> BoxFuture<'static, Counts> + Send + 'static {
        let port = self.watched_at;
        move || counts(port).boxed()
    }

    /// Waits until it counts so many, or more, under this name.
    pub async fn until_counted(&self, name: &'static str, wanted: f64) {
        within(async {
            while self.count(name).await < wanted {
                sleep(LOOK_AGAIN).await;
            }
        })
        .await;
    }

    /// Waits until it counts this.
    pub async fn until(&self, wanted: impl Fn(Counts) -> bool) -> Counts {
        until(self.watched_at, wanted).await
    }

    /// Waits until no stranger is left, and nothing to be done.
    pub async fn is_calm(&self) {
        self.until(|counts| counts == THEM).await;
        rests(&self.bystanders.relay).await;
        // What was asked of it over HTTP has its end a moment later.
        within(async {
            while open_files(&self.bystanders.relay) > self.files {
                sleep(LOOK_AGAIN).await;
            }
        })
        .await;
    }

    /// The resident memory of the relay, in KiB.
    pub fn resident(&self) -> u64 {
        resident(self.bystanders.relay.pid())
    }

    /// The strangers are gone. Nothing of them is left, nobody else has lost anything, and once
    /// everybody is gone nothing is left at all.
    pub async fn ends_as_it_began(mut self) {
        self.is_calm().await;
        self.bystanders.are_unharmed().await;
        let watched_at = self.watched_at;
        let _relay = self.bystanders.leave().await;
        until(watched_at, |counts| counts == NOBODY).await;
    }
}

fn open_files(relay: &Relay) -> usize {
    let files = fs::read_dir(format!("/proc/{}/fd", relay.pid()));
    files.expect("it runs, on Linux").count()
}

async fn counts(port: u16) -> Counts {
    let samples = samples(&get(port, "/metrics").await);
    let count = |name: &str| samples[name] as usize;
    Counts {
        live: count(r#"relaylet_slots{state="live"}"#),
        grace: count(r#"relaylet_slots{state="grace"}"#),
        circuits: count("relaylet_circuits"),
        connections: count("relaylet_connections"),
    }
}

async fn until(port: u16, wanted: impl Fn(Counts) -> bool) -> Counts {
    let start = Instant::now();
    loop {
        let counts = counts(port).await;
        if wanted(counts) {
            return counts;
        }
        assert!(start.elapsed() < PATIENCE, "{counts:?}");
        sleep(LOOK_AGAIN).await;
    }
}
