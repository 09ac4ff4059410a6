//! Peers that use each of their limits to the full.

use std::{collections::HashMap, io, time::Duration};

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
        ACK, DATA, FIN, RST, SYN, data, frame, length_prefixed, negotiate, proposal, tcp_from,
    },
    http::{get, samples},
    messages::{OK, connect, reserve},
    raw_peers::{AT_A_TIME, RawPeer, address, expect_all, hop_opening, run_each, short_or_long},
    within,
};

/// How many peers share an address.
const PER_ADDRESS: usize = 8;

/// How many frames of one byte a source sends, to a target that does not answer.
const SMALL_FRAMES: usize = 2500;

/// What it sends otherwise, into a window of 256 KiB.
const CHUNKS: usize = 3;
const CHUNK: usize = 60 * 1024;

/// How many streams each peer opens without a request.
const SILENT_STREAMS: usize = 8;

/// The identify protocols. A message has the peer's key in field 1, an address in field 2, and a protocol in field 3.
const IDENTIFY: &str = "/ipfs/id/1.0.0";
const PUSH: &str = "/ipfs/id/push/1.0.0";

/// The messages that use the most memory once decoded: as many short fields as fit.
const EMPTY_ADDRESSES: usize = 2010;
const SHORT_PROTOCOLS: usize = 844;

/// The length of a body that a header announces: less than the window of 256 KiB, of which some is used.
const LONGEST_BODY: u32 = 192 * 1024;

/// The interval at which the metrics are polled.
const POLL_INTERVAL: Duration = Duration::from_millis(100);

/// How long a handshake is left pending, and a stream is watched for a reset.
const HOLD_TIME: Duration = Duration::from_secs(5);

/// The relay's limits.
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
    /// The relay's default limits.
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
    /// The limits in the settings that a relay prints.
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

/// What the peers reached.
#[derive(Debug)]
pub struct Reached {
    /// The most circuits that were open or pending at once.
    pub circuits: usize,
    /// How many streams the relay reset because its buffers were full.
    pub reset: usize,
    /// How many connections were closed.
    pub closed: usize,
}

/// As many peers as the limits allow beside the two bystanders.
pub struct Load {
    port: u16,
    http_port: u16,
    size: Size,
    /// A target that holds a slot, and a source for it.
    pairs: Vec<(RawPeer, RawPeer)>,
}

impl Load {
    pub async fn start(port: u16, http_port: u16, size: Size) -> Self {
        // One slot and one circuit are the bystanders'.
        let at_a_time = AT_A_TIME.min(size.handshakes / 2);
        let pairs = run_each(size.slots - 1, at_a_time, move |number| async move {
            let from = address(2 * number / PER_ADDRESS);
            let mut target = RawPeer::connect_with_retry(port, from).await;
            let mut source = RawPeer::connect_with_retry(port, from).await;
            for peer in [&mut target, &mut source] {
                answer_identify(peer).await?;
            }
            assert_eq!(target.request(&reserve()).await?.1, OK);
            for peer in [&mut target, &mut source] {
                grow_read_buffer(peer).await?;
                push(peer, &empty_addresses()).await?;
                push(peer, &short_protocols()).await?;
            }
            io::Result::Ok((target, source))
        });
        Self { port, http_port, size, pairs: expect_all(pairs.await) }
    }

    /// Waits until this metric has this value.
    async fn until(&self, name: &str, wanted: usize) {
        within(async {
            while self.count(name).await != wanted {
                sleep(POLL_INTERVAL).await;
            }
        })
        .await;
    }

    async fn count(&self, name: &str) -> usize {
        samples(&get(self.http_port, "/metrics").await)[name] as usize
    }

    /// Runs several rounds in which all limits are reached at once.
    pub async fn run(mut self) -> Reached {
        // The metrics are updated once a second.
        self.until("relaylet_connections", self.size.connections).await;
        self.until(r#"relaylet_slots{state="live"}"#, self.size.slots).await;
        let mut circuits = 0;
        let rounds = short_or_long(3, 8);
        for round in 0..rounds {
            let is_last = round + 1 == rounds;
            // A pending stop request counts as a circuit; wait until those of the previous round are gone.
            self.until("relaylet_circuits", 1).await;
            let handshakes = hold_handshakes(self.port, self.size.handshakes);
            let mut peers = JoinSet::new();
            for (target, source) in std::mem::take(&mut self.pairs) {
                let circuits = self.size.circuits / self.size.slots;
                peers.spawn(async move {
                    match round % 2 {
                        0 => stall_pending_circuits(target, source, circuits, is_last).await,
                        _ => stall_open_circuits(target, source, circuits, is_last).await,
                    }
                });
            }
            let (remaining, ()) = future::join(peers.join_all(), handshakes).await;
            circuits = circuits.max(self.count("relaylet_circuits").await);
            self.pairs = remaining.into_iter().flatten().collect();
        }
        Reached {
            circuits,
            reset: self.count(r#"relaylet_streams_cut_total{reason="max-buffered"}"#).await,
            closed: 2 * (self.size.slots - 1 - self.pairs.len()),
        }
    }
}

/// Makes the relay read a message of the greatest length, whose buffer it keeps for the connection.
pub async fn grow_read_buffer(peer: &mut RawPeer) -> io::Result<()> {
    let stream = peer.next_stream();
    peer.send(&data(SYN, stream, &vec![7; 64_000])).await?;
    peer.send(&data(RST, stream, &[])).await
}

fn empty_addresses() -> Vec<u8> {
    [0x12, 0].repeat(EMPTY_ADDRESSES)
}

fn short_protocols() -> Vec<u8> {
    let name = |number: usize| [b'A' + (number / 32) as u8, b'A' + (number % 32) as u8];
    let field = |number| [&[0x1a, 3, b'/'][..], &name(number)].concat();
    (0..SHORT_PROTOCOLS).flat_map(field).collect()
}

/// Answers the relay's identify request.
async fn answer_identify(peer: &mut RawPeer) -> io::Result<()> {
    let mut streams = HashMap::<u32, Vec<u8>>::new();
    loop {
        let frame = peer.read_frame().await?;
        let received = streams.entry(frame.stream).or_default();
        received.extend(frame.body);
        if *received == proposal(IDENTIFY) {
            // An Ed25519 key is in the peer id, after two bytes.
            let key = &peer.peer.to_bytes()[2..];
            let key = [&[0x0a][..], &length_prefixed(key)].concat();
            let message = length_prefixed(&[key, empty_addresses()].concat());
            let answer = [proposal(IDENTIFY), message].concat();
            return peer.send(&data(ACK | FIN, frame.stream, &answer)).await;
        }
    }
}

/// The bytes that open a stream and push this message.
fn pushed(message: &[u8]) -> Vec<u8> {
    [proposal(PUSH), length_prefixed(message)].concat()
}

/// Pushes this message, and waits until the relay closes the stream.
async fn push(peer: &mut RawPeer, message: &[u8]) -> io::Result<()> {
    let stream = peer.next_stream();
    peer.send(&data(SYN | FIN, stream, &pushed(message))).await?;
    loop {
        let frame = peer.read_frame().await?;
        if frame.stream == stream && frame.has(FIN | RST) {
            return Ok(());
        }
    }
}

/// Pushes a message except for its last byte. Returns the stream, which stays open.
async fn push_most(peer: &mut RawPeer) -> io::Result<u32> {
    let stream = peer.next_stream();
    let mut most = pushed(&short_protocols());
    most.pop();
    peer.send(&data(SYN, stream, &most)).await?;
    Ok(stream)
}

/// Announces a body of the greatest length on such a stream. The body never follows, so the relay reads nothing else on
/// this connection.
async fn send_header_only(peer: &mut RawPeer, stream: u32) -> io::Result<()> {
    peer.send(&frame(DATA, 0, stream, LONGEST_BODY)).await
}

/// Opens streams without a request; those above the limits are reset.
async fn open_silent_streams(peer: &mut RawPeer) -> io::Result<()> {
    for _ in 0..SILENT_STREAMS {
        let stream = peer.next_stream();
        let begun = data(SYN, stream, b"\x13/multistream/1.0.0\n");
        peer.send(&begun).await?;
    }
    Ok(())
}

/// The target does not answer stop requests, so the relay reads nothing that the source sends after its CONNECTs, which
/// is in the smallest frames. The last round ends with a header alone.
async fn stall_pending_circuits(
    mut target: RawPeer,
    mut source: RawPeer,
    circuits: usize,
    is_last: bool,
) -> Option<(RawPeer, RawPeer)> {
    let streams: Vec<_> = (0..circuits).map(|_| source.next_stream()).collect();
    let small = |stream: &u32| data(0, *stream, &[7]).repeat(SMALL_FRAMES / circuits);
    let small: Vec<_> = streams.iter().flat_map(small).collect();
    let remaining = async {
        source.send(&requests(&streams, &target)).await?;
        let pushes = [push_most(&mut source).await?, push_most(&mut target).await?];
        open_silent_streams(&mut source).await?;
        open_silent_streams(&mut target).await?;
        source.send(&small).await?;
        hold(&mut target, &mut source, &streams, pushes, is_last).await
    };
    remaining.await.ok()?;
    Some((target, source))
}

/// The circuits are open, and the target reads nothing.
async fn stall_open_circuits(
    mut target: RawPeer,
    mut source: RawPeer,
    circuits: usize,
    is_last: bool,
) -> Option<(RawPeer, RawPeer)> {
    let streams: Vec<_> = (0..circuits).map(|_| source.next_stream()).collect();
    let remaining = async {
        source.send(&requests(&streams, &target)).await?;
        let accepted = timeout(HOLD_TIME, target.accept_count(circuits)).await;
        let accepted = accepted.map_err(io::Error::other)??;
        let pushes = [push_most(&mut source).await?, push_most(&mut target).await?];
        for (stream, circuit) in streams.iter().zip(&accepted) {
            for _ in 0..CHUNKS {
                source.send(&data(0, *stream, &vec![7; CHUNK])).await?;
                target.send(&data(0, *circuit, &vec![7; CHUNK])).await?;
            }
        }
        hold(&mut target, &mut source, &streams, pushes, is_last).await
    };
    remaining.await.ok()?;
    Some((target, source))
}

/// Requests a circuit to the target on each of these streams.
fn requests(streams: &[u32], target: &RawPeer) -> Vec<u8> {
    let request = hop_opening(&connect(target.peer));
    streams.iter().flat_map(|stream| data(SYN, *stream, &request)).collect()
}

/// Waits for a while, or until the relay resets the source's first stream. In the last round headers are sent first, and
/// everything stays open.
async fn hold(
    target: &mut RawPeer,
    source: &mut RawPeer,
    streams: &[u32],
    [of_source, of_target]: [u32; 2],
    is_last: bool,
) -> io::Result<()> {
    if is_last {
        send_header_only(source, of_source).await?;
        send_header_only(target, of_target).await?;
    }
    source.is_reset(streams[0], HOLD_TIME).await?;
    if !is_last {
        let resets: Vec<_> = streams.iter().flat_map(|stream| data(RST, *stream, &[])).collect();
        source.send(&resets).await?;
        target.read_until_pong().await?;
    }
    Ok(())
}

/// Starts this many handshakes, and stops in the middle of the longest message of Noise.
async fn hold_handshakes(port: u16, count: usize) {
    let mut handshakes = JoinSet::new();
    for number in 0..count {
        // As many per address as may be in their handshakes.
        let from = address(1000 + number / 8);
        handshakes.spawn(async move {
            let mut stream: TcpStream = tcp_from(from, port).await?;
            negotiate(&mut stream, "/noise").await?;
            let mut message = u16::MAX.to_be_bytes().to_vec();
            message.resize(60 * 1024, 7);
            stream.write_all(&message).await?;
            stream.flush().await?;
            tokio::time::sleep(HOLD_TIME).await;
            io::Result::Ok(())
        });
    }
    // The relay may have denied some.
    let _ = handshakes.join_all().await;
}
