//! Strangers who take all that each of them may have.

use std::{
    collections::HashMap,
    io,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use libp2p::{
    futures::{AsyncWriteExt, future},
    tcp::tokio::TcpStream,
};
use tokio::{
    task::JoinSet,
    time::{sleep, timeout},
};

use crate::common::{
    by_hand::{
        ACK, DATA, FIN, RST, SYN, agree, behind_its_length, data, frame, proposal, tcp_from,
    },
    http::{get, samples},
    messages::{connect, reserve},
    strangers::{AT_A_TIME, Stranger, address, all, each, opening, quick_or_long},
    within,
};

/// How many come from one address.
const OF_ONE_ADDRESS: usize = 8;

/// How many frames of one byte a source sends, to a target that does not answer.
const SMALL_FRAMES: usize = 2500;

/// What it sends else, of a window that is 256 KiB wide.
const PIECES: usize = 3;
const PIECE: usize = 60 * 1024;

/// How many streams each opens, on which it never says what it wants.
const MUTE: usize = 8;

/// How peers say of themselves what they are, asked or not: a message in protobuf, whose field 1 is the
/// peer's key, 2 an address, and 3 a protocol.
const IDENTIFY: &str = "/ipfs/id/1.0.0";
const PUSH: &str = "/ipfs/id/push/1.0.0";

/// The messages that take the most memory once they are decoded: as many fields as there is room for.
const EMPTY_ADDRESSES: usize = 2010;
const SHORT_PROTOCOLS: usize = 844;

/// A body that a header may announce: the stream's window is 256 KiB wide, and some of it is used.
const LONGEST_BODY: u32 = 192 * 1024;

/// How often to look at what the relay counts.
const LOOK_AGAIN: Duration = Duration::from_millis(100);

/// For how long whoever is in its handshake is left alone.
const IN_HANDSHAKE: Duration = Duration::from_secs(5);

/// The limits.
#[derive(Clone, Copy, Debug)]
pub struct Size {
    pub connections: usize,
    handshakes: usize,
    slots: usize,
    pub circuits: usize,
    circuits_per_peer: usize,
    streams: usize,
    buffered: usize,
}

impl Default for Size {
    /// The relay's own.
    fn default() -> Self {
        Self {
            connections: 2048,
            handshakes: 256,
            slots: 1024,
            circuits: 1024,
            circuits_per_peer: 64,
            streams: 4096,
            buffered: 80 * 1024 * 1024,
        }
    }
}

impl Size {
    /// The limits that a relay prints as its settings.
    pub fn printed(settings: &str) -> Self {
        let settings: toml::Table = settings.replace("\n# ", "\n").parse().expect("TOML");
        let limit = |name: &str| settings[name].as_integer().expect("a number") as usize;
        Self {
            connections: limit("max-connections"),
            handshakes: limit("max-handshakes"),
            slots: limit("max-reservations"),
            circuits: limit("max-circuits"),
            circuits_per_peer: limit("max-circuits-per-peer"),
            streams: limit("max-streams"),
            buffered: limit("max-buffered"),
        }
    }

    pub fn divided_by(self, by: usize) -> Self {
        Self {
            connections: self.connections / by,
            handshakes: self.handshakes / by,
            slots: self.slots / by,
            circuits: self.circuits / by,
            circuits_per_peer: self.circuits_per_peer / by,
            streams: self.streams / by,
            buffered: self.buffered / by,
        }
    }

    pub fn flags(self) -> Vec<String> {
        vec![
            format!("--max-connections={}", self.connections),
            format!("--max-handshakes={}", self.handshakes),
            format!("--max-reservations={}", self.slots),
            format!("--max-circuits={}", self.circuits),
            format!("--max-circuits-per-peer={}", self.circuits_per_peer),
            format!("--max-streams={}", self.streams),
            format!("--max-buffered={}", self.buffered),
        ]
    }
}

/// What they came to.
#[derive(Debug)]
pub struct Reached {
    /// How many circuits there were at once, or asked for.
    pub circuits: usize,
    /// How many streams of theirs were reset.
    pub reset: usize,
    /// How many connections were closed.
    pub closed: usize,
}

/// All that there is room for beside the two who look on.
pub struct Crowd {
    port: u16,
    watched_at: u16,
    size: Size,
    /// A target that holds a slot, and who wants to reach it.
    pairs: Vec<(Stranger, Stranger)>,
}

impl Crowd {
    pub async fn gather(port: u16, watched_at: u16, size: Size) -> Self {
        // Two look on, who have a slot and a circuit.
        let at_a_time = AT_A_TIME.min(size.handshakes / 2);
        let pairs = each(size.slots - 1, at_a_time, move |number| async move {
            let from = address(2 * number / OF_ONE_ADDRESS);
            let mut target = Stranger::arrive(port, from).await;
            let mut source = Stranger::arrive(port, from).await;
            for stranger in [&mut target, &mut source] {
                answer_identify(stranger).await?;
            }
            assert_eq!(target.ask_once(&reserve()).await?.1, Some(100));
            for stranger in [&mut target, &mut source] {
                fill_what_stays(stranger).await?;
                push(stranger, &empty_addresses()).await?;
                push(stranger, &short_protocols()).await?;
            }
            io::Result::Ok((target, source))
        });
        Self { port, watched_at, size, pairs: all(pairs.await) }
    }

    /// Waits until it counts so many.
    async fn until(&self, name: &str, wanted: usize) {
        within(async {
            while self.count(name).await != wanted {
                sleep(LOOK_AGAIN).await;
            }
        })
        .await;
    }

    async fn count(&self, name: &str) -> usize {
        samples(&get(self.watched_at, "/metrics").await)[name] as usize
    }

    /// All of it at once, more than once.
    pub async fn presses(mut self) -> Reached {
        let reset = Arc::new(AtomicUsize::new(0));
        // It counts once a second.
        self.until("relaylet_connections", self.size.connections).await;
        self.until(r#"relaylet_slots{state="live"}"#, self.size.slots).await;
        let mut circuits = 0;
        let rounds = quick_or_long(3, 8);
        for round in 0..rounds {
            let is_last = round + 1 == rounds;
            // A target that does not answer is asked for a while, and counts. Two look on.
            self.until("relaylet_circuits", 1).await;
            let handshakes = in_handshake(self.port, self.size.handshakes);
            let mut pressing = JoinSet::new();
            for (target, source) in std::mem::take(&mut self.pairs) {
                let reset = Arc::clone(&reset);
                let circuits = self.size.circuits / self.size.slots;
                pressing.spawn(async move {
                    match round % 2 {
                        0 => stalls_unanswered(target, source, circuits, &reset, is_last).await,
                        _ => stalls_in_circuits(target, source, circuits, &reset, is_last).await,
                    }
                });
            }
            let (pressed, ()) = future::join(pressing.join_all(), handshakes).await;
            circuits = circuits.max(self.count("relaylet_circuits").await);
            self.pairs = pressed.into_iter().flatten().collect();
        }
        Reached {
            circuits,
            reset: reset.load(Ordering::Relaxed),
            closed: 2 * (self.size.slots - 1 - self.pairs.len()),
        }
    }
}

/// What the relay keeps for a connection once it has had to read a message as long as there can be.
pub async fn fill_what_stays(stranger: &mut Stranger) -> io::Result<()> {
    let stream = stranger.next_stream();
    stranger.say(&data(SYN, stream, &vec![7; 64_000])).await?;
    stranger.say(&data(RST, stream, &[])).await
}

fn empty_addresses() -> Vec<u8> {
    [0x12, 0].repeat(EMPTY_ADDRESSES)
}

fn short_protocols() -> Vec<u8> {
    let name = |number: usize| [b'A' + (number / 32) as u8, b'A' + (number % 32) as u8];
    let field = |number| [&[0x1a, 3, b'/'][..], &name(number)].concat();
    (0..SHORT_PROTOCOLS).flat_map(field).collect()
}

/// Answers the relay, which asks each peer that connects what it is.
async fn answer_identify(stranger: &mut Stranger) -> io::Result<()> {
    let mut asked = HashMap::<u32, Vec<u8>>::new();
    loop {
        let frame = stranger.frame().await?;
        let said = asked.entry(frame.stream).or_default();
        said.extend(frame.body);
        if *said == proposal(IDENTIFY) {
            // An Ed25519 key is in the peer's id, behind two bytes.
            let key = &stranger.peer.to_bytes()[2..];
            let key = [&[0x0a][..], &behind_its_length(key)].concat();
            let message = behind_its_length(&[key, empty_addresses()].concat());
            let answer = [proposal(IDENTIFY), message].concat();
            return stranger.say(&data(ACK | FIN, frame.stream, &answer)).await;
        }
    }
}

/// What opens a stream with a push of this message.
fn pushed(message: &[u8]) -> Vec<u8> {
    [proposal(PUSH), behind_its_length(message)].concat()
}

/// Pushes this message, and waits until the relay is done with it.
async fn push(stranger: &mut Stranger, message: &[u8]) -> io::Result<()> {
    let stream = stranger.next_stream();
    stranger.say(&data(SYN | FIN, stream, &pushed(message))).await?;
    loop {
        let frame = stranger.frame().await?;
        if frame.stream == stream && frame.has(FIN | RST) {
            return Ok(());
        }
    }
}

/// Pushes all of a message but its last byte. Yields the stream, which stays open.
async fn push_most(stranger: &mut Stranger) -> io::Result<u32> {
    let stream = stranger.next_stream();
    let mut most = pushed(&short_protocols());
    most.pop();
    stranger.say(&data(SYN, stream, &most)).await?;
    Ok(stream)
}

/// Announces a body as long as there can be on such a stream. None follows, so it is the last that the
/// relay hears.
async fn say_only_a_header(stranger: &mut Stranger, stream: u32) -> io::Result<()> {
    stranger.say(&frame(DATA, 0, stream, LONGEST_BODY)).await
}

/// Streams on which the relay cannot yet be asked anything; those beyond its limits are reset.
async fn stay_mute(stranger: &mut Stranger) -> io::Result<()> {
    for _ in 0..MUTE {
        let stream = stranger.next_stream();
        let begun = data(SYN, stream, b"\x13/multistream/1.0.0\n");
        stranger.say(&begun).await?;
    }
    Ok(())
}

/// Circuits are asked for, and the target says nothing: so the relay reads nothing of what their source
/// sends behind the requests, in the smallest of frames. The last round ends with a header alone.
async fn stalls_unanswered(
    mut target: Stranger,
    mut source: Stranger,
    circuits: usize,
    reset: &AtomicUsize,
    is_last: bool,
) -> Option<(Stranger, Stranger)> {
    let streams: Vec<_> = (0..circuits).map(|_| source.next_stream()).collect();
    let small = |stream: &u32| data(0, *stream, &[7]).repeat(SMALL_FRAMES / circuits);
    let small: Vec<_> = streams.iter().flat_map(small).collect();
    let pressed = async {
        source.say(&requests(&streams, &target)).await?;
        let pushes = [push_most(&mut source).await?, push_most(&mut target).await?];
        stay_mute(&mut source).await?;
        stay_mute(&mut target).await?;
        source.say(&small).await?;
        stays(&mut target, &mut source, &streams, pushes, reset, is_last).await
    };
    pressed.await.ok()?;
    Some((target, source))
}

/// Circuits are open, and the target reads nothing.
async fn stalls_in_circuits(
    mut target: Stranger,
    mut source: Stranger,
    circuits: usize,
    reset: &AtomicUsize,
    is_last: bool,
) -> Option<(Stranger, Stranger)> {
    let streams: Vec<_> = (0..circuits).map(|_| source.next_stream()).collect();
    let pressed = async {
        source.say(&requests(&streams, &target)).await?;
        let asked = timeout(IN_HANDSHAKE, target.agree_to(circuits)).await;
        let open = asked.map_err(io::Error::other)??;
        let pushes = [push_most(&mut source).await?, push_most(&mut target).await?];
        for (stream, circuit) in streams.iter().zip(&open) {
            for _ in 0..PIECES {
                source.say(&data(0, *stream, &vec![7; PIECE])).await?;
                target.say(&data(0, *circuit, &vec![7; PIECE])).await?;
            }
        }
        stays(&mut target, &mut source, &streams, pushes, reset, is_last).await
    };
    pressed.await.ok()?;
    Some((target, source))
}

/// Asks for a circuit to the target on each of these streams.
fn requests(streams: &[u32], target: &Stranger) -> Vec<u8> {
    let request = opening(&connect(target.peer));
    streams.iter().flat_map(|stream| data(SYN, *stream, &request)).collect()
}

/// All of it stays for a while, or until the relay resets the source's first stream; in the last round with a
/// header alone behind it, and for good.
async fn stays(
    target: &mut Stranger,
    source: &mut Stranger,
    streams: &[u32],
    [of_source, of_target]: [u32; 2],
    reset: &AtomicUsize,
    is_last: bool,
) -> io::Result<()> {
    if is_last {
        say_only_a_header(source, of_source).await?;
        say_only_a_header(target, of_target).await?;
    }
    let is_reset = source.is_reset(streams[0], IN_HANDSHAKE).await?;
    reset.fetch_add(is_reset.into(), Ordering::Relaxed);
    if !is_last {
        let resets: Vec<_> = streams.iter().flat_map(|stream| data(RST, *stream, &[])).collect();
        source.say(&resets).await?;
        target.hears_out().await?;
    }
    Ok(())
}

/// So many come, and stop in the midst of a message of Noise as long as there can be.
async fn in_handshake(port: u16, count: usize) {
    let mut coming = JoinSet::new();
    for number in 0..count {
        // As many of an address as may be in their handshakes.
        let from = address(1000 + number / 8);
        coming.spawn(async move {
            let mut stream: TcpStream = tcp_from(from, port).await?;
            agree(&mut stream, "/noise").await?;
            let mut message = u16::MAX.to_be_bytes().to_vec();
            message.resize(60 * 1024, 7);
            stream.write_all(&message).await?;
            stream.flush().await?;
            tokio::time::sleep(IN_HANDSHAKE).await;
            io::Result::Ok(())
        });
    }
    // The relay may have turned some away.
    let _ = coming.join_all().await;
}
