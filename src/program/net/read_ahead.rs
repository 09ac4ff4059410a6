//! Larger reads than those who read ask for, and none that must be in vain.
//!
//! Noise reads a socket 8 KiB at a time, rustls 4 KiB: a system call each. Gained, together with
//! frames as large: an eighth of the CPU time of a relayed gigabyte. And a connection's task asks
//! its socket each time that anything wakes it, be it a circuit or the other connection: two
//! thirds of those calls found nothing.

use std::{
    io::{self, Read},
    ops::Range,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, Wake, Waker, ready},
};

use libp2p::futures::{AsyncRead, AsyncWrite, task::AtomicWaker};

use crate::{
    behaviour::buffer::{self, Buffer},
    delegate::delegate_write,
};

/// How much is read before other connections have their turn, in bytes.
///
/// Twice as much makes an echo wait half as long again beside a circuit that runs flat out; half as
/// much makes a relayed gigabyte dearer by a twentieth.
const TURN: usize = 2 * buffer::SIZE;

/// A stream that is read a whole [`Buffer`] at a time. It has one only while there is something in
/// it, so that an idle connection holds none.
#[derive(Debug)]
pub struct ReadAhead<S> {
    stream: S,
    ahead: Option<(Buffer, Range<usize>)>,
    readiness: Arc<Readiness>,
    /// Wakes `readiness`.
    waker: Waker,
    /// How much was read in this turn.
    turn: usize,
}

/// Whether it makes sense to ask the stream.
#[derive(Debug)]
struct Readiness {
    /// It was not asked yet, had something the last time, or has called since.
    ready: AtomicBool,
    /// Who reads.
    task: AtomicWaker,
}

impl Wake for Readiness {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.ready.store(true, Ordering::Release);
        self.task.wake();
    }
}

impl<S> ReadAhead<S> {
    /// Nothing was read from `stream` yet.
    pub fn new(stream: S) -> Self {
        let readiness =
            Arc::new(Readiness { ready: AtomicBool::new(true), task: AtomicWaker::new() });
        Self { stream, ahead: None, waker: Arc::clone(&readiness).into(), readiness, turn: 0 }
    }
}

impl<S: AsyncRead + Unpin> ReadAhead<S> {
    /// A buffer with what the stream has.
    fn poll_fill(&mut self, cx: &Context<'_>) -> Poll<io::Result<(Buffer, Range<usize>)>> {
        if self.turn >= TURN {
            self.turn = 0;
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        self.readiness.task.register(cx.waker());
        if !self.readiness.ready.swap(false, Ordering::AcqRel) {
            self.turn = 0;
            return Poll::Pending;
        }
        let mut buffer = Buffer::borrow();
        let mut call = Context::from_waker(&self.waker);
        let Poll::Ready(read) = Pin::new(&mut self.stream).poll_read(&mut call, &mut buffer) else {
            self.turn = 0;
            return Poll::Pending;
        };
        self.readiness.ready.store(true, Ordering::Release);
        let read = read?;
        self.turn += read;
        Poll::Ready(Ok((buffer, 0..read)))
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for ReadAhead<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        into: &mut [u8],
    ) -> Poll<io::Result<usize>> {
        let (buffer, mut unread) = match self.ahead.take() {
            Some(ahead) => ahead,
            None => ready!(self.poll_fill(cx))?,
        };
        let mut rest = buffer.get(unread.clone()).unwrap_or_default();
        let now = rest.read(into)?; // from memory
        unread.start += now;
        if !unread.is_empty() {
            self.ahead = Some((buffer, unread));
        }
        Poll::Ready(Ok(now))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for ReadAhead<S> {
    delegate_write!(stream: poll_write, poll_write_vectored, poll_flush, poll_close);
}
