//! The secure channel of a connection: TLS 1.3 or Noise, whichever the client proposes.

mod apart;

use std::{io, iter};

use libp2p::{
    PeerId,
    core::upgrade::{InboundConnectionUpgrade, OutboundConnectionUpgrade, UpgradeInfo},
    futures::{
        AsyncRead, AsyncWrite, FutureExt, TryFutureExt,
        future::{self, BoxFuture},
    },
    identity::Keypair,
    noise, tls,
};

use self::apart::Apart;

/// How many messages of Noise's handshake, XX, each side hears.
const HEARD_BY_LISTENER: u8 = 2;
const HEARD_BY_DIALER: u8 = 1;

/// Both secure channels, for either side of a connection.
#[derive(Clone)]
pub struct Security {
    noise: noise::Config,
    tls: tls::Config,
}

impl Security {
    /// For the owner of `keypair`.
    ///
    /// # Errors
    ///
    /// When the key cannot sign the certificate or the static key.
    pub fn new(keypair: &Keypair) -> anyhow::Result<Self> {
        Ok(Self { noise: noise::Config::new(keypair)?, tls: tls::Config::new(keypair)? })
    }
}

/// Which of the two was agreed upon.
#[derive(Clone, Copy, Debug)]
pub enum Agreed {
    /// `/tls/1.0.0`
    Tls,
    /// `/noise`
    Noise,
}

impl Agreed {
    fn name(self) -> &'static str {
        match self {
            Self::Tls => "/tls/1.0.0",
            Self::Noise => "/noise",
        }
    }
}

impl AsRef<str> for Agreed {
    fn as_ref(&self) -> &str {
        self.name()
    }
}

impl UpgradeInfo for Security {
    type Info = Agreed;
    type InfoIter = iter::Chain<iter::Once<Agreed>, iter::Once<Agreed>>;

    fn protocol_info(&self) -> Self::InfoIter {
        iter::once(Agreed::Tls).chain(iter::once(Agreed::Noise))
    }
}

/// A secured connection.
type Secured<C> = future::Either<tls::TlsStream<C>, noise::Output<Apart<C>>>;
type Securing<C> = BoxFuture<'static, io::Result<(PeerId, Secured<C>)>>;

impl<C: AsyncRead + AsyncWrite + Unpin + Send + 'static> InboundConnectionUpgrade<C> for Security {
    type Output = (PeerId, Secured<C>);
    type Error = io::Error;
    type Future = Securing<C>;

    fn upgrade_inbound(self, connection: C, agreed: Agreed) -> Self::Future {
        let name = agreed.name();
        match agreed {
            Agreed::Tls => {
                secured(self.tls.upgrade_inbound(connection, name), future::Either::Left)
            }
            Agreed::Noise => secured(
                self.noise.upgrade_inbound(Apart::new(connection, HEARD_BY_LISTENER), name),
                future::Either::Right,
            ),
        }
    }
}

impl<C: AsyncRead + AsyncWrite + Unpin + Send + 'static> OutboundConnectionUpgrade<C> for Security {
    type Output = (PeerId, Secured<C>);
    type Error = io::Error;
    type Future = Securing<C>;

    fn upgrade_outbound(self, connection: C, agreed: Agreed) -> Self::Future {
        let name = agreed.name();
        match agreed {
            Agreed::Tls => {
                secured(self.tls.upgrade_outbound(connection, name), future::Either::Left)
            }
            Agreed::Noise => secured(
                self.noise.upgrade_outbound(Apart::new(connection, HEARD_BY_DIALER), name),
                future::Either::Right,
            ),
        }
    }
}

fn secured<C, T, E>(
    handshake: impl Future<Output = Result<(PeerId, T), E>> + Send + 'static,
    which: fn(T) -> Secured<C>,
) -> Securing<C>
where
    C: 'static,
    T: 'static,
    E: std::error::Error + Send + Sync + 'static,
{
    handshake
        .map_ok(move |(peer, connection)| (peer, which(connection)))
        .map_err(io::Error::other)
        .boxed()
}
