//! The behaviour in a swarm of an embedder: on tokio, over libp2p's TCP and yamux, beside other behaviours on the same
//! connections.

use std::{
    collections::{HashMap, HashSet},
    future::pending,
    pin::pin,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use crate::common::{
    Client, HOP, Relay, TEST_TIMEOUT, assert_relayed,
    by_hand::send,
    circuit,
    client_process::Process,
    log_recorder,
    messages::{self, HopMessage, NO_RESERVATION, OK, PERMISSION_DENIED, connect, reserve},
    read_bytes, read_to_end, source_and_target_at,
    swarms::{self, ECHO, drive},
    within,
};
use libp2p::{
    Multiaddr, PeerId, StreamProtocol, Swarm, SwarmBuilder,
    core::{
        muxing::StreamMuxerBox,
        transport::{self, Transport},
        upgrade::Version,
    },
    futures::{AsyncReadExt, AsyncWriteExt, StreamExt},
    identify,
    multiaddr::Protocol,
    noise, ping, relay,
    swarm::{ConnectionId, NetworkBehaviour, SwarmEvent},
    tcp, yamux,
};
use relaylet::{Access, ActivityCounter, CircuitEnd, Config, Event, FreedReason, Permission};
use tokio::sync::mpsc;

/// A second protocol, which keeps a connection busy.
const BUSY: StreamProtocol = StreamProtocol::new("/test/busy/1.0.0");

/// The behaviours of the embedder's swarm: a relay and several others.
#[derive(NetworkBehaviour)]
struct Composed {
    relay: relaylet::Behaviour,
    client: relay::client::Behaviour,
    ping: ping::Behaviour,
    identify: identify::Behaviour,
    stream: libp2p_stream::Behaviour,
}

/// The swarm above, running in a task.
struct Embedded {
    address: Multiaddr,
    peer: PeerId,
    control: libp2p_stream::Control,
    events: mpsc::UnboundedReceiver<ComposedEvent>,
    calls: mpsc::UnboundedSender<Call>,
}

/// What the embedder does with the behaviour.
enum Call {
    Release(PeerId),
    RecordActivity(PeerId),
    Track(PeerId, ActivityCounter),
    Serve(Option<bool>),
    ConfirmAddress(Multiaddr),
    With(Box<dyn FnOnce(&mut relaylet::Behaviour) + Send>),
}

impl Call {
    /// Calls the behaviour; `connections` has one connection of each peer.
    fn run(self, swarm: &mut Swarm<Composed>, connections: &HashMap<PeerId, ConnectionId>) {
        let relay = &mut swarm.behaviour_mut().relay;
        match self {
            Self::Release(peer) => assert!(relay.release(peer)),
            Self::RecordActivity(peer) => relay.record_activity(peer),
            Self::Track(peer, activity) => relay.track(connections[&peer], activity),
            Self::Serve(serving) => relay.set_serving(serving),
            Self::ConfirmAddress(address) => swarm.add_external_address(address),
            Self::With(call) => call(relay),
        }
    }
}

impl Embedded {
    async fn start(config: Config) -> Self {
        Self::start_listening(config, "/ip4/127.0.0.1/tcp/0".parse().unwrap()).await
    }

    async fn start_listening(config: Config, listen: Multiaddr) -> Self {
        Self::run(swarm(config), listen).await
    }

    async fn run(mut swarm: Swarm<Composed>, listen: Multiaddr) -> Self {
        let address = swarms::listen(&mut swarm, listen).await;
        let peer = *swarm.local_peer_id();
        let control = swarm.behaviour().stream.new_control();
        let (sender, events) = mpsc::unbounded_channel();
        let (calls, mut received) = mpsc::unbounded_channel::<Call>();
        tokio::spawn(async move {
            let mut connections = HashMap::new();
            loop {
                tokio::select! {
                    event = swarm.select_next_some() => match event {
                        SwarmEvent::Behaviour(event) => drop(sender.send(event)),
                        SwarmEvent::ConnectionEstablished { peer_id, connection_id, .. } => {
                            connections.insert(peer_id, connection_id);
                        }
                        _ => {}
                    },
                    Some(call) = received.recv() => {
                        call.run(&mut swarm, &connections);
                    }
                }
            }
        });
        Self { address: address.with_p2p(peer).unwrap(), peer, control, events, calls }
    }

    async fn connect(&self) -> Client {
        Client::connect_to(&self.address).await
    }

    /// Two clients, the second of which holds a slot.
    async fn source_and_target(&self) -> (Client, Client) {
        source_and_target_at(&self.address).await
    }

    /// Calls the behaviour, and returns what `call` returns.
    async fn call<T: Send + 'static>(
        &self,
        call: impl FnOnce(&mut relaylet::Behaviour) -> T + Send + 'static,
    ) -> T {
        let (sender, result) = tokio::sync::oneshot::channel();
        let call = Call::With(Box::new(|relay| drop(sender.send(call(relay)))));
        assert!(self.calls.send(call).is_ok());
        within(result).await.expect("the swarm runs")
    }

    /// Waits for an event from which `wanted` returns something.
    async fn wait_for_event<T>(&mut self, mut wanted: impl FnMut(ComposedEvent) -> Option<T>) -> T {
        within(async {
            loop {
                let event = self.events.recv().await.expect("the swarm runs");
                if let Some(found) = wanted(event) {
                    return found;
                }
            }
        })
        .await
    }

    /// Waits until a peer times out; returns it.
    async fn next_timed_out(&mut self) -> PeerId {
        self.wait_for_event(|event| match event {
            ComposedEvent::Relay(Event::PeerSilent { peer, .. }) => Some(peer),
            _ => None,
        })
        .await
    }
}

fn swarm(config: Config) -> Swarm<Composed> {
    swarm_over(config, |tcp| tcp)
}

/// The boxed transport of an embedder: TCP, Noise, yamux.
type BoxedTransport = transport::Boxed<(PeerId, StreamMuxerBox)>;

fn swarm_over(config: Config, change: fn(BoxedTransport) -> BoxedTransport) -> Swarm<Composed> {
    SwarmBuilder::with_new_identity()
        .with_tokio()
        .with_other_transport(|keypair| {
            let tcp = tcp::tokio::Transport::new(tcp::Config::default())
                .upgrade(Version::V1Lazy)
                .authenticate(noise::Config::new(keypair)?)
                .multiplex(yamux::Config::default())
                .boxed();
            Ok(change(tcp))
        })
        .unwrap()
        .with_relay_client(noise::Config::new, yamux::Config::default)
        .unwrap()
        .with_behaviour(|keypair, client| {
            Ok(Composed {
                relay: relaylet::Behaviour::new(keypair.clone(), config)?,
                client,
                ping: ping::Behaviour::new(
                    ping::Config::new().with_interval(Duration::from_millis(100)),
                ),
                identify: identify::Behaviour::new(identify::Config::new(
                    "test".into(),
                    keypair.public(),
                )),
                stream: libp2p_stream::Behaviour::new(),
            })
        })
        .unwrap()
        // Longer than any pause between two uses of a connection here, and short enough to see unused ones close.
        .with_swarm_config(|config| config.with_idle_connection_timeout(Duration::from_secs(1)))
        .build()
}

/// A transport whose received bytes count as activity.
fn counting(tcp: BoxedTransport) -> BoxedTransport {
    let counting = Transport::map(tcp, relaylet::count_activity);
    counting.map(|(peer, muxer), _| (peer, StreamMuxerBox::new(muxer))).boxed()
}

/// Relays beside libp2p's ping and a busy second protocol on the same connections.
async fn check_relaying(answer_ping: bool) {
    let mut config = Config::default();
    config.answer_ping = answer_ping;
    let mut embedded = Embedded::start(config).await;
    let mut alice = embedded.connect().await;
    let mut bob = embedded.connect().await;

    // Alice keeps the second protocol busy until the end of the test.
    let mut incoming = embedded.control.accept(BUSY).unwrap();
    tokio::spawn(async move {
        let (_, stream) = incoming.next().await.unwrap();
        let (mut reader, mut writer) = stream.split();
        libp2p::futures::io::copy(&mut reader, &mut writer).await
    });
    let (mut echoed, mut busy) = alice.open(BUSY).await.split();
    tokio::spawn(async move { while busy.write_all(&[1; 64 * 1024]).await.is_ok() {} });
    let (count, mut counted) = tokio::sync::watch::channel(0);
    tokio::spawn(async move {
        let mut buffer = vec![0; 64 * 1024];
        while let Ok(read @ 1..) = echoed.read(&mut buffer).await {
            count.send_modify(|count| *count += read);
        }
    });

    bob.reserve().await;
    let (mut there, mut back) = circuit(&mut alice, &mut bob).await;
    let before = *counted.borrow();
    for _ in 0..100 {
        assert_relayed(&mut there, &mut back, b"to bob").await;
        assert_relayed(&mut back, &mut there, b"to alice").await;
    }
    within(counted.wait_for(|now| *now > before + 1024 * 1024)).await.unwrap();

    // Pings in both directions work: the swarm's own, and those of the clients.
    let mut pings = 0;
    embedded
        .wait_for_event(|event| {
            if let ComposedEvent::Ping(ping::Event { result, .. }) = event {
                result.expect("every ping is answered");
                pings += 1;
            }
            (pings == 20).then_some(())
        })
        .await;
    let mut ping = alice.open(StreamProtocol::new("/ipfs/ping/1.0.0")).await;
    send(&mut ping, &[7; 32]).await;
    assert_eq!(read_bytes(&mut ping, 32).await, [7; 32]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_behaviour_relays_beside_ping_and_a_busy_protocol() {
    check_relaying(true).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_behaviour_relays_with_its_own_ping_disabled() {
    check_relaying(false).await;
}

#[tokio::test]
async fn events_report_peers_and_reasons() {
    let mut config = Config::default();
    config.max_reservations = 1;
    config.grace = Duration::ZERO;
    let mut embedded = Embedded::start(config).await;
    let mut alice = embedded.connect().await;
    let mut bob = embedded.connect().await;
    let (a, b) = (alice.peer, bob.peer);
    alice.reserve().await;
    bob.request(&reserve()).await;
    alice.reserve().await;
    alice.disconnect().await;
    let mut seen = Vec::new();
    embedded
        .wait_for_event(|event| {
            if let ComposedEvent::Relay(event) = event {
                seen.push(match event {
                    Event::ReservationAccepted { peer, renewed, .. } => (peer, renewed.to_string()),
                    Event::ReservationRefused { peer, reason, .. } => (peer, reason.to_string()),
                    Event::ReservationFreed { peer, reason, .. } => (peer, reason.to_string()),
                    other => panic!("{other}"),
                });
            }
            (seen.len() == 4).then_some(())
        })
        .await;
    let expected = [(a, "false"), (b, "all slots are taken"), (a, "true"), (a, "disconnected")];
    assert_eq!(seen, expected.map(|(peer, text)| (peer, text.to_owned())));
}

/// An app passes events on to several tasks, for example over a broadcast channel.
#[test]
fn events_can_be_cloned() {
    let event = Event::GraceBegan { peer: PeerId::random() };
    assert_eq!(event.clone().to_string(), event.to_string());
}

#[tokio::test]
async fn a_released_peer_loses_its_slot_and_circuits_at_once() {
    let mut embedded = Embedded::start(Config::default()).await;
    let (mut alice, mut bob) = embedded.source_and_target().await;
    let (mut there, mut back) = circuit(&mut alice, &mut bob).await;
    embedded.calls.send(Call::Release(bob.peer)).ok().unwrap();
    for end in [&mut there, &mut back] {
        let (bytes, _) = read_to_end(end).await;
        assert!(bytes.is_empty());
    }
    assert_eq!(alice.request(&connect(bob.peer)).await.status, NO_RESERVATION);
    let end = embedded
        .wait_for_event(|event| match event {
            ComposedEvent::Relay(Event::CircuitClosed { end, .. }) => Some(end.to_string()),
            _ => None,
        })
        .await;
    assert_eq!(end, "released");
}

// ---- Access that answers later

/// A store of members that takes 200 ms to answer.
#[derive(Clone, Default)]
struct Store(Arc<Mutex<HashSet<PeerId>>>);

impl Access for Store {
    fn may_reserve(&self, peer: PeerId, _: &Multiaddr) -> Permission {
        let members = Arc::clone(&self.0);
        Permission::Later(Box::pin(async move {
            tokio::time::sleep(Duration::from_millis(200)).await;
            members.lock().unwrap().contains(&peer).into()
        }))
    }

    fn may_connect(&self, source: PeerId, address: &Multiaddr, _: PeerId) -> Permission {
        self.may_reserve(source, address)
    }
}

#[tokio::test]
async fn a_store_that_takes_200_ms_decides_requests_and_a_later_denial_ends_slot_and_circuit() {
    let mut embedded = Embedded::start(Config::default()).await;
    let store = Store::default();
    let access = store.clone();
    embedded.call(move |relay| relay.set_access(access)).await;
    let mut alice = embedded.connect().await;
    let mut bob = embedded.connect().await;
    let mut stranger = embedded.connect().await;
    store.0.lock().unwrap().extend([alice.peer, bob.peer]);
    bob.reserve().await;
    bob.reserve().await;
    assert_eq!(stranger.request(&reserve()).await.status, PERMISSION_DENIED);
    assert_eq!(stranger.request(&connect(bob.peer)).await.status, PERMISSION_DENIED);
    let (mut there, mut back) = circuit(&mut alice, &mut bob).await;
    assert_relayed(&mut there, &mut back, b"to bob").await;

    store.0.lock().unwrap().remove(&bob.peer);
    embedded.call(|relay| relay.recheck_access()).await;
    assert!(read_to_end(&mut there).await.0.is_empty());
    let (mut freed, mut ended) = (None, None);
    embedded
        .wait_for_event(|event| {
            match event {
                ComposedEvent::Relay(Event::ReservationFreed { peer, reason, .. }) => {
                    freed = Some((peer, reason));
                }
                ComposedEvent::Relay(Event::CircuitClosed { end, .. }) => ended = Some(end),
                _ => {}
            }
            freed.zip(ended)
        })
        .await;
    assert_eq!(freed, Some((bob.peer, FreedReason::Denied)));
    assert_eq!(ended, Some(CircuitEnd::Denied));
}

/// Never answers. For each call, sends a receiver that ends when the future of the answer is dropped.
struct NeverAnswers(mpsc::UnboundedSender<mpsc::Receiver<()>>);

impl Access for NeverAnswers {
    fn may_reserve(&self, _: PeerId, _: &Multiaddr) -> Permission {
        let calls = self.0.clone();
        Permission::Later(Box::pin(async move {
            let (_open, dropped) = mpsc::channel(1);
            let _ = calls.send(dropped);
            pending().await
        }))
    }

    fn may_connect(&self, source: PeerId, address: &Multiaddr, _: PeerId) -> Permission {
        self.may_reserve(source, address)
    }
}

#[tokio::test]
async fn requests_without_an_answer_are_denied_at_the_deadline() {
    log_recorder::record();
    let mut embedded = Embedded::start(Config::default()).await;
    let (sender, mut calls) = mpsc::unbounded_channel();
    embedded.call(|relay| relay.set_access(NeverAnswers(sender))).await;
    let (mut alice, mut bob) = (embedded.connect().await, embedded.connect().await);
    let (start, requests) = (Instant::now(), [reserve(), connect(PeerId::random())]);
    let [to_reserve, to_connect] = &requests;
    let (reserved, connected) = tokio::join!(alice.request(to_reserve), bob.request(to_connect));
    assert!(start.elapsed() >= Duration::from_secs(10), "{:?}", start.elapsed());
    for (request, answer) in requests.iter().zip([reserved, connected]) {
        assert_eq!(answer.status, PERMISSION_DENIED, "to {request:?}");
        let mut dropped = within(calls.recv()).await.expect("the store is asked");
        assert_eq!(within(dropped.recv()).await, None);
    }
    let mut refused = 0;
    embedded
        .wait_for_event(|event| {
            if let ComposedEvent::Relay(
                Event::ReservationRefused { reason, .. } | Event::CircuitRefused { reason, .. },
            ) = event
            {
                assert_eq!(reason, relaylet::Refused::Denied);
                refused += 1;
            }
            (refused == 2).then_some(())
        })
        .await;
    let expected = "access denied: no answer within the time limit";
    assert_eq!(log_recorder::count(|_, line| line == expected), 2);
}

#[tokio::test]
async fn a_client_that_disconnects_before_the_answer_leaves_no_state() {
    let mut embedded = Embedded::start(Config::default()).await;
    let (sender, mut calls) = mpsc::unbounded_channel();
    embedded.call(|relay| relay.set_access(NeverAnswers(sender))).await;
    for request in [reserve(), connect(PeerId::random())] {
        let mut client = embedded.connect().await;
        let mut dropped = tokio::select! {
            answer = client.request(&request) => panic!("{answer:?}"),
            dropped = within(calls.recv()) => dropped.expect("the store is asked"),
        };
        client.disconnect().await;
        assert_eq!(within(dropped.recv()).await, None, "the answer is dropped");
    }
    let no_connection = async {
        while embedded.call(|relay| relay.view().connections.count()).await > 0 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    within(no_connection).await;
    let counts = |relay: &mut relaylet::Behaviour| {
        let view = relay.view();
        (view.reservations.taken(), view.circuits.count(), view.waiting.len())
    };
    assert_eq!(embedded.call(counts).await, (0, 0, 0));
    while let Ok(event) = embedded.events.try_recv() {
        assert!(!matches!(event, ComposedEvent::Relay(_)), "{event:?}");
    }
}

/// First with `set_serving(None)`, then after each change, which identify pushes over open connections.
#[tokio::test]
async fn the_relay_supports_the_hop_protocol_only_while_it_serves() {
    // With ping supported twice, the swarm would not see that the hop protocol is gone.
    let config = Config::default().with(|config| config.answer_ping = false);
    let mut embedded = Embedded::start(config).await;
    let calls = embedded.calls.clone();
    let call = |call| assert!(calls.send(call).is_ok());
    call(Call::Serve(None));
    let mut client = swarm(Config::default());
    let mut busy = client.behaviour().stream.new_control().accept(BUSY).unwrap();
    let peer = *client.local_peer_id();
    client.dial(embedded.address.clone()).unwrap();
    let (sender, mut supports_hop) = mpsc::unbounded_channel();
    tokio::spawn(async move {
        loop {
            let event = client.select_next_some().await;
            if let SwarmEvent::Behaviour(ComposedEvent::Identify(event)) = event
                && let identify::Event::Received { info, .. } = event
            {
                let _ = sender.send(info.protocols.contains(&HOP));
            }
        }
    });
    assert_eq!(within(supports_hop.recv()).await, Some(false), "no address is confirmed");
    // Identify pushes changes once the exchange is over; a stream keeps the connection open.
    let identified = |event| match event {
        ComposedEvent::Identify(identify::Event::Received { .. }) => Some(()),
        _ => None,
    };
    embedded.wait_for_event(identified).await;
    let mut stream = within(embedded.control.open_stream(peer, BUSY)).await.unwrap();
    send(&mut stream, b"busy").await;
    let _other_end = within(busy.next()).await;
    for (change, serves) in [
        (Call::ConfirmAddress(embedded.address.clone()), true),
        (Call::Serve(Some(false)), false),
        (Call::Serve(Some(true)), true),
    ] {
        call(change);
        // Identify pushes a new address separately.
        while within(supports_hop.recv()).await != Some(serves) {}
    }
}

/// Timeouts of a few seconds.
fn short_timeouts() -> Config {
    let mut config = Config::default();
    config.heartbeat = Duration::from_secs(1);
    config.silence = Duration::from_secs(3);
    config.grace = Duration::ZERO;
    config
}

/// The embedder counts no bytes of connections: only the relay's own streams count as activity.
#[tokio::test]
async fn a_peer_that_refuses_ping_does_not_time_out() {
    log_recorder::record();
    let mut embedded = Embedded::start(short_timeouts()).await;
    let mut refuses = Client::connect_without_ping(&embedded.address).await;
    refuses.reserve().await;
    // It is probed again only after an answer, and its only answer is the refusal.
    wait_for_probes(refuses.peer, 6).await;
    refuses.reserve().await;
    let renewed = embedded
        .wait_for_event(|event| match event {
            ComposedEvent::Relay(Event::ReservationAccepted { renewed: true, .. }) => Some(true),
            ComposedEvent::Relay(Event::PeerSilent { .. } | Event::ReservationFreed { .. }) => {
                Some(false)
            }
            _ => None,
        })
        .await;
    assert!(renewed, "it never loses its slot");
}

#[tokio::test]
async fn without_close_silent_a_timed_out_peer_loses_only_slot_and_circuits() {
    let mut embedded = Embedded::start(short_timeouts()).await;
    let frozen = Process::start_and_reserve(&embedded.address).await;
    let mut source = embedded.connect().await;
    source.reserve().await; // keeps its connection open
    let (answer, mut circuit) = source.request_circuit(&connect(frozen.peer)).await;
    assert_eq!(answer.status, OK);
    let mut control = embedded.control.clone();
    let echo = within(control.open_stream(frozen.peer, ECHO)).await;
    let mut echo = echo.expect("another protocol on its connection");
    send(&mut echo, b"before").await;
    assert_eq!(read_bytes(&mut echo, 6).await, b"before");

    frozen.signal("STOP");
    assert_eq!(embedded.next_timed_out().await, frozen.peer);
    let (bytes, _) = read_to_end(&mut circuit).await;
    assert!(bytes.is_empty());
    let freed = embedded
        .wait_for_event(|event| match event {
            ComposedEvent::Relay(Event::ReservationFreed { peer, reason, .. }) => {
                Some((peer, reason))
            }
            _ => None,
        })
        .await;
    assert_eq!(freed, (frozen.peer, relaylet::FreedReason::Silent));
    let answer = source.request(&connect(frozen.peer)).await;
    assert_eq!(answer.status, NO_RESERVATION);

    frozen.signal("CONT");
    send(&mut echo, b"after").await;
    assert_eq!(read_bytes(&mut echo, 5).await, b"after");
}

#[tokio::test]
async fn without_close_silent_a_peer_that_answers_within_grace_keeps_its_slot() {
    let mut config = short_timeouts();
    config.grace = Duration::from_secs(600);
    let swarm = swarm_over(config, counting);
    let mut embedded = Embedded::run(swarm, "/ip4/127.0.0.1/tcp/0".parse().unwrap()).await;
    let frozen = Process::start_and_reserve(&embedded.address).await;
    frozen.signal("STOP");
    assert_eq!(embedded.next_timed_out().await, frozen.peer);
    // While another one times out, the swarm has the time to close the connection if nothing keeps it open.
    let other = Process::start_and_reserve(&embedded.address).await;
    other.signal("STOP");
    assert_eq!(embedded.next_timed_out().await, other.peer);
    frozen.signal("CONT");
    let live_again = embedded
        .wait_for_event(|event| match event {
            ComposedEvent::Relay(Event::ReservationAccepted { peer, renewed: true, .. }) => {
                Some(peer)
            }
            _ => None,
        })
        .await;
    assert_eq!(live_again, frozen.peer);
}

#[tokio::test]
async fn a_peer_with_recorded_activity_does_not_time_out() {
    check_kept_alive(|calls, peer| drop(calls.send(Call::RecordActivity(peer)))).await;
}

#[tokio::test]
async fn a_peer_with_activity_on_a_tracked_stream_does_not_time_out() {
    let activity = ActivityCounter::default();
    let mut tracked = false;
    check_kept_alive(|calls, peer| {
        if !std::mem::replace(&mut tracked, true) {
            drop(calls.send(Call::Track(peer, activity.clone())));
        }
        activity.add(1);
    })
    .await;
}

/// The embedder's transport counts bytes, so any protocol answers a probe; the peer never answers a ping.
#[tokio::test]
async fn with_a_counting_transport_a_peer_that_uses_another_protocol_does_not_time_out() {
    let swarm = swarm_over(short_timeouts(), counting);
    let mut embedded = Embedded::run(swarm, "/ip4/127.0.0.1/tcp/0".parse().unwrap()).await;
    let mut incoming = embedded.control.accept(BUSY).unwrap();
    tokio::spawn(async move {
        let (_, mut stream) = incoming.next().await.unwrap();
        let mut byte = [0];
        while stream.read_exact(&mut byte).await.is_ok() {}
    });
    let mut busy = Client::connect_without_ping(&embedded.address).await;
    let _unanswered = busy.accept(StreamProtocol::new("/ipfs/ping/1.0.0"));
    busy.reserve().await;
    let mut stream = busy.open(BUSY).await;
    tokio::spawn(async move {
        let mut interval = tokio::time::interval(Duration::from_millis(100));
        while stream.write_all(&[1]).await.is_ok() && stream.flush().await.is_ok() {
            interval.tick().await;
        }
    });
    // Two frozen clients time out meanwhile, and the busy one does not.
    for _ in 0..2 {
        let frozen = Process::start_and_reserve(&embedded.address).await;
        frozen.signal("STOP");
        assert_eq!(embedded.next_timed_out().await, frozen.peer);
    }
}

/// Freezes two clients and reports activity of one until the other one times out.
async fn check_kept_alive(mut report: impl FnMut(&mpsc::UnboundedSender<Call>, PeerId)) {
    let mut embedded = Embedded::start(short_timeouts()).await;
    let active = Process::start_and_reserve(&embedded.address).await;
    let silent_peer = Process::start_and_reserve(&embedded.address).await;
    active.signal("STOP");
    silent_peer.signal("STOP");
    let calls = embedded.calls.clone();
    let mut interval = tokio::time::interval(Duration::from_millis(100));
    let first = {
        let mut silent = pin!(embedded.next_timed_out());
        loop {
            tokio::select! {
                peer = &mut silent => break peer,
                _ = interval.tick() => report(&calls, active.peer),
            }
        }
    };
    assert_eq!(first, silent_peer.peer);
    // The reports have ended, so it times out, too.
    assert_eq!(embedded.next_timed_out().await, active.peer);
}

#[tokio::test]
async fn only_a_reservation_keeps_an_idle_connection_open() {
    let mut config = Config::default();
    config.reservation_ttl = Duration::from_secs(5);
    let embedded = Embedded::start(config).await;
    let mut alice = embedded.connect().await;
    let mut stranger = embedded.connect().await;
    alice.reserve().await;
    stranger.wait_for_connections(0).await; // by the swarm's idle timeout
    alice.reserve().await;
    alice.wait_for_connections(0).await; // when the term ends
}

#[tokio::test]
async fn requests_over_a_relayed_connection_are_denied() {
    let outer = Relay::start(&[]);
    let through_outer = outer.address.clone().with(Protocol::P2pCircuit);
    let inner = Embedded::start_listening(Config::default(), through_outer.clone()).await;

    // A client that knows the inner relay only by its address through the outer one.
    let mut client = swarm(Config::default());
    let mut control = client.behaviour().stream.new_control();
    client.dial(through_outer.with(Protocol::P2p(inner.peer))).unwrap();
    drive(client);
    for request in [reserve(), connect(PeerId::random())] {
        let stream = tokio::time::timeout(TEST_TIMEOUT, async {
            loop {
                // There is no connection until the dial succeeds.
                match control.open_stream(inner.peer, HOP).await {
                    Ok(stream) => return stream,
                    Err(_) => tokio::task::yield_now().await,
                }
            }
        });
        let mut stream = stream.await.unwrap();
        messages::write(&mut stream, &request).await;
        let answer: HopMessage = messages::read(&mut stream).await;
        assert_eq!(answer.status, PERMISSION_DENIED, "to {request:?}");
    }
}

/// Waits until a peer has been probed this many times.
async fn wait_for_probes(peer: PeerId, times: usize) {
    let expected = format!("probe sent: peer {peer}");
    let count = || log_recorder::count(|_, line| line == expected);
    let probed = async {
        while count() < times {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    within(probed).await;
}
