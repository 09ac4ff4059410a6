//! The metrics of the process that every Prometheus client library provides, under their standard names:
//! [process metrics](https://prometheus.io/docs/instrumenting/writing_clientlibs/#process-metrics).
//!
//! Read for each scrape, on the thread that serves HTTP and not on the relay's: to count the open files takes a system
//! call for every few hundred of them.

use std::{
    fmt, fs,
    sync::OnceLock,
    time::{Duration, SystemTime},
};

use prometheus_client::{
    collector::Collector,
    encoding::DescriptorEncoder,
    metrics::{counter::ConstCounter, gauge::ConstGauge},
    registry::Unit,
};
use rlimit::Resource;
use rustix::time::{ClockId, clock_gettime};

use super::counters::write;
use crate::wall_clock;

/// Ticks per second in `/proc`: `USER_HZ`, which is 100 on all architectures that Rust builds for.
const TICKS: f64 = 100.0;

/// The metrics of this process.
#[derive(Debug, Default)]
pub struct Process {
    /// When the process was started, in seconds since 1970, once that is known.
    started: OnceLock<f64>,
}

impl Process {
    /// When the process was started, in seconds since 1970. Computed once the clock, which shows `now`, is set.
    fn started(&self, now: SystemTime) -> Option<f64> {
        let known = self.started.get().copied();
        let started = known.or_else(|| start_time(now).filter(|_| wall_clock::is_set(now)))?;
        Some(*self.started.get_or_init(|| started))
    }
}

impl Collector for Process {
    /// Leaves out the metrics that this system does not provide.
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let out = &mut encoder;
        let help = "User and system CPU time that the process has taken.";
        let cpu = ConstCounter::new(read_clock(ClockId::ProcessCPUTime).as_secs_f64());
        write(out, "process_cpu", help, Some(&Unit::Seconds), cpu)?;
        let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
        let mut gauge = |name, help, unit, value: Option<f64>| match value {
            Some(value) => write(out, name, help, unit, ConstGauge::new(value)),
            None => Ok(()),
        };
        let (bytes, seconds) = (Some(&Unit::Bytes), Some(&Unit::Seconds));
        let help = "Memory of the process that is in RAM.";
        gauge("process_resident_memory", help, bytes, memory(&status, "VmRSS:"))?;
        let help = "Address space of the process.";
        gauge("process_virtual_memory", help, bytes, memory(&status, "VmSize:"))?;
        let help = "Open file descriptors; each connection has one.";
        gauge("process_open_fds", help, None, open_files())?;
        let limit = Resource::NOFILE.get_soft().ok().map(|limit| limit as f64);
        gauge("process_max_fds", "Limit of open file descriptors.", None, limit)?;
        let help = "When the process was started, in seconds since 1970.";
        gauge("process_start_time", help, seconds, self.started(SystemTime::now()))
    }
}

/// The memory of this process that is in RAM, in bytes; `None` where the system does not tell.
pub fn resident_memory() -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    memory(&status, "VmRSS:").map(|bytes| bytes as u64)
}

/// The time that this clock shows.
pub fn read_clock(clock: ClockId) -> Duration {
    Duration::try_from(clock_gettime(clock)).unwrap_or_default()
}

/// The value of a line of `/proc/self/status` in KiB, converted to bytes.
fn memory(status: &str, name: &str) -> Option<f64> {
    let line = status.lines().find_map(|line| line.strip_prefix(name))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some((kib * 1024) as f64)
}

fn open_files() -> Option<f64> {
    let files = fs::read_dir("/proc/self/fd").ok()?.count();
    Some(files.saturating_sub(1) as f64) // the descriptor of the folder itself
}

/// When the process was started, in seconds since 1970, if the clock, which shows `now`, is right. Field 22 of
/// `/proc/self/stat` has the ticks from the boot until then.
#[cfg(target_os = "linux")]
fn start_time(now: SystemTime) -> Option<f64> {
    let stat = fs::read_to_string("/proc/self/stat").ok()?;
    let (_, fields) = stat.rsplit_once(") ")?; // after the name, which may contain anything
    let ticks: f64 = fields.split(' ').nth(22 - 3)?.parse().ok()?;
    let age = read_clock(ClockId::Boottime).as_secs_f64() - ticks / TICKS;
    Some(now.duration_since(SystemTime::UNIX_EPOCH).ok()?.as_secs_f64() - age)
}

#[cfg(not(target_os = "linux"))]
fn start_time(_: SystemTime) -> Option<f64> {
    None
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;

    #[cfg(target_os = "linux")]
    #[test]
    fn process_metrics_describe_this_process() {
        let status = "Name:\tVmRSS:\nVmSize:\t  123 kB\nVmRSS:\t      45 kB\n";
        assert_eq!(memory(status, "VmRSS:"), Some(45.0 * 1024.0));
        assert_eq!(memory(status, "VmSize:"), Some(123.0 * 1024.0));
        assert_eq!(memory("", "VmSize:"), None);
        let files: Vec<_> = (0..50).map(|_| File::open("/dev/null").unwrap()).collect();
        assert!(open_files().is_some_and(|open| open >= files.len() as f64));
    }

    /// The clock of a board without a battery starts in 1970.
    #[cfg(target_os = "linux")]
    #[test]
    fn the_start_is_known_once_the_clock_is_set_and_then_stays() {
        let (process, now) = (Process::default(), SystemTime::now());
        assert_eq!(process.started(SystemTime::UNIX_EPOCH), None);
        let started = process.started(now);
        let seconds = now.duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs_f64();
        assert!(started.is_some_and(|it| it <= seconds && seconds - it < 86_400.0), "{started:?}");
        for later in [SystemTime::UNIX_EPOCH, now + Duration::from_secs(3600)] {
            assert_eq!(process.started(later), started);
        }
    }
}
