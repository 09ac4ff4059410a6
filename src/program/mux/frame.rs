//! Frames of yamux: the protocol's constants, headers, and the memory that frames are read to.
//!
//! Sans-IO. The sections named here are those of
//! [the specification](https://github.com/hashicorp/yamux/blob/master/spec.md).

use std::{cell::RefCell, io::Read};

/// The length of a header, in bytes ("Framing").
pub const HEADER: usize = 12;

/// The credit of each direction of a stream from its start, in bytes ("Flow Control").
pub const INITIAL_WINDOW: usize = 256 * 1024;

/// The largest window that is ever granted, and so the longest body, in bytes.
///
/// js-libp2p sends as much as the window holds in a single frame, and Go and Rust end a connection over a
/// longer one. It is enough for 80 Mbit/s over a round trip of 100 ms.
pub const MAX_WINDOW: usize = 1024 * 1024;

/// The most streams that one connection may have in either direction.
pub const MAX_STREAMS: usize = u16::MAX as usize;

/// The capacity of a chunk is a multiple of this, in bytes.
const MIN_CHUNK: usize = 4 * 1024;
const MAX_CHUNK: usize = 16 * 1024;

/// How many of the largest chunks a thread keeps for later frames. A new chunk has to be zeroed: for a circuit at full
/// speed that costs as much as copying all of its bytes.
const MAX_SPARE: usize = 8;

thread_local! {
    static SPARE: RefCell<Vec<Box<[u8]>>> = const { RefCell::new(Vec::new()) };
}

/// The type of a frame ("Type Field").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The body is data of a stream.
    Data,
    /// The length is credit for a stream.
    WindowUpdate,
    /// The length is an opaque value, which the answer repeats.
    Ping,
    /// The length is a reason: the sender ends the session.
    GoAway,
}

/// Flags of a frame ("Flag Field"): bits.
pub type Flags = u16;
/// Opens a stream, or asks for the answer to a ping.
pub const SYN: Flags = 1;
/// Accepts a stream, or answers a ping.
pub const ACK: Flags = 2;
/// The sender sends no more on the stream.
pub const FIN: Flags = 4;
/// Resets the stream.
pub const RST: Flags = 8;

/// Why a session ends, as a go-away says it ("Go Away").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// Normal termination.
    Normal = 0,
    /// The peer broke the protocol.
    ProtocolError = 1,
    /// The peer asks for more than this side can answer.
    InternalError = 2,
}

/// The header of a frame ("Framing").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// The type.
    pub kind: Kind,
    /// The flags.
    pub flags: Flags,
    /// The stream; 0 is the session itself ("StreamID Field").
    pub stream: u32,
    /// The length of the body, or what the type makes of it ("Length Field").
    pub length: u32,
}

impl Header {
    /// Parses a header; `None` if its version or its type is unknown ("Version Field").
    pub fn parse(bytes: [u8; HEADER]) -> Option<Self> {
        let [0, kind, f0, f1, s0, s1, s2, s3, l0, l1, l2, l3] = bytes else {
            return None;
        };
        let kinds = [Kind::Data, Kind::WindowUpdate, Kind::Ping, Kind::GoAway];
        Some(Self {
            kind: *kinds.get(usize::from(kind))?,
            flags: u16::from_be_bytes([f0, f1]),
            stream: u32::from_be_bytes([s0, s1, s2, s3]),
            length: u32::from_be_bytes([l0, l1, l2, l3]),
        })
    }

    /// The header as it is sent, in network order.
    pub fn encode(self) -> [u8; HEADER] {
        let [f0, f1] = self.flags.to_be_bytes();
        let [s0, s1, s2, s3] = self.stream.to_be_bytes();
        let [l0, l1, l2, l3] = self.length.to_be_bytes();
        [0, self.kind as u8, f0, f1, s0, s1, s2, s3, l0, l1, l2, l3]
    }
}

/// Where the next bytes of the connection are read to.
#[derive(Debug, Default)]
pub struct Room {
    /// The header, and how many of its bytes have been received.
    pub header: [u8; HEADER],
    pub read: usize,
    /// How many bytes of the body are missing; 0: a header comes next.
    pub body: usize,
    /// Empty while no bytes are being received: received bytes belong to the stream.
    pub chunk: Chunk,
}

impl Room {
    /// The buffer to read into.
    pub fn buffer(&mut self) -> &mut [u8] {
        if self.body == 0 {
            return self.header.get_mut(self.read..).unwrap_or_default();
        }
        if self.chunk.capacity() == 0 {
            self.chunk = Chunk::for_body(self.body);
        }
        self.chunk.room(self.body)
    }
}

/// A buffer for received bytes. Its capacity is charged to the stream's connection.
#[derive(Debug, Default)]
pub struct Chunk {
    bytes: Box<[u8]>,
    /// The bytes before `end` were received; of these, the ones before `start` were read.
    start: usize,
    end: usize,
}

impl Chunk {
    /// An empty chunk for a body of this length, or for the part of it that fits into one chunk.
    pub fn for_body(bytes: usize) -> Self {
        let capacity = bytes.next_multiple_of(MIN_CHUNK).clamp(MIN_CHUNK, MAX_CHUNK);
        let is_large = capacity == MAX_CHUNK;
        let spare = is_large.then(|| SPARE.with_borrow_mut(Vec::pop)).flatten();
        Self { bytes: spare.unwrap_or_else(|| vec![0; capacity].into()), start: 0, end: 0 }
    }

    /// What the connection is charged for it, in bytes.
    pub fn capacity(&self) -> usize {
        self.bytes.len()
    }

    /// Returns at most this many bytes of free space.
    pub fn room(&mut self, most: usize) -> &mut [u8] {
        let end = self.bytes.len().min(self.end.saturating_add(most));
        self.bytes.get_mut(self.end..end).unwrap_or_default()
    }

    /// Records that this many bytes were written to the free space.
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

    /// Reads as much as fits. Returns the number of bytes.
    pub fn read(&mut self, into: &mut [u8]) -> usize {
        let read = self.unread().read(into).unwrap_or_default(); // from memory
        self.start += read;
        read
    }

    /// Moves as much of `other` into this chunk as fits. Returns whether everything did.
    pub fn append(&mut self, other: &mut Self) -> bool {
        self.end += other.read(self.room(usize::MAX));
        other.unread().is_empty()
    }
}

impl Drop for Chunk {
    fn drop(&mut self) {
        let bytes = std::mem::take(&mut self.bytes);
        // While a thread ends, its spare chunks may be destroyed before its last stream.
        let _ = SPARE.try_with(|spare| {
            let mut spare = spare.borrow_mut();
            if bytes.len() == MAX_CHUNK && spare.len() < MAX_SPARE {
                spare.push(bytes);
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_is_twelve_bytes_in_network_order() {
        let flags = SYN | FIN;
        let header = Header { kind: Kind::WindowUpdate, flags, stream: 0x0102_0304, length: 5 };
        let bytes = [0, 1, 0, 5, 1, 2, 3, 4, 0, 0, 0, 5];
        assert_eq!(header.encode(), bytes);
        assert_eq!(Header::parse(bytes), Some(header));
        assert!(header.flags & FIN != 0 && header.flags & RST == 0);
    }

    #[test]
    fn unknown_versions_and_types_are_rejected() {
        for kind in 0..=u8::MAX {
            let known = Header::parse([0, kind, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0]);
            assert_eq!(known.map(|header| header.kind as u8), (kind < 4).then_some(kind));
            assert_eq!(Header::parse([1, kind, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0]), None);
        }
    }
}
