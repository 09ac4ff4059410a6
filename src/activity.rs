//! Signs of life: how much has been heard from the other end of a connection.
//!
//! A counter, shared between whoever hears something and whoever looks now and then whether there
//! is more than last time. What was heard does not matter.

use std::{
    io,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    task::{Context, Poll, ready},
};

use libp2p::futures::{AsyncRead, AsyncWrite};

use crate::delegate::delegate_write;

/// Counts what is heard. Clones share one counter.
#[derive(Clone, Debug, Default)]
pub struct Signs(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    heard: AtomicU64,
    is_flooding: AtomicBool,
}

impl Signs {
    /// How much was heard so far: bytes, and the ends of streams.
    pub fn count(&self) -> u64 {
        self.0.heard.load(Ordering::Relaxed)
    }

    /// So much more was heard.
    pub fn heard(&self, more: u64) {
        self.0.heard.fetch_add(more, Ordering::Relaxed);
    }

    /// Whether the peer sends so much that serves nothing that it is to be closed, unless it holds a slot or
    /// is part of a circuit.
    pub fn is_flooding(&self) -> bool {
        self.0.is_flooding.load(Ordering::Relaxed)
    }

    /// The peer sends that much.
    pub fn set_flooding(&self) {
        self.0.is_flooding.store(true, Ordering::Relaxed);
    }

    /// Counts what comes in on `stream`, its end or failure included.
    pub fn listen_to<S>(&self, stream: S) -> Heard<S> {
        self.listen_with(stream, ())
    }

    /// As [`Signs::listen_to`]; `guard` is dropped with the stream, and before it.
    pub fn listen_with<S, G>(&self, stream: S, guard: G) -> Heard<S, G> {
        Heard { _guard: guard, signs: self.clone(), stream }
    }
}

/// A stream that counts what comes in on it.
#[derive(Debug)]
pub struct Heard<S, G = ()> {
    // Fields are dropped in this order.
    _guard: G,
    signs: Signs,
    stream: S,
}

impl<S: AsyncRead + Unpin, G: Unpin> AsyncRead for Heard<S, G> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut [u8],
    ) -> Poll<io::Result<usize>> {
        let read = ready!(Pin::new(&mut self.stream).poll_read(cx, buffer));
        let bytes = read.as_ref().map_or(0, |bytes| *bytes as u64);
        self.signs.heard(bytes.max(1));
        Poll::Ready(read)
    }
}

impl<S: AsyncWrite + Unpin, G: Unpin> AsyncWrite for Heard<S, G> {
    delegate_write!(stream: poll_write, poll_write_vectored, poll_flush, poll_close);
}
