//! Sending: control frames are kept as state, not in a queue, so that each is sent once however long it waits; data
//! is sent in turn by fair queueing.

use std::time::Instant;

use super::Session;
use crate::program::mux::{
    frame::{Flags, HEADER, Header, Kind},
    stream::Outbound,
};

/// The most bytes of control frames in one write batch.
const MAX_CONTROL: usize = 64 * HEADER;

/// Frames to send.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Frames {
    /// Control frames other than resets.
    #[default]
    Control,
    /// Resets.
    Resets,
    /// Data of one stream.
    Data,
}

impl Session {
    /// Takes the next frames to send, with at most `most` bytes of data. Returns their kind; `None` if there are none.
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
                break; // resets are a batch of their own
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
