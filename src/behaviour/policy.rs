//! What may change while the relay runs: its configuration, and who may use it.

use std::time::Instant;

use libp2p::{Multiaddr, PeerId, swarm::ConnectionId};

use super::Behaviour;
use crate::{
    access::{Access, Permission},
    circuits::End,
    config::{Config, ConfigError},
    event::Refused,
};

/// Whether this configuration makes sense, to a relay of this name.
pub(super) fn check(config: &Config, relay: PeerId) -> Result<(), ConfigError> {
    config.validate()?;
    for announced in &config.announce {
        if announced.clone().with_p2p(relay).is_err() {
            let problem = format!("{announced} names another peer; this relay is {relay}");
            return Err(ConfigError::new("announce", problem));
        }
    }
    Ok(())
}

impl Behaviour {
    /// The configuration that holds.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Replaces the configuration while the relay runs. See [`Config`] for what holds from when.
    ///
    /// A lowered cap drops nobody who is live: nobody is admitted until there is room. Whoever the
    /// rules no longer let in loses its slot and its circuits at once.
    ///
    /// # Errors
    ///
    /// As [`Behaviour::new`]. Nothing has changed then.
    pub fn set_config(&mut self, config: Config) -> Result<(), ConfigError> {
        check(&config, self.peer)?;
        let now = Instant::now();
        self.reservations.set_policy((&config).into(), now);
        self.circuits.set_policy((&config).into());
        self.heartbeat.set_policy((&config).into(), now);
        self.reclaim.set_policy((&config).into());
        self.reserve_rates.set(config.reserve_rate);
        self.connect_rates.set(config.connect_rate);
        self.in_a_hurry = false;
        self.sweep_in(config.sweep);
        self.config = config;
        self.hurry();
        self.access_changed();
        Ok(())
    }

    /// Lets `access` decide who may use the relay, instead of the lists in [`Config::access`].
    pub fn set_access(&mut self, access: impl Access + 'static) {
        self.access = Some(Box::new(access));
        self.access_changed();
    }

    /// Asks again of everyone who holds a slot, waits for one or is part of a circuit, and ends
    /// what is no longer allowed. To be called when [`Access`] would answer otherwise than before.
    pub fn access_changed(&mut self) {
        for peer in self.reservations.holders().collect::<Vec<_>>() {
            if self.denies_holder(peer) {
                self.reservations.deny(peer);
                self.tell_freed();
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

    pub(super) fn may_reserve(&self, from: End<ConnectionId>) -> Permission {
        let address = self.address_of(from.connection);
        self.access().may_reserve(from.peer, &address)
    }

    pub(super) fn may_connect(&self, from: End<ConnectionId>, target: PeerId) -> Permission {
        let address = self.address_of(from.connection);
        self.access().may_connect(from.peer, &address, target)
    }

    fn denies_holder(&self, peer: PeerId) -> bool {
        // Who is in grace has no connection; its bill still says where it came from.
        let address = match self.reservations.connection(&peer) {
            Some(connection) => self.address_of(connection),
            None => {
                let bill = self.reservations.bill_of(&peer);
                bill.map_or_else(Multiaddr::empty, |address| address.to_multiaddr())
            }
        };
        self.access().may_reserve(peer, &address) == Permission::Deny
    }

    fn access(&self) -> &dyn Access {
        self.access.as_deref().unwrap_or(&self.config.access)
    }
}
