//! Our muxer against go-yamux and js-libp2p's yamux, over a bare TCP connection: streams of both sides under a random
//! schedule.
//!
//! A stream begins with its plan, which its opener makes up: how many bytes go each way, and how it ends. Each side
//! checks every byte, and the end.

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
        stream::FuturesUnordered,
    },
};
use rand::{RngExt, SeedableRng, rngs::Xoshiro256PlusPlus as Random};
use relaylet::program::mux::{
    muxer::Multiplex,
    stream_limits::{Budget, StreamLimits},
};

use super::{Talking, client, js_client, run};

/// How many streams each side opens.
const STREAMS: usize = 60;

/// How many sessions there are of each role, and where their seeds begin unless this variable says so.
const SESSIONS: u64 = 3;
const SEED: &str = "RELAYLET_SEED";

const KIB: usize = 1024;

#[test]
#[ignore = "needs Go"]
fn go_yamux_and_we_carry_all_that_is_said_and_end_alike() {
    let peer = std::path::Path::new(env!("CARGO_TARGET_TMPDIR")).join("go-yamux");
    let build = ["build", "-o", peer.to_str().expect("a path in UTF-8"), "./yamux"];
    run(Command::new("go").args(build).current_dir(client("go")));
    play_all("go-yamux", || Command::new(&peer));
}

#[test]
#[ignore = "needs Node with npm"]
fn js_yamux_and_we_carry_all_that_is_said_and_end_alike() {
    let folder = js_client();
    play_all("js-yamux", || {
        let mut node = Command::new("node_modules/.bin/node");
        node.arg("yamux.mjs").current_dir(folder);
        node
    });
}

fn play_all(name: &str, peer: impl Fn() -> Command) {
    let first = env::var(SEED).map_or(1, |seed| seed.parse().expect("a number"));
    for seed in first..first + SESSIONS {
        for we_are_the_client in [true, false] {
            println!("{name}, seed {seed}, we are the client: {we_are_the_client}");
            let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
            let address = listener.local_addr().expect("an address").to_string();
            let role = if we_are_the_client { "server" } else { "client" };
            let args = [&address, role, &seed.to_string(), &STREAMS.to_string()];
            let mut peer = Talking::start(peer().args(args));
            let (tcp, _) = listener.accept().expect("it comes");
            let (says, done) = oneshot::channel();
            let talks = thread::spawn(move || {
                peer.says("done");
                let _ = says.send(());
                peer.ends_well();
            });
            let seen = task::block_on(play(tcp.into(), we_are_the_client, seed, done));
            talks.join().expect("it ends well");
            println!("they sent {:?}\nwe sent {:?}", seen.theirs, seen.ours);
            assert!(seen.theirs.has_all() && seen.ours.has_all());
            assert_eq!((seen.theirs.go_away, seen.ours.go_away), (None, Some(0)));
        }
    }
}

/// Has both sides open their streams until all have ended; then we end the session.
async fn play(
    tcp: TcpStream,
    we_are_the_client: bool,
    seed: u64,
    mut done: oneshot::Receiver<()>,
) -> Seen {
    let seen = Arc::default();
    let watched = Watched { tcp, seen: Arc::clone(&seen) };
    let budget = Budget { inbound: 2 * STREAMS, outbound: 2 * STREAMS };
    let limits = StreamLimits { stream_rate: 0, ..StreamLimits::default() };
    let multiplex = Multiplex::new(budget, limits, STREAMS);
    let (memory, protocol) = (multiplex.memory.clone(), "/yamux/1.0.0");
    let muxer = match we_are_the_client {
        true => multiplex.upgrade_outbound(watched, protocol).await,
        false => multiplex.upgrade_inbound(watched, protocol).await,
    };
    let mut muxer = muxer.expect("it needs nothing");
    let mut random = Random::seed_from_u64(seed);
    let at_once = random.random_range(1..25);
    let mut tasks = FuturesUnordered::new();
    let (mut opened, mut asking) = (0, 0);
    poll_fn(|cx| {
        loop {
            if opened < STREAMS
                && asking < at_once
                && let Poll::Ready(stream) = muxer.poll_outbound_unpin(cx)
            {
                let plan = Plan::random(&mut random);
                (opened, asking) = (opened + 1, asking + 1);
                let stream = stream.expect("it goes on");
                tasks.push(ask(stream, plan).map(|()| true).boxed());
            } else if let Poll::Ready(stream) = muxer.poll_inbound_unpin(cx) {
                let stream = stream.expect("it goes on");
                tasks.push(answer(stream).map(|()| false).boxed());
            } else if let Poll::Ready(Some(was_ours)) = tasks.poll_next_unpin(cx) {
                asking -= usize::from(was_ours);
            } else if let Poll::Ready(Err(error)) = muxer.poll_unpin(cx) {
                panic!("the session ended: {error}");
            } else if opened == STREAMS && tasks.is_empty() && done.poll_unpin(cx).is_ready() {
                // One of theirs that was reset before we took it is not among the tasks.
                return Poll::Ready(());
            } else {
                return Poll::Pending;
            }
        }
    })
    .await;
    muxer.close().await.expect("it closes"); // and drops it
    drop(tasks);
    assert_eq!(memory.buffered().bytes, 0);
    Arc::into_inner(seen).expect("the only one").into_inner().expect("no task failed")
}

/// What becomes of a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    /// Both sides write at once and finish.
    Both,
    /// The acceptor writes only after the opener's end.
    Late,
    /// The opener resets it.
    Cut,
    /// The acceptor resets it.
    Refuse,
    /// The opener finishes, reads half of the answer, and goes.
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
    /// How many milliseconds readers wait now and then.
    slow: u8,
    /// How much is written at once.
    piece: u16,
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
            piece: random.random_range(1..=most) as u16,
        }
    }

    fn encode(self) -> Vec<u8> {
        let numbers = [self.seed, self.there, self.back].map(u32::to_be_bytes).concat();
        [&numbers[..], &[self.outcome as u8, self.slow], &self.piece.to_be_bytes()].concat()
    }

    fn decode(header: [u8; 16]) -> Self {
        let number = |at: usize| u32::from_be_bytes(*header[at..].first_chunk().unwrap());
        Self {
            seed: number(0),
            there: number(4),
            back: number(8),
            outcome: OUTCOMES[usize::from(header[12])],
            slow: header[13],
            piece: u16::from_be_bytes([header[14], header[15]]),
        }
    }
}

/// The opener's side of a stream. Dropped before its end, it is reset.
async fn ask(stream: impl AsyncRead + AsyncWrite, plan: Plan) {
    let (mut reads, mut writes) = stream.split();
    let write = async {
        writes.write_all(&plan.encode()).await?;
        send(&mut writes, plan.seed, plan.there, plan, plan.outcome != Outcome::Cut).await
    };
    let (expected, back) = (payload(!plan.seed), plan.back as usize);
    match plan.outcome {
        Outcome::Both | Outcome::Late => {
            let (wrote, read) = join(write, receive(&mut reads, expected, back, plan)).await;
            assert_eq!((wrote.is_ok(), read), (true, Read::Whole), "ask {plan:?}");
        }
        Outcome::Cut => write.await.unwrap_or_else(|error| panic!("ask {plan:?}: {error}")),
        Outcome::Refuse => {
            // Writing ends with the reset, too.
            let (_, read) = join(write, receive(&mut reads, expected, back, plan)).await;
            assert!(matches!(read, Read::Reset(_)), "ask {plan:?}: {read:?}");
        }
        Outcome::Enough => {
            let mut half = reads.take(u64::from(plan.back / 2));
            let (wrote, read) = join(write, receive(&mut half, expected, back / 2, plan)).await;
            assert_eq!((wrote.is_ok(), read), (true, Read::Whole), "ask {plan:?}");
        }
    }
}

/// The acceptor's side.
async fn answer(stream: impl AsyncRead + AsyncWrite) {
    let (mut reads, mut writes) = stream.split();
    let mut header = [0; 16];
    reads.read_exact(&mut header).await.expect("what came before a reset is read");
    let plan = Plan::decode(header);
    let ends = plan.outcome != Outcome::Refuse;
    let write = send(&mut writes, !plan.seed, plan.back, plan, ends);
    let read = receive(&mut reads, payload(plan.seed), plan.there as usize, plan);
    match plan.outcome {
        Outcome::Both => {
            let (wrote, read) = join(write, read).await;
            assert_eq!((wrote.is_ok(), read), (true, Read::Whole), "answer {plan:?}");
        }
        Outcome::Late => {
            assert_eq!(read.await, Read::Whole, "answer {plan:?}");
            write.await.unwrap_or_else(|error| panic!("answer {plan:?}: {error}"));
        }
        Outcome::Cut => {
            let (_, read) = join(write, read).await;
            assert!(matches!(read, Read::Reset(_)), "answer {plan:?}: {read:?}");
        }
        Outcome::Refuse => write.await.unwrap_or_else(|error| panic!("answer {plan:?}: {error}")),
        Outcome::Enough => {
            // It may be reset meanwhile.
            let (_, read) = join(write, read).await;
            assert!(!matches!(read, Read::Short(_)), "answer {plan:?}: {read:?}");
        }
    }
}

/// What came.
#[derive(Debug, PartialEq, Eq)]
enum Read {
    /// All, and the end.
    Whole,
    /// An end with so many bytes missing.
    Short(usize),
    /// A reset with so many bytes missing.
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
    for piece in bytes.chunks(plan.piece.into()) {
        to.write_all(piece).await?;
    }
    to.flush().await?;
    if ends { to.close().await } else { Ok(()) }
}

/// The bytes of a seed.
fn payload(mut seed: u32) -> impl Iterator<Item = u8> {
    std::iter::repeat_with(move || {
        seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (seed >> 24) as u8
    })
}

/// The frames of both sides.
#[derive(Default)]
struct Seen {
    theirs: Frames,
    ours: Frames,
}

/// How many frames there were, by their flags, and the last if it was go-away.
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

/// A connection whose frames are counted.
struct Watched {
    tcp: TcpStream,
    seen: Arc<Mutex<Seen>>,
}

impl AsyncRead for Watched {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut [u8],
    ) -> Poll<io::Result<usize>> {
        let read = Pin::new(&mut self.tcp).poll_read(cx, buffer);
        if let Poll::Ready(Ok(read)) = read {
            self.seen.lock().unwrap().theirs.follow(&buffer[..read]);
        }
        read
    }
}

impl AsyncWrite for Watched {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.tcp).poll_write(cx, bytes);
        if let Poll::Ready(Ok(written)) = written {
            self.seen.lock().unwrap().ours.follow(&bytes[..written]);
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
