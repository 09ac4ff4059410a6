//! Who is let in: the relay's behaviour behind the limits on connections.
//!
//! Around the relay, because that knows who holds a slot and who is a stranger. It decides nothing:
//! [`super::connection_limits`] does.

use std::task::{Context, Poll};

use libp2p::{
    Multiaddr, PeerId,
    core::{Endpoint, transport::PortUse},
    swarm::{
        ConnectionClosed, ConnectionDenied, ConnectionId, FromSwarm, ListenFailure,
        NetworkBehaviour, THandler, THandlerInEvent, THandlerOutEvent, ToSwarm,
    },
};

use super::connection_limits::{ConnectionLimits, Denied, Limits, Room, Standing};
use crate::{address::BilledTo, behaviour::Behaviour, event::Event};

/// The relay, and who gets to it.
pub struct Door {
    limits: ConnectionLimits,
    /// Who makes room for a connection that is about to come up.
    room: Option<(ConnectionId, Room)>,
    /// What is behind it.
    pub relay: Behaviour,
}

impl Door {
    /// Nobody is connected yet.
    pub fn new(limits: Limits, relay: Behaviour) -> Self {
        Self {
            limits: ConnectionLimits::new(limits),
            room: None,
            relay,
        }
    }

    fn let_in(&mut self, id: ConnectionId, peer: PeerId) -> Result<(), Denied> {
        let standing = Standing {
            holds_a_slot: self.relay.reservations().ends(&peer).is_some(),
            connections: self.relay.connections().open_of(&peer).count(),
        };
        let room = self.limits.establish(id, standing)?;
        if room == Room::OfAStranger && !self.relay.has_idle_stranger(id) {
            return Err(Denied::Connections);
        }
        self.room = Some((id, room));
        Ok(())
    }

    /// It is up: now that its peer's slot can move to it, others make room.
    fn make_room_for(&mut self, id: ConnectionId, peer: PeerId) {
        match self.room.take_if(|(waits, _)| *waits == id) {
            Some((_, Room::OfItsOwn)) => self.relay.close_longest_silent_of(peer, id),
            Some((_, Room::OfAStranger)) => self.relay.close_longest_idle_stranger(id),
            Some((_, Room::Free)) | None => {}
        }
    }
}

impl NetworkBehaviour for Door {
    type ConnectionHandler = THandler<Behaviour>;
    type ToSwarm = Event;

    fn handle_pending_inbound_connection(
        &mut self,
        id: ConnectionId,
        _: &Multiaddr,
        remote: &Multiaddr,
    ) -> Result<(), ConnectionDenied> {
        self.limits
            .admit(id, BilledTo::of(remote))
            .map_err(ConnectionDenied::new)
    }

    fn handle_established_inbound_connection(
        &mut self,
        id: ConnectionId,
        peer: PeerId,
        local: &Multiaddr,
        remote: &Multiaddr,
    ) -> Result<THandler<Self>, ConnectionDenied> {
        self.let_in(id, peer).map_err(ConnectionDenied::new)?;
        self.relay
            .handle_established_inbound_connection(id, peer, local, remote)
    }

    fn handle_established_outbound_connection(
        &mut self,
        id: ConnectionId,
        peer: PeerId,
        address: &Multiaddr,
        role: Endpoint,
        port_use: PortUse,
    ) -> Result<THandler<Self>, ConnectionDenied> {
        self.relay
            .handle_established_outbound_connection(id, peer, address, role, port_use)
    }

    fn on_swarm_event(&mut self, event: FromSwarm<'_>) {
        if let FromSwarm::ConnectionClosed(ConnectionClosed { connection_id, .. })
        | FromSwarm::ListenFailure(ListenFailure { connection_id, .. }) = event
        {
            self.limits.forget(connection_id);
        }
        self.relay.on_swarm_event(event);
        if let FromSwarm::ConnectionEstablished(up) = event {
            self.make_room_for(up.connection_id, up.peer_id);
        }
    }

    fn on_connection_handler_event(
        &mut self,
        peer: PeerId,
        id: ConnectionId,
        event: THandlerOutEvent<Self>,
    ) {
        self.relay.on_connection_handler_event(peer, id, event);
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<ToSwarm<Event, THandlerInEvent<Self>>> {
        self.relay.poll(cx)
    }
}

#[cfg(test)]
mod tests {
    use libp2p::{identity::Keypair, swarm::ListenError};

    use super::*;
    use crate::config::Config;

    fn door(limits: Limits) -> Door {
        let relay = Behaviour::new(Keypair::generate_ed25519(), Config::default()).unwrap();
        Door::new(limits, relay)
    }

    /// A connection comes from 192.0.2.1, and has done its handshake.
    fn come(door: &mut Door, n: usize) -> Result<(), ConnectionDenied> {
        let (id, [local, remote]) = (ConnectionId::new_unchecked(n), addresses());
        door.handle_pending_inbound_connection(id, &local, &remote)?;
        door.handle_established_inbound_connection(id, PeerId::random(), &local, &remote)
            .map(drop)
    }

    /// What the swarm says of a connection that was not let in.
    fn fail(door: &mut Door, n: usize, cause: ConnectionDenied) {
        let [local_addr, send_back_addr] = &addresses();
        door.on_swarm_event(FromSwarm::ListenFailure(ListenFailure {
            local_addr,
            send_back_addr,
            error: &ListenError::Denied { cause },
            connection_id: ConnectionId::new_unchecked(n),
            peer_id: None,
        }));
    }

    fn addresses() -> [Multiaddr; 2] {
        ["/ip4/192.0.2.9/tcp/4001", "/ip4/192.0.2.1/tcp/1"].map(|text| text.parse().unwrap())
    }

    fn kind(denied: &ConnectionDenied) -> Option<&'static str> {
        denied.downcast_ref::<Denied>().map(Denied::kind)
    }

    #[test]
    fn who_is_turned_away_before_or_after_its_handshake_counts_no_longer() {
        let mut door = door(Limits {
            max_connections: 1,
            max_connections_per_peer: 1,
            max_connections_per_ip: 2,
            max_handshakes: 1,
        });
        come(&mut door, 0).unwrap();
        assert_eq!(door.limits.counts(), [1, 0, 1]);
        for n in 1..9 {
            let denied = come(&mut door, n).unwrap_err();
            // Not of the address, nor of its handshake: nothing is left of those before it.
            assert_eq!(kind(&denied), Some("too many connections"));
            assert_eq!(door.limits.counts(), [2, 0, 1], "until the swarm says so");
            // Meanwhile the next is turned away before it has said a word.
            let too_soon = come(&mut door, n + 100).unwrap_err();
            assert_eq!(kind(&too_soon), Some("too many connections of the address"));
            fail(&mut door, n + 100, too_soon);
            fail(&mut door, n, denied);
            assert_eq!(door.limits.counts(), [1, 0, 1]);
        }
        fail(&mut door, 0, ConnectionDenied::new(Denied::Connections)); // by another behaviour
        assert_eq!(door.limits.counts(), [0; 3]);
        come(&mut door, 9).unwrap();
    }
}
