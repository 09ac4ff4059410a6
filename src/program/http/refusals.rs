//! Refusals, failed handshakes and freed slots since the start: the count of each reason, and the latest refused
//! requests one by one.
//!
//! Recording reads no clock; `/status.json` counts its seconds up to when it is serialized. The log has the same by the
//! minute: `cli/log_summary.rs`.

use std::{
    collections::{BTreeMap, VecDeque},
    time::Instant,
};

use libp2p::{Multiaddr, PeerId};
use serde::{Serialize, Serializer};

use super::stats::Shown;
use crate::program::tally::{self, Tally};

/// How many refused requests are kept one by one.
const MAX_LATEST: usize = 50;

/// All counts, and the latest refused requests.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Refusals {
    #[serde(serialize_with = "values")]
    refused: Reasons,
    /// The last one first.
    latest_refusals: VecDeque<Refusal>,
    #[serde(serialize_with = "values")]
    freed: Reasons,
    /// How many peers did not answer a probe.
    #[serde(skip)]
    pub unanswered: u64,
}

type Reasons = BTreeMap<(&'static str, &'static str), Reason>;

/// How often something happened for one reason, and when it did last.
#[derive(Clone, Debug, Serialize)]
struct Reason {
    what: &'static str,
    why: &'static str,
    count: u64,
    #[serde(rename = "ago", serialize_with = "seconds_since")]
    last_at: Instant,
}

/// One refused request.
#[derive(Clone, Debug, Serialize)]
struct Refusal {
    /// Its number, counted from the start.
    number: u64,
    what: &'static str,
    why: &'static str,
    peer: Shown<PeerId>,
    address: Multiaddr,
    #[serde(rename = "ago", serialize_with = "seconds_since")]
    at: Instant,
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
        let new = Reason { what, why, count: 0, last_at: now };
        let reason = reasons.entry((what, why)).or_insert(new);
        reason.count += 1;
        reason.last_at = now;
        // Without a client it is a denied connection or a failed handshake, of which there are too many to list.
        let Some((peer, address)) = tally.client else {
            return;
        };
        let number = self.latest_refusals.front().map_or(1, |last| last.number + 1);
        self.latest_refusals.truncate(MAX_LATEST - 1);
        self.latest_refusals.push_front(Refusal {
            number,
            what,
            why,
            peer: Shown(peer),
            address: address.clone(),
            at: now,
        });
    }
}

fn values<S: Serializer>(reasons: &Reasons, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_seq(reasons.values())
}

/// Serializes how many seconds ago `instant` was.
fn seconds_since<S: Serializer>(instant: &Instant, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_u64(instant.elapsed().as_secs())
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use serde_json::json;

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
        let mut refusals = Refusals::default();
        let start = Instant::now().checked_sub(Duration::from_secs(10)).unwrap();
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
        let json = serde_json::to_value(&refusals).unwrap();
        let expected = json!([
            { "what": "RESERVE", "why": "all slots are taken", "count": 2, "ago": 8 },
            { "what": "RESERVE", "why": "the peer asks too often", "count": 1, "ago": 9 },
        ]);
        assert_eq!(json["refused"], expected);
        assert_eq!(json["freed"][0]["why"], "grace over");
    }

    #[test]
    fn the_latest_fifty_refusals_are_listed_one_by_one() {
        let (mut refusals, now) = (Refusals::default(), Instant::now());
        for _ in 0..100 {
            record(&mut refusals, &refused(Refused::TableFull), now);
        }
        record(&mut refusals, &refused(Refused::Denied), now);
        let latest = refusals.latest_refusals;
        assert_eq!(latest.len(), MAX_LATEST);
        assert_eq!(latest[0].why, "the rules do not allow it");
        assert_eq!((latest[0].number, latest[49].number), (101, 52));
    }
}
