//! Simulates the clients of a trace with one relay under a virtual clock, and measures the results.
//!
//! The simulation knows which clients are live. A relay only sees what arrives on its connections.

use std::{
    cmp::Reverse,
    collections::{BTreeSet, BinaryHeap},
    time::Duration,
};

use rand::{RngExt, SeedableRng, rngs::Xoshiro256PlusPlus};

use crate::trace::{Change, DAY, MEASURED_FROM, Trace};

/// TCP retransmits what is not acknowledged within a round trip and this time, at intervals that double.
const RETRANSMIT_AFTER: Duration = Duration::from_millis(200);
/// The longest of these intervals.
const LONGEST_RETRANSMIT: Duration = Duration::from_secs(120);
/// From this retransmission on the intervals of the program's sockets double (Linux, `TCP_THIN_LINEAR_TIMEOUTS`).
const LINEAR_RETRANSMITS: u64 = 6;

/// How long after the last client has disconnected every term and grace is over.
const AFTERWARDS: Duration = Duration::from_secs(3 * 60 * 60);

/// A relay. Connections and peers are numbers, times are durations since the start.
pub trait Relay {
    /// The term of a slot.
    fn term(&self) -> Duration;
    fn on_connected(&mut self, connection: usize, peer: usize, now: Duration);
    fn on_disconnected(&mut self, connection: usize, now: Duration);
    fn reserve(&mut self, connection: usize, now: Duration);
    /// Bytes arrived on a connection.
    fn on_activity(&mut self, connection: usize);
    /// When [`Relay::wake`] is due.
    fn next(&self) -> Option<Duration>;
    fn wake(&mut self, now: Duration);
    /// The relay's actions since the last call, in order.
    fn take_actions(&mut self) -> Vec<Action>;
    /// How many slots and connections the relay still has.
    fn left_over(&self) -> usize;

    /// The client's kernel acknowledged a probe that was retransmitted this many times.
    fn on_acknowledged(&mut self, _connection: usize, _retransmitted: u64, _now: Duration) {}

    /// For a model that does not simulate probes: no answers arrive on this connection from now on, until this time or
    /// for ever.
    fn on_frozen(&mut self, _connection: usize, _until: Option<Duration>, _now: Duration) {}

    /// After how long the kernel closes a connection whose peer is silently gone.
    fn kernel_timeout(&self) -> Option<Duration> {
        None
    }
}

/// An action of a relay.
#[derive(Clone, Copy)]
pub enum Action {
    Granted(usize),
    Refused(usize),
    Probed(usize),
    /// The relay found a peer silent, after it was probed for at least this long and silent for at least this long.
    TimedOut {
        connection: usize,
        probed_for: Duration,
        silent_for: Duration,
    },
    Closed(usize),
    /// This peer's slot is in grace: a newcomer may take it if no other is free.
    Grace(usize),
    Freed(usize),
}

/// The measurements.
#[derive(Default)]
pub struct Tally {
    /// How many stays began, and in how many of them the peer was refused.
    pub stays: usize,
    pub refused: usize,
    /// Slot-seconds of live slots whose peers were gone, and of slots in grace.
    pub held_by_gone_peers: f64,
    pub in_grace: f64,
    /// How many live peers lost slot and connection, and how long they were without.
    pub evicted: usize,
    pub unreachable: Duration,
    /// Timeouts of peers that were active or had answered in time: mistakes of the relay.
    pub wrong_evictions: usize,
    /// Broken promises: refusals while the peer of a slot had been gone long enough to be detected. Only for a relay
    /// with that promise.
    pub broken: Option<usize>,
    /// How long it took until a gone peer's slot was available.
    pub back_after: Vec<Duration>,
    /// Slots and connections that the relay still has after all clients have disconnected.
    pub left_over: usize,
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Due {
    /// The relay sees that the connection is closed.
    Disconnected(usize),
    /// The client sees that the relay has closed its connection.
    Lost(usize),
    Reserve(usize),
    /// A probe arrives, where packets are lost.
    Probe(usize),
    Answer(usize),
    /// The relay's kernel gets the acknowledgement of a probe that was retransmitted this many times.
    Acknowledged(usize, u64),
    Keepalive(usize),
    /// A keepalive arrives, where packets are lost: the relay answers it.
    Kept(usize),
    /// This client reconnects, if it is still in this stay.
    Reconnect(usize, usize),
}

/// The current state of a client.
#[derive(Clone, Default)]
struct Client {
    peer: usize,
    stay: usize,
    connection: Option<usize>,
    stalled_until: Duration,
    refusals: u32,
    was_refused: bool,
    evicted: Option<Duration>,
}

struct Connection {
    client: usize,
    peer: usize,
    last_heard: Duration,
    probed: Option<Duration>,
    wants_since: Duration,
    /// The last packet to the client, and the last one to the relay.
    last: [Packet; 2],
}

/// When a packet is sent, arrives and is acknowledged. All that is to be sent meanwhile follows then, as one packet.
#[derive(Clone, Copy, Default)]
struct Packet {
    sent: Duration,
    arrives: Duration,
    acknowledged: Duration,
}

/// The directions of a connection.
const TO_CLIENT: usize = 0;
const TO_RELAY: usize = 1;

#[derive(Clone, Copy, Default, PartialEq)]
enum Holds {
    #[default]
    Nothing,
    Slot,
    Grace,
}

#[derive(Clone, Copy, Default)]
struct Peer {
    holds: Holds,
    gone_since: Option<Duration>,
}

impl Peer {
    /// Since when the peer has been gone while it holds a live slot.
    fn gone_with_slot_since(self) -> Option<Duration> {
        self.gone_since.filter(|_| self.holds == Holds::Slot)
    }
}

/// Simulates the trace. `promise`: a newcomer gets the slot of any peer that has been gone for this long. `loss`: with
/// this probability each packet of a probe, of an answer and of a keepalive is lost.
pub fn simulate(trace: &Trace, relay: impl Relay, promise: Option<Duration>, loss: f64) -> Tally {
    let mut simulation = Simulation {
        trace,
        relay,
        promise,
        loss,
        rng: Xoshiro256PlusPlus::seed_from_u64(1),
        now: Duration::ZERO,
        clients: vec![Client::default(); trace.clients.len()],
        connections: Vec::new(),
        peers: vec![Peer::default(); trace.peers],
        gone_with_slot: BTreeSet::new(),
        in_grace: 0,
        counted_until: MEASURED_FROM,
        due: BinaryHeap::new(),
        inserted: 0,
        tally: Tally { broken: promise.map(|_| 0), ..Tally::default() },
    };
    simulation.run();
    simulation.tally.left_over = simulation.relay.left_over();
    simulation.tally
}

struct Simulation<'a, R> {
    trace: &'a Trace,
    relay: R,
    promise: Option<Duration>,
    loss: f64,
    rng: Xoshiro256PlusPlus,
    now: Duration,
    clients: Vec<Client>,
    connections: Vec<Connection>,
    peers: Vec<Peer>,
    gone_with_slot: BTreeSet<(Duration, usize)>,
    in_grace: usize,
    counted_until: Duration,
    due: BinaryHeap<Reverse<(Duration, usize, Due)>>,
    /// Entries that are due at the same time are handled in the order of their insertion.
    inserted: usize,
    tally: Tally,
}

impl<R: Relay> Simulation<'_, R> {
    fn run(&mut self) {
        let mut events = self.trace.events.iter().peekable();
        let last = self.trace.events.last().map_or(self.now, |event| event.0);
        loop {
            let event = events.peek().map(|(at, ..)| *at);
            let due = self.due.peek().map(|Reverse((at, ..))| *at);
            let next = [event, due, self.relay.next()].into_iter().flatten().min();
            let Some(now) = next.filter(|next| *next <= last + AFTERWARDS) else {
                return;
            };
            self.now = now;
            if event == Some(now) {
                let (_, client, what) = events.next().expect("the peeked entry");
                self.apply(*client, *what);
            } else if due == Some(now) {
                let Reverse((_, _, due)) = self.due.pop().expect("the peeked entry");
                self.handle_due(due);
            } else {
                self.relay.wake(now);
            }
            for action in self.relay.take_actions() {
                self.apply_action(action);
            }
        }
    }

    fn apply(&mut self, client: usize, what: Change) {
        match what {
            Change::Start { peer } => {
                self.tally.stays += usize::from(self.is_measured());
                let stay = self.clients[client].stay + 1;
                self.clients[client] = Client { peer, stay, ..Client::default() };
                self.change(peer, |peer| peer.gone_since = None);
                self.connect(client);
            }
            Change::End { fin } => {
                self.end_unreachability(client);
                let now = self.now;
                self.change(self.clients[client].peer, |peer| {
                    peer.gone_since = Some(now);
                });
                let Some(connection) = self.clients[client].connection.take() else {
                    return;
                };
                if fin {
                    let arrives = self.trace.clients[client].round_trip / 2;
                    self.schedule(arrives, Due::Disconnected(connection));
                    return;
                }
                self.relay.on_frozen(connection, None, now);
                if let Some(timeout) = self.relay.kernel_timeout() {
                    self.schedule(timeout, Due::Disconnected(connection));
                }
            }
            Change::Stall { until } => {
                self.clients[client].stalled_until = until;
                if let Some(connection) = self.clients[client].connection {
                    self.relay.on_frozen(connection, Some(until), self.now);
                }
            }
        }
    }

    fn connect(&mut self, client: usize) {
        let connection = self.connections.len();
        let peer = self.clients[client].peer;
        self.connections.push(Connection {
            client,
            peer,
            last_heard: self.now,
            probed: None,
            wants_since: self.now,
            last: Default::default(),
        });
        self.clients[client].connection = Some(connection);
        self.relay.on_connected(connection, peer, self.now);
        self.schedule(Duration::ZERO, Due::Reserve(connection));
        if let Some(period) = self.trace.clients[client].family.keepalive_interval() {
            self.schedule(period, Due::Keepalive(connection));
        }
    }

    fn handle_due(&mut self, due: Due) {
        // 1. Entries that do not need the client's connection to be up.
        let (connection, client) = match due {
            Due::Disconnected(connection) => {
                return self.relay.on_disconnected(connection, self.now);
            }
            Due::Reconnect(client, stay) => {
                let stalled_until = self.clients[client].stalled_until;
                if self.clients[client].stay != stay || !self.is_up(client) {
                    return;
                }
                if self.now < stalled_until {
                    return self.schedule(stalled_until - self.now, due);
                }
                return self.connect(client);
            }
            Due::Lost(connection)
            | Due::Reserve(connection)
            | Due::Probe(connection)
            | Due::Answer(connection)
            | Due::Acknowledged(connection, _)
            | Due::Keepalive(connection)
            | Due::Kept(connection) => (connection, self.connections[connection].client),
        };
        if self.clients[client].connection != Some(connection) {
            return;
        }
        // 2. The client's kernel acknowledges even while the client is stalled; all else waits for the client.
        if let Due::Acknowledged(_, retransmitted) = due {
            return self.relay.on_acknowledged(connection, retransmitted, self.now);
        }
        let Client { stalled_until, stay, .. } = self.clients[client];
        let family = self.trace.clients[client].family;
        if self.now < stalled_until {
            return self.schedule(stalled_until - self.now, due);
        }
        // 3. What the client does about it.
        if due == Due::Lost(connection) {
            self.clients[client].connection = None;
            if let Some(pause) = family.reconnect_after_close() {
                self.schedule(pause, Due::Reconnect(client, stay));
            }
            return;
        }
        if let (Due::Keepalive(_), Some(period)) = (due, family.keepalive_interval()) {
            self.schedule(period, due);
            if self.loss > 0.0 {
                let arrives = self.send(connection, TO_RELAY);
                return self.schedule(arrives, Due::Kept(connection));
            }
        }
        if due == Due::Probe(connection) {
            let arrives = self.send(connection, TO_RELAY);
            return self.schedule(arrives, Due::Answer(connection));
        }
        // 4. What arrives at the relay.
        self.connections[connection].last_heard = self.now;
        self.relay.on_activity(connection);
        if due == Due::Kept(connection) {
            self.send(connection, TO_CLIENT);
        }
        if due == Due::Reserve(connection) {
            self.connections[connection].wants_since = self.now;
            self.relay.reserve(connection, self.now);
        }
    }

    /// Sends a packet, now or once the one before is acknowledged; returns after how long it arrives.
    fn send(&mut self, connection: usize, direction: usize) -> Duration {
        let state = &mut self.connections[connection];
        let round_trip = self.trace.clients[state.client].round_trip;
        let (now, back) = (self.now, 1 - direction);
        let last = state.last[direction];
        if now < last.sent {
            return last.arrives - now; // with the one that waits already
        }
        let sent = now.max(last.acknowledged);
        let (mut at, mut arrives, mut retransmitted) = (sent, None, 0);
        let mut pause = RETRANSMIT_AFTER + round_trip;
        loop {
            if !self.rng.random_bool(self.loss) {
                arrives.get_or_insert(at + round_trip / 2);
                if !self.rng.random_bool(self.loss) {
                    break;
                }
            }
            at += pause;
            retransmitted += 1;
            if direction == TO_RELAY || retransmitted >= LINEAR_RETRANSMITS {
                pause = LONGEST_RETRANSMIT.min(pause * 2);
            }
        }
        let acknowledged = at + round_trip;
        let arrives = arrives.unwrap_or(acknowledged);
        state.last[direction] = Packet { sent, arrives, acknowledged };
        // It also acknowledges what has arrived before it is sent.
        let other = &mut state.last[back];
        if other.arrives + round_trip / 2 <= arrives {
            other.acknowledged = other.acknowledged.min(arrives);
        }
        if direction == TO_CLIENT {
            self.schedule(acknowledged - now, Due::Acknowledged(connection, retransmitted));
        }
        arrives - now
    }

    fn apply_action(&mut self, action: Action) {
        match action {
            Action::Granted(connection) => {
                let peer = self.connections[connection].peer;
                self.change(peer, |peer| peer.holds = Holds::Slot);
                // Clients renew at three quarters of the term.
                self.schedule(self.relay.term() * 3 / 4, Due::Reserve(connection));
                if let Some(client) = self.live_client(connection) {
                    self.clients[client].refusals = 0;
                    self.end_unreachability(client);
                }
            }
            Action::Refused(connection) => self.on_refused(connection),
            Action::Probed(connection) => {
                self.connections[connection].probed = Some(self.now);
                if let Some(client) = self.live_client(connection) {
                    if self.loss > 0.0 {
                        let arrives = self.send(connection, TO_CLIENT);
                        self.schedule(arrives, Due::Probe(connection));
                    } else {
                        let ready = self.clients[client].stalled_until.max(self.now);
                        let answered = ready + self.trace.clients[client].round_trip;
                        self.schedule(answered - self.now, Due::Answer(connection));
                    }
                }
            }
            Action::TimedOut { connection, probed_for, silent_for } => {
                let Connection { last_heard, probed, .. } = self.connections[connection];
                let silent = last_heard + silent_for <= self.now;
                let unanswered = probed
                    .is_some_and(|probed| last_heard <= probed && probed + probed_for <= self.now);
                self.tally.wrong_evictions += usize::from(!silent || !unanswered);
            }
            Action::Closed(connection) => {
                let Some(client) = self.live_client(connection) else {
                    return; // the client is gone; the kernel closes the connection
                };
                if self.is_measured() {
                    self.tally.evicted += 1;
                    self.clients[client].evicted.get_or_insert(self.now);
                }
                let ready = self.clients[client].stalled_until.max(self.now);
                let arrives = ready + self.trace.clients[client].round_trip / 2 - self.now;
                self.schedule(arrives, Due::Lost(connection));
                self.schedule(arrives, Due::Disconnected(connection));
            }
            Action::Grace(peer) => self.change(peer, |peer| peer.holds = Holds::Grace),
            Action::Freed(peer) => self.change(peer, |peer| peer.holds = Holds::Nothing),
        }
    }

    fn on_refused(&mut self, connection: usize) {
        let Some(client) = self.live_client(connection) else {
            return;
        };
        let wants_since = self.connections[connection].wants_since;
        if let (Some(promise), Some((gone_since, _))) = (self.promise, self.gone_with_slot.first())
        {
            let broken = *gone_since + promise <= wants_since && self.is_measured();
            *self.tally.broken.get_or_insert_default() += usize::from(broken);
        }
        let is_first = !std::mem::replace(&mut self.clients[client].was_refused, true);
        self.tally.refused += usize::from(is_first && self.is_measured());
        self.clients[client].refusals += 1;
        let family = self.trace.clients[client].family;
        if let Some(pause) = family.retry_after_refusal(self.clients[client].refusals) {
            self.schedule(pause, Due::Reserve(connection));
        }
    }

    /// The client at the other end, if it is live and uses this connection.
    fn live_client(&self, connection: usize) -> Option<usize> {
        let client = self.connections[connection].client;
        (self.clients[client].connection == Some(connection)).then_some(client)
    }

    fn is_up(&self, client: usize) -> bool {
        self.peers[self.clients[client].peer].gone_since.is_none()
    }

    fn end_unreachability(&mut self, client: usize) {
        if let Some(evicted) = self.clients[client].evicted.take() {
            self.tally.unreachable += self.now - evicted;
        }
    }

    /// Changes the state of a peer, and counts for how long the states before lasted.
    fn change(&mut self, peer: usize, change: impl FnOnce(&mut Peer)) {
        let until = self.now.clamp(MEASURED_FROM, DAY);
        let seconds = (until - self.counted_until).as_secs_f64();
        self.tally.held_by_gone_peers += self.gone_with_slot.len() as f64 * seconds;
        self.tally.in_grace += self.in_grace as f64 * seconds;
        self.counted_until = until;

        let before = self.peers[peer];
        change(&mut self.peers[peer]);
        let after = self.peers[peer];
        self.in_grace += usize::from(after.holds == Holds::Grace);
        self.in_grace -= usize::from(before.holds == Holds::Grace);
        if let Some(since) = before.gone_with_slot_since() {
            self.gone_with_slot.remove(&(since, peer));
            if after.holds != Holds::Slot && (MEASURED_FROM..DAY).contains(&since) {
                self.tally.back_after.push(self.now - since);
            }
        }
        if let Some(since) = after.gone_with_slot_since() {
            self.gone_with_slot.insert((since, peer));
        }
    }

    fn is_measured(&self) -> bool {
        (MEASURED_FROM..DAY).contains(&self.now)
    }

    fn schedule(&mut self, pause: Duration, due: Due) {
        self.inserted += 1;
        self.due.push(Reverse((self.now + pause, self.inserted, due)));
    }
}
