//! What yamux keeps of a stream until somebody reads it, and what that takes.
//!
//! Pure. Each frame is memory of its own to yamux, which is most of what it takes where frames are
//! small: a window full of frames of one byte would take a hundred windows.

use std::collections::VecDeque;

/// What a frame takes beside its body, in bytes: its place in a queue that may be twice as large as
/// it needs to be, and what an allocation of its own takes at least.
pub const FRAME: usize = 96;

/// Frames are counted together up to so many bytes, so that counting takes next to nothing: memory
/// counts as free again once all of them were read.
const PIECE: usize = 4096;

/// What came on a stream.
#[derive(Debug, Default)]
pub struct Unread {
    pieces: VecDeque<Piece>,
    /// What it takes in all.
    takes: usize,
    /// What was read last: until there is another read whoever read it may still hold it.
    passing: usize,
}

/// Some frames.
#[derive(Debug)]
struct Piece {
    /// What is yet to be read of them.
    bytes: usize,
    takes: usize,
    /// When the first of them came.
    since: u64,
}

impl Unread {
    /// A frame comes now with a body of so many bytes; yields how many it takes.
    pub fn arrives(&mut self, bytes: usize, now: u64) -> usize {
        if bytes == 0 {
            return 0;
        }
        let takes = bytes + FRAME;
        self.takes += takes;
        match self.pieces.back_mut() {
            Some(last) if last.bytes + bytes <= PIECE => {
                last.bytes += bytes;
                last.takes += takes;
            }
            _ => self.pieces.push_back(Piece { bytes, takes, since: now }),
        }
        takes
    }

    /// So many bytes are read, and those before them were passed on; yields how many bytes of memory
    /// that frees.
    pub fn read(&mut self, bytes: usize) -> usize {
        let (mut passed, mut freed) = (std::mem::replace(&mut self.passing, bytes), 0);
        while let Some(first) = self.pieces.front_mut()
            && passed > 0
        {
            let of_first = passed.min(first.bytes);
            first.bytes -= of_first;
            passed -= of_first;
            if first.bytes == 0 {
                freed += first.takes;
                self.pieces.pop_front();
            }
        }
        self.takes -= freed;
        freed
    }

    /// How much it is in the way: how many bytes, times how long the first of them have been waiting.
    /// So much passes through a stream that is being read, and yet it is not.
    pub fn weight(&self, now: u64) -> u128 {
        let first = self.pieces.front();
        let age = first.map_or(0, |first| now.saturating_sub(first.since));
        self.takes as u128 * u128::from(age)
    }

    /// How many bytes it takes.
    pub fn takes(&self) -> usize {
        self.takes
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn small_frames_take_much_and_little_to_be_counted() {
        let mut unread = Unread::default();
        for _ in 0..100_000 {
            assert_eq!(unread.arrives(1, 0), 1 + FRAME);
        }
        assert_eq!(unread.takes(), 100_000 * (1 + FRAME));
        assert!(unread.pieces.len() < 30);
    }

    #[test]
    fn what_was_read_is_free_with_the_next_read() {
        let mut unread = Unread::default();
        unread.arrives(PIECE, 0);
        unread.arrives(PIECE, 0);
        assert_eq!(unread.read(PIECE), 0);
        assert_eq!(unread.read(PIECE), PIECE + FRAME);
        assert_eq!(unread.read(0), PIECE + FRAME);
        assert_eq!((unread.takes(), unread.read(0)), (0, 0));
    }

    #[test]
    fn what_is_passed_on_weighs_less_than_what_stands() {
        let [mut stands, mut moves] = [(); 2].map(|()| Unread::default());
        stands.arrives(PIECE, 1);
        for now in 1..100 {
            moves.arrives(10 * PIECE, now);
            moves.read(10 * PIECE);
            moves.arrives(10 * PIECE, now);
            moves.read(10 * PIECE);
        }
        assert!(moves.takes() > stands.takes());
        assert!(moves.weight(100) < stands.weight(100));
        assert_eq!(Unread::default().weight(100), 0);
    }

    proptest! {
        #[test]
        fn all_that_came_is_free_in_the_end_and_no_more_than_that_before(
            steps in prop::collection::vec((0_usize..9000, 0_usize..9000), 0..50),
        ) {
            let mut unread = Unread::default();
            let (mut there, mut taken, mut freed) = (0, 0, 0);
            for (arrives, reads) in steps {
                taken += unread.arrives(arrives, 0);
                there += arrives;
                let reads = reads.min(there);
                freed += unread.read(reads);
                there -= reads;
                prop_assert_eq!(unread.takes(), taken - freed);
                prop_assert!(unread.takes() >= there);
            }
            freed += unread.read(there);
            freed += unread.read(0);
            prop_assert_eq!((unread.takes(), freed), (0, taken));
        }
    }
}
