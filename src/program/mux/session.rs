//! A session of yamux: its streams, and what their holders do with them.
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
    frame::{Flags, Reason},
    permits::StreamPermit,
    stream::{Inbound, Outbound, Stream},
};

/// How many refusals may wait to be sent, and how many streams are remembered that ended on our side alone.
const MAX_REFUSED: usize = 256;

/// How many of our streams may wait to be acknowledged: go-libp2p refuses more ("ACK backlog").
const MAX_UNACKNOWLEDGED: usize = 256;

/// Which side of the connection this is. It decides whose stream numbers are odd ("StreamID Field").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Its numbers are odd.
    Client,
    /// Its numbers are even.
    Server,
}

/// Why a session ends.
#[derive(Debug)]
pub enum End {
    /// The peer ends it.
    Left,
    /// This side ends it, with this go-away.
    Broken(Reason, &'static str),
    /// The connection failed.
    Failed(io::Error),
}

impl From<io::Error> for End {
    fn from(error: io::Error) -> Self {
        Self::Failed(error)
    }
}

/// What is to be done when the session's lock is released.
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

    /// Has this task woken in place of the one before it.
    fn register(&mut self, waker: &mut Option<Waker>, cx: &Context<'_>) {
        if !waker.as_ref().is_some_and(|waker| waker.will_wake(cx.waker())) {
            // The one before may be the last of its task, which must not be dropped under the lock.
            self.wakers.extend(waker.replace(cx.waker().clone()));
        }
    }
}

/// One session.
#[derive(Debug)]
pub struct Session {
    role: Role,
    budget: Arc<ConnectionBudget>,
    /// By a serial number of ours, for a number on the wire may return.
    streams: BTreeMap<u64, Box<Stream>>,
    last_serial: u64,
    /// By their numbers on the wire, as long as those are in use.
    ids: BTreeMap<u32, u64>,
    next_id: u32,
    /// How many streams of ours the peer has not acknowledged.
    unacknowledged: usize,
    /// How many streams were refused, and their peer is not told yet.
    refused: usize,
    /// Streams that this side has closed, and nobody holds: their peers may still send.
    half_closed: VecDeque<u32>,
    /// Streams that the peer opened and nobody has taken yet.
    accepted: VecDeque<u64>,
    /// The stream and the flags of the frame that comes.
    incoming: (u32, Flags),
    /// The ping to be answered.
    ping: Option<u32>,
    round_trip: RoundTrip,
    /// By how much windows may still grow.
    growth: usize,
    /// Streams with control frames to send, and with data.
    control: VecDeque<u64>,
    turns: Turns,
    /// What the frame is charged that was taken last.
    in_flight: usize,
    /// No stream is opened any more; go-away is sent after all else.
    is_over: bool,
    go_away: Option<Reason>,
    /// Who drives the connection, waits for a stream to come, and for one to be opened.
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
            growth: budget.growth(),
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

    /// What is to be done now that the lock is released.
    pub fn take_effects(&mut self) -> Effects {
        std::mem::take(&mut self.effects)
    }

    /// This task drives the connection: it is woken when there is something to send.
    pub fn set_driver(&mut self, cx: &Context<'_>) {
        self.effects.register(&mut self.driver, cx);
    }

    // ---- Streams come

    /// Opens a stream, which takes this permit; its serial number.
    ///
    /// # Errors
    ///
    /// When the session is over, or has used up its numbers.
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

    /// A stream that the peer opened. It is acknowledged with what is sent next.
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

    // ---- What their holders do

    /// Reads from a stream. What was received before a reset is still read.
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

    /// What was written to the stream will be sent, whatever becomes of the stream.
    pub fn flush(&mut self, serial: u64) {
        if let Some(stream) = self.streams.get_mut(&serial) {
            stream.flush();
        }
    }

    /// Nothing more will be written to the stream: FIN goes after the last of it.
    pub fn close(&mut self, serial: u64) {
        self.change(serial, |stream, _| stream.close());
    }

    /// Nobody holds the stream any more. It is reset, unless this side closed it.
    pub fn drop_handle(&mut self, serial: u64) {
        self.change(serial, Stream::drop_handle);
    }

    /// Resets a stream: frees its bytes at once, and tells the peer.
    pub fn reset(&mut self, serial: u64) {
        self.change(serial, Stream::reset);
    }

    /// Resets the stream with the most bytes that have waited for the longest; how many bytes that freed.
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

    /// How many bytes the peer may still send.
    pub fn credit(&self) -> usize {
        self.streams.values().map(|stream| stream.credit()).sum()
    }

    /// The permit of a stream.
    pub fn permit(&self, serial: u64) -> Option<&StreamPermit> {
        self.streams.get(&serial)?.permit.as_ref()
    }

    // ---- What follows

    /// Changes how far a stream has come, and wakes its holder.
    fn change(&mut self, serial: u64, change: impl FnOnce(&mut Stream, &ConnectionBudget)) {
        if let Some(stream) = self.streams.get_mut(&serial) {
            change(stream, &self.budget);
            self.effects.wakers.extend(stream.reader.take());
            self.effects.wakers.extend(stream.writer.take());
            self.settle(serial);
        }
    }

    /// Queues a stream for what it has to send; forgets of it what is not needed any more.
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
        // One whose first frame broke the session was not refused yet.
        self.refused = self.refused.saturating_sub(usize::from(stream.permit.is_none()));
        self.effects.permits.extend(stream.permit.take());
    }

    /// A stream of ours does not wait any more to be acknowledged, if it did.
    fn acknowledge(&mut self, did_wait: bool) {
        self.unacknowledged -= usize::from(did_wait);
        self.effects.wakers.extend(self.opener.take());
    }

    // ---- The end

    /// Sends what is unsent, and go-away; no stream is opened any more.
    pub fn leave(&mut self) {
        if !std::mem::replace(&mut self.is_over, true) {
            self.go_away = Some(Reason::Normal);
        }
    }

    /// The session is over: streams end where they are, with what was received. Nothing is sent but the
    /// go-away, if this side ends it.
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

    /// The connection is gone: all memory is freed.
    pub fn close_all(&mut self) {
        self.end(&End::Left);
        self.streams.keys().copied().collect::<Vec<_>>().into_iter().for_each(|it| self.remove(it));
        self.budget.release(std::mem::take(&mut self.in_flight));
    }
}

#[cfg(test)]
mod tests;
