//! The relay as the bench runs it, with the kernel's figures and its metrics.

use std::{
    fs::{self, File},
    io::{Read, Write},
    net::TcpStream,
    path::PathBuf,
    thread,
    time::Duration,
};

use crate::{
    common::{self, http},
    contestants::{RELAYLET_FLAGS, Relay},
};

/// Peers may connect long before they reserve.
const NO_IDLE_TIMEOUT: &str = "--idle-timeout=0s";

/// Logs only the address of the metrics.
const LOG: &str = "error,relaylet::program::http=info";
const METRICS_LOGGED: &str = "monitoring page: http://";

/// A relay that used less than a hundredth of this on the CPU is idle. After this many it is taken to be idle: it may
/// still be sending probes to thousands of peers.
const INTERVAL: Duration = Duration::from_secs(1);
const MOST_INTERVALS: usize = 10;

/// A running relay, and its log.
pub struct Watched {
    pub relay: Relay,
    log: PathBuf,
}

impl Watched {
    /// Starts a relay with these flags in addition to those of the bench.
    pub fn start(flags: &str) -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let log = folder.path().join("log");
        let mut command = common::command(&folder);
        command
            .args(RELAYLET_FLAGS.split_whitespace())
            .args([NO_IDLE_TIMEOUT, http::ON_ANY_PORT])
            .args(flags.split_whitespace())
            .env("RUST_LOG", LOG)
            .stderr(File::create(&log).expect("a file"));
        let relay = Relay::run(command, folder);
        Self { relay, log }
    }

    /// The CPU seconds that it has used, once it is idle.
    pub fn spent(&self) -> f64 {
        let mut spent = self.relay.process.cpu();
        for _ in 0..MOST_INTERVALS {
            let before = spent;
            thread::sleep(INTERVAL);
            spent = self.relay.process.cpu();
            if u128::from(spent - before) * 100 < INTERVAL.as_nanos() {
                break;
            }
        }
        spent as f64 / 1e9
    }

    /// The values of these metrics.
    pub fn metrics<const N: usize>(&self, names: [&str; N]) -> [f64; N] {
        let log = fs::read_to_string(&self.log).expect("the log is read");
        let (_, rest) = log.split_once(METRICS_LOGGED).expect("the address of the metrics");
        let (address, _) = rest.split_once('/').expect("an address");
        let mut stream = TcpStream::connect(address).expect("the port is open");
        stream.write_all(b"GET /metrics HTTP/1.0\r\n\r\n").expect("the relay reads");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).expect("an answer");
        names.map(|name| {
            let value = answer.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
            value.unwrap_or_else(|| panic!("{name}: {answer}")).parse().expect("a number")
        })
    }
}
