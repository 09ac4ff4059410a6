//! How many threads do the work, and what the allocator keeps for them.
//!
//! With more than one, each connection is a task and any thread runs it: the relay may use as many
//! cores, and pays for it with calls from thread to thread. With one the swarm polls its
//! connections itself, on the thread that waits for the sockets, and nothing is ever called across
//! threads: a circuit's set-up costs a third less, a relayed gigabyte a tenth.

use std::{future::Future, hint::black_box, num::NonZeroUsize, thread};

use async_global_executor::GlobalExecutorConfig;

/// The most that may be asked for: more than any machine has cores.
pub const MOST: usize = 1024;

/// Twice as much is kept, at most, of what a thread freed at the top of its heap.
const KEPT: usize = 4 * 1024 * 1024;

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

/// Has the C library keep what is freed, up to a few MiB.
///
/// Glibc returns memory as soon as 128 KiB are free at the top of a heap. Bulk frees that much
/// with every other frame, and pays for the same pages again with the next. The largest block that
/// was freed moves that threshold (`M_MMAP_THRESHOLD` in mallopt(3)); it need never be touched,
/// and other C libraries do not care. Gained: a tenth of the CPU time of a relayed gigabyte.
pub fn keep_what_is_freed() {
    drop(black_box(Vec::<u8>::with_capacity(KEPT)));
}
