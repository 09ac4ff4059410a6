//! `/status.json`, which the page shows.
//!
//! Collected on the relay's thread, once a second while it is requested. That thread only copies it; the thread that
//! serves HTTP serializes it.

use std::{
    collections::BTreeMap,
    time::{Instant, SystemTime},
};

use libp2p::{Multiaddr, PeerId, swarm::ConnectionId};
use serde::Serialize;

use super::{
    history::History,
    process::resident_memory,
    refusals::Refusals,
    speeds::{Speed, Speeds},
    stats::{Bytes, Circuit, Shown, Slots, Stats},
};
use crate::{program::node::Node, relay::reservations::Slot};

/// How many holders of slots are listed at most, and how many circuits.
const MAX_LISTED: usize = 1000;

/// The whole status. Times are in seconds, rates in bytes a second.
#[derive(Debug, Serialize)]
pub struct Status {
    pub version: &'static str,
    pub peer: Shown<PeerId>,
    pub draining: bool,
    pub not_serving: Option<&'static str>,
    pub up_for: u64,
    pub addresses: Vec<Multiaddr>,
    /// The addresses of `--announce`.
    pub announced: Vec<Multiaddr>,
    /// The addresses that reservations contain, best first, with the relay's `/p2p/…`.
    pub reachable_at: Vec<Multiaddr>,
    /// By the names of their settings; zero: no limit.
    pub limits: BTreeMap<&'static str, u64>,
    pub memory: Memory,
    /// When the certificate of `--tls-cert` expires; zero: it has expired.
    pub certificate_ends_in: Option<u64>,
    pub slots: Slots,
    pub history: History,
    pub holders: Listed<Holder>,
    pub circuits: Listed<Circuit>,
    pub connections: usize,
    pub relayed: Bytes,
    pub rate: Bytes,
    #[serde(flatten)]
    pub refusals: Refusals,
    pub questions: Probes,
}

/// How many there are of something, and a list of them, which is shorter if there are many.
#[derive(Debug, Serialize)]
pub struct Listed<T> {
    /// Circuits that are being set up count, and are not listed.
    pub count: usize,
    /// At most [`MAX_LISTED`], in no order.
    pub listed: Vec<T>,
}

impl<T> Listed<T> {
    /// Lists the first [`MAX_LISTED`] of `all`; the iterator yields no others.
    fn of(count: usize, all: impl Iterator<Item = T>) -> Self {
        Self { count, listed: all.take(MAX_LISTED).collect() }
    }
}

/// A peer that holds a slot.
#[derive(Debug, Serialize)]
pub struct Holder {
    pub peer: Shown<PeerId>,
    /// The remote address of its connection; in grace, the IP address that its slot counts towards.
    pub address: Option<Multiaddr>,
    /// `live` while it is connected, else `grace`.
    pub state: &'static str,
    /// When the slot is freed, unless the peer renews or reconnects.
    pub ends_in: u64,
    /// For how long nothing was received from it.
    pub silent_for: Option<u64>,
    /// The number of circuits that it is part of.
    pub circuits: usize,
}

/// The memory of the process, in bytes.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Memory {
    /// How much of it is in RAM, if the system tells.
    pub resident: Option<u64>,
    /// How much it takes at most under its limits.
    pub estimate: u64,
}

/// Probes of silent peers.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Probes {
    pub asked: u64,
    pub unanswered: u64,
}

/// The parts of a [`Status`] that build up over time.
#[derive(Debug)]
pub struct Recorder {
    pub started: Instant,
    pub history: History,
    /// The speed of each circuit.
    pub speeds: Speeds,
    /// The speed of all circuits together.
    pub speed: Speed,
    pub refusals: Refusals,
}

impl Recorder {
    /// Records the current stats, whether or not a status is requested.
    pub fn record(&mut self, stats: &Stats, now: Instant) {
        self.history.record(stats.slots, now);
        self.speed.update(stats.relayed, now);
    }

    /// An empty record, from now on.
    pub fn new(now: Instant) -> Self {
        Self {
            started: now,
            history: History::new(now),
            speeds: Speeds::default(),
            speed: Speed::new(now),
            refusals: Refusals::default(),
        }
    }
}

impl Status {
    /// The status of this relay now.
    pub fn of(node: &Node, stats: &Stats, recorder: &mut Recorder, now: Instant) -> Self {
        let relay = node.relay().view();
        Self {
            version: env!("CARGO_PKG_VERSION"),
            peer: Shown(node.peer_id()),
            draining: relay.is_draining(),
            not_serving: stats.not_serving,
            up_for: now.saturating_duration_since(recorder.started).as_secs(),
            addresses: node.listeners().cloned().collect(),
            announced: relay.config.announce.clone(),
            reachable_at: node.relay().addresses(None),
            limits: stats.limits.into(),
            memory: Memory { resident: resident_memory(), estimate: stats.memory },
            certificate_ends_in: stats
                .certificate_not_after
                .map(|time| time.duration_since(SystemTime::now()).unwrap_or_default().as_secs()),
            slots: stats.slots,
            history: recorder.history.clone(),
            holders: holders(node, now),
            circuits: circuits(node, &mut recorder.speeds, now),
            connections: stats.connections,
            relayed: stats.relayed.into(),
            rate: recorder.speed.per_second().into(),
            refusals: recorder.refusals.clone(),
            questions: Probes { asked: stats.probes, unanswered: recorder.refusals.unanswered },
        }
    }
}

fn holders(node: &Node, now: Instant) -> Listed<Holder> {
    let relay = node.relay().view();
    let table = &relay.reservations;
    let holder = |(peer, slot): (PeerId, Slot<ConnectionId>)| {
        let connection = slot.connection.and_then(|over| relay.connections.get(over));
        let address = match connection {
            Some(connection) => Some(connection.origin.address.clone()),
            None => slot.prefix.map(|prefix| prefix.ip().into()),
        };
        Holder {
            peer: Shown(peer),
            address,
            state: if slot.connection.is_some() { "live" } else { "grace" },
            ends_in: slot.ends.saturating_duration_since(now).as_secs(),
            silent_for: connection.map(|connection| connection.liveness.silent_for(now).as_secs()),
            circuits: relay.circuits.count_of(&peer),
        }
    };
    Listed::of(table.taken(), table.iter().map(holder))
}

fn circuits(node: &Node, speeds: &mut Speeds, now: Instant) -> Listed<Circuit> {
    let relay = node.relay().view();
    let address_of = |over| Some(relay.connections.get(over)?.origin.address.clone());
    speeds.forget(|id| relay.circuits.records.contains_key(&id));
    let open = relay.circuits.iter().filter_map(|(id, circuit)| {
        let (since, carried) = circuit.open()?;
        let open_for = now.saturating_duration_since(since);
        let limit = circuit.limit;
        Some(Circuit {
            id: Shown(id),
            source: Shown(circuit.source.peer),
            source_address: address_of(circuit.source.connection),
            target: Shown(circuit.target.peer),
            target_address: address_of(circuit.target.connection),
            open_for: open_for.as_secs(),
            ends_in: limit.duration.map(|most| most.saturating_sub(open_for).as_secs()),
            carried: carried.into(),
            left: limit.bytes.map(|most| Bytes {
                to_target: most.saturating_sub(carried.to_target),
                to_source: most.saturating_sub(carried.to_source),
            }),
            rate: speeds.update(id, since, carried, now).into(),
        })
    });
    Listed::of(relay.circuits.count(), open)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn at_most_a_thousand_elements_of_a_list_are_visited() {
        let mut visited = 0;
        let list = Listed::of(1_000_000, (0..1_000_000).inspect(|_| visited += 1));
        assert_eq!((list.count, list.listed.len()), (1_000_000, 1000));
        assert_eq!(visited, 1000);
        let short = Listed::of(2, [7, 8].into_iter());
        assert_eq!((short.count, short.listed), (2, vec![7, 8]));
    }
}
