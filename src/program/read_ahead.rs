//! Larger reads than those who read ask for.
//!
//! Noise reads a socket 8 KiB at a time, rustls 4 KiB: a system call each. Gained, together with
//! frames as large: an eighth of the CPU time of a relayed gigabyte.

use std::{
    io,
    ops::Range,
    pin::Pin,
    task::{Context, Poll, ready},
};

use libp2p::futures::{AsyncRead, AsyncWrite};

use crate::buffer::Buffer;

/// A stream that is read a whole [`Buffer`] at a time. It has one only while there is something in
/// it, so that an idle connection holds none.
#[derive(Debug)]
pub struct ReadAhead<S> {
    stream: S,
    ahead: Option<(Buffer, Range<usize>)>,
}

impl<S> ReadAhead<S> {
    /// Nothing was read from `stream` yet.
    pub fn new(stream: S) -> Self {
        Self {
            stream,
            ahead: None,
        }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for ReadAhead<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        into: &mut [u8],
    ) -> Poll<io::Result<usize>> {
        let this = &mut *self;
        let (buffer, mut unread) = match this.ahead.take() {
            Some(ahead) => ahead,
            None => {
                let mut buffer = Buffer::borrow();
                let read = ready!(Pin::new(&mut this.stream).poll_read(cx, &mut buffer))?;
                (buffer, 0..read)
            }
        };
        let now = unread.len().min(into.len());
        into[..now].copy_from_slice(&buffer[unread.start..][..now]);
        unread.start += now;
        if !unread.is_empty() {
            this.ahead = Some((buffer, unread));
        }
        Poll::Ready(Ok(now))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for ReadAhead<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        parts: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, parts)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_close(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_close(cx)
    }
}
