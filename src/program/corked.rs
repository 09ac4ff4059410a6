//! What the muxer writes before it comes to rest goes out in one piece.
//!
//! yamux flushes behind each frame, and each flush is a message of Noise or TLS and a system call.
//! Where a question follows its protocol's name, or an answer comes to both, that is twice what is
//! needed: a fifth of the CPU time of a circuit's set-up.

use std::{
    io,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll},
};

use libp2p::futures::{AsyncRead, AsyncWrite};

/// A stream that is flushed by its [`Cork`] instead of whoever writes.
#[derive(Debug)]
pub struct Corked<S>(Arc<Mutex<Inner<S>>>);

/// Flushes a stream when it is time.
#[derive(Debug)]
pub struct Cork<S>(Arc<Mutex<Inner<S>>>);

#[derive(Debug)]
struct Inner<S> {
    stream: S,
    /// Something was written since it was last flushed.
    unflushed: bool,
}

/// A stream to write to, and what flushes it.
pub fn cork<S>(stream: S) -> (Corked<S>, Cork<S>) {
    let inner = Arc::new(Mutex::new(Inner {
        stream,
        unflushed: false,
    }));
    (Corked(Arc::clone(&inner)), Cork(inner))
}

impl<S: AsyncWrite + Unpin> Cork<S> {
    /// Sends what was written, if anything was.
    pub fn poll_flush(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut inner = lock(&self.0);
        if !inner.unflushed {
            return Poll::Ready(Ok(()));
        }
        let flushed = Pin::new(&mut inner.stream).poll_flush(cx);
        inner.unflushed = flushed.is_pending();
        flushed
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
        inner.unflushed = true;
        Pin::new(&mut inner.stream).poll_write(cx, bytes)
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    /// Flushes, too.
    fn poll_close(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut lock(&self.0).stream).poll_close(cx)
    }
}
