//! A connection as yamux reads and writes it: what passes is kept in its [`Ledger`].

use std::{
    io,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
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
    leaves: Arc<AtomicBool>,
}

/// Whether the last read found something, so that there may be more.
#[derive(Debug)]
pub struct Leaves(Arc<AtomicBool>);

/// Nothing was read or written of it yet.
pub fn meter<S>(stream: S, ledger: Arc<Ledger>) -> (Metered<S>, Leaves) {
    let leaves = Arc::new(AtomicBool::new(false));
    let metered = Metered {
        stream,
        ledger,
        comes: Frames::default(),
        goes: Frames::default(),
        leaves: Arc::clone(&leaves),
    };
    (metered, Leaves(leaves))
}

impl Leaves {
    /// Whether it did.
    pub fn any(&self) -> bool {
        self.0.load(Ordering::Relaxed)
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
        self.leaves.store(read.is_ready(), Ordering::Relaxed);
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
