//! The clients of a trace against one relay, under a virtual clock; and what became of them.
//!
//! Here it is known who lives and who is dead. A relay hears what comes in on its connections.

use std::{
    cmp::Reverse,
    collections::{BTreeSet, BinaryHeap},
    time::Duration,
};

use crate::trace::{DAY, MEASURED_FROM, Trace, What};

/// So long after the last client is gone every term and every grace is over.
const AFTERWARDS: Duration = Duration::from_secs(3 * 60 * 60);

/// A relay: connections, peers and times are numbers.
pub trait Relay {
    /// For how long a slot is granted.
    fn term(&self) -> Duration;
    fn connected(&mut self, connection: usize, peer: usize, now: Duration);
    fn disconnected(&mut self, connection: usize, now: Duration);
    fn reserve(&mut self, connection: usize, now: Duration);
    /// Something came in on a connection.
    fn heard(&mut self, connection: usize);
    /// When it wants to be woken.
    fn next(&self) -> Option<Duration>;
    fn wake(&mut self, now: Duration);
    /// What it did since the last call, in this order.
    fn take_acts(&mut self) -> Vec<Act>;
    /// How many slots and connections it still knows of.
    fn left_over(&self) -> usize;

    /// For a model that need not ask to be as good as its original: nothing comes back on this
    /// connection from now on, until then or for ever.
    fn froze(&mut self, _connection: usize, _until: Option<Duration>, _now: Duration) {}

    /// After how long the kernel gives up a connection whose other side is gone without a word.
    fn kernel_gives_up_after(&self) -> Option<Duration> {
        None
    }
}

/// What a relay does.
#[derive(Clone, Copy)]
pub enum Act {
    Granted(usize),
    Refused(usize),
    Asked(usize),
    /// Judged although it may be there: not before it was asked for so long and silent for so long.
    Judged {
        connection: usize,
        asked_for: Duration,
        silent_for: Duration,
    },
    Closed(usize),
    /// This peer's slot can be had by anybody who finds no other.
    Grace(usize),
    Freed(usize),
}

/// What was measured.
#[derive(Default)]
pub struct Tally {
    /// Stays that began, and those in which the peer was told that there is no slot.
    pub stays: usize,
    pub refused: usize,
    /// Slots that only their peers could have had, who were gone; and slots in grace. In seconds.
    pub held_by_the_dead: f64,
    pub in_grace: f64,
    /// Live peers that lost slot and connection, and for how long they had none.
    pub evicted: usize,
    pub unreachable: Duration,
    /// Judged, though it was heard of in time: a mistake of the relay.
    pub unjust: usize,
    /// Refused, though a slot's peer had been gone for long enough to be found out; where there is
    /// such a promise.
    pub broken: Option<usize>,
    /// How long it took until a dead peer's slot could be had.
    pub back_after: Vec<Duration>,
    /// Slots and connections that are known after all are gone.
    pub left_over: usize,
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Due {
    /// The relay sees that the connection is gone.
    Disconnected(usize),
    /// The client sees that the relay closed its connection.
    Lost(usize),
    Reserves(usize),
    Answers(usize),
    Talks(usize),
    /// This client connects anew, in this stay.
    Returns(usize, usize),
}

/// A client as it is now.
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
    asked: Option<Duration>,
    wants_since: Duration,
}

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
    /// Since when it has been keeping a slot from everybody without being there.
    fn dead_since(self) -> Option<Duration> {
        self.gone_since.filter(|_| self.holds == Holds::Slot)
    }
}

/// Plays the trace to the relay, which promises a newcomer the slot of any peer that has been gone
/// for so long.
pub fn play(trace: &Trace, relay: impl Relay, promise: Option<Duration>) -> Tally {
    let mut world = World {
        trace,
        relay,
        promise,
        now: Duration::ZERO,
        clients: vec![Client::default(); trace.clients.len()],
        connections: Vec::new(),
        peers: vec![Peer::default(); trace.peers],
        dead: BTreeSet::new(),
        in_grace: 0,
        counted_until: MEASURED_FROM,
        due: BinaryHeap::new(),
        put: 0,
        tally: Tally { broken: promise.map(|_| 0), ..Tally::default() },
    };
    world.play();
    world.tally.left_over = world.relay.left_over();
    world.tally
}

struct World<'a, R> {
    trace: &'a Trace,
    relay: R,
    promise: Option<Duration>,
    now: Duration,
    clients: Vec<Client>,
    connections: Vec<Connection>,
    peers: Vec<Peer>,
    dead: BTreeSet<(Duration, usize)>,
    in_grace: usize,
    counted_until: Duration,
    due: BinaryHeap<Reverse<(Duration, usize, Due)>>,
    /// What is due at one time is done in the order in which it was put down.
    put: usize,
    tally: Tally,
}

impl<R: Relay> World<'_, R> {
    fn play(&mut self) {
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
                let (_, client, what) = events.next().expect("it was seen");
                self.happens(*client, *what);
            } else if due == Some(now) {
                let Reverse((_, _, due)) = self.due.pop().expect("it was seen");
                self.is_due(due);
            } else {
                self.relay.wake(now);
            }
            for act in self.relay.take_acts() {
                self.acted(act);
            }
        }
    }

    fn happens(&mut self, client: usize, what: What) {
        match what {
            What::Comes { peer } => {
                self.tally.stays += usize::from(self.measured());
                let stay = self.clients[client].stay + 1;
                self.clients[client] = Client { peer, stay, ..Client::default() };
                self.change(peer, |peer| peer.gone_since = None);
                self.connect(client);
            }
            What::Goes { fin } => {
                self.reachable_or_gone(client);
                let now = self.now;
                self.change(self.clients[client].peer, |peer| {
                    peer.gone_since = Some(now);
                });
                let Some(connection) = self.clients[client].connection.take() else {
                    return;
                };
                if fin {
                    let arrives = self.trace.clients[client].round_trip / 2;
                    self.later(arrives, Due::Disconnected(connection));
                    return;
                }
                self.relay.froze(connection, None, now);
                if let Some(patience) = self.relay.kernel_gives_up_after() {
                    self.later(patience, Due::Disconnected(connection));
                }
            }
            What::Stalls { until } => {
                self.clients[client].stalled_until = until;
                if let Some(connection) = self.clients[client].connection {
                    self.relay.froze(connection, Some(until), self.now);
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
            asked: None,
            wants_since: self.now,
        });
        self.clients[client].connection = Some(connection);
        self.relay.connected(connection, peer, self.now);
        self.later(Duration::ZERO, Due::Reserves(connection));
        if let Some(period) = self.trace.clients[client].family.talks_every() {
            self.later(period, Due::Talks(connection));
        }
    }

    fn is_due(&mut self, due: Due) {
        let (connection, client) = match due {
            Due::Disconnected(connection) => {
                return self.relay.disconnected(connection, self.now);
            }
            Due::Returns(client, stay) => {
                let stalled_until = self.clients[client].stalled_until;
                if self.clients[client].stay != stay || !self.is_up(client) {
                    return;
                }
                if self.now < stalled_until {
                    return self.later(stalled_until - self.now, due);
                }
                return self.connect(client);
            }
            Due::Lost(connection)
            | Due::Reserves(connection)
            | Due::Answers(connection)
            | Due::Talks(connection) => (connection, self.connections[connection].client),
        };
        if self.clients[client].connection != Some(connection) {
            return;
        }
        let Client { stalled_until, stay, .. } = self.clients[client];
        let family = self.trace.clients[client].family;
        if self.now < stalled_until {
            return self.later(stalled_until - self.now, due);
        }
        if due == Due::Lost(connection) {
            self.clients[client].connection = None;
            if let Some(pause) = family.returns_after() {
                self.later(pause, Due::Returns(client, stay));
            }
            return;
        }
        self.connections[connection].last_heard = self.now;
        self.relay.heard(connection);
        if due == Due::Reserves(connection) {
            self.connections[connection].wants_since = self.now;
            self.relay.reserve(connection, self.now);
        }
        if let (Due::Talks(_), Some(period)) = (due, family.talks_every()) {
            self.later(period, due);
        }
    }

    fn acted(&mut self, act: Act) {
        match act {
            Act::Granted(connection) => {
                let peer = self.connections[connection].peer;
                self.change(peer, |peer| peer.holds = Holds::Slot);
                // Clients renew well before the end.
                self.later(self.relay.term() * 3 / 4, Due::Reserves(connection));
                if let Some(client) = self.lives(connection) {
                    self.clients[client].refusals = 0;
                    self.reachable_or_gone(client);
                }
            }
            Act::Refused(connection) => self.refused(connection),
            Act::Asked(connection) => {
                self.connections[connection].asked = Some(self.now);
                if let Some(client) = self.lives(connection) {
                    let ready = self.clients[client].stalled_until.max(self.now);
                    let round_trip = self.trace.clients[client].round_trip;
                    self.later(ready + round_trip - self.now, Due::Answers(connection));
                }
            }
            Act::Judged { connection, asked_for, silent_for } => {
                let Connection { last_heard, asked, .. } = self.connections[connection];
                let silent = last_heard + silent_for <= self.now;
                let in_vain =
                    asked.is_some_and(|asked| last_heard <= asked && asked + asked_for <= self.now);
                self.tally.unjust += usize::from(!silent || !in_vain);
            }
            Act::Closed(connection) => {
                let Some(client) = self.lives(connection) else {
                    return; // it is gone, and the kernel will see to the connection
                };
                if self.measured() {
                    self.tally.evicted += 1;
                    self.clients[client].evicted.get_or_insert(self.now);
                }
                let ready = self.clients[client].stalled_until.max(self.now);
                let arrives = ready + self.trace.clients[client].round_trip / 2 - self.now;
                self.later(arrives, Due::Lost(connection));
                self.later(arrives, Due::Disconnected(connection));
            }
            Act::Grace(peer) => self.change(peer, |peer| peer.holds = Holds::Grace),
            Act::Freed(peer) => self.change(peer, |peer| peer.holds = Holds::Nothing),
        }
    }

    fn refused(&mut self, connection: usize) {
        let Some(client) = self.lives(connection) else {
            return;
        };
        let wants_since = self.connections[connection].wants_since;
        if let (Some(promise), Some((gone_since, _))) = (self.promise, self.dead.first()) {
            let broken = *gone_since + promise <= wants_since && self.measured();
            *self.tally.broken.get_or_insert_default() += usize::from(broken);
        }
        let news = !std::mem::replace(&mut self.clients[client].was_refused, true);
        self.tally.refused += usize::from(news && self.measured());
        self.clients[client].refusals += 1;
        let family = self.trace.clients[client].family;
        if let Some(pause) = family.asks_again_after(self.clients[client].refusals) {
            self.later(pause, Due::Reserves(connection));
        }
    }

    /// The client at the other end, if it is still there and uses this connection.
    fn lives(&self, connection: usize) -> Option<usize> {
        let client = self.connections[connection].client;
        (self.clients[client].connection == Some(connection)).then_some(client)
    }

    fn is_up(&self, client: usize) -> bool {
        self.peers[self.clients[client].peer].gone_since.is_none()
    }

    fn reachable_or_gone(&mut self, client: usize) {
        if let Some(evicted) = self.clients[client].evicted.take() {
            self.tally.unreachable += self.now - evicted;
        }
    }

    fn change(&mut self, peer: usize, change: impl FnOnce(&mut Peer)) {
        let until = self.now.clamp(MEASURED_FROM, DAY);
        let seconds = (until - self.counted_until).as_secs_f64();
        self.tally.held_by_the_dead += self.dead.len() as f64 * seconds;
        self.tally.in_grace += self.in_grace as f64 * seconds;
        self.counted_until = until;

        let before = self.peers[peer];
        change(&mut self.peers[peer]);
        let after = self.peers[peer];
        self.in_grace += usize::from(after.holds == Holds::Grace);
        self.in_grace -= usize::from(before.holds == Holds::Grace);
        if let Some(since) = before.dead_since() {
            self.dead.remove(&(since, peer));
            if after.holds != Holds::Slot && (MEASURED_FROM..DAY).contains(&since) {
                self.tally.back_after.push(self.now - since);
            }
        }
        if let Some(since) = after.dead_since() {
            self.dead.insert((since, peer));
        }
    }

    fn measured(&self) -> bool {
        (MEASURED_FROM..DAY).contains(&self.now)
    }

    fn later(&mut self, pause: Duration, due: Due) {
        self.put += 1;
        self.due.push(Reverse((self.now + pause, self.put, due)));
    }
}
