//! The secure channel of a connection: TLS 1.3 or Noise, as the client proposes. Without the feature `tls` Noise only.

mod noise_framing;
#[cfg(feature = "tls")]
mod tls;
#[cfg(feature = "tls")]
mod tls_stream;

use std::{array, error::Error, io, iter::Skip, time::SystemTime};

use libp2p::{
    PeerId,
    core::upgrade::{InboundConnectionUpgrade, OutboundConnectionUpgrade, UpgradeInfo},
    futures::{AsyncRead, AsyncWrite, FutureExt, TryFutureExt, future::BoxFuture},
    identity::Keypair,
    noise,
};
#[cfg(feature = "tls")]
use {
    self::{tls::Tls, tls_stream::TlsStream},
    libp2p::futures::future::Either::{self, Left as wrap_tls, Right as wrap_noise},
};

use self::noise_framing::NoiseFraming;
use super::admission::handshake_failure::{Stage, StageError};
use crate::wall_clock;
#[cfg(not(feature = "tls"))]
use std::convert::identity as wrap_noise;

const NOISE: &str = "/noise";
/// In the order in which a dialer proposes them.
#[cfg(feature = "tls")]
const PROTOCOLS: [&str; 2] = ["/tls/1.0.0", NOISE];
/// What a dialer proposes.
#[cfg(not(feature = "tls"))]
const PROTOCOLS: [&str; 1] = [NOISE];

/// How many messages of Noise's XX handshake each side reads.
const READ_BY_LISTENER: u8 = 2;
const READ_BY_DIALER: u8 = 1;

/// The secure channels, for either end of a connection.
#[derive(Clone)]
pub struct Security {
    noise: noise::Config,
    #[cfg(feature = "tls")]
    tls: Tls,
}

impl Security {
    /// Secures connections under the identity of `keypair`.
    ///
    /// # Errors
    ///
    /// When the key cannot sign the TLS certificate or Noise's static key.
    pub fn new(keypair: &Keypair) -> anyhow::Result<Self> {
        Ok(Self {
            noise: noise::Config::new(keypair)?,
            #[cfg(feature = "tls")]
            tls: Tls::new(keypair)?,
        })
    }
}

impl UpgradeInfo for Security {
    type Info = &'static str;
    type InfoIter = Protocols;

    fn protocol_info(&self) -> Self::InfoIter {
        protocols(SystemTime::now())
    }
}

type Protocols = Skip<array::IntoIter<&'static str, { PROTOCOLS.len() }>>;

/// Noise alone while the clock is not set: every peer's TLS certificate would seem not valid yet, and a peer whose TLS
/// handshake failed does not try Noise.
fn protocols(now: SystemTime) -> Protocols {
    let skipped = if wall_clock::is_set(now) { 0 } else { PROTOCOLS.len() - 1 };
    PROTOCOLS.into_iter().skip(skipped)
}

type Noise<C> = noise::Output<NoiseFraming<C>>;
/// A secured connection.
#[cfg(feature = "tls")]
type Secured<C> = Either<Box<TlsStream<C>>, Noise<C>>;
#[cfg(not(feature = "tls"))]
type Secured<C> = Noise<C>;
type Handshake<C> = BoxFuture<'static, io::Result<(PeerId, Secured<C>)>>;

impl<C: AsyncRead + AsyncWrite + Unpin + Send + 'static> InboundConnectionUpgrade<C> for Security {
    type Output = (PeerId, Secured<C>);
    type Error = io::Error;
    type Future = Handshake<C>;

    fn upgrade_inbound(self, connection: C, protocol: &'static str) -> Self::Future {
        #[cfg(feature = "tls")]
        if protocol != NOISE {
            return secure(self.tls.accept(connection), wrap_tls);
        }
        let connection = NoiseFraming::new(connection, READ_BY_LISTENER);
        secure(self.noise.upgrade_inbound(connection, protocol), wrap_noise)
    }
}

impl<C: AsyncRead + AsyncWrite + Unpin + Send + 'static> OutboundConnectionUpgrade<C> for Security {
    type Output = (PeerId, Secured<C>);
    type Error = io::Error;
    type Future = Handshake<C>;

    fn upgrade_outbound(self, connection: C, protocol: &'static str) -> Self::Future {
        #[cfg(feature = "tls")]
        if protocol != NOISE {
            return secure(self.tls.connect(connection), wrap_tls);
        }
        let connection = NoiseFraming::new(connection, READ_BY_DIALER);
        secure(self.noise.upgrade_outbound(connection, protocol), wrap_noise)
    }
}

/// Gives the handshakes of both channels one type.
fn secure<C: 'static, T: 'static, E: Error + Send + Sync + 'static>(
    handshake: impl Future<Output = Result<(PeerId, T), E>> + Send + 'static,
    wrap: fn(T) -> Secured<C>,
) -> Handshake<C> {
    let secured = handshake.map_ok(move |(peer, connection)| (peer, wrap(connection)));
    let failed = |error| StageError::wrap(Stage::Security, None, io::Error::other(error));
    secured.map_err(failed).boxed()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_relay_whose_clock_is_not_set_secures_connections_with_noise_alone() {
        assert!(protocols(SystemTime::UNIX_EPOCH).eq([NOISE]));
        assert!(protocols(SystemTime::now()).eq(PROTOCOLS));
    }
}
