//! The state of one stream: unread received data, unsent data, and the credit of both sides.
//!
//! Sans-IO.

use std::{
    collections::VecDeque,
    io::{self, ErrorKind, Write},
    mem,
    task::{Poll, Waker},
    time::{Duration, Instant},
};

use super::{
    budget::{ConnectionBudget, Cut},
    frame::{ACK, Chunk, FIN, Flags, HEADER, Header, INITIAL_WINDOW, Kind, MAX_WINDOW, RST, SYN},
    stream_limits::Permit,
};
use crate::behaviour::circuit::BUFFER_SIZE;

/// The most unsent data of a stream, and the most that is sent before the next stream's turn, in bytes: a frame that
/// fits into a message of Noise.
pub const QUANTUM: usize = BUFFER_SIZE;

/// The least credit that a grant has to leave the peer, in bytes: with less it would send tiny frames.
const MIN_CREDIT: usize = 16 * 1024;

/// A peer with a longer round trip is far away.
const FAR: Duration = Duration::from_millis(10);

/// A peer far away is granted credit once this many bytes of its window are missing. With grants at half of a wide
/// window it would in effect have only that half: the second grant would wait for the data sent on the first.
const MAX_MISSING_OF_FAR: usize = INITIAL_WINDOW / 2;

/// Which side opened a stream.
#[derive(Debug, Default)]
pub enum Origin {
    /// The relay.
    #[default]
    Relay,
    /// The peer, with a permit of the pool unless it needs none.
    Peer(Option<Permit>),
    /// The peer; the stream is refused.
    Refused,
}

/// One stream.
#[derive(Debug, Default)]
pub struct Stream {
    /// Which side opened it.
    pub origin: Origin,
    /// The flags that the peer sent, except SYN. RST also if nothing more is read for another reason.
    pub received: Flags,
    /// The flags that were sent. RST also if nothing more is sent for another reason.
    pub sent: Flags,
    /// The flags to be sent: SYN and ACK with the next frame, FIN after the last data, RST after all else.
    pub pending: Flags,
    /// Whether it has a handle, or waits to be accepted.
    pub has_handle: bool,
    /// Whether it is queued for its control frames.
    pub in_control: bool,
    /// Whether it is queued for its data, and how many bytes it may send before the next stream's turn.
    pub in_turns: bool,
    pub deficit: i64,
    /// The tasks that wait for data, and for room to write.
    pub reader: Option<Waker>,
    pub writer: Option<Waker>,
    /// The received data, and the sum of the chunks' capacities.
    chunks: VecDeque<Chunk>,
    stored: usize,
    /// How many received bytes are held: those in `chunks`, and those of the last read, which the next read releases:
    /// until then the reader may still use them. Since when the reader has taken none.
    pub unread: usize,
    last_read: usize,
    read_at: Option<Instant>,
    /// How many bytes the peer may still send, besides those of the current frame that are still arriving.
    credit: usize,
    arriving: usize,
    /// The window granted while memory is plentiful; how much of it the peer has used, and since when.
    window: usize,
    used: usize,
    used_since: Option<Instant>,
    /// How many bytes may be written and sent before the peer grants more.
    pub send_window: u32,
    /// The frame to send: space for its header, and its body.
    out: Vec<u8>,
    /// How much of the body is sent even if the stream is dropped, because it was flushed.
    flushed: usize,
    /// Since when none of the unsent data was sent.
    sent_at: Option<Instant>,
}

impl Stream {
    /// A new stream.
    pub fn new(origin: Origin, now: Instant) -> Self {
        Self {
            pending: if matches!(origin, Origin::Relay) { SYN } else { 0 },
            origin,
            has_handle: true,
            credit: INITIAL_WINDOW,
            window: INITIAL_WINDOW,
            used_since: Some(now),
            send_window: INITIAL_WINDOW as u32,
            ..Self::default()
        }
    }

    /// Records that a request has arrived: the stream is no longer reset in favour of another one.
    pub fn set_used(&mut self) {
        if let Origin::Peer(Some(permit)) = &mut self.origin {
            permit.set_used();
        }
    }

    /// Whether this side opened it, and the peer has not acknowledged it.
    pub fn is_unacknowledged(&self) -> bool {
        matches!(self.origin, Origin::Relay) && self.received & ACK == 0
    }

    // ---- Receiving

    /// Whether the peer may send more data.
    fn is_receiving(&self) -> bool {
        self.received & (FIN | RST) == 0
    }

    /// Whether data that arrives will be read.
    pub fn is_read(&self) -> bool {
        self.has_handle && (self.sent | self.pending) & RST == 0
    }

    /// Subtracts the bytes of an arriving frame from the peer's credit. Returns false if the credit is smaller.
    pub fn consume_credit(&mut self, bytes: usize) -> bool {
        self.arriving = bytes;
        let left = self.credit.checked_sub(bytes);
        self.credit = left.unwrap_or_default();
        left.is_some()
    }

    /// Returns how many bytes the peer may still send.
    pub fn credit(&self) -> usize {
        if self.is_receiving() { self.credit } else { 0 }
    }

    /// Stores the contents of a chunk.
    pub fn store(&mut self, chunk: &mut Chunk, now: Instant) {
        if self.unread == self.last_read {
            self.read_at = Some(now);
        }
        self.unread += chunk.unread().len();
        self.arriving = self.arriving.saturating_sub(chunk.unread().len());
        if !self.chunks.back_mut().is_some_and(|last| last.append(chunk)) {
            self.stored += chunk.capacity();
            self.chunks.push_back(mem::take(chunk));
        }
    }

    /// Reads as much as fits.
    pub fn poll_read(&mut self, mut into: &mut [u8], now: Instant) -> Poll<io::Result<usize>> {
        let has_room = !into.is_empty();
        self.unread -= mem::take(&mut self.last_read);
        self.read_at = Some(now);
        while let Some(first) = self.chunks.front_mut() {
            let read = first.read(into);
            self.last_read += read;
            into = into.get_mut(read..).unwrap_or_default();
            if !first.unread().is_empty() {
                break;
            }
            self.stored -= first.capacity();
            self.chunks.pop_front();
        }
        match self.received {
            _ if self.last_read > 0 || !has_room => Poll::Ready(Ok(self.last_read)),
            flags if flags & RST != 0 => Poll::Ready(Err(ErrorKind::ConnectionReset.into())),
            flags if flags & FIN != 0 => Poll::Ready(Ok(0)),
            _ => Poll::Pending,
        }
    }

    /// Frees the received data.
    fn discard_unread(&mut self) {
        (self.chunks, self.stored, self.unread, self.last_read) = (VecDeque::new(), 0, 0, 0);
    }

    /// Returns the credit to grant, in bytes.
    fn due_credit(&self, rtt: Option<Duration>, budget: &ConnectionBudget) -> usize {
        let window = budget.window(self.window);
        let missing = window.saturating_sub(self.credit + self.arriving + self.unread);
        let most = if rtt > Some(FAR) { MAX_MISSING_OF_FAR } else { MAX_WINDOW };
        let is_due = missing >= most.min(window / 2) && self.credit + missing > MIN_CREDIT;
        if is_due && self.is_receiving() && self.is_read() { missing } else { 0 }
    }

    /// Grants the credit that is due, in bytes.
    ///
    /// Before that, widens the window by at most `growth` if the peer used half of it within two round trips: then the
    /// window limits the peer's speed. Not while memory is scarce: then the pool limits it.
    pub fn grant(
        &mut self,
        rtt: Option<Duration>,
        growth: &mut usize,
        now: Instant,
        budget: &ConnectionBudget,
    ) -> usize {
        self.used += self.due_credit(rtt, budget);
        if self.used >= self.window / 2 {
            self.used = 0;
            let since = rtt.zip(self.used_since.replace(now));
            if !budget.is_scarce() && since.is_some_and(|(rtt, at)| now < at + rtt * 2) {
                let wider = self.window.min(*growth).min(MAX_WINDOW - self.window);
                self.window += wider;
                *growth -= wider;
            }
        }
        let credit = self.due_credit(rtt, budget);
        self.credit += credit;
        credit
    }

    /// Returns by how much the window has grown.
    pub fn growth(&self) -> usize {
        self.window - INITIAL_WINDOW
    }

    // ---- Sending

    /// Adds credit granted by the peer. Returns false if it overflows.
    pub fn add_send_window(&mut self, credit: u32) -> bool {
        let sum = self.send_window.checked_add(credit);
        self.send_window = sum.unwrap_or_default();
        sum.is_some()
    }

    /// Returns the number of unsent bytes.
    pub fn unsent(&self) -> usize {
        self.out.len().saturating_sub(HEADER)
    }

    /// Takes as many of `bytes` as there is room for.
    pub fn poll_write(&mut self, bytes: &[u8], now: Instant) -> Poll<io::Result<usize>> {
        match self.sent | self.pending {
            it if it & RST != 0 => return Poll::Ready(Err(ErrorKind::ConnectionReset.into())),
            it if it & FIN != 0 => return Poll::Ready(Err(ErrorKind::WriteZero.into())),
            _ => {}
        }
        let room = QUANTUM.saturating_sub(self.unsent()).min(self.send_window as usize);
        if room == 0 && !bytes.is_empty() {
            return Poll::Pending;
        }
        let bytes = bytes.get(..room).unwrap_or(bytes);
        if self.out.is_empty() {
            self.sent_at = Some(now);
            self.out.reserve_exact(HEADER + bytes.len());
            self.out.resize(HEADER, 0);
        }
        self.out.extend_from_slice(bytes);
        self.send_window -= bytes.len() as u32;
        Poll::Ready(Ok(bytes.len()))
    }

    /// Guarantees that the bytes written so far are sent, even if the stream is dropped.
    pub fn flush(&mut self) {
        self.flushed = self.unsent();
    }

    /// Frees the unsent data.
    fn discard_unsent(&mut self) {
        (self.out, self.flushed) = (Vec::new(), 0);
    }

    /// Whether it has something to send in its turn: data, or FIN.
    pub fn has_data(&self) -> bool {
        self.unsent() > 0 || self.pending & FIN != 0
    }

    /// Moves a frame with at most `most` bytes of data into `into`, which is empty.
    pub fn take_frame(&mut self, id: u32, into: &mut Vec<u8>, most: usize, now: Instant) {
        let body = self.unsent().min(most);
        // FIN is a frame of its own: go-yamux handles the flags of a frame before its body, so a reader would see the
        // end before the last of the data.
        let flags = self.pending & if body == 0 { SYN | ACK | FIN } else { SYN | ACK };
        let header = self.take_header(id, Kind::Data, flags, body);
        self.sent_at = Some(now);
        self.flushed = self.flushed.saturating_sub(body);
        if body == self.unsent() && !self.out.is_empty() {
            // The buffer already has space for the header: no copy.
            *into = mem::take(&mut self.out);
            let _ = into.as_mut_slice().write(&header); // to memory
            return;
        }
        into.extend_from_slice(&header);
        if body > 0 {
            into.extend(self.out.drain(HEADER..HEADER + body));
        }
    }

    /// Whether there are frames without data to send.
    pub fn has_control(&self, rtt: Option<Duration>, budget: &ConnectionBudget) -> bool {
        // An ACK is sent with data if there is some, and RST after it.
        self.pending & (ACK | RST) != 0 && !self.has_data() || self.due_credit(rtt, budget) > 0
    }

    /// Whether RST is to be sent now.
    pub fn is_reset_due(&self) -> bool {
        self.pending & RST != 0 && !self.has_data()
    }

    /// Returns a header with these flags, which are pending no longer; `id` is that of this stream on the wire.
    pub fn take_header(&mut self, id: u32, kind: Kind, flags: Flags, len: usize) -> [u8; HEADER] {
        self.pending &= !flags;
        self.sent |= flags;
        Header { kind, flags, stream: id, length: len as u32 }.encode()
    }

    // ---- The end

    /// Closes this side's half.
    pub fn close(&mut self) {
        if (self.sent | self.pending) & (FIN | RST) == 0 {
            self.pending |= FIN;
        }
    }

    /// Drops the handle. Unless this side closed it, resets the stream, so that the peer sees it as incomplete.
    pub fn drop_handle(&mut self) {
        self.has_handle = false;
        self.discard_unread();
        let is_incomplete = (self.sent | self.pending) & (FIN | RST) == 0;
        if is_incomplete {
            match self.flushed {
                0 => self.discard_unsent(),
                flushed => self.out.truncate(HEADER + flushed),
            }
        }
        // A peer without credit waits for some, and so sends no data that would cause a reset.
        if is_incomplete || self.is_receiving() && self.credit == 0 {
            self.set_reset();
        }
    }

    /// Resets the stream. The id of a finished one may already belong to another stream: no RST is sent for it.
    pub fn reset(&mut self) {
        self.discard_unread();
        self.discard_unsent();
        if self.is_finished() {
            self.stop_sending();
        } else {
            self.pending &= !FIN;
            self.set_reset();
        }
        self.received |= RST;
    }

    /// Handles a reset by the peer.
    pub fn on_reset(&mut self) {
        self.discard_unsent();
        self.stop_sending();
        self.received |= RST;
    }

    /// Ends the stream with its session. A FIN that was received still counts as the end of the data.
    pub fn end(&mut self) {
        let received = self.received;
        self.on_reset();
        if received & FIN != 0 {
            self.received = received;
        }
    }

    /// Sends RST after the unsent data. A stream that the peer does not know of needs none.
    pub fn set_reset(&mut self) {
        if self.pending & SYN != 0 && !self.has_data() {
            self.stop_sending();
        } else {
            self.pending |= RST;
        }
    }

    /// Marks this side's half as ended: nothing more is sent.
    fn stop_sending(&mut self) {
        self.pending = 0;
        self.sent |= RST;
    }

    /// What its connection is charged for it, in bytes.
    pub fn charge(&self) -> usize {
        size_of::<Self>() + self.stored + self.last_read + self.out.capacity()
    }

    /// Its weight when memory is freed: its bytes, times how long its reader or its peer has not taken any. Only
    /// received ones count if the limit of its connection is exceeded.
    pub fn weight(&self, now: Instant, cut: Cut) -> u128 {
        let waits = |bytes: usize, since: Option<Instant>| {
            let millis = since.map_or(0, |at| now.saturating_duration_since(at).as_millis());
            bytes as u128 * (1 + millis)
        };
        let unsent = if cut == Cut::Pool { self.out.capacity() } else { 0 };
        waits(self.unread, self.read_at) + waits(unsent, self.sent_at)
    }

    /// Whether both halves have ended, so that its id is free.
    pub fn is_finished(&self) -> bool {
        let is_closed = self.received & self.sent & FIN != 0 && self.pending & RST == 0;
        is_closed || self.sent & RST != 0
    }

    /// Whether it has no handle and nothing to send.
    pub fn is_gone(&self) -> bool {
        !self.has_handle && self.pending & (FIN | RST) == 0
    }
}
