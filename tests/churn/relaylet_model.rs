//! relaylet: the real `relaylet::relay`, without sockets.
//!
//! Connections are numbers. There are no circuits, and every answer to a RESERVE is delivered: it fits into the
//! socket's buffer.

use std::{
    collections::HashMap,
    net::{IpAddr, Ipv4Addr},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
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

use crate::simulation::{Action as Outcome, Relay};

/// The program's TCP keepalive probes after 60 s of silence, and the connection is closed 15 s later, because
/// TCP_USER_TIMEOUT has passed by then.
const KERNEL_TIMEOUT: Duration = Duration::from_secs(75);

/// The program asks its kernel: a link loses packets if two were lost, and a peer was heard if that was within this time.
const LOSSES: u64 = 2;
const HEARD: u64 = 45; // seconds

/// What the kernel knows of a connection.
#[derive(Default)]
struct Kernel {
    lost: AtomicU64,
    /// When the other end was last heard, in seconds.
    heard: AtomicU64,
}

pub struct RelayletModel {
    relay: relay::Relay<usize, usize>,
    /// The start of the virtual clock; the relay sees only differences.
    start: Instant,
    peers: HashMap<usize, PeerId>,
    activity: HashMap<usize, ActivityCounter>,
    /// Empty if the relay does not ask.
    kernel: HashMap<usize, Arc<Kernel>>,
    asks_kernel: bool,
    /// The virtual clock in seconds.
    clock: Arc<AtomicU64>,
    outcomes: Vec<Outcome>,
    /// Whether a newcomer waited at the last sweep.
    newcomer_waited: bool,
}

impl RelayletModel {
    pub fn new(config: Config, asks_kernel: bool) -> Self {
        let start = Instant::now();
        Self {
            relay: relay::Relay::new(config, start).expect("a valid configuration"),
            start,
            peers: HashMap::new(),
            activity: HashMap::new(),
            kernel: HashMap::new(),
            asks_kernel,
            clock: Arc::default(),
            outcomes: Vec::new(),
            newcomer_waited: false,
        }
    }

    fn end(&self, connection: usize) -> End<usize> {
        let peer = self.peers[&connection];
        End { peer, connection }
    }

    /// A timeout by the heartbeat, or a sooner one for a newcomer, which may have its slot by now.
    fn timed_out(&self, connection: usize) -> Outcome {
        let config = &self.relay.config;
        let (probed_for, silent_for) = match self.newcomer_waited {
            true => (config.probe, config.probe_after),
            false => (config.silence - config.heartbeat, config.silence),
        };
        Outcome::TimedOut { connection, probed_for, silent_for }
    }

    /// Translates the relay's actions.
    fn take_relay_actions(&mut self, now: Instant) {
        while let Some(action) = self.relay.actions.pop_front() {
            let outcome = match action {
                Action::Grant { request, receipt, .. } => {
                    self.relay.on_delivered(request.from.peer, receipt, true, now);
                    Outcome::Granted(request.from.connection)
                }
                Action::Refuse(connection, _) => Outcome::Refused(connection),
                Action::Probe(to, _) => Outcome::Probed(to.connection),
                // Idle connections are not closed here: that is switched off.
                Action::Close(End { connection, .. }) => {
                    self.outcomes.push(self.timed_out(connection));
                    Outcome::Closed(connection)
                }
                Action::Report(Event::GraceBegan { peer }) => Outcome::Grace(number(&peer)),
                Action::Report(Event::ReservationFreed { peer, reason, .. }) => {
                    assert_ne!(reason, FreedReason::Undelivered);
                    Outcome::Freed(number(&peer))
                }
                _ => continue,
            };
            self.outcomes.push(outcome);
        }
    }
}

impl Relay for RelayletModel {
    fn term(&self) -> Duration {
        self.relay.config.reservation_ttl
    }

    fn on_connected(&mut self, id: usize, peer: usize, now: Duration) {
        // Each from an address of its own: the caps on addresses are not tested here.
        let address = IpAddr::from(Ipv4Addr::from_bits(id as u32)).into();
        let peer = peer_id(peer);
        let connection = Connection::new(peer, address, false, id as u8, self.start + now);
        let activity = ActivityCounter::default();
        if self.asks_kernel {
            let (kernel, clock) = (Arc::new(Kernel::default()), Arc::clone(&self.clock));
            self.kernel.insert(id, Arc::clone(&kernel));
            activity.set_lossy(move || {
                let heard = clock.load(Relaxed) - kernel.heard.load(Relaxed);
                heard < HEARD && kernel.lost.load(Relaxed) >= LOSSES
            });
        }
        self.relay.connections.add(id, connection);
        self.relay.connections.get_mut(id).unwrap().track(activity.clone());
        self.activity.insert(id, activity);
        self.peers.insert(id, peer);
    }

    fn on_disconnected(&mut self, id: usize, now: Duration) {
        let now = self.start + now;
        self.kernel.remove(&id);
        if self.activity.remove(&id).is_some() {
            self.relay.on_disconnected(self.end(id), now);
            self.peers.remove(&id);
            self.take_relay_actions(now);
        }
    }

    fn reserve(&mut self, id: usize, now: Duration) {
        let now = self.start + now;
        if self.activity.contains_key(&id) {
            let from = self.end(id);
            self.relay.handle_request(from, Ok(Request::Reserve), id, now);
            self.take_relay_actions(now);
        }
    }

    fn on_activity(&mut self, id: usize) {
        if let Some(activity) = self.activity.get(&id) {
            activity.add(1);
        }
        if let Some(kernel) = self.kernel.get(&id) {
            kernel.heard.store(self.clock.load(Relaxed), Relaxed);
        }
    }

    fn on_acknowledged(&mut self, id: usize, retransmitted: u64, now: Duration) {
        if let Some(kernel) = self.kernel.get(&id) {
            kernel.lost.fetch_add(retransmitted, Relaxed);
            kernel.heard.store(now.as_secs(), Relaxed);
        }
    }

    fn next(&self) -> Option<Duration> {
        Some(self.relay.sweep_due - self.start)
    }

    fn wake(&mut self, now: Duration) {
        self.clock.store(now.as_secs(), Relaxed);
        let now = self.start + now;
        self.newcomer_waited = !self.relay.waiting.is_empty();
        self.relay.sweep(now);
        self.take_relay_actions(now);
    }

    fn take_actions(&mut self) -> Vec<Outcome> {
        std::mem::take(&mut self.outcomes)
    }

    fn left_over(&self) -> usize {
        let table = &self.relay.reservations;
        let slots = table.taken() + table.in_grace() + table.quota.scopes();
        slots + self.relay.connections.count() + self.relay.waiting.len()
    }

    fn kernel_timeout(&self) -> Option<Duration> {
        Some(KERNEL_TIMEOUT)
    }
}

/// A peer id whose hash is a number.
fn peer_id(number: usize) -> PeerId {
    let mut sha256 = [0; 34];
    sha256[..2].copy_from_slice(&[0x12, 32]);
    sha256[2..10].copy_from_slice(&(number as u64).to_le_bytes());
    PeerId::from_bytes(&sha256).expect("a valid peer id")
}

fn number(peer: &PeerId) -> usize {
    let hash = peer.as_ref().digest();
    u64::from_le_bytes(hash[..8].try_into().expect("a hash of 32 bytes")) as usize
}
