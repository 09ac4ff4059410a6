//! Reads protobuf messages from streams, each with its length in front: identify's, AutoNAT's, and the answers that
//! `relaylet check` gets.

use std::io;

use libp2p::futures::{AsyncRead, AsyncReadExt};
use prost::{Message, bytes::Bytes};

use crate::wire;

/// The largest message that is read, in bytes: go-libp2p's limit for identify and AutoNAT. rust-libp2p sends at most 4,096.
const MAX_MESSAGE: usize = 8192;

/// Reads a message. It takes no more memory than has arrived of it.
///
/// # Errors
///
/// When the stream fails, or the message is malformed, too long or cut short.
pub async fn read<M: Message + Default>(stream: &mut (impl AsyncRead + Unpin)) -> io::Result<M> {
    let length = wire::read_length(stream).await?;
    let length =
        length.filter(|length| *length <= MAX_MESSAGE).ok_or(io::ErrorKind::InvalidData)?;
    let mut bytes = Vec::new();
    stream.take(length as u64).read_to_end(&mut bytes).await?;
    if bytes.len() < length {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(M::decode(Bytes::from(bytes))?)
}
