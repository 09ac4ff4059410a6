//! Many circuits at once, all of them transferring data.

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

/// How many bytes are read or written at a time.
const CHUNK: usize = 64 * 1024;

/// Measures a column of the table: this many circuits, distributed over this many pairs of peers, each of which
/// transfers this many bytes.
pub async fn measure(circuits: usize, pairs: usize, bytes: usize, flags: &str, table: &mut Table) {
    let relay = Watched::start(flags);
    let process = &relay.relay.process;
    let connecting = (0..pairs).map(|_| async {
        let client = || {
            let keypair = Keypair::generate_ed25519();
            Client::connect_with(keypair, &relay.relay.address, Security::Noise, many_streams)
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
        // Every other circuit transfers in the opposite direction.
        let (from, to) = match number % 2 {
            0 => (source, target),
            _ => (target, source),
        };
        ends.spawn(write_all(from, number, bytes));
        ends.spawn(read_all(to, number, bytes));
    }
    ends.join_all().await;
    let (took, gigabytes) = (start.elapsed(), (circuits * bytes) as f64 / 1e9);
    let spent = (process.cpu() - before) as f64 / 1e9;
    table.add("MB a second, in all", gigabytes * 1e3 / took.as_secs_f64());
    table.add("CPU of the relay for a GB, s", spent / gigabytes);
    table.add("resident memory at its peak, MiB", process.peak() as f64 / 1024.0);
}

/// Windows for all circuits on one connection, and room for more than the default of 512 streams.
fn many_streams() -> yamux::Config {
    let mut config = yamux::Config::default();
    config.set_max_num_streams(2048);
    config
}

/// The bytes of a circuit: all byte values in turn, starting from a different one in each circuit.
fn bytes_of(circuit: usize) -> Vec<u8> {
    (0..CHUNK).map(|at| (circuit + at) as u8).collect()
}

/// Writes all bytes, and closes the stream.
async fn write_all(mut stream: Stream, circuit: usize, bytes: usize) {
    let piece = bytes_of(circuit);
    for _ in 0..bytes / CHUNK {
        within(stream.write_all(&piece)).await.expect("the circuit is open");
    }
    within(stream.close()).await.expect("the circuit is open");
    let end = within(stream.read(&mut [0])).await;
    assert_eq!(end.expect("a clean end"), 0);
}

/// Reads and checks all bytes, and closes the stream.
async fn read_all(mut stream: Stream, circuit: usize, bytes: usize) {
    let expected = bytes_of(circuit);
    let mut piece = vec![0; CHUNK];
    for _ in 0..bytes / CHUNK {
        within(stream.read_exact(&mut piece)).await.expect("the circuit is open");
        assert!(piece == expected, "circuit {circuit}: the received bytes are those sent");
    }
    let end = within(stream.read(&mut piece)).await;
    assert_eq!(end.expect("a clean end"), 0);
    within(stream.close()).await.expect("the other end is there");
}
