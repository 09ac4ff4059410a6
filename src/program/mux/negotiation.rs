//! Limits what a peer may send while the protocol of a stream is being negotiated, and parses what the side that has
//! not opened the stream sends until it accepts one.
//!
//! Sans-IO. libp2p's multistream-select allocates 16 KiB for a message as soon as its length is announced, which takes
//! two bytes. So messages longer than 127 bytes are rejected; the usual protocol names are shorter.
//! See [the specification](https://github.com/multiformats/multistream-select).

/// The negotiation of one stream.
#[derive(Debug, Default)]
pub struct Negotiation {
    /// Whether the relay has opened the stream.
    pub is_outbound: bool,
    /// What was sent of the current message, starting with its length.
    pub message: Vec<u8>,
}

impl Negotiation {
    /// Whether the relay accepts what it has read into a buffer of this size. multistream-select reads only lengths
    /// byte by byte; the first byte of a length above 127 has its highest bit set.
    pub fn accepts(read: &[u8], buffer: usize) -> bool {
        !(buffer == 1 && read.first().is_some_and(|byte| *byte >= 0x80))
    }

    /// Parses what is sent next. Returns whether a protocol was accepted in it.
    pub fn parse(&mut self, bytes: &[u8]) -> bool {
        bytes.iter().any(|byte| {
            self.message.push(*byte);
            match unsigned_varint::decode::usize(&self.message) {
                Ok((length, text)) if text.len() >= length => {
                    let accepts = text.starts_with(b"/") && text != b"/multistream/1.0.0\n";
                    self.message.clear();
                    accepts
                }
                _ => false,
            }
        })
    }
}
