//! The connections that are up: whose they are, from where, and which of them are idle.
//!
//! Sans-IO. A connection is *idle* while it neither holds a reservation nor carries a circuit,
//! whatever else is open on it: a stranger with a stalled stream does not stay for ever.

use std::{
    collections::{HashMap, HashSet, hash_map::Entry},
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use libp2p::{Multiaddr, PeerId};

use super::{circuits::End, heartbeat::Liveness};
use crate::{activity::Signs, address::ClientPrefix};

/// The connections of one relay.
#[derive(Debug)]
pub struct Connections<C> {
    up: HashMap<C, Connection>,
    /// Those that are idle, and not being closed for it.
    idle: HashSet<C>,
    by_peer: HashMap<PeerId, Vec<C>>,
}

/// One connection that is up.
///
/// A sweep looks at all of them, and takes as long as the memory does: what it need not know stands
/// elsewhere.
#[derive(Debug)]
pub struct Connection {
    /// Where it comes from; requests that came over it share this.
    pub origin: Arc<Origin>,
    holds_reservation: bool,
    circuits: u32,
    /// When it became so.
    pub idle_since: Instant,
    closing: bool,
    /// Its peer sends more than it may of what serves nothing.
    floods: bool,
    /// Where what is heard from the peer is counted, by the handler and by somebody else; and how
    /// much it was when we last looked.
    signs: [Option<Signs>; 2],
    heard: u64,
    /// When it was heard last, and whether it is being probed.
    pub liveness: Liveness,
}

/// Where a connection comes from: found out once, when it comes up.
#[derive(Debug)]
pub struct Origin {
    /// The peer at its other end.
    pub peer: PeerId,
    /// The address it came from, or was dialed at.
    pub address: Multiaddr,
    /// The prefix that what its peer holds counts towards.
    pub prefix: Option<ClientPrefix>,
    /// Whether it leads through another relay.
    pub relayed: bool,
    /// The address under which the peer says that it reached this relay: found out later, and by requests that
    /// wait as well.
    pub reported: Mutex<Option<Multiaddr>>,
}

impl Origin {
    /// That of a connection to `peer`.
    pub fn new(peer: PeerId, address: Multiaddr, relayed: bool) -> Self {
        let (prefix, reported) = (ClientPrefix::of(&address), Mutex::default());
        Self { peer, address, prefix, relayed, reported }
    }
}

impl Connection {
    /// A connection that came up at `now`; for `jitter` see [`Liveness::new`].
    pub fn new(peer: PeerId, address: Multiaddr, relayed: bool, jitter: u8, now: Instant) -> Self {
        Self {
            origin: Arc::new(Origin::new(peer, address, relayed)),
            holds_reservation: false,
            circuits: 0,
            idle_since: now,
            closing: false,
            floods: false,
            signs: [None, None],
            heard: 0,
            liveness: Liveness::new(now, jitter),
        }
    }

    /// Signs of life on it are counted here: the first call's, and the last one's.
    pub fn listen_to(&mut self, signs: Signs) {
        let [first, last] = &mut self.signs;
        *(if first.is_none() { first } else { last }) = Some(signs);
    }

    /// For how long nothing was heard on it.
    pub fn silent_for(&self, now: Instant) -> Duration {
        self.liveness.silent_for(now)
    }

    fn idle(&self) -> bool {
        !self.holds_reservation && self.circuits == 0
    }

    fn watched(&self) -> bool {
        !self.idle() && !self.closing
    }

    /// Whether there is more to be heard than when this was last asked.
    fn listen(&mut self, now: Instant) {
        let [first, last] = &self.signs;
        let count = |signs: &Option<Signs>| signs.as_ref().map_or(0, Signs::count);
        let count = count(first) + count(last);
        self.floods = self.signs.iter().flatten().any(Signs::is_flooding);
        if count != self.heard {
            self.heard = count;
            self.liveness.on_activity(now);
        }
    }
}

impl<C: Copy + Eq + std::hash::Hash> Connections<C> {
    /// How many are up.
    pub fn count(&self) -> usize {
        self.up.len()
    }

    /// The connection of this name.
    pub fn get(&self, id: C) -> Option<&Connection> {
        self.up.get(&id)
    }

    /// The connections of `peer`, oldest first.
    pub fn of(&self, peer: &PeerId) -> &[C] {
        self.by_peer.get(peer).map_or(&[], Vec::as_slice)
    }

    /// Those of them that a reservation may point at, oldest first: not relayed, nor being closed.
    pub fn fit_for_a_slot(&self, peer: &PeerId) -> impl Iterator<Item = (C, &Connection)> {
        let of = self.of(peer).iter().filter_map(|id| Some((*id, self.get(*id)?)));
        of.filter(|(_, connection)| !connection.origin.relayed && !connection.closing)
    }

    /// Those of them that are not being closed, oldest first.
    pub fn open_of(&self, peer: &PeerId) -> impl Iterator<Item = C> {
        let open = |id: &&C| self.get(**id).is_some_and(|connection| !connection.closing);
        self.of(peer).iter().filter(open).copied()
    }

    /// Those that are idle, with their clients' prefixes and since when; in no order.
    pub fn idle(&self) -> impl Iterator<Item = (End<C>, Option<ClientPrefix>, Instant)> {
        self.idle.iter().filter_map(|id| {
            let connection = self.up.get(id)?;
            let end = End { peer: connection.origin.peer, connection: *id };
            Some((end, connection.origin.prefix, connection.idle_since))
        })
    }

    /// A connection came up.
    pub fn add(&mut self, id: C, connection: Connection) {
        let peer = connection.origin.peer;
        self.by_peer.entry(peer).or_default().push(id);
        self.idle.insert(id);
        self.up.insert(id, connection);
    }

    /// A connection is gone.
    pub fn remove(&mut self, id: C) -> Option<Connection> {
        let connection = self.up.remove(&id)?;
        self.idle.remove(&id);
        if let Entry::Occupied(mut ids) = self.by_peer.entry(connection.origin.peer) {
            ids.get_mut().retain(|other| *other != id);
            if ids.get().is_empty() {
                ids.remove();
            }
        }
        Some(connection)
    }

    /// As [`Connections::get`], to change what has nothing to do with whether it is idle.
    pub fn get_mut(&mut self, id: C) -> Option<&mut Connection> {
        self.up.get_mut(&id)
    }

    /// The connection holds a reservation from now on, or does so no longer. Whether that is news.
    pub fn hold_reservation(&mut self, id: C, holds: bool, now: Instant) -> bool {
        let news = self.up.get(&id).is_some_and(|c| c.holds_reservation != holds);
        self.change(id, now, |connection| connection.holds_reservation = holds);
        news
    }

    /// One circuit more goes over the connection, or one less.
    pub fn count_circuit(&mut self, id: C, by: i32, now: Instant) {
        let count = |up: &mut Connection| up.circuits = up.circuits.saturating_add_signed(by);
        self.change(id, now, count);
    }

    /// Those that have been idle for `timeout` or longer, or are idle and flood the relay, to be closed:
    /// each is named once, with whether it floods.
    pub fn take_idle(&mut self, timeout: Duration, now: Instant) -> Vec<(End<C>, bool)> {
        let idle = self.idle.iter().filter_map(|id| {
            let connection = self.up.get(id)?;
            let idle_for = now.saturating_duration_since(connection.idle_since);
            let is_over = idle_for >= timeout || connection.floods;
            let end = End { peer: connection.origin.peer, connection: *id };
            is_over.then_some((end, connection.floods))
        });
        let idle: Vec<_> = idle.collect();
        for (end, _) in &idle {
            self.closing(end.connection);
        }
        idle
    }

    /// Those that carry no circuit and are not being closed.
    pub fn without_circuits(&self) -> Vec<End<C>> {
        let unused = self.up.iter().filter(|(_, c)| c.circuits == 0 && !c.closing);
        unused.map(|(id, c)| End { peer: c.origin.peer, connection: *id }).collect()
    }

    /// Whether a circuit goes over the connection.
    pub fn carries_circuits(&self, id: C) -> bool {
        self.get(id).is_some_and(|connection| connection.circuits > 0)
    }

    /// Something was heard from `peer`.
    pub fn heard(&mut self, peer: &PeerId, now: Instant) {
        for id in self.by_peer.get(peer).into_iter().flatten() {
            if let Some(connection) = self.up.get_mut(id) {
                connection.liveness.on_activity(now);
            }
        }
    }

    /// Open probes count from another time.
    pub fn excuse(&mut self, from: impl Fn(Instant) -> Instant) {
        self.up.values_mut().for_each(|connection| connection.liveness.excuse(&from));
    }

    /// Listens to all connections: one that is not watched now may be so next.
    pub fn listen(&mut self, now: Instant) {
        // Nothing else: the counters are all over the memory, and so the processor fetches several
        // at a time.
        for connection in self.up.values_mut() {
            connection.listen(now);
        }
    }

    /// The connections that are watched, with what is known of them: those that are not idle.
    pub fn watched(&mut self) -> impl Iterator<Item = (C, &mut Liveness)> {
        let watched = self.up.iter_mut().filter(|(_, c)| c.watched());
        watched.map(|(id, connection)| (*id, &mut connection.liveness))
    }

    /// The watched ones that hold a reservation and were not heard for so long, with whose they are.
    pub fn silent(
        &self,
        at_least: Duration,
        now: Instant,
    ) -> impl Iterator<Item = (C, PeerId, &Liveness)> {
        let silent = self.up.iter().filter(move |(_, connection)| {
            let reserved = connection.holds_reservation && connection.watched();
            reserved && connection.silent_for(now) >= at_least
        });
        silent.map(|(id, connection)| (*id, connection.origin.peer, &connection.liveness))
    }

    /// The connection is being closed: it is neither watched nor idle any more.
    pub fn closing(&mut self, id: C) {
        if let Some(connection) = self.up.get_mut(&id) {
            connection.closing = true;
            self.idle.remove(&id);
        }
    }

    fn change(&mut self, id: C, now: Instant, change: impl FnOnce(&mut Connection)) {
        let Some(connection) = self.up.get_mut(&id) else {
            return;
        };
        let was_idle = connection.idle();
        change(connection);
        if !was_idle {
            connection.idle_since = now;
        }
        match connection.idle() && !connection.closing {
            true => self.idle.insert(id),
            false => self.idle.remove(&id),
        };
    }
}

impl<C: Copy + Eq + std::hash::Hash> Default for Connections<C> {
    fn default() -> Self {
        Self { up: HashMap::new(), idle: HashSet::new(), by_peer: HashMap::new() }
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

    fn idle(connections: &mut Connections<u32>, now: Instant) -> Vec<u32> {
        let idle = connections.take_idle(MINUTE, now);
        idle.into_iter().map(|(end, _)| end.connection).collect()
    }

    #[test]
    fn a_stranger_is_idle_from_the_start() {
        let (mut connections, start) = connections();
        assert!(idle(&mut connections, start + MINUTE / 2).is_empty());
        assert_eq!(idle(&mut connections, start + MINUTE), [1]);
        assert!(idle(&mut connections, start + 2 * MINUTE).is_empty(), "it is closing already");
    }

    #[test]
    fn who_holds_a_reservation_or_carries_a_circuit_is_not_idle() {
        let (mut connections, start) = connections();
        connections.hold_reservation(1, true, start);
        connections.count_circuit(1, 1, start);
        assert!(idle(&mut connections, start + 9 * MINUTE).is_empty());
        connections.hold_reservation(1, false, start + 9 * MINUTE);
        assert!(idle(&mut connections, start + 20 * MINUTE).is_empty());
        connections.count_circuit(1, -1, start + 20 * MINUTE);
        assert!(idle(&mut connections, start + 20 * MINUTE).is_empty());
        assert_eq!(idle(&mut connections, start + 21 * MINUTE), [1]);
    }

    #[test]
    fn who_floods_the_relay_is_closed_at_once_unless_it_holds_a_reservation_or_carries_a_circuit() {
        let (mut connections, start) = connections();
        let signs = Signs::default();
        connections.get_mut(1).unwrap().listen_to(signs.clone());
        connections.hold_reservation(1, true, start);
        signs.set_flooding();
        connections.listen(start);
        assert!(idle(&mut connections, start).is_empty());
        connections.hold_reservation(1, false, start);
        assert_eq!(idle(&mut connections, start), [1]);
    }

    #[test]
    fn a_connection_that_is_gone_leaves_nothing_behind() {
        let (mut connections, _) = connections();
        let peer = connections.get(1).unwrap().origin.peer;
        assert_eq!(connections.of(&peer), [1]);
        connections.remove(1);
        assert_eq!(connections.count(), 0);
        assert!(connections.by_peer.is_empty() && connections.idle.is_empty());
    }

    /// Connections that came up a second after each other, of these peers.
    fn in_turn(peers: &[PeerId], start: Instant) -> Connections<u32> {
        let mut connections = Connections::default();
        for (id, peer) in (0..).zip(peers) {
            let address = "/ip4/127.0.0.1/tcp/1".parse().unwrap();
            let up = start + Duration::from_secs(id.into());
            connections.add(id, Connection::new(*peer, address, false, 0, up));
        }
        connections
    }

    #[test]
    fn those_of_a_peer_that_are_not_being_closed_are_told_oldest_first() {
        let (alice, bob) = (PeerId::random(), PeerId::random());
        let mut connections = in_turn(&[alice, bob, alice, alice], Instant::now());
        let open = |connections: &Connections<u32>, peer| -> Vec<_> {
            connections.open_of(peer).collect()
        };
        assert_eq!(open(&connections, &alice), [0, 2, 3]);
        connections.closing(2);
        assert_eq!(open(&connections, &alice), [0, 3]);
        connections.remove(0);
        assert_eq!(open(&connections, &alice), [3]);
        assert_eq!(open(&connections, &bob), [1]);
        assert!(open(&connections, &PeerId::random()).is_empty());
    }

    #[test]
    fn one_is_idle_that_holds_nothing_carries_nothing_and_is_not_being_closed() {
        let start = Instant::now();
        let peers: Vec<_> = (0..5).map(|_| PeerId::random()).collect();
        let mut connections = in_turn(&peers, start);
        let longest_first = |connections: &Connections<u32>| -> Vec<_> {
            let mut idle: Vec<_> = connections.idle().collect();
            idle.sort_by_key(|(_, _, since)| *since);
            idle.iter().map(|(end, ..)| end.connection).collect()
        };
        connections.hold_reservation(0, true, start);
        connections.count_circuit(1, 1, start);
        assert_eq!(longest_first(&connections), [2, 3, 4]);
        connections.closing(2);
        assert_eq!(longest_first(&connections), [3, 4]);
        // It waits for an answer: until now it was not idle.
        connections.get_mut(3).unwrap().idle_since = start + MINUTE;
        assert_eq!(longest_first(&connections), [4, 3]);
        connections.count_circuit(1, -1, start + 2 * MINUTE);
        connections.remove(4);
        assert_eq!(longest_first(&connections), [3, 1]);
    }
}
