//! The heartbeat: which connections to probe, which have timed out, and whether the relay itself is at fault.
//!
//! Sans-IO. A connection times out only if its peer had the time to answer a probe, however long it had been silent
//! before. A pause of the relay itself times out no connection: a late check resets the liveness timers, and when most
//! connections become silent at once, timeouts are deferred.

use std::time::{Duration, Instant};

use crate::config::Config;

/// This many connections that become silent together, if they are most of the watched connections, may mean that the
/// relay's own link is down.
const MANY: usize = 8;

/// The least time between two warnings that the link may be down.
const WARN_AGAIN: Duration = Duration::from_secs(60 * 60);

/// When a connection was last active, and whether it is being probed.
pub struct Liveness {
    active_at: Instant,
    /// When the last probe was sent, if none has been answered since.
    pub(super) probed_at: Option<Instant>,
    /// How many probes in a row are unanswered.
    probes: u8,
    /// Whether only activity on the relay's own streams counts, because no counter of all bytes is tracked. Then a peer
    /// times out after the silence limit and two unanswered probes, and not earlier for a newcomer.
    pub is_partial: bool,
    /// Whether the connection was active since its peer timed out, on it or on one that was probed later; `None`: it has
    /// not timed out.
    pub(super) heard_since_timeout: Option<bool>,
    jitter: u8,
}

impl Liveness {
    /// A connection that was active at `now`. `jitter` is any number: see [`Liveness::spread_over`].
    pub fn new(now: Instant, jitter: u8) -> Self {
        let (probed_at, is_partial, heard_since_timeout) = (None, false, None);
        Self { active_at: now, probed_at, probes: 0, is_partial, heard_since_timeout, jitter }
    }

    /// A part of `period`, by the jitter: connections that came up together are not probed or closed together.
    pub fn spread_over(&self, period: Duration) -> Duration {
        period * u32::from(self.jitter) / 255
    }

    /// Records activity, which answers an open probe.
    pub fn on_activity(&mut self, now: Instant) {
        self.active_at = now;
        self.forget_probes();
        self.heard_since_timeout = self.heard_since_timeout.map(|_| true);
    }

    /// Forgets the unanswered probes.
    pub fn forget_probes(&mut self) {
        (self.probed_at, self.probes) = (None, 0);
    }

    /// Records that a probe is sent.
    pub fn on_probe(&mut self, now: Instant) {
        self.probed_at = Some(now);
        self.probes = self.probes.saturating_add(1);
    }

    /// How long the last probe has been unanswered. `None`: one has to be sent first, because none is unanswered, or
    /// only some streams count and the first of two was not answered within `time`.
    pub fn decisive_probe(&self, time: Duration, now: Instant) -> Option<Duration> {
        let open = now.saturating_duration_since(self.probed_at?);
        (!self.is_partial || self.probes > 1 || open < time).then_some(open)
    }

    /// Whether another probe is useful: none is unanswered, the last one is older than `silence` and its answer would
    /// not be read any more, or two have to be unanswered.
    pub fn needs_probe(&self, silence: Duration, now: Instant) -> bool {
        let is_old = |at| now.saturating_duration_since(at) > silence;
        self.probed_at.is_none_or(is_old) || self.is_partial && self.probes < 2
    }

    /// How long the peer has been silent.
    pub fn silent_for(&self, now: Instant) -> Duration {
        now.saturating_duration_since(self.active_at)
    }
}

/// When the last check was, and until when timeouts are deferred.
pub struct Heartbeat {
    pub(super) checked_at: Instant,
    /// Until then no connection times out, because most became silent at once. Stays set while connections time out
    /// after that, so that no second deferral begins.
    deferred_until: Option<Instant>,
    /// When the next warning that the link may be down is due at the earliest.
    warn_from: Option<Instant>,
}

/// The outcome of one check.
#[derive(Debug, PartialEq, Eq)]
pub struct HeartbeatOutcome<C> {
    /// The connections to probe.
    pub probe: Vec<C>,
    /// The connections that have timed out.
    pub timed_out: Vec<C>,
    /// Why the relay itself may be at fault, as a warning.
    pub fault: Option<String>,
}

impl Heartbeat {
    /// The heartbeat of a relay that starts at `now`.
    pub fn new(now: Instant) -> Self {
        Self { checked_at: now, deferred_until: None, warn_from: None }
    }

    /// Checks all watched connections.
    pub fn check<'a, C>(
        &mut self,
        config: &Config,
        watched: impl Iterator<Item = (C, &'a mut Liveness)>,
        now: Instant,
    ) -> HeartbeatOutcome<C> {
        let mut found = HeartbeatOutcome { probe: Vec::new(), timed_out: Vec::new(), fault: None };
        let Config { heartbeat, silence, sweep, .. } = *config;
        if heartbeat.is_zero() {
            return found;
        }
        // 1. After a pause, reset all timers.
        let pause = now.saturating_duration_since(self.checked_at);
        self.checked_at = now;
        if pause > sweep + heartbeat {
            let watched = watched.map(|(_, liveness)| liveness.on_activity(now)).count();
            let seconds = pause.as_secs();
            found.fault = (watched > 0)
                .then(|| format!("process was suspended for {seconds} s: liveness timers reset"));
            return found;
        }
        // 2. Find the connections to probe, and those whose probes were not answered in time.
        let time_to_answer = silence.saturating_sub(heartbeat);
        let (mut count, mut soon_due) = (0, 0);
        for (id, liveness) in watched {
            count += 1;
            let silent_for = liveness.silent_for(now);
            let time = if liveness.is_partial { time_to_answer / 2 } else { time_to_answer };
            if let Some(probed_for) = liveness.decisive_probe(time, now) {
                soon_due += usize::from(silent_for + heartbeat >= silence);
                // A connection that was not watched until now may have been silent for hours.
                if silent_for >= silence && probed_for >= time {
                    found.timed_out.push(id);
                }
            } else if silent_for >= heartbeat - liveness.spread_over(heartbeat / 4) {
                liveness.on_probe(now);
                found.probe.push(id);
            }
        }
        // 3. If most became silent at once, defer their timeouts by one more silence limit.
        let are_most = soon_due >= MANY && soon_due * 2 > count;
        match self.deferred_until {
            Some(until) if now < until => found.timed_out.clear(),
            Some(_) if found.timed_out.is_empty() => self.deferred_until = None,
            None if are_most && !found.timed_out.is_empty() => {
                self.deferred_until = Some(now + silence);
                // Warn rarely: any client can cause this.
                if self.warn_from.is_none_or(|from| now > from) {
                    self.warn_from = Some(now + WARN_AGAIN);
                    found.fault = Some(format!(
                        "{soon_due} of {count} watched connections became silent at once: evictions wait for one \
                         more silence limit; check this relay's own link"
                    ));
                }
                found.probe.append(&mut found.timed_out); // their probes may have been lost with the link
            }
            _ => {}
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEARTBEAT: u64 = 30;
    const SILENCE: u64 = 60;

    /// Watched connections, and a simulated clock that advances by the sweep interval of 1 s.
    struct Fixture {
        heartbeat: Heartbeat,
        config: Config,
        livenesses: Vec<Liveness>,
        now: Instant,
    }

    impl Fixture {
        fn of(count: usize) -> Self {
            let now = Instant::now();
            let config = Config {
                heartbeat: Duration::from_secs(HEARTBEAT),
                silence: Duration::from_secs(SILENCE),
                sweep: Duration::from_secs(1),
                ..Config::default()
            };
            Self {
                heartbeat: Heartbeat::new(now),
                config,
                livenesses: (0..count).map(|_| Liveness::new(now, 0)).collect(),
                now,
            }
        }

        fn check_after(&mut self, seconds: u64) -> HeartbeatOutcome<usize> {
            self.now += Duration::from_secs(seconds);
            self.heartbeat.check(&self.config, self.livenesses.iter_mut().enumerate(), self.now)
        }

        /// Checks once a second; returns everything that was found.
        fn run_for(&mut self, seconds: u64) -> HeartbeatOutcome<usize> {
            let mut all = self.check_after(1);
            for _ in 1..seconds {
                let outcome = self.check_after(1);
                all.probe.extend(outcome.probe);
                all.timed_out.extend(outcome.timed_out);
                all.fault = all.fault.or(outcome.fault);
            }
            all
        }

        fn record_activity(&mut self, index: usize) {
            self.livenesses[index].on_activity(self.now);
        }
    }

    fn probed(indices: &[usize]) -> HeartbeatOutcome<usize> {
        outcome_of(indices, &[])
    }

    fn timed_out(indices: &[usize]) -> HeartbeatOutcome<usize> {
        outcome_of(&[], indices)
    }

    fn outcome_of(probe: &[usize], timed_out: &[usize]) -> HeartbeatOutcome<usize> {
        HeartbeatOutcome { probe: probe.into(), timed_out: timed_out.into(), fault: None }
    }

    #[test]
    fn a_silent_peer_is_probed_once_and_times_out_at_the_limit() {
        let mut fixture = Fixture::of(1);
        assert_eq!(fixture.run_for(HEARTBEAT - 1), probed(&[]));
        assert_eq!(fixture.run_for(1), probed(&[0]));
        assert_eq!(fixture.run_for(SILENCE - HEARTBEAT - 1), probed(&[]));
        assert_eq!(fixture.run_for(1), timed_out(&[0]));
    }

    #[test]
    fn where_only_some_streams_count_a_peer_times_out_after_two_probes_in_the_same_time() {
        let mut fixture = Fixture::of(1);
        fixture.livenesses[0].is_partial = true;
        let half = (SILENCE - HEARTBEAT) / 2;
        assert_eq!(fixture.run_for(HEARTBEAT), probed(&[0]));
        assert_eq!(fixture.run_for(half - 1), probed(&[]));
        assert_eq!(fixture.run_for(1), probed(&[0]));
        assert_eq!(fixture.run_for(half - 1), probed(&[]));
        assert_eq!(fixture.run_for(1), timed_out(&[0]));
        // An answer to either begins anew.
        fixture.record_activity(0);
        assert_eq!(fixture.run_for(HEARTBEAT + half), probed(&[0, 0]));
        fixture.record_activity(0);
        assert_eq!(fixture.run_for(HEARTBEAT + half), probed(&[0, 0]));
    }

    #[test]
    fn an_active_peer_is_never_probed() {
        let mut fixture = Fixture::of(2);
        for _ in 0..20 {
            assert_eq!(fixture.run_for(HEARTBEAT - 1), probed(&[]));
            fixture.record_activity(0);
            fixture.record_activity(1);
        }
    }

    #[test]
    fn a_late_answer_within_the_limit_prevents_the_timeout() {
        let mut fixture = Fixture::of(1);
        assert_eq!(fixture.run_for(SILENCE - 1), probed(&[0]));
        fixture.record_activity(0);
        assert_eq!(fixture.run_for(HEARTBEAT - 1), probed(&[]));
        assert_eq!(fixture.run_for(1), probed(&[0]));
    }

    #[test]
    fn no_peer_times_out_without_a_probe() {
        let mut fixture = Fixture::of(1);
        // The longest sweep interval that is not late: the limit passes before the first check.
        fixture.config.sweep = Duration::from_secs(SILENCE);
        assert_eq!(fixture.check_after(SILENCE + 1), probed(&[0]));
    }

    #[test]
    fn silence_before_watching_does_not_shorten_the_time_to_answer() {
        let mut fixture = Fixture::of(1);
        let quiet = fixture.livenesses.split_off(0);
        fixture.run_for(10 * SILENCE);
        fixture.livenesses = quiet;
        assert_eq!(fixture.run_for(1), probed(&[0]));
        assert_eq!(fixture.run_for(SILENCE - HEARTBEAT - 1), probed(&[]));
        assert_eq!(fixture.run_for(1), timed_out(&[0]));
    }

    #[test]
    fn a_repeated_probe_gives_the_usual_time_to_answer() {
        let mut fixture = Fixture::of(1);
        assert_eq!(fixture.run_for(SILENCE - 1), probed(&[0]));
        fixture.livenesses[0].probed_at = Some(fixture.now);
        assert_eq!(fixture.run_for(SILENCE - HEARTBEAT - 1), probed(&[]));
        assert_eq!(fixture.run_for(1), timed_out(&[0]));
    }

    #[test]
    fn a_late_sweep_resets_all_liveness_timers() {
        let mut fixture = Fixture::of(3);
        fixture.run_for(SILENCE - 1);
        let pause = HEARTBEAT + 2;
        let late = fixture.check_after(pause);
        let warning = format!("process was suspended for {pause} s: liveness timers reset");
        assert_eq!(late.fault, Some(warning));
        assert!(late.probe.is_empty() && late.timed_out.is_empty());
        assert_eq!(fixture.run_for(HEARTBEAT - 1), probed(&[]));
        assert_eq!(fixture.run_for(1), probed(&[0, 1, 2]));
    }

    #[test]
    fn timeouts_are_deferred_by_one_limit_when_most_peers_fall_silent_at_once() {
        let mut fixture = Fixture::of(15);
        for _ in 0..SILENCE - 1 {
            assert!(fixture.check_after(1).timed_out.is_empty());
            (8..15).for_each(|index| fixture.record_activity(index));
        }
        let outcome = fixture.check_after(1);
        let warning = "8 of 15 watched connections became silent at once: evictions wait";
        assert!(outcome.fault.as_ref().is_some_and(|fault| fault.starts_with(warning)));
        assert!(outcome.timed_out.is_empty());
        assert_eq!(outcome.probe.len(), 8, "probed anew");

        // Two answer. The others time out, without a second warning.
        fixture.record_activity(0);
        fixture.record_activity(1);
        for _ in 0..SILENCE - 1 {
            let outcome = fixture.check_after(1);
            assert!(outcome.timed_out.is_empty() && outcome.fault.is_none());
            (8..15).for_each(|index| fixture.record_activity(index));
        }
        fixture.record_activity(0);
        fixture.record_activity(1);
        assert_eq!(fixture.check_after(1), timed_out(&[2, 3, 4, 5, 6, 7]));
    }

    #[test]
    fn once_a_deferral_is_over_none_begins_while_peers_time_out() {
        let mut fixture = Fixture::of(8);
        assert!(fixture.run_for(2 * SILENCE - 1).timed_out.is_empty());
        for _ in 0..2 {
            assert_eq!(fixture.check_after(1), timed_out(&[0, 1, 2, 3, 4, 5, 6, 7]));
        }
    }

    #[test]
    fn peers_that_fall_silent_within_one_heartbeat_do_so_at_once() {
        let mut fixture = Fixture::of(8);
        for index in 0..8 {
            fixture.run_for(3);
            fixture.record_activity(index);
        }
        let outcome = fixture.run_for(SILENCE);
        assert!(outcome.fault.is_some() && outcome.timed_out.is_empty());
    }

    #[test]
    fn half_of_the_peers_are_not_most() {
        let mut fixture = Fixture::of(16);
        for _ in 0..SILENCE - 1 {
            assert!(fixture.check_after(1).timed_out.is_empty());
            (8..16).for_each(|index| fixture.record_activity(index));
        }
        assert_eq!(fixture.check_after(1).timed_out.len(), 8);
    }

    #[test]
    fn the_warning_about_the_link_comes_once_an_hour() {
        let mut fixture = Fixture::of(8);
        let mut warnings = Vec::new();
        let start = fixture.now;
        while fixture.now < start + 2 * WARN_AGAIN {
            if fixture.check_after(1).fault.is_some() {
                warnings.push(fixture.now);
            }
            // They are silent for two limits, and then heard again.
            if (fixture.now - start).as_secs().is_multiple_of(3 * SILENCE) {
                (0..8).for_each(|index| fixture.record_activity(index));
            }
        }
        assert_eq!(warnings.len(), 2);
        assert!(warnings[1] > warnings[0] + WARN_AGAIN);
    }

    #[test]
    fn a_peer_that_is_probed_early_times_out_no_earlier() {
        let mut fixture = Fixture::of(1);
        fixture.livenesses[0].jitter = 255;
        assert_eq!(fixture.run_for(SILENCE - 1), probed(&[0]));
        assert_eq!(fixture.run_for(1), timed_out(&[0]));
    }

    #[test]
    fn a_sweep_that_is_late_by_a_heartbeat_resets_nothing() {
        let mut fixture = Fixture::of(1);
        let sweep = 1;
        assert_eq!(fixture.check_after(sweep + HEARTBEAT), probed(&[0]));
    }

    #[test]
    fn deferral_ends_when_peers_are_heard_again() {
        let mut fixture = Fixture::of(8);
        assert!(fixture.run_for(SILENCE).fault.is_some());
        (0..8).for_each(|index| fixture.record_activity(index));
        fixture.check_after(1);
        // A peer that becomes silent alone after that times out as usual.
        for _ in 0..SILENCE {
            (1..8).for_each(|index| fixture.record_activity(index));
            let outcome = fixture.check_after(1);
            if !outcome.timed_out.is_empty() {
                assert_eq!(outcome, timed_out(&[0]));
                return;
            }
        }
        panic!("no peer timed out");
    }

    #[test]
    fn a_few_silent_peers_do_not_defer_timeouts() {
        let mut fixture = Fixture::of(7);
        assert_eq!(fixture.run_for(SILENCE).timed_out.len(), 7);
    }

    #[test]
    fn without_a_heartbeat_no_peer_is_probed() {
        let mut fixture = Fixture::of(1);
        fixture.config.heartbeat = Duration::ZERO;
        assert_eq!(fixture.run_for(10 * SILENCE), probed(&[]));
    }

    #[test]
    fn probes_of_peers_that_connected_together_are_spread_out() {
        let mut fixture = Fixture::of(2);
        fixture.config.heartbeat = Duration::from_secs(32);
        fixture.livenesses[1].jitter = 255;
        assert_eq!(fixture.run_for(23), probed(&[]));
        assert_eq!(fixture.run_for(1), probed(&[1]));
        fixture.livenesses[1].on_activity(fixture.now);
        assert_eq!(fixture.run_for(7), probed(&[]));
        assert_eq!(fixture.run_for(1), probed(&[0]));
    }
}
