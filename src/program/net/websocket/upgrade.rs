//! From an accepted connection to an open WebSocket: TLS, the head of the request, the answer.

use std::{io, net::Shutdown, sync::Arc};

use futures_rustls::{TlsAcceptor, rustls::ServerConfig, server::TlsStream};
use libp2p::futures::{
    AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt,
    future::Either,
    io::{copy, sink},
};
use soketto::handshake::{Server, server::Response};

use super::{
    head::{Head, MAX_BYTES, Request},
    stream::WebSocketStream,
};
use crate::program::net::{
    admission::handshake_failure::{Reason, Stage, StageError},
    socket::Socket,
};

/// How many bytes of a head are read at once.
const STEP: usize = 2 * 1024;

/// How many bytes that follow a request are read after it was answered. Closing a socket with unread bytes resets the
/// connection, and the client may lose the answer.
const LINGER: u64 = 256 * 1024;

/// A connection whose request was read and not answered yet.
pub struct PendingUpgrade<S> {
    stream: Either<TlsStream<S>, S>,
    /// The head of the request.
    pub head: Head,
}

impl<S: AsyncRead + AsyncWrite + Send + Unpin + 'static> PendingUpgrade<S> {
    /// Performs the TLS handshake, if there is a configuration for it, and reads the head of the request.
    ///
    /// # Errors
    ///
    /// When TLS fails, or the connection ends within the head.
    pub async fn read(stream: S, tls: Option<Arc<ServerConfig>>) -> io::Result<Self> {
        let mut stream = match tls {
            Some(config) => Either::Left(TlsAcceptor::from(config).accept(stream).await?),
            None => Either::Right(stream),
        };
        let head = read_head(&mut stream).await?;
        Ok(Self { stream, head })
    }

    /// Opens the WebSocket. Answers a request that is no upgrade, and shuts down its connection, whose socket is
    /// `socket`. A health check fails with the reason `not_serving`, if there is one.
    ///
    /// # Errors
    ///
    /// If the request is not a WebSocket upgrade, or the connection ends.
    pub async fn answer(
        self,
        socket: Option<Socket>,
        not_serving: Option<&'static str>,
    ) -> io::Result<WebSocketStream> {
        let Self { mut stream, head } = self;
        let reason = match head.request {
            Request::Upgrade(key) => {
                let mut server = Server::new(stream);
                let accept = Response::Accept { key, protocol: None };
                server.send_response(&accept).await.map_err(io::Error::other)?;
                return Ok(WebSocketStream::new(server.into_inner()));
            }
            Request::Health => Reason::HealthCheck,
            Request::Other | Request::TooLarge => Reason::Http,
            Request::Bad(_) => Reason::Protocol,
        };
        let (status, response) = head.response(not_serving);
        let _ = send_and_close(&mut stream, &response, socket).await; // the client may be gone
        let error = io::Error::other(format!("no WebSocket was asked for: the answer is {status}"));
        Err(StageError::wrap(Stage::WebSocket, Some(reason), error))
    }
}

/// Sends an answer, closes this side, and reads what the client still sends until it closes its own.
async fn send_and_close(
    stream: &mut (impl AsyncRead + AsyncWrite + Unpin),
    response: &[u8],
    socket: Option<Socket>,
) -> io::Result<()> {
    stream.write_all(response).await?;
    stream.close().await?; // flushes, and sends TLS's close_notify; the socket stays open
    let Some(socket) = socket else { return Ok(()) };
    socket.get_ref().shutdown(Shutdown::Write)?;
    copy(stream.take(LINGER), &mut sink()).await.map(drop)
}

/// Reads up to the end of the head. Parses only when the head may be complete, so that one that arrives byte by byte
/// costs no more than another.
async fn read_head(stream: &mut (impl AsyncRead + Unpin)) -> io::Result<Head> {
    let mut bytes = Vec::new();
    loop {
        let before = bytes.len();
        bytes.resize(before + STEP, 0);
        let read = stream.read(bytes.get_mut(before..).unwrap_or_default()).await?;
        bytes.truncate(before + read);
        if read == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        // The first piece is always parsed: most requests arrive in one, and it shows what is not HTTP.
        let new = bytes.get(before.saturating_sub(2)..).unwrap_or_default();
        let may_be_whole = before == 0 || bytes.len() >= MAX_BYTES || has_empty_line(new);
        if may_be_whole && let Some(head) = Head::parse(&bytes) {
            return Ok(head);
        }
    }
}

/// Whether these bytes contain the end of a line and an empty line after it. Lines end with LF, usually after CR.
fn has_empty_line(bytes: &[u8]) -> bool {
    bytes.windows(2).any(|two| two == b"\n\n") || bytes.windows(3).any(|three| three == b"\n\r\n")
}

#[cfg(test)]
mod tests {
    use async_std::task::block_on;
    use libp2p::{core::transport::TransportError, futures::io::Cursor, swarm::ListenError};

    use super::*;
    use crate::program::net::{
        admission::{
            handshake_failure::{HandshakeFailure, HandshakeInfo},
            handshakes::Progress,
        },
        multiaddr::Layer,
    };

    #[test]
    fn the_reason_is_the_request_even_if_the_answer_cannot_be_sent() {
        for (request, reason) in [
            (&b"GET /healthz HTTP/1.1\r\n\r\n"[..], None),
            (b"GET / HTTP/1.1\r\n\r\n", Some("http")),
            (b"\xff\xff", Some("protocol")),
        ] {
            let no_room: &'static mut [u8] = &mut [];
            let (stream, head) = (Either::Right(Cursor::new(no_room)), Head::parse(request));
            let upgrade = PendingUpgrade { stream, head: head.unwrap() };
            let error = block_on(upgrade.answer(None, None)).err().expect("no WebSocket");
            let progress = Progress::default();
            progress.record(request);
            let (layer, is_private) = (Layer::WebSocket, false);
            let known = HandshakeInfo { progress, dropped: None, layer, is_private };
            let error = ListenError::Transport(TransportError::Other(error));
            let failure = HandshakeFailure::of(&error, &known);
            assert_eq!(failure.map(|failure| failure.reason.kind()), reason);
        }
    }
}
