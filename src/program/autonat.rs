//! AutoNAT: tells a client whether it can be reached, by dialing it. The server's half of versions 1 and 2.
//!
//! `autonat/exchange.rs` serves one request and `autonat/messages.rs` has its messages; `autonat/target.rs` chooses the
//! address, `autonat/dial_limits.rs` limits the dials, and `autonat/dial.rs` dials. All of it runs in the handler of the
//! connection on which the client asks, and ends with it: the swarm does not see these dials, and they hold no slot, are
//! not watched and not counted.
//!
//! Not libp2p-autonat, because version 0.16 answers wrongly when the server dials only TCP: its version 2 dials the last
//! of a client's addresses instead of the first that it can dial, both versions report QUIC addresses as unreachable, and
//! a rate limit in front of it can only fail a request, not refuse it.

mod dial;
mod dial_limits;
mod exchange;
mod messages;
mod target;

use std::{
    convert::Infallible,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use libp2p::{
    Multiaddr, PeerId, StreamProtocol,
    core::{
        Endpoint,
        transport::PortUse,
        upgrade::{DeniedUpgrade, ReadyUpgrade, SelectUpgrade},
    },
    futures::{
        FutureExt,
        future::{BoxFuture, Either},
    },
    swarm::{
        ConnectionDenied, ConnectionHandler, ConnectionHandlerEvent, ConnectionId, FromSwarm,
        NetworkBehaviour, SubstreamProtocol, THandler, ToSwarm, handler::ConnectionEvent,
    },
};

use self::{exchange::Server, target::Client};
use crate::{address, program::net::multiaddr};

const VERSION_1: StreamProtocol = StreamProtocol::new("/libp2p/autonat/1.0.0");
const VERSION_2: StreamProtocol = StreamProtocol::new("/libp2p/autonat/2/dial-request");

/// Both versions of the protocol, the newer first.
type Inbound = SelectUpgrade<ReadyUpgrade<StreamProtocol>, ReadyUpgrade<StreamProtocol>>;

/// How long a peer may take to negotiate the protocol of a stream.
const NEGOTIATION_TIMEOUT: Duration = Duration::from_secs(5);

/// How many requests of one connection are served at a time. A stream beyond that is reset.
const MAX_EXCHANGES: usize = 2;

/// The AutoNAT server on all connections.
pub struct AutoNat(Arc<Server>);

impl AutoNat {
    /// `private`: whether addresses that are not global are dialed, too, as in tests.
    ///
    /// # Errors
    ///
    /// When the secure channels cannot be created.
    pub fn new(private: bool) -> anyhow::Result<Self> {
        Ok(Self(Arc::new(Server::new(private)?)))
    }

    fn handler(&self, peer: PeerId, remote: &Multiaddr) -> Handler {
        let port = multiaddr::dialable(remote).map(|from| from.port());
        let client = address::ip(remote).map(|ip| Client { peer, ip, port });
        Handler { server: Arc::clone(&self.0), client, exchanges: Vec::new() }
    }
}

impl NetworkBehaviour for AutoNat {
    type ConnectionHandler = Handler;
    type ToSwarm = Infallible;

    fn handle_established_inbound_connection(
        &mut self,
        _: ConnectionId,
        peer: PeerId,
        _: &Multiaddr,
        remote: &Multiaddr,
    ) -> Result<THandler<Self>, ConnectionDenied> {
        Ok(self.handler(peer, remote))
    }

    fn handle_established_outbound_connection(
        &mut self,
        _: ConnectionId,
        peer: PeerId,
        remote: &Multiaddr,
        _: Endpoint,
        _: PortUse,
    ) -> Result<THandler<Self>, ConnectionDenied> {
        Ok(self.handler(peer, remote))
    }

    fn on_swarm_event(&mut self, _: FromSwarm) {}

    fn on_connection_handler_event(&mut self, _: PeerId, _: ConnectionId, never: Infallible) {
        match never {}
    }

    fn poll(&mut self, _: &mut Context<'_>) -> Poll<ToSwarm<Infallible, Infallible>> {
        Poll::Pending
    }
}

/// The AutoNAT server on one connection.
pub struct Handler {
    server: Arc<Server>,
    client: Option<Client>,
    exchanges: Vec<BoxFuture<'static, ()>>,
}

impl ConnectionHandler for Handler {
    type FromBehaviour = Infallible;
    type ToBehaviour = Infallible;
    type InboundProtocol = Inbound;
    type OutboundProtocol = DeniedUpgrade;
    type InboundOpenInfo = ();
    type OutboundOpenInfo = ();

    fn listen_protocol(&self) -> SubstreamProtocol<Inbound> {
        let inbound =
            SelectUpgrade::new(ReadyUpgrade::new(VERSION_2), ReadyUpgrade::new(VERSION_1));
        SubstreamProtocol::new(inbound, ()).with_timeout(NEGOTIATION_TIMEOUT)
    }

    fn on_behaviour_event(&mut self, never: Infallible) {
        match never {}
    }

    fn on_connection_event(&mut self, event: ConnectionEvent<Inbound, DeniedUpgrade>) {
        let ConnectionEvent::FullyNegotiatedInbound(inbound) = event else {
            return;
        };
        let (stream, is_version_2) = match inbound.protocol {
            Either::Left(stream) => (stream, true),
            Either::Right(stream) => (stream, false),
        };
        if let Some(client) = self.client
            && self.exchanges.len() < MAX_EXCHANGES
        {
            let server = Arc::clone(&self.server);
            let exchange = exchange::serve(server, client, is_version_2, stream);
            self.exchanges.push(exchange.boxed());
        }
    }

    fn poll(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<ConnectionHandlerEvent<DeniedUpgrade, (), Infallible>> {
        let exchanges = &mut self.exchanges;
        exchanges.retain_mut(|exchange| exchange.poll_unpin(cx).is_pending());
        Poll::Pending
    }
}
