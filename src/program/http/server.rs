//! The HTTP port: a thread of its own, which waits for a few sockets and for nothing else.
//!
//! hyper speaks HTTP; this keeps whoever calls from being felt by the relay. The thread shares
//! neither executor nor reactor with it, so that nothing that comes in here ever wakes it. What
//! callers can cost is bounded: how many there are, how much each may send ahead, how long it may
//! take, and how much of a core they get all together.

use std::{
    cell::Cell,
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
    time::{ClockId, clock_gettime},
};

use super::routes::Site;

/// How many callers are served at a time. One more takes the place of whoever has asked for nothing
/// for the longest.
const MOST_CALLERS: usize = 32;

/// How many are let in before those who are in get their turn.
const MOST_AT_ONCE: usize = MOST_CALLERS / 4;

/// How long the first request of a connection may take to come.
const FIRST_REQUEST: Duration = Duration::from_secs(10);

/// How long an answer may take to be read, and the next request to come.
const NEXT_REQUEST: Duration = Duration::from_secs(30);

/// How much of a request is read ahead, in bytes: its head has to fit. The least that hyper takes.
const READ_AHEAD: usize = 8 * 1024;

/// How many times as long as it worked the thread rests: a tenth of a core is all that callers get.
const REST: u32 = 9;

/// When to look again whether there is what was not there yet.
const SOON: Duration = Duration::from_millis(10);

/// The longest rest, and how long to wait when there are no files left to open.
const PAUSE: Duration = Duration::from_secs(1);

/// Serves `site` to whoever calls, on a thread that never ends.
///
/// # Errors
///
/// When there is no thread to be had.
pub fn start(listener: TcpListener, site: Site) -> io::Result<()> {
    listener.set_nonblocking(true)?;
    let thread = thread::Builder::new().name("relaylet-http".into());
    thread.spawn(move || serve(&listener, site))?;
    Ok(())
}

fn serve(listener: &TcpListener, site: Site) {
    // Whatever the relay's threads have to do comes first. Elsewhere this would be about them, too.
    #[cfg(target_os = "linux")]
    let _ = rustix::process::nice(19);
    let site = Rc::new(site);
    let mut callers: Vec<Caller> = Vec::new();
    let woken = Arc::new(Woken::default());
    let waker = Waker::from(Arc::clone(&woken));
    loop {
        wait(listener, &callers, woken.0.swap(false, Ordering::Relaxed));
        let (start, before) = (Instant::now(), time_worked());
        for _ in 0..MOST_AT_ONCE {
            match listener.accept() {
                Ok((socket, _)) => {
                    if callers.len() == MOST_CALLERS {
                        show_out(&mut callers);
                    }
                    callers.extend(Caller::new(socket, &site, start));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                // It went again before its turn came.
                Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
                Err(_) => {
                    thread::sleep(PAUSE);
                    break;
                }
            }
        }
        let cx = &mut Context::from_waker(&waker);
        callers.retain_mut(|caller| caller.serve(start, cx));
        let worked = time_worked().saturating_sub(before);
        thread::sleep((worked * REST).min(PAUSE));
    }
}

/// How long this thread has worked: not for how long it was kept from it.
fn time_worked() -> Duration {
    let worked = clock_gettime(ClockId::ThreadCPUTime);
    Duration::try_from(worked).unwrap_or_default()
}

/// Waits until a socket is ready or somebody's time is up; not for long, if there is more to do.
fn wait(listener: &TcpListener, callers: &[Caller], more_to_do: bool) {
    let mut sockets = vec![PollFd::new(listener, PollFlags::IN)];
    let waiting =
        callers.iter().map(|caller| PollFd::new(&caller.line.socket, caller.line.waits_for.get()));
    sockets.extend(waiting);
    let until = callers.iter().map(|caller| caller.line.until.get()).min();
    let time = match (more_to_do, until) {
        (true, _) => Some(SOON),
        (false, until) => until.map(|until| until.saturating_duration_since(Instant::now())),
    };
    let time = time.and_then(|time| Timespec::try_from(time).ok());
    match poll(&mut sockets, time.as_ref()) {
        Ok(_) | Err(rustix::io::Errno::INTR) => {}
        Err(_) => thread::sleep(PAUSE),
    }
}

/// Ends the connection whose time would be up first.
fn show_out(callers: &mut Vec<Caller>) {
    let first = callers.iter().enumerate();
    let first = first.min_by_key(|(_, caller)| caller.line.until.get());
    if let Some((index, _)) = first {
        callers.swap_remove(index);
    }
}

/// Whether somebody wants to go on without waiting for a socket.
#[derive(Default)]
struct Woken(AtomicBool);

impl Wake for Woken {
    fn wake(self: Arc<Self>) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// One connection, and what hyper has to do on it.
struct Caller {
    line: Rc<Line>,
    conversation: Pin<Box<dyn Future<Output = ()>>>,
}

/// A socket, what it is waited for, and until when.
struct Line {
    socket: TcpStream,
    waits_for: Cell<PollFlags>,
    until: Cell<Instant>,
}

impl Caller {
    fn new(socket: TcpStream, site: &Rc<Site>, now: Instant) -> io::Result<Self> {
        socket.set_nonblocking(true)?;
        socket.set_nodelay(true)?;
        let line = Rc::new(Line {
            socket,
            waits_for: Cell::new(PollFlags::IN),
            until: Cell::new(now + FIRST_REQUEST),
        });
        let (site, asked) = (Rc::clone(site), Rc::clone(&line));
        let service = service_fn(move |request| {
            asked.until.set(Instant::now() + NEXT_REQUEST);
            let site = Rc::clone(&site);
            poll_fn(move |cx| {
                let answer = site.answer(&request);
                if answer.is_pending() {
                    cx.waker().wake_by_ref();
                }
                answer.map(Ok::<_, Infallible>)
            })
        });
        let conversation = http1::Builder::new()
            .max_buf_size(READ_AHEAD)
            .header_read_timeout(None) // a caller's time is up whatever it does
            .serve_connection(Wire(Rc::clone(&line)), service);
        Ok(Self {
            line,
            conversation: Box::pin(async {
                let _ = conversation.await; // whose fault it is does not matter
            }),
        })
    }

    /// Does what there is to do; whether the caller is to stay.
    fn serve(&mut self, now: Instant, cx: &mut Context<'_>) -> bool {
        self.line.waits_for.set(PollFlags::empty());
        self.conversation.as_mut().poll(cx).is_pending() && now < self.line.until.get()
    }
}

/// The socket as hyper wants it.
struct Wire(Rc<Line>);

impl Wire {
    /// What an attempt on the socket came to; if it would have to wait, for this.
    fn tried<T>(&self, result: io::Result<T>, wait_for: PollFlags) -> Poll<io::Result<T>> {
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

impl Read for Wire {
    fn poll_read(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
        mut buffer: ReadBufCursor<'_>,
    ) -> Poll<io::Result<()>> {
        let mut bytes = [0; READ_AHEAD];
        let (room, _) = bytes.split_at_mut(READ_AHEAD.min(buffer.remaining()));
        let read = (&self.0.socket).read(room);
        let read = read.map(|read| buffer.put_slice(room.get(..read).unwrap_or_default()));
        self.tried(read, PollFlags::IN)
    }
}

impl Write for Wire {
    fn poll_write(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.tried((&self.0.socket).write(bytes), PollFlags::OUT)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
        bytes: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.tried((&self.0.socket).write_vectored(bytes), PollFlags::OUT)
    }

    fn is_write_vectored(&self) -> bool {
        true // without it hyper would copy each answer
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(self.0.socket.shutdown(Shutdown::Write))
    }
}
