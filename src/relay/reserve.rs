//! RESERVE, from the request to what becomes of the slot.

use std::{hash::Hash, mem, time::Instant};

use libp2p::PeerId;

use super::{
    Action, Relay,
    connections::{End, PendingRequest},
    quota::Scope,
    reclaim::{self, Candidate, PendingReservation, Verdict},
    reservations::{Change, Receipt},
};
use crate::{
    access::Terms,
    config::{Config, LONGEST, SHORTEST},
    event::{Event, Refused},
};

impl<C: Copy + Ord + Hash, R> Relay<C, R> {
    /// Grants an allowed RESERVE a slot, refuses it, or has it wait for one.
    pub(super) fn reserve(&mut self, request: PendingRequest<C, R>, terms: Terms, now: Instant) {
        let (End { peer, connection }, prefix) = (request.from, request.origin.prefix);
        // 1. A peer has one request that waits. The older one is decided first: granted later, it would move the
        //    reservation back to the older connection.
        let nth = self.waiting.iter().position(|older| older.request.from.peer == peer);
        let older = nth.and_then(|nth| self.waiting.remove(nth));
        if let Some((older, full)) = older.and_then(|older| self.try_reserve(older, now)) {
            self.refuse(older.request, full.into());
        }
        // 2. A slot.
        let pending = PendingReservation { request, terms, since: None };
        let Some((pending, full)) = self.try_reserve(pending, now) else { return };
        // 3. Wait for one.
        if !reclaim::may_wait(&self.config, &self.waiting, prefix) {
            return self.refuse(pending.request, full.into());
        }
        log::debug!("reservation pending: peer {peer}: {}", Refused::from(full));
        self.waiting.push_back(pending);
        // The connection's idle time starts anew with the request.
        self.connections.update(connection, now, |up| up.idle_since = now);
        self.bring_sweep_forward(now);
    }

    /// Grants or refuses a RESERVE, unless a peer under a full cap may turn out to be gone: then returns the RESERVE,
    /// with that cap.
    fn try_reserve(
        &mut self,
        pending: PendingReservation<C, R>,
        now: Instant,
    ) -> Option<(PendingReservation<C, R>, Scope)> {
        let PendingReservation { request, terms, .. } = &pending;
        let (End { peer, connection }, prefix) = (request.from, request.origin.prefix);
        let ttl = terms.reservation_ttl.unwrap_or(self.config.reservation_ttl);
        let (ttl, limit) = (ttl.clamp(SHORTEST, LONGEST), self.circuit_limit(*terms));
        let decided = self.reservations.reserve(peer, connection, prefix, ttl, now);
        self.apply_changes(now);
        let (receipt, renewed) = match decided {
            Ok(granted) => granted,
            Err(full) => match self.reservations.quota.above(prefix) {
                // More slots are held than this cap allows: one that becomes free is not enough.
                Some(above) => {
                    self.refuse(pending.request, above.into());
                    return None;
                }
                None => return Some((pending, full)),
            },
        };
        let (request, expires) = (pending.request, now + ttl);
        let address = request.origin.address.clone();
        self.actions.push_back(Action::Grant { request, receipt, limit, expires });
        self.report(Event::ReservationAccepted { peer, address, renewed });
        None
    }

    /// Looks for a slot for each newcomer that waits.
    pub(super) fn reclaim(&mut self, now: Instant) {
        // 1. Try again: one may be free by now.
        let mut waiting = Vec::new();
        for pending in mem::take(&mut self.waiting) {
            if let Some((mut pending, full)) = self.try_reserve(pending, now) {
                let since = *pending.since.get_or_insert(now);
                waiting.push((pending, full, now - since));
            }
        }
        if waiting.is_empty() {
            return;
        }
        // 2. Decide about the silent peers.
        // The slowest part here is looking up prefixes, which the total cap does not need: it covers every peer.
        let needs_prefixes = waiting.iter().any(|(_, full, _)| *full != Scope::Total);
        let prefix_of = |peer| self.reservations.get(peer).and_then(|slot| slot.prefix);
        let Config { probe, probe_after, silence, .. } = self.config;
        let candidates = self.connections.iter().filter_map(|(connection, up)| {
            let limit = if up.liveness.is_partial { silence.max(probe_after) } else { probe_after };
            let silent_for = up.liveness.silent_for(now);
            (up.holds_reservation && up.closing.is_none() && silent_for >= limit).then(|| {
                let prefix = needs_prefixes.then(|| prefix_of(&up.origin.peer)).flatten();
                let probed_for = up.liveness.decisive_probe(probe, now);
                Candidate { connection, prefix, silent_for, probed_for }
            })
        });
        let caps = waiting.iter().map(|(_, full, waited)| (*full, *waited));
        let (verdicts, probes) = reclaim::decide(&self.config, caps, candidates.collect());
        // 3. Probe.
        for connection in probes {
            if let Some(up) = self.connections.get_mut(connection) {
                up.liveness.on_probe(now);
            }
            self.probe(connection, now);
        }
        // 4. Evict, refuse, or let wait.
        for ((pending, full, _), verdict) in waiting.into_iter().zip(verdicts) {
            match verdict {
                Verdict::Refuse => self.refuse(pending.request, full.into()),
                Verdict::Wait => self.waiting.push_back(pending),
                Verdict::Evict(connection) => {
                    self.time_out(connection, now);
                    // Now there is room, unless this connection is lossy or its peer has another one.
                    let still_pending = self.try_reserve(pending, now);
                    self.waiting.extend(still_pending.map(|(pending, _)| pending));
                }
            }
        }
    }

    /// Handles the delivery of the answer with this receipt, or its failure, which undoes the grant.
    pub fn on_delivered(&mut self, peer: PeerId, receipt: Receipt, arrived: bool, now: Instant) {
        if arrived {
            return self.reservations.confirm(&peer);
        }
        let up = self.fit_for_a_slot(peer, &|_| true);
        self.reservations.on_undelivered(peer, receipt, &up, now);
        self.apply_changes(now);
        self.recheck(Some(peer), now); // the slot may have moved
    }

    /// Undoes a grant whose voucher could not be signed.
    pub fn on_sign_failed(&mut self, request: PendingRequest<C, R>, answer: Receipt, now: Instant) {
        self.on_delivered(request.from.peer, answer, false, now);
        self.refuse(request, Refused::NotSigned);
    }

    /// Applies what changed in the table: holds the connections that reservations point at, releases the others, and
    /// reports freed slots and graces.
    pub(super) fn apply_changes(&mut self, now: Instant) {
        while let Some(change) = self.reservations.changes.pop_front() {
            let Change { peer, to, freed } = change;
            for connection in self.connections.ids_of(&peer) {
                let holds = to == Some(connection);
                self.connections.update(connection, now, |up| up.holds_reservation = holds);
                // Not when grace begins: the peer may be heard again over the open connection that it timed out on.
                if to.is_some() || freed.is_some() {
                    self.actions.push_back(Action::Hold(End { peer, connection }, holds));
                }
            }
            if let Some((reason, prefix)) = freed {
                self.report(Event::ReservationFreed { peer, prefix, reason });
            } else if to.is_none() {
                self.report(Event::GraceBegan { peer });
            }
        }
    }
}
