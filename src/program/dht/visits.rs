//! The operator's nodes, dialed: one after the other as they are due, their names looked up first.

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
    bootstrap::{self, Bootstraps},
    routable::Reach,
};

/// The nodes, and those that are being visited.
pub struct Visits {
    nodes: Bootstraps,
    /// Those whose names are being looked up.
    lookups: FuturesUnordered<BoxFuture<'static, (PeerId, io::Result<Vec<Multiaddr>>)>>,
    /// Those that were dialed and have not said yet what they serve.
    under_way: HashMap<ConnectionId, PeerId>,
    next: Delay,
    random: RandomState,
}

impl Visits {
    /// To the nodes at these addresses, but for `local`, which is the relay.
    pub fn new(addresses: &[Multiaddr], local: PeerId) -> Self {
        Self {
            nodes: Bootstraps::new(addresses, local, Instant::now()),
            lookups: FuturesUnordered::new(),
            under_way: HashMap::new(),
            next: Delay::new(Duration::ZERO),
            random: RandomState::new(),
        }
    }

    /// From where the nodes can be reached; `None`: there are none.
    pub fn reach(&self) -> Option<Reach> {
        self.nodes.addresses().map(Reach::of).max()
    }

    /// Whether this connection is, or is to be, one to a node, which is dialed where the operator
    /// says.
    pub fn include(&self, id: ConnectionId) -> bool {
        self.under_way.contains_key(&id)
    }

    /// The next one to dial. New ones begin only while they are `wanted`.
    pub fn poll(&mut self, wanted: bool, cx: &mut Context<'_>) -> Poll<DialOpts> {
        loop {
            while let Poll::Ready(Some((peer, found))) = self.lookups.poll_next_unpin(cx) {
                match found {
                    Ok(addresses) => {
                        let visit = DialOpts::peer_id(peer).addresses(addresses).build();
                        self.under_way.insert(visit.connection_id(), peer);
                        return Poll::Ready(visit);
                    }
                    Err(error) => self.came_to(peer, Err(format!("cannot be looked up: {error}"))),
                }
            }
            if !wanted {
                return Poll::Pending;
            }
            let now = Instant::now();
            if let Some(node) = self.nodes.next(now) {
                let (peer, addresses) = (node.peer, node.addresses.clone());
                log::debug!("trying --bootstrap peer {peer}");
                let lookup = async move { (peer, bootstrap::look_up(addresses).await) };
                self.lookups.push(lookup.boxed());
                continue;
            }
            let Some(due) = self.nodes.due() else {
                return Poll::Pending;
            };
            self.next.reset(due.saturating_duration_since(now));
            if self.next.poll_unpin(cx).is_pending() {
                return Poll::Pending;
            }
        }
    }

    /// A peer says whether it serves the DHT.
    pub fn heard(&mut self, peer: PeerId, serves: Result<(), String>) {
        let takes_part = serves.is_ok();
        let visit = self.under_way.iter().find(|(_, node)| **node == peer);
        if let Some(visit) = visit.map(|(id, _)| *id) {
            self.under_way.remove(&visit);
            self.came_to(peer, serves);
        }
        if takes_part {
            self.nodes.takes_part(&peer);
        }
    }

    /// Somebody could not be dialed. Whether that is a node that is connected already.
    pub fn failed(&mut self, failure: &DialFailure<'_>) -> bool {
        let Some(peer) = self.under_way.remove(&failure.connection_id) else {
            return false;
        };
        if let DialError::DialPeerConditionFalse(_) = failure.error {
            let (jitter, now) = self.jitter();
            self.nodes.later(&peer, jitter, now);
            return true;
        }
        let cause = in_a_line(failure.error);
        self.came_to(peer, Err(format!("cannot be reached: {cause}")));
        false
    }

    /// A connection is gone.
    pub fn closed(&mut self, id: ConnectionId) {
        if let Some(peer) = self.under_way.remove(&id) {
            self.came_to(peer, Err("hangs up".into()));
        }
    }

    fn came_to(&mut self, peer: PeerId, this: Result<(), String>) {
        let (jitter, now) = self.jitter();
        match self.nodes.tried(&peer, this, jitter, now) {
            Some(Ok(())) => log::info!("--bootstrap: peer {peer} is there again"),
            Some(Err(problem)) => {
                log::warn!("--bootstrap: peer {peer} {problem}; trying again after growing pauses");
            }
            None => {}
        }
    }

    fn jitter(&self) -> (u8, Instant) {
        let now = Instant::now();
        (self.random.hash_one(now) as u8, now)
    }
}

/// What is behind it all, without the addresses.
fn in_a_line(error: &DialError) -> String {
    let first: &(dyn Error + 'static) = match error {
        DialError::Transport(failures) => match failures.first() {
            Some((_, error)) => error,
            None => error,
        },
        error => error,
    };
    let cause = anyhow::Chain::new(first).last();
    cause.map_or_else(String::new, ToString::to_string)
}
