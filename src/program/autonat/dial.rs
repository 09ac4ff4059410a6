//! The dial itself: TCP, the secure channel, the muxer, and for version 2 one stream.

use std::{
    future::poll_fn,
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
    futures::future::{self, Either},
    identity::Keypair,
};
use multistream_select::dialer_select_proto;

use super::messages::{self, v2};
use crate::program::{
    mux::{
        muxer::{Budget, Multiplex},
        stream_limits::StreamLimits,
    },
    net::{
        admission::{arrivals::Arrivals, proxies::Proxies},
        multiaddr::multiaddr,
        read_ahead::ReadAhead,
        security::Security,
        tcp::Tcp,
        traffic::Traffic,
    },
};

const DIAL_BACK: &str = "/libp2p/autonat/2/dial-back";

/// How long a dial may take, the handshakes included; and version 2's stream after it. Together
/// below the 10 s for which rust-libp2p's client waits to be told that it cannot be reached.
const DIAL_TIMEOUT: Duration = Duration::from_secs(5);
const STREAM_TIMEOUT: Duration = Duration::from_secs(3);

/// How long a connection has to be closed in good order.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(1);

/// The client may open a few streams, as each does on a new connection; none is answered.
const BUDGET: Budget = Budget { inbound: 8, outbound: 1 };

/// Nothing that the client sends on a stream is read.
const LIMITS: StreamLimits = StreamLimits {
    max_streams: 0,
    max_streams_per_connection: Some(BUDGET.inbound),
    stream_rate: 0,
    max_buffered: None,
    max_buffered_per_connection: None,
};

/// Dials, under an identity of its own, as go-libp2p's server does: to the client this is one more
/// stranger, and not a second connection to its relay that comes and goes.
pub struct Dialer(Mutex<Boxed<(PeerId, StreamMuxerBox)>>);

impl Dialer {
    /// With a new identity.
    pub fn new() -> anyhow::Result<Self> {
        let keypair = Keypair::generate_ed25519();
        let transport = Tcp::new(Traffic::default(), Proxies::new(0), Arrivals::unlimited())
            .map(|stream, _| ReadAhead::new(stream))
            // Not lazily: the client is to see the connection come up before it is closed.
            .upgrade(Version::V1)
            .authenticate(Security::new(&keypair)?)
            .multiplex(Multiplex::new(BUDGET, LIMITS, 0))
            .timeout(DIAL_TIMEOUT)
            .boxed();
        Ok(Self(Mutex::new(transport)))
    }

    /// A connection to this peer.
    ///
    /// # Errors
    ///
    /// When it cannot be reached there, or somebody else is.
    pub async fn dial(&self, peer: PeerId, to: SocketAddr) -> io::Result<Dialed> {
        let how = DialOpts { role: Endpoint::Dialer, port_use: PortUse::New };
        let dial = {
            let mut transport = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            transport.dial(multiaddr(to), how)
        };
        let (who, muxer) = dial.map_err(io::Error::other)?.await?;
        match who == peer {
            true => Ok(Dialed(muxer)),
            false => Err(io::Error::other("somebody else")),
        }
    }
}

/// A connection that was dialed.
pub struct Dialed(StreamMuxerBox);

impl Dialed {
    /// Proves to the client that it was dialed: tells it the number that it gave.
    ///
    /// # Errors
    ///
    /// When it does not take it.
    pub async fn prove(&mut self, nonce: u64) -> io::Result<()> {
        let prove = async {
            let stream = poll_fn(|cx| self.poll_open(cx)).await?;
            let exchange = pin!(exchange(stream, nonce));
            let progress = pin!(poll_fn(|cx| self.poll_progress(cx)));
            match future::select(exchange, progress).await {
                Either::Left((proved, _)) => proved,
                Either::Right((error, _)) => Err(error),
            }
        };
        timeout(STREAM_TIMEOUT, prove).await
    }

    /// Ends it.
    pub async fn close(self) {
        let _ = timeout(CLOSE_TIMEOUT, self.0.close()).await;
    }

    fn poll_open(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<SubstreamBox>> {
        if let Poll::Ready(error) = self.poll_progress(cx) {
            return Poll::Ready(Err(error));
        }
        self.0.poll_outbound_unpin(cx)
    }

    /// Lets the connection make progress, until it ends. What the client opens is reset.
    fn poll_progress(&mut self, cx: &mut Context<'_>) -> Poll<io::Error> {
        loop {
            match self.0.poll_inbound_unpin(cx) {
                Poll::Ready(Ok(stream)) => drop(stream),
                Poll::Ready(Err(error)) => return Poll::Ready(error),
                Poll::Pending => break,
            }
        }
        match self.0.poll_unpin(cx) {
            Poll::Ready(Err(error)) => Poll::Ready(error),
            Poll::Ready(Ok(_)) | Poll::Pending => Poll::Pending,
        }
    }
}

async fn exchange(stream: SubstreamBox, nonce: u64) -> io::Result<()> {
    let agreed = dialer_select_proto(stream, [DIAL_BACK], Version::V1).await;
    let (_, mut stream) = agreed.map_err(io::Error::other)?;
    messages::write_and_close(&mut stream, &v2::DialBack { nonce }).await?;
    // That it answers is what says that it has read.
    messages::read::<v2::DialBackResponse>(&mut stream).await?;
    Ok(())
}
