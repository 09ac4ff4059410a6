//! What becomes of the relay's keys: in its memory, and on the disk.

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

/// The first bytes of freed memory are the allocator's, which writes its lists there.
const OF_THE_ALLOCATOR: usize = 20;

/// How many bytes make a coincidence impossible.
const ENOUGH: usize = 24;

#[tokio::test]
async fn what_was_read_from_key_files_is_not_left_in_memory() {
    let folder = TempDir::new().unwrap();
    // In memory the scalar of such a key has its bytes in another order than in the file. An Ed25519
    // key is the same in both.
    let identity = Keypair::generate_ecdsa().to_protobuf_encoding().unwrap();
    let swarm_key = PreSharedKey::new(std::array::from_fn(|at| at as u8)).to_key_file();
    let certificate = Certificate::new();
    fs::write(folder.path().join("relaylet.key"), &identity).unwrap();
    fs::write(folder.path().join("swarm.key"), &swarm_key).unwrap();
    certificate.write(folder.path());
    let mut flags = vec![LISTEN_TLS, "--swarm-key=swarm.key"];
    flags.extend(CERTIFICATE);
    let relay = Relay::start_in(folder, &flags);
    // With a line break: the decoder of PEM, which is a library's, leaves the text without any.
    let pem = certificate.key.find("KEY-----\n").unwrap();
    for (name, file) in [
        ("identity", &identity[OF_THE_ALLOCATOR..]),
        ("swarm key", &swarm_key.as_bytes()[swarm_key.len() - ENOUGH - 8..]),
        ("TLS key", &certificate.key.as_bytes()[pem..]),
    ] {
        let secret = &file[..ENOUGH];
        assert_eq!(count_in_memory(relay.pid(), secret), 0, "{name}");
    }
    // It is the right memory that is looked at.
    let peer = relay.peer.to_string();
    assert!(count_in_memory(relay.pid(), peer.as_bytes()) > 0);
}

#[tokio::test]
async fn the_secrets_of_tls_sessions_are_never_written() {
    let folder = TempDir::new().unwrap();
    let file = folder.path().join("sessions");
    let mut command = command(&folder);
    // Behind the name of the program: it is executed anew with the same arguments.
    command.args(["--listen", "/ip4/127.0.0.1/tcp/0", "--max-reservations=7"]);
    command.env("SSLKEYLOGFILE", &file);
    let mut relay = Relay::run(command, folder);
    let mut client =
        Client::connect_as(Keypair::generate_ed25519(), &relay.address, Security::Tls).await;
    client.reserve().await;
    assert!(!file.exists());
    // It is the same process: a service manager goes on watching it.
    assert!(relay.runs());
    relay.wait_for_log("relays for anyone: 7 slots").await;
    let environment = fs::read(format!("/proc/{}/environ", relay.pid())).unwrap();
    assert!(!String::from_utf8_lossy(&environment).contains("SSLKEYLOGFILE"));
}

/// How often these bytes stand in the memory that a process can write to.
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
        // Some regions are the kernel's.
        let read = memory.read_exact_at(&mut bytes, from).is_ok();
        let found = |window: &&[u8]| *window == wanted;
        if read { bytes.windows(wanted.len()).filter(found).count() } else { 0 }
    };
    regions.map(count).sum()
}
