//! The laws once more, as naively as they can be written down: plain lists, scanned for everything.
//!
//! Times are milliseconds since the beginning. Nothing is counted, cached or indexed, so that it
//! cannot be wrong in the way in which the relay might be.

use std::collections::HashMap;

/// What is told to whoever asked for a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Answer {
    Granted,
    Refused,
    TooOften,
    Denied,
}

/// Why a slot came back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Why {
    Expired,
    GraceOver,
    Left,
    Silent,
    Taken(usize),
    Undelivered,
    Denied,
    Released,
}

/// What the operator wants; zero is no cap, no grace, no heartbeat, no probe, no rate.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Policy {
    pub total: usize,
    pub per_ip: usize,
    pub per_subnet: usize,
    pub ttl: u64,
    pub grace: u64,
    pub heartbeat: u64,
    pub silence: u64,
    pub close_silent: bool,
    pub probe: u64,
    pub probe_after: u64,
    pub sweep: u64,
    pub rate: u64,
    pub denied: Option<usize>,
}

/// How often a waiting newcomer's chances are looked at.
const TICK: u64 = 100;

/// How late a sweep may be before questions count anew.
const LATE: u64 = 1000;

/// How many newcomers of one address may wait.
const MOST_WAITING_PER_ADDRESS: usize = 8;

const MINUTE: u64 = 60_000;

#[derive(Clone, Debug)]
pub struct Connection {
    pub id: u32,
    pub peer: usize,
    pub address: u8,
    pub last_heard: u64,
    pub asked: Option<u64>,
    /// Something came in that no sweep has seen yet.
    pub unseen: bool,
    closing: bool,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum State {
    Live(u32),
    /// Left then, as the how-manieth.
    Grace(u64, u64),
}

#[derive(Clone, Debug, PartialEq)]
pub struct Slot {
    pub peer: usize,
    pub state: State,
    pub expires: u64,
    pub address: u8,
    /// The request that was last granted.
    pub request: u64,
    /// What held when the peer last knew where it stood: nothing, or a slot.
    before: Option<Option<(State, u64)>>,
}

#[derive(Clone, Copy, Debug)]
struct Waiting {
    peer: usize,
    connection: u32,
    address: u8,
    request: u64,
    /// Since when somebody may have been asked for it.
    since: Option<u64>,
}

/// A cap, narrowest first.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Cap {
    Address(u8),
    Subnet(u8),
    Table,
}

impl Policy {
    /// How long a peer that is judged must have had to answer.
    pub fn time_to_answer(&self, somebody_waits: bool) -> u64 {
        let beat = (self.heartbeat > 0).then(|| self.silence - self.heartbeat);
        let probe = (somebody_waits && self.probe > 0).then_some(self.probe);
        beat.into_iter().chain(probe).min().expect("somebody judges")
    }
}

/// Two addresses make a subnet.
pub fn subnet(address: u8) -> u8 {
    address / 2
}

impl Cap {
    fn covers(self, address: u8) -> bool {
        match self {
            Self::Address(one) => one == address,
            Self::Subnet(one) => one == subnet(address),
            Self::Table => true,
        }
    }
}

pub struct Model {
    pub policy: Policy,
    pub connections: Vec<Connection>,
    pub slots: Vec<Slot>,
    waiting: Vec<Waiting>,
    /// How much is left in a bucket, and since when: a peer's, or an address's.
    peer_buckets: HashMap<usize, (u64, u64)>,
    address_buckets: HashMap<u8, (u64, u64)>,
    departures: u64,
    last_beat: u64,
    doubt: Option<u64>,
    // What came of it, until somebody takes it.
    pub answers: Vec<(u64, Answer)>,
    pub freed: Vec<(usize, Why)>,
    pub asked: Vec<u32>,
}

impl Model {
    pub fn new(policy: Policy) -> Self {
        Self {
            policy,
            connections: Vec::new(),
            slots: Vec::new(),
            waiting: Vec::new(),
            peer_buckets: HashMap::new(),
            address_buckets: HashMap::new(),
            departures: 0,
            last_beat: 0,
            doubt: None,
            answers: Vec::new(),
            freed: Vec::new(),
            asked: Vec::new(),
        }
    }

    pub fn waiting(&self) -> usize {
        self.waiting.len()
    }

    pub fn over(&self, slot: &Slot, now: u64) -> bool {
        self.end(slot) <= now
    }

    fn why_over(&self, slot: &Slot, now: u64) -> Option<Why> {
        let is_term = self.end(slot) == slot.expires;
        self.over(slot, now).then_some(if is_term { Why::Expired } else { Why::GraceOver })
    }

    pub fn end(&self, slot: &Slot) -> u64 {
        match slot.state {
            State::Live(_) => slot.expires,
            State::Grace(since, _) => slot.expires.min(since + self.policy.grace),
        }
    }

    /// Those of a peer that a slot may point at, oldest first.
    pub fn fit(&self, peer: usize) -> Vec<u32> {
        let fit = |c: &&Connection| c.peer == peer && !c.closing;
        self.connections.iter().filter(fit).map(|c| c.id).collect()
    }

    fn slot(&self, peer: usize) -> Option<usize> {
        self.slots.iter().position(|slot| slot.peer == peer)
    }

    fn connection(&mut self, id: u32) -> &mut Connection {
        let found = self.connections.iter_mut().find(|c| c.id == id);
        found.expect("it is up")
    }

    fn free(&mut self, index: usize, why: Why) {
        let slot = self.slots.remove(index);
        self.freed.push((slot.peer, why));
    }

    fn end_what_is_over(&mut self, now: u64) {
        let mut index = 0;
        while let Some(slot) = self.slots.get(index) {
            match self.why_over(slot, now) {
                Some(why) => self.free(index, why),
                None => index += 1,
            }
        }
    }

    // ---- Caps

    /// The caps that hold for an address, narrowest first: what each covers, how many slots are held
    /// under it, and how many may be.
    fn caps(&self, address: u8) -> Vec<(Cap, usize, usize)> {
        let caps = [
            (Cap::Address(address), self.policy.per_ip),
            (Cap::Subnet(subnet(address)), self.policy.per_subnet),
            (Cap::Table, self.policy.total),
        ];
        let given = caps.into_iter().filter(|(_, most)| *most > 0);
        given
            .map(|(cap, most)| {
                let held = self.slots.iter().filter(|s| cap.covers(s.address)).count();
                (cap, held, most)
            })
            .collect()
    }

    /// Gives `peer` a slot. `Err(None)`: not even if somebody were gone.
    fn try_reserve(
        &mut self,
        peer: usize,
        connection: u32,
        request: u64,
        now: u64,
    ) -> Result<(), Option<Cap>> {
        let address = self.connection(connection).address;
        if let Some(own) = self.slot(peer)
            && let Some(why) = self.why_over(&self.slots[own], now)
        {
            self.free(own, why);
        }
        if self.caps(address).iter().any(|(_, held, most)| held >= most) {
            self.end_what_is_over(now);
        }
        let expires = now + self.policy.ttl;
        if let Some(own) = self.slot(peer) {
            let from = self.slots[own].address;
            let room = |(cap, held, most): &(Cap, usize, usize)| cap.covers(from) || held < most;
            let narrow: Vec<_> =
                self.caps(address).into_iter().filter(|c| c.0 != Cap::Table).collect();
            let moves = narrow.iter().all(room);
            let slot = &mut self.slots[own];
            slot.before.get_or_insert(Some((slot.state, slot.expires)));
            slot.state = State::Live(connection);
            slot.expires = expires;
            slot.request = request;
            if moves {
                slot.address = address;
            }
            self.answers.push((request, Answer::Granted));
            return Ok(());
        }
        let caps = self.caps(address);
        if let Some((narrowest, ..)) = caps.iter().find(|(_, held, most)| held >= most) {
            if caps.iter().any(|(_, held, most)| held > most) {
                return Err(None);
            }
            let under = self.slots.iter().enumerate().filter(|(_, s)| narrowest.covers(s.address));
            let left = under.filter_map(|(index, slot)| match slot.state {
                State::Grace(_, nth) => Some((nth, index)),
                State::Live(_) => None,
            });
            let (_, oldest) = left.min().ok_or(Some(*narrowest))?;
            self.free(oldest, Why::Taken(peer));
        }
        self.slots.push(Slot {
            peer,
            state: State::Live(connection),
            expires,
            address,
            request,
            before: Some(None),
        });
        self.answers.push((request, Answer::Granted));
        Ok(())
    }

    // ---- Rates

    fn pay(&mut self, peer: usize, address: Option<u8>, now: u64) -> bool {
        if self.policy.rate == 0 {
            return true;
        }
        let spacing = MINUTE / self.policy.rate;
        let left = |bucket: Option<&(u64, u64)>| match bucket {
            Some((left, since)) => (left + now - since).min(MINUTE),
            None => MINUTE,
        };
        let own = left(self.peer_buckets.get(&peer));
        let all = address.map(|address| left(self.address_buckets.get(&address)));
        if own < spacing || all.is_some_and(|left| left < spacing / 10) {
            return false;
        }
        self.peer_buckets.insert(peer, (own - spacing, now));
        if let (Some(address), Some(left)) = (address, all) {
            self.address_buckets.insert(address, (left - spacing / 10, now));
        }
        true
    }

    // ---- What happens

    pub fn connect(&mut self, id: u32, peer: usize, address: u8, now: u64) {
        self.connections.push(Connection {
            id,
            peer,
            address,
            last_heard: now,
            asked: None,
            unseen: false,
            closing: false,
        });
    }

    pub fn reserve(&mut self, connection: u32, request: u64, now: u64) {
        let Connection { peer, address, .. } = *self.connection(connection);
        if self.policy.denied == Some(peer) {
            self.answers.push((request, Answer::Denied));
            return;
        }
        let holds = self.slots.iter().any(|s| s.peer == peer && !self.over(s, now));
        if !self.pay(peer, (!holds).then_some(address), now) {
            self.answers.push((request, Answer::TooOften));
            return;
        }
        match self.try_reserve(peer, connection, request, now) {
            Ok(()) => return,
            Err(None) => {
                self.answers.push((request, Answer::Refused));
                return;
            }
            Err(Some(_)) => {}
        }
        // It waits once.
        let (older, others) = self.waiting.iter().partition(|w| w.peer == peer);
        self.waiting = others;
        let older: Vec<Waiting> = older;
        self.answers.extend(older.iter().map(|w| (w.request, Answer::Refused)));
        let from_there = |w: &&Waiting| w.address == address;
        let crowded = self.waiting.iter().filter(from_there).count() >= MOST_WAITING_PER_ADDRESS;
        if self.policy.probe == 0 || crowded {
            self.answers.push((request, Answer::Refused));
            return;
        }
        self.waiting.push(Waiting { peer, connection, address, request, since: None });
    }

    pub fn disconnect(&mut self, id: u32, now: u64) {
        let peer = self.connection(id).peer;
        self.connections.retain(|c| c.id != id);
        self.waiting.retain(|w| w.connection != id);
        self.lose(peer, id, self.fit(peer), Why::Left, now);
    }

    pub fn delivered(&mut self, peer: usize) {
        for slot in self.slots.iter_mut().filter(|slot| slot.peer == peer) {
            slot.before = None;
        }
    }

    pub fn undelivered(&mut self, peer: usize, request: u64, now: u64) {
        let last = |own: &usize| self.slots[*own].request == request;
        if let Some(own) = self.slot(peer).filter(last) {
            self.undo(own, self.fit(peer), now);
        }
    }

    pub fn release(&mut self, peer: usize) {
        if let Some(own) = self.slot(peer) {
            self.free(own, Why::Released);
        }
    }

    pub fn configure(&mut self, policy: Policy, now: u64) {
        self.policy = policy;
        self.last_beat = now;
        let Some(denied) = policy.denied else {
            return;
        };
        if let Some(own) = self.slot(denied) {
            self.free(own, Why::Denied);
        }
        let (shut_out, others): (Vec<_>, Vec<_>) =
            self.waiting.iter().partition(|w| w.peer == denied);
        self.waiting = others;
        self.answers.extend(shut_out.iter().map(|w| (w.request, Answer::Denied)));
    }

    fn lose(&mut self, peer: usize, gone: u32, up: Vec<u32>, why: Why, now: u64) {
        let points_there = |own: &usize| self.slots[*own].state == State::Live(gone);
        let Some(own) = self.slot(peer).filter(points_there) else {
            return;
        };
        match self.slots[own].before {
            Some(_) => self.undo(own, up, now),
            None => self.settle(own, up, why, now),
        }
    }

    fn settle(&mut self, own: usize, up: Vec<u32>, why: Why, now: u64) {
        if let Some(other) = up.last() {
            self.slots[own].state = State::Live(*other);
        } else if self.policy.grace == 0 {
            self.free(own, why);
        } else {
            self.departures += 1;
            self.slots[own].state = State::Grace(now, self.departures);
        }
    }

    fn undo(&mut self, own: usize, up: Vec<u32>, now: u64) {
        let Some(before) = self.slots[own].before.take() else {
            return;
        };
        let Some((state, expires)) = before else {
            self.free(own, Why::Undelivered);
            return;
        };
        self.slots[own].state = state;
        self.slots[own].expires = expires;
        if matches!(state, State::Live(connection) if !up.contains(&connection)) {
            self.settle(own, up, Why::Left, now);
        }
    }

    // ---- The sweep

    /// One sweep, which was due at `due`. Where the laws leave open in which order peers are
    /// judged that were silent for as long, `judged` says what the relay did.
    pub fn sweep(&mut self, due: u64, judged: &[usize], now: u64) {
        let mut judged = judged.iter().copied();
        if now > due + LATE {
            for connection in &mut self.connections {
                connection.asked = connection.asked.map(|_| now);
            }
        } else if now > due + TICK {
            for connection in &mut self.connections {
                connection.asked = connection.asked.map(|asked| asked + (now - due));
            }
        }
        self.end_what_is_over(now);
        for connection in &mut self.connections {
            if std::mem::take(&mut connection.unseen) {
                connection.last_heard = now;
                connection.asked = None;
            }
        }
        let silent = self.beat(now);
        for _ in &silent {
            let peer = judged.next().expect("somebody is judged");
            let connection = silent.iter().find(|id| self.connection(**id).peer == peer);
            self.judge(*connection.expect("and was silent for too long"), now);
        }
        self.reclaim(&mut judged, now);
        assert_eq!(judged.next(), None, "nobody else is judged");
    }

    /// When the next one is due.
    pub fn next_sweep(&self, now: u64) -> u64 {
        match self.waiting.is_empty() {
            true => now + self.policy.sweep,
            false => now + self.policy.sweep.min(TICK),
        }
    }

    fn watched(&self) -> Vec<Connection> {
        let held = |id| self.slots.iter().any(|slot| slot.state == State::Live(id));
        let watched = self.connections.iter().filter(|c| !c.closing && held(c.id));
        watched.cloned().collect()
    }

    fn beat(&mut self, now: u64) -> Vec<u32> {
        let Policy { heartbeat, silence, sweep, .. } = self.policy;
        if heartbeat == 0 {
            return Vec::new();
        }
        let pause = now - std::mem::replace(&mut self.last_beat, now);
        let watched = self.watched();
        if pause > sweep + heartbeat {
            for connection in watched {
                self.heard(connection.id, now);
            }
            return Vec::new();
        }
        let asked: Vec<_> = watched.iter().filter(|c| c.asked.is_some()).collect();
        let silent_for = |c: &Connection, limit| now - c.last_heard >= limit;
        let soon = asked.iter().filter(|c| silent_for(c, silence - heartbeat)).count();
        let could_answer =
            |c: &Connection| c.asked.is_some_and(|at| now - at >= silence - heartbeat);
        let due: Vec<_> = asked
            .iter()
            .filter(|c| silent_for(c, silence) && could_answer(c))
            .map(|c| c.id)
            .collect();
        for connection in watched.iter().filter(|c| c.asked.is_none()) {
            if silent_for(connection, heartbeat) {
                self.ask(connection.id, now);
            }
        }
        match self.doubt {
            Some(until) if now < until => return Vec::new(),
            Some(_) if due.is_empty() => self.doubt = None,
            None if soon >= 8 && soon * 2 > watched.len() && !due.is_empty() => {
                self.doubt = Some(now + silence);
                self.asked.extend(due);
                return Vec::new();
            }
            _ => {}
        }
        due
    }

    fn reclaim(&mut self, judged: &mut impl Iterator<Item = usize>, now: u64) {
        let mut in_need = Vec::new();
        for newcomer in std::mem::take(&mut self.waiting) {
            let Waiting { peer, connection, request, .. } = newcomer;
            match self.try_reserve(peer, connection, request, now) {
                Ok(()) => {}
                Err(None) => self.answers.push((request, Answer::Refused)),
                Err(Some(cap)) => in_need.push((newcomer, cap)),
            }
        }
        if in_need.is_empty() {
            return;
        }
        let Policy { probe, probe_after, silence, .. } = self.policy;
        let mut candidates = self.watched();
        candidates.retain(|c| now - c.last_heard >= probe_after);
        for candidate in &mut candidates {
            candidate.asked = candidate.asked.filter(|asked| now - asked <= silence);
        }
        let billed: HashMap<usize, u8> = self.slots.iter().map(|s| (s.peer, s.address)).collect();
        let mut to_judge = Vec::new();
        for (mut newcomer, cap) in in_need {
            if probe == 0 {
                self.answers.push((newcomer.request, Answer::Refused));
                continue;
            }
            let since = *newcomer.since.get_or_insert(now);
            let under = |c: &Connection| cap.covers(billed[&c.peer]);
            let due = |c: &&Connection| under(c) && c.asked.is_some_and(|at| now - at >= probe);
            let longest = candidates.iter().filter(due).map(|c| c.last_heard).min();
            if let Some(longest) = longest {
                let peer = judged.next().expect("somebody is judged");
                let which = candidates.iter().position(|c| c.peer == peer);
                let judged = candidates.remove(which.expect("and was asked"));
                assert!(due(&&judged) && judged.last_heard == longest, "the longest silent");
                to_judge.push((newcomer, Some(judged.id)));
            } else if now - since >= probe + TICK || !candidates.iter().any(under) {
                self.answers.push((newcomer.request, Answer::Refused));
            } else {
                for candidate in &mut candidates {
                    if under(candidate) && candidate.asked.is_none() {
                        candidate.asked = Some(now);
                        self.ask(candidate.id, now);
                    }
                }
                to_judge.push((newcomer, None));
            }
        }
        for (newcomer, judged) in to_judge {
            let Waiting { peer, connection, request, .. } = newcomer;
            let room = judged.map(|judged| {
                self.judge(judged, now);
                self.try_reserve(peer, connection, request, now)
            });
            match room {
                Some(Ok(())) => {}
                Some(Err(None)) => self.answers.push((request, Answer::Refused)),
                Some(Err(Some(_))) | None => self.waiting.push(newcomer),
            }
        }
    }

    fn ask(&mut self, id: u32, now: u64) {
        self.connection(id).asked = Some(now);
        self.asked.push(id);
    }

    pub fn heard(&mut self, id: u32, now: u64) {
        let connection = self.connection(id);
        connection.last_heard = now;
        connection.asked = None;
    }

    fn judge(&mut self, id: u32, now: u64) {
        self.heard(id, now);
        let peer = self.connection(id).peer;
        let mut up = self.fit(peer);
        up.retain(|other| *other != id);
        self.lose(peer, id, up, Why::Silent, now);
        if self.policy.close_silent {
            self.connection(id).closing = true;
        }
    }
}
