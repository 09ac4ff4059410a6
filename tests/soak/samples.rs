//! The relay's resources, and whether they are flat.

use std::{fs, time::Duration};

use crate::common::child_process;

/// How much more may be used at the end than before, under the same load: a fraction, and a margin.
const MORE: f64 = 0.10;
const MORE_MEMORY: f64 = 2048.0;
const MORE_FILES: f64 = 4.0;

/// How much the loads of the compared times may differ.
const SAME_LOAD: f64 = 0.20;

/// The resources at one time.
#[derive(Clone, Copy, Debug, Default)]
pub struct Sample {
    pub at: Duration,
    pub clients: f64,
    pub connections: f64,
    pub circuits: f64,
    /// In KiB.
    pub resident: f64,
    pub files: f64,
    pub threads: f64,
}

impl Sample {
    /// The kernel's figures of a process.
    pub fn of(process: u32) -> Self {
        let count = |of: &str| {
            let all = fs::read_dir(format!("/proc/{process}/{of}"));
            all.expect("a running process, on Linux").count() as f64
        };
        Self {
            resident: child_process::resident(process) as f64,
            files: count("fd"),
            threads: count("task"),
            ..Self::default()
        }
    }

    /// The means of the samples in this interval.
    pub fn mean(all: &[Self], from: Duration, until: Duration) -> Option<Self> {
        let all: Vec<_> = all.iter().filter(|sample| (from..=until).contains(&sample.at)).collect();
        let mean = |of: fn(&Self) -> f64| {
            let sum: f64 = all.iter().map(|sample| of(sample)).sum();
            sum / all.len() as f64
        };
        (!all.is_empty()).then(|| Self {
            at: until,
            clients: mean(|s| s.clients),
            connections: mean(|s| s.connections),
            circuits: mean(|s| s.circuits),
            resident: mean(|s| s.resident),
            files: mean(|s| s.files),
            threads: mean(|s| s.threads),
        })
    }
}

/// Whether `end` uses no more than `early` did. A time after the last client would not do: the C library returns little
/// freed memory to the kernel.
pub fn is_flat(early: &Sample, end: &Sample) -> Result<(), String> {
    let load = (end.connections - early.connections).abs() / early.connections;
    if load > SAME_LOAD {
        return Err(format!(
            "{:.0} connections at first and {:.0} at the end are not the same load: another --seed, or \
             more --clients",
            early.connections, end.connections
        ));
    }
    let same = |what: &str, early: f64, end: f64, most: f64| match end > most {
        true => Err(format!(
            "{what} is not flat: {early:.0} at first, {end:.0} at the end, and {most:.0} is allowed"
        )),
        false => Ok(()),
    };
    let most = |early: f64, more: f64| early * (1.0 + MORE) + more;
    let (memory, files) = (early.resident, early.files - early.connections);
    same("memory (KiB)", memory, end.resident, most(memory, MORE_MEMORY))?;
    let at_end = end.files - end.connections;
    same("descriptors beside connections", files, at_end, most(files, MORE_FILES))?;
    same("threads", early.threads, end.threads, early.threads)
}
