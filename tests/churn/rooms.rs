//! relaylet: the real thing but for its sockets, `relaylet::relay`.
//!
//! Connections have numbers. There are no circuits, and all answers to a RESERVE are delivered:
//! they fit into the socket's buffer.

use std::{
    collections::HashMap,
    net::{IpAddr, Ipv4Addr},
    time::{Duration, Instant},
};

use libp2p::PeerId;
use relaylet::{
    ActivityCounter, Config, Event, FreedReason,
    relay::{
        self, Action,
        connections::{Connection, End},
    },
    wire::Request,
};

use crate::world::{Act, Relay};

/// The program's TCP keepalive asks after 60 s of silence and gives up at the next look, 15 s on,
/// because TCP_USER_TIMEOUT is over by then.
const KERNEL_GIVES_UP: Duration = Duration::from_secs(75);

pub struct Rooms {
    relay: relay::Relay<usize, usize>,
    /// What the virtual clock calls zero; the relay sees differences only.
    start: Instant,
    peers: HashMap<usize, PeerId>,
    signs: HashMap<usize, ActivityCounter>,
    acts: Vec<Act>,
    /// Whether somebody waited for a slot when the relay looked last.
    somebody_waited: bool,
}

impl Rooms {
    pub fn new(config: Config) -> Self {
        let start = Instant::now();
        Self {
            relay: relay::Relay::new(config, start).expect("it makes sense"),
            start,
            peers: HashMap::new(),
            signs: HashMap::new(),
            acts: Vec::new(),
            somebody_waited: false,
        }
    }

    fn end(&self, connection: usize) -> End<usize> {
        let peer = self.peers[&connection];
        End { peer, connection }
    }

    /// By the heartbeat, or sooner because somebody waited. Who waited may have been served by then.
    fn judged(&self, connection: usize) -> Act {
        let config = &self.relay.config;
        let (asked_for, silent_for) = match self.somebody_waited {
            true => (config.probe, config.probe_after),
            false => (config.silence - config.heartbeat, config.silence),
        };
        Act::Judged { connection, asked_for, silent_for }
    }

    /// What the relay ordered, as acts.
    fn carry_out(&mut self, now: Instant) {
        while let Some(action) = self.relay.actions.pop_front() {
            let act = match action {
                Action::Grant { request, receipt, .. } => {
                    self.relay.on_delivered(request.from.peer, receipt, true, now);
                    Act::Granted(request.from.connection)
                }
                Action::Refuse(connection, _) => Act::Refused(connection),
                Action::Probe(to, _) => Act::Asked(to.connection),
                // Nobody is closed for being idle: that is switched off.
                Action::Close(End { connection, .. }) => {
                    self.acts.push(self.judged(connection));
                    Act::Closed(connection)
                }
                Action::Report(Event::GraceBegan { peer }) => Act::Grace(number(&peer)),
                Action::Report(Event::ReservationFreed { peer, reason, .. }) => {
                    assert_ne!(reason, FreedReason::Undelivered);
                    Act::Freed(number(&peer))
                }
                _ => continue,
            };
            self.acts.push(act);
        }
    }
}

impl Relay for Rooms {
    fn term(&self) -> Duration {
        self.relay.config.reservation_ttl
    }

    fn connected(&mut self, id: usize, peer: usize, now: Duration) {
        // Each from an address of its own: the caps on addresses are not what is looked at here.
        let address = IpAddr::from(Ipv4Addr::from_bits(id as u32)).into();
        let peer = peer_id(peer);
        let connection = Connection::new(peer, address, false, id as u8, self.start + now);
        let signs = ActivityCounter::default();
        self.relay.connections.add(id, connection);
        self.relay.connections.get_mut(id).unwrap().track(signs.clone());
        self.signs.insert(id, signs);
        self.peers.insert(id, peer);
    }

    fn disconnected(&mut self, id: usize, now: Duration) {
        let now = self.start + now;
        if self.signs.remove(&id).is_some() {
            self.relay.on_disconnected(self.end(id), now);
            self.peers.remove(&id);
            self.carry_out(now);
        }
    }

    fn reserve(&mut self, id: usize, now: Duration) {
        let now = self.start + now;
        if self.signs.contains_key(&id) {
            let from = self.end(id);
            self.relay.handle_request(from, Ok(Request::Reserve), id, now);
            self.carry_out(now);
        }
    }

    fn heard(&mut self, id: usize) {
        if let Some(signs) = self.signs.get(&id) {
            signs.add(1);
        }
    }

    fn next(&self) -> Option<Duration> {
        Some(self.relay.sweep_due - self.start)
    }

    fn wake(&mut self, now: Duration) {
        let now = self.start + now;
        self.somebody_waited = !self.relay.waiting.is_empty();
        self.relay.sweep(now);
        self.carry_out(now);
    }

    fn take_acts(&mut self) -> Vec<Act> {
        std::mem::take(&mut self.acts)
    }

    fn left_over(&self) -> usize {
        let table = &self.relay.reservations;
        let slots = table.taken() + table.in_grace() + table.quota.scopes();
        slots + self.relay.connections.count() + self.relay.waiting.len()
    }

    fn kernel_gives_up_after(&self) -> Option<Duration> {
        Some(KERNEL_GIVES_UP)
    }
}

/// A peer id with a number for its hash.
fn peer_id(number: usize) -> PeerId {
    let mut sha256 = [0; 34];
    sha256[..2].copy_from_slice(&[0x12, 32]);
    sha256[2..10].copy_from_slice(&(number as u64).to_le_bytes());
    PeerId::from_bytes(&sha256).expect("it has the form of one")
}

fn number(peer: &PeerId) -> usize {
    let hash = peer.as_ref().digest();
    u64::from_le_bytes(hash[..8].try_into().expect("it is 32 bytes long")) as usize
}
