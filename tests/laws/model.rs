//! A naive model of the relay's reservations: plain lists, searched for everything.
//!
//! Times are in milliseconds since the start. Nothing is cached or indexed, so that the model does not share possible
//! mistakes of the relay.

use std::collections::HashMap;

/// The answer to a RESERVE.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Answer {
    Granted,
    Refused,
    TooOften,
    Denied,
}

/// Why a slot was freed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Reason {
    Expired,
    GraceOver,
    Disconnected,
    Silent,
    Taken(usize),
    Undelivered,
    Denied,
    Released,
}

/// The configuration; zero: no cap, no grace, no heartbeat, no probe, no rate limit.
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

/// The interval of sweeps while newcomers wait.
const TICK: u64 = 100;

/// How late a sweep may be before probes start over.
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
    pub probed: Option<u64>,
    /// Bytes have arrived that no sweep has seen yet.
    pub unseen: bool,
    /// Whether its peer timed out on it, and whether it was heard since.
    timed_out: bool,
    pub heard: bool,
    closing: bool,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum State {
    Live(u32),
    /// Since this time, and as the nth slot that entered grace.
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
    /// The state before the grants that are not yet known to be delivered; `Some(None)`: no slot.
    before: Option<Option<(State, u64)>>,
}

#[derive(Clone, Copy, Debug)]
struct Waiting {
    peer: usize,
    connection: u32,
    address: u8,
    request: u64,
    /// When it was first in need of a slot that a probe could free.
    since: Option<u64>,
}

/// A cap, narrowest first.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Cap {
    Address(u8),
    Subnet(u8),
    Total,
}

impl Policy {
    /// The least time that a peer has to answer before it times out.
    pub fn time_to_answer(&self, newcomers_wait: bool) -> u64 {
        let heartbeat = (self.heartbeat > 0).then(|| self.silence - self.heartbeat);
        let probe = (newcomers_wait && self.probe > 0).then_some(self.probe);
        heartbeat.into_iter().chain(probe).min().expect("a heartbeat or a probe")
    }
}

/// Each subnet has two addresses.
pub fn subnet(address: u8) -> u8 {
    address / 2
}

impl Cap {
    fn covers(self, address: u8) -> bool {
        match self {
            Self::Address(one) => one == address,
            Self::Subnet(one) => one == subnet(address),
            Self::Total => true,
        }
    }
}

pub struct Model {
    pub policy: Policy,
    pub connections: Vec<Connection>,
    pub slots: Vec<Slot>,
    waiting: Vec<Waiting>,
    /// The tokens left in the buckets of peers and addresses, and when they were counted.
    peer_buckets: HashMap<usize, (u64, u64)>,
    address_buckets: HashMap<u8, (u64, u64)>,
    /// How many slots have entered grace.
    graces: u64,
    last_sweep: u64,
    deferred_until: Option<u64>,
    // Results since they were last taken.
    pub answers: Vec<(u64, Answer)>,
    pub freed: Vec<(usize, Reason)>,
    pub probed: Vec<u32>,
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
            graces: 0,
            last_sweep: 0,
            deferred_until: None,
            answers: Vec::new(),
            freed: Vec::new(),
            probed: Vec::new(),
        }
    }

    pub fn waiting(&self) -> usize {
        self.waiting.len()
    }

    pub fn is_over(&self, slot: &Slot, now: u64) -> bool {
        self.end(slot) <= now
    }

    fn end_reason(&self, slot: &Slot, now: u64) -> Option<Reason> {
        let is_expiry = self.end(slot) == slot.expires;
        let reason = if is_expiry { Reason::Expired } else { Reason::GraceOver };
        self.is_over(slot, now).then_some(reason)
    }

    pub fn end(&self, slot: &Slot) -> u64 {
        match slot.state {
            State::Live(_) => slot.expires,
            State::Grace(since, _) => slot.expires.min(since + self.policy.grace),
        }
    }

    /// Has a slot point at this connection, on which its peer is probed anew.
    fn point(&mut self, own: usize, id: u32) {
        if self.slots[own].state != State::Live(id) {
            self.connection(id).probed = None;
        }
        self.slots[own].state = State::Live(id);
    }

    /// The connections of a peer that a slot may point at, oldest first: not those on which the peer timed out and was
    /// not heard since.
    pub fn usable(&self, peer: usize) -> Vec<u32> {
        let is_silent = |c: &Connection| c.closing || c.timed_out && !c.heard;
        let usable = |c: &&Connection| c.peer == peer && !is_silent(c);
        self.connections.iter().filter(usable).map(|c| c.id).collect()
    }

    fn slot(&self, peer: usize) -> Option<usize> {
        self.slots.iter().position(|slot| slot.peer == peer)
    }

    fn connection(&mut self, id: u32) -> &mut Connection {
        let found = self.connections.iter_mut().find(|c| c.id == id);
        found.expect("a connection that is up")
    }

    fn free(&mut self, index: usize, reason: Reason) {
        let slot = self.slots.remove(index);
        self.freed.push((slot.peer, reason));
    }

    fn end_what_is_over(&mut self, now: u64) {
        let mut index = 0;
        while let Some(slot) = self.slots.get(index) {
            match self.end_reason(slot, now) {
                Some(reason) => self.free(index, reason),
                None => index += 1,
            }
        }
    }

    // ---- Caps

    /// The caps that apply to an address, narrowest first: which slots each covers, how many those are, and how many
    /// are allowed.
    fn caps(&self, address: u8) -> Vec<(Cap, usize, usize)> {
        let caps = [
            (Cap::Address(address), self.policy.per_ip),
            (Cap::Subnet(subnet(address)), self.policy.per_subnet),
            (Cap::Total, self.policy.total),
        ];
        let given = caps.into_iter().filter(|(_, most)| *most > 0);
        given
            .map(|(cap, most)| {
                let held = self.slots.iter().filter(|s| cap.covers(s.address)).count();
                (cap, held, most)
            })
            .collect()
    }

    /// Reserves a slot for `peer`. `Err(None)`: a cap is exceeded, so that one freed slot would not be enough.
    fn try_reserve(
        &mut self,
        peer: usize,
        connection: u32,
        request: u64,
        now: u64,
    ) -> Result<(), Option<Cap>> {
        let address = self.connection(connection).address;
        // 1. End what is over: the peer's own slot; under a full cap, all.
        if let Some(own) = self.slot(peer)
            && let Some(reason) = self.end_reason(&self.slots[own], now)
        {
            self.free(own, reason);
        }
        if self.caps(address).iter().any(|(_, held, most)| held >= most) {
            self.end_what_is_over(now);
        }
        // 2. Renew.
        let expires = now + self.policy.ttl;
        if let Some(own) = self.slot(peer) {
            let from = self.slots[own].address;
            let room = |(cap, held, most): &(Cap, usize, usize)| cap.covers(from) || held < most;
            let narrow: Vec<_> =
                self.caps(address).into_iter().filter(|c| c.0 != Cap::Total).collect();
            let moves = narrow.iter().all(room);
            let slot = &mut self.slots[own];
            slot.before.get_or_insert(Some((slot.state, slot.expires)));
            slot.expires = expires;
            slot.request = request;
            if moves {
                slot.address = address;
            }
            self.point(own, connection);
            self.answers.push((request, Answer::Granted));
            return Ok(());
        }
        // 3. Under a full cap, free the slot that has been in grace for longest under the narrowest one.
        let caps = self.caps(address);
        if let Some((narrowest, ..)) = caps.iter().find(|(_, held, most)| held >= most) {
            if caps.iter().any(|(_, held, most)| held > most) {
                return Err(None);
            }
            let under = self.slots.iter().enumerate().filter(|(_, s)| narrowest.covers(s.address));
            let in_grace = under.filter_map(|(index, slot)| match slot.state {
                State::Grace(_, nth) => Some((nth, index)),
                State::Live(_) => None,
            });
            let (_, oldest) = in_grace.min().ok_or(Some(*narrowest))?;
            self.free(oldest, Reason::Taken(peer));
        }
        // 4. Grant.
        self.connection(connection).probed = None;
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

    /// Takes a token from the peer's bucket, and one from its address's if `address` is given. False: one of them has
    /// none.
    fn take_tokens(&mut self, peer: usize, address: Option<u8>, now: u64) -> bool {
        if self.policy.rate == 0 {
            return true;
        }
        let spacing = MINUTE / self.policy.rate;
        let tokens = |bucket: Option<&(u64, u64)>| match bucket {
            Some((tokens, since)) => (tokens + now - since).min(MINUTE),
            None => MINUTE,
        };
        let own = tokens(self.peer_buckets.get(&peer));
        let all = address.map(|address| tokens(self.address_buckets.get(&address)));
        if own < spacing || all.is_some_and(|tokens| tokens < spacing / 10) {
            return false;
        }
        self.peer_buckets.insert(peer, (own - spacing, now));
        if let (Some(address), Some(tokens)) = (address, all) {
            self.address_buckets.insert(address, (tokens - spacing / 10, now));
        }
        true
    }

    // ---- Events

    pub fn connect(&mut self, id: u32, peer: usize, address: u8, now: u64) {
        self.connections.push(Connection {
            id,
            peer,
            address,
            last_heard: now,
            probed: None,
            unseen: false,
            timed_out: false,
            heard: false,
            closing: false,
        });
    }

    pub fn reserve(&mut self, connection: u32, request: u64, now: u64) {
        let Connection { peer, address, .. } = *self.connection(connection);
        if self.policy.denied == Some(peer) {
            self.answers.push((request, Answer::Denied));
            return;
        }
        let holds = self.slots.iter().any(|s| s.peer == peer && !self.is_over(s, now));
        if !self.take_tokens(peer, (!holds).then_some(address), now) {
            self.answers.push((request, Answer::TooOften));
            return;
        }
        // A peer waits with one request only: the older one is decided first.
        let (older, others) = self.waiting.iter().partition(|w| w.peer == peer);
        self.waiting = others;
        let older: Vec<Waiting> = older;
        for older in older {
            if self.try_reserve(peer, older.connection, older.request, now).is_err() {
                self.answers.push((older.request, Answer::Refused));
            }
        }
        match self.try_reserve(peer, connection, request, now) {
            Ok(()) => return,
            Err(None) => {
                self.answers.push((request, Answer::Refused));
                return;
            }
            Err(Some(_)) => {}
        }
        let from_there = |w: &&Waiting| w.address == address;
        let is_full = self.waiting.iter().filter(from_there).count() >= MOST_WAITING_PER_ADDRESS;
        if self.policy.probe == 0 || is_full {
            self.answers.push((request, Answer::Refused));
            return;
        }
        self.waiting.push(Waiting { peer, connection, address, request, since: None });
    }

    pub fn disconnect(&mut self, id: u32, now: u64) {
        let peer = self.connection(id).peer;
        self.connections.retain(|c| c.id != id);
        self.waiting.retain(|w| w.connection != id);
        self.lose(peer, id, self.usable(peer), Reason::Disconnected, now);
    }

    pub fn delivered(&mut self, peer: usize) {
        for slot in self.slots.iter_mut().filter(|slot| slot.peer == peer) {
            slot.before = None;
        }
    }

    pub fn undelivered(&mut self, peer: usize, request: u64, now: u64) {
        let last = |own: &usize| self.slots[*own].request == request;
        if let Some(own) = self.slot(peer).filter(last) {
            self.undo(own, self.usable(peer), now);
        }
    }

    pub fn release(&mut self, peer: usize) {
        if let Some(own) = self.slot(peer) {
            self.free(own, Reason::Released);
        }
    }

    pub fn configure(&mut self, policy: Policy, now: u64) {
        self.policy = policy;
        self.last_sweep = now;
        let Some(denied) = policy.denied else {
            return;
        };
        if let Some(own) = self.slot(denied) {
            self.free(own, Reason::Denied);
        }
        let (denied_newcomers, others): (Vec<_>, Vec<_>) =
            self.waiting.iter().partition(|w| w.peer == denied);
        self.waiting = others;
        self.answers.extend(denied_newcomers.iter().map(|w| (w.request, Answer::Denied)));
    }

    fn lose(&mut self, peer: usize, gone: u32, up: Vec<u32>, reason: Reason, now: u64) {
        let points_there = |own: &usize| self.slots[*own].state == State::Live(gone);
        let Some(own) = self.slot(peer).filter(points_there) else {
            return;
        };
        match self.slots[own].before {
            Some(_) => self.undo(own, up, now),
            None => self.settle(own, up, reason, now),
        }
    }

    fn settle(&mut self, own: usize, up: Vec<u32>, reason: Reason, now: u64) {
        if let Some(other) = up.last() {
            self.point(own, *other);
        } else if self.policy.grace == 0 {
            self.free(own, reason);
        } else {
            self.graces += 1;
            self.slots[own].state = State::Grace(now, self.graces);
        }
    }

    fn undo(&mut self, own: usize, up: Vec<u32>, now: u64) {
        let Some(before) = self.slots[own].before.take() else {
            return;
        };
        let Some((state, expires)) = before else {
            self.free(own, Reason::Undelivered);
            return;
        };
        self.slots[own].expires = expires;
        match state {
            State::Live(connection) if up.contains(&connection) => self.point(own, connection),
            State::Live(_) => self.settle(own, up, Reason::Disconnected, now),
            State::Grace(..) => self.slots[own].state = state,
        }
    }

    // ---- The sweep

    /// One sweep, which was due at `due`. Where the laws leave open the order in which equally silent peers time out,
    /// `timed_out` has the relay's order.
    pub fn sweep(&mut self, due: u64, timed_out: &[usize], now: u64) {
        let mut timed_out = timed_out.iter().copied();
        if now > due + LATE {
            for connection in &mut self.connections {
                connection.probed = connection.probed.map(|_| now);
            }
            for newcomer in &mut self.waiting {
                newcomer.since = newcomer.since.map(|_| now);
            }
        } else if now > due + TICK {
            for connection in &mut self.connections {
                connection.probed = connection.probed.map(|probed| probed + (now - due));
            }
            for newcomer in &mut self.waiting {
                newcomer.since = newcomer.since.map(|since| since + (now - due));
            }
        }
        self.end_what_is_over(now);
        for connection in &mut self.connections {
            if std::mem::take(&mut connection.unseen) {
                connection.last_heard = now;
                connection.probed = None;
                connection.heard = true;
            }
        }
        self.revive();
        let silent = self.heartbeat_step(now);
        for _ in &silent {
            let peer = timed_out.next().expect("a peer timed out in the relay, too");
            let connection = silent.iter().find(|id| self.connection(**id).peer == peer);
            self.time_out(*connection.expect("the same peer as in the model"), now);
        }
        self.reclaim(&mut timed_out, now);
        assert_eq!(timed_out.next(), None, "no other peer times out");
    }

    /// When the next sweep is due.
    pub fn next_sweep(&self, now: u64) -> u64 {
        match self.waiting.is_empty() {
            true => now + self.policy.sweep,
            false => now + self.policy.sweep.min(TICK),
        }
    }

    /// Law: whatever arrives within grace, over the open connection that a peer timed out on, makes its slot live
    /// again.
    fn revive(&mut self) {
        for slot in self.slots.iter_mut().filter(|s| matches!(s.state, State::Grace(..))) {
            let is_heard_again =
                |c: &&Connection| c.peer == slot.peer && c.timed_out && c.heard && !c.closing;
            if let Some(heard) = self.connections.iter().find(is_heard_again) {
                slot.state = State::Live(heard.id);
            }
        }
    }

    fn watched(&self) -> Vec<Connection> {
        let held = |id| self.slots.iter().any(|slot| slot.state == State::Live(id));
        let watched = self.connections.iter().filter(|c| !c.closing && held(c.id));
        watched.cloned().collect()
    }

    fn heartbeat_step(&mut self, now: u64) -> Vec<u32> {
        let Policy { heartbeat, silence, sweep, .. } = self.policy;
        if heartbeat == 0 {
            return Vec::new();
        }
        let pause = now - std::mem::replace(&mut self.last_sweep, now);
        let watched = self.watched();
        if pause > sweep + heartbeat {
            for connection in watched {
                self.record_activity(connection.id, now);
            }
            return Vec::new();
        }
        let probed: Vec<_> = watched.iter().filter(|c| c.probed.is_some()).collect();
        let silent_for = |c: &Connection, limit| now - c.last_heard >= limit;
        let soon = probed.iter().filter(|c| silent_for(c, silence - heartbeat)).count();
        let could_answer =
            |c: &Connection| c.probed.is_some_and(|at| now - at >= silence - heartbeat);
        let due: Vec<_> = probed
            .iter()
            .filter(|c| silent_for(c, silence) && could_answer(c))
            .map(|c| c.id)
            .collect();
        for connection in watched.iter().filter(|c| c.probed.is_none()) {
            if silent_for(connection, heartbeat) {
                self.probe(connection.id, now);
            }
        }
        match self.deferred_until {
            Some(until) if now < until => return Vec::new(),
            Some(_) if due.is_empty() => self.deferred_until = None,
            None if soon >= 8 && soon * 2 > watched.len() && !due.is_empty() => {
                self.deferred_until = Some(now + silence);
                for connection in due {
                    self.probed.push(connection);
                    self.probe_others(connection, now);
                }
                return Vec::new();
            }
            _ => {}
        }
        due
    }

    fn reclaim(&mut self, timed_out: &mut impl Iterator<Item = usize>, now: u64) {
        // 1. Try again.
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
        // 2. Find the silent peers.
        let Policy { probe, probe_after, silence, .. } = self.policy;
        let mut candidates = self.watched();
        candidates.retain(|c| now - c.last_heard >= probe_after);
        for candidate in &mut candidates {
            candidate.probed = candidate.probed.filter(|probed| now - probed <= silence);
        }
        let addresses: HashMap<usize, u8> =
            self.slots.iter().map(|s| (s.peer, s.address)).collect();
        // 3. For each newcomer choose a peer to evict, refuse, or probe and wait.
        let mut still_waiting = Vec::new();
        for (mut newcomer, cap) in in_need {
            if probe == 0 {
                self.answers.push((newcomer.request, Answer::Refused));
                continue;
            }
            let since = *newcomer.since.get_or_insert(now);
            let under = |c: &Connection| cap.covers(addresses[&c.peer]);
            let due = |c: &&Connection| under(c) && c.probed.is_some_and(|at| now - at >= probe);
            let longest = candidates.iter().filter(due).map(|c| c.last_heard).min();
            if let Some(longest) = longest {
                let peer = timed_out.next().expect("a peer timed out in the relay, too");
                let which = candidates.iter().position(|c| c.peer == peer);
                let chosen = candidates.remove(which.expect("a candidate"));
                assert!(due(&&chosen) && chosen.last_heard == longest, "the longest silent one");
                still_waiting.push((newcomer, Some(chosen.id)));
            } else if now - since >= probe + TICK || !candidates.iter().any(under) {
                self.answers.push((newcomer.request, Answer::Refused));
            } else {
                for candidate in &mut candidates {
                    if under(candidate) && candidate.probed.is_none() {
                        candidate.probed = Some(now);
                        self.probe(candidate.id, now);
                    }
                }
                still_waiting.push((newcomer, None));
            }
        }
        // 4. Evict, and try once more.
        for (newcomer, timed_out) in still_waiting {
            let Waiting { peer, connection, request, .. } = newcomer;
            let room = timed_out.map(|timed_out| {
                self.time_out(timed_out, now);
                self.try_reserve(peer, connection, request, now)
            });
            match room {
                Some(Ok(())) => {}
                Some(Err(None)) => self.answers.push((request, Answer::Refused)),
                Some(Err(Some(_))) | None => self.waiting.push(newcomer),
            }
        }
    }

    fn probe(&mut self, id: u32, now: u64) {
        self.connection(id).probed = Some(now);
        self.probed.push(id);
        self.probe_others(id, now);
    }

    /// Probes the other connections of a peer that is probed, unless that was done before and the answer may still
    /// come.
    fn probe_others(&mut self, id: u32, now: u64) {
        let (peer, silence) = (self.connection(id).peer, self.policy.silence);
        for other in self.connections.iter_mut().filter(|c| c.peer == peer && c.id != id) {
            if !other.closing && other.probed.is_none_or(|probed| now - probed > silence) {
                other.probed = Some(now);
                self.probed.push(other.id);
            }
        }
    }

    pub fn record_activity(&mut self, id: u32, now: u64) {
        let connection = self.connection(id);
        connection.last_heard = now;
        connection.probed = None;
        connection.heard = true;
    }

    fn time_out(&mut self, id: u32, now: u64) {
        let Connection { peer, probed, .. } = *self.connection(id);
        self.record_activity(id, now);
        // It had at least as much time to answer on the connections that were probed no later.
        for connection in self.connections.iter_mut().filter(|c| c.peer == peer) {
            if connection.id == id || connection.probed.is_some_and(|at| Some(at) <= probed) {
                (connection.timed_out, connection.heard) = (true, false);
            }
        }
        let mut up = self.usable(peer);
        up.retain(|other| *other != id);
        self.lose(peer, id, up, Reason::Silent, now);
        if self.policy.close_silent {
            self.connection(id).closing = true;
        }
    }
}
