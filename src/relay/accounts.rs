//! The accounts: what circuits carried, for each peer while it is connected, and in all since the
//! start.
//!
//! Sans-IO. What counts is payload, as it was delivered: neither the relay's own messages, nor what
//! the secure channel and the muxer put around it. A circuit counts from when it is opened, its
//! bytes when it ends; until then they are in its [`Counters`] alone.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use libp2p::PeerId;

use crate::event::{Carried, CircuitId};

/// The accounts of one relay.
#[derive(Debug, Default)]
pub struct Accounts {
    totals: Totals,
    /// What all circuits together have carried, the open ones included.
    relayed: Arc<Counts>,
    /// Of the peers that are connected and were part of a circuit since.
    peers: HashMap<PeerId, Stay>,
}

/// What a peer used the relay for since it connected: since the first of its connections that are
/// up without a gap.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Account {
    /// Circuits that it asked for and got, those that are open included.
    pub as_source: u64,
    /// Circuits that led to it, those that are open included.
    pub as_target: u64,
    /// Payload bytes that it sent and that were delivered, of the circuits that ended.
    pub sent: u64,
    /// Payload bytes that were delivered to it, of the circuits that ended.
    pub received: u64,
}

/// What all peers together used the relay for since it started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Totals {
    /// Circuits that were opened.
    pub opened: u64,
    /// Circuits that were opened and have ended.
    pub closed: u64,
    /// Payload bytes that those delivered.
    pub carried: Carried,
}

/// What is known of a peer from its first connection to its last.
#[derive(Debug)]
struct Stay {
    /// Of its circuits the one that was admitted first.
    ///
    /// What remains of an earlier stay may end during this one, and was admitted before: a circuit
    /// that is not open when its peer goes never opens.
    first: CircuitId,
    account: Account,
}

impl Accounts {
    /// What all peers together used the relay for since it started.
    pub fn totals(&self) -> Totals {
        self.totals
    }

    /// What `peer` used the relay for since it connected; `None` if it was part of no circuit, or
    /// is not connected.
    pub fn of(&self, peer: &PeerId) -> Option<Account> {
        self.peers.get(peer).map(|stay| stay.account)
    }

    /// All peers that [`Accounts::of`] has an account of, in no order.
    pub fn iter(&self) -> impl Iterator<Item = (PeerId, Account)> {
        self.peers.iter().map(|(peer, stay)| (*peer, stay.account))
    }

    /// What circuits have carried since the relay started, the open ones included.
    pub fn relayed(&self) -> Carried {
        self.relayed.read()
    }

    /// A circuit was opened between two peers that are connected. Returns where it is to count its bytes.
    pub fn opened(&mut self, id: CircuitId, source: PeerId, target: PeerId) -> Counters {
        self.totals.opened += 1;
        self.open(id, source).as_source += 1;
        self.open(id, target).as_target += 1;
        Counters { circuit: Arc::default(), all: Arc::clone(&self.relayed) }
    }

    fn open(&mut self, id: CircuitId, peer: PeerId) -> &mut Account {
        let stay =
            self.peers.entry(peer).or_insert(Stay { first: id, account: Account::default() });
        stay.first = stay.first.min(id); // circuits may open in another order
        &mut stay.account
    }

    /// A circuit that was opened has ended, having carried so much.
    pub fn closed(&mut self, id: CircuitId, source: PeerId, target: PeerId, carried: Carried) {
        let Carried { to_target, to_source } = carried;
        self.totals.closed += 1;
        self.totals.carried.to_target += to_target;
        self.totals.carried.to_source += to_source;
        self.charge(id, source, to_target, to_source);
        self.charge(id, target, to_source, to_target);
    }

    fn charge(&mut self, id: CircuitId, peer: PeerId, sent: u64, received: u64) {
        // Who is gone gets no account any more: nobody would end it.
        let Some(stay) = self.peers.get_mut(&peer) else {
            return;
        };
        if stay.first <= id {
            stay.account.sent += sent;
            stay.account.received += received;
        }
    }

    /// The last connection of `peer` is gone.
    pub fn left(&mut self, peer: &PeerId) {
        self.peers.remove(peer);
    }
}

/// How many bytes one circuit has carried, and whether some wait. Clones share the counts.
#[derive(Clone, Debug)]
pub struct Counters {
    circuit: Arc<OfCircuit>,
    all: Arc<Counts>,
}

#[derive(Debug, Default)]
struct OfCircuit {
    counts: Counts,
    waiting: [AtomicBool; 2],
}

impl Counters {
    /// What was carried so far.
    pub fn read(&self) -> Carried {
        self.circuit.counts.read()
    }

    /// Whether bytes wait that were read, to be taken by the target, and by the source.
    pub fn waiting(&self) -> [bool; 2] {
        self.circuit.waiting.each_ref().map(|waits| waits.load(Ordering::Relaxed))
    }

    /// Says so. Only the circuit itself does.
    pub fn set_waiting(&self, waiting: [bool; 2]) {
        for (waits, now) in self.circuit.waiting.iter().zip(waiting) {
            waits.store(now, Ordering::Relaxed);
        }
    }

    /// So much was carried by now. Only the circuit itself says so.
    pub fn set(&self, carried: Carried) {
        let before = self.read();
        if carried == before {
            return; // what is shared by all stays out of the caches of other cores
        }
        let more = Carried {
            to_target: carried.to_target - before.to_target,
            to_source: carried.to_source - before.to_source,
        };
        self.circuit.counts.add(more);
        self.all.add(more);
    }
}

#[derive(Debug, Default)]
struct Counts {
    to_target: AtomicU64,
    to_source: AtomicU64,
}

impl Counts {
    fn read(&self) -> Carried {
        Carried {
            to_target: self.to_target.load(Ordering::Relaxed),
            to_source: self.to_source.load(Ordering::Relaxed),
        }
    }

    fn add(&self, more: Carried) {
        self.to_target.fetch_add(more.to_target, Ordering::Relaxed);
        self.to_source.fetch_add(more.to_source, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        config::Config,
        relay::circuits::{Circuits, End},
    };

    const CARRIED: Carried = Carried { to_target: 1000, to_source: 7 };

    /// Accounts, and the table that names the circuits.
    struct House {
        accounts: Accounts,
        circuits: Circuits<(), ()>,
        alice: PeerId,
        bob: PeerId,
    }

    impl House {
        fn new() -> Self {
            Self {
                accounts: Accounts::default(),
                circuits: Circuits::new(&Config::default()),
                alice: PeerId::random(),
                bob: PeerId::random(),
            }
        }

        fn admit(&mut self) -> CircuitId {
            let [source, target] = [self.alice, self.bob].map(|peer| End { peer, connection: () });
            self.circuits.add(source, target, None, (), std::time::Instant::now()).0
        }

        /// From Alice to Bob.
        fn open(&mut self) -> CircuitId {
            let id = self.admit();
            self.accounts.opened(id, self.alice, self.bob);
            id
        }

        fn close(&mut self, id: CircuitId) {
            self.accounts.closed(id, self.alice, self.bob, CARRIED);
        }
    }

    #[test]
    fn what_one_end_sent_the_other_received() {
        let mut house = House::new();
        let id = house.open();
        house.close(id);
        let alices = Account { as_source: 1, as_target: 0, sent: 1000, received: 7 };
        let bobs = Account { as_source: 0, as_target: 1, sent: 7, received: 1000 };
        assert_eq!(house.accounts.of(&house.alice), Some(alices));
        assert_eq!(house.accounts.of(&house.bob), Some(bobs));
        assert_eq!(house.accounts.iter().count(), 2);
    }

    #[test]
    fn a_circuit_counts_once_it_is_open_and_its_bytes_once_it_has_ended() {
        let mut house = House::new();
        let id = house.open();
        let alices = house.accounts.of(&house.alice).unwrap();
        assert_eq!((alices.as_source, alices.sent), (1, 0));
        let before = house.accounts.totals();
        house.close(id);
        let after = house.accounts.totals();
        assert_eq!((before.opened, before.closed), (1, 0));
        assert_eq!((after.opened, after.closed), (1, 1));
        assert_eq!((before.carried, after.carried), (Carried::default(), CARRIED));
    }

    #[test]
    fn who_left_has_no_account_and_gets_none_by_the_end_of_its_circuits() {
        let mut house = House::new();
        let id = house.open();
        house.accounts.left(&house.bob);
        house.close(id);
        assert_eq!(house.accounts.of(&house.bob), None);
        assert_eq!(house.accounts.of(&house.alice).unwrap().sent, 1000);
        house.accounts.left(&house.alice);
        assert_eq!(house.accounts.iter().count(), 0);
        assert_eq!(house.accounts.totals().carried, CARRIED, "for good");
    }

    #[test]
    fn who_came_back_does_not_pay_for_an_earlier_stay() {
        let mut house = House::new();
        let old = house.open();
        house.accounts.left(&house.bob);
        let (second, third) = (house.admit(), house.admit());
        for id in [third, second] {
            house.accounts.opened(id, house.alice, house.bob);
        }
        house.close(old);
        assert_eq!(house.accounts.of(&house.bob).unwrap().received, 0);
        assert_eq!(house.accounts.of(&house.alice).unwrap().sent, 1000);
        house.close(second);
        house.close(third);
        let bobs = house.accounts.of(&house.bob).unwrap();
        assert_eq!((bobs.as_target, bobs.received), (2, 2000));
    }
}
