//! The sweep: one pass over the tables, and what it found.
//!
//! The behaviour runs it at each sweep interval. Nothing else cleans up.

use std::{
    hash::Hash,
    time::{Duration, Instant},
};

use libp2p::PeerId;

use crate::{connections::Connections, reservations::Reservations};

/// Ends what is over at `now`, and names the connections to close: those that have been idle for
/// `idle_timeout` (zero: none).
///
/// The freed slots wait in [`Reservations::take_freed`], as all others do.
pub fn sweep<C: Copy + Eq + Hash>(
    reservations: &mut Reservations<C>,
    connections: &mut Connections<C>,
    idle_timeout: Duration,
    now: Instant,
) -> Vec<(PeerId, C)> {
    reservations.end_what_is_over(now);
    if idle_timeout.is_zero() {
        return Vec::new();
    }
    connections.take_idle(idle_timeout, now)
}
