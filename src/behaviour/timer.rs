//! Time limits without a runtime: one timer for all that go on on a connection.
//!
//! A timer of futures-timer wakes a thread when it is set and once more when it is dropped, and
//! nearly all of these limits are set and never reached. So a connection's timer, once set, is left
//! to run, and what starts meanwhile waits for the same one: 4 timers less for each circuit, a tenth
//! of the CPU time of its set-up.

use std::{
    io,
    pin::Pin,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll},
    time::{Duration, Instant},
};

use futures_timer::Delay;
use libp2p::futures::{
    FutureExt,
    future::{self, Either, Future},
    task::AtomicWaker,
};

/// The time limits of one connection, shared by its tasks.
#[derive(Clone, Debug, Default)]
pub(crate) struct Timeouts(Arc<Mutex<Started>>);

#[derive(Debug, Default)]
struct Started {
    /// The timer, and what it is set to: the end of the first limit, or earlier.
    timer: Option<(Delay, Instant)>,
    started: Vec<Arc<Limit>>,
    /// When there are so many, those that nobody waits for any more are forgotten.
    crowded: usize,
}

/// One of them. Ready when the time is over.
#[derive(Debug)]
pub(crate) struct Timeout(Arc<Limit>);

#[derive(Debug)]
struct Limit {
    ends: Instant,
    over: AtomicBool,
    task: AtomicWaker,
}

impl Timeouts {
    /// A limit that ends so long from now, if the connection [polls](Self::poll) for it.
    pub(crate) fn start(&self, limit: Duration) -> Timeout {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if all.started.len() >= all.crowded {
            all.started.retain(|limit| limit.is_waited_for());
            all.crowded = 2 * all.started.len().max(4);
        }
        let now = Instant::now();
        let limit = Arc::new(Limit {
            ends: now + limit,
            over: AtomicBool::new(false),
            task: AtomicWaker::new(),
        });
        all.started.push(Arc::clone(&limit));
        all.be_awake_at(limit.ends, now);
        Timeout(limit)
    }

    /// Ends the limits whose time is over, and has `cx` woken for the next: after the tasks that start some.
    pub(crate) fn poll(&self, cx: &mut Context<'_>) {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        while let Some((timer, _)) = &mut all.timer {
            if timer.poll_unpin(cx).is_pending() {
                return;
            }
            all.timer = None;
            let now = Instant::now();
            all.started.retain(|limit| limit.is_waited_for() && !limit.end_at(now));
            if let Some(next) = all.started.iter().map(|limit| limit.ends).min() {
                all.be_awake_at(next, now);
            }
        }
    }
}

impl Started {
    fn be_awake_at(&mut self, ends: Instant, now: Instant) {
        let left = ends.saturating_duration_since(now);
        match &mut self.timer {
            Some((_, set_to)) if *set_to <= ends => {}
            Some((timer, set_to)) => {
                timer.reset(left);
                *set_to = ends;
            }
            None => self.timer = Some((Delay::new(left), ends)),
        }
    }
}

impl Limit {
    fn is_waited_for(self: &Arc<Self>) -> bool {
        Arc::strong_count(self) > 1
    }

    /// Ends it if its time is over; whether it is.
    fn end_at(&self, now: Instant) -> bool {
        let over = self.ends <= now;
        if over {
            self.over.store(true, Ordering::Release);
            self.task.wake();
        }
        over
    }
}

impl Future for Timeout {
    type Output = ();

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        self.0.task.register(cx.waker());
        match self.0.over.load(Ordering::Acquire) {
            true => Poll::Ready(()),
            false => Poll::Pending,
        }
    }
}

/// What `future` yields, unless the time is over first.
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

    /// What comes of `future` while somebody looks after the limits.
    fn run<T>(limits: &Timeouts, future: impl Future<Output = T>) -> T {
        let mut future = std::pin::pin!(future);
        block_on(poll_fn(|cx| {
            limits.poll(cx);
            future.as_mut().poll(cx)
        }))
    }

    #[test]
    fn what_takes_too_long_is_given_up_whatever_began_before_or_after_it() {
        let limits = Timeouts::default();
        let longer = limits.start(LONG);
        let short = limits.start(SHORT);
        let _later = limits.start(LONG);
        let never = within(short, future::pending::<io::Result<()>>());
        let error = run(&limits, never).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        let limits = limits.0.lock().unwrap();
        assert_eq!(limits.started.len(), 2);
        assert!(limits.timer.as_ref().is_some_and(|(_, set_to)| *set_to == longer.0.ends));
    }

    #[test]
    fn what_is_done_in_time_leaves_the_timer_to_the_next() {
        let limits = Timeouts::default();
        for _ in 0..1000 {
            let limit = limits.start(SHORT);
            assert_eq!(run(&limits, within(limit, future::ready(io::Result::Ok(7)))).unwrap(), 7);
        }
        assert!(limits.0.lock().unwrap().started.len() <= 8, "who is done is forgotten");
        let last = limits.start(SHORT * 2);
        run(&limits, last);
        let limits = limits.0.lock().unwrap();
        assert!(limits.timer.is_none() && limits.started.is_empty());
    }
}
