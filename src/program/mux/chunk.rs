//! Memory for received bytes, in chunks whose capacity is charged to their connection.

use std::{cell::RefCell, io::Read};

/// The capacity of a chunk is a multiple of this, in bytes.
const MIN_CHUNK: usize = 4 * 1024;
const MAX_CHUNK: usize = 16 * 1024;

/// How many of the largest chunks a thread keeps for later frames. A new chunk has to be zeroed: for a circuit at full
/// speed that costs as much as copying all of its bytes.
const MAX_SPARE: usize = 8;

thread_local! {
    static SPARE: RefCell<Vec<Box<[u8]>>> = const { RefCell::new(Vec::new()) };
}

/// A buffer for received bytes.
#[derive(Debug, Default)]
pub struct Chunk {
    bytes: Box<[u8]>,
    /// The bytes before `end` were received; of these, the ones before `start` were read.
    start: usize,
    end: usize,
}

impl Chunk {
    /// An empty chunk for a body of `length` bytes, or for the part of it that fits into one chunk.
    pub fn for_body(bytes: usize) -> Self {
        let capacity = bytes.next_multiple_of(MIN_CHUNK).clamp(MIN_CHUNK, MAX_CHUNK);
        let spare = match capacity {
            MAX_CHUNK => SPARE.with_borrow_mut(Vec::pop),
            _ => None,
        };
        Self { bytes: spare.unwrap_or_else(|| vec![0; capacity].into()), start: 0, end: 0 }
    }

    /// What the connection is charged for it, in bytes.
    pub fn capacity(&self) -> usize {
        self.bytes.len()
    }

    /// Returns at most `most` bytes of free space.
    pub fn room(&mut self, most: usize) -> &mut [u8] {
        let end = self.bytes.len().min(self.end.saturating_add(most));
        self.bytes.get_mut(self.end..end).unwrap_or_default()
    }

    /// Records that `count` bytes were written to the free space.
    pub fn advance(&mut self, bytes: usize) {
        self.end += bytes;
    }

    /// Discards its contents.
    pub fn clear(&mut self) {
        (self.start, self.end) = (0, 0);
    }

    /// Returns the unread bytes.
    pub fn unread(&self) -> &[u8] {
        self.bytes.get(self.start..self.end).unwrap_or_default()
    }

    /// Reads as much as fits into `into`. Returns the number of bytes.
    pub fn read(&mut self, into: &mut [u8]) -> usize {
        let read = self.unread().read(into).unwrap_or_default(); // from memory
        self.start += read;
        read
    }

    /// Moves as much of `other` into this chunk as fits. Returns whether everything did.
    pub fn append(&mut self, other: &mut Self) -> bool {
        let moved = other.read(self.room(usize::MAX));
        self.end += moved;
        let is_all = other.unread().is_empty();
        if is_all {
            other.clear();
        }
        is_all
    }
}

impl Drop for Chunk {
    fn drop(&mut self) {
        if self.bytes.len() < MAX_CHUNK {
            return;
        }
        let bytes = std::mem::take(&mut self.bytes);
        // While a thread ends, its spare chunks may be destroyed before its last stream.
        let _ = SPARE.try_with(|spare| {
            let mut spare = spare.borrow_mut();
            if spare.len() < MAX_SPARE {
                spare.push(bytes);
            }
        });
    }
}
