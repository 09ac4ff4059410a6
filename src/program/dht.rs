//! Joins a Kademlia DHT as a server, so that clients that look for relays in it find this one.
//!
//! libp2p's `kad` does the work. This module bounds what it does: it stores nothing for others, keeps and dials only
//! addresses that all nodes of the DHT can dial, and limits the dials in progress. While no node of the DHT is known to
//! answer, it dials the bootstrap nodes.

mod address_range;
mod bootstrap_dialer;
mod bootstrap_nodes;

use std::{
    collections::HashSet,
    task::{Context, Poll, ready},
};

use libp2p::{
    Multiaddr, PeerId, StreamProtocol,
    core::{Endpoint, transport::PortUse},
    kad::{
        self, Event, QueryResult, RoutingUpdate,
        store::{MemoryStore, MemoryStoreConfig},
    },
    swarm::{
        ConnectionClosed, ConnectionDenied, ConnectionId, DialFailure, FromSwarm, NetworkBehaviour,
        NewListenAddr, THandler, THandlerInEvent, THandlerOutEvent, ToSwarm,
        behaviour::ExternalAddrConfirmed,
    },
};

use self::{address_range::AddressRange, bootstrap_dialer::BootstrapDialer};
use crate::program::{
    delegate::delegate_behaviour,
    net::{admission::limits::DIALED_FOR_DHT, multiaddr::without_peer},
};

/// A store without room for records or providers.
const EMPTY_STORE: MemoryStoreConfig = MemoryStoreConfig {
    max_records: 0,
    max_value_bytes: 0,
    max_providers_per_key: 0,
    max_provided_keys: 0,
};

/// Which DHT to join, and through which nodes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// The protocol of the DHT.
    pub protocol: StreamProtocol,
    /// The bootstrap nodes, each with its peer id at the end. Invalid ones are skipped.
    pub bootstrap: Vec<Multiaddr>,
}

impl Config {
    /// The DHT of this protocol, joined through these nodes.
    ///
    /// # Errors
    ///
    /// The invalid setting in one line, with the name of its flag and the remedy.
    pub fn new(protocol: &str, bootstrap: &[Multiaddr]) -> Result<Self, String> {
        for address in bootstrap {
            bootstrap_nodes::parse(address)
                .map_err(|problem| format!("--bootstrap {address}: {problem}"))?;
        }
        // 126 characters: the length of a longer name takes two bytes, which the muxer rejects.
        let is_valid = protocol.len() <= 126 && protocol.chars().all(|c| c.is_ascii_graphic());
        match StreamProtocol::try_from_owned(protocol.to_owned()) {
            Ok(protocol) if is_valid => Ok(Self { protocol, bootstrap: bootstrap.to_vec() }),
            _ => Err(format!(
                "--dht-protocol {protocol:?}: not a protocol of at most 126 characters; try /ipfs/kad/1.0.0"
            )),
        }
    }
}

type Kad = kad::Behaviour<MemoryStore>;
type ToHandler = THandlerInEvent<Kad>;

/// The relay as a node of a DHT.
pub struct Dht {
    kad: Kad,
    protocol: StreamProtocol,
    bootstrap: BootstrapDialer,
    /// The connections that were dialed for the DHT, or are being dialed.
    dialed: HashSet<ConnectionId>,
    /// The range of the DHT: a peer's address of a narrower one is neither kept nor dialed.
    range: AddressRange,
    /// Whether the range follows from the relay's own addresses, because there are no bootstrap nodes.
    range_follows: bool,
    /// Whether a node of the DHT is known to answer: one was added to the routing table since the last bootstrap query,
    /// or answered that query.
    has_joined: bool,
    /// Whether a node answered during the current bootstrap query.
    has_answered: bool,
    has_logged_join: bool,
    is_paused: bool,
}

/// The error of a dial beyond [`DIALED_FOR_DHT`], or while the DHT is paused.
const DIAL_DENIED: &str = "too many connections were dialed for the DHT";

impl Dht {
    /// The relay `local` as a node of this DHT.
    pub fn new(local: PeerId, config: Config) -> Self {
        let mut settings = kad::Config::new(config.protocol.clone());
        settings
            .set_kbucket_inserts(kad::BucketInserts::Manual)
            // Drops records that others want stored. A store that refuses them would not do: kad 0.49 leaves the
            // stream of a refused record open and unanswered.
            .set_record_filtering(kad::StoreInserts::FilterBoth)
            // Turns off the replication job, which remembers each key that it was asked to store, stored or not.
            .set_replication_interval(None)
            .set_publication_interval(None)
            .set_provider_publication_interval(None)
            .set_caching(kad::Caching::Disabled);
        let store = MemoryStore::with_config(local, EMPTY_STORE);
        let mut kad = Kad::with_config(local, store, settings);
        kad.set_mode(Some(kad::Mode::Server));
        let bootstrap = BootstrapDialer::new(&config.bootstrap, local);
        let range = bootstrap.address_range();
        Self {
            kad,
            protocol: config.protocol,
            bootstrap,
            dialed: HashSet::new(),
            range: range.unwrap_or(AddressRange::Loopback),
            range_follows: range.is_none(),
            has_joined: false,
            has_answered: false,
            has_logged_join: false,
            is_paused: false,
        }
    }

    /// Handles what a peer says in identify: whether it serves the DHT, and where it listens.
    pub fn on_identified(&mut self, peer: PeerId, serves: bool, listening: &[Multiaddr]) {
        if !serves && self.kad.remove_peer(&peer).is_some() {
            self.has_joined &= self.kad.kbuckets().next().is_some();
        }
        if serves {
            self.insert(peer, listening);
        }
        let missing = || format!("does not serve {}; see --dht-protocol", self.protocol);
        let serves = serves.then_some(()).ok_or_else(missing);
        self.bootstrap.on_identified(peer, serves);
    }

    /// Pauses or resumes serving the DHT. While paused, the relay is a client of it and dials no nodes.
    pub fn set_paused(&mut self, is_paused: bool) {
        self.is_paused = is_paused;
        let mode = if is_paused { kad::Mode::Client } else { kad::Mode::Server };
        self.kad.set_mode(Some(mode));
        self.has_joined &= !is_paused;
    }

    /// Inserts a peer into the routing table, or replaces its addresses there.
    fn insert(&mut self, peer: PeerId, listening: &[Multiaddr]) {
        let Some(bucket) = self.kad.kbucket(peer) else {
            return; // the relay itself
        };
        let entry = bucket.iter().find(|entry| *entry.node.key.preimage() == peer);
        let known = entry.map(|entry| entry.node.value.clone().into_vec());
        // The bucket is full and its pending entry taken, perhaps by this very peer.
        if known.is_none() && bucket.has_pending() {
            return;
        }
        let addresses = self.range.shareable(listening);
        if addresses.is_empty() {
            return;
        }
        for address in &addresses {
            if !self.add(peer, address.clone()) {
                return;
            }
        }
        // Removes the older addresses, so that a peer's entry does not grow with each change.
        for old in known.iter().flatten() {
            if !addresses.contains(&without_peer(old)) {
                self.kad.remove_address(&peer, old);
            }
        }
    }

    /// Adds an address to the routing table. Returns whether the peer is in it now.
    fn add(&mut self, peer: PeerId, address: Multiaddr) -> bool {
        let added = matches!(self.kad.add_address(&peer, address), RoutingUpdate::Success);
        if added {
            self.has_joined |= !self.is_paused;
            log::debug!("DHT node known: peer {peer}");
        }
        added
    }

    fn on_kad_event(&mut self, event: Event) {
        match event {
            // The relay has dialed the peer there.
            Event::RoutablePeer { peer, address } => {
                self.add(peer, address);
            }
            Event::OutboundQueryProgressed {
                result: QueryResult::Bootstrap(_),
                stats,
                step,
                ..
            } => {
                self.has_answered |= stats.num_successes() > 0;
                if self.has_answered && !std::mem::replace(&mut self.has_logged_join, true) {
                    log::info!("joined the DHT {}: a node of it answers", self.protocol);
                }
                if step.last {
                    let answered = std::mem::take(&mut self.has_answered);
                    log::debug!("DHT bootstrap query ended: any node answered: {answered}");
                    self.has_joined = answered && !self.is_paused;
                }
            }
            _ => {}
        }
    }

    fn on_dial_failure(&mut self, failure: &DialFailure<'_>) {
        self.dialed.remove(&failure.connection_id);
        if self.bootstrap.on_dial_failure(failure) {
            // The node is connected, but perhaps did not answer earlier queries.
            let _ = self.kad.bootstrap();
        }
    }

    fn on_connection_closed(&mut self, closed: &ConnectionClosed<'_>) {
        self.dialed.remove(&closed.connection_id);
        self.bootstrap.on_connection_closed(closed.connection_id);
    }
}

/// Clears the value in the answer to a PUT_VALUE: kad echoes it whether or not it was stored; an answer without it
/// tells the peer that it was not.
fn clear_put_answer(event: &mut ToSwarm<Event, ToHandler>) {
    if let ToSwarm::NotifyHandler { event: ToHandler::PutRecordRes { value, .. }, .. } = event {
        value.clear();
    }
}

impl NetworkBehaviour for Dht {
    type ConnectionHandler = THandler<Kad>;
    /// Never emitted: all of kad's events are handled here.
    type ToSwarm = Event;

    delegate_behaviour!(kad:
        handle_established_inbound_connection, handle_established_outbound_connection,
        on_connection_handler_event);

    /// Chooses where to dial, or denies the dial.
    fn handle_pending_outbound_connection(
        &mut self,
        id: ConnectionId,
        peer: Option<PeerId>,
        addresses: &[Multiaddr],
        role: Endpoint,
    ) -> Result<Vec<Multiaddr>, ConnectionDenied> {
        // A bootstrap node is dialed only at the operator's addresses.
        if self.bootstrap.has_dialed(id) {
            return Ok(Vec::new());
        }
        if self.dialed.contains(&id) && (self.is_paused || self.dialed.len() > DIALED_FOR_DHT) {
            return Err(ConnectionDenied::new(DIAL_DENIED));
        }
        let known = self.kad.handle_pending_outbound_connection(id, peer, addresses, role)?;
        Ok(self.range.dialable(&known))
    }

    fn on_swarm_event(&mut self, event: FromSwarm<'_>) {
        match &event {
            FromSwarm::DialFailure(failure) => self.on_dial_failure(failure),
            FromSwarm::ConnectionClosed(closed) => self.on_connection_closed(closed),
            FromSwarm::NewListenAddr(NewListenAddr { addr, .. })
            | FromSwarm::ExternalAddrConfirmed(ExternalAddrConfirmed { addr })
                if self.range_follows =>
            {
                self.range = self.range.max(AddressRange::of(addr));
            }
            _ => {}
        }
        self.kad.on_swarm_event(event);
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<ToSwarm<Event, ToHandler>> {
        loop {
            let needs_bootstrap = !self.has_joined && !self.is_paused;
            let event = match self.bootstrap.poll(needs_bootstrap, cx) {
                Poll::Ready(opts) => ToSwarm::Dial { opts },
                Poll::Pending => ready!(self.kad.poll(cx)),
            };
            match event {
                ToSwarm::GenerateEvent(event) => self.on_kad_event(event),
                mut event => {
                    if let ToSwarm::Dial { opts } = &event {
                        self.dialed.insert(opts.connection_id());
                    }
                    clear_put_answer(&mut event);
                    return Poll::Ready(event);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use libp2p::swarm::DialError;

    use super::*;

    const KAD: StreamProtocol = StreamProtocol::new("/ipfs/kad/1.0.0");

    fn addresses(texts: &[&str]) -> Vec<Multiaddr> {
        let parsed = texts.iter().map(|text| text.parse());
        parsed.collect::<Result<_, _>>().expect("multiaddrs")
    }

    /// A DHT with a bootstrap node on the internet.
    fn dht() -> Dht {
        let node = format!("/ip4/8.8.8.8/tcp/1/p2p/{}", PeerId::random());
        let config = Config::new(KAD.as_ref(), &addresses(&[&node])).unwrap();
        Dht::new(PeerId::random(), config)
    }

    /// The addresses of this peer that the relay hands out.
    fn shared(dht: &mut Dht, peer: PeerId) -> Vec<Multiaddr> {
        let mut shared = Vec::new();
        for bucket in dht.kad.kbuckets() {
            let entries = bucket.iter();
            let of_peer = entries.filter(|entry| *entry.node.key.preimage() == peer);
            shared.extend(of_peer.flat_map(|entry| entry.node.value.clone().into_vec()));
        }
        shared.iter().map(without_peer).collect()
    }

    fn pending(
        dht: &mut Dht,
        id: ConnectionId,
        peer: PeerId,
    ) -> Result<Vec<Multiaddr>, ConnectionDenied> {
        dht.handle_pending_outbound_connection(id, Some(peer), &[], Endpoint::Dialer)
    }

    #[test]
    fn a_peer_that_only_says_that_it_serves_the_dht_is_not_logged_as_joined() {
        let mut dht = dht();
        dht.on_identified(PeerId::random(), true, &addresses(&["/ip4/8.8.8.8/tcp/1"]));
        assert!(dht.has_joined && !dht.has_logged_join);
    }

    #[test]
    fn a_peers_last_addresses_are_shared() {
        let mut dht = dht();
        let peer = PeerId::random();
        for n in 1..100 {
            let more: Vec<_> =
                (0..9).map(|m| format!("/ip4/8.8.8.8/tcp/{}", n * 100 + m)).collect();
            let more: Vec<_> = more.iter().map(String::as_str).collect();
            dht.on_identified(peer, true, &addresses(&more));
            assert_eq!(shared(&mut dht, peer), addresses(&more[..6]));
        }
        dht.on_identified(peer, false, &addresses(&["/ip4/8.8.8.8/tcp/1"]));
        assert!(shared(&mut dht, peer).is_empty(), "it no longer serves the DHT");
    }

    #[test]
    fn a_peers_private_addresses_are_neither_shared_nor_dialed() {
        let mut dht = dht();
        let peer = PeerId::random();
        let inside = addresses(&["/ip4/127.0.0.1/tcp/22", "/ip4/10.0.0.1/tcp/22"]);
        dht.on_identified(peer, true, &inside);
        assert!(shared(&mut dht, peer).is_empty() && !dht.has_joined);
        // Not even if the routing table contains them.
        for address in inside {
            dht.kad.add_address(&peer, address);
        }
        let id = ConnectionId::new_unchecked(1);
        assert_eq!(pending(&mut dht, id, peer).unwrap(), []);
    }

    #[test]
    fn dials_are_capped_and_denied_while_paused() {
        let mut dht = dht();
        let peer = PeerId::random();
        let id = ConnectionId::new_unchecked;
        for n in 1..=DIALED_FOR_DHT {
            dht.dialed.insert(id(n));
            assert!(pending(&mut dht, id(n), peer).is_ok());
        }
        let one_more = id(DIALED_FOR_DHT + 1);
        dht.dialed.insert(one_more);
        assert!(pending(&mut dht, one_more, peer).is_err());
        let failure = DialFailure {
            peer_id: Some(peer),
            error: &DialError::Aborted,
            connection_id: one_more,
        };
        dht.on_dial_failure(&failure);
        assert_eq!(dht.dialed.len(), DIALED_FOR_DHT);

        let endpoint = libp2p::core::ConnectedPoint::Dialer {
            address: Multiaddr::empty(),
            role_override: Endpoint::Dialer,
            port_use: PortUse::Reuse,
        };
        dht.on_connection_closed(&ConnectionClosed {
            peer_id: peer,
            connection_id: id(1),
            endpoint: &endpoint,
            cause: None,
            remaining_established: 0,
        });
        dht.dialed.insert(one_more);
        assert!(pending(&mut dht, one_more, peer).is_ok());
        dht.set_paused(true);
        assert!(pending(&mut dht, one_more, peer).is_err());
        // A dial of another behaviour is not denied.
        assert!(pending(&mut dht, id(9999), peer).is_ok());
    }
}
