//! The threads of the async runtime.
//!
//! With several threads each connection is a task that any of them runs: the relay uses as many cores, at the cost of
//! wake-ups across threads. With one thread the swarm polls its connections itself, on the thread that waits for the
//! sockets: setting up a circuit then costs a third less CPU time, and relaying a gigabyte a tenth less.

use std::{future::Future, num::NonZeroUsize, thread};

use async_global_executor::GlobalExecutorConfig;

/// The most threads that can be configured: more than any machine has cores.
pub const MAX_THREADS: usize = 1024;

/// Half of the machine's cores, at least one: the kernel needs the others for the network.
pub fn default_threads() -> usize {
    let cores = thread::available_parallelism().map_or(1, NonZeroUsize::get);
    (cores / 2).max(1)
}

/// Runs `program` to its end on this many threads. Call it once, before anything else uses async-std's executor.
pub fn run<T: Send + 'static>(
    threads: usize,
    program: impl Future<Output = T> + Send + 'static,
) -> T {
    if threads == 1 {
        return async_io::block_on(program);
    }
    let config = GlobalExecutorConfig::default()
        .with_min_threads(threads)
        .with_max_threads(threads)
        .with_thread_name_fn(|| "relaylet".into());
    async_global_executor::init_with_config(config);
    // Spawned, because this thread is not one of the executor's.
    async_std::task::block_on(async_std::task::spawn(program))
}
