//! Options of TCP sockets, what the kernel knows of them, and the remedies for bind errors.

use std::{
    io,
    net::Shutdown,
    task::{Context, Poll},
    time::Duration,
};

use async_std::net::TcpStream;
use libp2p::futures::{AsyncReadExt, FutureExt};
use socket2::{SockRef, TcpKeepalive};

#[cfg(target_os = "linux")]
use crate::behaviour::tcp_info::TcpInfo;

/// How long sent data may stay unacknowledged before the kernel closes the connection: see [`set_user_timeout`].
///
/// Without it a peer that vanished while its window was full holds its socket for a quarter of an hour.
#[cfg(any(target_os = "android", target_os = "linux"))]
const USER_TIMEOUT: Duration = Duration::from_secs(60);

/// How many written bytes may wait unsent in the kernel; above it the socket accepts no more. So what is written next,
/// such as a probe, waits only for these bytes and those in flight.
#[cfg(any(target_os = "android", target_os = "linux"))]
const MAX_UNSENT: u32 = 128 * 1024;

/// After how much silence the kernel sends the first keep-alive probe, and how often further ones.
const KEEPALIVE: Duration = Duration::from_secs(60);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(15);

/// Adds the remedy to a bind error. Done here because libp2p's boxed transports keep the text of an error and drop
/// its kind.
pub(crate) fn with_remedy(error: &io::Error) -> io::Error {
    let remedy = match error.kind() {
        io::ErrorKind::AddrInUse => "stop the program that uses it, or listen on another port",
        io::ErrorKind::AddrNotAvailable => "this machine has no such address; try 0.0.0.0 or ::",
        io::ErrorKind::PermissionDenied => "ports below 1024 are for root; try a higher one",
        _ => "try another address",
    };
    io::Error::new(error.kind(), format!("{error}; {remedy}"))
}

/// Sets the options of a connection's socket, as far as the kernel supports them: WSL 1 has no TCP_USER_TIMEOUT, for
/// example. A relay serves its clients without them, too.
pub(crate) fn set_options(stream: &TcpStream) {
    let socket = SockRef::from(stream);
    let _ = socket.set_tcp_nodelay(true);
    let keepalive = TcpKeepalive::new().with_time(KEEPALIVE).with_interval(KEEPALIVE_INTERVAL);
    let _ = socket.set_tcp_keepalive(&keepalive);
    #[cfg(any(target_os = "android", target_os = "linux"))]
    {
        let _ = socket.set_tcp_user_timeout(Some(USER_TIMEOUT));
        let _ = socket.set_tcp_notsent_lowat(MAX_UNSENT);
        // Without backoff of the first retransmissions, a probe is sent eleven times instead of five within its 3 s.
        let _ = socket.set_tcp_thin_linear_timeouts(true);
    }
    // Linux uses linear timeouts only after the initial slow start, and takes a BBR connection to be in it forever.
    #[cfg(target_os = "linux")]
    if socket.tcp_congestion().is_ok_and(|name| name.starts_with(b"bbr")) {
        let _ = socket.set_tcp_congestion(b"reno");
    }
}

/// Restores the system's congestion control, in place of which [`set_options`] may have set another, before bulk data.
pub(crate) fn prepare_for_bulk(stream: &TcpStream) {
    #[cfg(target_os = "linux")]
    if let Ok(name) = std::fs::read("/proc/sys/net/ipv4/tcp_congestion_control") {
        let _ = SockRef::from(stream).set_tcp_congestion(name.trim_ascii());
    }
    #[cfg(not(target_os = "linux"))]
    let _ = stream;
}

/// Sets whether the kernel closes a connection whose peer stalls. The muxer switches that off and does it itself: the
/// kernel would also close one whose peer reads slowly, as it counts from when the peer's window first had no room
/// (Linux 6.18).
pub(crate) fn set_user_timeout(stream: &TcpStream, is_on: bool) {
    #[cfg(any(target_os = "android", target_os = "linux"))]
    let _ = SockRef::from(stream).set_tcp_user_timeout(is_on.then_some(USER_TIMEOUT));
    #[cfg(not(any(target_os = "android", target_os = "linux")))]
    let _ = (stream, is_on);
}

/// Shuts down the sending half of a connection, and reads to its end. Closing a socket resets the connection if not all that
/// the peer sends was read, and the peer may lose what was sent last.
pub(crate) fn poll_end(mut stream: &TcpStream, cx: &mut Context<'_>) -> Poll<()> {
    let _ = stream.shutdown(Shutdown::Write); // fails if the connection is reset
    match stream.read(&mut [0; 4096]).poll_unpin(cx) {
        Poll::Ready(Ok(1..)) => cx.waker().wake_by_ref(), // there may be more
        Poll::Ready(_) => return Poll::Ready(()),
        Poll::Pending => {}
    }
    Poll::Pending
}

/// How many bytes the other end has acknowledged so far; `None` where the kernel does not say so.
pub(crate) fn acknowledged(stream: &TcpStream) -> Option<u64> {
    #[cfg(target_os = "linux")]
    return TcpInfo::of(stream.local_addr().ok()?, stream.peer_addr().ok()?)?.acknowledged();
    #[cfg(not(target_os = "linux"))]
    return None;
}

#[cfg(test)]
#[cfg(target_os = "linux")]
mod tests {
    use async_std::{net::TcpListener, task::block_on};

    use super::*;

    #[test]
    fn unsent_data_in_the_kernel_is_bounded_and_dead_connections_time_out() {
        block_on(async {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
            let (stream, _) = listener.accept().await.unwrap();
            set_options(&stream);
            let socket = SockRef::from(&stream);
            assert_eq!(socket.tcp_notsent_lowat().unwrap(), MAX_UNSENT);
            assert_eq!(socket.tcp_user_timeout().unwrap(), Some(USER_TIMEOUT));
            assert!(socket.tcp_thin_linear_timeouts().unwrap());
            let by_default = SockRef::from(&client).tcp_congestion().unwrap();
            assert!(!socket.tcp_congestion().unwrap().starts_with(b"bbr"));
            prepare_for_bulk(&stream);
            assert_eq!(socket.tcp_congestion().unwrap(), by_default);
            set_user_timeout(&stream, false);
            assert_eq!(socket.tcp_user_timeout().unwrap(), None);
            set_user_timeout(&stream, true);
            assert_eq!(socket.tcp_user_timeout().unwrap(), Some(USER_TIMEOUT));
        });
    }
}
