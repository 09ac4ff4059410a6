//! Time limits without a runtime: one timer for all tasks of a connection.
//!
//! A timer of futures-timer wakes a thread when it is set and again when it is dropped, and nearly all of these limits
//! are set and never reached. So a connection's timer, once set, is left to run, and later limits use the same one. That
//! saves 4 timers for each circuit, a tenth of the CPU time of its set-up.

use std::{
    io,
    sync::{Arc, Mutex, PoisonError},
    task::Context,
    time::{Duration, Instant},
};

use futures_timer::Delay;
use libp2p::futures::{
    FutureExt,
    channel::oneshot,
    future::{self, Either, Future},
};

/// The time limits of one connection, shared by its tasks.
#[derive(Clone, Debug, Default)]
pub(crate) struct Timeouts(Arc<Mutex<Started>>);

#[derive(Debug, Default)]
struct Started {
    /// The timer, and what it is set to: the end of the first limit, or earlier.
    timer: Option<(Delay, Instant)>,
    /// When each limit ends. Dropping the sender ends it.
    limits: Vec<(Instant, oneshot::Sender<()>)>,
    /// At this many limits, those that were dropped are forgotten.
    prune_at: usize,
}

/// One time limit. Ready when it is reached.
pub(crate) type Timeout = oneshot::Receiver<()>;

impl Timeouts {
    /// Starts a limit of this duration. It ends when the connection [polls](Self::poll) for it.
    pub(crate) fn start(&self, duration: Duration) -> Timeout {
        let mut started = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        // 1. Forget limits that were dropped.
        if started.limits.len() >= started.prune_at {
            started.limits.retain(|(_, limit)| !limit.is_canceled());
            started.prune_at = 2 * started.limits.len().max(4);
        }
        // 2. Add this one.
        let ends = Instant::now() + duration;
        let (limit, timeout) = oneshot::channel();
        started.limits.push((ends, limit));
        // 3. Set the timer, unless it fires earlier anyway.
        let (timer, set_to) = started.timer.get_or_insert_with(|| (Delay::new(duration), ends));
        if ends < *set_to {
            timer.reset(duration);
            *set_to = ends;
        }
        timeout
    }

    /// Ends the limits that are reached, and has `cx` woken for the next. To be called after the tasks that start some.
    pub(crate) fn poll(&self, cx: &mut Context<'_>) {
        let mut started = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        while let Some((timer, _)) = &mut started.timer
            && timer.poll_unpin(cx).is_ready()
        {
            let now = Instant::now();
            started.limits.retain(|(ends, limit)| *ends > now && !limit.is_canceled());
            let next = started.limits.iter().map(|(ends, _)| *ends).min();
            started.timer = next.map(|at| (Delay::new(at.saturating_duration_since(now)), at));
        }
    }
}

/// The result of `future`, or an error of the kind `TimedOut` when the limit is reached first.
pub(crate) async fn within<T, E: From<io::Error>>(
    limit: Timeout,
    future: impl Future<Output = Result<T, E>>,
) -> Result<T, E> {
    match future::select(std::pin::pin!(future), limit).await {
        Either::Left((value, _)) => value,
        Either::Right(_) => Err(io::Error::from(io::ErrorKind::TimedOut).into()),
    }
}

#[cfg(test)]
mod tests {
    use libp2p::futures::{executor::block_on, future::poll_fn};

    use super::*;

    const SHORT: Duration = Duration::from_millis(20);
    const LONG: Duration = Duration::from_secs(3600);

    /// Runs `future` to completion while polling `limits`.
    fn run<T>(limits: &Timeouts, future: impl Future<Output = T>) -> T {
        let mut future = std::pin::pin!(future);
        block_on(poll_fn(|cx| {
            limits.poll(cx);
            future.as_mut().poll(cx)
        }))
    }

    #[test]
    fn each_task_times_out_independently_of_the_others() {
        let limits = Timeouts::default();
        let _longer = limits.start(LONG);
        let short = limits.start(SHORT);
        let _later = limits.start(LONG);
        let never = within(short, future::pending::<io::Result<()>>());
        let error = run(&limits, never).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        let limits = limits.0.lock().unwrap();
        assert_eq!(limits.limits.len(), 2);
        assert!(limits.timer.as_ref().is_some_and(|(_, set_to)| *set_to == limits.limits[0].0));
    }

    #[test]
    fn a_finished_task_leaves_the_timer_to_the_next_one() {
        let limits = Timeouts::default();
        for _ in 0..1000 {
            let limit = limits.start(SHORT);
            assert_eq!(run(&limits, within(limit, future::ready(io::Result::Ok(7)))).unwrap(), 7);
        }
        assert!(limits.0.lock().unwrap().limits.len() <= 8, "finished tasks are removed");
        let last = limits.start(SHORT * 2);
        let _ = run(&limits, last);
        let limits = limits.0.lock().unwrap();
        assert!(limits.timer.is_none() && limits.limits.is_empty());
    }
}
