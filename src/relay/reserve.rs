//! RESERVE, from the request to what became of the slot.

use std::{hash::Hash, io, time::Instant};

use libp2p::PeerId;

use super::{
    Command, Grant, Newcomer, Order, Relay, RequestId,
    circuits::End,
    quota::Scope,
    reclaim::{Candidate, Prospect},
    reservations::{Admission, Left, Receipt},
};
use crate::{
    access::Permission,
    event::{Event, Refused},
};

impl<C: Copy + Ord + Hash, S> Relay<C, S> {
    pub(super) fn reserve(&mut self, from: End<C>, request: RequestId, now: Instant) {
        let Some(connection) = self.connections.get(from.connection) else {
            return;
        };
        if connection.remote.relayed {
            self.refuse(from, request, Refused::Relayed);
            return;
        }
        let billed_to = connection.billed_to();
        let Permission::Allow(terms) = self.may_reserve(from) else {
            self.refuse(from, request, Refused::Denied);
            return;
        };
        // Who holds a slot is stopped by nobody but itself.
        let paid = match self.reservations.holds(&from.peer, now) {
            true => self.reserve_rates.take_own(from.peer, now),
            false => self.reserve_rates.take(from.peer, billed_to, now),
        };
        if let Err(spent) = paid {
            self.refuse(from, request, spent.into());
            return;
        }
        let newcomer = Newcomer { from, request, terms };
        let Err(full) = self.try_reserve(newcomer, now) else {
            return;
        };
        // A peer waits once: what it asked before, from another network maybe, is over.
        for older in self.reclaim.withdraw(|older| older.from.peer == from.peer) {
            self.refuse(older.from, older.request, full.into());
        }
        if !self.reclaim.wait(newcomer, billed_to) {
            self.refuse(from, request, full.into());
            return;
        }
        log::debug!("reservation waits: peer {}: {}", from.peer, Refused::from(full));
        self.connections.waits(from.connection, now);
        self.hurry(now);
    }

    /// Decides a RESERVE and answers it, unless somebody under a full cap may turn out to be gone.
    fn try_reserve(&mut self, newcomer: Newcomer<C>, now: Instant) -> Result<(), Scope> {
        let Newcomer { from, request, terms } = newcomer;
        let Some(connection) = self.connections.get(from.connection) else {
            return Ok(()); // nobody to answer
        };
        let (peer, address) = (from.peer, connection.remote.address.clone());
        let before = self.reservations.connection(&peer);
        let billed_to = connection.billed_to();
        let ttl = self.config.ttl(terms);
        let admission = self.reservations.reserve(peer, from.connection, billed_to, ttl, now);
        self.tell_freed(now);
        let (receipt, renewed) = match admission {
            Admission::Refused(full) => return Err(full),
            Admission::Over(full) => {
                self.refuse(from, request, full.into());
                return Ok(());
            }
            Admission::Granted(receipt) => (receipt, false),
            Admission::Renewed(receipt) => (receipt, true),
        };
        self.point(peer, before, now);
        let grant = Grant { to: from, request, receipt, terms, expires: now + ttl };
        self.orders.push_back(Order::Grant(grant));
        self.tell(Event::ReservationAccepted { peer, address, renewed });
        Ok(())
    }

    /// Looks for a slot for each newcomer that waits.
    pub(super) fn reclaim(&mut self, now: Instant) {
        let mut waiting = Vec::new();
        for newcomer in self.reclaim.take() {
            if let Err(full) = self.try_reserve(newcomer.newcomer, now) {
                waiting.push((newcomer, full));
            }
        }
        if waiting.is_empty() {
            return;
        }
        let silent = self.connections.silent(self.config.probe_after, now);
        let candidates = silent.map(|(connection, peer, pulse)| Candidate {
            connection,
            billed_to: self.reservations.bill_of(&peer),
            silent_for: pulse.silent_for(now),
            asked_for: pulse.asked_for(now),
        });
        let caps = waiting.iter_mut().map(|(who, full)| {
            let since = *who.since.get_or_insert(now);
            (*full, now - since)
        });
        let (prospects, ask) = self.reclaim.decide(caps, candidates.collect());
        for connection in ask {
            self.connections.asked(connection, now);
            self.ask_for_sign(connection);
        }
        for ((waiting, full), prospect) in waiting.into_iter().zip(prospects) {
            let Newcomer { from, request, .. } = waiting.newcomer;
            match prospect {
                Prospect::Refuse => self.refuse(from, request, full.into()),
                Prospect::Wait => self.reclaim.wait_on(waiting),
                Prospect::Judge(connection) => {
                    self.silent(connection, now);
                    // Unless the peer has another connection, there is room now.
                    if self.try_reserve(waiting.newcomer, now).is_err() {
                        self.reclaim.wait_on(waiting);
                    }
                }
            }
        }
    }

    /// Whether the answer of this receipt arrived.
    pub fn answered(
        &mut self,
        peer: PeerId,
        receipt: Receipt,
        arrived: Result<(), io::ErrorKind>,
        now: Instant,
    ) {
        match arrived {
            Ok(()) => self.reservations.delivered(&peer),
            Err(_) => self.undelivered(peer, receipt, now),
        }
    }

    /// There is no answer: the voucher could not be signed.
    pub fn not_signed(&mut self, grant: Grant<C>, now: Instant) {
        self.undelivered(grant.to.peer, grant.receipt, now);
        self.refuse(grant.to, grant.request, Refused::NotSigned);
    }

    fn undelivered(&mut self, peer: PeerId, receipt: Receipt, now: Instant) {
        let before = self.reservations.connection(&peer);
        let up = self.fit_for_a_slot(peer);
        let left = self.reservations.undelivered(peer, receipt, &up, now);
        self.after_leaving(peer, before, left, now);
    }

    pub(super) fn after_leaving(
        &mut self,
        peer: PeerId,
        before: Option<C>,
        left: Left<C>,
        now: Instant,
    ) {
        self.tell_freed(now);
        self.point(peer, before, now);
        if left == Left::Grace {
            self.tell(Event::GraceBegan { peer });
        }
    }

    /// Keeps the connection that `peer`'s reservation points at now, and no longer the one before.
    fn point(&mut self, peer: PeerId, before: Option<C>, now: Instant) {
        let after = self.reservations.connection(&peer);
        if let Some(connection) = before.filter(|_| before != after) {
            self.hold(End { peer, connection }, false, now);
            if after.is_some() {
                log::debug!("slot moved to another connection: peer {peer}");
            }
        }
        if let Some(connection) = after {
            self.hold(End { peer, connection }, true, now);
        }
    }

    fn hold(&mut self, on: End<C>, holds: bool, now: Instant) {
        if self.connections.hold_reservation(on.connection, holds, now) {
            self.command(on, Command::Hold(holds));
        }
    }

    pub(super) fn tell_freed(&mut self, now: Instant) {
        for freed in self.reservations.take_freed() {
            if let Some(connection) = freed.connection {
                let peer = freed.peer;
                self.hold(End { peer, connection }, false, now);
            }
            self.tell(Event::ReservationFreed {
                peer: freed.peer,
                billed_to: freed.billed_to,
                reason: freed.reason,
            });
        }
    }

    pub(super) fn refuse(&mut self, from: End<C>, request: RequestId, reason: Refused) {
        let Some(connection) = self.connections.get(from.connection) else {
            return; // nobody to answer
        };
        let address = connection.remote.address.clone();
        self.turn_down(from, request, &reason);
        self.tell(Event::ReservationRefused { peer: from.peer, address, reason });
    }
}
