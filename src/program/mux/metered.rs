//! A connection as yamux reads and writes it: what passes is kept in its [`Ledger`].

use std::{
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Instant,
};

use futures_timer::Delay;
use libp2p::futures::{AsyncRead, AsyncWrite, FutureExt};

use super::{
    frames::{Frames, Splitter},
    ledger::Ledger,
    pace::Pace,
};
use crate::delegate::delegate_write;

/// A stream of frames that are counted.
#[derive(Debug)]
pub struct Metered<S> {
    stream: S,
    ledger: Arc<Ledger>,
    comes: Splitter,
    goes: Frames,
    /// How fast frames may come that open streams, reset them, or ping.
    pace: Pace,
    /// Until then it is not read, because they came faster.
    pause: Option<Delay>,
}

impl<S> Metered<S> {
    /// Nothing was read or written of `stream` yet.
    pub fn new(stream: S, ledger: Arc<Ledger>, pace: Pace) -> Self {
        Self {
            stream,
            ledger,
            comes: Splitter::default(),
            goes: Frames::default(),
            pace,
            pause: None,
        }
    }

    /// A frame came that opens a stream, resets one, or pings.
    fn came_dear(&mut self, now: Instant) {
        if let Some(rest) = self.pace.rest(now) {
            self.ledger.floods();
            self.pause = Some(Delay::new(rest));
        }
    }
}

impl<S: AsyncRead + Unpin> Metered<S> {
    fn poll_next(&mut self, cx: &mut Context<'_>, into: &mut [u8]) -> Poll<io::Result<usize>> {
        if self.ledger.has_to_wait() {
            return Poll::Pending;
        }
        if let Some(pause) = &mut self.pause {
            ready!(pause.poll_unpin(cx));
            self.pause = None;
        }
        while let Some(room) = self.comes.header_room() {
            let read = ready!(Pin::new(&mut self.stream).poll_read(cx, room))?;
            if read == 0 {
                return Poll::Ready(Ok(0));
            }
            if self.comes.header_read(read)? {
                self.came_dear(Instant::now());
            }
        }
        if let Some((passed_on, data)) = self.comes.pass_on(into) {
            if let Some(data) = data {
                self.ledger.comes(data);
            }
            if self.comes.body() == 0 {
                self.ledger.came();
            }
            return Poll::Ready(Ok(passed_on));
        }
        let (into, _) = into.split_at_mut(self.comes.body().min(into.len()));
        let read = ready!(Pin::new(&mut self.stream).poll_read(cx, into))?;
        if self.comes.body_read(read) {
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

    delegate_write!(stream: poll_flush, poll_close);
}
