//! Checks the laws from outside: with what the clients see and what the relay reports about itself.
//!
//! Sans-IO: observations come in with `now`, a violated law comes out. Observations are late and not in order; each law
//! has a documented tolerance for that.

use std::{
    collections::{BTreeMap, HashMap, HashSet, VecDeque},
    fmt,
    time::Duration,
};

use libp2p::PeerId;
use relaylet::Config;

/// How late an event may be observed here or by the relay.
const LATE: Duration = Duration::from_millis(750);

/// How old the relay's report may be: it is updated once a second.
const STALE: Duration = Duration::from_millis(1250);

/// A peer that froze for less than the probe time, by up to this much, may time out: it was probed before it froze.
const EARLY: Duration = Duration::from_millis(150);

/// After a scheduling pause of this length, clients may have failed to answer.
const SUSPENDED: Duration = Duration::from_millis(200);
/// How long after it violations are excused.
const EXCUSED_FOR: Duration = Duration::from_secs(4);

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Law {
    /// A peer that answers keeps its slot.
    Safety,
    /// There are never more slots than configured.
    Bounds,
    /// The slot of a gone peer is freed in time.
    Return,
    /// A peer is refused only while the table is full.
    Refusal,
    /// A peer that still has its slot is not refused.
    Owner,
    /// A circuit transfers the bytes that were sent.
    Echo,
    /// After all clients have disconnected, no state is left.
    NothingLeft,
}

/// All laws.
pub const LAWS: [Law; 7] =
    [Law::Safety, Law::Bounds, Law::Return, Law::Refusal, Law::Owner, Law::Echo, Law::NothingLeft];

impl fmt::Display for Law {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Safety => "a peer that answers keeps its slot",
            Self::Bounds => "never more slots than --max-reservations",
            Self::Return => "the slot of a gone peer is freed in time",
            Self::Refusal => "no refusal unless the table is full",
            Self::Owner => "no refusal of a peer that still has its slot",
            Self::Echo => "a circuit transfers the bytes that were sent",
            Self::NothingLeft => "after all clients have disconnected, every count is zero",
        })
    }
}

/// The violated law, the peer and the time.
#[derive(Debug)]
pub struct Violation {
    pub law: Law,
    pub peer: Option<PeerId>,
    pub at: Duration,
    pub what: String,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "violated at {:.2} s: {}", self.at.as_secs_f64(), self.law)?;
        match self.peer {
            Some(peer) => write!(f, ": {peer} {}", self.what),
            None => write!(f, ": {}", self.what),
        }
    }
}

pub type Verdict = Result<(), Box<Violation>>;

/// What a client sees or does.
#[derive(Clone, Debug)]
pub enum Seen {
    /// A stay begins.
    Started,
    Requested,
    Granted {
        renewal: bool,
    },
    /// The relay refused with this status.
    Refused(&'static str),
    /// The relay closed the connection of its slot.
    Lost(String),
    /// The relay closed its connection, while it had no slot.
    Closed,
    /// It could not connect.
    Denied,
    Froze,
    Thawed,
    /// The stay ends, with a FIN or silently.
    Ended {
        fin: bool,
    },
    Echoed {
        correct: bool,
    },
    /// A circuit ended early, by a limit or with its other end.
    NoEcho,
    /// A circuit was refused with this status.
    NoCircuit(&'static str),
}

/// What the relay reports about itself.
#[derive(Clone, Debug, Default)]
pub struct Report {
    pub total: usize,
    /// The listed holders by state.
    pub live: HashSet<PeerId>,
    pub grace: HashSet<PeerId>,
    /// How many are live and in grace according to the counters.
    pub counted: (usize, usize),
    pub circuits: usize,
    pub connections: usize,
}

/// What is known about a peer.
#[derive(Clone, Debug, Default)]
struct Peer {
    /// The number of its stay: observations of earlier ones are ignored.
    stay: u64,
    is_live: bool,
    requested: Option<Duration>,
    granted: Option<Duration>,
    frozen: Option<Duration>,
    /// From when to when it was last frozen.
    thawed: Option<(Duration, Duration)>,
    /// When it was last thawed after a freeze long enough to time out.
    was_frozen: Option<Duration>,
    lost: Option<Duration>,
    /// How the previous stay ended.
    ended: Option<StayEnd>,
    /// When it last disappeared silently: the relay may still take that connection for up.
    vanished: Option<Duration>,
}

#[derive(Clone, Copy, Debug)]
struct StayEnd {
    at: Duration,
    fin: bool,
    /// Whether it held a slot, and whether it may have: a request may have been granted without an answer.
    held: bool,
    may_hold: bool,
}

pub struct Observer {
    rules: Config,
    /// After how long a silently gone peer times out at the latest.
    silent_limit: Duration,
    peers: HashMap<PeerId, Peer>,
    /// When this machine was recently suspended or overloaded.
    suspended_at: VecDeque<Duration>,
    pub checked: BTreeMap<Law, u64>,
    /// Violations that were excused, because the machine was suspended or overloaded.
    pub excused: u64,
    /// Refusals while a peer had been gone longer than `--probe-after`: undesirable, but no violation.
    pub refused_too_early: u64,
}

impl Observer {
    pub fn new(rules: Config) -> Self {
        Self {
            silent_limit: rules.silence + 2 * rules.sweep + LATE,
            rules,
            peers: HashMap::new(),
            suspended_at: VecDeque::new(),
            checked: LAWS.into_iter().map(|law| (law, 0)).collect(),
            excused: 0,
            refused_too_early: 0,
        }
    }

    /// Handles what a client saw or did in this stay.
    pub fn on_seen(&mut self, now: Duration, id: PeerId, stay: u64, seen: &Seen) -> Verdict {
        let peer = self.peers.entry(id).or_default();
        if stay < peer.stay {
            return Ok(());
        }
        match seen {
            Seen::Started => {
                *peer = Peer {
                    stay,
                    is_live: true,
                    lost: peer.lost,
                    ended: peer.ended,
                    vanished: peer.vanished,
                    ..Peer::default()
                };
            }
            Seen::Ended { fin } => {
                let before = peer.ended.is_some_and(|ended| ended.may_hold);
                peer.ended = Some(StayEnd {
                    at: now,
                    fin: *fin,
                    held: peer.granted.is_some() && !peer.may_have_timed_out(now),
                    may_hold: before || peer.granted.is_some() || peer.requested.is_some(),
                });
                if !fin {
                    peer.vanished = Some(now);
                }
                (peer.is_live, peer.granted, peer.requested, peer.frozen) =
                    (false, None, None, None);
            }
            _ if !peer.is_live => {}
            Seen::Requested => peer.requested = Some(now),
            Seen::Granted { renewal } => {
                let came_back = peer.still_has(now, &self.rules).is_some();
                peer.requested = None;
                peer.granted = peer.granted.or(Some(now));
                if *renewal || came_back {
                    self.check(Law::Owner);
                }
                return self.bounds(now);
            }
            Seen::Refused(status) => return self.refused(now, id, status),
            Seen::Lost(cause) => return self.lost(now, id, cause),
            Seen::Froze => {
                // Without time to answer in between it counts as one freeze.
                let once = peer.thawed.filter(|(_, until)| *until + EARLY >= now);
                peer.frozen = Some(once.map_or(now, |(since, _)| since));
            }
            Seen::Thawed => {
                let since = peer.frozen.take().unwrap_or(now);
                peer.thawed = Some((since, now));
                if now.saturating_sub(since) + EARLY >= self.rules.probe {
                    peer.was_frozen = Some(now);
                }
            }
            Seen::Echoed { correct } => {
                self.check(Law::Echo);
                if !correct {
                    return violated(Law::Echo, Some(id), now, "got wrong bytes".to_owned());
                }
            }
            Seen::Closed | Seen::Denied => peer.requested = None,
            Seen::NoEcho | Seen::NoCircuit(_) => {}
        }
        Ok(())
    }

    /// Tasks were not scheduled for this long.
    pub fn on_suspended(&mut self, now: Duration, pause: Duration) {
        if pause >= SUSPENDED {
            self.suspended_at.push_back(now);
        }
        self.suspended_at.retain(|at| *at + EXCUSED_FOR > now);
    }

    /// Handles a report that was requested at `requested_at` and received at `now`.
    pub fn report(&mut self, now: Duration, requested_at: Duration, report: &Report) -> Verdict {
        let as_of = requested_at.saturating_sub(STALE);
        self.check(Law::Bounds);
        let most = self.rules.max_reservations;
        let (live, grace) = report.counted;
        if live + grace > most || report.total != most {
            let what = format!(
                "{live} live slots and {grace} in grace of {} are reported, at most {most} are allowed",
                report.total
            );
            return violated(Law::Bounds, None, now, what);
        }
        let ids: Vec<PeerId> = self.peers.keys().copied().collect();
        for id in ids {
            let peer = &self.peers[&id];
            if peer.is_live {
                self.check_reported(now, as_of, id, report)?;
            } else {
                self.check_not_reported(now, as_of, id, report)?;
            }
        }
        self.forget(as_of);
        Ok(())
    }

    /// Handles the report at the end, after every client has been gone long enough.
    pub fn nothing_left(&mut self, now: Duration, report: &Report) -> Verdict {
        self.check(Law::NothingLeft);
        let (live, grace) = report.counted;
        let listed = report.live.len() + report.grace.len();
        let remaining = live + grace + listed + report.circuits + report.connections;
        if remaining == 0 {
            return Ok(());
        }
        let what = format!(
            "{live} live slots, {grace} in grace, {} circuits, {} connections",
            report.circuits, report.connections
        );
        violated(Law::NothingLeft, None, now, what)
    }

    /// After this time the relay has no state of a gone peer.
    pub fn all_freed_within(&self) -> Duration {
        self.silent_limit + self.rules.grace + self.rules.sweep + STALE + LATE
    }

    /// All clients disconnect from now on. While most of them are silent the relay defers timeouts by one more limit.
    pub fn on_disconnecting_all(&mut self) {
        self.silent_limit += self.rules.silence;
    }

    /// The peers that hold a slot as far as their clients know.
    pub fn holders(&self) -> impl Iterator<Item = PeerId> {
        let holds = |peer: &Peer| peer.is_live && peer.granted.is_some();
        let all = self.peers.iter();
        all.filter(move |(_, peer)| holds(peer)).map(|(id, _)| *id)
    }

    fn check(&mut self, law: Law) {
        *self.checked.entry(law).or_default() += 1;
    }

    /// Checks the number of slots, counting those that are certain.
    fn bounds(&mut self, now: Duration) -> Verdict {
        self.check(Law::Bounds);
        let certain = |peer: &&Peer| {
            let holds = peer.granted.is_some_and(|since| since <= now);
            peer.is_live && holds && peer.frozen.is_none() && !peer.may_have_timed_out(now)
        };
        let hold = self.peers.values().filter(certain).count();
        let most = self.rules.max_reservations;
        if hold <= most {
            return Ok(());
        }
        let what = format!("{hold} clients hold a slot each, at most {most} are allowed");
        self.unless_suspended(now, violated(Law::Bounds, None, now, what))
    }

    fn lost(&mut self, now: Duration, id: PeerId, cause: &str) -> Verdict {
        self.check(Law::Safety);
        let probe = self.rules.probe;
        let Some(peer) = self.peers.get_mut(&id) else {
            return Ok(());
        };
        let held = peer.granted.take();
        (peer.lost, peer.requested) = (Some(now), None);
        if held.is_none() || peer.may_have_timed_out(now) {
            return Ok(());
        }
        let what =
            format!("lost its slot although no freeze reached the probe time, {probe:?} ({cause})");
        self.unless_suspended(now, violated(Law::Safety, Some(id), now, what))
    }

    fn refused(&mut self, now: Duration, id: PeerId, status: &str) -> Verdict {
        let rules = &self.rules;
        let Some(peer) = self.peers.get_mut(&id) else {
            return Ok(());
        };
        let requested = peer.requested.take().unwrap_or(now);
        let (held, timed_out) = (peer.granted.take(), peer.may_have_timed_out(now));
        let had = peer.still_has(now, rules);
        if held.is_some() && !timed_out {
            self.check(Law::Owner);
            let what = format!("was refused to renew the slot that it held ({status})");
            return self.unless_suspended(now, violated(Law::Owner, Some(id), now, what));
        }
        if let Some(ended) = had {
            self.check(Law::Owner);
            let what =
                format!("reconnected after {:?}, and was refused ({status})", now - ended.at);
            return violated(Law::Owner, Some(id), now, what);
        }
        if status != "Refused" {
            let what = format!("was refused for another reason: {status}");
            return violated(Law::Refusal, Some(id), now, what);
        }
        self.check(Law::Refusal);
        let (most, bound) = (self.rules.max_reservations, self.silent_limit);
        let desired = self.rules.probe_after + self.rules.sweep + LATE;
        let may_hold = self.may_have_held(id, requested, bound);
        if self.may_have_held(id, requested, desired) < most {
            self.refused_too_early += 1;
        }
        if may_hold >= most {
            return Ok(());
        }
        let what = format!("was refused while at most {may_hold} of {most} slots were taken");
        self.unless_suspended(now, violated(Law::Refusal, Some(id), now, what))
    }

    /// How many other peers may have held a slot at any time since then; silently gone ones for at most `gone_for`.
    fn may_have_held(&self, but: PeerId, since: Duration, gone_for: Duration) -> usize {
        let may = |peer: &Peer| {
            let has = peer.is_live && (peer.granted.is_some() || peer.requested.is_some());
            let lost = peer.lost.is_some_and(|lost| lost + LATE >= since);
            let ended = peer.ended.is_some_and(|ended| ended.may_hold);
            has || lost || (ended && peer.noticed(gone_for) >= Some(since))
        };
        let all = self.peers.iter().filter(|(id, _)| **id != but);
        all.filter(|(_, peer)| may(peer)).count()
    }

    /// A live peer that holds a slot must be reported as live.
    fn check_reported(
        &mut self,
        now: Duration,
        as_of: Duration,
        id: PeerId,
        report: &Report,
    ) -> Verdict {
        let peer = &self.peers[&id];
        let certain = peer.granted.is_some_and(|since| since < as_of);
        let answers = peer.frozen.is_none() && !peer.may_have_timed_out(as_of);
        if !certain || !answers {
            return Ok(());
        }
        self.check(Law::Safety);
        if report.live.contains(&id) {
            return Ok(());
        }
        let what = match report.grace.contains(&id) {
            true => "answers, and its slot is in grace",
            false => "answers, and its slot is gone",
        };
        let violated = violated(Law::Safety, Some(id), now, what.to_owned());
        self.unless_suspended(now, violated)
    }

    /// A peer that has been gone long enough must not be reported.
    fn check_not_reported(
        &mut self,
        now: Duration,
        as_of: Duration,
        id: PeerId,
        report: &Report,
    ) -> Verdict {
        let Some(ended) = self.peers[&id].ended else {
            return Ok(());
        };
        let noticed = self.peers[&id].noticed(self.silent_limit);
        let noticed = noticed.unwrap_or(ended.at);
        if noticed >= as_of {
            return Ok(());
        }
        let freed_by = noticed + self.rules.grace + self.rules.sweep;
        self.check(Law::Return);
        let in_grace = report.grace.contains(&id);
        if !report.live.contains(&id) && (!in_grace || freed_by >= as_of) {
            return Ok(());
        }
        let (state, how) = (
            if in_grace { "in grace" } else { "live" },
            if ended.fin { "closed" } else { "silent" },
        );
        let gone_for = (as_of - ended.at).as_secs_f64();
        let what = format!("has been gone ({how}) for {gone_for:.2} s, and its slot is {state}");
        self.unless_suspended(now, violated(Law::Return, Some(id), now, what))
    }

    /// Removes peers that have been gone so long that no law applies to them.
    fn forget(&mut self, as_of: Duration) {
        let bound = self.all_freed_within() + 2 * STALE;
        self.peers.retain(|_, peer| {
            let ended = peer.ended.is_none_or(|ended| ended.at + bound >= as_of);
            peer.is_live || ended
        });
    }

    fn unless_suspended(&mut self, now: Duration, verdict: Verdict) -> Verdict {
        let is_excused = self.suspended_at.iter().any(|at| *at + EXCUSED_FOR > now);
        if verdict.is_err() && is_excused {
            self.excused += 1;
            return Ok(());
        }
        verdict
    }
}

impl Peer {
    /// When the relay has noticed that it is gone, if a silent end takes `silent_limit`.
    fn noticed(&self, silent_limit: Duration) -> Option<Duration> {
        let closed = self.ended.map(|ended| ended.at + LATE);
        let vanished = self.vanished.map(|at| at + silent_limit);
        closed.max(vanished)
    }

    /// How it left its slot, if no newcomer can have taken it: this peer would be probed first.
    fn still_has(&self, now: Duration, rules: &Config) -> Option<StayEnd> {
        let ended = self.ended.filter(|ended| ended.held && !ended.fin)?;
        (now < ended.at + rules.probe.saturating_sub(EARLY)).then_some(ended)
    }

    /// Whether it was frozen so long that it may have timed out without knowing.
    fn may_have_timed_out(&self, now: Duration) -> bool {
        let was = self.was_frozen.is_some_and(|until| until + LATE >= now);
        // A frozen peer may not answer.
        was || self.frozen.is_some()
    }
}

fn violated(law: Law, peer: Option<PeerId>, at: Duration, what: String) -> Verdict {
    Err(Box::new(Violation { law, peer, at, what }))
}
