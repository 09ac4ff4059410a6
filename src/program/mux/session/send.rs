//! Sending: control frames are state, and not a queue, so that each is sent once however long it waits; data takes
//! turns.

use std::{
    collections::{BTreeMap, VecDeque},
    time::{Duration, Instant},
};

use super::Session;
use crate::program::mux::{
    frame::{Flags, HEADER, Header, Kind},
    stream::{Outbound, QUANTUM, Stream},
};

/// After so many received bytes the round trip is measured, unless that was done a short time ago.
const PING_AFTER: usize = 64 * 1024;
const PING_INTERVAL: Duration = Duration::from_secs(10);

/// How many bytes of control frames are sent at once.
const MAX_CONTROL: usize = 64 * HEADER;

/// Frames to send.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Frames {
    /// Frames about streams and the session.
    #[default]
    Control,
    /// Resets.
    Resets,
    /// Data of one stream.
    Data,
}

impl Session {
    /// Takes the next frames to send, of `most` bytes of data at most: what they are, unless there are none.
    pub fn take_frames(&mut self, into: &mut Vec<u8>, most: usize, now: Instant) -> Option<Frames> {
        self.budget.release(std::mem::take(&mut self.in_flight));
        into.clear();
        if let Some(frames) = self.take_control(into, now) {
            return Some(frames);
        }
        if let Some(serial) = self.turns.next(&mut self.streams)
            && let Some(stream) = self.streams.get_mut(&serial)
        {
            self.in_flight = stream.take_frame(into, most, now, &self.budget);
            self.turns.spend(into.len());
            self.effects.wakers.extend(stream.writer.take());
            self.settle(serial);
            return Some(Frames::Data);
        }
        let reason = self.go_away.take()?;
        into.extend(session_header(Kind::GoAway, Flags::NONE, reason as u32));
        Some(Frames::Control)
    }

    fn take_control(&mut self, into: &mut Vec<u8>, now: Instant) -> Option<Frames> {
        if let Some(id) = self.ping.take() {
            into.extend(session_header(Kind::Ping, Flags::ACK, id));
        }
        if !self.is_over
            && let Some(id) = self.round_trip.ask(now)
        {
            into.extend(session_header(Kind::Ping, Flags::SYN, id));
        }
        let mut frames = Frames::Control;
        while into.len() < MAX_CONTROL
            && let Some(serial) = self.control.front().copied()
        {
            let stream = self.streams.get_mut(&serial);
            let Some(stream) = stream.filter(|stream| stream.has_control(&self.budget)) else {
                self.control.pop_front();
                if let Some(stream) = self.streams.get_mut(&serial) {
                    stream.in_control = false;
                }
                continue;
            };
            let resets = stream.is_reset_due();
            if resets != (frames == Frames::Resets) && !into.is_empty() {
                break; // resets go by themselves
            }
            let opening = std::mem::take(&mut stream.opening);
            if resets {
                frames = Frames::Resets;
                stream.outbound = Outbound::Reset;
                into.extend(stream.header(Kind::Data, opening | Flags::RST, 0).encode());
            } else {
                let rtt = self.round_trip.measured;
                let (credit, wider) = stream.grant(rtt, self.growth, now, &self.budget);
                self.growth -= wider;
                into.extend(stream.header(Kind::WindowUpdate, opening, credit as u32).encode());
            }
            self.settle(serial);
        }
        (!into.is_empty()).then_some(frames)
    }
}

fn session_header(kind: Kind, flags: Flags, length: u32) -> [u8; HEADER] {
    Header { kind, flags, stream: 0, length }.encode()
}

/// Whose turn it is to send data: deficit round robin with a list of new flows, as in fq_codel (RFC 8290, 4.2). A
/// stream that had nothing to send goes first, for one quantum.
#[derive(Debug, Default)]
pub struct Turns {
    new: VecDeque<Turn>,
    old: VecDeque<Turn>,
}

/// A stream, and how many bytes it may send before the others have their turn.
#[derive(Debug)]
struct Turn {
    stream: u64,
    deficit: i64,
}

impl Turns {
    /// This stream has something to send.
    pub fn add(&mut self, stream: u64) {
        self.new.push_back(Turn { stream, deficit: QUANTUM as i64 });
    }

    /// The stream that sends next.
    fn next(&mut self, streams: &mut BTreeMap<u64, Box<Stream>>) -> Option<u64> {
        loop {
            let is_new = !self.new.is_empty();
            let list = if is_new { &mut self.new } else { &mut self.old };
            let mut turn = list.pop_front()?;
            let stream = streams.get_mut(&turn.stream);
            let has_data = stream.as_ref().is_some_and(|stream| stream.has_data());
            if has_data && turn.deficit > 0 {
                let serial = turn.stream;
                list.push_front(turn);
                return Some(serial);
            }
            // One that comes and goes is not new each time.
            if has_data || (stream.is_some() && is_new && !self.old.is_empty()) {
                turn.deficit += if turn.deficit <= 0 { QUANTUM as i64 } else { 0 };
                self.old.push_back(turn);
            } else if let Some(stream) = stream {
                stream.in_turns = false;
            }
        }
    }

    /// It sent so many bytes.
    fn spend(&mut self, bytes: usize) {
        let list = if self.new.is_empty() { &mut self.old } else { &mut self.new };
        if let Some(turn) = list.front_mut() {
            turn.deficit -= bytes as i64;
        }
    }
}

/// Round trips, as measured by our pings ("Ping"): one at a time.
#[derive(Debug, Default)]
pub struct RoundTrip {
    /// The last that was measured.
    measured: Option<Duration>,
    /// How many bytes of data were received since.
    pub received: usize,
    /// When the last ping was sent, its number, and whether it is to be answered.
    last: Option<Instant>,
    number: u32,
    is_asked: bool,
}

impl RoundTrip {
    /// The ping to send, if one is due.
    fn ask(&mut self, now: Instant) -> Option<u32> {
        let since = self.last.map(|last| now.saturating_duration_since(last));
        let is_old = since.is_none_or(|since| since >= PING_INTERVAL);
        if self.is_asked || self.received < PING_AFTER || !is_old {
            return None;
        }
        let number = self.number.wrapping_add(1);
        let (last, is_asked, measured) = (Some(now), true, self.measured);
        *self = Self { measured, received: 0, last, number, is_asked };
        Some(number)
    }

    /// The peer answers; false if it was not asked.
    pub fn on_answer(&mut self, number: u32, now: Instant) -> bool {
        let is_asked = std::mem::take(&mut self.is_asked) && self.number == number;
        self.measured = self.last.map(|last| now.saturating_duration_since(last));
        is_asked
    }
}
