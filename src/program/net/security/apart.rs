//! Messages of Noise are read one at a time.
//!
//! libp2p's Noise keeps room for ever for as much as it once had to wait for. It takes what there is,
//! and so would come to hold one message and most of the next, 128 KiB; with the messages apart it is
//! the largest message, 64 KiB.
//!
//! Here alone it can be seen how long a message of the handshake is before it is decrypted: one that is longer
//! than an identity of 4,096 bits of RSA needs is not, for to verify one of 8,192 takes four times as long.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll, ready},
};

use libp2p::futures::{AsyncRead, AsyncWrite};

use crate::delegate::delegate_write;

/// How many bytes say how long a message is.
/// See [the specification](https://github.com/libp2p/specs/blob/master/noise/README.md#wire-format).
const HEAD: usize = 2;

/// The longest message of a handshake: the static key and its tag take 64 bytes, an RSA key of 4,096 bits and
/// its signature 1,073, and a few are for extensions.
const LONGEST_OF_HANDSHAKE: usize = 1280;

/// A stream of such messages, no read of which goes beyond the end of one.
#[derive(Debug)]
pub struct Apart<S> {
    stream: S,
    head: [u8; HEAD],
    /// How much of the next head is known.
    known: usize,
    /// How much of the message is yet to come.
    left: usize,
    /// How many messages of the handshake are yet to come.
    handshake: u8,
}

impl<S> Apart<S> {
    /// Nothing was read from `stream` yet; so many messages of its handshake will be.
    pub fn new(stream: S, handshake: u8) -> Self {
        Self { stream, head: [0; HEAD], known: 0, left: 0, handshake }
    }

    /// These bytes were read.
    ///
    /// # Errors
    ///
    /// When they announce a message of the handshake that is too long.
    fn note(&mut self, bytes: &[u8]) -> io::Result<()> {
        if self.left > 0 {
            self.left -= bytes.len();
            return Ok(());
        }
        if let Some(room) = self.head.get_mut(self.known..self.known + bytes.len()) {
            room.copy_from_slice(bytes);
            self.known += bytes.len();
        }
        if self.known == HEAD {
            self.known = 0;
            self.left = u16::from_be_bytes(self.head).into();
            if self.handshake > 0 && self.left > LONGEST_OF_HANDSHAKE {
                let problem = "a key that takes too long to verify, above RSA of 4096 bits";
                return Err(io::Error::new(io::ErrorKind::InvalidData, problem));
            }
            self.handshake = self.handshake.saturating_sub(1);
        }
        Ok(())
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
        this.note(into.get(..read).unwrap_or_default())?;
        Poll::Ready(Ok(read))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Apart<S> {
    delegate_write!(stream: poll_write, poll_flush, poll_close);
}

#[cfg(test)]
mod tests {
    use libp2p::futures::{AsyncReadExt, executor::block_on, io::Cursor};
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_message_of_the_handshake_that_is_too_long_is_not_read() {
        let of = |length: usize| [&(length as u16).to_be_bytes()[..], &vec![7; length]].concat();
        let bytes = [of(LONGEST_OF_HANDSHAKE), of(9000)].concat();
        let read = |handshake| {
            let mut stream = Apart::new(Cursor::new(&bytes), handshake);
            block_on(stream.read_to_end(&mut Vec::new())).map_err(|error| error.kind())
        };
        assert_eq!(read(1), Ok(bytes.len()));
        assert_eq!(read(2), Err(io::ErrorKind::InvalidData));
    }

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
            let (mut stream, mut heard) = (Apart::new(Cursor::new(&bytes), 0), Vec::new());
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
