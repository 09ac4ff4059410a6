//! Checks the observer itself: for each law a planted violation must be found, and the same history without it must
//! pass.

use std::{collections::HashSet, time::Duration};

use libp2p::PeerId;
use relaylet::Config;

use crate::observer::{LAWS, Law, Observer, Report, Seen, Verdict};

/// The slots of the table; everything else is the default.
const SLOTS: usize = 2;

/// A planted violation.
#[derive(Clone, Copy, Debug)]
enum Planted {
    /// The relay closes the connection of a peer that answered.
    Closed,
    /// A peer answers, and its slot is not reported.
    NotReported,
    OneTooManyGranted,
    OneTooManyReported,
    /// A peer is gone silently, and its slot stays live, or in grace for too long.
    StaysLive,
    StaysInGrace,
    RefusedWithRoom,
    RefusedForItsRate,
    OwnerRefused,
    RenewalRefused,
    WrongBytes,
    OneConnectionLeft,
}

const ALL: [(Law, Planted); 12] = [
    (Law::Safety, Planted::Closed),
    (Law::Safety, Planted::NotReported),
    (Law::Bounds, Planted::OneTooManyGranted),
    (Law::Bounds, Planted::OneTooManyReported),
    (Law::Return, Planted::StaysLive),
    (Law::Return, Planted::StaysInGrace),
    (Law::Refusal, Planted::RefusedWithRoom),
    (Law::Refusal, Planted::RefusedForItsRate),
    (Law::Owner, Planted::OwnerRefused),
    (Law::Owner, Planted::RenewalRefused),
    (Law::Echo, Planted::WrongBytes),
    (Law::NothingLeft, Planted::OneConnectionLeft),
];

/// Runs all histories. Returns the first mistake of the observer in one line.
pub fn self_check() -> Result<(), String> {
    if let Some(law) = LAWS.iter().find(|law| ALL.iter().all(|(of, _)| of != *law)) {
        return Err(format!("no violation of {law:?} is planted"));
    }
    for (law, planted) in ALL {
        if let Err(broken) = history(planted, false) {
            return Err(format!("the observer reports a violation without one: {broken}"));
        }
        match history(planted, true) {
            Err(broken) if broken.law == law => {}
            Err(other) => return Err(format!("planted {planted:?}, and reported: {other}")),
            Ok(()) => return Err(format!("the observer does not find {planted:?}")),
        }
    }
    Ok(())
}

/// An observer, and the peers of the history.
struct History {
    observer: Observer,
    peers: [PeerId; 4],
}

impl History {
    fn new() -> Self {
        let mut rules = Config::default();
        rules.max_reservations = SLOTS;
        Self { observer: Observer::new(rules), peers: std::array::from_fn(|_| PeerId::random()) }
    }

    fn on_seen(&mut self, at: u64, index: usize, on_seen: Seen) -> Verdict {
        let peer = self.peers[index];
        self.observer.on_seen(Duration::from_secs(at), peer, 1, &on_seen)
    }

    fn takes_slot(&mut self, at: u64, index: usize) -> Verdict {
        self.on_seen(at, index, Seen::Started)?;
        self.on_seen(at, index, Seen::Requested)?;
        self.on_seen(at, index, Seen::Granted { renewal: false })
    }

    /// A stay that begins and is refused at once.
    fn requests_and_is_refused(
        &mut self,
        at: u64,
        index: usize,
        stay: u64,
        status: &'static str,
    ) -> Verdict {
        let (at, peer) = (Duration::from_secs(at), self.peers[index]);
        for on_seen in [Seen::Started, Seen::Requested, Seen::Refused(status)] {
            self.observer.on_seen(at, peer, stay, &on_seen)?;
        }
        Ok(())
    }

    fn reports(&mut self, at: u64, live: &[usize], grace: &[usize]) -> Verdict {
        let peers = |index: &[usize]| -> HashSet<PeerId> {
            index.iter().map(|index| self.peers[*index]).collect()
        };
        let report = Report {
            total: SLOTS,
            live: peers(live),
            grace: peers(grace),
            counted: (live.len(), grace.len()),
            ..Report::default()
        };
        let at = Duration::from_secs(at);
        self.observer.report(at, at, &report)
    }
}

/// Two peers hold both slots; then follows the violation, or a similar sequence without one.
fn history(planted: Planted, violated: bool) -> Verdict {
    let mut history = History::new();
    history.takes_slot(1, 0)?;
    history.takes_slot(2, 1)?;
    history.reports(10, &[0, 1], &[])?;
    match planted {
        Planted::Closed => {
            if !violated {
                history.on_seen(20, 0, Seen::Froze)?;
                history.on_seen(90, 0, Seen::Thawed)?;
            }
            history.on_seen(90, 0, Seen::Lost("planted".to_owned()))
        }
        Planted::NotReported => history.reports(20, if violated { &[1] } else { &[0, 1] }, &[]),
        Planted::OneTooManyGranted => {
            if !violated {
                history.on_seen(20, 1, Seen::Ended { fin: true })?;
            }
            history.takes_slot(30, 2)
        }
        Planted::OneTooManyReported => {
            history.reports(20, &[0, 1], if violated { &[2] } else { &[] })
        }
        Planted::StaysLive => {
            history.on_seen(20, 0, Seen::Ended { fin: false })?;
            match violated {
                true => history.reports(90, &[0, 1], &[]),
                false => history.reports(90, &[1], &[0]),
            }
        }
        Planted::StaysInGrace => {
            history.on_seen(20, 0, Seen::Ended { fin: true })?;
            history.reports(if violated { 60 } else { 45 }, &[1], &[0])
        }
        Planted::RefusedWithRoom => {
            if violated {
                history.on_seen(20, 0, Seen::Ended { fin: true })?;
            }
            history.requests_and_is_refused(30, 2, 1, "Refused")
        }
        Planted::RefusedForItsRate => {
            let status = if violated { "ResourceLimitExceeded" } else { "Refused" };
            history.requests_and_is_refused(30, 2, 1, status)
        }
        Planted::OwnerRefused => {
            history.on_seen(20, 0, Seen::Ended { fin: false })?;
            history.requests_and_is_refused(21, if violated { 0 } else { 2 }, 2, "Refused")
        }
        Planted::RenewalRefused => match violated {
            true => history.on_seen(20, 0, Seen::Refused("Refused")),
            false => history.on_seen(20, 0, Seen::Granted { renewal: true }),
        },
        Planted::WrongBytes => history.on_seen(20, 0, Seen::Echoed { correct: !violated }),
        Planted::OneConnectionLeft => {
            let report = Report { connections: usize::from(violated), ..Report::default() };
            let at = Duration::from_secs(300);
            history.observer.nothing_left(at, &report)
        }
    }
}
