//! The table of reservations: admission, renewal, grace, and the end of each.
//!
//! Sans-IO: no clock, no socket. What changes is appended to [`Reservations::changes`]. `C` identifies a connection:
//! the behaviour uses the swarm's `ConnectionId`, tests use numbers.
//!
//! ```text
//!                  granted                       last connection closed
//!       (none) ───────────────▶ Live { connection } ───────────────▶ Grace { since }
//!          ▲                     │   ▲  ▲                              │   │
//!          │      term over      │   └──┴─ RESERVE: renewed ───────────┘   │
//!          └─────────────────────┴── grace over, term over, or taken by a newcomer
//! ```

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    sync::Arc,
    time::{Duration, Instant},
};

use libp2p::PeerId;

use super::{
    connections::End,
    quota::{Quota, Scope},
};
use crate::{address::ClientPrefix, config::Config, event::FreedReason};

/// The number of the disconnect that began a grace. A newcomer takes the slot in grace with the lowest.
type GraceNumber = u64;

/// The reservations of one relay.
pub struct Reservations<C> {
    grace: Duration,
    /// The ids are shared with `queue`: an id takes more memory than everything else that is kept of a slot.
    slots: HashMap<Arc<PeerId>, Reservation<C>>,
    /// The peers in grace under each scope, in the order of their disconnects.
    queue: BTreeMap<(Scope, GraceNumber), Arc<PeerId>>,
    /// How many slots each address and subnet holds.
    pub quota: Quota,
    /// No term or grace ends before this time; `None`: no slot is held.
    next_end: Option<Instant>,
    /// Changes to slots, oldest first, until the caller takes them.
    pub changes: VecDeque<Change<C>>,
    /// The last number that was given to a grace or to a receipt.
    last_number: u64,
}

/// The reservation of one peer.
struct Reservation<C> {
    state: State<C>,
    expires: Instant,
    prefix: Option<ClientPrefix>,
    /// Identifies the last answer.
    receipt: Receipt,
    /// Until when a renewal that waits for its access check keeps the slot.
    kept_until: Option<Instant>,
    /// What to restore if the last answer does not reach the peer; `None` once an answer has reached it.
    undo: Option<Box<Before<C>>>,
}

/// What a peer held before an answer: the state and the end of the term; `None`: no slot.
type Before<C> = Option<(State<C>, Instant)>;

/// Whether a slot is live or in grace.
#[derive(Clone, Copy, Debug)]
enum State<C> {
    /// Circuits reach the peer over this connection: the one it last reserved over or, after that closed, its newest.
    Live { connection: C },
    /// The peer's last connection closed or timed out: the slot counts, but CONNECT does not find it.
    Grace { since: Instant, number: GraceNumber },
}

impl<C> State<C> {
    fn connection(self) -> Option<C> {
        if let Self::Live { connection } = self { Some(connection) } else { None }
    }
}

/// The state of a peer's slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slot<C> {
    /// The connection that the reservation points at; `None` in grace.
    pub connection: Option<C>,
    /// The prefix that it counts towards.
    pub prefix: Option<ClientPrefix>,
    /// When it becomes free without a renewal: at the end of its term, or of its grace. From then on it is void,
    /// whether or not the sweep has removed it.
    pub ends: Instant,
}

impl<C> Slot<C> {
    /// The connection over which circuits reach the peer; `None` in grace, and once the slot is void.
    pub fn live(self, now: Instant) -> Option<C> {
        self.connection.filter(|_| now < self.ends)
    }
}

/// Identifies the answer that grants or renews a reservation, to report later whether it reached the peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Receipt(u64);

/// A change to a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Change<C> {
    /// The peer.
    pub peer: PeerId,
    /// The connection that it points at now; `None`: grace began, or the slot is free.
    pub to: Option<C>,
    /// If the slot is free: why, and the prefix that it counted towards.
    pub freed: Option<(FreedReason, Option<ClientPrefix>)>,
}

impl<C: Copy + Eq> Reservations<C> {
    /// An empty table.
    pub fn new(config: &Config) -> Self {
        Self {
            grace: config.grace,
            slots: HashMap::new(),
            queue: BTreeMap::new(),
            quota: Quota::new(config.slot_caps()),
            next_end: None,
            changes: VecDeque::new(),
            last_number: 0,
        }
    }

    /// Replaces the caps and the grace. Frees no slot, and keeps granted terms.
    pub fn configure(&mut self, config: &Config, now: Instant) {
        self.grace = config.grace;
        self.quota.caps = config.slot_caps();
        self.next_end = Some(now); // a shorter grace may be over already
    }

    /// How many slots are taken, those in grace included.
    pub fn taken(&self) -> usize {
        self.slots.len()
    }

    /// How many slots are in grace.
    pub fn in_grace(&self) -> usize {
        self.peers_in_grace().count()
    }

    /// The peers whose slots are in grace, in the order of their disconnects.
    pub fn peers_in_grace(&self) -> impl Iterator<Item = &PeerId> {
        self.queue.range((Scope::Total, 0)..).map(|(_, peer)| &**peer)
    }

    /// The slot of `peer`. It may be void: ended, and not removed yet.
    pub fn get(&self, peer: &PeerId) -> Option<Slot<C>> {
        let reservation = self.slots.get(peer)?;
        let (connection, ends) = (reservation.state.connection(), self.end(reservation).0);
        Some(Slot { connection, prefix: reservation.prefix, ends })
    }

    /// All peers that hold a slot, with their slots, in no order. A slot may be void.
    pub fn iter(&self) -> impl Iterator<Item = (PeerId, Slot<C>)> {
        self.slots.keys().filter_map(|peer| Some((**peer, self.get(peer)?)))
    }

    /// Decides a RESERVE of `peer` over `connection` for a term of `ttl`; the slot counts towards `prefix`. Returns the
    /// receipt of the answer, and whether the peer already held the slot.
    ///
    /// # Errors
    ///
    /// The full cap. The newcomer can get a slot only if a peer under that cap turns out to be gone, and not even then
    /// if more slots are held than a cap allows ([`Quota::above`]).
    pub fn reserve(
        &mut self,
        peer: PeerId,
        connection: C,
        prefix: Option<ClientPrefix>,
        ttl: Duration,
        now: Instant,
    ) -> Result<(Receipt, bool), Scope> {
        // 1. Free what has ended and the sweep has not removed yet: this peer's slot and, if a cap is full, all others.
        // That is a pass over the table only if one may have ended: a full table does not cost a pass for each request.
        let ended = self.slots.get(&peer).map(|slot| self.end(slot)).filter(|(end, _)| *end <= now);
        if let Some((_, reason)) = ended {
            self.free(peer, reason);
        }
        let is_renewal = self.slots.contains_key(&peer);
        let mut full = self.quota.full(prefix);
        if full.is_some() {
            self.end_what_is_over(now);
            full = self.quota.full(prefix);
        }
        // 2. If a cap is full, take the oldest slot in grace under it for the newcomer. `full` is the narrowest full
        // cap, so that slot makes room under the wider ones, too. Where one slot would not be enough, none is taken.
        if let Some(full) = full.filter(|_| !is_renewal) {
            if self.quota.above(prefix).is_some() {
                return Err(full);
            }
            let mut under_cap = self.queue.range((full, 0)..=(full, GraceNumber::MAX));
            let is_kept = |id| self.slots.get(id).is_some_and(|slot| slot.kept_until > Some(now));
            let (_, oldest) = under_cap.find(|(_, id)| !is_kept(*id)).ok_or(full)?;
            self.free(**oldest, FreedReason::TakenBy { peer });
        }
        // 3. Renew or grant.
        self.last_number += 1;
        let (receipt, expires) = (Receipt(self.last_number), now + ttl);
        let next_end = self.next_end.get_or_insert(expires);
        *next_end = expires.min(*next_end);
        let state = State::Live { connection };
        let before = self.set_state(peer, state);
        if let (Some(before), Some(slot)) = (before, self.slots.get_mut(&peer)) {
            // If several answers in a row are lost, what the peer held before the first of them is restored.
            let before = (before, std::mem::replace(&mut slot.expires, expires));
            slot.undo.get_or_insert_with(|| Box::new(Some(before)));
            (slot.receipt, slot.kept_until) = (receipt, None);
            // If the new prefix has no room, the slot goes on counting towards the old one.
            if self.quota.move_unit(slot.prefix, prefix) {
                slot.prefix = prefix;
            }
        } else {
            let (kept_until, undo) = (None, Some(Box::new(None)));
            let reservation = Reservation { state, expires, prefix, receipt, kept_until, undo };
            self.slots.insert(Arc::new(peer), reservation);
            self.quota.add(prefix);
            self.changes.push_back(Change { peer, to: Some(connection), freed: None });
        }
        Ok((receipt, is_renewal))
    }

    /// Keeps `peer`'s slot until then, whatever its state, for a renewal that waits for its access check.
    ///
    /// Does so once a term: otherwise a peer whose renewals are denied could hold its slot for ever.
    pub fn keep(&mut self, peer: &PeerId, until: Instant) {
        if let Some(reservation) = self.slots.get_mut(peer) {
            reservation.kept_until.get_or_insert(until);
        }
    }

    /// Confirms the last grant or renewal, because an answer reached the peer.
    ///
    /// It need not be the last answer: a peer that has read any OK relies on its slot.
    pub fn confirm(&mut self, peer: &PeerId) {
        if let Some(reservation) = self.slots.get_mut(peer) {
            reservation.undo = None;
        }
    }

    /// Undoes the grant or renewal with this receipt, whose answer did not reach the peer: frees the slot, or restores
    /// what the peer held before. Does nothing if there was a later one. `up` are the connections that the slot may
    /// move to, oldest first.
    pub fn on_undelivered(&mut self, peer: PeerId, receipt: Receipt, up: &[C], now: Instant) {
        if self.slots.get(&peer).is_some_and(|reservation| reservation.receipt == receipt) {
            self.undo(peer, up, now);
        }
    }

    /// Handles a connection that closed or timed out; `up` are the others that the slot may move to, oldest first.
    ///
    /// Nothing changes unless the slot points at the one that is gone. `reason` is why it is freed without grace.
    pub fn on_disconnected(&mut self, gone: End<C>, up: &[C], reason: FreedReason, now: Instant) {
        let End { peer, connection } = gone;
        let held_over = self.slots.get(&peer).and_then(|slot| slot.state.connection());
        // An answer that is being sent over that connection will not arrive: undo what it grants.
        if held_over == Some(connection) && !self.undo(peer, up, now) {
            self.settle(peer, up, reason, now);
        }
    }

    /// Makes the slot of a peer in grace live again. It points at this connection.
    pub fn revive(&mut self, over: End<C>) {
        self.set_state(over.peer, State::Live { connection: over.connection });
    }

    /// Frees the slots whose term or grace has ended. This is a pass over the table, unless none can have ended.
    pub fn end_what_is_over(&mut self, now: Instant) {
        if self.next_end.is_none_or(|end| end > now) {
            return;
        }
        let mut over = Vec::new();
        self.next_end = None;
        for (peer, reservation) in &self.slots {
            let (end, reason) = self.end(reservation);
            if end <= now {
                over.push((**peer, reason));
            } else {
                self.next_end = Some(self.next_end.map_or(end, |next| next.min(end)));
            }
        }
        over.into_iter().for_each(|(peer, reason)| _ = self.free(peer, reason));
    }

    /// Restores what the peer held before the answers that have not reached it; returns whether there are any.
    fn undo(&mut self, peer: PeerId, up: &[C], now: Instant) -> bool {
        let Some(reservation) = self.slots.get_mut(&peer) else { return false };
        let Some(before) = reservation.undo.take() else { return false };
        if let Some((state, expires)) = *before {
            reservation.expires = expires;
            self.next_end = self.next_end.map(|next| next.min(expires));
            if state.connection().is_some_and(|over| !up.contains(&over)) {
                self.settle(peer, up, FreedReason::Disconnected, now);
            } else {
                self.set_state(peer, state);
            }
        } else {
            self.free(peer, FreedReason::Undelivered);
        }
        true
    }

    /// Moves a slot whose connection is gone to the newest of `up`; if there is none, begins the grace. Where grace is
    /// switched off, frees the slot for the reason `without_grace`.
    fn settle(&mut self, peer: PeerId, up: &[C], without_grace: FreedReason, now: Instant) {
        if let Some(&connection) = up.last() {
            self.set_state(peer, State::Live { connection });
        } else if self.grace.is_zero() {
            self.free(peer, without_grace);
        } else {
            self.last_number += 1;
            self.set_state(peer, State::Grace { since: now, number: self.last_number });
        }
    }

    /// Replaces the state of `peer`'s slot; returns what it was, if there is a slot.
    fn set_state(&mut self, peer: PeerId, state: State<C>) -> Option<State<C>> {
        let reservation = self.slots.get_mut(&peer)?;
        let before = std::mem::replace(&mut reservation.state, state);
        let prefix = reservation.prefix;
        self.leave_queue(before, prefix);
        if let State::Grace { since, number } = state
            && let Some((id, _)) = self.slots.get_key_value(&peer)
        {
            self.queue.extend(Scope::of(prefix).map(|scope| ((scope, number), Arc::clone(id))));
            self.next_end = self.next_end.map(|next| next.min(since + self.grace));
        }
        let to = state.connection();
        if before.connection() != to {
            self.changes.push_back(Change { peer, to, freed: None });
        }
        Some(before)
    }

    /// Frees the slot of `peer`, whatever its state; returns whether there was one. No slot is freed in another way.
    pub fn free(&mut self, peer: PeerId, reason: FreedReason) -> bool {
        let Some(slot) = self.slots.remove(&peer) else { return false };
        self.leave_queue(slot.state, slot.prefix);
        self.quota.remove(slot.prefix);
        self.changes.push_back(Change { peer, to: None, freed: Some((reason, slot.prefix)) });
        true
    }

    /// Removes a slot that was in this state from the queue, if that state is a grace.
    fn leave_queue(&mut self, state: State<C>, prefix: Option<ClientPrefix>) {
        if let State::Grace { number, .. } = state {
            for scope in Scope::of(prefix) {
                self.queue.remove(&(scope, number));
            }
        }
    }

    /// When the slot becomes free without a renewal, and why.
    fn end(&self, reservation: &Reservation<C>) -> (Instant, FreedReason) {
        let (end, reason) = match reservation.state {
            State::Grace { since, .. } if since + self.grace < reservation.expires => {
                (since + self.grace, FreedReason::GraceOver)
            }
            _ => (reservation.expires, FreedReason::Expired),
        };
        (reservation.kept_until.map_or(end, |kept| kept.max(end)), reason)
    }
}
