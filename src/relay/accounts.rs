//! Accounts: the bytes that circuits transferred, for each peer while it is connected, and the totals since the start.
//!
//! Sans-IO. Counts delivered payload only: neither the relay's own messages nor the overhead of the secure channel and
//! the muxer. A circuit counts from when it opens; until it ends, its bytes are in its [`Counters`] and in
//! [`Accounts::relayed()`] only.

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
    /// The accounts of the connected peers that have been part of a circuit since they connected, each with the lowest
    /// id of those circuits.
    ///
    /// An older circuit may end after the peer has reconnected, and does not count. Its id is lower still: a circuit
    /// that is not open when its peer disconnects never opens.
    peers: HashMap<PeerId, (CircuitId, Account)>,
}

/// What a peer used the relay for since it connected. The account ends when its last connection closes.
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

impl Accounts {
    /// The account of `peer`; `None` if it has been part of no circuit or is not connected.
    pub fn of(&self, peer: &PeerId) -> Option<Account> {
        self.peers.get(peer).map(|(_, account)| *account)
    }

    /// All accounts, in no order.
    pub fn iter(&self) -> impl Iterator<Item = (PeerId, Account)> {
        self.peers.iter().map(|(peer, (_, account))| (*peer, *account))
    }

    /// The bytes of all circuits since the relay started, of the open ones too.
    pub fn relayed(&self) -> BytesTransferred {
        self.relayed.read()
    }

    /// Where one more circuit counts its bytes.
    pub fn counters(&self) -> Counters {
        Counters { circuit: Arc::default(), relayed: Arc::clone(&self.relayed) }
    }

    /// Counts a circuit that opens between two connected peers.
    pub fn on_opened(&mut self, id: CircuitId, source: PeerId, target: PeerId) {
        self.totals.opened += 1;
        for (peer, is_source) in [(source, true), (target, false)] {
            let (first, account) = self.peers.entry(peer).or_insert((id, Account::default()));
            *first = id.min(*first); // circuits may open in another order
            account.as_source += u64::from(is_source);
            account.as_target += u64::from(!is_source);
        }
    }

    /// Counts an open circuit that ended, and its bytes.
    pub fn on_closed(&mut self, id: CircuitId, ends: [PeerId; 2], transferred: BytesTransferred) {
        let ([source, target], BytesTransferred { to_target, to_source }) = (ends, transferred);
        self.totals.closed += 1;
        self.totals.transferred.to_target += to_target;
        self.totals.transferred.to_source += to_source;
        let both = [(source, to_target, to_source), (target, to_source, to_target)];
        for (peer, sent, received) in both {
            // A peer that disconnected gets no new account: nothing would remove it.
            let account = self.peers.get_mut(&peer).filter(|(first, _)| *first <= id);
            if let Some((_, account)) = account {
                account.sent += sent;
                account.received += received;
            }
        }
    }

    /// Removes the account of a peer whose last connection closed.
    pub fn remove(&mut self, peer: &PeerId) {
        self.peers.remove(peer);
    }
}

/// Counts the bytes of one circuit, also for [`Accounts::relayed()`], and shows whether some wait. Clones share all.
#[derive(Clone, Debug)]
pub struct Counters {
    circuit: Arc<Counts>,
    relayed: Arc<Counts>,
}

impl Counters {
    /// The bytes of the circuit so far.
    pub fn read(&self) -> BytesTransferred {
        self.circuit.read()
    }

    /// Whether bytes were read that their receiver did not accept yet: first the target, second the source.
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
        for counts in [&self.circuit, &self.relayed] {
            counts.to_target.fetch_add(more.to_target, Ordering::Relaxed);
            counts.to_source.fetch_add(more.to_source, Ordering::Relaxed);
        }
    }
}

#[derive(Debug, Default)]
struct Counts {
    to_target: AtomicU64,
    to_source: AtomicU64,
    /// Whether bytes wait to be accepted by the target, and by the source. Used in the counts of a single circuit only.
    waiting: [AtomicBool; 2],
}

impl Counts {
    fn read(&self) -> BytesTransferred {
        let load = |count: &AtomicU64| count.load(Ordering::Relaxed);
        BytesTransferred { to_target: load(&self.to_target), to_source: load(&self.to_source) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BYTES: BytesTransferred = BytesTransferred { to_target: 1000, to_source: 7 };

    /// Accounts, and the two peers of all circuits.
    struct Fixture {
        accounts: Accounts,
        admitted: u64,
        alice: PeerId,
        bob: PeerId,
    }

    impl Fixture {
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
    fn the_bytes_sent_by_one_end_are_received_by_the_other() {
        let mut fixture = Fixture::new();
        let id = fixture.open();
        fixture.close(id);
        let alices = Account { as_source: 1, as_target: 0, sent: 1000, received: 7 };
        let bobs = Account { as_source: 0, as_target: 1, sent: 7, received: 1000 };
        assert_eq!(fixture.accounts.of(&fixture.alice), Some(alices));
        assert_eq!(fixture.accounts.of(&fixture.bob), Some(bobs));
        assert_eq!(fixture.accounts.iter().count(), 2);
    }

    #[test]
    fn a_circuit_counts_once_it_is_open_and_its_bytes_once_it_has_ended() {
        let mut fixture = Fixture::new();
        let id = fixture.open();
        let alices = fixture.accounts.of(&fixture.alice).unwrap();
        assert_eq!((alices.as_source, alices.sent), (1, 0));
        let before = fixture.accounts.totals;
        fixture.close(id);
        let after = fixture.accounts.totals;
        assert_eq!((before.opened, before.closed), (1, 0));
        assert_eq!((after.opened, after.closed), (1, 1));
        let none = BytesTransferred::default();
        assert_eq!((before.transferred, after.transferred), (none, BYTES));
    }

    #[test]
    fn a_disconnected_peer_gets_no_account_when_its_circuits_end() {
        let mut fixture = Fixture::new();
        let id = fixture.open();
        fixture.accounts.remove(&fixture.bob);
        fixture.close(id);
        assert_eq!(fixture.accounts.of(&fixture.bob), None);
        assert_eq!(fixture.accounts.of(&fixture.alice).unwrap().sent, 1000);
        fixture.accounts.remove(&fixture.alice);
        assert_eq!(fixture.accounts.iter().count(), 0);
        assert_eq!(fixture.accounts.totals.transferred, BYTES, "the totals keep them");
    }

    #[test]
    fn a_reconnected_peer_starts_with_an_empty_account() {
        let mut fixture = Fixture::new();
        let old = fixture.open();
        fixture.accounts.remove(&fixture.bob);
        let (second, third) = (fixture.admit(), fixture.admit());
        for id in [third, second] {
            fixture.accounts.on_opened(id, fixture.alice, fixture.bob);
        }
        fixture.close(old);
        assert_eq!(fixture.accounts.of(&fixture.bob).unwrap().received, 0);
        assert_eq!(fixture.accounts.of(&fixture.alice).unwrap().sent, 1000);
        fixture.close(second);
        fixture.close(third);
        let bobs = fixture.accounts.of(&fixture.bob).unwrap();
        assert_eq!((bobs.as_target, bobs.received), (2, 2000));
    }

    #[test]
    fn the_relayed_bytes_include_open_circuits() {
        let fixture = Fixture::new();
        let [one, other] = [(); 2].map(|()| fixture.accounts.counters());
        one.add(BYTES);
        other.add(BytesTransferred { to_source: 1, ..BYTES });
        assert_eq!(one.read(), BYTES);
        assert_eq!(fixture.accounts.relayed(), BytesTransferred { to_target: 2000, to_source: 8 });
    }
}
