//! The three relays as processes, with limits that do not affect the benches.

use std::{
    path::{Path, PathBuf},
    process::Command,
    thread,
};

use libp2p::Multiaddr;
use tempfile::TempDir;

use crate::common::{self, child_process::Process};

/// All peers connect from few addresses and at once; circuits have no limits.
pub const RELAYLET_FLAGS: &str = "--listen=/ip4/127.0.0.1/tcp/0 --max-reservations=20000 \
    --max-reservations-per-ip=0 --max-reservations-per-subnet=0 --max-connections=30000 \
    --max-connections-per-ip=0 --max-handshakes=4096 --max-circuits=20000 \
    --max-circuits-per-peer=2048 --circuit-duration=0s --circuit-bytes=0 --reserve-rate=0 \
    --connect-rate=0 --stream-rate=0";

/// The relays, in the order of the table's columns. The others are compared with the first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Contestant {
    Relaylet,
    Rust,
    Go,
}

impl Contestant {
    pub const ALL: [Self; 3] = [Self::Relaylet, Self::Rust, Self::Go];

    pub fn name(self) -> &'static str {
        match self {
            Self::Relaylet => "relaylet",
            Self::Rust => "rust-libp2p",
            Self::Go => "go-libp2p",
        }
    }
}

/// How to start each relay.
pub struct Contestants {
    flags: Vec<String>,
    built: PathBuf,
}

impl Contestants {
    /// Builds the other relays that take part.
    pub fn build(selected: &[Contestant], flags: &str) -> Self {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let built = root.join("target/peers");
        let sources = root.join("tests/peers");
        if selected.contains(&Contestant::Rust) {
            let mut cargo = Command::new(env!("CARGO"));
            cargo.args(["build", "--release", "--locked", "--quiet"]);
            cargo.arg("--manifest-path");
            cargo.arg(sources.join("rust/Cargo.toml"));
            run(cargo.arg("--target-dir").arg(&built));
        }
        // go-libp2p is the client as well.
        let mut go = Command::new("go");
        go.current_dir(sources.join("go"));
        run(go.args(["build", "-o"]).arg(built.join("go-libp2p")));
        let all = RELAYLET_FLAGS.split_whitespace();
        let flags = all.chain(flags.split_whitespace()).map(str::to_owned);
        Self { flags: flags.collect(), built }
    }

    /// go-libp2p as a relay; with arguments as a client.
    pub fn go(&self) -> Command {
        Command::new(self.built.join("go-libp2p"))
    }

    /// Starts a new process.
    pub fn start(&self, contestant: Contestant) -> Relay {
        self.start_with(contestant, &[])
    }

    /// As [`Contestants::start`], with these additional flags for relaylet.
    pub fn start_with(&self, contestant: Contestant, flags: &[String]) -> Relay {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let mut command = match contestant {
            Contestant::Relaylet => {
                let mut command = common::command(&folder);
                command.args(&self.flags).args(flags).env("RUST_LOG", "error");
                command
            }
            Contestant::Rust => Command::new(self.built.join("release/rust-libp2p-relay")),
            Contestant::Go => self.go(),
        };
        // As many as relaylet's default.
        let cores = thread::available_parallelism().map_or(1, usize::from);
        let threads = (cores / 2).max(1).to_string();
        command.env("TOKIO_WORKER_THREADS", &threads).env("GOMAXPROCS", &threads);
        Relay::run(command, folder)
    }
}

fn run(command: &mut Command) {
    let status = command.status();
    let status = status.unwrap_or_else(|error| panic!("{command:?} cannot be run: {error}"));
    assert!(status.success(), "{command:?} failed");
}

/// A running relay.
pub struct Relay {
    pub process: Process,
    pub address: Multiaddr,
    _folder: TempDir,
}

impl Relay {
    /// Runs this command in `folder`.
    pub fn run(mut command: Command, folder: TempDir) -> Self {
        command.current_dir(folder.path());
        let mut process = Process::start(command);
        Self { address: process.listen_address(), process, _folder: folder }
    }
}
