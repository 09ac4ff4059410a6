//! What the process does on a signal, depending on earlier ones. Sans-IO.

use async_signal::Signal;

/// The signals that the program handles.
pub const SIGNALS: [Signal; 4] = [Signal::Int, Signal::Term, Signal::Hup, Signal::Usr1];

/// What to do on a signal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SignalAction {
    /// Exit at once.
    Exit,
    /// Drain, and exit when no connections are left or the drain timeout is reached.
    DrainAndExit,
    /// Drain, and keep running.
    Drain,
    /// End the drain, and admit clients again.
    Resume,
    /// Reload the settings.
    Reload,
}

/// The state that signals have put the program in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Phase {
    /// Serves clients.
    #[default]
    Serving,
    /// Drains, and keeps running.
    Draining,
    /// Drains, and then exits.
    Exiting,
}

impl Phase {
    /// Handles a signal; `None` if there is nothing to do.
    pub fn on_signal(&mut self, signal: Signal) -> Option<SignalAction> {
        let (next, action) = match (*self, signal) {
            (_, Signal::Int) | (Self::Exiting, Signal::Term) => (Self::Exiting, SignalAction::Exit),
            (_, Signal::Term) => (Self::Exiting, SignalAction::DrainAndExit),
            (Self::Exiting, _) => return None,
            (phase, Signal::Hup) => (phase, SignalAction::Reload),
            (Self::Serving, Signal::Usr1) => (Self::Draining, SignalAction::Drain),
            (Self::Draining, Signal::Usr1) => (Self::Serving, SignalAction::Resume),
            _ => return None,
        };
        *self = next;
        Some(action)
    }
}

/// The name of a signal: "SIGTERM".
pub fn name(signal: Signal) -> String {
    format!("SIG{signal:?}").to_uppercase()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn actions(signals: &[Signal]) -> Vec<Option<SignalAction>> {
        let mut phase = Phase::default();
        signals.iter().map(|signal| phase.on_signal(*signal)).collect()
    }

    #[test]
    fn the_first_sigterm_drains_and_the_second_exits() {
        let twice = actions(&[Signal::Term, Signal::Term]);
        assert_eq!(twice, [Some(SignalAction::DrainAndExit), Some(SignalAction::Exit)]);
        let mixed = actions(&[Signal::Term, Signal::Usr1, Signal::Hup, Signal::Int]);
        assert_eq!(mixed, [Some(SignalAction::DrainAndExit), None, None, Some(SignalAction::Exit)]);
    }

    #[test]
    fn sigint_exits_at_once() {
        assert_eq!(actions(&[Signal::Int]), [Some(SignalAction::Exit)]);
    }

    #[test]
    fn sigusr1_drains_and_resumes_alternately() {
        let usr1 = Signal::Usr1;
        assert_eq!(
            actions(&[usr1, Signal::Hup, usr1, usr1, Signal::Term]),
            [
                Some(SignalAction::Drain),
                Some(SignalAction::Reload),
                Some(SignalAction::Resume),
                Some(SignalAction::Drain),
                Some(SignalAction::DrainAndExit)
            ]
        );
    }
}
