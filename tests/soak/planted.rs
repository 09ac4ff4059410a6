//! Whether the observer finds what it is there to find: one planted violation of each law, and the
//! same history without it.

use std::{collections::HashSet, time::Duration};

use libp2p::PeerId;
use relaylet::Config;

use crate::observer::{Broken, LAWS, Law, Observer, Saw, Shown, Verdict};

/// A small table, and the defaults.
const SLOTS: usize = 2;

/// Tries each law. Whatever is not as it should be, in a line.
pub fn self_check() -> Result<(), String> {
    for law in LAWS {
        if let Err(broken) = history(law, false) {
            return Err(format!("the observer finds what is not there: {broken}"));
        }
        match history(law, true) {
            Err(Broken { law: found, .. }) if found == law => {}
            Err(other) => return Err(format!("planted {law:?}, and found: {other}")),
            Ok(()) => return Err(format!("the observer does not find that {law:?} is broken")),
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
        Self {
            observer: Observer::new(rules),
            peers: std::array::from_fn(|_| PeerId::random()),
        }
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

/// Two come and hold both slots, and then what the law is about.
fn history(law: Law, wrong: bool) -> Verdict {
    let mut stage = Stage::new();
    stage.holds(1, 0)?;
    stage.holds(2, 1)?;
    stage.shows(10, &[0, 1], &[])?;
    match law {
        Law::Safety => {
            if !wrong {
                stage.saw(20, 0, Saw::Froze)?;
                stage.saw(90, 0, Saw::Thawed)?;
            }
            stage.saw(90, 0, Saw::Lost("planted".to_owned()))
        }
        Law::Bounds => {
            if !wrong {
                stage.saw(20, 1, Saw::Leaves { fin: true })?;
            }
            stage.holds(30, 2)
        }
        Law::Return => {
            stage.saw(20, 0, Saw::Leaves { fin: false })?;
            match wrong {
                true => stage.shows(90, &[0, 1], &[]),
                false => stage.shows(90, &[1], &[0]),
            }
        }
        Law::Refusal => {
            if wrong {
                stage.saw(20, 0, Saw::Leaves { fin: true })?;
            }
            stage.saw(30, 2, Saw::Comes)?;
            stage.saw(30, 2, Saw::Asks)?;
            stage.saw(31, 2, Saw::Refused("Refused"))
        }
        Law::Owner => {
            stage.saw(20, 0, Saw::Leaves { fin: false })?;
            let peer = if wrong { 0 } else { 2 };
            let at = Duration::from_secs(21);
            let peer = stage.peers[peer];
            for saw in [Saw::Comes, Saw::Asks, Saw::Refused("Refused")] {
                stage.observer.saw(at, peer, 2, &saw)?;
            }
            Ok(())
        }
        Law::Echo => stage.saw(20, 0, Saw::Echoed { right: !wrong }),
        Law::NothingLeft => {
            let shown = Shown {
                connections: usize::from(wrong),
                ..Shown::default()
            };
            stage
                .observer
                .nothing_left(Duration::from_secs(300), &shown)
        }
    }
}
