//! Noise framing: reads Noise messages one at a time.
//!
//! libp2p's Noise reads as much as there is and never shrinks its buffer, so that it comes to hold one message and most
//! of the next, 128 KiB. If no read goes beyond the end of a message, the buffer is as large as the largest message,
//! 64 KiB.
//!
//! This is also the only place that sees the length of a handshake message before it is decrypted. A message longer than
//! an identity of RSA with 4,096 bits needs is rejected: one of 8,192 bits takes five times as long to verify. The key
//! itself cannot be seen here: one of 4,640 bits with an exponent of 33 bits passes, and takes eight times as long.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll, ready},
};

use libp2p::futures::{AsyncRead, AsyncWrite};

use crate::{
    delegate::delegate_write,
    program::net::admission::handshake_failure::{Reason, Stage, StageError},
};

/// The length of a message's head, in bytes; the head is the length of the message.
/// See [the specification](https://github.com/libp2p/specs/blob/master/noise/README.md#wire-format).
const HEAD: usize = 2;

/// The longest handshake message, in bytes: 64 for the static key and its tag, 1,073 for an RSA key of 4,096 bits and
/// its signature, and a few for extensions.
const MAX_HANDSHAKE_MESSAGE: usize = 1280;

/// A stream of Noise messages, no read of which goes beyond the end of one.
#[derive(Debug)]
pub struct NoiseFraming<S> {
    stream: S,
    head: [u8; HEAD],
    /// How many bytes of the next head were read.
    head_read: usize,
    /// How many bytes of the message are left to read.
    left: usize,
    /// How many messages the handshake reads.
    handshake: u8,
    /// How many messages were begun to be read, at most 255.
    messages: u8,
}

impl<S> NoiseFraming<S> {
    /// Wraps a stream from which nothing was read yet. The handshake reads this many messages.
    pub fn new(stream: S, handshake: u8) -> Self {
        Self { stream, head: [0; HEAD], head_read: 0, left: 0, handshake, messages: 0 }
    }

    /// Parses the bytes of one read.
    ///
    /// # Errors
    ///
    /// When they are the head of a handshake message that is too long.
    fn on_read(&mut self, bytes: &[u8]) -> io::Result<()> {
        if self.left > 0 {
            self.left -= bytes.len();
            return Ok(());
        }
        if let Some(head) = self.head.get_mut(self.head_read..self.head_read + bytes.len()) {
            head.copy_from_slice(bytes);
            self.head_read += bytes.len();
        }
        if self.head_read == HEAD {
            self.head_read = 0;
            self.left = u16::from_be_bytes(self.head).into();
            if self.messages < self.handshake && self.left > MAX_HANDSHAKE_MESSAGE {
                let problem = "the peer's key takes too long to verify: above RSA of 4096 bits";
                return Err(io::Error::new(io::ErrorKind::InvalidData, problem));
            }
            self.messages = self.messages.saturating_add(1);
        }
        Ok(())
    }

    /// The error of a connection that closes. In place of a listener's last handshake message, it means that the dialer
    /// has seen the listener's peer id, and expected another: go-libp2p and js-libp2p close the connection then.
    fn closed(&self, error: io::Error) -> io::Error {
        let is_last = self.messages > 0 && self.messages < self.handshake;
        match is_last && self.left == 0 && self.head_read == 0 {
            true => StageError::wrap(Stage::Security, Some(Reason::PeerId), error),
            false => error,
        }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for NoiseFraming<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        into: &mut [u8],
    ) -> Poll<io::Result<usize>> {
        let this = &mut *self;
        let wanted = match this.left {
            0 => HEAD - this.head_read,
            left => left,
        };
        let (into, _) = into.split_at_mut(wanted.min(into.len()));
        let read = ready!(Pin::new(&mut this.stream).poll_read(cx, into));
        let read = read.map_err(|error| this.closed(error))?;
        if read == 0 && !into.is_empty() && this.messages < this.handshake {
            return Poll::Ready(Err(this.closed(io::ErrorKind::UnexpectedEof.into())));
        }
        this.on_read(into.get(..read).unwrap_or_default())?;
        Poll::Ready(Ok(read))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for NoiseFraming<S> {
    delegate_write!(stream);
}

#[cfg(test)]
mod tests {
    use libp2p::futures::{AsyncReadExt, executor::block_on, io::Cursor};
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_handshake_message_that_is_too_long_is_an_error() {
        let of = |length: usize| [&(length as u16).to_be_bytes()[..], &vec![7; length]].concat();
        let bytes = [of(MAX_HANDSHAKE_MESSAGE), of(9000)].concat();
        let read = |handshake| {
            let mut stream = NoiseFraming::new(Cursor::new(&bytes), handshake);
            block_on(stream.read_to_end(&mut Vec::new())).map_err(|error| error.kind())
        };
        assert_eq!(read(1), Ok(bytes.len()));
        assert_eq!(read(2), Err(io::ErrorKind::InvalidData));
    }

    proptest! {
        #[test]
        fn no_byte_is_lost_and_no_read_goes_beyond_a_message(
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
            let (mut stream, mut received) = (NoiseFraming::new(Cursor::new(&bytes), 0), Vec::new());
            let mut into = vec![0; room];
            loop {
                let read = block_on(stream.read(&mut into)).unwrap();
                if read == 0 {
                    break;
                }
                received.extend_from_slice(&into[..read]);
                prop_assert!(Some(received.len()) <= end);
                if Some(received.len()) == end {
                    end = ends.next();
                }
            }
            prop_assert_eq!(received, bytes);
        }
    }
}
