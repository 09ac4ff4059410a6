//! The sweep, one pass over the tables that ends what has expired or timed out; the drain, which closes connections a
//! few at a time; and the replacement of a peer's connection by a newer one when there is no room for both.
//!
//! All times are of the monotonic clock ([`Instant`]), independent of the wall clock. While the process is stopped or
//! its virtual machine is paused, that clock goes on: the next sweep is late, ends the reservations and graces that
//! have run out, and resets liveness timers. Linux stops the clock while the machine is suspended, as if no time had
//! passed: a slot that is not renewed ends that much later than its peer was told, and a peer that has gone meanwhile
//! is probed within a heartbeat.
//!
//! A draining relay grants no request. A client whose connection was closed is back within seconds, here or at another
//! relay; one that was refused may stay away for an hour. So a request is answered by closing its connection. The
//! closes are spread over the drain time, because clients that are closed together come back together. Circuits stay.

use std::{
    cmp::Reverse,
    hash::Hash,
    time::{Duration, Instant},
};

use libp2p::PeerId;

use super::{
    Action, Draining, Relay,
    connections::{CloseReason, Connection, End},
    reclaim::TICK,
};
use crate::{
    address::ClientPrefix,
    event::{CircuitEnd, Event, FreedReason, Refused},
};

/// A sweep that is later than this restarts open probes. One that is less late extends them by its lateness: a relay
/// without CPU time reads no answers.
const LATE: Duration = Duration::from_secs(1);

/// Multiplies the silence limit of a peer whose link loses packets. TCP waits for up to two minutes before it sends
/// lost data once more; meanwhile the peer only acknowledges. Measured for ten minutes at 30 % loss: one of 120 peers
/// only acknowledged for more than four times the limit.
const LOSSY_FACTOR: u32 = 8;

impl<C: Copy + Ord + Hash, R> Relay<C, R> {
    /// Passes over all tables.
    pub fn sweep(&mut self, now: Instant) {
        // 1. After a delay, extend or restart probes, the waits of newcomers, stop requests and stalls: answers may not
        //    have been read yet.
        let late = now.saturating_duration_since(self.sweep_due);
        if late > TICK {
            let shift = |since| if late > LATE { now } else { since + late };
            self.connections.shift_probes(shift);
            self.circuits.shift_waits(shift);
            self.waiting.iter_mut().for_each(|newcomer| newcomer.since = newcomer.since.map(shift));
        }
        // 2. Drop full buckets and empty queues, and free the slots whose term or grace has ended.
        self.reserve_rates.forget_full(now);
        self.connect_rates.forget_full(now);
        self.link.lock().forget_paid(now);
        self.reservations.end_what_is_over(now);
        self.apply_changes(now);
        // 3. Read the counters, and revive the slots of peers that are heard again.
        self.connections.poll_counters(now);
        self.circuits.poll_counters(now);
        self.revive(now);
        // 4. Probe silent peers, and disconnect those that timed out.
        let mut found = self.heartbeat.check(&self.config, self.connections.watched(), now);
        found.fault.iter().for_each(|fault| log::warn!("{fault}"));
        found.probe.into_iter().for_each(|connection| self.probe(connection, now));
        found.timed_out.sort_unstable(); // so that a simulation can be repeated
        found.timed_out.into_iter().for_each(|connection| self.time_out(connection, now));
        // 5. Ask unresponsive targets over another of their connections: they may have reconnected without reserving
        //    again, and the old connection may be half-open. Find slots for newcomers.
        for (id, silent) in self.circuits.unanswered(now) {
            self.ask_elsewhere(id, silent, now);
        }
        self.reclaim(now);
        // 6. Close idle connections, and while draining those that are due.
        let idle = self.connections.idle_for(self.config.idle_timeout, now);
        idle.into_iter().for_each(|(connection, reason)| self.close(connection, reason));
        self.close_due(now);
        self.sweep_due = now + self.config.sweep;
        self.bring_sweep_forward(now);
    }

    /// Ends the circuits in which bytes wait and have not moved for a while, if memory is scarce for the client prefix
    /// of either peer.
    pub fn end_stalled(&mut self, is_scarce: impl Fn(Option<ClientPrefix>) -> bool, now: Instant) {
        let mut stalled = self.circuits.stalled(now);
        stalled.retain(|(_, ends)| {
            let up = ends.iter().filter_map(|end| self.connections.get(end.connection));
            up.map(|up| up.origin.prefix).any(&is_scarce)
        });
        stalled.into_iter().for_each(|(id, _)| self.end_circuit(id, CircuitEnd::Stalled));
    }

    /// Sweeps soon if a newcomer waits or the relay drains.
    pub(super) fn bring_sweep_forward(&mut self, now: Instant) {
        if !self.waiting.is_empty() || self.is_draining() {
            self.sweep_due = self.sweep_due.min(now + TICK);
        }
    }

    /// Handles a time-out on this connection as if it had closed, whether or not the relay closes it.
    ///
    /// A peer that may be alive behind a link that loses packets has [`LOSSY_FACTOR`] times the silence limit. It is
    /// probed again: a TCP acknowledgement shows that it is alive.
    pub(super) fn time_out(&mut self, connection: C, now: Instant) {
        let Some(silent) = self.connections.get_mut(connection) else { return };
        let silent_for = silent.liveness.silent_for(now);
        if silent_for < self.config.silence * LOSSY_FACTOR && silent.is_lossy() {
            silent.liveness.on_probe(now);
            return self.probe(connection, now);
        }
        let (peer, address) = (silent.origin.peer, silent.origin.address.clone());
        let probed_at = silent.liveness.probed_at;
        silent.liveness.on_activity(now); // if it stays open, its timers start again
        silent.liveness.heard_since_timeout = Some(false);
        self.report(Event::PeerSilent { peer, address, silent_for });
        // It has timed out, too, on its other connections that were probed no later.
        for other in self.connections.ids_of(&peer) {
            let Some(up) = self.connections.get_mut(other) else { continue };
            let is_no_later = up.liveness.probed_at.is_some_and(|at| Some(at) <= probed_at);
            if is_no_later && !up.is_lossy() {
                up.liveness.heard_since_timeout = Some(false);
            }
        }
        self.abandon(End { peer, connection }, CircuitEnd::Silent, now);
        if self.config.close_silent {
            self.close(connection, CloseReason::Silent);
        }
    }

    /// Revives the slots in grace whose peers are heard again over an open connection on which they had timed out.
    fn revive(&mut self, now: Instant) {
        let is_heard = |up: &Connection| up.liveness.heard_since_timeout == Some(true);
        let heard = self.reservations.peers_in_grace().flat_map(|peer| {
            let heard = self.connections.of(peer).filter(|(_, up)| is_heard(up));
            heard.map(|(connection, _)| End { peer: *peer, connection })
        });
        for heard in heard.collect::<Vec<_>>() {
            let slot = self.reservations.get(&heard.peer);
            if slot.is_some_and(|slot| slot.connection.is_none())
                && !self.fit_for_a_slot(heard.peer, &|it| it == heard.connection).is_empty()
            {
                let (peer, address) = (heard.peer, self.address_of(heard.connection));
                self.reservations.revive(heard);
                self.apply_changes(now);
                self.report(Event::ReservationAccepted { peer, address, renewed: true });
                self.recheck(Some(peer), now);
            }
        }
    }

    /// Ends the circuits over a connection, except those whose target can be asked elsewhere. Moves the reservation
    /// that points at it to another connection, or else begins the grace; without grace, frees the slot.
    pub(super) fn abandon(&mut self, gone: End<C>, end: CircuitEnd, now: Instant) {
        for id in self.circuits.over(gone) {
            if self.ask_elsewhere(id, gone, now).is_none() {
                self.end_circuit(id, end);
            }
        }
        let held_over = self.reservations.get(&gone.peer).and_then(|slot| slot.connection);
        if held_over != Some(gone.connection) {
            return;
        }
        let up = self.fit_for_a_slot(gone.peer, &|other| other != gone.connection);
        let is_silent = end == CircuitEnd::Silent;
        let reason = if is_silent { FreedReason::Silent } else { FreedReason::Disconnected };
        self.reservations.on_disconnected(gone, &up, reason, now);
        self.apply_changes(now);
        // The slot may move before the access rules have answered about the new address.
        if !up.is_empty() {
            self.recheck(Some(gone.peer), now);
        }
    }

    /// Probes a peer over this connection. If the peer's slot points at this one, probes the other ones, too: the slot
    /// moves to one of them if the peer answers only there.
    pub(super) fn probe(&mut self, connection: C, now: Instant) {
        let Some(up) = self.connections.get(connection) else { return };
        let (peer, is_holder) = (up.origin.peer, up.holds_reservation);
        let time = self.config.silence.max(self.config.probe);
        for other in self.connections.ids_of(&peer) {
            let Some(up) = self.connections.get_mut(other) else { continue };
            if other != connection {
                if !is_holder || up.closing.is_some() || !up.liveness.needs_probe(time, now) {
                    continue;
                }
                up.liveness.on_probe(now);
            }
            log::debug!("probe sent: peer {peer}");
            self.probes += 1;
            self.actions.push_back(Action::Probe(End { peer, connection: other }, time));
        }
    }

    /// Drains: grants no request from now on, and closes all connections without a circuit by `until`. Without
    /// [`Config::close_silent`](crate::Config::close_silent) it closes only those that hold a slot or carry a circuit
    /// now, or did so at the start of the drain that this one replaces.
    pub fn drain(&mut self, until: Instant, now: Instant) {
        let earlier = self.draining.take().map(|drain| (drain.unanswered, drain.used));
        let (unanswered, mut used) = earlier.unwrap_or_default();
        used.extend(self.connections.iter().filter(|(_, up)| up.is_used()).map(|(id, _)| id));
        self.draining = Some(Draining { until, last: now, due: 0.0, unanswered, used });
        for newcomer in std::mem::take(&mut self.waiting) {
            self.refuse(newcomer.request, Refused::Draining);
        }
        self.bring_sweep_forward(now);
    }

    /// Ends a drain.
    pub fn resume(&mut self) {
        self.draining = None;
    }

    /// Whether the relay drains.
    pub fn is_draining(&self) -> bool {
        self.draining.is_some()
    }

    /// Closes as many connections as are due in a drain, including those whose last circuit has ended.
    pub(super) fn close_due(&mut self, now: Instant) {
        let Some(draining) = &mut self.draining else { return };
        draining.unanswered.retain(|(over, _)| self.connections.get(*over).is_some());
        let closable = self.connections.iter().filter(|(id, up)| {
            let is_the_relays = up.holds_reservation || draining.used.contains(id);
            up.circuits == 0 && up.closing.is_none() && (self.config.close_silent || is_the_relays)
        });
        let mut closable: Vec<_> = closable.map(|(connection, _)| connection).collect();
        let mut due = closable.len();
        if now < draining.until {
            // The rate at which those that remain are closed in the time that remains.
            let left = draining.until.saturating_duration_since(draining.last).as_secs_f64();
            let passed = now.saturating_duration_since(draining.last).as_secs_f64();
            draining.due += due as f64 * passed / left;
            draining.last = now;
            due = draining.due as usize;
            draining.due -= due as f64;
        }
        closable.sort_unstable();
        closable.into_iter().take(due).for_each(|id| self.close(id, CloseReason::Draining));
    }

    /// Answers a request by closing its connection, unless that carries circuits or serves other protocols; then by
    /// resetting its stream.
    pub(super) fn close_unanswered(&mut self, from: End<C>, reply: R) {
        if let Some(draining) = &mut self.draining
            && self.connections.get(from.connection).is_some_and(|up| up.circuits == 0)
            && (self.config.close_silent || draining.used.contains(&from.connection))
        {
            draining.unanswered.push((from.connection, reply));
            self.close(from.connection, CloseReason::Draining);
        }
        // Otherwise dropping `reply` resets the stream.
    }

    /// Closes a connection, and marks it as closing.
    pub fn close(&mut self, connection: C, reason: CloseReason) {
        if let Some(up) = self.connections.get_mut(connection) {
            let closing = End { peer: up.origin.peer, connection };
            log::debug!("closing connection: peer {}: {}", closing.peer, reason.kind());
            up.closing = Some(reason);
            self.actions.push_back(Action::Close(closing));
        }
    }

    /// Makes room for the connection `keep` of `peer`: closes the one of its other connections that has been silent the
    /// longest, and handles it as closed at once.
    pub fn close_longest_silent_of(&mut self, peer: PeerId, keep: C, now: Instant) {
        self.connections.poll_counters(now);
        let others =
            self.connections.of(&peer).filter(|(id, up)| *id != keep && up.closing.is_none());
        // The oldest of several that have been silent for the same time.
        let silent = others.min_by_key(|(_, up)| Reverse(up.liveness.silent_for(now)));
        if let Some((connection, _)) = silent {
            self.abandon(End { peer, connection }, CircuitEnd::Replaced, now);
            self.close(connection, CloseReason::Replaced);
        }
    }

    /// The idle connections of peers that hold no slot, in no order.
    pub fn idle_without_slot(&self) -> impl Iterator<Item = (C, &Connection)> {
        let has_no_slot = |up: &Connection| self.reservations.get(&up.origin.peer).is_none();
        self.connections.idle().filter(move |(_, up)| has_no_slot(up))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    };

    use libp2p::PeerId;

    use super::*;
    use crate::{
        activity::ActivityCounter,
        config::Config,
        relay::{connections::Connection, rates::Rates},
        wire::Request,
    };

    const TEN_MINUTES: Duration = Duration::from_secs(600);

    /// A relay with two peers that hold slots.
    fn relay(config: Config, now: Instant) -> (Relay<u32, ()>, [End<u32>; 2]) {
        let mut relay = Relay::new(config, now).unwrap();
        let holders = [0, 1].map(|connection| {
            let peer = PeerId::random();
            let address = "/memory/1".parse().unwrap();
            relay.connections.add(connection, Connection::new(peer, address, false, 0, now));
            let end = End { peer, connection };
            relay.handle_request(end, Ok(Request::Reserve), (), now);
            end
        });
        while let Some(action) = relay.actions.pop_front() {
            if let Action::Grant { request, receipt, .. } = action {
                relay.on_delivered(request.from.peer, receipt, true, now);
            }
        }
        (relay, holders)
    }

    /// What sweeps did: peers probed, peers timed out, and slots freed.
    #[derive(Debug, Default, PartialEq)]
    struct Found {
        probed: Vec<PeerId>,
        silent: Vec<PeerId>,
        freed: Vec<(PeerId, FreedReason)>,
    }

    fn found(relay: &mut Relay<u32, ()>) -> Found {
        let mut found = Found::default();
        while let Some(action) = relay.actions.pop_front() {
            match action {
                Action::Probe(to, _) => found.probed.push(to.peer),
                Action::Report(Event::PeerSilent { peer, .. }) => found.silent.push(peer),
                Action::Report(Event::ReservationFreed { peer, reason, .. }) => {
                    found.freed.push((peer, reason));
                }
                _ => {}
            }
        }
        found
    }

    /// Sweeps whenever it is due until something is found; returns the time and the findings.
    fn until_found(relay: &mut Relay<u32, ()>) -> (Instant, Found) {
        loop {
            let now = relay.sweep_due;
            relay.sweep(now);
            let found = found(relay);
            if found != Found::default() {
                return (now, found);
            }
        }
    }

    #[test]
    fn after_a_pause_of_ten_minutes_liveness_resets_and_ended_terms_expire() {
        let start = Instant::now();
        let (mut relay, [stays, leaves]) = relay(Config::default(), start);
        let (probed, both) = until_found(&mut relay);
        assert_eq!(both.probed.len(), 2);
        relay.on_disconnected(leaves, probed);
        found(&mut relay);

        let late = probed + TEN_MINUTES;
        relay.sweep(late);
        let expected =
            Found { freed: vec![(leaves.peer, FreedReason::GraceOver)], ..Found::default() };
        assert_eq!(found(&mut relay), expected);

        // The probe sent before the pause does not count.
        let Config { heartbeat, silence, .. } = Config::default();
        let (probed, again) = until_found(&mut relay);
        assert_eq!((probed, again.probed), (late + heartbeat, vec![stays.peer]));
        let (evicted_at, silent) = until_found(&mut relay);
        assert_eq!((evicted_at, silent.silent), (late + silence, vec![stays.peer]));
    }

    #[test]
    fn a_newcomer_waits_for_the_probes_that_a_late_sweep_extends_or_restarts() {
        for late in [2 * TICK, 100 * TICK] {
            let start = Instant::now();
            let config = Config { max_reservations: 2, ..Config::default() };
            let Config { probe, probe_after, .. } = config;
            let (mut relay, holders) = relay(config, start);
            let newcomer = End { peer: PeerId::random(), connection: 2 };
            let up = Connection::new(newcomer.peer, "/memory/1".parse().unwrap(), false, 0, start);
            relay.connections.add(2, up);
            let asked = start + probe_after;
            relay.sweep_due = asked;
            relay.handle_request(newcomer, Ok(Request::Reserve), (), asked);
            relay.sweep(asked);
            assert_eq!(found(&mut relay).probed.len(), 2);
            while relay.sweep_due < asked + probe - TICK {
                relay.sweep(relay.sweep_due);
            }
            relay.sweep(relay.sweep_due + late);
            assert_eq!(found(&mut relay), Found::default(), "an answer may not have been read yet");
            let (_, taken) = until_found(&mut relay);
            let [(peer, FreedReason::TakenBy { peer: by })] = taken.freed[..] else {
                panic!("{taken:?}");
            };
            assert!(holders.iter().any(|holder| holder.peer == peer) && by == newcomer.peer);
        }
    }

    #[test]
    fn a_slot_stays_at_the_connection_that_its_peer_last_reserved_over_when_an_older_request_waits()
    {
        let start = Instant::now();
        let config = Config { max_reservations: 2, ..Config::default() };
        let asked = start + config.probe_after;
        let (mut relay, [holder, _]) = relay(config, start);
        let newcomer = PeerId::random();
        let [old, new] = [2, 3].map(|connection| {
            let up = Connection::new(newcomer, "/memory/1".parse().unwrap(), false, 0, start);
            relay.connections.add(connection, up);
            End { peer: newcomer, connection }
        });
        relay.handle_request(old, Ok(Request::Reserve), (), asked);
        assert_eq!(relay.waiting.len(), 1);
        relay.release(holder.peer, FreedReason::Released, asked);
        relay.handle_request(new, Ok(Request::Reserve), (), asked);
        relay.sweep(asked);
        let slot = relay.reservations.get(&newcomer).expect("a slot");
        assert_eq!((slot.connection, relay.waiting.len()), (Some(new.connection), 0));
    }

    #[test]
    fn a_peer_that_is_heard_within_grace_over_the_connection_that_stayed_open_has_its_slot_again() {
        let start = Instant::now();
        let (mut relay, [alice, bob]) = relay(Config::default(), start);
        until_found(&mut relay); // both are probed
        let (now, both) = until_found(&mut relay);
        assert_eq!(both.silent.len(), 2);
        let live = |relay: &Relay<u32, ()>, end: End<u32>, now| {
            relay.reservations.get(&end.peer).and_then(|slot| slot.live(now))
        };
        assert_eq!((live(&relay, alice, now), live(&relay, bob, now)), (None, None));
        // Another connection of Bob's does not count: a peer that comes back reserves.
        let another = Connection::new(bob.peer, "/memory/1".parse().unwrap(), false, 0, now);
        relay.connections.add(2, another);
        relay.connections.get_mut(2).unwrap().liveness.on_activity(now);
        relay.connections.record_activity(&alice.peer, now);
        let now = relay.sweep_due;
        relay.sweep(now);
        assert_eq!((live(&relay, alice, now), live(&relay, bob, now)), (Some(0), None));
        assert!(
            std::iter::from_fn(|| relay.actions.pop_front())
                .any(|action| { matches!(action, Action::Hold(End { connection: 0, .. }, true)) })
        );
        // After the grace it is over.
        let (now, over) = until_found(&mut relay);
        assert_eq!(over.freed, [(bob.peer, FreedReason::GraceOver)]);
        relay.connections.record_activity(&bob.peer, now);
        relay.sweep(now);
        assert!(relay.reservations.get(&bob.peer).is_none());
    }

    #[test]
    fn a_live_slot_does_not_move_back_to_a_connection_on_which_its_peer_timed_out() {
        let start = Instant::now();
        let (mut relay, [alice, bob]) = relay(Config::default(), start);
        let up = Connection::new(alice.peer, "/memory/1".parse().unwrap(), false, 0, start);
        relay.connections.add(2, up);
        relay.time_out(alice.connection, start);
        relay.on_disconnected(bob, start); // so that a slot is in grace
        relay.connections.record_activity(&alice.peer, start);
        relay.sweep(start);
        assert_eq!(relay.reservations.get(&alice.peer).unwrap().connection, Some(2));
    }

    #[test]
    fn a_slot_moves_to_a_connection_on_which_its_peer_timed_out_only_once_it_is_heard_there() {
        for (is_heard, expected) in [(false, None), (true, Some(0))] {
            let start = Instant::now();
            let (mut relay, [alice, _]) = relay(Config::default(), start);
            let up = Connection::new(alice.peer, "/memory/1".parse().unwrap(), false, 0, start);
            relay.connections.add(2, up);
            let slot = |relay: &Relay<u32, ()>| relay.reservations.get(&alice.peer).unwrap();
            relay.time_out(alice.connection, start);
            assert_eq!(slot(&relay).connection, Some(2));
            if is_heard {
                relay.connections.get_mut(0).unwrap().liveness.on_activity(start);
            }
            relay.time_out(2, start);
            assert_eq!(slot(&relay).connection, expected);
        }
    }

    #[test]
    fn a_peer_is_probed_anew_on_the_connection_that_its_slot_moves_back_to() {
        let start = Instant::now();
        let (mut relay, [old, _]) = relay(Config::default(), start);
        let Config { heartbeat, silence, .. } = Config::default();
        sweep_until(&mut relay, start + heartbeat);
        let new = End { connection: 2, ..old };
        let up = Connection::new(new.peer, "/memory/1".parse().unwrap(), false, 0, start);
        relay.connections.add(new.connection, up);
        relay.handle_request(new, Ok(Request::Reserve), (), start + heartbeat);
        relay.reservations.confirm(&new.peer);
        relay.on_disconnected(new, start + silence - Duration::from_secs(1));
        found(&mut relay);
        let found = sweep_until(&mut relay, start + silence);
        assert!(found.probed.contains(&old.peer) && !found.silent.contains(&old.peer));
    }

    #[test]
    fn a_peer_times_out_once_on_a_connection_whose_circuits_have_yet_to_report_their_end() {
        let start = Instant::now();
        let (mut relay, [source, target]) = relay(Config::default(), start);
        relay.handle_request(source, Ok(Request::Connect(target.peer)), (), start);
        let (id, _) = relay.circuits.iter().next().expect("a circuit");
        assert!(relay.on_target_answered(id, target.connection, Ok(()), start).is_some());
        let end = start + 2 * Config::default().silence - Duration::from_secs(1);
        let mut silent = sweep_until(&mut relay, end).silent;
        silent.sort_unstable();
        let mut both = [source.peer, target.peer];
        both.sort_unstable();
        assert_eq!(silent, both);
    }

    #[test]
    fn a_shorter_sweep_interval_is_no_pause() {
        let start = Instant::now();
        let sweep = Duration::from_secs(50);
        let (mut relay, _) = relay(Config { sweep, ..Config::default() }, start);
        relay.sweep(start);
        relay.set_config(Config::default(), start + 4 * sweep / 5).unwrap();
        relay.sweep(relay.sweep_due);
        assert_eq!(found(&mut relay).probed.len(), 2);
    }

    #[test]
    fn the_open_connection_of_a_peer_that_timed_out_is_kept_until_its_grace_is_over() {
        let start = Instant::now();
        let (mut relay, holders) = relay(Config::default(), start);
        let released = |relay: &mut Relay<u32, ()>| -> Vec<_> {
            let actions = std::iter::from_fn(|| relay.actions.pop_front());
            let ends = actions.filter_map(|action| match action {
                Action::Hold(end, false) => Some(end.connection),
                _ => None,
            });
            ends.collect()
        };
        holders.iter().for_each(|end| relay.time_out(end.connection, start));
        assert_eq!((relay.reservations.in_grace(), released(&mut relay)), (2, vec![]));
        // One reserves over a new connection, and the grace of the other one ends.
        let [alice, bob] = holders;
        let new = End { connection: 2, ..alice };
        let up = Connection::new(alice.peer, "/memory/1".parse().unwrap(), false, 0, start);
        relay.connections.add(new.connection, up);
        relay.handle_request(new, Ok(Request::Reserve), (), start);
        assert_eq!(released(&mut relay), [alice.connection]);
        relay.sweep(start + Config::default().grace);
        assert_eq!(released(&mut relay), [bob.connection]);
    }

    /// Sweeps as due until then; returns all findings.
    fn sweep_until(relay: &mut Relay<u32, ()>, end: Instant) -> Found {
        let mut all = Found::default();
        while relay.sweep_due <= end {
            relay.sweep(relay.sweep_due);
            let Found { probed, silent, freed } = found(relay);
            all.probed.extend(probed);
            all.silent.extend(silent);
            all.freed.extend(freed);
        }
        all
    }

    /// Where only the relay's own streams count: no time-out within the silence limit, and none after a single probe.
    #[test]
    fn a_newcomer_takes_no_slot_of_a_partially_tracked_peer_before_two_probes_and_the_limit() {
        let start = Instant::now();
        let heartbeat = Duration::ZERO;
        let config =
            Config { max_reservations: 2, heartbeat, grace: Duration::ZERO, ..Config::default() };
        let Config { silence, .. } = config;
        let (mut relay, holders) = relay(config, start);
        for holder in holders {
            relay.connections.get_mut(holder.connection).unwrap().liveness.is_partial = true;
        }
        let second = Duration::from_secs(1);
        let early = add_newcomer(&mut relay, start + silence - 10 * second);
        assert_eq!(early, Found::default(), "it is not even probed");
        let first = add_newcomer(&mut relay, start + silence + second);
        assert_eq!((first.probed.len(), first.silent.len()), (4, 0), "two probes of each");
        let next = add_newcomer(&mut relay, start + silence + 10 * second);
        assert_eq!((next.probed.len(), next.silent.len()), (0, 1));
    }

    #[test]
    fn a_newcomer_takes_no_slot_of_a_partially_tracked_peer_before_probe_after() {
        let start = Instant::now();
        let (heartbeat, probe_after) = (Duration::ZERO, Duration::from_secs(90));
        let config = Config { max_reservations: 2, heartbeat, probe_after, ..Config::default() };
        let (mut relay, holders) = relay(config, start);
        for holder in holders {
            relay.connections.get_mut(holder.connection).unwrap().liveness.is_partial = true;
        }
        let early = add_newcomer(&mut relay, start + probe_after - Duration::from_secs(9));
        assert_eq!(early, Found::default(), "it is not even probed");
    }

    #[test]
    fn without_heartbeat_a_probe_lasts_as_long_as_set_even_if_the_silence_limit_is_shorter() {
        let start = Instant::now();
        let (heartbeat, silence) = (Duration::ZERO, Duration::from_secs(1));
        let config = Config { max_reservations: 2, heartbeat, silence, ..Config::default() };
        let Config { probe, probe_after, .. } = config;
        let (mut relay, _) = relay(config, start);
        let found = add_newcomer(&mut relay, start + probe_after);
        assert_eq!((found.probed.len(), found.silent.len()), (2, 1));
        relay.probe(0, start);
        let sent = relay.actions.pop_back();
        assert!(matches!(sent, Some(Action::Probe(_, time)) if time == probe), "{sent:?}");
    }

    #[test]
    fn a_sweep_forgets_rates_that_are_full_and_bandwidth_that_is_paid_for() {
        let start = Instant::now();
        let config = Config { bandwidth: 1000, ..Config::default() };
        let (mut relay, [source, target]) = relay(config, start);
        relay.handle_request(source, Ok(Request::Connect(target.peer)), (), start);
        relay.link.lock().charge([source.peer, target.peer], 1, start);
        let kept = |relay: &Relay<u32, ()>| {
            let [reserve, connect] =
                [&relay.reserve_rates, &relay.connect_rates].map(Rates::buckets);
            [reserve, connect, relay.link.lock().queues()]
        };
        assert_eq!(kept(&relay), [2, 1, 1]);
        relay.sweep(start + Duration::from_secs(5));
        assert_eq!(kept(&relay), [0; 3]);
    }

    #[test]
    fn the_connection_of_a_newcomer_that_waits_is_not_idle() {
        let start = Instant::now();
        let second = Duration::from_secs(1);
        let (max_reservations, idle_timeout) = (2, 4 * second);
        let config = Config { max_reservations, idle_timeout, ..Config::default() };
        let asked = start + config.probe_after;
        let (mut relay, _) = relay(config, start);
        relay.sweep_due = asked;
        let up = Connection::new(
            PeerId::random(),
            "/memory/1".parse().unwrap(),
            false,
            0,
            asked - 3 * second,
        );
        let newcomer = End { peer: up.origin.peer, connection: 2 };
        relay.connections.add(2, up);
        relay.handle_request(newcomer, Ok(Request::Reserve), (), asked);
        sweep_until(&mut relay, asked + 2 * second);
        assert_eq!(relay.connections.get(2).unwrap().closing, None);
        assert_eq!(relay.waiting.len(), 1);
    }

    /// As [`relay`], but each holder has another connection.
    fn relay_with_spare_connections(
        config: Config,
        now: Instant,
    ) -> (Relay<u32, ()>, [End<u32>; 2]) {
        let (mut relay, holders) = relay(config, now);
        for (holder, spare) in holders.iter().zip([2, 3]) {
            let up = Connection::new(holder.peer, "/memory/1".parse().unwrap(), false, 0, now);
            relay.connections.add(spare, up);
        }
        (relay, holders)
    }

    #[test]
    fn a_peer_that_answers_on_none_of_its_connections_has_one_silence_limit() {
        let (start, config) = (Instant::now(), Config::default());
        let Config { heartbeat, silence, .. } = config;
        let (mut relay, [silent, lives]) = relay_with_spare_connections(config, start);
        let found = sweep_until(&mut relay, start + heartbeat);
        assert_eq!(found.probed.len(), 4);
        relay.connections.get_mut(3).unwrap().liveness.on_activity(start + heartbeat);
        sweep_until(&mut relay, start + silence);
        let connection = |end: End<u32>| relay.reservations.get(&end.peer).unwrap().connection;
        assert_eq!((connection(silent), connection(lives)), (None, Some(3)));
    }

    #[test]
    fn a_newcomer_takes_the_slot_of_a_peer_that_answers_on_none_of_its_connections() {
        let start = Instant::now();
        let config = Config { max_reservations: 2, ..Config::default() };
        let Config { probe_after, .. } = config;
        let (mut relay, _) = relay_with_spare_connections(config, start);
        let found = add_newcomer(&mut relay, start + probe_after);
        assert_eq!((found.silent.len(), found.freed.len()), (1, 1));
    }

    #[test]
    fn a_slot_moves_to_a_connection_behind_a_lossy_link() {
        let (start, config) = (Instant::now(), Config::default());
        let Config { silence, .. } = config;
        let (mut relay, [alice, _]) = relay_with_spare_connections(config, start);
        lose_packets(&mut relay, 2);
        sweep_until(&mut relay, start + silence);
        assert_eq!(relay.reservations.get(&alice.peer).unwrap().connection, Some(2));
    }

    /// Has a newcomer ask for a slot at this time; returns what was found until it is answered.
    fn add_newcomer(relay: &mut Relay<u32, ()>, at: Instant) -> Found {
        sweep_until(relay, at);
        let (peer, connection) = (PeerId::random(), relay.connections.count() as u32);
        let up = Connection::new(peer, "/memory/1".parse().unwrap(), false, 0, at);
        relay.connections.add(connection, up);
        relay.handle_request(End { peer, connection }, Ok(Request::Reserve), (), at);
        sweep_until(relay, at + relay.config.probe + Duration::from_secs(1))
    }

    /// Has the link of this connection lose packets until the returned switch is set to false.
    fn lose_packets(relay: &mut Relay<u32, ()>, connection: u32) -> Arc<AtomicBool> {
        let (counter, is_lossy) = (ActivityCounter::default(), Arc::new(AtomicBool::new(true)));
        let copy = Arc::clone(&is_lossy);
        counter.set_lossy(move || copy.load(Ordering::Relaxed));
        relay.connections.get_mut(connection).unwrap().track(counter);
        is_lossy
    }

    #[test]
    fn a_peer_behind_a_lossy_link_has_eight_times_the_silence_limit() {
        let start = Instant::now();
        let (mut relay, [live, gone]) = relay(Config::default(), start);
        lose_packets(&mut relay, live.connection);
        let Config { silence, .. } = Config::default();
        let found = sweep_until(&mut relay, start + silence);
        assert_eq!(found.silent, [gone.peer]);
        assert_eq!(found.probed.iter().filter(|peer| **peer == live.peer).count(), 2);
        let found = sweep_until(&mut relay, start + 8 * silence - Duration::from_secs(1));
        assert!(found.silent.is_empty() && found.probed.len() >= 3);
        assert!(found.probed.iter().all(|peer| *peer == live.peer));
        let found = sweep_until(&mut relay, start + 8 * silence);
        assert_eq!(found.silent, [live.peer]);
    }

    #[test]
    fn a_newcomer_takes_no_slot_of_a_peer_behind_a_lossy_link_unless_that_is_no_longer_heard() {
        let start = Instant::now();
        let config = Config { max_reservations: 2, ..Config::default() };
        let Config { probe_after, .. } = config;
        let (mut relay, [live, gone]) = relay(config, start);
        let is_lossy = lose_packets(&mut relay, live.connection);
        let found = add_newcomer(&mut relay, start + probe_after);
        assert_eq!(found.silent, [gone.peer]);
        let found = add_newcomer(&mut relay, start + 2 * probe_after);
        assert!(!found.silent.contains(&live.peer));
        is_lossy.store(false, Ordering::Relaxed);
        let found = add_newcomer(&mut relay, start + 3 * probe_after);
        assert!(found.silent.contains(&live.peer));
    }

    #[test]
    fn a_term_that_ended_during_a_pause_is_expired() {
        let start = Instant::now();
        let config = Config { reservation_ttl: TEN_MINUTES / 2, ..Config::default() };
        let (mut relay, holders) = relay(config, start);
        relay.sweep(start + TEN_MINUTES);
        let found = found(&mut relay);
        assert!(found.silent.is_empty() && found.probed.is_empty());
        let freed = |end: &End<u32>| found.freed.contains(&(end.peer, FreedReason::Expired));
        assert!(holders.iter().all(freed), "{found:?}");
    }
}

#[cfg(test)]
mod drain_tests {
    use std::{sync::Arc, time::Duration};

    use super::*;
    use crate::{config::Config, wire::Request};

    const DRAIN: Duration = Duration::from_secs(8);

    /// A relay with `connections` connections.
    fn relay(connections: u32, now: Instant) -> (Relay<u32, ()>, Vec<End<u32>>) {
        let config = Config { close_silent: true, ..Config::default() };
        let mut relay = Relay::new(config, now).unwrap();
        let connect = |connection| {
            let peer = PeerId::random();
            let address = "/memory/1".parse().unwrap();
            relay.connections.add(connection, Connection::new(peer, address, false, 0, now));
            End { peer, connection }
        };
        let ends = (0..connections).map(connect).collect();
        (relay, ends)
    }

    /// Takes all actions; returns the closed connections, and whether a request was answered.
    fn actions(relay: &mut Relay<u32, ()>) -> (Vec<u32>, bool) {
        let (mut closed, mut answered) = (Vec::new(), false);
        while let Some(action) = relay.actions.pop_front() {
            match action {
                Action::Close(end) => closed.push(end.connection),
                Action::Refuse(..) | Action::Grant { .. } => answered = true,
                _ => {}
            }
        }
        (closed, answered)
    }

    /// Opens a circuit from the first to the second connection.
    fn open_circuit(relay: &mut Relay<u32, ()>, ends: &[End<u32>], now: Instant) {
        relay.handle_request(ends[1], Ok(Request::Reserve), (), now);
        relay.handle_request(ends[0], Ok(Request::Connect(ends[1].peer)), (), now);
        let (id, _) = relay.circuits.iter().next().expect("an admitted circuit");
        assert!(relay.on_target_answered(id, ends[1].connection, Ok(()), now).is_some());
        actions(relay);
    }

    #[test]
    fn connections_are_closed_evenly_and_all_of_them_in_time() {
        for connections in [1000, 10, 1] {
            for sweep in [1000, 10] {
                let start = Instant::now();
                let (mut relay, _) = relay(connections, start);
                let sweep = Duration::from_millis(sweep);
                let config = Config { close_silent: true, sweep, ..Config::default() };
                relay.set_config(config, start).unwrap();
                relay.drain(start + DRAIN, start);
                let mut closed = 0;
                while relay.sweep_due <= start + DRAIN {
                    let now = relay.sweep_due;
                    relay.sweep(now);
                    closed += actions(&mut relay).0.len();
                    let part = (now - start).as_secs_f64() / DRAIN.as_secs_f64();
                    let due = f64::from(connections) * part;
                    assert!((due - closed as f64).abs() <= 1.001, "{closed} of {due}");
                }
                assert_eq!(closed, connections as usize);
            }
        }
    }

    #[test]
    fn without_close_silent_only_connections_that_the_relay_used_are_closed() {
        let start = Instant::now();
        let (mut relay, ends) = relay(4, start);
        let config = Config::default();
        relay.set_config(config, start).unwrap();
        open_circuit(&mut relay, &ends, start);
        relay.drain(start + DRAIN, start);
        relay.handle_request(ends[2], Ok(Request::Reserve), (), start);
        relay.sweep(start + DRAIN);
        assert_eq!(actions(&mut relay), (vec![], false));
        let (id, _) = relay.circuits.iter().next().expect("the circuit");
        relay.on_circuit_ended(id, crate::CircuitEnd::Finished, start + DRAIN);
        relay.sweep(start + DRAIN);
        assert_eq!(actions(&mut relay).0, [0, 1]);
    }

    #[test]
    fn without_close_silent_the_connection_that_a_slot_moves_to_is_closed_too() {
        let start = Instant::now();
        let (mut relay, ends) = relay(1, start);
        relay.set_config(Config::default(), start).unwrap();
        let address = "/memory/1".parse().unwrap();
        relay.connections.add(7, Connection::new(ends[0].peer, address, false, 0, start));
        relay.handle_request(ends[0], Ok(Request::Reserve), (), start);
        relay.reservations.confirm(&ends[0].peer);
        relay.drain(start + DRAIN, start);
        relay.on_disconnected(ends[0], start);
        assert_eq!(relay.reservations.get(&ends[0].peer).unwrap().connection, Some(7));
        actions(&mut relay);
        relay.sweep(start + DRAIN);
        assert_eq!(actions(&mut relay).0, [7]);
    }

    #[test]
    fn a_connection_with_a_circuit_stays_until_the_circuit_ends() {
        let start = Instant::now();
        let (mut relay, ends) = relay(3, start);
        open_circuit(&mut relay, &ends, start);
        relay.drain(start + DRAIN, start);
        relay.sweep(start + DRAIN);
        assert_eq!(actions(&mut relay).0, [2]);
        let (id, _) = relay.circuits.iter().next().expect("the circuit");
        let ended = crate::CircuitEnd::Finished;
        relay.on_circuit_ended(id, ended, start + DRAIN);
        relay.sweep(start + DRAIN);
        assert_eq!(actions(&mut relay).0, [0, 1]);
    }

    #[test]
    fn a_request_while_draining_closes_its_connection_unless_it_carries_a_circuit() {
        let start = Instant::now();
        let (mut relay, ends) = relay(4, start);
        open_circuit(&mut relay, &ends, start);
        relay.drain(start + DRAIN, start);
        relay.handle_request(ends[2], Ok(Request::Reserve), (), start);
        relay.handle_request(ends[3], Ok(Request::Connect(ends[1].peer)), (), start);
        relay.handle_request(ends[0], Ok(Request::Reserve), (), start);
        assert_eq!(actions(&mut relay), (vec![2, 3], false));
    }

    #[test]
    fn a_request_without_an_answer_is_forgotten_with_its_connection() {
        let start = Instant::now();
        let config = Config { close_silent: true, ..Config::default() };
        let mut relay = Relay::<u32, Arc<()>>::new(config, start).unwrap();
        relay.drain(start + DRAIN, start);
        let reply = Arc::new(());
        for connection in 0..3 {
            let end = End { peer: PeerId::random(), connection };
            let up = Connection::new(end.peer, "/memory/1".parse().unwrap(), false, 0, start);
            relay.connections.add(connection, up);
            relay.handle_request(end, Ok(Request::Reserve), reply.clone(), start);
            assert_eq!(Arc::strong_count(&reply), 2, "until its connection has closed");
            relay.on_disconnected(end, start);
            relay.sweep(start);
            assert_eq!(Arc::strong_count(&reply), 1);
        }
    }

    #[test]
    fn a_second_drain_keeps_the_requests_that_wait_for_their_connections_to_close() {
        let start = Instant::now();
        let config = Config { close_silent: true, ..Config::default() };
        let mut relay = Relay::<u32, Arc<()>>::new(config, start).unwrap();
        let (end, reply) = (End { peer: PeerId::random(), connection: 0 }, Arc::new(()));
        let up = Connection::new(end.peer, "/memory/1".parse().unwrap(), false, 0, start);
        relay.connections.add(0, up);
        relay.drain(start + DRAIN, start);
        relay.handle_request(end, Ok(Request::Reserve), Arc::clone(&reply), start);
        relay.drain(start + DRAIN, start);
        assert_eq!(Arc::strong_count(&reply), 2);
    }

    #[test]
    fn without_close_silent_a_second_drain_closes_what_was_in_use_at_the_first() {
        let start = Instant::now();
        let (mut relay, ends) = relay(3, start);
        relay.set_config(Config::default(), start).unwrap();
        open_circuit(&mut relay, &ends, start);
        relay.drain(start + DRAIN, start);
        let (id, _) = relay.circuits.iter().next().expect("the circuit");
        relay.on_circuit_ended(id, crate::CircuitEnd::Finished, start);
        relay.drain(start + DRAIN, start);
        relay.sweep(start + DRAIN);
        assert_eq!(actions(&mut relay).0, [0, 1]);
    }

    #[test]
    fn a_drain_begins_at_once_and_answers_newcomers_that_wait_by_closing_their_connections() {
        let start = Instant::now();
        let (mut relay, ends) = relay(2, start);
        let config = Config { max_reservations: 1, ..relay.config.clone() };
        relay.set_config(config, start).unwrap();
        relay.handle_request(ends[0], Ok(Request::Reserve), (), start);
        let later = start + relay.config.probe_after;
        relay.handle_request(ends[1], Ok(Request::Reserve), (), later);
        assert_eq!(relay.waiting.len(), 1);
        actions(&mut relay);
        relay.sweep_due = later + DRAIN;
        relay.drain(later + DRAIN, later);
        assert_eq!((actions(&mut relay), relay.waiting.len()), ((vec![1], false), 0));
        assert_eq!(relay.sweep_due, later + TICK);
    }

    #[test]
    fn a_resumed_relay_accepts_clients() {
        let start = Instant::now();
        let (mut relay, ends) = relay(1, start);
        relay.drain(start + DRAIN, start);
        relay.resume();
        relay.sweep(start + DRAIN);
        relay.handle_request(ends[0], Ok(Request::Reserve), (), start + DRAIN);
        assert_eq!(actions(&mut relay), (vec![], true));
    }
}

#[cfg(test)]
mod preemption_tests {
    use std::time::Duration;

    use libp2p::futures::channel::oneshot;

    use super::*;
    use crate::{
        activity::ActivityCounter, config::Config, event::Event, relay::Action, wire::Request,
    };

    /// A relay whose connections are numbered from 0 and open one second apart.
    struct Clients {
        relay: Relay<u32, ()>,
        ends: Vec<End<u32>>,
        activity: Vec<ActivityCounter>,
        now: Instant,
    }

    /// The effects of a step.
    #[derive(Debug, Default, PartialEq)]
    struct Effects {
        closed: Vec<u32>,
        graces_begun: usize,
    }

    fn closed(connection: u32) -> Effects {
        Effects { closed: vec![connection], ..Effects::default() }
    }

    impl Clients {
        fn new() -> Self {
            let now = Instant::now();
            Self {
                relay: Relay::new(Config::default(), now).unwrap(),
                ends: Vec::new(),
                activity: Vec::new(),
                now,
            }
        }

        fn advance_a_second(&mut self) {
            self.now += Duration::from_secs(1);
        }

        fn connect(&mut self, peer: PeerId) -> u32 {
            self.advance_a_second();
            let (connection, address) = (self.ends.len() as u32, "/memory/1".parse().unwrap());
            let up = Connection::new(peer, address, false, 0, self.now);
            let activity = ActivityCounter::default();
            self.relay.connections.add(connection, up);
            self.relay.connections.get_mut(connection).unwrap().track(activity.clone());
            self.activity.push(activity);
            self.ends.push(End { peer, connection });
            connection
        }

        fn reserve(&mut self, connection: u32) {
            let (from, now) = (self.ends[connection as usize], self.now);
            self.relay.handle_request(from, Ok(Request::Reserve), (), now);
            while let Some(action) = self.relay.actions.pop_front() {
                if let Action::Grant { receipt, .. } = action {
                    self.relay.on_delivered(from.peer, receipt, true, now);
                }
            }
            assert_eq!(self.slot_of(from.peer), Some(connection));
        }

        /// Opens a circuit to `target`, which holds a slot; the receiver is cancelled when the circuit is ended.
        fn open_circuit(&mut self, source: u32, target: PeerId) -> oneshot::Receiver<()> {
            let (from, now) = (self.ends[source as usize], self.now);
            self.relay.handle_request(from, Ok(Request::Connect(target)), (), now);
            let asked = std::iter::from_fn(|| self.relay.actions.pop_front()).find_map(|action| {
                let Action::AskTarget(target, parameters) = action else {
                    return None;
                };
                Some((target.connection, parameters))
            });
            let (over, parameters) = asked.expect("an admitted circuit");
            let opened = self.relay.on_target_answered(parameters.id, over, Ok(()), now);
            self.effects();
            assert!(opened.is_some(), "an open circuit");
            parameters.ended
        }

        fn slot_of(&self, peer: PeerId) -> Option<u32> {
            self.relay.reservations.get(&peer)?.connection
        }

        /// Advances a second, and closes the longest-silent other connection of the peer in favour of `connection`.
        fn replace_with(&mut self, connection: u32) -> Effects {
            self.advance_a_second();
            let (peer, now) = (self.ends[connection as usize].peer, self.now);
            self.relay.close_longest_silent_of(peer, connection, now);
            self.effects()
        }

        /// The idle connections of peers that hold no slot.
        fn idle_without_slot(&self) -> Vec<u32> {
            let mut idle: Vec<_> = self.relay.idle_without_slot().map(|(id, _)| id).collect();
            idle.sort_unstable();
            idle
        }

        fn effects(&mut self) -> Effects {
            let mut effects = Effects::default();
            while let Some(action) = self.relay.actions.pop_front() {
                match action {
                    Action::Close(end) => effects.closed.push(end.connection),
                    Action::Report(Event::GraceBegan { .. }) => effects.graces_begun += 1,
                    _ => {}
                }
            }
            effects
        }
    }

    #[test]
    fn the_longest_silent_connection_is_replaced_and_its_slot_moves_without_grace() {
        let (mut clients, alice) = (Clients::new(), PeerId::random());
        let [first, second] = [0; 2].map(|_| clients.connect(alice));
        clients.reserve(first);
        let third = clients.connect(alice);
        assert_eq!(clients.replace_with(third), closed(first));
        assert_eq!(clients.slot_of(alice), Some(third));
        // A connection that is being closed is not chosen again.
        assert_eq!(clients.replace_with(third), closed(second));
        assert_eq!(clients.slot_of(alice), Some(third));
        // No other connection is left.
        assert_eq!(clients.replace_with(third), Effects::default());
    }

    #[test]
    fn activity_since_the_last_sweep_counts_and_the_slot_does_not_move() {
        let (mut clients, alice) = (Clients::new(), PeerId::random());
        let [first, second] = [0; 2].map(|_| clients.connect(alice));
        clients.reserve(first);
        clients.activity[first as usize].add(1);
        let third = clients.connect(alice);
        assert_eq!(clients.replace_with(third), closed(second));
        assert_eq!(clients.slot_of(alice), Some(first));
    }

    #[test]
    fn among_equally_silent_connections_the_oldest_is_replaced() {
        let (mut clients, alice) = (Clients::new(), PeerId::random());
        let old = [0; 3].map(|_| clients.connect(alice));
        let new = clients.connect(alice);
        clients.relay.connections.record_activity(&alice, clients.now); // on all of them at once
        for old in old {
            assert_eq!(clients.replace_with(new), closed(old));
        }
    }

    #[test]
    fn without_grace_a_slot_that_cannot_move_to_the_newer_connection_is_freed_as_disconnected() {
        let (mut clients, alice) = (Clients::new(), PeerId::random());
        let grace = Duration::ZERO;
        clients.relay.set_config(Config { grace, ..Config::default() }, clients.now).unwrap();
        let first = clients.connect(alice);
        clients.reserve(first);
        let relayed = Connection::new(alice, "/memory/1".parse().unwrap(), true, 0, clients.now);
        clients.relay.connections.add(first + 1, relayed);
        clients.relay.close_longest_silent_of(alice, first + 1, clients.now);
        let freed = std::iter::from_fn(|| clients.relay.actions.pop_front()).find_map(|action| {
            let Action::Report(Event::ReservationFreed { reason, .. }) = action else {
                return None;
            };
            Some(reason)
        });
        assert_eq!(freed, Some(FreedReason::Disconnected));
    }

    #[test]
    fn circuits_of_the_replaced_connection_end_and_others_continue() {
        let mut clients = Clients::new();
        let (alice, bob) = (PeerId::random(), PeerId::random());
        let [first, of_bob] = [alice, bob].map(|peer| clients.connect(peer));
        let carol = clients.connect(PeerId::random());
        clients.reserve(first);
        clients.reserve(of_bob);
        let mut circuits = [alice, bob].map(|target| clients.open_circuit(carol, target));
        let second = clients.connect(alice);
        assert_eq!(clients.replace_with(second), closed(first));
        let ended = circuits.each_mut().map(|circuit| circuit.try_recv().is_err());
        assert_eq!(ended, [true, false]);
        let _over_the_new_one = clients.open_circuit(carol, alice); // at once
        let circuits_of = |clients: &Clients, of| {
            let circuits = clients.relay.circuits.over(clients.ends[of as usize]);
            circuits.len()
        };
        assert_eq!(circuits_of(&clients, second), 1);
        assert_eq!(circuits_of(&clients, of_bob), 1);
    }

    #[test]
    fn an_idle_connection_may_be_preempted_unless_its_peer_holds_a_slot() {
        let mut clients = Clients::new();
        let alice = PeerId::random();
        let holder = clients.connect(alice);
        clients.reserve(holder);
        clients.connect(alice); // one to spare
        let [first, second] = [0; 2].map(|_| clients.connect(PeerId::random()));
        assert_eq!(clients.idle_without_slot(), [first, second]);
        clients.relay.close(first, CloseReason::Preempted);
        assert_eq!(clients.effects(), closed(first));
        assert_eq!(clients.idle_without_slot(), [second]);
    }
}
