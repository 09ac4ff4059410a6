//! Under the lock of a session no task is woken, no waker dropped, and no other session locked.

use std::{
    net::IpAddr,
    sync::atomic::{AtomicUsize, Ordering},
    task::Wake,
};

use super::*;
use crate::program::mux::{
    budget::{Connection, ConnectionBudget},
    frame::{Header, Kind, SYN},
    stream_limits::Key,
};

/// The sessions of a test.
#[derive(Clone, Debug, Default)]
pub struct Sessions(Arc<Mutex<Vec<Arc<Shared>>>>);

impl Sessions {
    pub fn add(&self, session: &Arc<Shared>) {
        self.0.lock().unwrap().push(Arc::clone(session));
    }

    /// The task, whose wakers see to it that no session is locked.
    pub fn checked(
        &self,
        task: impl Future<Output = ()> + Send + 'static,
    ) -> impl Future<Output = ()> + Send + 'static {
        let (mut task, sessions) = (task.boxed(), self.clone());
        poll_fn(move |cx| {
            let (inner, sessions) = (cx.waker().clone(), sessions.clone());
            let waker = Waker::from(Arc::new(Checked { inner, sessions }));
            task.poll_unpin(&mut Context::from_waker(&waker))
        })
    }

    fn assert_unlocked(&self) {
        if thread::panicking() {
            return;
        }
        let is_locked = self.0.lock().unwrap().iter().any(|session| session.is_locked());
        assert!(!is_locked, "a session is locked");
    }
}

/// A waker of its own for each poll.
struct Checked {
    inner: Waker,
    sessions: Sessions,
}

impl Wake for Checked {
    fn wake(self: Arc<Self>) {
        self.sessions.assert_unlocked();
        self.inner.wake_by_ref();
    }
}

impl Drop for Checked {
    fn drop(&mut self) {
        self.sessions.assert_unlocked();
    }
}

#[test]
fn no_task_is_woken_and_no_waker_dropped_while_a_session_is_locked() {
    for ends in [[ours as Run, ours], [ours, theirs], [theirs, ours]] {
        let (spawn, spawned) = mpsc::unbounded();
        let checked = Executor::Checked(spawn, Sessions::default());
        block_on(run(spawned, exchange(10 * KIB, ends, [checked.clone(), checked])));
    }
}

/// Another connection, which is asked for memory and for permits.
#[derive(Debug)]
struct Other {
    sessions: Sessions,
    budget: Arc<ConnectionBudget>,
    asked: AtomicUsize,
}

impl Other {
    fn is_asked(&self) {
        self.sessions.assert_unlocked();
        self.asked.fetch_add(1, Ordering::Relaxed);
    }
}

impl Connection for Other {
    fn budget(&self) -> &ConnectionBudget {
        &self.budget
    }

    fn shed(&self, _: Instant) -> usize {
        self.is_asked();
        let held = self.budget.held();
        self.budget.release(held);
        held
    }

    fn reset(&self, _: Key) {
        self.is_asked();
    }

    fn credit(&self) -> usize {
        0
    }
}

fn syn(stream: u32) -> [u8; HEADER] {
    Header { kind: Kind::Data, flags: SYN, stream, length: 0 }.encode()
}

#[test]
fn another_connection_is_asked_for_memory_and_permits_while_no_session_is_locked() {
    const LIMIT: usize = 1024 * KIB;
    let budget = Budget { inbound: 64, outbound: 64 };
    let limits = StreamLimits { stream_rate: 0, max_streams: 16, ..StreamLimits::default() };
    let memory = MemoryBudget::new(LIMIT, LIMIT, 0);
    let all = Multiplex { memory: memory.clone(), ..Multiplex::new(budget, limits, 64) };
    let multiplex = all.of(&"/ip4/10.0.100.1/tcp/1".parse().unwrap(), None, None);
    let (mut peer, pipe) = pipes(100 * KIB);
    let mut muxer = Muxer::new(pipe, multiplex, Role::Server);
    let sessions = Sessions::default();
    sessions.add(&muxer.shared);
    let prefix = |host| Some(IpAddr::from([10, 0, host, 1]).into());
    let asked = AtomicUsize::new(0);
    let other = Arc::new_cyclic(|other: &std::sync::Weak<Other>| {
        let budget = memory.open(prefix(0), other.clone());
        Other { sessions, budget, asked }
    });
    let asked = || other.asked.swap(0, Ordering::Relaxed);
    let cx = &mut Context::from_waker(Waker::noop());

    other.budget.charge(2 * LIMIT);
    block_on(peer.write_all(&syn(1))).unwrap();
    assert!(Pin::new(&mut muxer).poll(cx).is_pending());
    assert!(asked() > 0, "as bytes come");
    let Poll::Ready(Ok(mut stream)) = Pin::new(&mut muxer).poll_inbound(cx) else {
        panic!("it was opened");
    };
    other.budget.charge(2 * LIMIT);
    assert!(Pin::new(&mut stream).poll_write(cx, b"!").is_ready());
    assert!(asked() > 0, "as bytes are written");

    // Eight addresses have all permits, on streams on which no request has come.
    let (mut admission, now) = (all.admission.clone(), Instant::now());
    let mut permits = Vec::new();
    for host in 1..=8 {
        for serial in 0..2 {
            let stream = (other.budget.number, (host.into(), serial));
            permits.push(admission.admit(stream, 4, prefix(host), now).expect("a permit"));
        }
    }
    for stream in 1..=4 {
        block_on(peer.write_all(&syn(2 * stream + 1))).unwrap();
    }
    assert!(Pin::new(&mut muxer).poll(cx).is_pending());
    assert_eq!(asked(), 1, "as a stream is opened beyond its own permits");
}
