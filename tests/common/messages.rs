//! The relay's messages as these tests write and read them: the specification's protobuf a second time,
//! so that a mistake in the relay's own definitions is not repeated.

use libp2p::{
    Multiaddr, PeerId, Stream,
    futures::{AsyncReadExt, AsyncWriteExt},
};
use prost::Message;

use super::within;

#[derive(Clone, PartialEq, Message)]
pub struct HopMessage {
    #[prost(int32, optional, tag = "1")]
    pub kind: Option<i32>,
    #[prost(message, optional, tag = "2")]
    pub peer: Option<Peer>,
    #[prost(message, optional, tag = "3")]
    pub reservation: Option<Reservation>,
    #[prost(message, optional, tag = "4")]
    pub limit: Option<Limit>,
    #[prost(int32, optional, tag = "5")]
    pub status: Option<i32>,
}

#[derive(Clone, PartialEq, Message)]
pub struct StopMessage {
    #[prost(int32, optional, tag = "1")]
    pub kind: Option<i32>,
    #[prost(message, optional, tag = "2")]
    pub peer: Option<Peer>,
    #[prost(message, optional, tag = "3")]
    pub limit: Option<Limit>,
    #[prost(int32, optional, tag = "4")]
    pub status: Option<i32>,
}

#[derive(Clone, PartialEq, Message)]
pub struct Peer {
    #[prost(bytes = "vec", optional, tag = "1")]
    pub id: Option<Vec<u8>>,
    #[prost(bytes = "vec", repeated, tag = "2")]
    pub addrs: Vec<Vec<u8>>,
}

#[derive(Clone, PartialEq, Message)]
pub struct Reservation {
    #[prost(uint64, optional, tag = "1")]
    pub expire: Option<u64>,
    #[prost(bytes = "vec", repeated, tag = "2")]
    pub addrs: Vec<Vec<u8>>,
    #[prost(bytes = "vec", optional, tag = "3")]
    pub voucher: Option<Vec<u8>>,
}

#[derive(Clone, Copy, PartialEq, Message)]
pub struct Limit {
    #[prost(uint32, optional, tag = "1")]
    pub duration: Option<u32>,
    #[prost(uint64, optional, tag = "2")]
    pub data: Option<u64>,
}

/// The fields of an identify message that these tests use.
#[derive(Clone, PartialEq, Message)]
pub struct Identify {
    #[prost(bytes = "vec", optional, tag = "1")]
    pub public_key: Option<Vec<u8>>,
    #[prost(bytes = "vec", repeated, tag = "2")]
    pub listen_addrs: Vec<Vec<u8>>,
    #[prost(bytes = "vec", optional, tag = "4")]
    pub observed_addr: Option<Vec<u8>>,
}

impl Identify {
    /// A message that reports this observed address.
    pub fn reached_at(address: &Multiaddr) -> Self {
        Self { observed_addr: Some(address.to_vec()), ..Self::default() }
    }
}

// The statuses of answers.
pub const OK: Option<i32> = Some(100);
pub const RESERVATION_REFUSED: Option<i32> = Some(200);
pub const RESOURCE_LIMIT_EXCEEDED: Option<i32> = Some(201);
pub const PERMISSION_DENIED: Option<i32> = Some(202);
pub const CONNECTION_FAILED: Option<i32> = Some(203);
pub const NO_RESERVATION: Option<i32> = Some(204);
pub const MALFORMED_MESSAGE: Option<i32> = Some(400);
pub const UNEXPECTED_MESSAGE: Option<i32> = Some(401);

pub fn reserve() -> HopMessage {
    HopMessage { kind: Some(0), ..HopMessage::default() }
}

pub fn connect(target: PeerId) -> HopMessage {
    HopMessage {
        kind: Some(1),
        peer: Some(Peer { id: Some(target.to_bytes()), addrs: Vec::new() }),
        ..HopMessage::default()
    }
}

pub fn stop_status(status: i32) -> StopMessage {
    StopMessage { kind: Some(1), status: Some(status), ..StopMessage::default() }
}

/// Writes a message with its length in front.
pub async fn write(stream: &mut Stream, message: &impl Message) {
    let bytes = message.encode_length_delimited_to_vec();
    within(async {
        stream.write_all(&bytes).await?;
        stream.flush().await
    })
    .await
    .expect("the other side reads");
}

/// Reads a message with its length in front.
pub async fn read<M: Message + Default>(stream: &mut Stream) -> M {
    let mut prefix = Vec::new();
    while prefix.last().is_none_or(|byte| byte & 0x80 != 0) {
        let mut byte = [0];
        within(stream.read_exact(&mut byte)).await.expect("an answer");
        prefix.push(byte[0]);
    }
    let length = prost::decode_length_delimiter(&*prefix).expect("a length");
    let mut message = vec![0; length];
    within(stream.read_exact(&mut message)).await.expect("the whole message");
    M::decode(&*message).expect("a message")
}
