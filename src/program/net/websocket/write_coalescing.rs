//! Write coalescing: sends the head of a WebSocket message together with its body.
//!
//! soketto writes one after the other, and the relay's sockets send each write at once (TCP_NODELAY): that would take
//! two system calls and two packets for each message. Also bounds how many pings one turn of a task answers.

use std::{
    io::{self, ErrorKind, IoSlice},
    pin::Pin,
    task::{Context, Poll, ready},
};

use libp2p::futures::{AsyncRead, AsyncWrite};

/// The first byte of each message that the relay sends: binary, not fragmented. With TLS the stream gets records, none
/// of which begins with it.
const MESSAGE: u8 = 0x82;

/// The longest head of such a message, in bytes.
const MAX_HEAD: usize = 10;

/// How many flushes there may be in one turn of a task before it yields to others: a cooperative budget. soketto
/// answers each ping of a client at once, with a write and a flush.
const YIELD_AFTER: u8 = 16;

/// A stream that delays a head until its body is written, or the stream is flushed.
#[derive(Debug)]
pub struct WriteCoalescing<S> {
    stream: S,
    head: [u8; MAX_HEAD],
    /// How many bytes of `head` are delayed.
    delayed: usize,
    /// How many flushes there were in this turn.
    flushes: u8,
}

impl<S> WriteCoalescing<S> {
    /// Wraps a stream to which nothing was written yet.
    pub fn new(stream: S) -> Self {
        Self { stream, head: [0; MAX_HEAD], delayed: 0, flushes: 0 }
    }

    /// Delays these bytes if they look like a head. Returns whether they do.
    fn delay(&mut self, bytes: &[u8]) -> bool {
        match self.head.get_mut(..bytes.len()) {
            Some(head) if bytes.first() == Some(&MESSAGE) => {
                head.copy_from_slice(bytes);
                self.delayed = bytes.len();
                true
            }
            _ => false,
        }
    }
}

impl<S: AsyncWrite + Unpin> WriteCoalescing<S> {
    /// Writes the delayed head, followed by `body`. Ready once the whole head is written, with how much of `body` was
    /// written, too.
    fn poll_write_delayed(&mut self, cx: &mut Context<'_>, body: &[u8]) -> Poll<io::Result<usize>> {
        while self.delayed > 0 {
            let head = self.head.get(..self.delayed).unwrap_or_default();
            let pieces = [IoSlice::new(head), IoSlice::new(body)];
            let written = ready!(Pin::new(&mut self.stream).poll_write_vectored(cx, &pieces))?;
            if written == 0 {
                return Poll::Ready(Err(ErrorKind::WriteZero.into()));
            }
            let of_head = written.min(self.delayed);
            self.head.copy_within(of_head..self.delayed, 0);
            self.delayed -= of_head;
            if written > of_head {
                return Poll::Ready(Ok(written - of_head));
            }
        }
        Poll::Ready(Ok(0))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for WriteCoalescing<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        if self.delayed == 0 && self.delay(bytes) {
            return Poll::Ready(Ok(bytes.len()));
        }
        match ready!(self.poll_write_delayed(cx, bytes))? {
            0 => Pin::new(&mut self.stream).poll_write(cx, bytes),
            written => Poll::Ready(Ok(written)),
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.flushes == YIELD_AFTER {
            self.flushes = 0;
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        self.flushes += 1;
        ready!(self.poll_write_delayed(cx, &[]))?;
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_close(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_write_delayed(cx, &[]))?;
        Pin::new(&mut self.stream).poll_close(cx)
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for WriteCoalescing<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        into: &mut [u8],
    ) -> Poll<io::Result<usize>> {
        let read = Pin::new(&mut self.stream).poll_read(cx, into);
        if read.is_pending() {
            self.flushes = 0; // the turn ends
        }
        read
    }
}

#[cfg(test)]
mod tests {
    use libp2p::futures::{AsyncWriteExt, executor::block_on};
    use proptest::prelude::*;

    use super::*;

    /// Takes at most this many bytes in one call, and records each call.
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

    fn coalescing(at_once: usize) -> WriteCoalescing<Socket> {
        let calls = Vec::new();
        WriteCoalescing::new(Socket { at_once, calls })
    }

    #[test]
    fn a_head_and_its_body_are_written_in_one_call() {
        let mut stream = coalescing(usize::MAX);
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
        fn no_byte_is_lost_or_reordered(
            writes in prop::collection::vec(
                prop::collection::vec(prop_oneof![Just(MESSAGE), any::<u8>()], 0..14),
                0..20,
            ),
            at_once in 1_usize..20,
        ) {
            let mut stream = coalescing(at_once);
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
