//! What the relay's operator sees at a glance: `/status.json`, and behind it the page.
//!
//! Taken on the thread of the relay, once a second while somebody asks for it. So it is only copied
//! there; to make text of it is the reader's.

use std::time::Instant;

use libp2p::{Multiaddr, PeerId};
use serde::Serialize;

use super::{
    history::History,
    refusals::{Case, Reason, Refusals},
    speeds::{Speed, Speeds},
    stats::{Bytes, Circuit, Figures, Shown, Slots},
};
use crate::program::node::Node;

/// How many holders of slots are listed, and how many circuits.
pub const MOST_LISTED: usize = 1000;

/// The whole of it. Times are in seconds, rates in bytes a second.
#[derive(Debug, Serialize)]
pub struct Status {
    pub version: &'static str,
    pub peer: Shown<PeerId>,
    pub draining: bool,
    pub up_for: u64,
    pub addresses: Vec<Shown<Multiaddr>>,
    /// Those that clients are told instead, if any.
    pub announced: Vec<Shown<Multiaddr>>,
    pub slots: Slots,
    pub history: History,
    pub holders: Listed<Holder>,
    pub circuits: Listed<Circuit>,
    pub connections: usize,
    pub relayed: Bytes,
    pub rate: Bytes,
    pub refused: Vec<Reason>,
    pub latest_refusals: Vec<Case>,
    pub freed: Vec<Reason>,
    pub questions: Questions,
}

/// A list that may be too long to be given whole.
#[derive(Debug, Serialize)]
pub struct Listed<T> {
    /// How many there are.
    pub count: usize,
    /// Some of them, in no order: all, or the first [`MOST_LISTED`] that were come across.
    pub listed: Vec<T>,
}

impl<T> Listed<T> {
    /// So many, of which as many are shown as may be: no other is looked at.
    fn of<I>(count: usize, all: impl Iterator<Item = I>, show: impl FnMut(I) -> Option<T>) -> Self {
        let listed = all.take(MOST_LISTED).filter_map(show).collect();
        Self { count, listed }
    }
}

/// Who holds a slot.
#[derive(Debug, Serialize)]
pub struct Holder {
    pub peer: Shown<PeerId>,
    /// Where it is connected from; in grace, whom its slot is billed to.
    pub address: Option<Shown<Multiaddr>>,
    pub state: State,
    /// When the slot comes back unless the peer renews, or comes back itself.
    pub ends_in: u64,
    /// For how long nothing was heard from it.
    pub silent_for: Option<u64>,
    /// The circuits it is part of.
    pub circuits: usize,
}

/// Whether a slot's holder is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    Live,
    Grace,
}

/// Signs of life that were asked for.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Questions {
    pub asked: u64,
    pub unanswered: u64,
}

/// The parts of a [`Status`] that somebody has to remember from one to the next.
#[derive(Debug)]
pub struct Memory {
    pub started: Instant,
    pub history: History,
    /// That of each circuit.
    pub speeds: Speeds,
    /// That of all circuits together.
    pub speed: Speed,
    pub refusals: Refusals,
}

impl Memory {
    /// Remembers how it is now, whether or not somebody asks.
    pub fn note(&mut self, figures: &Figures, now: Instant) {
        self.history.note(figures.slots, now);
        self.speed.look(figures.relayed, now);
    }

    /// That of a relay that starts now.
    pub fn new(now: Instant) -> Self {
        Self {
            started: now,
            history: History::new(now),
            speeds: Speeds::default(),
            speed: Speed::new(now),
            refusals: Refusals::default(),
        }
    }
}

impl Status {
    /// That of this relay.
    pub fn of(node: &Node, figures: &Figures, memory: &mut Memory, now: Instant) -> Self {
        let circuits = node.relay().circuits();
        let open = circuits.iter().filter_map(|(id, circuit)| Some((id, circuit, circuit.open()?)));
        memory.speeds.forget(|id| circuits.get(id).is_some());
        Self {
            version: env!("CARGO_PKG_VERSION"),
            peer: Shown(node.peer_id()),
            draining: figures.draining,
            up_for: now.saturating_duration_since(memory.started).as_secs(),
            addresses: node.listeners().cloned().map(Shown).collect(),
            announced: node.relay().config().announce.iter().cloned().map(Shown).collect(),
            slots: figures.slots,
            history: memory.history.clone(),
            holders: holders(node, now),
            circuits: Listed::of(figures.circuits, open, |(id, circuit, (since, carried))| {
                Some(Circuit {
                    id: Shown(id),
                    source: Shown(circuit.source.peer),
                    target: Shown(circuit.target.peer),
                    open_for: now.saturating_duration_since(since).as_secs(),
                    carried: carried.into(),
                    rate: memory.speeds.look(id, since, carried, now).into(),
                })
            }),
            connections: figures.connections,
            relayed: figures.relayed.into(),
            rate: memory.speed.rate().into(),
            refused: memory.refusals.refused(now),
            latest_refusals: memory.refusals.latest(now),
            freed: memory.refusals.freed(now),
            questions: Questions {
                asked: figures.upkeep.questions,
                unanswered: memory.refusals.unanswered(),
            },
        }
    }
}

fn holders(node: &Node, now: Instant) -> Listed<Holder> {
    let relay = node.relay();
    let table = relay.reservations();
    let holder = |peer| {
        let over = table.connection(&peer);
        let connection = over.and_then(|over| relay.connections().get(over));
        let address = match connection {
            Some(connection) => Some(connection.origin.address.clone()),
            None => table.bill_of(&peer).map(|bill| bill.ip().into()),
        };
        let left = table.ends(&peer)?.saturating_duration_since(now);
        Some(Holder {
            peer: Shown(peer),
            address: address.map(Shown),
            state: if over.is_some() { State::Live } else { State::Grace },
            ends_in: left.as_secs(),
            silent_for: connection.map(|connection| connection.silent_for(now).as_secs()),
            circuits: relay.circuits().count_of(&peer),
        })
    };
    Listed::of(table.taken(), table.holders(), holder)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_a_long_list_a_thousand_are_looked_at() {
        let mut looked_at = 0;
        let list = Listed::of(1_000_000, 0..1_000_000, |number| {
            looked_at += 1;
            (number % 2 == 0).then_some(number)
        });
        assert_eq!((list.count, list.listed.len()), (1_000_000, 500));
        assert_eq!(looked_at, 1000);
        let short = Listed::of(2, [7, 8].into_iter(), Some);
        assert_eq!((short.count, short.listed), (2, vec![7, 8]));
    }
}
