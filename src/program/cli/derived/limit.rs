//! The limits that follow from others, by name.

use crate::program::mux::stream_limits::in_kib;

/// 1 KiB, in bytes.
pub const KIB: usize = 1024;

/// A limit that follows from the size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)] // the flags of these names
pub enum Limit {
    Reservations,
    Circuits,
    CircuitsPerPeer,
    Connections,
    Handshakes,
    Streams,
    BufferedPerConnection,
    Buffered,
    Threads,
}

/// All of them, and their flags.
pub const LIMITS: [(Limit, &str); 9] = [
    (Limit::Reservations, "--max-reservations"),
    (Limit::Circuits, "--max-circuits"),
    (Limit::CircuitsPerPeer, "--max-circuits-per-peer"),
    (Limit::Connections, "--max-connections"),
    (Limit::Handshakes, "--max-handshakes"),
    (Limit::Streams, "--max-streams"),
    (Limit::BufferedPerConnection, "--max-buffered-per-connection"),
    (Limit::Buffered, "--max-buffered"),
    (Limit::Threads, "--threads"),
];

impl Limit {
    /// A value as the flag takes it.
    pub fn shown(self, value: usize) -> String {
        match self {
            Self::BufferedPerConnection | Self::Buffered => in_kib(value / KIB),
            _ => value.to_string(),
        }
    }
}

/// The values of all limits, in the order of [`Limit`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Derived(pub [usize; LIMITS.len()]);

impl Derived {
    /// This limit.
    pub fn get(&self, limit: Limit) -> usize {
        self.0.get(limit as usize).copied().unwrap_or_default()
    }
}
