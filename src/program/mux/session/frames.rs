//! Receiving and sending frames.
//!
//! Control frames are kept as state, not in a queue, so that each is sent once however long it waits; data is sent in
//! turn by fair queueing.

use std::{
    io, mem,
    time::{Duration, Instant},
};

use super::{Key, MAX_REFUSED, Session, current};
use crate::program::mux::{
    budget::Cut,
    frame::{ACK, Chunk, FIN, Flags, HEADER, Header, Kind, MAX_WINDOW, RST, Reason, Room, SYN},
    stream::{Origin, QUANTUM, Stream},
};

/// The most bytes of control frames in one write batch.
const MAX_CONTROL: usize = 64 * HEADER;

/// Frames to send.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Frames {
    /// Control frames, without a reset.
    Control,
    /// Control frames, some of them resets.
    Resets,
    /// Data of one stream.
    Data,
}

impl Session {
    // ---- Receiving

    /// Handles bytes that were read into `room`, and prepares it for the next ones. Returns how long to pause reading:
    /// the rate of frames that are costlier for the relay than for the peer is limited.
    ///
    /// # Errors
    ///
    /// If the session ends.
    pub fn receive(&mut self, room: &mut Room, bytes: usize, now: Instant) -> io::Result<Duration> {
        let mut pause = Duration::ZERO;
        if room.body > 0 {
            room.body -= bytes;
            room.chunk.advance(bytes);
            self.on_body(&mut room.chunk, now);
        } else {
            room.read += bytes;
            if room.read < HEADER {
                return Ok(pause);
            }
            room.read = 0;
            let Some(header) = Header::parse(room.header) else {
                return Err(self.fail(Reason::ProtocolError, "unknown version or type"));
            };
            self.on_header(header, now)?;
            if header.kind == Kind::Ping || header.flags & (SYN | RST) != 0 {
                pause = self.admission.count_frame(now);
            }
            room.body = if header.kind == Kind::Data { header.length as usize } else { 0 };
        }
        if room.body == 0 {
            room.chunk = Chunk::default();
            self.on_frame_end();
        }
        Ok(pause)
    }

    /// "Framing": SYN is handled first, then ACK, then the body or the window, then FIN and RST.
    fn on_header(&mut self, header: Header, now: Instant) -> io::Result<()> {
        let Header { kind, flags, stream: id, length } = header;
        match kind {
            Kind::GoAway => return Err(io::ErrorKind::ConnectionAborted.into()),
            Kind::Ping if flags & ACK != 0 => {
                let is_asked = self.round_trip.on_answer(length, now);
                return self.require(is_asked, "an answer to no ping");
            }
            Kind::Ping => {
                // Only the last of several pings is answered: a late answer is useless.
                self.ping = Some(length);
                return Ok(());
            }
            Kind::Data => {
                self.require(length as usize <= MAX_WINDOW, "a frame is longer than any window")?;
            }
            Kind::WindowUpdate => {}
        }
        self.incoming = (id, flags);
        if flags & SYN != 0 {
            let is_open = current(&mut self.streams, id).is_some();
            let is_free = !is_open && !self.half_closed.contains(&id);
            let is_valid = is_free && id != 0 && id % 2 != self.next_id % 2;
            self.require(is_valid, "a stream number that is not the peer's, or in use")?;
            self.is_unused = false;
            // A stream that the same frame opens and resets is not admitted at all.
            if flags & RST == 0 {
                self.admit(id, now)?;
            }
        }
        let Some((key, stream)) = current(&mut self.streams, id) else {
            let continues = kind == Kind::Data && length > 0 && flags & (FIN | RST) == 0;
            if continues && self.half_closed.contains(&id) {
                // The peer only knows that this side sends no more on it.
                self.half_closed.retain(|it| *it != id);
                return self.refuse(id, now);
            }
            return Ok(()); // its body is discarded
        };
        if flags & ACK != 0 && stream.is_unacknowledged() {
            self.unacknowledged -= 1;
            self.effects.wakers.extend(self.task.take());
        }
        stream.received |= flags & ACK;
        if kind == Kind::WindowUpdate {
            self.effects.wakers.extend(stream.writer.take());
            let fits = stream.add_send_window(length);
            return self.require(fits, "a window overflows");
        }
        // Data that is discarded needs no credit: a refused stream that stands in for a half-closed one has less than
        // the peer had on that one.
        let fits = stream.consume_credit(length as usize) || !stream.is_read();
        if length > 0 {
            self.round_trip.received += length as usize;
            if stream.received & FIN != 0 {
                self.change(key, Stream::reset);
            } else if !stream.has_handle {
                stream.set_reset();
            }
        }
        self.require(fits, "more data than the window allows")
    }

    /// Admits a stream that the peer opens, or refuses it.
    fn admit(&mut self, id: u32, now: Instant) -> io::Result<()> {
        let stream = (self.budget.number, (id, self.last_serial + 1));
        let admitted = self.admission.admit(stream, self.inbound, now);
        let Some((permit, preempted)) = admitted else { return self.refuse(id, now) };
        self.effects.preempted.extend(preempted);
        self.inbound += 1;
        let key = self.insert(id, Origin::Peer(permit), now);
        self.accepted.push_back(key);
        self.effects.wakers.extend(self.task.take());
        Ok(())
    }

    fn refuse(&mut self, id: u32, now: Instant) -> io::Result<()> {
        self.refused += 1;
        let key = self.insert(id, Origin::Refused, now);
        self.change(key, Stream::drop_handle);
        if self.refused > MAX_REFUSED {
            self.budget.count(Cut::Refusals);
            return Err(self.fail(Reason::InternalError, Cut::Refusals.kind()));
        }
        Ok(())
    }

    fn on_body(&mut self, chunk: &mut Chunk, now: Instant) {
        if let Some((key, stream)) = current(&mut self.streams, self.incoming.0)
            && stream.is_read()
        {
            self.effects.wakers.extend(stream.reader.take());
            self.update(key, |stream| stream.store(chunk, now));
        }
        chunk.clear();
        while self.budget.is_exceeded(self.unread) && self.shed(now, Cut::Connection) > 0 {}
    }

    fn on_frame_end(&mut self) {
        let (id, flags) = mem::take(&mut self.incoming);
        if flags & (FIN | RST) == 0 {
            return;
        }
        match current(&mut self.streams, id) {
            Some((key, _)) if flags & RST != 0 => self.change(key, Stream::on_reset),
            Some((key, _)) => self.change(key, |stream| stream.received |= FIN),
            // Removed before the frame or during it: the peer sends no more on it, either.
            None => self.half_closed.retain(|it| *it != id),
        }
    }

    /// Returns a protocol error unless the condition holds.
    fn require(&mut self, holds: bool, what: &'static str) -> io::Result<()> {
        if holds { Ok(()) } else { Err(self.fail(Reason::ProtocolError, what)) }
    }

    /// Queues a go-away with this reason, and returns the error that ends the session.
    fn fail(&mut self, reason: Reason, why: &'static str) -> io::Error {
        self.go_away = Some(reason);
        io::Error::other(why)
    }

    // ---- Sending

    /// Takes the next frames to send, with at most `most` bytes of data. Returns their kind; `None` if there are none.
    pub fn take_frames(&mut self, into: &mut Vec<u8>, most: usize, now: Instant) -> Option<Frames> {
        into.clear();
        let frames = self.take_control(into, now).or_else(|| self.take_other(into, most, now));
        into.shrink_to(2 * into.len());
        let in_flight = mem::replace(&mut self.in_flight, into.capacity());
        self.budget.replace_charge(in_flight, self.in_flight);
        frames
    }

    /// Takes data of a stream, or else the go-away.
    fn take_other(&mut self, into: &mut Vec<u8>, most: usize, now: Instant) -> Option<Frames> {
        if let Some(key) = self.next_turn() {
            let writer = self.update(key, |stream| {
                stream.take_frame(key.0, into, most, now);
                stream.deficit -= into.len() as i64;
                stream.writer.take()
            });
            self.effects.wakers.extend(writer.flatten());
            return Some(Frames::Data);
        }
        // An idle session has no memory for its queues.
        let Self { accepted, control, new_flows, old_flows, .. } = self;
        for queue in [accepted, control, new_flows, old_flows] {
            queue.shrink_to_fit();
        }
        let reason = self.go_away.take()?;
        into.extend(session_header(Kind::GoAway, 0, reason as u32));
        Some(Frames::Control)
    }

    fn take_control(&mut self, into: &mut Vec<u8>, now: Instant) -> Option<Frames> {
        if let Some(number) = self.ping.take() {
            into.extend(session_header(Kind::Ping, ACK, number));
        }
        if !self.is_over
            && let Some(number) = self.round_trip.ask(now)
        {
            into.extend(session_header(Kind::Ping, SYN, number));
        }
        let (rtt, mut frames) = (self.round_trip.measured, Frames::Control);
        while into.len() < MAX_CONTROL
            && let Some(key) = self.control.pop_front()
        {
            let Some(stream) = self.streams.get_mut(&key) else { continue };
            stream.in_control = false;
            if stream.is_reset_due() {
                frames = Frames::Resets;
                into.extend(stream.take_header(key.0, Kind::Data, stream.pending, 0));
            } else if stream.has_control(rtt, &self.budget) {
                let credit = stream.grant(rtt, &mut self.growth, now, &self.budget);
                let opening = stream.pending & (SYN | ACK);
                into.extend(stream.take_header(key.0, Kind::WindowUpdate, opening, credit));
            }
            self.update(key, |_| ());
        }
        (!into.is_empty()).then_some(frames)
    }

    /// Returns the stream whose turn it is to send data.
    fn next_turn(&mut self) -> Option<Key> {
        loop {
            let is_new = !self.new_flows.is_empty();
            let flows = if is_new { &mut self.new_flows } else { &mut self.old_flows };
            let key = flows.pop_front()?;
            let Some(stream) = self.streams.get_mut(&key) else { continue };
            if stream.has_data() && stream.deficit > 0 {
                flows.push_front(key);
                return Some(key);
            }
            // A stream that becomes idle and returns does not count as new each time.
            stream.in_turns = stream.has_data() || (is_new && !self.old_flows.is_empty());
            if stream.in_turns {
                stream.deficit += if stream.deficit <= 0 { QUANTUM as i64 } else { 0 };
                self.old_flows.push_back(key);
            }
        }
    }
}

fn session_header(kind: Kind, flags: Flags, length: u32) -> [u8; HEADER] {
    Header { kind, flags, stream: 0, length }.encode()
}
