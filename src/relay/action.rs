//! What the relay decides, as values: to be carried out by the owner of the connections.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use libp2p::{PeerId, futures::channel::oneshot};

use super::{
    accounts::Counters,
    bandwidth::{Ends, Link},
    circuits::End,
    connections::Origin,
    reservations::Receipt,
};
use crate::{
    access::Terms,
    event::{CircuitId, Event},
    wire::{Limit, Status},
};

/// Something to be done. `R` is the reply handle of a request.
#[derive(Debug)]
pub enum Action<C, R> {
    /// Answer a RESERVE with OK. Then report whether the answer arrived, or that it could not be signed:
    /// [`crate::relay::Relay::on_delivered`], [`crate::relay::Relay::on_sign_failed`].
    Grant {
        /// The request.
        request: Pending<C, R>,
        /// Names the answer.
        receipt: Receipt,
        /// The limits of circuits to the peer.
        terms: Terms,
        /// When the reservation's term ends.
        expires: Instant,
    },
    /// Answer a request with a status other than OK.
    Refuse(R, Status),
    /// Ask `target` over a stop stream whether it takes a circuit, and report its answer:
    /// [`crate::relay::Relay::on_target_answered`].
    AskTarget {
        /// The peer that is asked, and the connection of its reservation.
        target: End<C>,
        /// The circuit.
        circuit: CircuitId,
        /// The peer that asked for it.
        source: PeerId,
        /// What it may carry.
        limit: Limit,
        /// Is cancelled when the target need not answer any more.
        ended: oneshot::Receiver<()>,
    },
    /// Ask the peer for a sign of life, and wait for it for so long.
    Probe(End<C>, Duration),
    /// Keep the connection while it holds a reservation; `false`: it holds none any more.
    Hold(End<C>, bool),
    /// Close a connection.
    Close(End<C>),
    /// Tell the relay's owner.
    Tell(Event),
}

/// A request that is yet to be answered.
///
/// Dropping its reply handle leaves it unanswered: its stream is reset.
#[derive(Debug)]
pub struct Pending<C, R> {
    /// The peer, and the connection that the request came over.
    pub from: End<C>,
    /// Where that connection comes from.
    pub origin: Arc<Origin>,
    /// Takes the answer.
    pub reply: R,
}

/// What a circuit may carry: what both of its peers were told, and what the others leave it.
#[derive(Debug)]
pub struct CircuitParameters {
    /// As on the wire.
    pub limit: Limit,
    /// The link that it shares with the others.
    pub link: Link,
    /// Its peers, by which that is shared.
    pub ends: Ends,
    /// Where it counts what it carries.
    pub counters: Counters,
    /// Is cancelled when the relay ends it.
    pub ended: oneshot::Receiver<()>,
}
