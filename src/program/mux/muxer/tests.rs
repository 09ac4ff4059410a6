//! Tests of our muxer against itself and against the `yamux` crate, over an in-memory connection.

#[cfg(test)]
mod locks;

use std::{
    collections::VecDeque,
    future::poll_fn,
    sync::{
        Mutex, MutexGuard,
        atomic::{AtomicBool, Ordering},
    },
    task::{Wake, Waker},
    thread,
};

use libp2p::futures::{
    AsyncReadExt, AsyncWriteExt, StreamExt,
    channel::{mpsc, oneshot},
    executor::block_on,
    future::{BoxFuture, FutureExt},
    stream::FuturesUnordered,
};
use yamux::Mode;

use super::*;
use crate::program::mux::frame::{Header, Kind, SYN};

const KIB: usize = 1024;

/// One direction of an in-memory connection.
#[derive(Default)]
struct Wire {
    bytes: VecDeque<u8>,
    ended: bool,
    reader: Option<Waker>,
    writer: Option<Waker>,
}

/// One end of an in-memory connection, which buffers at most `room` bytes each way.
struct Pipe {
    from: Arc<Mutex<Wire>>,
    to: Arc<Mutex<Wire>>,
    room: usize,
}

/// Both ends of a connection.
fn pipes(room: usize) -> (Pipe, Pipe) {
    let [there, back] = [(); 2].map(|()| Arc::new(Mutex::new(Wire::default())));
    let one = Pipe { from: Arc::clone(&back), to: Arc::clone(&there), room };
    (one, Pipe { from: there, to: back, room })
}

/// Opens a stream, for which there is room.
fn open(muxer: &mut Muxer<impl AsyncRead + AsyncWrite + Unpin>, cx: &mut Context<'_>) -> Substream {
    let Poll::Ready(Ok(stream)) = Pin::new(muxer).poll_outbound(cx) else {
        panic!("there is room for a stream");
    };
    stream
}

fn lock(wire: &Mutex<Wire>) -> MutexGuard<'_, Wire> {
    wire.lock().unwrap()
}

impl AsyncRead for Pipe {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut [u8],
    ) -> Poll<io::Result<usize>> {
        let mut wire = lock(&self.from);
        if wire.bytes.is_empty() && !wire.ended {
            wire.reader = Some(cx.waker().clone());
            return Poll::Pending;
        }
        let read = io::Read::read(&mut wire.bytes, buffer)?;
        let writer = wire.writer.take();
        drop(wire);
        writer.into_iter().for_each(Waker::wake);
        Poll::Ready(Ok(read))
    }
}

impl AsyncWrite for Pipe {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let mut wire = lock(&self.to);
        if wire.ended {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        let room = self.room - wire.bytes.len();
        if room == 0 {
            wire.writer = Some(cx.waker().clone());
            return Poll::Pending;
        }
        let written = room.min(bytes.len());
        wire.bytes.extend(&bytes[..written]);
        let reader = wire.reader.take();
        drop(wire);
        reader.into_iter().for_each(Waker::wake);
        Poll::Ready(Ok(written))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_close(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        for wire in [&self.from, &self.to] {
            let mut wire = lock(wire);
            wire.ended = true;
            let wakers = [wire.reader.take(), wire.writer.take()];
            drop(wire);
            wakers.into_iter().flatten().for_each(Waker::wake);
        }
        Poll::Ready(Ok(()))
    }
}

impl Drop for Pipe {
    fn drop(&mut self) {
        let _ = Pin::new(self).poll_close(&mut Context::from_waker(Waker::noop()));
    }
}

type Task = BoxFuture<'static, ()>;

/// Where tasks run.
#[derive(Clone)]
enum Executor {
    /// On the thread that calls [`run`].
    Here(mpsc::UnboundedSender<Task>),
    /// As `Here`, and asserts that no session is locked while a waker is woken or dropped.
    Checked(mpsc::UnboundedSender<Task>, locks::Sessions),
    /// On the threads of async-std.
    Threads,
}

impl Executor {
    fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        match self {
            Self::Here(tasks) => tasks.unbounded_send(task.boxed()).unwrap(),
            Self::Checked(tasks, sessions) => {
                tasks.unbounded_send(sessions.checked(task).boxed()).unwrap();
            }
            Self::Threads => drop(async_std::task::spawn(task)),
        }
    }
}

/// Runs `test` with its tasks on an executor, on the calling thread, and with each side on a thread of its own.
fn on_all_executors<F: Future<Output = ()>>(test: impl Fn([Executor; 2]) -> F) {
    block_on(test([Executor::Threads, Executor::Threads]));
    let (spawn, spawned) = mpsc::unbounded();
    let here = Executor::Here(spawn);
    block_on(run(spawned, test([here.clone(), here])));
    thread::scope(|scope| {
        let mut over = Vec::new();
        let threads = [(); 2].map(|()| {
            let (spawn, spawned) = mpsc::unbounded();
            let (end, ended) = oneshot::channel::<()>();
            over.push(end);
            scope.spawn(move || block_on(run(spawned, ended.map(drop))));
            Executor::Here(spawn)
        });
        block_on(test(threads));
    });
}

/// Polls the spawned tasks until `until` completes.
async fn run(mut spawned: mpsc::UnboundedReceiver<Task>, until: impl Future<Output = ()>) {
    let mut tasks = FuturesUnordered::new();
    let mut until = std::pin::pin!(until);
    poll_fn(|cx| {
        loop {
            while let Poll::Ready(Some(task)) = spawned.poll_next_unpin(cx) {
                tasks.push(task);
            }
            if until.as_mut().poll(cx).is_ready() {
                return Poll::Ready(());
            }
            if !matches!(tasks.poll_next_unpin(cx), Poll::Ready(Some(()))) {
                return Poll::Pending;
            }
        }
    })
    .await;
}

/// The bytes that stream `number` sends, different for each. At least one byte: the `yamux` crate does not announce a
/// stream that is closed before it is written to.
fn payload(number: usize) -> Vec<u8> {
    let length = [1, 2, 3, 12, 40_000, 70_000, 300_000, 600_000][number % 8];
    (0..length).map(|at: usize| (at / 7 + at * number) as u8).collect()
}

/// Writes the payload of `number`, closes its write half, and expects the same bytes back.
async fn write_and_expect_echo(
    stream: impl AsyncRead + AsyncWrite,
    number: usize,
    done: mpsc::UnboundedSender<()>,
) {
    let (mut reads, mut writes) = stream.split();
    let payload = payload(number);
    let write = async {
        for piece in payload.chunks(1 + 9000 * (number % 11)) {
            writes.write_all(piece).await.expect("an open connection");
        }
        writes.flush().await.expect("an open connection");
        writes.close().await.expect("an open connection");
    };
    let mut received = Vec::new();
    let read = async {
        reads.read_to_end(&mut received).await.expect("an open connection");
    };
    libp2p::futures::future::join(write, read).await;
    assert!(received == payload, "{number}: {} of {} bytes", received.len(), payload.len());
    let _ = done.unbounded_send(());
}

/// Writes back what it reads.
async fn echo(stream: impl AsyncRead + AsyncWrite) {
    let (mut reads, mut writes) = stream.split();
    let mut buffer = vec![0; 30_000];
    loop {
        match reads.read(&mut buffer).await.expect("an open connection") {
            0 => break,
            read => writes.write_all(&buffer[..read]).await.expect("an open connection"),
        }
    }
    writes.close().await.expect("an open connection");
}

fn muxer(pipe: Pipe, role: Endpoint) -> Muxer<Pipe> {
    let budget = Budget { inbound: 64, outbound: 64 };
    let limits = StreamLimits { stream_rate: 0, ..StreamLimits::default() };
    Muxer::new(pipe, Multiplex::new(budget, limits, 64), role)
}

/// Opens `streams` streams over our muxer, and echoes inbound ones.
fn run_muxer(
    pipe: Pipe,
    role: Endpoint,
    streams: usize,
    executor: Executor,
    done: mpsc::UnboundedSender<()>,
) {
    let (mut muxer, spawn) = (muxer(pipe, role), executor.clone());
    if let Executor::Checked(_, sessions) = &executor {
        sessions.add(&muxer.shared);
    }
    let mut opened = 0;
    executor.spawn(poll_fn(move |cx| {
        loop {
            if opened < streams
                && let Poll::Ready(stream) = Pin::new(&mut muxer).poll_outbound(cx)
            {
                spawn.spawn(write_and_expect_echo(
                    stream.expect("an open connection"),
                    opened,
                    done.clone(),
                ));
                opened += 1;
                continue;
            }
            if let Poll::Ready(stream) = Pin::new(&mut muxer).poll_inbound(cx) {
                spawn.spawn(echo(stream.expect("an open connection")));
                continue;
            }
            return match Pin::new(&mut muxer).poll(cx) {
                Poll::Ready(Err(error)) => {
                    assert_eq!(error.kind(), io::ErrorKind::ConnectionAborted);
                    Poll::Ready(())
                }
                _ => Poll::Pending,
            };
        }
    }));
}

/// As [`run_muxer`], over the `yamux` crate.
fn run_rust_yamux(
    pipe: Pipe,
    role: Endpoint,
    streams: usize,
    executor: Executor,
    done: mpsc::UnboundedSender<()>,
) {
    let mode = if role == Endpoint::Dialer { Mode::Client } else { Mode::Server };
    let mut connection = yamux::Connection::new(pipe, yamux::Config::default(), mode);
    let (mut opened, spawn) = (0, executor.clone());
    executor.spawn(poll_fn(move |cx| {
        loop {
            if opened < streams
                && let Poll::Ready(stream) = connection.poll_new_outbound(cx)
            {
                spawn.spawn(write_and_expect_echo(
                    stream.expect("an open connection"),
                    opened,
                    done.clone(),
                ));
                opened += 1;
                continue;
            }
            match connection.poll_next_inbound(cx) {
                Poll::Ready(Some(Ok(stream))) => spawn.spawn(echo(stream)),
                Poll::Ready(Some(Err(error))) => panic!("connection failed: {error}"),
                Poll::Ready(None) => return Poll::Ready(()),
                Poll::Pending => return Poll::Pending,
            }
        }
    }));
}

/// Runs one end: [`run_muxer`], or [`run_rust_yamux`].
type RunEnd = fn(Pipe, Endpoint, usize, Executor, mpsc::UnboundedSender<()>);

/// Opens streams from both ends and waits until all are echoed.
async fn exchange(room: usize, [one, other]: [RunEnd; 2], [first, second]: [Executor; 2]) {
    const STREAMS: usize = 16;
    let (client, server) = pipes(room);
    let (done, mut exchanged) = mpsc::unbounded();
    one(client, Endpoint::Dialer, STREAMS, first, done.clone());
    other(server, Endpoint::Listener, STREAMS, second, done);
    for _ in 0..2 * STREAMS {
        exchanged.next().await.expect("an open connection");
    }
}

#[test]
fn two_muxers_transfer_all_bytes_of_their_streams() {
    for room in [997, 100 * KIB] {
        on_all_executors(|executors| exchange(room, [run_muxer, run_muxer], executors));
    }
}

#[test]
fn rust_yamux_and_our_muxer_interoperate_in_both_roles() {
    for room in [997, 100 * KIB] {
        on_all_executors(|executors| exchange(room, [run_muxer, run_rust_yamux], executors));
        on_all_executors(|executors| exchange(room, [run_rust_yamux, run_muxer], executors));
    }
}

#[test]
fn each_poll_accepts_one_of_the_streams_that_a_peer_opens_at_once() {
    let (one, other) = pipes(100 * KIB);
    let (mut client, mut server) = (muxer(one, Endpoint::Dialer), muxer(other, Endpoint::Listener));
    let woken = Arc::new(Woken::default());
    let waker = Waker::from(Arc::clone(&woken));
    let mut cx = Context::from_waker(&waker);
    let mut streams = Vec::new();
    for _ in 0..3 {
        let mut stream = open(&mut client, &mut cx);
        assert!(Pin::new(&mut stream).poll_write(&mut cx, b"!").is_ready());
        streams.push(stream);
    }
    assert!(Pin::new(&mut client).poll(&mut cx).is_pending());
    assert!(Pin::new(&mut server).poll(&mut cx).is_pending());
    for left in [2, 1, 0] {
        assert!(Pin::new(&mut server).poll_inbound(&mut cx).is_ready());
        woken.0.store(false, Ordering::Relaxed);
        assert!(Pin::new(&mut server).poll_inbound(&mut cx).is_pending());
        assert_eq!(woken.0.load(Ordering::Relaxed), left > 0, "{left} are left");
    }
}

#[test]
fn a_stream_requested_after_the_connection_ended_does_not_hide_the_error() {
    let (one, other) = pipes(KIB);
    let mut server = muxer(other, Endpoint::Listener);
    let mut cx = Context::from_waker(Waker::noop());
    drop(one);
    assert!(Pin::new(&mut server).poll(&mut cx).is_pending());
    assert!(Pin::new(&mut server).poll_outbound(&mut cx).is_pending());
    let Poll::Ready(Err(error)) = Pin::new(&mut server).poll(&mut cx) else {
        panic!("the connection has ended");
    };
    assert_eq!(error.to_string(), "muxer failed");
}

#[derive(Default)]
struct Woken(AtomicBool);

impl Wake for Woken {
    fn wake(self: Arc<Self>) {
        self.0.store(true, Ordering::Relaxed);
    }
}

fn secs(secs: u64) -> Duration {
    Duration::from_secs(secs)
}

#[test]
fn a_peer_that_acknowledges_one_byte_a_minute_is_not_stalled() {
    let (mut stall, start) = (WriteStall::default(), Instant::now());
    for minute in 0..100 {
        let at = start + secs(60 * minute);
        assert_eq!(stall.on_waiting(Some(minute), at), secs(0));
        assert_eq!(stall.on_waiting(Some(minute), at + secs(59)), secs(59));
    }
}

#[test]
fn a_stall_lasts_until_something_is_acknowledged_or_written() {
    let (mut stall, start) = (WriteStall::default(), Instant::now());
    for acknowledged in [Some(7), None] {
        assert_eq!(stall.on_waiting(acknowledged, start), secs(0));
        assert_eq!(stall.on_waiting(acknowledged, start + secs(30)), secs(30));
        assert_eq!(stall.on_waiting(acknowledged, start + secs(61)), secs(61));
        stall.on_written();
        assert_eq!(stall.on_waiting(acknowledged, start + secs(62)), secs(0));
    }
}

/// A message of multistream-select: its length, the text and a newline.
fn line(text: &str) -> Vec<u8> {
    [&[text.len() as u8 + 1], text.as_bytes(), b"\n"].concat()
}

#[test]
fn negotiation_ends_on_acceptance_in_any_number_of_writes() {
    let list = line(&"/one/of/them".repeat(12));
    let list = [&[0x80 | (list.len() as u8 & 0x7f), 1], &list[..]].concat();
    for (payload, is_accepted) in [
        (line("/multistream/1.0.0"), false),
        (line("na"), false),
        (list, false),
        (line("/multistream/1.0.0/and/more"), true),
        (line("/ipfs/ping/1.0.0"), true),
    ] {
        let mut at_once = Negotiation::default();
        assert!(!at_once.parse(&line("/multistream/1.0.0")));
        assert_eq!(at_once.parse(&payload), is_accepted, "{payload:?}");
        let mut bytewise = Negotiation::default();
        let ended = payload.iter().map(|byte| bytewise.parse(&[*byte]));
        assert_eq!(ended.last(), Some(is_accepted), "{payload:?}");
    }
}

#[test]
fn lengths_above_127_are_rejected() {
    assert!(Negotiation::accepts(&[0x7f], 1));
    assert!(!Negotiation::accepts(&[0x80], 1));
    assert!(Negotiation::accepts(&[0xff, 7], 99), "not a length");
    assert!(Negotiation::accepts(&[], 1));
}

#[test]
fn a_peer_cannot_announce_a_long_message_before_a_protocol_is_accepted() {
    let cx = &mut Context::from_waker(Waker::noop());
    for (relay_opens, answer) in [(true, "/ipfs/ping/1.0.0"), (true, "na"), (false, "na")] {
        let (one, other) = pipes(KIB);
        let (mut peer, mut relay) =
            (muxer(one, Endpoint::Dialer), muxer(other, Endpoint::Listener));
        let (opener, listener) =
            if relay_opens { (&mut relay, &mut peer) } else { (&mut peer, &mut relay) };
        let mut opened = open(opener, cx);
        let proposal = [line("/multistream/1.0.0"), line("/ipfs/ping/1.0.0")].concat();
        assert!(Pin::new(&mut opened).poll_write(cx, &proposal).is_ready());
        assert!(Pin::new(&mut *opener).poll(cx).is_pending());
        assert!(Pin::new(&mut *listener).poll(cx).is_pending());
        let Poll::Ready(Ok(mut accepted)) = Pin::new(listener).poll_inbound(cx) else {
            panic!("no inbound stream");
        };
        let answer = [line("/multistream/1.0.0"), line(answer)].concat();
        assert!(Pin::new(&mut accepted).poll_write(cx, &answer).is_ready());
        let (mut at_relay, mut at_peer, unread) = match relay_opens {
            true => (opened, accepted, answer.clone()),
            false => (accepted, opened, proposal),
        };
        assert!(Pin::new(&mut at_peer).poll_write(cx, &[0xff, 0x7f]).is_ready());
        assert!(Pin::new(&mut peer).poll(cx).is_pending());
        assert!(Pin::new(&mut relay).poll(cx).is_pending());
        for byte in unread.into_iter().chain([0xff, 0x7f]) {
            let read = Pin::new(&mut at_relay).poll_read(cx, &mut [0]);
            let is_valid = byte < 0x80 || answer.ends_with(b"/ipfs/ping/1.0.0\n");
            assert_eq!(matches!(read, Poll::Ready(Ok(1))), is_valid, "{byte}: {read:?}");
        }
    }
}

/// The muxer of a connection that was accepted from 192.0.2.1.
fn listener(pipe: Pipe, limits: StreamLimits, activity: &ActivityCounter) -> Muxer<Pipe> {
    let multiplex = Multiplex::new(Budget { inbound: 64, outbound: 64 }, limits, 64);
    let remote = "/ip4/192.0.2.1/tcp/1".parse().unwrap();
    let multiplex = multiplex.of(&remote, Some(activity.clone()), None);
    Muxer::new(pipe, multiplex, Endpoint::Listener)
}

#[test]
fn a_connection_whose_frames_exceed_their_rate_is_read_no_further_and_marked_as_flooding() {
    const PINGS: usize = 1000;
    let limits = StreamLimits { stream_rate: 1, ..StreamLimits::default() };
    let activity = ActivityCounter::default();
    let (mut peer, pipe) = pipes(PINGS * HEADER);
    let mut muxer = listener(pipe, limits, &activity);
    let ping = Header { kind: Kind::Ping, flags: SYN, stream: 0, length: 1 }.encode();
    block_on(peer.write_all(&ping.repeat(PINGS))).unwrap();
    for _ in 0..60 {
        assert!(Pin::new(&mut muxer).poll(&mut Context::from_waker(Waker::noop())).is_pending());
    }
    let read = PINGS - lock(&peer.to).bytes.len() / HEADER;
    assert!((190..230).contains(&read), "{read}");
    assert!(activity.is_flooding());
    assert!(activity.count() > 0, "a peer whose frames are not read is not silent");
}

#[test]
fn a_poll_reads_and_writes_no_more_than_one_turn_and_then_wakes_its_task() {
    let (mut peer, pipe) = pipes(4 * TURN);
    let mut relay = listener(pipe, StreamLimits::default(), &ActivityCounter::default());
    let woken = Arc::new(Woken::default());
    let waker = Waker::from(Arc::clone(&woken));
    let mut cx = Context::from_waker(&waker);
    let update = Header { kind: Kind::WindowUpdate, flags: 0, stream: 1, length: 1 }.encode();
    block_on(peer.write_all(&update.repeat(2 * TURN_READS))).unwrap();
    assert!(Pin::new(&mut relay).poll(&mut cx).is_pending());
    assert_eq!(lock(&peer.to).bytes.len(), TURN_READS * HEADER);
    assert!(woken.0.swap(false, Ordering::Relaxed), "there is more to read");
    for _ in 0..2 * TURN / QUANTUM {
        let mut stream = open(&mut relay, &mut cx);
        assert!(Pin::new(&mut stream).poll_write(&mut cx, &[0; QUANTUM]).is_ready());
        assert!(Pin::new(&mut stream).poll_close(&mut cx).is_ready());
    }
    assert!(Pin::new(&mut relay).poll(&mut cx).is_pending());
    let written = lock(&peer.from).bytes.len();
    assert!((TURN..TURN + LARGE_BATCH).contains(&written), "{written}");
}

/// A connection that collects the bytes written between flushes.
#[derive(Default)]
struct Messages {
    sent: Arc<Mutex<Vec<Vec<u8>>>>,
    current: Vec<u8>,
}

impl AsyncRead for Messages {
    fn poll_read(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
        _: &mut [u8],
    ) -> Poll<io::Result<usize>> {
        Poll::Pending
    }
}

impl AsyncWrite for Messages {
    fn poll_write(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.current.extend(bytes);
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        let message = mem::take(&mut self.current);
        self.sent.lock().unwrap().push(message);
        Poll::Ready(Ok(()))
    }

    fn poll_close(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

#[test]
fn messages_are_small_at_first_and_a_reset_shares_none_with_data() {
    // Half of the pool is less than what large batches cost.
    let memory = MemoryBudget::new(300 * KIB, 300 * KIB, 0);
    let multiplex = Multiplex::new(Budget { inbound: 9, outbound: 9 }, StreamLimits::default(), 9);
    let connection = Messages::default();
    let sent = Arc::clone(&connection.sent);
    let mut relay = Muxer::new(connection, Multiplex { memory, ..multiplex }, Endpoint::Dialer);
    let cx = &mut Context::from_waker(Waker::noop());
    let mut stream = open(&mut relay, cx);
    assert!(Pin::new(&mut stream).poll_write(cx, &[0; QUANTUM]).is_ready());
    assert!(Pin::new(&mut stream).poll_flush(cx).is_ready());
    drop(stream);
    assert!(Pin::new(&mut relay).poll(cx).is_pending());
    let lengths: Vec<_> = sent.lock().unwrap().iter().map(Vec::len).collect();
    let (reset, data) = lengths.split_last().unwrap();
    assert!(data.iter().all(|length| *length <= SMALL_BATCH), "{lengths:?}");
    assert_eq!(data.iter().sum::<usize>(), QUANTUM + data.len() * HEADER);
    assert_eq!(*reset, HEADER);
}

#[test]
fn large_batches_are_charged_once() {
    let multiplex = Multiplex::new(Budget { inbound: 9, outbound: 9 }, StreamLimits::default(), 9);
    let memory = multiplex.memory.clone();
    let mut relay = Muxer::new(Messages::default(), multiplex, Endpoint::Dialer);
    let cx = &mut Context::from_waker(Waker::noop());
    let mut stream = open(&mut relay, cx);
    let idle = memory.buffered().bytes;
    for _ in 0..4 {
        assert!(Pin::new(&mut stream).poll_write(cx, &[0; QUANTUM]).is_ready());
        assert!(Pin::new(&mut relay).poll(cx).is_pending());
    }
    assert_eq!(memory.buffered().bytes, idle + LARGE_BATCH_COST);
}

#[test]
fn a_protocol_violation_is_answered_by_go_away_and_returned_by_the_next_poll() {
    let (mut peer, pipe) = pipes(KIB);
    let mut relay = muxer(pipe, Endpoint::Listener);
    let woken = Arc::new(Woken::default());
    let waker = Waker::from(Arc::clone(&woken));
    let mut cx = Context::from_waker(&waker);
    block_on(peer.write_all(&[1; HEADER])).unwrap();
    assert!(Pin::new(&mut relay).poll(&mut cx).is_pending());
    assert!(woken.0.load(Ordering::Relaxed));
    assert!(Pin::new(&mut relay).poll(&mut cx).is_ready());
    let mut sent = [0; HEADER];
    block_on(peer.read_exact(&mut sent)).unwrap();
    assert_eq!(Header::parse(sent).map(|header| header.kind), Some(Kind::GoAway));
}

#[test]
fn a_muxer_keeps_no_memory_for_an_announced_body_and_none_once_it_is_dropped() {
    let (mut peer, pipe) = pipes(100 * KIB);
    let mut relay = muxer(pipe, Endpoint::Listener);
    let cx = &mut Context::from_waker(Waker::noop());
    let header = Header { kind: Kind::Data, flags: SYN, stream: 1, length: 1000 }.encode();
    block_on(peer.write_all(&header)).unwrap();
    assert!(Pin::new(&mut relay).poll(cx).is_pending());
    assert_eq!(relay.room.chunk.capacity(), 0);
    block_on(peer.write_all(&[7; 1000])).unwrap();
    assert!(Pin::new(&mut relay).poll(cx).is_pending());
    let Poll::Ready(Ok(stream)) = Pin::new(&mut relay).poll_inbound(cx) else {
        panic!("no inbound stream");
    };
    let pool = relay.shared.budget.pool.clone();
    assert!(pool.buffered().bytes > 1000);
    drop(relay);
    assert_eq!(pool.buffered().bytes, 0);
    drop(stream);
}

/// The kernel resets a connection that is closed before all that its peer sends was read, and discards what it has not sent yet.
#[test]
fn a_peer_that_sends_while_the_relay_closes_receives_all_bulk_data() {
    [false, true].into_iter().for_each(assert_bulk_data_arrives);
}

/// `is_scarce`: so little memory is free that batches stay small.
fn assert_bulk_data_arrives(is_scarce: bool) {
    use socket2::{Domain, Type};

    let cx = &mut Context::from_waker(Waker::noop());
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let mut peer = socket2::Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    peer.set_recv_buffer_size(4 * KIB).unwrap(); // most of the data waits at the relay
    peer.connect(&listener.local_addr().unwrap().into()).unwrap();
    let socket = Socket::new(async_io::Async::new(listener.accept().unwrap().0).unwrap());
    let multiplex = Multiplex::new(Budget { inbound: 9, outbound: 9 }, StreamLimits::default(), 9);
    let other = multiplex.memory.open(None, std::sync::Weak::<Shared>::new());
    other.replace_charge(0, if is_scarce { 41 << 20 } else { 0 }); // of 80 MiB
    let multiplex = multiplex.of(&Multiaddr::empty(), None, Some(socket.clone()));
    let mut relay = Muxer::new(socket, multiplex, Endpoint::Listener);
    let mut stream = open(&mut relay, cx);
    for _ in 0..3 {
        assert!(Pin::new(&mut stream).poll_write(cx, &[7; QUANTUM]).is_ready());
        assert!(Pin::new(&mut relay).poll(cx).is_pending());
    }
    assert!(Pin::new(&mut stream).poll_close(cx).is_ready());
    let peer = thread::spawn(move || {
        let ping = Header { kind: Kind::Ping, flags: SYN, stream: 0, length: 1 }.encode();
        for _ in 0..2 {
            let _ = io::Write::write_all(&mut peer, &ping);
            thread::sleep(Duration::from_millis(100));
        }
        io::copy(&mut peer, &mut io::sink())
    });
    assert_eq!(relay.batch == LARGE_BATCH, !is_scarce);
    block_on(poll_fn(|cx| Pin::new(&mut relay).poll_close(cx))).unwrap();
    drop(relay);
    let received = peer.join().unwrap().unwrap();
    assert!(received as usize > 3 * QUANTUM, "{received}");
}
