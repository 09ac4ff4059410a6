//! Many circuits at once, all of them carrying.

use std::time::Instant;

use libp2p::{
    Stream,
    futures::{AsyncReadExt, AsyncWriteExt, future},
    identity::Keypair,
    yamux,
};
use tokio::task::JoinSet;

use super::{relay::Watched, table::Table};
use crate::common::{Client, STOP, Security, circuit_to, within};

/// What is written and read at a time.
const PIECE: usize = 64 * 1024;

/// A column of the table: so many circuits, shared out among so many pairs of peers, each of which
/// carries so many bytes.
pub async fn measure(circuits: usize, pairs: usize, bytes: usize, flags: &str, table: &mut Table) {
    let relay = Watched::start(flags);
    let process = &relay.relay.process;
    let connecting = (0..pairs).map(|_| async {
        let client = || {
            let keypair = Keypair::generate_ed25519();
            Client::connect_with(keypair, &relay.relay.address, Security::Noise, wide)
        };
        let (source, mut target) = (client().await, client().await);
        target.reserve().await;
        (source, target)
    });
    let mut clients = future::join_all(connecting).await;
    relay.spent();
    let without = process.resident();

    let opening = clients.iter_mut().map(|(source, target)| async {
        let mut stops = target.accept(STOP);
        let mut open = Vec::new();
        for _ in 0..circuits / pairs {
            open.push(circuit_to(source, target.peer, &mut stops).await);
        }
        open
    });
    let open = future::join_all(opening).await;
    relay.spent();
    let each = (process.resident() as f64 - without as f64) / circuits as f64;
    table.add("resident memory for an open circuit, KiB", each);

    let (before, start) = (process.cpu(), Instant::now());
    let mut ends = JoinSet::new();
    for (number, (source, target)) in open.into_iter().flatten().enumerate() {
        // Every other one carries the other way.
        let (from, to) = match number % 2 {
            0 => (source, target),
            _ => (target, source),
        };
        ends.spawn(say(from, number, bytes));
        ends.spawn(hear(to, number, bytes));
    }
    ends.join_all().await;
    let (took, gigabytes) = (start.elapsed(), (circuits * bytes) as f64 / 1e9);
    let spent = (process.cpu() - before) as f64 / 1e9;
    table.add("MB a second, in all", gigabytes * 1e3 / took.as_secs_f64());
    table.add("CPU of the relay for a GB, s", spent / gigabytes);
    table.add("resident memory at its peak, MiB", process.peak() as f64 / 1024.0);
}

/// Room for all circuits on one connection: by default there would be 512 streams.
fn wide() -> yamux::Config {
    let mut config = yamux::Config::default();
    config.set_max_num_streams(2048);
    config
}

/// What a circuit carries: all bytes in turn, each circuit from a byte of its own on.
fn bytes_of(circuit: usize) -> Vec<u8> {
    (0..PIECE).map(|at| (circuit + at) as u8).collect()
}

/// Says all that the circuit is to carry, and closes it.
async fn say(mut stream: Stream, circuit: usize, bytes: usize) {
    let piece = bytes_of(circuit);
    for _ in 0..bytes / PIECE {
        within(stream.write_all(&piece)).await.expect("it is read");
    }
    within(stream.close()).await.expect("it is read");
    let end = within(stream.read(&mut [0])).await;
    assert_eq!(end.expect("a clean end"), 0);
}

/// Hears all of it, byte for byte, and closes the circuit.
async fn hear(mut stream: Stream, circuit: usize, bytes: usize) {
    let expected = bytes_of(circuit);
    let mut piece = vec![0; PIECE];
    for _ in 0..bytes / PIECE {
        within(stream.read_exact(&mut piece)).await.expect("it is said");
        assert!(piece == expected, "circuit {circuit} carries what was said");
    }
    let end = within(stream.read(&mut piece)).await;
    assert_eq!(end.expect("a clean end"), 0);
    within(stream.close()).await.expect("the other end is there");
}
