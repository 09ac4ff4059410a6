//! The sweep: one pass over the tables, for all that ends without anybody saying so.
//!
//! All of it goes by the monotonic clock ([`Instant`]), whatever becomes of the wall clock. A process
//! that was stopped, or a virtual machine that was paused, finds that this clock went on: its sweep is
//! late, what is over is over, and silences start anew. On a machine that was suspended, Linux lets it
//! stand still: it is as if no time had passed but on the wall clock, so a slot that is not renewed
//! ends so much later than its peer was told, and who went meanwhile is asked within a heartbeat.

use std::{
    hash::Hash,
    time::{Duration, Instant},
};

use super::{Action, Relay, circuits::End, reclaim::TICK};
use crate::event::{Event, FreedReason};

/// How late a sweep may come before questions count anew. Before that its lateness is taken off the
/// time for which they have been open: a relay that has no time hears no answers.
const LATE: Duration = Duration::from_secs(1);

impl<C: Copy + Ord + Hash, R> Relay<C, R> {
    /// Looks at everything: what is over, who has been silent, who is idle, and whether there is a
    /// slot for those who wait.
    pub fn sweep(&mut self, now: Instant) {
        // What was answered while the relay stood still may not have been read yet.
        let late = now.saturating_duration_since(self.sweep_due);
        if late > TICK {
            let excuse = |since| if late > LATE { now } else { since + late };
            self.connections.excuse(excuse);
            self.circuits.excuse(excuse);
        }
        self.reserve_rates.forget_full(now);
        self.connect_rates.forget_full(now);
        self.link.bandwidth().forget_paid(now);
        self.reservations.end_what_is_over(now);
        self.tell_changes(now);
        self.connections.listen(now);
        self.circuits.look(now);
        let mut beat = self.heartbeat.beat(&self.config, self.connections.watched(), now);
        if let Some(fault) = beat.fault {
            log::warn!("{fault}");
        }
        for connection in beat.probe {
            self.probe(connection);
        }
        // In the order in which they came, so that a rerun of a simulation is the same.
        beat.timed_out.sort_unstable();
        for connection in beat.timed_out {
            self.time_out(connection, now);
        }
        self.reclaim(now);
        self.close_idle(now);
        self.give_back(now);
        self.sweep_due = now + self.config.sweep;
        self.hurry(now);
    }

    /// Memory was scarce at the last sweep: ends the circuits that hold some and have moved nothing for a while.
    pub fn end_stalled(&mut self, now: Instant) {
        self.circuits.stalled(now).into_iter().for_each(|id| self.end_circuit(id));
    }

    fn close_idle(&mut self, now: Instant) {
        let timeout = self.config.idle_timeout;
        let timeout = if timeout.is_zero() { Duration::MAX } else { timeout };
        for (end, floods) in self.connections.take_idle(timeout, now) {
            let why = if floods { "flooding".into() } else { format!("idle for {timeout:?}") };
            log::debug!("connection {why}: closing that of peer {}", end.peer);
            self.actions.push_back(Action::Close(end));
        }
    }

    /// Sweeps soon, if a newcomer waits or connections are given back.
    pub(super) fn hurry(&mut self, now: Instant) {
        if self.reclaim.waiting() > 0 || self.is_draining() {
            self.sweep_due = self.sweep_due.min(now + TICK);
        }
    }

    /// The peer at the other end of this connection has timed out: as if it were gone, whether or not it is
    /// closed.
    pub(super) fn time_out(&mut self, connection: C, now: Instant) {
        let Some(silent) = self.connections.get_mut(connection) else {
            return;
        };
        let (peer, address) = (silent.origin.peer, silent.origin.address.clone());
        let silent_for = silent.silent_for(now);
        silent.liveness.on_activity(now); // if it stays up, its silence starts anew
        self.tell(Event::PeerSilent { peer, address, silent_for });
        self.give_up(End { peer, connection }, now);
        if self.config.close_silent {
            self.close(End { peer, connection });
        }
    }

    /// From now on nothing goes over a connection, whether or not it is closed.
    pub(super) fn give_up(&mut self, gone: End<C>, now: Instant) {
        let End { peer, connection } = gone;
        self.circuits.over(gone).into_iter().for_each(|id| self.end_circuit(id));
        let mut up = self.fit_for_a_slot(peer);
        up.retain(|other| *other != connection);
        self.reservations.disconnected(peer, connection, &up, FreedReason::Silent, now);
        self.tell_changes(now);
    }

    pub(super) fn probe(&mut self, connection: C) {
        if let Some(up) = self.connections.get(connection) {
            let to = End { peer: up.origin.peer, connection };
            log::debug!("asked for a sign of life: peer {}", to.peer);
            self.probes += 1;
            self.actions.push_back(Action::Probe(to, self.config.silence));
        }
    }
}

#[cfg(test)]
mod tests {
    use libp2p::PeerId;

    use super::*;
    use crate::{config::Config, relay::connections::Connection, wire::Request};

    const TEN_MINUTES: Duration = Duration::from_secs(600);

    /// A relay with two that hold a slot.
    fn relay(config: Config, now: Instant) -> (Relay<u32, ()>, [End<u32>; 2]) {
        let mut relay = Relay::new(config, now).unwrap();
        let holders = [0, 1].map(|connection| {
            let peer = PeerId::random();
            let address = "/memory/1".parse().unwrap();
            relay.on_connected(connection, Connection::new(peer, address, false, 0, now));
            let end = End { peer, connection };
            relay.handle_request(end, Ok(Request::Reserve), (), now);
            end
        });
        while let Some(action) = relay.next_action() {
            if let Action::Grant { request, receipt, .. } = action {
                relay.on_delivered(request.from.peer, receipt, true, now);
            }
        }
        (relay, holders)
    }

    /// Who was asked, who was judged, and whose slot came back why.
    #[derive(Debug, Default, PartialEq)]
    struct Found {
        asked: Vec<PeerId>,
        silent: Vec<PeerId>,
        freed: Vec<(PeerId, FreedReason)>,
    }

    fn found(relay: &mut Relay<u32, ()>) -> Found {
        let mut found = Found::default();
        while let Some(action) = relay.next_action() {
            match action {
                Action::Probe(to, _) => found.asked.push(to.peer),
                Action::Tell(Event::PeerSilent { peer, .. }) => found.silent.push(peer),
                Action::Tell(Event::ReservationFreed { peer, reason, .. }) => {
                    found.freed.push((peer, reason));
                }
                _ => {}
            }
        }
        found
    }

    /// Sweeps when it is due, until something is found. When that was.
    fn until_found(relay: &mut Relay<u32, ()>) -> (Instant, Found) {
        loop {
            let now = relay.sweep_due();
            relay.sweep(now);
            let found = found(relay);
            if found != Found::default() {
                return (now, found);
            }
        }
    }

    #[test]
    fn after_ten_minutes_in_which_it_stood_still_silences_start_anew_and_what_is_over_is_over() {
        let start = Instant::now();
        let (mut relay, [stays, leaves]) = relay(Config::default(), start);
        let (asked, both) = until_found(&mut relay);
        assert_eq!(both.asked.len(), 2);
        relay.on_disconnected(leaves, asked);
        found(&mut relay);

        let late = asked + TEN_MINUTES;
        relay.sweep(late);
        let expected =
            Found { freed: vec![(leaves.peer, FreedReason::GraceOver)], ..Found::default() };
        assert_eq!(found(&mut relay), expected);

        // The question from before counts for nothing.
        let Config { heartbeat, silence, .. } = Config::default();
        let (asked, again) = until_found(&mut relay);
        assert_eq!((asked, again.asked), (late + heartbeat, vec![stays.peer]));
        let (judged, silent) = until_found(&mut relay);
        assert_eq!((judged, silent.silent), (late + silence, vec![stays.peer]));
    }

    #[test]
    fn a_term_that_ended_while_it_stood_still_is_over() {
        let start = Instant::now();
        let config = Config { reservation_ttl: TEN_MINUTES / 2, ..Config::default() };
        let (mut relay, holders) = relay(config, start);
        relay.sweep(start + TEN_MINUTES);
        let found = found(&mut relay);
        assert!(found.silent.is_empty() && found.asked.is_empty());
        let freed = |end: &End<u32>| found.freed.contains(&(end.peer, FreedReason::Expired));
        assert!(holders.iter().all(freed), "{found:?}");
    }
}
