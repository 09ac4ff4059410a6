//! A connection as yamux reads and writes it: what passes is kept in its [`Ledger`].

use std::{
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use libp2p::futures::{AsyncRead, AsyncWrite};

use super::{frames::Frames, ledger::Ledger, muxer::LONGEST_FRAME};

/// A stream of frames that are counted.
#[derive(Debug)]
pub struct Metered<S> {
    stream: S,
    ledger: Arc<Ledger>,
    comes: Frames,
    goes: Frames,
}

impl<S> Metered<S> {
    /// Nothing was read or written of `stream` yet.
    pub fn new(stream: S, ledger: Arc<Ledger>) -> Self {
        Self {
            stream,
            ledger,
            comes: Frames::default(),
            goes: Frames::default(),
        }
    }
}

impl<S: AsyncRead + Unpin> Metered<S> {
    fn poll_next(&mut self, cx: &mut Context<'_>, into: &mut [u8]) -> Poll<io::Result<usize>> {
        if self.ledger.has_to_wait() {
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        let read = ready!(Pin::new(&mut self.stream).poll_read(cx, into))?;
        let mut bytes = into.get(..read).unwrap_or_default();
        while let Some(data) = self.comes.next(&mut bytes) {
            if data.length > LONGEST_FRAME {
                return Poll::Ready(Err(io::ErrorKind::InvalidData.into())); // so would yamux
            }
            self.ledger.comes(data);
        }
        if self.comes.is_between() {
            self.ledger.came();
        }
        Poll::Ready(Ok(read))
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Metered<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        into: &mut [u8],
    ) -> Poll<io::Result<usize>> {
        let read = self.poll_next(cx, into);
        self.ledger.read_some(read.is_ready());
        read
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Metered<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let this = &mut *self;
        let written = ready!(Pin::new(&mut this.stream).poll_write(cx, bytes))?;
        let mut bytes = bytes.get(..written).unwrap_or_default();
        while let Some(data) = this.goes.next(&mut bytes) {
            this.ledger.goes(data);
        }
        if this.goes.is_between() {
            this.ledger.went();
        }
        Poll::Ready(Ok(written))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_close(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_close(cx)
    }
}
