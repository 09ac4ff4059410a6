//! The relay uses no more memory than it estimates at its start: in a memory cgroup of that size, peers drive all
//! limits to their maximum at once. The relay must not be killed, and two bystanders must not be affected.
//!
//! `.ci/env memory_estimate`. With `RELAYLET_ATTACKS=long` the limits are the relay's defaults, else a quarter of them.

mod cgroup;
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

#[tokio::test]
#[ignore = "needs root, for a cgroup that limits memory"]
async fn all_limits_at_once_stay_below_the_memory_estimate() {
    rlimit::increase_nofile_limit(u64::MAX).expect("a limit of open files");
    let size = short_or_long(Size::default().divided_by(4), Size::default());
    let cgroup = Cgroup::make();
    let folder = tempfile::tempdir().expect("a temporary folder");
    let mut start = command(&folder);
    start.args(["--listen=/ip4/127.0.0.1/tcp/0", ON_ANY_PORT]);
    start.args(["--circuit-bytes=0", "--circuit-duration=0s", "--grace=1s"]);
    start.args(size.flags());
    let relay = Relay::run(cgroup.command(&start), folder);
    let most = estimate(&relay);
    cgroup.limit(most * MIB);
    let mut bystanders = Bystanders::start_with(relay, most * 1024).await;
    let port = bystanders.relay.port();
    let http_port = http::port(&bystanders.relay).await;

    let attack = async move { Load::start(port, http_port, size).await.run().await };
    let (reached, impact) = bystanders.watch_during(attack).await;
    let peaks = [peak(bystanders.relay.pid()) / 1024, cgroup.peak() / MIB];
    println!(
        "at most {most} MiB: {} MiB resident at its peak, {} MiB of its cgroup; {reached:?}; {}",
        peaks[0],
        peaks[1],
        impact.on_clients(),
    );
    assert_eq!(cgroup.killed(), 0);
    // Each limit was reached: connections and slots before the attack, circuits and buffers during it. A few circuits
    // may be closed before the last one opens.
    assert!(reached.circuits >= size.circuits - size.circuits / 50, "{reached:?}");
    assert!(reached.reset > 0, "{reached:?}");
    // Mostly streams were reset to free memory: a connection is closed only when its peer does not read the reset in
    // time, as on a slow machine.
    assert!(reached.closed <= size.connections / 5, "{reached:?}");
    bystanders.assert_unharmed().await;
    let _relay = bystanders.disconnect().await;
}

/// The memory estimate in the relay's log, in MiB.
fn estimate(relay: &Relay) -> u64 {
    let log = relay.log();
    let estimated = log.iter().find_map(|line| {
        let (_, estimated) = line.split_once("at most ")?;
        estimated.split_once(" MiB under these limits")?.0.parse().ok()
    });
    estimated.unwrap_or_else(|| panic!("{log:#?}"))
}
