//! What was refused and what came back, since the start: how often for which reason, and the latest
//! refusals one by one.
//!
//! Pure. The log has the same by the minute: [`crate::program::cli::log_summary`].

use std::{
    collections::{BTreeMap, VecDeque},
    time::Instant,
};

use libp2p::{Multiaddr, PeerId};
use serde::Serialize;

use super::stats::Shown;
use crate::program::tally::{self, Tally};

/// How many refusals are remembered one by one.
const MOST_CASES: usize = 50;

/// All that is remembered of them.
#[derive(Debug, Default)]
pub struct Refusals {
    refused: Reasons,
    freed: Reasons,
    unanswered: u64,
    latest: VecDeque<Case>,
    /// How many there were of those.
    count: u64,
}

type Reasons = BTreeMap<(&'static str, &'static str), Reason>;

/// What happened and why, how often, and when last.
#[derive(Clone, Debug, Serialize)]
pub struct Reason {
    what: &'static str,
    why: &'static str,
    count: u64,
    #[serde(skip)]
    last: Instant,
    /// How many seconds ago that was.
    ago: u64,
}

/// One refusal.
#[derive(Clone, Debug, Serialize)]
pub struct Case {
    /// The how-manieth it was.
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
    pub fn note(&mut self, tally: &Tally, now: Instant) {
        let reasons = match tally.what {
            tally::PEER => {
                self.unanswered += 1;
                return;
            }
            tally::SLOT => &mut self.freed,
            _ => &mut self.refused,
        };
        let (what, why) = (tally.what.json, tally.why);
        let new = Reason { what, why, count: 0, last: now, ago: 0 };
        let reason = reasons.entry((what, why)).or_insert(new);
        reason.count += 1;
        reason.last = now;
        // Denied connections are too many to be listed one by one.
        let Some((peer, address)) = tally.client else {
            return;
        };
        self.latest.truncate(MOST_CASES - 1);
        self.count += 1;
        self.latest.push_front(Case {
            number: self.count,
            what,
            why,
            peer: Shown(peer),
            address: Shown(address.clone()),
            at: now,
            ago: 0,
        });
    }

    /// What was refused, by reason.
    pub fn refused(&self, now: Instant) -> Vec<Reason> {
        shown(&self.refused, now)
    }

    /// The slots that came back, by reason.
    pub fn freed(&self, now: Instant) -> Vec<Reason> {
        shown(&self.freed, now)
    }

    /// How many peers did not answer a probe.
    pub fn unanswered(&self) -> u64 {
        self.unanswered
    }

    /// The latest refusals, the last one first.
    pub fn latest(&self, now: Instant) -> Vec<Case> {
        let case = |case: &Case| Case { ago: seconds(case.at, now), ..case.clone() };
        self.latest.iter().map(case).collect()
    }
}

fn shown(reasons: &Reasons, now: Instant) -> Vec<Reason> {
    let shown = |reason: &Reason| Reason { ago: seconds(reason.last, now), ..reason.clone() };
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

    fn note(refusals: &mut Refusals, event: &NodeEvent, now: Instant) {
        refusals.note(&Tally::of(event).unwrap(), now);
    }

    #[test]
    fn a_reason_has_its_count_and_when_it_was_the_last_time() {
        let (mut refusals, start) = (Refusals::default(), Instant::now());
        let at = |seconds| start + Duration::from_secs(seconds);
        note(&mut refusals, &refused(Refused::TableFull), at(0));
        note(&mut refusals, &refused(Refused::TooOften), at(1));
        note(&mut refusals, &refused(Refused::TableFull), at(2));
        let freed = NodeEvent::Relay(Event::ReservationFreed {
            peer: PeerId::random(),
            billed_to: None,
            reason: FreedReason::GraceOver,
        });
        note(&mut refusals, &freed, at(3));
        let counts: Vec<_> = refusals.refused(at(10)).into_iter().collect();
        let counts: Vec<_> = counts.iter().map(|t| (t.why, t.count, t.ago)).collect();
        assert_eq!(counts, [("all slots are taken", 2, 8), ("the peer asks too often", 1, 9)]);
        assert_eq!(refusals.freed(at(10))[0].why, "grace over");
    }

    #[test]
    fn the_latest_are_told_one_by_one_and_no_more_of_them_than_fifty() {
        let (mut refusals, now) = (Refusals::default(), Instant::now());
        for _ in 0..100 {
            note(&mut refusals, &refused(Refused::TableFull), now);
        }
        note(&mut refusals, &refused(Refused::Denied), now);
        let latest = refusals.latest(now);
        assert_eq!(latest.len(), MOST_CASES);
        assert_eq!(latest[0].why, "the rules do not allow it");
        assert_eq!((latest[0].number, latest[49].number), (101, 52));
    }
}
