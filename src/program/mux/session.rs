//! A yamux session: its streams, the operations on them, and the frames received and sent.
//!
//! Sans-IO: the bytes of the connection and `now` come in ([`Session::receive`]), frames to send come out
//! ([`Session::take_frames`]); [`Effects`] is what is to be done once the session's lock is released. The sections named
//! here are those of [the specification](https://github.com/hashicorp/yamux/blob/master/spec.md).

pub mod frames;

use std::{
    collections::{BTreeMap, VecDeque},
    io, mem,
    sync::{Arc, Mutex, PoisonError, Weak},
    task::{Context, Poll, Waker},
    time::{Duration, Instant},
};

use libp2p::core::Endpoint;

use super::{
    budget::{Connection, ConnectionBudget, Cut, MemoryBudget},
    frame::{ACK, Flags, RST, Reason},
    stream::{Origin, QUANTUM, Stream},
    stream_limits::{Key, StreamAdmission, StreamId},
};

/// How many refusals may wait to be sent, and how many streams are remembered that only this side has closed.
const MAX_REFUSED: usize = 256;

/// The most unacknowledged streams that this side opens: go-libp2p refuses more ("ACK backlog").
const MAX_UNACKNOWLEDGED: usize = 256;

/// The round-trip time is measured after this many received bytes, unless it was measured recently.
const PING_AFTER: usize = 64 * 1024;
const PING_INTERVAL: Duration = Duration::from_secs(10);

/// What is done after the session's lock is released.
#[derive(Debug, Default)]
pub struct Effects {
    wakers: Vec<Waker>,
    /// Wakers that were replaced. One may be the last reference to its task, which must not be dropped under the lock.
    replaced: Vec<Waker>,
    /// Streams of other sessions that are reset for streams of this one.
    preempted: Vec<StreamId>,
}

impl Effects {
    /// Resets streams of other sessions, and wakes tasks.
    pub fn apply(self, memory: &MemoryBudget) {
        self.preempted.into_iter().for_each(|stream| memory.reset(stream));
        self.wakers.into_iter().for_each(Waker::wake);
    }

    /// Registers the task of `cx` in place of the previous waker.
    fn register(&mut self, waker: &mut Option<Waker>, cx: &Context<'_>) {
        if !waker.as_ref().is_some_and(|waker| waker.will_wake(cx.waker())) {
            self.replaced.extend(waker.replace(cx.waker().clone()));
        }
    }
}

type Streams = BTreeMap<Key, Box<Stream>>;

/// The serial number of the stream with this id on the wire, until it is finished.
fn current(streams: &mut Streams, id: u32) -> Option<(Key, &mut Stream)> {
    let (key, stream) = streams.range_mut((id, 0)..=(id, u64::MAX)).next_back()?;
    (!stream.is_finished()).then_some((*key, stream))
}

/// One session.
#[derive(Debug)]
pub struct Session {
    budget: Arc<ConnectionBudget>,
    admission: StreamAdmission,
    streams: Streams,
    last_serial: u64,
    next_id: u32,
    /// How many streams the peer has open, how many this side, and how many of those the peer has not acknowledged.
    inbound: usize,
    outbound: usize,
    unacknowledged: usize,
    /// Whether the peer has dialed the connection and opened no stream yet.
    is_unused: bool,
    /// Refused streams whose RST is not sent yet.
    refused: usize,
    /// How many received bytes its streams hold.
    unread: usize,
    /// Ids of streams without a handle that this side has closed, the last first: the peer may still send on them.
    half_closed: VecDeque<u32>,
    /// Streams that the peer opened and that are not accepted yet.
    pub accepted: VecDeque<Key>,
    /// The stream and the flags of the frame being received.
    incoming: (u32, Flags),
    /// The ping to answer.
    ping: Option<u32>,
    round_trip: RoundTrip,
    /// The remaining growth of windows, in bytes.
    growth: usize,
    /// Streams with control frames to send.
    control: VecDeque<Key>,
    /// Streams with data to send: deficit round robin with a list of new flows, as in fq_codel (RFC 8290, 4.2). A
    /// stream that had nothing to send goes first, for one quantum.
    new_flows: VecDeque<Key>,
    old_flows: VecDeque<Key>,
    /// What the frames taken last are charged.
    in_flight: usize,
    /// No more streams are opened; go-away is sent after everything else.
    is_over: bool,
    go_away: Option<Reason>,
    /// The connection's task.
    task: Option<Waker>,
    effects: Effects,
}

impl Session {
    /// A session without streams. The dialer opens streams with odd ids, the listener with even ones ("StreamID Field").
    pub fn new(role: Endpoint, budget: Arc<ConnectionBudget>, admission: StreamAdmission) -> Self {
        Self {
            growth: budget.growth(),
            budget,
            admission,
            streams: Streams::new(),
            last_serial: 0,
            next_id: if role.is_dialer() { 1 } else { 2 },
            inbound: 0,
            outbound: 0,
            unacknowledged: 0,
            is_unused: role.is_listener(),
            refused: 0,
            unread: 0,
            half_closed: VecDeque::new(),
            accepted: VecDeque::new(),
            incoming: (0, 0),
            ping: None,
            round_trip: RoundTrip::default(),
            control: VecDeque::new(),
            new_flows: VecDeque::new(),
            old_flows: VecDeque::new(),
            in_flight: 0,
            is_over: false,
            go_away: None,
            task: None,
            effects: Effects::default(),
        }
    }

    /// Sets the connection's task, which is woken when there is something to send, a stream to accept, or one less of ours.
    pub fn set_task(&mut self, cx: &Context<'_>) {
        self.effects.register(&mut self.task, cx);
    }

    // ---- Opening and accepting streams

    /// Opens a stream, as soon as the limits allow another one.
    ///
    /// # Errors
    ///
    /// If the session is over, or has used up its ids.
    pub fn poll_open(&mut self, cx: &Context<'_>, now: Instant) -> Poll<io::Result<Key>> {
        let next_id = self.next_id.checked_add(2).filter(|_| !self.is_over);
        let next_id = next_id.ok_or(io::ErrorKind::NotConnected)?;
        let is_full = self.outbound >= self.admission.budget.outbound;
        if is_full || self.unacknowledged >= MAX_UNACKNOWLEDGED {
            self.set_task(cx);
            return Poll::Pending;
        }
        let id = mem::replace(&mut self.next_id, next_id);
        self.outbound += 1;
        self.unacknowledged += 1;
        Poll::Ready(Ok(self.insert(id, Origin::Relay, now)))
    }

    /// Accepts a stream that the peer opened. It is acknowledged by its next frame.
    pub fn poll_accept(&mut self, cx: &Context<'_>) -> Poll<Key> {
        while let Some(key) = self.accepted.pop_front() {
            if self.streams.get(&key).is_some_and(|stream| stream.received & RST == 0) {
                self.update(key, |stream| stream.pending |= ACK);
                return Poll::Ready(key);
            }
            self.change(key, Stream::drop_handle);
        }
        self.set_task(cx);
        Poll::Pending
    }

    fn insert(&mut self, id: u32, origin: Origin, now: Instant) -> Key {
        self.last_serial += 1;
        let (key, stream) = ((id, self.last_serial), Box::new(Stream::new(origin, now)));
        self.budget.replace_charge(0, stream.charge());
        self.streams.insert(key, stream);
        key
    }

    // ---- Operations on a handle

    /// Reads from or writes to a stream; the task of `cx` waits until that is possible. A stream that ends with its
    /// connection fails otherwise than one that is reset: [`CircuitEnd`](crate::CircuitEnd) tells these apart.
    pub fn poll_stream(
        &mut self,
        key: Key,
        cx: &Context<'_>,
        waker: fn(&mut Stream) -> &mut Option<Waker>,
        act: impl FnOnce(&mut Stream) -> Poll<io::Result<usize>>,
    ) -> Poll<io::Result<usize>> {
        use io::ErrorKind::{ConnectionAborted, ConnectionReset};
        let result = self.update(key, act).unwrap_or(Poll::Ready(Err(ConnectionReset.into())));
        if result.is_pending()
            && let Some(stream) = self.streams.get_mut(&key)
        {
            self.effects.register(waker(stream), cx);
        }
        result.map_err(|error| match error.kind() {
            ConnectionReset if self.is_over => ConnectionAborted.into(),
            _ => error,
        })
    }

    /// Changes the state of a stream: [`Stream::close`], [`Stream::drop_handle`], [`Stream::reset`] or another end.
    /// Wakes its reader and its writer.
    pub fn change(&mut self, key: Key, change: impl FnOnce(&mut Stream)) {
        let wakers = self.update(key, |stream| {
            change(stream);
            [stream.reader.take(), stream.writer.take()]
        });
        self.effects.wakers.extend(wakers.into_iter().flatten().flatten());
    }

    /// Resets the stream with the greatest weight. Returns how many bytes that freed.
    pub fn shed(&mut self, now: Instant, cut: Cut) -> usize {
        let weights = self.streams.iter().map(|(key, stream)| (stream.weight(now, cut), *key));
        let (weight, key) = weights.max().unwrap_or_default();
        if weight == 0 {
            return 0;
        }
        let before = self.budget.held();
        self.change(key, Stream::reset);
        self.budget.count(cut);
        before.saturating_sub(self.budget.held())
    }

    /// Returns how many bytes the peer may still send.
    pub fn credit(&self) -> usize {
        self.streams.values().map(|stream| stream.credit()).sum()
    }

    // ---- Bookkeeping

    /// Changes a stream, and then what depends on its state: counts its memory, queues it for what it has to send, and
    /// removes it when it is no longer needed.
    pub fn update<T>(&mut self, key: Key, change: impl FnOnce(&mut Stream) -> T) -> Option<T> {
        let stream = self.streams.get_mut(&key)?;
        let (charge, unread) = (stream.charge(), stream.unread);
        let result = change(stream);
        self.budget.replace_charge(charge, stream.charge());
        self.unread = self.unread - unread + stream.unread;
        if stream.has_control(self.round_trip.measured, &self.budget)
            && !mem::replace(&mut stream.in_control, true)
        {
            self.control.push_back(key);
            self.effects.wakers.extend(self.task.take());
        }
        if stream.has_data() && !mem::replace(&mut stream.in_turns, true) {
            stream.deficit = QUANTUM as i64;
            self.new_flows.push_back(key);
            self.effects.wakers.extend(self.task.take());
        }
        if stream.is_gone() {
            if !stream.is_finished() {
                self.half_closed.push_front(key.0);
                self.half_closed.truncate(MAX_REFUSED);
            }
            self.remove(key);
        }
        Some(result)
    }

    fn remove(&mut self, key: Key) {
        let Some(stream) = self.streams.remove(&key) else { return };
        // While the peer does not read, nothing else takes the keys of removed streams out of the queues.
        for queue in [&mut self.control, &mut self.new_flows, &mut self.old_flows] {
            if queue.len() > 2 * (self.streams.len() + 1) {
                queue.retain(|key| self.streams.contains_key(key));
            }
        }
        self.budget.replace_charge(stream.charge(), 0);
        self.unread -= stream.unread;
        self.growth += stream.growth();
        self.unacknowledged -= usize::from(stream.is_unacknowledged());
        match stream.origin {
            Origin::Relay => {
                self.outbound -= 1;
                self.effects.wakers.extend(self.task.take());
            }
            Origin::Peer(_) => self.inbound -= 1,
            Origin::Refused => self.refused -= 1,
        }
    }

    // ---- The end

    /// Sends all unsent data and then go-away, as the task of `cx` takes the frames; no more streams are opened.
    pub fn leave(&mut self, cx: &Context<'_>) {
        self.set_task(cx);
        if !mem::replace(&mut self.is_over, true) {
            self.go_away = Some(Reason::Normal);
        }
    }

    /// Ends the session: each stream ends after the data received so far. Sends nothing but the go-away, if this
    /// side ends it. Returns whether the peer has dialed the connection and opened no stream.
    pub fn end(&mut self) -> bool {
        self.is_over = true;
        self.ping = None;
        self.accepted.clear();
        for key in self.streams.keys().copied().collect::<Vec<_>>() {
            self.change(key, Stream::end);
        }
        self.effects.wakers.extend(self.task.take());
        self.is_unused
    }

    /// Frees all memory after the connection closed.
    pub fn close_all(&mut self) {
        self.end();
        while let Some((key, _)) = self.streams.first_key_value() {
            self.remove(*key);
        }
        self.budget.replace_charge(mem::take(&mut self.in_flight), 0);
    }
}

/// A session and its lock. No thread holds the locks of two sessions, or wakes a task under one.
#[derive(Debug)]
pub struct Shared {
    session: Mutex<Session>,
    /// The account that it is charged to.
    pub budget: Arc<ConnectionBudget>,
}

impl Shared {
    /// A session with these limits on its streams and on its memory.
    pub fn new(role: Endpoint, admission: StreamAdmission, memory: &MemoryBudget) -> Arc<Self> {
        Arc::new_cyclic(|shared: &Weak<Self>| {
            let budget = memory.open(admission.prefix, shared.clone());
            let session = Mutex::new(Session::new(role, Arc::clone(&budget), admission));
            Self { session, budget }
        })
    }

    /// Calls `act` under the lock, and applies its effects after releasing the lock.
    pub fn with<T>(&self, act: impl FnOnce(&mut Session) -> T) -> T {
        let mut session = self.session.lock().unwrap_or_else(PoisonError::into_inner);
        let result = act(&mut session);
        let effects = mem::take(&mut session.effects);
        drop(session);
        effects.apply(&self.budget.pool);
        result
    }

    /// Whether its lock is held.
    #[cfg(test)]
    pub fn is_locked(&self) -> bool {
        self.session.try_lock().is_err()
    }
}

impl Connection for Shared {
    fn budget(&self) -> &ConnectionBudget {
        &self.budget
    }

    fn shed(&self, now: Instant) -> usize {
        self.with(|session| session.shed(now, Cut::Pool))
    }

    fn reset(&self, stream: Key) {
        self.with(|session| session.change(stream, Stream::reset));
    }

    fn credit(&self) -> usize {
        self.with(|session| session.credit())
    }
}

/// Round-trip times, measured by our pings ("Ping"), one at a time.
#[derive(Debug, Default)]
struct RoundTrip {
    /// The last measured one.
    measured: Option<Duration>,
    /// Bytes of data received since the last ping, and the time of that ping.
    received: usize,
    asked_at: Option<Instant>,
    /// The id of the last ping, and whether its answer is missing.
    number: u32,
    is_asked: bool,
}

impl RoundTrip {
    /// Returns the id of the ping to send if one is due.
    fn ask(&mut self, now: Instant) -> Option<u32> {
        let is_recent = self.asked_at.is_some_and(|at| now < at + PING_INTERVAL);
        if self.is_asked || self.received < PING_AFTER || is_recent {
            return None;
        }
        (self.received, self.asked_at, self.is_asked) = (0, Some(now), true);
        self.number = self.number.wrapping_add(1);
        Some(self.number)
    }

    /// Handles an answer. Returns false if no ping with this id was sent.
    fn on_answer(&mut self, number: u32, now: Instant) -> bool {
        self.measured = self.asked_at.map(|at| now.saturating_duration_since(at));
        mem::take(&mut self.is_asked) && self.number == number
    }
}

#[cfg(test)]
mod tests;
