//! The table's laws: as sentences, and as properties of random histories.
//!
//! The sentences below read like the laws of the design. The property runs the real table beside
//! a naive model of it that keeps a plain list, scans it for everything, and is too simple to be
//! wrong in the same way: after each step of a random history both must have given the same answer
//! and hold the same, and no cap may be exceeded.

use std::{
    net::{IpAddr, Ipv4Addr},
    time::{Duration, Instant},
};

use libp2p::PeerId;
use proptest::prelude::*;
use relaylet::{
    Config,
    address::BilledTo,
    bills::Full,
    reservations::{Admission, Freed, FreedReason, Left, Receipt, Reservations},
};

const TTL: Duration = Duration::from_secs(3600);
const GRACE: Duration = Duration::from_secs(30);

fn secs(n: u64) -> Duration {
    Duration::from_secs(n)
}

fn billed_to(n: u8) -> BilledTo {
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
    Nothing(Full),
    /// Nor would there be if somebody were gone.
    NothingYet(Full),
}

impl Table {
    fn of(slots: usize) -> Self {
        Self::with(&config(slots, 0))
    }

    fn with(config: &Config) -> Self {
        Self {
            reservations: Reservations::new(config.into()),
            peers: (0..3).map(|_| PeerId::random()).collect(),
            now: Instant::now(),
        }
    }

    fn pass(&mut self, time: Duration) {
        self.now += time;
    }

    fn reserve(&mut self, who: usize) -> Got {
        let (got, _) = self.reserve_over(who, connection_of(who), who as u8);
        self.reservations.delivered(&self.peers[who]);
        got
    }

    /// Without the answer being read yet.
    fn reserve_over(&mut self, who: usize, connection: u32, address: u8) -> (Got, Option<Receipt>) {
        let peer = self.peers[who];
        let address = Some(billed_to(address));
        let admission = self
            .reservations
            .reserve(peer, connection, address, TTL, self.now);
        let taken = self
            .reservations
            .take_freed()
            .into_iter()
            .find_map(|freed| {
                let from = self.peers.iter().position(|peer| *peer == freed.peer)?;
                (freed.reason == FreedReason::TakenBy { peer }).then_some(from)
            });
        match admission {
            Admission::Granted(receipt) => (taken.map_or(Got::Slot, Got::SlotOf), Some(receipt)),
            Admission::Renewed(receipt) => (Got::Renewal, Some(receipt)),
            Admission::Refused(full) => (Got::Nothing(full), None),
            Admission::Over(full) => (Got::NothingYet(full), None),
        }
    }

    fn disconnect(&mut self, who: usize) -> Left<u32> {
        self.lose(who, connection_of(who), &[])
    }

    fn lose(&mut self, who: usize, connection: u32, up: &[u32]) -> Left<u32> {
        self.reservations
            .disconnected(self.peers[who], connection, up, self.now)
    }

    fn undelivered(&mut self, who: usize, receipt: Option<Receipt>, up: &[u32]) -> Left<u32> {
        let receipt = receipt.expect("there was an answer");
        self.reservations
            .undelivered(self.peers[who], receipt, up, self.now)
    }

    fn sweep(&mut self) -> Vec<(usize, FreedReason)> {
        self.reservations.end_what_is_over(self.now);
        let freed = self.reservations.take_freed();
        let who = |freed: &Freed<u32>| self.peers.iter().position(|peer| *peer == freed.peer);
        freed
            .iter()
            .map(|freed| (who(freed).unwrap(), freed.reason))
            .collect()
    }

    fn slots_of(&self, address: BilledTo) -> usize {
        self.reservations.bills().of_address(address)
    }

    fn set(&mut self, config: &Config) {
        self.reservations.set_policy(config.into(), self.now);
    }

    fn reaches(&self, who: usize) -> Option<u32> {
        self.reservations.live(&self.peers[who], self.now)
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
    assert_eq!(table.reserve(BOB), Got::Nothing(Full::Table));
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
    assert_eq!(table.disconnect(ALICE), Left::Freed);
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
    table.reservations.delivered(&table.peers[ALICE]);
    table.reserve_over(ALICE, new, 2);
    table.reservations.delivered(&table.peers[ALICE]);
    assert_eq!(table.lose(ALICE, old, &[new]), Left::Untouched);
    assert_eq!(table.reaches(ALICE), Some(new));
}

#[test]
fn when_the_connection_goes_another_of_the_same_peer_takes_over() {
    let mut table = Table::of(1);
    table.reserve(ALICE);
    let spare = 9;
    assert_eq!(
        table.lose(ALICE, connection_of(ALICE), &[spare]),
        Left::MovedTo(spare)
    );
    assert_eq!(table.reaches(ALICE), Some(spare));
    assert_eq!(table.lose(ALICE, spare, &[]), Left::Grace);
}

// ---- Answers that never arrive

#[test]
fn a_grant_whose_answer_is_lost_is_freed() {
    let mut table = Table::of(1);
    let (_, receipt) = table.reserve_over(ALICE, 1, 1);
    assert_eq!(table.undelivered(ALICE, receipt, &[1]), Left::Freed);
    assert_eq!(table.reserve(BOB), Got::Slot);
}

#[test]
fn a_grant_is_freed_as_well_when_its_connection_is_lost_before_the_answer() {
    let mut table = Table::of(1);
    table.reserve_over(ALICE, 1, 1);
    assert_eq!(table.lose(ALICE, 1, &[]), Left::Freed);
    assert_eq!(table.sweep(), [(ALICE, FreedReason::Undelivered)]);
}

#[test]
fn a_renewal_whose_answer_is_lost_leaves_the_old_term_and_the_old_connection() {
    let mut table = Table::of(1);
    table.reserve(ALICE);
    table.pass(secs(10));
    let (got, receipt) = table.reserve_over(ALICE, 9, 1);
    assert_eq!(got, Got::Renewal);
    let old = connection_of(ALICE);
    assert_eq!(
        table.undelivered(ALICE, receipt, &[old, 9]),
        Left::MovedTo(old)
    );
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
    table.reservations.delivered(&table.peers[ALICE]);
    assert_eq!(table.undelivered(ALICE, first, &[1]), Left::Untouched);
    assert!(table.reaches(ALICE).is_some());
}

// ---- Caps

#[test]
fn an_address_cap_takes_only_from_the_same_address() {
    let mut table = Table::with(&config(9, 1));
    table.reserve_over(ALICE, 0, 1);
    table.reservations.delivered(&table.peers[ALICE]);
    let full = Full::Address(billed_to(1));
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
    assert_eq!(table.reserve(CAROL), Got::Nothing(Full::Subnet(subnet)));
    table.disconnect(BOB);
    assert_eq!(table.reserve(CAROL), Got::SlotOf(BOB));
    assert_eq!(table.reservations.bills().of_subnet(subnet), 2);
}

// ---- A policy that changes

#[test]
fn a_cap_that_is_lowered_drops_nobody_and_admits_nobody_until_there_is_room() {
    let mut table = Table::of(3);
    table.reserve(ALICE);
    table.reserve(BOB);
    table.set(&config(1, 0));
    table.disconnect(BOB);
    assert_eq!(table.reserve(CAROL), Got::NothingYet(Full::Table));
    assert_eq!(table.reserve(ALICE), Got::Renewal);
    assert_eq!(table.reserve(BOB), Got::Renewal, "its claim was left alone");
    table.reservations.release(table.peers[BOB]);
    assert_eq!(table.reserve(CAROL), Got::Nothing(Full::Table));
    table.reservations.release(table.peers[ALICE]);
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

// ---- The same, for any history

/// One step of a history. Peers, connections and addresses are few, so that they meet.
#[derive(Clone, Debug)]
enum Step {
    Reserve {
        peer: usize,
        connection: u32,
        address: u8,
    },
    Delivered {
        peer: usize,
    },
    Undelivered {
        peer: usize,
    },
    Disconnect {
        peer: usize,
        connection: u32,
    },
    Connect {
        peer: usize,
        connection: u32,
    },
    Release {
        peer: usize,
    },
    Pass {
        seconds: u64,
    },
    Sweep,
}

const PEERS: usize = 6;

fn step() -> impl Strategy<Value = Step> {
    let peer = 0..PEERS;
    let connection = 0..3u32;
    prop_oneof![
        5 => (peer.clone(), connection.clone(), 0..3u8).prop_map(|(peer, connection, address)| {
            Step::Reserve { peer, connection, address }
        }),
        3 => peer.clone().prop_map(|peer| Step::Delivered { peer }),
        1 => peer.clone().prop_map(|peer| Step::Undelivered { peer }),
        3 => (peer.clone(), connection.clone())
            .prop_map(|(peer, connection)| Step::Disconnect { peer, connection }),
        2 => (peer.clone(), connection)
            .prop_map(|(peer, connection)| Step::Connect { peer, connection }),
        1 => peer.prop_map(|peer| Step::Release { peer }),
        3 => prop_oneof![1..40u64, 1000..4000u64].prop_map(|seconds| Step::Pass { seconds }),
        2 => Just(Step::Sweep),
    ]
}

/// The laws once more, as naively as they can be written down.
struct Model {
    slots: Vec<Slot>,
    total: usize,
    per_ip: usize,
    ttl: u64,
    grace: u64,
    now: u64,
    departures: u64,
}

/// `Ok`: live over this connection; `Err`: left at this time, as the how-manieth.
type State = Result<u32, (u64, u64)>;

#[derive(Clone, Debug, PartialEq)]
struct Slot {
    peer: usize,
    state: State,
    expires: u64,
    address: u8,
    receipt: Option<Receipt>,
    /// What held when the peer last knew where it stood: nothing, or a slot.
    before: Option<Option<(State, u64)>>,
}

impl Model {
    fn over(&self, slot: &Slot) -> bool {
        let grace_over = slot
            .state
            .is_err_and(|(since, _)| since + self.grace <= self.now);
        slot.expires <= self.now || grace_over
    }

    fn sweep(&mut self) {
        let slots = std::mem::take(&mut self.slots);
        self.slots = slots.into_iter().filter(|slot| !self.over(slot)).collect();
    }

    fn at(&self, address: u8) -> usize {
        self.slots
            .iter()
            .filter(|slot| slot.address == address)
            .count()
    }

    /// Whom a newcomer at this address takes the slot of, if it gets one.
    fn admit(&self, address: u8) -> Option<Option<usize>> {
        let address_full = self.at(address) >= self.per_ip;
        if !address_full && self.slots.len() < self.total {
            return Some(None);
        }
        let candidates = self
            .slots
            .iter()
            .filter(|s| !address_full || s.address == address);
        let left = candidates.filter_map(|s| Some((s.state.err()?.1, s.peer)));
        left.min().map(|(_, peer)| Some(peer))
    }

    fn settle(&mut self, index: usize, up: &[u32]) {
        self.slots[index].state = match up.last() {
            Some(connection) => Ok(*connection),
            None => {
                self.departures += 1;
                Err((self.now, self.departures))
            }
        };
        if self.grace == 0 && self.slots[index].state.is_err() {
            self.slots.remove(index);
        }
    }

    fn undo(&mut self, index: usize, up: &[u32]) {
        let Some(before) = self.slots[index].before.take() else {
            return;
        };
        let Some((state, expires)) = before else {
            self.slots.remove(index);
            return;
        };
        self.slots[index].state = state;
        self.slots[index].expires = expires;
        if state.is_ok_and(|connection| !up.contains(&connection)) {
            self.settle(index, up);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]

    #[test]
    fn the_table_and_a_naive_model_of_it_never_differ(
        total in 1..5usize,
        per_ip in 1..4usize,
        grace in prop_oneof![Just(0u64), Just(30)],
        history in prop::collection::vec(step(), 1..200),
    ) {
        let mut config = config(total, per_ip);
        config.grace = secs(grace);
        let mut table: Reservations<u32> = Reservations::new((&config).into());
        let mut model = Model {
            slots: Vec::new(), total, per_ip, ttl: TTL.as_secs(), grace, now: 0, departures: 0,
        };
        let peers: Vec<_> = (0..PEERS).map(|_| PeerId::random()).collect();
        let mut up: Vec<Vec<u32>> = vec![Vec::new(); PEERS];
        let start = Instant::now();

        for step in history {
            let now = start + secs(model.now);
            match step {
                Step::Connect { peer, connection } => {
                    if !up[peer].contains(&connection) {
                        up[peer].push(connection);
                    }
                }
                Step::Reserve { peer, connection, address } => {
                    if !up[peer].contains(&connection) {
                        up[peer].push(connection);
                    }
                    let to = Some(billed_to(address));
                    let got = table.reserve(peers[peer], connection, to, TTL, now);
                    // Whoever is over is no holder any more, and in nobody's way.
                    model.sweep();
                    let expires = model.now + model.ttl;
                    if let Some(index) = model.slots.iter().position(|s| s.peer == peer) {
                        let Admission::Renewed(receipt) = got else {
                            return Err(TestCaseError::fail(format!("not renewed: {got:?}")));
                        };
                        let room = model.at(address) < model.per_ip;
                        let slot = &mut model.slots[index];
                        slot.before.get_or_insert(Some((slot.state, slot.expires)));
                        slot.state = Ok(connection);
                        slot.expires = expires;
                        slot.receipt = Some(receipt);
                        if room {
                            slot.address = address;
                        }
                    } else if let Some(taken) = model.admit(address) {
                        let Admission::Granted(receipt) = got else {
                            return Err(TestCaseError::fail(format!("not granted: {got:?}")));
                        };
                        model.slots.retain(|slot| Some(slot.peer) != taken);
                        model.slots.push(Slot {
                            peer, state: Ok(connection), expires, address,
                            receipt: Some(receipt), before: Some(None),
                        });
                    } else {
                        prop_assert!(matches!(got, Admission::Refused(_)), "{:?}", got);
                    }
                }
                Step::Delivered { peer } => {
                    table.delivered(&peers[peer]);
                    if let Some(slot) = model.slots.iter_mut().find(|slot| slot.peer == peer) {
                        slot.before = None;
                    }
                }
                Step::Undelivered { peer } => {
                    if let Some(index) = model.slots.iter().position(|slot| slot.peer == peer) {
                        let receipt = model.slots[index].receipt.unwrap();
                        table.undelivered(peers[peer], receipt, &up[peer], now);
                        model.undo(index, &up[peer]);
                    }
                }
                Step::Disconnect { peer, connection } => {
                    up[peer].retain(|other| *other != connection);
                    table.disconnected(peers[peer], connection, &up[peer], now);
                    let index = model.slots.iter().position(|s| {
                        s.peer == peer && s.state == Ok(connection)
                    });
                    if let Some(index) = index {
                        if model.slots[index].before.is_some() {
                            model.undo(index, &up[peer]);
                        } else {
                            model.settle(index, &up[peer]);
                        }
                    }
                }
                Step::Release { peer } => {
                    table.release(peers[peer]);
                    model.slots.retain(|slot| slot.peer != peer);
                }
                Step::Pass { seconds } => model.now += seconds,
                Step::Sweep => {
                    table.end_what_is_over(now);
                    model.sweep();
                }
            }
            let _ = table.take_freed();

            // What is over may still lie there until somebody needs the room: count the others.
            let now = start + secs(model.now);
            for (index, peer) in peers.iter().enumerate() {
                let slot = model.slots.iter().find(|slot| slot.peer == index);
                let live = slot.filter(|s| s.expires > model.now).and_then(|s| s.state.ok());
                prop_assert_eq!(table.live(peer, now), live);
            }
            // No cap is ever exceeded, and the counters are what counting from scratch gives.
            prop_assert!(table.taken() <= total);
            let billed: usize = (0..3).map(|n| table.bills().of_address(billed_to(n))).sum();
            prop_assert_eq!(billed, table.taken());
            prop_assert!((0..3).all(|n| table.bills().of_address(billed_to(n)) <= per_ip));
            prop_assert!(table.in_grace() <= table.taken());
        }

        // With everyone gone and every term over, nothing is left.
        let end = start + secs(model.now) + TTL + GRACE;
        table.end_what_is_over(end);
        prop_assert_eq!((table.taken(), table.in_grace(), table.bills().len()), (0, 0, 0));
    }
}
