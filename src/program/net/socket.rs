//! TCP sockets on async-std's reactor: reads, options, what the kernel knows of them, and the remedies for bind errors.

use std::{
    io::{self, Read},
    mem,
    net::{Shutdown, SocketAddr, TcpStream},
    ops::Deref,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use async_io::Async;
use libp2p::futures::{AsyncRead, AsyncWrite};
use socket2::{SockRef, TcpKeepalive};

use crate::delegate::delegate_write;

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

/// The socket of a connection. Clones share it; one of them reads.
///
/// Not async-std's `TcpStream`, which reads until the kernel has nothing, and then once more: for a short message that is
/// three system calls instead of one.
#[derive(Clone, Debug)]
pub struct Socket {
    stream: Arc<Async<TcpStream>>,
    /// The last read found less than it had room for: the next one is left out, and waits for the reactor.
    is_empty: bool,
}

impl Socket {
    /// A connection on the reactor. Sets its options.
    pub fn new(stream: Async<TcpStream>) -> Self {
        set_options(&stream);
        Self { stream: Arc::new(stream), is_empty: false }
    }

    /// Connects to this address.
    ///
    /// # Errors
    ///
    /// The kernel's.
    pub async fn connect(to: SocketAddr) -> io::Result<Self> {
        Ok(Self::new(Async::<TcpStream>::connect(to).await?))
    }
}

impl Deref for Socket {
    type Target = Async<TcpStream>;

    fn deref(&self) -> &Async<TcpStream> {
        &self.stream
    }
}

impl AsyncRead for Socket {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        into: &mut [u8],
    ) -> Poll<io::Result<usize>> {
        if !mem::take(&mut self.is_empty) {
            match self.get_ref().read(into) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                read => {
                    self.is_empty = matches!(read, Ok(bytes) if bytes < into.len());
                    return Poll::Ready(read);
                }
            }
        }
        // Registers for the next event. First it may report, and forget, the one before the last read.
        while self.poll_readable(cx)?.is_ready() {}
        Poll::Pending
    }
}

impl AsyncWrite for Socket {
    delegate_write!(stream, Deref::deref);
}

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
fn set_options(stream: &Async<TcpStream>) {
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
pub(crate) fn prepare_for_bulk(stream: &Async<TcpStream>) {
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
pub(crate) fn set_user_timeout(stream: &Async<TcpStream>, is_on: bool) {
    #[cfg(any(target_os = "android", target_os = "linux"))]
    let _ = SockRef::from(stream).set_tcp_user_timeout(is_on.then_some(USER_TIMEOUT));
    #[cfg(not(any(target_os = "android", target_os = "linux")))]
    let _ = (stream, is_on);
}

/// Shuts down the sending half of a connection, and reads to its end. Closing a socket resets the connection if not all that
/// the peer sends was read, and the peer may lose what was sent last.
pub(crate) fn poll_end(socket: &Socket, cx: &mut Context<'_>) -> Poll<()> {
    let _ = socket.get_ref().shutdown(Shutdown::Write); // fails if the connection is reset
    match Pin::new(&mut &**socket).poll_read(cx, &mut [0; 4096]) {
        Poll::Ready(Ok(1..)) => cx.waker().wake_by_ref(), // there may be more
        Poll::Ready(_) => return Poll::Ready(()),
        Poll::Pending => {}
    }
    Poll::Pending
}

/// How many bytes the other end has acknowledged so far; `None` where the kernel does not say so.
pub(crate) fn acknowledged(stream: &Async<TcpStream>) -> Option<u64> {
    #[cfg(target_os = "linux")]
    {
        let stream = stream.get_ref();
        TcpInfo::of(stream.local_addr().ok()?, stream.peer_addr().ok()?)?.acknowledged()
    }
    #[cfg(not(target_os = "linux"))]
    return None;
}

#[cfg(test)]
mod tests {
    use std::{
        io::Write,
        net::TcpListener,
        sync::atomic::{AtomicUsize, Ordering},
        task::{Wake, Waker},
    };

    use async_io::block_on;
    use libp2p::futures::AsyncReadExt;

    use super::*;

    /// A connection on loopback: this end on the reactor, and the other.
    fn connection() -> (Socket, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let socket = block_on(Socket::connect(listener.local_addr().unwrap())).unwrap();
        (socket, listener.accept().unwrap().0)
    }

    #[derive(Default)]
    struct Wakes(AtomicUsize);

    impl Wake for Wakes {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    #[test]
    fn after_a_short_read_the_next_one_waits_for_the_reactor() {
        let (mut socket, mut other) = connection();
        let mut into = [0; 8];
        for message in ["one", "two", "three"] {
            other.write_all(message.as_bytes()).unwrap();
            let read = block_on(socket.read(&mut into)).unwrap();
            assert_eq!(&into[..read], message.as_bytes());
        }
        // What comes now is read after a wake, and not before.
        let wakes = Arc::<Wakes>::default();
        let waker = Waker::from(Arc::clone(&wakes));
        let mut read = |into: &mut [u8]| {
            Pin::new(&mut socket).poll_read(&mut Context::from_waker(&waker), into)
        };
        assert!(read(&mut into).is_pending());
        other.write_all(b"a whole buffer and more").unwrap();
        while wakes.0.load(Ordering::Relaxed) == 0 {
            std::thread::yield_now();
        }
        // A full buffer may not be all: that is read without a wake.
        for bytes in [8, 8, 7] {
            assert!(matches!(read(&mut into), Poll::Ready(Ok(read)) if read == bytes));
        }
        assert!(read(&mut into).is_pending());
        drop(other);
        assert_eq!(block_on(socket.read(&mut into)).unwrap(), 0);
        assert_eq!(block_on(socket.read(&mut into)).unwrap(), 0);
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn unsent_data_in_the_kernel_is_bounded_and_dead_connections_time_out() {
        let (stream, client) = connection();
        let socket = SockRef::from(&*stream);
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
    }
}
