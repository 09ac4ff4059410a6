//! The heartbeat: whom to ask for a sign of life, whom to judge silent, and when the fault is ours.
//!
//! Pure: what was heard and when comes in with `now`; whom to ask and whom to judge goes out.
//!
//! Nobody is judged who did not have the time to answer a question, however long it had been silent
//! before that; and nobody because of a silence that may be our own: after a pass that came late,
//! silences start anew; when most fall silent at once, verdicts wait.

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
pub struct Pulse {
    last_heard: Instant,
    /// Since when a question is open.
    asked: Option<Instant>,
    jitter: u8,
}

impl Pulse {
    /// A connection that was heard of at `now`. `jitter` is any number: it spreads the questions.
    pub fn new(now: Instant, jitter: u8) -> Self {
        Self { last_heard: now, asked: None, jitter }
    }

    /// Something was heard. Whatever was asked is answered with it.
    pub fn heard(&mut self, now: Instant) {
        self.last_heard = now;
        self.asked = None;
    }

    /// A question was put.
    pub fn asked(&mut self, now: Instant) {
        self.asked = Some(now);
    }

    /// A question that is open counts from another time.
    pub fn excuse(&mut self, from: impl Fn(Instant) -> Instant) {
        self.asked = self.asked.map(from);
    }

    /// For how long a question has been open, if one is.
    pub fn asked_for(&self, now: Instant) -> Option<Duration> {
        self.asked.map(|asked| now.saturating_duration_since(asked))
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

/// What one beat found.
#[derive(Debug, PartialEq, Eq)]
pub struct Beat<C> {
    /// Whom to ask for a sign of life.
    pub ask: Vec<C>,
    /// Who is judged silent.
    pub silent: Vec<C>,
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
        watched: impl Iterator<Item = (C, &'a mut Pulse)>,
        now: Instant,
    ) -> Beat<C> {
        let mut beat = Beat { ask: Vec::new(), silent: Vec::new(), fault: None };
        let Config { heartbeat, silence, sweep, .. } = *config;
        if heartbeat.is_zero() {
            return beat;
        }
        let pause = now.saturating_duration_since(self.last_beat);
        self.last_beat = now;
        if pause > sweep + heartbeat {
            let stood_still = watched.map(|(_, pulse)| pulse.heard(now)).count() > 0;
            beat.fault = stood_still.then_some(Fault::Late(pause));
            return beat;
        }

        let time_to_answer = silence.saturating_sub(heartbeat);
        let mut due = Vec::new();
        let (mut count, mut soon_due) = (0, 0);
        for (id, pulse) in watched {
            count += 1;
            let silent_for = pulse.silent_for(now);
            if let Some(asked_for) = pulse.asked_for(now) {
                soon_due += usize::from(silent_for + heartbeat >= silence);
                // A connection that nobody watched until now may have been quiet for hours.
                if silent_for >= silence && asked_for >= time_to_answer {
                    due.push((id, pulse));
                }
            } else if silent_for >= first_question(heartbeat, pulse.jitter) {
                pulse.asked(now);
                beat.ask.push(id);
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
                beat.ask.extend(due.into_iter().map(|(id, _)| id));
                return beat;
            }
            _ => {}
        }
        beat.silent.extend(due.into_iter().map(|(id, _)| id));
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
        pulses: Vec<Pulse>,
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
                pulses: (0..count).map(|_| Pulse::new(now, 0)).collect(),
                now,
            }
        }

        fn beat_after(&mut self, seconds: u64) -> Beat<usize> {
            self.now += Duration::from_secs(seconds);
            self.heartbeat.beat(&self.config, self.pulses.iter_mut().enumerate(), self.now)
        }

        /// All that was found in so many seconds.
        fn pass(&mut self, seconds: u64) -> Beat<usize> {
            let mut all = self.beat_after(1);
            for _ in 1..seconds {
                let beat = self.beat_after(1);
                all.ask.extend(beat.ask);
                all.silent.extend(beat.silent);
                all.fault = all.fault.or(beat.fault);
            }
            all
        }

        fn hear(&mut self, who: usize) {
            self.pulses[who].heard(self.now);
        }
    }

    fn asked(who: &[usize]) -> Beat<usize> {
        found(who, &[])
    }

    fn judged(who: &[usize]) -> Beat<usize> {
        found(&[], who)
    }

    fn found(ask: &[usize], silent: &[usize]) -> Beat<usize> {
        Beat { ask: ask.into(), silent: silent.into(), fault: None }
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
        let quiet = ward.pulses.split_off(0);
        ward.pass(10 * SILENCE);
        ward.pulses = quiet;
        assert_eq!(ward.pass(1), asked(&[0]));
        assert_eq!(ward.pass(SILENCE - HEARTBEAT - 1), asked(&[]));
        assert_eq!(ward.pass(1), judged(&[0]));
    }

    #[test]
    fn a_question_that_was_put_anew_gives_the_usual_time_to_answer() {
        let mut ward = Ward::of(1);
        assert_eq!(ward.pass(SILENCE - 1), asked(&[0]));
        ward.pulses[0].asked(ward.now);
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
        assert!(late.ask.is_empty() && late.silent.is_empty());
        assert_eq!(ward.pass(HEARTBEAT - 1), asked(&[]));
        assert_eq!(ward.pass(1), asked(&[0, 1, 2]));
    }

    #[test]
    fn when_most_fall_silent_at_once_their_verdict_waits_for_one_more_limit() {
        let mut ward = Ward::of(15);
        for _ in 0..SILENCE - 1 {
            assert!(ward.beat_after(1).silent.is_empty());
            (8..15).for_each(|who| ward.hear(who));
        }
        let beat = ward.beat_after(1);
        let (silent, watched) = (8, 15);
        assert_eq!(beat.fault, Some(Fault::Link { silent, watched }));
        assert!(beat.silent.is_empty());
        assert_eq!(beat.ask.len(), 8, "asked anew");

        // Two were there all the time. The others are judged, without a second warning.
        ward.hear(0);
        ward.hear(1);
        for _ in 0..SILENCE - 1 {
            let beat = ward.beat_after(1);
            assert!(beat.silent.is_empty() && beat.fault.is_none());
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
            if !beat.silent.is_empty() {
                assert_eq!(beat, judged(&[0]));
                return;
            }
        }
        panic!("nobody was judged");
    }

    #[test]
    fn a_few_that_fall_silent_are_no_sign_of_a_broken_link() {
        let mut ward = Ward::of(7);
        assert_eq!(ward.pass(SILENCE).silent.len(), 7);
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
