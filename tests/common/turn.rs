//! A semaphore: how many tests run relays at the same time, so that relays keep their time on a small machine.

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
    /// Held until the thread ends, which a test has to itself: a test that starts its relay anew does not wait
    /// again, and one that starts several cannot wait for itself.
    static PERMIT: Permit = Permit::wait();
}

/// Waits until the test on this thread may run relays.
pub fn wait() {
    PERMIT.with(|_| ());
}

struct Permit;

impl Permit {
    fn wait() -> Self {
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
