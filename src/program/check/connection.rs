//! A connection to the relay, opened layer by layer so that each is reported, and exchanges on its streams.

use std::io::{
    self, ErrorKind::HostUnreachable, ErrorKind::NetworkUnreachable, ErrorKind::NotFound,
};
use std::{future::poll_fn, pin::pin, sync::Arc, task::Poll};

use async_std::io::timeout;
use futures_rustls::rustls::{ClientConfig, RootCertStore, crypto::ring, pki_types::ServerName};
use futures_rustls::{TlsConnector, client::TlsStream};
use libp2p::core::muxing::{StreamMuxerBox, StreamMuxerExt, SubstreamBox};
use libp2p::core::upgrade::{OutboundConnectionUpgrade, UpgradeInfo, Version};
use libp2p::futures::future::{self, BoxFuture, Either, FutureExt};
use libp2p::futures::stream::{FuturesUnordered, StreamExt};
use libp2p::{PeerId, identity::Keypair};
use multistream_select::dialer_select_proto;

use super::{diagnosis::Stage, requests, requests::Stream, steps, steps::Steps, target::Target};
use crate::program::mux::{muxer::Multiplex, stream_limits::Budget, stream_limits::StreamLimits};
use crate::program::net::{self, security::Security, socket::Socket, websocket::WebSocketStream};

const YAMUX: &str = "/yamux/1.0.0";

/// A few streams in each direction.
const BUDGET: Budget = Budget { inbound: 32, outbound: 32 };

/// An open connection.
pub struct Connection {
    /// The relay, as the secure channel proved it.
    pub peer: PeerId,
    /// Its streams.
    pub muxer: StreamMuxerBox,
    /// Serve the streams that the relay opened.
    inbound: FuturesUnordered<BoxFuture<'static, io::Result<()>>>,
}

impl Connection {
    /// Connects to the first address that accepts, as the owner of `keypair`, and reports each layer as a step.
    pub async fn open(target: &Target, keypair: &Keypair, steps: &Steps) -> io::Result<Self> {
        // 1. TCP.
        let mut stream = SubstreamBox::new(steps.run(Stage::Tcp, dial(target)).await?);

        // 2. TLS and WebSocket.
        if let Some(name) = &target.tls {
            stream = SubstreamBox::new(steps.run(Stage::Tls, tls(stream, name)).await?);
        }
        if let Some(path) = &target.websocket {
            let host = target.authority();
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
            let (protocol, stream) =
                dialer_select_proto(stream, security.protocol_info(), Version::V1).await?;
            let (peer, stream) = security.upgrade_outbound(stream, protocol).await?;
            if target.peer.is_some_and(|expected| expected != peer) {
                return Err(io::Error::other(format!("another peer answers: {peer}")));
            }
            let (_, stream) =
                dialer_select_proto(SubstreamBox::new(stream), [YAMUX], Version::V1).await?;
            let multiplex = Multiplex::new(BUDGET, StreamLimits::default(), 1);
            let muxer = StreamMuxerBox::new(multiplex.upgrade_outbound(stream, YAMUX).await?);
            let connection = Self { peer, muxer, inbound: FuturesUnordered::new() };
            Ok((connection, format!("{protocol} with {peer}, {YAMUX}")))
        };
        steps.run(Stage::Secure, secure).await
    }

    /// Opens a stream of this protocol, and runs `exchange` on it.
    pub async fn exchange<T>(
        &mut self,
        protocol: impl AsRef<str> + Clone,
        exchange: impl AsyncFnOnce(Stream) -> io::Result<T>,
    ) -> io::Result<T> {
        let stream = poll_fn(|cx| {
            let _ = self.muxer.poll_unpin(cx)?;
            self.muxer.poll_outbound_unpin(cx)
        });
        let negotiate = dialer_select_proto(stream.await?, [protocol], Version::V1);
        self.run(async { exchange(negotiate.await?.1).await }).await
    }

    /// Runs `work`, which uses streams of this connection, while polling the connection and accepting circuits.
    pub async fn run<T>(&mut self, work: impl Future<Output = io::Result<T>>) -> io::Result<T> {
        let progress = poll_fn(|cx| {
            while let Poll::Ready(stream) = self.muxer.poll_inbound_unpin(cx)? {
                self.inbound.push(requests::accept_circuit(stream).boxed());
            }
            while let Poll::Ready(Some(_)) = self.inbound.poll_next_unpin(cx) {}
            self.muxer.poll_unpin(cx).map(|polled| polled.map(|_| ()))
        });
        match future::select(pin!(work), progress).await {
            Either::Left((result, _)) => result,
            Either::Right((ended, _)) => ended.and(Err(io::ErrorKind::ConnectionReset.into())),
        }
    }
}

/// Connects to the first address that accepts. The text, or the error, names each address that was tried.
async fn dial(target: &Target) -> io::Result<(Socket, String)> {
    let (mut failed, mut cause) = (String::new(), NotFound);
    // Together less than the step's limit: otherwise the step would end without naming an address.
    let each = steps::TIME_LIMIT / (target.sockets.len() + 1) as u32;
    for to in &target.sockets {
        match timeout(each, Socket::connect(*to)).await {
            Ok(stream) => {
                let from = stream.get_ref().local_addr()?.ip();
                return Ok((stream, format!("connected to {to} from {from}{failed}")));
            }
            Err(error) => {
                failed += &format!("; {to} failed: {error}");
                // A missing route to one address explains nothing if another address fails otherwise.
                if [NotFound, HostUnreachable, NetworkUnreachable].contains(&cause) {
                    cause = error.kind();
                }
            }
        }
    }
    Err(io::Error::new(cause, failed.trim_start_matches("; ").to_owned()))
}

/// Performs the TLS handshake as browsers do: the certificate has to be for `name`, and from an issuer that this
/// machine trusts.
async fn tls(stream: SubstreamBox, name: &str) -> io::Result<(TlsStream<SubstreamBox>, String)> {
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    if roots.is_empty() {
        let problem = "this machine has no root certificates to verify the relay's with";
        return Err(io::Error::new(NotFound, problem));
    }
    let config = ClientConfig::builder_with_provider(ring::default_provider().into())
        .with_safe_default_protocol_versions()
        .map_err(io::Error::other)?
        .with_root_certificates(roots)
        .with_no_client_auth();
    let server = ServerName::try_from(name.to_owned()).map_err(io::Error::other)?;
    let stream = TlsConnector::from(Arc::new(config)).connect(server, stream).await?;
    Ok((stream, format!("the certificate is valid for {name}")))
}

#[cfg(test)]
mod tests {
    use async_std::{net::TcpListener, task};

    use super::*;

    #[test]
    fn each_address_that_does_not_accept_is_named_and_one_without_a_route_is_not_the_cause() {
        task::block_on(async {
            let closed = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
            // TCP has no route to a multicast address.
            let elsewhere = "224.0.0.1:4001".parse().unwrap();
            for sockets in [vec![closed, elsewhere], vec![elsewhere, closed]] {
                let target = Target { sockets, ..Target::default() };
                let error = dial(&target).await.unwrap_err();
                assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused, "{error}");
                for address in [closed, elsewhere] {
                    assert!(error.to_string().contains(&address.to_string()), "{error}");
                }
            }
        });
    }
}
