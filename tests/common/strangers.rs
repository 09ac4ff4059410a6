//! Who attacks: peers from as many addresses as it takes, who say what they like byte by byte.

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
        next_frame, proposal, secure, tcp_from,
    },
    messages::{HopMessage, StopMessage, stop_status},
    within,
};

/// How many arrive at a time: half as many as one address may have in their handshakes.
pub const AT_A_TIME: usize = 16;

/// The pause before a connection that was turned away is tried again.
const TRY_AGAIN: Duration = Duration::from_millis(100);

/// What a window still has room for once a request was made, at least, in bytes.
pub const ROOM: usize = WINDOW - 1024;

/// What is written at a time, in bytes.
pub const PIECE: usize = 32 * 1024;

/// The first for `cargo test`, the second with `RELAYLET_ATTACKS=long`.
pub fn quick_or_long<T>(quick: T, long: T) -> T {
    match env::var("RELAYLET_ATTACKS").as_deref() {
        Ok("long") => long,
        Ok(other) => panic!("RELAYLET_ATTACKS={other}: it can be long, or not there"),
        Err(_) => quick,
    }
}

/// The so-manieth address, each of which is in a /24 of its own.
pub fn address(number: usize) -> Ipv4Addr {
    address_in(number, 0)
}

/// The so-manieth address of the so-manieth /24.
pub fn address_in(subnet: usize, number: usize) -> Ipv4Addr {
    let first = Ipv4Addr::new(127, 66, 0, 1).to_bits();
    Ipv4Addr::from_bits(first + (subnet * 256 + number) as u32)
}

/// Does this for each number below `count`, so many at a time.
pub async fn each<T: Send + 'static, F: Future<Output = T> + Send + 'static>(
    count: usize,
    at_a_time: usize,
    what: impl Fn(usize) -> F,
) -> Vec<T> {
    let each = stream::iter(0..count).map(|number| tokio::spawn(what(number)));
    let done = each.buffer_unordered(at_a_time);
    done.map(|done| done.expect("it does so")).collect().await
}

/// What all of them came to.
///
/// # Panics
///
/// When the relay turned one away, or closed its connection.
pub fn all<T>(done: Vec<io::Result<T>>) -> Vec<T> {
    done.into_iter().collect::<io::Result<_>>().expect("the relay keeps them all")
}

/// A peer that is connected, and awaits frames.
pub struct Stranger {
    pub peer: PeerId,
    pub channel: Channel,
    next: u32,
}

impl Stranger {
    /// Somebody new.
    ///
    /// # Errors
    ///
    /// When the relay turned it away.
    pub async fn connect(port: u16, from: Ipv4Addr) -> io::Result<Self> {
        Self::connect_as(&Keypair::generate_ed25519(), port, from).await
    }

    /// As [`Self::connect`], and tries again if it is turned away: on a busy machine its handshake takes too long
    /// now and then.
    pub async fn arrive(port: u16, from: Ipv4Addr) -> Self {
        let arrives = async {
            loop {
                if let Ok(stranger) = Self::connect(port, from).await {
                    return stranger;
                }
                sleep(TRY_AGAIN).await;
            }
        };
        within(arrives).await
    }

    /// The owner of this key.
    ///
    /// # Errors
    ///
    /// When the relay turned it away.
    pub async fn connect_as(keypair: &Keypair, port: u16, from: Ipv4Addr) -> io::Result<Self> {
        let secured = secure(tcp_from(from, port).await?, keypair, Security::Noise);
        Ok(Self {
            peer: keypair.public().to_peer_id(),
            channel: mux(secured.await?).await?,
            next: 1,
        })
    }

    /// A stream of its own.
    pub fn next_stream(&mut self) -> u32 {
        self.next += 2;
        self.next - 2
    }

    /// Says all of it at once.
    pub async fn say(&mut self, bytes: &[u8]) -> io::Result<()> {
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
    pub async fn frame(&mut self) -> io::Result<Frame> {
        let frame = next_frame(&mut self.channel).await;
        frame.ok_or(io::ErrorKind::ConnectionAborted.into())
    }

    /// Whether this stream is reset within this time; nothing of what else comes is answered.
    ///
    /// # Errors
    ///
    /// When the relay closed the connection.
    pub async fn is_reset(&mut self, stream: u32, within: Duration) -> io::Result<bool> {
        let reset = async {
            loop {
                let frame = self.frame().await?;
                if frame.stream == stream && frame.has(RST) {
                    return Ok(true);
                }
            }
        };
        timeout(within, reset).await.unwrap_or(Ok(false))
    }

    /// Hears out what the relay has to say: it answers a ping after all that came before. Yields how
    /// many streams of the stranger's it reset meanwhile; those of its own it resets when nothing is said on them.
    pub async fn hears_out(&mut self) -> io::Result<usize> {
        self.say(&frame(PING, SYN, 0, 4711)).await?;
        let mut reset = 0;
        loop {
            let frame = self.frame().await?;
            reset += usize::from(frame.has(RST) && frame.stream % 2 == 1);
            if (frame.kind, frame.flags) == (PING, ACK) {
                return Ok(reset);
            }
        }
    }

    /// Asks all of this at once, each on a stream of its own. Yields the streams, and how each was
    /// answered; `None`: it was reset.
    pub async fn ask(&mut self, requests: &[HopMessage]) -> io::Result<Vec<(u32, Option<i32>)>> {
        let answers = self.answers(requests).await?.into_iter();
        let statuses = answers.map(|(stream, answer)| (stream, answer.and_then(|it| it.status)));
        Ok(statuses.collect())
    }

    /// Asks one thing.
    pub async fn ask_once(&mut self, request: &HopMessage) -> io::Result<(u32, Option<i32>)> {
        Ok(self.ask(slice::from_ref(request)).await?[0])
    }

    /// Asks one thing, and wants to know all of the answer.
    pub async fn ask_whole(&mut self, request: &HopMessage) -> io::Result<HopMessage> {
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
        let frames = frames.flat_map(|(id, request)| data(SYN, *id, &opening(request)));
        let frames: Vec<_> = frames.collect();
        self.say(&frames).await?;
        let mut heard = Heard::default();
        let mut answers = HashMap::new();
        while answers.len() < streams.len() {
            let frame = self.frame().await?;
            let id = frame.stream;
            if !streams.contains(&id) {
                self.is_there(&frame).await?;
            } else if let Entry::Vacant(missing) = answers.entry(id) {
                let answer = heard.message(&HOP, &frame);
                if answer.is_some() || frame.has(RST | FIN) {
                    missing.insert(answer);
                }
            }
        }
        let answers = streams.into_iter().map(|id| (id, answers.remove(&id).flatten()));
        Ok(answers.collect())
    }

    /// Refuses the next circuit; yields how it was asked.
    pub async fn refuses(&mut self) -> io::Result<StopMessage> {
        let mut heard = Heard::default();
        loop {
            let frame = self.frame().await?;
            if let Some(question) = heard.message(&STOP, &frame) {
                let refused = stop_status(203).encode_length_delimited_to_vec();
                let refused = [proposal(STOP.as_ref()), refused].concat();
                self.say(&data(ACK | FIN, frame.stream, &refused)).await?;
                return Ok(question);
            }
        }
    }

    /// Refuses what the relay wants, which is a sign of life.
    async fn is_there(&mut self, frame: &Frame) -> io::Result<()> {
        match frame.has(SYN) {
            true => self.say(&data(RST, frame.stream, &[])).await,
            false => Ok(()),
        }
    }

    /// Stays, and gives a sign of life when it is asked for one, until what this yields is dropped.
    pub fn stays(mut self) -> Staying {
        Staying::as_long_as(async move {
            while let Ok(frame) = self.frame().await {
                if self.is_there(&frame).await.is_err() {
                    break;
                }
            }
        })
    }

    /// Writes so many bytes on a stream of its own, as the relay opens its window.
    pub async fn write(&mut self, stream: u32, bytes: usize) -> io::Result<()> {
        let (mut room, mut left) = (ROOM, bytes);
        while left > 0 {
            let piece = left.min(room).min(PIECE);
            if piece > 0 {
                self.say(&data(0, stream, &vec![7; piece])).await?;
                (room, left) = (room - piece, left - piece);
                continue;
            }
            let frame = self.frame().await?;
            if (frame.stream, frame.kind) == (stream, WINDOW_UPDATE) {
                room += frame.length as usize;
            }
        }
        Ok(())
    }

    /// Sends as many pings on two streams as it may without reading their echoes.
    pub async fn asks_for_echoes(&mut self) -> io::Result<()> {
        for _ in 0..2 {
            let stream = self.next_stream();
            self.say(&data(SYN, stream, &proposal("/ipfs/ping/1.0.0"))).await?;
            for _ in 0..ROOM / PIECE {
                self.say(&data(0, stream, &[7; PIECE])).await?;
            }
        }
        Ok(())
    }

    /// Agrees to circuits for as long as it is connected. What it is told on each stream, and it may
    /// answer, is `hears`'s.
    pub async fn agrees(mut self, mut hears: impl FnMut(&Frame) -> Vec<u8>) -> io::Result<()> {
        let mut heard = Heard::default();
        let mut open = HashSet::new();
        loop {
            let frame = self.frame().await?;
            let id = frame.stream;
            if !open.contains(&id) {
                if self.agree(&mut heard, &frame).await? {
                    open.insert(id);
                }
                continue;
            }
            let mut answer = hears(&frame);
            if frame.has(RST | FIN) {
                open.remove(&id);
                answer.extend(data(RST, id, &[]));
            }
            if !answer.is_empty() {
                self.say(&answer).await?;
            }
        }
    }

    /// Agrees to so many circuits; yields their streams.
    pub async fn agree_to(&mut self, circuits: usize) -> io::Result<Vec<u32>> {
        let mut heard = Heard::default();
        let mut open = Vec::new();
        while open.len() < circuits {
            let frame = self.frame().await?;
            if !open.contains(&frame.stream) && self.agree(&mut heard, &frame).await? {
                open.push(frame.stream);
            }
        }
        Ok(open)
    }

    /// Agrees to a circuit, if this frame is the last of the question.
    async fn agree(&mut self, heard: &mut Heard, frame: &Frame) -> io::Result<bool> {
        if heard.message::<StopMessage>(&STOP, frame).is_none() {
            if frame.has(RST | FIN) {
                heard.forget(frame.stream);
            }
            return Ok(false);
        }
        heard.forget(frame.stream);
        self.say(&data(ACK, frame.stream, &agreement())).await?;
        Ok(true)
    }
}

/// Somebody who stays connected.
pub struct Staying(JoinHandle<()>);

impl Staying {
    /// Does this meanwhile.
    pub fn as_long_as(stays: impl Future<Output = ()> + Send + 'static) -> Self {
        Self(tokio::spawn(stays))
    }
}

impl Drop for Staying {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Stays connected, and does not read.
pub async fn takes_nothing(_stranger: Stranger) {
    std::future::pending().await
}

/// What came on streams so far.
#[derive(Default)]
pub struct Heard(HashMap<u32, Vec<u8>>);

impl Heard {
    /// The first message on the stream of this frame, if it is one of this protocol and there by
    /// now.
    pub fn message<M: Message + Default>(
        &mut self,
        protocol: &StreamProtocol,
        frame: &Frame,
    ) -> Option<M> {
        let heard = self.0.entry(frame.stream).or_default();
        heard.extend(&frame.body);
        let message = heard.strip_prefix(&proposal(protocol.as_ref())[..])?;
        M::decode_length_delimited(message).ok()
    }

    pub fn forget(&mut self, stream: u32) {
        self.0.remove(&stream);
    }
}

/// What opens a hop stream, with this request on it.
pub fn opening(request: &HopMessage) -> Vec<u8> {
    let request = request.encode_length_delimited_to_vec();
    [proposal(HOP.as_ref()), request].concat()
}

/// What a target says that agrees.
pub fn agreement() -> Vec<u8> {
    let agreed = stop_status(100).encode_length_delimited_to_vec();
    [proposal(STOP.as_ref()), agreed].concat()
}
