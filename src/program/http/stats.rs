//! The figures of the relay at one moment, and the types that `/status.json` is made of.

use std::{
    fmt,
    time::{Duration, SystemTime},
};

use libp2p::{Multiaddr, PeerId};
use serde::{Serialize, Serializer};

use crate::{
    config::Config,
    event::{BytesTransferred, CircuitId},
    program::{
        mux::{budget::Buffered, stream_limits::StreamLimits},
        net::admission::limits::Limits,
        node::Node,
    },
    relay::quota::Busiest,
    wall_clock,
};

/// The figures of a relay at one moment.
#[derive(Clone, Copy, Debug)]
pub struct Stats {
    /// Why the relay does not serve, if it does not.
    pub not_serving: Option<&'static str>,
    pub limits: ConfiguredLimits,
    /// The memory that the relay takes at most, in bytes.
    pub memory: u64,
    pub slots: Slots,
    /// How many circuits count towards `max-circuits`: those that are open or being set up.
    pub circuits: usize,
    pub connections: usize,
    pub relayed: BytesTransferred,
    /// How many probes it sent. Those without an answer are [`crate::Event::PeerSilent`].
    pub probes: u64,
    /// How many sweeps there were.
    pub sweeps: u64,
    /// How long all sweeps took together.
    pub swept_for: Duration,
    pub buffered: Buffered,
    /// The address that holds the most of each resource.
    pub busiest: [(&'static str, Option<Busiest>); 6],
    pub certificate_not_after: Option<SystemTime>,
}

/// The configured limits by the names of their settings; durations in seconds, zero for none.
pub type ConfiguredLimits = [(&'static str, u64); 12];

/// The limits that the node was started with, beside those of its configuration.
#[derive(Clone, Copy, Debug, Default)]
pub struct StartLimits {
    /// The limits on connections.
    pub connections: Limits,
    /// The limits on streams.
    pub streams: StreamLimits,
    /// The memory that the relay takes at most, in bytes: the estimate that it logs at its start.
    pub memory: u64,
}

impl StartLimits {
    fn beside(&self, config: &Config) -> ConfiguredLimits {
        let Self { connections, streams, .. } = self;
        [
            ("max-reservations", config.max_reservations as u64),
            ("max-circuits", config.max_circuits as u64),
            ("max-circuits-per-peer", config.max_circuits_per_peer as u64),
            ("max-connections", connections.max_connections as u64),
            ("max-connections-per-peer", connections.max_connections_per_peer as u64),
            ("max-handshakes", connections.max_handshakes as u64),
            ("max-streams", streams.max_streams as u64),
            ("max-buffered", streams.buffered(config.max_circuits_per_peer) as u64),
            ("reservation-ttl", config.reservation_ttl.as_secs()),
            ("circuit-duration", config.circuit_duration.as_secs()),
            ("circuit-bytes", config.circuit_bytes),
            ("bandwidth", config.bandwidth),
        ]
    }
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
    /// The figures of this relay now.
    pub fn of(node: &Node, limits: &StartLimits) -> Self {
        let relay = node.relay();
        let (view, (sweeps, swept_for)) = (relay.view(), relay.sweeps);
        let (total, table) = (view.config.max_reservations, &view.reservations);
        let (taken, grace) = (table.taken(), table.in_grace());
        Self {
            not_serving: wall_clock::not_serving(view.is_draining(), SystemTime::now()),
            limits: limits.beside(&view.config),
            memory: limits.memory,
            slots: Slots { total, live: taken - grace, grace, free: total.saturating_sub(taken) },
            circuits: view.circuits.count(),
            connections: view.connections.count(),
            relayed: view.accounts.relayed(),
            probes: view.probes,
            sweeps,
            swept_for,
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
    pub source_address: Option<Multiaddr>,
    pub target: Shown<PeerId>,
    pub target_address: Option<Multiaddr>,
    pub open_for: u64,
    /// When it reaches its time limit, if it has one.
    pub ends_in: Option<u64>,
    pub carried: Bytes,
    /// What it may still carry, if that is limited.
    pub left: Option<Bytes>,
    pub rate: Bytes,
}

/// Bytes in each direction.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Bytes {
    pub to_target: u64,
    pub to_source: u64,
}

impl From<BytesTransferred> for Bytes {
    fn from(carried: BytesTransferred) -> Self {
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
