//! How much memory the relay may come to take, by its limits.
//!
//! What one of each takes was measured: `cargo bench --bench scale` for those that are well behaved,
//! and `tests/env/ceiling.rs`, which has strangers drive all limits to their edge at once, for the most.

use crate::{
    config::Config,
    program::{mux::stream_limits::StreamLimits, net::admission::limits::Limits},
};

const KIB: u64 = 1024;
const MIB: u64 = 1024 * KIB;

/// The program itself, and what it keeps of what was.
const PROGRAM: u64 = 12 * MIB;

/// What the heap of one thread keeps of what was freed: see `runtime.rs`.
const THREAD: u64 = 8 * MIB;

/// A connection over Noise that has nothing to read or to write, but once had a message of the largest
/// size to read, and a piece to write. One over TLS takes a third of it.
const CONNECTION: u64 = 116 * KIB;

/// What WebSocket takes beside, and its longest message.
#[cfg(feature = "websocket")]
const WEBSOCKET: u64 = 16 * KIB + crate::program::net::websocket::LONGEST_MESSAGE as u64;
#[cfg(not(feature = "websocket"))]
const WEBSOCKET: u64 = 0;

/// A stream, and who negotiates or asks on it.
const STREAM: u64 = 3 * KIB;

/// A circuit beside its source's stream: the target's, and what carries it.
const CIRCUIT: u64 = 3 * KIB;

/// A slot, and what is counted of its peer and its address.
const SLOT: u64 = KIB;

/// What the heap loses to fragmentation, where blocks are of many sizes and come and go: in percent of
/// all else.
///
/// With the default limits all else adds up to 404 MiB. The crowd of `tests/env/ceiling.rs` once had 328 MiB
/// of that in use, for which the heap took 527 MiB; the most that it took in five runs was 571 MiB.
const LOST: u64 = 60;

/// What the relay was told that memory depends on, beside its configuration.
#[derive(Clone, Copy, Debug)]
pub struct Uses {
    /// How many threads do the work.
    pub threads: usize,
    /// How many connections may be dialed.
    pub dialed: usize,
    /// Whether clients may come over WebSocket.
    pub websocket: bool,
}

/// The most memory that there can be use for, in bytes.
pub fn most(config: &Config, limits: &Limits, streams: &StreamLimits, uses: Uses) -> u64 {
    let connections = limits.max_connections.saturating_add(uses.dialed);
    let places = connections.saturating_add(limits.max_handshakes);
    let connection = CONNECTION + if uses.websocket { WEBSOCKET } else { 0 };
    let all = [
        (1, PROGRAM),
        (uses.threads, THREAD),
        (places, connection),
        (streams.most(places), STREAM),
        (config.max_circuits, CIRCUIT),
        (config.max_reservations, SLOT),
        (streams.buffered(config.max_circuits_per_peer), 1),
    ];
    let sum = all.iter().fold(0_u64, |sum, (count, each)| {
        sum.saturating_add((*count as u64).saturating_mul(*each))
    });
    sum.saturating_add(sum / 100 * LOST)
}

/// How much memory this process can have, in bytes: the machine's, or what its cgroup is limited to. `None`
/// where that cannot be told.
#[cfg(target_os = "linux")]
pub fn available() -> Option<u64> {
    let machine = rustix::system::sysinfo();
    let machine = machine.totalram.saturating_mul(machine.mem_unit.into());
    let cgroups = std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let limits = cgroups.lines().flat_map(limit_files).filter_map(|file| {
        // "max" where there is no limit.
        std::fs::read_to_string(file).ok()?.trim().parse().ok()
    });
    limits.chain([machine]).min()
}

#[cfg(not(target_os = "linux"))]
pub fn available() -> Option<u64> {
    None
}

/// The files that may have a limit on memory, by a line of /proc/self/cgroup: of the cgroup and of each above
/// it.
///
/// See cgroups(7), "/proc files": version 2 has no controllers in its line.
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

    const ALONE: Uses = Uses { threads: 1, dialed: 0, websocket: false };

    fn at_most(uses: Uses) -> u64 {
        most(&Config::default(), &Limits::default(), &StreamLimits::default(), uses)
    }

    #[test]
    fn by_default_it_is_less_than_660_mib() {
        assert!((600 * MIB..660 * MIB).contains(&at_most(ALONE)), "{}", at_most(ALONE));
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn the_machine_has_memory_and_a_cgroup_may_limit_it() {
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
    fn what_cannot_be_counted_is_too_much() {
        let config =
            Config { max_circuits: usize::MAX, max_reservations: usize::MAX, ..Config::default() };
        let (limits, streams) = (Limits::default(), StreamLimits::default());
        assert_eq!(most(&config, &limits, &streams, ALONE), u64::MAX);
    }
}
