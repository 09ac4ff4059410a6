//! How much memory the relay may come to take, by its limits.
//!
//! What one of each takes was measured: `cargo bench --bench scale` for those that are well behaved,
//! and `tests/ceiling.rs`, which has strangers drive all limits to their edge at once, for the most.

use crate::{
    config::Config,
    program::{mux::stream_limits::StreamLimits, net::admission::limits::Limits},
};

const KIB: u64 = 1024;
const MIB: u64 = 1024 * KIB;

/// The program itself, and what it keeps of what was.
const PROGRAM: u64 = 12 * MIB;

/// What the heap of one thread keeps of what was freed: see `runtime.rs`.
const THREAD: u64 = 8 * MIB;

/// A connection over Noise that has nothing to read or to write, but once had a message of the largest
/// size to read, and a piece to write. One over TLS takes a third of it.
const CONNECTION: u64 = 116 * KIB;

/// What WebSocket takes beside, and its longest message.
#[cfg(feature = "websocket")]
const WEBSOCKET: u64 = 16 * KIB + crate::program::net::websocket::LONGEST_MESSAGE as u64;
#[cfg(not(feature = "websocket"))]
const WEBSOCKET: u64 = 0;

/// A stream, and who negotiates or asks on it.
const STREAM: u64 = 3 * KIB;

/// A circuit beside its source's stream: the target's, and what carries it.
const CIRCUIT: u64 = 3 * KIB;

/// A slot, and what is counted of its peer and its address.
const SLOT: u64 = KIB;

/// What the heap loses to fragmentation, where blocks are of many sizes and come and go: in percent of
/// all else.
///
/// With the default limits all else adds up to 404 MiB. The crowd of `tests/ceiling.rs` once had 328 MiB
/// of that in use, for which the heap took 527 MiB; the most that it took in five runs was 571 MiB.
const LOST: u64 = 60;

/// What the relay was told that memory depends on, beside its configuration.
#[derive(Clone, Copy, Debug)]
pub struct Uses {
    /// How many threads do the work.
    pub threads: usize,
    /// How many connections may be dialed.
    pub dialed: usize,
    /// Whether clients may come over WebSocket.
    pub websocket: bool,
}

/// The most memory that there can be use for, in bytes.
pub fn most(config: &Config, limits: &Limits, streams: &StreamLimits, uses: Uses) -> u64 {
    let connections = limits.max_connections.saturating_add(uses.dialed);
    let places = connections.saturating_add(limits.max_handshakes);
    let connection = CONNECTION + if uses.websocket { WEBSOCKET } else { 0 };
    let all = [
        (1, PROGRAM),
        (uses.threads, THREAD),
        (places, connection),
        (streams.most(places), STREAM),
        (config.max_circuits, CIRCUIT),
        (config.max_reservations, SLOT),
        (streams.buffered(config.max_circuits_per_peer), 1),
    ];
    let sum = all.iter().fold(0_u64, |sum, (count, each)| {
        sum.saturating_add((*count as u64).saturating_mul(*each))
    });
    sum.saturating_add(sum / 100 * LOST)
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALONE: Uses = Uses { threads: 1, dialed: 0, websocket: false };

    fn at_most(uses: Uses) -> u64 {
        most(&Config::default(), &Limits::default(), &StreamLimits::default(), uses)
    }

    #[test]
    fn by_default_it_is_less_than_660_mib() {
        assert!((600 * MIB..660 * MIB).contains(&at_most(ALONE)), "{}", at_most(ALONE));
    }

    #[test]
    fn what_cannot_be_counted_is_too_much() {
        let config =
            Config { max_circuits: usize::MAX, max_reservations: usize::MAX, ..Config::default() };
        let (limits, streams) = (Limits::default(), StreamLimits::default());
        assert_eq!(most(&config, &limits, &streams, ALONE), u64::MAX);
    }
}
