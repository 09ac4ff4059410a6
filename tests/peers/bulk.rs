//! A gigabyte through four circuits, each between two peers of its own.

use std::process::Command;

use libp2p::{
    Multiaddr, Stream,
    futures::{AsyncReadExt, AsyncWriteExt, future},
    identity::Keypair,
};

use super::contestants::Relay;
use crate::common::{Client, Security, children::Process, circuit};

const CIRCUITS: u64 = 4;

/// What is handed to the stream, and asked of it, at a time.
const PIECE: usize = 64 * 1024;

/// Pages are touched and windows have grown by then.
const WARM_UP: u64 = 16 * 1024 * 1024;

/// The relay's CPU seconds for a gigabyte between the peers of this client.
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
    client.says("ready");
    let mut carry = |bytes: u64| {
        client.hears(&(bytes / CIRCUITS).to_string());
        client.says("carried");
    };
    carry(WARM_UP);
    let before = relay.process.cpu();
    carry(bytes);
    let spent = relay.process.cpu() - before;
    spent as f64 / bytes as f64
}

/// Two peers and a circuit between them.
pub struct Pair {
    source: Stream,
    target: Stream,
    clients: [Client; 2],
}

/// Two new peers, connected through the relay.
pub async fn pair(relay: &Multiaddr, security: Security) -> Pair {
    let client = || Client::connect_as(Keypair::generate_ed25519(), relay, security);
    let (mut source, mut target) = (client().await, client().await);
    target.reserve().await;
    let (from, to) = circuit(&mut source, &mut target).await;
    Pair { source: from, target: to, clients: [source, target] }
}

impl Pair {
    /// Both ends of the circuit, and who has to stay for it to last.
    pub fn apart(self) -> (Stream, Stream, [Client; 2]) {
        (self.source, self.target, self.clients)
    }

    /// Carries so many bytes from the source to the target.
    pub async fn carry(&mut self, bytes: u64) {
        let (source, target) = (&mut self.source, &mut self.target);
        let write = async {
            let piece = vec![7; PIECE];
            let mut left = bytes;
            while left > 0 {
                let next = left.min(PIECE as u64) as usize;
                source.write_all(&piece[..next]).await.expect("it is read");
                left -= next as u64;
            }
            source.flush().await.expect("it is read");
        };
        let read = async {
            let mut piece = vec![0; PIECE];
            let mut left = bytes;
            while left > 0 {
                let read = target.read(&mut piece).await.expect("it is written");
                assert_ne!(read, 0, "the circuit ended early");
                left -= read as u64;
            }
        };
        future::join(write, read).await;
    }
}
