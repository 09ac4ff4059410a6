//! What the operator's signals ask for, by what was asked before. Pure.

use async_signal::Signal;

/// The signals that are listened to.
pub const SIGNALS: [Signal; 4] = [Signal::Int, Signal::Term, Signal::Hup, Signal::Usr1];

/// What the relay is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// End at once.
    End,
    /// Drain, and end when nobody is left or the time is over.
    DrainAndEnd,
    /// Drain, and stay.
    Drain,
    /// Take clients in again.
    Resume,
    /// Read the configuration again.
    Reload,
}

/// What was asked so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Phase {
    /// Nothing: it serves.
    #[default]
    Serving,
    /// To drain.
    Draining,
    /// To drain and end.
    Ending,
}

impl Phase {
    /// What this signal asks for; `None`: nothing that is not under way.
    pub fn order(&mut self, signal: Signal) -> Option<Order> {
        let (next, order) = match (*self, signal) {
            (_, Signal::Int) | (Self::Ending, Signal::Term) => (Self::Ending, Order::End),
            (_, Signal::Term) => (Self::Ending, Order::DrainAndEnd),
            (Self::Ending, _) => return None,
            (phase, Signal::Hup) => (phase, Order::Reload),
            (Self::Serving, Signal::Usr1) => (Self::Draining, Order::Drain),
            (Self::Draining, Signal::Usr1) => (Self::Serving, Order::Resume),
            _ => return None,
        };
        *self = next;
        Some(order)
    }
}

/// A signal's name.
pub fn name(signal: Signal) -> &'static str {
    match signal {
        Signal::Int => "SIGINT",
        Signal::Term => "SIGTERM",
        Signal::Hup => "SIGHUP",
        Signal::Usr1 => "SIGUSR1",
        _ => "a signal",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn orders(signals: &[Signal]) -> Vec<Option<Order>> {
        let mut phase = Phase::default();
        signals.iter().map(|signal| phase.order(*signal)).collect()
    }

    #[test]
    fn the_first_sigterm_drains_and_the_second_ends_it() {
        let twice = orders(&[Signal::Term, Signal::Term]);
        assert_eq!(twice, [Some(Order::DrainAndEnd), Some(Order::End)]);
        let mixed = orders(&[Signal::Term, Signal::Usr1, Signal::Hup, Signal::Int]);
        assert_eq!(mixed, [Some(Order::DrainAndEnd), None, None, Some(Order::End)]);
    }

    #[test]
    fn sigint_ends_it_at_once() {
        assert_eq!(orders(&[Signal::Int]), [Some(Order::End)]);
    }

    #[test]
    fn sigusr1_drains_and_resumes_by_turns() {
        let usr1 = Signal::Usr1;
        assert_eq!(
            orders(&[usr1, Signal::Hup, usr1, usr1, Signal::Term]),
            [
                Some(Order::Drain),
                Some(Order::Reload),
                Some(Order::Resume),
                Some(Order::Drain),
                Some(Order::DrainAndEnd)
            ]
        );
    }
}
