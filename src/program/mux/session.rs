//! A session of yamux: frames in, frames out, and the streams in between.
//!
//! Sans-IO: the bytes of the connection and `now` come in, frames to send come out; [`Effects`] is what is to be
//! done once the session's lock is released. The sections named here are those of
//! [the specification](https://github.com/hashicorp/yamux/blob/master/spec.md).

use std::{
    collections::{BTreeMap, VecDeque},
    io,
    sync::Arc,
    task::{Context, Poll, Waker},
    time::{Duration, Instant},
};

use super::{
    budget::ConnectionBudget,
    frame::{Flags, HEADER, Header, INITIAL_WINDOW, Kind, MAX_WINDOW, Reason},
    places::Place,
    stream::{Chunk, Inbound, Outbound, QUANTUM, Stream, Turn},
};

/// How many refusals may wait to be sent, and how many streams are remembered that ended on our side alone.
const MAX_REFUSED: usize = 256;

/// How many of our streams may wait to be acknowledged: go-libp2p refuses more ("ACK backlog").
const MAX_UNACKNOWLEDGED: usize = 256;

/// The windows of one connection grow by so much in all, in bytes.
const MAX_GROWTH: usize = MAX_WINDOW - INITIAL_WINDOW;

/// After so many received bytes the round trip is measured, unless that was done a short time ago.
const PING_AFTER: usize = 64 * 1024;
const PING_INTERVAL: Duration = Duration::from_secs(10);

/// How many bytes of control frames are sent at once.
const MAX_CONTROL: usize = 64 * HEADER;

/// Which side of the connection this is. It decides whose stream numbers are odd ("StreamID Field").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Its numbers are odd.
    Client,
    /// Its numbers are even.
    Server,
}

/// Why a session ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// The peer ends it.
    Left,
    /// This side ends it, with this go-away.
    Broken(Reason, &'static str),
}

/// Where the next bytes of the connection belong.
#[derive(Debug, Default)]
pub struct Room {
    header: [u8; HEADER],
    /// How much of the header is there.
    read: usize,
    /// How much of the body is missing; 0: a header comes next.
    body: usize,
    chunk: Chunk,
}

impl Room {
    /// Where to read to.
    pub fn buffer(&mut self) -> &mut [u8] {
        match self.body {
            0 => self.header.get_mut(self.read..).unwrap_or_default(),
            body => self.chunk.room(body),
        }
    }

    /// Whether memory is to be lent before there is such a place.
    pub fn needs_chunk(&self) -> bool {
        self.body > 0 && self.chunk.capacity() == 0
    }

    /// Whether memory is lent to it.
    pub fn has_chunk(&self) -> bool {
        self.chunk.capacity() > 0
    }
}

/// What was received.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Received {
    /// A header.
    pub is_frame: bool,
    /// Of a frame that costs the relay more than the peer: it opens a stream, resets one, or pings.
    pub is_dear: bool,
    /// A stream was opened; [`Session::admit`] has to be called before anything else.
    pub opened: Option<u64>,
}

/// Frames to send.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Frames {
    /// Data of one stream.
    Data,
    /// Frames about streams and the session.
    Control,
    /// Resets.
    Resets,
}

/// What is to be done when the session's lock is released.
#[derive(Debug, Default)]
pub struct Effects {
    wakers: Vec<Waker>,
    places: Vec<Place>,
}

impl Effects {
    /// Wakes tasks, frees places.
    pub fn apply(self) {
        drop(self.places);
        self.wakers.into_iter().for_each(Waker::wake);
    }
}

/// The frame whose body is received.
#[derive(Clone, Copy, Debug)]
struct Incoming {
    stream: Option<u64>,
    flags: Flags,
}

/// Round trips, as measured by our pings ("Ping"): one at a time.
#[derive(Debug, Default)]
struct RoundTrip {
    measured: Option<Duration>,
    last: Option<Instant>,
    /// The ping that is to be answered.
    asked: Option<u32>,
    next: u32,
    is_due: bool,
    received: usize,
}

/// How far a session has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Open,
    /// What is unsent goes out, then go-away.
    Closing,
    /// Only this go-away goes out.
    Broken(Reason),
    /// Nothing goes out.
    Over,
}

/// One session.
#[derive(Debug)]
pub struct Session {
    role: Role,
    phase: Phase,
    budget: Arc<ConnectionBudget>,
    /// By a serial number of ours, for a number on the wire may return.
    streams: BTreeMap<u64, Box<Stream>>,
    last_serial: u64,
    /// By their numbers on the wire, as long as those are in use.
    ids: BTreeMap<u32, u64>,
    next_id: u32,
    unacknowledged: usize,
    /// Streams that the peer opened and nobody has taken yet.
    accepted: VecDeque<u64>,
    incoming: Option<Incoming>,
    /// The ping to be answered.
    ping: Option<u32>,
    round_trip: RoundTrip,
    /// By how much windows may still grow.
    growth: usize,
    /// Streams with control frames to send, and those with data: new flows, and old ones.
    control: VecDeque<u64>,
    new: VecDeque<u64>,
    old: VecDeque<u64>,
    /// Streams to be reset that are not known any more.
    refused: VecDeque<u32>,
    /// Streams that this side has closed, and nobody holds: their peers may still send.
    half_closed: VecDeque<u32>,
    /// What the frame is charged that was taken last.
    in_flight: usize,
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
            phase: Phase::Open,
            budget,
            streams: BTreeMap::new(),
            last_serial: 0,
            ids: BTreeMap::new(),
            next_id: if role == Role::Client { 1 } else { 2 },
            unacknowledged: 0,
            accepted: VecDeque::new(),
            incoming: None,
            ping: None,
            round_trip: RoundTrip::default(),
            growth: MAX_GROWTH,
            control: VecDeque::new(),
            new: VecDeque::new(),
            old: VecDeque::new(),
            refused: VecDeque::new(),
            half_closed: VecDeque::new(),
            in_flight: 0,
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
        register(&mut self.driver, cx, &mut self.effects);
    }

    // ---- Receiving

    /// So many bytes were put into the room, which is made ready for the next ones.
    ///
    /// # Errors
    ///
    /// When the session ends.
    pub fn receive(&mut self, room: &mut Room, bytes: usize, now: Instant) -> Result<Received, End> {
        let mut received = Received::default();
        if room.body == 0 {
            room.read += bytes;
            if room.read < HEADER {
                return Ok(received);
            }
            room.read = 0;
            let header = Header::parse(room.header).ok_or_else(|| broken("unknown version or type"))?;
            received = self.on_header(header, now)?;
            room.body = if header.kind == Kind::Data { header.length as usize } else { 0 };
        } else {
            room.body -= bytes;
            room.chunk.advance(bytes);
            self.on_body(&mut room.chunk, bytes, now);
        }
        if room.body == 0 {
            self.reclaim(room);
            self.on_frame_end();
        }
        Ok(received)
    }

    /// Lends memory for the body that comes.
    pub fn lend(&mut self, room: &mut Room) {
        room.chunk = Chunk::for_body(room.body);
        self.budget.charge(room.chunk.capacity());
    }

    /// Takes back what was lent.
    pub fn reclaim(&mut self, room: &mut Room) {
        self.budget.release(std::mem::take(&mut room.chunk).capacity());
    }

    /// "Framing": SYN comes first, then ACK, then what the type says, then FIN and RST.
    fn on_header(&mut self, header: Header, now: Instant) -> Result<Received, End> {
        let Header { kind, flags, stream: id, length } = header;
        let is_dear = kind == Kind::Ping || flags.has(Flags::SYN | Flags::RST);
        let mut received = Received { is_frame: true, is_dear, opened: None };
        match kind {
            Kind::Ping if flags.has(Flags::ACK) => self.round_trip.on_answer(length, now)?,
            // Of several the last is answered: an answer that comes late is as good as none.
            Kind::Ping => self.ping = Some(length),
            Kind::GoAway => return Err(End::Left),
            Kind::Data | Kind::WindowUpdate => {
                if kind == Kind::Data && length as usize > MAX_WINDOW {
                    return Err(broken("a frame is longer than any window"));
                }
                if flags.has(Flags::SYN) {
                    received.opened = self.on_syn(id, flags, now)?;
                }
                let stream = self.ids.get(&id).copied();
                match stream {
                    Some(serial) => self.on_known(serial, header, now)?,
                    None => self.on_unknown(header)?,
                }
                self.incoming = Some(Incoming { stream, flags });
            }
        }
        Ok(received)
    }

    /// "StreamID Field": each side has numbers of its own. They need not rise: go-libp2p sends them as its
    /// streams come to write.
    fn on_syn(&mut self, id: u32, flags: Flags, now: Instant) -> Result<Option<u64>, End> {
        let is_theirs = id != 0 && (id % 2 == 1) == (self.role == Role::Server);
        if !is_theirs || self.ids.contains_key(&id) || self.half_closed.contains(&id) {
            return Err(broken("a stream number that is not the peer's, or in use"));
        }
        if flags.has(Flags::RST) {
            return Ok(None); // it is gone already
        }
        Ok(Some(self.insert(Stream::new(id, Flags::NONE, now))))
    }

    fn on_known(&mut self, serial: u64, header: Header, now: Instant) -> Result<(), End> {
        let Some(stream) = self.streams.get_mut(&serial) else {
            return Ok(());
        };
        if header.flags.has(Flags::ACK) && std::mem::take(&mut stream.is_unacknowledged) {
            self.unacknowledged -= 1;
            self.effects.wakers.extend(self.opener.take());
        }
        if header.kind == Kind::WindowUpdate {
            if !stream.add_send_window(header.length) {
                return Err(broken("a window overflows"));
            }
            self.effects.wakers.extend(stream.writer.take());
            return Ok(());
        }
        if !stream.consume_credit(header.length as usize) {
            return Err(broken("more data than the window allows"));
        }
        if header.length > 0 {
            stream.is_stray = !stream.has_handle;
            if stream.inbound == Inbound::Finished {
                self.reset(serial);
            }
            self.round_trip.on_data(header.length as usize, now);
        }
        Ok(())
    }

    /// Data for a stream that is gone is passed over. It is reset if all that its peer knows is that we say no
    /// more on it.
    fn on_unknown(&mut self, header: Header) -> Result<(), End> {
        let ends = header.flags.has(Flags::FIN | Flags::RST);
        let is_data = header.kind == Kind::Data && header.length > 0;
        if !ends && !is_data {
            return Ok(());
        }
        let Some(at) = self.half_closed.iter().position(|id| *id == header.stream) else {
            return Ok(());
        };
        self.half_closed.remove(at);
        if is_data && !ends { self.refuse(header.stream) } else { Ok(()) }
    }

    fn on_body(&mut self, chunk: &mut Chunk, bytes: usize, now: Instant) {
        let serial = self.incoming.and_then(|incoming| incoming.stream);
        let stream = serial.and_then(|serial| self.streams.get_mut(&serial));
        match stream.filter(|stream| stream.is_read() && stream.inbound == Inbound::Open) {
            Some(stream) if bytes > 0 => {
                stream.store(chunk, now, &self.budget);
                self.effects.wakers.extend(stream.reader.take());
            }
            _ => chunk.clear(),
        }
        while self.budget.is_exceeded() && self.shed(now) > 0 {}
    }

    fn on_frame_end(&mut self) {
        let Some(Incoming { stream: Some(serial), flags }) = self.incoming.take() else {
            return;
        };
        if flags.has(Flags::RST) {
            self.on_reset(serial);
        } else if flags.has(Flags::FIN)
            && let Some(stream) = self.streams.get_mut(&serial)
        {
            if stream.inbound == Inbound::Open {
                stream.inbound = Inbound::Finished;
            }
            self.effects.wakers.extend(stream.reader.take());
            self.tidy(serial);
        }
    }

    /// What was received before is still read.
    fn on_reset(&mut self, serial: u64) {
        let Some(stream) = self.streams.get_mut(&serial) else {
            return;
        };
        (stream.inbound, stream.outbound) = (Inbound::Reset, Outbound::Reset);
        stream.discard_unsent(&self.budget);
        self.effects.wakers.extend(stream.reader.take());
        self.effects.wakers.extend(stream.writer.take());
        self.tidy(serial);
    }

    /// The stream that was opened just now gets this place, or is refused.
    ///
    /// # Errors
    ///
    /// When the peer takes no refusals.
    pub fn admit(&mut self, serial: u64, place: Option<Place>) -> Result<(), End> {
        if let Some(place) = place {
            if let Some(stream) = self.streams.get_mut(&serial) {
                stream.place = Some(place);
                self.accepted.push_back(serial);
                self.effects.wakers.extend(self.acceptor.take());
            }
            return Ok(());
        }
        match self.remove(serial) {
            Some(stream) => self.refuse(stream.id),
            None => Ok(()),
        }
    }

    fn refuse(&mut self, id: u32) -> Result<(), End> {
        if self.refused.len() >= MAX_REFUSED {
            self.budget.count_closed();
            return Err(End::Broken(Reason::InternalError, "the peer takes no refusals"));
        }
        self.refused.push_back(id);
        Ok(())
    }

    // ---- Streams

    /// Opens a stream, which takes this place; its serial number.
    ///
    /// # Errors
    ///
    /// When the session is over, or has used up its numbers.
    pub fn open(&mut self, place: Place, now: Instant) -> io::Result<u64> {
        if self.phase != Phase::Open {
            self.effects.places.push(place);
            return Err(io::ErrorKind::NotConnected.into());
        }
        let id = self.next_id;
        self.next_id = id.checked_add(2).ok_or(io::ErrorKind::AddrNotAvailable)?;
        self.unacknowledged += 1;
        let serial = self.insert(Stream::new(id, Flags::SYN, now));
        if let Some(stream) = self.streams.get_mut(&serial) {
            stream.place = Some(place);
        }
        Ok(serial)
    }

    /// Ready when another stream may be opened.
    pub fn poll_open(&mut self, cx: &Context<'_>) -> Poll<()> {
        if self.unacknowledged < MAX_UNACKNOWLEDGED {
            return Poll::Ready(());
        }
        register(&mut self.opener, cx, &mut self.effects);
        Poll::Pending
    }

    /// A stream that the peer opened. It is acknowledged with what is sent next.
    pub fn poll_accept(&mut self, cx: &Context<'_>) -> Poll<u64> {
        while let Some(serial) = self.accepted.pop_front() {
            match self.streams.get_mut(&serial) {
                Some(stream) if stream.inbound != Inbound::Reset => {
                    stream.opening = Flags::ACK;
                    self.send_control(serial);
                    return Poll::Ready(serial);
                }
                _ => self.drop_handle(serial),
            }
        }
        register(&mut self.acceptor, cx, &mut self.effects);
        Poll::Pending
    }

    /// Reads from a stream.
    pub fn poll_read(
        &mut self,
        serial: u64,
        cx: &Context<'_>,
        into: &mut [u8],
        now: Instant,
    ) -> Poll<io::Result<usize>> {
        let stream = self.streams.get_mut(&serial).ok_or(io::ErrorKind::ConnectionReset)?;
        let read = stream.read(into, now, &self.budget);
        if !stream.in_control && stream.is_grant_due(&self.budget) {
            stream.in_control = true;
            self.control.push_back(serial);
            self.effects.wakers.extend(self.driver.take());
        }
        match stream.inbound {
            _ if read > 0 || into.is_empty() => Poll::Ready(Ok(read)),
            Inbound::Finished => Poll::Ready(Ok(0)),
            Inbound::Reset => Poll::Ready(Err(io::ErrorKind::ConnectionReset.into())),
            Inbound::Open => {
                register(&mut stream.reader, cx, &mut self.effects);
                Poll::Pending
            }
        }
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
        if bytes.is_empty() {
            return Poll::Ready(Ok(0));
        }
        if stream.room() == 0 {
            register(&mut stream.writer, cx, &mut self.effects);
            return Poll::Pending;
        }
        let written = stream.write(bytes, now, &self.budget);
        self.send_data(serial);
        self.wake_driver();
        Poll::Ready(Ok(written))
    }

    /// What was written to the stream will be sent.
    pub fn flush(&mut self, serial: u64) {
        if let Some(stream) = self.streams.get_mut(&serial) {
            stream.flush();
        }
    }

    /// Nothing more will be written to the stream: FIN goes with the last of it.
    pub fn close(&mut self, serial: u64) {
        if let Some(stream) = self.streams.get_mut(&serial)
            && stream.outbound == Outbound::Open
        {
            stream.outbound = Outbound::Finishing;
            self.send_data(serial);
            self.wake_driver();
        }
    }

    /// Nobody holds the stream any more. It is reset, unless this side closed it.
    pub fn drop_handle(&mut self, serial: u64) {
        let Some(stream) = self.streams.get_mut(&serial) else {
            return;
        };
        stream.has_handle = false;
        stream.discard_unread(&self.budget);
        self.effects.wakers.extend(stream.reader.take());
        self.effects.wakers.extend(stream.writer.take());
        if stream.outbound == Outbound::Open {
            stream.discard_unflushed(&self.budget);
            self.set_resetting(serial);
        }
        self.tidy(serial);
    }

    /// Resets a stream: frees its bytes at once, and tells the peer.
    pub fn reset(&mut self, serial: u64) {
        let Some(stream) = self.streams.get_mut(&serial) else {
            return;
        };
        stream.discard_unread(&self.budget);
        stream.discard_unsent(&self.budget);
        self.effects.wakers.extend(stream.reader.take());
        self.effects.wakers.extend(stream.writer.take());
        stream.inbound = Inbound::Reset;
        if stream.outbound != Outbound::Reset {
            self.set_resetting(serial);
        }
        self.tidy(serial);
    }

    /// Resets the stream with the most bytes that have waited for the longest; how many bytes that freed.
    pub fn shed(&mut self, now: Instant) -> usize {
        let weigh = |(serial, stream): (&u64, &Box<Stream>)| (stream.weight(now), *serial);
        let (weight, serial) = self.streams.iter().map(weigh).max().unwrap_or_default();
        if weight == 0 {
            return 0;
        }
        let before = self.budget.held();
        self.reset(serial);
        self.budget.count_cut();
        before.saturating_sub(self.budget.held())
    }

    /// The place of a stream.
    pub fn place(&self, serial: u64) -> Option<&Place> {
        self.streams.get(&serial)?.place.as_ref()
    }

    fn insert(&mut self, stream: Stream) -> u64 {
        self.last_serial += 1;
        let serial = self.last_serial;
        self.budget.charge(size_of::<Stream>());
        self.ids.insert(stream.id, serial);
        self.streams.insert(serial, Box::new(stream));
        serial
    }

    fn remove(&mut self, serial: u64) -> Option<Box<Stream>> {
        let mut stream = self.streams.remove(&serial)?;
        self.free_id(&stream, serial);
        stream.discard_unread(&self.budget);
        stream.discard_unsent(&self.budget);
        self.budget.release(size_of::<Stream>());
        self.growth += stream.growth();
        if std::mem::take(&mut stream.is_unacknowledged) {
            self.unacknowledged -= 1;
            self.effects.wakers.extend(self.opener.take());
        }
        self.effects.places.extend(stream.place.take());
        Some(stream)
    }

    fn free_id(&mut self, stream: &Stream, serial: u64) {
        if self.ids.get(&stream.id) == Some(&serial) {
            self.ids.remove(&stream.id);
        }
    }

    /// RST follows what is to be sent; a stream that the peer has not heard of needs none.
    fn set_resetting(&mut self, serial: u64) {
        let Some(stream) = self.streams.get_mut(&serial) else {
            return;
        };
        if stream.opening == Flags::SYN && stream.unsent() == 0 {
            stream.outbound = Outbound::Reset;
            return;
        }
        stream.outbound = Outbound::Resetting;
        if stream.unsent() == 0 {
            self.send_control(serial);
        }
        self.wake_driver();
    }

    /// Forgets of a stream what is not needed any more.
    fn tidy(&mut self, serial: u64) {
        let Some(stream) = self.streams.get(&serial) else {
            return;
        };
        let (is_finished, id, is_stray) = (stream.is_finished(), stream.id, stream.is_stray);
        if stream.is_gone() {
            self.remove(serial);
            if !is_finished && !is_stray {
                if self.half_closed.len() >= MAX_REFUSED {
                    self.half_closed.pop_front();
                }
                self.half_closed.push_back(id);
            } else if !is_finished {
                let _ = self.refuse(id); // or it is not told
            }
        } else if is_finished && self.ids.get(&id) == Some(&serial) {
            self.ids.remove(&id);
        }
    }

    // ---- Sending

    fn wake_driver(&mut self) {
        self.effects.wakers.extend(self.driver.take());
    }

    fn send_control(&mut self, serial: u64) {
        if let Some(stream) = self.streams.get_mut(&serial)
            && !std::mem::replace(&mut stream.in_control, true)
        {
            self.control.push_back(serial);
        }
    }

    fn send_data(&mut self, serial: u64) {
        if let Some(stream) = self.streams.get_mut(&serial)
            && stream.turn == Turn::Idle
        {
            (stream.turn, stream.deficit) = (Turn::New, QUANTUM as i64);
            self.new.push_back(serial);
        }
    }

    /// Takes the next frames to send, of about `most` bytes of data at most: what they are, unless there are
    /// none.
    pub fn take_frames(&mut self, into: &mut Vec<u8>, most: usize, now: Instant) -> Option<Frames> {
        self.budget.release(std::mem::take(&mut self.in_flight));
        into.clear();
        if let Phase::Broken(reason) = self.phase {
            self.phase = Phase::Over;
            return Some(go_away(into, reason));
        }
        if self.phase == Phase::Over {
            return None;
        }
        if let Some(frames) = self.take_control(into, now) {
            return Some(frames);
        }
        if self.take_data(into, most, now) {
            return Some(Frames::Data);
        }
        if self.phase == Phase::Closing {
            self.phase = Phase::Over;
            return Some(go_away(into, Reason::Normal));
        }
        None
    }

    /// Control frames: they are state, and not a queue, so that each is sent once however long it waits.
    fn take_control(&mut self, into: &mut Vec<u8>, now: Instant) -> Option<Frames> {
        let session = |kind, flags, length| Header { kind, flags, stream: 0, length }.encode();
        if let Some(id) = self.ping.take() {
            into.extend(session(Kind::Ping, Flags::ACK, id));
        }
        if let Some(id) = self.round_trip.ask(now) {
            into.extend(session(Kind::Ping, Flags::SYN, id));
        }
        let mut resets = false;
        while into.len() < MAX_CONTROL
            && let Some(serial) = self.control.front().copied()
        {
            let Some(stream) = self.streams.get_mut(&serial) else {
                self.control.pop_front();
                continue;
            };
            let is_reset = stream.outbound == Outbound::Resetting && stream.unsent() == 0;
            if is_reset != resets && !into.is_empty() {
                break; // resets go by themselves
            }
            stream.in_control = false;
            self.control.pop_front();
            if is_reset {
                resets = true;
                stream.outbound = Outbound::Reset;
                let opening = std::mem::take(&mut stream.opening);
                into.extend(stream.header(Kind::Data, opening | Flags::RST, 0).encode());
                self.tidy(serial);
                continue;
            }
            let rtt = self.round_trip.measured;
            let (credit, wider) = stream.grant(rtt, self.growth, now, &self.budget);
            self.growth -= wider;
            if credit > 0 || stream.opening == Flags::ACK {
                let opening = std::mem::take(&mut stream.opening);
                into.extend(stream.header(Kind::WindowUpdate, opening, credit as u32).encode());
            }
        }
        while (resets || into.is_empty()) && into.len() < MAX_CONTROL
            && let Some(stream) = self.refused.pop_front()
        {
            resets = true;
            let header = Header { kind: Kind::Data, flags: Flags::RST, stream, length: 0 };
            into.extend(header.encode());
        }
        match (into.is_empty(), resets) {
            (true, _) => None,
            (_, true) => Some(Frames::Resets),
            (_, false) => Some(Frames::Control),
        }
    }

    /// A frame of the stream whose turn it is: deficit round robin with a list of new flows, as in fq_codel
    /// (RFC 8290, 4.2). A stream that had nothing to send goes first, for one quantum.
    fn take_data(&mut self, into: &mut Vec<u8>, most: usize, now: Instant) -> bool {
        loop {
            let is_new = !self.new.is_empty();
            let list = if is_new { &mut self.new } else { &mut self.old };
            let Some(serial) = list.front().copied() else {
                return false;
            };
            let Some(stream) = self.streams.get_mut(&serial) else {
                list.pop_front();
                continue;
            };
            let is_spent = stream.deficit <= 0;
            if is_spent || !stream.has_data() {
                list.pop_front();
                // One that comes and goes is not new each time.
                if is_spent || (is_new && !self.old.is_empty()) {
                    stream.deficit += if is_spent { QUANTUM as i64 } else { 0 };
                    stream.turn = Turn::Old;
                    self.old.push_back(serial);
                } else {
                    stream.turn = Turn::Idle;
                }
                continue;
            }
            let (body, charge) = stream.take_frame(into, most, now, &self.budget);
            self.in_flight = charge;
            stream.deficit -= (HEADER + body) as i64;
            self.effects.wakers.extend(stream.writer.take());
            if stream.outbound == Outbound::Resetting && stream.unsent() == 0 {
                self.send_control(serial);
            }
            self.tidy(serial);
            return true;
        }
    }

    // ---- The end

    /// Sends what is unsent, and go-away; no stream is opened any more.
    pub fn leave(&mut self) {
        if self.phase == Phase::Open {
            self.phase = Phase::Closing;
        }
    }

    /// The session is over: streams end where they are, with what was received. Nothing is sent but the
    /// go-away, if this side ends it.
    pub fn end(&mut self, end: End) {
        self.phase = match end {
            End::Left => Phase::Over,
            End::Broken(reason, _) => Phase::Broken(reason),
        };
        self.accepted.clear();
        let serials: Vec<_> = self.streams.keys().copied().collect();
        for serial in serials {
            if let Some(stream) = self.streams.get_mut(&serial)
                && stream.inbound == Inbound::Open
            {
                stream.inbound = Inbound::Reset;
            }
            self.on_end(serial);
        }
        self.effects.wakers.extend(self.opener.take());
        self.effects.wakers.extend(self.acceptor.take());
    }

    /// The connection is gone: all memory is freed.
    pub fn close_all(&mut self) {
        self.end(End::Left);
        let serials: Vec<_> = self.streams.keys().copied().collect();
        serials.into_iter().for_each(|serial| _ = self.remove(serial));
        self.budget.release(std::mem::take(&mut self.in_flight));
    }

    fn on_end(&mut self, serial: u64) {
        let Some(stream) = self.streams.get_mut(&serial) else {
            return;
        };
        stream.outbound = Outbound::Reset;
        stream.discard_unsent(&self.budget);
        self.effects.wakers.extend(stream.reader.take());
        self.effects.wakers.extend(stream.writer.take());
        self.tidy(serial);
    }
}

impl RoundTrip {
    /// So many bytes were received.
    fn on_data(&mut self, bytes: usize, now: Instant) {
        self.received = self.received.saturating_add(bytes);
        let is_old = self.last.is_none_or(|last| now.saturating_duration_since(last) >= PING_INTERVAL);
        self.is_due |= self.received >= PING_AFTER && self.asked.is_none() && is_old;
    }

    /// The ping to send, if one is due.
    fn ask(&mut self, now: Instant) -> Option<u32> {
        if !std::mem::take(&mut self.is_due) || self.asked.is_some() {
            return None;
        }
        (self.received, self.last, self.asked) = (0, Some(now), Some(self.next));
        self.next = self.next.wrapping_add(1);
        self.asked
    }

    fn on_answer(&mut self, id: u32, now: Instant) -> Result<(), End> {
        if self.asked.take_if(|asked| *asked == id).is_none() {
            return Err(broken("an answer to no ping"));
        }
        self.measured = self.last.map(|asked| now.saturating_duration_since(asked));
        Ok(())
    }
}

/// Has this task woken in place of the one before it.
fn register(waker: &mut Option<Waker>, cx: &Context<'_>, effects: &mut Effects) {
    if !waker.as_ref().is_some_and(|waker| waker.will_wake(cx.waker())) {
        // The one before may be the last of its task, which must not be dropped under the lock.
        effects.wakers.extend(waker.replace(cx.waker().clone()));
    }
}

fn go_away(into: &mut Vec<u8>, reason: Reason) -> Frames {
    let flags = Flags::NONE;
    into.extend(Header { kind: Kind::GoAway, flags, stream: 0, length: reason as u32 }.encode());
    Frames::Control
}

fn broken(why: &'static str) -> End {
    End::Broken(Reason::ProtocolError, why)
}

#[cfg(test)]
mod tests;
