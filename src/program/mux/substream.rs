//! Handles of streams: `AsyncRead` and `AsyncWrite` over a session that they share with the connection's muxer.

use std::{
    io,
    pin::Pin,
    sync::{Arc, Mutex, PoisonError, Weak},
    task::{Context, Poll, ready},
    time::Instant,
};

use libp2p::futures::{AsyncRead, AsyncWrite};

use super::{
    budget::{ConnectionBudget, Cut, MemoryBudget, Shed},
    negotiation::Negotiation,
    permits::{Reset, StreamPermit},
    session::{Role, Session},
};
use crate::address::ClientPrefix;

/// A session and its lock. No thread holds the locks of two sessions, or wakes a task under one.
#[derive(Debug)]
pub struct Shared {
    session: Mutex<Session>,
    budget: Arc<ConnectionBudget>,
}

impl Shared {
    /// A session of a connection from this prefix.
    pub fn new(role: Role, budget: &MemoryBudget, prefix: Option<ClientPrefix>) -> Arc<Self> {
        let account = budget.open(prefix);
        let session = Mutex::new(Session::new(role, Arc::clone(&account)));
        let shared = Arc::new(Self { session, budget: account });
        budget.register(&shared);
        shared
    }

    /// Calls `act` under the lock, and applies its effects after releasing that.
    pub fn with<T>(&self, act: impl FnOnce(&mut Session) -> T) -> T {
        let mut session = self.session.lock().unwrap_or_else(PoisonError::into_inner);
        let result = act(&mut session);
        let effects = session.take_effects();
        drop(session);
        effects.apply();
        result
    }

    /// Whether its lock is held.
    #[cfg(test)]
    pub fn is_locked(&self) -> bool {
        self.session.try_lock().is_err()
    }
}

impl Shed for Shared {
    fn budget(&self) -> &ConnectionBudget {
        &self.budget
    }

    fn shed(&self, now: Instant) -> usize {
        self.with(|session| session.shed(now, Cut::Pool))
    }

    fn credit(&self) -> usize {
        self.with(|session| session.credit())
    }
}

impl Reset for Shared {
    fn reset(&self, stream: u64) {
        self.with(|session| session.reset(stream));
    }
}

/// Who opened a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OpenedBy {
    /// The peer.
    Peer,
    /// The relay.
    Relay,
}

/// The handle of a stream. Dropping it before it is closed resets the stream.
#[derive(Debug)]
pub struct Substream {
    shared: Arc<Shared>,
    serial: u64,
    /// The negotiation of the protocol, until it is done.
    negotiation: Option<Box<Negotiation>>,
    /// Whether the peer opened it and no request has arrived on it yet.
    is_unused: bool,
}

impl Substream {
    /// The handle of this stream of the session.
    pub fn new(shared: &Arc<Shared>, serial: u64, by: OpenedBy) -> Self {
        let is_unused = by == OpenedBy::Peer;
        if is_unused {
            let session: Weak<Shared> = Arc::downgrade(shared);
            shared.with(|all| all.permit(serial).map(|permit| permit.set_stream(session, serial)));
        }
        Self {
            shared: Arc::clone(shared),
            serial,
            negotiation: is_unused.then(Box::default),
            is_unused,
        }
    }
}

impl Drop for Substream {
    fn drop(&mut self) {
        self.shared.with(|session| session.drop_handle(self.serial));
    }
}

impl AsyncRead for Substream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut [u8],
    ) -> Poll<io::Result<usize>> {
        let (serial, now) = (self.serial, Instant::now());
        let read = self.shared.with(|session| session.poll_read(serial, cx, buffer, now));
        let read = ready!(read)?;
        if self.negotiation.is_some() {
            let bytes = buffer.get(..read).unwrap_or_default();
            if !Negotiation::accepts(bytes, buffer.len()) {
                return Poll::Ready(Err(io::ErrorKind::InvalidData.into()));
            }
        } else if read > 0 && std::mem::take(&mut self.is_unused) {
            self.shared.with(|session| session.permit(serial).map(StreamPermit::mark_used));
        }
        Poll::Ready(Ok(read))
    }
}

impl AsyncWrite for Substream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let (serial, now) = (self.serial, Instant::now());
        let written = self.shared.with(|session| session.poll_write(serial, cx, bytes, now));
        let written = ready!(written)?;
        self.shared.budget.pool().push_out(now);
        let bytes = bytes.get(..written).unwrap_or_default();
        if self.negotiation.as_mut().is_some_and(|negotiation| negotiation.on_write(bytes)) {
            self.negotiation = None;
        }
        Poll::Ready(Ok(written))
    }

    /// Ready at once: written data is sent even if the handle is dropped.
    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.shared.with(|session| session.flush(self.serial));
        Poll::Ready(Ok(()))
    }

    /// Ready at once: the end of the stream is sent after the written data.
    fn poll_close(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.shared.with(|session| session.close(self.serial));
        Poll::Ready(Ok(()))
    }
}
