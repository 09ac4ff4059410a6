//! Hop and stop streams: the exchanges of
//! [the specification](https://github.com/libp2p/specs/blob/master/relay/circuit-v2.md#hop-protocol), top to bottom, and
//! what passes between their tasks and the behaviour.
//!
//! Commands and events use channels of their own: to deliver a command, the swarm would search the connections of all
//! peers. The channels are unbounded, but a stream sends nothing more until its request has been answered, so the number
//! of queued events is bounded by the number of streams.

use std::{future::poll_fn, io, pin::pin, sync::Arc, task::Poll, time::Duration};

use futures_timer::Delay;
use libp2p::{
    PeerId, Stream,
    core::upgrade::NegotiationError,
    futures::{
        AsyncWriteExt, FutureExt,
        channel::{mpsc, oneshot},
        future::{self, Either},
    },
    swarm::ConnectionId,
};

use super::{
    circuit::{end_of, transfer},
    timer::{Timeouts, within},
};
use crate::{
    access::{ANSWER_TIMEOUT, Permission},
    activity::TrackedStream,
    event::{CircuitEnd, CircuitId, StopFailed},
    relay::{AccessCheck, CircuitParameters, connections::End, reservations::Receipt},
    wire::{self, BadRequest, Request, Status},
};

/// How long a client may take to negotiate the protocol, and then to send its request.
pub(crate) const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);

/// How long an answer may take to be written, flushed and, unless a circuit follows, closed.
const DELIVERY_TIMEOUT: Duration = Duration::from_secs(10);

/// How long the target may take, from the first request for a stream to its answer.
const STOP_TIMEOUT: Duration = Duration::from_secs(30);

/// Sends to the behaviour.
pub type Events = mpsc::UnboundedSender<HandlerEvent>;

/// What the tasks of one connection share.
#[derive(Clone)]
pub struct TaskContext {
    pub(super) end: End<ConnectionId>,
    pub(super) events: Events,
    pub(super) timeouts: Timeouts,
}

/// What a connection's tasks report to the behaviour.
pub enum HandlerEvent {
    /// A request, or why it could not be decoded.
    RequestReceived(End<ConnectionId>, Result<Request, BadRequest>, Reply),
    /// Whether the answer of this receipt arrived.
    Delivered(PeerId, Receipt, bool),
    /// The answer of a circuit's target over this connection: what opens the circuit, or why it did not accept.
    TargetAnswered(CircuitId, ConnectionId, Result<Box<Opening>, StopFailed>),
    /// An open circuit has ended.
    CircuitEnded(CircuitId, CircuitEnd),
}

/// Sends its event when it is dropped, even if the task that owns it is dropped unfinished.
pub struct Report {
    pub(super) event: Option<HandlerEvent>,
    pub(super) events: Events,
}

impl Drop for Report {
    fn drop(&mut self) {
        if let Some(event) = self.event.take() {
            let _ = self.events.unbounded_send(event); // fails once the swarm is dropped
        }
    }
}

/// Takes the answer to one request. Dropping it resets the request's stream.
pub type Reply = oneshot::Sender<Answer>;

/// An access check and its answer, which comes at once.
pub type Decided = (AccessCheck<ConnectionId, Reply>, Permission);

/// The answer to a request.
pub enum Answer {
    /// This message, after which the stream is closed. With a receipt, report whether it arrived.
    Final(Vec<u8>, Option<Receipt>),
    /// OK to a CONNECT, after which the stream is the circuit.
    Open(Box<Opening>),
}

/// A circuit whose target has accepted this stop stream.
pub type Opening = (TrackedStream<Stream>, Box<CircuitParameters>);

/// What the behaviour tells a connection's handler to do.
pub enum HandlerCommand {
    /// Ask the peer on a new stream whether it accepts this circuit.
    Stop(Box<CircuitParameters>),
    /// Probe the peer on a new stream. It has to answer within this time.
    Probe(Duration),
    /// Keep the connection while it holds a reservation.
    Hold(bool),
    /// Accept hop streams, or do not.
    Serve(bool),
}

/// Serves a hop stream of this client; `permit` is held until its request has been answered.
///
/// # Errors
///
/// When the stream failed, or the request did not arrive in time: there is no answer then. A request that cannot be
/// decoded is not an error; it is refused.
pub(crate) async fn serve(
    mut stream: TrackedStream<Stream>,
    TaskContext { end: from, events, timeouts }: TaskContext,
    permit: Arc<()>,
) -> io::Result<()> {
    // 1. Read the request.
    let message = within(timeouts.start(REQUEST_TIMEOUT), wire::read_frame(&mut stream)).await?;
    let request = message.and_then(|message| wire::decode_request(&message, from.peer));
    // 2. Send it to the relay, and await the reply. Without one, the stream is reset.
    let (reply, answer) = oneshot::channel();
    let _ = events.unbounded_send(HandlerEvent::RequestReceived(from, request, reply));
    let Ok(answer) = answer.await else { return Ok(()) };
    // 3. Answer. Unless a circuit follows, report the delivery and end here.
    let timeout = timeouts.start(DELIVERY_TIMEOUT);
    let (target, mut parameters) = match answer {
        Answer::Open(opening) => *opening,
        Answer::Final(message, receipt) => {
            let delivery = async {
                wire::write_frame(&mut stream, &message).await?;
                stream.close().await
            };
            let delivered = within(timeout, delivery).await;
            if let Some(receipt) = receipt {
                let event = HandlerEvent::Delivered(from.peer, receipt, delivered.is_ok());
                let _ = events.unbounded_send(event);
            }
            return delivered;
        }
    };
    drop(permit);
    let circuit = parameters.id;
    let event = HandlerEvent::CircuitEnded(circuit, CircuitEnd::Disconnected);
    let mut report = Report { event: Some(event), events };
    // The time limit of a circuit begins before its answer is delivered.
    let deadline = parameters.limit.duration.map(|duration| timeouts.start(duration));
    let message = wire::answer(Status::Ok, parameters.limit, None);
    let delivery = within(timeout, wire::write_frame(&mut stream, &message));
    let delivered = match future::select(pin!(delivery), &mut parameters.ended).await {
        Either::Left((delivered, _)) => delivered.map_err(end_of),
        Either::Right(_) => Err(CircuitEnd::Disconnected),
    };
    // 4. Transfer the bytes of the circuit.
    let end = match delivered {
        Ok(()) => transfer(stream, target, parameters, deadline).await,
        Err(end) => end,
    };
    report.event = Some(HandlerEvent::CircuitEnded(circuit, end));
    Ok(())
}

impl From<io::Error> for StopFailed {
    fn from(error: io::Error) -> Self {
        // With V1Lazy negotiation, the target's refusal of the protocol arrives instead of its answer.
        match error.get_ref().and_then(|cause| cause.downcast_ref()) {
            Some(NegotiationError::Failed) => Self::Unsupported,
            _ => Self::Io(error.kind()),
        }
    }
}

/// How much of [`STOP_TIMEOUT`] is left for this circuit.
pub(crate) fn time_left(parameters: &CircuitParameters) -> Duration {
    STOP_TIMEOUT.saturating_sub(parameters.since.elapsed())
}

/// Asks the target on this stream whether it accepts a circuit, and reports its answer; if there is none, that it is gone.
///
/// After it agreed, what the target sends belongs to the circuit: nothing beyond the answer is read.
pub(crate) async fn ask(
    mut stream: TrackedStream<Stream>,
    TaskContext { end, events, timeouts }: TaskContext,
    mut parameters: Box<CircuitParameters>,
) {
    let (circuit, [source, _], limit) = (parameters.id, parameters.ends, parameters.limit);
    let answered = |answer| Some(HandlerEvent::TargetAnswered(circuit, end.connection, answer));
    let mut report = Report { event: answered(Err(StopFailed::Gone)), events };
    let timeout = timeouts.start(time_left(&parameters));
    let exchange = async {
        wire::write_frame(&mut stream, &wire::stop_connect(source, limit)).await?;
        let message = wire::read_frame(&mut stream).await?;
        let status = message.and_then(|message| wire::decode_stop_answer(&message));
        match status.map_err(StopFailed::Nonsense)? {
            status if status == Status::Ok as i32 => Ok(()),
            status => Err(StopFailed::Refused(status)),
        }
    };
    // Polled first: on a stream that took long to open, a circuit that has ended is not asked about.
    let ended = &mut parameters.ended;
    let answer = match future::select(ended, pin!(within(timeout, exchange))).await {
        Either::Left(_) => Err(StopFailed::Gone),
        Either::Right((answer, _)) => answer,
    };
    report.event = answered(answer.map(|()| Box::new((stream, parameters))));
}

/// Awaits the answer to a check for [`ANSWER_TIMEOUT`]; then it is [`Permission::Deny`]. `None`: the client is gone.
pub(crate) async fn decide(
    mut check: AccessCheck<ConnectionId, Reply>,
    mut permission: Permission,
) -> Option<Decided> {
    let answer = async {
        while let Permission::Later(answer) = permission {
            permission = answer.await;
        }
        permission
    };
    let gone = poll_fn(|cx| match &mut check {
        AccessCheck::Request(request, _) => request.reply.poll_canceled(cx),
        _ => Poll::Pending,
    });
    let denied = Delay::new(ANSWER_TIMEOUT).map(|()| {
        log::debug!("access denied: no answer within the time limit");
        Permission::Deny
    });
    let permission = match future::select(gone, future::select(pin!(answer), denied)).await {
        Either::Left(_) => return None,
        Either::Right((first, _)) => first.factor_first().0,
    };
    Some((check, permission))
}
