//! What passes between the tasks of the connections and the behaviour.
//!
//! Commands and events go over channels of our own: to deliver a command, the swarm would search the connections of
//! all peers. The channels are unbounded, but a stream sends nothing more until its request has been answered, so
//! the number of queued events is bounded by the number of streams.

use std::time::{Duration, Instant};

use libp2p::{
    PeerId, Stream,
    futures::channel::{mpsc, oneshot},
    swarm::ConnectionId,
};

use crate::{
    activity::Heard,
    event::{CircuitEnd, CircuitId, StopFailed},
    relay::{CircuitParameters, circuits::End, reservations::Receipt},
    wire::{BadRequest, Limit, Request, Status},
};

/// A stream whose received bytes, and whose end, count as activity of its peer.
pub type TrackedStream = Heard<Stream>;

/// To the behaviour.
pub type Events = mpsc::UnboundedSender<HandlerEvent>;

/// What a connection's tasks report to the behaviour.
#[derive(Debug)]
pub enum HandlerEvent {
    /// A request, or why it could not be decoded.
    Requested(End<ConnectionId>, Result<Request, BadRequest>, Reply),
    /// Whether the answer of this receipt arrived.
    Delivered(PeerId, Receipt, bool),
    /// The answer of a circuit's target: the accepted stop stream, or why there is none.
    TargetAnswered(CircuitId, Result<Box<TrackedStream>, StopFailed>),
    /// An open circuit has ended.
    CircuitEnded(CircuitId, CircuitEnd),
}

/// Sends its event when it is dropped: also when the task that owns it is dropped unfinished.
#[derive(Debug)]
pub struct Report {
    event: Option<HandlerEvent>,
    events: Events,
}

impl Report {
    pub(crate) fn new(event: HandlerEvent, events: Events) -> Self {
        Self { event: Some(event), events }
    }

    /// Sends this event instead.
    pub(crate) fn send(mut self, event: HandlerEvent) {
        self.event = Some(event);
    }
}

impl Drop for Report {
    fn drop(&mut self) {
        if let Some(event) = self.event.take() {
            let _ = self.events.unbounded_send(event); // or the whole swarm is gone
        }
    }
}

/// Takes the answer to one request. Dropping it resets the request's stream.
#[derive(Debug)]
pub struct Reply(pub(crate) oneshot::Sender<Answer>);

/// The answer to a request.
#[derive(Debug)]
pub enum Answer {
    /// To a RESERVE: OK, in this message. Whether it arrives is to be reported.
    Reserved(Vec<u8>, Receipt),
    /// To a CONNECT: OK. Then the stream is the circuit.
    Connected(Box<Opening>),
    /// To any request: it is refused.
    Refused(Status),
}

/// A circuit that is to be opened.
#[derive(Debug)]
pub struct Opening {
    pub(crate) circuit: CircuitId,
    pub(crate) target: TrackedStream,
    pub(crate) parameters: CircuitParameters,
    /// Reports that it has ended.
    pub(crate) report: Report,
}

/// What the behaviour asks of a connection.
#[derive(Debug)]
pub enum HandlerCommand {
    /// Open a stream, for this.
    Open(Outbound),
    /// Keep the connection while it holds a reservation.
    Hold(bool),
}

/// What a stream is opened for.
#[derive(Debug)]
pub enum Outbound {
    /// Asks the peer whether it accepts a circuit.
    Stop(Box<StopRequest>),
    /// Probes the peer, which has to answer within this time.
    Probe(Duration),
}

/// A circuit that the target is to be asked for.
#[derive(Debug)]
pub struct StopRequest {
    pub(crate) circuit: CircuitId,
    pub(crate) source: PeerId,
    pub(crate) limit: Limit,
    pub(crate) since: Instant,
    /// Is cancelled when the relay ends the circuit.
    pub(crate) ended: oneshot::Receiver<()>,
    /// Reports the target's answer; if there is none, that the target is gone.
    pub(crate) report: Report,
}
