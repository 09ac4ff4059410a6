//! The muxer with any input: it goes on reading or fails with an error, stays within its memory limit, and writes valid
//! frames.

use std::{
    io,
    pin::Pin,
    sync::{Arc, Mutex},
    task::{Context, Poll, Waker},
};

use libp2p::{
    core::{muxing::StreamMuxer, upgrade::InboundConnectionUpgrade},
    futures::{AsyncRead, AsyncWrite, FutureExt},
};
use proptest::{collection::vec, prelude::*};
use relaylet::program::mux::{
    muxer::{Multiplex, Muxer, Substream},
    stream_limits::{Budget, StreamLimits},
};

const STREAMS: usize = 8;
const KIB: usize = 1024;

/// The most bytes that the muxer may buffer: for each stream a receive window and as much to send, with their overhead,
/// and a margin.
const MOST_BUFFERED: usize = STREAMS * 2 * (256 + 64) * KIB + 2048 * KIB;

/// A connection whose peer sends `sent`, `at_once` bytes at a time, and whose output is collected in `received`.
struct Link<'a> {
    sent: &'a [u8],
    at_once: usize,
    received: Arc<Mutex<Vec<u8>>>,
    /// How many bytes the peer takes at once; it takes none every other time. `None`: all.
    taken_at_once: Option<usize>,
    is_full: bool,
}

impl AsyncRead for Link<'_> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
        buffer: &mut [u8],
    ) -> Poll<io::Result<usize>> {
        let (room, _) = buffer.split_at_mut(self.at_once.min(buffer.len()));
        Poll::Ready(io::Read::read(&mut self.sent, room))
    }
}

impl AsyncWrite for Link<'_> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.is_full = !self.is_full && self.taken_at_once.is_some();
        if self.is_full {
            return Poll::Pending;
        }
        let (bytes, _) = bytes.split_at(self.taken_at_once.unwrap_or(bytes.len()).min(bytes.len()));
        self.received.lock().unwrap().extend(bytes);
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_close(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

/// The limit of a small pool, and by how much it may be exceeded: what cannot be freed, and what arrives at once.
const SMALL_POOL: usize = 256 * KIB;
const EXCESS: usize = 64 * KIB;

/// One connection: its muxer until that fails, the streams that the relay has accepted, and the output.
struct Connection<'a> {
    muxer: Option<Muxer<Link<'a>>>,
    streams: Vec<Substream>,
    received: Arc<Mutex<Vec<u8>>>,
    taken_at_once: Option<usize>,
    choices: u8,
}

impl<'a> Connection<'a> {
    /// A connection from the host of this number.
    fn new(multiplex: &Multiplex, host: u8, sent: &'a [u8], at_once: usize, choices: u8) -> Self {
        let address = format!("/ip4/192.0.2.{host}/tcp/1").parse().expect("an address");
        let received = Arc::<Mutex<Vec<u8>>>::default();
        let taken_at_once = (choices & 8 != 0).then_some(at_once);
        let to = Arc::clone(&received);
        let link = Link { sent, at_once, received: to, taken_at_once, is_full: false };
        let multiplex = multiplex.of(&address, None, None);
        let muxer = multiplex.upgrade_inbound(link, "/yamux/1.0.0").now_or_never();
        let muxer = Some(muxer.expect("ready at once").expect("the upgrade cannot fail"));
        Self { muxer, streams: Vec::new(), received, taken_at_once, choices }
    }

    /// Polls the muxer once, and uses its streams. Returns false once the muxer has failed: because the input is
    /// invalid, or at its end.
    fn poll(&mut self) -> bool {
        let cx = &mut Context::from_waker(Waker::noop());
        let Some(muxer) = &mut self.muxer else { return false };
        if Pin::new(&mut *muxer).poll(cx).is_ready() {
            self.muxer = None;
            return false;
        }
        while let Poll::Ready(stream) = Pin::new(&mut *muxer).poll_inbound(cx) {
            self.streams.push(stream.expect("the muxer has not failed"));
        }
        let mut buffer = [0; 4 * KIB];
        for (number, stream) in self.streams.iter_mut().enumerate() {
            let has = |bit: u8| self.choices.rotate_left(number as u32) & bit != 0;
            if has(1)
                && let Poll::Ready(Ok(read)) = Pin::new(&mut *stream).poll_read(cx, &mut buffer)
            {
                let _ = Pin::new(&mut *stream).poll_write(cx, &buffer[..read]);
            }
            if has(2) {
                let _ = Pin::new(stream).poll_close(cx);
            }
        }
        if self.choices & 4 != 0 {
            self.streams.pop();
        }
        true
    }
}

/// A peer sends `bytes`, except for the first two. The first byte chooses how many bytes arrive at once. The bits of
/// the second choose whether the relay echoes (1), closes (2) and drops (4) the streams that the peer opens, whether
/// the peer takes its output slowly (8), and whether a second peer sends the same at another speed, while both share a
/// small pool (16).
pub fn check(bytes: &[u8]) {
    let [at_once, choices, sent @ ..] = bytes else {
        return;
    };
    let (at_once, is_crowded) = (1 + usize::from(*at_once), choices & 16 != 0);
    let budget = Budget { inbound: STREAMS, outbound: STREAMS };
    let max_buffered = is_crowded.then_some(SMALL_POOL);
    let limits = StreamLimits { stream_rate: 0, max_buffered, ..StreamLimits::default() };
    let multiplex = Multiplex::new(budget, limits, STREAMS);
    let most = if is_crowded { SMALL_POOL + EXCESS } else { MOST_BUFFERED };
    let mut connections = vec![Connection::new(&multiplex, 1, sent, at_once, *choices)];
    if is_crowded {
        let at_once = 1 + at_once / 3;
        let choices = choices.rotate_left(1); // other ones than the first peer's
        connections.push(Connection::new(&multiplex, 2, sent, at_once, choices));
    }
    while connections.iter_mut().fold(false, |polls, connection| connection.poll() | polls) {
        let buffered = multiplex.memory.buffered().bytes;
        assert!(buffered <= most, "{buffered}");
    }
    connections.iter_mut().for_each(|connection| connection.streams.clear());
    assert_eq!(multiplex.memory.buffered().bytes, 0);
    for Connection { received, taken_at_once, .. } in connections {
        assert_frames(&received.lock().unwrap(), taken_at_once.is_none());
    }
}

/// Asserts that the output consists of frames of known types, with nothing after a go-away; the last may be cut short
/// unless `are_whole`.
fn assert_frames(mut bytes: &[u8], are_whole: bool) {
    while let Some((header, rest)) = bytes.split_first_chunk::<12>() {
        let [version, kind, _, _, _, _, _, _, l0, l1, l2, l3] = *header;
        assert!(version == 0 && kind <= 3, "{header:?}");
        let length = if kind == 0 { u32::from_be_bytes([l0, l1, l2, l3]) as usize } else { 0 };
        assert!(!are_whole || length <= rest.len(), "a whole body");
        bytes = rest.get(length..).unwrap_or_default();
        assert!(kind != 3 || bytes.is_empty(), "nothing after a go-away");
    }
    assert!(!are_whole || bytes.is_empty(), "a whole header");
}

/// Two bytes that choose (see [`check`]), and then frames, most of them valid.
pub fn frames() -> impl Strategy<Value = Vec<u8>> {
    let flags = prop_oneof![4 => Just(0_u16), 4 => Just(1), 1 => 0..16_u16];
    let length = prop_oneof![4 => 0..40_usize, 1 => 0..300_000_usize];
    // No go-away: it would end the session.
    let frame = (0..3_u8, flags, 0..12_u32, length).prop_map(|(kind, flags, stream, length)| {
        let [flags, stream] = [u32::from(flags), stream].map(u32::to_be_bytes);
        let header = [&[0, kind], &flags[2..], &stream, &(length as u32).to_be_bytes()].concat();
        let body = vec![7; if kind == 0 { length } else { 0 }];
        [header, body].concat()
    });
    (any::<[u8; 2]>(), vec(frame, 0..40))
        .prop_map(|(how, frames)| [&how[..], &frames.concat()].concat())
}
