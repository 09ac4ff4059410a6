//! Where yamux's frames begin and end in a stream of bytes.
//!
//! See [its specification](https://github.com/hashicorp/yamux/blob/master/spec.md#framing).

/// How long a header is, in bytes.
pub const HEADER: usize = 12;

/// The kind of frames that have a body.
const DATA: u8 = 0;

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
        let header = [
            &[0, kind, 0, 1][..],
            &stream.to_be_bytes(),
            &length.to_be_bytes(),
        ];
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
    }
}
