//! RESERVE, from the request to what became of the slot.

use std::{hash::Hash, time::Instant};

use libp2p::PeerId;

use super::{
    Action, Pending, Relay,
    circuits::End,
    quota::Scope,
    reclaim::{self, Candidate, PendingReservation, Prospect},
    reservations::{Change, Granted, Receipt},
};
use crate::{
    access::{Permission, Terms},
    event::{Event, Refused},
};

impl<C: Copy + Ord + Hash, R> Relay<C, R> {
    pub(super) fn reserve(&mut self, request: Pending<C, R>, now: Instant) {
        let terms = match self.permit_reserve(&request, now) {
            Ok(terms) => terms,
            Err(reason) => return self.refuse(request, reason),
        };
        let pending = PendingReservation { request, terms, since: None };
        let Some((pending, full)) = self.try_reserve(pending, now) else {
            return;
        };
        // A peer waits once: what it asked before, from another network maybe, is over.
        let End { peer, connection } = pending.request.from;
        for older in self.reclaim.withdraw(|older| older.from.peer == peer) {
            self.refuse(older.request, full.into());
        }
        if let Some(refused) = self.reclaim.wait(&self.config, pending) {
            return self.refuse(refused.request, full.into());
        }
        log::debug!("reservation waits: peer {peer}: {}", Refused::from(full));
        if let Some(up) = self.connections.get_mut(connection) {
            up.idle_since = now; // until now it was not
        }
        self.hurry(now);
    }

    /// Checks everything but whether there is a slot; returns the terms of a grant.
    fn permit_reserve(&mut self, request: &Pending<C, R>, now: Instant) -> Result<Terms, Refused> {
        let (peer, origin) = (request.from.peer, &*request.origin);
        self.permit(origin)?;
        let Permission::Allow(terms) = self.access().may_reserve(peer, &origin.address) else {
            return Err(Refused::Denied);
        };
        // A peer that holds a slot pays only its own request rate.
        let prefix = origin.prefix.filter(|_| !self.reservations.holds(&peer, now));
        self.reserve_rates.take(peer, prefix, now)?;
        Ok(terms)
    }

    /// Decides a RESERVE and answers it, unless a peer under a full cap may turn out to be gone: then returns
    /// it, with that cap.
    fn try_reserve(
        &mut self,
        pending: PendingReservation<C, R>,
        now: Instant,
    ) -> Option<(PendingReservation<C, R>, Scope)> {
        let (End { peer, connection }, prefix) =
            (pending.request.from, pending.request.origin.prefix);
        let ttl = self.config.ttl(pending.terms);
        let decided = self.reservations.reserve(peer, connection, prefix, ttl, now);
        self.tell_changes(now);
        let Granted { receipt, is_renewal } = match decided {
            Ok(granted) => granted,
            Err(full) => match self.reservations.quota().above(prefix) {
                Some(above) => {
                    self.refuse(pending.request, above.into());
                    return None;
                }
                None => return Some((pending, full)),
            },
        };
        let PendingReservation { request, terms, .. } = pending;
        let address = request.origin.address.clone();
        self.actions.push_back(Action::Grant { request, receipt, terms, expires: now + ttl });
        self.tell(Event::ReservationAccepted { peer, address, renewed: is_renewal });
        None
    }

    /// Looks for a slot for each newcomer that waits.
    pub(super) fn reclaim(&mut self, now: Instant) {
        let mut waiting = Vec::new();
        for newcomer in self.reclaim.take() {
            if let Some((mut newcomer, full)) = self.try_reserve(newcomer, now) {
                let since = *newcomer.since.get_or_insert(now);
                waiting.push((newcomer, full, now - since));
            }
        }
        if waiting.is_empty() {
            return;
        }
        let silent = self.connections.silent(self.config.probe_after, now);
        let candidates = silent.map(|(connection, peer, liveness)| Candidate {
            connection,
            billed_to: self.reservations.bill_of(&peer),
            silent_for: liveness.silent_for(now),
            probed_for: liveness.probed_for(now),
        });
        let caps = waiting.iter().map(|(_, full, waited)| (*full, *waited));
        let (prospects, ask) = reclaim::decide(&self.config, caps, candidates.collect());
        for connection in ask {
            if let Some(up) = self.connections.get_mut(connection) {
                up.liveness.on_probe(now);
            }
            self.probe(connection);
        }
        for ((newcomer, full, _), prospect) in waiting.into_iter().zip(prospects) {
            match prospect {
                Prospect::Refuse => self.refuse(newcomer.request, full.into()),
                Prospect::Wait => self.reclaim.requeue(newcomer),
                Prospect::Evict(connection) => {
                    self.time_out(connection, now);
                    // Unless the peer has another connection, there is room now.
                    if let Some((newcomer, _)) = self.try_reserve(newcomer, now) {
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
        let up = self.fit_for_a_slot(peer);
        self.reservations.undelivered(peer, receipt, &up, now);
        self.tell_changes(now);
    }

    /// There is no answer: the voucher could not be signed.
    pub fn on_sign_failed(&mut self, request: Pending<C, R>, receipt: Receipt, now: Instant) {
        self.on_delivered(request.from.peer, receipt, false, now);
        self.refuse(request, Refused::NotSigned);
    }

    /// Holds the connections that reservations point at now and releases the others; reports freed slots and graces.
    pub(super) fn tell_changes(&mut self, now: Instant) {
        while let Some(change) = self.reservations.next_change() {
            let (peer, from, to) = match change {
                Change::Moved { peer, from, to } => (peer, from, to),
                Change::Freed { peer, connection, .. } => (peer, connection, None),
            };
            for (connection, holds) in [(from, false), (to, true)] {
                if let Some(connection) = connection
                    && self.connections.hold_reservation(connection, holds, now)
                {
                    self.actions.push_back(Action::Hold(End { peer, connection }, holds));
                }
            }
            match change {
                Change::Freed { peer, billed_to, reason, .. } => {
                    self.tell(Event::ReservationFreed { peer, billed_to, reason });
                }
                Change::Moved { to: None, .. } => self.tell(Event::GraceBegan { peer }),
                Change::Moved { from: None, .. } => {}
                Change::Moved { .. } => {
                    log::debug!("slot moved to another connection: peer {peer}");
                }
            }
        }
    }

    pub(super) fn refuse(&mut self, request: Pending<C, R>, reason: Refused) {
        let (peer, address) = (request.from.peer, request.origin.address.clone());
        self.turn_down(request, &reason);
        self.tell(Event::ReservationRefused { peer, address, reason });
    }
}
