//! WebSocket connections to the relay: rust-libp2p's, and byte by byte.

use std::{
    fs,
    path::Path,
    time::{Duration, Instant},
};

use libp2p::{
    Multiaddr, PeerId, Transport,
    core::{
        Endpoint,
        muxing::StreamMuxerBox,
        transport::{Boxed, DialOpts, PortUse},
        upgrade::Version,
    },
    identity::Keypair,
    noise, tcp, yamux,
};
use libp2p_websocket::{Config, tls};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::sleep,
};

use super::{Client, Relay, TEST_TIMEOUT, within};

/// Flags that listen on any free port.
pub const LISTEN: &str = "--listen=/ip4/127.0.0.1/tcp/0/ws";
pub const LISTEN_TLS: &str = "--listen=/ip4/127.0.0.1/tcp/0/tls/ws";

/// Flags that name the certificate files in the relay's folder.
pub const CERTIFICATE: [&str; 2] = ["--tls-cert=cert.pem", "--tls-key=key.pem"];

/// A self-signed certificate for 127.0.0.1, and its key.
pub struct Certificate {
    pub pem: String,
    pub key: String,
    der: Vec<u8>,
}

impl Certificate {
    pub fn new() -> Self {
        let created = rcgen::generate_simple_self_signed(["127.0.0.1".to_owned()]);
        let created = created.expect("a certificate");
        Self {
            pem: created.cert.pem(),
            key: created.key_pair.serialize_pem(),
            der: created.cert.der().to_vec(),
        }
    }

    /// Writes it to the files of [`CERTIFICATE`].
    pub fn write(&self, folder: &Path) {
        fs::write(folder.join("cert.pem"), &self.pem).expect("the file is written");
        fs::write(folder.join("key.pem"), &self.key).expect("the file is written");
    }

    pub fn der(&self) -> Vec<u8> {
        self.der.clone()
    }

    /// Whether the relay presents this certificate at a `/tls/ws` address.
    pub async fn is_served(&self, address: &Multiaddr) -> bool {
        let options = DialOpts { role: Endpoint::Dialer, port_use: PortUse::New };
        let dial = transport(Some(self)).dial(address.clone(), options);
        let dialed = within(dial.expect("an address to dial")).await;
        match dialed {
            Ok(_) => true,
            Err(libp2p_websocket::error::Error::Tls(_)) => false,
            Err(error) => panic!("{address}: {error}"),
        }
    }
}

type Ws = Config<tcp::tokio::Transport>;

fn transport(trusted: Option<&Certificate>) -> Ws {
    let mut transport = Config::new(tcp::tokio::Transport::new(tcp::Config::default()));
    if let Some(certificate) = trusted {
        let mut tls = tls::Config::builder();
        let der = tls::Certificate::new(certificate.der.clone());
        tls.add_trust(&der).expect("a certificate to trust");
        transport.set_tls_config(tls.finish());
    }
    transport
}

fn secured(transport: Ws, keypair: &Keypair) -> Boxed<(PeerId, StreamMuxerBox)> {
    transport
        .upgrade(Version::V1Lazy)
        .authenticate(noise::Config::new(keypair).expect("a key for Noise"))
        .multiplex(yamux::Config::default())
        .boxed()
}

/// A new peer, connected over `/ws`.
pub async fn connect(relay: &Multiaddr) -> Client {
    Client::connect_over(relay, |keypair| secured(transport(None), keypair)).await
}

/// A new peer, connected over `/tls/ws` to a relay that presents this certificate.
pub async fn connect_in_tls(relay: &Multiaddr, certificate: &Certificate) -> Client {
    Client::connect_over(relay, |keypair| secured(transport(Some(certificate)), keypair)).await
}

pub use super::tcp_port as port;

/// The address on which the relay listens with this ending after the TCP port.
pub async fn address(relay: &Relay, ending: &str) -> Multiaddr {
    let start = Instant::now();
    loop {
        for line in relay.log() {
            let listening = line.split_once("listening on ");
            let listening = listening.and_then(|(_, address)| address.parse().ok());
            let ends_so = |address: &Multiaddr| {
                let wanted = format!("/tcp/{}{ending}/p2p/", port(address));
                address.to_string().contains(&wanted)
            };
            if let Some(address) = listening.filter(ends_so) {
                return address;
            }
        }
        assert!(start.elapsed() < TEST_TIMEOUT, "{ending}: {:#?}", relay.log());
        sleep(Duration::from_millis(20)).await;
    }
}

/// The upgrade request of a client.
pub const REQUEST: &[u8] = b"GET / HTTP/1.1\r\nHost: relay\r\nUpgrade: websocket\r\n\
    Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\n\
    Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n";

/// The answer to the key in [`REQUEST`]: RFC 6455's example.
const ACCEPTED: &str = "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=";

/// A connection after the WebSocket upgrade, on which frames may be sent.
pub async fn by_hand(port: u16) -> TcpStream {
    let mut stream = tcp(port).await;
    within(stream.write_all(REQUEST)).await.expect("the relay reads");
    let mut answer = String::new();
    while !answer.ends_with("\r\n\r\n") {
        let byte = within(stream.read_u8()).await.expect("the relay answers");
        answer.push(byte.into());
    }
    assert!(answer.starts_with("HTTP/1.1 101 "), "{answer}");
    assert!(answer.contains(ACCEPTED), "{answer}");
    stream
}

pub async fn tcp(port: u16) -> TcpStream {
    let stream = within(TcpStream::connect(("127.0.0.1", port))).await;
    stream.expect("the relay listens")
}

// The opcodes of frames, and the FIN bit of a message's last frame.
pub const CONTINUATION: u8 = 0;
pub const TEXT: u8 = 1;
pub const BINARY: u8 = 2;
pub const CLOSE: u8 = 8;
pub const PING: u8 = 9;
pub const LAST: u8 = 0x80;

/// The header of a client's frame of this length. The mask is zero, so the payload follows unchanged.
pub fn header(kind: u8, length: u64) -> Vec<u8> {
    const MASKED: u8 = 0x80;
    let length = match length {
        0..=125 => vec![MASKED | length as u8],
        126..=0xffff => [&[MASKED | 126][..], &(length as u16).to_be_bytes()].concat(),
        _ => [&[MASKED | 127][..], &length.to_be_bytes()].concat(),
    };
    [&[kind][..], &length, &[0; 4]].concat()
}

/// A whole frame.
pub fn frame(kind: u8, bytes: &[u8]) -> Vec<u8> {
    [&header(kind, bytes.len() as u64), bytes].concat()
}
