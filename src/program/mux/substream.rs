//! One stream, and what is kept of it: it can be taken from whoever holds it.

use std::{
    io,
    pin::Pin,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, ready},
};

use libp2p::futures::{AsyncRead, AsyncWrite, task::AtomicWaker};

use super::{
    held::Account,
    negotiation::Negotiation,
    places::{Place, Reset},
    unread::{FRAME, Unread},
};
use crate::behaviour::buffer;

/// How much of one connection's may be on its way out before whoever writes waits, in bytes.
const UNSENT: usize = 1024 * 1024;

/// One stream.
#[derive(Debug)]
pub struct Substream(Arc<Kept>);

/// What its connection keeps of it.
#[derive(Debug)]
pub struct Kept {
    id: u32,
    account: Account,
    stream: Mutex<Stream>,
    /// Who waits until there is less on its way out.
    writer: AtomicWaker,
    waits: AtomicBool,
}

#[derive(Debug)]
struct Stream {
    /// Until it was dropped, or taken away. Yamux frees what it has of it as soon as it can write.
    yamux: Option<yamux::Stream>,
    /// Until yamux has nothing of it any more. Without one it is to be reset.
    place: Option<Place>,
    /// Whether we closed our half: after that yamux knows no reset from the peer's own close.
    closed: bool,
    /// What is agreed on, while that is not known.
    negotiation: Option<Box<Negotiation>>,
    /// The peer opened it, and no request has come on it yet.
    is_silent: bool,
    unread: Unread,
    /// Yamux has been told that nobody has it any more.
    told: bool,
}

/// Who opened a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OpenedBy {
    /// The peer.
    Peer,
    /// The relay.
    Relay,
}

impl Substream {
    /// A stream of this connection, in its place.
    pub fn new(yamux: yamux::Stream, by: OpenedBy, place: Option<Place>, account: Account) -> Self {
        let id = yamux.id().val();
        let stream = Stream {
            yamux: Some(yamux),
            place,
            closed: false,
            negotiation: (by == OpenedBy::Peer).then(Box::default),
            is_silent: by == OpenedBy::Peer,
            unread: Unread::default(),
            told: false,
        };
        let kept = Arc::new(Kept {
            id,
            account,
            stream: Mutex::new(stream),
            writer: AtomicWaker::new(),
            waits: AtomicBool::new(false),
        });
        if by == OpenedBy::Peer
            && let Some(place) = &kept.stream().place
        {
            let silent: Weak<Kept> = Arc::downgrade(&kept);
            place.is_silent(silent);
        }
        Self(kept)
    }

    /// What its connection is to keep of it.
    pub fn kept(&self) -> Arc<Kept> {
        Arc::clone(&self.0)
    }
}

impl Kept {
    /// A frame comes with a body of so many bytes.
    pub fn arrives(&self, bytes: usize) {
        let now = self.account.pool().taken();
        let taken = self.stream().unread.arrives(bytes, now);
        self.account.take(taken);
    }

    /// How much it is in the way.
    pub fn weight(&self, now: u64) -> u128 {
        self.stream().unread.weight(now)
    }

    /// How many bytes it takes.
    pub fn takes(&self) -> usize {
        self.stream().unread.takes()
    }

    /// Whether nobody has it any more.
    pub fn is_dropped(&self) -> bool {
        self.stream().yamux.is_none()
    }

    /// Takes it from whoever holds it: to them it was reset.
    pub fn take_away(&self) {
        let Some(yamux) = self.stream().yamux.take() else {
            return;
        };
        drop(yamux);
        self.account.went(self.id);
    }

    /// Yamux is told now if nobody has it any more.
    pub fn tell(&self) {
        let mut stream = self.stream();
        stream.told = stream.yamux.is_none();
    }

    /// Whether yamux was told, and so has nothing of it once it could write.
    pub fn is_told(&self) -> bool {
        self.stream().told
    }

    /// Yamux has nothing of it any more.
    pub fn is_gone(&self) {
        let mut stream = self.stream();
        let takes = std::mem::take(&mut stream.unread).takes();
        let place = stream.place.take();
        drop(stream);
        drop(place);
        self.account.give_back(takes);
    }

    /// There is less on its way out.
    pub fn go_on(&self) {
        if self.waits.swap(false, Ordering::AcqRel) {
            self.writer.wake();
        }
    }

    /// Waits until little enough of the connection's is on its way out.
    fn poll_turn(&self, cx: &Context<'_>) -> Poll<()> {
        let is_little = || self.account.unsent() < UNSENT;
        if is_little() {
            return Poll::Ready(());
        }
        self.writer.register(cx.waker());
        self.waits.store(true, Ordering::Release);
        match is_little() {
            true => Poll::Ready(()),
            false => Poll::Pending,
        }
    }

    fn stream(&self) -> MutexGuard<'_, Stream> {
        self.stream.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Reset for Kept {
    fn reset(&self) {
        self.take_away();
    }
}

impl Drop for Substream {
    fn drop(&mut self) {
        self.0.take_away();
    }
}

fn taken_away() -> io::Error {
    io::ErrorKind::ConnectionReset.into()
}

impl AsyncRead for Substream {
    /// A stream that was reset reads as an end of file in yamux; here as the error that it is.
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut [u8],
    ) -> Poll<io::Result<usize>> {
        let mut guard = self.0.stream();
        let Stream { yamux, place, closed, negotiation, is_silent, unread, .. } = &mut *guard;
        let yamux = yamux.as_mut().ok_or_else(taken_away)?;
        // Who reads again has passed on what was read before.
        let freed = unread.read(0);
        self.0.account.give_back(freed);
        let read = ready!(Pin::new(&mut *yamux).poll_read(cx, buffer))?;
        unread.read(read);
        if read == 0 && !buffer.is_empty() && !*closed && yamux.is_closed() {
            return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()));
        }
        if *is_silent && read > 0 && negotiation.is_none() {
            *is_silent = false;
            place.as_ref().map(Place::is_used);
        }
        let said = buffer.get(..read).unwrap_or_default();
        if negotiation.is_some() && !Negotiation::takes(said, buffer.len()) {
            return Poll::Ready(Err(io::ErrorKind::InvalidData.into()));
        }
        Poll::Ready(Ok(read))
    }
}

impl AsyncWrite for Substream {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let mut stream = self.0.stream();
        let Stream { yamux, negotiation, .. } = &mut *stream;
        let yamux = yamux.as_mut().ok_or_else(taken_away)?;
        ready!(self.0.poll_turn(cx));
        // Counted before another thread can send it, and given back when it goes out.
        let (piece, account) = (bytes.len().min(buffer::SIZE), &self.0.account);
        account.take_unsent(piece + FRAME);
        let written = Pin::new(yamux).poll_write(cx, bytes);
        let goes = match &written {
            Poll::Ready(Ok(written)) if *written > 0 => written + FRAME,
            _ => 0,
        };
        account.give_back_unsent((piece + FRAME).saturating_sub(goes));
        let written = ready!(written)?;
        let said = bytes.get(..written).unwrap_or_default();
        if negotiation.as_mut().is_some_and(|talk| talk.writes(said)) {
            *negotiation = None;
        }
        Poll::Ready(Ok(written))
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut stream = self.0.stream();
        let yamux = stream.yamux.as_mut().ok_or_else(taken_away)?;
        Pin::new(yamux).poll_flush(cx)
    }

    fn poll_close(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut stream = self.0.stream();
        let yamux = stream.yamux.as_mut().ok_or_else(taken_away)?;
        ready!(Pin::new(yamux).poll_close(cx))?;
        stream.closed = true;
        Poll::Ready(Ok(()))
    }
}
