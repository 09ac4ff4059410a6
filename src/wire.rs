//! The messages of Circuit Relay v2, their framing, and the signed vouchers: bytes in, typed values out, and back.
//!
//! No other file handles malformed messages or protobuf. Each message is preceded by its length as an unsigned varint.
//! Presence matters as in proto2, so that a message without a type is malformed and not a RESERVE.
//! See [the specification](https://github.com/libp2p/specs/blob/master/relay/circuit-v2.md#protobuf).

use std::{io, time::Duration};

use libp2p::{
    Multiaddr, PeerId, StreamProtocol,
    core::SignedEnvelope,
    futures::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    identity::{Keypair, SigningError},
};
use prost::Message;
use unsigned_varint::decode;

/// The protocol a client speaks to the relay.
pub const HOP_PROTOCOL: StreamProtocol = StreamProtocol::new("/libp2p/circuit/relay/0.2.0/hop");
/// The protocol the relay speaks to the target of a circuit.
pub const STOP_PROTOCOL: StreamProtocol = StreamProtocol::new("/libp2p/circuit/relay/0.2.0/stop");

/// The largest message accepted or sent, in bytes: the limit of the Go and Rust implementations.
pub const MAX_MESSAGE: usize = 4096;

/// Separates the signatures of vouchers from any other use of the relay's key.
pub(crate) const VOUCHER_DOMAIN: &str = "libp2p-relay-rsvp";
/// The multicodec `libp2p-relay-rsvp`, as the two bytes that implementations write.
pub(crate) const VOUCHER_TYPE: [u8; 2] = [0x03, 0x02];

/// The status codes of the specification, as they stand on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Status {
    /// The request was granted.
    Ok = 100,
    /// A cap on slots is reached.
    ReservationRefused = 200,
    /// A rate limit, or too many circuits.
    ResourceLimitExceeded = 201,
    /// An access rule, or a request that came over a relayed connection.
    PermissionDenied = 202,
    /// The target could not be asked, refused, or did not answer in time.
    ConnectionFailed = 203,
    /// The target holds no live reservation.
    NoReservation = 204,
    /// The message could not be decoded.
    MalformedMessage = 400,
    /// A client may not send this message here.
    UnexpectedMessage = 401,
}

/// What a circuit may carry; told to both ends and enforced on both directions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limit {
    /// How long the circuit may stay open; `None` for no limit.
    pub duration: Option<Duration>,
    /// How many bytes may pass in each direction; `None` for no limit.
    pub bytes: Option<u64>,
}

/// A request on a hop stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// A slot for the client itself, or the renewal of the one it holds.
    Reserve,
    /// A circuit to this peer.
    Connect(PeerId),
}

/// Why a request could not be decoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
#[non_exhaustive]
pub enum BadRequest {
    /// Not a message of this protocol.
    Malformed(&'static str),
    /// A CONNECT without a valid target.
    BadTarget(&'static str),
    /// A message of this protocol, out of place.
    Unexpected(&'static str),
}

impl BadRequest {
    /// The status of the answer.
    pub(crate) fn status(self) -> Status {
        match self {
            Self::Malformed(_) | Self::BadTarget(_) => Status::MalformedMessage,
            Self::Unexpected(_) => Status::UnexpectedMessage,
        }
    }
}

/// Reads the length of a message; `None` when it is invalid or takes more than three bytes.
///
/// `unsigned-varint`'s own reader takes 65,538 for 2: it drops the bits that do not fit the type.
pub async fn read_length(stream: &mut (impl AsyncRead + Unpin)) -> io::Result<Option<usize>> {
    let mut prefix = [0; 3];
    for byte in prefix.chunks_mut(1) {
        stream.read_exact(byte).await?;
        if byte.iter().all(|byte| decode::is_last(*byte)) {
            break;
        }
    }
    Ok(decode::u32(&prefix).ok().map(|(length, _)| length as usize))
}

/// Reads one message and not a byte more: what follows it on the stream belongs to the circuit.
///
/// # Errors
///
/// When the stream fails, or ends before a message.
pub async fn read_frame(
    stream: &mut (impl AsyncRead + Unpin),
) -> io::Result<Result<Vec<u8>, BadRequest>> {
    let bad = |what| Ok(Err(BadRequest::Malformed(what)));
    let length = match read_length(stream).await? {
        Some(length) if length <= MAX_MESSAGE => length,
        Some(_) => return bad("a message of more than 4096 bytes"),
        None => return bad("a length prefix beyond 4096"),
    };
    let mut message = vec![0; length];
    match stream.read_exact(&mut message).await {
        Ok(()) => Ok(Ok(message)),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => bad("a message cut short"),
        Err(error) => Err(error),
    }
}

/// Writes a whole message, and flushes it.
pub async fn write_frame(stream: &mut (impl AsyncWrite + Unpin), frame: &[u8]) -> io::Result<()> {
    stream.write_all(frame).await?;
    stream.flush().await
}

/// Decodes a request of the client `from`.
pub fn decode_request(message: &[u8], from: PeerId) -> Result<Request, BadRequest> {
    let message = proto::HopMessage::decode(message)
        .map_err(|_| BadRequest::Malformed("a message that is no protobuf"))?;
    match message.r#type {
        Some(proto::HOP_RESERVE) => Ok(Request::Reserve),
        Some(proto::HOP_CONNECT) => {
            let peer = message.peer.ok_or(BadRequest::BadTarget("CONNECT without a peer"))?;
            match PeerId::from_bytes(&peer.id.unwrap_or_default()) {
                Ok(target) if target == from => Err(BadRequest::BadTarget("CONNECT to oneself")),
                Ok(target) => Ok(Request::Connect(target)),
                Err(_) => Err(BadRequest::BadTarget("CONNECT to a peer id that is none")),
            }
        }
        Some(proto::HOP_STATUS) => Err(BadRequest::Unexpected("STATUS on a hop stream")),
        Some(_) => Err(BadRequest::Malformed("a message of unknown type")),
        None => Err(BadRequest::Malformed("a message without a type")),
    }
}

/// Decodes the target's answer on a stop stream, and returns its status as on the wire.
pub fn decode_stop_answer(message: &[u8]) -> Result<i32, BadRequest> {
    let message = proto::StopMessage::decode(message)
        .map_err(|_| BadRequest::Malformed("an answer that is no protobuf"))?;
    match (message.r#type, message.status) {
        (Some(proto::STOP_STATUS), Some(status)) => Ok(status),
        (Some(proto::STOP_STATUS), None) => Err(BadRequest::Malformed("STATUS without a status")),
        (Some(proto::STOP_CONNECT), _) => Err(BadRequest::Unexpected("CONNECT as an answer")),
        _ => Err(BadRequest::Malformed("an answer of unknown type")),
    }
}

/// The answer to a RESERVE that was granted or renewed. `expire` is in UNIX seconds.
pub fn reserve_ok(expire: u64, addrs: &[Multiaddr], voucher: Vec<u8>, limit: Limit) -> Vec<u8> {
    let (expire, voucher) = (Some(expire), Some(voucher));
    let addrs = addrs.iter().map(Multiaddr::to_vec).collect();
    answer(Status::Ok, limit, Some(proto::Reservation { expire, addrs, voucher }))
}

/// The answer to a request. Without a reservation: OK to a CONNECT, after which the stream is the circuit, or a refusal.
pub fn answer(status: Status, limit: Limit, reservation: Option<proto::Reservation>) -> Vec<u8> {
    let (r#type, status, limit) = (Some(proto::HOP_STATUS), Some(status as i32), limit.into());
    let message = proto::HopMessage { r#type, reservation, limit, status, peer: None };
    message.encode_length_delimited_to_vec()
}

/// The request to the target of a circuit.
pub fn stop_connect(source: PeerId, limit: Limit) -> Vec<u8> {
    let peer = proto::Peer { id: Some(source.to_bytes()), addrs: Vec::new() };
    let (r#type, limit) = (Some(proto::STOP_CONNECT), limit.into());
    let message = proto::StopMessage { r#type, peer: Some(peer), limit, status: None };
    message.encode_length_delimited_to_vec()
}

/// Signs the voucher that `peer` holds a slot with the owner of `keypair` until `expire`, in UNIX seconds.
///
/// A signed envelope (libp2p RFC 0002) as
/// [the specification](https://github.com/libp2p/specs/blob/master/relay/circuit-v2.md#reservation-vouchers) defines it.
/// Go clients verify it, and fail the reservation if it is invalid.
///
/// # Errors
///
/// When the key cannot sign, which none of libp2p's key types reports in practice.
pub fn sign_voucher(keypair: &Keypair, peer: PeerId, expire: u64) -> Result<Vec<u8>, SigningError> {
    let [relay, peer] = [keypair.public().to_peer_id(), peer].map(|peer| Some(peer.to_bytes()));
    let voucher = proto::Voucher { relay, peer, expiration: Some(expire) };
    let (domain, payload_type) = (VOUCHER_DOMAIN.to_owned(), VOUCHER_TYPE.to_vec());
    let envelope = SignedEnvelope::new(keypair, domain, payload_type, voucher.encode_to_vec())?;
    Ok(envelope.into_protobuf_encoding())
}

impl From<Limit> for Option<proto::Limit> {
    /// Without any limit the message has none: go-libp2p takes even an empty one for a limited connection, and then
    /// refuses ordinary streams on it.
    fn from(limit: Limit) -> Self {
        let seconds = |limit: Duration| u32::try_from(limit.as_secs()).unwrap_or(u32::MAX);
        let message = proto::Limit { duration: limit.duration.map(seconds), data: limit.bytes };
        (limit != Limit::default()).then_some(message)
    }
}

/// The protobuf messages of the specification.
pub(crate) mod proto {
    pub const HOP_RESERVE: i32 = 0;
    pub const HOP_CONNECT: i32 = 1;
    pub const HOP_STATUS: i32 = 2;
    pub const STOP_CONNECT: i32 = 0;
    pub const STOP_STATUS: i32 = 1;

    #[derive(Clone, PartialEq, prost::Message)]
    pub struct HopMessage {
        #[prost(int32, optional, tag = "1")]
        pub r#type: Option<i32>,
        #[prost(message, optional, tag = "2")]
        pub peer: Option<Peer>,
        #[prost(message, optional, tag = "3")]
        pub reservation: Option<Reservation>,
        #[prost(message, optional, tag = "4")]
        pub limit: Option<Limit>,
        #[prost(int32, optional, tag = "5")]
        pub status: Option<i32>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub struct StopMessage {
        #[prost(int32, optional, tag = "1")]
        pub r#type: Option<i32>,
        #[prost(message, optional, tag = "2")]
        pub peer: Option<Peer>,
        #[prost(message, optional, tag = "3")]
        pub limit: Option<Limit>,
        #[prost(int32, optional, tag = "4")]
        pub status: Option<i32>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub struct Peer {
        #[prost(bytes = "vec", optional, tag = "1")]
        pub id: Option<Vec<u8>>,
        #[prost(bytes = "vec", repeated, tag = "2")]
        pub addrs: Vec<Vec<u8>>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub struct Reservation {
        #[prost(uint64, optional, tag = "1")]
        pub expire: Option<u64>,
        #[prost(bytes = "vec", repeated, tag = "2")]
        pub addrs: Vec<Vec<u8>>,
        #[prost(bytes = "vec", optional, tag = "3")]
        pub voucher: Option<Vec<u8>>,
    }

    #[derive(Clone, Copy, PartialEq, prost::Message)]
    pub struct Limit {
        #[prost(uint32, optional, tag = "1")]
        pub duration: Option<u32>,
        #[prost(uint64, optional, tag = "2")]
        pub data: Option<u64>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub struct Voucher {
        #[prost(bytes = "vec", optional, tag = "1")]
        pub relay: Option<Vec<u8>>,
        #[prost(bytes = "vec", optional, tag = "2")]
        pub peer: Option<Vec<u8>>,
        #[prost(uint64, optional, tag = "3")]
        pub expiration: Option<u64>,
    }
}

#[cfg(test)]
mod tests {
    use libp2p::futures::{executor::block_on, io::Cursor};
    use proptest::prelude::*;

    use super::*;

    fn read(bytes: &[u8]) -> Option<Result<Vec<u8>, BadRequest>> {
        block_on(read_frame(&mut Cursor::new(bytes))).ok()
    }

    fn unframed(frame: &[u8]) -> Vec<u8> {
        read(frame).unwrap().expect("our own frames can be read")
    }

    #[test]
    fn a_reserve_message_is_two_bytes() {
        let alice = PeerId::random();
        assert_eq!(decode_request(&[0x08, 0x00], alice), Ok(Request::Reserve));
    }

    #[test]
    fn a_message_without_a_type_is_malformed_and_not_a_reserve() {
        let bad = decode_request(&[], PeerId::random()).unwrap_err();
        assert_eq!(bad.status(), Status::MalformedMessage);
    }

    #[test]
    fn an_unknown_type_is_malformed_and_a_status_is_unexpected() {
        let status = |message: &[u8]| {
            let bad = decode_request(message, PeerId::random()).unwrap_err();
            bad.status()
        };
        assert_eq!(status(&[0x08, 0x07]), Status::MalformedMessage);
        assert_eq!(status(&[0x08, 0x02]), Status::UnexpectedMessage);
    }

    #[test]
    fn a_connect_needs_a_valid_peer_other_than_the_source() {
        let (alice, bob) = (PeerId::random(), PeerId::random());
        let connect = |id: Option<Vec<u8>>| {
            let message = proto::HopMessage {
                r#type: Some(proto::HOP_CONNECT),
                peer: id.map(|id| proto::Peer { id: Some(id), addrs: Vec::new() }),
                ..Default::default()
            };
            decode_request(&message.encode_to_vec(), alice)
        };
        assert_eq!(connect(Some(bob.to_bytes())), Ok(Request::Connect(bob)));
        for bad in [None, Some(Vec::new()), Some(vec![1, 2, 3]), Some(alice.to_bytes())] {
            assert_eq!(connect(bad).unwrap_err().status(), Status::MalformedMessage);
        }
    }

    #[test]
    fn messages_above_4096_bytes_are_rejected() {
        let framed = |length: u16| {
            let mut buffer = unsigned_varint::encode::u16_buffer();
            let mut bytes = unsigned_varint::encode::u16(length, &mut buffer).to_vec();
            bytes.resize(bytes.len() + usize::from(length), 0);
            bytes
        };
        assert_eq!(read(&framed(4096)).unwrap().unwrap().len(), 4096);
        assert!(matches!(read(&framed(4097)), Some(Err(BadRequest::Malformed(_)))));
    }

    #[test]
    fn a_length_of_2_to_the_63_is_malformed_and_allocates_nothing() {
        let mut buffer = unsigned_varint::encode::u64_buffer();
        let prefix = unsigned_varint::encode::u64(1 << 63, &mut buffer);
        assert!(matches!(read(prefix), Some(Err(BadRequest::Malformed(_)))));
    }

    /// These texts appear in log lines, which are stable: see [`crate::event`].
    #[test]
    fn each_malformed_message_has_this_error_text() {
        let words_of = |read: Option<Result<Vec<u8>, BadRequest>>| match read {
            Some(Err(BadRequest::Malformed(words))) => words,
            other => panic!("{other:?}"),
        };
        for (bytes, words) in [
            (&[0x81, 0x20][..], "a message of more than 4096 bytes"),
            // 65,538, whose lower 16 bits are a RESERVE's length.
            (&[0x82, 0x80, 0x04, 8, 0], "a message of more than 4096 bytes"),
            (&[0x82, 0x80, 0x80, 0x80, 0x10, 8, 0], "a length prefix beyond 4096"),
            (&[0x82, 0x00, 8, 0], "a length prefix beyond 4096"), // not minimal
            (&[0xff; 9], "a length prefix beyond 4096"),
            (&[2, 0x08], "a message cut short"),
        ] {
            assert_eq!(words_of(read(bytes)), words);
        }

        // The identity of nothing, as an id.
        let alice = PeerId::from_bytes(&[0, 0]).unwrap();
        for (message, words) in [
            (&[0xff][..], "a message that is no protobuf"),
            (&[8, 1], "CONNECT without a peer"),
            (&[8, 1, 18, 0], "CONNECT to a peer id that is none"),
            (&[8, 1, 18, 4, 10, 2, 0, 0], "CONNECT to oneself"),
            (&[8, 2], "STATUS on a hop stream"),
            (&[8, 7], "a message of unknown type"),
            (&[], "a message without a type"),
        ] {
            let bad = decode_request(message, alice).unwrap_err();
            assert_eq!(bad.to_string(), words);
        }
        for (message, words) in [
            (&[0xff][..], "an answer that is no protobuf"),
            (&[8, 1], "STATUS without a status"),
            (&[8, 0], "CONNECT as an answer"),
            (&[], "an answer of unknown type"),
        ] {
            let bad = decode_stop_answer(message).unwrap_err();
            assert_eq!(bad.to_string(), words);
        }
    }

    #[test]
    fn bytes_after_a_message_stay_on_the_stream() {
        let mut stream = Cursor::new(b"\x02\x08\x00early data".to_vec());
        block_on(read_frame(&mut stream)).unwrap().unwrap();
        let mut rest = String::new();
        block_on(stream.read_to_string(&mut rest)).unwrap();
        assert_eq!(rest, "early data");
    }

    #[test]
    fn unset_limits_are_omitted() {
        let limit = |limit| {
            let message =
                proto::HopMessage::decode(&*unframed(&super::answer(Status::Ok, limit, None)))
                    .unwrap();
            message.limit
        };
        assert_eq!(limit(Limit::default()), None);
        let only_bytes = Limit { bytes: Some(7), duration: None };
        let sent = proto::Limit { data: Some(7), duration: None };
        assert_eq!(limit(only_bytes), Some(sent));
    }

    #[test]
    fn a_voucher_names_relay_peer_and_expiration_and_is_signed_by_the_relay() {
        let (relay, peer) = (Keypair::generate_ed25519(), PeerId::random());
        let bytes = sign_voucher(&relay, peer, 1_800_000_000).unwrap();
        let envelope = SignedEnvelope::from_protobuf_encoding(&bytes).unwrap();
        let (payload, signer) =
            envelope.payload_and_signing_key(VOUCHER_DOMAIN.to_owned(), &VOUCHER_TYPE).unwrap();
        assert_eq!(*signer, relay.public());
        let voucher = proto::Voucher::decode(payload).unwrap();
        assert_eq!(voucher.relay, Some(signer.to_peer_id().to_bytes()));
        assert_eq!(voucher.peer, Some(peer.to_bytes()));
        assert_eq!(voucher.expiration, Some(1_800_000_000));
    }

    proptest! {
        #[test]
        fn arbitrary_messages_do_not_panic(bytes: Vec<u8>) {
            if let Some(Ok(message)) = read(&bytes) {
                let _ = decode_request(&message, PeerId::random());
                let _ = decode_stop_answer(&message);
            }
            let _ = decode_request(&bytes, PeerId::random());
            let _ = decode_stop_answer(&bytes);
        }
    }
}
