//! Memory that was freed is kept for the next who wants it.

use std::hint::black_box;

/// Twice as much is kept, at most, of what a thread freed at the top of its heap.
const KEPT: usize = 4 * 1024 * 1024;

/// Has the C library keep what is freed, up to a few MiB.
///
/// Glibc returns memory as soon as 128 KiB are free at the top of a heap. Bulk frees that much
/// with every other frame, and pays for the same pages again with the next. The largest block that
/// was freed moves that threshold (`M_MMAP_THRESHOLD` in mallopt(3)); it need never be touched,
/// and other C libraries do not care. Gained: a tenth of the CPU time of a relayed gigabyte.
pub fn keep_what_is_freed() {
    drop(black_box(Vec::<u8>::with_capacity(KEPT)));
}
