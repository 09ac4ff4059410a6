//! A memory cgroup, version 1 or 2, for one process.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{self, Command},
    sync::atomic::{AtomicUsize, Ordering},
};

/// How many were made: each has a name of its own.
static MADE: AtomicUsize = AtomicUsize::new(0);

const V1: &str = "/sys/fs/cgroup/memory";
const V2: &str = "/sys/fs/cgroup";

/// A cgroup, without a limit at first; removed when dropped.
pub struct Cgroup {
    folder: PathBuf,
    names: Names,
}

/// The names of its files.
struct Names {
    limit: &'static str,
    peak: &'static str,
    events: &'static str,
}

impl Cgroup {
    /// # Panics
    ///
    /// Without root.
    pub fn make() -> Self {
        let is_v1 = Path::new(V1).is_dir();
        let (root, names) = match is_v1 {
            true => (
                V1,
                Names {
                    limit: "memory.limit_in_bytes",
                    peak: "memory.max_usage_in_bytes",
                    events: "memory.oom_control",
                },
            ),
            false => {
                (V2, Names { limit: "memory.max", peak: "memory.peak", events: "memory.events" })
            }
        };
        if !is_v1 {
            let control = Path::new(V2).join("cgroup.subtree_control");
            fs::write(control, "+memory").expect("root, and a cgroup's memory to control");
        }
        let number = MADE.fetch_add(1, Ordering::Relaxed);
        let folder = Path::new(root).join(format!("relaylet-{}-{number}", process::id()));
        fs::create_dir(&folder).expect("root, and cgroups that count memory");
        Self { folder, names }
    }

    /// This command, run within the cgroup from its first page on.
    pub fn command(&self, inner: &Command) -> Command {
        let mut outer = Command::new("/bin/sh");
        outer.args(["-c", "echo $$ > \"$0\" && exec \"$@\""]);
        outer.arg(self.folder.join("cgroup.procs"));
        outer.arg(inner.get_program()).args(inner.get_args());
        outer.current_dir(inner.get_current_dir().expect("a folder"));
        outer.env_clear();
        outer
    }

    pub fn limit(&self, bytes: u64) {
        fs::write(self.folder.join(self.names.limit), bytes.to_string()).expect("the limit is set");
    }

    /// The peak memory use, in bytes.
    pub fn peak(&self) -> u64 {
        let peak = self.read(self.names.peak);
        peak.trim().parse().expect("a number")
    }

    /// How many processes the OOM killer has killed.
    pub fn killed(&self) -> u64 {
        let events = self.read(self.names.events);
        let killed = events.lines().find_map(|line| line.strip_prefix("oom_kill "));
        killed.expect("the cgroup's counters").parse().expect("a number")
    }

    fn read(&self, name: &str) -> String {
        fs::read_to_string(self.folder.join(name)).expect("the cgroup's counters")
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        // Fails while a process is in it; the cgroup is then left behind.
        let _ = fs::remove_dir(&self.folder);
    }
}
