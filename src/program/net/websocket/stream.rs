//! A WebSocket as a stream of bytes: each write is one binary message.
//!
//! Does the same as libp2p-websocket, also on soketto. That crate has no public constructor for a connection, so its
//! users cannot read the HTTP request that opened the WebSocket.

use std::{
    io, mem,
    pin::Pin,
    task::{Context, Poll, ready},
};

use libp2p::futures::{
    AsyncRead, AsyncWrite, Sink, StreamExt, TryStreamExt, sink,
    stream::{self, BoxStream, IntoAsyncRead},
};
use soketto::{
    Incoming,
    connection::{Builder, Error, Mode, Receiver},
};

/// The longest message that is read, in bytes.
///
/// It takes that much memory as soon as it is announced, which any client may do. The longest that
/// clients send is rust-libp2p's, 192 KiB: all that its Noise has gathered before it writes. go- and
/// js-libp2p send each message of Noise, or each record of TLS, by itself: 64 KiB.
pub const LONGEST_MESSAGE: usize = 256 * 1024;

/// An open WebSocket. Its end and a failure can be read several times.
pub struct WebSocketStream {
    reader: IntoAsyncRead<BoxStream<'static, io::Result<Vec<u8>>>>,
    /// Performs one operation at a time. soketto's sender has asynchronous methods, and no polled ones.
    writer: Pin<Box<dyn Sink<Operation, Error = io::Error> + Send>>,
    is_flushed: bool,
    is_closed: bool,
    has_failed: bool,
}

/// What soketto's sender is to do.
enum Operation {
    Send(Vec<u8>),
    Flush,
    Close,
}

impl WebSocketStream {
    /// The server's side of a connection whose upgrade was answered.
    pub fn new<S: AsyncRead + AsyncWrite + Send + Unpin + 'static>(connection: S) -> Self {
        Self::build(Builder::new(connection, Mode::Server))
    }

    /// The client's side: asks the server at `host` for a WebSocket, and reads the answer.
    ///
    /// # Errors
    ///
    /// When it answers otherwise.
    #[cfg(feature = "check")]
    pub async fn connect<S>(connection: S, host: &str, path: &str) -> io::Result<Self>
    where
        S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        use soketto::handshake::{Client, ServerResponse};

        let mut client = Client::new(connection, host, path);
        let status = match client.handshake().await.map_err(io::Error::other)? {
            ServerResponse::Accepted { .. } => return Ok(Self::build(client.into_builder())),
            ServerResponse::Redirect { status_code, .. } => status_code,
            ServerResponse::Rejected { status_code } => status_code,
        };
        Err(io::Error::other(format!("the server answers the upgrade with HTTP {status}")))
    }

    fn build<S: AsyncRead + AsyncWrite + Send + Unpin + 'static>(mut builder: Builder<S>) -> Self {
        builder.set_max_message_size(LONGEST_MESSAGE);
        builder.set_max_frame_size(LONGEST_MESSAGE);
        let (sender, receiver) = builder.finish();
        let messages = stream::unfold(receiver, |mut receiver| async {
            let message = next_message(&mut receiver).await?;
            Some((message, receiver))
        });
        let writer = sink::unfold(sender, |mut sender, operation| async {
            let done = match operation {
                Operation::Send(message) => sender.send_binary_mut(message).await,
                Operation::Flush => sender.flush().await,
                Operation::Close => sender.close().await,
            };
            done.map(|()| sender).map_err(io_error)
        });
        Self {
            reader: messages.boxed().into_async_read(),
            writer: Box::pin(writer),
            is_flushed: true,
            is_closed: false,
            has_failed: false,
        }
    }

    /// Completes the operation that is under way.
    fn poll_idle(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.has_failed {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        let idle = ready!(self.writer.as_mut().poll_ready(cx));
        self.has_failed = idle.is_err();
        Poll::Ready(idle)
    }
}

/// Returns the payload of the next message; `None` once the peer has closed the WebSocket.
async fn next_message<S: AsyncRead + AsyncWrite + Unpin>(
    receiver: &mut Receiver<S>,
) -> Option<io::Result<Vec<u8>>> {
    let mut message = Vec::new();
    loop {
        match receiver.receive(&mut message).await {
            Ok(Incoming::Data(_)) => return Some(Ok(message)),
            Ok(Incoming::Pong(_)) => {}
            Ok(Incoming::Closed(_)) | Err(Error::Closed) => return None,
            Err(error) => return Some(Err(io_error(error))),
        }
    }
}

fn io_error(error: Error) -> io::Error {
    match error {
        Error::Io(error) => error,
        other => io::Error::other(other),
    }
}

impl AsyncRead for WebSocketStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        into: &mut [u8],
    ) -> Poll<io::Result<usize>> {
        if into.is_empty() {
            return Poll::Ready(Ok(0));
        }
        Pin::new(&mut self.reader).poll_read(cx, into)
    }
}

impl AsyncWrite for WebSocketStream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        ready!(self.poll_idle(cx))?;
        if self.is_closed {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into())); // soketto would send it
        }
        self.writer.as_mut().start_send(Operation::Send(bytes.to_vec()))?;
        self.is_flushed = false;
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        loop {
            ready!(self.poll_idle(cx))?;
            if mem::replace(&mut self.is_flushed, true) {
                return Poll::Ready(Ok(()));
            }
            self.writer.as_mut().start_send(Operation::Flush)?;
        }
    }

    fn poll_close(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        loop {
            ready!(self.poll_idle(cx))?;
            if mem::replace(&mut self.is_closed, true) {
                return Poll::Ready(Ok(()));
            }
            self.writer.as_mut().start_send(Operation::Close)?;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io::ErrorKind,
        sync::{Arc, Mutex},
    };

    use libp2p::futures::{AsyncReadExt, AsyncWriteExt, FutureExt, executor::block_on};

    use super::*;
    use crate::program::net::websocket::write_coalescing::WriteCoalescing;

    /// A connection from which `bytes` and then an error are read; records what is written.
    #[derive(Default)]
    struct Connection {
        bytes: &'static [u8],
        written: Arc<Mutex<Vec<u8>>>,
    }

    impl AsyncRead for Connection {
        fn poll_read(
            mut self: Pin<&mut Self>,
            cx: &mut Context<'_>,
            into: &mut [u8],
        ) -> Poll<io::Result<usize>> {
            if self.bytes.is_empty() {
                return Poll::Ready(Err(ErrorKind::ConnectionReset.into()));
            }
            Pin::new(&mut self.bytes).poll_read(cx, into)
        }
    }

    impl AsyncWrite for Connection {
        fn poll_write(
            self: Pin<&mut Self>,
            _: &mut Context<'_>,
            bytes: &[u8],
        ) -> Poll<io::Result<usize>> {
            // Two bytes at a time, so that every message is written in pieces.
            let taken = bytes.len().min(2);
            self.written.lock().unwrap().extend(&bytes[..taken]);
            Poll::Ready(Ok(taken))
        }

        fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }

        fn poll_close(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }
    }

    /// A client's frame, masked with zeros.
    fn frame(kind: u8, payload: &[u8]) -> Vec<u8> {
        [&[0x80 | kind, 0x80 | payload.len() as u8, 0, 0, 0, 0], payload].concat()
    }

    #[test]
    fn messages_are_read_as_bytes_and_the_end_is_sticky() {
        let (binary, close, reserved) = (2, 8, 3);
        for (last, fails) in [(frame(close, b""), false), (frame(reserved, b""), true)] {
            let pieces = [frame(binary, b"one"), frame(binary, b""), frame(binary, b"two"), last];
            let connection = Connection { bytes: pieces.concat().leak(), ..Connection::default() };
            let mut stream = WebSocketStream::new(connection);
            block_on(async {
                let mut bytes = [0; 6];
                assert_eq!(stream.read(&mut []).await.unwrap(), 0);
                stream.read_exact(&mut bytes).await.unwrap();
                assert_eq!(&bytes, b"onetwo");
                assert_eq!(stream.read(&mut bytes).await.is_err(), fails);
                assert_eq!(stream.read(&mut bytes).await.unwrap(), 0);
            });
        }
    }

    #[test]
    fn a_task_that_answers_pings_yields_to_others() {
        let connection =
            Connection { bytes: frame(9, b"").repeat(1000).leak(), ..Connection::default() };
        let written = Arc::clone(&connection.written);
        let mut stream = WebSocketStream::new(WriteCoalescing::new(connection));
        for turn in 1..10 {
            assert!(stream.read(&mut [0]).now_or_never().is_none());
            let pongs = written.lock().unwrap().len() / 2;
            assert!(pongs <= turn * 16 + 1, "{pongs} in {turn} turns");
        }
    }

    #[test]
    fn each_write_is_one_message_and_writes_after_close_fail() {
        let connection = Connection::default();
        let written = Arc::clone(&connection.written);
        let mut stream = WebSocketStream::new(connection);
        block_on(async {
            for bytes in [&b"one"[..], b"three"] {
                assert_eq!(stream.write(bytes).await.unwrap(), bytes.len());
                stream.flush().await.unwrap();
            }
            stream.close().await.unwrap();
            assert!(stream.write(b"more").await.is_err());
        });
        let written = written.lock().unwrap();
        assert_eq!(written.as_slice(), b"\x82\x03one\x82\x05three\x88\x02\x03\xe8");
    }
}
