//! The sweep: one pass over the tables, and what it found.
//!
//! The behaviour runs it at each sweep interval, and more often while a newcomer waits.

use std::{
    hash::Hash,
    time::{Duration, Instant},
};

use libp2p::PeerId;

use crate::{
    connections::Connections,
    heartbeat::{Beat, Heartbeat},
    reservations::Reservations,
};

/// What a sweep found. The freed slots wait in [`Reservations::take_freed`], as all others do.
#[derive(Debug)]
pub struct Swept<C> {
    /// Connections to close, because they have been idle for too long.
    pub idle: Vec<(PeerId, C)>,
    /// Whom to ask for a sign of life, and who is judged silent.
    pub beat: Beat<C>,
}

/// Ends what is over at `now`, listens to those that are watched, and names the connections that
/// have been idle for `idle_timeout` (zero: none).
pub fn sweep<C: Copy + Eq + Hash>(
    reservations: &mut Reservations<C>,
    connections: &mut Connections<C>,
    heartbeat: &mut Heartbeat,
    idle_timeout: Duration,
    now: Instant,
) -> Swept<C> {
    reservations.end_what_is_over(now);
    connections.listen(now);
    let beat = heartbeat.beat(connections.watched(), now);
    let idle = match idle_timeout.is_zero() {
        true => Vec::new(),
        false => connections.take_idle(idle_timeout, now),
    };
    Swept { idle, beat }
}
