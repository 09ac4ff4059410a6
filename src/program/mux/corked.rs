//! What the muxer writes before it comes to rest goes out in one piece.
//!
//! yamux flushes behind each frame, and each flush is a message of Noise or TLS and a system call.
//! Where a question follows its protocol's name, or an answer comes to both, that is twice what is
//! needed: a fifth of the CPU time of a circuit's set-up.
//!
//! How large a piece gets is bounded, because the secure channel keeps room for the largest.

use std::{
    io,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll, ready},
};

use libp2p::futures::{AsyncRead, AsyncWrite};

use super::{frames::HEADER, held::Account};
use crate::behaviour::buffer;

/// How much goes out in one piece where memory is short, in bytes.
///
/// Noise has room for three such pieces for ever, once there was one.
const NARROW: usize = 8 * 1024;

/// How much goes out in one piece at most, in bytes: a whole frame, which is a whole message of Noise. Cut
/// elsewhere its end would go out with what comes next, and js-libp2p drops what comes with a reset.
const WHOLE: usize = buffer::SIZE + HEADER;

/// How much more memory a connection takes whose pieces may be as large as they come.
const WIDE: usize = 3 * (WHOLE - NARROW);

/// A stream that is flushed by its [`Cork`] instead of whoever writes.
#[derive(Debug)]
pub struct Corked<S>(Arc<Mutex<Inner<S>>>);

/// Flushes a stream when it is time.
#[derive(Debug)]
pub struct Cork<S>(Arc<Mutex<Inner<S>>>);

#[derive(Debug)]
struct Inner<S> {
    stream: S,
    account: Account,
    /// How much there may be to be flushed.
    at_once: usize,
    /// How much was written since it was last flushed.
    unflushed: usize,
    /// It is being flushed.
    flushing: bool,
    /// It took no more when something was to be written.
    full: bool,
}

/// A stream to write to, and what flushes it.
pub fn cork<S>(stream: S, account: Account) -> (Corked<S>, Cork<S>) {
    let inner = Arc::new(Mutex::new(Inner {
        stream,
        account,
        at_once: NARROW,
        unflushed: 0,
        flushing: false,
        full: false,
    }));
    (Corked(Arc::clone(&inner)), Cork(inner))
}

impl<S> Cork<S> {
    /// Whether it took all that was to be written since this was asked last.
    pub fn took_all(&self) -> bool {
        !std::mem::take(&mut lock(&self.0).full)
    }
}

impl<S: AsyncWrite + Unpin> Cork<S> {
    /// Sends what was written, if anything was.
    pub fn poll_flush(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        lock(&self.0).poll_flush(cx)
    }
}

impl<S: AsyncWrite + Unpin> Inner<S> {
    fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.unflushed == 0 && !self.flushing {
            return Poll::Ready(Ok(()));
        }
        self.unflushed = 0;
        self.flushing = true;
        ready!(Pin::new(&mut self.stream).poll_flush(cx))?;
        self.flushing = false;
        Poll::Ready(Ok(()))
    }

    /// Nothing is written behind what waits to be sent: else that would pile up below.
    fn poll_write(&mut self, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        if bytes.len() > self.at_once && self.account.keep_if_plenty(WIDE) {
            self.at_once = WHOLE;
        }
        if self.flushing || self.unflushed >= self.at_once {
            ready!(self.poll_flush(cx))?;
        }
        let room = bytes.len().min(self.at_once - self.unflushed);
        let piece = bytes.get(..room).unwrap_or_default();
        let written = ready!(Pin::new(&mut self.stream).poll_write(cx, piece))?;
        self.unflushed += written;
        Poll::Ready(Ok(written))
    }
}

/// Nobody ever waits for it: both are in the hands of one muxer.
fn lock<S>(inner: &Mutex<Inner<S>>) -> MutexGuard<'_, Inner<S>> {
    inner.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<S: AsyncRead + Unpin> AsyncRead for Corked<S> {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut [u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut lock(&self.0).stream).poll_read(cx, buffer)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Corked<S> {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let mut inner = lock(&self.0);
        let written = inner.poll_write(cx, bytes);
        inner.full |= written.is_pending();
        written
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    /// Flushes, too.
    fn poll_close(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut lock(&self.0).stream).poll_close(cx)
    }
}
