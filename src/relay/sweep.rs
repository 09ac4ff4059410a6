//! The sweep: one pass over the tables that ends what has expired or timed out.
//!
//! All times are of the monotonic clock ([`Instant`]), independent of the wall clock. If the process was stopped or its
//! virtual machine paused, that clock continued: the sweep is late, reservations and graces that have run out end, and
//! liveness timers are reset. Linux stops the clock while the machine is suspended, as if no time had passed: a slot
//! that is not renewed ends that much later than its peer was told, and a peer that left meanwhile is probed within a
//! heartbeat.

use std::{
    hash::Hash,
    time::{Duration, Instant},
};

use super::{
    Action, Relay,
    connections::{CloseReason, End},
    reclaim::TICK,
};
use crate::event::{CircuitEnd, Event, FreedReason};

/// A sweep that is later than this restarts open probes. One that is less late extends them by its lateness: a relay
/// without CPU time reads no answers.
const LATE: Duration = Duration::from_secs(1);

impl<C: Copy + Ord + Hash, R> Relay<C, R> {
    /// Passes over all tables.
    pub fn sweep(&mut self, now: Instant) {
        // 1. What arrived while the process was stopped may not have been read yet: probes, stop requests and stalls get that time.
        let late = now.saturating_duration_since(self.sweep_due);
        if late > TICK {
            let shift = |since| if late > LATE { now } else { since + late };
            self.connections.shift_probes(shift);
            self.circuits.shift_waits(shift);
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
        if let Some(fault) = found.fault {
            log::warn!("{fault}");
        }
        found.probe.into_iter().for_each(|connection| self.probe(connection));
        found.timed_out.retain(|connection| !self.defer_timeout(*connection, now));
        found.timed_out.sort_unstable(); // so that a simulation can be repeated
        found.timed_out.into_iter().for_each(|connection| self.time_out(connection, now));
        // 5. Ask targets that do not answer over another connection: they may have reconnected without reserving again, and
        //    the old connection may be half-open. Find slots for newcomers.
        for (id, silent) in self.circuits.unanswered(now) {
            self.ask_over_another(id, silent, now);
        }
        self.reclaim(now);
        // 6. Close idle connections, and while draining those that are due.
        let timeout = self.config.idle_timeout;
        let timeout = if timeout.is_zero() { Duration::MAX } else { timeout };
        let idle = self.connections.idle_for(timeout, now);
        idle.into_iter().for_each(|(end, reason)| self.close(end, reason));
        self.close_due(now);
        self.sweep_due = now + self.config.sweep;
        self.bring_sweep_forward(now);
    }

    /// Ends the circuits that hold bytes and have transferred none for a while: memory was scarce at the last sweep.
    pub fn end_stalled(&mut self, now: Instant) {
        let stalled = self.circuits.stalled(now);
        stalled.into_iter().for_each(|id| self.end_circuit(id, CircuitEnd::Stalled));
    }

    /// Sweeps soon if a newcomer waits or the relay drains.
    pub(super) fn bring_sweep_forward(&mut self, now: Instant) {
        if !self.waiting.is_empty() || self.is_draining() {
            self.sweep_due = self.sweep_due.min(now + TICK);
        }
    }

    /// Handles a peer that timed out on this connection: as if it had closed, whether or not the relay closes it.
    pub(super) fn time_out(&mut self, connection: C, now: Instant) {
        let Some(silent) = self.connections.get_mut(connection) else {
            return;
        };
        let (peer, address) = (silent.origin.peer, silent.origin.address.clone());
        let silent_for = silent.liveness.silent_for(now);
        silent.liveness.on_activity(now); // if it stays open, its timers start again
        (silent.has_timed_out, silent.liveness.is_silent) = (true, true);
        self.report(Event::PeerSilent { peer, address, silent_for });
        let timed_out = End { peer, connection };
        self.abandon(timed_out, CircuitEnd::Silent, now);
        if self.config.close_silent {
            self.close(timed_out, CloseReason::Silent);
        }
    }

    /// Whether a peer that did not answer in time has until twice the silence limit, because its link loses packets and its
    /// end of the connection was heard. Probes it again: if it acknowledges that, it is not gone.
    pub(super) fn defer_timeout(&mut self, connection: C, now: Instant) -> bool {
        let most = self.config.silence * 2;
        let up = self.connections.get_mut(connection);
        let lossy = up.filter(|up| up.liveness.silent_for(now) < most && up.is_lossy());
        let Some(up) = lossy else { return false };
        up.liveness.on_probe(now);
        self.probe(connection);
        true
    }

    /// Makes slots in grace live again whose peers are heard over the connection that they timed out on.
    fn revive(&mut self, now: Instant) {
        if self.config.close_silent || self.reservations.in_grace() == 0 {
            return;
        }
        for heard in self.connections.heard_again() {
            let slot = self.reservations.get(&heard.peer);
            if slot.is_some_and(|slot| slot.connection.is_none())
                && self.fit_for_a_slot(heard.peer).contains(&heard.connection)
                && let Some(up) = self.connections.get(heard.connection)
            {
                let (peer, address) = (heard.peer, up.origin.address.clone());
                self.reservations.revive(heard);
                self.apply_changes(now);
                self.report(Event::ReservationAccepted { peer, address, renewed: true });
            }
        }
    }

    /// Ends the circuits over a connection, and moves its reservation or begins the grace; without grace, frees its slot.
    pub(super) fn abandon(&mut self, gone: End<C>, end: CircuitEnd, now: Instant) {
        self.circuits.over(gone).into_iter().for_each(|id| self.end_circuit(id, end));
        let mut up = self.fit_for_a_slot(gone.peer);
        up.retain(|other| *other != gone.connection);
        let is_closed = end == CircuitEnd::Disconnected;
        let reason = if is_closed { FreedReason::Disconnected } else { FreedReason::Silent };
        let slot = self.reservations.get(&gone.peer).and_then(|slot| slot.connection);
        self.reservations.on_disconnected(gone, &up, reason, now);
        self.apply_changes(now);
        // The answer for the address that it moved to may come later.
        if slot == Some(gone.connection) && !up.is_empty() {
            self.recheck(Some(gone.peer), now);
        }
    }

    pub(super) fn probe(&mut self, connection: C) {
        if let Some(up) = self.connections.get(connection) {
            let to = End { peer: up.origin.peer, connection };
            log::debug!("probe sent: peer {}", to.peer);
            self.probes += 1;
            self.actions.push_back(Action::Probe(to, self.config.silence));
        }
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
        activity::ActivityCounter, config::Config, relay::connections::Connection, wire::Request,
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
    fn after_a_suspend_of_ten_minutes_liveness_resets_and_ended_terms_expire() {
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

        // The probe sent before the suspend does not count.
        let Config { heartbeat, silence, .. } = Config::default();
        let (probed, again) = until_found(&mut relay);
        assert_eq!((probed, again.probed), (late + heartbeat, vec![stays.peer]));
        let (evicted_at, silent) = until_found(&mut relay);
        assert_eq!((evicted_at, silent.silent), (late + silence, vec![stays.peer]));
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

    /// Where only the relay's own streams count: no verdict within the silence limit, and none after a single probe.
    #[test]
    fn a_newcomer_takes_no_slot_of_a_peer_of_which_only_some_streams_count_before_two_probes_and_the_limit()
     {
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
    fn a_peer_behind_a_lossy_link_times_out_after_twice_the_silence_limit() {
        let start = Instant::now();
        let (mut relay, [live, gone]) = relay(Config::default(), start);
        lose_packets(&mut relay, live.connection);
        let Config { silence, .. } = Config::default();
        let found = sweep_until(&mut relay, start + silence);
        assert_eq!(found.silent, [gone.peer]);
        assert_eq!(found.probed.iter().filter(|peer| **peer == live.peer).count(), 2);
        let found = sweep_until(&mut relay, start + 2 * silence - Duration::from_secs(1));
        assert_eq!((found.probed, found.silent), (vec![live.peer], vec![]));
        let found = sweep_until(&mut relay, start + 2 * silence);
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
    fn a_term_that_ended_during_a_suspend_is_expired() {
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
