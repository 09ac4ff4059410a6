//! The relay takes no more memory than it says at its start: in a memory cgroup of that size
//! strangers drive all limits to their edge at once, and it is not killed, and two who have nothing to
//! do with it notice nothing.
//!
//! `.ci/env ceiling`. With `RELAYLET_ATTACKS=long` in front the limits are the relay's own, else a quarter of
//! those.

mod cgroup;
mod crowd;

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

#[tokio::test]
#[ignore = "needs root, for a cgroup that limits memory"]
async fn all_limits_at_once_stay_below_what_the_relay_said_at_its_start() {
    rlimit::increase_nofile_limit(u64::MAX).expect("a limit of open files");
    let size = quick_or_long(Size::default().divided_by(4), Size::default());
    let cgroup = Cgroup::make();
    let folder = tempfile::tempdir().expect("a temporary folder");
    let mut start = command(&folder);
    start.args(["--listen=/ip4/127.0.0.1/tcp/0", ANYWHERE]);
    start.args(["--circuit-bytes=0", "--circuit-duration=0s", "--grace=1s"]);
    start.args(size.flags());
    let relay = Relay::run(cgroup.command(&start), folder);
    let most = at_most(&relay);
    cgroup.limit(most * MIB);
    let mut bystanders = Bystanders::gather_at(relay, most * 1024).await;
    let port = bystanders.relay.port();
    let watched_at = http::port(&bystanders.relay).await;

    let attack = async move { Crowd::gather(port, watched_at, size).await.presses().await };
    let (reached, noticed) = bystanders.live_through(attack).await;
    let peaks = [peak(bystanders.relay.pid()) / 1024, cgroup.peak() / MIB];
    println!(
        "at most {most} MiB: {} MiB resident at its peak, {} MiB of its cgroup; {reached:?}; {}",
        peaks[0],
        peaks[1],
        noticed.by_clients(),
    );
    assert_eq!(cgroup.killed(), 0);
    // Each limit was reached: of connections and slots before, of circuits, and of what waits. A few circuits
    // may be given up before the last one is there.
    assert!(reached.circuits >= size.circuits - size.circuits / 50, "{reached:?}");
    assert!(reached.reset > 0, "{reached:?}");
    // Streams were given up, and hardly a connection: whoever reads what it is sent can be told in time,
    // unless the machine is too slow.
    assert!(reached.closed <= size.connections / 5, "{reached:?}");
    bystanders.are_unharmed().await;
    let _relay = bystanders.leave().await;
}

/// What it says at its start, in MiB.
fn at_most(relay: &Relay) -> u64 {
    let log = relay.log();
    let said = log.iter().find_map(|line| {
        let (_, said) = line.split_once("at most ")?;
        said.split_once(" MiB under these limits")?.0.parse().ok()
    });
    said.unwrap_or_else(|| panic!("{log:#?}"))
}
