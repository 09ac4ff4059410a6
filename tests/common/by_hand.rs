//! Connections to the relay without libp2p's manners: TCP, Noise or TLS, and yamux, byte by byte.

use std::{
    io,
    net::{Ipv4Addr, SocketAddr},
};

use libp2p::{
    core::upgrade::OutboundConnectionUpgrade,
    futures::{
        AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt,
        future::{self, Either},
    },
    identity::Keypair,
    noise,
    tcp::tokio::TcpStream,
    tls,
};
use prost::Message;
use tokio::net::TcpSocket;

use super::{HOP, Relay, Security, messages, within};

// The kinds of yamux frames, and their flags.
pub const DATA: u8 = 0;
pub const WINDOW_UPDATE: u8 = 1;
pub const PING: u8 = 2;
pub const GO_AWAY: u8 = 3;

pub const SYN: u16 = 1;
pub const ACK: u16 = 2;
pub const FIN: u16 = 4;
pub const RST: u16 = 8;

/// The room that every yamux stream has from its start, in bytes.
pub const WINDOW: usize = 256 * 1024;

pub type Channel = Either<noise::Output<TcpStream>, tls::TlsStream<TcpStream>>;

/// A connection without any protocol yet.
pub async fn tcp(relay: &Relay) -> TcpStream {
    let stream = tcp_from(Ipv4Addr::LOCALHOST, relay.port());
    stream.await.expect("the relay listens")
}

/// As [`tcp`], from this address, of which a machine has as many as there are in 127.0.0.0/8.
pub async fn tcp_from(from: Ipv4Addr, port: u16) -> io::Result<TcpStream> {
    let socket = TcpSocket::new_v4()?;
    socket.bind(SocketAddr::from((from, 0)))?;
    let stream = socket.connect(SocketAddr::from((Ipv4Addr::LOCALHOST, port)));
    Ok(TcpStream(within(stream).await?))
}

/// A secure channel without a muxer yet.
pub async fn secured(relay: &Relay, keypair: &Keypair) -> Channel {
    let channel = secure(tcp(relay).await, keypair, Security::Noise).await;
    channel.expect("the relay speaks Noise")
}

/// Makes a connection a secure channel.
pub async fn secure(
    mut stream: TcpStream,
    keypair: &Keypair,
    security: Security,
) -> io::Result<Channel> {
    match security {
        Security::Noise => {
            agree(&mut stream, "/noise").await?;
            let noise = noise::Config::new(keypair).expect("a key for Noise");
            let handshake = noise.upgrade_outbound(stream, "/noise");
            let done = within(handshake).await.map_err(io::Error::other)?;
            Ok(Either::Left(done.1))
        }
        Security::Tls => {
            agree(&mut stream, "/tls/1.0.0").await?;
            let tls = tls::Config::new(keypair).expect("a key for TLS");
            let handshake = tls.upgrade_outbound(stream, "/tls/1.0.0");
            let done = within(handshake).await.map_err(io::Error::other)?;
            Ok(Either::Right(done.1))
        }
    }
}

/// A connection that awaits frames.
pub async fn muxed(relay: &Relay) -> Channel {
    muxed_as(relay, &Keypair::generate_ed25519()).await
}

/// As [`muxed`], for the owner of `keypair`.
pub async fn muxed_as(relay: &Relay, keypair: &Keypair) -> Channel {
    muxed_with(relay, keypair, Security::Noise).await
}

/// As [`muxed_as`], over this secure channel.
pub async fn muxed_with(relay: &Relay, keypair: &Keypair, security: Security) -> Channel {
    let channel = secure(tcp(relay).await, keypair, security).await;
    let muxed = mux(channel.expect("the relay speaks both")).await;
    muxed.expect("the relay speaks yamux")
}

/// Has a secure channel await frames.
pub async fn mux(mut channel: Channel) -> io::Result<Channel> {
    agree(&mut channel, "/yamux/1.0.0").await?;
    Ok(channel)
}

/// Proposes a protocol, and insists on it.
pub async fn agree(
    stream: &mut (impl AsyncRead + AsyncWrite + Unpin),
    protocol: &str,
) -> io::Result<()> {
    let proposal = proposal(protocol);
    let mut answer = vec![0; proposal.len()];
    within(async {
        stream.write_all(&proposal).await?;
        stream.flush().await?;
        stream.read_exact(&mut answer).await
    })
    .await?;
    assert_eq!(answer, proposal);
    Ok(())
}

/// What opens the negotiation of a protocol; the same closes it, if the other side agrees.
pub fn proposal(protocol: &str) -> Vec<u8> {
    [line("/multistream/1.0.0"), line(protocol)].concat()
}

/// As multistream-select writes it.
pub fn line(text: &str) -> Vec<u8> {
    behind_its_length(format!("{text}\n").as_bytes())
}

pub fn behind_its_length(bytes: &[u8]) -> Vec<u8> {
    let mut framed = Vec::new();
    prost::encode_length_delimiter(bytes.len(), &mut framed).expect("room for it");
    framed.extend(bytes);
    framed
}

pub async fn send(stream: &mut (impl AsyncWrite + Unpin), bytes: &[u8]) {
    let sent = async {
        stream.write_all(bytes).await?;
        stream.flush().await
    };
    within(sent).await.expect("the relay reads");
}

/// Says all of it and closes its half; yields what the relay said until it closed its own.
pub async fn say_and_hang_up(stream: impl AsyncRead + AsyncWrite + Unpin, bytes: &[u8]) -> Vec<u8> {
    let (reader, mut writer) = stream.split();
    let say = async {
        // Nobody has to hear it out.
        let _ = within(writer.write_all(bytes)).await;
        let _ = within(writer.close()).await;
    };
    future::join(until_closed(reader), say).await.0
}

/// What the relay says until it closes the stream, or resets it.
pub async fn until_closed(mut stream: impl AsyncRead + Unpin) -> Vec<u8> {
    let mut bytes = Vec::new();
    let _ = within(stream.read_to_end(&mut bytes)).await;
    bytes
}

/// A frame from the relay.
#[derive(Debug)]
pub struct Frame {
    pub kind: u8,
    pub flags: u16,
    pub stream: u32,
    pub length: u32,
    pub body: Vec<u8>,
}

impl Frame {
    pub fn has(&self, flags: u16) -> bool {
        self.flags & flags != 0
    }
}

/// A frame without a body.
pub fn frame(kind: u8, flags: u16, stream: u32, length: u32) -> Vec<u8> {
    let flags = flags.to_be_bytes();
    let (stream, length) = (stream.to_be_bytes(), length.to_be_bytes());
    [&[0, kind], &flags[..], &stream, &length].concat()
}

pub fn data(flags: u16, stream: u32, body: &[u8]) -> Vec<u8> {
    let length = body.len().try_into().expect("a length");
    [&frame(DATA, flags, stream, length), body].concat()
}

/// The next frame from the relay, unless it closed the connection.
pub async fn next_frame(channel: &mut (impl AsyncRead + Unpin)) -> Option<Frame> {
    let mut header = [0; 12];
    within(channel.read_exact(&mut header)).await.ok()?;
    let [_, kind, f0, f1, s0, s1, s2, s3, l0, l1, l2, l3] = header;
    let length = u32::from_be_bytes([l0, l1, l2, l3]);
    let body_length = if kind == DATA { length } else { 0 };
    let mut body = vec![0; body_length as usize];
    within(channel.read_exact(&mut body)).await.ok()?;
    Some(Frame {
        kind,
        flags: u16::from_be_bytes([f0, f1]),
        stream: u32::from_be_bytes([s0, s1, s2, s3]),
        length,
        body,
    })
}

/// What the relay says on a stream until it closes it; nothing if it resets it.
pub async fn hear(channel: &mut Channel, stream: u32) -> Option<Vec<u8>> {
    let mut heard = Vec::new();
    loop {
        let frame = next_frame(channel).await.expect("the connection is up");
        assert_ne!(frame.kind, GO_AWAY);
        if frame.stream != stream {
            continue;
        }
        heard.extend(&frame.body);
        if frame.has(FIN | RST) {
            return Some(heard).filter(|_| frame.has(FIN));
        }
    }
}

/// Asks for a reservation on a new stream; yields the status, unless the stream is reset.
pub async fn reserve(channel: &mut Channel, stream: u32) -> Option<i32> {
    let agreed = proposal(HOP.as_ref());
    let request = messages::reserve().encode_length_delimited_to_vec();
    let opening = [&agreed[..], &request].concat();
    send(channel, &data(SYN, stream, &opening)).await;
    let heard = hear(channel, stream).await?;
    let answer = heard.strip_prefix(&agreed[..]).expect("it agrees");
    let answer = messages::HopMessage::decode_length_delimited(answer);
    answer.expect("an answer").status
}
