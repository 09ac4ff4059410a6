//! The figures of the relay at one moment, and the types that `/status.json` is made of.

use std::{fmt, time::SystemTime};

use libp2p::PeerId;
use serde::{Serialize, Serializer};

use crate::{
    behaviour::Upkeep,
    event::{Carried, CircuitId},
    program::{mux::budget::Buffered, node::Node},
    relay::quota::Busiest,
};

/// The figures of a relay at one moment.
#[derive(Clone, Copy, Debug)]
pub struct Stats {
    pub draining: bool,
    pub slots: Slots,
    pub circuits: usize,
    pub connections: usize,
    pub relayed: Carried,
    pub upkeep: Upkeep,
    pub buffered: Buffered,
    /// The address that holds the most of each resource.
    pub busiest: [(&'static str, Option<Busiest>); 5],
    pub certificate_not_after: Option<SystemTime>,
}

/// The number of slots, by state.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Slots {
    pub total: usize,
    pub live: usize,
    pub grace: usize,
    pub free: usize,
}

impl Stats {
    /// Takes those of this relay now.
    pub fn of(node: &Node, draining: bool) -> Self {
        let relay = node.relay();
        let (total, table) = (relay.config().max_reservations, relay.reservations());
        let (taken, grace) = (table.taken(), table.in_grace());
        Self {
            draining,
            slots: Slots { total, live: taken - grace, grace, free: total.saturating_sub(taken) },
            circuits: relay.circuits().count(),
            connections: relay.connections().count(),
            relayed: relay.accounts().relayed(),
            upkeep: relay.upkeep(),
            buffered: node.buffered(),
            busiest: node.busiest(),
            certificate_not_after: node.certificate_not_after(),
        }
    }
}

/// An open circuit.
#[derive(Debug, Serialize)]
pub struct Circuit {
    pub id: Shown<CircuitId>,
    pub source: Shown<PeerId>,
    pub target: Shown<PeerId>,
    pub open_for: u64,
    pub carried: Bytes,
    pub rate: Bytes,
}

/// Bytes in each direction.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Bytes {
    pub to_target: u64,
    pub to_source: u64,
}

impl From<Carried> for Bytes {
    fn from(carried: Carried) -> Self {
        Self { to_target: carried.to_target, to_source: carried.to_source }
    }
}

/// Serializes a value as the text of its `Display`.
#[derive(Clone, Debug)]
pub struct Shown<T>(pub T);

impl<T: fmt::Display> Serialize for Shown<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&self.0)
    }
}
