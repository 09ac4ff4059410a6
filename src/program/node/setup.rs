//! The settings of a node that are not in its configuration.

#[cfg(feature = "pnet")]
use crate::program::net::swarm_key::PreSharedKey;
use crate::program::{mux::stream_limits::StreamLimits, net::admission::limits::Limits};

/// The settings of a [`Node`](super::Node) besides its [`Config`](crate::Config). They cannot change while it runs.
#[derive(Clone, Debug, Default)]
pub struct Setup {
    /// The limits on connections.
    pub limits: Limits,
    /// The limits on streams, and on the bytes buffered for them.
    pub streams: StreamLimits,
    /// Whether polling the node also polls its connections: cheaper, but on one core at a time. Otherwise each
    /// connection is a task of async-std's. Default: false.
    pub one_thread: bool,
    /// The key of the relay's private network ([`load`](crate::program::net::swarm_key::load)); `None`: the relay is in no private network.
    #[cfg(feature = "pnet")]
    pub swarm_key: Option<PreSharedKey>,
}

impl Setup {
    /// Whether the relay is in a private network.
    pub(super) fn is_private(&self) -> bool {
        #[cfg(feature = "pnet")]
        return self.swarm_key.is_some();
        #[cfg(not(feature = "pnet"))]
        return false;
    }
}
