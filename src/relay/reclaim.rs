//! Reclaim on demand: a newcomer waits, and a slot is got back for it from a peer that is gone.
//!
//! Sans-IO. When a cap is full, probes the silent peers under it at once; a peer that does not answer within
//! [`Config::probe`] is evicted: the longest silent first, and no more than newcomers wait. A peer that
//! answers keeps its slot. Doubts about our own link (see [`crate::relay::heartbeat`]) delay none of it:
//! the newcomer came over that link.

use std::{
    cmp::Reverse,
    collections::VecDeque,
    time::{Duration, Instant},
};

use super::{action::Pending, quota::Scope};
use crate::{access::Terms, address::ClientPrefix, config::Config};

/// How many newcomers may wait at a time. Whoever comes beyond that is refused at once.
const MOST_WAITING: usize = 64;

/// How many of them may have come from one address: else one that is at its cap takes all places.
const MOST_WAITING_PER_ADDRESS: usize = 8;

/// How many peers may be on probation at a time.
const MOST_ASKED: usize = 32;

/// How often the relay looks while a newcomer waits.
pub const TICK: Duration = Duration::from_millis(100);

/// The newcomers that wait, first come first.
#[derive(Debug)]
pub struct Reclaim<C, R> {
    waiting: VecDeque<PendingReservation<C, R>>,
}

/// A RESERVE that waits for a slot, or is about to get one.
#[derive(Debug)]
pub struct PendingReservation<C, R> {
    /// The request.
    pub request: Pending<C, R>,
    /// On which terms it is granted.
    pub terms: Terms,
    /// Since when a peer may have been probed for its sake; the first look at it may come late.
    pub since: Option<Instant>,
}

/// A live slot whose peer has been silent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Candidate<C> {
    /// The connection that its reservation points at.
    pub connection: C,
    /// Whom the slot is billed to.
    pub billed_to: Option<ClientPrefix>,
    /// For how long nothing was heard from the peer.
    pub silent_for: Duration,
    /// For how long a question to it has been open, if one is.
    pub probed_for: Option<Duration>,
}

/// What is to become of a newcomer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Prospect<C> {
    /// The peer behind this connection has timed out, and its slot is to be had.
    Evict(C),
    /// Somebody under the cap may yet turn out to be gone.
    Wait,
    /// There is nothing to be had.
    Refuse,
}

impl<C, R> Reclaim<C, R> {
    /// How many wait.
    pub fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Lets a newcomer wait, if there is a probe at all and room to wait in; else returns it.
    pub fn wait(
        &mut self,
        config: &Config,
        newcomer: PendingReservation<C, R>,
    ) -> Option<PendingReservation<C, R>> {
        let prefix = newcomer.request.origin.prefix;
        let alike = self.waiting.iter().filter(|other| other.request.origin.prefix == prefix);
        if config.probe.is_zero()
            || self.waiting.len() >= MOST_WAITING
            || alike.count() >= MOST_WAITING_PER_ADDRESS
        {
            return Some(newcomer);
        }
        self.waiting.push_back(newcomer);
        None
    }

    /// Lets a newcomer whose turn it was wait on.
    pub fn requeue(&mut self, newcomer: PendingReservation<C, R>) {
        self.waiting.push_back(newcomer);
    }

    /// Takes out those for whom this holds.
    pub fn withdraw(
        &mut self,
        which: impl Fn(&Pending<C, R>) -> bool,
    ) -> Vec<PendingReservation<C, R>> {
        let (gone, rest) = self.take().into_iter().partition(|waiting| which(&waiting.request));
        self.waiting = rest;
        Vec::from(gone)
    }

    /// Takes out all, first come first. They are to come back by [`Reclaim::requeue`] or not at all.
    pub fn take(&mut self) -> VecDeque<PendingReservation<C, R>> {
        std::mem::take(&mut self.waiting)
    }
}

impl<C, R> Default for Reclaim<C, R> {
    fn default() -> Self {
        Self { waiting: VecDeque::new() }
    }
}

/// What is to become of each newcomer that waits under a cap, for so long; and whom to probe. Candidates
/// are all that have been silent for [`Config::probe_after`].
pub fn decide<C: Copy + Ord>(
    config: &Config,
    waiting: impl Iterator<Item = (Scope, Duration)>,
    mut candidates: Vec<Candidate<C>>,
) -> (Vec<Prospect<C>>, Vec<C>) {
    let Config { probe, silence, .. } = *config;
    if probe.is_zero() {
        // Switched off while they waited: nobody could answer in no time.
        return (waiting.map(|_| Prospect::Refuse).collect(), Vec::new());
    }
    for candidate in &mut candidates {
        // Nobody listens for the answer to an older one.
        candidate.probed_for = candidate.probed_for.filter(|open| *open <= silence);
    }
    let is_due = |candidate: &Candidate<C>| candidate.probed_for.is_some_and(|open| open >= probe);
    let (mut due, mut others): (Vec<_>, Vec<_>) = candidates.into_iter().partition(is_due);
    let on_probation = others.iter().filter(|candidate| candidate.probed_for.is_some());
    let mut room = MOST_ASKED.saturating_sub(on_probation.count());
    // The longest silent first; of these, who came first.
    let order = |candidate: &Candidate<C>| (Reverse(candidate.silent_for), candidate.connection);
    due.sort_unstable_by_key(order);
    if room > 0 {
        others.sort_unstable_by_key(order);
    }
    let mut ask = Vec::new();
    let prospects = waiting.map(|(full, waited)| {
        let covered = |candidate: &Candidate<C>| full.covers(candidate.billed_to);
        if let Some(silent) = due.iter().position(covered) {
            return Prospect::Evict(due.remove(silent).connection);
        }
        // Those who were asked for it have had their time.
        if waited >= probe + TICK {
            return Prospect::Refuse;
        }
        let mut prospect = Prospect::Refuse;
        for candidate in others.iter_mut().filter(|candidate| covered(candidate)) {
            prospect = Prospect::Wait;
            if room == 0 {
                break;
            }
            if candidate.probed_for.is_none() {
                room -= 1;
                candidate.probed_for = Some(Duration::ZERO);
                ask.push(candidate.connection);
            }
        }
        prospect
    });
    (prospects.collect(), ask)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use libp2p::PeerId;

    use super::*;
    use crate::relay::{circuits::End, connections::Origin};

    const PROBE: Duration = Duration::from_secs(3);

    fn config() -> Config {
        Config { probe: PROBE, silence: secs(60), ..Config::default() }
    }

    fn secs(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    fn silent(connection: u32, seconds: u64) -> Candidate<u32> {
        Candidate { connection, billed_to: None, silent_for: secs(seconds), probed_for: None }
    }

    fn asked(connection: u32, seconds: u64, open: Duration) -> Candidate<u32> {
        Candidate { probed_for: Some(open), ..silent(connection, seconds) }
    }

    fn decide(
        waited: &[Duration],
        candidates: Vec<Candidate<u32>>,
    ) -> (Vec<Prospect<u32>>, Vec<u32>) {
        let waiting = waited.iter().map(|waited| (Scope::Total, *waited));
        super::decide(&config(), waiting, candidates)
    }

    #[test]
    fn who_has_been_silent_is_asked_longest_first_and_the_newcomer_waits() {
        let (prospects, ask) = decide(&[secs(0)], vec![silent(1, 12), silent(3, 40)]);
        assert_eq!(prospects, [Prospect::Wait]);
        assert_eq!(ask, [3, 1]);
    }

    #[test]
    fn where_nobody_has_been_silent_the_newcomer_is_refused_at_once() {
        assert_eq!(decide(&[secs(0)], vec![]), (vec![Prospect::Refuse], vec![]));
    }

    #[test]
    fn as_many_are_judged_as_newcomers_wait_the_longest_silent_first() {
        let due = vec![asked(1, 13, PROBE), asked(2, 20, PROBE), asked(3, 15, PROBE)];
        let (prospects, ask) = decide(&[secs(3), secs(1)], due);
        assert_eq!(prospects, [Prospect::Evict(2), Prospect::Evict(3)]);
        assert!(ask.is_empty());
    }

    #[test]
    fn nobody_is_judged_before_the_probe_is_over() {
        let almost = PROBE - Duration::from_millis(1);
        let (prospects, ask) = decide(&[secs(3)], vec![asked(1, 13, almost)]);
        assert_eq!((prospects, ask), (vec![Prospect::Wait], vec![]));
    }

    #[test]
    fn a_question_that_nobody_listens_to_any_more_is_put_anew() {
        let (prospects, ask) = decide(&[secs(0)], vec![asked(1, 4000, secs(3600))]);
        assert_eq!((prospects, ask), (vec![Prospect::Wait], vec![1]));
    }

    #[test]
    fn a_newcomer_waits_for_the_probe_time_and_no_longer() {
        let (prospects, ask) = decide(&[PROBE + TICK], vec![silent(1, 12)]);
        assert_eq!((prospects, ask), (vec![Prospect::Refuse], vec![]));
    }

    #[test]
    fn once_the_probe_is_switched_off_nobody_is_asked_or_judged_for_those_who_wait() {
        let config = Config { probe: Duration::ZERO, ..config() };
        let waiting = [(Scope::Total, secs(0)), (Scope::Total, secs(1))];
        let candidates = vec![asked(1, 13, secs(1)), silent(2, 12)];
        let (prospects, ask) = super::decide(&config, waiting.into_iter(), candidates);
        assert_eq!((prospects, ask), (vec![Prospect::Refuse; 2], vec![]));
    }

    #[test]
    fn under_an_address_s_cap_only_its_own_slots_count() {
        let home = ClientPrefix::of(&"/ip4/192.0.2.1/tcp/1".parse().unwrap()).unwrap();
        let mut own = asked(2, 12, PROBE);
        own.billed_to = Some(home);
        let waiting = std::iter::once((Scope::Address(home), secs(1)));
        let (prospects, _) = super::decide(&config(), waiting, vec![asked(1, 50, PROBE), own]);
        assert_eq!(prospects, [Prospect::Evict(2)]);
    }

    #[test]
    fn no_more_than_32_are_on_probation_and_no_more_than_64_wait() {
        let candidates = (0..100).map(|connection| silent(connection, 60)).collect();
        let (_, ask) = decide(&[secs(0), secs(0)], candidates);
        assert_eq!(ask.len(), MOST_ASKED);

        let (mut reclaim, config) = (Reclaim::default(), config());
        let wait = |reclaim: &mut Reclaim<u32, ()>, address: &str| {
            let origin = Origin::new(PeerId::random(), address.parse().unwrap(), false);
            let from = End { peer: origin.peer, connection: 0 };
            let request = Pending { from, origin: Arc::new(origin), reply: () };
            let newcomer = PendingReservation { request, terms: Terms::default(), since: None };
            reclaim.wait(&config, newcomer).is_none()
        };
        for n in 0..MOST_WAITING {
            let home = format!("/ip4/192.0.2.{}/tcp/1", n / MOST_WAITING_PER_ADDRESS);
            assert!(wait(&mut reclaim, &home));
            let crowded = (n + 1) % MOST_WAITING_PER_ADDRESS == 0;
            assert!(!crowded || !wait(&mut reclaim, &home));
        }
        assert!(!wait(&mut reclaim, "/memory/1"));
        let withdrawn = reclaim.withdraw(|request| request.from.connection == 0);
        assert_eq!(withdrawn.len(), MOST_WAITING);
        assert_eq!(reclaim.waiting(), 0);
    }
}
