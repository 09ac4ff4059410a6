//! Under the lock of a session no task is woken, no waker dropped, and no other session locked.

use std::{
    net::IpAddr,
    sync::atomic::{AtomicUsize, Ordering},
    task::Wake,
};

use super::*;
use crate::program::mux::{
    budget::ConnectionBudget,
    frame::{Flags, Header, Kind},
    permits::{OWN, Reset},
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

impl Shed for Other {
    fn budget(&self) -> &ConnectionBudget {
        &self.budget
    }

    fn shed(&self, _: Instant) -> usize {
        self.is_asked();
        let held = self.budget.held();
        self.budget.release(held);
        held
    }

    fn credit(&self) -> usize {
        0
    }
}

impl Reset for Other {
    fn reset(&self, _: u64) {
        self.is_asked();
    }
}

fn syn(stream: u32) -> [u8; HEADER] {
    Header { kind: Kind::Data, flags: Flags::SYN, stream, length: 0 }.encode()
}

#[test]
fn another_connection_is_asked_for_memory_and_permits_while_no_session_is_locked() {
    const LIMIT: usize = 1024 * KIB;
    let budget = Budget { inbound: 64, outbound: 64 };
    let limits = StreamLimits { stream_rate: 0, ..StreamLimits::default() };
    let pool = SharedPool::new(16);
    let memory = MemoryBudget::new(LIMIT, LIMIT, 0);
    let multiplex = Multiplex {
        memory: memory.clone(),
        shared_pool: pool.clone(),
        ..Multiplex::new(budget, limits, 64)
    };
    let multiplex = multiplex.of(&"/ip4/10.0.100.1/tcp/1".parse().unwrap(), None, None);
    let (mut peer, pipe) = pipes(100 * KIB);
    let mut muxer = Muxer::new(pipe, &multiplex, Role::Server);
    let sessions = Sessions::default();
    sessions.add(&muxer.shared);
    let prefix = |host| Some(IpAddr::from([10, 0, host, 1]).into());
    let asked = AtomicUsize::new(0);
    let other = Arc::new(Other { sessions, budget: memory.open(prefix(0)), asked });
    memory.register(&other);
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
    let permits = (1..=8).flat_map(|host| {
        let permits = StreamPermits::shared(OWN + 2, pool.clone(), prefix(host));
        (0..OWN + 2).map_while(move |_| StreamPermit::take(&permits))
    });
    let permits: Vec<_> = permits.collect();
    for permit in &permits {
        let session: std::sync::Weak<Other> = Arc::downgrade(&other);
        permit.set_stream(session, 0);
    }
    for stream in 1..=OWN as u32 {
        block_on(peer.write_all(&syn(2 * stream + 1))).unwrap();
    }
    assert!(Pin::new(&mut muxer).poll(cx).is_pending());
    assert_eq!(asked(), 1, "as a stream is opened beyond its own permits");
}
