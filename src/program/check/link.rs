//! A connection to the relay, opened layer by layer so that each is reported, and exchanges on its streams.

use std::{env, future::poll_fn, io, net::IpAddr, net::SocketAddr, path::PathBuf, pin::pin};

use async_std::{io::timeout, net::TcpStream, net::ToSocketAddrs};
use futures_rustls::rustls::{self, pki_types::pem::PemObject};
use futures_rustls::{TlsConnector, client::TlsStream};
use libp2p::core::muxing::{StreamMuxerBox, StreamMuxerExt, SubstreamBox};
use libp2p::core::upgrade::{NegotiationError, OutboundConnectionUpgrade, Version};
use libp2p::futures::{AsyncRead, AsyncWrite, future, future::Either};
use libp2p::{Multiaddr, PeerId, identity::Keypair, multiaddr::Protocol, pnet::PreSharedKey};
use multistream_select::{Negotiated, dialer_select_proto};

use super::steps::{Failed, Steps};
use super::{diagnosis::Stage, steps};
use crate::program::mux::{muxer::Multiplex, stream_limits::Budget, stream_limits::StreamLimits};
use crate::program::net::{self, security::Security, websocket::WebSocketStream};

const YAMUX: &str = "/yamux/1.0.0";

/// A few streams in each direction.
const BUDGET: Budget = Budget { inbound: 32, outbound: 32 };

/// Where systems have the certificates that they trust: Debian and Alpine, Fedora, SUSE, BSD and macOS.
const ROOTS: [&str; 4] = [
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/etc/ssl/cert.pem",
];

/// The address of a relay: a host, a TCP port, and what runs over TCP.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Target {
    /// An IP address or a DNS name.
    pub host: String,
    /// Whether a name may be one of an IPv4 and of an IPv6 address.
    versions: [bool; 2],
    port: u16,
    /// The path of the WebSocket, if there is one.
    websocket: Option<String>,
    /// The name in the certificate of TLS below WebSocket.
    tls: Option<String>,
    /// The relay's peer id, if it is known.
    peer: Option<PeerId>,
    /// The key of its private network, if it is in one.
    pub swarm_key: Option<PreSharedKey>,
}

impl Target {
    /// Parses `/ip4/…/tcp/…` with an optional `/ws` or `/tls/ws`, and an optional `/p2p/…`, or the same with a DNS name.
    /// `None` if it is another address.
    pub fn parse(address: &Multiaddr) -> Option<Self> {
        let (mut target, mut parts) = (Self::default(), address.iter());
        (target.host, target.versions) = match parts.next()? {
            Protocol::Ip4(ip) => (ip.to_string(), [true, false]),
            Protocol::Ip6(ip) => (ip.to_string(), [false, true]),
            Protocol::Dns4(name) => (name.into(), [true, false]),
            Protocol::Dns6(name) => (name.into(), [false, true]),
            Protocol::Dns(name) => (name.into(), [true; 2]),
            _ => return None,
        };
        let Some(Protocol::Tcp(port)) = parts.next() else { return None };
        target.port = port;
        for part in parts {
            match part {
                _ if target.peer.is_some() => return None,
                Protocol::P2p(peer) => target.peer = Some(peer),
                _ if target.websocket.is_some() => return None,
                Protocol::Tls => target.tls = Some(target.host.clone()),
                Protocol::Sni(name) if target.tls.is_some() => target.tls = Some(name.into()),
                Protocol::Ws(path) => target.websocket = Some(path.into()),
                Protocol::Wss(path) => {
                    (target.tls, target.websocket) = (Some(target.host.clone()), Some(path.into()));
                }
                _ => return None,
            }
        }
        (target.tls.is_none() || target.websocket.is_some()).then_some(target)
    }

    /// Whether DNS has to be asked.
    pub fn is_name(&self) -> bool {
        self.host.parse::<IpAddr>().is_err()
    }

    /// The addresses of the host; fails if there are none.
    pub async fn resolve(&self) -> io::Result<Vec<SocketAddr>> {
        let found = (&*self.host, self.port).to_socket_addrs().await?;
        let [ip4, ip6] = self.versions;
        let fits = |socket: &SocketAddr| if socket.is_ipv4() { ip4 } else { ip6 };
        let mut sockets: Vec<_> = found.filter(fits).collect();
        sockets.dedup();
        if sockets.is_empty() { Err(io::ErrorKind::NotFound.into()) } else { Ok(sockets) }
    }
}

/// An open connection.
pub struct Link {
    /// The relay, as the secure channel proved it.
    pub peer: PeerId,
    /// Where it was reached: an IP address and a TCP port.
    pub address: Multiaddr,
    /// Its streams.
    pub muxer: StreamMuxerBox,
}

impl Link {
    /// Connects to the first of `sockets` that accepts, as the owner of `keypair`. Fails with the step that failed.
    pub async fn open(
        target: &Target,
        sockets: &[SocketAddr],
        keypair: &Keypair,
        steps: &Steps,
    ) -> Result<Self, Failed> {
        // 1. TCP.
        let (tcp, to) = steps.run(Stage::Tcp, dial(sockets)).await?;
        let mut stream = SubstreamBox::new(tcp);

        // 2. TLS and WebSocket.
        if let Some(name) = &target.tls {
            stream = SubstreamBox::new(steps.run(Stage::Tls, tls(stream, name)).await?);
        }
        if let Some(path) = &target.websocket {
            let host = format!("{}:{}", target.host, target.port);
            let upgrade = async {
                let stream = WebSocketStream::connect(stream, &host, path).await?;
                Ok((SubstreamBox::new(stream), format!("upgraded at {path}")))
            };
            stream = steps.run(Stage::WebSocket, upgrade).await?;
        }

        // 3. The private network.
        if let Some(key) = target.swarm_key {
            let handshake = async {
                let stream = SubstreamBox::new(net::swarm_key::encrypt(Some(key), stream).await?);
                Ok((stream, format!("nonces exchanged for {}", key.fingerprint())))
            };
            stream = steps.run(Stage::Pnet, handshake).await?;
        }

        // 4. The secure channel, the peer that it proves, and the muxer.
        let secure = async {
            let security = Security::new(keypair).map_err(io::Error::other)?;
            let (protocol, stream) = negotiate(stream, net::security::PROTOCOLS).await?;
            let (peer, stream) = security.upgrade_outbound(stream, protocol).await?;
            if target.peer.is_some_and(|expected| expected != peer) {
                return Err(io::Error::other(format!("another peer answers: {peer}")));
            }
            let (_, stream) = negotiate(stream, [YAMUX]).await?;
            let muxer = StreamMuxerBox::new(multiplex().upgrade_outbound(stream, YAMUX).await?);
            Ok(((peer, muxer), format!("{protocol} with {peer}, {YAMUX}")))
        };
        let (peer, muxer) = steps.run(Stage::Secure, secure).await?;
        Ok(Self { peer, address: net::multiaddr::multiaddr(to), muxer })
    }

    /// Opens a stream of this protocol, and runs `exchange` on it. Resets the streams that the relay opens meanwhile.
    pub async fn exchange<T>(
        &mut self,
        protocol: &str,
        exchange: impl AsyncFnOnce(Negotiated<SubstreamBox>) -> io::Result<T>,
    ) -> io::Result<T> {
        let stream = poll_fn(|cx| {
            let _ = self.muxer.poll_unpin(cx)?;
            self.muxer.poll_outbound_unpin(cx)
        });
        let stream = stream.await?;
        let exchange = pin!(async { exchange(negotiate(stream, [protocol]).await?.1).await });
        let progress = pin!(poll_fn(|cx| {
            while self.muxer.poll_inbound_unpin(cx)?.is_ready() {}
            self.muxer.poll_unpin(cx).map(|polled| polled.map(|_| ()))
        }));
        match future::select(exchange, progress).await {
            Either::Left((result, _)) => result,
            Either::Right((ended, _)) => ended.and(Err(io::ErrorKind::ConnectionReset.into())),
        }
    }
}

/// The muxer of all connections of the check.
pub fn multiplex() -> Multiplex {
    Multiplex::new(BUDGET, StreamLimits::default(), 1)
}

/// Agrees on one of these protocols. Fails as `Unsupported` if the relay supports none, and as `InvalidData` if it sends
/// what no libp2p peer sends.
async fn negotiate<S, P>(stream: S, protocols: P) -> io::Result<(P::Item, Negotiated<S>)>
where
    S: AsyncRead + AsyncWrite + Unpin,
    P: IntoIterator<Item: AsRef<str> + Clone>,
{
    let agreed = dialer_select_proto(stream, protocols, Version::V1).await;
    agreed.map_err(|error| match error {
        NegotiationError::Failed => {
            io::Error::new(io::ErrorKind::Unsupported, "the relay agrees on no protocol")
        }
        NegotiationError::ProtocolError(error) => error.into(),
    })
}

/// Connects to the first of these that accepts. What is reported names those that do not.
async fn dial(sockets: &[SocketAddr]) -> io::Result<((TcpStream, SocketAddr), String)> {
    let (mut failed, mut last) = (String::new(), io::ErrorKind::NotFound.into());
    let each = steps::TIME_LIMIT / u32::try_from(sockets.len()).unwrap_or(1).max(1);
    for to in sockets {
        match timeout(each, TcpStream::connect(to)).await {
            Ok(stream) => {
                net::socket::set_options(&stream)?;
                let from = stream.local_addr()?.ip();
                return Ok(((stream, *to), format!("connected to {to} from {from}{failed}")));
            }
            Err(error) => {
                failed += &format!("; {to} failed: {error}");
                last = error;
            }
        }
    }
    Err(last)
}

/// Performs TLS as browsers do: the certificate has to be for the name, and from an issuer that this machine trusts.
async fn tls(stream: SubstreamBox, name: &str) -> io::Result<(TlsStream<SubstreamBox>, String)> {
    let named = env::var_os("SSL_CERT_FILE").map(PathBuf::from);
    let mut files = named.into_iter().chain(ROOTS.map(PathBuf::from));
    let roots = files.find_map(|file| rustls::pki_types::CertificateDer::pem_file_iter(file).ok());
    let mut store = rustls::RootCertStore::empty();
    store.add_parsable_certificates(roots.into_iter().flatten().flatten());
    if store.is_empty() {
        let problem = "this machine has no root certificates to verify the relay's with";
        return Err(io::Error::new(io::ErrorKind::NotFound, problem));
    }
    let config = rustls::ClientConfig::builder_with_provider(
        rustls::crypto::ring::default_provider().into(),
    )
    .with_protocol_versions(&[&rustls::version::TLS13, &rustls::version::TLS12])
    .map_err(io::Error::other)?
    .with_root_certificates(store)
    .with_no_client_auth();
    let server =
        rustls::pki_types::ServerName::try_from(name.to_owned()).map_err(io::Error::other)?;
    let stream = TlsConnector::from(std::sync::Arc::new(config)).connect(server, stream).await?;
    Ok((stream, format!("the certificate is valid for {name}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_over_tcp_or_websocket_is_parsed() {
        let peer = "12D3KooWPGM3wYKMsTHGEqbhcBft6cPjA2F3rQmyWTEDD3wCGS1g";
        let parse = |text: &str| Target::parse(&text.parse().unwrap());
        let (ip4, ip6, root) = ([true, false], [false, true], Some("/".to_owned()));
        let target = |host: &str, versions, port| Target {
            host: host.into(),
            versions,
            port,
            ..Target::default()
        };
        for (text, expected) in [
            ("/ip4/192.0.2.1/tcp/4001", target("192.0.2.1", ip4, 4001)),
            ("/ip6/2001:db8::1/tcp/1", target("2001:db8::1", ip6, 1)),
            ("/dns/a.example/tcp/1", target("a.example", [true; 2], 1)),
            (
                "/dns6/a.example/tcp/1/ws",
                Target { websocket: root.clone(), ..target("a.example", ip6, 1) },
            ),
            (
                "/dns4/a.example/tcp/443/tls/sni/b.example/ws",
                Target {
                    websocket: root.clone(),
                    tls: Some("b.example".into()),
                    ..target("a.example", ip4, 443)
                },
            ),
            (
                "/dns4/a.example/tcp/443/wss",
                Target {
                    websocket: root,
                    tls: Some("a.example".into()),
                    ..target("a.example", ip4, 443)
                },
            ),
        ] {
            let with_peer = Target { peer: peer.parse().ok(), ..expected.clone() };
            assert_eq!(parse(text), Some(expected), "{text}");
            assert_eq!(parse(&format!("{text}/p2p/{peer}")), Some(with_peer), "{text}");
        }
        for text in [
            "/ip4/192.0.2.1",
            "/ip4/192.0.2.1/udp/4001/quic-v1",
            "/ip4/192.0.2.1/tcp/4001/tls",
            "/ip4/192.0.2.1/tcp/4001/ws/ws",
            "/ip4/192.0.2.1/tcp/4001/sni/a.example/ws",
            "/dnsaddr/a.example",
            "/memory/7",
        ] {
            assert_eq!(parse(text), None, "{text}");
        }
        assert_eq!(parse(&format!("/ip4/192.0.2.1/tcp/4001/p2p/{peer}/p2p-circuit")), None);
    }
}
