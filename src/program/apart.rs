//! Messages of Noise are read one at a time.
//!
//! libp2p's Noise keeps room for ever for as much as it once had to wait for. It takes what there is,
//! and so would come to hold one message and most of the next, 128 KiB; with the messages apart it is
//! the largest message, 64 KiB.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll, ready},
};

use libp2p::futures::{AsyncRead, AsyncWrite};

/// How many bytes say how long a message is.
/// See [the specification](https://github.com/libp2p/specs/blob/master/noise/README.md#wire-format).
const HEAD: usize = 2;

/// A stream of such messages, no read of which goes beyond the end of one.
#[derive(Debug)]
pub struct Apart<S> {
    stream: S,
    head: [u8; HEAD],
    /// How much of the next head is known.
    known: usize,
    /// How much of the message is yet to come.
    left: usize,
}

impl<S> Apart<S> {
    /// Nothing was read from `stream` yet.
    pub fn new(stream: S) -> Self {
        Self {
            stream,
            head: [0; HEAD],
            known: 0,
            left: 0,
        }
    }

    /// These bytes were read.
    fn note(&mut self, bytes: &[u8]) {
        if self.left > 0 {
            self.left -= bytes.len();
            return;
        }
        if let Some(room) = self.head.get_mut(self.known..self.known + bytes.len()) {
            room.copy_from_slice(bytes);
            self.known += bytes.len();
        }
        if self.known == HEAD {
            self.known = 0;
            self.left = u16::from_be_bytes(self.head).into();
        }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Apart<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        into: &mut [u8],
    ) -> Poll<io::Result<usize>> {
        let this = &mut *self;
        let next = match this.left {
            0 => HEAD - this.known,
            left => left,
        };
        let room = next.min(into.len());
        let (into, _) = into.split_at_mut(room);
        let read = ready!(Pin::new(&mut this.stream).poll_read(cx, into))?;
        this.note(into.get(..read).unwrap_or_default());
        Poll::Ready(Ok(read))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Apart<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_close(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_close(cx)
    }
}

#[cfg(test)]
mod tests {
    use libp2p::futures::{AsyncReadExt, executor::block_on, io::Cursor};
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn nothing_is_lost_and_no_read_goes_beyond_a_message(
            lengths in prop::collection::vec(0_u16..300, 0..20),
            room in 1_usize..200,
        ) {
            let message = |length: &u16| [&length.to_be_bytes()[..], &vec![7; (*length).into()]].concat();
            let messages: Vec<_> = lengths.iter().map(message).collect();
            let bytes = messages.concat();
            let mut ends = messages.iter().scan(0, |end, message| {
                *end += message.len();
                Some(*end)
            });
            let mut end = ends.next();
            let (mut stream, mut heard) = (Apart::new(Cursor::new(&bytes)), Vec::new());
            let mut into = vec![0; room];
            loop {
                let read = block_on(stream.read(&mut into)).unwrap();
                if read == 0 {
                    break;
                }
                heard.extend_from_slice(&into[..read]);
                prop_assert!(Some(heard.len()) <= end);
                if Some(heard.len()) == end {
                    end = ends.next();
                }
            }
            prop_assert_eq!(heard, bytes);
        }
    }
}
