//! A yamux session: its streams, and the operations on them.
//!
//! Sans-IO: the bytes of the connection and `now` come in ([`receive`]), frames to send come out ([`send`]);
//! [`Effects`] is what is to be done once the session's lock is released. The sections named here are those of
//! [the specification](https://github.com/hashicorp/yamux/blob/master/spec.md).

pub mod receive;
pub mod send;
mod turns;

use std::{
    collections::{BTreeMap, VecDeque},
    io,
    sync::Arc,
    task::{Context, Poll, Waker},
    time::Instant,
};

use self::turns::{RoundTrip, Turns};
use super::{
    budget::{ConnectionBudget, Cut},
    frame::{Flags, INITIAL_WINDOW, MAX_WINDOW, Reason},
    permits::StreamPermit,
    stream::{Inbound, Outbound, Stream},
};

/// The most refusals that may wait to be sent, and the most streams remembered that only this side has closed.
const MAX_REFUSED: usize = 256;

/// The most unacknowledged streams that this side opens: go-libp2p refuses more ("ACK backlog").
const MAX_UNACKNOWLEDGED: usize = 256;

/// The total by which the windows of one connection grow, in bytes.
const MAX_GROWTH: usize = MAX_WINDOW - INITIAL_WINDOW;

/// The side of the connection. It determines the parity of the stream ids that this side assigns ("StreamID Field").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Opens streams with odd ids.
    Client,
    /// Opens streams with even ids.
    Server,
}

/// Why a session ends.
#[derive(Debug)]
pub enum End {
    /// The peer sent go-away.
    Left,
    /// This side ends it with this go-away.
    Broken(Reason, &'static str),
    /// The connection failed.
    Failed(io::Error),
}

impl From<io::Error> for End {
    fn from(error: io::Error) -> Self {
        Self::Failed(error)
    }
}

/// What is done after the session's lock is released.
#[derive(Debug, Default)]
pub struct Effects {
    wakers: Vec<Waker>,
    permits: Vec<StreamPermit>,
}

impl Effects {
    /// Wakes tasks and releases permits.
    pub fn apply(self) {
        drop(self.permits);
        self.wakers.into_iter().for_each(Waker::wake);
    }

    /// Registers the task of `cx` in place of the previous waker.
    fn register(&mut self, waker: &mut Option<Waker>, cx: &Context<'_>) {
        if !waker.as_ref().is_some_and(|waker| waker.will_wake(cx.waker())) {
            // The previous waker may be the last reference to its task, which must not be dropped under the lock.
            self.wakers.extend(waker.replace(cx.waker().clone()));
        }
    }
}

/// One session.
#[derive(Debug)]
pub struct Session {
    role: Role,
    budget: Arc<ConnectionBudget>,
    /// By serial number, which is never reused; ids on the wire may be.
    streams: BTreeMap<u64, Box<Stream>>,
    last_serial: u64,
    /// Serial numbers by id on the wire, for ids in use.
    ids: BTreeMap<u32, u64>,
    next_id: u32,
    /// Streams opened by this side that the peer has not acknowledged.
    unacknowledged: usize,
    /// Refused streams whose RST is not sent yet.
    refused: usize,
    /// Ids of streams without a handle that this side has closed: the peer may still send on them.
    half_closed: VecDeque<u32>,
    /// Streams that the peer opened and that are not accepted yet.
    accepted: VecDeque<u64>,
    /// The stream and the flags of the frame being received.
    incoming: (u32, Flags),
    /// The ping to answer.
    ping: Option<u32>,
    round_trip: RoundTrip,
    /// The remaining growth of windows, in bytes.
    growth: usize,
    /// Streams with control frames to send; streams with data to send.
    control: VecDeque<u64>,
    turns: Turns,
    /// What the last frame taken is charged.
    in_flight: usize,
    /// No more streams are opened; go-away is sent after everything else.
    is_over: bool,
    go_away: Option<Reason>,
    /// The tasks that drive the connection, wait for an inbound stream, and wait to open one.
    driver: Option<Waker>,
    acceptor: Option<Waker>,
    opener: Option<Waker>,
    effects: Effects,
}

impl Session {
    /// A session without streams.
    pub fn new(role: Role, budget: Arc<ConnectionBudget>) -> Self {
        Self {
            role,
            budget,
            streams: BTreeMap::new(),
            last_serial: 0,
            ids: BTreeMap::new(),
            next_id: if role == Role::Client { 1 } else { 2 },
            unacknowledged: 0,
            refused: 0,
            half_closed: VecDeque::new(),
            accepted: VecDeque::new(),
            incoming: (0, Flags::NONE),
            ping: None,
            round_trip: RoundTrip::default(),
            growth: MAX_GROWTH,
            control: VecDeque::new(),
            turns: Turns::default(),
            in_flight: 0,
            is_over: false,
            go_away: None,
            driver: None,
            acceptor: None,
            opener: None,
            effects: Effects::default(),
        }
    }

    /// Takes what is to be done after the lock is released.
    pub fn take_effects(&mut self) -> Effects {
        std::mem::take(&mut self.effects)
    }

    /// Sets the task that drives the connection, which is woken when there is something to send.
    pub fn set_driver(&mut self, cx: &Context<'_>) {
        self.effects.register(&mut self.driver, cx);
    }

    // ---- Opening and accepting streams

    /// Opens a stream with this permit. Returns its serial number.
    ///
    /// # Errors
    ///
    /// If the session is over, or has used up its ids.
    pub fn open(&mut self, permit: StreamPermit, now: Instant) -> io::Result<u64> {
        let next_id = self.next_id.checked_add(2).filter(|_| !self.is_over);
        let Some(next_id) = next_id else {
            self.effects.permits.push(permit);
            return Err(io::ErrorKind::NotConnected.into());
        };
        let id = std::mem::replace(&mut self.next_id, next_id);
        self.unacknowledged += 1;
        Ok(self.insert(Stream::new(id, Flags::SYN, Some(permit), now)))
    }

    /// Ready when another stream may be opened.
    pub fn poll_open(&mut self, cx: &Context<'_>) -> Poll<()> {
        if self.unacknowledged < MAX_UNACKNOWLEDGED {
            return Poll::Ready(());
        }
        self.effects.register(&mut self.opener, cx);
        Poll::Pending
    }

    /// Accepts a stream that the peer opened. It is acknowledged by its next frame.
    pub fn poll_accept(&mut self, cx: &Context<'_>) -> Poll<u64> {
        while let Some(serial) = self.accepted.pop_front() {
            match self.streams.get_mut(&serial) {
                Some(stream) if stream.inbound != Inbound::Reset => {
                    stream.opening = Flags::ACK;
                    self.settle(serial);
                    return Poll::Ready(serial);
                }
                _ => self.drop_handle(serial),
            }
        }
        self.effects.register(&mut self.acceptor, cx);
        Poll::Pending
    }

    fn insert(&mut self, stream: Stream) -> u64 {
        self.last_serial += 1;
        self.budget.charge(size_of::<Stream>());
        self.ids.insert(stream.id, self.last_serial);
        self.streams.insert(self.last_serial, Box::new(stream));
        self.last_serial
    }

    // ---- Operations on a handle

    /// Reads from a stream. Data received before a reset can still be read.
    pub fn poll_read(
        &mut self,
        serial: u64,
        cx: &Context<'_>,
        into: &mut [u8],
        now: Instant,
    ) -> Poll<io::Result<usize>> {
        let stream = self.streams.get_mut(&serial).ok_or(io::ErrorKind::ConnectionReset)?;
        let read = stream.read(into, now, &self.budget);
        let result = match stream.inbound {
            _ if read > 0 || into.is_empty() => Poll::Ready(Ok(read)),
            Inbound::Finished => Poll::Ready(Ok(0)),
            Inbound::Reset => Poll::Ready(Err(io::ErrorKind::ConnectionReset.into())),
            Inbound::Open => {
                self.effects.register(&mut stream.reader, cx);
                Poll::Pending
            }
        };
        self.settle(serial);
        result
    }

    /// Writes to a stream.
    pub fn poll_write(
        &mut self,
        serial: u64,
        cx: &Context<'_>,
        bytes: &[u8],
        now: Instant,
    ) -> Poll<io::Result<usize>> {
        let stream = self.streams.get_mut(&serial).ok_or(io::ErrorKind::ConnectionReset)?;
        match stream.outbound {
            Outbound::Open => {}
            Outbound::Finishing | Outbound::Finished => {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            Outbound::Resetting | Outbound::Reset => {
                return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()));
            }
        }
        if stream.room() == 0 && !bytes.is_empty() {
            self.effects.register(&mut stream.writer, cx);
            return Poll::Pending;
        }
        let written = stream.write(bytes, now, &self.budget);
        self.settle(serial);
        Poll::Ready(Ok(written))
    }

    /// Guarantees that the bytes written so far are sent, even if the stream is dropped.
    pub fn flush(&mut self, serial: u64) {
        if let Some(stream) = self.streams.get_mut(&serial) {
            stream.flush();
        }
    }

    /// Closes the write half: FIN follows the unsent data.
    pub fn close(&mut self, serial: u64) {
        self.change(serial, |stream, _| stream.close());
    }

    /// Drops the handle. Resets the stream, unless this side closed it.
    pub fn drop_handle(&mut self, serial: u64) {
        self.change(serial, Stream::drop_handle);
    }

    /// Resets a stream: frees its bytes at once, and sends RST.
    pub fn reset(&mut self, serial: u64) {
        self.change(serial, Stream::reset);
    }

    /// Resets the stream with the greatest [weight](Stream::weight). Returns how many bytes that freed.
    pub fn shed(&mut self, now: Instant, cut: Cut) -> usize {
        let weights = self.streams.iter().map(|(serial, stream)| (stream.weight(now), *serial));
        let (weight, serial) = weights.max().unwrap_or_default();
        if weight == 0 {
            return 0;
        }
        let before = self.budget.held();
        self.reset(serial);
        self.budget.count(cut);
        before.saturating_sub(self.budget.held())
    }

    /// Returns how many bytes the peer may still send.
    pub fn credit(&self) -> usize {
        self.streams.values().map(|stream| stream.credit()).sum()
    }

    /// Returns the permit of a stream.
    pub fn permit(&self, serial: u64) -> Option<&StreamPermit> {
        self.streams.get(&serial)?.permit.as_ref()
    }

    // ---- Bookkeeping

    /// Changes the state of a stream, and wakes its reader and its writer.
    fn change(&mut self, serial: u64, change: impl FnOnce(&mut Stream, &ConnectionBudget)) {
        if let Some(stream) = self.streams.get_mut(&serial) {
            change(stream, &self.budget);
            self.effects.wakers.extend(stream.reader.take());
            self.effects.wakers.extend(stream.writer.take());
            self.settle(serial);
        }
    }

    /// Queues a stream for what it has to send; removes it, or frees its id, when it is no longer needed.
    fn settle(&mut self, serial: u64) {
        let Some(stream) = self.streams.get_mut(&serial) else {
            return;
        };
        if stream.has_control(&self.budget) && !std::mem::replace(&mut stream.in_control, true) {
            self.control.push_back(serial);
            self.effects.wakers.extend(self.driver.take());
        }
        if stream.has_data() && !std::mem::replace(&mut stream.in_turns, true) {
            self.turns.add(serial);
            self.effects.wakers.extend(self.driver.take());
        }
        let (id, is_finished, is_gone) = (stream.id, stream.is_finished(), stream.is_gone());
        if is_finished && self.ids.get(&id) == Some(&serial) {
            self.ids.remove(&id);
        }
        if is_gone {
            self.remove(serial);
            if !is_finished {
                self.ids.remove(&id);
                self.half_closed.push_back(id);
            }
            if self.half_closed.len() > MAX_REFUSED {
                self.half_closed.pop_front();
            }
        }
    }

    fn remove(&mut self, serial: u64) {
        let Some(mut stream) = self.streams.remove(&serial) else {
            return;
        };
        stream.discard_unread(&self.budget);
        stream.discard_unsent(&self.budget);
        self.budget.release(size_of::<Stream>());
        self.growth += stream.growth();
        self.acknowledge(stream.is_unacknowledged);
        // A stream whose first frame violated the protocol has not been refused yet.
        self.refused = self.refused.saturating_sub(usize::from(stream.permit.is_none()));
        self.effects.permits.extend(stream.permit.take());
    }

    /// Counts a stream of this side as acknowledged, if `did_wait`.
    fn acknowledge(&mut self, did_wait: bool) {
        self.unacknowledged -= usize::from(did_wait);
        self.effects.wakers.extend(self.opener.take());
    }

    // ---- The end

    /// Sends all unsent data and then go-away; no more streams are opened.
    pub fn leave(&mut self) {
        if !std::mem::replace(&mut self.is_over, true) {
            self.go_away = Some(Reason::Normal);
        }
    }

    /// Ends the session: each stream ends after the data received so far. Sends nothing but the go-away, if this
    /// side ends it.
    pub fn end(&mut self, end: &End) {
        self.is_over = true;
        self.go_away = None;
        if let End::Broken(reason, _) = end {
            self.go_away = Some(*reason);
        }
        self.ping = None;
        self.accepted.clear();
        for serial in self.streams.keys().copied().collect::<Vec<_>>() {
            self.change(serial, Stream::end);
        }
        self.effects.wakers.extend(self.acceptor.take());
        self.effects.wakers.extend(self.opener.take());
    }

    /// Frees all memory after the connection closed.
    pub fn close_all(&mut self) {
        self.end(&End::Left);
        self.streams.keys().copied().collect::<Vec<_>>().into_iter().for_each(|it| self.remove(it));
        self.budget.release(std::mem::take(&mut self.in_flight));
    }
}

#[cfg(test)]
mod tests;
