//! Identify: sends each peer the relay's key, protocols and addresses, and reads at which address the peer reached the
//! relay.
//!
//! Answers requests over `/ipfs/id/1.0.0`, sends one to each peer that connects, reads pushes over
//! `/ipfs/id/push/1.0.0`, and pushes when the node asks for it. The messages are in `identify/message.rs`.
//!
//! Not libp2p-identify, because version 0.48 stores a peer's whole message, up to 300 KiB a connection, and sends a
//! message of any size, although rust-libp2p rejects more than 4,096 bytes and go-libp2p more than 8,192.

mod message;

use std::{
    collections::{HashSet, VecDeque},
    mem,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll, ready},
    time::{Duration, Instant},
    vec,
};

use futures_timer::Delay;
use libp2p::{
    Multiaddr, PeerId, Stream, StreamProtocol,
    core::{
        Endpoint,
        transport::PortUse,
        upgrade::{ReadyUpgrade, SelectUpgrade},
    },
    futures::{
        FutureExt, StreamExt,
        future::{BoxFuture, Either},
        stream::FuturesUnordered,
    },
    identity::PublicKey,
    swarm::{
        ConnectionDenied, ConnectionHandler, ConnectionHandlerEvent, ConnectionId, FromSwarm,
        NetworkBehaviour, NotifyHandler, SubstreamProtocol, SupportedProtocols, THandler,
        THandlerInEvent, THandlerOutEvent, ToSwarm,
        handler::{ConnectionEvent, ProtocolSupport},
    },
};

#[cfg(feature = "check")]
pub use self::message::Identify as Message;
pub use self::message::Info;
use self::message::TIME_LIMIT;
use super::{admission::scoped_rates::Bucket, multiaddr::without_peer};
use crate::relay::rates::Rate;

const IDENTIFY: StreamProtocol = StreamProtocol::new("/ipfs/id/1.0.0");
const PUSH: StreamProtocol = StreamProtocol::new("/ipfs/id/push/1.0.0");

type Ready = ReadyUpgrade<StreamProtocol>;

/// How long a peer may take to negotiate the protocol of a stream.
const NEGOTIATION_TIMEOUT: Duration = Duration::from_secs(5);

/// How many peers are sent a push at once, and how long before the next ones: a changed address wakes a thousand phones
/// within seconds, but not all in the same instant.
const PUSHES_AT_ONCE: usize = 32;
const PUSH_PAUSE: Duration = Duration::from_millis(100);

/// How many exchanges may be in progress on one connection when a request is answered. One beyond that is reset.
const MAX_EXCHANGES: usize = 4;

/// How many pushes of one peer are read: 20 at once, then one each 3 s. A push beyond that is reset, and so is one that
/// arrives while another is being read.
const PUSHES: Rate = Rate { burst: 20, spacing: Duration::from_secs(3) };

/// Identify on all connections.
pub struct Identify {
    shared: Arc<Shared>,
    /// The peers that have yet to be sent a push.
    pushing: vec::IntoIter<PeerId>,
    /// How many were sent one since the last pause.
    pushed: usize,
    pause: Option<Delay>,
    identified: VecDeque<Identified>,
}

/// A peer's message arrived: the answer to the request after connecting, or a push.
#[derive(Debug)]
pub struct Identified {
    /// The connection that it arrived on.
    pub connection: ConnectionId,
    /// The sender.
    #[cfg(feature = "dht")]
    pub peer: PeerId,
    /// What the message says.
    pub info: Info,
}

/// What the handlers of all connections send, and which protocol they look for.
struct Shared {
    public_key: Vec<u8>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// The relay's addresses, best first.
    addresses: Vec<Multiaddr>,
    /// Whether it was logged that not all of them fit into a message.
    is_overflow_logged: bool,
    /// The protocol of the DHT that the relay is in.
    dht: Option<StreamProtocol>,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The message for a connection with these addresses: the remote one is the observed address. If the relay knows no
    /// other address of its own, it sends the local one.
    fn message(
        &self,
        protocols: &SupportedProtocols,
        observed: &Multiaddr,
        local: Option<&Multiaddr>,
    ) -> Vec<u8> {
        let mut state = self.state();
        let protocols = protocols.iter().map(AsRef::as_ref);
        let addresses = match local {
            Some(local) if state.addresses.is_empty() => std::slice::from_ref(local),
            _ => &state.addresses,
        };
        let (message, left_out) = message::encode(&self.public_key, addresses, protocols, observed);
        if left_out > 0 && !mem::replace(&mut state.is_overflow_logged, true) {
            let all = state.addresses.len();
            log::warn!(
                "identify message is full: {left_out} of {all} addresses left out; choose some with \
                 --announce"
            );
        }
        message
    }
}

impl Identify {
    /// Identify under this key. It sends no addresses until [`Identify::set_addresses`].
    pub fn new(public_key: &PublicKey) -> Self {
        let (public_key, state) = (public_key.encode_protobuf(), Mutex::default());
        Self {
            shared: Arc::new(Shared { public_key, state }),
            pushing: Vec::new().into_iter(),
            pushed: 0,
            pause: None,
            identified: VecDeque::new(),
        }
    }

    /// Reads from now on where peers listen, and whether they support this protocol of a DHT.
    #[cfg(feature = "dht")]
    pub fn set_dht(&mut self, protocol: StreamProtocol) {
        self.shared.state().dht = Some(protocol);
    }

    /// Sends these addresses from now on: as many as fit into a message, the first ones first. Returns whether they
    /// differ from those before.
    pub fn set_addresses(&mut self, addresses: Vec<Multiaddr>) -> bool {
        let mut state = self.shared.state();
        let has_changed = state.addresses != addresses;
        if has_changed {
            // A wildcard listener's addresses come and go one by one: that is one overflow.
            state.is_overflow_logged &= state.addresses.iter().any(|old| addresses.contains(old));
            state.addresses = addresses;
        }
        has_changed
    }

    /// Pushes the relay's message to `peers`, over one connection of each, in place of the peers that still wait for an
    /// earlier push.
    pub fn push(&mut self, peers: Vec<PeerId>) {
        self.pushing = peers.into_iter();
    }

    fn handler(&self, remote: &Multiaddr, local: Option<&Multiaddr>) -> Handler {
        Handler {
            shared: Arc::clone(&self.shared),
            local: local
                .filter(|_| self.shared.state().addresses.is_empty())
                .cloned()
                .map(Box::new),
            remote: remote.clone(),
            protocols: SupportedProtocols::default(),
            tasks: FuturesUnordered::new(),
            pushes: Bucket::default(),
            dht_to_report: None,
            should_ask: true,
            should_push: false,
            is_pushing: false,
            is_reading_push: false,
            has_sent: false,
        }
    }
}

impl NetworkBehaviour for Identify {
    type ConnectionHandler = Handler;
    type ToSwarm = Identified;

    fn handle_established_inbound_connection(
        &mut self,
        _: ConnectionId,
        _: PeerId,
        local: &Multiaddr,
        remote: &Multiaddr,
    ) -> Result<THandler<Self>, ConnectionDenied> {
        Ok(self.handler(remote, Some(local)))
    }

    fn handle_established_outbound_connection(
        &mut self,
        _: ConnectionId,
        _: PeerId,
        remote: &Multiaddr,
        _: Endpoint,
        _: PortUse,
    ) -> Result<THandler<Self>, ConnectionDenied> {
        // A dialed address may end in the peer's id; an observed one does not.
        Ok(self.handler(&without_peer(remote), None))
    }

    fn on_swarm_event(&mut self, _: FromSwarm<'_>) {}

    fn on_connection_handler_event(
        &mut self,
        peer: PeerId,
        connection: ConnectionId,
        mut info: THandlerOutEvent<Self>,
    ) {
        // Drop addresses that end in another peer's id.
        info.listening.retain(|address| address.clone().with_p2p(peer).is_ok());
        self.identified.push_back(Identified {
            connection,
            #[cfg(feature = "dht")]
            peer,
            info,
        });
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<ToSwarm<Identified, THandlerInEvent<Self>>> {
        if let Some(identified) = self.identified.pop_front() {
            return Poll::Ready(ToSwarm::GenerateEvent(identified));
        }
        if self.pushed == PUSHES_AT_ONCE {
            ready!(self.pause.get_or_insert_with(|| Delay::new(PUSH_PAUSE)).poll_unpin(cx));
            (self.pushed, self.pause) = (0, None);
        }
        let Some(peer_id) = self.pushing.next() else {
            return Poll::Pending;
        };
        self.pushed += 1;
        Poll::Ready(ToSwarm::NotifyHandler { peer_id, handler: NotifyHandler::Any, event: Push })
    }
}

/// Identify on one connection. It stores nothing of what the peer sends.
pub struct Handler {
    shared: Arc<Shared>,
    /// The peer's address, sent as the observed one.
    remote: Multiaddr,
    /// The local address, if the peer opened the connection and the relay knew no other address of its own then.
    local: Option<Box<Multiaddr>>,
    /// The protocols that the connection's handlers support, sent to the peer.
    protocols: SupportedProtocols,
    tasks: FuturesUnordered<BoxFuture<'static, (Exchange, Option<Info>)>>,
    /// How many pushes may be read.
    pushes: Bucket,
    /// Whether the peer supports the DHT's protocol, until that is reported to the swarm.
    dht_to_report: Option<bool>,
    should_ask: bool,
    should_push: bool,
    is_pushing: bool,
    is_reading_push: bool,
    /// Whether the protocols were sent: if so, a change of them is pushed.
    has_sent: bool,
}

/// Has the handler send the peer the relay's message.
#[derive(Clone, Copy, Debug)]
pub struct Push;

/// The purpose of a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exchange {
    /// Answer the peer's request.
    Answer,
    /// Request the peer's message.
    Ask,
    /// Read the peer's push.
    ReadPush,
    /// Push the relay's message.
    Push,
}

impl Handler {
    fn on_push(&mut self, stream: Stream) {
        let is_free = !self.is_reading_push;
        if is_free && self.pushes.take(PUSHES, Duration::ZERO, Instant::now()).is_some() {
            self.is_reading_push = true;
            self.read(stream, Exchange::ReadPush);
        }
    }

    fn read(&mut self, stream: Stream, exchange: Exchange) {
        let dht = self.shared.state().dht.clone();
        let read = async move {
            let dht = dht.as_ref().map(AsRef::as_ref);
            (exchange, message::read(stream, dht).await.ok())
        };
        self.tasks.push(read.boxed());
    }

    fn send(&mut self, stream: Stream, exchange: Exchange) {
        self.has_sent = true;
        let message = self.shared.message(&self.protocols, &self.remote, self.local.as_deref());
        let send = async move {
            let _ = message::send(stream, &message).await; // the peer may ask again
            (exchange, None)
        };
        self.tasks.push(send.boxed());
    }

    fn on_ended(&mut self, exchange: Exchange) {
        self.is_reading_push &= exchange != Exchange::ReadPush;
        self.is_pushing &= exchange != Exchange::Push;
    }
}

type Event = ConnectionHandlerEvent<Ready, Exchange, Info>;

fn open(protocol: StreamProtocol, exchange: Exchange) -> Poll<Event> {
    let protocol = SubstreamProtocol::new(ReadyUpgrade::new(protocol), exchange);
    let protocol = protocol.with_timeout(TIME_LIMIT);
    Poll::Ready(ConnectionHandlerEvent::OutboundSubstreamRequest { protocol })
}

impl ConnectionHandler for Handler {
    type FromBehaviour = Push;
    type ToBehaviour = Info;
    type InboundProtocol = SelectUpgrade<Ready, Ready>;
    type OutboundProtocol = Ready;
    type InboundOpenInfo = ();
    type OutboundOpenInfo = Exchange;

    fn listen_protocol(&self) -> SubstreamProtocol<SelectUpgrade<Ready, Ready>> {
        let inbound = SelectUpgrade::new(ReadyUpgrade::new(IDENTIFY), ReadyUpgrade::new(PUSH));
        SubstreamProtocol::new(inbound, ()).with_timeout(NEGOTIATION_TIMEOUT)
    }

    fn on_behaviour_event(&mut self, _: Push) {
        self.should_push = true;
    }

    fn on_connection_event(
        &mut self,
        event: ConnectionEvent<SelectUpgrade<Ready, Ready>, Ready, (), Exchange>,
    ) {
        match event {
            ConnectionEvent::FullyNegotiatedInbound(inbound) => match inbound.protocol {
                Either::Left(stream) if self.tasks.len() < MAX_EXCHANGES => {
                    self.send(stream, Exchange::Answer);
                }
                Either::Left(_) => {}
                Either::Right(stream) => self.on_push(stream),
            },
            ConnectionEvent::FullyNegotiatedOutbound(outbound) => match outbound.info {
                Exchange::Push => self.send(outbound.protocol, Exchange::Push),
                exchange => self.read(outbound.protocol, exchange),
            },
            ConnectionEvent::DialUpgradeError(failed) => self.on_ended(failed.info),
            ConnectionEvent::LocalProtocolsChange(change) => {
                let has_changed = self.protocols.on_protocols_change(change);
                self.should_push |= has_changed && self.has_sent;
            }
            _ => {}
        }
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Event> {
        if mem::take(&mut self.should_ask) {
            return open(IDENTIFY, Exchange::Ask);
        }
        if let Some(is_supported) = self.dht_to_report.take()
            && let Some(dht) = self.shared.state().dht.clone()
        {
            let kind = if is_supported { ProtocolSupport::Added } else { ProtocolSupport::Removed };
            let support = kind(HashSet::from([dht]));
            return Poll::Ready(ConnectionHandlerEvent::ReportRemoteProtocols(support));
        }
        while let Poll::Ready(Some((exchange, info))) = self.tasks.poll_next_unpin(cx) {
            self.on_ended(exchange);
            if let Some(info) = info {
                self.dht_to_report = info.supports_dht;
                return Poll::Ready(ConnectionHandlerEvent::NotifyBehaviour(info));
            }
        }
        if self.should_push && !self.is_pushing {
            (self.should_push, self.is_pushing) = (false, true);
            return open(PUSH, Exchange::Push);
        }
        Poll::Pending
    }
}

#[cfg(test)]
mod tests {
    use libp2p::{
        futures::task::noop_waker_ref,
        identity::Keypair,
        swarm::{StreamUpgradeError, handler::DialUpgradeError},
    };

    use super::*;

    fn identify() -> Identify {
        Identify::new(&Keypair::generate_ed25519().public())
    }

    /// The stream that the handler requests; `None` if it requests none.
    fn requested(handler: &mut Handler) -> Option<Exchange> {
        match handler.poll(&mut Context::from_waker(noop_waker_ref())) {
            Poll::Ready(ConnectionHandlerEvent::OutboundSubstreamRequest { protocol }) => {
                Some(*protocol.info())
            }
            Poll::Ready(other) => panic!("{other:?}"),
            Poll::Pending => None,
        }
    }

    #[test]
    fn pushes_requested_during_a_push_are_merged_into_one() {
        let mut handler = identify().handler(&Multiaddr::empty(), None);
        assert_eq!(requested(&mut handler), Some(Exchange::Ask));
        assert_eq!(requested(&mut handler), None);
        handler.on_behaviour_event(Push);
        assert_eq!(requested(&mut handler), Some(Exchange::Push));
        for _ in 0..9 {
            handler.on_behaviour_event(Push);
            assert_eq!(requested(&mut handler), None);
        }
        handler.tasks.push(async { (Exchange::Push, None) }.boxed());
        assert_eq!(requested(&mut handler), Some(Exchange::Push));
        assert_eq!(requested(&mut handler), None);
        // A peer that does not support it.
        let error = StreamUpgradeError::NegotiationFailed;
        let failed = DialUpgradeError { info: Exchange::Push, error };
        handler.on_connection_event(ConnectionEvent::DialUpgradeError(failed));
        assert_eq!(requested(&mut handler), None);
        handler.on_behaviour_event(Push);
        assert_eq!(requested(&mut handler), Some(Exchange::Push));
    }

    #[test]
    fn left_out_addresses_are_logged_once_for_each_new_list() {
        let mut identify = identify();
        let many = |port| -> Vec<Multiaddr> {
            let one = |n| format!("/ip6/2a00:1450::{n:x}/tcp/{port}").parse().expect("a multiaddr");
            (0..1000u16).map(one).collect()
        };
        let (shared, protocols) = (Arc::clone(&identify.shared), SupportedProtocols::default());
        assert!(identify.set_addresses(many(1)) && !shared.state().is_overflow_logged);
        let message = shared.message(&protocols, &Multiaddr::empty(), None);
        assert!((4000..=4098).contains(&message.len()) && shared.state().is_overflow_logged);
        assert!(!identify.set_addresses(many(1)) && shared.state().is_overflow_logged);
        assert!(identify.set_addresses(many(2)) && !shared.state().is_overflow_logged);
        shared.message(&protocols, &Multiaddr::empty(), None);
        for one_by_one in [&many(2)[1..], &many(2), &many(2)[..999]] {
            assert!(identify.set_addresses(one_by_one.to_vec()));
            assert!(shared.state().is_overflow_logged);
        }
        assert!(identify.set_addresses(Vec::new()));
        shared.message(&protocols, &Multiaddr::empty(), None);
        assert!(!shared.state().is_overflow_logged);
    }

    #[test]
    fn pushes_are_sent_in_batches() {
        let mut identify = identify();
        identify.push((0..PUSHES_AT_ONCE + 1).map(|_| PeerId::random()).collect());
        let cx = &mut Context::from_waker(std::task::Waker::noop());
        let mut sent = 0;
        while identify.poll(cx).is_ready() {
            sent += 1;
        }
        assert_eq!(sent, PUSHES_AT_ONCE);
        while identify.poll(cx).is_pending() {
            std::thread::yield_now();
        }
        assert!(identify.poll(cx).is_pending(), "that was the last");
    }

    #[test]
    fn without_a_known_address_the_local_one_is_sent() {
        let mut identify = identify();
        let [local, known]: [Multiaddr; 2] =
            ["/ip4/10.0.0.1/tcp/4001", "/ip4/8.8.8.8/tcp/1"].map(|text| text.parse().unwrap());
        let sends = |identify: &Identify, address: &Multiaddr| {
            let protocols = SupportedProtocols::default();
            let message = identify.shared.message(&protocols, &Multiaddr::empty(), Some(&local));
            message.windows(address.len()).any(|bytes| bytes == address.as_ref())
        };
        assert!(sends(&identify, &local));
        identify.set_addresses(vec![known.clone()]);
        assert!(sends(&identify, &known) && !sends(&identify, &local));
    }

    #[test]
    fn addresses_that_end_in_another_peer_are_dropped() {
        let mut identify = identify();
        let peer = PeerId::random();
        let plain: Multiaddr = "/ip4/1.2.3.4/tcp/1".parse().expect("a multiaddr");
        let listening = [plain.clone(), plain.clone().with_p2p(peer).expect("it had none")];
        let other = plain.with_p2p(PeerId::random()).expect("it had none");
        let info = Info { listening: [&listening[..], &[other]].concat(), ..Info::default() };
        identify.on_connection_handler_event(peer, ConnectionId::new_unchecked(1), info);
        let identified = identify.poll(&mut Context::from_waker(noop_waker_ref()));
        let Poll::Ready(ToSwarm::GenerateEvent(identified)) = identified else {
            panic!("{identified:?}");
        };
        assert_eq!(identified.info.listening, listening);
    }
}
