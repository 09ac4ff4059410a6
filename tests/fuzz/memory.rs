//! Connections in memory, whose other end is controlled by the test: no sockets, encryption or runtime.

use std::{
    collections::VecDeque,
    future::{Pending, Ready, ready},
    io,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard},
    task::{Context, Poll, Waker},
};

use libp2p::{
    Multiaddr, PeerId,
    core::{
        StreamMuxer,
        muxing::{StreamMuxerBox, StreamMuxerEvent},
        transport::{DialOpts, ListenerId, TransportError, TransportEvent},
    },
    futures::{AsyncRead, AsyncWrite},
};

/// State that the relay's end and the other end share.
#[derive(Debug, Default)]
pub struct Shared<T>(Arc<Mutex<T>>);

impl<T> Shared<T> {
    pub fn lock(&self) -> MutexGuard<'_, T> {
        self.0.lock().expect("no panic while it was locked")
    }

    /// Whether the relay has dropped its end.
    pub fn is_alone(&self) -> bool {
        Arc::strong_count(&self.0) == 1
    }
}

impl<T> Clone for Shared<T> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

/// A stream.
#[derive(Debug, Default)]
pub struct Pipe {
    pub to_relay: VecDeque<u8>,
    /// Whether the other end has closed its direction.
    pub closed: bool,
    pub reset: bool,
    pub from_relay: VecDeque<u8>,
    /// How many of these bytes may be unread.
    pub window: usize,
    pub closed_by_relay: bool,
    /// Whether the relay's end was dropped.
    pub dropped: bool,
    /// How many bytes the relay has read.
    pub read_by_relay: usize,
    /// How many bytes the relay has written.
    pub written_by_relay: usize,
    reader: Option<Waker>,
    writer: Option<Waker>,
}

impl Pipe {
    /// Wakes the relay's end after a change at the other end.
    pub fn wake(&mut self) {
        let wakers = [self.reader.take(), self.writer.take()];
        wakers.into_iter().flatten().for_each(Waker::wake);
    }

    fn check(&self) -> io::Result<()> {
        match self.reset {
            true => Err(io::ErrorKind::ConnectionReset.into()),
            false => Ok(()),
        }
    }
}

/// The relay's end of a stream.
#[derive(Debug)]
pub struct Substream(Shared<Pipe>);

impl Drop for Substream {
    fn drop(&mut self) {
        self.0.lock().dropped = true;
    }
}

impl AsyncRead for Substream {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        room: &mut [u8],
    ) -> Poll<io::Result<usize>> {
        let mut pipe = self.0.lock();
        pipe.check()?;
        let count = room.len().min(pipe.to_relay.len());
        if count == 0 && !pipe.closed && !room.is_empty() {
            pipe.reader = Some(cx.waker().clone());
            return Poll::Pending;
        }
        for (place, byte) in room.iter_mut().zip(pipe.to_relay.drain(..count)) {
            *place = byte;
        }
        pipe.read_by_relay += count;
        Poll::Ready(Ok(count))
    }
}

impl AsyncWrite for Substream {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let mut pipe = self.0.lock();
        pipe.check()?;
        assert!(!pipe.closed_by_relay, "nothing is written after the close");
        let room = pipe.window.saturating_sub(pipe.from_relay.len());
        let count = room.min(bytes.len());
        if count == 0 && !bytes.is_empty() {
            pipe.writer = Some(cx.waker().clone());
            return Poll::Pending;
        }
        pipe.from_relay.extend(&bytes[..count]);
        pipe.written_by_relay += count;
        Poll::Ready(Ok(count))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(self.0.lock().check())
    }

    fn poll_close(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut pipe = self.0.lock();
        pipe.check()?;
        pipe.closed_by_relay = true;
        Poll::Ready(Ok(()))
    }
}

/// A connection.
#[derive(Debug, Default)]
pub struct Link {
    /// Streams that the other end opened and the relay has not accepted yet.
    opened: VecDeque<Shared<Pipe>>,
    /// Streams that the relay opened and the other end has not handled yet.
    pub accepted: Vec<Shared<Pipe>>,
    /// Whether the relay may open streams.
    pub lets_open: bool,
    /// Whether the connection is lost.
    cut: bool,
    /// Whether the relay's end was dropped.
    pub dropped: bool,
    waker: Option<Waker>,
}

impl Link {
    pub fn open(&mut self, window: usize) -> Shared<Pipe> {
        let pipe = Shared::<Pipe>::default();
        pipe.lock().window = window;
        self.opened.push_back(pipe.clone());
        self.wake();
        pipe
    }

    /// How many streams the relay has not accepted yet.
    pub fn waiting(&self) -> usize {
        self.opened.len()
    }

    pub fn cut(&mut self) {
        self.cut = true;
        self.opened.clear();
        self.wake();
    }

    pub fn wake(&mut self) {
        self.waker.take().into_iter().for_each(Waker::wake);
    }

    fn check(&mut self, cx: &Context<'_>) -> io::Result<()> {
        self.waker = Some(cx.waker().clone());
        match self.cut {
            true => Err(io::ErrorKind::ConnectionReset.into()),
            false => Ok(()),
        }
    }
}

/// How much of what the relay sends may be unread, by default.
pub const WINDOW: usize = 256 * 1024;

/// The relay's end of a connection.
struct Muxer(Shared<Link>);

impl Drop for Muxer {
    fn drop(&mut self) {
        self.0.lock().dropped = true;
    }
}

impl StreamMuxer for Muxer {
    type Substream = Substream;
    type Error = io::Error;

    fn poll_inbound(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<Substream>> {
        let mut link = self.0.lock();
        link.check(cx)?;
        match link.opened.pop_front() {
            Some(pipe) => Poll::Ready(Ok(Substream(pipe))),
            None => Poll::Pending,
        }
    }

    fn poll_outbound(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<Substream>> {
        let mut link = self.0.lock();
        link.check(cx)?;
        if !link.lets_open {
            return Poll::Pending;
        }
        let pipe = Shared::<Pipe>::default();
        pipe.lock().window = WINDOW;
        link.accepted.push(pipe.clone());
        Poll::Ready(Ok(Substream(pipe)))
    }

    fn poll_close(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<StreamMuxerEvent>> {
        self.0.lock().check(cx)?;
        Poll::Pending
    }
}

/// A transport with inbound connections in memory.
#[derive(Clone, Default)]
pub struct MemoryTransport(Shared<Incoming>);

#[derive(Default)]
struct Incoming {
    connections: VecDeque<(PeerId, Multiaddr, Muxer)>,
    waker: Option<Waker>,
}

impl MemoryTransport {
    pub fn connect(&self, peer: PeerId, from: Multiaddr) -> Shared<Link> {
        let link = Shared::<Link>::default();
        link.lock().lets_open = true;
        let mut incoming = self.0.lock();
        let muxer = Muxer(link.clone());
        incoming.connections.push_back((peer, from, muxer));
        incoming.waker.take().into_iter().for_each(Waker::wake);
        link
    }
}

impl libp2p::Transport for MemoryTransport {
    type Output = (PeerId, StreamMuxerBox);
    type Error = io::Error;
    type ListenerUpgrade = Ready<io::Result<Self::Output>>;
    type Dial = Pending<io::Result<Self::Output>>;

    fn listen_on(&mut self, _: ListenerId, _: Multiaddr) -> Result<(), TransportError<io::Error>> {
        Ok(())
    }

    fn remove_listener(&mut self, _: ListenerId) -> bool {
        false
    }

    fn dial(
        &mut self,
        address: Multiaddr,
        _: DialOpts,
    ) -> Result<Self::Dial, TransportError<io::Error>> {
        Err(TransportError::MultiaddrNotSupported(address))
    }

    fn poll(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<TransportEvent<Self::ListenerUpgrade, io::Error>> {
        let mut incoming = self.0.lock();
        let Some((peer, send_back_addr, muxer)) = incoming.connections.pop_front() else {
            incoming.waker = Some(cx.waker().clone());
            return Poll::Pending;
        };
        Poll::Ready(TransportEvent::Incoming {
            listener_id: ListenerId::next(),
            upgrade: ready(Ok((peer, StreamMuxerBox::new(muxer)))),
            local_addr: "/memory/1".parse().expect("a multiaddr"),
            send_back_addr,
        })
    }
}
