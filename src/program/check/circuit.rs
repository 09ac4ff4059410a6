//! A circuit from one identity to another, on connections that are up: libp2p's own relay client at both ends.

use std::{io, pin::Pin, task::Context, task::Poll, time::Duration};

use libp2p::core::transport::{DialOpts, ListenerId, TransportError, TransportEvent};
use libp2p::core::{muxing::StreamMuxerBox, upgrade::Version};
use libp2p::futures::{StreamExt, future, future::Either};
use libp2p::swarm::{self, NetworkBehaviour, SwarmEvent};
use libp2p::{
    Multiaddr, PeerId, Swarm, Transport, identity::Keypair, multiaddr::Protocol, ping, relay,
};

use super::link::{Link, multiplex};
use crate::program::net::security::Security;

/// Longer than the check takes.
const IDLE_TIMEOUT: Duration = Duration::from_secs(120);

#[derive(NetworkBehaviour)]
struct Parts {
    relay: relay::client::Behaviour,
    ping: ping::Behaviour,
}

/// Two clients of a relay, each on a connection of its own.
pub struct Pair([Swarm<Parts>; 2], Multiaddr);

impl Pair {
    /// The owners of these keys: the target of the circuit, and its source.
    pub fn new(target: (Link, &Keypair), source: (Link, &Keypair)) -> io::Result<Self> {
        let relay = target.0.address.clone().with(Protocol::P2p(target.0.peer));
        Ok(Self([client(target)?, client(source)?], relay.with(Protocol::P2pCircuit)))
    }

    /// Has the target reserve, and the source connect to it and ping it.
    pub async fn connect(&mut self) -> io::Result<((), String)> {
        let Self([target, source], relay) = self;
        let peer = *target.local_peer_id();
        target.listen_on(relay.clone()).map_err(io::Error::other)?;
        loop {
            let (Either::Left((event, _)) | Either::Right((event, _))) =
                future::select(target.next(), source.next()).await;
            match event {
                // Not at NewListenAddr, of which there may be several: the client drops a second dial.
                Some(SwarmEvent::Behaviour(PartsEvent::Relay(
                    relay::client::Event::ReservationReqAccepted { renewal: false, .. },
                ))) => {
                    let through = relay.clone().with(Protocol::P2p(peer));
                    source.dial(through).map_err(io::Error::other)?;
                }
                Some(SwarmEvent::Behaviour(PartsEvent::Ping(ping))) if ping.peer == peer => {
                    let time = ping.result.map_err(io::Error::other)?.as_secs_f64() * 1000.0;
                    return Ok((
                        (),
                        format!("{peer} answers a ping through the relay in {time:.1} ms"),
                    ));
                }
                Some(SwarmEvent::ListenerClosed { reason: Err(error), .. }) => {
                    return Err(io::Error::other(error));
                }
                Some(SwarmEvent::OutgoingConnectionError { error, .. }) => {
                    return Err(io::Error::other(error));
                }
                Some(SwarmEvent::ConnectionClosed { .. }) | None => {
                    return Err(io::ErrorKind::ConnectionReset.into());
                }
                _ => {}
            }
        }
    }

    /// Closes the circuit and both connections.
    pub async fn close(self) -> io::Result<((), String)> {
        for mut swarm in self.0 {
            for peer in swarm.connected_peers().copied().collect::<Vec<_>>() {
                let _ = swarm.disconnect_peer_id(peer); // it may be gone
            }
            while swarm.connected_peers().next().is_some() {
                swarm.next().await;
            }
        }
        Ok(((), "the circuit and both connections are closed".into()))
    }
}

fn client((link, keypair): (Link, &Keypair)) -> io::Result<Swarm<Parts>> {
    let peer = keypair.public().to_peer_id();
    let (circuits, relay) = relay::client::new(peer);
    let security = Security::new(keypair).map_err(io::Error::other)?;
    let transport = circuits.upgrade(Version::V1Lazy).authenticate(security).multiplex(multiplex());
    let transport = transport.or_transport(Connected(Some((link.peer, link.muxer))));
    let transport = transport.map(|either, _| match either {
        Either::Left((peer, muxer)) => (peer, StreamMuxerBox::new(muxer)),
        Either::Right(connected) => connected,
    });
    let config = swarm::Config::without_executor().with_idle_connection_timeout(IDLE_TIMEOUT);
    let parts = Parts { relay, ping: ping::Behaviour::default() };
    Ok(Swarm::new(transport.boxed(), parts, peer, config))
}

/// A transport whose one connection is up already: dialing returns it.
struct Connected(Option<(PeerId, StreamMuxerBox)>);

impl Transport for Connected {
    type Output = (PeerId, StreamMuxerBox);
    type Error = io::Error;
    type ListenerUpgrade = future::Pending<io::Result<Self::Output>>;
    type Dial = future::Ready<io::Result<Self::Output>>;

    fn listen_on(&mut self, _: ListenerId, of: Multiaddr) -> Result<(), TransportError<io::Error>> {
        Err(TransportError::MultiaddrNotSupported(of))
    }

    fn remove_listener(&mut self, _: ListenerId) -> bool {
        false
    }

    fn dial(&mut self, _: Multiaddr, _: DialOpts) -> Result<Self::Dial, TransportError<io::Error>> {
        Ok(future::ready(self.0.take().ok_or_else(|| io::ErrorKind::NotConnected.into())))
    }

    fn poll(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<TransportEvent<Self::ListenerUpgrade, io::Error>> {
        Poll::Pending
    }
}
