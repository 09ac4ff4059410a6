//! What may change while the relay runs: its configuration, and who may use it.

use std::{hash::Hash, time::Instant};

use libp2p::{Multiaddr, PeerId};

use super::{Pending, Relay, circuits::Circuit, connections::Connection};
use crate::{
    access::{Access, Permission},
    config::{Config, ConfigError},
    event::{FreedReason, Refused},
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
        self.circuits.configure(&config);
        self.heartbeat.restart(now);
        self.reserve_rates.set(config.reserve_rate);
        self.connect_rates.set(config.connect_rate);
        self.link.bandwidth().configure(&config, now);
        // Never later than it was: whoever changes something every second would put it off for ever.
        self.sweep_due = self.sweep_due.min(now + config.sweep);
        self.hurry(now);
        self.config = config;
        self.access_changed(now);
        Ok(())
    }

    /// Lets `access` decide who may use the relay, instead of the configuration's lists.
    pub fn set_access(&mut self, access: Box<dyn Access>, now: Instant) {
        self.access = Some(access);
        self.access_changed(now);
    }

    /// Asks again of everyone who holds a slot, waits for one or is part of a circuit, and ends
    /// what is no longer allowed.
    pub fn access_changed(&mut self, now: Instant) {
        for peer in self.reservations.holders().collect::<Vec<_>>() {
            if self.denies_holder(peer) {
                self.reservations.free(peer, FreedReason::Denied);
                self.tell_changes(now);
                self.end_circuits_of(&peer);
            }
        }
        let is_denied = |circuit: &Circuit<C, _>| {
            let (source, target) = (circuit.source, circuit.target);
            let from = self.address_of(source.connection);
            let source_may = self.access().may_connect(source.peer, &from, target.peer);
            // Its target need not hold a slot any more, or may hold it over another connection.
            let at = self.address_of(target.connection);
            let target_may = self.access().may_reserve(target.peer, &at);
            [source_may, target_may].contains(&Permission::Deny)
        };
        let denied = self.circuits.iter().filter(|(_, circuit)| is_denied(circuit));
        let denied: Vec<_> = denied.map(|(id, _)| id).collect();
        denied.into_iter().for_each(|id| self.end_circuit(id));
        for mut newcomer in self.reclaim.take() {
            let Pending { from, origin, .. } = &newcomer.request;
            match self.access().may_reserve(from.peer, &origin.address) {
                Permission::Deny => self.refuse(newcomer.request, Refused::Denied),
                Permission::Allow(terms) => {
                    newcomer.terms = terms;
                    self.reclaim.requeue(newcomer);
                }
            }
        }
    }

    fn denies_holder(&self, peer: PeerId) -> bool {
        // Who is in grace has no connection; its bill still says where it came from.
        let address = match self.reservations.connection(&peer) {
            Some(connection) => self.address_of(connection),
            None => {
                let bill = self.reservations.bill_of(&peer);
                bill.map_or_else(Multiaddr::empty, |address| address.ip().into())
            }
        };
        self.access().may_reserve(peer, &address) == Permission::Deny
    }

    /// The connections of `peer` that its slot may move to, oldest first: those it may reserve over.
    pub(super) fn fit_for_a_slot(&self, peer: PeerId) -> Vec<C> {
        let may =
            |connection: &Connection| self.access().may_reserve(peer, &connection.origin.address);
        let fit = self.connections.fit_for_a_slot(&peer);
        fit.filter(|(_, up)| may(up) != Permission::Deny).map(|(id, _)| id).collect()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::{
        relay::{Action, circuits::End},
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
            relay.on_connected(connection, up);
            End { peer, connection }
        });
        (relay, ends)
    }

    fn actions(relay: &mut Relay<u32, u32>) -> Vec<Action<u32, u32>> {
        std::iter::from_fn(|| relay.next_action()).collect()
    }

    #[test]
    fn a_circuit_ends_whose_target_is_denied_and_holds_no_slot_any_more() {
        let start = Instant::now();
        let (mut relay, [source, target]) = relay(start);
        relay.handle_request(target, Ok(Request::Reserve), 1, start);
        relay.handle_request(source, Ok(Request::Connect(target.peer)), 2, start);
        let asked = actions(&mut relay).into_iter().find_map(|action| match action {
            Action::AskTarget { circuit, .. } => Some(circuit),
            _ => None,
        });
        let circuit = asked.expect("the target is asked");
        let opened = relay.on_target_answered(circuit, Ok(()), start);
        let (_, mut parameters) = opened.expect("both want it");
        let later = start + Duration::from_secs(2 * 60 * 60);
        relay.heard(target.peer, later);
        relay.heard(source.peer, later);
        relay.sweep(later);
        assert_eq!(relay.reservations().taken(), 0, "the term is over");
        assert_eq!(parameters.ended.try_recv(), Ok(None));

        let mut config = relay.config().clone();
        config.access.deny_subnet = vec!["192.0.2.0/24".parse().unwrap()];
        relay.set_config(config, later).unwrap();
        assert!(parameters.ended.try_recv().is_err());
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
        relay.on_connected(3, Connection::new(holder.peer, address, false, 0, start));
        let mut config = relay.config().clone();
        config.access.deny_subnet = vec!["203.0.113.0/24".parse().unwrap()];
        relay.set_config(config, start).unwrap();
        relay.on_disconnected(holder, start);
        assert_eq!(relay.reservations().connection(&holder.peer), None);
        assert_eq!(relay.reservations().in_grace(), 1);
    }

    #[test]
    fn a_policy_that_changes_all_the_time_puts_no_sweep_off() {
        let start = Instant::now();
        let (mut relay, _) = relay(start);
        let due = relay.sweep_due();
        for later in 1..9 {
            let now = start + Duration::from_millis(later * 100);
            relay.set_config(relay.config().clone(), now).unwrap();
        }
        assert_eq!(relay.sweep_due(), due);
    }
}
