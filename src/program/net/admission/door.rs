//! Admission: the relay's behaviour behind the limits on connections, and behind the access rules.
//!
//! Around the relay, because that knows which peers hold slots. It decides nothing:
//! [`crate::program::net::admission::limits`] and the rules do.

use std::{
    collections::HashMap,
    net::Shutdown,
    task::{Context, Poll},
    time::{Duration, Instant},
};

use async_std::net::TcpStream;
use futures_timer::Delay;
use libp2p::{
    Multiaddr, PeerId,
    core::{ConnectedPoint, Endpoint, transport::PortUse},
    futures::FutureExt,
    swarm::{
        ConnectionClosed, ConnectionDenied, ConnectionId, FromSwarm, ListenFailure,
        NetworkBehaviour, THandler, THandlerInEvent, THandlerOutEvent, ToSwarm,
    },
};

use super::limits::{ConnectionLimits, Denied, Limits, Room, Standing};
use crate::{
    address::ClientPrefix,
    behaviour::Behaviour,
    event::Event,
    program::net::traffic::Traffic,
    relay::{
        circuits::End,
        quota::{Busiest, Scope},
    },
};

/// How often handshakes are looked at that may take too long.
const LOOK: Duration = Duration::from_millis(500);

/// The relay behind its limits.
pub struct Door {
    limits: ConnectionLimits,
    traffic: Traffic,
    /// The sockets of connections in their handshakes, which nothing else can end.
    sockets: HashMap<ConnectionId, TcpStream>,
    /// While there are some.
    look: Option<Delay>,
    /// What makes room for a connection that is about to come up.
    makes_room: Option<(ConnectionId, MakesRoom)>,
    /// What is behind it.
    pub relay: Behaviour,
}

/// What is closed for a connection.
#[derive(Clone, Copy, Debug)]
enum MakesRoom {
    /// The longest silent one of the same peer.
    OneOfItsOwn,
    /// This idle one.
    Stranger(End<ConnectionId>),
}

impl Door {
    /// No connections yet; `traffic` knows the sockets of those in their handshakes.
    pub fn new(limits: Limits, relay: Behaviour, traffic: Traffic) -> Self {
        let limits = ConnectionLimits::new(limits);
        Self { limits, traffic, sockets: HashMap::new(), look: None, makes_room: None, relay }
    }

    /// The addresses that have the most connections, and the most handshakes.
    pub fn busiest(&self) -> [Option<Busiest>; 2] {
        self.limits.busiest()
    }

    fn begin(
        &mut self,
        id: ConnectionId,
        local: &Multiaddr,
        remote: &Multiaddr,
    ) -> Result<(), Denied> {
        if !self.relay.may_enter(None, remote) {
            return Err(Denied::Rules);
        }
        let prefix = ClientPrefix::of(remote);
        let held = |prefix| self.relay.reservations().quota().held(Scope::Address(prefix));
        let slots = prefix.map_or(0, held);
        let (local_addr, send_back_addr) = (local.clone(), remote.clone());
        let pending =
            self.traffic.look_up(&ConnectedPoint::Listener { local_addr, send_back_addr });
        let (progress, socket) = pending.map(|it| (it.progress, it.socket)).unzip();
        if let Some(dropped) = self.limits.admit(id, prefix, slots, progress, Instant::now())? {
            log::debug!("handshake of connection {dropped} dropped: another one takes its place");
            self.drop_handshake(dropped);
        }
        self.sockets.extend(socket.flatten().map(|socket| (id, socket)));
        self.look.get_or_insert_with(|| Delay::new(LOOK));
        Ok(())
    }

    /// Ends a handshake: what reads from its socket comes to an end.
    fn drop_handshake(&mut self, id: ConnectionId) {
        if let Some(socket) = self.sockets.remove(&id) {
            let _ = socket.shutdown(Shutdown::Both); // or the peer was faster
        }
    }

    /// Ends the handshakes that take too long, from time to time.
    fn poll_overdue(&mut self, cx: &mut Context<'_>) {
        while let Some(look) = &mut self.look
            && look.poll_unpin(cx).is_ready()
        {
            for overdue in self.limits.overdue(Instant::now()) {
                log::debug!("handshake of connection {overdue} dropped: it takes too long");
                self.drop_handshake(overdue);
            }
            self.look = (!self.sockets.is_empty()).then(|| Delay::new(LOOK));
        }
    }

    fn let_in(&mut self, id: ConnectionId, peer: PeerId, remote: &Multiaddr) -> Result<(), Denied> {
        if !self.relay.may_enter(Some(peer), remote) {
            return Err(Denied::Rules);
        }
        let connections = self.relay.connections();
        let (all, open) = (connections.of(&peer).len(), connections.open_of(&peer).count());
        let holds_a_slot = self.relay.reservations().ends(&peer).is_some();
        let standing = Standing { holds_a_slot, connections: all, closing: all - open };
        let reservations = self.relay.reservations();
        let live = reservations.taken() - reservations.in_grace();
        let makes_room = match self.limits.establish(id, standing, live)? {
            Room::Free => None,
            Room::OfItsOwn => Some(MakesRoom::OneOfItsOwn),
            Room::OfAStranger => {
                let stranger = self.idle_stranger(ClientPrefix::of(remote), holds_a_slot);
                Some(MakesRoom::Stranger(stranger.ok_or(Denied::Connections)?))
            }
        };
        self.makes_room = makes_room.map(|makes_room| (id, makes_room));
        Ok(())
    }

    /// The idle connection that makes room for one of this prefix: of the heaviest prefix, and of those the
    /// longest idle. For a stranger only one whose prefix holds more than its own.
    fn idle_stranger(
        &self,
        prefix: Option<ClientPrefix>,
        holds_a_slot: bool,
    ) -> Option<End<ConnectionId>> {
        let (now, quota) = (Instant::now(), self.limits.quota());
        let idle = self.relay.idle_strangers();
        let idle = idle.filter(|(_, other, _)| holds_a_slot || quota.yields(*other, prefix));
        let heaviest = idle.max_by_key(|(_, other, since)| {
            (quota.load(*other), now.saturating_duration_since(*since))
        });
        heaviest.map(|(stranger, ..)| stranger)
    }

    /// It is up: now that its peer's slot can move to it, another one makes room.
    fn make_room_for(&mut self, id: ConnectionId, peer: PeerId) {
        match self.makes_room.take_if(|(waits, _)| *waits == id) {
            Some((_, MakesRoom::OneOfItsOwn)) => self.relay.close_longest_silent_of(peer, id),
            Some((_, MakesRoom::Stranger(stranger))) => self.relay.close_stranger(stranger),
            None => {}
        }
    }
}

impl NetworkBehaviour for Door {
    type ConnectionHandler = THandler<Behaviour>;
    type ToSwarm = Event;

    fn handle_pending_inbound_connection(
        &mut self,
        id: ConnectionId,
        local: &Multiaddr,
        remote: &Multiaddr,
    ) -> Result<(), ConnectionDenied> {
        self.begin(id, local, remote).map_err(ConnectionDenied::new)
    }

    fn handle_established_inbound_connection(
        &mut self,
        id: ConnectionId,
        peer: PeerId,
        local: &Multiaddr,
        remote: &Multiaddr,
    ) -> Result<THandler<Self>, ConnectionDenied> {
        self.sockets.remove(&id);
        self.let_in(id, peer, remote).map_err(ConnectionDenied::new)?;
        self.relay.handle_established_inbound_connection(id, peer, local, remote)
    }

    fn handle_established_outbound_connection(
        &mut self,
        id: ConnectionId,
        peer: PeerId,
        address: &Multiaddr,
        role: Endpoint,
        port_use: PortUse,
    ) -> Result<THandler<Self>, ConnectionDenied> {
        self.relay.handle_established_outbound_connection(id, peer, address, role, port_use)
    }

    fn on_swarm_event(&mut self, event: FromSwarm<'_>) {
        if let FromSwarm::ConnectionClosed(ConnectionClosed { connection_id, .. })
        | FromSwarm::ListenFailure(ListenFailure { connection_id, .. }) = event
        {
            self.sockets.remove(&connection_id);
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
        self.poll_overdue(cx);
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
        Door::new(limits, relay, Traffic::default())
    }

    /// A connection comes from 192.0.2.1, and has done its handshake.
    fn come(door: &mut Door, n: usize) -> Result<(), ConnectionDenied> {
        let (id, [local, remote]) = (ConnectionId::new_unchecked(n), addresses());
        door.handle_pending_inbound_connection(id, &local, &remote)?;
        door.handle_established_inbound_connection(id, PeerId::random(), &local, &remote).map(drop)
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
            max_connections_per_ip: Some(2),
            max_connections_per_subnet: None,
            max_handshakes: 1,
        });
        come(&mut door, 0).unwrap();
        assert_eq!(door.limits.counts(), [1, 0, 3]);
        for n in 1..9 {
            let denied = come(&mut door, n).unwrap_err();
            // Not of the address, nor of its handshake: nothing is left of those before it.
            assert_eq!(kind(&denied), Some("too many connections"));
            assert_eq!(door.limits.counts(), [2, 0, 3], "until the swarm says so");
            // Meanwhile the next is turned away before it has said a word.
            let too_soon = come(&mut door, n + 100).unwrap_err();
            assert_eq!(kind(&too_soon), Some("too many connections of the address"));
            fail(&mut door, n + 100, too_soon);
            fail(&mut door, n, denied);
            assert_eq!(door.limits.counts(), [1, 0, 3]);
        }
        fail(&mut door, 0, ConnectionDenied::new(Denied::Connections)); // by another behaviour
        assert_eq!(door.limits.counts(), [0; 3]);
        come(&mut door, 9).unwrap();
    }
}
