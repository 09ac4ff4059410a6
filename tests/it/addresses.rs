//! The addresses that the relay gives to clients: announced and observed ones, and how connected clients learn of a
//! change.

use std::{fs, net::Ipv4Addr};

use crate::common::{
    HOP, Relay,
    by_hand::tcp_from,
    messages::{self, Identify, OK},
    swarms::{swarm, swarm_of},
    within,
};
use libp2p::{
    Multiaddr, PeerId, StreamProtocol,
    futures::{AsyncWriteExt, StreamExt},
    identify,
    identity::Keypair,
    multiaddr::Protocol,
    swarm::{NetworkBehaviour, SwarmEvent},
};
use libp2p_stream::Control;
use tempfile::TempDir;
use tokio::{net::TcpListener, sync::mpsc, task::JoinHandle};

const IDENTIFY: StreamProtocol = StreamProtocol::new("/ipfs/id/1.0.0");

// ---- Announced addresses

#[tokio::test]
async fn dns_names_are_announced_unchanged() {
    let names = [
        "/dns4/relay.example.org/tcp/4001",
        "/dns6/relay.example.org/tcp/4001",
        "/dns/relay.example.org/tcp/4001/p2p/<relay>",
        "/dnsaddr/relay.example.org",
        "/dnsaddr/example.org/p2p/<relay>",
    ];
    let folder = TempDir::new().unwrap();
    let first = Relay::start_in(folder, &["--listen=/ip4/127.0.0.1/tcp/0"]);
    let peer = first.peer.to_string();
    let names = names.map(|name| name.replace("<relay>", &peer));
    let announce = format!("--announce={}", names.join(","));
    let relay = Relay::start_in(first.kill(), &["--listen=/ip4/127.0.0.1/tcp/0", &announce]);

    let mut client = Client::connect(&relay).await;
    let identified = client.received().await;
    for name in &names {
        assert!(identified.contains(name), "{name}: {identified:?}");
    }
    let with_the_relay = names.map(|name| match name.contains("/p2p/") {
        true => name,
        false => format!("{name}/p2p/{peer}"),
    });
    assert_eq!(client.reserve().await, with_the_relay);
}

#[tokio::test]
async fn a_changed_announce_list_is_pushed_and_used_in_the_next_reservation() {
    const BEFORE: &str = "/dns4/before.example.org/tcp/4001";
    const AFTER: &str = "/dns4/after.example.org/tcp/4001";
    let folder = TempDir::new().unwrap();
    write(&folder, &format!("announce = [\"{BEFORE}\"]\n"));
    let mut command = crate::common::command(&folder);
    command.args(["--config", "relay.toml", "--listen", "/ip4/127.0.0.1/tcp/0"]);
    let relay = Relay::run(command, folder);

    let mut client = Client::connect(&relay).await;
    let mut bystander = Client::connect(&relay).await;
    for received in [client.received().await, bystander.received().await] {
        assert!(received.contains(&BEFORE.to_owned()), "{received:?}");
    }
    let of_relay = |address: &str| format!("{address}/p2p/{}", relay.peer);
    assert_eq!(client.reserve().await, [of_relay(BEFORE)]);

    write(&relay.folder, &format!("announce = [\"{AFTER}\"]\n"));
    relay.signal("HUP");
    for client in [&mut client, &mut bystander] {
        let received = client.received().await;
        assert!(received.contains(&AFTER.to_owned()), "{received:?}");
        assert!(!received.contains(&BEFORE.to_owned()), "{received:?}");
    }
    assert_eq!(client.reserve().await, [of_relay(AFTER)]);

    // When nothing is announced any more, the listen address is used again.
    write(&relay.folder, "");
    relay.signal("HUP");
    let listening = relay.address.to_string();
    let received = client.received().await;
    assert_eq!(of_relay(&received.join(" ")), listening);
    assert_eq!(client.reserve().await, [listening]);

    // A change of another setting is not pushed.
    write(&relay.folder, "max-reservations = 7\n");
    relay.signal("HUP");
    relay.wait_for_log("SIGHUP: changed: max-reservations").await;
    client.reserve().await;
    assert!(client.received.try_recv().is_err());
}

fn write(folder: &TempDir, file: &str) {
    fs::write(folder.path().join("relay.toml"), file).expect("the file is written");
}

// ---- Observed addresses

#[tokio::test]
async fn an_address_observed_from_four_subnets_is_pushed_and_used_in_the_next_reservation() {
    let relay = Relay::start(&[]);
    let reached = format!("/ip4/5.5.5.5/tcp/{}", relay.port());
    let mut client = Client::connect(&relay).await;
    let listening = relay.address.to_string();
    assert_eq!(client.received().await.len(), 1);
    assert_eq!(client.reserve().await, [&*listening]);

    let mut observers = Vec::new();
    for network in 1..4 {
        for host in [1, 2] {
            let from = Ipv4Addr::new(127, 1, network, host);
            observers.push(Observer::connect(&relay, from, &reached).await);
        }
    }
    // Six peers of three subnets are not enough.
    assert_eq!(client.reserve().await, [&*listening]);
    assert!(client.received.try_recv().is_err());

    let fourth = Ipv4Addr::new(127, 1, 4, 1);
    observers.push(Observer::connect(&relay, fourth, &reached).await);
    let received = client.received().await;
    assert!(received.contains(&reached), "{received:?}");
    relay.wait_for_log(&format!("reached the relay at {reached}")).await;
    let expected = [format!("{reached}/p2p/{}", relay.peer), listening];
    assert_eq!(client.reserve().await, expected);
    let newcomer = Client::connect(&relay).await.received().await;
    assert!(newcomer.contains(&reached), "{newcomer:?}");
}

#[tokio::test]
async fn observed_addresses_are_not_added_to_announced_ones() {
    const ANNOUNCED: &str = "/dns4/relay.example.org/tcp/4001";
    let relay = Relay::start(&["--announce", ANNOUNCED]);
    let reached = format!("/ip4/5.5.5.5/tcp/{}", relay.port());
    let mut observers = Vec::new();
    for network in 1..6 {
        let from = Ipv4Addr::new(127, 1, network, 1);
        observers.push(Observer::connect(&relay, from, &reached).await);
    }
    let mut client = Client::connect(&relay).await;
    let received = client.received().await;
    assert!(received.contains(&ANNOUNCED.to_owned()) && !received.contains(&reached));
    let announced = format!("{ANNOUNCED}/p2p/{}", relay.peer);
    assert_eq!(client.reserve().await, [announced]);
}

// ---- Helpers

/// rust-libp2p with its identify, which records the relay's addresses.
struct Client {
    relay: PeerId,
    control: Control,
    /// The relay's addresses from each identify message.
    received: mpsc::UnboundedReceiver<Vec<String>>,
    task: JoinHandle<()>,
}

#[derive(NetworkBehaviour)]
struct Parts {
    identify: identify::Behaviour,
    stream: libp2p_stream::Behaviour,
}

impl Client {
    async fn connect(relay: &Relay) -> Self {
        let mut swarm = swarm(|keypair| Parts {
            identify: identify::Behaviour::new(identify::Config::new(
                "test".into(),
                keypair.public(),
            )),
            stream: libp2p_stream::Behaviour::new(),
        });
        let control = swarm.behaviour().stream.new_control();
        swarm.dial(relay.address.clone()).expect("the relay can be dialed");
        let (sender, received) = mpsc::unbounded_channel();
        let task = tokio::spawn(async move {
            loop {
                let event = swarm.select_next_some().await;
                if let SwarmEvent::Behaviour(PartsEvent::Identify(identify::Event::Received {
                    info,
                    ..
                })) = event
                {
                    let addresses = info.listen_addrs.iter().map(Multiaddr::to_string);
                    let _ = sender.send(addresses.collect());
                }
            }
        });
        Self { relay: relay.peer, control, received, task }
    }

    /// The relay's addresses from the next identify message.
    async fn received(&mut self) -> Vec<String> {
        within(self.received.recv()).await.expect("the client runs")
    }

    /// Reserves, and returns the addresses of the reservation.
    async fn reserve(&mut self) -> Vec<String> {
        let stream = self.control.open_stream(self.relay, HOP);
        let mut stream = within(stream).await.expect("the relay accepts the stream");
        messages::write(&mut stream, &messages::reserve()).await;
        let answer: messages::HopMessage = messages::read(&mut stream).await;
        assert_eq!(answer.status, OK);
        let addresses = answer.reservation.expect("a reservation").addrs;
        let read = |bytes| Multiaddr::try_from(bytes).expect("a multiaddr").to_string();
        addresses.into_iter().map(read).collect()
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// A peer that reports an observed address of the relay.
struct Observer(JoinHandle<()>);

impl Observer {
    /// Connects a new peer from this loopback address, and waits until the relay has processed its report.
    async fn connect(relay: &Relay, from: Ipv4Addr, reached: &str) -> Self {
        let keypair = Keypair::generate_ed25519();
        let message = Identify {
            public_key: Some(keypair.public().encode_protobuf()),
            ..Identify::reached_at(&reached.parse().unwrap())
        };
        let mut swarm = swarm_of(keypair, |_| libp2p_stream::Behaviour::new());
        let mut control = swarm.behaviour().new_control();
        let mut identify_streams = control.accept(IDENTIFY).expect("accept is called once");
        let address = forwarder(relay.port(), from).await;
        swarm.dial(address).expect("the forwarder can be dialed");
        let (done, mut processed) = mpsc::unbounded_channel();
        let relay = relay.peer;
        let task = tokio::spawn(async move {
            let run = async {
                loop {
                    swarm.select_next_some().await;
                }
            };
            let answer = async {
                let (_, mut stream) =
                    identify_streams.next().await.expect("the relay opens identify");
                messages::write(&mut stream, &message).await;
                stream.close().await.expect("the relay reads");
                // The relay handles this request after the message, on the same connection.
                let mut hop = control.open_stream(relay, HOP).await.expect("the connection is up");
                messages::write(&mut hop, &messages::connect(PeerId::random())).await;
                let _: messages::HopMessage = messages::read(&mut hop).await;
                let _ = done.send(());
            };
            tokio::join!(run, answer);
        });
        within(processed.recv()).await.expect("the report is processed");
        Self(task)
    }
}

impl Drop for Observer {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Forwards one connection to the relay from the source address `from`; returns the forwarder's address.
async fn forwarder(relay: u16, from: Ipv4Addr) -> Multiaddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        let (mut client, _) = listener.accept().await.unwrap();
        let mut relay = tcp_from(from, relay).await.expect("the relay listens").0;
        let _ = tokio::io::copy_bidirectional(&mut client, &mut relay).await;
    });
    Multiaddr::from(Ipv4Addr::LOCALHOST).with(Protocol::Tcp(port))
}
