//! A hop stream, from the client's request to the end of what it was granted:
//! [the specification](https://github.com/libp2p/specs/blob/master/relay/circuit-v2.md#hop-protocol), top to bottom.
//!
//! What the answer is comes from the behaviour; here it is only carried.

use std::{io, pin::pin, sync::Arc, time::Duration};

use libp2p::{
    futures::{
        AsyncWrite, AsyncWriteExt,
        channel::oneshot,
        future::{self, Either},
    },
    swarm::ConnectionId,
};

use super::{
    circuit::Circuit,
    inbound::REQUEST_TIMEOUT,
    messages::{Answer, Events, HandlerEvent, Opening, Reply, TrackedStream},
    timer::{Timeouts, within},
};
use crate::{
    event::CircuitEnd,
    relay::circuits::End,
    wire::{self, BadRequest, FrameError},
};

/// How long an answer may take to be written, flushed and, unless a circuit follows, closed.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

/// Serves a hop stream of this client; `permit` is held until its request has been answered.
///
/// # Errors
///
/// When the client sent nothing in time, or the stream failed before the request was read: none is to be
/// answered then. A request that makes no sense is no error here but one to be refused.
pub(crate) async fn serve(
    mut stream: TrackedStream,
    from: End<ConnectionId>,
    events: Events,
    timeouts: Timeouts,
    permit: Arc<()>,
) -> io::Result<()> {
    // 1. Read the request.
    let limit = timeouts.start(REQUEST_TIMEOUT);
    let request = match within(limit, wire::read_frame(&mut stream)).await {
        Ok(message) => wire::decode_request(&message, from.peer),
        Err(FrameError::Malformed(what)) => Err(BadRequest::Malformed(what)),
        Err(FrameError::Io(error)) => return Err(error),
    };
    // 2. Hand it to the relay, and await the reply. Without one, the stream is reset.
    let (sender, reply) = oneshot::channel();
    let _ = events.unbounded_send(HandlerEvent::Requested(from, request, Reply(sender)));
    let Ok(answer) = reply.await else {
        return Ok(());
    };
    // 3. Answer. After a CONNECT that was granted, the stream is the circuit.
    let limit = timeouts.start(ANSWER_TIMEOUT);
    match answer {
        Answer::Refused(status) => within(limit, deliver_all(stream, wire::refusal(status))).await,
        Answer::Reserved(message, receipt) => {
            let delivered = within(limit, deliver_all(stream, message)).await;
            let event = HandlerEvent::Delivered(from.peer, receipt, delivered.is_ok());
            let _ = events.unbounded_send(event);
            delivered
        }
        Answer::Connected(opening) => {
            drop(permit);
            let Opening { circuit, target, mut parameters, report } = *opening;
            // Its time begins now, not when the answer has been sent.
            let deadline = parameters.limit.duration.map(|duration| timeouts.start(duration));
            let answer = deliver(&mut stream, wire::connect_ok(parameters.limit));
            let answered =
                match future::select(pin!(within(limit, answer)), &mut parameters.ended).await {
                    Either::Left((answered, _)) => Some(answered),
                    Either::Right(_) => None,
                };
            let end = match answered {
                Some(Ok(())) => Circuit::new(stream, target, parameters, deadline).await,
                Some(Err(error)) => CircuitEnd::Reset(error.kind()),
                None => CircuitEnd::Ended,
            };
            report.send(HandlerEvent::CircuitEnded(circuit, end));
            Ok(())
        }
    }
}

/// Writes and flushes an answer.
async fn deliver(stream: &mut (impl AsyncWrite + Unpin), message: Vec<u8>) -> io::Result<()> {
    stream.write_all(&message).await?;
    stream.flush().await
}

/// Delivers an answer that ends the exchange: written, flushed and closed.
async fn deliver_all(mut stream: impl AsyncWrite + Unpin, message: Vec<u8>) -> io::Result<()> {
    deliver(&mut stream, message).await?;
    stream.close().await
}
