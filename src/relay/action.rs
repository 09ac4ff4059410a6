//! What the relay decides, as values: carried out by the owner of the connections.

use std::time::{Duration, Instant};

use libp2p::{PeerId, futures::channel::oneshot};

use super::{
    accounts::Counters,
    bandwidth::Link,
    connections::{End, PendingRequest},
    reservations::Receipt,
};
use crate::{
    access::Permission,
    event::{CircuitId, Event},
    wire::{Limit, Status},
};

/// Something to do. `R` is the reply handle of a request.
#[derive(Debug)]
pub enum Action<C, R> {
    /// Answer a RESERVE with OK. Then report whether the answer arrived, or that it could not be signed:
    /// [`Relay::on_delivered`](super::Relay::on_delivered), [`Relay::on_sign_failed`](super::Relay::on_sign_failed).
    Grant {
        /// The request.
        request: PendingRequest<C, R>,
        /// Identifies the answer.
        receipt: Receipt,
        /// The limits of circuits to the peer.
        limit: Limit,
        /// When the reservation's term ends.
        expires: Instant,
    },
    /// Await a [`Permission::Later`], and report the answer: [`Relay::on_access_checked`](super::Relay::on_access_checked).
    CheckAccess(AccessCheck<C, R>, Permission),
    /// Answer a request with a status other than OK.
    Refuse(R, Status),
    /// Ask `target` on a stop stream whether it accepts a circuit, and report its answer over this connection:
    /// [`Relay::on_target_answered`](super::Relay::on_target_answered).
    ///
    /// The end is the target's, with the connection of its reservation, or another one if it did not answer over that.
    AskTarget(End<C>, Box<CircuitParameters>),
    /// Probe the peer, and wait this long for the answer.
    Probe(End<C>, Duration),
    /// Keep the connection while it holds a reservation; `false`: it holds none any more.
    Hold(End<C>, bool),
    /// Close a connection.
    Close(End<C>),
    /// Report an event to the embedder.
    Report(Event),
}

/// What is allowed or denied by an answer that comes later.
#[derive(Debug)]
pub enum AccessCheck<C, R> {
    /// A request, and how often the rules had changed when it came.
    Request(PendingRequest<C, R>, u64),
    /// The slot of a peer.
    Slot(PeerId),
    /// A circuit that is open or being set up.
    Circuit(CircuitId),
}

/// What the tasks of one circuit need: its source and target, its limits, and its byte counters.
#[derive(Debug)]
pub struct CircuitParameters {
    /// The circuit.
    pub id: CircuitId,
    /// When it was admitted.
    pub since: Instant,
    /// The limits, as told to both peers.
    pub limit: Limit,
    /// The link whose bandwidth it shares with the other circuits.
    pub link: Link,
    /// Its source and its target.
    pub ends: [PeerId; 2],
    /// Counts the bytes that it carries.
    pub counters: Counters,
    /// Is cancelled when the relay ends it, or asks the target over another connection.
    pub ended: oneshot::Receiver<()>,
}
