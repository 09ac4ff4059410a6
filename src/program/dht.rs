//! A Kademlia DHT, joined as a server: those who walk it, as clients do that look for relays, find
//! this one.
//!
//! libp2p's `kad` does the work. Around it stands what keeps it small: it stores nothing for
//! others, keeps and dials only addresses that make sense, and so many at a time; and it comes into
//! the DHT, again and again if need be, by the nodes that the operator named.

mod bootstrap;
mod routable;
mod visits;

use std::{
    collections::HashSet,
    error::Error,
    fmt,
    task::{Context, Poll},
};

use libp2p::{
    Multiaddr, PeerId, StreamProtocol,
    core::{Endpoint, transport::PortUse},
    kad::{
        self, QueryResult, RoutingUpdate,
        store::{MemoryStore, MemoryStoreConfig},
    },
    swarm::{
        ConnectionClosed, ConnectionDenied, ConnectionId, DialFailure, FromSwarm, NetworkBehaviour,
        NewListenAddr, THandler, THandlerInEvent, THandlerOutEvent, ToSwarm,
        behaviour::ExternalAddrConfirmed,
    },
};

use self::{
    routable::{Reach, without_peer},
    visits::Visits,
};
use crate::program::net::admission::limits::DIALED_FOR_DHT;

/// A store for nothing at all: what strangers bring is theirs to keep.
const NOTHING: MemoryStoreConfig = MemoryStoreConfig {
    max_records: 0,
    max_value_bytes: 0,
    max_providers_per_key: 0,
    max_provided_keys: 0,
};

/// Which DHT, and by whom it is joined.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// The protocol that all of its nodes speak.
    pub protocol: StreamProtocol,
    /// Nodes that are in it, each with its id at the end. Those that make no sense are left out.
    pub bootstrap: Vec<Multiaddr>,
}

impl Config {
    /// A DHT whose nodes speak this protocol, by these nodes.
    ///
    /// # Errors
    ///
    /// What makes no sense, in one line, with the name of its flag and the remedy.
    pub fn new(protocol: &str, bootstrap: &[Multiaddr]) -> Result<Self, String> {
        for address in bootstrap {
            bootstrap::named(address)
                .map_err(|problem| format!("--bootstrap {address}: {problem}"))?;
        }
        let is_one = protocol.len() <= 140 && protocol.chars().all(|c| c.is_ascii_graphic());
        match StreamProtocol::try_from_owned(protocol.to_owned()) {
            Ok(protocol) if is_one => Ok(Self { protocol, bootstrap: bootstrap.to_vec() }),
            _ => Err(format!("--dht-protocol {protocol:?}: is no protocol; try /ipfs/kad/1.0.0")),
        }
    }
}

type Kad = kad::Behaviour<MemoryStore>;
type ToHandler = THandlerInEvent<Kad>;

/// The relay's part in the DHT.
pub struct Dht {
    kad: Kad,
    protocol: StreamProtocol,
    visits: Visits,
    /// What was dialed for the DHT, whether or not it is up yet.
    dialed: HashSet<ConnectionId>,
    reach: Reach,
    /// Whether that follows from where the relay is, because the operator named nobody.
    reach_follows: bool,
    /// Whether somebody in it is known to answer.
    joined: bool,
    /// Whether anybody answered in the walk that is under way.
    answered: bool,
    /// Whether it was ever told that it has joined.
    told: bool,
    resting: bool,
}

/// As many connections are dialed as may be, or none may be.
#[derive(Debug)]
struct NotNow;

impl fmt::Display for NotNow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("enough connections were dialed for the DHT")
    }
}

impl Error for NotNow {}

impl Dht {
    /// The part of `local` in that DHT.
    pub fn new(local: PeerId, config: Config) -> Self {
        let mut settings = kad::Config::new(config.protocol.clone());
        settings
            .set_kbucket_inserts(kad::BucketInserts::Manual)
            // What comes to be stored is dropped. Not by a store that refuses it: kad 0.49 would leave
            // the stream that it came on open, and unanswered.
            .set_record_filtering(kad::StoreInserts::FilterBoth)
            // There is nothing to hand on; and the job that would remembers each key that it is
            // asked to store, whether or not it was stored.
            .set_replication_interval(None)
            .set_publication_interval(None)
            .set_provider_publication_interval(None)
            .set_caching(kad::Caching::Disabled);
        let store = MemoryStore::with_config(local, NOTHING);
        let mut kad = Kad::with_config(local, store, settings);
        kad.set_mode(Some(kad::Mode::Server));
        let visits = Visits::new(&config.bootstrap, local);
        let reach = visits.reach();
        Self {
            kad,
            protocol: config.protocol,
            visits,
            dialed: HashSet::new(),
            reach: reach.unwrap_or(Reach::Machine),
            reach_follows: reach.is_none(),
            joined: false,
            answered: false,
            told: false,
            resting: false,
        }
    }

    /// The protocol that all of its nodes speak.
    pub fn protocol(&self) -> &StreamProtocol {
        &self.protocol
    }

    /// A peer says whether it speaks that protocol, and where it listens.
    pub fn hear(&mut self, peer: PeerId, serves: bool, listens: &[Multiaddr]) {
        if !serves && self.kad.remove_peer(&peer).is_some() {
            self.joined &= self.kad.kbuckets().next().is_some();
        }
        if serves {
            self.insert(peer, listens);
        }
        let missing = || format!("does not serve {}; see --dht-protocol", self.protocol);
        let serves = serves.then_some(()).ok_or_else(missing);
        self.visits.heard(peer, serves);
    }

    /// Goes out of the DHT, as far as that depends on us, or into it again.
    pub fn rest(&mut self, resting: bool) {
        self.resting = resting;
        self.kad.set_mode(Some(match resting {
            true => kad::Mode::Client,
            false => kad::Mode::Server,
        }));
        self.joined &= !resting;
    }

    /// Puts a peer that is in the DHT, and listens there, into the table.
    fn insert(&mut self, peer: PeerId, listens: &[Multiaddr]) {
        let Some(bucket) = self.kad.kbucket(peer) else {
            return; // ourselves
        };
        let entry = bucket.iter().find(|entry| *entry.node.key.preimage() == peer);
        let known = entry.map(|entry| entry.node.value.clone().into_vec());
        // One waits for a place in it already. It may be this one, and has what it needs.
        if known.is_none() && bucket.has_pending() {
            return;
        }
        let addresses = self.reach.tellable(listens);
        if addresses.is_empty() {
            return;
        }
        for address in &addresses {
            if !self.add(peer, address.clone()) {
                return;
            }
        }
        // So that it has no more than these, however often it says others.
        for before in known.iter().flatten() {
            if !addresses.contains(&without_peer(before)) {
                self.kad.remove_address(&peer, before);
            }
        }
    }

    /// Whether the peer is in the table now.
    fn add(&mut self, peer: PeerId, address: Multiaddr) -> bool {
        let added = matches!(self.kad.add_address(&peer, address), RoutingUpdate::Success);
        if added {
            self.joined |= !self.resting;
            if !std::mem::replace(&mut self.told, true) {
                log::info!("joined the DHT {} at peer {peer}", self.protocol);
            }
        }
        added
    }

    fn note(&mut self, event: kad::Event) {
        match event {
            // It was dialed there, so it can be.
            kad::Event::RoutablePeer { peer, address } => {
                self.add(peer, address);
            }
            kad::Event::OutboundQueryProgressed {
                result: QueryResult::Bootstrap(_),
                stats,
                step,
                ..
            } => {
                self.answered |= stats.num_successes() > 0;
                if step.last {
                    let answered = std::mem::take(&mut self.answered);
                    log::debug!("walked the DHT: anybody there: {answered}");
                    self.joined = answered && !self.resting;
                }
            }
            _ => {}
        }
    }

    fn dial_failed(&mut self, failure: &DialFailure<'_>) {
        self.dialed.remove(&failure.connection_id);
        if self.visits.failed(failure) {
            // It may have been silent until now.
            let _ = self.kad.bootstrap();
        }
    }

    fn closed(&mut self, closed: &ConnectionClosed<'_>) {
        self.dialed.remove(&closed.connection_id);
        self.visits.closed(closed.connection_id);
    }
}

/// kad answers a PUT_VALUE with the value, whether or not it was stored. Without it whoever asked
/// knows.
fn admit_that_nothing_is_stored(event: &mut ToSwarm<kad::Event, ToHandler>) {
    if let ToSwarm::NotifyHandler { event: ToHandler::PutRecordRes { value, .. }, .. } = event {
        value.clear();
    }
}

impl NetworkBehaviour for Dht {
    type ConnectionHandler = THandler<Kad>;
    /// Never: it keeps all of kad's events to itself.
    type ToSwarm = kad::Event;

    fn handle_established_inbound_connection(
        &mut self,
        id: ConnectionId,
        peer: PeerId,
        local: &Multiaddr,
        remote: &Multiaddr,
    ) -> Result<THandler<Self>, ConnectionDenied> {
        self.kad.handle_established_inbound_connection(id, peer, local, remote)
    }

    /// Where to dial, if we are to: what strangers say of each other leads nowhere but into the DHT.
    fn handle_pending_outbound_connection(
        &mut self,
        id: ConnectionId,
        peer: Option<PeerId>,
        addresses: &[Multiaddr],
        role: Endpoint,
    ) -> Result<Vec<Multiaddr>, ConnectionDenied> {
        if self.visits.include(id) {
            return Ok(Vec::new()); // where the operator says
        }
        if self.dialed.contains(&id) && (self.resting || self.dialed.len() > DIALED_FOR_DHT) {
            return Err(ConnectionDenied::new(NotNow));
        }
        let known = self.kad.handle_pending_outbound_connection(id, peer, addresses, role)?;
        Ok(self.reach.dialable(&known))
    }

    fn handle_established_outbound_connection(
        &mut self,
        id: ConnectionId,
        peer: PeerId,
        address: &Multiaddr,
        role: Endpoint,
        port_use: PortUse,
    ) -> Result<THandler<Self>, ConnectionDenied> {
        self.kad.handle_established_outbound_connection(id, peer, address, role, port_use)
    }

    fn on_swarm_event(&mut self, event: FromSwarm<'_>) {
        match &event {
            FromSwarm::DialFailure(failure) => self.dial_failed(failure),
            FromSwarm::ConnectionClosed(closed) => self.closed(closed),
            FromSwarm::NewListenAddr(NewListenAddr { addr, .. })
            | FromSwarm::ExternalAddrConfirmed(ExternalAddrConfirmed { addr })
                if self.reach_follows =>
            {
                self.reach = self.reach.max(Reach::of(addr));
            }
            _ => {}
        }
        self.kad.on_swarm_event(event);
    }

    fn on_connection_handler_event(
        &mut self,
        peer: PeerId,
        id: ConnectionId,
        event: THandlerOutEvent<Self>,
    ) {
        self.kad.on_connection_handler_event(peer, id, event);
    }

    fn poll(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<ToSwarm<Self::ToSwarm, THandlerInEvent<Self>>> {
        loop {
            let alone = !self.joined && !self.resting;
            if let Poll::Ready(opts) = self.visits.poll(alone, cx) {
                self.dialed.insert(opts.connection_id());
                return Poll::Ready(ToSwarm::Dial { opts });
            }
            match self.kad.poll(cx) {
                Poll::Ready(ToSwarm::GenerateEvent(event)) => self.note(event),
                Poll::Ready(ToSwarm::Dial { opts }) => {
                    self.dialed.insert(opts.connection_id());
                    return Poll::Ready(ToSwarm::Dial { opts });
                }
                Poll::Ready(mut event) => {
                    admit_that_nothing_is_stored(&mut event);
                    return Poll::Ready(event);
                }
                Poll::Pending => return Poll::Pending,
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

    /// A DHT that is joined by a node of the internet.
    fn dht() -> Dht {
        let node = format!("/ip4/8.8.8.8/tcp/1/p2p/{}", PeerId::random());
        let config = Config::new(KAD.as_ref(), &addresses(&[&node])).unwrap();
        Dht::new(PeerId::random(), config)
    }

    /// What others are told of this peer.
    fn told(dht: &mut Dht, peer: PeerId) -> Vec<Multiaddr> {
        let mut told = Vec::new();
        for bucket in dht.kad.kbuckets() {
            let entries = bucket.iter();
            let of_peer = entries.filter(|entry| *entry.node.key.preimage() == peer);
            told.extend(of_peer.flat_map(|entry| entry.node.value.clone().into_vec()));
        }
        told.iter().map(without_peer).collect()
    }

    fn pending(
        dht: &mut Dht,
        id: ConnectionId,
        peer: PeerId,
    ) -> Result<Vec<Multiaddr>, ConnectionDenied> {
        dht.handle_pending_outbound_connection(id, Some(peer), &[], Endpoint::Dialer)
    }

    #[test]
    fn a_peer_is_told_with_the_addresses_that_it_named_last() {
        let mut dht = dht();
        let peer = PeerId::random();
        for n in 1..100 {
            let more: Vec<_> =
                (0..9).map(|m| format!("/ip4/8.8.8.8/tcp/{}", n * 100 + m)).collect();
            let more: Vec<_> = more.iter().map(String::as_str).collect();
            dht.hear(peer, true, &addresses(&more));
            assert_eq!(told(&mut dht, peer), addresses(&more[..6]));
        }
        dht.hear(peer, false, &addresses(&["/ip4/8.8.8.8/tcp/1"]));
        assert!(told(&mut dht, peer).is_empty(), "it serves no DHT any more");
    }

    #[test]
    fn where_a_stranger_points_into_a_network_is_neither_told_nor_dialed() {
        let mut dht = dht();
        let peer = PeerId::random();
        let inside = addresses(&["/ip4/127.0.0.1/tcp/22", "/ip4/10.0.0.1/tcp/22"]);
        dht.hear(peer, true, &inside);
        assert!(told(&mut dht, peer).is_empty() && !dht.joined);
        // However it came to be there.
        for address in inside {
            dht.kad.add_address(&peer, address);
        }
        let id = ConnectionId::new_unchecked(1);
        assert_eq!(pending(&mut dht, id, peer).unwrap(), []);
    }

    #[test]
    fn so_many_are_dialed_at_a_time_and_none_while_it_rests() {
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
        dht.dial_failed(&failure);
        assert_eq!(dht.dialed.len(), DIALED_FOR_DHT);

        let endpoint = libp2p::core::ConnectedPoint::Dialer {
            address: Multiaddr::empty(),
            role_override: Endpoint::Dialer,
            port_use: PortUse::Reuse,
        };
        dht.closed(&ConnectionClosed {
            peer_id: peer,
            connection_id: id(1),
            endpoint: &endpoint,
            cause: None,
            remaining_established: 0,
        });
        dht.dialed.insert(one_more);
        assert!(pending(&mut dht, one_more, peer).is_ok());
        dht.rest(true);
        assert!(pending(&mut dht, one_more, peer).is_err());
        // Somebody else's dial is none of its business.
        assert!(pending(&mut dht, id(9999), peer).is_ok());
    }
}
