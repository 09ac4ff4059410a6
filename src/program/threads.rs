//! How many threads do the work.
//!
//! With more than one, each connection is a task and any thread runs it: the relay may use as many
//! cores, and pays for it with calls from thread to thread. With one the swarm polls its
//! connections itself, on the thread that waits for the sockets, and nothing is ever called across
//! threads: a circuit's set-up costs a third less, a relayed gigabyte a tenth.

use std::{future::Future, num::NonZeroUsize, thread};

use async_global_executor::GlobalExecutorConfig;

/// The most that may be asked for: more than any machine has cores.
pub const MOST: usize = 1024;

/// Half of the machine's cores, at least one: the kernel needs the others for the network.
pub fn default() -> usize {
    let cores = thread::available_parallelism().map_or(1, NonZeroUsize::get);
    (cores / 2).max(1)
}

/// Runs `program` to its end on so many threads. To be called once, before anything else uses
/// async-std's executor.
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
    // On those threads, because the one that waits is none of them.
    async_std::task::block_on(async_std::task::spawn(program))
}
