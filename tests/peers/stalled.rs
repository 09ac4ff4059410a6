//! Circuits whose readers have stopped: a relay's memory for each.

use std::time::Duration;

use libp2p::futures::{AsyncWriteExt, future};

use super::contestants::Relay;
use crate::common::{STOP, circuit_to, source_and_target_at};

const PAIRS: usize = 10;
const CIRCUITS: usize = 10;

/// A writer without progress for this long is stalled.
const STALLED: Duration = Duration::from_secs(1);

/// The relay's resident KiB per circuit.
pub async fn kilobytes_per_circuit(relay: &Relay) -> f64 {
    let pairs = (0..PAIRS).map(|_| source_and_target_at(&relay.address));
    let mut pairs = future::join_all(pairs).await;
    let before = relay.process.resident();
    let mut circuits = Vec::new();
    for (source, target) in &mut pairs {
        let mut stops = target.accept(STOP);
        for _ in 0..CIRCUITS {
            circuits.push(circuit_to(source, target.peer, &mut stops).await);
        }
    }
    let writers = circuits.iter_mut().map(|(source, _)| async {
        let piece = [7; 16 * 1024];
        while let Ok(written) = tokio::time::timeout(STALLED, source.write_all(&piece)).await {
            written.expect("the circuit stays");
        }
    });
    future::join_all(writers).await;
    let after = relay.process.resident();
    (after as f64 - before as f64) / (PAIRS * CIRCUITS) as f64
}
