//! A read buffer for sockets. It saves system calls: it reads more at once than the caller asks for, and it does not read
//! while the socket has nothing.
//!
//! Noise reads a socket 8 KiB at a time and WebSocket's TLS 4 KiB, each with a system call. Reading more at once saves,
//! together with frames of the same size, an eighth of the CPU time of a relayed gigabyte. And a connection's task polls its
//! socket each time that anything wakes it, such as a circuit or another connection: without the readiness flag here, two
//! thirds of those reads find nothing.

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

use super::admission::handshakes::Progress;
use crate::{
    behaviour::circuit::{BUFFER_SIZE, Buffer},
    delegate::delegate_write,
};

/// How many bytes one task reads before it yields to other connections: a cooperative budget.
///
/// With twice as much an echo takes half as long again beside a circuit at full speed; with half as much a relayed
/// gigabyte costs a twentieth more CPU time.
const YIELD_AFTER: usize = 2 * BUFFER_SIZE;

/// With this much room a caller, such as libp2p's TLS, reads the stream directly: that saves a copy.
const READS_DIRECTLY: usize = BUFFER_SIZE / 2;

/// A stream with a read buffer. It borrows the [`Buffer`] only while that holds bytes, so that an idle connection has
/// none.
#[derive(Debug)]
pub struct ReadBuffer<S> {
    stream: S,
    buffered: Option<(Buffer, Range<usize>)>,
    readiness: Arc<Readiness>,
    /// Wakes `readiness`.
    waker: Waker,
    /// How many bytes were read since the task last yielded.
    read_since_yield: usize,
    /// Records the first bytes, until there are enough.
    progress: Option<Progress>,
}

/// Whether the stream may have bytes.
#[derive(Debug)]
struct Readiness {
    /// Set at first, after a read that returned bytes, and when the stream wakes.
    ready: AtomicBool,
    /// The task that reads.
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

impl<S> ReadBuffer<S> {
    /// Wraps a stream from which nothing was read yet; `progress` records the first bytes.
    pub fn new(stream: S, progress: Option<Progress>) -> Self {
        let readiness =
            Arc::new(Readiness { ready: AtomicBool::new(true), task: AtomicWaker::new() });
        let waker = Arc::clone(&readiness).into();
        Self { stream, buffered: None, readiness, waker, read_since_yield: 0, progress }
    }
}

impl<S: AsyncRead + Unpin> ReadBuffer<S> {
    /// Reads the stream.
    fn poll_stream(&mut self, cx: &Context<'_>, into: &mut [u8]) -> Poll<io::Result<usize>> {
        // 1. Yield when the budget is used up.
        if self.read_since_yield >= YIELD_AFTER {
            self.read_since_yield = 0;
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        // 2. Skip the read while the stream has not woken. The task is registered first, so that no wake is missed.
        self.readiness.task.register(cx.waker());
        if !self.readiness.ready.swap(false, Ordering::AcqRel) {
            self.read_since_yield = 0;
            return Poll::Pending;
        }
        // 3. Read.
        let mut cx = Context::from_waker(&self.waker);
        let Poll::Ready(read) = Pin::new(&mut self.stream).poll_read(&mut cx, into) else {
            self.read_since_yield = 0;
            return Poll::Pending;
        };
        self.readiness.ready.store(true, Ordering::Release);
        let read = read?;
        self.read_since_yield += read;
        let bytes = into.get(..read).unwrap_or_default();
        self.progress.take_if(|progress| progress.record(bytes));
        Poll::Ready(Ok(read))
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for ReadBuffer<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        into: &mut [u8],
    ) -> Poll<io::Result<usize>> {
        let (buffer, mut unread) = match self.buffered.take() {
            Some(buffered) => buffered,
            None if into.len() >= READS_DIRECTLY => return self.poll_stream(cx, into),
            None => {
                let mut buffer = Buffer::borrow();
                let read = ready!(self.poll_stream(cx, &mut buffer.0))?;
                (buffer, 0..read)
            }
        };
        let mut rest = buffer.0.get(unread.clone()).unwrap_or_default();
        let read = rest.read(into)?; // a copy
        unread.start += read;
        if !unread.is_empty() {
            self.buffered = Some((buffer, unread));
        }
        Poll::Ready(Ok(read))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for ReadBuffer<S> {
    delegate_write!(stream);
}

#[cfg(test)]
mod tests {
    use libp2p::futures::{AsyncReadExt, executor::block_on, io::Cursor};

    use super::*;

    #[test]
    fn a_caller_with_room_reads_directly_and_what_is_buffered_comes_first() {
        let bytes: Vec<u8> = (0..3 * BUFFER_SIZE).map(|at| (at / 7) as u8).collect();
        let mut stream = ReadBuffer::new(Cursor::new(&bytes), None);
        let (mut received, mut into) = (Vec::new(), vec![0; BUFFER_SIZE]);
        for (room, is_buffered) in [(BUFFER_SIZE, false), (10, true), (BUFFER_SIZE, false)] {
            let read = block_on(stream.read(&mut into[..room])).unwrap();
            received.extend_from_slice(&into[..read]);
            assert_eq!(stream.buffered.is_some(), is_buffered);
        }
        assert_eq!(received.len(), 2 * BUFFER_SIZE);
        block_on(stream.read_to_end(&mut received)).unwrap();
        assert_eq!(received, bytes);
    }
}
