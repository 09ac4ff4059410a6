//! The behaviour in somebody else's swarm: on tokio, over libp2p's own TCP and yamux, beside other
//! behaviours on the same connections.

use std::{
    collections::HashMap,
    pin::pin,
    sync::{Mutex, Once},
    time::Duration,
};

use crate::common::{
    Client, HOP, PATIENCE, Relay,
    by_hand::send,
    circuit,
    messages::{self, HopMessage, connect, reserve},
    process::Process,
    read_bytes, read_to_end,
    swarms::{self, ECHO, drive},
    within,
};
use libp2p::{
    Multiaddr, PeerId, StreamProtocol, Swarm, SwarmBuilder,
    futures::{AsyncReadExt, AsyncWriteExt, StreamExt},
    identify,
    identity::Keypair,
    multiaddr::Protocol,
    noise, ping, relay,
    swarm::{ConnectionId, NetworkBehaviour, SwarmEvent},
    tcp, yamux,
};
use relaylet::{ActivityCounter, Config, Event};
use tokio::sync::mpsc;

/// A second protocol, which keeps the connection busy.
const BUSY: StreamProtocol = StreamProtocol::new("/test/busy/1.0.0");

/// A swarm of one's own: a relay, and much else.
#[derive(NetworkBehaviour)]
struct Parts {
    relay: relaylet::Behaviour,
    client: relay::client::Behaviour,
    ping: ping::Behaviour,
    identify: identify::Behaviour,
    stream: libp2p_stream::Behaviour,
}

/// The swarm above, running.
struct Embedded {
    address: Multiaddr,
    peer: PeerId,
    control: libp2p_stream::Control,
    events: mpsc::UnboundedReceiver<PartsEvent>,
    orders: mpsc::UnboundedSender<Order>,
}

/// What its owner wants of it.
enum Order {
    Release(PeerId),
    Heard(PeerId),
    ListenTo(PeerId, ActivityCounter),
}

impl Order {
    /// Carries it out; `connections` has one of each peer.
    fn carry_out(
        self,
        relay: &mut relaylet::Behaviour,
        connections: &HashMap<PeerId, ConnectionId>,
    ) {
        match self {
            Self::Release(peer) => assert!(relay.release(peer)),
            Self::Heard(peer) => relay.record_activity(peer),
            Self::ListenTo(peer, signs) => relay.track(connections[&peer], signs),
        }
    }
}

impl Embedded {
    async fn start(config: Config) -> Self {
        Self::start_listening(config, "/ip4/127.0.0.1/tcp/0".parse().unwrap()).await
    }

    async fn start_listening(config: Config, listen: Multiaddr) -> Self {
        let mut swarm = swarm(config);
        let address = swarms::listen(&mut swarm, listen).await;
        let peer = *swarm.local_peer_id();
        let control = swarm.behaviour().stream.new_control();
        let (tell, events) = mpsc::unbounded_channel();
        let (orders, mut ordered) = mpsc::unbounded_channel::<Order>();
        tokio::spawn(async move {
            let mut connections = HashMap::new();
            loop {
                tokio::select! {
                    event = swarm.select_next_some() => match event {
                        SwarmEvent::Behaviour(event) => drop(tell.send(event)),
                        SwarmEvent::ConnectionEstablished { peer_id, connection_id, .. } => {
                            connections.insert(peer_id, connection_id);
                        }
                        _ => {}
                    },
                    Some(order) = ordered.recv() => {
                        order.carry_out(&mut swarm.behaviour_mut().relay, &connections);
                    }
                }
            }
        });
        Self { address: address.with_p2p(peer).unwrap(), peer, control, events, orders }
    }

    async fn connect(&self) -> Client {
        let keypair = Keypair::generate_ed25519();
        Client::connect_as(keypair, &self.address, crate::common::Security::Noise).await
    }

    /// Waits for an event.
    async fn until<T>(&mut self, mut wanted: impl FnMut(PartsEvent) -> Option<T>) -> T {
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

    /// Waits until a peer is judged silent; whose turn it was.
    async fn next_silent(&mut self) -> PeerId {
        self.until(|event| match event {
            PartsEvent::Relay(Event::PeerSilent { peer, .. }) => Some(peer),
            _ => None,
        })
        .await
    }
}

fn swarm(config: Config) -> Swarm<Parts> {
    SwarmBuilder::with_new_identity()
        .with_tokio()
        .with_tcp(tcp::Config::default(), noise::Config::new, yamux::Config::default)
        .unwrap()
        .with_relay_client(noise::Config::new, yamux::Config::default)
        .unwrap()
        .with_behaviour(|keypair, client| {
            Ok(Parts {
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
        // Long, so that whoever is kept is kept by the relay's handler, and short, so that whoever
        // is not kept is seen to go.
        .with_swarm_config(|config| config.with_idle_connection_timeout(Duration::from_secs(1)))
        .build()
}

/// The relay beside libp2p's ping and a busy second protocol on the same connections.
async fn relays_beside_others(answer_ping: bool) {
    let mut config = Config::default();
    config.answer_ping = answer_ping;
    let mut embedded = Embedded::start(config).await;
    let mut alice = embedded.connect().await;
    let mut bob = embedded.connect().await;

    // Alice keeps the second protocol busy as long as the test lasts.
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
        there.write_all(b"to bob").await.unwrap();
        there.flush().await.unwrap();
        assert_eq!(read_bytes(&mut back, 6).await, b"to bob");
        back.write_all(b"to alice").await.unwrap();
        back.flush().await.unwrap();
        assert_eq!(read_bytes(&mut there, 8).await, b"to alice");
    }
    within(counted.wait_for(|now| *now > before + 1024 * 1024)).await.unwrap();

    // Both pings go on: the swarm's own, and the one that the clients send.
    let mut pings = 0;
    embedded
        .until(|event| {
            if let PartsEvent::Ping(ping::Event { result, .. }) = event {
                result.expect("every ping is answered");
                pings += 1;
            }
            (pings == 20).then_some(())
        })
        .await;
    let mut ping = alice.open(StreamProtocol::new("/ipfs/ping/1.0.0")).await;
    ping.write_all(&[7; 32]).await.unwrap();
    ping.flush().await.unwrap();
    assert_eq!(read_bytes(&mut ping, 32).await, [7; 32]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn it_relays_beside_a_ping_behaviour_and_a_busy_protocol() {
    relays_beside_others(true).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn it_does_so_with_its_own_ping_switched_off_as_well() {
    relays_beside_others(false).await;
}

#[tokio::test]
async fn its_events_say_who_came_and_went_and_why() {
    let mut config = Config::default();
    config.max_reservations = 1;
    config.grace = Duration::ZERO;
    let mut embedded = Embedded::start(config).await;
    let mut alice = embedded.connect().await;
    let mut bob = embedded.connect().await;
    let (a, b) = (alice.peer, bob.peer);
    alice.reserve().await;
    bob.ask(&reserve()).await;
    alice.reserve().await;
    alice.leave().await;
    let mut seen = Vec::new();
    embedded
        .until(|event| {
            if let PartsEvent::Relay(event) = event {
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

#[tokio::test]
async fn who_is_released_loses_slot_and_circuits_at_once() {
    let mut embedded = Embedded::start(Config::default()).await;
    let mut alice = embedded.connect().await;
    let mut bob = embedded.connect().await;
    bob.reserve().await;
    let (mut there, mut back) = circuit(&mut alice, &mut bob).await;
    embedded.orders.send(Order::Release(bob.peer)).ok().unwrap();
    for end in [&mut there, &mut back] {
        let (bytes, _) = read_to_end(end).await;
        assert!(bytes.is_empty());
    }
    assert_eq!(alice.ask(&connect(bob.peer)).await.status, Some(204));
    let end = embedded
        .until(|event| match event {
            PartsEvent::Relay(Event::CircuitClosed { end, .. }) => Some(end.to_string()),
            _ => None,
        })
        .await;
    assert_eq!(end, "released");
}

/// Asks and judges within seconds.
fn quick() -> Config {
    let mut config = Config::default();
    config.heartbeat = Duration::from_secs(1);
    config.silence = Duration::from_secs(3);
    config.grace = Duration::ZERO;
    config
}

/// Nobody counts a connection's bytes here: all that the relay hears are its own streams.
#[tokio::test]
async fn who_refuses_to_be_asked_is_not_judged_silent() {
    record_the_log();
    let mut embedded = Embedded::start(quick()).await;
    let mut refuses = Client::connect_without_ping(&embedded.address).await;
    refuses.reserve().await;
    // It is asked anew only once something came back, and nothing does but its refusal.
    asked_times(refuses.peer, 6).await;
    refuses.reserve().await;
    let renewed = embedded
        .until(|event| match event {
            PartsEvent::Relay(Event::ReservationAccepted { renewed: true, .. }) => Some(true),
            PartsEvent::Relay(Event::PeerSilent { .. } | Event::ReservationFreed { .. }) => {
                Some(false)
            }
            _ => None,
        })
        .await;
    assert!(renewed, "it holds its slot all the time");
}

#[tokio::test]
async fn where_the_silent_are_not_closed_they_lose_slot_and_circuits_only() {
    let mut config = quick();
    config.close_silent = false;
    let mut embedded = Embedded::start(config).await;
    let frozen = Process::that_reserves(&embedded.address).await;
    let mut source = embedded.connect().await;
    source.reserve().await; // which keeps its connection
    let (answer, mut circuit) = source.ask_for_circuit(&connect(frozen.peer)).await;
    assert_eq!(answer.status, Some(100));
    let mut control = embedded.control.clone();
    let echo = within(control.open_stream(frozen.peer, ECHO)).await;
    let mut echo = echo.expect("another protocol on its connection");
    send(&mut echo, b"before").await;
    assert_eq!(read_bytes(&mut echo, 6).await, b"before");

    frozen.signal("STOP");
    assert_eq!(embedded.next_silent().await, frozen.peer);
    let (bytes, _) = read_to_end(&mut circuit).await;
    assert!(bytes.is_empty());
    let freed = embedded
        .until(|event| match event {
            PartsEvent::Relay(Event::ReservationFreed { peer, reason, .. }) => Some((peer, reason)),
            _ => None,
        })
        .await;
    assert_eq!(freed, (frozen.peer, relaylet::FreedReason::Silent));
    let answer = source.ask(&connect(frozen.peer)).await;
    assert_eq!(answer.status, Some(204));

    frozen.signal("CONT");
    send(&mut echo, b"after").await;
    assert_eq!(read_bytes(&mut echo, 5).await, b"after");
}

#[tokio::test]
async fn whom_its_owner_hears_of_is_not_judged_silent() {
    owner_keeps_alive(|orders, peer| drop(orders.send(Order::Heard(peer)))).await;
}

#[tokio::test]
async fn on_whose_connection_its_owner_counts_signs_is_not_judged_silent() {
    let signs = ActivityCounter::default();
    let mut listens = false;
    owner_keeps_alive(|orders, peer| {
        if !std::mem::replace(&mut listens, true) {
            drop(orders.send(Order::ListenTo(peer, signs.clone())));
        }
        signs.add(1);
    })
    .await;
}

/// Two clients freeze, and the owner hears of one of them again and again.
async fn owner_keeps_alive(mut hears: impl FnMut(&mpsc::UnboundedSender<Order>, PeerId)) {
    let mut embedded = Embedded::start(quick()).await;
    let heard = Process::that_reserves(&embedded.address).await;
    let unheard = Process::that_reserves(&embedded.address).await;
    heard.signal("STOP");
    unheard.signal("STOP");
    let orders = embedded.orders.clone();
    let mut often = tokio::time::interval(Duration::from_millis(100));
    let first = {
        let mut silent = pin!(embedded.next_silent());
        loop {
            tokio::select! {
                peer = &mut silent => break peer,
                _ = often.tick() => hears(&orders, heard.peer),
            }
        }
    };
    assert_eq!(first, unheard.peer);
    // It was frozen as well.
    assert_eq!(embedded.next_silent().await, heard.peer);
}

#[tokio::test]
async fn a_reservation_keeps_its_connection_and_nothing_else_does() {
    let mut config = Config::default();
    config.reservation_ttl = Duration::from_secs(5);
    let embedded = Embedded::start(config).await;
    let mut alice = embedded.connect().await;
    let mut stranger = embedded.connect().await;
    alice.reserve().await;
    stranger.wait_for_connections(0).await; // the swarm's own idle timeout
    alice.reserve().await;
    alice.wait_for_connections(0).await; // once the term is over
}

#[tokio::test]
async fn over_a_relayed_connection_everything_is_denied() {
    let outer = Relay::start(&[]);
    let through_outer = outer.address.clone().with(Protocol::P2pCircuit);
    let inner = Embedded::start_listening(Config::default(), through_outer.clone()).await;

    // A client that knows the inner relay by its address through the outer one only.
    let mut client = swarm(Config::default());
    let mut control = client.behaviour().stream.new_control();
    client.dial(through_outer.with(Protocol::P2p(inner.peer))).unwrap();
    drive(client);
    for request in [reserve(), connect(PeerId::random())] {
        let stream = tokio::time::timeout(PATIENCE, async {
            loop {
                // Until the dialing above is through, there is nobody to open a stream to.
                match control.open_stream(inner.peer, HOP).await {
                    Ok(stream) => return stream,
                    Err(_) => tokio::task::yield_now().await,
                }
            }
        });
        let mut stream = stream.await.unwrap();
        messages::write(&mut stream, &request).await;
        let answer: HopMessage = messages::read(&mut stream).await;
        assert_eq!(answer.status, Some(202), "to {request:?}");
    }
}

/// What the relays in this process log.
static LOG: Mutex<Vec<String>> = Mutex::new(Vec::new());

struct Recorder;

impl log::Log for Recorder {
    fn enabled(&self, metadata: &log::Metadata<'_>) -> bool {
        metadata.target().starts_with("relaylet")
    }

    fn log(&self, record: &log::Record<'_>) {
        if self.enabled(record.metadata()) {
            LOG.lock().unwrap().push(record.args().to_string());
        }
    }

    fn flush(&self) {}
}

fn record_the_log() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        log::set_logger(&Recorder).unwrap();
        log::set_max_level(log::LevelFilter::Debug);
    });
}

/// Waits until a peer has been probed so many times.
async fn asked_times(peer: PeerId, times: usize) {
    let asked = format!("probe sent: peer {peer}");
    let count = || LOG.lock().unwrap().iter().filter(|line| **line == asked).count();
    let asked = async {
        while count() < times {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    within(asked).await;
}
