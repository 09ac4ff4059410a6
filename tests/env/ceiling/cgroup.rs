//! A memory cgroup, of version 1 or 2, for one process.

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

/// A cgroup without a limit at first, which goes when this is dropped.
pub struct Cgroup {
    folder: PathBuf,
    names: Names,
}

/// What its files are called.
struct Names {
    limit: &'static str,
    peak: &'static str,
    events: &'static str,
}

impl Cgroup {
    /// # Panics
    ///
    /// Without the right to.
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

    /// This command, within it from its first page on.
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
        fs::write(self.folder.join(self.names.limit), bytes.to_string())
            .expect("it can be limited");
    }

    /// The most that it ever took, in bytes.
    pub fn peak(&self) -> u64 {
        let peak = self.read(self.names.peak);
        peak.trim().parse().expect("a number")
    }

    /// How many processes were killed for want of memory.
    pub fn killed(&self) -> u64 {
        let events = self.read(self.names.events);
        let killed = events.lines().find_map(|line| line.strip_prefix("oom_kill "));
        killed.expect("the kernel counts").parse().expect("a number")
    }

    fn read(&self, name: &str) -> String {
        fs::read_to_string(self.folder.join(name)).expect("the kernel counts")
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        // Who failed within it is still there: the system lets it go once it is empty.
        let _ = fs::remove_dir(&self.folder);
    }
}
