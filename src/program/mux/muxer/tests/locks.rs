//! While a session is locked, no task is woken, no waker is dropped and no other session is locked.

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

/// The sessions of a test that must not be locked.
#[derive(Clone, Debug, Default)]
pub struct Sessions(Arc<Mutex<Vec<Arc<Shared>>>>);

impl Sessions {
    pub fn add(&self, session: &Arc<Shared>) {
        self.0.lock().unwrap().push(Arc::clone(session));
    }

    /// `task` with wakers that assert that no session is locked.
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

/// The waker passed to one poll.
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
    for ends in
        [[run_muxer as RunEnd, run_muxer], [run_muxer, run_rust_yamux], [run_rust_yamux, run_muxer]]
    {
        let (spawn, spawned) = mpsc::unbounded();
        let checked = Executor::Checked(spawn, Sessions::default());
        block_on(run(spawned, exchange(10 * KIB, ends, [checked.clone(), checked])));
    }
}

/// Another connection, which counts how often it is asked to free memory or to reset a stream.
#[derive(Debug)]
struct Other {
    sessions: Sessions,
    budget: Arc<ConnectionBudget>,
    evictions: AtomicUsize,
}

impl Other {
    fn record_eviction(&self) {
        self.sessions.assert_unlocked();
        self.evictions.fetch_add(1, Ordering::Relaxed);
    }
}

impl Connection for Other {
    fn budget(&self) -> &ConnectionBudget {
        &self.budget
    }

    fn shed(&self, _: Instant) -> usize {
        self.record_eviction();
        let held = self.budget.held();
        self.budget.replace_charge(held, 0);
        held
    }

    fn reset(&self, _: Key) {
        self.record_eviction();
    }

    fn credit(&self) -> usize {
        0
    }
}

fn syn(stream: u32) -> [u8; HEADER] {
    Header { kind: Kind::Data, flags: SYN, stream, length: 0 }.encode()
}

#[test]
fn memory_and_permits_are_taken_from_another_connection_without_a_session_lock() {
    const LIMIT: usize = 1024 * KIB;
    let budget = Budget { inbound: 64, outbound: 64 };
    let limits = StreamLimits { stream_rate: 0, max_streams: 16, ..StreamLimits::default() };
    let memory = MemoryBudget::new(LIMIT, LIMIT, 0);
    let all = Multiplex { memory: memory.clone(), ..Multiplex::new(budget, limits, 64) };
    let multiplex = all.of(&"/ip4/10.0.100.1/tcp/1".parse().unwrap(), None, None);
    let (mut peer, pipe) = pipes(100 * KIB);
    let mut muxer = Muxer::new(pipe, multiplex, Endpoint::Listener);
    let sessions = Sessions::default();
    sessions.add(&muxer.shared);
    let prefix = |host| Some(IpAddr::from([10, 0, host, 1]).into());
    let evictions = AtomicUsize::new(0);
    let other = Arc::new_cyclic(|other: &std::sync::Weak<Other>| {
        let budget = memory.open(prefix(0), other.clone());
        Other { sessions, budget, evictions }
    });
    let evictions = || other.evictions.swap(0, Ordering::Relaxed);
    let cx = &mut Context::from_waker(Waker::noop());

    other.budget.replace_charge(0, 2 * LIMIT);
    block_on(peer.write_all(&syn(1))).unwrap();
    assert!(Pin::new(&mut muxer).poll(cx).is_pending());
    assert!(evictions() > 0, "when bytes arrive");
    let Poll::Ready(Ok(mut stream)) = Pin::new(&mut muxer).poll_inbound(cx) else {
        panic!("no inbound stream");
    };
    other.budget.replace_charge(0, 2 * LIMIT);
    assert!(Pin::new(&mut stream).poll_write(cx, b"!").is_ready());
    assert!(evictions() > 0, "when bytes are written");

    // Eight addresses hold all permits, on streams on which no request has arrived.
    let (mut admission, now) = (all.admission.clone(), Instant::now());
    let mut permits = Vec::new();
    for host in 1..=8 {
        admission.prefix = prefix(host);
        for serial in 0..2 {
            let stream = (other.budget.number, (host.into(), serial));
            permits.push(admission.admit(stream, 4, now).expect("a permit"));
        }
    }
    for stream in 1..=4 {
        block_on(peer.write_all(&syn(2 * stream + 1))).unwrap();
    }
    assert!(Pin::new(&mut muxer).poll(cx).is_pending());
    assert_eq!(evictions(), 1, "when a stream needs a shared permit");
}
