//! Connections to the relay without rust-libp2p: TCP, Noise or TLS, and yamux, byte by byte.

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
use socket2::SockRef;
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

/// The initial window of every yamux stream, in bytes.
pub const WINDOW: usize = 256 * 1024;

pub type Channel = Either<noise::Output<TcpStream>, tls::TlsStream<TcpStream>>;

/// A TCP connection on which nothing has been sent yet.
pub async fn tcp(relay: &Relay) -> TcpStream {
    let stream = tcp_from(Ipv4Addr::LOCALHOST, relay.port());
    stream.await.expect("the relay listens")
}

/// As [`tcp`], from this source address in 127.0.0.0/8.
pub async fn tcp_from(from: Ipv4Addr, port: u16) -> io::Result<TcpStream> {
    connect_socket(TcpSocket::new_v4()?, from, port).await
}

/// As [`tcp_from`]; the kernel buffers few bytes that are not read. The relay's side sizes its buffer by the segments, which
/// have 64 KiB on loopback otherwise.
pub async fn tcp_with_small_buffer(from: Ipv4Addr, port: u16) -> io::Result<TcpStream> {
    let socket = TcpSocket::new_v4()?;
    socket.set_recv_buffer_size(4096)?;
    SockRef::from(&socket).set_tcp_mss(536)?;
    connect_socket(socket, from, port).await
}

async fn connect_socket(socket: TcpSocket, from: Ipv4Addr, port: u16) -> io::Result<TcpStream> {
    socket.bind(SocketAddr::from((from, 0)))?;
    let stream = socket.connect(SocketAddr::from((Ipv4Addr::LOCALHOST, port)));
    Ok(TcpStream(within(stream).await?))
}

/// A secure channel without a muxer yet.
pub async fn secured(relay: &Relay, keypair: &Keypair) -> Channel {
    let channel = secure(tcp(relay).await, keypair, Security::Noise).await;
    channel.expect("the relay supports Noise")
}

/// Upgrades a connection to a secure channel.
pub async fn secure(
    mut stream: TcpStream,
    keypair: &Keypair,
    security: Security,
) -> io::Result<Channel> {
    match security {
        Security::Noise => {
            negotiate(&mut stream, "/noise").await?;
            let noise = noise::Config::new(keypair).expect("a key for Noise");
            let handshake = noise.upgrade_outbound(stream, "/noise");
            let done = within(handshake).await.map_err(io::Error::other)?;
            Ok(Either::Left(done.1))
        }
        Security::Tls => {
            negotiate(&mut stream, "/tls/1.0.0").await?;
            let tls = tls::Config::new(keypair).expect("a key for TLS");
            let handshake = tls.upgrade_outbound(stream, "/tls/1.0.0");
            let done = within(handshake).await.map_err(io::Error::other)?;
            Ok(Either::Right(done.1))
        }
    }
}

/// A connection on which yamux has been negotiated.
pub async fn muxed(relay: &Relay) -> Channel {
    muxed_as(relay, &Keypair::generate_ed25519()).await
}

/// As [`muxed`], for the owner of `keypair`.
pub async fn muxed_as(relay: &Relay, keypair: &Keypair) -> Channel {
    let muxed = mux(secured(relay, keypair).await).await;
    muxed.expect("the relay supports yamux")
}

/// Negotiates yamux on a secure channel.
pub async fn mux(mut channel: Channel) -> io::Result<Channel> {
    negotiate(&mut channel, "/yamux/1.0.0").await?;
    Ok(channel)
}

/// Negotiates a protocol; panics if the relay answers with anything else.
pub async fn negotiate(
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

/// The messages that propose a protocol. The other side sends the same to accept it.
pub fn proposal(protocol: &str) -> Vec<u8> {
    [line("/multistream/1.0.0"), line(protocol)].concat()
}

/// A line of multistream-select: prefixed with its length, and ended by a newline.
pub fn line(text: &str) -> Vec<u8> {
    length_prefixed(format!("{text}\n").as_bytes())
}

/// `bytes` with their length as a varint in front.
pub fn length_prefixed(bytes: &[u8]) -> Vec<u8> {
    let mut framed = Vec::new();
    prost::encode_length_delimiter(bytes.len(), &mut framed).expect("a Vec grows");
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

/// Sends `bytes` and closes the write half. Returns what the relay sends until it closes or resets the connection.
pub async fn send_and_close(stream: impl AsyncRead + AsyncWrite + Unpin, bytes: &[u8]) -> Vec<u8> {
    let (reader, mut writer) = stream.split();
    let write = async {
        // The relay may close the connection before it has read all of it.
        let _ = within(writer.write_all(bytes)).await;
        let _ = within(writer.close()).await;
    };
    future::join(read_until_closed(reader), write).await.0
}

/// Reads until the relay closes or resets the stream.
pub async fn read_until_closed(mut stream: impl AsyncRead + Unpin) -> Vec<u8> {
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

/// The next frame from the relay; `None` if it closed the connection.
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

/// Reads a stream until the relay closes it; `None` if the relay resets it.
pub async fn read_stream(channel: &mut Channel, stream: u32) -> Option<Vec<u8>> {
    let mut received = Vec::new();
    loop {
        let frame = next_frame(channel).await.expect("the connection is up");
        assert_ne!(frame.kind, GO_AWAY);
        if frame.stream != stream {
            continue;
        }
        received.extend(&frame.body);
        if frame.has(FIN | RST) {
            return Some(received).filter(|_| frame.has(FIN));
        }
    }
}

/// Sends a RESERVE on a new stream. Returns the status; `None` if the stream is reset.
pub async fn reserve(channel: &mut Channel, stream: u32) -> Option<i32> {
    let negotiated = proposal(HOP.as_ref());
    let request = messages::reserve().encode_length_delimited_to_vec();
    let opening = [&negotiated[..], &request].concat();
    send(channel, &data(SYN, stream, &opening)).await;
    let received = read_stream(channel, stream).await?;
    let answer = received.strip_prefix(&negotiated[..]).expect("hop is accepted");
    let answer = messages::HopMessage::decode_length_delimited(answer);
    answer.expect("an answer").status
}
