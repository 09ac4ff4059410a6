//! The heartbeat: which connections to probe, which have timed out, and when the fault is ours.
//!
//! Sans-IO: what was heard and when comes in with `now`; what to probe and what has timed out goes out.
//!
//! No connection times out that did not have the time to answer a probe, however long it had been silent
//! before that; and none because of a silence that may be our own: after a pass that came late, liveness
//! timers are reset; when most fall silent at once, verdicts wait.

use std::{
    fmt,
    time::{Duration, Instant},
};

use crate::config::Config;

/// So many that fall silent together may be our own link's fault, if they are most of the watched.
const MANY: usize = 8;

/// How often the operator is told at most that the link may be down.
const TELL_AGAIN: Duration = Duration::from_secs(60 * 60);

/// What is known of one watched connection.
#[derive(Debug)]
pub struct Liveness {
    last_heard: Instant,
    /// Since when it has been probed without an answer.
    probed: Option<Instant>,
    jitter: u8,
}

impl Liveness {
    /// A connection that was heard of at `now`. `jitter` is any number: it spreads the probes.
    pub fn new(now: Instant, jitter: u8) -> Self {
        Self { last_heard: now, probed: None, jitter }
    }

    /// Something was heard: whatever it was, it answers an open probe.
    pub fn on_activity(&mut self, now: Instant) {
        self.last_heard = now;
        self.probed = None;
    }

    /// It was probed.
    pub fn on_probe(&mut self, now: Instant) {
        self.probed = Some(now);
    }

    /// An open probe counts from another time.
    pub fn excuse(&mut self, from: impl Fn(Instant) -> Instant) {
        self.probed = self.probed.map(from);
    }

    /// For how long a probe has been open, if one is.
    pub fn probed_for(&self, now: Instant) -> Option<Duration> {
        self.probed.map(|since| now.saturating_duration_since(since))
    }

    /// For how long nothing was heard.
    pub fn silent_for(&self, now: Instant) -> Duration {
        now.saturating_duration_since(self.last_heard)
    }
}

/// When the relay looked last, and whether it doubts its own link.
#[derive(Debug)]
pub struct Heartbeat {
    last_beat: Instant,
    /// Verdicts wait until then, because most fell silent at once.
    doubt: Option<Instant>,
    /// When the operator was told so last.
    told: Option<Instant>,
}

/// The outcome of one heartbeat.
#[derive(Debug, PartialEq, Eq)]
pub struct HeartbeatOutcome<C> {
    /// The connections to probe.
    pub probe: Vec<C>,
    /// The connections that have timed out.
    pub timed_out: Vec<C>,
    /// What the operator should know.
    pub fault: Option<Fault>,
}

/// Why the silence may be our own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// So many of all that are watched fell silent at once.
    Link {
        /// So many.
        silent: usize,
        /// Of these.
        watched: usize,
    },
    /// The beat came so much later than the one before: the process or the machine was stopped.
    Late(Duration),
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Link { silent, watched } => write!(
                f,
                "{silent} of {watched} watched connections fell silent at once: is this relay's \
                 own link down? Nobody is judged for one more silence limit"
            ),
            Self::Late(pause) => write!(
                f,
                "the relay stood still for {} s: all silences start anew",
                pause.as_secs()
            ),
        }
    }
}

impl Heartbeat {
    /// The heartbeat of a relay that starts at `now`.
    pub fn new(now: Instant) -> Self {
        Self { last_beat: now, doubt: None, told: None }
    }

    /// Another configuration holds from `now` on: the time since the last beat says nothing about a pause.
    pub fn restart(&mut self, now: Instant) {
        self.last_beat = now;
    }

    /// Looks at all that are watched.
    pub fn beat<'a, C>(
        &mut self,
        config: &Config,
        watched: impl Iterator<Item = (C, &'a mut Liveness)>,
        now: Instant,
    ) -> HeartbeatOutcome<C> {
        let mut beat = HeartbeatOutcome { probe: Vec::new(), timed_out: Vec::new(), fault: None };
        let Config { heartbeat, silence, sweep, .. } = *config;
        if heartbeat.is_zero() {
            return beat;
        }
        let pause = now.saturating_duration_since(self.last_beat);
        self.last_beat = now;
        if pause > sweep + heartbeat {
            let stood_still = watched.map(|(_, liveness)| liveness.on_activity(now)).count() > 0;
            beat.fault = stood_still.then_some(Fault::Late(pause));
            return beat;
        }

        let time_to_answer = silence.saturating_sub(heartbeat);
        let mut due = Vec::new();
        let (mut count, mut soon_due) = (0, 0);
        for (id, liveness) in watched {
            count += 1;
            let silent_for = liveness.silent_for(now);
            if let Some(probed_for) = liveness.probed_for(now) {
                soon_due += usize::from(silent_for + heartbeat >= silence);
                // A connection that nobody watched until now may have been quiet for hours.
                if silent_for >= silence && probed_for >= time_to_answer {
                    due.push((id, liveness));
                }
            } else if silent_for >= first_question(heartbeat, liveness.jitter) {
                liveness.on_probe(now);
                beat.probe.push(id);
            }
        }

        let most = soon_due >= MANY && soon_due * 2 > count;
        match self.doubt {
            Some(until) if now < until => return beat,
            Some(_) if due.is_empty() => self.doubt = None,
            None if most && !due.is_empty() => {
                self.doubt = Some(now + silence);
                // Once an hour: strangers can fall silent together as often as they like.
                let last = self.told.map(|told| now.saturating_duration_since(told));
                if last.is_none_or(|last| last > TELL_AGAIN) {
                    self.told = Some(now);
                    beat.fault = Some(Fault::Link { silent: soon_due, watched: count });
                }
                // The question may have been lost with the link.
                beat.probe.extend(due.into_iter().map(|(id, _)| id));
                return beat;
            }
            _ => {}
        }
        beat.timed_out.extend(due.into_iter().map(|(id, _)| id));
        beat
    }
}

/// After how much silence the question comes: up to a quarter of the heartbeat early, so that those
/// who came together are not asked together.
fn first_question(heartbeat: Duration, jitter: u8) -> Duration {
    heartbeat - heartbeat / 4 * u32::from(jitter) / 255
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEARTBEAT: u64 = 30;
    const SILENCE: u64 = 60;

    /// Some connections that are watched, and seconds that pass by the sweep.
    struct Ward {
        heartbeat: Heartbeat,
        config: Config,
        livenesses: Vec<Liveness>,
        now: Instant,
    }

    impl Ward {
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

        fn beat_after(&mut self, seconds: u64) -> HeartbeatOutcome<usize> {
            self.now += Duration::from_secs(seconds);
            self.heartbeat.beat(&self.config, self.livenesses.iter_mut().enumerate(), self.now)
        }

        /// All that was found in so many seconds.
        fn pass(&mut self, seconds: u64) -> HeartbeatOutcome<usize> {
            let mut all = self.beat_after(1);
            for _ in 1..seconds {
                let beat = self.beat_after(1);
                all.probe.extend(beat.probe);
                all.timed_out.extend(beat.timed_out);
                all.fault = all.fault.or(beat.fault);
            }
            all
        }

        fn hear(&mut self, who: usize) {
            self.livenesses[who].on_activity(self.now);
        }
    }

    fn asked(who: &[usize]) -> HeartbeatOutcome<usize> {
        found(who, &[])
    }

    fn judged(who: &[usize]) -> HeartbeatOutcome<usize> {
        found(&[], who)
    }

    fn found(ask: &[usize], silent: &[usize]) -> HeartbeatOutcome<usize> {
        HeartbeatOutcome { probe: ask.into(), timed_out: silent.into(), fault: None }
    }

    #[test]
    fn who_is_silent_for_a_heartbeat_is_asked_once_and_judged_at_the_limit() {
        let mut ward = Ward::of(1);
        assert_eq!(ward.pass(HEARTBEAT - 1), asked(&[]));
        assert_eq!(ward.pass(1), asked(&[0]));
        assert_eq!(ward.pass(SILENCE - HEARTBEAT - 1), asked(&[]));
        assert_eq!(ward.pass(1), judged(&[0]));
    }

    #[test]
    fn who_talks_is_never_asked() {
        let mut ward = Ward::of(2);
        for _ in 0..20 {
            assert_eq!(ward.pass(HEARTBEAT - 1), asked(&[]));
            ward.hear(0);
            ward.hear(1);
        }
    }

    #[test]
    fn who_answers_late_but_in_time_is_not_judged() {
        let mut ward = Ward::of(1);
        assert_eq!(ward.pass(SILENCE - 1), asked(&[0]));
        ward.hear(0);
        assert_eq!(ward.pass(HEARTBEAT - 1), asked(&[]));
        assert_eq!(ward.pass(1), asked(&[0]));
    }

    #[test]
    fn nobody_is_judged_without_a_question() {
        let mut ward = Ward::of(1);
        // As far apart as beats may be without being late: the limit is over before the first.
        ward.config.sweep = Duration::from_secs(SILENCE);
        assert_eq!(ward.beat_after(SILENCE + 1), asked(&[0]));
    }

    #[test]
    fn who_was_quiet_for_long_before_it_was_watched_has_the_usual_time_to_answer() {
        let mut ward = Ward::of(1);
        let quiet = ward.livenesses.split_off(0);
        ward.pass(10 * SILENCE);
        ward.livenesses = quiet;
        assert_eq!(ward.pass(1), asked(&[0]));
        assert_eq!(ward.pass(SILENCE - HEARTBEAT - 1), asked(&[]));
        assert_eq!(ward.pass(1), judged(&[0]));
    }

    #[test]
    fn a_question_that_was_put_anew_gives_the_usual_time_to_answer() {
        let mut ward = Ward::of(1);
        assert_eq!(ward.pass(SILENCE - 1), asked(&[0]));
        ward.livenesses[0].on_probe(ward.now);
        assert_eq!(ward.pass(SILENCE - HEARTBEAT - 1), asked(&[]));
        assert_eq!(ward.pass(1), judged(&[0]));
    }

    #[test]
    fn a_beat_that_comes_late_starts_all_silences_anew() {
        let mut ward = Ward::of(3);
        ward.pass(SILENCE - 1);
        let pause = HEARTBEAT + 2;
        let late = ward.beat_after(pause);
        assert_eq!(late.fault, Some(Fault::Late(Duration::from_secs(pause))));
        assert!(late.probe.is_empty() && late.timed_out.is_empty());
        assert_eq!(ward.pass(HEARTBEAT - 1), asked(&[]));
        assert_eq!(ward.pass(1), asked(&[0, 1, 2]));
    }

    #[test]
    fn when_most_fall_silent_at_once_their_verdict_waits_for_one_more_limit() {
        let mut ward = Ward::of(15);
        for _ in 0..SILENCE - 1 {
            assert!(ward.beat_after(1).timed_out.is_empty());
            (8..15).for_each(|who| ward.hear(who));
        }
        let beat = ward.beat_after(1);
        let (silent, watched) = (8, 15);
        assert_eq!(beat.fault, Some(Fault::Link { silent, watched }));
        assert!(beat.timed_out.is_empty());
        assert_eq!(beat.probe.len(), 8, "asked anew");

        // Two were there all the time. The others are judged, without a second warning.
        ward.hear(0);
        ward.hear(1);
        for _ in 0..SILENCE - 1 {
            let beat = ward.beat_after(1);
            assert!(beat.timed_out.is_empty() && beat.fault.is_none());
            (8..15).for_each(|who| ward.hear(who));
        }
        ward.hear(0);
        ward.hear(1);
        assert_eq!(ward.beat_after(1), judged(&[2, 3, 4, 5, 6, 7]));
    }

    #[test]
    fn doubt_ends_when_the_link_is_back() {
        let mut ward = Ward::of(8);
        assert!(ward.pass(SILENCE).fault.is_some());
        (0..8).for_each(|who| ward.hear(who));
        ward.beat_after(1);
        // Whoever falls silent alone after that is judged in the usual time.
        for _ in 0..SILENCE {
            (1..8).for_each(|who| ward.hear(who));
            let beat = ward.beat_after(1);
            if !beat.timed_out.is_empty() {
                assert_eq!(beat, judged(&[0]));
                return;
            }
        }
        panic!("nobody was judged");
    }

    #[test]
    fn a_few_that_fall_silent_are_no_sign_of_a_broken_link() {
        let mut ward = Ward::of(7);
        assert_eq!(ward.pass(SILENCE).timed_out.len(), 7);
    }

    #[test]
    fn without_a_heartbeat_nobody_is_asked() {
        let mut ward = Ward::of(1);
        ward.config.heartbeat = Duration::ZERO;
        assert_eq!(ward.pass(10 * SILENCE), asked(&[]));
    }

    #[test]
    fn those_who_came_together_are_not_asked_together() {
        let heartbeat = Duration::from_secs(32);
        assert_eq!(first_question(heartbeat, 0), heartbeat);
        assert_eq!(first_question(heartbeat, 255), Duration::from_secs(24));
    }
}
