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
    budget::{Connection, ConnectionBudget, Cut, MemoryBudget},
    session::{Role, Session},
    stream::Stream,
    stream_limits::{Key, StreamAdmission},
};
use crate::address::ClientPrefix;

/// A session and its lock. No thread holds the locks of two sessions, or wakes a task under one.
#[derive(Debug)]
pub struct Shared {
    session: Mutex<Session>,
    /// What it is charged.
    pub budget: Arc<ConnectionBudget>,
}

impl Shared {
    /// A session of a connection from this prefix.
    pub fn new(
        role: Role,
        admission: StreamAdmission,
        memory: &MemoryBudget,
        prefix: Option<ClientPrefix>,
    ) -> Arc<Self> {
        Arc::new_cyclic(|shared: &Weak<Self>| {
            let budget = memory.open(prefix, shared.clone());
            let session = Mutex::new(Session::new(role, Arc::clone(&budget), admission));
            Self { session, budget }
        })
    }

    /// Calls `act` under the lock, and applies its effects after releasing that.
    pub fn with<T>(&self, act: impl FnOnce(&mut Session) -> T) -> T {
        let mut session = self.session.lock().unwrap_or_else(PoisonError::into_inner);
        let result = act(&mut session);
        let effects = session.take_effects();
        drop(session);
        effects.apply(&self.budget.pool);
        result
    }

    /// Whether its lock is held.
    #[cfg(test)]
    pub fn is_locked(&self) -> bool {
        self.session.try_lock().is_err()
    }
}

impl Connection for Shared {
    fn budget(&self) -> &ConnectionBudget {
        &self.budget
    }

    fn shed(&self, now: Instant) -> usize {
        self.with(|session| session.shed(now, Cut::Pool))
    }

    fn reset(&self, stream: Key) {
        self.with(|session| session.change(stream, Stream::reset));
    }

    fn credit(&self) -> usize {
        self.with(|session| session.credit())
    }
}

/// The handle of a stream. Dropping it before it is closed resets the stream.
#[derive(Debug)]
pub struct Substream {
    shared: Arc<Shared>,
    key: Key,
    /// The negotiation of the protocol, if the peer opened the stream, until that is known.
    negotiation: Option<Negotiation>,
    /// Whether the peer opened it and no request has arrived on it yet.
    is_unused: bool,
}

impl Substream {
    /// The handle of this stream of the session.
    pub fn new(shared: &Arc<Shared>, key: Key, is_inbound: bool) -> Self {
        let negotiation = is_inbound.then(Negotiation::default);
        Self { shared: Arc::clone(shared), key, negotiation, is_unused: is_inbound }
    }
}

impl Drop for Substream {
    fn drop(&mut self) {
        self.shared.with(|session| session.change(self.key, Stream::drop_handle));
    }
}

impl AsyncRead for Substream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut [u8],
    ) -> Poll<io::Result<usize>> {
        let (key, now) = (self.key, Instant::now());
        let read = self.shared.with(|session| session.poll_read(key, cx, buffer, now));
        let read = ready!(read)?;
        if self.negotiation.is_some() {
            let bytes = buffer.get(..read).unwrap_or_default();
            if !Negotiation::accepts(bytes, buffer.len()) {
                return Poll::Ready(Err(io::ErrorKind::InvalidData.into()));
            }
        } else if read > 0 && std::mem::take(&mut self.is_unused) {
            self.shared.with(|session| session.set_used(key));
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
        let (key, now) = (self.key, Instant::now());
        let written = self.shared.with(|session| session.poll_write(key, cx, bytes, now));
        let written = ready!(written)?;
        self.shared.budget.pool.push_out(now);
        let bytes = bytes.get(..written).unwrap_or_default();
        if self.negotiation.as_mut().is_some_and(|negotiation| negotiation.on_write(bytes)) {
            self.negotiation = None;
        }
        Poll::Ready(Ok(written))
    }

    /// Ready at once: written data is sent even if the handle is dropped.
    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.shared.with(|session| session.flush(self.key));
        Poll::Ready(Ok(()))
    }

    /// Ready at once: the end of the stream is sent after the written data.
    fn poll_close(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.shared.with(|session| session.change(self.key, |stream, _| stream.close()));
        Poll::Ready(Ok(()))
    }
}

/// Limits what a peer may send while the protocol of its stream is being negotiated, and parses what the relay writes
/// until that accepts one.
///
/// Sans-IO. libp2p's multistream-select allocates 16 KiB for a message as soon as its length is announced, which takes two
/// bytes. No protocol name is longer than 127 bytes, so longer messages are rejected.
/// See [the specification](https://github.com/multiformats/multistream-select).
#[derive(Debug, Default)]
struct Negotiation {
    /// What the relay has written of the current message, its length first.
    message: Vec<u8>,
}

impl Negotiation {
    /// Whether the relay accepts what it has read into a buffer of this size. multistream-select reads only lengths byte
    /// by byte; the first byte of a length above 127 has its highest bit set.
    fn accepts(read: &[u8], buffer: usize) -> bool {
        !(buffer == 1 && read.first().is_some_and(|byte| *byte >= 0x80))
    }

    /// Parses what the relay writes. Returns whether it has accepted a protocol by now.
    fn on_write(&mut self, bytes: &[u8]) -> bool {
        bytes.iter().any(|byte| self.on_byte(*byte))
    }

    fn on_byte(&mut self, byte: u8) -> bool {
        self.message.push(byte);
        match unsigned_varint::decode::usize(&self.message) {
            Ok((length, text)) if text.len() >= length => {
                let accepts = text.starts_with(b"/") && text != b"/multistream/1.0.0\n";
                self.message.clear();
                accepts
            }
            _ => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(text: &str) -> Vec<u8> {
        [&[text.len() as u8 + 1], text.as_bytes(), b"\n"].concat()
    }

    #[test]
    fn it_ends_when_the_relay_accepts_a_protocol_in_any_number_of_writes() {
        let list = line(&"/one/of/them".repeat(12));
        let list = [&[0x80 | (list.len() as u8 & 0x7f), 1], &list[..]].concat();
        for (said, agrees) in [
            (line("/multistream/1.0.0"), false),
            (line("na"), false),
            (list, false),
            (line("/multistream/1.0.0/and/more"), true),
            (line("/ipfs/ping/1.0.0"), true),
        ] {
            let mut at_once = Negotiation::default();
            assert!(!at_once.on_write(&line("/multistream/1.0.0")));
            assert_eq!(at_once.on_write(&said), agrees, "{said:?}");
            let mut cut = Negotiation::default();
            let agreed = said.iter().map(|byte| cut.on_write(&[*byte]));
            assert_eq!(agreed.last(), Some(agrees), "{said:?}");
        }
    }

    #[test]
    fn lengths_above_127_are_rejected() {
        assert!(Negotiation::accepts(&[0x7f], 1));
        assert!(!Negotiation::accepts(&[0x80], 1));
        assert!(Negotiation::accepts(&[0xff, 7], 99), "not a length");
        assert!(Negotiation::accepts(&[], 1));
    }
}
