//! Receiving: a body is read directly into the memory of its stream, up to the stream's credit.

use std::time::Instant;

use super::{End, MAX_REFUSED, Role, Session};
use crate::program::mux::{
    budget::Cut,
    chunk::Chunk,
    frame::{Flags, HEADER, Header, Kind, MAX_WINDOW, Reason},
    permits::StreamPermit,
    stream::{Inbound, Stream},
};

/// Where the next bytes of the connection are read to.
#[derive(Debug, Default)]
pub struct Room {
    header: [u8; HEADER],
    /// How many bytes of the header have been received.
    read: usize,
    /// How many bytes of the body are missing; 0: a header comes next.
    body: usize,
    chunk: Chunk,
}

impl Room {
    /// The buffer to read into; empty until memory is [lent](Session::lend).
    pub fn buffer(&mut self) -> &mut [u8] {
        match self.body {
            0 => self.header.get_mut(self.read..).unwrap_or_default(),
            body => self.chunk.room(body),
        }
    }

    /// Whether it has lent memory.
    pub fn has_chunk(&self) -> bool {
        self.chunk.capacity() > 0
    }
}

/// What was received.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Received {
    /// A part of a frame, or a frame that costs the relay as little as the peer.
    Cheap,
    /// A frame that costs the relay more than the peer: it resets a stream, or pings.
    Dear,
    /// A frame that opens a stream. The caller calls [`Session::admit`] next.
    Opened(u64),
}

impl Session {
    /// Handles `received` bytes that were read into `room`, and prepares it for the next ones.
    ///
    /// # Errors
    ///
    /// If the session ends.
    pub fn receive(
        &mut self,
        room: &mut Room,
        bytes: usize,
        now: Instant,
    ) -> Result<Received, End> {
        let mut received = Received::Cheap;
        if room.body > 0 {
            room.body -= bytes;
            room.chunk.advance(bytes);
            self.on_body(&mut room.chunk, now);
        } else {
            room.read += bytes;
            if room.read < HEADER {
                return Ok(received);
            }
            room.read = 0;
            let header = Header::parse(room.header);
            let header = header.ok_or_else(|| broken("unknown version or type"))?;
            received = self.on_header(header, now)?;
            room.body = if header.kind == Kind::Data { header.length as usize } else { 0 };
        }
        if room.body == 0 {
            self.reclaim(room);
            self.on_frame_end();
        }
        Ok(received)
    }

    /// Lends memory for the expected body.
    pub fn lend(&mut self, room: &mut Room) {
        room.chunk = Chunk::for_body(room.body);
        self.budget.charge(room.chunk.capacity());
    }

    /// Takes back the lent memory.
    pub fn reclaim(&mut self, room: &mut Room) {
        self.budget.release(std::mem::take(&mut room.chunk).capacity());
    }

    /// Gives the stream opened last this permit, or refuses it.
    ///
    /// # Errors
    ///
    /// If too many refusals are unsent.
    pub fn admit(&mut self, serial: u64, permit: Option<StreamPermit>) -> Result<(), End> {
        let Some(stream) = self.streams.get_mut(&serial) else {
            return Ok(());
        };
        stream.permit = permit;
        if stream.permit.is_none() {
            return self.refuse(serial);
        }
        self.accepted.push_back(serial);
        self.effects.wakers.extend(self.acceptor.take());
        Ok(())
    }

    fn refuse(&mut self, serial: u64) -> Result<(), End> {
        self.refused += 1;
        self.drop_handle(serial);
        if self.refused > MAX_REFUSED {
            self.budget.count(Cut::Refusals);
            return Err(End::Broken(Reason::InternalError, "the peer takes no refusals"));
        }
        Ok(())
    }

    /// "Framing": SYN is handled first, then ACK, then the body or the window, then FIN and RST.
    fn on_header(&mut self, header: Header, now: Instant) -> Result<Received, End> {
        let Header { kind, flags, stream: id, length } = header;
        match kind {
            Kind::GoAway => return Err(End::Left),
            Kind::Ping if flags.has(Flags::ACK) => {
                let is_asked = self.round_trip.on_answer(length, now);
                return is_asked.then_some(Received::Dear).ok_or(broken("an answer to no ping"));
            }
            Kind::Ping => {
                // Only the last of several pings is answered: a late answer is useless.
                self.ping = Some(length);
                return Ok(Received::Dear);
            }
            Kind::Data if length as usize > MAX_WINDOW => {
                return Err(broken("a frame is longer than any window"));
            }
            Kind::Data | Kind::WindowUpdate => {}
        }
        self.incoming = (id, flags);
        let is_reset = flags.has(Flags::RST);
        let mut received = if is_reset { Received::Dear } else { Received::Cheap };
        if flags.has(Flags::SYN) {
            let is_theirs = id != 0 && (id % 2 == 1) == (self.role == Role::Server);
            if !is_theirs || self.ids.contains_key(&id) || self.half_closed.contains(&id) {
                return Err(broken("a stream number that is not the peer's, or in use"));
            }
            // A stream that is reset at once is already removed.
            if !is_reset {
                received = Received::Opened(self.insert(Stream::new(id, Flags::NONE, None, now)));
            }
        }
        match self.ids.get(&id).copied() {
            Some(serial) => self.on_known(serial, header)?,
            None => self.on_unknown(header, now)?,
        }
        Ok(received)
    }

    fn on_known(&mut self, serial: u64, header: Header) -> Result<(), End> {
        let Some(stream) = self.streams.get_mut(&serial) else {
            return Ok(());
        };
        let did_wait =
            header.flags.has(Flags::ACK) && std::mem::take(&mut stream.is_unacknowledged);
        let length = header.length as usize;
        if header.kind == Kind::WindowUpdate {
            if !stream.add_send_window(header.length) {
                return Err(broken("a window overflows"));
            }
            self.effects.wakers.extend(stream.writer.take());
        } else if !stream.consume_credit(length) {
            return Err(broken("more data than the window allows"));
        } else if length > 0 {
            self.round_trip.received += length;
            stream.is_stray = !stream.has_handle;
            if stream.inbound == Inbound::Finished {
                self.reset(serial);
            }
        }
        if did_wait {
            self.acknowledge(true);
        }
        Ok(())
    }

    /// Discards data for a stream that is gone. Resets the stream if the peer only knows that this side sends no
    /// more on it.
    fn on_unknown(&mut self, header: Header, now: Instant) -> Result<(), End> {
        let Header { kind, flags, stream: id, length } = header;
        let ends = flags.has(Flags::FIN | Flags::RST);
        if kind != Kind::Data || length == 0 || ends || !self.half_closed.contains(&id) {
            return Ok(());
        }
        self.half_closed.retain(|it| *it != id);
        let serial = self.insert(Stream::new(id, Flags::NONE, None, now));
        self.refuse(serial)
    }

    fn on_body(&mut self, chunk: &mut Chunk, now: Instant) {
        let serial = self.ids.get(&self.incoming.0);
        let stream = serial.and_then(|serial| self.streams.get_mut(serial));
        match stream.filter(|stream| stream.is_read()) {
            Some(stream) => {
                stream.store(chunk, now, &self.budget);
                self.effects.wakers.extend(stream.reader.take());
            }
            None => chunk.clear(),
        }
        while self.budget.is_exceeded() && self.shed(now, Cut::Connection) > 0 {}
    }

    fn on_frame_end(&mut self) {
        let (id, flags) = std::mem::take(&mut self.incoming);
        let Some(serial) = self.ids.get(&id).copied() else {
            // It may have been removed since the frame began.
            let is_over = |it: &u32| *it == id && flags.has(Flags::FIN | Flags::RST);
            self.half_closed.retain(|it| !is_over(it));
            return;
        };
        if flags.has(Flags::RST) {
            self.change(serial, Stream::on_reset);
        } else if flags.has(Flags::FIN) {
            self.change(serial, |stream, _| {
                if stream.inbound == Inbound::Open {
                    stream.inbound = Inbound::Finished;
                }
            });
        }
    }
}

fn broken(why: &'static str) -> End {
    End::Broken(Reason::ProtocolError, why)
}
