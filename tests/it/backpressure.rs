//! A reader that stops halts its writer, and costs the relay what the windows allow.

use std::{cell::Cell, io, time::Duration};

use crate::common::{
    Client, HOP, Relay, STOP, Security, agree,
    by_hand::{
        ACK, Channel, FIN, RST, SYN, WINDOW_UPDATE, data, frame, muxed_with, next_frame, proposal,
        reserve, send,
    },
    children::resident,
    circuit,
    messages::{HopMessage, StopMessage, connect, stop_status},
    strangers::Heard,
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

/// What the writer would like to say.
const OFFER: usize = 1024 * MIB;

/// What the reader takes before it stops, each time.
const TAKEN: usize = 32 * MIB;

/// A window that all of it fits into.
const WIDE: u32 = (OFFER + 2 * TAKEN) as u32;

/// The largest piece in which the relay reads, pumps and writes: a message of Noise.
const PIECE: usize = 64 * KIB;

/// What the relay may hold of a circuit that stands still, in bytes.
const HELD: usize = {
    // What the writer sent: INITIAL_WINDOW and WINDOW_GROWTH of `muxer.rs`, together LONGEST_FRAME.
    let window = MIB;
    // Frames for the reader: yamux takes ten of a stream and one more from each of its halves, and
    // has one that is next and one that is being written.
    let frames = (10 + 2 + 2) * PIECE;
    // Behind the writer's socket: a read buffer, a message, and what is in it. Between the streams:
    // what the reader's did not take. Before the reader's socket: a message, its encryption, and up
    // to three that wait for the socket.
    let pieces = (3 + 1 + 5) * PIECE;
    window + frames + pieces
};

/// What the relay's heap may keep beside, for each thread: what was freed in between (`cli/runtime.rs`).
const KEPT: usize = 8 * MIB;

/// A writer that got nothing away for so long is halted. On a machine so slow that it is not, it is
/// asked to get less away than it might.
const HALTED: Duration = Duration::from_secs(1);

/// Which end of the circuit reads.
#[derive(Clone, Copy, Debug)]
enum Reads {
    Source,
    Target,
}

/// Where what the relay sends piles up, when the reader stops.
#[derive(Clone, Copy, Debug)]
enum Stops {
    /// In the reader's window: it does not open it again.
    Window,
    /// In its socket: the window is open wide, and nobody reads.
    Socket,
}

#[tokio::test]
async fn over_noise_a_target_that_stops_halts_the_source() {
    halts(Security::Noise, Reads::Target).await;
}

#[tokio::test]
async fn over_noise_a_source_that_stops_halts_the_target() {
    halts(Security::Noise, Reads::Source).await;
}

#[tokio::test]
async fn over_tls_a_target_that_stops_halts_the_source() {
    halts(Security::Tls, Reads::Target).await;
}

#[tokio::test]
async fn over_tls_a_source_that_stops_halts_the_target() {
    halts(Security::Tls, Reads::Source).await;
}

async fn halts(security: Security, reads: Reads) {
    let both = |threads| {
        future::join(
            halts_at(security, reads, Stops::Window, threads),
            halts_at(security, reads, Stops::Socket, threads),
        )
    };
    future::join(both(1), both(2)).await;
}

async fn halts_at(security: Security, reads: Reads, stops: Stops, threads: usize) {
    let relay = Relay::start(&[
        "--circuit-bytes=0",
        "--circuit-duration=0s",
        // Who stopped does not answer when it is asked whether it is alive.
        "--heartbeat=0s",
        &format!("--threads={threads}"),
    ]);
    let (mut reader, mut writer) = circuit_over(&relay, security, reads, stops).await;
    // After that the relay's code is loaded, its heap is as large as its work, and nothing is under
    // way.
    let carried = write(&mut writer.stream, TAKEN, |_| ());
    future::join(carried, reader.take(TAKEN)).await;
    let before = resident(relay.pid());

    let accepted = Cell::new(0);
    let offered = write(&mut writer.stream, OFFER, |more| {
        accepted.set(accepted.get() + more);
    });
    let stopped = async {
        for taken in [0, TAKEN] {
            reader.take(taken).await;
            halted(&accepted).await;
            assert!(accepted.get() >= taken, "what was read was written");
            let grown = resident(relay.pid()).saturating_sub(before) as usize * KIB;
            let most = HELD + threads * KEPT;
            assert!(grown <= most, "{stops:?}: the relay holds {grown} bytes more");
        }
    };
    tokio::select! {
        () = stopped => {}
        () = offered => panic!("{stops:?}: the writer was not halted"),
    }
}

/// What `--silence` is where a peer is to be found write stalled.
const SILENCE: Duration = Duration::from_secs(6);

/// Both speak, so neither is silent. One takes nothing of what is sent to it; the other one reads, though slowly.
#[tokio::test]
async fn a_peer_that_takes_nothing_enters_grace_and_one_that_reads_slowly_stays() {
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
            slow.take(PIECE).await;
            slow.speak().await.expect("it stays connected");
            tokio::time::sleep(SILENCE / 4).await;
        }
    };
    let speaking = async {
        while stalled.speak().await.is_ok() {
            tokio::time::sleep(SILENCE / 4).await;
        }
        future::pending::<()>().await // it was closed
    };
    let closing = async {
        relay.wait_for_log("write stalled: took nothing for ").await;
        relay.wait_for_log("grace began: peer ").await;
    };
    tokio::select! {
        () = closing => {}
        _ = future::join3(writing, reading, speaking) => panic!("a circuit ends"),
    }
    slow.take(PIECE).await;
    slow.speak().await.expect("it stays connected");
    for line in ["write stalled", "grace began"] {
        assert_eq!(relay.count_in_log(line), 1, "{line}");
    }
    assert_eq!(relay.count_in_log("peer silent"), 0);
}

/// Writes so many bytes; tells how many more were accepted, each time that some were.
async fn write(stream: &mut Stream, bytes: usize, told: impl Fn(usize)) {
    let piece = vec![7; PIECE];
    let mut left = bytes;
    while left > 0 {
        let next = &piece[..left.min(PIECE)];
        let accepted = stream.write(next).await.expect("the circuit stays");
        told(accepted);
        left -= accepted;
    }
    stream.flush().await.expect("the circuit stays");
}

/// Waits until nothing more is accepted.
async fn halted(accepted: &Cell<usize>) {
    let mut before = usize::MAX;
    while accepted.get() != before {
        before = accepted.get();
        tokio::time::sleep(HALTED).await;
    }
}

/// The end of a circuit that stops. Who holds it has to stay for the circuit to last.
enum Reader {
    Client(Stream, #[expect(dead_code)] Box<Client>),
    /// A stream of this connection.
    ByHand(Box<Channel>, u32),
}

/// The end of a circuit that is halted, and who holds it.
struct Writer {
    stream: Stream,
    _client: Client,
}

impl Reader {
    /// Says something that needs no answer.
    async fn speak(&mut self) -> io::Result<()> {
        let Self::ByHand(channel, circuit) = self else {
            panic!("a client speaks by itself");
        };
        channel.write_all(&frame(WINDOW_UPDATE, 0, *circuit, 1)).await?;
        channel.flush().await
    }

    /// Takes so many bytes of the circuit.
    async fn take(&mut self, bytes: usize) {
        let mut left = bytes;
        match self {
            Self::Client(stream, _) => {
                let mut piece = vec![0; PIECE];
                while left > 0 {
                    let next = &mut piece[..left.min(PIECE)];
                    let read = within(stream.read(next)).await.expect("the circuit stays");
                    assert_ne!(read, 0, "the circuit stays");
                    left -= read;
                }
            }
            Self::ByHand(channel, circuit) => {
                while left > 0 {
                    let frame = next_frame(channel).await.expect("the connection stays");
                    if frame.stream == *circuit {
                        assert!(!frame.has(FIN | RST), "the circuit stays");
                        left = left.saturating_sub(frame.body.len());
                    }
                }
            }
        }
    }
}

/// An open circuit over the relay.
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
    let mut reader = muxed_with(relay, &keypair, security).await;
    let (circuit, stream) = match reads {
        Reads::Target => {
            assert_eq!(reserve(&mut reader, 1).await, Some(100));
            let request = connect(keypair.public().to_peer_id());
            let asked = writer.ask_for_circuit(&request);
            let (circuit, (answer, stream)) = future::join(agree_by_hand(&mut reader), asked).await;
            assert_eq!(answer.status, Some(100));
            (circuit, stream)
        }
        Reads::Source => {
            writer.reserve().await;
            let mut stops = writer.accept(STOP);
            let asked = connect_by_hand(&mut reader, writer.peer);
            let (circuit, (_, stream)) = future::join(asked, agree(&mut stops)).await;
            (circuit, stream)
        }
    };
    send(&mut reader, &frame(WINDOW_UPDATE, 0, circuit, WIDE)).await;
    (Reader::ByHand(Box::new(reader), circuit), stream, writer)
}

/// Asks for a circuit, and gets it; on which stream.
async fn connect_by_hand(channel: &mut Channel, target: PeerId) -> u32 {
    let request = connect(target).encode_length_delimited_to_vec();
    let opening = [proposal(HOP.as_ref()), request].concat();
    send(channel, &data(SYN, 1, &opening)).await;
    let (stream, answer) = first_message::<HopMessage>(channel, &HOP).await;
    assert_eq!(answer.status, Some(100));
    stream
}

/// Agrees to a circuit; on which stream.
async fn agree_by_hand(channel: &mut Channel) -> u32 {
    let (stream, _) = first_message::<StopMessage>(channel, &STOP).await;
    let agreed = stop_status(100).encode_length_delimited_to_vec();
    let answer = [proposal(STOP.as_ref()), agreed].concat();
    send(channel, &data(ACK, stream, &answer)).await;
    stream
}

/// The first message on a stream of this protocol, and which stream that is.
async fn first_message<M: Message + Default>(
    channel: &mut Channel,
    protocol: &StreamProtocol,
) -> (u32, M) {
    let mut heard = Heard::default();
    loop {
        let frame = next_frame(channel).await.expect("the connection stays");
        if let Some(message) = heard.message(protocol, &frame) {
            return (frame.stream, message);
        }
    }
}
