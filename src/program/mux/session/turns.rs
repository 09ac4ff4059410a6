//! Fair queueing of data, and when to ping.
//!
//! Sans-IO.

use std::{
    collections::{BTreeMap, VecDeque},
    time::{Duration, Instant},
};

use crate::program::mux::stream::{QUANTUM, Stream};

/// The round-trip time is measured after this many received bytes, unless it was measured recently.
const PING_AFTER: usize = 64 * 1024;
const PING_INTERVAL: Duration = Duration::from_secs(10);

/// The order in which streams send data: deficit round robin with a list of new flows, as in fq_codel (RFC 8290, 4.2).
/// A stream that had nothing to send goes first, for one quantum.
#[derive(Debug, Default)]
pub struct Turns {
    new: VecDeque<Turn>,
    old: VecDeque<Turn>,
}

/// A stream, and how many bytes it may send before the next stream's turn.
#[derive(Debug)]
struct Turn {
    stream: u64,
    deficit: i64,
}

impl Turns {
    /// Adds a stream that has data to send.
    pub fn add(&mut self, stream: u64) {
        self.new.push_back(Turn { stream, deficit: QUANTUM as i64 });
    }

    /// Returns the stream that sends next.
    pub fn next(&mut self, streams: &mut BTreeMap<u64, Box<Stream>>) -> Option<u64> {
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
            // A stream that becomes idle and returns does not count as new each time.
            if has_data || (stream.is_some() && is_new && !self.old.is_empty()) {
                turn.deficit += if turn.deficit <= 0 { QUANTUM as i64 } else { 0 };
                self.old.push_back(turn);
            } else if let Some(stream) = stream {
                stream.in_turns = false;
            }
        }
    }

    /// Records that the current stream sent this many bytes.
    pub fn spend(&mut self, bytes: usize) {
        let list = if self.new.is_empty() { &mut self.old } else { &mut self.new };
        if let Some(turn) = list.front_mut() {
            turn.deficit -= bytes as i64;
        }
    }
}

/// Round-trip times, measured by our pings ("Ping"), one at a time.
#[derive(Debug, Default)]
pub struct RoundTrip {
    /// The last measured one.
    pub measured: Option<Duration>,
    /// Bytes of data received since then.
    pub received: usize,
    /// The last ping: its time, its id, and whether its answer is missing.
    last: Option<Instant>,
    number: u32,
    is_asked: bool,
}

impl RoundTrip {
    /// Returns the ping to send if one is due.
    pub fn ask(&mut self, now: Instant) -> Option<u32> {
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

    /// Handles an answer. Returns false if no ping with this id was sent.
    pub fn on_answer(&mut self, number: u32, now: Instant) -> bool {
        let is_asked = std::mem::take(&mut self.is_asked) && self.number == number;
        self.measured = self.last.map(|last| now.saturating_duration_since(last));
        is_asked
    }
}
