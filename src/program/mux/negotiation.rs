//! What a peer may say while the protocol of its stream is not agreed on yet.
//!
//! Pure. libp2p's multistream-select takes 16 KiB as soon as a message of that length is announced,
//! which takes two bytes; nobody has protocols with names longer than 127 bytes. So a longer message is
//! not let come. See [the specification](https://github.com/multiformats/multistream-select).

/// What the relay says first.
const HEADER: &[u8] = b"/multistream/1.0.0\n";

/// How much of a message tells what it is, in bytes.
const BEGINNING: usize = HEADER.len();

/// A negotiation in which the relay agrees or not.
#[derive(Debug, Default)]
pub struct Negotiation {
    /// The length of the message that it is writing, as far as it was written.
    length: usize,
    length_bits: u32,
    /// How much of that message is yet to be written, once its length was.
    left: Option<usize>,
    beginning: Vec<u8>,
}

impl Negotiation {
    /// Whether this can be the first byte of a length that the relay reads on: lengths are read byte by
    /// byte, and nothing else is.
    pub fn takes(read: &[u8], room: usize) -> bool {
        !(room == 1 && read.first().is_some_and(|byte| *byte >= 0x80))
    }

    /// The relay writes this; whether it has agreed by now.
    pub fn writes(&mut self, bytes: &[u8]) -> bool {
        bytes.iter().any(|byte| self.writes_one(*byte))
    }

    fn writes_one(&mut self, byte: u8) -> bool {
        let Some(left) = &mut self.left else {
            self.length |= usize::from(byte & 0x7f).checked_shl(self.length_bits).unwrap_or(0);
            self.length_bits += 7;
            if byte < 0x80 {
                self.left = Some(self.length);
            }
            return false;
        };
        if self.beginning.len() < BEGINNING {
            self.beginning.push(byte);
        }
        *left = left.saturating_sub(1);
        if *left > 0 {
            return false;
        }
        let said = std::mem::take(self).beginning;
        said.starts_with(b"/") && said != HEADER
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(text: &str) -> Vec<u8> {
        [&[text.len() as u8 + 1], text.as_bytes(), b"\n"].concat()
    }

    #[test]
    fn it_ends_when_the_relay_names_a_protocol_however_that_is_cut() {
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
            assert!(!at_once.writes(&line("/multistream/1.0.0")));
            assert_eq!(at_once.writes(&said), agrees, "{said:?}");
            let mut cut = Negotiation::default();
            let agreed = said.iter().map(|byte| cut.writes(&[*byte]));
            assert_eq!(agreed.last(), Some(agrees), "{said:?}");
        }
    }

    #[test]
    fn long_messages_are_not_announced() {
        assert!(Negotiation::takes(&[0x7f], 1));
        assert!(!Negotiation::takes(&[0x80], 1));
        assert!(Negotiation::takes(&[0xff, 7], 99), "no length");
        assert!(Negotiation::takes(&[], 1));
    }
}
