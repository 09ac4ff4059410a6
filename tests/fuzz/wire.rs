//! The relay's messages, compared with a naive protobuf decoder that does not use prost.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll},
};

use libp2p::{
    PeerId,
    futures::{AsyncRead, FutureExt, task::noop_waker_ref},
};
use proptest::{collection::vec, prelude::*, sample::select};
use relaylet::{
    BadRequest,
    wire::{self, MAX_MESSAGE, Request},
};

use super::protobuf::{self, Field, HOP, STOP};

/// The peer that sends the requests: an id of 32 bytes, as an Ed25519 key has.
pub fn alice() -> PeerId {
    PeerId::from_bytes(&[&[0, 32][..], &[7; 32]].concat()).expect("a peer id")
}

/// Reads `bytes` from a stream, and decodes them as one message.
pub fn check(bytes: &[u8]) {
    let whole = frame(bytes, bytes.len().max(1));
    for chunk in [1, 2, 7] {
        assert_eq!(frame(bytes, chunk), whole, "in chunks of {chunk}");
    }
    message(bytes);
    if let Ok(framed) = whole {
        message(&framed);
    }
}

/// Reads a frame from a stream whose bytes arrive in chunks of `piece`.
fn frame(bytes: &[u8], piece: usize) -> Result<Vec<u8>, &'static str> {
    let mut stream = Trickle { bytes, read: 0, piece, most: 0, late: false };
    let read = {
        let cx = &mut Context::from_waker(noop_waker_ref());
        let mut reading = Box::pin(wire::read_frame(&mut stream));
        loop {
            if let Poll::Ready(read) = reading.poll_unpin(cx) {
                break read;
            }
        }
    };
    assert!(stream.most <= MAX_MESSAGE, "a buffer of {}", stream.most);
    let length = protobuf::length_in_front(bytes);
    match (read, length) {
        (Ok(Ok(message)), Some((prefix, length))) => {
            assert!(length <= MAX_MESSAGE);
            assert_eq!(message, bytes[prefix..prefix + length]);
            assert_eq!(stream.read, prefix + length, "nothing after the message is read");
            Ok(message)
        }
        (Ok(Err(BadRequest::Malformed(why))), None) => {
            assert!(stream.read <= 3, "only the length is read");
            Err(why)
        }
        (Ok(Err(BadRequest::Malformed(why))), Some((prefix, length))) => {
            let cut_short = length <= MAX_MESSAGE && bytes.len() < prefix + length;
            assert!(length > MAX_MESSAGE || cut_short);
            assert!(cut_short || stream.read == prefix, "nothing after the length is read");
            Err(why)
        }
        (Err(error), None) => {
            assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
            assert!(bytes.len() < 3 && bytes.iter().all(|byte| byte & 0x80 != 0));
            Err("the end")
        }
        (read, length) => panic!("{read:?}, where the length is {length:?}"),
    }
}

/// Decodes one message, and compares the result with the naive decoder's.
fn message(bytes: &[u8]) {
    let (request, answer) = (wire::decode_request(bytes, alice()), wire::decode_stop_answer(bytes));
    if let Some(read) = protobuf::read(bytes, HOP) {
        let hop = read.ok();
        assert_eq!(request, expected_request(hop.as_deref()));
        if hop.is_some() {
            // The last of several values counts, and unknown fields are skipped.
            let then = |more: &[u8]| wire::decode_request(&[bytes, more].concat(), alice());
            assert_eq!(then(&[0x78, 1]), request);
            assert_eq!(then(&[8, 0]), Ok(Request::Reserve));
        }
    }
    if let Ok(Request::Connect(target)) = request {
        assert_ne!(target, alice());
        let again = protobuf::connect(&target.to_bytes());
        assert_eq!(wire::decode_request(&again, alice()), request);
    }
    if let Some(read) = protobuf::read(bytes, STOP) {
        assert_eq!(answer, expected_answer(read.ok().as_deref()));
    }
}

fn expected_request(message: Option<&[Field]>) -> Result<Request, BadRequest> {
    let malformed = |why| Err(BadRequest::Malformed(why));
    let Some(message) = message else {
        return malformed("a message that is no protobuf");
    };
    match protobuf::number(message, &[1]).map(|number| number as i32) {
        Some(0) => Ok(Request::Reserve),
        Some(1) => {
            if !message.iter().any(|field| field.path == [2]) {
                return Err(BadRequest::BadTarget("CONNECT without a peer"));
            }
            let id = protobuf::bytes(message, &[2, 1]).unwrap_or_default();
            match PeerId::from_bytes(id) {
                Ok(target) if target == alice() => Err(BadRequest::BadTarget("CONNECT to oneself")),
                Ok(target) => Ok(Request::Connect(target)),
                Err(_) => Err(BadRequest::BadTarget("CONNECT to a peer id that is none")),
            }
        }
        Some(2) => Err(BadRequest::Unexpected("STATUS on a hop stream")),
        Some(_) => malformed("a message of unknown type"),
        None => malformed("a message without a type"),
    }
}

fn expected_answer(message: Option<&[Field]>) -> Result<i32, BadRequest> {
    let malformed = |why| Err(BadRequest::Malformed(why));
    let Some(message) = message else {
        return malformed("an answer that is no protobuf");
    };
    let number = |field| protobuf::number(message, &[field]).map(|number| number as i32);
    match (number(1), number(4)) {
        (Some(1), Some(status)) => Ok(status),
        (Some(1), None) => malformed("STATUS without a status"),
        (Some(0), _) => Err(BadRequest::Unexpected("CONNECT as an answer")),
        _ => malformed("an answer of unknown type"),
    }
}

/// A stream whose bytes arrive in small chunks, with pauses, and then end.
struct Trickle<'a> {
    bytes: &'a [u8],
    read: usize,
    piece: usize,
    /// The largest buffer that was read into.
    most: usize,
    late: bool,
}

impl AsyncRead for Trickle<'_> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
        room: &mut [u8],
    ) -> Poll<io::Result<usize>> {
        self.most = self.most.max(room.len());
        self.late = !self.late && self.piece < self.bytes.len();
        if self.late {
            return Poll::Pending;
        }
        let rest = &self.bytes[self.read..];
        let count = rest.len().min(self.piece).min(room.len());
        room[..count].copy_from_slice(&rest[..count]);
        self.read += count;
        Poll::Ready(Ok(count))
    }
}

/// A message of some kind with a length of some kind in front, and bytes after it.
pub fn streams() -> impl Strategy<Value = Vec<u8>> {
    let length = prop_oneof![
        8 => Just(None),
        1 => select(vec![0, 1, 127, 128, 4095, 4096, 4097, 16_384, 65_535, 65_536, u64::MAX]).prop_map(Some),
        1 => any::<u64>().prop_map(Some),
    ];
    let padding = prop_oneof![8 => Just(0usize), 1 => 1..12usize];
    let after = vec(any::<u8>(), 0..8);
    (length, padding, protobuf::messages(), after).prop_map(|(length, padding, message, after)| {
        let length = length.unwrap_or(message.len() as u64);
        let mut bytes = Vec::new();
        protobuf::varint(&mut bytes, length, padding);
        bytes.extend(message);
        bytes.extend(after);
        bytes
    })
}

/// Messages around the greatest length.
pub fn long_streams() -> impl Strategy<Value = Vec<u8>> {
    (4080..4110usize, 0..30usize, any::<u8>()).prop_map(|(length, missing, fill)| {
        let mut bytes = Vec::new();
        protobuf::varint(&mut bytes, length as u64, 0);
        bytes.resize((bytes.len() + length).saturating_sub(missing), fill);
        bytes
    })
}
