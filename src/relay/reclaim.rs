//! Reclaim on demand: while a newcomer waits, finds a slot whose peer is gone.
//!
//! Sans-IO. When a cap is full, probes the silent peers under it; a peer that does not answer within [`Config::probe`]
//! is evicted: the longest silent first, and no more peers than newcomers wait. A peer that answers keeps its slot.
//! Doubts about the relay's own link (see [`crate::relay::heartbeat`]) delay nothing here: the newcomer came over that
//! link.

use std::{
    cmp::Reverse,
    collections::VecDeque,
    time::{Duration, Instant},
};

use super::{
    connections::PendingRequest,
    quota::{Caps, Quota, Scope},
};
use crate::{access::Terms, address::ClientPrefix, config::Config};

/// How many newcomers may wait at a time; one more is refused at once. Without the caps of a subnet and of an address,
/// one site, or one address that is at its cap, would take the whole queue.
const MOST_WAITING: Caps = Caps { total: Some(64), per_subnet: Some(16), per_address: Some(8) };

/// How many probes may be open at a time.
const MOST_PROBED: usize = 32;

/// The time between two sweeps while a newcomer waits.
pub const TICK: Duration = Duration::from_millis(100);

/// A RESERVE that waits for a slot, or is about to get one.
pub struct PendingReservation<C, R> {
    /// The request.
    pub request: PendingRequest<C, R>,
    /// The terms of a grant.
    pub terms: Terms,
    /// When it was first looked at: peers may have been probed for it since then.
    pub since: Option<Instant>,
}

/// A live slot whose peer has been silent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Candidate<C> {
    /// The connection that the reservation points at.
    pub connection: C,
    /// The prefix that the slot counts towards.
    pub prefix: Option<ClientPrefix>,
    /// How long the peer has been silent.
    pub silent_for: Duration,
    /// How long the decisive probe has been open, if there is one:
    /// [`Liveness::decisive_probe`](super::heartbeat::Liveness::decisive_probe).
    pub probed_for: Option<Duration>,
}

/// What becomes of a newcomer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict<C> {
    /// The peer of this connection has timed out, and the newcomer gets its slot.
    Evict(C),
    /// The newcomer waits, because a probed peer under the cap may time out.
    Wait,
    /// There is no slot.
    Refuse,
}

/// Whether one more newcomer of this prefix may wait.
pub fn may_wait<C, R>(
    config: &Config,
    waiting: &VecDeque<PendingReservation<C, R>>,
    prefix: Option<ClientPrefix>,
) -> bool {
    let mut quota = Quota::new(MOST_WAITING);
    waiting.iter().for_each(|other| quota.add(other.request.origin.prefix));
    !config.probe.is_zero() && quota.full(prefix).is_none()
}

/// Decides about each newcomer that has waited under a cap for this long, and which connections to probe. `candidates`
/// are all that have been silent for [`Config::probe_after`], or, where only the relay's own streams count, for the
/// silence limit.
pub fn decide<C: Copy + Ord>(
    config: &Config,
    waiting: impl Iterator<Item = (Scope, Duration)>,
    mut candidates: Vec<Candidate<C>>,
) -> (Vec<Verdict<C>>, Vec<C>) {
    let Config { probe, silence, .. } = *config;
    if probe.is_zero() {
        // Probing was switched off while they waited.
        return (waiting.map(|_| Verdict::Refuse).collect(), Vec::new());
    }
    // 1. The relay waits for an answer no longer than the silence limit: an older probe is as good as none.
    for candidate in &mut candidates {
        candidate.probed_for = candidate.probed_for.filter(|open| *open <= silence.max(probe));
    }
    // 2. Divide them into those that did not answer in time and the others, the longest silent first.
    let is_due = |candidate: &Candidate<C>| candidate.probed_for.is_some_and(|open| open >= probe);
    let (mut due, mut others): (Vec<_>, Vec<_>) = candidates.into_iter().partition(is_due);
    let open = others.iter().filter(|candidate| candidate.probed_for.is_some()).count();
    let room = MOST_PROBED.saturating_sub(open);
    let order = |candidate: &Candidate<C>| (Reverse(candidate.silent_for), candidate.connection);
    due.sort_unstable_by_key(order);
    if room > 0 {
        others.sort_unstable_by_key(order);
    }
    // 3. For each newcomer: evict one under its cap, or probe those under it while there is room.
    let mut probes = Vec::new();
    let verdicts = waiting.map(|(full, waited)| {
        if let Some(nth) = due.iter().position(|candidate| full.covers(candidate.prefix)) {
            return Verdict::Evict(due.remove(nth).connection);
        }
        // The peers that were probed for this newcomer had the time to answer.
        if waited >= probe + TICK {
            return Verdict::Refuse;
        }
        let mut verdict = Verdict::Refuse;
        for candidate in others.iter_mut().filter(|candidate| full.covers(candidate.prefix)) {
            verdict = Verdict::Wait;
            if probes.len() == room {
                break;
            }
            if candidate.probed_for.is_none() {
                candidate.probed_for = Some(Duration::ZERO);
                probes.push(candidate.connection);
            }
        }
        verdict
    });
    (verdicts.collect(), probes)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use libp2p::PeerId;

    use super::*;
    use crate::{
        relay::connections::{End, Origin},
        wire::Request,
    };

    const PROBE: Duration = Duration::from_secs(3);

    fn config() -> Config {
        Config { probe: PROBE, silence: secs(60), ..Config::default() }
    }

    fn secs(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    fn silent(connection: u32, seconds: u64) -> Candidate<u32> {
        Candidate { connection, prefix: None, silent_for: secs(seconds), probed_for: None }
    }

    fn probed(connection: u32, seconds: u64, open: Duration) -> Candidate<u32> {
        Candidate { probed_for: Some(open), ..silent(connection, seconds) }
    }

    fn decide(
        waited: &[Duration],
        candidates: Vec<Candidate<u32>>,
    ) -> (Vec<Verdict<u32>>, Vec<u32>) {
        let waiting = waited.iter().map(|waited| (Scope::Total, *waited));
        super::decide(&config(), waiting, candidates)
    }

    #[test]
    fn silent_peers_are_probed_longest_first_while_the_newcomer_waits() {
        let (verdicts, to_probe) = decide(&[secs(0)], vec![silent(1, 12), silent(3, 40)]);
        assert_eq!(verdicts, [Verdict::Wait]);
        assert_eq!(to_probe, [3, 1]);
    }

    #[test]
    fn without_a_silent_peer_the_newcomer_is_refused_at_once() {
        assert_eq!(decide(&[secs(0)], vec![]), (vec![Verdict::Refuse], vec![]));
    }

    #[test]
    fn one_peer_is_evicted_per_waiting_newcomer_longest_silent_first() {
        let due = vec![probed(1, 13, PROBE), probed(2, 20, PROBE), probed(3, 15, PROBE)];
        let (verdicts, to_probe) = decide(&[secs(3), secs(1)], due);
        assert_eq!(verdicts, [Verdict::Evict(2), Verdict::Evict(3)]);
        assert!(to_probe.is_empty());
    }

    #[test]
    fn no_peer_is_evicted_before_its_probe_times_out() {
        let almost = PROBE - Duration::from_millis(1);
        let (verdicts, to_probe) = decide(&[secs(3)], vec![probed(1, 13, almost)]);
        assert_eq!((verdicts, to_probe), (vec![Verdict::Wait], vec![]));
    }

    #[test]
    fn a_probe_lost_with_its_connection_is_sent_again() {
        let (verdicts, to_probe) = decide(&[secs(0)], vec![probed(1, 4000, secs(3600))]);
        assert_eq!((verdicts, to_probe), (vec![Verdict::Wait], vec![1]));
    }

    #[test]
    fn a_newcomer_waits_at_most_one_probe_time() {
        let (verdicts, to_probe) = decide(&[PROBE + TICK], vec![silent(1, 12)]);
        assert_eq!((verdicts, to_probe), (vec![Verdict::Refuse], vec![]));
    }

    #[test]
    fn disabling_the_probe_stops_probes_and_evictions_for_waiting_newcomers() {
        let config = Config { probe: Duration::ZERO, ..config() };
        let waiting = [(Scope::Total, secs(0)), (Scope::Total, secs(1))];
        let candidates = vec![probed(1, 13, secs(1)), silent(2, 12)];
        let (verdicts, to_probe) = super::decide(&config, waiting.into_iter(), candidates);
        assert_eq!((verdicts, to_probe), (vec![Verdict::Refuse; 2], vec![]));
    }

    #[test]
    fn under_an_address_cap_only_slots_of_that_address_are_evicted() {
        let home = ClientPrefix::of(&"/ip4/192.0.2.1/tcp/1".parse().unwrap()).unwrap();
        let mut own = probed(2, 12, PROBE);
        own.prefix = Some(home);
        let waiting = std::iter::once((Scope::Address(home), secs(1)));
        let (verdicts, _) = super::decide(&config(), waiting, vec![probed(1, 50, PROBE), own]);
        assert_eq!(verdicts, [Verdict::Evict(2)]);
    }

    #[test]
    fn a_peer_is_probed_once_for_several_newcomers_and_open_probes_count() {
        let (verdicts, to_probe) = decide(&[secs(0), secs(0)], vec![silent(1, 12), silent(2, 13)]);
        assert_eq!((verdicts, to_probe), (vec![Verdict::Wait; 2], vec![2, 1]));
        let mut candidates: Vec<_> = (0..30).map(|nth| probed(nth, 12, secs(1))).collect();
        candidates.extend((30..40).map(|nth| silent(nth, 60)));
        let (_, to_probe) = decide(&[secs(0)], candidates);
        assert_eq!(to_probe, [30, 31]);
    }

    #[test]
    fn at_most_32_peers_are_probed_and_at_most_64_newcomers_wait() {
        let candidates = (0..100).map(|connection| silent(connection, 60)).collect();
        let (_, to_probe) = decide(&[secs(0), secs(0)], candidates);
        assert_eq!(to_probe.len(), MOST_PROBED);

        let mut waiting: VecDeque<PendingReservation<u32, ()>> = VecDeque::new();
        let mut wait = |address: &str| {
            let origin = Arc::new(Origin::new(PeerId::random(), address.parse().unwrap(), false));
            let may_wait = may_wait(&config(), &waiting, origin.prefix);
            if may_wait {
                let from = End { peer: origin.peer, connection: 0 };
                let request = PendingRequest { from, origin, request: Request::Reserve, reply: () };
                let terms = Terms::default();
                waiting.push_back(PendingReservation { request, terms, since: None });
            }
            may_wait
        };
        for n in 1..=64 {
            let subnet = format!("/ip4/192.0.{}", (n - 1) / 16);
            let address = format!("{subnet}.{}/tcp/1", (n - 1) / 8);
            assert!(wait(&address));
            assert!(n % 8 != 0 || !wait(&address), "eight of one address");
            assert!(n % 16 != 0 || !wait(&format!("{subnet}.99/tcp/1")), "sixteen of one subnet");
        }
        assert!(!wait("/memory/1"));
        assert_eq!(waiting.len(), 64);
    }
}
