//! The tables of the other relays: the data structures of each, and what a RESERVE does to them, as briefly as
//! possible.

use std::{
    collections::HashMap,
    net::IpAddr,
    time::{Duration, Instant},
};

use libp2p::PeerId;

use super::{peer::Peer, reserve::Table};

const TTL: Duration = Duration::from_secs(60 * 60);

/// rust-libp2p (libp2p-relay 0.22): the connections of each peer, and whether a reservation is active on them. Each
/// RESERVE, also a renewal, counts all of them.
pub struct CountsAll {
    max: usize,
    peers: HashMap<PeerId, HashMap<usize, bool>>,
}

impl CountsAll {
    pub fn of(max: usize) -> Self {
        let peers = HashMap::new();
        Self { max, peers }
    }
}

impl Table for CountsAll {
    fn hold(&mut self, peer: &Peer, _: Instant) {
        let connections = self.peers.entry(peer.id).or_default();
        connections.insert(peer.connection, true);
    }

    fn reserve(&mut self, peer: &Peer, now: Instant) -> bool {
        let active = |of: &HashMap<_, bool>| of.values().filter(|active| **active).count();
        let taken: usize = self.peers.values().map(active).sum();
        let room = taken < self.max;
        if room {
            self.hold(peer, now);
        }
        room
    }

    fn free(&mut self, peer: &Peer) {
        self.peers.remove(&peer.id);
    }
}

/// go-libp2p (0.51): lists of peers with their expirations, one of all and one per address. Each RESERVE walks all of
/// them for expired ones, and again for the peer's earlier one.
pub struct WalksAll {
    max: usize,
    all: Vec<(PeerId, Instant)>,
    by_address: HashMap<IpAddr, Vec<(PeerId, Instant)>>,
}

impl WalksAll {
    pub fn of(max: usize) -> Self {
        Self { max, all: Vec::new(), by_address: HashMap::new() }
    }

    fn keep(&mut self, keep: impl Fn(&(PeerId, Instant)) -> bool) {
        self.all.retain(&keep);
        self.by_address.retain(|_, list| {
            list.retain(&keep);
            !list.is_empty()
        });
    }
}

impl Table for WalksAll {
    fn hold(&mut self, peer: &Peer, now: Instant) {
        let entry = (peer.id, now + TTL);
        self.all.push(entry);
        self.by_address.entry(peer.address).or_default().push(entry);
    }

    fn reserve(&mut self, peer: &Peer, now: Instant) -> bool {
        self.keep(|(_, expires)| *expires >= now);
        self.free(peer);
        let room = self.all.len() < self.max;
        if room {
            self.hold(peer, now);
        }
        room
    }

    fn free(&mut self, peer: &Peer) {
        self.keep(|(other, _)| *other != peer.id);
    }
}
