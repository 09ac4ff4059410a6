//! Admission: admits or denies connections, then passes them to the relay's behaviour.
//!
//! It wraps the relay's behaviour, which knows the peers that hold slots. The caps are in [`super::limits`], the access
//! rules in [`crate::access`].

use std::{
    cmp::Reverse,
    collections::HashMap,
    net::Shutdown,
    task::{Context, Poll},
    time::{Duration, Instant},
};

use futures_timer::Delay;
use libp2p::{
    Multiaddr, PeerId,
    core::{ConnectedPoint, Endpoint, transport::PortUse},
    futures::FutureExt,
    swarm::{
        ConnectionClosed, ConnectionDenied, ConnectionId, FromSwarm, NetworkBehaviour, THandler,
        THandlerInEvent, THandlerOutEvent, ToSwarm,
    },
};

use super::{
    handshake_failure::{HandshakeFailure, HandshakeInfo, Reason},
    limits::{ConnectionLimits, Denied, Limits, PeerStatus, Preemption},
};
use crate::{
    address::ClientPrefix,
    behaviour::Behaviour,
    event::Event,
    program::{
        delegate::delegate_behaviour,
        net::{
            byte_counters::{ByteCounters, Pending},
            multiaddr::{Layer, listen_address},
            socket::Socket,
        },
    },
    relay::{connections::CloseReason, quota::Scope},
};

/// How often handshakes are checked against their time limits.
const CHECK_INTERVAL: Duration = Duration::from_millis(500);

/// The relay's behaviour behind the limits on connections.
pub struct Admission {
    /// The limits, and what counts towards them.
    pub limits: ConnectionLimits,
    counters: ByteCounters,
    /// What is known of each handshake, and its socket: a swarm task runs the handshake, and shutting down the socket
    /// ends it.
    handshakes: HashMap<ConnectionId, (HandshakeInfo, Option<Socket>)>,
    /// Whether the relay is in a private network.
    is_private: bool,
    /// The failure of the handshake whose end the swarm is about to report; `None` if it was a denial or a health check.
    pub failed: Option<HandshakeFailure>,
    /// Why the relay closed the connection whose end the swarm is about to report; `None` if it did not.
    pub closed: Option<CloseReason>,
    /// When handshakes are checked next; `None` while there are none.
    next_check: Option<Delay>,
    /// The connection that the swarm is about to establish, and the idle one to close for it (inner `None`: the peer's
    /// own longest silent one).
    preempted: Option<(ConnectionId, Option<ConnectionId>)>,
    /// The relay's behaviour.
    pub relay: Behaviour,
}

impl Admission {
    /// No connections yet; `counters` knows the sockets of those in their handshakes.
    pub fn new(limits: Limits, relay: Behaviour, counters: ByteCounters, is_private: bool) -> Self {
        Self {
            limits: ConnectionLimits::new(limits),
            counters,
            handshakes: HashMap::new(),
            is_private,
            failed: None,
            closed: None,
            next_check: None,
            preempted: None,
            relay,
        }
    }

    /// Admits a connection to its handshake; may drop another handshake for it.
    fn admit_handshake(
        &mut self,
        id: ConnectionId,
        local: &Multiaddr,
        remote: &Multiaddr,
    ) -> Result<(), Denied> {
        let (local_addr, send_back_addr) = (local.clone(), remote.clone());
        let pending = self.counters.get(&ConnectedPoint::Listener { local_addr, send_back_addr });
        // The rules are for clients, not for a proxy's health check. Without a counter, the connection has failed
        // already, for example without a proxy's header, which is the reason to report; or another one has the same
        // addresses, and the rules are checked after its handshake.
        let is_from_client = pending.as_ref().is_some_and(|pending| !pending.is_proxys_own);
        if is_from_client && !self.relay.relay.access().may_enter(None, remote) {
            return Err(Denied::Rules);
        }
        let prefix = ClientPrefix::of(remote);
        let held = |prefix| self.relay.relay.reservations.quota.held(Scope::Address(prefix));
        let slots = prefix.map_or(0, held);
        let progress = pending.as_ref().map(|pending| pending.progress.clone());
        // In a full subnet the address with the most connections makes room for one with fewer: at once, because a
        // connection counts towards its subnet from the start.
        let may_preempt = |full: &Scope| matches!(full, Scope::Subnet(_)) && progress.is_some();
        let full = self.limits.quota.full(prefix).filter(may_preempt);
        let idle = full.and_then(|full| self.idle_connection(full, prefix, false));
        let dropped = self.limits.admit(id, prefix, slots, progress, idle, Instant::now())?;
        if let Some(idle) = idle {
            self.relay.relay.close(idle, CloseReason::Preempted);
        }
        if let Some(dropped) = dropped {
            log::debug!("handshake dropped: connection {dropped} makes room for connection {id}");
            self.drop_handshake(dropped, Reason::Preempted);
        }
        if let Some(Pending { progress, socket, .. }) = pending {
            let layer = listen_address(local).map_or(Layer::Tcp, |(_, layer)| layer);
            let info =
                HandshakeInfo { progress, dropped: None, layer, is_private: self.is_private };
            self.handshakes.insert(id, (info, socket));
        }
        self.next_check.get_or_insert_with(|| Delay::new(CHECK_INTERVAL));
        Ok(())
    }

    /// Ends a handshake: its task reads EOF from the socket.
    fn drop_handshake(&mut self, id: ConnectionId, reason: Reason) {
        if let Some((info, socket)) = self.handshakes.get_mut(&id)
            && let Some(socket) = socket.take()
        {
            info.dropped = Some(reason);
            let _ = socket.get_ref().shutdown(Shutdown::Both); // fails if the peer closed it first
        }
    }

    /// Drops the handshakes that have exceeded their time limit, once per [`CHECK_INTERVAL`].
    fn poll_overdue(&mut self, cx: &mut Context<'_>) {
        while let Some(next_check) = &mut self.next_check
            && next_check.poll_unpin(cx).is_ready()
        {
            for overdue in self.limits.handshakes.take_overdue(Instant::now()) {
                log::debug!("handshake dropped: connection {overdue} exceeded its time limit");
                self.drop_handshake(overdue, Reason::Timeout);
            }
            self.next_check = (!self.handshakes.is_empty()).then(|| Delay::new(CHECK_INTERVAL));
        }
    }

    /// Admits a connection that has completed its handshake, by its peer.
    fn admit(&mut self, id: ConnectionId, peer: PeerId, remote: &Multiaddr) -> Result<(), Denied> {
        let relay = &self.relay.relay;
        if !relay.access().may_enter(Some(peer), remote) {
            return Err(Denied::Rules);
        }
        let (connections, reservations) = (&relay.connections, &relay.reservations);
        let count = connections.of(&peer).count();
        let closing = connections.of(&peer).filter(|(_, up)| up.closing.is_some()).count();
        let holds_slot = reservations.get(&peer).is_some();
        let status = PeerStatus { holds_slot, connections: count, closing };
        let live = reservations.taken() - reservations.in_grace();
        let idle = match self.limits.establish(id, status, live)? {
            Preemption::None => return Ok(()),
            Preemption::OwnConnection => None,
            Preemption::IdleConnection => {
                let prefix = ClientPrefix::of(remote);
                let idle = self.idle_connection(Scope::Total, prefix, holds_slot);
                Some(idle.ok_or(Denied::Connections)?)
            }
        };
        self.preempted = Some((id, idle));
        Ok(())
    }

    /// The idle connection under this cap to close for a new one of `prefix`: the longest idle one of the heaviest prefix.
    /// For a peer without a slot, only one of a prefix with more connections than `prefix`. Connections that the relay has
    /// dialed do not count towards the cap, so closing one would make no room.
    fn idle_connection(
        &self,
        full: Scope,
        prefix: Option<ClientPrefix>,
        holds_slot: bool,
    ) -> Option<ConnectionId> {
        let quota = &self.limits.quota;
        let idle = self.relay.relay.idle_without_slot();
        let idle = idle.filter(|(id, other)| {
            full.covers(other.origin.prefix) && self.limits.established.contains(id)
        });
        let candidates =
            idle.filter(|(_, other)| holds_slot || quota.yields(other.origin.prefix, prefix));
        let heaviest = candidates
            .max_by_key(|(_, other)| (quota.load(other.origin.prefix), Reverse(other.idle_since)));
        heaviest.map(|(connection, _)| connection)
    }

    /// Closes the connection that makes room for this one, once this one is up: so a peer's slot can move from its old
    /// connection.
    fn preempt(&mut self, id: ConnectionId, peer: PeerId) {
        let relay = &mut self.relay.relay;
        match self.preempted.take_if(|(admitted, _)| *admitted == id) {
            Some((_, Some(idle))) => relay.close(idle, CloseReason::Preempted),
            Some((_, None)) => relay.close_longest_silent_of(peer, id, Instant::now()),
            None => {}
        }
    }
}

impl NetworkBehaviour for Admission {
    type ConnectionHandler = THandler<Behaviour>;
    type ToSwarm = Event;

    delegate_behaviour!(relay:
        handle_established_outbound_connection, on_connection_handler_event);

    fn handle_pending_inbound_connection(
        &mut self,
        id: ConnectionId,
        local: &Multiaddr,
        remote: &Multiaddr,
    ) -> Result<(), ConnectionDenied> {
        self.admit_handshake(id, local, remote).map_err(ConnectionDenied::new)
    }

    fn handle_established_inbound_connection(
        &mut self,
        id: ConnectionId,
        peer: PeerId,
        local: &Multiaddr,
        remote: &Multiaddr,
    ) -> Result<THandler<Self>, ConnectionDenied> {
        self.handshakes.remove(&id);
        self.admit(id, peer, remote).map_err(ConnectionDenied::new)?;
        self.relay.handle_established_inbound_connection(id, peer, local, remote)
    }

    fn on_swarm_event(&mut self, event: FromSwarm<'_>) {
        match event {
            FromSwarm::ConnectionClosed(ConnectionClosed { connection_id, .. }) => {
                let up = self.relay.relay.connections.get(connection_id);
                self.closed = up.and_then(|up| up.closing);
                self.limits.remove(connection_id);
            }
            FromSwarm::ListenFailure(failed) => {
                let info = self.handshakes.remove(&failed.connection_id);
                self.failed = info.and_then(|(info, _)| HandshakeFailure::of(failed.error, &info));
                self.limits.remove(failed.connection_id);
            }
            _ => {}
        }
        self.relay.on_swarm_event(event);
        if let FromSwarm::ConnectionEstablished(up) = event {
            self.preempt(up.connection_id, up.peer_id);
        }
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<ToSwarm<Event, THandlerInEvent<Self>>> {
        self.poll_overdue(cx);
        self.relay.poll(cx)
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use libp2p::{
        identity::Keypair,
        multiaddr::Protocol,
        swarm::{ListenError, ListenFailure, behaviour::ConnectionEstablished},
    };

    use super::*;
    use crate::config::Config;

    fn admission(limits: Limits) -> Admission {
        let relay = Behaviour::new(Keypair::generate_ed25519(), Config::default()).unwrap();
        Admission::new(limits, relay, ByteCounters::default(), false)
    }

    /// A connection from 192.0.2.1 that completes its handshake.
    fn connect(admission: &mut Admission, n: usize) -> Result<(), ConnectionDenied> {
        let (id, [local, remote]) = (ConnectionId::new_unchecked(n), addresses());
        admission.handle_pending_inbound_connection(id, &local, &remote)?;
        admission
            .handle_established_inbound_connection(id, PeerId::random(), &local, &remote)
            .map(drop)
    }

    /// A connection from this address begins its handshake. Returns its ends.
    fn begin(
        admission: &mut Admission,
        n: usize,
        from: [u8; 4],
    ) -> Result<[Multiaddr; 2], ConnectionDenied> {
        let [local, _] = addresses();
        let from = Multiaddr::from(Ipv4Addr::from(from)).with(Protocol::Tcp(n as u16 + 1));
        let [to, client] = [&local, &from].map(|it| listen_address(it).unwrap().0);
        let _counted = admission.counters.count((), Some(to), client, None);
        let id = ConnectionId::new_unchecked(n);
        admission.handle_pending_inbound_connection(id, &local, &from)?;
        Ok([local, from])
    }

    /// A connection from 192.0.2.`host` comes up.
    fn come_up(admission: &mut Admission, n: usize, host: u8) -> Result<(), ConnectionDenied> {
        let (connection_id, peer_id) = (ConnectionId::new_unchecked(n), PeerId::random());
        let (id, peer) = (connection_id, peer_id);
        let [local_addr, send_back_addr] = begin(admission, n, [192, 0, 2, host])?;
        let up =
            admission.handle_established_inbound_connection(id, peer, &local_addr, &send_back_addr);
        up.map(drop)?;
        admission.on_swarm_event(FromSwarm::ConnectionEstablished(ConnectionEstablished {
            peer_id,
            connection_id,
            endpoint: &ConnectedPoint::Listener { local_addr, send_back_addr },
            failed_addresses: &[],
            other_established: 0,
        }));
        Ok(())
    }

    /// The swarm reports a connection that was denied.
    fn fail(admission: &mut Admission, n: usize, cause: ConnectionDenied) {
        let [local_addr, send_back_addr] = &addresses();
        admission.on_swarm_event(FromSwarm::ListenFailure(ListenFailure {
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
    fn a_connection_denied_before_or_after_its_handshake_stops_counting() {
        let mut admission = admission(Limits {
            max_connections: 1,
            max_connections_per_peer: 1,
            max_connections_per_ip: Some(2),
            max_connections_per_subnet: None,
            max_handshakes: 1,
        });
        connect(&mut admission, 0).unwrap();
        // Admitted, in their handshakes, scopes.
        assert_eq!(admission.limits.counts(), [1, 0, 3]);
        for n in 1..9 {
            let denied = connect(&mut admission, n).unwrap_err();
            // The total denies it, not the address or the handshakes: earlier ones no longer count.
            assert_eq!(kind(&denied), Some("too many connections"));
            assert_eq!(admission.limits.counts(), [2, 0, 3], "until the swarm reports it");
            // Meanwhile the next one is denied before its handshake.
            let of_address = connect(&mut admission, n + 100).unwrap_err();
            assert_eq!(kind(&of_address), Some("too many connections of the address"));
            fail(&mut admission, n + 100, of_address);
            fail(&mut admission, n, denied);
            assert_eq!(admission.limits.counts(), [1, 0, 3]);
        }
        fail(&mut admission, 0, ConnectionDenied::new(Denied::Connections)); // by another behaviour
        assert_eq!(admission.limits.counts(), [0; 3]);
        connect(&mut admission, 9).unwrap();
    }

    #[test]
    fn two_addresses_with_idle_connections_do_not_keep_the_others_of_their_subnet_out() {
        let mut admission = admission(Limits {
            max_connections_per_ip: Some(4),
            max_connections_per_subnet: Some(8),
            ..Limits::default()
        });
        (0..8).for_each(|n| come_up(&mut admission, n, 1 + (n / 4) as u8).unwrap());
        (8..10).for_each(|n| come_up(&mut admission, n, 3).unwrap());
        // The longest idle one of each.
        let all = &admission.relay.relay.connections;
        let closing = all.iter().filter(|(_, up)| up.closing.is_some()).map(|(id, _)| id);
        let mut closing: Vec<_> = closing.collect();
        closing.sort_unstable();
        assert_eq!(closing, [0, 4].map(ConnectionId::new_unchecked));
        // That was its fair share.
        let denied = come_up(&mut admission, 10, 3).unwrap_err();
        assert_eq!(kind(&denied), Some("too many connections of the subnet"));
        closing.into_iter().for_each(|id| admission.limits.remove(id));
        assert_eq!(admission.limits.counts(), [8, 0, 5]);
    }

    #[test]
    fn a_connection_that_is_denied_closes_no_idle_one_of_its_subnet() {
        let mut admission = admission(Limits {
            max_connections_per_subnet: Some(4),
            max_handshakes: 1,
            ..Limits::default()
        });
        (0..4).for_each(|n| come_up(&mut admission, n, 1).unwrap());
        begin(&mut admission, 9, [198, 51, 100, 1]).unwrap();
        let denied = come_up(&mut admission, 10, 2).unwrap_err();
        assert_eq!(kind(&denied), Some("too many handshakes"));
        assert!(admission.relay.relay.connections.iter().all(|(_, up)| up.closing.is_none()));
    }

    #[test]
    fn a_dialed_connection_is_not_closed_to_admit_another_one() {
        let mut admission = admission(Limits { max_connections: 3, ..Limits::default() });
        (0..3).for_each(|n| connect(&mut admission, n).unwrap());
        // An idle connection to a peer in the subnet that has the most connections.
        let (connection_id, peer_id) = (ConnectionId::new_unchecked(3), PeerId::random());
        let [_, address] = addresses();
        let (role, port_use) = (Endpoint::Dialer, PortUse::Reuse);
        let handler = admission.handle_established_outbound_connection(
            connection_id,
            peer_id,
            &address,
            role,
            port_use,
        );
        assert!(handler.is_ok());
        let endpoint = &ConnectedPoint::Dialer { address, role_override: role, port_use };
        admission.on_swarm_event(FromSwarm::ConnectionEstablished(ConnectionEstablished {
            peer_id,
            connection_id,
            endpoint,
            failed_addresses: &[],
            other_established: 0,
        }));
        let other = "/ip4/198.51.100.1/tcp/1".parse().unwrap();
        let denied = admission.admit(ConnectionId::new_unchecked(4), PeerId::random(), &other);
        assert_eq!(denied, Err(Denied::Connections));
    }
}
