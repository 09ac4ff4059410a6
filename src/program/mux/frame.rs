//! Headers of yamux frames, and the protocol's constants.
//!
//! Sans-IO. The sections named here are those of
//! [the specification](https://github.com/hashicorp/yamux/blob/master/spec.md).

use std::ops::BitOr;

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

/// Flags of a frame ("Flag Field").
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Flags(pub u16);

impl Flags {
    /// No flag.
    pub const NONE: Self = Self(0);
    /// Opens a stream, or asks for the answer to a ping.
    pub const SYN: Self = Self(1);
    /// Accepts a stream, or answers a ping.
    pub const ACK: Self = Self(2);
    /// The sender sends no more on the stream.
    pub const FIN: Self = Self(4);
    /// Resets the stream.
    pub const RST: Self = Self(8);

    /// Whether one of these flags is set.
    pub fn has(self, flags: Self) -> bool {
        self.0 & flags.0 != 0
    }
}

impl BitOr for Flags {
    type Output = Self;

    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

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
        let [version, kind, f0, f1, s0, s1, s2, s3, l0, l1, l2, l3] = bytes;
        let kind = match (version, kind) {
            (0, 0) => Kind::Data,
            (0, 1) => Kind::WindowUpdate,
            (0, 2) => Kind::Ping,
            (0, 3) => Kind::GoAway,
            _ => return None,
        };
        Some(Self {
            kind,
            flags: Flags(u16::from_be_bytes([f0, f1])),
            stream: u32::from_be_bytes([s0, s1, s2, s3]),
            length: u32::from_be_bytes([l0, l1, l2, l3]),
        })
    }

    /// The header as it is sent, in network order.
    pub fn encode(self) -> [u8; HEADER] {
        let [f0, f1] = self.flags.0.to_be_bytes();
        let [s0, s1, s2, s3] = self.stream.to_be_bytes();
        let [l0, l1, l2, l3] = self.length.to_be_bytes();
        [0, self.kind as u8, f0, f1, s0, s1, s2, s3, l0, l1, l2, l3]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_is_twelve_bytes_in_network_order() {
        let flags = Flags::SYN | Flags::FIN;
        let header = Header { kind: Kind::WindowUpdate, flags, stream: 0x0102_0304, length: 5 };
        let bytes = [0, 1, 0, 5, 1, 2, 3, 4, 0, 0, 0, 5];
        assert_eq!(header.encode(), bytes);
        assert_eq!(Header::parse(bytes), Some(header));
        assert!(header.flags.has(Flags::FIN) && !header.flags.has(Flags::RST));
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
