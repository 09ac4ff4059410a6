//! Backpressure: an end that stops reading pauses the other one, and the relay buffers no more than the windows allow.

use std::{cell::Cell, io, net::Ipv4Addr, time::Duration};

use crate::common::{
    Client, HOP, Relay, STOP, Security, accept_circuit,
    by_hand::{
        ACK, Channel, FIN, RST, SYN, WINDOW_UPDATE, data, frame, mux, next_frame, reserve, secure,
        send, tcp_with_small_buffer,
    },
    child_process::resident,
    circuit,
    messages::{HopMessage, OK, StopMessage, connect},
    raw_peers::{Received, hop_opening, stop_acceptance},
    within,
};
use libp2p::{
    PeerId, Stream, StreamProtocol,
    futures::{AsyncReadExt, AsyncWriteExt, future},
    identity::Keypair,
};
use prost::Message;

const KIB: usize = 1024;
const MIB: usize = 1024 * KIB;

/// How much the writer offers.
const OFFER: usize = 1024 * MIB;

/// How much the reader reads before each time that it stops.
const READ: usize = 32 * MIB;

/// A window larger than all that is written.
const LARGE_WINDOW: u32 = (OFFER + 2 * READ) as u32;

/// The largest chunk in which the relay reads, relays and writes: a message of Noise.
const CHUNK: usize = 64 * KIB;

/// How much the relay may buffer of a paused circuit, in bytes.
const BUFFERED: usize = {
    // What the writer sent: INITIAL_WINDOW and WINDOW_GROWTH of `muxer.rs`, together LONGEST_FRAME.
    let window = MIB;
    // Frames for the reader: yamux queues ten of a stream and one more of each of its halves; one is next, and one
    // is being written.
    let frames = (10 + 2 + 2) * CHUNK;
    // On the writer's connection: a read buffer, a message, and its contents. Between the streams: what the reader's
    // stream did not accept. On the reader's connection: a message, its ciphertext, and up to three that wait for
    // the socket.
    let chunks = (3 + 1 + 5) * CHUNK;
    window + frames + chunks
};

/// How much freed memory the heap may keep for each thread (`cli/runtime.rs`), in bytes.
const FREED: usize = 8 * MIB;

/// A writer without progress for this long is taken to be paused. On a slow machine the test may then stop early, which
/// weakens it but does not make it fail.
const PAUSED: Duration = Duration::from_secs(1);

/// Which end of the circuit reads.
#[derive(Clone, Copy, Debug)]
enum Reads {
    Source,
    Target,
}

/// Where the data piles up when the reader stops.
#[derive(Clone, Copy, Debug)]
enum Stops {
    /// In the relay: the reader does not open its window.
    Window,
    /// In the reader's socket: its window is large, and it does not read.
    Socket,
}

#[tokio::test]
async fn over_noise_a_target_that_stops_reading_pauses_the_source() {
    check(Security::Noise, Reads::Target).await;
}

#[tokio::test]
async fn over_noise_a_source_that_stops_reading_pauses_the_target() {
    check(Security::Noise, Reads::Source).await;
}

#[tokio::test]
async fn over_tls_a_target_that_stops_reading_pauses_the_source() {
    check(Security::Tls, Reads::Target).await;
}

#[tokio::test]
async fn over_tls_a_source_that_stops_reading_pauses_the_target() {
    check(Security::Tls, Reads::Source).await;
}

async fn check(security: Security, reads: Reads) {
    let both = |threads| {
        future::join(
            check_with(security, reads, Stops::Window, threads),
            check_with(security, reads, Stops::Socket, threads),
        )
    };
    future::join(both(1), both(2)).await;
}

async fn check_with(security: Security, reads: Reads, stops: Stops, threads: usize) {
    let relay = Relay::start(&[
        "--circuit-bytes=0",
        "--circuit-duration=0s",
        // A reader that has stopped does not answer probes.
        "--heartbeat=0s",
        &format!("--threads={threads}"),
    ]);
    let (mut reader, mut writer) = circuit_over(&relay, security, reads, stops).await;
    // Warm-up: loads the code and grows the heap.
    let warm_up = write(&mut writer.stream, READ, |_| ());
    future::join(warm_up, reader.read(READ)).await;
    let before = resident(relay.pid());

    let accepted = Cell::new(0);
    let offered = write(&mut writer.stream, OFFER, |more| {
        accepted.set(accepted.get() + more);
    });
    let stopped = async {
        for read in [0, READ] {
            reader.read(read).await;
            wait_until_paused(&accepted).await;
            assert!(accepted.get() >= read, "what was read was written");
            let growth = resident(relay.pid()).saturating_sub(before) as usize * KIB;
            let most = BUFFERED + threads * FREED;
            assert!(growth <= most, "{stops:?}: the relay uses {growth} bytes more");
        }
    };
    tokio::select! {
        () = stopped => {}
        () = offered => panic!("{stops:?}: the writer was not paused"),
    }
}

/// `--silence` of the test of stalled writes.
const SILENCE: Duration = Duration::from_secs(6);

/// Both peers send, so neither is silent. One reads nothing, and the other one slowly.
#[tokio::test]
async fn a_peer_that_stops_reading_enters_grace_and_a_slow_reader_stays() {
    let relay = Relay::start(&[
        "--circuit-bytes=0",
        "--circuit-duration=0s",
        "--heartbeat=2s",
        &format!("--silence={}s", SILENCE.as_secs()),
    ]);
    let slow = circuit_over(&relay, Security::Noise, Reads::Target, Stops::Socket).await;
    let stalled = circuit_over(&relay, Security::Noise, Reads::Target, Stops::Socket).await;
    let [(mut slow, mut to_slow), (mut stalled, mut to_stalled)] = [slow, stalled];
    let writing = future::join(
        write(&mut to_slow.stream, OFFER, |_| ()),
        to_stalled.stream.write_all(&[7; 32 * MIB]),
    );
    let reading = async {
        loop {
            slow.read(CHUNK).await;
            slow.send_frame().await.expect("it stays connected");
            tokio::time::sleep(SILENCE / 4).await;
        }
    };
    let sending = async {
        while stalled.send_frame().await.is_ok() {
            tokio::time::sleep(SILENCE / 4).await;
        }
        future::pending::<()>().await // the relay has closed it
    };
    let closing = async {
        relay.wait_for_log("write stalled: no progress for ").await;
        relay.wait_for_log("grace began: peer ").await;
    };
    tokio::select! {
        () = closing => {}
        _ = future::join3(writing, reading, sending) => panic!("a circuit ended"),
    }
    slow.read(CHUNK).await;
    slow.send_frame().await.expect("it stays connected");
    for line in ["write stalled", "grace began"] {
        assert_eq!(relay.count_in_log(line), 1, "{line}");
    }
    assert_eq!(relay.count_in_log("peer silent"), 0);
}

/// Writes this many bytes; `progress` gets the number of bytes accepted by each write.
async fn write(stream: &mut Stream, bytes: usize, progress: impl Fn(usize)) {
    let piece = vec![7; CHUNK];
    let mut remaining = bytes;
    while remaining > 0 {
        let next = &piece[..remaining.min(CHUNK)];
        let accepted = stream.write(next).await.expect("the circuit stays");
        progress(accepted);
        remaining -= accepted;
    }
    stream.flush().await.expect("the circuit stays");
}

/// Waits until no more bytes are accepted.
async fn wait_until_paused(accepted: &Cell<usize>) {
    let mut before = usize::MAX;
    while accepted.get() != before {
        before = accepted.get();
        tokio::time::sleep(PAUSED).await;
    }
}

/// The end of a circuit that stops reading, with its client: dropping that would close the circuit.
enum Reader {
    Client(Stream, #[expect(dead_code)] Box<Client>),
    /// A stream of this connection.
    ByHand(Box<Channel>, u32),
}

/// The end of a circuit that is paused, with its client.
struct Writer {
    stream: Stream,
    _client: Client,
}

impl Reader {
    /// Sends a frame that needs no answer.
    async fn send_frame(&mut self) -> io::Result<()> {
        let Self::ByHand(channel, circuit) = self else {
            panic!("only for a connection by hand");
        };
        channel.write_all(&frame(WINDOW_UPDATE, 0, *circuit, 1)).await?;
        channel.flush().await
    }

    /// Reads this many bytes from the circuit.
    async fn read(&mut self, bytes: usize) {
        let mut remaining = bytes;
        match self {
            Self::Client(stream, _) => {
                let mut piece = vec![0; CHUNK];
                while remaining > 0 {
                    let next = &mut piece[..remaining.min(CHUNK)];
                    let read = within(stream.read(next)).await.expect("the circuit stays");
                    assert_ne!(read, 0, "the circuit stays");
                    remaining -= read;
                }
            }
            Self::ByHand(channel, circuit) => {
                while remaining > 0 {
                    let frame = next_frame(channel).await.expect("the connection stays");
                    if frame.stream == *circuit {
                        assert!(!frame.has(FIN | RST), "the circuit stays");
                        remaining = remaining.saturating_sub(frame.body.len());
                    }
                }
            }
        }
    }
}

/// Opens a circuit through the relay.
async fn circuit_over(
    relay: &Relay,
    security: Security,
    reads: Reads,
    stops: Stops,
) -> (Reader, Writer) {
    let (reader, stream, client) = match stops {
        Stops::Window => between_clients(relay, security, reads).await,
        Stops::Socket => by_hand(relay, security, reads).await,
    };
    let writer = Writer { stream, _client: client };
    (reader, writer)
}

async fn between_clients(
    relay: &Relay,
    security: Security,
    reads: Reads,
) -> (Reader, Stream, Client) {
    let client = || Client::connect_as(Keypair::generate_ed25519(), &relay.address, security);
    let (mut source, mut target) = (client().await, client().await);
    target.reserve().await;
    let (from, to) = circuit(&mut source, &mut target).await;
    match reads {
        Reads::Target => (Reader::Client(to, Box::new(target)), from, source),
        Reads::Source => (Reader::Client(from, Box::new(source)), to, target),
    }
}

async fn by_hand(relay: &Relay, security: Security, reads: Reads) -> (Reader, Stream, Client) {
    let writer = Client::connect_as(Keypair::generate_ed25519(), &relay.address, security);
    let mut writer = writer.await;
    let keypair = Keypair::generate_ed25519();
    // Reading a little opens the window of a small buffer at once, that of a large one after a sixteenth of it.
    let socket = tcp_with_small_buffer(Ipv4Addr::LOCALHOST, relay.port());
    let channel = secure(socket.await.expect("the relay listens"), &keypair, security).await;
    let reader = mux(channel.expect("the relay supports both")).await;
    let mut reader = reader.expect("the relay supports yamux");
    let (circuit, stream) = match reads {
        Reads::Target => {
            assert_eq!(reserve(&mut reader, 1).await, OK);
            let request = connect(keypair.public().to_peer_id());
            let requested = writer.request_circuit(&request);
            let (circuit, (answer, stream)) =
                future::join(accept_by_hand(&mut reader), requested).await;
            assert_eq!(answer.status, OK);
            (circuit, stream)
        }
        Reads::Source => {
            writer.reserve().await;
            let mut stops = writer.accept(STOP);
            let request = connect_by_hand(&mut reader, writer.peer);
            let (circuit, (_, stream)) = future::join(request, accept_circuit(&mut stops)).await;
            (circuit, stream)
        }
    };
    send(&mut reader, &frame(WINDOW_UPDATE, 0, circuit, LARGE_WINDOW)).await;
    (Reader::ByHand(Box::new(reader), circuit), stream, writer)
}

/// Opens a circuit; returns its stream.
async fn connect_by_hand(channel: &mut Channel, target: PeerId) -> u32 {
    send(channel, &data(SYN, 1, &hop_opening(&connect(target)))).await;
    let (stream, answer) = first_message::<HopMessage>(channel, &HOP).await;
    assert_eq!(answer.status, OK);
    stream
}

/// Accepts a circuit; returns its stream.
async fn accept_by_hand(channel: &mut Channel) -> u32 {
    let (stream, _) = first_message::<StopMessage>(channel, &STOP).await;
    send(channel, &data(ACK, stream, &stop_acceptance())).await;
    stream
}

/// The first message on a stream of this protocol, and that stream.
async fn first_message<M: Message + Default>(
    channel: &mut Channel,
    protocol: &StreamProtocol,
) -> (u32, M) {
    let mut received = Received::default();
    loop {
        let frame = next_frame(channel).await.expect("the connection stays");
        if let Some(message) = received.message(protocol, &frame) {
            return (frame.stream, message);
        }
    }
}
