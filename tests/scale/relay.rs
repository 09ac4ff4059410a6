//! The relay as the bench runs it, and what the kernel and its metrics say of it.

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

/// Whoever connects may take its time to reserve.
const NO_HURRY: &str = "--idle-timeout=0s";

/// Nothing but where its metrics are.
const LOG: &str = "error,relaylet::program::http=info";
const WATCH_IT: &str = "watch it at http://";

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
            .args([NO_HURRY, http::ANYWHERE])
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

    /// The values of these metrics.
    pub fn metrics<const N: usize>(&self, names: [&str; N]) -> [f64; N] {
        let log = fs::read_to_string(&self.log).expect("its log");
        let (_, rest) = log.split_once(WATCH_IT).expect("where its metrics are");
        let (address, _) = rest.split_once('/').expect("an address");
        let mut stream = TcpStream::connect(address).expect("the port is open");
        stream.write_all(b"GET /metrics HTTP/1.0\r\n\r\n").expect("it reads");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).expect("an answer");
        names.map(|name| {
            let value = answer.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
            value.unwrap_or_else(|| panic!("{name}: {answer}")).parse().expect("a number")
        })
    }
}
