//! RESERVE, from the request to what became of the slot.

use std::{hash::Hash, time::Instant};

use libp2p::PeerId;

use super::{
    Action, PendingRequest, Relay,
    circuits::End,
    quota::Scope,
    reclaim::{self, Candidate, PendingReservation, Prospect},
    reservations::{Freed, Granted, Left, Receipt},
};
use crate::{
    access::{Permission, Terms},
    event::{Event, Refused},
};

impl<C: Copy + Ord + Hash, R> Relay<C, R> {
    pub(super) fn reserve(&mut self, request: PendingRequest<C, R>, now: Instant) {
        let terms = match self.permit_reserve(&request, now) {
            Ok(terms) => terms,
            Err(reason) => return self.refuse(request, reason),
        };
        let pending = PendingReservation { request, terms, since: None };
        let Err((pending, full)) = self.try_reserve(pending, now) else {
            return;
        };
        // A peer waits once: what it asked before, from another network maybe, is over.
        let End { peer, connection } = pending.request.from;
        for older in self.reclaim.withdraw(|older| older.from.peer == peer) {
            self.refuse(older.request, full.into());
        }
        if let Err(refused) = self.reclaim.wait(&self.config, pending) {
            return self.refuse(refused.request, full.into());
        }
        log::debug!("reservation waits: peer {peer}: {}", Refused::from(full));
        self.connections.waits(connection, now);
        self.hurry(now);
    }

    /// Checks whether the peer may ask at all, before it is asked whether there is a slot.
    fn permit_reserve(
        &mut self,
        request: &PendingRequest<C, R>,
        now: Instant,
    ) -> Result<Terms, Refused> {
        let (peer, origin) = (request.from.peer, &*request.origin);
        if self.is_draining() {
            return Err(Refused::Draining);
        }
        if origin.relayed {
            return Err(Refused::Relayed);
        }
        let Permission::Allow(terms) = self.access().may_reserve(peer, &origin.address) else {
            return Err(Refused::Denied);
        };
        // A peer that holds a slot is stopped by none but itself.
        match self.reservations.holds(&peer, now) {
            true => self.reserve_rates.take_own(peer, now)?,
            false => self.reserve_rates.take(peer, origin.prefix, now)?,
        }
        Ok(terms)
    }

    /// Decides a RESERVE and answers it, unless a peer under a full cap may turn out to be gone: then returns
    /// it, with that cap.
    fn try_reserve(
        &mut self,
        pending: PendingReservation<C, R>,
        now: Instant,
    ) -> Result<(), (PendingReservation<C, R>, Scope)> {
        let (End { peer, connection }, prefix) =
            (pending.request.from, pending.request.origin.prefix);
        let before = self.reservations.connection(&peer);
        let ttl = self.config.ttl(pending.terms);
        let decided = self.reservations.reserve(peer, connection, prefix, ttl, now);
        self.tell_freed(now);
        let Granted { receipt, is_renewal } = match decided {
            Ok(granted) => granted,
            Err(full) => match self.reservations.quota().above(prefix) {
                Some(above) => return Ok(self.refuse(pending.request, above.into())),
                None => return Err((pending, full)),
            },
        };
        self.point(peer, before, now);
        let PendingReservation { request, terms, .. } = pending;
        let address = request.origin.address.clone();
        self.actions.push_back(Action::Grant { request, receipt, terms, expires: now + ttl });
        self.tell(Event::ReservationAccepted { peer, address, renewed: is_renewal });
        Ok(())
    }

    /// Looks for a slot for each newcomer that waits.
    pub(super) fn reclaim(&mut self, now: Instant) {
        let mut waiting = Vec::new();
        for newcomer in self.reclaim.take() {
            if let Err((mut newcomer, full)) = self.try_reserve(newcomer, now) {
                let since = *newcomer.since.get_or_insert(now);
                waiting.push((newcomer, full, now - since));
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
        let caps = waiting.iter().map(|(_, full, waited)| (*full, *waited));
        let (prospects, ask) = reclaim::decide(&self.config, caps, candidates.collect());
        for connection in ask {
            self.connections.asked(connection, now);
            self.probe(connection);
        }
        for ((newcomer, full, _), prospect) in waiting.into_iter().zip(prospects) {
            match prospect {
                Prospect::Refuse => self.refuse(newcomer.request, full.into()),
                Prospect::Wait => self.reclaim.requeue(newcomer),
                Prospect::Evict(connection) => {
                    self.time_out(connection, now);
                    // Unless the peer has another connection, there is room now.
                    if let Err((newcomer, _)) = self.try_reserve(newcomer, now) {
                        self.reclaim.requeue(newcomer);
                    }
                }
            }
        }
    }

    /// The answer of this receipt arrived, or did not.
    pub fn on_delivered(&mut self, peer: PeerId, receipt: Receipt, arrived: bool, now: Instant) {
        if arrived {
            return self.reservations.delivered(&peer);
        }
        let before = self.reservations.connection(&peer);
        let up = self.fit_for_a_slot(peer);
        let left = self.reservations.undelivered(peer, receipt, &up, now);
        self.after_leaving(peer, before, left, now);
    }

    /// There is no answer: the voucher could not be signed.
    pub fn on_sign_failed(
        &mut self,
        request: PendingRequest<C, R>,
        receipt: Receipt,
        now: Instant,
    ) {
        self.on_delivered(request.from.peer, receipt, false, now);
        self.refuse(request, Refused::NotSigned);
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
            self.actions.push_back(Action::Hold(on, holds));
        }
    }

    pub(super) fn tell_freed(&mut self, now: Instant) {
        for Freed { peer, connection, billed_to, reason } in self.reservations.take_freed() {
            if let Some(connection) = connection {
                self.hold(End { peer, connection }, false, now);
            }
            self.tell(Event::ReservationFreed { peer, billed_to, reason });
        }
    }

    pub(super) fn refuse(&mut self, request: PendingRequest<C, R>, reason: Refused) {
        let (peer, address) = (request.from.peer, request.origin.address.clone());
        self.turn_down(request, &reason);
        self.tell(Event::ReservationRefused { peer, address, reason });
    }
}
