//! The relay takes no more memory than it says at its start: in a memory cgroup of that size
//! strangers drive all limits to their edge at once, and it is not killed, and two who have nothing to
//! do with it notice nothing.
//!
//! `.ci/env ceiling`. With `RELAYLET_ATTACKS=long` in front the limits are the relay's own, else a quarter of
//! those. With `--memory` they are what follows from it.

mod cgroup;
mod crowd;
mod flat_out;

use crate::common::{
    Relay,
    bystanders::Bystanders,
    children::peak,
    command,
    http::{self, ANYWHERE},
    strangers::quick_or_long,
};
use cgroup::Cgroup;
use crowd::{Crowd, Size};

const MIB: u64 = 1024 * 1024;

/// What a debug build takes more than others: the kernel counts the pages of its file that the process has read.
const DEBUG_BUILD: u64 = 24;

#[tokio::test]
#[ignore = "needs root, for a cgroup that limits memory"]
async fn all_limits_at_once_stay_below_what_the_relay_said_at_its_start() {
    let size = quick_or_long(Size::default().divided_by(4), Size::default());
    press(size, &size.flags()).await;
}

#[tokio::test]
#[ignore = "needs root, for a cgroup that limits memory"]
async fn what_follows_from_memory_stays_below_it_with_all_limits_at_once() {
    for memory in quick_or_long(&[24][..], &[24, 32, 64]) {
        let flag = format!("--memory={memory}MiB");
        let folder = tempfile::tempdir().expect("a temporary folder");
        let printed = command(&folder).args([&flag, ANYWHERE, "--print-config"]).output();
        let printed = String::from_utf8(printed.expect("it prints").stdout).expect("text");
        let said = press(Size::printed(&printed), &[flag]).await;
        // All of it but what one more slot would take.
        assert!((memory * 9 / 10..=*memory).contains(&said), "{said}");
    }
}

/// Presses all limits of a relay with these flags, in a cgroup of the memory that it says at its start, which it returns in
/// MiB.
async fn press(size: Size, flags: &[String]) -> u64 {
    rlimit::increase_nofile_limit(u64::MAX).expect("a limit of open files");
    let cgroup = Cgroup::make();
    let folder = tempfile::tempdir().expect("a temporary folder");
    let mut start = command(&folder);
    start.args(["--listen=/ip4/127.0.0.1/tcp/0", ANYWHERE]);
    start.args(["--circuit-bytes=0", "--circuit-duration=0s", "--grace=1s"]);
    start.args(flags);
    let relay = Relay::run(cgroup.command(&start), folder);
    let most = at_most(&relay).await;
    cgroup.limit(most * MIB);
    let mut bystanders = Bystanders::gather_at(relay, (most + DEBUG_BUILD) * 1024).await;
    let port = bystanders.relay.port();
    let watched_at = http::port(&bystanders.relay).await;

    let attack = async move { Crowd::gather(port, watched_at, size).await.presses().await };
    let (reached, noticed) = bystanders.live_through(attack).await;
    let peaks = [peak(bystanders.relay.pid()) / 1024, cgroup.peak() / MIB];
    println!(
        "at most {most} MiB: {} MiB resident at its peak, {} MiB of its cgroup; {size:?}, {reached:?}; {}",
        peaks[0],
        peaks[1],
        noticed.by_clients(),
    );
    assert_eq!(cgroup.killed(), 0);
    // Each limit was reached: of connections and slots before, of circuits, and of what waits. A few circuits
    // may be given up before the last one is there, and those of the two who look on are fewer than a pair's.
    assert!(reached.circuits >= size.circuits - size.circuits / 50 - 1, "{reached:?}");
    assert!(reached.reset > 0, "{reached:?}");
    // Streams were given up, and hardly a connection: whoever reads what it is sent can be told in time,
    // unless the machine is too slow.
    assert!(reached.closed <= size.connections / 5, "{reached:?}");
    bystanders.are_unharmed().await;
    let _relay = bystanders.leave().await;
    most
}

/// What it says at its start, in MiB.
async fn at_most(relay: &Relay) -> u64 {
    let line = relay.wait_for_log(" MiB under these limits").await;
    let said = line.split_once("at most ").and_then(|(_, said)| said.split(' ').next());
    said.and_then(|said| said.parse().ok()).unwrap_or_else(|| panic!("{line}"))
}
