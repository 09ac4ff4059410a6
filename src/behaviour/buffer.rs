//! Memory for bytes that pass through: a buffer for each thread, lent for as long as it holds some.

use std::{
    cell::Cell,
    ops::{Deref, DerefMut},
};

/// How large a buffer is, in bytes.
///
/// What a secure channel sends in one piece: the largest message of Noise carries 64,511 bytes,
/// and a yamux frame's header takes 12 of them.
pub(crate) const SIZE: usize = 64_511 - 12;

thread_local! {
    static AT_HAND: Cell<Option<Box<[u8]>>> = const { Cell::new(None) };
}

/// The thread's buffer, or a new one while that is lent. Given back when it is dropped.
#[derive(Debug)]
pub(crate) struct Buffer(Box<[u8]>);

impl Buffer {
    pub(crate) fn borrow() -> Self {
        let buffer = AT_HAND.take();
        Self(buffer.unwrap_or_else(|| vec![0; SIZE].into()))
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        AT_HAND.set(Some(std::mem::take(&mut self.0)));
    }
}

impl Deref for Buffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.0
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.0
    }
}
