//! Dials the bootstrap nodes as they become due, after resolving their names.

use std::{
    collections::{HashMap, hash_map::RandomState},
    error::Error,
    hash::BuildHasher,
    io,
    task::{Context, Poll},
    time::{Duration, Instant},
};

use futures_timer::Delay;
use libp2p::{
    Multiaddr, PeerId,
    futures::{FutureExt, StreamExt, future::BoxFuture, stream::FuturesUnordered},
    swarm::{ConnectionId, DialError, DialFailure, dial_opts::DialOpts},
};

use super::{
    address_range::AddressRange,
    bootstrap_nodes::{self, BootstrapNodes},
};

/// The bootstrap nodes, and those that are being dialed.
pub struct BootstrapDialer {
    nodes: BootstrapNodes,
    /// Those whose names are being resolved.
    lookups: FuturesUnordered<BoxFuture<'static, (PeerId, io::Result<Vec<Multiaddr>>)>>,
    /// Those that were dialed and have not yet sent which protocols they support.
    dialed: HashMap<ConnectionId, PeerId>,
    next_due: Delay,
    random: RandomState,
}

impl BootstrapDialer {
    /// Dials the nodes at these addresses, except `local`, which is the relay.
    pub fn new(addresses: &[Multiaddr], local: PeerId) -> Self {
        Self {
            nodes: BootstrapNodes::new(addresses, local, Instant::now()),
            lookups: FuturesUnordered::new(),
            dialed: HashMap::new(),
            next_due: Delay::new(Duration::ZERO),
            random: RandomState::new(),
        }
    }

    /// The widest range of the nodes' addresses; `None` if there are no nodes.
    pub fn address_range(&self) -> Option<AddressRange> {
        self.nodes.addresses().map(AddressRange::of).max()
    }

    /// Whether this dial is one of a bootstrap node.
    pub fn has_dialed(&self, id: ConnectionId) -> bool {
        self.dialed.contains_key(&id)
    }

    /// Returns the next dial, while dials are `wanted`.
    pub fn poll(&mut self, wanted: bool, cx: &mut Context<'_>) -> Poll<DialOpts> {
        if !wanted {
            return Poll::Pending;
        }
        loop {
            // 1. Dial a node whose name was resolved.
            while let Poll::Ready(Some((peer, resolved))) = self.lookups.poll_next_unpin(cx) {
                match resolved {
                    Ok(addresses) => {
                        let dial = DialOpts::peer_id(peer).addresses(addresses).build();
                        self.dialed.insert(dial.connection_id(), peer);
                        return Poll::Ready(dial);
                    }
                    Err(error) => self.on_result(peer, Err(format!("lookup failed: {error}"))),
                }
            }
            // 2. Resolve the name of the next node that is due.
            let now = Instant::now();
            if let Some(node) = self.nodes.next(now) {
                let (peer, addresses) = (node.peer, node.addresses.clone());
                log::debug!("trying --bootstrap peer {peer}");
                let lookup = async move { (peer, bootstrap_nodes::resolve(addresses).await) };
                self.lookups.push(lookup.boxed());
                continue;
            }
            // 3. Wait until another one is.
            let Some(due) = self.nodes.due() else {
                return Poll::Pending;
            };
            self.next_due.reset(due.saturating_duration_since(now));
            if self.next_due.poll_unpin(cx).is_pending() {
                return Poll::Pending;
            }
        }
    }

    /// Handles identify's report of whether a peer serves the DHT; the error says that it does not.
    pub fn on_identified(&mut self, peer: PeerId, serves: Result<(), String>) {
        let is_serving = serves.is_ok();
        let dial = self.dialed.iter().find(|(_, node)| **node == peer);
        if let Some(dial) = dial.map(|(id, _)| *id) {
            self.dialed.remove(&dial);
            self.on_result(peer, serves);
        }
        if is_serving {
            self.nodes.reset_backoff(&peer, Instant::now());
        }
    }

    /// Handles a failed dial. Returns whether it was of a node that is connected already.
    pub fn on_dial_failure(&mut self, failure: &DialFailure<'_>) -> bool {
        let Some(peer) = self.dialed.remove(&failure.connection_id) else {
            return false;
        };
        if let DialError::DialPeerConditionFalse(_) = failure.error {
            let (jitter, now) = self.jitter();
            self.nodes.back_off(&peer, jitter, now);
            return true;
        }
        let cause = root_cause(failure.error);
        self.on_result(peer, Err(format!("cannot be reached: {cause}")));
        false
    }

    /// Handles the end of a connection.
    pub fn on_connection_closed(&mut self, id: ConnectionId) {
        if let Some(peer) = self.dialed.remove(&id) {
            self.on_result(peer, Err("closed the connection".into()));
        }
    }

    fn on_result(&mut self, peer: PeerId, result: Result<(), String>) {
        let (jitter, now) = self.jitter();
        match self.nodes.on_attempt(&peer, result, jitter, now) {
            Some(Ok(())) => log::info!("--bootstrap: peer {peer} answers again"),
            Some(Err(problem)) => {
                log::warn!("--bootstrap: peer {peer}: {problem}; trying again with backoff");
            }
            None => {}
        }
    }

    /// A random jitter for a backoff, and the time from which that counts.
    fn jitter(&self) -> (u8, Instant) {
        let now = Instant::now();
        (self.random.hash_one(now) as u8, now)
    }
}

/// The innermost source of the first address's error, without the address itself.
fn root_cause(error: &DialError) -> String {
    let first = match error {
        DialError::Transport(failures) => failures.first(),
        _ => None,
    };
    let first: &(dyn Error + 'static) = first.map_or(error, |(_, error)| error);
    let cause = anyhow::Chain::new(first).last();
    cause.map_or_else(String::new, ToString::to_string)
}

#[cfg(test)]
mod tests {
    use libp2p::futures::task::noop_waker_ref;

    use super::*;

    #[test]
    fn a_name_that_is_resolved_while_no_dial_is_wanted_is_dialed_later() {
        let mut dialer = BootstrapDialer::new(&[], PeerId::random());
        let address = "/ip4/192.0.2.1/tcp/1".parse().unwrap();
        dialer.lookups.push(async { (PeerId::random(), Ok(vec![address])) }.boxed());
        let cx = &mut Context::from_waker(noop_waker_ref());
        assert!(dialer.poll(false, cx).is_pending());
        assert!(dialer.poll(true, cx).is_ready());
    }
}
