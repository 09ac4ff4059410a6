//! The head of a WebSocket message goes out in one piece with its body.
//!
//! libp2p's WebSocket writes one after the other, and our sockets send at once what they are given:
//! that would be two system calls and two packets for each message.

use std::{
    io::{self, ErrorKind, IoSlice},
    pin::Pin,
    task::{Context, Poll, ready},
};

use libp2p::futures::{AsyncRead, AsyncWrite};

/// How a message of the relay's begins: binary, and whole. No record of TLS does.
const MESSAGE: u8 = 0x82;

/// The longest head of such a message, in bytes.
const LONGEST_HEAD: usize = 10;

/// A stream that holds a head back until its body comes, or it is flushed.
#[derive(Debug)]
pub struct Joined<S> {
    stream: S,
    head: [u8; LONGEST_HEAD],
    /// How much of it is held.
    held: usize,
}

impl<S> Joined<S> {
    /// Nothing was written to `stream` yet.
    pub fn new(stream: S) -> Self {
        Self { stream, head: [0; LONGEST_HEAD], held: 0 }
    }

    /// Takes these bytes, if they look like a head.
    fn hold(&mut self, bytes: &[u8]) -> bool {
        match self.head.get_mut(..bytes.len()) {
            Some(head) if bytes.first() == Some(&MESSAGE) => {
                head.copy_from_slice(bytes);
                self.held = bytes.len();
                true
            }
            _ => false,
        }
    }
}

impl<S: AsyncWrite + Unpin> Joined<S> {
    /// Writes what is held and, behind it, from `body`; how much of that, once nothing is held.
    fn poll_release(&mut self, cx: &mut Context<'_>, body: &[u8]) -> Poll<io::Result<usize>> {
        while self.held > 0 {
            let head = self.head.get(..self.held).unwrap_or_default();
            let pieces = [IoSlice::new(head), IoSlice::new(body)];
            let written = ready!(Pin::new(&mut self.stream).poll_write_vectored(cx, &pieces))?;
            if written == 0 {
                return Poll::Ready(Err(ErrorKind::WriteZero.into()));
            }
            let of_head = written.min(self.held);
            self.head.copy_within(of_head..self.held, 0);
            self.held -= of_head;
            if written > of_head {
                return Poll::Ready(Ok(written - of_head));
            }
        }
        Poll::Ready(Ok(0))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Joined<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        if self.held == 0 && self.hold(bytes) {
            return Poll::Ready(Ok(bytes.len()));
        }
        match ready!(self.poll_release(cx, bytes))? {
            0 => Pin::new(&mut self.stream).poll_write(cx, bytes),
            written => Poll::Ready(Ok(written)),
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_release(cx, &[]))?;
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_close(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_release(cx, &[]))?;
        Pin::new(&mut self.stream).poll_close(cx)
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Joined<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        into: &mut [u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_read(cx, into)
    }
}

#[cfg(test)]
mod tests {
    use libp2p::futures::{AsyncWriteExt, executor::block_on};
    use proptest::prelude::*;

    use super::*;

    /// Takes so many bytes at most in one call, and keeps what each call brought.
    struct Socket {
        at_once: usize,
        calls: Vec<Vec<u8>>,
    }

    impl AsyncWrite for Socket {
        fn poll_write(
            mut self: Pin<&mut Self>,
            _: &mut Context<'_>,
            bytes: &[u8],
        ) -> Poll<io::Result<usize>> {
            let taken = bytes.len().min(self.at_once);
            self.calls.push(bytes[..taken].into());
            Poll::Ready(Ok(taken))
        }

        fn poll_write_vectored(
            self: Pin<&mut Self>,
            cx: &mut Context<'_>,
            pieces: &[IoSlice<'_>],
        ) -> Poll<io::Result<usize>> {
            let bytes: Vec<_> = pieces.iter().flat_map(|piece| piece.iter().copied()).collect();
            self.poll_write(cx, &bytes)
        }

        fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }

        fn poll_close(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }
    }

    fn joined(at_once: usize) -> Joined<Socket> {
        let calls = Vec::new();
        Joined::new(Socket { at_once, calls })
    }

    #[test]
    fn a_head_and_its_body_are_one_call() {
        let mut stream = joined(usize::MAX);
        block_on(async {
            stream.write_all(&[MESSAGE, 3]).await.unwrap();
            stream.write_all(b"one").await.unwrap();
            stream.write_all(&[MESSAGE, 0]).await.unwrap();
            stream.flush().await.unwrap();
            stream.write_all(b"HTTP").await.unwrap();
        });
        let expected = [&b"\x82\x03one"[..], b"\x82\0", b"HTTP"];
        assert_eq!(stream.stream.calls, expected);
    }

    proptest! {
        #[test]
        fn nothing_is_lost_or_moved(
            writes in prop::collection::vec(
                prop::collection::vec(prop_oneof![Just(MESSAGE), any::<u8>()], 0..14),
                0..20,
            ),
            at_once in 1_usize..20,
        ) {
            let mut stream = joined(at_once);
            block_on(async {
                for bytes in &writes {
                    stream.write_all(bytes).await.unwrap();
                }
                stream.close().await.unwrap();
            });
            prop_assert_eq!(stream.stream.calls.concat(), writes.concat());
        }
    }
}
