//! The sweep: one pass over the tables, for all that ends without anybody saying so.

use std::{
    hash::Hash,
    time::{Duration, Instant},
};

use libp2p::PeerId;

use super::{Command, Order, Relay};
use crate::{circuits::End, connections::Remote, event::Event, reclaim::TICK};

/// How late a sweep may come before questions count anew. Before that its lateness is taken off the
/// time for which they have been open: a relay that has no time hears no answers.
const LATE: Duration = Duration::from_secs(1);

impl<C: Copy + Ord + Hash, S> Relay<C, S> {
    /// Looks at everything: what is over, who has been silent, who is idle, and whether there is a
    /// slot for those who wait.
    pub fn sweep(&mut self, now: Instant) {
        // What was answered while the relay stood still may not have been read yet.
        let late = now.saturating_duration_since(self.sweep_due);
        if late > LATE {
            self.connections.ask_anew(now);
        } else if late > TICK {
            self.connections.excuse(late);
        }
        self.reserve_rates.forget_full(now);
        self.connect_rates.forget_full(now);
        self.link.bandwidth().forget_paid(now);
        self.reservations.end_what_is_over(now);
        self.tell_freed(now);
        self.connections.listen(now);
        let mut beat = self.heartbeat.beat(self.connections.watched(), now);
        if let Some(fault) = beat.fault {
            log::warn!("{fault}");
        }
        for connection in beat.ask {
            self.ask_for_sign(connection);
        }
        // In the order in which they came, so that a rerun of a simulation is the same.
        beat.silent.sort_unstable();
        for connection in beat.silent {
            self.silent(connection, now);
        }
        self.reclaim(now);
        self.close_idle(now);
        self.give_back(now);
        self.sweep_due = now + self.config.sweep;
        self.hurry(now);
    }

    fn close_idle(&mut self, now: Instant) {
        let timeout = self.config.idle_timeout;
        if timeout.is_zero() {
            return;
        }
        for (peer, connection) in self.connections.take_idle(timeout, now) {
            log::debug!("connection idle for {timeout:?}: closing that of peer {peer}");
            let idle = End { peer, connection };
            self.orders.push_back(Order::Close(idle));
        }
    }

    /// Sweeps soon, if a newcomer waits or connections are given back.
    pub(super) fn hurry(&mut self, now: Instant) {
        if self.reclaim.waiting() > 0 || self.is_draining() {
            self.sweep_due = self.sweep_due.min(now + TICK);
        }
    }

    /// Nothing was heard on this connection: as if it were gone, whether or not it is closed.
    pub(super) fn silent(&mut self, connection: C, now: Instant) {
        let Some(silent) = self.connections.get(connection) else {
            return;
        };
        let Remote { peer, address, .. } = &*silent.remote;
        let (peer, address) = (*peer, address.clone());
        let silent_for = silent.silent_for(now);
        self.connections.judged(connection, now);
        self.tell(Event::PeerSilent {
            peer,
            address,
            silent_for,
        });
        self.give_up(End { peer, connection }, now);
        if self.config.close_silent {
            self.close(End { peer, connection });
        }
    }

    /// From now on nothing goes over a connection, whether or not it is closed.
    fn give_up(&mut self, gone: End<C>, now: Instant) {
        let End { peer, connection } = gone;
        for (id, circuit) in self.circuits.over(gone) {
            self.end_circuit(id, circuit);
        }
        let before = self.reservations.connection(&peer);
        let mut up = self.connections.fit_for_a_slot(&peer);
        up.retain(|other| *other != connection);
        let left = self.reservations.silent(peer, connection, &up, now);
        self.after_leaving(peer, before, left, now);
    }

    /// Closes that connection of `peer` but `but` on which nothing was heard for the longest, as if
    /// it were gone.
    pub fn close_longest_silent_of(&mut self, peer: PeerId, but: C, now: Instant) {
        self.connections.listen(now);
        let silence = |id: &C| self.connections.get(*id).map(|c| c.silent_for(now));
        let others = self.connections.open_of(&peer).filter(|id| *id != but);
        let Some(connection) = others.max_by_key(silence) else {
            return;
        };
        log::debug!("another connection of peer {peer} takes the place of one of its own");
        let replaced = End { peer, connection };
        self.give_up(replaced, now);
        self.close(replaced);
    }

    /// Closes the connection but `but` that has been idle for the longest.
    pub fn close_longest_idle(&mut self, but: C) {
        let Some((peer, connection)) = self.connections.longest_idle(but) else {
            return;
        };
        log::debug!("one that holds a slot takes the place of an idle connection of peer {peer}");
        self.close(End { peer, connection });
    }

    pub(super) fn ask_for_sign(&mut self, connection: C) {
        if let Some(peer) = self.connections.get(connection).map(|c| c.remote.peer) {
            log::debug!("asked for a sign of life: peer {peer}");
            self.questions += 1;
            let question = Command::AskForSign(self.config.silence);
            self.command(End { peer, connection }, question);
        }
    }
}
