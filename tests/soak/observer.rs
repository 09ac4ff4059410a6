//! The laws, as somebody can check them who sees no more than the clients do, and what the relay
//! shows of itself.
//!
//! Pure: what was seen comes in with `now`, a broken law comes out. Whoever looks from outside sees
//! late, and in another order; each law has its tolerance for that, and says it.

use std::{
    collections::{BTreeMap, HashMap, HashSet, VecDeque},
    fmt,
    time::Duration,
};

use libp2p::PeerId;
use relaylet::Config;

/// How much later than it happens something may be seen here, or by the relay.
const LATE: Duration = Duration::from_millis(750);

/// What the relay shows may be so old: it is posted once a second.
const STALE: Duration = Duration::from_millis(1250);

/// Who was frozen for so much less than a probe may have been asked before.
const EARLY: Duration = Duration::from_millis(150);

/// A machine that keeps everybody waiting for so long answers for no client.
const STOOD_STILL: Duration = Duration::from_millis(200);
/// And for this time after it.
const NOT_BELIEVED: Duration = Duration::from_secs(4);

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Law {
    /// A peer that lives and answers keeps its slot.
    Safety,
    /// There are never more slots than there may be.
    Bounds,
    /// The slot of a peer that is gone comes back in time.
    Return,
    /// Nobody is refused but while the table is full.
    Refusal,
    /// A peer whose slot is there still is not refused.
    Owner,
    /// What comes back through a circuit is what was sent.
    Echo,
    /// When all are gone, nothing is left.
    NothingLeft,
}

/// All of them.
pub const LAWS: [Law; 7] =
    [Law::Safety, Law::Bounds, Law::Return, Law::Refusal, Law::Owner, Law::Echo, Law::NothingLeft];

impl fmt::Display for Law {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Safety => "a peer that answers keeps its slot",
            Self::Bounds => "never more slots than --max-reservations",
            Self::Return => "the slot of a peer that is gone comes back in time",
            Self::Refusal => "no refusal unless the table is full",
            Self::Owner => "no refusal of a peer whose slot is there still",
            Self::Echo => "a circuit brings what was sent",
            Self::NothingLeft => "when all are gone, every count is zero",
        })
    }
}

/// Which law, by whom, when.
#[derive(Debug)]
pub struct Broken {
    pub law: Law,
    pub peer: Option<PeerId>,
    pub at: Duration,
    pub what: String,
}

impl fmt::Display for Broken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "broken at {:.2} s: {}", self.at.as_secs_f64(), self.law)?;
        match self.peer {
            Some(peer) => write!(f, ": {peer} {}", self.what),
            None => write!(f, ": {}", self.what),
        }
    }
}

pub type Verdict = Result<(), Box<Broken>>;

/// What a client saw, and what it did.
#[derive(Clone, Debug)]
pub enum Saw {
    /// A stay begins.
    Comes,
    Asks,
    Granted {
        renewal: bool,
    },
    /// The relay said no, with this status.
    Refused(&'static str),
    /// The relay closed the connection that its slot was on.
    Lost(String),
    /// The relay closed its connection, and it had no slot.
    Closed,
    /// It could not connect.
    TurnedAway,
    Froze,
    Thawed,
    /// The stay ends; whether the kernel says so.
    Leaves {
        fin: bool,
    },
    Echoed {
        right: bool,
    },
    /// A circuit ended early, by a limit or with its other side.
    NoEcho,
    /// There is none to be had, with this status.
    NoCircuit(&'static str),
}

/// What the relay shows of itself.
#[derive(Clone, Debug, Default)]
pub struct Shown {
    pub total: usize,
    /// The holders by state, as they are listed.
    pub live: HashSet<PeerId>,
    pub grace: HashSet<PeerId>,
    /// As they are counted.
    pub counted: (usize, usize),
    pub circuits: usize,
    pub connections: usize,
}

/// What is known of one peer.
#[derive(Clone, Debug, Default)]
struct Peer {
    /// Counts its stays: who was left behind in an older one has no say.
    stay: u64,
    here: bool,
    asks: Option<Duration>,
    granted: Option<Duration>,
    frozen: Option<Duration>,
    /// From when until when it was frozen last.
    thawed: Option<(Duration, Duration)>,
    /// The last time that it was frozen for long enough to be taken for dead, until then.
    was_frozen: Option<Duration>,
    lost: Option<Duration>,
    /// How the stay before this ended, or the last.
    left: Option<Left>,
    /// When it was gone without a word last: for the relay that connection may be up still.
    vanished: Option<Duration>,
}

#[derive(Clone, Copy, Debug)]
struct Left {
    at: Duration,
    fin: bool,
    /// It had its answer. One that had asked may have a slot, too.
    held: bool,
    may_hold: bool,
}

pub struct Observer {
    rules: Config,
    /// After how long a peer is judged that is gone without a word, at the latest.
    without_a_word: Duration,
    peers: HashMap<PeerId, Peer>,
    /// When the machine stood still last.
    still: VecDeque<Duration>,
    pub checked: BTreeMap<Law, u64>,
    /// Not held against the relay, because the machine stood still.
    pub excused: u64,
    /// Refused while a peer had been gone for long enough to be asked: the wish, not the law.
    pub refused_too_early: u64,
}

impl Observer {
    pub fn new(rules: Config) -> Self {
        Self {
            without_a_word: rules.silence + 2 * rules.sweep + LATE,
            rules,
            peers: HashMap::new(),
            still: VecDeque::new(),
            checked: LAWS.into_iter().map(|law| (law, 0)).collect(),
            excused: 0,
            refused_too_early: 0,
        }
    }

    /// A client of this stay saw, or did, something.
    pub fn saw(&mut self, now: Duration, id: PeerId, stay: u64, saw: &Saw) -> Verdict {
        let peer = self.peers.entry(id).or_default();
        if stay < peer.stay {
            return Ok(());
        }
        match saw {
            Saw::Comes => {
                *peer = Peer {
                    stay,
                    here: true,
                    lost: peer.lost,
                    left: peer.left,
                    vanished: peer.vanished,
                    ..Peer::default()
                };
            }
            Saw::Leaves { fin } => {
                let before = peer.left.is_some_and(|left| left.may_hold);
                peer.left = Some(Left {
                    at: now,
                    fin: *fin,
                    held: peer.granted.is_some() && !peer.may_be_given_up(now),
                    may_hold: before || peer.granted.is_some() || peer.asks.is_some(),
                });
                if !fin {
                    peer.vanished = Some(now);
                }
                (peer.here, peer.granted, peer.asks, peer.frozen) = (false, None, None, None);
            }
            _ if !peer.here => {}
            Saw::Asks => peer.asks = Some(now),
            Saw::Granted { renewal } => {
                let came_back = peer.still_has(now, &self.rules).is_some();
                peer.asks = None;
                peer.granted = peer.granted.or(Some(now));
                if *renewal || came_back {
                    self.check(Law::Owner);
                }
                return self.bounds(now);
            }
            Saw::Refused(status) => return self.refused(now, id, status),
            Saw::Lost(cause) => return self.lost(now, id, cause),
            Saw::Froze => {
                // With no time to answer in between it is one freeze.
                let once = peer.thawed.filter(|(_, until)| *until + EARLY >= now);
                peer.frozen = Some(once.map_or(now, |(since, _)| since));
            }
            Saw::Thawed => {
                let since = peer.frozen.take().unwrap_or(now);
                peer.thawed = Some((since, now));
                if now.saturating_sub(since) + EARLY >= self.rules.probe {
                    peer.was_frozen = Some(now);
                }
            }
            Saw::Echoed { right } => {
                self.check(Law::Echo);
                if !right {
                    return broken(Law::Echo, Some(id), now, "heard something else".to_owned());
                }
            }
            Saw::Closed | Saw::TurnedAway => peer.asks = None,
            Saw::NoEcho | Saw::NoCircuit(_) => {}
        }
        Ok(())
    }

    /// Nothing ran here for so long, although it should have.
    pub fn stood_still(&mut self, now: Duration, pause: Duration) {
        if pause >= STOOD_STILL {
            self.still.push_back(now);
        }
        self.still.retain(|at| *at + NOT_BELIEVED > now);
    }

    /// The relay was asked at `asked` what it shows of itself, and had answered by `now`.
    pub fn shown(&mut self, now: Duration, asked: Duration, shown: &Shown) -> Verdict {
        let as_of = asked.saturating_sub(STALE);
        self.check(Law::Bounds);
        let most = self.rules.max_reservations;
        let (live, grace) = shown.counted;
        if live + grace > most || shown.total != most {
            let what = format!(
                "{live} live slots and {grace} in grace of {} are shown, {most} there may be",
                shown.total
            );
            return broken(Law::Bounds, None, now, what);
        }
        let ids: Vec<PeerId> = self.peers.keys().copied().collect();
        for id in ids {
            let peer = &self.peers[&id];
            if peer.here {
                self.is_shown(now, as_of, id, shown)?;
            } else {
                self.is_gone(now, as_of, id, shown)?;
            }
        }
        self.forget(as_of);
        Ok(())
    }

    /// All are gone, for longer than any of them may be remembered.
    pub fn nothing_left(&mut self, now: Duration, shown: &Shown) -> Verdict {
        self.check(Law::NothingLeft);
        let (live, grace) = shown.counted;
        let listed = shown.live.len() + shown.grace.len();
        let left = live + grace + listed + shown.circuits + shown.connections;
        if left == 0 {
            return Ok(());
        }
        let what = format!(
            "{live} live slots, {grace} in grace, {} circuits, {} connections",
            shown.circuits, shown.connections
        );
        broken(Law::NothingLeft, None, now, what)
    }

    /// Within so much time everything of a peer that is gone is forgotten.
    pub fn all_back_within(&self) -> Duration {
        self.without_a_word + self.rules.grace + self.rules.sweep + STALE + LATE
    }

    /// From now on all leave. When most of them are silent, the relay doubts its own link, and judges
    /// nobody for one more limit.
    pub fn all_leave(&mut self) {
        self.without_a_word += self.rules.silence;
    }

    /// Who holds a slot, as far as its client knows.
    pub fn holders(&self) -> impl Iterator<Item = PeerId> {
        let holds = |peer: &Peer| peer.here && peer.granted.is_some();
        let all = self.peers.iter();
        all.filter(move |(_, peer)| holds(peer)).map(|(id, _)| *id)
    }

    fn check(&mut self, law: Law) {
        *self.checked.entry(law).or_default() += 1;
    }

    /// No more hold a slot than may: those of whom it is certain.
    fn bounds(&mut self, now: Duration) -> Verdict {
        self.check(Law::Bounds);
        let certain = |peer: &&Peer| {
            let since = peer.granted.is_some_and(|since| since <= now);
            peer.here && since && peer.frozen.is_none() && !peer.may_be_given_up(now)
        };
        let hold = self.peers.values().filter(certain).count();
        let most = self.rules.max_reservations;
        if hold <= most {
            return Ok(());
        }
        let what = format!("{hold} clients hold a slot each, {most} there may be");
        self.unless_it_stood_still(now, broken(Law::Bounds, None, now, what))
    }

    fn lost(&mut self, now: Duration, id: PeerId, cause: &str) -> Verdict {
        self.check(Law::Safety);
        let probe = self.rules.probe;
        let Some(peer) = self.peers.get_mut(&id) else {
            return Ok(());
        };
        let held = peer.granted.take();
        (peer.lost, peer.asks) = (Some(now), None);
        if held.is_none() || peer.may_be_given_up(now) {
            return Ok(());
        }
        let what = format!("lost its slot, and had answered all the time but {probe:?} ({cause})");
        self.unless_it_stood_still(now, broken(Law::Safety, Some(id), now, what))
    }

    fn refused(&mut self, now: Duration, id: PeerId, status: &str) -> Verdict {
        let rules = &self.rules;
        let Some(peer) = self.peers.get_mut(&id) else {
            return Ok(());
        };
        let asked = peer.asks.take().unwrap_or(now);
        let (held, given_up) = (peer.granted.take(), peer.may_be_given_up(now));
        let had = peer.still_has(now, rules);
        if held.is_some() && !given_up {
            self.check(Law::Owner);
            let what = format!("was refused to renew the slot that it held ({status})");
            return self.unless_it_stood_still(now, broken(Law::Owner, Some(id), now, what));
        }
        if let Some(left) = had {
            self.check(Law::Owner);
            let what = format!("came back after {:?}, and was refused ({status})", now - left.at);
            return broken(Law::Owner, Some(id), now, what);
        }
        if status != "Refused" {
            let what = format!("was refused for another reason: {status}");
            return broken(Law::Refusal, Some(id), now, what);
        }
        self.check(Law::Refusal);
        let (most, bound) = (self.rules.max_reservations, self.without_a_word);
        let wish = self.rules.probe_after + self.rules.sweep + LATE;
        let may_hold = self.may_have_held(id, asked, bound);
        if self.may_have_held(id, asked, wish) < most {
            self.refused_too_early += 1;
        }
        if may_hold >= most {
            return Ok(());
        }
        let what = format!("was refused while {may_hold} of {most} slots were taken at most");
        self.unless_it_stood_still(now, broken(Law::Refusal, Some(id), now, what))
    }

    /// How many others may have held a slot at any time since then, of peers that are gone without a
    /// word for no longer than this.
    fn may_have_held(&self, but: PeerId, since: Duration, gone_for: Duration) -> usize {
        let may = |peer: &Peer| {
            let has = peer.here && (peer.granted.is_some() || peer.asks.is_some());
            let lost = peer.lost.is_some_and(|lost| lost + LATE >= since);
            let left = peer.left.is_some_and(|left| left.may_hold);
            has || lost || (left && peer.noticed(gone_for) >= Some(since))
        };
        let all = self.peers.iter().filter(|(id, _)| **id != but);
        all.filter(|(_, peer)| may(peer)).count()
    }

    /// Who holds a slot is shown with it.
    fn is_shown(&mut self, now: Duration, as_of: Duration, id: PeerId, shown: &Shown) -> Verdict {
        let peer = &self.peers[&id];
        let certain = peer.granted.is_some_and(|since| since < as_of);
        let answers = peer.frozen.is_none() && !peer.may_be_given_up(as_of);
        if !certain || !answers {
            return Ok(());
        }
        self.check(Law::Safety);
        if shown.live.contains(&id) {
            return Ok(());
        }
        let what = match shown.grace.contains(&id) {
            true => "answers, and its slot is in grace",
            false => "answers, and its slot is gone",
        };
        let broken = broken(Law::Safety, Some(id), now, what.to_owned());
        self.unless_it_stood_still(now, broken)
    }

    /// Who is gone for long enough is not shown any more.
    fn is_gone(&mut self, now: Duration, as_of: Duration, id: PeerId, shown: &Shown) -> Verdict {
        let Some(left) = self.peers[&id].left else {
            return Ok(());
        };
        let noticed = self.peers[&id].noticed(self.without_a_word);
        let noticed = noticed.unwrap_or(left.at);
        if noticed >= as_of {
            return Ok(());
        }
        let forgotten = noticed + self.rules.grace + self.rules.sweep;
        self.check(Law::Return);
        let in_grace = shown.grace.contains(&id);
        if !shown.live.contains(&id) && (!in_grace || forgotten >= as_of) {
            return Ok(());
        }
        let (state, how) = (
            if in_grace { "in grace" } else { "live" },
            if left.fin { "closed" } else { "silent" },
        );
        let gone_for = (as_of - left.at).as_secs_f64();
        let what = format!("has been gone ({how}) for {gone_for:.2} s, and its slot is {state}");
        self.unless_it_stood_still(now, broken(Law::Return, Some(id), now, what))
    }

    /// Those who are gone for so long that no law speaks of them.
    fn forget(&mut self, as_of: Duration) {
        let bound = self.all_back_within() + 2 * STALE;
        self.peers.retain(|_, peer| {
            let left = peer.left.is_none_or(|left| left.at + bound >= as_of);
            peer.here || left
        });
    }

    fn unless_it_stood_still(&mut self, now: Duration, verdict: Verdict) -> Verdict {
        let still = self.still.iter().any(|at| *at + NOT_BELIEVED > now);
        if verdict.is_err() && still {
            self.excused += 1;
            return Ok(());
        }
        verdict
    }
}

impl Peer {
    /// When the relay has noticed that it is gone, if that takes so long where it was without a word.
    fn noticed(&self, without_a_word: Duration) -> Option<Duration> {
        let closed = self.left.map(|left| left.at + LATE);
        let vanished = self.vanished.map(|at| at + without_a_word);
        closed.max(vanished)
    }

    /// How it left its slot, if nobody can have had it since: whoever wants it asks this peer first.
    fn still_has(&self, now: Duration, rules: &Config) -> Option<Left> {
        let left = self.left.filter(|left| left.held && !left.fin)?;
        (now < left.at + rules.probe.saturating_sub(EARLY)).then_some(left)
    }

    /// Whether it was frozen for so long that it may have been given up, and not know it yet.
    fn may_be_given_up(&self, now: Duration) -> bool {
        let was = self.was_frozen.is_some_and(|until| until + LATE >= now);
        // Who is frozen is not known to answer.
        was || self.frozen.is_some()
    }
}

fn broken(law: Law, peer: Option<PeerId>, at: Duration, what: String) -> Verdict {
    Err(Box::new(Broken { law, peer, at, what }))
}
