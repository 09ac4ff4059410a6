//! Memory for received bytes, in chunks that a connection is charged by their capacity.

use std::{cell::RefCell, io::Read};

/// Chunks are multiples of the smallest one, in bytes.
const MIN_CHUNK: usize = 4 * 1024;
const MAX_CHUNK: usize = 16 * 1024;

/// How many of the largest chunks a thread keeps for its next frames. A new chunk has to be zeroed: in a circuit flat out
/// that costs as much as a copy of all its bytes.
const MAX_SPARE: usize = 8;

thread_local! {
    static SPARE: RefCell<Vec<Box<[u8]>>> = const { RefCell::new(Vec::new()) };
}

/// Memory for bytes that are received.
#[derive(Debug, Default)]
pub struct Chunk {
    bytes: Box<[u8]>,
    /// Of those before `end`, the ones before `start` were read.
    start: usize,
    end: usize,
}

impl Chunk {
    /// An empty chunk for a body of so many bytes, or as much of it as goes into one.
    pub fn for_body(bytes: usize) -> Self {
        let capacity = bytes.next_multiple_of(MIN_CHUNK).clamp(MIN_CHUNK, MAX_CHUNK);
        let spare = match capacity {
            MAX_CHUNK => SPARE.with_borrow_mut(Vec::pop),
            _ => None,
        };
        Self { bytes: spare.unwrap_or_else(|| vec![0; capacity].into()), start: 0, end: 0 }
    }

    /// What it is charged, in bytes.
    pub fn capacity(&self) -> usize {
        self.bytes.len()
    }

    /// Room for so many bytes at most.
    pub fn room(&mut self, most: usize) -> &mut [u8] {
        let end = self.bytes.len().min(self.end.saturating_add(most));
        self.bytes.get_mut(self.end..end).unwrap_or_default()
    }

    /// So many bytes were put into the room.
    pub fn advance(&mut self, bytes: usize) {
        self.end += bytes;
    }

    /// Forgets what is in it.
    pub fn clear(&mut self) {
        (self.start, self.end) = (0, 0);
    }

    /// What is in it and was not read.
    pub fn unread(&self) -> &[u8] {
        self.bytes.get(self.start..self.end).unwrap_or_default()
    }

    /// Reads as much of it as fits; how many bytes that is.
    pub fn read(&mut self, into: &mut [u8]) -> usize {
        let read = self.unread().read(into).unwrap_or_default(); // from memory
        self.start += read;
        read
    }

    /// Takes as much of `other` as there is room for; whether that is all of it.
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
        // When a thread ends, its spare chunks may be gone before its last stream.
        let _ = SPARE.try_with(|spare| {
            let mut spare = spare.borrow_mut();
            if spare.len() < MAX_SPARE {
                spare.push(bytes);
            }
        });
    }
}
