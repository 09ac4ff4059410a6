//! The threads of the async runtime, and what the allocator keeps for them.
//!
//! With several threads each connection is a task that any of them runs: the relay uses as many cores, at the cost of
//! wake-ups across threads. With one thread the swarm polls its connections itself, on the thread that waits for the
//! sockets: setting up a circuit then costs a third less CPU time, and relaying a gigabyte a tenth less.

use std::{future::Future, hint::black_box, num::NonZeroUsize, thread};

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

/// Makes the C library keep freed memory, so many bytes at the top of each thread's heap.
///
/// Glibc returns memory to the kernel as soon as 128 KiB are free at the top of a heap. Bulk traffic frees that much with
/// every other frame, and then faults the same pages in again. The threshold is twice the largest block that was ever
/// freed (`M_MMAP_THRESHOLD` in mallopt(3)), even if that was never written to; other C libraries ignore it. With 8 MiB this
/// saves a tenth of the CPU time of a relayed gigabyte.
pub fn keep_freed_memory(bytes: u64) {
    drop(black_box(Vec::<u8>::with_capacity((bytes / 2) as usize)));
}
