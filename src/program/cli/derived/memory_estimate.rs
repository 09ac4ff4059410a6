//! Estimates how much memory the relay takes at most under its limits.
//!
//! The cost of each item was measured: with `cargo bench --bench scale` for ordinary use, and with `tests/env/memory_estimate.rs`, in
//! which peers reach all limits at once, for the maximum.

use super::limit::{Derived, Limit};
use crate::program::{
    mux::stream_limits::FREE_STREAMS,
    net::admission::limits::{DIALED_FOR_AUTONAT, DIALED_FOR_DHT},
};

const KIB: u64 = 1024;
const MIB: u64 = 1024 * KIB;

/// The program itself, with empty tables. At the start more pages of its file are resident; the kernel reclaims them when
/// memory is short.
const PROGRAM: u64 = if cfg!(any(feature = "http", feature = "tls")) { 7 * MIB } else { 5 * MIB };

/// The most freed memory that the allocator keeps for one thread: see `runtime.rs`.
pub const MAX_PER_THREAD: u64 = 8 * MIB;

/// What a thread takes at least: its stack, and the buffers that its connections share.
pub const MIN_PER_THREAD: u64 = 256 * KIB;

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

/// Fragmentation of the heap, in percent of what is on it.
///
/// With the default limits that adds up to 384 MiB. In one run of `tests/env/memory_estimate.rs` 328 MiB of that were in use, for
/// which the heap took 527 MiB; the most that it took in five runs was 571 MiB.
const FRAGMENTATION: u64 = 60;

/// A small heap is fragmented half as much: with `--memory 24MiB` 12 MiB are on it, and the same test took 16 MiB.
const SMALL_HEAP: u64 = 32 * MIB;

/// What memory depends on besides the limits.
#[derive(Clone, Copy, Debug, Default)]
pub struct Usage {
    /// How many threads run the relay, unless a flag or the memory says otherwise.
    pub default_threads: usize,
    /// Whether connections are dialed for the DHT.
    pub dht: bool,
    /// Whether connections are dialed for AutoNAT.
    pub autonat: bool,
    /// Whether clients can connect over WebSocket.
    pub websocket: bool,
}

impl Usage {
    /// How many connections may be dialed for the DHT at a time.
    pub fn dialed_for_dht(&self) -> usize {
        if self.dht { DIALED_FOR_DHT } else { 0 }
    }

    /// The flags that take memory: " with --dht".
    pub fn reason(&self) -> String {
        let all = [("--dht", self.dht), ("--autonat", self.autonat), ("WebSocket", self.websocket)];
        let names: Vec<_> = all.iter().filter(|(_, is_on)| *is_on).map(|(name, _)| *name).collect();
        if names.is_empty() { String::new() } else { format!(" with {}", names.join(" and ")) }
    }
}

/// The memory that a relay takes at most under these limits, in bytes, if each thread keeps so many freed bytes.
pub fn estimate(limits: &Derived, usage: Usage, kept_by_thread: u64) -> u64 {
    let count = |limit| limits.get(limit);
    let for_autonat = if usage.autonat { DIALED_FOR_AUTONAT } else { 0 };
    let connections =
        [count(Limit::Connections), count(Limit::Handshakes), usage.dialed_for_dht(), for_autonat];
    let connections = connections.into_iter().fold(0, usize::saturating_add);
    let heap = sum([
        (connections, CONNECTION + if usage.websocket { WEBSOCKET } else { 0 }),
        (connections.saturating_mul(FREE_STREAMS).saturating_add(count(Limit::Streams)), STREAM),
        (count(Limit::Circuits), CIRCUIT),
        (count(Limit::Reservations), SLOT),
        (count(Limit::Buffered), 1),
    ]);
    let fragmented = heap - heap.min(SMALL_HEAP) / 2;
    let heap = heap.saturating_add(fragmented / 100 * FRAGMENTATION);
    heap.saturating_add(sum([(1, PROGRAM), (count(Limit::Threads), kept_by_thread)]))
}

fn sum<const N: usize>(parts: [(usize, u64); N]) -> u64 {
    let each = parts.iter().map(|(count, each)| (*count as u64).saturating_mul(*each));
    each.fold(0, u64::saturating_add)
}

/// How much memory this process can have, in bytes: the machine's, or the limit of its cgroup. `None` if that is unknown.
#[cfg(target_os = "linux")]
pub fn available() -> Option<u64> {
    let machine = rustix::system::sysinfo();
    #[allow(clippy::useless_conversion)] // a u32 on 32-bit machines
    let total = u64::from(machine.totalram);
    let machine = total.saturating_mul(machine.mem_unit.into());
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

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

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
}
