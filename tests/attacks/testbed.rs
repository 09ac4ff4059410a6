//! The testbed of an attack: a relay with default limits, the bystanders, and the relay's metrics.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use libp2p::futures::{FutureExt, future::BoxFuture};
use tokio::time::sleep;

use crate::common::{
    Relay, TEST_TIMEOUT,
    bystanders::{Bystanders, Impact, wait_until_idle},
    child_process::{open_files, resident},
    http::{self, ON_ANY_PORT, get, samples},
    within,
};

/// The limits are the defaults, except that circuits have none, for the bystanders', and that grace is short, so that
/// slots of attackers are freed soon.
const FLAGS: [&str; 4] = [ON_ANY_PORT, "--circuit-duration=0s", "--circuit-bytes=0", "--grace=1s"];

/// The limit on the relay's peak memory in any attack, in KiB.
const MEMORY_LIMIT: u64 = 512 * 1024;

/// The metrics of streams and connections that the relay closed to free memory.
pub const FREED_FOR_MEMORY: [&str; 2] =
    [r#"relaylet_given_up_total{what="stream"}"#, r#"relaylet_given_up_total{what="connection"}"#];

/// The smallest `--max-buffered` for peers that may have four circuits each.
pub const SMALL_BUDGET: [&str; 2] = ["--max-circuits-per-peer=4", "--max-buffered=8MiB"];

/// The interval at which metrics are polled.
const POLL_INTERVAL: Duration = Duration::from_millis(100);

/// A relay under attack.
pub struct Testbed {
    pub bystanders: Bystanders,
    /// The relay's TCP port on 127.0.0.1.
    pub port: u16,
    http_port: u16,
    /// How many files the relay had open before the attack.
    open_files: usize,
}

/// What the relay counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Counts {
    pub live: usize,
    pub grace: usize,
    pub circuits: usize,
    pub connections: usize,
}

/// The counts with only the bystanders connected.
const BYSTANDERS: Counts = Counts { live: 1, grace: 0, circuits: 1, connections: 2 };

const EMPTY: Counts = Counts { live: 0, grace: 0, circuits: 0, connections: 0 };

impl Testbed {
    /// Starts a relay with these additional flags.
    pub async fn start(flags: &[&str]) -> Self {
        rlimit::increase_nofile_limit(u64::MAX).expect("a limit of open files");
        let relay = Relay::start(&[&FLAGS, flags].concat());
        let bystanders = Bystanders::start_with(relay, MEMORY_LIMIT).await;
        Self {
            port: bystanders.relay.port(),
            open_files: open_files(bystanders.relay.pid()),
            http_port: http::port(&bystanders.relay).await,
            bystanders,
        }
    }

    /// Runs an attack, and prints its row of the table.
    pub async fn attack<T: Send + 'static>(
        &mut self,
        what: &str,
        size: &str,
        attack: impl Future<Output = T> + Send + 'static,
    ) -> (T, Impact) {
        let (output, impact) = self.bystanders.watch_during(attack).await;
        let (clients, relay) = (impact.on_clients(), impact.on_relay());
        println!("\n| {what} | {size} | {clients} | {relay} |");
        (output, impact)
    }

    /// The value of this metric, labels included.
    pub async fn count(&self, name: &'static str) -> f64 {
        self.counter(name)().await
    }

    /// A function that reads this metric during an attack.
    pub fn counter(
        &self,
        name: &'static str,
    ) -> impl Fn() -> BoxFuture<'static, f64> + Send + 'static {
        self.reader(move |samples| samples.get(name).copied())
    }

    /// A function that reads how much of this resource the busiest address holds.
    pub fn busiest_reader(
        &self,
        resource: &'static str,
    ) -> impl Fn() -> BoxFuture<'static, f64> + Send + 'static {
        let prefix = format!("relaylet_busiest{{resource=\"{resource}\"");
        self.reader(move |samples| {
            let busiest = samples.iter().find(|(name, _)| name.starts_with(&prefix));
            busiest.map(|(_, holds)| *holds)
        })
    }

    /// A function that finds a value in the metrics; without one, zero.
    fn reader(
        &self,
        find: impl Fn(&BTreeMap<String, f64>) -> Option<f64> + Clone + Send + Sync + 'static,
    ) -> impl Fn() -> BoxFuture<'static, f64> + Send + 'static {
        let port = self.http_port;
        move || {
            let find = find.clone();
            async move { find(&samples(&get(port, "/metrics").await)).unwrap_or_default() }.boxed()
        }
    }

    /// A function that reads the counts during an attack.
    pub fn counts_reader(&self) -> impl Fn() -> BoxFuture<'static, Counts> + Send + 'static {
        let port = self.http_port;
        move || counts(port).boxed()
    }

    /// Asserts that the relay closed no stream and no connection to free memory.
    pub async fn assert_nothing_freed(&self) {
        let samples = samples(&get(self.http_port, "/metrics").await);
        for metric in FREED_FOR_MEMORY {
            assert_eq!(samples[metric], 0.0, "{metric}");
        }
    }

    /// Waits until this metric is at least `wanted`.
    pub async fn wait_until_counted(&self, name: &'static str, wanted: f64) {
        within(async {
            while self.count(name).await < wanted {
                sleep(POLL_INTERVAL).await;
            }
        })
        .await;
    }

    /// Waits until the counts satisfy `wanted`.
    pub async fn until(&self, wanted: impl Fn(Counts) -> bool) -> Counts {
        until(self.http_port, wanted).await
    }

    /// Waits until only the bystanders are connected and the relay is idle.
    pub async fn wait_until_idle(&self) {
        self.until(|counts| counts == BYSTANDERS).await;
        wait_until_idle(&self.bystanders.relay).await;
        // The connections of HTTP requests are closed a moment later.
        within(async {
            while open_files(self.bystanders.relay.pid()) > self.open_files {
                sleep(POLL_INTERVAL).await;
            }
        })
        .await;
    }

    /// The resident memory of the relay, in KiB.
    pub fn resident(&self) -> u64 {
        resident(self.bystanders.relay.pid())
    }

    /// Asserts that the disconnected attackers have left nothing behind and the bystanders are unaffected, and that
    /// every count is zero once the bystanders have disconnected, too.
    pub async fn assert_restored(mut self) {
        self.wait_until_idle().await;
        self.bystanders.assert_unharmed().await;
        let http_port = self.http_port;
        let _relay = self.bystanders.disconnect().await;
        until(http_port, |counts| counts == EMPTY).await;
    }
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
        assert!(start.elapsed() < TEST_TIMEOUT, "{counts:?}");
        sleep(POLL_INTERVAL).await;
    }
}
