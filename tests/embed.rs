//! The behaviour in somebody else's swarm: on tokio, over libp2p's own TCP and yamux, beside other
//! behaviours on the same connections.

mod common;

use std::time::Duration;

use common::{
    Client, HOP, PATIENCE, Relay, circuit,
    messages::{self, HopMessage, connect, reserve},
    read_bytes, within,
};
use libp2p::{
    Multiaddr, PeerId, StreamProtocol, Swarm, SwarmBuilder,
    futures::{AsyncReadExt, AsyncWriteExt, StreamExt},
    identify,
    identity::Keypair,
    multiaddr::Protocol,
    noise, ping, relay,
    swarm::{NetworkBehaviour, SwarmEvent},
    tcp, yamux,
};
use relaylet::{Config, Event};
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
}

impl Embedded {
    async fn start(config: Config) -> Self {
        Self::start_listening(config, "/ip4/127.0.0.1/tcp/0".parse().unwrap()).await
    }

    async fn start_listening(config: Config, listen: Multiaddr) -> Self {
        let mut swarm = swarm(config);
        swarm.listen_on(listen).unwrap();
        let address = within(async {
            loop {
                if let SwarmEvent::NewListenAddr { address, .. } = swarm.select_next_some().await {
                    return address;
                }
            }
        })
        .await;
        let peer = *swarm.local_peer_id();
        let control = swarm.behaviour().stream.new_control();
        let (tell, events) = mpsc::unbounded_channel();
        let (orders, mut ordered) = mpsc::unbounded_channel();
        tokio::spawn(async move {
            loop {
                tokio::select! {
                    event = swarm.select_next_some() => {
                        if let SwarmEvent::Behaviour(event) = event {
                            let _ = tell.send(event);
                        }
                    }
                    Some(Order::Release(peer)) = ordered.recv() => {
                        assert!(swarm.behaviour_mut().relay.release(peer));
                    }
                }
            }
        });
        Self {
            address: address.with_p2p(peer).unwrap(),
            peer,
            control,
            events,
            orders,
        }
    }

    async fn connect(&self) -> Client {
        let keypair = Keypair::generate_ed25519();
        Client::connect_as(keypair, &self.address, common::Security::Noise).await
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
}

fn swarm(config: Config) -> Swarm<Parts> {
    SwarmBuilder::with_new_identity()
        .with_tokio()
        .with_tcp(
            tcp::Config::default(),
            noise::Config::new,
            yamux::Config::default,
        )
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
    within(counted.wait_for(|now| *now > before + 1024 * 1024))
        .await
        .unwrap();

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
    let expected = [
        (a, "false"),
        (b, "all slots are taken"),
        (a, "true"),
        (a, "disconnected"),
    ];
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
        let (bytes, _) = common::read_to_end(end).await;
        assert!(bytes.is_empty());
    }
    assert_eq!(alice.ask(&connect(bob.peer)).await.status, Some(204));
    let end = embedded
        .until(|event| match event {
            PartsEvent::Relay(Event::CircuitClosed { end, .. }) => Some(end.to_string()),
            _ => None,
        })
        .await;
    assert_eq!(end, "ended by the relay");
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
    client
        .dial(through_outer.with(Protocol::P2p(inner.peer)))
        .unwrap();
    tokio::spawn(async move {
        loop {
            client.select_next_some().await;
        }
    });
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
