//! What may change while the relay runs: its configuration, and who may use it.

use std::{hash::Hash, time::Instant};

use libp2p::{Multiaddr, PeerId};

use super::Relay;
use crate::{
    access::{Access, Permission},
    circuits::End,
    config::{Config, ConfigError},
    event::Refused,
};

impl<C: Copy + Ord + Hash, S> Relay<C, S> {
    /// Replaces the configuration: [`crate::Behaviour::set_config`].
    ///
    /// # Errors
    ///
    /// As [`Relay::new`]. Nothing has changed then.
    pub fn set_config(&mut self, config: Config, now: Instant) -> Result<(), ConfigError> {
        config.validate()?;
        self.reservations.set_policy((&config).into(), now);
        self.circuits.set_policy((&config).into());
        self.heartbeat.set_policy((&config).into(), now);
        self.reclaim.set_policy((&config).into());
        self.reserve_rates.set(config.reserve_rate);
        self.connect_rates.set(config.connect_rate);
        self.sweep_due = now + config.sweep;
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
                self.reservations.deny(peer);
                self.tell_freed(now);
                self.end_circuits_of(&peer);
            }
        }
        for (id, circuit) in self.circuits.iter().collect::<Vec<_>>() {
            if self.may_connect(circuit.source, circuit.target.peer) == Permission::Deny {
                self.end_circuit(id, circuit);
            }
        }
        for newcomer in self.reclaim.take() {
            let who = newcomer.newcomer;
            match self.may_reserve(who.from) {
                Permission::Deny => self.refuse(who.from, who.request, Refused::Denied),
                Permission::Allow(_) => self.reclaim.wait_on(newcomer),
            }
        }
    }

    pub(super) fn may_reserve(&self, from: End<C>) -> Permission {
        let address = self.address_of(from.connection);
        self.access().may_reserve(from.peer, &address)
    }

    pub(super) fn may_connect(&self, from: End<C>, target: PeerId) -> Permission {
        let address = self.address_of(from.connection);
        self.access().may_connect(from.peer, &address, target)
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

    fn access(&self) -> &dyn Access {
        self.access.as_deref().unwrap_or(&self.config.access)
    }
}
