//! Reads files that hold keys.

use std::io::{self, Read};

use zeroize::Zeroizing;

/// `read_to_end` needs this many bytes of spare capacity to find the end of a file, and otherwise grows the buffer.
const SPARE: usize = 64;

/// Reads at most `limit` bytes of `file` into a buffer that is zeroed when it is dropped.
///
/// The buffer has its full capacity from the start: one that grows would leave copies on the heap.
///
/// # Errors
///
/// When the file cannot be read.
pub fn read(file: impl Read, limit: usize) -> io::Result<Zeroizing<Vec<u8>>> {
    let mut bytes = Zeroizing::new(Vec::with_capacity(limit.saturating_add(SPARE)));
    file.take(limit as u64).read_to_end(&mut bytes)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_buffer_never_grows() {
        for length in [0, 1, 31, 99, 100, 101, 5000] {
            let read = read(&vec![7; length][..], 100).unwrap();
            assert_eq!(read.len(), length.min(100));
            assert_eq!(read.capacity(), 100 + SPARE);
        }
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn the_buffer_is_zeroed_when_it_is_dropped() {
        use std::{fs::File, os::unix::fs::FileExt};

        let secret = [7; 1000];
        let read = read(&secret[..], 1000).unwrap();
        let address = read.as_ptr() as u64;
        drop(read);
        let mut left = [0; 1000];
        File::open("/proc/self/mem").unwrap().read_exact_at(&mut left, address).unwrap();
        assert_eq!(left.iter().filter(|byte| **byte == 7).count(), 0);
    }
}
