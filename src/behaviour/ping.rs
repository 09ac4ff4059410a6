//! `/ipfs/ping/1.0.0`, both ways: answers pings, and probes peers.
//!
//! Part of the relay's own handler, because libp2p's ping behaviour also pings on every connection, which drains phones
//! and cannot be switched off.

use std::io;

use libp2p::{
    StreamProtocol,
    futures::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
};

use crate::wire;

/// The protocol of [the specification](https://github.com/libp2p/specs/blob/master/ping/ping.md).
pub(crate) const PING_PROTOCOL: StreamProtocol = StreamProtocol::new("/ipfs/ping/1.0.0");

/// The length of a ping, in bytes.
const PAYLOAD: usize = 32;

/// Echoes what the peer sends, 32 bytes at a time, until it closes the stream or that fails.
pub(crate) async fn answer(mut stream: impl AsyncRead + AsyncWrite + Unpin) -> io::Result<()> {
    let mut payload = [0; PAYLOAD];
    while stream.read_exact(&mut payload).await.is_ok() {
        wire::write_frame(&mut stream, &payload).await?;
    }
    stream.close().await
}

/// Sends one ping and awaits any reaction: an answer, an end, a reset.
///
/// The payload is zeros, because the answer is not compared with it.
pub(crate) async fn probe(mut stream: impl AsyncRead + AsyncWrite + Unpin) -> io::Result<()> {
    let mut payload = [0; PAYLOAD];
    wire::write_frame(&mut stream, &payload).await?;
    stream.read_exact(&mut payload).await?;
    stream.close().await
}
