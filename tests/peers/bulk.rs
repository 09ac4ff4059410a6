//! Bulk transfer through four circuits, each between two peers of its own.

use std::process::Command;

use libp2p::{
    Multiaddr, Stream,
    futures::{AsyncReadExt, AsyncWriteExt, future},
    identity::Keypair,
};

use super::contestants::Relay;
use crate::common::{Client, Security, child_process::Process, circuit};

const CIRCUITS: u64 = 4;

/// How many bytes are read or written at a time.
const CHUNK: usize = 64 * 1024;

/// After this many bytes all pages are touched and windows have grown.
const WARM_UP: u64 = 16 * 1024 * 1024;

/// The relay's CPU seconds per gigabyte between the peers of this client.
pub fn seconds_per_gigabyte(
    relay: &Relay,
    mut client: Command,
    security: Security,
    bytes: u64,
) -> f64 {
    let security = match security {
        Security::Noise => "noise",
        Security::Tls => "tls",
    };
    client.args([&relay.address.to_string(), security, &CIRCUITS.to_string()]);
    let mut client = Process::start(client);
    client.read_value("ready");
    let mut transfer = |bytes: u64| {
        client.write_line(&(bytes / CIRCUITS).to_string());
        client.read_value("carried");
    };
    transfer(WARM_UP);
    let before = relay.process.cpu();
    transfer(bytes);
    let spent = relay.process.cpu() - before;
    spent as f64 / bytes as f64
}

/// Two peers and a circuit between them.
pub struct Pair {
    source: Stream,
    target: Stream,
    clients: [Client; 2],
}

/// Connects two new peers through the relay.
pub async fn pair(relay: &Multiaddr, security: Security) -> Pair {
    let client = || Client::connect_as(Keypair::generate_ed25519(), relay, security);
    let (mut source, mut target) = (client().await, client().await);
    target.reserve().await;
    let (from, to) = circuit(&mut source, &mut target).await;
    Pair { source: from, target: to, clients: [source, target] }
}

impl Pair {
    /// Both ends of the circuit, and its clients, which must not be dropped before it.
    pub fn into_parts(self) -> (Stream, Stream, [Client; 2]) {
        (self.source, self.target, self.clients)
    }

    /// Transfers this many bytes from the source to the target.
    pub async fn transfer(&mut self, bytes: u64) {
        let (source, target) = (&mut self.source, &mut self.target);
        let write = async {
            let chunk = vec![7; CHUNK];
            let mut remaining = bytes;
            while remaining > 0 {
                let next = remaining.min(CHUNK as u64) as usize;
                source.write_all(&chunk[..next]).await.expect("the circuit is open");
                remaining -= next as u64;
            }
            source.flush().await.expect("the circuit is open");
        };
        let read = async {
            let mut chunk = vec![0; CHUNK];
            let mut remaining = bytes;
            while remaining > 0 {
                let read = target.read(&mut chunk).await.expect("the circuit is open");
                assert_ne!(read, 0, "the circuit ended early");
                remaining -= read as u64;
            }
        };
        future::join(write, read).await;
    }
}
