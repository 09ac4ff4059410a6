//! The laws: as sentences about the table, and as a property of random histories.
//!
//! | what holds | flags | shown by |
//! | --- | --- | --- |
//! | connection monitoring: a slot points at a connection that is up, or is in grace | none: it is always so | `when_the_connection_goes_another_of_the_same_peer_takes_over`, `the_end_of_an_old_connection_touches_nothing_that_moved_on` |
//! | reclaim on disconnect: at once, or kept for its owner for a while | `--grace`; `0s`: on the close event | `without_grace_the_slot_is_free_with_the_last_connection`, `a_peer_that_comes_back_within_grace_gets_its_slot`, `a_newcomer_takes_the_slot_of_the_peer_that_left_first` |
//! | heartbeat: who is silent is asked, who had its time to answer and did not is judged | `--heartbeat`, `--silence`, `--probe`, `--probe-after` | the history below; `faults.rs`, against the program |
//! | graceful release: given up by command, and with its term | `--reservation-ttl` | `a_slot_that_is_given_up_is_free_at_once`, `a_term_that_is_over_is_over_whether_or_not_the_sweep_has_been_by` |
//! | concurrency: many clients at once, and no slot too many | `--max-reservations` | `however_many_come_and_go_at_once_the_counts_agree` in `crowd.rs` |
//! | consistency: no cap exceeded, every counter what counting gives, nothing left behind | `--max-reservations-per-ip`, `--max-reservations-per-subnet`, `--reserve-rate` | `history::the_relay_and_a_naive_model_of_it_never_differ` |
//! | fair shares: a prefix that takes all it can get cedes to others, and nobody loses a circuit for one that is refused | `--max-circuits`, `--max-circuits-per-ip`, `--max-circuits-per-subnet`, `--max-circuits-per-peer` | `circuits::circuits_are_admitted_and_cede_as_a_list_of_them_says` |
//! | one acceptance: a target that does not answer is asked over its other connections, over one at a time, and accepts a circuit once | none: it is always so | `circuits::circuits_are_admitted_and_cede_as_a_list_of_them_says`, and a target on a dead connection in `faults.rs` |
//! | accounting: a peer's account is of its present stay, and ends with it; totals are of all | none: it is always so | `accounts::the_accounts_are_what_the_list_of_all_that_happened_adds_up_to`; `accounts.rs`, against a whole relay |
//! | tunable policy: what is changed holds from then on and drops nobody | all of these | `a_cap_that_is_lowered_drops_nobody_and_admits_nobody_until_there_is_room`, the history; `access.rs` |

#[path = "laws/accounts.rs"]
mod accounts;
#[path = "laws/circuits.rs"]
mod circuits;
#[path = "laws/history.rs"]
mod history;
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
        reservations::{Change, Granted, Receipt, Reservations},
    },
};

const TTL: Duration = Duration::from_secs(3600);
const GRACE: Duration = Duration::from_secs(30);

fn secs(n: u64) -> Duration {
    Duration::from_secs(n)
}

fn billed_to(n: u8) -> ClientPrefix {
    IpAddr::from(Ipv4Addr::new(10, 0, 0, n)).into()
}

fn config(total: usize, per_ip: usize) -> Config {
    let mut config = Config::default();
    config.max_reservations = total;
    config.max_reservations_per_ip = Some(per_ip);
    config.grace = GRACE;
    config
}

/// A table whose peers are letters, whose clock is moved by hand, and whose answers are short.
///
/// Each peer reserves over the connection that bears its own number, from an address of its own,
/// and reads the answer, unless a test says otherwise.
struct Table {
    reservations: Reservations<u32>,
    peers: Vec<PeerId>,
    now: Instant,
}

const ALICE: usize = 0;
const BOB: usize = 1;
const CAROL: usize = 2;

/// What became of a RESERVE.
#[derive(Debug, PartialEq, Eq)]
enum Got {
    Slot,
    SlotOf(usize),
    Renewal,
    Nothing(Scope),
    /// Nor would there be if somebody were gone.
    NothingYet(Scope),
}

/// What the end of a connection, or of an attempt to answer, meant for a slot.
#[derive(Debug, PartialEq, Eq)]
enum Left {
    Untouched,
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

    fn pass(&mut self, time: Duration) {
        self.now += time;
    }

    fn reserve(&mut self, who: usize) -> Got {
        let (got, _) = self.reserve_over(who, connection_of(who), who as u8);
        self.reservations.confirm(&self.peers[who]);
        got
    }

    /// Without the answer being read yet.
    fn reserve_over(&mut self, who: usize, connection: u32, address: u8) -> (Got, Option<Receipt>) {
        let peer = self.peers[who];
        let address = Some(billed_to(address));
        let admission = self.reservations.reserve(peer, connection, address, TTL, self.now);
        let taken = self
            .freed()
            .into_iter()
            .find_map(|(from, reason)| (reason == FreedReason::TakenBy { peer }).then_some(from));
        match admission {
            Ok(Granted { receipt, is_renewal: true }) => (Got::Renewal, Some(receipt)),
            Ok(Granted { receipt, .. }) => (taken.map_or(Got::Slot, Got::SlotOf), Some(receipt)),
            Err(full) => match self.reservations.quota.above(address) {
                Some(above) => (Got::NothingYet(above), None),
                None => (Got::Nothing(full), None),
            },
        }
    }

    fn disconnect(&mut self, who: usize) -> Left {
        self.lose(who, connection_of(who), &[])
    }

    fn lose(&mut self, who: usize, connection: u32, up: &[u32]) -> Left {
        let (peer, reason) = (self.peers[who], FreedReason::Disconnected);
        self.changes();
        self.reservations.on_disconnected(End { peer, connection }, up, reason, self.now);
        self.left(who)
    }

    fn undelivered(&mut self, who: usize, receipt: Option<Receipt>, up: &[u32]) -> Left {
        let receipt = receipt.expect("there was an answer");
        self.changes();
        self.reservations.on_undelivered(self.peers[who], receipt, up, self.now);
        self.left(who)
    }

    /// What became of its slot.
    fn left(&mut self, who: usize) -> Left {
        let mut changes = self.changes();
        let change = changes.pop();
        assert!(changes.is_empty(), "one at a time");
        match change {
            None => Left::Untouched,
            Some(Change { peer, to, freed, .. }) => {
                assert_eq!(peer, self.peers[who]);
                let moved = to.map_or(Left::Grace, Left::MovedTo);
                freed.map_or(moved, |(reason, _)| Left::Freed(reason))
            }
        }
    }

    fn changes(&mut self) -> Vec<Change<u32>> {
        self.reservations.changes.drain(..).collect()
    }

    fn freed(&mut self) -> Vec<(usize, FreedReason)> {
        let changes = self.changes().into_iter();
        let freed = changes.filter_map(|change| Some((change.peer, change.freed?.0)));
        let who = |peer| self.peers.iter().position(|other| *other == peer);
        freed.map(|(peer, reason)| (who(peer).unwrap(), reason)).collect()
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

    fn reaches(&self, who: usize) -> Option<u32> {
        self.reservations.get(&self.peers[who]).filter(|slot| self.now < slot.ends)?.connection
    }
}

fn connection_of(who: usize) -> u32 {
    who as u32
}

// ---- Safety: who answers keeps its slot

#[test]
fn a_newcomer_gets_nothing_while_everyone_is_there() {
    let mut table = Table::of(1);
    assert_eq!(table.reserve(ALICE), Got::Slot);
    assert_eq!(table.reserve(BOB), Got::Nothing(Scope::Total));
    assert_eq!(table.reaches(ALICE), Some(connection_of(ALICE)));
}

// ---- Return: a slot whose peer is gone can be had again

#[test]
fn a_newcomer_takes_the_slot_of_the_peer_that_left_first() {
    let mut table = Table::of(2);
    table.reserve(ALICE);
    table.reserve(BOB);
    table.disconnect(BOB);
    table.pass(secs(1));
    table.disconnect(ALICE);
    assert_eq!(table.reserve(CAROL), Got::SlotOf(BOB));
    assert_eq!(table.reserve(ALICE), Got::Renewal);
}

#[test]
fn without_grace_the_slot_is_free_with_the_last_connection() {
    let mut config = config(1, 0);
    config.grace = Duration::ZERO;
    let mut table = Table::with(&config);
    table.reserve(ALICE);
    assert_eq!(table.disconnect(ALICE), Left::Freed(FreedReason::Disconnected));
    assert_eq!(table.reserve(BOB), Got::Slot);
}

#[test]
fn a_grace_that_is_over_frees_the_slot() {
    let mut table = Table::of(1);
    table.reserve(ALICE);
    assert_eq!(table.disconnect(ALICE), Left::Grace);
    table.pass(GRACE - secs(1));
    assert!(table.sweep().is_empty());
    table.pass(secs(1));
    assert_eq!(table.sweep(), [(ALICE, FreedReason::GraceOver)]);
}

#[test]
fn a_term_that_is_over_is_over_whether_or_not_the_sweep_has_been_by() {
    let mut table = Table::of(1);
    table.reserve(ALICE);
    table.pass(TTL);
    assert_eq!(table.reaches(ALICE), None);
    assert_eq!(table.reserve(BOB), Got::Slot);
    table.pass(TTL);
    assert_eq!(table.sweep(), [(BOB, FreedReason::Expired)]);
}

#[test]
fn a_grace_ends_with_the_term_at_the_latest() {
    let mut table = Table::of(1);
    table.reserve(ALICE);
    table.pass(TTL - secs(5));
    table.disconnect(ALICE);
    table.pass(secs(5));
    assert_eq!(table.sweep(), [(ALICE, FreedReason::Expired)]);
}

#[test]
fn a_slot_that_is_given_up_is_free_at_once() {
    let mut table = Table::of(1);
    table.reserve(ALICE);
    assert!(table.reservations.free(table.peers[ALICE], FreedReason::Released));
    assert!(!table.reservations.free(table.peers[ALICE], FreedReason::Released));
    assert_eq!(table.reserve(BOB), Got::Slot);
}

// ---- Return to the owner

#[test]
fn a_peer_that_comes_back_within_grace_gets_its_slot() {
    let mut table = Table::of(1);
    table.reserve(ALICE);
    table.disconnect(ALICE);
    assert_eq!(table.reaches(ALICE), None, "void while it is away");
    table.pass(GRACE - secs(1));
    assert_eq!(table.reserve(ALICE), Got::Renewal);
    assert_eq!(table.reaches(ALICE), Some(connection_of(ALICE)));
    table.pass(GRACE);
    assert!(table.sweep().is_empty());
}

#[test]
fn a_newcomer_leaves_grace_slots_alone_while_another_is_free() {
    let mut table = Table::of(2);
    table.reserve(ALICE);
    table.disconnect(ALICE);
    assert_eq!(table.reserve(BOB), Got::Slot);
    assert_eq!(table.reserve(ALICE), Got::Renewal);
}

#[test]
fn a_renewal_is_never_refused_for_room() {
    let mut table = Table::with(&config(1, 1));
    table.reserve(ALICE);
    for _ in 0..100 {
        table.pass(TTL - secs(1));
        assert_eq!(table.reserve(ALICE), Got::Renewal);
    }
}

#[test]
fn a_new_term_begins_with_the_renewal() {
    let mut table = Table::of(1);
    table.reserve(ALICE);
    table.pass(TTL / 2);
    table.reserve(ALICE);
    table.pass(TTL - secs(1));
    assert!(table.sweep().is_empty());
    assert!(table.reaches(ALICE).is_some());
}

// ---- Connections come and go

#[test]
fn the_end_of_an_old_connection_touches_nothing_that_moved_on() {
    let mut table = Table::of(1);
    let (old, new) = (7, 8);
    table.reserve_over(ALICE, old, 1);
    table.reservations.confirm(&table.peers[ALICE]);
    table.reserve_over(ALICE, new, 2);
    table.reservations.confirm(&table.peers[ALICE]);
    assert_eq!(table.lose(ALICE, old, &[new]), Left::Untouched);
    assert_eq!(table.reaches(ALICE), Some(new));
}

#[test]
fn when_the_connection_goes_another_of_the_same_peer_takes_over() {
    let mut table = Table::of(1);
    table.reserve(ALICE);
    let spare = 9;
    assert_eq!(table.lose(ALICE, connection_of(ALICE), &[spare]), Left::MovedTo(spare));
    assert_eq!(table.reaches(ALICE), Some(spare));
    assert_eq!(table.lose(ALICE, spare, &[]), Left::Grace);
}

// ---- Answers that never arrive

#[test]
fn a_grant_whose_answer_is_lost_is_freed() {
    let mut table = Table::of(1);
    let (_, receipt) = table.reserve_over(ALICE, 1, 1);
    assert_eq!(table.undelivered(ALICE, receipt, &[1]), Left::Freed(FreedReason::Undelivered));
    assert_eq!(table.reserve(BOB), Got::Slot);
}

#[test]
fn a_grant_is_freed_as_well_when_its_connection_is_lost_before_the_answer() {
    let mut table = Table::of(1);
    table.reserve_over(ALICE, 1, 1);
    assert_eq!(table.lose(ALICE, 1, &[]), Left::Freed(FreedReason::Undelivered));
}

#[test]
fn a_renewal_whose_answer_is_lost_leaves_the_old_term_and_the_old_connection() {
    let mut table = Table::of(1);
    table.reserve(ALICE);
    table.pass(secs(10));
    let (got, receipt) = table.reserve_over(ALICE, 9, 1);
    assert_eq!(got, Got::Renewal);
    let old = connection_of(ALICE);
    assert_eq!(table.undelivered(ALICE, receipt, &[old, 9]), Left::MovedTo(old));
    assert_eq!(table.reaches(ALICE), Some(old));
    table.pass(TTL - secs(10));
    assert_eq!(table.sweep(), [(ALICE, FreedReason::Expired)]);
}

#[test]
fn a_lost_answer_to_a_peer_in_grace_leaves_it_in_grace_and_in_its_place() {
    let mut table = Table::of(2);
    table.reserve(ALICE);
    table.reserve(BOB);
    table.disconnect(ALICE);
    table.disconnect(BOB);
    let (_, receipt) = table.reserve_over(ALICE, 9, 1);
    assert_eq!(table.undelivered(ALICE, receipt, &[9]), Left::Grace);
    assert_eq!(table.reserve(CAROL), Got::SlotOf(ALICE));
}

#[test]
fn news_of_an_older_answer_undoes_nothing() {
    let mut table = Table::of(1);
    let (_, first) = table.reserve_over(ALICE, 1, 1);
    let _second = table.reserve_over(ALICE, 1, 1);
    table.reservations.confirm(&table.peers[ALICE]);
    assert_eq!(table.undelivered(ALICE, first, &[1]), Left::Untouched);
    assert!(table.reaches(ALICE).is_some());
}

// ---- Caps

#[test]
fn an_address_cap_takes_only_from_the_same_address() {
    let mut table = Table::with(&config(9, 1));
    table.reserve_over(ALICE, 0, 1);
    table.reservations.confirm(&table.peers[ALICE]);
    let full = Scope::Address(billed_to(1));
    assert_eq!(table.reserve_over(BOB, 1, 1).0, Got::Nothing(full));
    table.disconnect(ALICE);
    assert_eq!(table.reserve_over(BOB, 1, 1).0, Got::SlotOf(ALICE));
    assert_eq!(table.reserve(CAROL), Got::Slot);
}

#[test]
fn a_renewal_is_billed_to_the_new_address_if_there_is_room() {
    let mut table = Table::with(&config(9, 1));
    table.reserve_over(ALICE, 0, 1);
    table.reserve_over(ALICE, 5, 2);
    assert_eq!(table.slots_of(billed_to(1)), 0);
    assert_eq!(table.slots_of(billed_to(2)), 1);

    table.reserve_over(BOB, 1, 1);
    assert_eq!(table.reserve_over(BOB, 6, 2).0, Got::Renewal);
    assert_eq!(table.slots_of(billed_to(1)), 1, "no room at the new one");
}

#[test]
fn what_is_over_is_in_nobodys_way_before_the_sweep() {
    let mut table = Table::with(&config(9, 1));
    table.reserve_over(ALICE, 0, 1);
    table.pass(TTL / 2);
    table.reserve_over(BOB, 1, 2);
    table.pass(TTL / 2);
    assert_eq!(table.reserve_over(BOB, 1, 1).0, Got::Renewal);
    assert_eq!(table.slots_of(billed_to(1)), 1, "in the place of Alice's");
    assert_eq!(table.slots_of(billed_to(2)), 0);
}

#[test]
fn a_subnet_cap_takes_only_from_the_same_subnet() {
    let mut config = config(9, 0);
    config.max_reservations_per_subnet = Some(2);
    let mut table = Table::with(&config);
    let subnet = billed_to(0).subnet();
    table.reserve(ALICE);
    table.reserve(BOB);
    assert_eq!(table.reserve(CAROL), Got::Nothing(Scope::Subnet(subnet)));
    table.disconnect(BOB);
    assert_eq!(table.reserve(CAROL), Got::SlotOf(BOB));
    assert_eq!(table.reservations.quota.held(Scope::Subnet(subnet)), 2);
}

// ---- A policy that changes

#[test]
fn a_cap_that_is_lowered_drops_nobody_and_admits_nobody_until_there_is_room() {
    let mut table = Table::of(3);
    table.reserve(ALICE);
    table.reserve(BOB);
    table.set(&config(1, 0));
    table.disconnect(BOB);
    assert_eq!(table.reserve(CAROL), Got::NothingYet(Scope::Total));
    assert_eq!(table.reserve(ALICE), Got::Renewal);
    assert_eq!(table.reserve(BOB), Got::Renewal, "its claim was left alone");
    table.reservations.free(table.peers[BOB], FreedReason::Released);
    assert_eq!(table.reserve(CAROL), Got::Nothing(Scope::Total));
    table.reservations.free(table.peers[ALICE], FreedReason::Released);
    assert_eq!(table.reserve(CAROL), Got::Slot);
}

#[test]
fn a_grace_that_is_shortened_may_be_over_at_once() {
    let mut table = Table::of(1);
    table.reserve(ALICE);
    table.disconnect(ALICE);
    table.pass(GRACE / 2);
    let mut shorter = config(1, 0);
    shorter.grace = GRACE / 3;
    table.set(&shorter);
    assert_eq!(table.reserve(BOB), Got::Slot);
}
