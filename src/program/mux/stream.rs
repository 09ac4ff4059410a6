//! The state of one stream: unread received data, unsent data, and the credit of both sides.
//!
//! Sans-IO.

use std::{
    collections::VecDeque,
    io::Write,
    task::Waker,
    time::{Duration, Instant},
};

use super::{
    budget::ConnectionBudget,
    chunk::Chunk,
    frame::{Flags, HEADER, Header, INITIAL_WINDOW, Kind, MAX_WINDOW},
    permits::StreamPermit,
};
use crate::behaviour::circuit::BUFFER_SIZE;

/// The most unsent data of a stream, and the most that is sent in its turn, in bytes: a frame that fits into a
/// message of Noise.
pub const QUANTUM: usize = BUFFER_SIZE;

/// A grant that would leave the peer this much credit or less is not sent, in bytes: it would send tiny frames.
const CRUMB: usize = 16 * 1024;

/// The state of the peer's half.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Inbound {
    /// More data may arrive.
    Open,
    /// FIN was received: no more data arrives.
    Finished,
    /// RST was received, or the session is over.
    Reset,
}

/// The state of this side's half.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outbound {
    /// More data may be written.
    Open,
    /// FIN follows the unsent data.
    Finishing,
    /// FIN was sent.
    Finished,
    /// RST follows the unsent data.
    Resetting,
    /// RST was sent, or is not necessary.
    Reset,
}

/// One stream.
#[derive(Debug)]
pub struct Stream {
    /// Its id on the wire.
    pub id: u32,
    /// The peer's half.
    pub inbound: Inbound,
    /// This side's half.
    pub outbound: Outbound,
    /// SYN or ACK, sent with the next frame.
    pub opening: Flags,
    /// This side opened it, and the peer has not acknowledged it.
    pub is_unacknowledged: bool,
    /// It has a handle, or waits to be accepted.
    pub has_handle: bool,
    /// Data arrived after its handle was dropped.
    pub is_stray: bool,
    /// It is queued for its control frames.
    pub in_control: bool,
    /// It is queued for its data.
    pub in_turns: bool,
    /// The task that waits for data.
    pub reader: Option<Waker>,
    /// The task that waits for room to write.
    pub writer: Option<Waker>,
    /// Its permit; `None` if it is refused.
    pub permit: Option<StreamPermit>,
    chunks: VecDeque<Chunk>,
    unread: usize,
    /// Charge of the chunk read last. It is released by the next read, as the reader may still use the bytes.
    passing: usize,
    read_at: Instant,
    /// How many bytes the peer may still send.
    credit: usize,
    /// The window granted while memory is plentiful.
    window: usize,
    granted_at: Instant,
    send_window: u32,
    /// The frame to send: space for its header, and its body.
    out: Vec<u8>,
    /// How much of the body was sent.
    sent: usize,
    /// How much of it is sent even if the stream is dropped, because it was flushed.
    flushed: usize,
    sent_at: Instant,
}

impl Stream {
    /// A new stream with this flag on its first frame.
    pub fn new(id: u32, opening: Flags, permit: Option<StreamPermit>, now: Instant) -> Self {
        Self {
            id,
            inbound: Inbound::Open,
            outbound: Outbound::Open,
            opening,
            is_unacknowledged: opening == Flags::SYN,
            has_handle: true,
            is_stray: false,
            in_control: false,
            in_turns: false,
            reader: None,
            writer: None,
            permit,
            chunks: VecDeque::new(),
            unread: 0,
            passing: 0,
            read_at: now,
            credit: INITIAL_WINDOW,
            window: INITIAL_WINDOW,
            granted_at: now,
            send_window: INITIAL_WINDOW as u32,
            out: Vec::new(),
            sent: 0,
            flushed: 0,
            sent_at: now,
        }
    }

    // ---- Receiving

    /// Subtracts received bytes from the peer's credit. Returns false if it has less.
    pub fn consume_credit(&mut self, bytes: usize) -> bool {
        let left = self.credit.checked_sub(bytes);
        self.credit = left.unwrap_or_default();
        left.is_some()
    }

    /// How many bytes the peer may still send.
    pub fn credit(&self) -> usize {
        if self.inbound == Inbound::Open { self.credit } else { 0 }
    }

    /// Whether data that arrives will be read.
    pub fn is_read(&self) -> bool {
        self.has_handle && self.is_open()
    }

    /// Stores the contents of a chunk; the charge for it moves with it if it is kept.
    pub fn store(&mut self, chunk: &mut Chunk, now: Instant, budget: &ConnectionBudget) {
        if self.unread == 0 {
            self.read_at = now;
        }
        self.unread += chunk.unread().len();
        budget.add_unread(chunk.unread().len());
        if !self.chunks.back_mut().is_some_and(|last| last.append(chunk)) {
            self.chunks.push_back(std::mem::take(chunk));
        }
    }

    /// Reads as much as fits.
    pub fn read(&mut self, mut into: &mut [u8], now: Instant, budget: &ConnectionBudget) -> usize {
        let (mut read, mut freed) = (0, 0);
        while let Some(first) = self.chunks.front_mut() {
            let some = first.read(into);
            read += some;
            into = into.get_mut(some..).unwrap_or_default();
            if !first.unread().is_empty() {
                break;
            }
            freed += first.capacity();
            self.chunks.pop_front();
        }
        self.unread -= read;
        let passed_on = std::mem::replace(&mut self.passing, read);
        self.read_at = now;
        budget.remove_unread(passed_on);
        budget.charge(read);
        budget.release(freed + passed_on);
        read
    }

    /// Frees the received data.
    pub fn discard_unread(&mut self, budget: &ConnectionBudget) {
        let chunks = std::mem::take(&mut self.chunks);
        let freed = chunks.iter().map(Chunk::capacity).sum::<usize>();
        budget.remove_unread(self.unread + self.passing);
        budget.release(freed + self.passing);
        (self.unread, self.passing) = (0, 0);
    }

    /// Whether a window update is due.
    pub fn is_grant_due(&self, budget: &ConnectionBudget) -> bool {
        let (grant, window) = self.missing_credit(budget);
        let is_read = self.inbound == Inbound::Open && self.is_read();
        is_read && grant >= window / 2 && self.credit + grant > CRUMB
    }

    /// Grants the credit that is due, in bytes.
    ///
    /// Before that, widens the window by at most `growth` if the peer used half of it within two round trips, which
    /// limits its speed. Returns the credit, and by how much the window grew.
    pub fn grant(
        &mut self,
        rtt: Option<Duration>,
        growth: usize,
        now: Instant,
        budget: &ConnectionBudget,
    ) -> (usize, usize) {
        if !self.is_grant_due(budget) {
            return (0, 0);
        }
        let is_fast =
            rtt.is_some_and(|rtt| now.saturating_duration_since(self.granted_at) < rtt * 2);
        let most = self.window.min(growth).min(MAX_WINDOW - self.window);
        let wider = if is_fast { most } else { 0 };
        self.window += wider;
        self.granted_at = now;
        let (grant, _) = self.missing_credit(budget);
        self.credit += grant;
        (grant, wider)
    }

    /// Returns how much credit is missing from the window, and the window.
    fn missing_credit(&self, budget: &ConnectionBudget) -> (usize, usize) {
        let window = budget.window(self.window);
        (window.saturating_sub(self.credit + self.unread + self.passing), window)
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

    /// Returns how many bytes may be written now.
    pub fn room(&self) -> usize {
        QUANTUM.saturating_sub(self.unsent()).min(self.send_window as usize)
    }

    /// Returns the number of unsent bytes.
    pub fn unsent(&self) -> usize {
        self.out.len().saturating_sub(HEADER + self.sent)
    }

    /// Takes as many of `bytes` as there is room for.
    pub fn write(&mut self, bytes: &[u8], now: Instant, budget: &ConnectionBudget) -> usize {
        let bytes = bytes.get(..self.room()).unwrap_or(bytes);
        let before = self.out.capacity();
        if self.out.is_empty() {
            self.sent_at = now;
            self.out.reserve_exact(HEADER + bytes.len());
            self.out.resize(HEADER, 0);
        }
        self.out.extend_from_slice(bytes);
        self.send_window -= bytes.len() as u32;
        budget.charge(self.out.capacity() - before);
        bytes.len()
    }

    /// Guarantees that the bytes written so far are sent, even if the stream is dropped.
    pub fn flush(&mut self) {
        self.flushed = self.unsent();
    }

    /// Frees the unsent data.
    pub fn discard_unsent(&mut self, budget: &ConnectionBudget) {
        budget.release(self.out.capacity());
        (self.out, self.sent, self.flushed) = (Vec::new(), 0, 0);
    }

    /// Whether it has something to send in its turn: data, or FIN.
    pub fn has_data(&self) -> bool {
        self.unsent() > 0 || self.outbound == Outbound::Finishing
    }

    /// Moves a frame with at most `most` bytes of data into `into`, which is empty. Returns what stays charged for it.
    pub fn take_frame(
        &mut self,
        into: &mut Vec<u8>,
        most: usize,
        now: Instant,
        budget: &ConnectionBudget,
    ) -> usize {
        let body = self.unsent().min(most);
        let is_last = body == self.unsent();
        let mut flags = std::mem::take(&mut self.opening);
        // FIN is a frame of its own: go-yamux handles the flags of a frame before its body, so a reader would see the
        // end before the last of the data.
        if body == 0 && self.outbound == Outbound::Finishing {
            flags = flags | Flags::FIN;
            self.outbound = if self.is_stray { Outbound::Resetting } else { Outbound::Finished };
        }
        let header = self.header(Kind::Data, flags, body as u32).encode();
        self.sent_at = now;
        self.flushed = self.flushed.saturating_sub(body);
        if is_last && self.sent == 0 && !self.out.is_empty() {
            // The buffer already has space for the header: no copy.
            *into = std::mem::take(&mut self.out);
            let _ = into.as_mut_slice().write(&header); // to memory
            return into.capacity();
        }
        let from = HEADER + self.sent;
        into.extend_from_slice(&header);
        into.extend_from_slice(self.out.get(from..from + body).unwrap_or_default());
        self.sent += body;
        if is_last {
            self.discard_unsent(budget);
        }
        0
    }

    /// Whether there are frames without data to send.
    pub fn has_control(&self, budget: &ConnectionBudget) -> bool {
        // An ACK is sent with data if there is some.
        let acknowledges = self.opening == Flags::ACK && self.is_open() && !self.has_data();
        acknowledges || self.is_reset_due() || self.is_grant_due(budget)
    }

    /// Whether RST is to be sent now.
    pub fn is_reset_due(&self) -> bool {
        self.outbound == Outbound::Resetting && self.unsent() == 0
    }

    /// A header with the id of this stream.
    pub fn header(&self, kind: Kind, flags: Flags, length: u32) -> Header {
        Header { kind, flags, stream: self.id, length }
    }

    // ---- The end

    /// Closes this side's half.
    pub fn close(&mut self) {
        if self.outbound == Outbound::Open {
            self.outbound = Outbound::Finishing;
        }
    }

    /// Drops the handle. Unless this side closed it, resets the stream, so that the peer sees it as incomplete.
    pub fn drop_handle(&mut self, budget: &ConnectionBudget) {
        self.has_handle = false;
        self.discard_unread(budget);
        // A peer without credit waits for some, and so sends no data that would cause a reset.
        if self.inbound == Inbound::Open && self.credit == 0 {
            self.is_stray = true;
            if self.outbound == Outbound::Finished {
                self.set_resetting();
            }
        }
        if self.outbound == Outbound::Open {
            match self.flushed {
                0 => self.discard_unsent(budget),
                flushed => self.out.truncate(HEADER + self.sent + flushed),
            }
            self.set_resetting();
        }
    }

    /// Resets it. The id of a finished stream may already belong to another one: no RST is sent for it.
    pub fn reset(&mut self, budget: &ConnectionBudget) {
        let is_finished = self.is_finished();
        self.discard_unread(budget);
        self.discard_unsent(budget);
        self.inbound = Inbound::Reset;
        self.set_resetting();
        if is_finished {
            self.outbound = Outbound::Reset;
        }
    }

    /// The peer reset it.
    pub fn on_reset(&mut self, budget: &ConnectionBudget) {
        self.discard_unsent(budget);
        (self.inbound, self.outbound) = (Inbound::Reset, Outbound::Reset);
    }

    /// The session is over.
    pub fn end(&mut self, budget: &ConnectionBudget) {
        self.discard_unsent(budget);
        self.outbound = Outbound::Reset;
        if self.inbound == Inbound::Open {
            self.inbound = Inbound::Reset;
        }
    }

    /// A stream that the peer does not know of needs no RST.
    fn set_resetting(&mut self) {
        let is_unheard = self.opening == Flags::SYN && self.unsent() == 0;
        self.outbound = if is_unheard { Outbound::Reset } else { Outbound::Resetting };
    }

    fn is_open(&self) -> bool {
        !matches!(self.outbound, Outbound::Resetting | Outbound::Reset)
    }

    /// Its weight when memory is freed: its bytes, times how long its reader or its peer has not taken
    /// any.
    pub fn weight(&self, now: Instant) -> u128 {
        let waits = |bytes: usize, since: Instant| {
            bytes as u128 * (1 + now.saturating_duration_since(since).as_millis())
        };
        waits(self.unread + self.passing, self.read_at) + waits(self.out.capacity(), self.sent_at)
    }

    /// Whether both halves have ended, so that its id is free.
    pub fn is_finished(&self) -> bool {
        let both = (self.inbound, self.outbound) == (Inbound::Finished, Outbound::Finished);
        both || self.outbound == Outbound::Reset
    }

    /// Whether it has no handle and nothing to send.
    pub fn is_gone(&self) -> bool {
        !self.has_handle && matches!(self.outbound, Outbound::Finished | Outbound::Reset)
    }
}
