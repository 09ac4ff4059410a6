//! The relay uses no more memory than it estimates at its start: in a memory cgroup of that size, peers drive all
//! limits to their maximum at once. The relay must not be killed, and two bystanders must not be affected.
//!
//! Run by `.ci/env memory_estimate`. With `RELAYLET_ATTACKS=long` the limits are the relay's defaults, else a quarter of
//! them. A second test uses the limits that are derived from `--memory`.

mod cgroup;
mod flat_out;
mod load;

use crate::common::{
    Relay,
    bystanders::Bystanders,
    child_process::peak,
    command,
    http::{self, ON_ANY_PORT},
    raw_peers::short_or_long,
};
use cgroup::Cgroup;
use load::{Load, Size};

const MIB: u64 = 1024 * 1024;

/// How many MiB more than the estimate may be resident, for debug builds: resident memory includes the pages of the
/// program file that the process has read.
const DEBUG_BUILD: u64 = 24;

#[tokio::test]
#[ignore = "needs root, for a cgroup that limits memory"]
async fn all_limits_at_once_stay_below_the_memory_estimate() {
    let size = short_or_long(Size::default().divided_by(4), Size::default());
    reach_limits(size, &size.flags()).await;
}

#[tokio::test]
#[ignore = "needs root, for a cgroup that limits memory"]
async fn all_limits_at_once_stay_below_the_memory_that_they_are_derived_from() {
    for memory in short_or_long(&[24][..], &[24, 32, 64]) {
        let flag = format!("--memory={memory}MiB");
        let folder = tempfile::tempdir().expect("a temporary folder");
        let printed = command(&folder).args([&flag, ON_ANY_PORT, "--print-config"]).output();
        let printed = String::from_utf8(printed.expect("output").stdout).expect("text");
        let estimated = reach_limits(Size::printed(&printed), &[flag]).await;
        // The derived limits use most of the memory, and no more than that.
        assert!((memory * 9 / 10..=*memory).contains(&estimated), "{estimated}");
    }
}

/// Reaches all limits of a relay with these flags, in a cgroup of the memory that it estimates. Returns the estimate,
/// in MiB.
async fn reach_limits(size: Size, flags: &[String]) -> u64 {
    rlimit::increase_nofile_limit(u64::MAX).expect("a limit of open files");
    let cgroup = Cgroup::make();
    let folder = tempfile::tempdir().expect("a temporary folder");
    let mut start = command(&folder);
    start.args(["--listen=/ip4/127.0.0.1/tcp/0", ON_ANY_PORT]);
    start.args(["--circuit-bytes=0", "--circuit-duration=0s", "--grace=1s"]);
    start.args(flags);
    let relay = Relay::run(cgroup.command(&start), folder);
    let most = estimate(&relay).await;
    cgroup.limit(most * MIB);
    let mut bystanders = Bystanders::start_with(relay, (most + DEBUG_BUILD) * 1024).await;
    let port = bystanders.relay.port();
    let http_port = http::port(&bystanders.relay).await;

    let attack = async move { Load::start(port, http_port, size).await.run().await };
    let (reached, impact) = bystanders.watch_during(attack).await;
    let peaks = [peak(bystanders.relay.pid()) / 1024, cgroup.peak() / MIB];
    println!(
        "at most {most} MiB: {} MiB resident at its peak, {} MiB of its cgroup; {size:?}, {reached:?}; {}",
        peaks[0],
        peaks[1],
        impact.on_clients(),
    );
    assert_eq!(cgroup.killed(), 0);
    // Each limit was reached: connections and slots before the attack, circuits and buffers during it. A few circuits
    // may be closed before the last one opens, and the bystanders have fewer than a pair.
    assert!(reached.circuits >= size.circuits - size.circuits / 50 - 1, "{reached:?}");
    assert!(reached.reset > 0, "{reached:?}");
    // Mostly streams were reset to free memory: a connection is closed only when its peer does not read the reset in
    // time, as on a slow machine.
    assert!(reached.closed <= size.connections / 5, "{reached:?}");
    bystanders.assert_unharmed().await;
    let _relay = bystanders.disconnect().await;
    most
}

/// The memory estimate in the relay's log, in MiB.
async fn estimate(relay: &Relay) -> u64 {
    let line = relay.wait_for_log(" MiB under these limits").await;
    let estimated = line.split_once("at most ").and_then(|(_, rest)| rest.split(' ').next());
    estimated.and_then(|mib| mib.parse().ok()).unwrap_or_else(|| panic!("{line}"))
}
