//! A semaphore that limits how many tests run relays at the same time, so that timers hold on a small machine.

use std::{
    num::NonZero,
    sync::{Condvar, Mutex},
    thread,
};

/// Tests wait more than they compute, so each core has two of them.
const PER_CORE: usize = 2;

/// How many tests run relays now.
static RUNNING: Mutex<usize> = Mutex::new(0);
static ENDED: Condvar = Condvar::new();

thread_local! {
    /// Held until the thread ends. Each test has a thread of its own: it needs one permit however many relays it
    /// starts, and cannot wait for itself.
    static PERMIT: Permit = Permit::acquire();
}

/// Waits until the test on this thread may run relays.
pub fn acquire() {
    PERMIT.with(|_| ());
}

struct Permit;

impl Permit {
    fn acquire() -> Self {
        let most = PER_CORE * thread::available_parallelism().map_or(1, NonZero::get);
        let running = RUNNING.lock().expect("no test panics while it is locked");
        *ENDED
            .wait_while(running, |running| *running >= most)
            .expect("no test panics while it is locked") += 1;
        Self
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        *RUNNING.lock().expect("no test panics while it is locked") -= 1;
        ENDED.notify_one();
    }
}
