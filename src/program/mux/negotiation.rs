//! Limits what a peer may send while the protocol of its stream is being negotiated.
//!
//! Sans-IO. libp2p's multistream-select allocates 16 KiB for a message as soon as its length is announced, which takes two
//! bytes. No protocol name is longer than 127 bytes, so longer messages are rejected.
//! See [the specification](https://github.com/multiformats/multistream-select).

/// The first message that the relay sends.
const HEADER: &[u8] = b"/multistream/1.0.0\n";

/// How many bytes at the start of a message tell what it is.
const PREFIX: usize = HEADER.len();

/// A negotiation in which the relay accepts a protocol or not, followed by parsing what the relay writes.
#[derive(Debug, Default)]
pub struct Negotiation {
    /// The length of the current message, as far as it was written: a varint.
    length: usize,
    length_bits: u32,
    /// How many bytes of the message are left to write, once its length was written.
    left: Option<usize>,
    prefix: Vec<u8>,
}

impl Negotiation {
    /// Whether the relay accepts what it has read into a buffer of this size. multistream-select reads only lengths byte
    /// by byte; the first byte of a length above 127 has its highest bit set.
    pub fn accepts(read: &[u8], buffer: usize) -> bool {
        !(buffer == 1 && read.first().is_some_and(|byte| *byte >= 0x80))
    }

    /// Parses what the relay writes. Returns whether it has accepted a protocol by now.
    pub fn on_write(&mut self, bytes: &[u8]) -> bool {
        bytes.iter().any(|byte| self.on_byte(*byte))
    }

    fn on_byte(&mut self, byte: u8) -> bool {
        let Some(left) = &mut self.left else {
            self.length |= usize::from(byte & 0x7f).checked_shl(self.length_bits).unwrap_or(0);
            self.length_bits += 7;
            if byte < 0x80 {
                self.left = Some(self.length);
            }
            return false;
        };
        if self.prefix.len() < PREFIX {
            self.prefix.push(byte);
        }
        *left = left.saturating_sub(1);
        if *left > 0 {
            return false;
        }
        let message = std::mem::take(self).prefix;
        message.starts_with(b"/") && message != HEADER
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(text: &str) -> Vec<u8> {
        [&[text.len() as u8 + 1], text.as_bytes(), b"\n"].concat()
    }

    #[test]
    fn negotiation_ends_on_acceptance_in_any_number_of_writes() {
        let list = line(&"/one/of/them".repeat(12));
        let list = [&[0x80 | (list.len() as u8 & 0x7f), 1], &list[..]].concat();
        for (said, agrees) in [
            (line("/multistream/1.0.0"), false),
            (line("na"), false),
            (list, false),
            (line("/multistream/1.0.0/and/more"), true),
            (line("/ipfs/ping/1.0.0"), true),
        ] {
            let mut at_once = Negotiation::default();
            assert!(!at_once.on_write(&line("/multistream/1.0.0")));
            assert_eq!(at_once.on_write(&said), agrees, "{said:?}");
            let mut cut = Negotiation::default();
            let agreed = said.iter().map(|byte| cut.on_write(&[*byte]));
            assert_eq!(agreed.last(), Some(agrees), "{said:?}");
        }
    }

    #[test]
    fn lengths_above_127_are_rejected() {
        assert!(Negotiation::accepts(&[0x7f], 1));
        assert!(!Negotiation::accepts(&[0x80], 1));
        assert!(Negotiation::accepts(&[0xff, 7], 99), "not a length");
        assert!(Negotiation::accepts(&[], 1));
    }
}
