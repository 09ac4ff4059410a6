//! Circuits that are opened and closed, one after another, between a few pairs.

use libp2p::{
    Stream,
    futures::{AsyncReadExt, AsyncWriteExt, future},
};

use super::contestants::Relay;
use crate::common::{STOP, circuit_to, source_and_target_at, within};

const PAIRS: u64 = 4;

/// The relay's CPU milliseconds per circuit.
pub async fn milliseconds_per_circuit(relay: &Relay, circuits: u64) -> f64 {
    let clients = (0..PAIRS).map(|_| source_and_target_at(&relay.address));
    let mut clients = future::join_all(clients).await;
    let before = relay.process.cpu();
    let all = clients.iter_mut().map(|(source, target)| async {
        let mut stops = target.accept(STOP);
        for _ in 0..circuits / PAIRS {
            let (from, to) = circuit_to(source, target.peer, &mut stops).await;
            future::join(end(from), end(to)).await;
        }
    });
    future::join_all(all).await;
    (relay.process.cpu() - before) as f64 / 1e6 / circuits as f64
}

/// Closes a stream, and waits until the other end has closed it, too.
async fn end(mut stream: Stream) {
    within(stream.close()).await.expect("the stream is closed");
    let read = within(stream.read(&mut [0])).await;
    assert_eq!(read.expect("a clean end"), 0);
}
