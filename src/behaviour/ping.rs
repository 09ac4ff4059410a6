//! A sign of life, over `/ipfs/ping/1.0.0`: given when asked for, and asked for.
//!
//! Served by the relay's own handler, because libp2p's ping behaviour would also *ask* on every
//! connection, which drains phones and cannot be switched off.

use std::io;

use libp2p::{
    StreamProtocol,
    futures::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
};

/// The protocol, as [the specification](https://github.com/libp2p/specs/blob/master/ping/ping.md)
/// has it.
pub(crate) const PING_PROTOCOL: StreamProtocol = StreamProtocol::new("/ipfs/ping/1.0.0");

/// How many bytes are sent and echoed at a time.
const PAYLOAD: usize = 32;

/// Echoes whatever the peer sends, 32 bytes at a time, until it has had enough.
pub(crate) async fn answer(mut stream: impl AsyncRead + AsyncWrite + Unpin) -> io::Result<()> {
    let mut payload = [0; PAYLOAD];
    loop {
        match stream.read_exact(&mut payload).await {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => break,
            Err(error) => return Err(error),
        }
        stream.write_all(&payload).await?;
        stream.flush().await?;
    }
    stream.close().await
}

/// Asks for a sign of life, on a stream of its own, and waits for any: an answer, an end, a reset.
///
/// What is sent does not matter, because what comes back is not looked at.
pub(crate) async fn ask(mut stream: impl AsyncRead + AsyncWrite + Unpin) -> io::Result<()> {
    let mut payload = [0; PAYLOAD];
    stream.write_all(&payload).await?;
    stream.flush().await?;
    stream.read_exact(&mut payload).await?;
    stream.close().await
}
