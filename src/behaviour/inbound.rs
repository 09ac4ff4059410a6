//! Inbound streams of one protocol, or of a second one where that is served too.

use std::{convert::Infallible, future, iter, option, time::Duration};

use libp2p::{
    StreamProtocol,
    core::upgrade::{InboundUpgrade, UpgradeInfo},
    swarm::SubstreamProtocol,
};

/// Accepts streams of these protocols, and returns which one was negotiated.
#[derive(Clone, Debug)]
pub struct Inbound(pub StreamProtocol, pub Option<StreamProtocol>);

/// How long a peer may take to say what its stream is for, and then to send its request.
pub const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);

impl Inbound {
    /// As a handler listens for them.
    pub fn listen(self) -> SubstreamProtocol<Self> {
        SubstreamProtocol::new(self, ()).with_timeout(REQUEST_TIMEOUT)
    }
}

impl UpgradeInfo for Inbound {
    type Info = StreamProtocol;
    type InfoIter = iter::Chain<iter::Once<StreamProtocol>, option::IntoIter<StreamProtocol>>;

    fn protocol_info(&self) -> Self::InfoIter {
        iter::once(self.0.clone()).chain(self.1.clone())
    }
}

impl<S> InboundUpgrade<S> for Inbound {
    type Output = (S, StreamProtocol);
    type Error = Infallible;
    type Future = future::Ready<Result<Self::Output, Self::Error>>;

    fn upgrade_inbound(self, stream: S, protocol: StreamProtocol) -> Self::Future {
        future::ready(Ok((stream, protocol)))
    }
}
