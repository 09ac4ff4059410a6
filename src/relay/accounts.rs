//! Accounts: the bytes that circuits transferred, for each peer while it is connected, and the totals since the start.
//!
//! Sans-IO. Counted is delivered payload: neither the relay's own messages nor the overhead of the secure channel and the
//! muxer. A circuit counts from when it opens; its bytes are in its [`Counters`] alone until it ends.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use libp2p::PeerId;
use portable_atomic::AtomicU64;

use crate::event::{BytesTransferred, CircuitId};

/// The accounts of one relay.
#[derive(Debug, Default)]
pub struct Accounts {
    /// What all peers together used the relay for since it started.
    pub totals: Totals,
    /// The bytes of all circuits, of the open ones too.
    relayed: Arc<Counts>,
    /// The peers that are connected and have been part of a circuit since.
    peers: HashMap<PeerId, Stay>,
}

/// What a peer used the relay for since it connected: since the first of its connections that are up without a gap.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Account {
    /// Circuits that it opened, those that are open included.
    pub as_source: u64,
    /// Circuits to it, those that are open included.
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
    /// Payload bytes that the ended circuits delivered.
    pub transferred: BytesTransferred,
}

/// The account of a peer from its first connection to its last.
#[derive(Debug)]
struct Stay {
    /// The first of its circuits that was admitted.
    ///
    /// Circuits of an earlier stay may end during this one. They were admitted before: a circuit that is not open
    /// when its peer leaves never opens.
    first: CircuitId,
    account: Account,
}

impl Accounts {
    /// The account of `peer`; `None` if it has been part of no circuit or is not connected.
    pub fn of(&self, peer: &PeerId) -> Option<Account> {
        self.peers.get(peer).map(|stay| stay.account)
    }

    /// All accounts, in no order.
    pub fn iter(&self) -> impl Iterator<Item = (PeerId, Account)> {
        self.peers.iter().map(|(peer, stay)| (*peer, stay.account))
    }

    /// The bytes of all circuits since the relay started, of the open ones too.
    pub fn relayed(&self) -> BytesTransferred {
        self.relayed.read()
    }

    /// Counts a circuit that opens between two connected peers. Returns where it counts its bytes.
    pub fn on_opened(&mut self, id: CircuitId, source: PeerId, target: PeerId) -> Counters {
        self.totals.opened += 1;
        for (peer, is_source) in [(source, true), (target, false)] {
            let new = || Stay { first: id, account: Account::default() };
            let stay = self.peers.entry(peer).or_insert_with(new);
            stay.first = stay.first.min(id); // circuits may open in another order
            *(if is_source { &mut stay.account.as_source } else { &mut stay.account.as_target }) +=
                1;
        }
        Counters { circuit: Arc::default(), relayed: Arc::clone(&self.relayed) }
    }

    /// Counts an open circuit that ended, and its bytes.
    pub fn on_closed(
        &mut self,
        id: CircuitId,
        [source, target]: [PeerId; 2],
        transferred: BytesTransferred,
    ) {
        let BytesTransferred { to_target, to_source } = transferred;
        self.totals.closed += 1;
        self.totals.transferred.to_target += to_target;
        self.totals.transferred.to_source += to_source;
        for (peer, sent, received) in
            [(source, to_target, to_source), (target, to_source, to_target)]
        {
            // A peer that left gets no new account: nothing would remove it.
            if let Some(stay) = self.peers.get_mut(&peer)
                && stay.first <= id
            {
                stay.account.sent += sent;
                stay.account.received += received;
            }
        }
    }

    /// Removes the account of a peer whose last connection closed.
    pub fn remove(&mut self, peer: &PeerId) {
        self.peers.remove(peer);
    }
}

/// Counts the bytes of one circuit, and shows whether some wait. Clones share both.
#[derive(Clone, Debug)]
pub struct Counters {
    circuit: Arc<OfCircuit>,
    relayed: Arc<Counts>,
}

#[derive(Debug, Default)]
struct OfCircuit {
    counts: Counts,
    /// Of the bytes to the target, and of those to the source.
    waiting: [AtomicBool; 2],
}

impl Counters {
    /// The bytes of the circuit so far.
    pub fn read(&self) -> BytesTransferred {
        self.circuit.counts.read()
    }

    /// Whether bytes were read that the target, and the source, did not accept yet.
    pub fn waiting(&self) -> [bool; 2] {
        self.circuit.waiting.each_ref().map(|waits| waits.load(Ordering::Relaxed))
    }

    /// Sets [`Counters::waiting`].
    pub fn set_waiting(&self, waiting: [bool; 2]) {
        for (waits, now) in self.circuit.waiting.iter().zip(waiting) {
            waits.store(now, Ordering::Relaxed);
        }
    }

    /// Adds bytes that were delivered.
    pub fn add(&self, more: BytesTransferred) {
        for counts in [&self.circuit.counts, &*self.relayed] {
            counts.to_target.fetch_add(more.to_target, Ordering::Relaxed);
            counts.to_source.fetch_add(more.to_source, Ordering::Relaxed);
        }
    }
}

#[derive(Debug, Default)]
struct Counts {
    to_target: AtomicU64,
    to_source: AtomicU64,
}

impl Counts {
    fn read(&self) -> BytesTransferred {
        let (to_target, to_source) = (&self.to_target, &self.to_source);
        BytesTransferred {
            to_target: to_target.load(Ordering::Relaxed),
            to_source: to_source.load(Ordering::Relaxed),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BYTES: BytesTransferred = BytesTransferred { to_target: 1000, to_source: 7 };

    /// Accounts, and two peers between whom circuits open.
    struct House {
        accounts: Accounts,
        admitted: u64,
        alice: PeerId,
        bob: PeerId,
    }

    impl House {
        fn new() -> Self {
            let [alice, bob] = [(); 2].map(|()| PeerId::random());
            Self { accounts: Accounts::default(), admitted: 0, alice, bob }
        }

        fn admit(&mut self) -> CircuitId {
            self.admitted += 1;
            CircuitId(self.admitted)
        }

        /// From Alice to Bob.
        fn open(&mut self) -> CircuitId {
            let id = self.admit();
            self.accounts.on_opened(id, self.alice, self.bob);
            id
        }

        fn close(&mut self, id: CircuitId) {
            self.accounts.on_closed(id, [self.alice, self.bob], BYTES);
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
        let before = house.accounts.totals;
        house.close(id);
        let after = house.accounts.totals;
        assert_eq!((before.opened, before.closed), (1, 0));
        assert_eq!((after.opened, after.closed), (1, 1));
        let none = BytesTransferred::default();
        assert_eq!((before.transferred, after.transferred), (none, BYTES));
    }

    #[test]
    fn a_peer_that_left_has_no_account_and_gets_none_when_its_circuits_end() {
        let mut house = House::new();
        let id = house.open();
        house.accounts.remove(&house.bob);
        house.close(id);
        assert_eq!(house.accounts.of(&house.bob), None);
        assert_eq!(house.accounts.of(&house.alice).unwrap().sent, 1000);
        house.accounts.remove(&house.alice);
        assert_eq!(house.accounts.iter().count(), 0);
        assert_eq!(house.accounts.totals.transferred, BYTES, "for good");
    }

    #[test]
    fn a_peer_that_came_back_does_not_pay_for_an_earlier_stay() {
        let mut house = House::new();
        let old = house.open();
        house.accounts.remove(&house.bob);
        let (second, third) = (house.admit(), house.admit());
        for id in [third, second] {
            house.accounts.on_opened(id, house.alice, house.bob);
        }
        house.close(old);
        assert_eq!(house.accounts.of(&house.bob).unwrap().received, 0);
        assert_eq!(house.accounts.of(&house.alice).unwrap().sent, 1000);
        house.close(second);
        house.close(third);
        let bobs = house.accounts.of(&house.bob).unwrap();
        assert_eq!((bobs.as_target, bobs.received), (2, 2000));
    }

    #[test]
    fn the_bytes_of_a_circuit_are_among_those_of_all() {
        let mut house = House::new();
        let [one, other] =
            [1, 2].map(|id| house.accounts.on_opened(CircuitId(id), house.alice, house.bob));
        one.add(BYTES);
        other.add(BytesTransferred { to_source: 1, ..BYTES });
        assert_eq!(one.read(), BYTES);
        assert_eq!(house.accounts.relayed(), BytesTransferred { to_target: 2000, to_source: 8 });
    }
}
