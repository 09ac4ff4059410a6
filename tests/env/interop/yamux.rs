//! Our muxer against go-yamux and js-libp2p's yamux over a TCP connection: both sides open streams on a random
//! schedule.
//!
//! A stream begins with its plan, which its opener chooses: how many bytes are sent each way, and how it ends. Each
//! side checks every byte and the end.

use std::{
    env, io,
    net::TcpListener,
    pin::Pin,
    process::Command,
    sync::{Arc, Mutex},
    task::{Context, Poll},
    thread,
    time::Duration,
};

use async_std::{net::TcpStream, task};
use libp2p::{
    core::{
        muxing::StreamMuxerExt,
        upgrade::{InboundConnectionUpgrade, OutboundConnectionUpgrade},
    },
    futures::{
        AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, FutureExt, StreamExt,
        channel::oneshot,
        future::{join, poll_fn},
        io::{BufReader, ReadHalf, WriteHalf},
        stream::FuturesUnordered,
    },
};
use rand::{RngExt, SeedableRng, rngs::Xoshiro256PlusPlus as Random};
use relaylet::program::mux::{
    muxer::Multiplex,
    stream_limits::{Budget, StreamLimits},
};

use super::{ClientProcess, client, js_client, run};

/// How many streams each side opens.
const STREAMS: usize = 60;

/// How many sessions are run in each role, and the variable that sets the first seed.
const SESSIONS: u64 = 3;
const SEED: &str = "RELAYLET_SEED";

const KIB: usize = 1024;

#[test]
#[ignore = "needs Go"]
fn go_yamux_and_our_muxer_interoperate() {
    let peer = std::path::Path::new(env!("CARGO_TARGET_TMPDIR")).join("go-yamux");
    let build = ["build", "-o", peer.to_str().expect("a path in UTF-8"), "./yamux"];
    run(Command::new("go").args(build).current_dir(client("go")));
    run_sessions("go-yamux", || Command::new(&peer));
}

#[test]
#[ignore = "needs Node with npm"]
fn js_yamux_and_our_muxer_interoperate() {
    let folder = js_client();
    run_sessions("js-yamux", || {
        let mut node = Command::new("node_modules/.bin/node");
        node.arg("yamux.mjs").current_dir(folder);
        node
    });
}

fn run_sessions(name: &str, peer: impl Fn() -> Command) {
    let first = env::var(SEED).map_or(1, |seed| seed.parse().expect("a number"));
    for seed in first..first + SESSIONS {
        for is_client in [true, false] {
            println!("{name}, seed {seed}, our muxer is the client: {is_client}");
            let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
            let address = listener.local_addr().expect("an address").to_string();
            let role = if is_client { "server" } else { "client" };
            let args = [&address, role, &seed.to_string(), &STREAMS.to_string()];
            let mut peer = ClientProcess::start(peer().args(args));
            let (tcp, _) = listener.accept().expect("a connection");
            let (sender, done) = oneshot::channel();
            let waiting = thread::spawn(move || {
                peer.read_value("done");
                let _ = sender.send(());
                peer.wait_for_success();
            });
            let counted = task::block_on(run_session(tcp.into(), is_client, seed, done));
            waiting.join().expect("the peer succeeds");
            println!("the peer sent {:?}\nour muxer sent {:?}", counted.theirs, counted.ours);
            assert!(counted.theirs.has_all() && counted.ours.has_all());
            assert_eq!((counted.theirs.go_away, counted.ours.go_away), (None, Some(0)));
        }
    }
}

/// Runs one session until all streams of both sides have ended; then our muxer closes it.
async fn run_session(
    tcp: TcpStream,
    is_client: bool,
    seed: u64,
    mut done: oneshot::Receiver<()>,
) -> Counted {
    let counted = Arc::default();
    let connection = Counting { tcp, counted: Arc::clone(&counted) };
    let budget = Budget { inbound: 2 * STREAMS, outbound: 2 * STREAMS };
    let limits = StreamLimits { stream_rate: 0, ..StreamLimits::default() };
    let multiplex = Multiplex::new(budget, limits, STREAMS);
    let (memory, protocol) = (multiplex.memory.clone(), "/yamux/1.0.0");
    let muxer = match is_client {
        true => multiplex.upgrade_outbound(connection, protocol).await,
        false => multiplex.upgrade_inbound(connection, protocol).await,
    };
    let mut muxer = muxer.expect("the upgrade cannot fail");
    let mut random = Random::seed_from_u64(seed);
    let at_once = random.random_range(1..25);
    let mut tasks = FuturesUnordered::new();
    let (mut opened, mut running) = (0, 0);
    poll_fn(|cx| {
        loop {
            if opened < STREAMS
                && running < at_once
                && let Poll::Ready(stream) = muxer.poll_outbound_unpin(cx)
            {
                let plan = Plan::random(&mut random);
                (opened, running) = (opened + 1, running + 1);
                let stream = stream.expect("the session is open");
                tasks.push(run_opener(stream, plan).map(|()| true).boxed());
            } else if let Poll::Ready(stream) = muxer.poll_inbound_unpin(cx) {
                let stream = stream.expect("the session is open");
                tasks.push(run_acceptor(stream).map(|()| false).boxed());
            } else if let Poll::Ready(Some(was_ours)) = tasks.poll_next_unpin(cx) {
                running -= usize::from(was_ours);
            } else if let Poll::Ready(Err(error)) = muxer.poll_unpin(cx) {
                panic!("the session ended: {error}");
            } else if opened == STREAMS && tasks.is_empty() && done.poll_unpin(cx).is_ready() {
                // A stream of theirs that was reset before it was accepted is not among the tasks.
                return Poll::Ready(());
            } else {
                return Poll::Pending;
            }
        }
    })
    .await;
    muxer.close().await.expect("the session closes"); // and drops it
    drop(tasks);
    assert_eq!(memory.buffered().bytes, 0);
    Arc::into_inner(counted).expect("the only one").into_inner().expect("no task failed")
}

/// How a stream ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    /// Both sides write at once and close.
    Both,
    /// The acceptor writes only after the opener has closed.
    Late,
    /// The opener resets it.
    Cut,
    /// The acceptor resets it.
    Refuse,
    /// The opener closes, reads half of the answer, and drops the stream.
    Enough,
}

const OUTCOMES: [Outcome; 5] =
    [Outcome::Both, Outcome::Late, Outcome::Cut, Outcome::Refuse, Outcome::Enough];

/// The header of a stream, in network order.
#[derive(Clone, Copy, Debug)]
struct Plan {
    seed: u32,
    there: u32,
    back: u32,
    outcome: Outcome,
    /// How many milliseconds readers pause between reads.
    slow: u8,
    /// The size of a write.
    chunk: u16,
}

impl Plan {
    fn random(random: &mut Random) -> Self {
        let sizes = [1, 20, 20 * KIB, 100 * KIB, 500 * KIB];
        let mut size = || {
            let most = sizes[random.random_range(0..sizes.len())];
            random.random_range(0..most) as u32
        };
        let (there, back) = (size(), size());
        let most = [KIB, 60 * KIB][random.random_range(0..2)];
        Self {
            seed: random.random(),
            there,
            back,
            outcome: OUTCOMES[random.random_range(0..OUTCOMES.len())],
            slow: random.random_range(0..12_u8).saturating_sub(8),
            chunk: random.random_range(1..=most) as u16,
        }
    }

    fn encode(self) -> Vec<u8> {
        let numbers = [self.seed, self.there, self.back].map(u32::to_be_bytes).concat();
        [&numbers[..], &[self.outcome as u8, self.slow], &self.chunk.to_be_bytes()].concat()
    }

    fn decode(header: [u8; 16]) -> Self {
        let number = |at: usize| u32::from_be_bytes(*header[at..].first_chunk().unwrap());
        Self {
            seed: number(0),
            there: number(4),
            back: number(8),
            outcome: OUTCOMES[usize::from(header[12])],
            slow: header[13],
            chunk: u16::from_be_bytes([header[14], header[15]]),
        }
    }
}

/// Splits a stream. It is never read by one byte, as multistream-select reads: no protocol is negotiated here, and the
/// muxer would take any byte above 127 for a length that it rejects.
fn split<S: AsyncRead + AsyncWrite>(stream: S) -> (BufReader<ReadHalf<S>>, WriteHalf<S>) {
    let (reads, writes) = stream.split();
    (BufReader::with_capacity(2, reads), writes)
}

/// The opener's side of a stream. Dropping the stream before its end resets it.
async fn run_opener(stream: impl AsyncRead + AsyncWrite, plan: Plan) {
    let (mut reads, mut writes) = split(stream);
    let write = async {
        writes.write_all(&plan.encode()).await?;
        send(&mut writes, plan.seed, plan.there, plan, plan.outcome != Outcome::Cut).await
    };
    let (expected, back) = (payload(!plan.seed), plan.back as usize);
    match plan.outcome {
        Outcome::Both | Outcome::Late => {
            let (wrote, read) = join(write, receive(&mut reads, expected, back, plan)).await;
            assert_eq!((wrote.is_ok(), read), (true, Read::Whole), "opener {plan:?}");
        }
        Outcome::Cut => write.await.unwrap_or_else(|error| panic!("opener {plan:?}: {error}")),
        Outcome::Refuse => {
            // The reset ends writing, too.
            let (_, read) = join(write, receive(&mut reads, expected, back, plan)).await;
            assert!(matches!(read, Read::Reset(_)), "opener {plan:?}: {read:?}");
        }
        Outcome::Enough => {
            let mut half = reads.take(u64::from(plan.back / 2));
            let (wrote, read) = join(write, receive(&mut half, expected, back / 2, plan)).await;
            assert_eq!((wrote.is_ok(), read), (true, Read::Whole), "opener {plan:?}");
        }
    }
}

/// The acceptor's side of a stream.
async fn run_acceptor(stream: impl AsyncRead + AsyncWrite) {
    let (mut reads, mut writes) = split(stream);
    let mut header = [0; 16];
    reads.read_exact(&mut header).await.expect("bytes before a reset can be read");
    let plan = Plan::decode(header);
    let ends = plan.outcome != Outcome::Refuse;
    let write = send(&mut writes, !plan.seed, plan.back, plan, ends);
    let read = receive(&mut reads, payload(plan.seed), plan.there as usize, plan);
    match plan.outcome {
        Outcome::Both => {
            let (wrote, read) = join(write, read).await;
            assert_eq!((wrote.is_ok(), read), (true, Read::Whole), "acceptor {plan:?}");
        }
        Outcome::Late => {
            assert_eq!(read.await, Read::Whole, "acceptor {plan:?}");
            write.await.unwrap_or_else(|error| panic!("acceptor {plan:?}: {error}"));
        }
        Outcome::Cut => {
            let (_, read) = join(write, read).await;
            assert!(matches!(read, Read::Reset(_)), "acceptor {plan:?}: {read:?}");
        }
        Outcome::Refuse => write.await.unwrap_or_else(|error| panic!("acceptor {plan:?}: {error}")),
        Outcome::Enough => {
            // The opener may reset it meanwhile.
            let (_, read) = join(write, read).await;
            assert!(!matches!(read, Read::Short(_)), "acceptor {plan:?}: {read:?}");
        }
    }
}

/// How reading ended.
#[derive(Debug, PartialEq, Eq)]
enum Read {
    /// All bytes, and a close.
    Whole,
    /// A close with this many bytes missing.
    Short(usize),
    /// A reset with this many bytes missing.
    Reset(usize),
}

async fn receive(
    from: &mut (impl AsyncRead + Unpin),
    mut expected: impl Iterator<Item = u8>,
    mut missing: usize,
    plan: Plan,
) -> Read {
    let least = if plan.slow > 0 { 8 * KIB } else { 1 };
    let mut buffer = vec![0; least + plan.seed as usize % (40 * KIB)];
    loop {
        match from.read(&mut buffer).await {
            Ok(0) if missing == 0 => return Read::Whole,
            Ok(0) => return Read::Short(missing),
            Ok(read) => {
                let is_right = buffer[..read].iter().all(|byte| expected.next() == Some(*byte));
                assert!(is_right, "a wrong byte with {missing} missing: {plan:?}");
                let left = missing.checked_sub(read);
                missing = left.unwrap_or_else(|| panic!("too much: {plan:?}"));
            }
            Err(error) => {
                assert_eq!(error.kind(), io::ErrorKind::ConnectionReset, "{plan:?}");
                return Read::Reset(missing);
            }
        }
        if plan.slow > 0 && missing > 0 {
            task::sleep(Duration::from_millis(plan.slow.into())).await;
        }
    }
}

async fn send(
    to: &mut (impl AsyncWrite + Unpin),
    seed: u32,
    count: u32,
    plan: Plan,
    ends: bool,
) -> io::Result<()> {
    let bytes: Vec<_> = payload(seed).take(count as usize).collect();
    for chunk in bytes.chunks(plan.chunk.into()) {
        to.write_all(chunk).await?;
    }
    to.flush().await?;
    if ends { to.close().await } else { Ok(()) }
}

/// The pseudo-random bytes of a seed.
fn payload(mut seed: u32) -> impl Iterator<Item = u8> {
    std::iter::repeat_with(move || {
        seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (seed >> 24) as u8
    })
}

/// The frames that both sides sent.
#[derive(Default)]
struct Counted {
    theirs: Frames,
    ours: Frames,
}

/// How many frames had each flag, and the code of a go-away.
#[derive(Debug, Default)]
struct Frames {
    syn: usize,
    ack: usize,
    fin: usize,
    rst: usize,
    pings: usize,
    pongs: usize,
    bytes: usize,
    go_away: Option<u32>,
    header: Vec<u8>,
    body: usize,
}

impl Frames {
    fn has_all(&self) -> bool {
        [self.syn, self.ack, self.fin, self.rst, self.pings, self.pongs].iter().all(|it| *it > 0)
    }

    fn follow(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let passed = self.body.min(bytes.len());
            self.body -= passed;
            self.bytes += passed;
            bytes = &bytes[passed..];
            let missing = (12 - self.header.len()).min(bytes.len());
            self.header.extend(&bytes[..missing]);
            bytes = &bytes[missing..];
            if let Ok(header) = <[u8; 12]>::try_from(&self.header[..]) {
                self.header.clear();
                self.count(header);
            }
        }
    }

    fn count(&mut self, [_, kind, _, flags, .., l0, l1, l2, l3]: [u8; 12]) {
        assert_eq!(self.go_away, None, "nothing follows go-away");
        let length = u32::from_be_bytes([l0, l1, l2, l3]);
        let has = |flag| usize::from(flags & flag != 0);
        match kind {
            2 => (self.pings, self.pongs) = (self.pings + has(1), self.pongs + has(2)),
            3 => self.go_away = Some(length),
            _ => {
                self.syn += has(1);
                self.ack += has(2);
                self.fin += has(4);
                self.rst += has(8);
                self.body = if kind == 0 { length as usize } else { 0 };
            }
        }
    }
}

/// A connection that counts the frames in both directions.
struct Counting {
    tcp: TcpStream,
    counted: Arc<Mutex<Counted>>,
}

impl AsyncRead for Counting {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut [u8],
    ) -> Poll<io::Result<usize>> {
        let read = Pin::new(&mut self.tcp).poll_read(cx, buffer);
        if let Poll::Ready(Ok(read)) = read {
            self.counted.lock().unwrap().theirs.follow(&buffer[..read]);
        }
        read
    }
}

impl AsyncWrite for Counting {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.tcp).poll_write(cx, bytes);
        if let Poll::Ready(Ok(written)) = written {
            self.counted.lock().unwrap().ours.follow(&bytes[..written]);
        }
        written
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tcp).poll_flush(cx)
    }

    fn poll_close(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tcp).poll_close(cx)
    }
}
