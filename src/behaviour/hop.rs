//! A client's request on a hop stream: read in, and answered.
//!
//! What the answer is comes from the behaviour; here it is only carried.

use std::{io, time::Duration};

use libp2p::{
    PeerId,
    futures::{AsyncRead, AsyncWrite, AsyncWriteExt},
};

use super::timer::{Timeout, within};
use crate::wire::{self, BadRequest, FrameError, Request};

/// How long an answer may take to be written, flushed and, unless a circuit follows, closed.
pub(crate) const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

/// Reads what the client `from` asks.
///
/// # Errors
///
/// When the client sent nothing within the limit, or the stream failed: then there is
/// nobody to answer. A request that makes no sense is no error here but one to be answered.
pub(crate) async fn read_request(
    stream: &mut (impl AsyncRead + Unpin),
    from: PeerId,
    limit: Timeout,
) -> io::Result<Result<Request, BadRequest>> {
    match within(limit, wire::read_frame(stream)).await? {
        Ok(message) => Ok(wire::decode_request(&message, from)),
        Err(FrameError::Malformed(what)) => Ok(Err(BadRequest::Malformed(what))),
        Err(FrameError::Io(error)) => Err(error),
    }
}

/// Delivers an answer that ends the exchange: written, flushed and closed.
pub(crate) async fn answer(
    mut stream: impl AsyncWrite + Unpin,
    message: Vec<u8>,
    limit: Timeout,
) -> io::Result<()> {
    let deliver = async {
        stream.write_all(&message).await?;
        stream.flush().await?;
        stream.close().await
    };
    within(limit, deliver).await?
}

/// Delivers the answer after which the stream is a circuit, and gives the stream back.
pub(crate) async fn open_circuit<S: AsyncWrite + Unpin>(
    mut stream: S,
    message: Vec<u8>,
    limit: Timeout,
) -> io::Result<S> {
    let deliver = async {
        stream.write_all(&message).await?;
        stream.flush().await
    };
    within(limit, deliver).await??;
    Ok(stream)
}
