//! Where yamux's frames begin and end in a stream of bytes, and yamux's limits.
//!
//! See [its specification](https://github.com/hashicorp/yamux/blob/master/spec.md#framing).

use std::io;

/// How long a header is, in bytes.
pub const HEADER: usize = 12;

/// The window that yamux grants every stream from its start, in bytes.
pub const INITIAL_WINDOW: usize = yamux::DEFAULT_CREDIT as usize;

/// The longest frame that yamux reads, in bytes; it ends the connection over a longer one.
pub const LONGEST_FRAME: usize = 1024 * 1024;

/// The most streams that one connection may have in either direction: yamux cannot count more.
pub const MOST_STREAMS: usize = {
    let addressable = usize::MAX / (4 * INITIAL_WINDOW);
    let named = u16::MAX as usize;
    if addressable < named { addressable } else { named }
};

/// The kind of frames that have a body.
const DATA: u8 = 0;

/// That of a ping, and of its answer.
const PING: u8 = 2;

/// The flags that open or accept a stream, and those that close or reset it.
const SYN: u16 = 0b0001;
const OPENING: u16 = SYN | 0b0010;
const RST: u16 = 0b1000;
const CLOSING: u16 = 0b0100 | RST;

/// The longest body that yamux sees, in bytes. yamux allocates a body as soon as it has the header: this
/// is the most that a header alone can take.
const PIECE: usize = 16 * 1024;

/// Follows the frames of one direction.
#[derive(Debug, Default)]
pub struct Frames {
    /// What is known of the next header.
    header: [u8; HEADER],
    known: usize,
    /// How much of the last body is yet to come.
    body: usize,
}

/// A frame of data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Data {
    /// Which stream's.
    pub stream: u32,
    /// How long its body is, in bytes.
    pub length: usize,
}

impl Frames {
    /// Looks at the next bytes, up to the end of a header of data at most, and cuts them off.
    pub fn next(&mut self, bytes: &mut &[u8]) -> Option<Data> {
        while !bytes.is_empty() {
            let body = cut(bytes, self.body).len();
            self.body -= body;
            let more = cut(bytes, HEADER - self.known);
            if let Some(room) = self.header.get_mut(self.known..self.known + more.len()) {
                room.copy_from_slice(more);
            }
            self.known += more.len();
            if self.known < HEADER {
                continue;
            }
            self.known = 0;
            let [_, kind, _, _, s0, s1, s2, s3, l0, l1, l2, l3] = self.header;
            if kind == DATA {
                self.body = u32::from_be_bytes([l0, l1, l2, l3]) as usize;
                return Some(Data {
                    stream: u32::from_be_bytes([s0, s1, s2, s3]),
                    length: self.body,
                });
            }
        }
        None
    }

    /// Whether all of the last body has come.
    pub fn is_between(&self) -> bool {
        self.body == 0
    }
}

/// Splits the frames that are read: no body that yamux sees is longer than [`PIECE`].
#[derive(Debug, Default)]
pub struct Splitter {
    /// The header that is being read, or passed on.
    header: [u8; HEADER],
    read: usize,
    passed_on: usize,
    /// The flags of the frame that were not passed on yet.
    flags: u16,
    /// How much of the body behind the header is yet to come, and of the frame behind that body.
    body: usize,
    rest: usize,
}

impl Splitter {
    /// Where the next bytes belong while a header is read.
    pub fn header_room(&mut self) -> Option<&mut [u8]> {
        self.header.get_mut(self.read..).filter(|room| !room.is_empty())
    }

    /// So many bytes of a header were read. Whether it is whole now, and that of a frame that costs the relay
    /// more than the peer: one that opens a stream, resets one, or pings.
    ///
    /// # Errors
    ///
    /// When it announces a longer frame than yamux reads, or opens a stream with more than its window.
    pub fn header_read(&mut self, bytes: usize) -> io::Result<bool> {
        self.read += bytes;
        let [_, kind, f0, f1, _, _, _, _, l0, l1, l2, l3] = self.header;
        let is_whole = self.read == HEADER;
        let flags = u16::from_be_bytes([f0, f1]);
        if is_whole && kind == DATA {
            self.flags = flags;
            self.rest = u32::from_be_bytes([l0, l1, l2, l3]) as usize;
            let opens = self.flags & SYN != 0;
            if self.rest > if opens { INITIAL_WINDOW } else { LONGEST_FRAME } {
                return Err(io::ErrorKind::InvalidData.into());
            }
            self.split();
        }
        Ok(is_whole && (kind == PING || flags & (SYN | RST) != 0))
    }

    /// Makes the header of the next piece. The first opens the stream, the last closes it.
    fn split(&mut self) {
        self.body = self.rest.min(PIECE);
        self.rest -= self.body;
        let flags = if self.rest == 0 { self.flags } else { self.flags & OPENING };
        self.flags &= CLOSING;
        let [_, _, f0, f1, _, _, _, _, l0, l1, l2, l3] = &mut self.header;
        [*f0, *f1] = flags.to_be_bytes();
        [*l0, *l1, *l2, *l3] = (self.body as u32).to_be_bytes();
        self.passed_on = 0;
    }

    /// Passes on what is left of a header that was read: how many bytes, and the data that it announces
    /// if it begins with this call.
    pub fn pass_on(&mut self, mut into: &mut [u8]) -> Option<(usize, Option<Data>)> {
        let begins = self.passed_on == 0;
        let left = self.header.get(self.passed_on..).filter(|left| !left.is_empty())?;
        if self.read < HEADER {
            return None;
        }
        let written = io::Write::write(&mut into, left).unwrap_or_default(); // to memory
        self.passed_on += written;
        let [_, kind, _, _, s0, s1, s2, s3, ..] = self.header;
        let stream = u32::from_be_bytes([s0, s1, s2, s3]);
        let data = (begins && kind == DATA).then_some(Data { stream, length: self.body });
        self.end();
        Some((written, data))
    }

    /// How much of a body comes next.
    pub fn body(&self) -> usize {
        self.body
    }

    /// So many bytes of it were read; whether that was the last of them.
    pub fn body_read(&mut self, bytes: usize) -> bool {
        self.body -= bytes;
        let is_whole = self.body == 0;
        if is_whole && self.rest > 0 {
            self.split();
        }
        self.end();
        is_whole
    }

    /// Expects the next header once all of a frame was passed on.
    fn end(&mut self) {
        if self.passed_on == HEADER && self.body + self.rest == 0 {
            *self = Self::default();
        }
    }
}

/// So many bytes, or all that there are.
fn cut<'a>(bytes: &mut &'a [u8], length: usize) -> &'a [u8] {
    let (cut, rest) = bytes.split_at(length.min(bytes.len()));
    *bytes = rest;
    cut
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn frame(kind: u8, stream: u32, length: u32) -> Vec<u8> {
        let body = vec![0xff; if kind == DATA { length as usize } else { 0 }];
        let header = [&[0, kind, 0, 1][..], &stream.to_be_bytes(), &length.to_be_bytes()];
        [header.concat(), body].concat()
    }

    proptest! {
        #[test]
        fn each_frame_of_data_is_found_however_it_comes(
            frames in prop::collection::vec((0_u8..4, any::<u32>(), 0_u32..50), 0..20),
            pieces in prop::collection::vec(1_usize..40, 1..20),
        ) {
            let bytes = frames.iter().flat_map(|(kind, stream, length)| frame(*kind, *stream, *length));
            let bytes: Vec<_> = bytes.collect();
            let mut pieces = pieces.iter().cycle();
            let (mut follower, mut found, mut rest) = (Frames::default(), Vec::new(), &bytes[..]);
            while !rest.is_empty() {
                let mut piece = cut(&mut rest, *pieces.next().unwrap());
                while let Some(data) = follower.next(&mut piece) {
                    found.push((DATA, data.stream, data.length as u32));
                }
            }
            let mut expected = frames;
            expected.retain(|(kind, ..)| *kind == DATA);
            prop_assert_eq!(found, expected);
            prop_assert!(follower.is_between());
        }

        #[test]
        fn a_split_frame_carries_the_same(
            frames in prop::collection::vec((0_u8..4, any::<u16>(), any::<u32>(), 0..3 * PIECE as u32), 0..6),
            room in 1..2 * PIECE,
        ) {
            let (mut sent, mut expected) = (Vec::new(), Vec::new());
            for (kind, flags, stream, length) in frames {
                // Behind a SYN only one window may come, which is more than this.
                let mut bytes = frame(kind, stream, length);
                bytes[2..4].copy_from_slice(&flags.to_be_bytes());
                expected.push((kind, stream, flags, length));
                sent.extend(bytes);
            }
            let mut found: Vec<(u8, u32, u16, u32)> = Vec::new();
            let mut splitter = Splitter::default();
            let (mut rest, mut continues) = (&sent[..], false);
            while !rest.is_empty() || splitter.body() > 0 {
                let mut header = [0; HEADER];
                let mut known = 0;
                while known < HEADER {
                    if let Some(into) = splitter.header_room() {
                        let piece = cut(&mut rest, into.len().min(room));
                        into[..piece.len()].copy_from_slice(piece);
                        splitter.header_read(piece.len()).unwrap();
                    } else {
                        let end = HEADER.min(known + room);
                        known += splitter.pass_on(&mut header[known..end]).unwrap().0;
                    }
                }
                let [_, kind, f0, f1, s0, s1, s2, s3, l0, l1, l2, l3] = header;
                let (flags, length) = (u16::from_be_bytes([f0, f1]), u32::from_be_bytes([l0, l1, l2, l3]));
                let stream = u32::from_be_bytes([s0, s1, s2, s3]);
                if kind == DATA {
                    prop_assert!(length as usize <= PIECE);
                    let mut left = length as usize;
                    while left > 0 {
                        prop_assert_eq!(splitter.body(), left);
                        let read = cut(&mut rest, left.min(room)).len();
                        left -= read;
                        prop_assert_eq!(splitter.body_read(read), left == 0);
                    }
                }
                match found.last_mut() {
                    Some(last) if continues => {
                        prop_assert_eq!(flags & !CLOSING, 0, "it is open");
                        last.2 |= flags;
                        last.3 += length;
                    }
                    _ => found.push((kind, stream, flags, length)),
                }
                let (_, _, _, whole) = expected[found.len() - 1];
                continues = kind == DATA && found.last().unwrap().3 < whole;
                prop_assert!(!continues || flags & CLOSING == 0, "more is to come");
            }
            let known = |(kind, stream, flags, length): &(u8, u32, u16, u32)| match *kind {
                DATA => (*kind, *stream, flags & (OPENING | CLOSING), *length),
                _ => (*kind, *stream, *flags, *length),
            };
            prop_assert_eq!(
                found.iter().map(known).collect::<Vec<_>>(),
                expected.iter().map(known).collect::<Vec<_>>()
            );
        }
    }
}
