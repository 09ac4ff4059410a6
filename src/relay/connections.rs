//! The connections that are up: their peers and addresses, and which of them are idle.
//!
//! Sans-IO. A connection is *idle* while it neither holds a reservation nor carries a circuit, whatever streams are
//! open on it: a stalled stream does not keep a connection.

use std::{
    collections::{HashMap, hash_map::Entry},
    hash::Hash,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use libp2p::{Multiaddr, PeerId};

use super::heartbeat::Liveness;
use crate::{activity::ActivityCounter, address::ClientPrefix, wire::Request};

/// A flooding connection is closed once it has been idle for that part of this time which its jitter selects: if all
/// connections of an address were closed at once, they would come back at once, each with its own burst.
const FLOODING_AGE: Duration = Duration::from_secs(8);

/// The connections of one relay.
pub struct Connections<C> {
    up: HashMap<C, Connection>,
    by_peer: HashMap<PeerId, Vec<C>>,
}

/// A peer, and one of its connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct End<C> {
    /// The peer.
    pub peer: PeerId,
    /// Its connection.
    pub connection: C,
}

/// Why the relay closes a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CloseReason {
    /// It was idle for the idle timeout.
    Idle,
    /// It was idle, and its peer exceeded its rate of frames that carry nothing.
    Flooding,
    /// Its peer did not answer a probe in time.
    Silent,
    /// A newer connection of its peer needs the room.
    Replaced,
    /// It was idle, and a connection of another peer needs the room.
    Preempted,
    /// The relay drains.
    Draining,
}

impl CloseReason {
    /// The reason in a few words: a label of metrics.
    pub fn kind(self) -> &'static str {
        match self {
            Self::Idle => "idle",
            Self::Flooding => "flooding",
            Self::Silent => "silent",
            Self::Replaced => "replaced",
            Self::Preempted => "preempted",
            Self::Draining => "draining",
        }
    }
}

/// The origin of a connection, determined once, when it is established.
#[derive(Debug)]
pub struct Origin {
    /// The peer at its other end.
    pub peer: PeerId,
    /// The address it came from, or was dialed at.
    pub address: Multiaddr,
    /// The prefix that its peer's slot, streams and circuits count towards.
    pub prefix: Option<ClientPrefix>,
    /// Whether it leads through another relay.
    pub relayed: bool,
    /// The address at which the peer says that it reached this relay. Set later; requests that wait see the change.
    pub reported: Mutex<Option<Multiaddr>>,
}

impl Origin {
    /// The origin of a connection to `peer`.
    pub fn new(peer: PeerId, address: Multiaddr, relayed: bool) -> Self {
        let (prefix, reported) = (ClientPrefix::of(&address), Mutex::default());
        Self { peer, address, prefix, relayed, reported }
    }
}

/// A request without an answer. Dropping its reply handle resets its stream.
#[derive(Debug)]
pub struct PendingRequest<C, R> {
    /// The client, and the connection that the request came over.
    pub from: End<C>,
    /// Where that connection comes from.
    pub origin: Arc<Origin>,
    /// What the client asks for.
    pub request: Request,
    /// Takes the answer.
    pub reply: R,
}

/// One connection that is up.
///
/// A sweep reads all connections and is bound by memory bandwidth: what it does not need is behind the `Arc`.
pub struct Connection {
    /// Where it comes from, shared with the requests that came over it.
    pub origin: Arc<Origin>,
    /// Whether a reservation points at it.
    pub holds_reservation: bool,
    /// How many circuits it carries.
    pub circuits: u32,
    /// When it became idle.
    pub idle_since: Instant,
    /// Why the relay is closing it: from then on it is neither watched nor idle. `None`: it stays open.
    pub closing: Option<CloseReason>,
    /// The counters of the handler and of the embedder.
    counters: [Option<ActivityCounter>; 2],
    /// The sum of the counters at the last poll.
    counted: u64,
    /// When its peer was last active, and whether it is being probed.
    pub liveness: Liveness,
}

impl Connection {
    /// A connection that came up at `now`; for `jitter` see [`Liveness::new`].
    pub fn new(peer: PeerId, address: Multiaddr, relayed: bool, jitter: u8, now: Instant) -> Self {
        Self {
            origin: Arc::new(Origin::new(peer, address, relayed)),
            holds_reservation: false,
            circuits: 0,
            idle_since: now,
            closing: None,
            counters: [None, None],
            counted: 0,
            liveness: Liveness::new(now, jitter),
        }
    }

    /// Has the sweep poll this counter. Of several, the first and the last that were passed are polled.
    pub fn track(&mut self, counter: ActivityCounter) {
        let [first, last] = &mut self.counters;
        *(if first.is_none() { first } else { last }) = Some(counter);
    }

    /// Whether it holds a reservation or carries a circuit.
    pub fn is_used(&self) -> bool {
        self.holds_reservation || self.circuits > 0
    }

    /// Whether a counter reports that its peer may be alive behind a link that loses packets.
    pub fn is_lossy(&self) -> bool {
        self.counters.iter().flatten().any(ActivityCounter::is_lossy)
    }
}

impl<C: Copy + Eq + Hash> Connections<C> {
    /// How many are up.
    pub fn count(&self) -> usize {
        self.up.len()
    }

    /// The connection of this id.
    pub fn get(&self, id: C) -> Option<&Connection> {
        self.up.get(&id)
    }

    /// As [`Connections::get`], to change anything but the reservation and the circuits, which decide whether it is
    /// idle: see [`Connections::update`].
    pub fn get_mut(&mut self, id: C) -> Option<&mut Connection> {
        self.up.get_mut(&id)
    }

    /// The connections of `peer`, oldest first.
    pub fn of(&self, peer: &PeerId) -> impl Iterator<Item = (C, &Connection)> {
        let ids = self.by_peer.get(peer).into_iter().flatten();
        ids.filter_map(|id| Some((*id, self.up.get(id)?)))
    }

    /// The ids of `peer`'s connections, oldest first.
    pub(super) fn ids_of(&self, peer: &PeerId) -> Vec<C> {
        self.by_peer.get(peer).cloned().unwrap_or_default()
    }

    /// The idle connections that are not being closed, in no order.
    pub fn idle(&self) -> impl Iterator<Item = (C, &Connection)> {
        self.iter().filter(|(_, up)| !up.is_used() && up.closing.is_none())
    }

    /// All connections, in no order.
    pub fn iter(&self) -> impl Iterator<Item = (C, &Connection)> {
        self.up.iter().map(|(id, connection)| (*id, connection))
    }

    /// Adds a connection that came up. It is idle.
    pub fn add(&mut self, id: C, connection: Connection) {
        self.by_peer.entry(connection.origin.peer).or_default().push(id);
        self.up.insert(id, connection);
    }

    /// Removes a connection that is closed.
    pub fn remove(&mut self, id: C) {
        if let Some(connection) = self.up.remove(&id)
            && let Entry::Occupied(mut ids) = self.by_peer.entry(connection.origin.peer)
        {
            ids.get_mut().retain(|other| *other != id);
            if ids.get().is_empty() {
                ids.remove();
            }
        }
    }

    /// Changes a connection. If it becomes idle, its idle time begins now. If it is idle no longer, its unanswered
    /// probes are forgotten: their answers may not have been read. Returns whether it is up.
    pub fn update(&mut self, id: C, now: Instant, change: impl FnOnce(&mut Connection)) -> bool {
        let Some(connection) = self.up.get_mut(&id) else { return false };
        let was_used = connection.is_used();
        if was_used {
            connection.idle_since = now;
        }
        change(connection);
        if !was_used && connection.is_used() {
            connection.liveness.forget_probes();
        }
        true
    }

    /// The connections that have been idle for `timeout` (zero: no limit), or are idle and flood the relay, each with
    /// the reason to close it.
    pub fn idle_for(&self, timeout: Duration, now: Instant) -> Vec<(C, CloseReason)> {
        let idle = self.idle().filter_map(|(id, up)| {
            let idle_for = now.saturating_duration_since(up.idle_since);
            let is_flooding = up.counters.iter().flatten().any(ActivityCounter::is_flooding);
            let floods = is_flooding && idle_for >= up.liveness.spread_over(FLOODING_AGE);
            let idle = (idle_for >= timeout && !timeout.is_zero()).then_some(CloseReason::Idle);
            Some((id, floods.then_some(CloseReason::Flooding).or(idle)?))
        });
        idle.collect()
    }

    /// Records activity on all connections of `peer`.
    pub fn record_activity(&mut self, peer: &PeerId, now: Instant) {
        for id in self.by_peer.get(peer).into_iter().flatten() {
            if let Some(connection) = self.up.get_mut(id) {
                connection.liveness.on_activity(now);
            }
        }
    }

    /// After a late sweep, moves the times at which the unanswered probes were sent: the delay was no time to answer.
    pub fn shift_probes(&mut self, shift: impl Fn(Instant) -> Instant) {
        for connection in self.up.values_mut() {
            connection.liveness.probed_at = connection.liveness.probed_at.map(&shift);
        }
    }

    /// Polls the activity counters of all connections, also of those that are not watched: they may be watched next.
    pub fn poll_counters(&mut self, now: Instant) {
        // A loop of its own: the counters are spread over the heap, and so the processor prefetches several at a time.
        for connection in self.up.values_mut() {
            let counts = connection.counters.iter().flatten().map(ActivityCounter::count);
            let count = counts.fold(0, u64::wrapping_add); // the embedder may add any amount
            if count != connection.counted {
                connection.counted = count;
                connection.liveness.on_activity(now);
            }
        }
    }

    /// The watched connections: those that are neither idle nor being closed.
    pub fn watched(&mut self) -> impl Iterator<Item = (C, &mut Liveness)> {
        let watched = self.up.iter_mut().filter(|(_, up)| up.is_used() && up.closing.is_none());
        watched.map(|(id, connection)| (*id, &mut connection.liveness))
    }
}

impl<C> Default for Connections<C> {
    fn default() -> Self {
        Self { up: HashMap::new(), by_peer: HashMap::new() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MINUTE: Duration = Duration::from_secs(60);

    fn connections() -> (Connections<u32>, Instant) {
        let now = Instant::now();
        let mut connections = Connections::default();
        let address = "/ip4/127.0.0.1/tcp/1".parse().unwrap();
        connections.add(1, Connection::new(PeerId::random(), address, false, 0, now));
        (connections, now)
    }

    fn hold(connections: &mut Connections<u32>, id: u32, holds: bool, now: Instant) {
        connections.update(id, now, |up| up.holds_reservation = holds);
    }

    fn add_circuits(connections: &mut Connections<u32>, id: u32, by: i32, now: Instant) {
        let by = |up: &mut Connection| up.circuits = up.circuits.saturating_add_signed(by);
        connections.update(id, now, by);
    }

    /// The connections to close as idle or flooding; marks them as being closed.
    fn close_idle(connections: &mut Connections<u32>, now: Instant) -> Vec<u32> {
        let idle = connections.idle_for(MINUTE, now);
        for (id, reason) in &idle {
            connections.get_mut(*id).unwrap().closing = Some(*reason);
        }
        idle.into_iter().map(|(id, _)| id).collect()
    }

    #[test]
    fn a_connection_without_slot_is_idle_from_the_start() {
        let (mut connections, start) = connections();
        assert!(close_idle(&mut connections, start + MINUTE / 2).is_empty());
        assert_eq!(close_idle(&mut connections, start + MINUTE), [1]);
        assert!(
            close_idle(&mut connections, start + 2 * MINUTE).is_empty(),
            "it is already closing"
        );
    }

    #[test]
    fn a_connection_with_a_reservation_or_circuit_is_not_idle() {
        let (mut connections, start) = connections();
        hold(&mut connections, 1, true, start);
        add_circuits(&mut connections, 1, 1, start);
        assert!(close_idle(&mut connections, start + 9 * MINUTE).is_empty());
        hold(&mut connections, 1, false, start + 9 * MINUTE);
        assert!(close_idle(&mut connections, start + 20 * MINUTE).is_empty());
        add_circuits(&mut connections, 1, -1, start + 20 * MINUTE);
        assert!(close_idle(&mut connections, start + 20 * MINUTE).is_empty());
        assert_eq!(close_idle(&mut connections, start + 21 * MINUTE), [1]);
    }

    #[test]
    fn a_flooding_connection_is_closed_unless_it_has_a_reservation_or_circuit() {
        let (mut connections, start) = connections();
        let activity = ActivityCounter::default();
        connections.get_mut(1).unwrap().track(activity.clone());
        hold(&mut connections, 1, true, start);
        activity.set_flooding();
        connections.poll_counters(start);
        assert!(close_idle(&mut connections, start).is_empty());
        hold(&mut connections, 1, false, start);
        assert_eq!(close_idle(&mut connections, start), [1]);
    }

    #[test]
    fn flooding_connections_that_came_up_together_are_not_closed_together() {
        let (mut connections, start) = (Connections::default(), Instant::now());
        let activity = ActivityCounter::default();
        activity.set_flooding();
        for (id, jitter) in [(1, 0), (2, 128), (3, 255)] {
            let address = "/ip4/127.0.0.1/tcp/1".parse().unwrap();
            let mut up = Connection::new(PeerId::random(), address, false, jitter, start);
            up.track(activity.clone());
            connections.add(id, up);
        }
        connections.poll_counters(start);
        assert_eq!(close_idle(&mut connections, start), [1]);
        assert_eq!(close_idle(&mut connections, start + FLOODING_AGE * 3 / 4), [2]);
        assert_eq!(close_idle(&mut connections, start + FLOODING_AGE), [3]);
    }

    #[test]
    fn a_connection_that_is_idle_and_floods_is_closed_as_flooding() {
        let (mut connections, start) = connections();
        let activity = ActivityCounter::default();
        activity.set_flooding();
        connections.get_mut(1).unwrap().track(activity);
        let closed = connections.idle_for(MINUTE, start + MINUTE);
        assert_eq!(closed, [(1, CloseReason::Flooding)]);
    }

    #[test]
    fn a_connection_that_is_being_closed_is_not_watched() {
        let (mut connections, start) = connections();
        hold(&mut connections, 1, true, start);
        assert_eq!(connections.watched().count(), 1);
        connections.get_mut(1).unwrap().closing = Some(CloseReason::Draining);
        assert_eq!(connections.watched().count(), 0);
    }

    #[test]
    fn any_sum_of_counters_is_polled() {
        let (mut connections, start) = connections();
        let [own, embedders] = [(); 2].map(|()| ActivityCounter::default());
        let up = connections.get_mut(1).unwrap();
        [&own, &embedders].into_iter().for_each(|counter| up.track(counter.clone()));
        own.add(1);
        embedders.add(u64::MAX - 1);
        connections.poll_counters(start);
        own.add(2);
        connections.poll_counters(start + MINUTE);
        let liveness = &connections.get(1).unwrap().liveness;
        assert_eq!(liveness.silent_for(start + MINUTE), Duration::ZERO);
    }

    #[test]
    fn a_closed_connection_leaves_nothing_behind() {
        let (mut connections, _) = connections();
        let peer = connections.get(1).unwrap().origin.peer;
        assert_eq!(connections.of(&peer).count(), 1);
        connections.remove(1);
        assert_eq!(connections.count(), 0);
        assert!(connections.by_peer.is_empty());
    }

    /// Connections of `peers`, opened one second apart.
    fn opened_in_order(peers: &[PeerId], start: Instant) -> Connections<u32> {
        let mut connections = Connections::default();
        for (id, peer) in (0..).zip(peers) {
            let address = "/ip4/127.0.0.1/tcp/1".parse().unwrap();
            let up = start + Duration::from_secs(id.into());
            connections.add(id, Connection::new(*peer, address, false, 0, up));
        }
        connections
    }

    #[test]
    fn the_open_connections_of_a_peer_are_listed_oldest_first() {
        let (alice, bob) = (PeerId::random(), PeerId::random());
        let mut connections = opened_in_order(&[alice, bob, alice, alice], Instant::now());
        let open = |connections: &Connections<u32>, peer: &PeerId| -> Vec<_> {
            connections.of(peer).filter(|(_, up)| up.closing.is_none()).map(|(id, _)| id).collect()
        };
        assert_eq!(open(&connections, &alice), [0, 2, 3]);
        connections.get_mut(2).unwrap().closing = Some(CloseReason::Idle);
        assert_eq!(open(&connections, &alice), [0, 3]);
        connections.remove(0);
        assert_eq!(open(&connections, &alice), [3]);
        assert_eq!(open(&connections, &bob), [1]);
        assert!(open(&connections, &PeerId::random()).is_empty());
    }

    #[test]
    fn a_connection_is_idle_without_slot_and_circuit_unless_it_is_closing() {
        let start = Instant::now();
        let peers: Vec<_> = (0..5).map(|_| PeerId::random()).collect();
        let mut connections = opened_in_order(&peers, start);
        let longest_first = |connections: &Connections<u32>| -> Vec<_> {
            let mut idle: Vec<_> = connections.idle().collect();
            idle.sort_by_key(|(_, up)| up.idle_since);
            idle.iter().map(|(id, _)| *id).collect()
        };
        hold(&mut connections, 0, true, start);
        add_circuits(&mut connections, 1, 1, start);
        assert_eq!(longest_first(&connections), [2, 3, 4]);
        connections.get_mut(2).unwrap().closing = Some(CloseReason::Idle);
        assert_eq!(longest_first(&connections), [3, 4]);
        // The idle time of a connection can start later than its number suggests.
        connections.get_mut(3).unwrap().idle_since = start + MINUTE;
        assert_eq!(longest_first(&connections), [4, 3]);
        add_circuits(&mut connections, 1, -1, start + 2 * MINUTE);
        connections.remove(4);
        assert_eq!(longest_first(&connections), [3, 1]);
    }
}
