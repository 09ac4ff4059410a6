//! The relay as the bench runs it, and what the kernel and its log say of it.

use std::{
    fs::{self, File},
    path::PathBuf,
    thread,
    time::Duration,
};

use crate::{
    common,
    contestants::{RELAYLET_FLAGS, Relay},
};

/// Whoever connects may take its time to reserve.
const NO_HURRY: &str = "--idle-timeout=0s";

/// One line for each sweep.
const LOG: &str = "error,relaylet::behaviour=trace";
const SWEPT: &str = "swept: ";

/// A relay that spent less than a hundredth of this on its CPU has done what there was to do. After
/// so many it may have, and be asking thousands of peers whether they are alive.
const MOMENT: Duration = Duration::from_secs(1);
const MOMENTS: usize = 10;

/// A relay, and its log.
pub struct Watched {
    pub relay: Relay,
    log: PathBuf,
}

impl Watched {
    /// A fresh one, with these flags beside those of the bench.
    pub fn start(flags: &str) -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let log = folder.path().join("log");
        let mut command = common::command(&folder);
        command
            .args(RELAYLET_FLAGS.split_whitespace())
            .arg(NO_HURRY)
            .args(flags.split_whitespace())
            .env("RUST_LOG", LOG)
            .stderr(File::create(&log).expect("a file"));
        let relay = Relay::run(command, folder);
        Self { relay, log }
    }

    /// The CPU seconds that it has spent, once it has nothing more to do.
    pub fn spent(&self) -> f64 {
        let mut spent = self.relay.process.cpu();
        for _ in 0..MOMENTS {
            let before = spent;
            thread::sleep(MOMENT);
            spent = self.relay.process.cpu();
            if u128::from(spent - before) * 100 < MOMENT.as_nanos() {
                break;
            }
        }
        spent as f64 / 1e9
    }

    /// How long each sweep took so far, in milliseconds.
    pub fn sweeps(&self) -> Vec<f64> {
        let log = fs::read_to_string(&self.log).expect("its log");
        let swept = log.lines().filter_map(|line| {
            let (_, took) = line.split_once(SWEPT)?;
            took.strip_suffix(" µs")?.parse::<f64>().ok()
        });
        swept.map(|microseconds| microseconds / 1e3).collect()
    }
}
