//! AutoNAT: tells a client whether it can be reached from outside, by dialing it. Version 1 and
//! version 2, the server's half of each.
//!
//! One conversation is in `autonat/exchange.rs`, its messages are in `autonat/messages.rs`; which
//! address is dialed is decided in `autonat/target.rs`, how often in `autonat/gate.rs`, and
//! `autonat/dial.rs` dials. All of it goes on in the handler of the connection that the client
//! asked over, and ends with that connection: to the swarm there is no dial-back, and none holds a
//! slot, is watched or counted.
//!
//! Written here because libp2p-autonat 0.16 tells clients of a relay that dials TCP only what is
//! not true: its version 2 tries the last of a client's addresses instead of the first that it can
//! dial, both versions answer that QUIC addresses cannot be reached, and where a limit is to be, it
//! can only fail, not refuse.

mod dial;
mod exchange;
mod gate;
mod messages;
mod target;

use std::{
    convert::Infallible,
    sync::Arc,
    task::{Context, Poll},
};

use libp2p::{
    Multiaddr, PeerId, StreamProtocol,
    core::{Endpoint, transport::PortUse, upgrade::DeniedUpgrade},
    futures::{FutureExt, future::BoxFuture},
    swarm::{
        ConnectionDenied, ConnectionHandler, ConnectionHandlerEvent, ConnectionId, FromSwarm,
        NetworkBehaviour, SubstreamProtocol, THandler, THandlerInEvent, THandlerOutEvent, ToSwarm,
        handler::{ConnectionEvent, FullyNegotiatedInbound},
    },
};

use self::{exchange::Server, target::Client};
use crate::{address, behaviour::inbound::Inbound};

const VERSION_1: StreamProtocol = StreamProtocol::new("/libp2p/autonat/1.0.0");
const VERSION_2: StreamProtocol = StreamProtocol::new("/libp2p/autonat/2/dial-request");

/// How many conversations go on over one connection. A stream beyond that is reset.
const MOST_EXCHANGES: usize = 2;

/// Answers AutoNAT's questions on all connections.
pub struct AutoNat(Arc<Server>);

impl AutoNat {
    /// `private`: whether addresses that are not global are dialed, too; that is for tests.
    ///
    /// # Errors
    ///
    /// When the secure channels cannot be made.
    pub fn new(private: bool) -> anyhow::Result<Self> {
        Ok(Self(Arc::new(Server::new(private)?)))
    }

    fn handler(&self, peer: PeerId, remote: &Multiaddr) -> Handler {
        let open = Open {
            server: Arc::clone(&self.0),
            client: address::ip(remote).map(|ip| Client { peer, ip }),
            exchanges: Vec::new(),
        };
        Handler(Box::new(open))
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

    fn on_connection_handler_event(
        &mut self,
        _: PeerId,
        _: ConnectionId,
        event: THandlerOutEvent<Self>,
    ) {
        match event {}
    }

    fn poll(&mut self, _: &mut Context<'_>) -> Poll<ToSwarm<Infallible, THandlerInEvent<Self>>> {
        Poll::Pending
    }
}

/// One connection. On the heap, because every connection has room for it, AutoNAT or not.
pub struct Handler(Box<Open>);

struct Open {
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
        Inbound(VERSION_2, Some(VERSION_1)).listen()
    }

    fn on_behaviour_event(&mut self, never: Infallible) {
        match never {}
    }

    fn on_connection_event(&mut self, event: ConnectionEvent<Inbound, DeniedUpgrade>) {
        let ConnectionEvent::FullyNegotiatedInbound(FullyNegotiatedInbound {
            protocol: (stream, protocol),
            ..
        }) = event
        else {
            return;
        };
        let Some(client) = self.0.client else {
            return;
        };
        if self.0.exchanges.len() < MOST_EXCHANGES {
            let server = Arc::clone(&self.0.server);
            let exchange = exchange::hold(server, client, protocol == VERSION_2, stream);
            self.0.exchanges.push(exchange.boxed());
        }
    }

    fn poll(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<ConnectionHandlerEvent<DeniedUpgrade, (), Infallible>> {
        let exchanges = &mut self.0.exchanges;
        exchanges.retain_mut(|exchange| exchange.poll_unpin(cx).is_pending());
        Poll::Pending
    }
}
