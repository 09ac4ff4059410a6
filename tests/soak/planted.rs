//! Whether the observer finds what it is there to find: one planted violation of each law, and the
//! same history without it.

use std::{collections::HashSet, time::Duration};

use libp2p::PeerId;
use relaylet::Config;

use crate::observer::{LAWS, Law, Observer, Saw, Shown, Verdict};

/// A small table, and the defaults.
const SLOTS: usize = 2;

/// What is planted.
#[derive(Clone, Copy, Debug)]
enum Planted {
    /// The relay closes the connection of somebody who answered.
    Closed,
    /// Somebody answers, and its slot is not shown.
    NotShown,
    OneGrantedTooMany,
    OneShownTooMany,
    /// A peer is gone without a word, and its slot stays live; or in grace.
    StaysLive,
    StaysInGrace,
    RefusedWithRoom,
    RefusedForItsRate,
    OwnerRefused,
    RenewalRefused,
    OtherBytes,
    OneConnectionLeft,
}

const ALL: [(Law, Planted); 12] = [
    (Law::Safety, Planted::Closed),
    (Law::Safety, Planted::NotShown),
    (Law::Bounds, Planted::OneGrantedTooMany),
    (Law::Bounds, Planted::OneShownTooMany),
    (Law::Return, Planted::StaysLive),
    (Law::Return, Planted::StaysInGrace),
    (Law::Refusal, Planted::RefusedWithRoom),
    (Law::Refusal, Planted::RefusedForItsRate),
    (Law::Owner, Planted::OwnerRefused),
    (Law::Owner, Planted::RenewalRefused),
    (Law::Echo, Planted::OtherBytes),
    (Law::NothingLeft, Planted::OneConnectionLeft),
];

/// Tries each. Whatever is not as it should be, in a line.
pub fn self_check() -> Result<(), String> {
    if let Some(law) = LAWS.iter().find(|law| ALL.iter().all(|(of, _)| of != *law)) {
        return Err(format!("nothing is planted against {law:?}"));
    }
    for (law, planted) in ALL {
        if let Err(broken) = history(planted, false) {
            return Err(format!("the observer finds what is not there: {broken}"));
        }
        match history(planted, true) {
            Err(broken) if broken.law == law => {}
            Err(other) => return Err(format!("planted {planted:?}, and found: {other}")),
            Ok(()) => return Err(format!("the observer does not find {planted:?}")),
        }
    }
    Ok(())
}

/// The observer and who is seen by it.
struct Stage {
    observer: Observer,
    peers: [PeerId; 4],
}

impl Stage {
    fn new() -> Self {
        let mut rules = Config::default();
        rules.max_reservations = SLOTS;
        Self { observer: Observer::new(rules), peers: std::array::from_fn(|_| PeerId::random()) }
    }

    fn saw(&mut self, at: u64, who: usize, saw: Saw) -> Verdict {
        let peer = self.peers[who];
        self.observer.saw(Duration::from_secs(at), peer, 1, &saw)
    }

    fn holds(&mut self, at: u64, who: usize) -> Verdict {
        self.saw(at, who, Saw::Comes)?;
        self.saw(at, who, Saw::Asks)?;
        self.saw(at, who, Saw::Granted { renewal: false })
    }

    /// In this stay, at once.
    fn is_refused(&mut self, at: u64, who: usize, stay: u64, status: &'static str) -> Verdict {
        let (at, peer) = (Duration::from_secs(at), self.peers[who]);
        for saw in [Saw::Comes, Saw::Asks, Saw::Refused(status)] {
            self.observer.saw(at, peer, stay, &saw)?;
        }
        Ok(())
    }

    fn shows(&mut self, at: u64, live: &[usize], grace: &[usize]) -> Verdict {
        let peers =
            |who: &[usize]| -> HashSet<PeerId> { who.iter().map(|who| self.peers[*who]).collect() };
        let shown = Shown {
            total: SLOTS,
            live: peers(live),
            grace: peers(grace),
            counted: (live.len(), grace.len()),
            ..Shown::default()
        };
        let at = Duration::from_secs(at);
        self.observer.shown(at, at, &shown)
    }
}

/// Two come and hold both slots; then what is planted, or what is like it and right.
fn history(planted: Planted, wrong: bool) -> Verdict {
    let mut stage = Stage::new();
    stage.holds(1, 0)?;
    stage.holds(2, 1)?;
    stage.shows(10, &[0, 1], &[])?;
    match planted {
        Planted::Closed => {
            if !wrong {
                stage.saw(20, 0, Saw::Froze)?;
                stage.saw(90, 0, Saw::Thawed)?;
            }
            stage.saw(90, 0, Saw::Lost("planted".to_owned()))
        }
        Planted::NotShown => stage.shows(20, if wrong { &[1] } else { &[0, 1] }, &[]),
        Planted::OneGrantedTooMany => {
            if !wrong {
                stage.saw(20, 1, Saw::Leaves { fin: true })?;
            }
            stage.holds(30, 2)
        }
        Planted::OneShownTooMany => stage.shows(20, &[0, 1], if wrong { &[2] } else { &[] }),
        Planted::StaysLive => {
            stage.saw(20, 0, Saw::Leaves { fin: false })?;
            match wrong {
                true => stage.shows(90, &[0, 1], &[]),
                false => stage.shows(90, &[1], &[0]),
            }
        }
        Planted::StaysInGrace => {
            stage.saw(20, 0, Saw::Leaves { fin: true })?;
            stage.shows(if wrong { 60 } else { 45 }, &[1], &[0])
        }
        Planted::RefusedWithRoom => {
            if wrong {
                stage.saw(20, 0, Saw::Leaves { fin: true })?;
            }
            stage.is_refused(30, 2, 1, "Refused")
        }
        Planted::RefusedForItsRate => {
            let status = if wrong { "ResourceLimitExceeded" } else { "Refused" };
            stage.is_refused(30, 2, 1, status)
        }
        Planted::OwnerRefused => {
            stage.saw(20, 0, Saw::Leaves { fin: false })?;
            stage.is_refused(21, if wrong { 0 } else { 2 }, 2, "Refused")
        }
        Planted::RenewalRefused => match wrong {
            true => stage.saw(20, 0, Saw::Refused("Refused")),
            false => stage.saw(20, 0, Saw::Granted { renewal: true }),
        },
        Planted::OtherBytes => stage.saw(20, 0, Saw::Echoed { right: !wrong }),
        Planted::OneConnectionLeft => {
            let shown = Shown { connections: usize::from(wrong), ..Shown::default() };
            let at = Duration::from_secs(300);
            stage.observer.nothing_left(at, &shown)
        }
    }
}
