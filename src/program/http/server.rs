//! The HTTP port: hyper on a thread of its own, which polls a few sockets.
//!
//! The thread shares neither executor nor reactor with the relay, so that no request wakes the relay. The cost of
//! its clients is bounded: their number, the bytes that each may send ahead, the time that each may take, and
//! the share of a core for all of them.

use std::{
    cell::Cell,
    cmp::Reverse,
    convert::Infallible,
    future::{Future, poll_fn},
    io::{self, IoSlice, Read as _, Write as _},
    net::{Shutdown, TcpListener, TcpStream},
    pin::Pin,
    rc::Rc,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, Wake, Waker},
    thread,
    time::{Duration, Instant},
};

use hyper::{
    rt::{Read, ReadBufCursor, Write},
    server::conn::http1,
    service::service_fn,
};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
    time::ClockId,
};

use super::{process::read_clock, routes::Routes};

/// How many connections are served at a time. One more replaces the one that would time out first.
const MAX_CONNECTIONS: usize = 32;

/// How many connections are accepted before the open ones are served.
const MAX_ACCEPTS: usize = MAX_CONNECTIONS / 4;

/// How long the first request of a connection may take.
const FIRST_REQUEST_TIMEOUT: Duration = Duration::from_secs(10);

/// How long the client may take to read an answer and to send the next request.
const NEXT_REQUEST_TIMEOUT: Duration = Duration::from_secs(30);

/// The longest head of a request, in bytes: the least that hyper takes.
const MAX_HEAD: usize = 8 * 1024;

/// After each turn the thread sleeps this many times as long as it worked: it takes a tenth of a core at most.
const SLEEP_PER_WORK: u32 = 9;

/// After how long an answer that was pending is polled again.
const POLL_INTERVAL: Duration = Duration::from_millis(10);

/// The longest sleep, also when no file descriptors are left.
const MAX_SLEEP: Duration = Duration::from_secs(1);

/// Serves `routes` on a thread that never ends.
///
/// # Errors
///
/// When no thread can be started.
pub fn start(listener: TcpListener, routes: Routes) -> io::Result<()> {
    listener.set_nonblocking(true)?;
    let thread = thread::Builder::new().name("relaylet-http".into());
    thread.spawn(move || serve(&listener, routes))?;
    Ok(())
}

fn serve(listener: &TcpListener, routes: Routes) {
    // The relay's threads come first. Elsewhere than on Linux this would lower their priority, too.
    #[cfg(target_os = "linux")]
    let _ = rustix::process::nice(19);
    let routes = Rc::new(routes);
    let mut connections: Vec<Connection> = Vec::new();
    let woken = Arc::new(Woken::default());
    let waker = Waker::from(Arc::clone(&woken));
    loop {
        let before = read_clock(ClockId::ThreadCPUTime);
        wait(listener, &connections, woken.0.swap(false, Ordering::Relaxed));
        let now = Instant::now();
        for _ in 0..MAX_ACCEPTS {
            match listener.accept() {
                Ok((stream, _)) => {
                    if connections.len() == MAX_CONNECTIONS {
                        connections.sort_by_key(|it| Reverse(it.socket.deadline.get()));
                        connections.pop();
                    }
                    connections.extend(Connection::new(stream, &routes, now));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                // The client closed it before it was accepted.
                Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
                Err(_) => {
                    thread::sleep(MAX_SLEEP);
                    break;
                }
            }
        }
        let cx = &mut Context::from_waker(&waker);
        connections.retain_mut(|connection| connection.poll(now, cx));
        let worked = read_clock(ClockId::ThreadCPUTime).saturating_sub(before);
        thread::sleep((worked * SLEEP_PER_WORK).min(MAX_SLEEP));
    }
}

/// Waits until a socket is ready or a connection times out; for a short time if an answer is pending.
fn wait(listener: &TcpListener, connections: &[Connection], is_pending: bool) {
    let sockets = connections.iter().map(|connection| &connection.socket);
    let mut polled = vec![PollFd::new(listener, PollFlags::IN)];
    polled.extend(sockets.clone().map(|it| PollFd::new(&it.stream, it.waits_for.get())));
    let deadline = sockets.map(|it| it.deadline.get()).min();
    let timeout = match is_pending {
        true => Some(POLL_INTERVAL),
        false => deadline.map(|deadline| deadline.saturating_duration_since(Instant::now())),
    };
    let timeout = timeout.and_then(|timeout| Timespec::try_from(timeout).ok());
    match poll(&mut polled, timeout.as_ref()) {
        Ok(_) | Err(Errno::INTR) => {}
        Err(_) => thread::sleep(MAX_SLEEP),
    }
}

/// Whether a task was woken by something other than a socket.
#[derive(Default)]
struct Woken(AtomicBool);

impl Wake for Woken {
    fn wake(self: Arc<Self>) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// One connection, and hyper's task for it.
struct Connection {
    socket: Rc<Socket>,
    task: Pin<Box<dyn Future<Output = hyper::Result<()>>>>,
}

/// A socket, the readiness that its task waits for, and its deadline.
struct Socket {
    stream: TcpStream,
    waits_for: Cell<PollFlags>,
    deadline: Cell<Instant>,
}

impl Connection {
    fn new(stream: TcpStream, routes: &Rc<Routes>, now: Instant) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        stream.set_nodelay(true)?;
        let socket = Rc::new(Socket {
            stream,
            waits_for: Cell::new(PollFlags::IN),
            deadline: Cell::new(now + FIRST_REQUEST_TIMEOUT),
        });
        let (routes, client) = (Rc::clone(routes), Rc::clone(&socket));
        let service = service_fn(move |request| {
            client.deadline.set(Instant::now() + NEXT_REQUEST_TIMEOUT);
            let routes = Rc::clone(&routes);
            poll_fn(move |cx| {
                let answer = routes.answer(&request);
                if answer.is_pending() {
                    cx.waker().wake_by_ref();
                }
                answer.map(Ok::<_, Infallible>)
            })
        });
        let task = http1::Builder::new()
            .max_buf_size(MAX_HEAD)
            .half_close(true) // a client that sends nothing more may wait for its answer
            .header_read_timeout(None) // the deadline is ours
            .serve_connection(HyperIo(Rc::clone(&socket)), service);
        Ok(Self { socket, task: Box::pin(task) })
    }

    /// Polls its task; returns whether the connection stays open.
    fn poll(&mut self, now: Instant, cx: &mut Context<'_>) -> bool {
        self.socket.waits_for.set(PollFlags::empty());
        self.task.as_mut().poll(cx).is_pending() && now < self.socket.deadline.get()
    }
}

/// The socket as hyper's I/O.
struct HyperIo(Rc<Socket>);

impl HyperIo {
    /// Converts the result of an attempt; one that would block waits for this readiness.
    fn poll_result<T>(&self, result: io::Result<T>, wait_for: PollFlags) -> Poll<io::Result<T>> {
        match result {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                let all = self.0.waits_for.get() | wait_for;
                self.0.waits_for.set(all);
                Poll::Pending
            }
            result => Poll::Ready(result),
        }
    }
}

impl Read for HyperIo {
    fn poll_read(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
        mut buffer: ReadBufCursor<'_>,
    ) -> Poll<io::Result<()>> {
        let mut bytes = [0; MAX_HEAD];
        let (room, _) = bytes.split_at_mut(MAX_HEAD.min(buffer.remaining()));
        let read = (&self.0.stream).read(room);
        let read = read.map(|read| buffer.put_slice(room.get(..read).unwrap_or_default()));
        self.poll_result(read, PollFlags::IN)
    }
}

impl Write for HyperIo {
    fn poll_write(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.poll_result((&self.0.stream).write(bytes), PollFlags::OUT)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
        bytes: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.poll_result((&self.0.stream).write_vectored(bytes), PollFlags::OUT)
    }

    fn is_write_vectored(&self) -> bool {
        true // else hyper copies each answer
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(self.0.stream.shutdown(Shutdown::Write))
    }
}
