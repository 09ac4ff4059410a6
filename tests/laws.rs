//! The relay's laws: as unit tests of the slot table, and as properties of random histories.
//!
//! | law | flags | tests |
//! | --- | --- | --- |
//! | connection monitoring: a slot points at a connection that is up, or is in grace | none: always | `a_reservation_moves_to_another_connection_of_its_peer`, `closing_an_old_connection_does_not_affect_a_moved_reservation` |
//! | reclaim on disconnect: at once, or after grace | `--grace`; `0s`: on the close event | `without_grace_a_slot_is_freed_with_the_last_connection`, `a_peer_that_returns_within_grace_gets_its_slot_back`, `a_newcomer_takes_the_slot_longest_in_grace` |
//! | heartbeat: silent peers are probed, and time out if they do not answer in time | `--heartbeat`, `--silence`, `--probe`, `--probe-after` | the history below; `faults.rs`, against the program |
//! | release: by command, and at the end of the term | `--reservation-ttl` | `a_released_slot_is_free_at_once`, `a_term_expires_even_before_the_sweep` |
//! | concurrency: many clients at once, and never more slots than configured | `--max-reservations` | `counts_match_while_many_clients_come_and_go` in `concurrency.rs` |
//! | consistency: no cap is exceeded, every counter matches a count from scratch, nothing is left behind | `--max-reservations-per-ip`, `--max-reservations-per-subnet`, `--reserve-rate` | `history::the_relay_matches_a_naive_model` |
//! | fair shares: a prefix above its share loses circuits to others, and no circuit ends for a request that is refused | `--max-circuits`, `--max-circuits-per-ip`, `--max-circuits-per-subnet`, `--max-circuits-per-peer` | `circuits::circuits_are_admitted_and_evicted_as_in_a_naive_model` |
//! | one acceptance: a target that does not answer is asked over its other connections, over one at a time, and accepts a circuit once | none: always | `circuits::circuits_are_admitted_and_evicted_as_in_a_naive_model`, and a target on a dead connection in `faults.rs` |
//! | accounting: a peer's account covers its present stay and ends with it; totals cover all peers | none: always | `accounts::accounts_match_the_sum_of_all_events`; `accounts.rs`, against a whole relay |
//! | access: a rule ends what it denies and nothing else, however late its answer comes, and every request is answered once | `--allow-peer`, `--deny-peer` and the other lists | `mixed::in_every_history_the_tables_agree_and_the_rules_apply`; `access.rs` |
//! | reconfiguration: a change applies from then on and takes no slot | all of these | `a_lowered_cap_keeps_existing_slots_and_refuses_newcomers`, the history; `access.rs` |

#[path = "laws/accounts.rs"]
mod accounts;
#[path = "laws/circuits.rs"]
mod circuits;
#[path = "laws/history.rs"]
mod history;
#[path = "laws/mixed.rs"]
mod mixed;
#[path = "laws/model.rs"]
mod model;

use std::{
    net::{IpAddr, Ipv4Addr},
    time::{Duration, Instant},
};

use libp2p::PeerId;
use relaylet::{
    Config, FreedReason,
    address::ClientPrefix,
    relay::{
        connections::End,
        quota::Scope,
        reservations::{Change, Receipt, Reservations},
    },
};

const TTL: Duration = Duration::from_secs(3600);
const GRACE: Duration = Duration::from_secs(30);

fn secs(n: u64) -> Duration {
    Duration::from_secs(n)
}

fn prefix(n: u8) -> ClientPrefix {
    IpAddr::from(Ipv4Addr::new(10, 0, 0, n)).into()
}

fn config(total: usize, per_ip: usize) -> Config {
    let mut config = Config::default();
    config.max_reservations = total;
    config.max_reservations_per_ip = Some(per_ip);
    config.grace = GRACE;
    config
}

/// A slot table with three peers and a clock that tests advance.
///
/// Each peer reserves over the connection that has its number, from an address of its own, and its answers are
/// delivered, unless a test does otherwise.
struct Table {
    reservations: Reservations<u32>,
    peers: Vec<PeerId>,
    now: Instant,
}

const ALICE: usize = 0;
const BOB: usize = 1;
const CAROL: usize = 2;

/// The outcome of a RESERVE.
#[derive(Debug, PartialEq, Eq)]
enum Outcome {
    Slot,
    SlotOf(usize),
    Renewal,
    Refused(Scope),
    /// A cap is exceeded: a single freed slot would not be enough.
    RefusedAboveCap(Scope),
}

/// What a lost connection, or an undelivered answer, did to a slot.
#[derive(Debug, PartialEq, Eq)]
enum Effect {
    None,
    MovedTo(u32),
    Grace,
    Freed(FreedReason),
}

impl Table {
    fn of(slots: usize) -> Self {
        Self::with(&config(slots, 0))
    }

    fn with(config: &Config) -> Self {
        Self {
            reservations: Reservations::new(config),
            peers: (0..3).map(|_| PeerId::random()).collect(),
            now: Instant::now(),
        }
    }

    fn advance(&mut self, time: Duration) {
        self.now += time;
    }

    fn reserve(&mut self, index: usize) -> Outcome {
        let (outcome, _) = self.reserve_over(index, connection_of(index), index as u8);
        self.reservations.confirm(&self.peers[index]);
        outcome
    }

    /// As [`Table::reserve`], over this connection and from this address; its answer is not delivered yet.
    fn reserve_over(
        &mut self,
        index: usize,
        connection: u32,
        address: u8,
    ) -> (Outcome, Option<Receipt>) {
        let peer = self.peers[index];
        let address = Some(prefix(address));
        let admission = self.reservations.reserve(peer, connection, address, TTL, self.now);
        let taken = self
            .freed()
            .into_iter()
            .find_map(|(from, reason)| (reason == FreedReason::TakenBy { peer }).then_some(from));
        match admission {
            Ok((receipt, true)) => (Outcome::Renewal, Some(receipt)),
            Ok((receipt, false)) => (taken.map_or(Outcome::Slot, Outcome::SlotOf), Some(receipt)),
            Err(full) => match self.reservations.quota.above(address) {
                Some(above) => (Outcome::RefusedAboveCap(above), None),
                None => (Outcome::Refused(full), None),
            },
        }
    }

    fn disconnect(&mut self, index: usize) -> Effect {
        self.lose_connection(index, connection_of(index), &[])
    }

    fn lose_connection(&mut self, index: usize, connection: u32, up: &[u32]) -> Effect {
        let (peer, reason) = (self.peers[index], FreedReason::Disconnected);
        self.changes();
        self.reservations.on_disconnected(End { peer, connection }, up, reason, self.now);
        self.effect(index)
    }

    fn undelivered(&mut self, index: usize, receipt: Option<Receipt>, up: &[u32]) -> Effect {
        let receipt = receipt.expect("there was an answer");
        self.changes();
        self.reservations.on_undelivered(self.peers[index], receipt, up, self.now);
        self.effect(index)
    }

    /// The effect of the last call on the peer's slot.
    fn effect(&mut self, index: usize) -> Effect {
        let mut changes = self.changes();
        let change = changes.pop();
        assert!(changes.is_empty(), "one change at a time");
        match change {
            None => Effect::None,
            Some(Change { peer, to, freed, .. }) => {
                assert_eq!(peer, self.peers[index]);
                let moved = to.map_or(Effect::Grace, Effect::MovedTo);
                freed.map_or(moved, |(reason, _)| Effect::Freed(reason))
            }
        }
    }

    fn changes(&mut self) -> Vec<Change<u32>> {
        self.reservations.changes.drain(..).collect()
    }

    fn freed(&mut self) -> Vec<(usize, FreedReason)> {
        let changes = self.changes().into_iter();
        let freed = changes.filter_map(|change| Some((change.peer, change.freed?.0)));
        let index = |peer| self.peers.iter().position(|other| *other == peer);
        freed.map(|(peer, reason)| (index(peer).unwrap(), reason)).collect()
    }

    fn sweep(&mut self) -> Vec<(usize, FreedReason)> {
        self.reservations.end_what_is_over(self.now);
        self.freed()
    }

    fn slots_of(&self, address: ClientPrefix) -> usize {
        self.reservations.quota.held(Scope::Address(address))
    }

    fn set(&mut self, config: &Config) {
        self.reservations.configure(config, self.now);
    }

    fn reachable_over(&self, index: usize) -> Option<u32> {
        self.reservations.get(&self.peers[index]).filter(|slot| self.now < slot.ends)?.connection
    }
}

fn connection_of(index: usize) -> u32 {
    index as u32
}

// ---- Safety: a peer that answers keeps its slot

#[test]
fn a_newcomer_is_refused_while_all_slots_are_live() {
    let mut table = Table::of(1);
    assert_eq!(table.reserve(ALICE), Outcome::Slot);
    assert_eq!(table.reserve(BOB), Outcome::Refused(Scope::Total));
    assert_eq!(table.reachable_over(ALICE), Some(connection_of(ALICE)));
}

// ---- Return: the slot of a peer that is gone becomes free

#[test]
fn a_newcomer_takes_the_slot_longest_in_grace() {
    let mut table = Table::of(2);
    table.reserve(ALICE);
    table.reserve(BOB);
    table.disconnect(BOB);
    table.advance(secs(1));
    table.disconnect(ALICE);
    assert_eq!(table.reserve(CAROL), Outcome::SlotOf(BOB));
    assert_eq!(table.reserve(ALICE), Outcome::Renewal);
}

#[test]
fn without_grace_a_slot_is_freed_with_the_last_connection() {
    let mut config = config(1, 0);
    config.grace = Duration::ZERO;
    let mut table = Table::with(&config);
    table.reserve(ALICE);
    assert_eq!(table.disconnect(ALICE), Effect::Freed(FreedReason::Disconnected));
    assert_eq!(table.reserve(BOB), Outcome::Slot);
}

#[test]
fn the_end_of_grace_frees_the_slot() {
    let mut table = Table::of(1);
    table.reserve(ALICE);
    assert_eq!(table.disconnect(ALICE), Effect::Grace);
    table.advance(GRACE - secs(1));
    assert!(table.sweep().is_empty());
    table.advance(secs(1));
    assert_eq!(table.sweep(), [(ALICE, FreedReason::GraceOver)]);
}

#[test]
fn a_term_expires_even_before_the_sweep() {
    let mut table = Table::of(1);
    table.reserve(ALICE);
    table.advance(TTL);
    assert_eq!(table.reachable_over(ALICE), None);
    assert_eq!(table.reserve(BOB), Outcome::Slot);
    table.advance(TTL);
    assert_eq!(table.sweep(), [(BOB, FreedReason::Expired)]);
}

#[test]
fn grace_ends_with_the_term_at_the_latest() {
    let mut table = Table::of(1);
    table.reserve(ALICE);
    table.advance(TTL - secs(5));
    table.disconnect(ALICE);
    table.advance(secs(5));
    assert_eq!(table.sweep(), [(ALICE, FreedReason::Expired)]);
}

#[test]
fn a_released_slot_is_free_at_once() {
    let mut table = Table::of(1);
    table.reserve(ALICE);
    assert!(table.reservations.free(table.peers[ALICE], FreedReason::Released));
    assert!(!table.reservations.free(table.peers[ALICE], FreedReason::Released));
    assert_eq!(table.reserve(BOB), Outcome::Slot);
}

// ---- Return to the owner

#[test]
fn a_peer_that_returns_within_grace_gets_its_slot_back() {
    let mut table = Table::of(1);
    table.reserve(ALICE);
    table.disconnect(ALICE);
    assert_eq!(table.reachable_over(ALICE), None, "not reachable in grace");
    table.advance(GRACE - secs(1));
    assert_eq!(table.reserve(ALICE), Outcome::Renewal);
    assert_eq!(table.reachable_over(ALICE), Some(connection_of(ALICE)));
    table.advance(GRACE);
    assert!(table.sweep().is_empty());
}

#[test]
fn a_newcomer_takes_a_free_slot_before_one_in_grace() {
    let mut table = Table::of(2);
    table.reserve(ALICE);
    table.disconnect(ALICE);
    assert_eq!(table.reserve(BOB), Outcome::Slot);
    assert_eq!(table.reserve(ALICE), Outcome::Renewal);
}

#[test]
fn a_renewal_is_never_refused_for_lack_of_room() {
    let mut table = Table::with(&config(1, 1));
    table.reserve(ALICE);
    for _ in 0..100 {
        table.advance(TTL - secs(1));
        assert_eq!(table.reserve(ALICE), Outcome::Renewal);
    }
}

#[test]
fn a_term_that_is_over_is_not_renewed() {
    let mut table = Table::of(1);
    table.reserve(ALICE);
    table.advance(TTL);
    assert_eq!(table.reserve(ALICE), Outcome::Slot);
}

#[test]
fn a_new_term_begins_with_the_renewal() {
    let mut table = Table::of(1);
    table.reserve(ALICE);
    table.advance(TTL / 2);
    table.reserve(ALICE);
    table.advance(TTL - secs(1));
    assert!(table.sweep().is_empty());
    assert!(table.reachable_over(ALICE).is_some());
}

// ---- Several connections of a peer

#[test]
fn closing_an_old_connection_does_not_affect_a_moved_reservation() {
    let mut table = Table::of(1);
    let (old, new) = (7, 8);
    table.reserve_over(ALICE, old, 1);
    table.reservations.confirm(&table.peers[ALICE]);
    table.reserve_over(ALICE, new, 2);
    table.reservations.confirm(&table.peers[ALICE]);
    assert_eq!(table.lose_connection(ALICE, old, &[new]), Effect::None);
    assert_eq!(table.reachable_over(ALICE), Some(new));
}

#[test]
fn a_reservation_moves_to_another_connection_of_its_peer() {
    let mut table = Table::of(1);
    table.reserve(ALICE);
    let spare = 9;
    assert_eq!(
        table.lose_connection(ALICE, connection_of(ALICE), &[spare]),
        Effect::MovedTo(spare)
    );
    assert_eq!(table.reachable_over(ALICE), Some(spare));
    assert_eq!(table.lose_connection(ALICE, spare, &[]), Effect::Grace);
}

// ---- Undelivered answers

#[test]
fn a_grant_is_undone_if_its_answer_is_not_delivered() {
    let mut table = Table::of(1);
    let (_, receipt) = table.reserve_over(ALICE, 1, 1);
    assert_eq!(table.undelivered(ALICE, receipt, &[1]), Effect::Freed(FreedReason::Undelivered));
    assert_eq!(table.reserve(BOB), Outcome::Slot);
}

#[test]
fn a_grant_is_undone_if_its_connection_closes_before_the_answer() {
    let mut table = Table::of(1);
    table.reserve_over(ALICE, 1, 1);
    assert_eq!(table.lose_connection(ALICE, 1, &[]), Effect::Freed(FreedReason::Undelivered));
}

#[test]
fn an_undelivered_renewal_restores_the_old_term_and_connection() {
    let mut table = Table::of(1);
    table.reserve(ALICE);
    table.advance(secs(10));
    let (outcome, receipt) = table.reserve_over(ALICE, 9, 1);
    assert_eq!(outcome, Outcome::Renewal);
    let old = connection_of(ALICE);
    assert_eq!(table.undelivered(ALICE, receipt, &[old, 9]), Effect::MovedTo(old));
    assert_eq!(table.reachable_over(ALICE), Some(old));
    table.advance(TTL - secs(10));
    assert_eq!(table.sweep(), [(ALICE, FreedReason::Expired)]);
}

#[test]
fn an_undelivered_answer_in_grace_restores_grace_and_its_order() {
    let mut table = Table::of(2);
    table.reserve(ALICE);
    table.reserve(BOB);
    table.disconnect(ALICE);
    table.disconnect(BOB);
    let (_, receipt) = table.reserve_over(ALICE, 9, 1);
    assert_eq!(table.undelivered(ALICE, receipt, &[9]), Effect::Grace);
    assert_eq!(table.reserve(CAROL), Outcome::SlotOf(ALICE));
}

#[test]
fn the_delivery_failure_of_an_older_answer_undoes_nothing() {
    let mut table = Table::of(1);
    let (_, first) = table.reserve_over(ALICE, 1, 1);
    let _second = table.reserve_over(ALICE, 1, 1);
    table.reservations.confirm(&table.peers[ALICE]);
    assert_eq!(table.undelivered(ALICE, first, &[1]), Effect::None);
    assert!(table.reachable_over(ALICE).is_some());
}

// ---- Caps

#[test]
fn an_address_cap_takes_only_from_the_same_address() {
    let mut table = Table::with(&config(9, 1));
    table.reserve_over(ALICE, 0, 1);
    table.reservations.confirm(&table.peers[ALICE]);
    let full = Scope::Address(prefix(1));
    assert_eq!(table.reserve_over(BOB, 1, 1).0, Outcome::Refused(full));
    table.disconnect(ALICE);
    assert_eq!(table.reserve_over(BOB, 1, 1).0, Outcome::SlotOf(ALICE));
    assert_eq!(table.reserve(CAROL), Outcome::Slot);
}

#[test]
fn a_renewal_moves_to_the_quota_of_the_new_address_if_there_is_room() {
    let mut table = Table::with(&config(9, 1));
    table.reserve_over(ALICE, 0, 1);
    table.reserve_over(ALICE, 5, 2);
    assert_eq!(table.slots_of(prefix(1)), 0);
    assert_eq!(table.slots_of(prefix(2)), 1);

    table.reserve_over(BOB, 1, 1);
    assert_eq!(table.reserve_over(BOB, 6, 2).0, Outcome::Renewal);
    assert_eq!(table.slots_of(prefix(1)), 1, "no room in the new quota");
}

#[test]
fn expired_slots_block_no_newcomer_before_the_sweep() {
    let mut table = Table::with(&config(9, 1));
    table.reserve_over(ALICE, 0, 1);
    table.advance(TTL / 2);
    table.reserve_over(BOB, 1, 2);
    table.advance(TTL / 2);
    assert_eq!(table.reserve_over(BOB, 1, 1).0, Outcome::Renewal);
    assert_eq!(table.slots_of(prefix(1)), 1, "it replaces Alice's");
    assert_eq!(table.slots_of(prefix(2)), 0);
}

#[test]
fn a_subnet_cap_takes_only_from_the_same_subnet() {
    let mut config = config(9, 0);
    config.max_reservations_per_subnet = Some(2);
    let mut table = Table::with(&config);
    let subnet = prefix(0).subnet();
    table.reserve(ALICE);
    table.reserve(BOB);
    assert_eq!(table.reserve(CAROL), Outcome::Refused(Scope::Subnet(subnet)));
    table.disconnect(BOB);
    assert_eq!(table.reserve(CAROL), Outcome::SlotOf(BOB));
    assert_eq!(table.reservations.quota.held(Scope::Subnet(subnet)), 2);
}

// ---- Changes of the configuration

#[test]
fn a_lowered_cap_keeps_existing_slots_and_refuses_newcomers() {
    let mut table = Table::of(3);
    table.reserve(ALICE);
    table.reserve(BOB);
    table.set(&config(1, 0));
    table.disconnect(BOB);
    assert_eq!(table.reserve(CAROL), Outcome::RefusedAboveCap(Scope::Total));
    assert_eq!(table.reserve(ALICE), Outcome::Renewal);
    assert_eq!(table.reserve(BOB), Outcome::Renewal, "its slot in grace was not taken");
    table.reservations.free(table.peers[BOB], FreedReason::Released);
    assert_eq!(table.reserve(CAROL), Outcome::Refused(Scope::Total));
    table.reservations.free(table.peers[ALICE], FreedReason::Released);
    assert_eq!(table.reserve(CAROL), Outcome::Slot);
}

#[test]
fn a_shortened_grace_may_end_at_once() {
    let mut table = Table::of(1);
    table.reserve(ALICE);
    table.disconnect(ALICE);
    table.advance(GRACE / 2);
    let mut shorter = config(1, 0);
    shorter.grace = GRACE / 3;
    table.set(&shorter);
    assert_eq!(table.reserve(BOB), Outcome::Slot);
}
