//! The target of a circuit asked on a stop stream: does it take this connection?

use std::{io, pin::pin, time::Duration};

use libp2p::{
    core::upgrade::NegotiationError,
    futures::{
        AsyncRead, AsyncWrite, AsyncWriteExt,
        future::{self, Either},
    },
};

use super::{
    messages::{HandlerEvent, StopRequest, TrackedStream},
    timer::{Timeout, Timeouts, within},
};
use crate::{
    event::StopFailed,
    wire::{self, BadRequest, FrameError, Status},
};

/// How long the whole exchange may take, from the wish for a stream to the target's answer.
pub(crate) const STOP_TIMEOUT: Duration = Duration::from_secs(30);

impl From<io::Error> for StopFailed {
    fn from(error: io::Error) -> Self {
        // Where the protocol's name went out with the question, its refusal comes as an answer.
        let refusal = error.get_ref().and_then(|cause| cause.downcast_ref());
        match refusal {
            Some(NegotiationError::Failed) => Self::Unsupported,
            _ => Self::Io(error.kind()),
        }
    }
}

impl StopRequest {
    /// Asks over this stream, and reports what the target says.
    pub(crate) async fn ask(self, mut stream: TrackedStream, timeouts: Timeouts) {
        let Self { circuit, source, limit, since, ended, report } = self;
        let timeout = timeouts.start(STOP_TIMEOUT.saturating_sub(since.elapsed()));
        let exchange = exchange(&mut stream, wire::stop_connect(source, limit), timeout);
        let answer = match future::select(pin!(exchange), ended).await {
            Either::Left((answer, _)) => answer,
            Either::Right(_) => Err(StopFailed::Gone),
        };
        let answer = answer.map(|()| Box::new(stream));
        report.send(HandlerEvent::TargetAnswered(circuit, answer));
    }
}

/// Puts `question` to the target and reads its answer, within the limit.
///
/// When it agreed, whatever it sends next already belongs to the circuit and is still unread.
async fn exchange(
    stream: &mut (impl AsyncRead + AsyncWrite + Unpin),
    question: Vec<u8>,
    limit: Timeout,
) -> Result<(), StopFailed> {
    let exchange = async {
        stream.write_all(&question).await?;
        stream.flush().await?;
        let message = match wire::read_frame(stream).await {
            Ok(message) => message,
            Err(FrameError::Malformed(what)) => {
                return Err(StopFailed::Nonsense(BadRequest::Malformed(what)));
            }
            Err(FrameError::Io(error)) => return Err(error.into()),
        };
        match wire::decode_stop_answer(&message).map_err(StopFailed::Nonsense)? {
            status if status == Status::Ok as i32 => Ok(()),
            status => Err(StopFailed::Refused(status)),
        }
    };
    within(limit, exchange).await
}
