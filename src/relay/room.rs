//! Room for a connection, where all places are taken: which of the others is closed for it.

use std::{cmp::Reverse, hash::Hash, time::Instant};

use libp2p::PeerId;

use super::Relay;
use crate::circuits::End;

impl<C: Copy + Ord + Hash, S> Relay<C, S> {
    /// Closes that connection of `peer` but `but` on which nothing was heard for the longest, as if
    /// it were gone.
    pub fn close_longest_silent_of(&mut self, peer: PeerId, but: C, now: Instant) {
        self.connections.listen(now);
        let silence = |id: &C| self.connections.get(*id).map(|c| c.silent_for(now));
        let others = self.connections.open_of(&peer).filter(|id| *id != but);
        // Of several that were heard at once, the first: the oldest.
        let Some(connection) = others.min_by_key(|id| Reverse(silence(id))) else {
            return;
        };
        log::debug!("another connection of peer {peer} takes the place of one of its own");
        let replaced = End { peer, connection };
        self.give_up(replaced, now);
        self.close(replaced);
    }

    /// The connection but `but` that has been idle for the longest, of those whose peers hold no slot.
    pub fn longest_idle_stranger(&self, but: C) -> Option<End<C>> {
        let stranger = |peer: &PeerId| self.reservations.ends(peer).is_none();
        let (peer, connection) = self.connections.longest_idle(but, stranger)?;
        Some(End { peer, connection })
    }

    /// Closes that one.
    pub fn close_longest_idle_stranger(&mut self, but: C) {
        if let Some(stranger) = self.longest_idle_stranger(but) {
            let peer = stranger.peer;
            log::debug!(
                "one that holds a slot takes the place of an idle connection of peer {peer}"
            );
            self.close(stranger);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::{
        config::Config,
        connections::Connection,
        event::Event,
        relay::{Command, Order, RequestId},
        signs::Signs,
        wire::Request,
    };

    /// A relay whose connections bear numbers, and come up a second after each other.
    struct Clients {
        relay: Relay<u32, ()>,
        ends: Vec<End<u32>>,
        signs: Vec<Signs>,
        now: Instant,
    }

    /// What became of it.
    #[derive(Debug, Default, PartialEq)]
    struct Did {
        closed: Vec<u32>,
        graces_begun: usize,
        circuits_ended: usize,
    }

    fn closed(connection: u32) -> Did {
        Did {
            closed: vec![connection],
            ..Did::default()
        }
    }

    impl Clients {
        fn none() -> Self {
            let now = Instant::now();
            Self {
                relay: Relay::new(Config::default(), now).unwrap(),
                ends: Vec::new(),
                signs: Vec::new(),
                now,
            }
        }

        fn pass_a_second(&mut self) {
            self.now += Duration::from_secs(1);
        }

        fn connect(&mut self, peer: PeerId) -> u32 {
            self.pass_a_second();
            let (connection, address) = (self.ends.len() as u32, "/memory/1".parse().unwrap());
            let up = Connection::new(peer, address, false, 0, self.now);
            let signs = Signs::default();
            self.relay.connected(connection, up);
            self.relay.listen_to(connection, signs.clone());
            self.signs.push(signs);
            self.ends.push(End { peer, connection });
            connection
        }

        fn reserve(&mut self, connection: u32) {
            let (from, now) = (self.ends[connection as usize], self.now);
            self.relay
                .requested(from, RequestId(1), Request::Reserve, now);
            while let Some(order) = self.relay.next_order() {
                if let Order::Grant(grant) = order {
                    self.relay.answered(from.peer, grant.receipt, Ok(()), now);
                }
            }
            assert_eq!(self.slot_of(from.peer), Some(connection));
        }

        /// A circuit to `target`, who holds a slot.
        fn circuit(&mut self, source: u32, target: PeerId) {
            let (from, now) = (self.ends[source as usize], self.now);
            self.relay
                .requested(from, RequestId(2), Request::Connect(target), now);
            let ids = self.relay.circuits().iter().map(|(id, _)| id);
            let id = ids.max().expect("it is admitted");
            self.relay.target_answered(id, Ok(()), now);
            self.did();
        }

        fn slot_of(&self, peer: PeerId) -> Option<u32> {
            self.relay.reservations().connection(&peer)
        }

        /// A second later, the connection takes the place of another of its peer's.
        fn replaces_its_own(&mut self, connection: u32) -> Did {
            self.pass_a_second();
            let (peer, now) = (self.ends[connection as usize].peer, self.now);
            self.relay.close_longest_silent_of(peer, connection, now);
            self.did()
        }

        /// The connection takes the place of an idle one.
        fn replaces_an_idle_one(&mut self, connection: u32) -> Did {
            self.relay.close_longest_idle_stranger(connection);
            self.did()
        }

        fn did(&mut self) -> Did {
            let mut did = Did::default();
            while let Some(order) = self.relay.next_order() {
                match order {
                    Order::Close(end) => did.closed.push(end.connection),
                    Order::Tell(Event::GraceBegan { .. }) => did.graces_begun += 1,
                    Order::Command(_, Command::EndCircuit(_)) => did.circuits_ended += 1,
                    _ => {}
                }
            }
            did
        }
    }

    #[test]
    fn the_longest_silent_is_replaced_and_its_slot_moves_to_the_new_one_without_grace() {
        let (mut clients, alice) = (Clients::none(), PeerId::random());
        let [first, second] = [0; 2].map(|_| clients.connect(alice));
        clients.reserve(first);
        let third = clients.connect(alice);
        assert_eq!(clients.replaces_its_own(third), closed(first));
        assert_eq!(clients.slot_of(alice), Some(third));
        // The one that is being closed is no longer one of hers.
        assert_eq!(clients.replaces_its_own(third), closed(second));
        assert_eq!(clients.slot_of(alice), Some(third));
        // The only one that is left is the new one itself.
        assert_eq!(clients.replaces_its_own(third), Did::default());
    }

    #[test]
    fn what_no_sweep_has_heard_yet_counts_and_the_slot_stays_where_it_is() {
        let (mut clients, alice) = (Clients::none(), PeerId::random());
        let [first, second] = [0; 2].map(|_| clients.connect(alice));
        clients.reserve(first);
        clients.signs[first as usize].heard(1);
        let third = clients.connect(alice);
        assert_eq!(clients.replaces_its_own(third), closed(second));
        assert_eq!(clients.slot_of(alice), Some(first));
    }

    #[test]
    fn of_those_that_are_equally_silent_the_oldest_is_replaced() {
        let (mut clients, alice) = (Clients::none(), PeerId::random());
        let old = [0; 3].map(|_| clients.connect(alice));
        let new = clients.connect(alice);
        clients.relay.heard(alice, clients.now); // on all of them at once
        for old in old {
            assert_eq!(clients.replaces_its_own(new), closed(old));
        }
    }

    #[test]
    fn the_circuits_over_the_one_that_is_replaced_end_and_others_go_on() {
        let mut clients = Clients::none();
        let (alice, bob) = (PeerId::random(), PeerId::random());
        let [first, of_bob] = [alice, bob].map(|peer| clients.connect(peer));
        let carol = clients.connect(PeerId::random());
        clients.reserve(first);
        clients.reserve(of_bob);
        clients.circuit(carol, alice);
        clients.circuit(carol, bob);
        let second = clients.connect(alice);
        let did = clients.replaces_its_own(second);
        assert_eq!((did.closed, did.circuits_ended), (vec![first], 1));
        clients.circuit(carol, alice); // over the new one, at once
        let ends = |clients: &Clients, of| {
            let circuits = clients.relay.circuits().over(clients.ends[of as usize]);
            circuits.len()
        };
        assert_eq!(ends(&clients, second), 1);
        assert_eq!(ends(&clients, of_bob), 1);
    }

    #[test]
    fn the_longest_idle_is_replaced_and_never_who_holds_a_slot() {
        let mut clients = Clients::none();
        let alice = PeerId::random();
        let holder = clients.connect(alice);
        clients.reserve(holder);
        clients.connect(alice); // one to spare
        let [first, second, new] = [0; 3].map(|_| clients.connect(PeerId::random()));
        assert_eq!(clients.replaces_an_idle_one(new), closed(first));
        assert_eq!(clients.replaces_an_idle_one(new), closed(second));
        assert_eq!(clients.replaces_an_idle_one(new), Did::default());
    }
}
