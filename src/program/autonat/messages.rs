//! AutoNAT's messages.
//!
//! See [version 1](https://github.com/libp2p/specs/blob/master/autonat/autonat-v1.md#protobuf) and
//! [version 2](https://github.com/libp2p/specs/blob/master/autonat/autonat-v2.md#rpc-messages).

use std::io;

use libp2p::futures::{AsyncWrite, AsyncWriteExt};
use prost::Message;

/// Writes a message with its length in front, and closes this half of the stream.
///
/// # Errors
///
/// When the stream fails.
pub async fn write_and_close(
    stream: &mut (impl AsyncWrite + Unpin),
    message: &impl Message,
) -> io::Result<()> {
    stream.write_all(&message.encode_length_delimited_to_vec()).await?;
    stream.close().await
}

pub mod v1 {
    use crate::wire::proto::Peer;

    pub const DIAL: i32 = 0;
    pub const DIAL_RESPONSE: i32 = 1;

    pub const OK: i32 = 0;
    pub const E_DIAL_ERROR: i32 = 100;
    pub const E_DIAL_REFUSED: i32 = 101;
    pub const E_BAD_REQUEST: i32 = 200;

    #[derive(Clone, PartialEq, prost::Message)]
    pub struct Message {
        #[prost(int32, optional, tag = "1")]
        pub r#type: Option<i32>,
        #[prost(message, optional, tag = "2")]
        pub dial: Option<Dial>,
        #[prost(message, optional, tag = "3")]
        pub dial_response: Option<DialResponse>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub struct Dial {
        #[prost(message, optional, tag = "1")]
        pub peer: Option<Peer>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub struct DialResponse {
        #[prost(int32, optional, tag = "1")]
        pub status: Option<i32>,
        #[prost(string, optional, tag = "2")]
        pub status_text: Option<String>,
        #[prost(bytes = "vec", optional, tag = "3")]
        pub addr: Option<Vec<u8>>,
    }
}

pub mod v2 {
    pub const OK: i32 = 200;
    pub const E_REQUEST_REJECTED: i32 = 100;
    pub const E_DIAL_REFUSED: i32 = 101;

    // Values of `dial_status`, if the relay has dialed.
    pub const E_DIAL_ERROR: i32 = 100;
    pub const E_DIAL_BACK_ERROR: i32 = 101;

    /// One of these fields is set. The specification's others are about data that this server never requests.
    #[derive(Clone, PartialEq, prost::Message)]
    pub struct Message {
        #[prost(message, optional, tag = "1")]
        pub dial_request: Option<DialRequest>,
        #[prost(message, optional, tag = "2")]
        pub dial_response: Option<DialResponse>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub struct DialRequest {
        #[prost(bytes = "vec", repeated, tag = "1")]
        pub addrs: Vec<Vec<u8>>,
        #[prost(fixed64, tag = "2")]
        pub nonce: u64,
    }

    #[derive(Clone, Copy, PartialEq, prost::Message)]
    pub struct DialResponse {
        #[prost(int32, tag = "1")]
        pub status: i32,
        #[prost(uint32, tag = "2")]
        pub addr_idx: u32,
        #[prost(int32, tag = "3")]
        pub dial_status: i32,
    }

    #[derive(Clone, Copy, PartialEq, prost::Message)]
    pub struct DialBack {
        #[prost(fixed64, tag = "1")]
        pub nonce: u64,
    }
}
