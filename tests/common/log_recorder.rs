//! What the relays in this process log, line by line.

use std::{
    sync::{Mutex, Once},
    thread::{self, ThreadId},
};

/// The lines, and the thread that logged each.
static LOG: Mutex<Vec<(ThreadId, String)>> = Mutex::new(Vec::new());

struct Recorder;

impl log::Log for Recorder {
    fn enabled(&self, metadata: &log::Metadata<'_>) -> bool {
        metadata.target().starts_with("relaylet")
    }

    fn log(&self, record: &log::Record<'_>) {
        if self.enabled(record.metadata()) {
            LOG.lock().unwrap().push((thread::current().id(), record.args().to_string()));
        }
    }

    fn flush(&self) {}
}

/// Records all lines from now on.
pub fn record() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        log::set_logger(&Recorder).unwrap();
        log::set_max_level(log::LevelFilter::Debug);
    });
}

/// How many lines match.
pub fn count(matches: impl Fn(ThreadId, &str) -> bool) -> usize {
    LOG.lock().unwrap().iter().filter(|(thread, line)| matches(*thread, line)).count()
}
