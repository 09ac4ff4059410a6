//! The options of every TCP socket, and the remedy in errors of bind.

use std::{io, time::Duration};

use async_std::net::TcpStream;
use socket2::{SockRef, TcpKeepalive};

/// How long what we sent may stay unacknowledged before the kernel gives the connection up.
///
/// Without it a peer that vanished behind a full window holds its socket for a quarter of an hour.
const UNACKNOWLEDGED: Duration = Duration::from_secs(60);
/// After which silence the kernel asks whether the other side is still there, and how often.
const KEEPALIVE: Duration = Duration::from_secs(60);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(15);

/// Said here, because libp2p's boxed transports keep the words of an error and lose its kind.
pub(crate) fn with_remedy(error: &io::Error) -> io::Error {
    let remedy = match error.kind() {
        io::ErrorKind::AddrInUse => "stop the program that has it, or listen on another port",
        io::ErrorKind::AddrNotAvailable => "this machine has no such address; try 0.0.0.0 or ::",
        io::ErrorKind::PermissionDenied => "ports below 1024 are for root; try a higher one",
        _ => "try another address",
    };
    io::Error::new(error.kind(), format!("{error}; {remedy}"))
}

/// The options of every connection.
pub(crate) fn prepare(stream: &TcpStream) -> io::Result<()> {
    let socket = SockRef::from(stream);
    socket.set_tcp_nodelay(true)?;
    let keepalive = TcpKeepalive::new().with_time(KEEPALIVE).with_interval(KEEPALIVE_INTERVAL);
    socket.set_tcp_keepalive(&keepalive)?;
    #[cfg(any(target_os = "android", target_os = "linux"))]
    socket.set_tcp_user_timeout(Some(UNACKNOWLEDGED))?;
    Ok(())
}
