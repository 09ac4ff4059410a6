//! The table of reservations: admission, renewal, grace, and the end of each.
//!
//! Sans-IO: no I/O, no clock, no swarm. Every method takes `now`, and whatever is decided comes back
//! as a value. `C` names a connection; the behaviour uses the swarm's `ConnectionId`, tests use
//! numbers.
//!
//! ```text
//!                  granted                       last connection lost
//!       (none) ───────────────▶ Live { connection } ───────────────▶ Grace { since }
//!          ▲                     │   ▲  ▲                              │   │
//!          │      term over      │   └──┴─ RESERVE: renewed ───────────┘   │
//!          └─────────────────────┴── grace over, term over, or taken by a newcomer
//! ```

use std::{
    collections::{HashMap, VecDeque},
    sync::Arc,
    time::{Duration, Instant},
};

use libp2p::PeerId;

use super::quota::{Caps, Queue, Quota, Scope};
use crate::{address::ClientPrefix, config::Config, event::FreedReason};

/// The how-manieth departure it was: the order in which slots in grace are taken.
type Departure = u64;

/// The reservations of one relay.
#[derive(Debug)]
pub struct Reservations<C> {
    grace: Duration,
    /// The ids are shared with `left`: each is larger than all else that is kept of a slot.
    slots: HashMap<Arc<PeerId>, Reservation<C>>,
    /// Who is in grace, in the order in which they left.
    left: Queue<Arc<PeerId>>,
    quota: Quota,
    /// Before this, no term and no grace ends: nobody has to look for one.
    next_end: Option<Instant>,
    /// Changes to slots, oldest first, until [`Reservations::next_change`] takes them.
    changes: VecDeque<Change<C>>,
    departures: u64,
    receipts: u64,
}

/// One peer's hold on a slot.
#[derive(Debug)]
struct Reservation<C> {
    state: State<C>,
    expires: Instant,
    billed_to: Option<ClientPrefix>,
    receipt: Receipt,
    /// What to go back to if the last answer does not reach the peer; `None` once one did.
    undo: Option<Box<Undo<C>>>,
}

#[derive(Clone, Copy, Debug)]
enum State<C> {
    /// The peer can be reached over this connection, the one it last reserved over.
    Live { connection: C },
    /// Its last connection is gone: the slot counts, but is void on the wire.
    Grace { since: Instant, departure: Departure },
}

impl<C> State<C> {
    fn connection(self) -> Option<C> {
        match self {
            Self::Live { connection } => Some(connection),
            Self::Grace { .. } => None,
        }
    }
}

#[derive(Debug)]
enum Undo<C> {
    Free,
    Restore { state: State<C>, expires: Instant },
}

/// Names one grant or renewal, to say later whether its answer reached the peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Receipt(u64);

/// A slot that was granted or renewed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Granted {
    /// Names the answer.
    pub receipt: Receipt,
    /// Whether the peer held the slot already, and keeps it for a new term.
    pub is_renewal: bool,
}

/// A change to a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change<C> {
    /// The reservation points at another connection of the peer.
    Moved {
        /// The peer.
        peer: PeerId,
        /// `None`: it was granted, or had been in grace.
        from: Option<C>,
        /// `None`: the peer has no connection any more, and its grace began.
        to: Option<C>,
    },
    /// It came back.
    Freed {
        /// The peer that held it.
        peer: PeerId,
        /// The connection it was live on.
        connection: Option<C>,
        /// The address it was billed to.
        billed_to: Option<ClientPrefix>,
        /// Why it came back.
        reason: FreedReason,
    },
}

impl<C: Copy + Eq> Reservations<C> {
    /// An empty table.
    pub fn new(config: &Config) -> Self {
        Self {
            grace: config.grace,
            slots: HashMap::new(),
            left: Queue::new(),
            quota: Quota::new(caps(config)),
            next_end: None,
            changes: VecDeque::new(),
            departures: 0,
            receipts: 0,
        }
    }

    /// This configuration holds from now on. No slot is freed for it; terms that were granted stay.
    pub fn configure(&mut self, config: &Config, now: Instant) {
        self.grace = config.grace;
        self.quota.set_caps(caps(config));
        // A shorter grace may be over already.
        self.ends_no_later_than(now);
    }

    /// How many slots are taken, those in grace included.
    pub fn taken(&self) -> usize {
        self.slots.len()
    }

    /// How many slots are in grace.
    pub fn in_grace(&self) -> usize {
        self.left.len()
    }

    /// What each address and subnet holds.
    pub fn quota(&self) -> &Quota {
        &self.quota
    }

    /// The connection over which `peer` can be reached; `None` without a live reservation.
    ///
    /// A term that is over is over, whether or not the sweep has been by.
    pub fn live(&self, peer: &PeerId, now: Instant) -> Option<C> {
        let in_term = now < self.slots.get(peer)?.expires;
        self.connection(peer).filter(|_| in_term)
    }

    /// The connection that `peer`'s reservation points at, its term over or not.
    pub fn connection(&self, peer: &PeerId) -> Option<C> {
        self.slots.get(peer)?.state.connection()
    }

    /// The address that `peer`'s slot is billed to.
    pub fn bill_of(&self, peer: &PeerId) -> Option<ClientPrefix> {
        self.slots.get(peer)?.billed_to
    }

    /// When `peer`'s term ends, if it holds a slot.
    pub fn expires(&self, peer: &PeerId) -> Option<Instant> {
        self.slots.get(peer).map(|reservation| reservation.expires)
    }

    /// When `peer`'s slot comes back by itself: at the end of its term, or of its grace.
    pub fn ends(&self, peer: &PeerId) -> Option<Instant> {
        self.slots.get(peer).map(|reservation| self.end(reservation))
    }

    /// Who holds a slot, in no order.
    pub fn holders(&self) -> impl Iterator<Item = PeerId> {
        self.slots.keys().map(|peer| **peer)
    }

    /// Whether `peer` has a slot at `now`, live or in grace: whether a RESERVE by it would be a
    /// renewal.
    pub fn holds(&self, peer: &PeerId, now: Instant) -> bool {
        let reservation = self.slots.get(peer);
        reservation.is_some_and(|reservation| self.ended(reservation, now).is_none())
    }

    /// Decides a RESERVE by `peer`, which came over `connection`, is billed to an address, and
    /// would hold for `ttl`.
    ///
    /// # Errors
    ///
    /// The cap that leaves no room: there is a slot only if a peer under it turns out to be gone, and not even
    /// then if more are held than it allows ([`Quota::above`]).
    pub fn reserve(
        &mut self,
        peer: PeerId,
        connection: C,
        billed_to: Option<ClientPrefix>,
        ttl: Duration,
        now: Instant,
    ) -> Result<Granted, Scope> {
        let expires = now + ttl;
        if let Some(reason) = self.slots.get(&peer).and_then(|r| self.ended(r, now)) {
            self.free(peer, reason);
        }
        // What is over is in nobody's way, even before the sweep. Each such pass is paid for by an
        // end that has come: a full table does not cost a pass a request.
        if self.quota.full(billed_to).is_some() {
            self.end_what_is_over(now);
        }
        let is_renewal = self.slots.contains_key(&peer);
        if !is_renewal {
            self.make_room(peer, billed_to)?;
        }
        self.receipts += 1;
        let receipt = Receipt(self.receipts);
        self.ends_no_later_than(expires);
        if is_renewal {
            self.renew(peer, connection, billed_to, expires, receipt);
        } else {
            let state = State::Live { connection };
            let undo = Some(Box::new(Undo::Free));
            let reservation = Reservation { state, expires, billed_to, receipt, undo };
            self.slots.insert(Arc::new(peer), reservation);
            self.quota.add(billed_to);
            self.changes.push_back(Change::Moved { peer, from: None, to: Some(connection) });
        }
        Ok(Granted { receipt, is_renewal })
    }

    /// An answer reached the peer: what it says now holds.
    ///
    /// Any answer to the reservation's peer confirms it: who has read one OK relies on the slot.
    pub fn delivered(&mut self, peer: &PeerId) {
        if let Some(reservation) = self.slots.get_mut(peer) {
            reservation.undo = None;
        }
    }

    /// The answer that this receipt stands for did not reach the peer: a new grant is freed, a
    /// renewal undone. `up` are the peer's connections, oldest first.
    pub fn undelivered(&mut self, peer: PeerId, receipt: Receipt, up: &[C], now: Instant) {
        if self.slots.get(&peer).is_some_and(|reservation| reservation.receipt == receipt) {
            self.undo(peer, up, now);
        }
    }

    /// A connection of `peer` is gone, or timed out; `up` are those that remain, oldest first.
    ///
    /// Unless the reservation points at the one that is gone, nothing happens to it. `reason` is why the slot
    /// comes back if there is no grace.
    pub fn disconnected(
        &mut self,
        peer: PeerId,
        gone: C,
        up: &[C],
        reason: FreedReason,
        now: Instant,
    ) {
        match self.slots.get(&peer) {
            Some(reservation) if reservation.state.connection() != Some(gone) => {}
            // An answer on its way over that connection will not arrive any more.
            Some(reservation) if reservation.undo.is_some() => self.undo(peer, up, now),
            Some(_) => self.settle(peer, up, reason, now),
            None => {}
        }
    }

    /// Gives up `peer`'s slot, whatever state it is in. Whether there was one.
    pub fn release(&mut self, peer: PeerId) -> bool {
        self.free(peer, FreedReason::Released)
    }

    /// Ends what is over at `now`: terms and graces. One pass over the table, if any can be.
    pub fn end_what_is_over(&mut self, now: Instant) {
        if self.next_end.is_none_or(|end| end > now) {
            return;
        }
        let mut over = Vec::new();
        let mut next_end: Option<Instant> = None;
        for (peer, reservation) in &self.slots {
            if let Some(reason) = self.ended(reservation, now) {
                over.push((**peer, reason));
                continue;
            }
            let end = self.end(reservation);
            next_end = Some(next_end.map_or(end, |next| next.min(end)));
        }
        self.next_end = next_end;
        for (peer, reason) in over {
            self.free(peer, reason);
        }
    }

    /// Takes out the oldest change that was not taken out yet.
    pub fn next_change(&mut self) -> Option<Change<C>> {
        self.changes.pop_front()
    }

    fn renew(
        &mut self,
        peer: PeerId,
        connection: C,
        billed_to: Option<ClientPrefix>,
        expires: Instant,
        receipt: Receipt,
    ) {
        self.move_bill(peer, billed_to);
        let Some(reservation) = self.slots.get_mut(&peer) else {
            return; // the caller saw it there
        };
        // Answers in a row that were all lost go back to before the first of them.
        let Reservation { state, expires: before, .. } = *reservation;
        let undo = || Box::new(Undo::Restore { state, expires: before });
        reservation.undo.get_or_insert_with(undo);
        reservation.expires = expires;
        reservation.receipt = receipt;
        self.set_state(peer, State::Live { connection });
    }

    /// Makes sure that one more slot fits under each cap, taking one in grace where it must.
    fn make_room(
        &mut self,
        newcomer: PeerId,
        billed_to: Option<ClientPrefix>,
    ) -> Result<(), Scope> {
        // A slot taken under the narrowest cap makes room under the wider ones as well.
        let Some(full) = self.quota.full(billed_to) else {
            return Ok(());
        };
        // Where one would not be enough, nobody loses its claim for nothing.
        if self.quota.above(billed_to).is_some() {
            return Err(full);
        }
        let holder = **self.left.first(full).ok_or(full)?;
        self.free(holder, FreedReason::TakenBy { peer: newcomer });
        Ok(())
    }

    /// Bills a slot to another address if there is room there; else it stays where it is.
    fn move_bill(&mut self, peer: PeerId, to: Option<ClientPrefix>) {
        let Some(reservation) = self.slots.get_mut(&peer) else {
            return;
        };
        let from = reservation.billed_to;
        if from == to || !self.quota.could_move(from, to) {
            return;
        }
        reservation.billed_to = to;
        if let State::Grace { departure, .. } = reservation.state
            && let Some(id) = self.left.remove(departure)
        {
            self.left.insert(departure, id, to);
        }
        self.quota.remove(from);
        self.quota.add(to);
    }

    /// Goes back to what held before the answers that never arrived.
    fn undo(&mut self, peer: PeerId, up: &[C], now: Instant) {
        let Some(reservation) = self.slots.get_mut(&peer) else {
            return;
        };
        match reservation.undo.take().map(|undo| *undo) {
            None => {}
            Some(Undo::Free) => _ = self.free(peer, FreedReason::Undelivered),
            Some(Undo::Restore { state, expires }) => {
                reservation.expires = expires;
                self.ends_no_later_than(expires);
                match state.connection() {
                    Some(gone) if !up.contains(&gone) => {
                        self.settle(peer, up, FreedReason::Disconnected, now);
                    }
                    _ => self.set_state(peer, state),
                }
            }
        }
    }

    /// The connection that the reservation points at is gone: another takes over, or grace begins.
    fn settle(&mut self, peer: PeerId, up: &[C], without_grace: FreedReason, now: Instant) {
        if let Some(&connection) = up.last() {
            self.set_state(peer, State::Live { connection });
        } else if self.grace.is_zero() {
            self.free(peer, without_grace);
        } else {
            self.departures += 1;
            self.set_state(peer, State::Grace { since: now, departure: self.departures });
        }
    }

    fn set_state(&mut self, peer: PeerId, state: State<C>) {
        let Some(reservation) = self.slots.get_mut(&peer) else {
            return;
        };
        let before = std::mem::replace(&mut reservation.state, state);
        let billed_to = reservation.billed_to;
        if let State::Grace { departure, .. } = before {
            self.left.remove(departure);
        }
        if let State::Grace { since, departure } = state
            && let Some((id, _)) = self.slots.get_key_value(&peer)
        {
            self.left.insert(departure, Arc::clone(id), billed_to);
            self.ends_no_later_than(since + self.grace);
        }
        let (from, to) = (before.connection(), state.connection());
        if from != to {
            self.changes.push_back(Change::Moved { peer, from, to });
        }
    }

    /// The one way in which a slot comes back.
    pub(super) fn free(&mut self, peer: PeerId, reason: FreedReason) -> bool {
        let Some(reservation) = self.slots.remove(&peer) else {
            return false;
        };
        if let State::Grace { departure, .. } = reservation.state {
            self.left.remove(departure);
        }
        let Reservation { state, billed_to, .. } = reservation;
        self.quota.remove(billed_to);
        self.changes.push_back(Change::Freed {
            peer,
            connection: state.connection(),
            billed_to,
            reason,
        });
        true
    }

    /// When the slot comes back if nothing happens, and why.
    fn end(&self, reservation: &Reservation<C>) -> Instant {
        match reservation.state {
            State::Live { .. } => reservation.expires,
            State::Grace { since, .. } => reservation.expires.min(since + self.grace),
        }
    }

    fn ended(&self, reservation: &Reservation<C>, now: Instant) -> Option<FreedReason> {
        if reservation.expires <= now {
            return Some(FreedReason::Expired);
        }
        (self.end(reservation) <= now).then_some(FreedReason::GraceOver)
    }

    fn ends_no_later_than(&mut self, end: Instant) {
        self.next_end = Some(self.next_end.map_or(end, |next| next.min(end)));
    }
}

fn caps(config: &Config) -> Caps {
    Caps {
        total: Some(config.max_reservations),
        per_subnet: config.reservations_per_subnet(),
        per_address: config.reservations_per_ip(),
    }
}
