//! Dials a client: TCP, the secure channel, the muxer, and one stream for version 2.

use std::{
    future::{Future, poll_fn},
    io,
    net::SocketAddr,
    pin::pin,
    sync::{Mutex, PoisonError},
    task::{Context, Poll},
    time::Duration,
};

use async_std::io::timeout;
use libp2p::{
    PeerId, Transport,
    core::{
        Endpoint,
        muxing::{StreamMuxerBox, StreamMuxerExt, SubstreamBox},
        transport::{Boxed, DialOpts, PortUse},
        upgrade::Version,
    },
    identity::Keypair,
};
use multistream_select::dialer_select_proto;

use super::messages::{self, v2};
use crate::program::{
    mux::{
        muxer::Multiplex,
        stream_limits::{Budget, StreamLimits},
    },
    net::{
        admission::{connection_rates::ConnectionRates, proxies::Proxies},
        byte_counters::ByteCounters,
        multiaddr::multiaddr,
        protobuf,
        read_buffer::ReadBuffer,
        security::Security,
        tcp::Tcp,
    },
};

const DIAL_BACK: &str = "/libp2p/autonat/2/dial-back";

/// How long a dial may take with its handshakes, and then version 2's stream. The sum is below the 10 s for which
/// rust-libp2p's client waits for the result.
const DIAL_TIMEOUT: Duration = Duration::from_secs(5);
const STREAM_TIMEOUT: Duration = Duration::from_secs(3);

/// How long closing the muxer may take.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(1);

/// Clients open a few streams on every new connection; the relay answers none of them.
const BUDGET: Budget = Budget { inbound: 8, outbound: 1 };

/// Dials under an identity of its own, as go-libp2p's server does: the client sees an unknown peer, not a second
/// connection to its relay that opens and closes.
pub struct Dialer(Mutex<Boxed<(PeerId, StreamMuxerBox)>>);

impl Dialer {
    /// A dialer with a new identity.
    pub fn new() -> anyhow::Result<Self> {
        let keypair = Keypair::generate_ed25519();
        let (counters, proxies) = (ByteCounters::default(), Proxies::new(0));
        let transport = Tcp::new(counters, proxies, ConnectionRates::default(), None)
            .map(|stream, _| ReadBuffer::new(stream, None))
            // Not V1Lazy: the client has to see the connection established before the relay closes it.
            .upgrade(Version::V1)
            .authenticate(Security::new(&keypair)?)
            .multiplex(Multiplex::new(BUDGET, StreamLimits::default(), 0))
            .timeout(DIAL_TIMEOUT)
            .boxed();
        Ok(Self(Mutex::new(transport)))
    }

    /// Dials this peer.
    ///
    /// # Errors
    ///
    /// When it cannot be reached at this address, or another peer answers.
    pub async fn dial(&self, peer: PeerId, to: SocketAddr) -> io::Result<DialedConnection> {
        let options = DialOpts { role: Endpoint::Dialer, port_use: PortUse::New };
        let dial =
            self.0.lock().unwrap_or_else(PoisonError::into_inner).dial(multiaddr(to), options);
        let (dialed, muxer) = dial.map_err(io::Error::other)?.await?;
        match dialed == peer {
            true => Ok(DialedConnection(muxer)),
            false => Err(io::Error::other(format!("another peer answers: {dialed}"))),
        }
    }
}

/// A connection to a client that was dialed.
pub struct DialedConnection(StreamMuxerBox);

impl DialedConnection {
    /// Sends the client the nonce of its request, which proves that it was dialed.
    ///
    /// # Errors
    ///
    /// When the client does not answer within [`STREAM_TIMEOUT`].
    pub async fn dial_back(&mut self, nonce: u64) -> io::Result<()> {
        let dial_back = async {
            let open = poll_fn(|cx| {
                self.drive(cx)?;
                self.0.poll_outbound_unpin(cx)
            });
            let mut sending = pin!(send_nonce(open.await?, nonce));
            poll_fn(|cx| {
                let sent = sending.as_mut().poll(cx);
                if sent.is_pending() {
                    self.drive(cx)?;
                }
                sent
            })
            .await
        };
        timeout(STREAM_TIMEOUT, dial_back).await
    }

    /// Closes the connection.
    pub async fn close(self) {
        let _ = timeout(CLOSE_TIMEOUT, self.0.close()).await;
    }

    /// Drives the connection. Resets the streams that the client opens.
    ///
    /// # Errors
    ///
    /// When the connection has failed.
    fn drive(&mut self, cx: &mut Context<'_>) -> io::Result<()> {
        while let Poll::Ready(stream) = self.0.poll_inbound_unpin(cx) {
            drop(stream?);
        }
        if let Poll::Ready(event) = self.0.poll_unpin(cx) {
            event?;
        }
        Ok(())
    }
}

async fn send_nonce(stream: SubstreamBox, nonce: u64) -> io::Result<()> {
    let agreed = dialer_select_proto(stream, [DIAL_BACK], Version::V1).await;
    let (_, mut stream) = agreed.map_err(io::Error::other)?;
    messages::write_and_close(&mut stream, &v2::DialBack { nonce }).await?;
    // The answer shows that the client has read the nonce; no field of it matters.
    protobuf::read(&mut stream).await
}
