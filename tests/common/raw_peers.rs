//! Peers that speak the protocols byte by byte, from any number of addresses: attackers, and clients under load.

use std::{
    collections::{HashMap, HashSet, hash_map::Entry},
    env, io,
    net::Ipv4Addr,
    slice,
    time::Duration,
};

use libp2p::{
    PeerId, StreamProtocol,
    futures::{AsyncWriteExt, StreamExt, stream},
    identity::Keypair,
    tcp::tokio::TcpStream,
};
use prost::Message;
use tokio::{
    task::JoinHandle,
    time::{sleep, timeout},
};

use super::{
    HOP, STOP, Security,
    by_hand::{
        ACK, Channel, FIN, Frame, PING, RST, SYN, WINDOW, WINDOW_UPDATE, data, frame, mux,
        next_frame, proposal, secure, tcp_from, tcp_with_small_buffer,
    },
    messages::{HopMessage, StopMessage, stop_status},
    within,
};

/// How many connect at a time: half as many as one address may have in their handshakes.
pub const AT_A_TIME: usize = 16;

/// The pause before a denied connection is tried again.
const RETRY_DELAY: Duration = Duration::from_millis(100);

/// The least free window after a request was sent, in bytes.
pub const FREE_WINDOW: usize = WINDOW - 1024;

/// The size of a write, in bytes.
pub const CHUNK: usize = 32 * 1024;

/// `short` in `cargo test`, `long` with `RELAYLET_ATTACKS=long`.
pub fn short_or_long<T>(short: T, long: T) -> T {
    match env::var("RELAYLET_ATTACKS").as_deref() {
        Ok("long") => long,
        Ok(other) => panic!("RELAYLET_ATTACKS={other}: set it to long, or unset it"),
        Err(_) => short,
    }
}

/// Address `number` of those that are each in a /24 of their own.
pub fn address(number: usize) -> Ipv4Addr {
    address_in(number, 0)
}

/// Address `number` of the /24 `subnet`.
pub fn address_in(subnet: usize, number: usize) -> Ipv4Addr {
    let first = Ipv4Addr::new(127, 66, 0, 1).to_bits();
    Ipv4Addr::from_bits(first + (subnet * 256 + number) as u32)
}

/// Runs `what` for each number below `count`, `at_a_time` concurrently.
pub async fn run_each<T: Send + 'static, F: Future<Output = T> + Send + 'static>(
    count: usize,
    at_a_time: usize,
    what: impl Fn(usize) -> F,
) -> Vec<T> {
    let each = stream::iter(0..count).map(|number| tokio::spawn(what(number)));
    let done = each.buffer_unordered(at_a_time);
    done.map(|done| done.expect("the task does not panic")).collect().await
}

/// The values of all results.
///
/// # Panics
///
/// When one is an error: the relay denied or closed its connection.
pub fn expect_all<T>(done: Vec<io::Result<T>>) -> Vec<T> {
    done.into_iter().collect::<io::Result<_>>().expect("the relay keeps every connection")
}

/// A connected peer, on whose connection yamux has been negotiated.
pub struct RawPeer {
    pub peer: PeerId,
    pub channel: Channel,
    next: u32,
}

impl RawPeer {
    /// Connects with a new identity.
    ///
    /// # Errors
    ///
    /// When the relay denied the connection.
    pub async fn connect(port: u16, from: Ipv4Addr) -> io::Result<Self> {
        Self::connect_as(&Keypair::generate_ed25519(), port, from).await
    }

    /// As [`Self::connect`], and retries when the connection is denied: on a busy machine a handshake may take too
    /// long.
    pub async fn connect_with_retry(port: u16, from: Ipv4Addr) -> Self {
        let arrives = async {
            loop {
                if let Ok(peer) = Self::connect(port, from).await {
                    return peer;
                }
                sleep(RETRY_DELAY).await;
            }
        };
        within(arrives).await
    }

    /// Connects with this identity.
    ///
    /// # Errors
    ///
    /// When the relay denied the connection.
    pub async fn connect_as(keypair: &Keypair, port: u16, from: Ipv4Addr) -> io::Result<Self> {
        Self::over(tcp_from(from, port).await?, keypair).await
    }

    /// As [`Self::connect_as`], with a socket that buffers few bytes that are not read.
    pub async fn connect_with_small_buffer(
        keypair: &Keypair,
        port: u16,
        from: Ipv4Addr,
    ) -> io::Result<Self> {
        Self::over(tcp_with_small_buffer(from, port).await?, keypair).await
    }

    async fn over(tcp: TcpStream, keypair: &Keypair) -> io::Result<Self> {
        let secured = secure(tcp, keypair, Security::Noise);
        Ok(Self {
            peer: keypair.public().to_peer_id(),
            channel: mux(secured.await?).await?,
            next: 1,
        })
    }

    /// The id of a new stream.
    pub fn next_stream(&mut self) -> u32 {
        self.next += 2;
        self.next - 2
    }

    /// Writes these bytes and flushes them.
    pub async fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        within(async {
            self.channel.write_all(bytes).await?;
            self.channel.flush().await
        })
        .await
    }

    /// The next frame from the relay.
    ///
    /// # Errors
    ///
    /// When the relay closed the connection.
    pub async fn read_frame(&mut self) -> io::Result<Frame> {
        let frame = next_frame(&mut self.channel).await;
        frame.ok_or(io::ErrorKind::ConnectionAborted.into())
    }

    /// Whether this stream is reset within this time. Other frames are ignored.
    ///
    /// # Errors
    ///
    /// When the relay closed the connection.
    pub async fn is_reset(&mut self, stream: u32, within: Duration) -> io::Result<bool> {
        let reset = async {
            loop {
                let frame = self.read_frame().await?;
                if frame.stream == stream && frame.has(RST) {
                    return Ok(true);
                }
            }
        };
        timeout(within, reset).await.unwrap_or(Ok(false))
    }

    /// Sends a yamux ping and reads until its answer, which the relay sends after all that it sent before. Returns how
    /// many streams that this peer opened were reset meanwhile.
    pub async fn read_until_pong(&mut self) -> io::Result<usize> {
        self.send(&frame(PING, SYN, 0, 4711)).await?;
        let mut reset = 0;
        loop {
            let frame = self.read_frame().await?;
            reset += usize::from(frame.has(RST) && frame.stream % 2 == 1);
            if (frame.kind, frame.flags) == (PING, ACK) {
                return Ok(reset);
            }
        }
    }

    /// Sends all requests at once, each on a stream of its own. Returns the streams, and the status of each answer;
    /// `None`: the stream was reset.
    pub async fn request_all(
        &mut self,
        requests: &[HopMessage],
    ) -> io::Result<Vec<(u32, Option<i32>)>> {
        let answers = self.answers(requests).await?.into_iter();
        let statuses = answers.map(|(stream, answer)| (stream, answer.and_then(|it| it.status)));
        Ok(statuses.collect())
    }

    /// Sends one request.
    pub async fn request(&mut self, request: &HopMessage) -> io::Result<(u32, Option<i32>)> {
        Ok(self.request_all(slice::from_ref(request)).await?[0])
    }

    /// Sends one request, and returns the whole answer.
    pub async fn request_message(&mut self, request: &HopMessage) -> io::Result<HopMessage> {
        let mut answers = self.answers(slice::from_ref(request)).await?;
        let answer = answers.pop().and_then(|(_, answer)| answer);
        answer.ok_or(io::ErrorKind::ConnectionReset.into())
    }

    async fn answers(
        &mut self,
        requests: &[HopMessage],
    ) -> io::Result<Vec<(u32, Option<HopMessage>)>> {
        let streams: Vec<_> = requests.iter().map(|_| self.next_stream()).collect();
        let frames = streams.iter().zip(requests);
        let frames = frames.flat_map(|(id, request)| data(SYN, *id, &hop_opening(request)));
        let frames: Vec<_> = frames.collect();
        self.send(&frames).await?;
        let mut received = Received::default();
        let mut answers = HashMap::new();
        while answers.len() < streams.len() {
            let frame = self.read_frame().await?;
            let id = frame.stream;
            if !streams.contains(&id) {
                self.refuse_stream(&frame).await?;
            } else if let Entry::Vacant(missing) = answers.entry(id) {
                let answer = received.message(&HOP, &frame);
                if answer.is_some() || frame.has(RST | FIN) {
                    missing.insert(answer);
                }
            }
        }
        let answers = streams.into_iter().map(|id| (id, answers.remove(&id).flatten()));
        Ok(answers.collect())
    }

    /// Refuses the next circuit; returns the stop request.
    pub async fn refuse_circuit(&mut self) -> io::Result<StopMessage> {
        let mut received = Received::default();
        loop {
            let frame = self.read_frame().await?;
            if let Some(request) = received.message(&STOP, &frame) {
                let refused = stop_status(203).encode_length_delimited_to_vec();
                let refused = [proposal(STOP.as_ref()), refused].concat();
                self.send(&data(ACK | FIN, frame.stream, &refused)).await?;
                return Ok(request);
            }
        }
    }

    /// Resets a stream that the relay opens, which answers its probe.
    async fn refuse_stream(&mut self, frame: &Frame) -> io::Result<()> {
        match frame.has(SYN) {
            true => self.send(&data(RST, frame.stream, &[])).await,
            false => Ok(()),
        }
    }

    /// Stays connected and answers probes, until the returned task is dropped.
    pub fn stay_connected(mut self) -> Background {
        Background::spawn(async move {
            while let Ok(frame) = self.read_frame().await {
                if self.refuse_stream(&frame).await.is_err() {
                    break;
                }
            }
        })
    }

    /// Writes this many bytes on a stream, as fast as the relay opens its window.
    pub async fn write(&mut self, stream: u32, bytes: usize) -> io::Result<()> {
        let (mut room, mut left) = (FREE_WINDOW, bytes);
        while left > 0 {
            let piece = left.min(room).min(CHUNK);
            if piece > 0 {
                self.send(&data(0, stream, &vec![7; piece])).await?;
                (room, left) = (room - piece, left - piece);
                continue;
            }
            let frame = self.read_frame().await?;
            if (frame.stream, frame.kind) == (stream, WINDOW_UPDATE) {
                room += frame.length as usize;
            }
        }
        Ok(())
    }

    /// Sends as many pings on two streams as their windows allow, without reading the echoes.
    pub async fn send_unread_pings(&mut self) -> io::Result<()> {
        for _ in 0..2 {
            let stream = self.next_stream();
            self.send(&data(SYN, stream, &proposal("/ipfs/ping/1.0.0"))).await?;
            for _ in 0..FREE_WINDOW / CHUNK {
                self.send(&data(0, stream, &[7; CHUNK])).await?;
            }
        }
        Ok(())
    }

    /// Accepts circuits for as long as it is connected. `on_frame` gets each frame of a circuit, and returns what to
    /// send.
    pub async fn accept_circuits(
        mut self,
        mut on_frame: impl FnMut(&Frame) -> Vec<u8>,
    ) -> io::Result<()> {
        let mut received = Received::default();
        let mut open = HashSet::new();
        loop {
            let frame = self.read_frame().await?;
            let id = frame.stream;
            if !open.contains(&id) {
                if self.accept_if_stop(&mut received, &frame).await? {
                    open.insert(id);
                }
                continue;
            }
            let mut answer = on_frame(&frame);
            if frame.has(RST | FIN) {
                open.remove(&id);
                answer.extend(data(RST, id, &[]));
            }
            if !answer.is_empty() {
                self.send(&answer).await?;
            }
        }
    }

    /// Accepts this many circuits; returns their streams.
    pub async fn accept_count(&mut self, circuits: usize) -> io::Result<Vec<u32>> {
        let mut received = Received::default();
        let mut open = Vec::new();
        while open.len() < circuits {
            let frame = self.read_frame().await?;
            if !open.contains(&frame.stream) && self.accept_if_stop(&mut received, &frame).await? {
                open.push(frame.stream);
            }
        }
        Ok(open)
    }

    /// Accepts a circuit if this frame completes its stop request.
    async fn accept_if_stop(&mut self, received: &mut Received, frame: &Frame) -> io::Result<bool> {
        if received.message::<StopMessage>(&STOP, frame).is_none() {
            if frame.has(RST | FIN) {
                received.remove(frame.stream);
            }
            return Ok(false);
        }
        received.remove(frame.stream);
        self.send(&data(ACK, frame.stream, &stop_acceptance())).await?;
        Ok(true)
    }
}

/// A task that is aborted when dropped.
pub struct Background(JoinHandle<()>);

impl Background {
    /// Runs this until it is dropped.
    pub fn spawn(task: impl Future<Output = ()> + Send + 'static) -> Self {
        Self(tokio::spawn(task))
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Keeps the connection open without reading from it.
pub async fn hold_without_reading(_peer: RawPeer) {
    std::future::pending().await
}

/// The bytes received so far, by stream.
#[derive(Default)]
pub struct Received(HashMap<u32, Vec<u8>>);

impl Received {
    /// The first message on the stream of this frame, if that stream is of this protocol and the message complete.
    pub fn message<M: Message + Default>(
        &mut self,
        protocol: &StreamProtocol,
        frame: &Frame,
    ) -> Option<M> {
        let received = self.0.entry(frame.stream).or_default();
        received.extend(&frame.body);
        let message = received.strip_prefix(&proposal(protocol.as_ref())[..])?;
        M::decode_length_delimited(message).ok()
    }

    pub fn remove(&mut self, stream: u32) {
        self.0.remove(&stream);
    }
}

/// The bytes that open a hop stream and send this request.
pub fn hop_opening(request: &HopMessage) -> Vec<u8> {
    let request = request.encode_length_delimited_to_vec();
    [proposal(HOP.as_ref()), request].concat()
}

/// The bytes with which a target accepts a circuit.
pub fn stop_acceptance() -> Vec<u8> {
    let accepted = stop_status(100).encode_length_delimited_to_vec();
    [proposal(STOP.as_ref()), accepted].concat()
}
