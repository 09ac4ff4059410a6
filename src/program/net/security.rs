//! The secure channel of a connection: TLS 1.3 or Noise, as the client proposes.

mod noise_framing;

use std::{error::Error, io};

use libp2p::{
    PeerId,
    core::upgrade::{InboundConnectionUpgrade, OutboundConnectionUpgrade, UpgradeInfo},
    futures::{
        AsyncRead, AsyncWrite, FutureExt, TryFutureExt,
        future::{BoxFuture, Either},
    },
    identity::Keypair,
    noise, tls,
};

use self::noise_framing::NoiseFraming;
use super::admission::handshake_failure::{Reason, Stage, StageError, causes};

const TLS: &str = "/tls/1.0.0";
const NOISE: &str = "/noise";

/// How many messages of Noise's XX handshake each side reads.
const READ_BY_LISTENER: u8 = 2;
const READ_BY_DIALER: u8 = 1;

/// Both secure channels, for either end of a connection.
#[derive(Clone)]
pub struct Security {
    noise: noise::Config,
    tls: tls::Config,
}

impl Security {
    /// Secures connections under the identity of `keypair`.
    ///
    /// # Errors
    ///
    /// When the key cannot sign the TLS certificate or Noise's static key.
    pub fn new(keypair: &Keypair) -> anyhow::Result<Self> {
        Ok(Self { noise: noise::Config::new(keypair)?, tls: tls::Config::new(keypair)? })
    }
}

impl UpgradeInfo for Security {
    type Info = &'static str;
    type InfoIter = [&'static str; 2];

    fn protocol_info(&self) -> Self::InfoIter {
        [TLS, NOISE]
    }
}

/// A secured connection.
type Secured<C> = Either<tls::TlsStream<C>, noise::Output<NoiseFraming<C>>>;
type Securing<C> = BoxFuture<'static, io::Result<(PeerId, Secured<C>)>>;

impl<C: AsyncRead + AsyncWrite + Unpin + Send + 'static> InboundConnectionUpgrade<C> for Security {
    type Output = (PeerId, Secured<C>);
    type Error = io::Error;
    type Future = Securing<C>;

    fn upgrade_inbound(self, connection: C, protocol: &'static str) -> Self::Future {
        if protocol == TLS {
            return secure(self.tls.upgrade_inbound(connection, protocol), Either::Left);
        }
        let connection = NoiseFraming::new(connection, READ_BY_LISTENER);
        secure(self.noise.upgrade_inbound(connection, protocol), Either::Right)
    }
}

impl<C: AsyncRead + AsyncWrite + Unpin + Send + 'static> OutboundConnectionUpgrade<C> for Security {
    type Output = (PeerId, Secured<C>);
    type Error = io::Error;
    type Future = Securing<C>;

    fn upgrade_outbound(self, connection: C, protocol: &'static str) -> Self::Future {
        if protocol == TLS {
            return secure(self.tls.upgrade_outbound(connection, protocol), Either::Left);
        }
        let connection = NoiseFraming::new(connection, READ_BY_DIALER);
        secure(self.noise.upgrade_outbound(connection, protocol), Either::Right)
    }
}

/// Gives the handshakes of both channels one type.
fn secure<C: 'static, T: 'static, E: Error + Send + Sync + 'static>(
    handshake: impl Future<Output = Result<(PeerId, T), E>> + Send + 'static,
    wrap: fn(T) -> Secured<C>,
) -> Securing<C> {
    let secured = handshake.map_ok(move |(peer, connection)| (peer, wrap(connection)));
    let failed = |error: E| {
        let reason = is_refusal(&error).then_some(Reason::PeerId);
        StageError::wrap(Stage::Security, reason, io::Error::other(error))
    };
    secured.map_err(failed).boxed()
}

/// Whether a dialer has rejected our certificate, as go-libp2p does if it expected another peer id. By the text, because
/// libp2p does not export the error's type, which is rustls's.
fn is_refusal(error: &(dyn Error + 'static)) -> bool {
    let alerts = ["AccessDenied", "BadCertificate", "CertificateUnknown", "UnknownCA"];
    let alert = |name| format!("received fatal alert: {name}");
    causes(error).any(|cause| alerts.iter().any(|name| cause.to_string() == alert(name)))
}
