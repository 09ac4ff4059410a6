//! What may change while the relay runs: its configuration, and who may use it.

use std::{hash::Hash, time::Instant};

use libp2p::{Multiaddr, PeerId};

use super::{Relay, reclaim::PendingReservation};
use crate::{
    access::{Access, Permission},
    config::{Config, ConfigError},
    event::{CircuitEnd, FreedReason, Refused},
};

impl<C: Copy + Ord + Hash, R> Relay<C, R> {
    /// Replaces the configuration: [`crate::Behaviour::set_config`].
    ///
    /// # Errors
    ///
    /// As [`Relay::new`]. Nothing has changed then.
    pub fn set_config(&mut self, config: Config, now: Instant) -> Result<(), ConfigError> {
        config.validate()?;
        self.reservations.configure(&config, now);
        self.circuits.quota.caps = config.circuit_caps();
        self.circuits.per_peer = config.max_circuits_per_peer;
        self.heartbeat.checked_at = now; // the time since the last check does not count as a pause
        self.reserve_rates.per_minute = config.reserve_rate;
        self.connect_rates.per_minute = config.connect_rate;
        self.link.lock().configure(&config, now);
        // Never later than before: otherwise a change every second would postpone it for ever.
        self.sweep_due = self.sweep_due.min(now + config.sweep);
        self.bring_sweep_forward(now);
        if !self.has_own_access {
            self.access = Box::new(config.access.clone());
        }
        self.config = config;
        self.recheck_access(now);
        Ok(())
    }

    /// Lets `access` decide who may use the relay, instead of the configuration's lists.
    pub fn set_access(&mut self, access: Box<dyn Access>, now: Instant) {
        (self.access, self.has_own_access) = (access, true);
        self.recheck_access(now);
    }

    /// Asks again about all peers that hold a slot, wait for one or are part of a circuit, and ends what is denied.
    pub fn recheck_access(&mut self, now: Instant) {
        // For a peer in grace, which has no connection, the first address of the prefix that its slot counts towards.
        let denied = self.reservations.iter().filter(|(peer, slot)| {
            let first = slot.prefix.map_or_else(Multiaddr::empty, |prefix| prefix.ip().into());
            self.is_denied(*peer, slot.connection.map_or(first, |up| self.address_of(up)))
        });
        for peer in denied.map(|(peer, _)| peer).collect::<Vec<_>>() {
            self.release(peer, FreedReason::Denied, now);
        }
        let denied = self.circuits.iter().filter(|(_, circuit)| {
            let (source, target) = (circuit.source, circuit.target);
            let from = self.address_of(source.connection);
            let may_connect = self.access.may_connect(source.peer, &from, target.peer);
            // The target may hold no slot any more, or hold it over another connection.
            let at = self.address_of(target.connection);
            may_connect == Permission::Deny || self.is_denied(target.peer, at)
        });
        for id in denied.map(|(id, _)| id).collect::<Vec<_>>() {
            self.end_circuit(id, CircuitEnd::Denied);
        }
        for newcomer in std::mem::take(&mut self.waiting) {
            let request = &newcomer.request;
            match self.access.may_reserve(request.from.peer, &request.origin.address) {
                Permission::Deny => self.refuse(newcomer.request, Refused::Denied),
                Permission::Allow(terms) => {
                    self.waiting.push_back(PendingReservation { terms, ..newcomer });
                }
            }
        }
    }

    /// The connections of `peer` that its slot may move to, oldest first: those over which it may reserve.
    pub(super) fn fit_for_a_slot(&self, peer: PeerId) -> Vec<C> {
        let fit = self.connections.of(&peer).filter(|(_, up)| {
            let is_usable = !up.origin.relayed && up.closing.is_none();
            is_usable && self.access.may_reserve(peer, &up.origin.address) != Permission::Deny
        });
        fit.map(|(id, _)| id).collect()
    }

    fn is_denied(&self, peer: PeerId, address: Multiaddr) -> bool {
        self.access.may_reserve(peer, &address) == Permission::Deny
    }

    /// The address of a connection's peer; empty if the connection closed.
    fn address_of(&self, connection: C) -> Multiaddr {
        let up = self.connections.get(connection);
        up.map_or_else(Multiaddr::empty, |up| up.origin.address.clone())
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::{
        event::Event,
        relay::{
            Action,
            connections::{Connection, End},
        },
        wire::Request,
    };

    const SOURCE: u32 = 1;
    const TARGET: u32 = 2;

    /// A relay with two connections, the target's from 192.0.2.1.
    fn relay(now: Instant) -> (Relay<u32, u32>, [End<u32>; 2]) {
        let mut relay = Relay::new(Config::default(), now).unwrap();
        let ends = [(SOURCE, "/ip4/198.51.100.1/tcp/1"), (TARGET, "/ip4/192.0.2.1/tcp/1")];
        let ends = ends.map(|(connection, address)| {
            let peer = PeerId::random();
            let address = address.parse().unwrap();
            let up = Connection::new(peer, address, false, 0, now);
            relay.connections.add(connection, up);
            End { peer, connection }
        });
        (relay, ends)
    }

    fn actions(relay: &mut Relay<u32, u32>) -> Vec<Action<u32, u32>> {
        std::iter::from_fn(|| relay.actions.pop_front()).collect()
    }

    #[test]
    fn a_circuit_ends_when_its_target_is_denied_after_losing_its_slot() {
        let start = Instant::now();
        let (mut relay, [source, target]) = relay(start);
        relay.handle_request(target, Ok(Request::Reserve), 1, start);
        relay.handle_request(source, Ok(Request::Connect(target.peer)), 2, start);
        let asked = actions(&mut relay).into_iter().find_map(|action| match action {
            Action::AskTarget(_, parameters) => Some(parameters),
            _ => None,
        });
        let mut parameters = asked.expect("a STOP request to the target");
        let opened = relay.on_target_answered(parameters.id, target.connection, Ok(()), start);
        assert!(opened.is_some(), "an open circuit");
        let later = start + Duration::from_secs(2 * 60 * 60);
        relay.connections.record_activity(&target.peer, later);
        relay.connections.record_activity(&source.peer, later);
        relay.sweep(later);
        assert_eq!(relay.reservations.taken(), 0, "the reservation has expired");
        assert_eq!(parameters.ended.try_recv(), Ok(None));

        let mut config = relay.config.clone();
        config.access.deny_subnet = vec!["192.0.2.0/24".parse().unwrap()];
        relay.set_config(config, later).unwrap();
        assert!(parameters.ended.try_recv().is_err());
        actions(&mut relay);
        relay.on_circuit_ended(parameters.id, CircuitEnd::Disconnected, later); // as its task reports
        let ended = actions(&mut relay);
        let [Action::Report(Event::CircuitClosed { end: CircuitEnd::Denied, .. })] = ended[..]
        else {
            panic!("{ended:?}");
        };
    }

    #[test]
    fn a_connect_that_waits_is_refused_as_denied_once_its_target_is_denied() {
        let start = Instant::now();
        let (mut relay, [source, target]) = relay(start);
        relay.handle_request(target, Ok(Request::Reserve), 1, start);
        relay.handle_request(source, Ok(Request::Connect(target.peer)), 2, start);
        actions(&mut relay);
        let mut config = relay.config.clone();
        config.access.deny_peer.insert(target.peer);
        relay.set_config(config, start).unwrap();
        let refused = actions(&mut relay).into_iter().find_map(|action| match action {
            Action::Report(Event::CircuitRefused { reason, .. }) => Some(reason),
            _ => None,
        });
        assert_eq!(refused, Some(Refused::Denied));
    }

    #[test]
    fn a_slot_does_not_move_to_a_connection_that_may_not_reserve() {
        let start = Instant::now();
        let (mut relay, [_, holder]) = relay(start);
        relay.handle_request(holder, Ok(Request::Reserve), 1, start);
        let granted = actions(&mut relay).into_iter().find_map(|action| match action {
            Action::Grant { receipt, .. } => Some(receipt),
            _ => None,
        });
        relay.on_delivered(holder.peer, granted.expect("a slot is free"), true, start);
        let address = "/ip4/203.0.113.1/tcp/1".parse().unwrap();
        relay.connections.add(3, Connection::new(holder.peer, address, false, 0, start));
        let mut config = relay.config.clone();
        config.access.deny_subnet = vec!["203.0.113.0/24".parse().unwrap()];
        relay.set_config(config, start).unwrap();
        relay.on_disconnected(holder, start);
        assert_eq!(relay.reservations.get(&holder.peer).unwrap().connection, None);
        assert_eq!(relay.reservations.in_grace(), 1);
    }

    #[test]
    fn frequent_policy_changes_do_not_delay_the_sweep() {
        let start = Instant::now();
        let (mut relay, _) = relay(start);
        let due = relay.sweep_due;
        for later in 1..9 {
            let now = start + Duration::from_millis(later * 100);
            relay.set_config(relay.config.clone(), now).unwrap();
        }
        assert_eq!(relay.sweep_due, due);
    }
}
