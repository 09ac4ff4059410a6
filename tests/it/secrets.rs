//! The relay's secret keys: in its memory, and on the disk.

use std::{
    fs::{self, File},
    os::unix::fs::FileExt,
};

use crate::common::{
    Client, Relay, Security, command,
    websocket::{CERTIFICATE, Certificate, LISTEN_TLS},
};
use libp2p::{identity::Keypair, pnet::PreSharedKey};
use tempfile::TempDir;

/// The allocator overwrites the first bytes of freed memory with its lists.
const OVERWRITTEN: usize = 20;

/// How many bytes rule out a coincidence. Of the identity they end within the secret number, so that a copy of that alone
/// is found, too.
const ENOUGH: usize = 16;

#[tokio::test]
async fn key_file_contents_are_wiped_from_memory() {
    let folder = TempDir::new().unwrap();
    // An ECDSA key has another byte order in memory than in the file; an Ed25519 key has the same, so that the live key
    // would be found.
    let identity = Keypair::generate_ecdsa().to_protobuf_encoding().unwrap();
    let swarm_key = PreSharedKey::new(std::array::from_fn(|at| at as u8)).to_key_file();
    let certificate = Certificate::new();
    fs::write(folder.path().join("relaylet.key"), &identity).unwrap();
    fs::write(folder.path().join("swarm.key"), &swarm_key).unwrap();
    certificate.write(folder.path());
    let mut flags = vec![LISTEN_TLS, "--swarm-key=swarm.key"];
    flags.extend(CERTIFICATE);
    let relay = Relay::start_in(folder, &flags);
    // With the line break: the PEM decoder, a library, keeps a copy without line breaks.
    let pem = certificate.key.find("KEY-----\n").unwrap();
    for (name, file) in [
        ("identity", &identity[OVERWRITTEN..]),
        ("swarm key", &swarm_key.as_bytes()[swarm_key.len() - ENOUGH - 8..]),
        ("TLS key", &certificate.key.as_bytes()[pem..]),
    ] {
        let secret = &file[..ENOUGH];
        assert_eq!(count_in_memory(relay.pid(), secret), 0, "{name}");
    }
    // The search itself works: it finds the peer id.
    let peer = relay.peer.to_string();
    assert!(count_in_memory(relay.pid(), peer.as_bytes()) > 0);
}

#[tokio::test]
async fn tls_session_secrets_are_never_logged() {
    let folder = TempDir::new().unwrap();
    let file = folder.path().join("sessions");
    let mut command = command(&folder);
    command.args(["--listen", "/ip4/127.0.0.1/tcp/0"]).env("SSLKEYLOGFILE", &file);
    let relay = Relay::run(command, folder);
    let mut client =
        Client::connect_as(Keypair::generate_ed25519(), &relay.address, Security::Tls).await;
    client.reserve().await;
    assert!(!file.exists());
}

/// How often these bytes occur in the writable memory of a process.
fn count_in_memory(pid: u32, wanted: &[u8]) -> usize {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
    let memory = File::open(format!("/proc/{pid}/mem")).expect("the right to trace a child");
    let regions = maps.lines().filter_map(|line| {
        let (range, rest) = line.split_once(' ')?;
        let (from, to) = range.split_once('-')?;
        let address = |hex| u64::from_str_radix(hex, 16).ok();
        rest.starts_with("rw").then_some((address(from)?, address(to)?))
    });
    let count = |(from, to): (u64, u64)| {
        let mut bytes = vec![0; (to - from) as usize];
        // Some regions belong to the kernel and cannot be read.
        let read = memory.read_exact_at(&mut bytes, from).is_ok();
        let found = |window: &&[u8]| *window == wanted;
        if read { bytes.windows(wanted.len()).filter(found).count() } else { 0 }
    };
    regions.map(count).sum()
}
