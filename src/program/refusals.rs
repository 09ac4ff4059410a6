//! What was refused and what came back, since the start: how often for which reason, and the latest
//! refusals one by one.
//!
//! Pure. The log has the same by the minute: [`super::digest`].

use std::{
    collections::{BTreeMap, VecDeque},
    time::Instant,
};

use libp2p::{Multiaddr, PeerId};
use serde::Serialize;

use super::{node::NodeEvent, status::Shown};
use crate::event::Event;

/// How many refusals are remembered one by one.
const MOST_CASES: usize = 50;

/// All that is remembered of them.
#[derive(Debug, Default)]
pub struct Refusals {
    refused: Tallies,
    freed: Tallies,
    latest: VecDeque<Refusal>,
    /// How many there were of those.
    count: u64,
}

/// What happened and why, how often, and when last.
type Tallies = BTreeMap<Key, (u64, Instant)>;

type Key = (&'static str, &'static str);

#[derive(Clone, Debug)]
struct Refusal {
    number: u64,
    what: &'static str,
    why: &'static str,
    peer: PeerId,
    address: Multiaddr,
    at: Instant,
}

/// A reason, as it is shown.
#[derive(Debug, Serialize)]
pub struct Tally {
    what: &'static str,
    why: &'static str,
    count: u64,
    /// How many seconds ago it was the last time.
    ago: u64,
}

/// One refusal, as it is shown.
#[derive(Debug, Serialize)]
pub struct Case {
    /// The how-manieth it was.
    number: u64,
    what: &'static str,
    why: &'static str,
    peer: Shown<PeerId>,
    address: Shown<Multiaddr>,
    ago: u64,
}

impl Refusals {
    /// Counts an event.
    pub fn note(&mut self, event: &NodeEvent, now: Instant) {
        let (what, why, peer, address) = match event {
            NodeEvent::ConnectionDenied { reason, .. } => {
                // Without a peer, and too many to be told one by one.
                count(&mut self.refused, "connection", reason.kind(), now);
                return;
            }
            NodeEvent::Relay(Event::ReservationFreed { reason, .. }) => {
                count(&mut self.freed, "slot", reason.kind(), now);
                return;
            }
            NodeEvent::Relay(Event::ReservationRefused {
                peer,
                address,
                reason,
            }) => ("RESERVE", reason.kind(), *peer, address),
            NodeEvent::Relay(Event::CircuitRefused {
                source,
                address,
                reason,
                ..
            }) => ("CONNECT", reason.kind(), *source, address),
            NodeEvent::Relay(Event::RequestRejected { peer, address, .. }) => {
                ("request", "not understood", *peer, address)
            }
            _ => return,
        };
        count(&mut self.refused, what, why, now);
        self.latest.truncate(MOST_CASES - 1);
        self.count += 1;
        self.latest.push_front(Refusal {
            number: self.count,
            what,
            why,
            peer,
            address: address.clone(),
            at: now,
        });
    }

    /// What was refused, by reason.
    pub fn refused(&self, now: Instant) -> Vec<Tally> {
        shown(&self.refused, now)
    }

    /// The slots that came back, by reason.
    pub fn freed(&self, now: Instant) -> Vec<Tally> {
        shown(&self.freed, now)
    }

    /// The latest refusals, the last one first.
    pub fn latest(&self, now: Instant) -> Vec<Case> {
        let case = |refusal: &Refusal| Case {
            number: refusal.number,
            what: refusal.what,
            why: refusal.why,
            peer: Shown(refusal.peer),
            address: Shown(refusal.address.clone()),
            ago: seconds(refusal.at, now),
        };
        self.latest.iter().map(case).collect()
    }
}

fn count(tallies: &mut Tallies, what: &'static str, why: &'static str, now: Instant) {
    let (count, last) = tallies.entry((what, why)).or_insert((0, now));
    *count += 1;
    *last = now;
}

fn shown(tallies: &Tallies, now: Instant) -> Vec<Tally> {
    let all = tallies.iter().map(|((what, why), (count, last))| Tally {
        what,
        why,
        count: *count,
        ago: seconds(*last, now),
    });
    all.collect()
}

fn seconds(from: Instant, to: Instant) -> u64 {
    to.saturating_duration_since(from).as_secs()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::{event::Refused, reservations::FreedReason};

    fn refused(reason: Refused) -> NodeEvent {
        NodeEvent::Relay(Event::ReservationRefused {
            peer: PeerId::random(),
            address: "/ip4/192.0.2.1/tcp/1".parse().unwrap(),
            reason,
        })
    }

    #[test]
    fn a_reason_has_its_count_and_when_it_was_the_last_time() {
        let (mut refusals, start) = (Refusals::default(), Instant::now());
        let at = |seconds| start + Duration::from_secs(seconds);
        refusals.note(&refused(Refused::TableFull), at(0));
        refusals.note(&refused(Refused::TooOften), at(1));
        refusals.note(&refused(Refused::TableFull), at(2));
        let freed = NodeEvent::Relay(Event::ReservationFreed {
            peer: PeerId::random(),
            billed_to: None,
            reason: FreedReason::GraceOver,
        });
        refusals.note(&freed, at(3));
        let counts: Vec<_> = refusals.refused(at(10)).into_iter().collect();
        let counts: Vec<_> = counts.iter().map(|t| (t.why, t.count, t.ago)).collect();
        assert_eq!(
            counts,
            [
                ("all slots are taken", 2, 8),
                ("the peer asks too often", 1, 9)
            ]
        );
        assert_eq!(refusals.freed(at(10))[0].why, "grace over");
    }

    #[test]
    fn the_latest_are_told_one_by_one_and_no_more_of_them_than_fifty() {
        let (mut refusals, now) = (Refusals::default(), Instant::now());
        for _ in 0..100 {
            refusals.note(&refused(Refused::TableFull), now);
        }
        refusals.note(&refused(Refused::Denied), now);
        let latest = refusals.latest(now);
        assert_eq!(latest.len(), MOST_CASES);
        assert_eq!(latest[0].why, "the rules do not allow it");
        assert_eq!((latest[0].number, latest[49].number), (101, 52));
    }
}
