//! What the relay wants done, by whoever has the connections.

use std::time::{Duration, Instant};

use libp2p::PeerId;

use super::{
    accounts::Meter,
    bandwidth::{Ends, Link},
    circuits::End,
    reservations::Receipt,
};
use crate::{
    access::Terms,
    event::{CircuitId, Event},
    wire::{Limit, Status},
};

/// Names a request, for as long as its connection is up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct RequestId(pub u64);

/// Something to be done. `S` stands for a stream to a target; it is passed on unseen.
#[derive(Debug)]
pub enum Order<C, S> {
    /// Answer a RESERVE: it is granted. Then say whether the answer arrived, or that there is none:
    /// [`crate::relay::Relay::answered`], [`crate::relay::Relay::not_signed`].
    Grant(Grant<C>),
    /// Have a connection do this.
    Command(End<C>, Command<S>),
    /// Close a connection.
    Close(End<C>),
    /// Tell the relay's owner.
    Tell(Event),
}

/// A reservation that is to be told to its peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Grant<C> {
    /// Whom.
    pub to: End<C>,
    /// What it asked.
    pub request: RequestId,
    /// Names the answer.
    pub receipt: Receipt,
    /// What circuits to it may carry.
    pub terms: Terms,
    /// When its term ends.
    pub expires: Instant,
}

/// What a circuit may carry: what both of its peers were told, and what the others leave it; and
/// where it says what it has.
#[derive(Debug)]
pub struct Quota {
    /// As on the wire.
    pub limit: Limit,
    /// The link that it shares with the others.
    pub link: Link,
    /// Its peers, by which that is shared.
    pub ends: Ends,
    /// Shows what it has carried so far.
    pub meter: Meter,
}

/// What is asked of a connection.
#[derive(Debug)]
pub enum Command<S> {
    /// Answer a RESERVE with this message, and say whether it arrived.
    Granted(RequestId, Receipt, Vec<u8>),
    /// Answer a request with a status other than OK.
    Refuse(RequestId, Status),
    /// Leave a request unanswered: its stream is reset.
    Drop(RequestId),
    /// Ask the peer whether it takes this circuit.
    AskTarget(CircuitId, PeerId, Limit),
    /// Nobody waits for the answer any more: say so as soon as nothing is left of the question.
    GiveUpAsking(CircuitId),
    /// The target agreed: answer the CONNECT, and let bytes pass.
    OpenCircuit(RequestId, CircuitId, S, Quota),
    /// End a circuit that this connection carries as its source.
    EndCircuit(CircuitId),
    /// Ask the peer for a sign of life, and wait for it for so long.
    AskForSign(Duration),
    /// Whether the connection holds a reservation, and so is to be kept.
    Hold(bool),
}
