//! Estimates how much memory the relay takes at most under its limits.
//!
//! The cost of each item was measured: with `cargo bench --bench scale` for ordinary use, and with `tests/env/memory_estimate.rs`, in
//! which peers reach all limits at once, for the maximum.

use crate::{
    config::Config,
    program::{mux::stream_limits::StreamLimits, net::admission::limits::Limits},
};

const KIB: u64 = 1024;
const MIB: u64 = 1024 * KIB;

/// The program itself, with its tables when empty.
const PROGRAM: u64 = 12 * MIB;

/// Freed memory that the allocator keeps for one thread: see `runtime.rs`.
const THREAD: u64 = 8 * MIB;

/// An idle connection over Noise, whose buffers have grown to the largest message. One over TLS takes a third of that.
const CONNECTION: u64 = 116 * KIB;

/// What WebSocket adds, with its longest message.
#[cfg(feature = "websocket")]
const WEBSOCKET: u64 = 16 * KIB + crate::program::net::websocket::LONGEST_MESSAGE as u64;
#[cfg(not(feature = "websocket"))]
const WEBSOCKET: u64 = 0;

/// A stream, with the task that negotiates its protocol or serves its request.
const STREAM: u64 = 3 * KIB;

/// A circuit besides its source's stream: the target's stream, and the task that copies bytes.
const CIRCUIT: u64 = 3 * KIB;

/// A slot, with the counts of its peer and its address.
const SLOT: u64 = KIB;

/// Fragmentation of the heap, in percent of all else.
///
/// With the default limits all else adds up to 404 MiB. In one run of `tests/env/memory_estimate.rs` 328 MiB of that were in use, for
/// which the heap took 527 MiB; the most that it took in five runs was 571 MiB.
const FRAGMENTATION: u64 = 60;

/// What memory depends on besides the limits.
#[derive(Clone, Copy, Debug)]
pub struct Usage {
    /// How many threads run the relay.
    pub threads: usize,
    /// How many connections may be dialed.
    pub dialed: usize,
    /// Whether clients can connect over WebSocket.
    pub websocket: bool,
}

/// The estimate, in bytes.
pub fn estimate(config: &Config, limits: &Limits, streams: &StreamLimits, usage: Usage) -> u64 {
    let connections = limits.max_connections.saturating_add(usage.dialed);
    let with_handshakes = connections.saturating_add(limits.max_handshakes);
    let connection = CONNECTION + if usage.websocket { WEBSOCKET } else { 0 };
    let all = [
        (1, PROGRAM),
        (usage.threads, THREAD),
        (with_handshakes, connection),
        (streams.most(with_handshakes), STREAM),
        (config.max_circuits, CIRCUIT),
        (config.max_reservations, SLOT),
        (streams.buffered(config.max_circuits_per_peer), 1),
    ];
    let sum = all.iter().fold(0_u64, |sum, (count, each)| {
        sum.saturating_add((*count as u64).saturating_mul(*each))
    });
    sum.saturating_add(sum / 100 * FRAGMENTATION)
}

/// How much memory this process can have, in bytes: the machine's, or the limit of its cgroup. `None` if that is unknown.
#[cfg(target_os = "linux")]
pub fn available() -> Option<u64> {
    let machine = rustix::system::sysinfo();
    let machine = machine.totalram.saturating_mul(machine.mem_unit.into());
    let cgroups = std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let limits = cgroups.lines().flat_map(limit_files).filter_map(|file| {
        // "max", which is not a number, if there is no limit.
        std::fs::read_to_string(file).ok()?.trim().parse().ok()
    });
    limits.chain([machine]).min()
}

#[cfg(not(target_os = "linux"))]
pub fn available() -> Option<u64> {
    None
}

/// The files with the memory limits of a cgroup, which is a line of /proc/self/cgroup, and of its ancestors.
///
/// See cgroups(7), "/proc files": the line of version 2 has no controllers.
#[cfg(target_os = "linux")]
fn limit_files(line: &str) -> Vec<std::path::PathBuf> {
    let mut fields = line.splitn(3, ':').skip(1);
    let (Some(controllers), Some(path)) = (fields.next(), fields.next()) else {
        return Vec::new();
    };
    let (root, file) = match controllers.split(',').any(|name| name == "memory") {
        true => ("/sys/fs/cgroup/memory", "memory.limit_in_bytes"),
        false if controllers.is_empty() => ("/sys/fs/cgroup", "memory.max"),
        false => return Vec::new(),
    };
    let path = std::path::Path::new(path.trim_start_matches('/'));
    path.ancestors().map(|path| std::path::Path::new(root).join(path).join(file)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALONE: Usage = Usage { threads: 1, dialed: 0, websocket: false };

    fn at_most(usage: Usage) -> u64 {
        estimate(&Config::default(), &Limits::default(), &StreamLimits::default(), usage)
    }

    #[test]
    fn the_default_is_below_660_mib() {
        assert!((600 * MIB..660 * MIB).contains(&at_most(ALONE)), "{}", at_most(ALONE));
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn available_memory_is_that_of_the_machine_or_the_cgroup_limit() {
        assert!(available().is_some_and(|bytes| bytes > MIB));
        let files = |line| limit_files(line).into_iter().map(|file| file.display().to_string());
        let two = [
            "/sys/fs/cgroup/a/b/memory.max",
            "/sys/fs/cgroup/a/memory.max",
            "/sys/fs/cgroup/memory.max",
        ];
        assert!(files("0::/a/b").eq(two));
        let one = [
            "/sys/fs/cgroup/memory/a/memory.limit_in_bytes",
            "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        ];
        assert!(files("5:cpu,memory:/a").eq(one));
        assert_eq!(files("4:cpuset:/a").count() + files("nonsense").count(), 0);
    }

    #[test]
    fn the_sum_saturates() {
        let config =
            Config { max_circuits: usize::MAX, max_reservations: usize::MAX, ..Config::default() };
        let (limits, streams) = (Limits::default(), StreamLimits::default());
        assert_eq!(estimate(&config, &limits, &streams, ALONE), u64::MAX);
    }
}
