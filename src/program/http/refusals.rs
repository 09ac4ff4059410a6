//! Refusals and released slots since the start: the count of each reason, and the latest refusals one by one.
//!
//! Sans-IO. The log has the same by the minute: [`crate::program::cli::log_summary`].

use std::{
    collections::{BTreeMap, VecDeque},
    time::Instant,
};

use libp2p::{Multiaddr, PeerId};
use serde::Serialize;

use super::stats::Shown;
use crate::program::tally::{self, Tally};

/// How many refusals are kept one by one.
const MAX_LATEST: usize = 50;

/// All counts, and the latest refusals.
#[derive(Debug, Default)]
pub struct Refusals {
    refused: Reasons,
    freed: Reasons,
    unanswered: u64,
    latest: VecDeque<Refusal>,
    /// How many refusals there were since the start.
    count: u64,
}

type Reasons = BTreeMap<(&'static str, &'static str), Reason>;

/// How often something happened for one reason, and when it did last.
#[derive(Clone, Debug, Serialize)]
pub struct Reason {
    what: &'static str,
    why: &'static str,
    count: u64,
    #[serde(skip)]
    last_at: Instant,
    /// How many seconds ago that was.
    ago: u64,
}

/// One refusal.
#[derive(Clone, Debug, Serialize)]
pub struct Refusal {
    /// Its number, counted from the start.
    number: u64,
    what: &'static str,
    why: &'static str,
    peer: Shown<PeerId>,
    address: Shown<Multiaddr>,
    #[serde(skip)]
    at: Instant,
    /// How many seconds ago that was.
    ago: u64,
}

impl Refusals {
    /// Counts an event.
    pub fn record(&mut self, tally: &Tally, now: Instant) {
        let reasons = match tally.what {
            tally::PEER => {
                self.unanswered += 1;
                return;
            }
            tally::SLOT => &mut self.freed,
            _ => &mut self.refused,
        };
        let (what, why) = (tally.what.json, tally.why);
        let new = Reason { what, why, count: 0, last_at: now, ago: 0 };
        let reason = reasons.entry((what, why)).or_insert(new);
        reason.count += 1;
        reason.last_at = now;
        // Without a client it is a denied connection, of which there are too many to list.
        let Some((peer, address)) = tally.client else {
            return;
        };
        self.latest.truncate(MAX_LATEST - 1);
        self.count += 1;
        self.latest.push_front(Refusal {
            number: self.count,
            what,
            why,
            peer: Shown(peer),
            address: Shown(address.clone()),
            at: now,
            ago: 0,
        });
    }

    /// Returns the refusals by reason.
    pub fn refused(&self, now: Instant) -> Vec<Reason> {
        shown(&self.refused, now)
    }

    /// Returns the released slots by reason.
    pub fn freed(&self, now: Instant) -> Vec<Reason> {
        shown(&self.freed, now)
    }

    /// Returns how many peers did not answer a probe.
    pub fn unanswered(&self) -> u64 {
        self.unanswered
    }

    /// Returns the latest refusals, the last one first.
    pub fn latest(&self, now: Instant) -> Vec<Refusal> {
        let case = |case: &Refusal| Refusal { ago: seconds(case.at, now), ..case.clone() };
        self.latest.iter().map(case).collect()
    }
}

fn shown(reasons: &Reasons, now: Instant) -> Vec<Reason> {
    let shown = |reason: &Reason| Reason { ago: seconds(reason.last_at, now), ..reason.clone() };
    reasons.values().map(shown).collect()
}

fn seconds(from: Instant, to: Instant) -> u64 {
    to.saturating_duration_since(from).as_secs()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::event::{Event, FreedReason, Refused};
    use crate::program::node::NodeEvent;

    fn refused(reason: Refused) -> NodeEvent {
        NodeEvent::Relay(Event::ReservationRefused {
            peer: PeerId::random(),
            address: "/ip4/192.0.2.1/tcp/1".parse().unwrap(),
            reason,
        })
    }

    fn record(refusals: &mut Refusals, event: &NodeEvent, now: Instant) {
        refusals.record(&Tally::of(event).unwrap(), now);
    }

    #[test]
    fn a_reason_has_a_count_and_the_time_of_its_last_event() {
        let (mut refusals, start) = (Refusals::default(), Instant::now());
        let at = |seconds| start + Duration::from_secs(seconds);
        record(&mut refusals, &refused(Refused::TableFull), at(0));
        record(&mut refusals, &refused(Refused::TooOften), at(1));
        record(&mut refusals, &refused(Refused::TableFull), at(2));
        let freed = NodeEvent::Relay(Event::ReservationFreed {
            peer: PeerId::random(),
            prefix: None,
            reason: FreedReason::GraceOver,
        });
        record(&mut refusals, &freed, at(3));
        let counts: Vec<_> = refusals.refused(at(10)).into_iter().collect();
        let counts: Vec<_> = counts.iter().map(|t| (t.why, t.count, t.ago)).collect();
        assert_eq!(counts, [("all slots are taken", 2, 8), ("the peer asks too often", 1, 9)]);
        assert_eq!(refusals.freed(at(10))[0].why, "grace over");
    }

    #[test]
    fn the_latest_fifty_refusals_are_listed_one_by_one() {
        let (mut refusals, now) = (Refusals::default(), Instant::now());
        for _ in 0..100 {
            record(&mut refusals, &refused(Refused::TableFull), now);
        }
        record(&mut refusals, &refused(Refused::Denied), now);
        let latest = refusals.latest(now);
        assert_eq!(latest.len(), MAX_LATEST);
        assert_eq!(latest[0].why, "the rules do not allow it");
        assert_eq!((latest[0].number, latest[49].number), (101, 52));
    }
}
