//! One session against frames of a peer, and two sessions against each other.

#[cfg(test)]
mod pool;
#[cfg(test)]
mod table;

use std::{
    collections::HashMap,
    sync::atomic::{AtomicBool, Ordering},
    task::Wake,
};

use proptest::{collection::vec, prelude::*};

use super::{frames::Frames, *};
use crate::program::mux::{
    frame::{Chunk, FIN, HEADER, Header, INITIAL_WINDOW, Kind, MAX_WINDOW, Room, SYN},
    stream_limits::{Budget, StreamLimits},
};

const KIB: usize = 1024;
const PLENTY: usize = 1 << 40;
const MAX_GROWTH: usize = MAX_WINDOW - INITIAL_WINDOW;

/// One end of a connection.
struct Side {
    session: Session,
    room: Room,
    now: Instant,
    budget: MemoryBudget,
}

impl Side {
    fn new(role: Endpoint) -> Self {
        Self::with(role, MemoryBudget::new(PLENTY, PLENTY, MAX_GROWTH))
    }

    fn with(role: Endpoint, budget: MemoryBudget) -> Self {
        let account = budget.open(None, Weak::<Shared>::new());
        let session = Session::new(role, account, admission(100));
        let (room, now) = (Room::default(), Instant::now());
        Self { session, room, now, budget }
    }

    /// Charges this many bytes to another connection of the same prefix, until the returned account is dropped.
    fn fill_pool(&mut self, bytes: usize) -> Arc<ConnectionBudget> {
        let other = self.budget.open(None, Weak::<Shared>::new());
        other.replace_charge(0, bytes);
        self.budget.compute_shares(self.now);
        other
    }

    fn open(&mut self) -> Key {
        let Poll::Ready(opened) = self.session.poll_open(&cx(), self.now) else {
            panic!("the limits allow no stream");
        };
        opened.expect("an id")
    }

    fn accept(&mut self) -> Option<Key> {
        match self.session.poll_accept(&cx()) {
            Poll::Ready(key) => Some(key),
            Poll::Pending => None,
        }
    }

    fn write(&mut self, stream: Key, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let write = |it: &mut Stream| it.poll_write(bytes, self.now);
        let written = self.session.poll_stream(stream, &cx(), |it| &mut it.writer, write);
        std::mem::take(&mut self.session.effects).apply(&self.budget);
        written
    }

    /// Reads once; `None` if there is nothing.
    fn read(&mut self, stream: Key, most: usize) -> Option<io::Result<Vec<u8>>> {
        let mut bytes = vec![0; most];
        let read = |it: &mut Stream| it.poll_read(&mut bytes, self.now);
        let read = self.session.poll_stream(stream, &cx(), |it| &mut it.reader, read);
        std::mem::take(&mut self.session.effects).apply(&self.budget);
        match read {
            Poll::Ready(read) => Some(read.map(|read| bytes[..read].to_vec())),
            Poll::Pending => None,
        }
    }

    /// Takes one write batch of frames.
    fn send(&mut self) -> Vec<u8> {
        self.send_at_most(QUANTUM)
    }

    fn send_at_most(&mut self, most: usize) -> Vec<u8> {
        let mut frames = Vec::new();
        self.session.take_frames(&mut frames, most, self.now);
        std::mem::take(&mut self.session.effects).apply(&self.budget);
        frames
    }

    fn send_all(&mut self) -> Vec<u8> {
        let mut all = Vec::new();
        loop {
            let frames = self.send();
            if frames.is_empty() {
                return all;
            }
            all.extend(frames);
        }
    }

    fn receive(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let into = self.room.buffer();
            let some = into.len().min(bytes.len());
            into[..some].copy_from_slice(&bytes[..some]);
            bytes = &bytes[some..];
            self.session.receive(&mut self.room, some, self.now)?;
            std::mem::take(&mut self.session.effects).apply(&self.budget);
        }
        Ok(())
    }

    fn drop_handle(&mut self, stream: Key) {
        self.session.change(stream, Stream::drop_handle);
        std::mem::take(&mut self.session.effects).apply(&self.budget);
    }

    /// Asserts that nothing is left of any stream.
    fn assert_empty(&mut self) {
        let session = &self.session;
        assert!(session.streams.is_empty(), "{session:#?}");
        assert!(session.half_closed.is_empty(), "{session:#?}");
        assert_eq!((session.inbound, session.outbound), (0, 0));
        assert_eq!((session.unacknowledged, session.refused), (0, 0));
        assert_eq!(session.growth, MAX_GROWTH);
        assert_eq!(self.budget.buffered().bytes, 0);
    }
}

/// Admits this many streams, without a rate limit.
fn admission(streams: usize) -> StreamAdmission {
    let limits =
        StreamLimits { stream_rate: 0, max_streams: streams * 8, ..StreamLimits::default() };
    StreamAdmission::new(Budget { inbound: streams, outbound: streams }, limits)
}

fn cx() -> Context<'static> {
    Context::from_waker(Waker::noop())
}

fn frame(kind: Kind, flags: Flags, stream: u32, length: usize) -> Vec<u8> {
    Header { kind, flags, stream, length: length as u32 }.encode().to_vec()
}

fn data(flags: Flags, stream: u32, length: usize) -> Vec<u8> {
    [frame(Kind::Data, flags, stream, length), vec![7; length]].concat()
}

/// Parses the headers of `bytes`, a sequence of frames.
fn headers(mut bytes: &[u8]) -> Vec<Header> {
    let mut headers = Vec::new();
    while let Some((header, rest)) = bytes.split_first_chunk() {
        let header = Header::parse(*header).expect("a header");
        headers.push(header);
        bytes = &rest[if header.kind == Kind::Data { header.length as usize } else { 0 }..];
    }
    headers
}

fn is_reset(read: Option<io::Result<Vec<u8>>>) -> bool {
    matches!(read, Some(Err(error)) if error.kind() == io::ErrorKind::ConnectionReset)
}

/// Receives a SYN for stream `id` and accepts the stream.
fn accept_inbound(server: &mut Side, id: u32) -> Key {
    server.receive(&frame(Kind::Data, SYN, id, 0)).expect("a valid frame");
    server.accept().expect("an inbound stream")
}

// ---- Frames of a peer

#[test]
fn protocol_violations_end_the_session_with_go_away() {
    let window = INITIAL_WINDOW;
    for (broken, reason) in [
        (data(0, 1, window + 1), Reason::ProtocolError),
        (data(SYN, 3, window + 1), Reason::ProtocolError),
        (frame(Kind::Data, 0, 99, MAX_WINDOW + 1), Reason::ProtocolError),
        (frame(Kind::WindowUpdate, 0, 1, u32::MAX as usize), Reason::ProtocolError),
        (frame(Kind::WindowUpdate, SYN, 3, u32::MAX as usize), Reason::ProtocolError),
        (frame(Kind::Data, SYN, 1, 0), Reason::ProtocolError),
        (frame(Kind::WindowUpdate, SYN, 2, 0), Reason::ProtocolError),
        (frame(Kind::Data, SYN, 0, 0), Reason::ProtocolError),
        (frame(Kind::Ping, ACK, 0, 4711), Reason::ProtocolError),
        ([0, 9, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0].to_vec(), Reason::ProtocolError),
        ([1; HEADER].to_vec(), Reason::ProtocolError),
    ] {
        let mut server = Side::new(Endpoint::Listener);
        accept_inbound(&mut server, 1);
        let end = server.receive(&broken).expect_err("a protocol violation");
        assert_eq!(end.kind(), io::ErrorKind::Other, "{end}");
        server.session.end();
        let last = headers(&server.send_all()).pop().expect("a go-away");
        assert_eq!((last.kind, last.length), (Kind::GoAway, reason as u32));
        server.session.close_all();
        server.assert_empty();
    }
}

#[test]
fn go_away_ends_the_session_and_earlier_data_is_still_read() {
    let mut server = Side::new(Endpoint::Listener);
    let stream = accept_inbound(&mut server, 1);
    server.receive(&data(0, 1, 5)).unwrap();
    let end = server.receive(&frame(Kind::GoAway, 0, 0, 0)).expect_err("GO_AWAY ends the session");
    assert_eq!(end.kind(), io::ErrorKind::ConnectionAborted);
    server.session.end();
    assert_eq!(server.read(stream, 9).unwrap().unwrap(), [7; 5]);
    let error = server.read(stream, 9).unwrap().unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ConnectionAborted, "no reset of the stream alone");
    assert!(server.send_all().is_empty());
    server.session.close_all();
    server.assert_empty();
}

#[test]
fn a_session_that_leaves_sends_its_data_and_then_go_away() {
    let mut server = Side::new(Endpoint::Listener);
    let stream = accept_inbound(&mut server, 1);
    server.receive(&data(0, 1, PING_AFTER)).unwrap();
    assert!(server.write(stream, b"last").is_ready());
    server.session.leave(&cx());
    server.session.leave(&cx());
    let sent = headers(&server.send_all());
    let kinds: Vec<_> = sent.iter().map(|header| (header.kind, header.length)).collect();
    assert_eq!(kinds, [(Kind::Data, 4), (Kind::GoAway, Reason::Normal as u32)]);
    assert!(matches!(server.session.poll_open(&cx(), server.now), Poll::Ready(Err(_))));
}

#[test]
fn a_session_that_has_ended_accepts_no_stream_and_answers_no_ping() {
    let mut server = Side::new(Endpoint::Listener);
    server.receive(&data(SYN | FIN, 1, 3)).unwrap();
    server.receive(&frame(Kind::Ping, SYN, 0, 1)).unwrap();
    server.session.end();
    assert_eq!(server.accept(), None);
    assert!(server.send_all().is_empty());
    server.session.close_all();
    server.assert_empty();
}

#[test]
fn a_stream_that_is_reset_before_it_is_accepted_is_not_accepted() {
    let mut server = Side::new(Endpoint::Listener);
    for id in [1, 3] {
        server.receive(&frame(Kind::Data, SYN, id, 0)).unwrap();
    }
    server.receive(&frame(Kind::Data, RST, 1, 0)).unwrap();
    assert_eq!(server.accept().unwrap().0, 3);
    assert_eq!((server.accept(), server.session.inbound), (None, 1));
}

#[test]
fn memory_of_what_waits_for_the_socket_is_free_once_the_session_is_closed() {
    let mut server = Side::new(Endpoint::Listener);
    let stream = accept_inbound(&mut server, 1);
    server.send_all();
    assert!(server.write(stream, &[0; QUANTUM]).is_ready());
    server.send();
    server.session.close_all();
    server.assert_empty();
}

#[test]
fn the_round_trip_time_is_measured_at_most_once_in_ten_seconds_by_the_answer_to_the_last_ping() {
    let mut server = Side::new(Endpoint::Listener);
    let stream = accept_inbound(&mut server, 1);
    let pings = |server: &mut Side| {
        server.receive(&data(0, 1, PING_AFTER)).unwrap();
        while server.read(stream, PING_AFTER).is_some() {}
        let sent = headers(&server.send_all());
        let pings = sent.iter().filter(|it| (it.kind, it.flags) == (Kind::Ping, SYN));
        pings.map(|it| it.length as usize).collect::<Vec<_>>()
    };
    assert_eq!(pings(&mut server), [1]);
    server.now += 2 * PING_INTERVAL;
    assert!(pings(&mut server).is_empty(), "one at a time");
    server.receive(&frame(Kind::Ping, ACK, 0, 1)).unwrap();
    assert_eq!(pings(&mut server), [2]);
    server.receive(&frame(Kind::Ping, ACK, 0, 2)).unwrap();
    assert!(pings(&mut server).is_empty());
    server.now += PING_INTERVAL;
    assert_eq!(pings(&mut server), [3]);
    assert!(server.receive(&frame(Kind::Ping, ACK, 0, 2)).is_err(), "not the last one");
}

#[test]
fn data_that_was_complete_before_the_session_ended_ends_without_an_error() {
    let mut server = Side::new(Endpoint::Listener);
    let stream = accept_inbound(&mut server, 1);
    server.receive(&data(FIN, 1, 3)).unwrap();
    server.session.end();
    assert_eq!(server.read(stream, 9).unwrap().unwrap(), [7; 3]);
    assert!(server.read(stream, 9).unwrap().unwrap().is_empty());
}

#[test]
fn only_the_newest_ping_is_answered_and_only_once() {
    let mut server = Side::new(Endpoint::Listener);
    server.receive(&[1, 2, 3].map(|id| frame(Kind::Ping, SYN, 0, id)).concat()).unwrap();
    assert_eq!(server.send_all(), frame(Kind::Ping, ACK, 0, 3));
    assert!(server.send_all().is_empty());
}

#[test]
fn the_flags_of_a_ping_do_not_affect_streams() {
    let mut server = Side::new(Endpoint::Listener);
    let stream = accept_inbound(&mut server, 1);
    let flags = SYN | FIN | RST;
    server.receive(&frame(Kind::Ping, flags, 1, 5)).unwrap();
    assert!(server.read(stream, 9).is_none(), "it goes on");
}

#[test]
fn frames_of_unknown_streams_are_skipped_without_buffering() {
    let mut server = Side::new(Endpoint::Listener);
    for flags in [0, ACK, FIN, RST] {
        server.receive(&data(flags, 5, 100 * KIB)).unwrap();
        server.receive(&frame(Kind::WindowUpdate, flags, 5, u32::MAX as usize)).unwrap();
    }
    assert!(server.send_all().is_empty());
    server.assert_empty();
}

#[test]
fn stream_ids_need_not_increase_and_finished_ones_may_be_reused() {
    let mut server = Side::new(Endpoint::Listener);
    for id in [5, 1, 3, 1] {
        let stream = accept_inbound(&mut server, id);
        server.receive(&data(FIN, id, 3)).unwrap();
        server.session.change(stream, Stream::close);
        assert!(headers(&server.send_all()).iter().any(|header| header.flags & FIN != 0));
        // Data that arrived before the FIN can still be read.
        assert_eq!(server.read(stream, 9).unwrap().unwrap(), [7; 3]);
        assert!(server.read(stream, 9).unwrap().unwrap().is_empty());
        if id != 1 {
            server.drop_handle(stream);
        }
    }
}

#[test]
fn the_flags_of_one_frame_are_handled_in_order() {
    for kind in [Kind::Data, Kind::WindowUpdate] {
        let mut server = Side::new(Endpoint::Listener);
        let bytes = match kind {
            Kind::Data => data(SYN | FIN, 1, 3),
            _ => frame(kind, SYN | FIN, 1, 3),
        };
        server.receive(&bytes).unwrap();
        let stream = server.accept().unwrap();
        if kind == Kind::Data {
            assert_eq!(server.read(stream, 9).unwrap().unwrap(), [7; 3]);
        }
        assert!(server.read(stream, 9).unwrap().unwrap().is_empty());
        server.session.change(stream, Stream::close);
        server.send_all();
        server.drop_handle(stream);
        server.assert_empty();
    }
}

#[test]
fn a_stream_reset_by_its_first_frame_is_not_opened() {
    let mut server = Side::new(Endpoint::Listener);
    server.receive(&data(SYN | RST, 1, 3)).unwrap();
    assert_eq!((server.session.inbound, server.accept()), (0, None));
    server.assert_empty();
}

#[test]
fn frames_that_open_streams_reset_them_or_ping_are_limited_and_others_are_not() {
    for (frame, is_limited) in [
        (frame(Kind::Ping, SYN, 0, 1), true),
        (frame(Kind::Ping, 0, 0, 1), true),
        (frame(Kind::Data, SYN | RST, 1, 0), true),
        (frame(Kind::WindowUpdate, RST, 1, 0), true),
        (frame(Kind::WindowUpdate, FIN, 1, 0), false),
        (data(0, 1, 1), false),
    ] {
        let mut server = Side::new(Endpoint::Listener);
        let limits = StreamLimits { stream_rate: 1, ..StreamLimits::default() };
        let budget = Budget { inbound: 9, outbound: 9 };
        server.session.admission = StreamAdmission::new(budget, limits);
        server.session.admission.prefix = Some(std::net::IpAddr::from([192, 0, 2, 1]).into());
        let mut is_paused = false;
        for byte in frame.iter().copied().cycle().take(1000 * frame.len()) {
            server.room.buffer()[0] = byte;
            let pause = server.session.receive(&mut server.room, 1, server.now).unwrap();
            is_paused |= !pause.is_zero();
        }
        assert_eq!(is_paused, is_limited, "{frame:?}");
    }
}

#[test]
fn a_session_is_unused_until_its_peer_opens_a_stream() {
    let mut server = Side::new(Endpoint::Listener);
    server.open();
    server.receive(&frame(Kind::Ping, SYN, 0, 1)).unwrap();
    assert!(server.session.end());
    assert!(!Side::new(Endpoint::Dialer).session.end(), "this side has dialed");
    let mut server = Side::new(Endpoint::Listener);
    server.receive(&frame(Kind::Data, SYN, 1, 0)).unwrap();
    assert!(!server.session.end());
}

#[test]
fn the_session_ends_after_256_unread_refusals() {
    let mut server = Side::new(Endpoint::Listener);
    server.session.admission.budget.inbound = 0;
    let syn = |id: u32| frame(Kind::Data, SYN, 2 * id + 1, 0);
    for id in 0..MAX_REFUSED as u32 {
        server.receive(&syn(id)).unwrap();
    }
    let end = server.receive(&syn(4711)).expect_err("too many");
    assert_eq!(end.to_string(), Cut::Refusals.kind());
    assert_eq!(server.budget.buffered().count(Cut::Refusals), 1);
    let mut resets = headers(&server.send_all());
    let go_away = resets.pop().expect("a go-away");
    assert_eq!((go_away.kind, go_away.length), (Kind::GoAway, Reason::InternalError as u32));
    assert_eq!(resets.len(), MAX_REFUSED + 1);
    assert!(resets.iter().all(|header| header.flags == RST));
}

#[test]
fn a_window_overflow_is_not_attributed_to_a_new_stream() {
    let mut server = Side::new(Endpoint::Listener);
    let most = u32::MAX as usize - INITIAL_WINDOW;
    server.receive(&frame(Kind::WindowUpdate, SYN, 1, most)).unwrap();
    assert!(server.receive(&frame(Kind::WindowUpdate, 0, 1, 1)).is_err());
}

// ---- Closing, resetting and dropping streams

#[test]
fn dropping_a_half_open_stream_resets_it_after_the_flushed_data() {
    for flushed in [true, false] {
        let mut server = Side::new(Endpoint::Listener);
        let stream = accept_inbound(&mut server, 1);
        assert!(server.write(stream, &[1; 9]).is_ready());
        if flushed {
            server.session.update(stream, Stream::flush);
            assert!(server.write(stream, &[2; 9]).is_ready());
        }
        server.drop_handle(stream);
        let mut sent = Vec::new();
        while let Some(kind) = server.session.take_frames(&mut sent, QUANTUM, server.now) {
            let is_reset = headers(&sent).iter().any(|header| header.flags & RST != 0);
            assert_eq!(is_reset, kind == Frames::Resets, "resets are sent in a batch of their own");
            if kind == Frames::Data {
                assert_eq!((headers(&sent)[0].length, flushed), (9, true));
            }
        }
        std::mem::take(&mut server.session.effects).apply(&server.budget);
        server.assert_empty();
    }
}

#[test]
fn dropping_a_stream_sends_the_rest_of_the_flushed_data_and_no_more() {
    let mut server = Side::new(Endpoint::Listener);
    let stream = accept_inbound(&mut server, 1);
    assert!(server.write(stream, &[1; 100]).is_ready());
    server.session.update(stream, Stream::flush);
    assert!(server.write(stream, &[2; 50]).is_ready());
    assert_eq!(headers(&server.send_at_most(60))[0].length, 60);
    server.drop_handle(stream);
    let sent = headers(&server.send_all());
    let sent: Vec<_> = sent.iter().map(|header| (header.length, header.flags)).collect();
    assert_eq!(sent, [(40, 0), (0, RST)]);
}

#[test]
fn a_stream_dropped_after_fin_is_reset_once_if_data_arrives() {
    let mut server = Side::new(Endpoint::Listener);
    let stream = accept_inbound(&mut server, 1);
    assert!(server.write(stream, &[1; 9]).is_ready());
    server.session.change(stream, Stream::close);
    server.drop_handle(stream);
    let sent = headers(&server.send_all());
    let last = sent.last().unwrap();
    assert_eq!(
        (last.length, last.flags & FIN != 0),
        (0, true),
        "go-yamux needs FIN in a frame of its own"
    );
    assert!(sent.iter().any(|header| header.length == 9), "buffered data is sent first");
    assert!(server.session.streams.is_empty());
    assert!(server.receive(&frame(Kind::Data, SYN, 1, 0)).is_err(), "the id is still in use");
    server.receive(&data(0, 1, 3)).unwrap();
    assert_eq!(headers(&server.send_all())[0].flags, RST);
    server.receive(&data(0, 1, 3)).unwrap();
    assert!(server.send_all().is_empty(), "a second reset");
    server.assert_empty();
}

#[test]
fn a_stream_dropped_after_fin_is_reset_at_once_if_its_peer_has_no_credit() {
    for is_sent in [true, false] {
        let mut server = Side::new(Endpoint::Listener);
        let stream = accept_inbound(&mut server, 1);
        server.session.change(stream, Stream::close);
        let mut sent = if is_sent { server.send_all() } else { Vec::new() };
        server.receive(&data(0, 1, INITIAL_WINDOW)).unwrap();
        server.drop_handle(stream);
        sent.extend(server.send_all());
        let flags: Vec<_> = headers(&sent).iter().map(|header| header.flags).collect();
        assert!(flags.iter().any(|flags| flags & FIN != 0), "{flags:?}");
        assert_eq!(
            flags.last(),
            Some(&RST),
            "the peer cannot send data that would cause the reset later"
        );
        server.assert_empty();
    }
}

#[test]
fn a_stream_that_is_dropped_before_its_fin_is_sent_is_reset_after_it_if_data_arrives() {
    let mut server = Side::new(Endpoint::Listener);
    let stream = accept_inbound(&mut server, 1);
    assert!(server.write(stream, b"last").is_ready());
    server.session.change(stream, Stream::close);
    server.drop_handle(stream);
    server.receive(&data(0, 1, 3)).unwrap();
    let sent = headers(&server.send_all());
    let flags: Vec<_> = sent.iter().map(|header| header.flags & !ACK).collect();
    assert_eq!(flags, [0, FIN, RST]);
    server.assert_empty();
}

#[test]
fn an_id_is_in_use_until_the_reset_of_its_stream_is_sent() {
    let mut server = Side::new(Endpoint::Listener);
    let stream = accept_inbound(&mut server, 1);
    server.session.change(stream, Stream::close);
    server.send_all();
    server.receive(&data(0, 1, INITIAL_WINDOW)).unwrap();
    server.drop_handle(stream);
    server.receive(&frame(Kind::Data, FIN, 1, 0)).unwrap();
    assert!(server.receive(&frame(Kind::Data, SYN, 1, 0)).is_err());
}

#[test]
fn a_reset_by_the_peer_frees_what_it_has_not_taken() {
    let mut server = Side::new(Endpoint::Listener);
    let stream = accept_inbound(&mut server, 1);
    server.send_all();
    let open = server.budget.buffered().bytes;
    assert!(server.write(stream, &[0; QUANTUM]).is_ready());
    server.receive(&frame(Kind::Data, RST, 1, 0)).unwrap();
    assert_eq!(server.budget.buffered().bytes, open);
    assert!(server.send_all().is_empty());
}

#[test]
fn a_stream_dropped_after_fin_discards_all_that_its_peer_may_send() {
    let mut server = Side::new(Endpoint::Listener);
    let stream = accept_inbound(&mut server, 1);
    let mut credit = 0;
    while credit < MAX_WINDOW {
        credit = use_credit(&mut server, stream, credit.max(INITIAL_WINDOW));
    }
    server.session.change(stream, Stream::close);
    server.drop_handle(stream);
    server.send_all();
    // All of it is on its way before the reset arrives.
    server.receive(&data(0, 1, KIB)).unwrap();
    server.receive(&data(0, 1, credit - KIB)).expect("no more than the window");
    assert_eq!(headers(&server.send_all()).pop().unwrap().flags, RST);
    server.assert_empty();
}

#[test]
fn evicting_a_finished_stream_does_not_reset_its_successor_of_the_same_id() {
    let mut server = Side::new(Endpoint::Listener);
    let stream = accept_inbound(&mut server, 1);
    server.receive(&data(FIN, 1, 9)).unwrap();
    server.session.change(stream, Stream::close);
    server.send_all();
    let next = accept_inbound(&mut server, 1);
    assert!(server.session.shed(server.now, Cut::Pool) > 0);
    assert!(is_reset(server.read(stream, 9)));
    assert!(headers(&server.send_all()).iter().all(|header| header.flags & RST == 0));
    assert!(server.read(next, 9).is_none(), "it goes on");
}

#[test]
fn a_bounded_number_of_finished_streams_is_remembered() {
    let mut server = Side::new(Endpoint::Listener);
    for id in 0..2 * MAX_REFUSED as u32 {
        let stream = accept_inbound(&mut server, 2 * id + 1);
        server.session.change(stream, Stream::close);
        server.drop_handle(stream);
        server.send_all();
    }
    assert_eq!(server.session.half_closed.len(), MAX_REFUSED);
    assert!(server.session.streams.is_empty());
}

#[test]
fn streams_that_come_and_go_leave_nothing_queued_while_the_peer_does_not_read() {
    let mut server = Side::new(Endpoint::Listener);
    let stays = accept_inbound(&mut server, 1);
    assert!(server.write(stays, b"unsent").is_ready());
    for id in 1..5000 {
        let stream = accept_inbound(&mut server, 2 * id + 1);
        if id % 2 == 0 {
            assert!(server.write(stream, b"unsent").is_ready());
        }
        server.receive(&frame(Kind::Data, RST, 2 * id + 1, 0)).unwrap();
        server.drop_handle(stream);
    }
    let Session { streams, control, new_flows, old_flows, .. } = &server.session;
    assert_eq!(streams.len(), 1);
    let queued = control.len() + new_flows.len() + old_flows.len();
    assert!(queued < 300, "{queued}");
    let sent = headers(&server.send_all());
    assert!(sent.iter().all(|header| header.stream == 1) && !sent.is_empty(), "{sent:?}");
}

#[test]
fn data_after_fin_resets_the_stream() {
    let mut server = Side::new(Endpoint::Listener);
    let stream = accept_inbound(&mut server, 1);
    server.receive(&data(FIN, 1, 1)).unwrap();
    server.receive(&data(0, 1, 1)).unwrap();
    assert!(is_reset(server.read(stream, 9)));
    assert!(headers(&server.send_all()).iter().any(|header| header.flags & RST != 0));
}

#[test]
fn a_reset_is_an_error_even_after_our_fin() {
    for closes in [true, false] {
        let mut server = Side::new(Endpoint::Listener);
        let stream = accept_inbound(&mut server, 1);
        if closes {
            server.session.change(stream, Stream::close);
            server.send_all();
        }
        server.receive(&data(RST, 1, 2)).unwrap();
        assert_eq!(
            server.read(stream, 9).unwrap().unwrap(),
            [7; 2],
            "data received before the reset"
        );
        assert!(is_reset(server.read(stream, 9)));
        server.drop_handle(stream);
        server.send_all();
        server.assert_empty();
    }
}

#[test]
fn dropping_an_unannounced_outbound_stream_sends_nothing() {
    let mut client = Side::new(Endpoint::Dialer);
    let stream = client.open();
    assert!(client.write(stream, b"unflushed").is_ready());
    client.drop_handle(stream);
    assert!(client.send_all().is_empty());
    client.assert_empty();
}

#[test]
fn opening_a_stream_waits_while_the_limit_on_outbound_streams_is_reached() {
    let mut client = Side::new(Endpoint::Dialer);
    client.session.admission.budget.outbound = 2;
    let streams = [(); 2].map(|()| client.open());
    let is_woken = Arc::new(Woken::default());
    let waker = Waker::from(Arc::clone(&is_woken));
    let cx = Context::from_waker(&waker);
    assert!(client.session.poll_open(&cx, client.now).is_pending());
    client.drop_handle(streams[0]);
    assert!(is_woken.0.load(Ordering::Relaxed), "there is room");
    client.open();
    assert!(client.session.poll_open(&cx, client.now).is_pending());
}

#[test]
fn only_the_last_task_that_waits_is_woken() {
    let mut server = Side::new(Endpoint::Listener);
    let stream = accept_inbound(&mut server, 1);
    let [first, last] = [(); 2].map(|()| Arc::new(Woken::default()));
    for task in [&first, &last] {
        let waker = Waker::from(Arc::clone(task));
        let cx = Context::from_waker(&waker);
        server.session.set_task(&cx);
        let read = |it: &mut Stream| it.poll_read(&mut [0; 9], server.now);
        assert!(server.session.poll_stream(stream, &cx, |it| &mut it.reader, read).is_pending());
        std::mem::take(&mut server.session.effects).apply(&server.budget);
    }
    server.receive(&data(0, 1, 1)).unwrap();
    let is_woken = [first, last].map(|task| task.0.load(Ordering::Relaxed));
    assert_eq!(is_woken, [false, true]);
}

/// Registers a waker as the connection's task, and calls `act`. Returns whether that woke the task.
fn wakes(side: &mut Side, act: impl FnOnce(&mut Side)) -> bool {
    let is_woken = Arc::new(Woken::default());
    side.session.set_task(&Context::from_waker(&Waker::from(Arc::clone(&is_woken))));
    act(side);
    std::mem::take(&mut side.session.effects).apply(&side.budget);
    is_woken.0.load(Ordering::Relaxed)
}

#[test]
fn the_task_is_woken_for_each_thing_that_it_has_to_do() {
    let mut server = Side::new(Endpoint::Listener);
    assert!(wakes(&mut server, |it| it.receive(&frame(Kind::Data, SYN, 1, 0)).unwrap()));
    let mut key = None;
    assert!(wakes(&mut server, |it| key = it.accept()), "an acknowledgement");
    let stream = key.unwrap();
    server.send_all();
    server.receive(&data(0, 1, INITIAL_WINDOW)).unwrap();
    server.read(stream, INITIAL_WINDOW).unwrap().unwrap();
    assert!(wakes(&mut server, |it| assert!(it.read(stream, 1).is_none())), "credit");
    server.send_all();
    assert!(wakes(&mut server, |it| assert!(it.write(stream, b"!").is_ready())), "data");
    server.send_all();
    assert!(wakes(&mut server, |it| it.drop_handle(stream)), "a reset");
    server.send_all();
    server.assert_empty();
    let is_woken = Arc::new(Woken::default());
    let waker = Waker::from(Arc::clone(&is_woken));
    assert!(server.session.poll_accept(&Context::from_waker(&waker)).is_pending());
    server.receive(&frame(Kind::Data, SYN, 3, 0)).unwrap();
    assert!(is_woken.0.load(Ordering::Relaxed), "a stream for the task that accepts");
    let opened = server.open();
    assert!(server.write(opened, b"!").is_ready());
    server.send_all();
    let answer = frame(Kind::WindowUpdate, ACK, opened.0, 0);
    assert!(wakes(&mut server, |it| it.receive(&answer).unwrap()), "another stream may open");
}

/// Whether a task was woken.
#[derive(Default)]
struct Woken(AtomicBool);

impl Wake for Woken {
    fn wake(self: Arc<Self>) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn at_most_256_unacknowledged_streams_are_opened() {
    let mut client = Side::new(Endpoint::Dialer);
    client.session.admission.budget.outbound = 1000;
    let streams: Vec<_> = (0..MAX_UNACKNOWLEDGED).map(|_| client.open()).collect();
    assert!(client.session.poll_open(&cx(), client.now).is_pending());
    for stream in &streams {
        assert!(client.write(*stream, b"!").is_ready());
    }
    client.send_all();
    client.receive(&frame(Kind::WindowUpdate, ACK, 1, 0)).unwrap();
    client.receive(&frame(Kind::WindowUpdate, ACK, 1, 0)).unwrap();
    client.open();
    assert!(client.session.poll_open(&cx(), client.now).is_pending());
    client.drop_handle(streams[1]);
    client.send_all();
    assert!(client.session.poll_open(&cx(), client.now).is_ready());
}

// ---- Memory

#[test]
fn a_header_allocates_nothing_and_a_byte_one_chunk() {
    let mut server = Side::new(Endpoint::Listener);
    let stream = accept_inbound(&mut server, 1);
    server.send_all();
    let open = server.budget.buffered().bytes;
    server.receive(&frame(Kind::Data, 0, 1, INITIAL_WINDOW)).unwrap();
    server.room.chunk = Chunk::default();
    assert_eq!(server.budget.buffered().bytes, open);
    for _ in 0..3 {
        server.receive(&[1]).unwrap();
        server.room.chunk = Chunk::default();
        assert_eq!(server.budget.buffered().bytes, open + 16 * KIB);
    }
    assert_eq!(server.read(stream, 9).unwrap().unwrap(), [1; 3]);
    assert_eq!(server.budget.buffered().bytes, open + 3, "freed by the next read");
    assert!(server.read(stream, 9).is_none());
    assert_eq!(server.budget.buffered().bytes, open);
}

#[test]
fn what_is_written_at_once_takes_no_more_memory_than_its_frame() {
    let mut server = Side::new(Endpoint::Listener);
    let stream = accept_inbound(&mut server, 1);
    server.send_all();
    let open = server.budget.buffered().bytes;
    assert!(server.write(stream, &[0; QUANTUM]).is_ready());
    assert_eq!(server.budget.buffered().bytes, open + HEADER + QUANTUM);
}

#[test]
fn a_read_into_no_buffer_does_not_wait() {
    let mut server = Side::new(Endpoint::Listener);
    let stream = accept_inbound(&mut server, 1);
    assert!(server.read(stream, 0).unwrap().unwrap().is_empty());
    assert!(server.read(stream, 1).is_none());
}

#[test]
fn one_byte_frames_use_no_more_memory_than_long_ones() {
    let mut server = Side::new(Endpoint::Listener);
    accept_inbound(&mut server, 1);
    server.send_all();
    let open = server.budget.buffered().bytes;
    for _ in 0..8 * KIB {
        server.receive(&data(0, 1, 1)).unwrap();
    }
    assert_eq!(server.budget.buffered().bytes, open + 8 * KIB);
}

#[test]
fn twelve_thousand_idle_streams_are_charged_their_memory() {
    const STREAMS: usize = 12_288;
    let mut server = Side::new(Endpoint::Listener);
    server.session.admission = admission(STREAMS);
    for id in 0..STREAMS as u32 {
        accept_inbound(&mut server, 2 * id + 1);
    }
    let each = server.budget.buffered().bytes / STREAMS;
    assert!((size_of::<Stream>()..KIB).contains(&each), "{each}");
}

#[test]
fn the_stream_unread_for_the_longest_is_reset_and_freed() {
    let mut server = Side::new(Endpoint::Listener);
    let [slow, fast] = [1, 3].map(|id| accept_inbound(&mut server, id));
    server.receive(&data(0, 1, 100 * KIB)).unwrap();
    server.receive(&data(0, 3, 200 * KIB)).unwrap();
    server.now += Duration::from_secs(10);
    server.read(fast, 1).unwrap().unwrap();
    server.send_all();
    let freed = server.session.shed(server.now, Cut::Pool);
    assert!((100 * KIB..200 * KIB).contains(&freed), "{freed}");
    assert!(is_reset(server.read(slow, 9)));
    assert_eq!(
        headers(&server.send_all())[0],
        Header { kind: Kind::Data, flags: RST, stream: 1, length: 0 }
    );
    assert_eq!(server.read(fast, 9).unwrap().unwrap(), [7; 9]);
    assert_eq!(server.budget.buffered().count(Cut::Pool), 1);
}

#[test]
fn the_stream_of_which_nothing_was_sent_for_the_longest_is_reset() {
    let mut server = Side::new(Endpoint::Listener);
    let [early, late] = [1, 3].map(|id| accept_inbound(&mut server, id));
    server.send_all();
    assert!(server.write(early, &[0; QUANTUM]).is_ready());
    server.now += Duration::from_secs(9);
    assert!(server.write(late, &[0; QUANTUM]).is_ready());
    server.now += Duration::from_secs(1);
    assert_eq!(headers(&server.send_at_most(8 * KIB))[0].stream, 1);
    server.now += Duration::from_secs(1);
    assert!(server.session.shed(server.now, Cut::Pool) > QUANTUM);
    assert!(is_reset(server.read(late, 9)));
    assert!(server.read(early, 9).is_none(), "it goes on");
}

#[test]
fn a_connection_above_its_limit_loses_a_stream_and_keeps_reading() {
    let mut server =
        Side::with(Endpoint::Listener, MemoryBudget::new(PLENTY, 300 * KIB, MAX_GROWTH));
    let [first, second] = [1, 3].map(|id| accept_inbound(&mut server, id));
    server.receive(&data(0, 1, 200 * KIB)).unwrap();
    server.now += Duration::from_secs(1);
    server.receive(&data(0, 3, 200 * KIB)).unwrap();
    assert!(is_reset(server.read(first, 9)));
    assert_eq!(server.read(second, 1 << 20).unwrap().unwrap().len(), 200 * KIB);
    assert_eq!(server.budget.buffered().count(Cut::Connection), 1);
}

#[test]
fn a_connection_above_its_limit_on_received_bytes_keeps_streams_that_hold_none() {
    let mut server =
        Side::with(Endpoint::Listener, MemoryBudget::new(PLENTY, 300 * KIB, MAX_GROWTH));
    let [writes, first, second] = [1, 3, 5].map(|id| accept_inbound(&mut server, id));
    assert!(server.write(writes, &[0; QUANTUM]).is_ready());
    server.now += Duration::from_secs(10);
    server.receive(&data(0, 3, 200 * KIB)).unwrap();
    server.now += Duration::from_millis(1);
    server.receive(&data(0, 5, 200 * KIB)).unwrap();
    assert!(is_reset(server.read(first, 9)));
    assert_eq!(server.read(second, 9).unwrap().unwrap(), [7; 9]);
    assert!(server.read(writes, 9).is_none(), "it goes on");
}

#[test]
fn credit_is_the_number_of_bytes_the_peer_may_send() {
    let mut server = Side::new(Endpoint::Listener);
    let [reads, stays] = [1, 3].map(|id| accept_inbound(&mut server, id));
    assert_eq!(server.session.credit(), 2 * 256 * KIB);
    server.receive(&data(0, 1, 200 * KIB)).unwrap();
    assert_eq!(server.session.credit(), 312 * KIB);
    server.read(reads, 1 << 20).unwrap().unwrap();
    server.send_all();
    assert_eq!(server.session.credit(), 312 * KIB, "freed by the next read");
    server.read(reads, 1);
    server.send_all();
    assert_eq!(server.session.credit(), 512 * KIB);
    server.receive(&data(FIN, 1, 0)).unwrap();
    server.session.change(stays, Stream::reset);
    assert_eq!(server.session.credit(), 0);
}

#[test]
fn a_stream_that_is_refilled_before_all_was_sent_holds_none_of_the_bytes_that_were() {
    let mut server = Side::new(Endpoint::Listener);
    let stream = accept_inbound(&mut server, 1);
    server.send_all();
    let (mut written, mut sent, mut frames) = (0, 0, Vec::new());
    for _ in 0..200 {
        let bytes: Vec<_> = (written..written + QUANTUM).map(|at| at as u8).collect();
        if let Poll::Ready(Ok(some)) = server.write(stream, &bytes) {
            written += some;
        }
        server.session.take_frames(&mut frames, 8 * KIB, server.now);
        let expected = (sent..).map(|at| at as u8).take(8 * KIB);
        assert!(frames[HEADER..].iter().copied().eq(expected));
        sent += 8 * KIB;
        server.receive(&frame(Kind::WindowUpdate, 0, 1, 8 * KIB)).unwrap();
        let held = server.budget.buffered().bytes;
        assert!(held < 4 * QUANTUM, "{held}");
    }
}

#[test]
fn frames_that_wait_for_the_socket_are_charged_the_capacity_of_their_buffer() {
    let mut server = Side::new(Endpoint::Listener);
    let stream = accept_inbound(&mut server, 1);
    server.send_all();
    let idle = server.budget.buffered().bytes;
    assert!(server.write(stream, &[0; QUANTUM]).is_ready());
    server.receive(&frame(Kind::Ping, SYN, 0, 1)).unwrap();
    let mut frames = Vec::new();
    for expected in [Some(Frames::Control), Some(Frames::Data), Some(Frames::Control), None] {
        let kind = server.session.take_frames(&mut frames, QUANTUM, server.now);
        assert_eq!(kind, expected);
        let unsent = server.session.streams.values().map(|it| it.charge()).sum::<usize>();
        assert_eq!(server.budget.buffered().bytes, unsent + frames.capacity(), "{kind:?}");
        if kind == Some(Frames::Data) {
            server.receive(&frame(Kind::Ping, SYN, 0, 2)).unwrap();
        }
    }
    assert_eq!(server.budget.buffered().bytes, idle);
}

#[test]
fn the_buffer_of_frames_that_wait_for_the_socket_is_at_most_twice_as_large() {
    let mut server = Side::new(Endpoint::Listener);
    let stream = accept_inbound(&mut server, 1);
    server.send_all();
    assert!(server.write(stream, &[0; QUANTUM]).is_ready());
    let (mut frames, mut sent) = (Vec::new(), 0);
    while server.session.take_frames(&mut frames, 8 * KIB, server.now).is_some() {
        assert!(frames.capacity() <= 2 * frames.len(), "{}", frames.capacity());
        sent += frames.len() - HEADER;
    }
    assert_eq!((sent, frames.capacity()), (QUANTUM, 0));
}

// ---- Credit

#[test]
fn window_updates_are_sent_at_half_the_window_and_never_tiny() {
    for (filled, window) in [(0, 256 * KIB), (625, 144 * KIB), (750, 32 * KIB), (900, 32 * KIB)] {
        let mut server =
            Side::with(Endpoint::Listener, MemoryBudget::new(1000 << 20, PLENTY, MAX_GROWTH));
        let stream = accept_inbound(&mut server, 1);
        server.send_all();
        let _other = server.fill_pool(filled << 20);
        let mut credit = INITIAL_WINDOW;
        for _ in 0..1000 {
            let some = credit.min(KIB);
            assert!(some > 0, "the peer has no credit");
            server.receive(&data(0, 1, some)).unwrap();
            server.read(stream, some).unwrap().unwrap();
            credit -= some;
            for update in headers(&server.send_all()) {
                if update.kind == Kind::WindowUpdate {
                    credit += update.length as usize;
                    assert!(credit > 16 * KIB && credit <= window + KIB, "{credit}");
                    assert!(update.length as usize > window / 2 - KIB, "{update:?}");
                }
            }
        }
        assert!(credit <= window + KIB);
    }
}

#[test]
fn what_a_header_announces_counts_as_unread_while_it_arrives() {
    let mut server = Side::new(Endpoint::Listener);
    let stream = accept_inbound(&mut server, 1);
    server.send_all();
    let frame = data(0, 1, INITIAL_WINDOW);
    for piece in frame.chunks(10 * KIB) {
        server.receive(piece).unwrap();
        let sent = headers(&server.send_all());
        assert!(sent.iter().all(|header| header.kind == Kind::Ping), "{sent:?}");
    }
    assert_eq!(server.read(stream, 1 << 20).unwrap().unwrap().len(), INITIAL_WINDOW);
}

#[test]
fn credit_is_granted_for_what_is_read_of_a_frame_that_still_arrives() {
    let mut server = Side::new(Endpoint::Listener);
    let stream = accept_inbound(&mut server, 1);
    server.send_all();
    server.receive(&data(0, 1, INITIAL_WINDOW)[..HEADER + INITIAL_WINDOW * 3 / 4]).unwrap();
    server.read(stream, INITIAL_WINDOW).unwrap().unwrap();
    assert!(server.read(stream, 1).is_none());
    let sent = headers(&server.send_all());
    let granted = sent.iter().filter(|header| header.kind == Kind::WindowUpdate);
    assert_eq!(granted.map(|it| it.length as usize).sum::<usize>(), INITIAL_WINDOW * 3 / 4);
}

#[test]
fn unread_data_grants_no_credit() {
    let mut server = Side::new(Endpoint::Listener);
    accept_inbound(&mut server, 1);
    server.send_all();
    server.receive(&data(0, 1, INITIAL_WINDOW)).unwrap();
    let sent = headers(&server.send_all());
    assert!(sent.iter().all(|header| header.kind == Kind::Ping), "{sent:?}");
    assert!(server.receive(&data(0, 1, 1)).is_err());
}

#[test]
fn windows_grow_with_the_round_trip_time_up_to_a_mebibyte() {
    let mut server = Side::new(Endpoint::Listener);
    let stream = accept_inbound(&mut server, 1);
    server.send_all();
    let (mut credit, mut widest) = (INITIAL_WINDOW, 0);
    for _ in 0..50 {
        credit = use_credit(&mut server, stream, credit);
        widest = widest.max(credit);
    }
    assert_eq!(widest, MAX_WINDOW);
}

#[test]
fn a_peer_far_away_is_granted_credit_before_half_of_a_wide_window_is_used() {
    for (round_trip, least) in [(11, MAX_WINDOW / 4 * 3), (10, MAX_WINDOW / 2 - 10 * KIB)] {
        let mut server = Side::new(Endpoint::Listener);
        let stream = accept_inbound(&mut server, 1);
        server.send_all();
        let mut credit = INITIAL_WINDOW;
        while credit < MAX_WINDOW {
            credit = use_credit(&mut server, stream, credit);
        }
        server.session.round_trip.measured = Some(Duration::from_millis(round_trip));
        let mut lowest = credit;
        for _ in 0..500 {
            server.receive(&data(0, 1, 10 * KIB)).unwrap();
            server.read(stream, 10 * KIB).unwrap().unwrap();
            let sent = headers(&server.send_all());
            let granted = sent.iter().filter(|header| header.kind == Kind::WindowUpdate);
            credit = credit - 10 * KIB + granted.map(|it| it.length as usize).sum::<usize>();
            lowest = lowest.min(credit);
        }
        assert!((least..least + MAX_WINDOW / 8).contains(&lowest), "{round_trip}: {lowest}");
    }
}

#[test]
fn windows_do_not_grow_while_the_pool_limits_them() {
    let mut server =
        Side::with(Endpoint::Listener, MemoryBudget::new(1000 << 20, PLENTY, MAX_GROWTH));
    let stream = accept_inbound(&mut server, 1);
    server.send_all();
    let _other = server.fill_pool(800 << 20);
    let mut credit = INITIAL_WINDOW;
    for _ in 0..50 {
        credit = use_credit(&mut server, stream, credit);
    }
    assert_eq!((credit, server.session.growth), (32 * KIB, MAX_GROWTH));
}

#[test]
fn windows_do_not_grow_for_a_peer_that_is_not_limited_by_them() {
    let mut server = Side::new(Endpoint::Listener);
    let stream = accept_inbound(&mut server, 1);
    server.send_all();
    let mut credit = INITIAL_WINDOW;
    for _ in 0..10 {
        credit = use_credit(&mut server, stream, credit);
        server.now += Duration::from_millis(101);
    }
    assert_eq!((credit, server.session.growth), (INITIAL_WINDOW, MAX_GROWTH));
}

#[test]
fn a_window_of_which_less_than_half_is_used_in_two_round_trips_does_not_grow() {
    let mut server = Side::new(Endpoint::Listener);
    let stream = accept_inbound(&mut server, 1);
    server.send_all();
    let credit = use_credit(&mut server, stream, INITIAL_WINDOW);
    assert_eq!(use_credit(&mut server, stream, credit), 2 * INITIAL_WINDOW);
    for _ in 0..10 {
        server.now += Duration::from_millis(101);
        server.receive(&data(0, 1, INITIAL_WINDOW / 2)).unwrap();
        while server.read(stream, 64 * KIB).is_some() {}
        server.send_all();
    }
    assert_eq!(server.session.growth, MAX_GROWTH - INITIAL_WINDOW);
}

#[test]
fn the_windows_of_one_connection_grow_by_its_limit_in_all() {
    let mut server = Side::with(Endpoint::Listener, MemoryBudget::new(PLENTY, PLENTY, 100 * KIB));
    let stream = accept_inbound(&mut server, 1);
    server.send_all();
    let mut credit = INITIAL_WINDOW;
    for _ in 0..10 {
        credit = use_credit(&mut server, stream, credit);
    }
    assert_eq!((credit, server.session.growth), (INITIAL_WINDOW + 100 * KIB, 0));
}

#[test]
fn an_update_leaves_the_peer_more_than_16_kib() {
    let mut server =
        Side::with(Endpoint::Listener, MemoryBudget::new(1000 << 20, PLENTY, MAX_GROWTH));
    let stream = accept_inbound(&mut server, 1);
    server.send_all();
    let _other = server.fill_pool(900 << 20);
    server.receive(&data(0, 1, INITIAL_WINDOW)).unwrap();
    for (read, granted) in [(240 * KIB, 0), (1, 0), (1, 16 * KIB + 1)] {
        assert_eq!(server.read(stream, read).unwrap().unwrap().len(), read);
        let sent = headers(&server.send_all());
        let updates = sent.iter().filter(|header| header.kind == Kind::WindowUpdate);
        assert_eq!(updates.map(|it| it.length as usize).sum::<usize>(), granted);
    }
}

#[test]
fn a_peer_that_has_finished_and_one_that_is_reset_are_granted_nothing() {
    for finishes in [true, false] {
        let mut server = Side::new(Endpoint::Listener);
        let stream = accept_inbound(&mut server, 1);
        server.send_all();
        server.receive(&data(if finishes { FIN } else { 0 }, 1, 200 * KIB)).unwrap();
        if finishes {
            while !server.read(stream, 64 * KIB).unwrap().unwrap().is_empty() {}
        } else {
            assert!(server.write(stream, b"flushed").is_ready());
            server.session.update(stream, Stream::flush);
            server.drop_handle(stream);
        }
        let sent = headers(&server.send_all());
        assert!(sent.iter().all(|header| header.kind != Kind::WindowUpdate), "{sent:?}");
    }
}

/// The peer of stream 1 sends as much as its credit allows, and answers pings after 100 ms. Returns its next credit.
fn use_credit(server: &mut Side, stream: Key, credit: usize) -> usize {
    server.receive(&data(0, 1, credit)).unwrap();
    while server.read(stream, 64 * KIB).is_some() {}
    let sent = headers(&server.send_all());
    server.now += Duration::from_millis(100);
    let mut granted = 0;
    for header in sent {
        match header.kind {
            Kind::Ping => {
                let id = header.length as usize;
                server.receive(&frame(Kind::Ping, ACK, 0, id)).unwrap();
            }
            _ => granted += header.length as usize,
        }
    }
    granted
}

// ---- Fair queueing of writes

#[test]
fn new_flows_go_first_and_backlogged_ones_take_turns() {
    let mut server = Side::new(Endpoint::Listener);
    let [bulk, other, quick] = [1, 3, 5].map(|id| accept_inbound(&mut server, id));
    server.send_all();
    let mut order = Vec::new();
    for round in 0..6 {
        for stream in [bulk, other] {
            let _ = server.write(stream, &[0; QUANTUM]);
        }
        if round == 3 {
            assert!(server.write(quick, b"quick").is_ready());
        }
        for id in [1, 3, 5] {
            server.receive(&frame(Kind::WindowUpdate, 0, id, QUANTUM)).unwrap();
        }
        order.extend(headers(&server.send()).iter().map(|header| header.stream));
    }
    assert_eq!(order, [1, 3, 1, 5, 3, 1]);
}

#[test]
fn a_stream_that_becomes_idle_and_returns_waits_for_its_turn() {
    let mut server = Side::new(Endpoint::Listener);
    let [bulk, quick] = [1, 3].map(|id| accept_inbound(&mut server, id));
    server.send_all();
    let fill = |server: &mut Side, stream: Key| {
        let _ = server.write(stream, &[0; QUANTUM]);
        server.receive(&frame(Kind::WindowUpdate, 0, stream.0, QUANTUM)).unwrap();
    };
    fill(&mut server, bulk);
    server.send();
    fill(&mut server, bulk);
    assert!(server.write(quick, b"quick").is_ready());
    let mut order = Vec::new();
    for round in 0..32 {
        order.extend(headers(&server.send_at_most(8 * KIB)).iter().map(|header| header.stream));
        fill(&mut server, bulk);
        if round > 0 {
            fill(&mut server, quick);
        }
    }
    let turns = order.chunk_by(|one, other| one == other).map(|turn| (turn[0], turn.len()));
    let turns: Vec<_> = turns.take(4).collect();
    assert_eq!(turns, [(3, 1), (1, 8), (3, 8), (1, 8)]);
}

#[test]
fn a_batch_of_control_frames_is_bounded() {
    let mut server = Side::new(Endpoint::Listener);
    for id in 0..90 {
        accept_inbound(&mut server, 2 * id + 1);
    }
    assert_eq!([(); 3].map(|()| headers(&server.send()).len()), [64, 26, 0]);
}

// ---- Two sessions against each other

/// What one side does. Streams are indices, modulo the number of the side's streams.
#[derive(Clone, Copy, Debug)]
enum Step {
    Open,
    /// Writes this many bytes to a stream.
    Write(usize, usize),
    /// Reads at most this many bytes from a stream.
    Read(usize, usize),
    Close(usize),
    Drop(usize),
    Flush(usize),
    Reset(usize),
    /// Takes a frame with at most this many bytes of data.
    Send(usize),
    /// Delivers at most this many bytes.
    Arrive(usize),
    Accept,
    /// This many milliseconds pass, on both sides.
    Pass(u64),
}

/// The model of one end of a stream.
#[derive(Debug, Default)]
struct StreamModel {
    key: Key,
    id: u32,
    written: usize,
    flushed: usize,
    arrived: usize,
    read: usize,
    /// What this side did.
    closed: bool,
    dropped: bool,
    reset: bool,
    /// Whether this side has read the end, and whether that was an error.
    ended: bool,
    was_reset: bool,
}

#[derive(Default)]
struct Connection {
    sides: Vec<Side>,
    streams: [Vec<StreamModel>; 2],
    wires: [Vec<u8>; 2],
}

/// The byte that a side writes to this stream at this position.
fn byte(id: u32, side: usize, at: usize) -> u8 {
    (at as u32).wrapping_mul(31).wrapping_add(id * 7 + side as u32) as u8
}

impl Connection {
    fn new() -> Self {
        let sides = [Endpoint::Dialer, Endpoint::Listener].map(Side::new).into_iter().collect();
        Self { sides, ..Self::default() }
    }

    /// Applies a step to the side `at` and to its model, unless it needs a stream in another state.
    fn step(&mut self, at: usize, step: Step) {
        let (side, models) = (&mut self.sides[at], &mut self.streams[at]);
        let count = models.len();
        let stream = |number: usize| (count > 0).then(|| number % count.max(1));
        match step {
            Step::Open if count < 8 => {
                let key = side.open();
                let id = key.0;
                models.push(StreamModel { key, id, ..StreamModel::default() });
            }
            Step::Open => {}
            Step::Write(number, bytes) => {
                let Some(stream) = stream(number).map(|number| &mut models[number]) else { return };
                if stream.closed || stream.dropped {
                    return;
                }
                let from = stream.written;
                let bytes: Vec<_> = (from..from + bytes).map(|n| byte(stream.id, at, n)).collect();
                if let Poll::Ready(Ok(written)) = side.write(stream.key, &bytes) {
                    stream.written += written;
                }
            }
            Step::Read(number, most) => {
                let Some(stream) = stream(number).map(|number| &mut models[number]) else { return };
                if !stream.dropped && !stream.ended {
                    Self::read(side, stream, at, most);
                }
            }
            Step::Close(number) => {
                let Some(stream) = stream(number).map(|number| &mut models[number]) else { return };
                if !stream.dropped && !stream.reset {
                    side.session.change(stream.key, Stream::close);
                    stream.closed = true;
                }
            }
            Step::Flush(number) => {
                let Some(stream) = stream(number).map(|number| &mut models[number]) else { return };
                if !stream.dropped {
                    side.session.update(stream.key, Stream::flush);
                    stream.flushed = stream.written;
                }
            }
            Step::Drop(number) => {
                let Some(stream) = stream(number).map(|number| &mut models[number]) else { return };
                if !std::mem::replace(&mut stream.dropped, true) {
                    side.drop_handle(stream.key);
                }
            }
            Step::Reset(number) => {
                let Some(stream) = stream(number).map(|number| &mut models[number]) else { return };
                if !stream.dropped {
                    side.session.change(stream.key, Stream::reset);
                    stream.reset = true;
                }
            }
            Step::Send(most) => {
                let frames = side.send_at_most(most);
                self.wires[at].extend(frames);
            }
            Step::Arrive(bytes) => {
                let wire = &mut self.wires[1 - at];
                let bytes: Vec<_> = wire.drain(..bytes.min(wire.len())).collect();
                side.receive(&bytes).expect("no protocol violation");
            }
            Step::Accept => {
                while let Some(key) = side.accept() {
                    let id = key.0;
                    models.push(StreamModel { key, id, ..StreamModel::default() });
                }
            }
            Step::Pass(millis) => {
                self.sides.iter_mut().for_each(|side| side.now += Duration::from_millis(millis));
            }
        }
    }

    /// Reads once, and compares the result with the model. Returns false if there was nothing to read.
    fn read(side: &mut Side, stream: &mut StreamModel, at: usize, most: usize) -> bool {
        match side.read(stream.key, most.max(1)) {
            None => return false,
            Some(Ok(bytes)) if bytes.is_empty() => stream.ended = true,
            Some(Ok(bytes)) => {
                let from = stream.read;
                stream.read += bytes.len();
                let expected = (from..).map(|n| byte(stream.id, 1 - at, n));
                assert!(bytes.iter().copied().eq(expected.take(bytes.len())), "unexpected bytes");
            }
            Some(Err(error)) => {
                assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
                (stream.ended, stream.was_reset) = (true, true);
            }
        }
        true
    }

    /// Delivers and reads everything that was sent.
    fn settle(&mut self) {
        loop {
            let mut moved = false;
            for at in 0..2 {
                loop {
                    self.step(at, Step::Send(QUANTUM));
                    if self.wires[at].is_empty() {
                        break;
                    }
                    moved = true;
                    self.step(1 - at, Step::Arrive(usize::MAX));
                }
                moved |= !self.sides[at].session.accepted.is_empty();
                self.step(at, Step::Accept);
                let side = &mut self.sides[at];
                for stream in &mut self.streams[at] {
                    while !stream.dropped && !stream.ended && Self::read(side, stream, at, 1 << 20)
                    {
                        moved = true;
                    }
                }
            }
            if !moved {
                return;
            }
        }
    }

    /// Asserts that both sides agree on the state of each stream.
    fn check(&mut self) {
        let mut by_id: HashMap<u32, Vec<(usize, &StreamModel)>> = HashMap::new();
        for (at, streams) in self.streams.iter().enumerate() {
            for stream in streams {
                by_id.entry(stream.id).or_default().push((at, stream));
            }
        }
        for ends in by_id.values() {
            let [(_, one), (_, other)] = ends[..] else { continue };
            for (from, to) in [(one, other), (other, one)] {
                assert!(to.read <= from.written);
                if to.dropped {
                    continue;
                }
                let is_incomplete = (from.dropped || from.reset) && !from.closed;
                if to.ended && !to.was_reset {
                    assert!(from.closed, "an end of file without a close: {from:?} {to:?}");
                    assert_eq!(
                        to.read, from.written,
                        "bytes are missing before the end of file: {from:?} {to:?}"
                    );
                }
                if is_incomplete {
                    assert!(
                        to.was_reset,
                        "an incomplete stream ended without a reset: {from:?} {to:?}"
                    );
                    assert!(
                        to.closed || to.reset || from.reset || to.read >= from.flushed,
                        "flushed bytes were lost: {from:?} {to:?}"
                    );
                } else if from.closed && !to.was_reset {
                    assert!(to.ended, "{from:?} {to:?}");
                }
            }
        }
    }

    /// Drops every stream and asserts that no state is left.
    fn end(&mut self) {
        // Twice: the first round may open streams on the other side, along with their end.
        for at in [0, 1, 0, 1] {
            for number in 0..self.streams[at].len() {
                self.step(at, Step::Drop(number));
            }
            if at == 1 {
                self.settle();
            }
        }
        self.sides.iter_mut().for_each(Side::assert_empty);
    }
}

fn steps() -> impl Strategy<Value = Step> {
    let size = prop_oneof![1..20_usize, 1..200_000_usize];
    prop_oneof![
        1 => Just(Step::Open),
        4 => (0..8_usize, size.clone()).prop_map(|(stream, bytes)| Step::Write(stream, bytes)),
        4 => (0..8_usize, size.clone()).prop_map(|(stream, bytes)| Step::Read(stream, bytes)),
        1 => (0..8_usize).prop_map(Step::Close),
        1 => (0..8_usize).prop_map(Step::Drop),
        1 => (0..8_usize).prop_map(Step::Flush),
        1 => (0..8_usize).prop_map(Step::Reset),
        5 => prop_oneof![Just(QUANTUM), Just(8 * KIB), 1..QUANTUM].prop_map(Step::Send),
        5 => size.prop_map(Step::Arrive),
        3 => Just(Step::Accept),
        1 => (0..200_u64).prop_map(Step::Pass),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn bytes_are_neither_lost_duplicated_nor_reordered_and_every_stream_ends(
        steps in vec((0..2_usize, steps()), 0..120),
    ) {
        let mut connection = Connection::new();
        for (at, step) in steps {
            connection.step(at, step);
        }
        connection.settle();
        connection.check();
        connection.end();
    }
}
