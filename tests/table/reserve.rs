//! The table's cost of one RESERVE, at three sizes, compared with the other relays' tables.

use std::{hint::black_box, time::Instant};

use relaylet::{
    Config, FreedReason,
    relay::{connections::End, reservations::Reservations},
};

use super::{
    bounds::Bounds,
    clock::{Caches, Samples, cpu_time},
    others::{CountsAll, WalksAll},
    peer::{Peer, TERM},
};

const SIZES: [usize; 3] = [1_000, 10_000, 100_000];
const ROUNDS: usize = 15;

/// How many RESERVEs are timed together: enough for the resolution of the clock, and few enough to find the caches
/// cold, because each is from another peer.
const BATCH: usize = 10;

/// After this many batches in a row the caches are warm, and hold the whole of a small table.
const WARM_UP: usize = 100;

/// The distance between the peers of a batch: coprime to the sizes.
const STRIDE: usize = 7919;

/// A relay's table of reservations.
pub trait Table {
    /// Gives this peer a slot, in the fastest way.
    fn hold(&mut self, peer: &Peer, now: Instant);
    /// Handles a RESERVE; returns whether it is granted.
    fn reserve(&mut self, peer: &Peer, now: Instant) -> bool;
    /// Frees the peer's slot.
    fn free(&mut self, peer: &Peer);
    /// The peer's connection has closed.
    fn leave(&mut self, peer: &Peer, _: Instant) {
        self.free(peer);
    }
}

impl Table for Reservations<usize> {
    fn hold(&mut self, peer: &Peer, now: Instant) {
        Table::reserve(self, peer, now);
    }

    /// All calls that the behaviour makes for one RESERVE whose answer is delivered.
    fn reserve(&mut self, peer: &Peer, now: Instant) -> bool {
        let billed_to = Some(peer.address.into());
        let admission = self.reserve(peer.id, peer.connection, billed_to, TERM, now);
        while let Some(change) = self.changes.pop_front() {
            black_box(change);
        }
        self.confirm(&peer.id);
        admission.is_ok()
    }

    fn free(&mut self, peer: &Peer) {
        Reservations::free(self, peer.id, FreedReason::Released);
        self.changes.clear();
    }

    fn leave(&mut self, peer: &Peer, now: Instant) {
        let gone = End { peer: peer.id, connection: peer.connection };
        self.on_disconnected(gone, &[], FreedReason::Disconnected, now);
    }
}

#[derive(Clone, Copy, PartialEq)]
enum Case {
    Admission,
    AdmissionForGrace,
    Renewal,
}

const RELAYLET: usize = 0;
const NAMES: [&str; 3] = ["relaylet", "rust-libp2p's way", "go-libp2p's way"];
const CASES: [(Case, &str); 3] = [
    (Case::Admission, "admission"),
    (Case::AdmissionForGrace, "admission, for one in grace"),
    (Case::Renewal, "renewal"),
];

/// A full table, and its peers.
struct Full {
    table: Box<dyn Table>,
    peers: Vec<Peer>,
    at: usize,
    newest: usize,
}

impl Full {
    fn of(size: usize, name: usize, now: Instant) -> Self {
        let mut config = Config::default();
        config.max_reservations = size;
        config.max_reservations_per_ip = Some(size);
        config.max_reservations_per_subnet = Some(size);
        let mut table: Box<dyn Table> = match name {
            RELAYLET => Box::new(Reservations::new(&config)),
            // One more than the table's size, else it would refuse renewals.
            1 => Box::new(CountsAll::of(size + 1)),
            _ => Box::new(WalksAll::of(size)),
        };
        let peers: Vec<_> = (0..size).map(Peer::number).collect();
        peers.iter().for_each(|peer| table.hold(peer, now));
        Self { table, peers, at: 0, newest: size }
    }

    /// Frees slots for a batch, and returns the peers that will reserve.
    fn prepare(&mut self, what: Case, now: Instant) -> Vec<Peer> {
        let next = |_| {
            self.at = (self.at + STRIDE) % self.peers.len();
            let peer = &mut self.peers[self.at];
            match what {
                Case::Renewal => return *peer,
                Case::Admission => self.table.free(peer),
                Case::AdmissionForGrace => self.table.leave(peer, now),
            }
            *peer = Peer::number(self.newest);
            self.newest += 1;
            *peer
        };
        (0..BATCH).map(next).collect()
    }

    /// Handles a batch; returns the time per RESERVE in microseconds.
    fn reserve(&mut self, batch: &[Peer], now: Instant) -> f64 {
        let time = cpu_time(|| {
            for peer in batch {
                assert!(self.table.reserve(peer, now), "it is granted");
            }
        });
        time.as_secs_f64() * 1e6 / batch.len() as f64
    }
}

/// One case of one relay: the cost at each size with cold caches, and for relaylet with warm ones as well.
struct Row {
    name: usize,
    what: (Case, &'static str),
    cold: [Samples; SIZES.len()],
    warm: [Samples; SIZES.len()],
}

pub fn measure(bounds: &mut Bounds) {
    let now = Instant::now();
    let mut caches = Caches::new();
    let mut tables: Vec<_> =
        (0..NAMES.len()).map(|name| SIZES.map(|size| Full::of(size, name, now))).collect();
    let rows = (0..NAMES.len()).flat_map(|name| CASES.map(|what| (name, what)));
    let mut rows: Vec<_> = rows
        // The other relays have no grace.
        .filter(|(name, what)| *name == RELAYLET || what.0 != Case::AdmissionForGrace)
        .map(|(name, what)| Row { name, what, cold: Default::default(), warm: Default::default() })
        .collect();
    for _ in 0..ROUNDS {
        for row in &mut rows {
            for (index, full) in tables[row.name].iter_mut().enumerate() {
                let batch = full.prepare(row.what.0, now);
                caches.evict();
                row.cold[index].push(full.reserve(&batch, now));
                if row.name == RELAYLET {
                    for _ in 0..WARM_UP {
                        let batch = full.prepare(row.what.0, now);
                        full.reserve(&batch, now);
                    }
                    let batch = full.prepare(row.what.0, now);
                    row.warm[index].push(full.reserve(&batch, now));
                }
            }
        }
    }
    print(&rows);
    check_bounds(&rows, bounds);
}

fn print(rows: &[Row]) {
    println!("\nOne RESERVE, the table's part of it: µs of CPU, the median (and the middle half).");
    println!("Cold: something else had the caches in between, as in a relay. Warm: in a row.");
    println!("\n| | caches | 1k slots | 10k | 100k | 100k / 1k |");
    println!("| --- | --- | --- | --- | --- | --- |");
    let line = |row: &Row, caches, [small, middle, large]: &[Samples; SIZES.len()]| {
        let (name, what) = (NAMES[row.name], row.what.1);
        let grows = large.median() / small.median();
        println!("| {name}: {what} | {caches} | {small} | {middle} | {large} | {grows:.2} |");
    };
    rows.iter().for_each(|row| line(row, "cold", &row.cold));
    let ours = rows.iter().filter(|row| row.name == RELAYLET);
    ours.for_each(|row| line(row, "warm", &row.warm));
}

fn check_bounds(rows: &[Row], bounds: &mut Bounds) {
    let large = |row: &Row| row.cold[SIZES.len() - 1].median();
    for ours in rows.iter().filter(|row| row.name == RELAYLET) {
        let flat = format!("{}: 100k slots / 1k slots", ours.what.1);
        bounds.at_most(&flat, large(ours) / ours.cold[0].median(), 2.0);
    }
    for theirs in rows.iter().filter(|row| row.name != RELAYLET) {
        let mut same = rows.iter().filter(|row| row.what.0 == theirs.what.0);
        let ours = same.next().expect("relaylet's rows come first");
        let what = format!("{}, 100k: {} / relaylet", theirs.what.1, NAMES[theirs.name]);
        bounds.at_least(&what, large(theirs) / large(ours), 100.0);
    }
}
