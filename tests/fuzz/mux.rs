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
    muxer::Multiplex,
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
    /// How many bytes the peer takes at once; it takes none each other time. `None`: all.
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

/// A peer sends `bytes`, except for the first two: those choose how many bytes arrive at once, and what the relay does
/// with the streams that the peer opens (bits: echo, close, drop), and whether the peer takes its output slowly.
pub fn check(bytes: &[u8]) {
    let [at_once, choices, sent @ ..] = bytes else {
        return;
    };
    let budget = Budget { inbound: STREAMS, outbound: STREAMS };
    let limits = StreamLimits { stream_rate: 0, ..StreamLimits::default() };
    let multiplex = Multiplex::new(budget, limits, STREAMS);
    let memory = multiplex.memory.clone();
    let received = Arc::default();
    let at_once = 1 + usize::from(*at_once);
    let taken_at_once = (choices & 8 != 0).then_some(at_once);
    let received_too = Arc::clone(&received);
    let link = Link { sent, at_once, received: received_too, taken_at_once, is_full: false };
    let muxer = multiplex.upgrade_inbound(link, "/yamux/1.0.0").now_or_never();
    let mut muxer = muxer.expect("ready at once").expect("the upgrade cannot fail");
    let cx = &mut Context::from_waker(Waker::noop());
    let mut streams = Vec::new();
    let mut buffer = vec![0; 4 * KIB];
    // The muxer ends with an error when the input is invalid, or at its end.
    while Pin::new(&mut muxer).poll(cx).is_pending() {
        while let Poll::Ready(stream) = Pin::new(&mut muxer).poll_inbound(cx) {
            streams.push(stream.expect("the muxer has not failed"));
        }
        for (number, stream) in streams.iter_mut().enumerate() {
            let has = |bit: u8| choices.rotate_left(number as u32) & bit != 0;
            if has(1)
                && let Poll::Ready(Ok(read)) = Pin::new(&mut *stream).poll_read(cx, &mut buffer)
            {
                let _ = Pin::new(&mut *stream).poll_write(cx, &buffer[..read]);
            }
            if has(2) {
                let _ = Pin::new(stream).poll_close(cx);
            }
        }
        if choices & 4 != 0 {
            streams.pop();
        }
        let buffered = memory.buffered().bytes;
        assert!(buffered <= MOST_BUFFERED, "{buffered}");
    }
    drop(muxer);
    drop(streams);
    assert_eq!(memory.buffered().bytes, 0);
    assert_frames(&received.lock().unwrap(), taken_at_once.is_none());
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

/// Frames, most of them in order.
pub fn frames() -> impl Strategy<Value = Vec<u8>> {
    let flags = prop_oneof![4 => Just(0_u16), 4 => Just(1), 1 => 0..16_u16];
    let length = prop_oneof![4 => 0..40_usize, 1 => 0..300_000_usize];
    let frame = (0..3_u8, flags, 0..12_u32, length).prop_map(|(kind, flags, stream, length)| {
        let [flags, stream] = [u32::from(flags), stream].map(u32::to_be_bytes);
        let header = [&[0, kind], &flags[2..], &stream, &(length as u32).to_be_bytes()].concat();
        let body = vec![7; if kind == 0 { length } else { 0 }];
        [header, body].concat()
    });
    (any::<[u8; 2]>(), vec(frame, 0..40))
        .prop_map(|(how, frames)| [&how[..], &frames.concat()].concat())
}
