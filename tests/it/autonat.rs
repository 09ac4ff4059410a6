//! AutoNAT: clients learn whether they are reachable, and the relay dials no other address than theirs.
//!
//! Uses rust-libp2p's clients of both versions, and requests written by hand. All addresses are on the loopback, which
//! the relay dials only with a flag for tests.

use std::{io, net::TcpListener, time::Duration};

use crate::common::{
    self, Client, Relay, messages,
    swarms::{self, drive, swarm, swarm_of, until},
    within,
};
use libp2p::{
    Multiaddr, PeerId, Stream, StreamProtocol, Swarm,
    autonat::{self, v1::NatStatus},
    core::ConnectedPoint,
    futures::{AsyncReadExt, AsyncWriteExt},
    identify,
    identity::Keypair,
    swarm::{NetworkBehaviour, SwarmEvent, dial_opts::DialOpts},
};
use prost::Message;

const VERSION_1: StreamProtocol = StreamProtocol::new("/libp2p/autonat/1.0.0");
const VERSION_2: StreamProtocol = StreamProtocol::new("/libp2p/autonat/2/dial-request");

const FOR_TESTS: [&str; 2] = ["--autonat", "--autonat-private"];

/// How many times a minute a peer is dialed.
const PER_PEER: usize = 12;

// ---- rust-libp2p's clients

#[derive(NetworkBehaviour)]
struct ClientV1 {
    autonat: autonat::v1::Behaviour,
}

#[derive(NetworkBehaviour)]
struct ClientV2 {
    autonat: autonat::v2::client::Behaviour,
    identify: identify::Behaviour,
}

/// A client of version 1 that sends a request as soon as it has an address.
async fn first(relay: &Relay) -> Swarm<ClientV1> {
    let config = autonat::v1::Config {
        boot_delay: Duration::ZERO,
        retry_interval: Duration::from_millis(100),
        throttle_server_period: Duration::ZERO,
        only_global_ips: false,
        ..autonat::v1::Config::default()
    };
    let mut swarm = swarm(|keypair| ClientV1 {
        autonat: autonat::v1::Behaviour::new(keypair.public().to_peer_id(), config),
    });
    swarm.behaviour_mut().autonat.add_server(relay.peer, None);
    connect(&mut swarm, relay).await;
    swarm
}

/// A client of version 2 that sends a request for each own address that a relay reports to it.
fn second() -> Swarm<ClientV2> {
    swarm(|keypair| ClientV2 {
        autonat: autonat::v2::client::Behaviour::default(),
        identify: identify::Behaviour::new(identify::Config::new("test".into(), keypair.public())),
    })
}

/// Connects from a new port: the kernel does not always allow the one that it listens on.
async fn connect<B: NetworkBehaviour>(swarm: &mut Swarm<B>, relay: &Relay) {
    let dial = DialOpts::peer_id(relay.peer).addresses(vec![relay.address.clone()]);
    let dial = dial.allocate_new_port().build();
    swarm.dial(dial).expect("the relay can be dialed");
    until(swarm, |event| match event {
        SwarmEvent::ConnectionEstablished { .. } => Some(()),
        SwarmEvent::OutgoingConnectionError { error, .. } => panic!("{error}"),
        _ => None,
    })
    .await;
}

/// Listens on the loopback.
async fn listen<B: NetworkBehaviour>(swarm: &mut Swarm<B>) -> Multiaddr {
    swarms::listen(swarm, "/ip4/127.0.0.1/tcp/0".parse().unwrap()).await
}

/// Whether a dial-back from another peer id than the relay's has arrived, and has been closed.
#[derive(Default)]
struct DialBack {
    arrived: bool,
    closed: bool,
}

impl DialBack {
    fn note<E>(&mut self, event: &SwarmEvent<E>, relay: PeerId) {
        match event {
            SwarmEvent::ConnectionEstablished {
                peer_id,
                endpoint: ConnectedPoint::Listener { .. },
                ..
            } => {
                assert_ne!(*peer_id, relay);
                self.arrived = true;
            }
            SwarmEvent::ConnectionClosed { peer_id, .. } if *peer_id != relay => self.closed = true,
            _ => {}
        }
    }
}

#[tokio::test]
async fn a_reachable_version_1_client_learns_it_is_reachable() {
    let relay = Relay::start(&FOR_TESTS);
    let mut client = first(&relay).await;
    let address = listen(&mut client).await;
    let (mut back, mut learnt) = (DialBack::default(), None);
    until(&mut client, |event| {
        back.note(&event, relay.peer);
        if let SwarmEvent::Behaviour(ClientV1Event::Autonat(autonat::v1::Event::StatusChanged {
            new,
            ..
        })) = event
        {
            learnt = Some(new);
        }
        (back.closed && learnt.is_some()).then_some(())
    })
    .await;
    assert_eq!(learnt, Some(NatStatus::Public(address)));
    assert!(back.arrived);
    has_one_connection(&relay).await;
}

#[tokio::test]
async fn an_unreachable_version_1_client_learns_it_is_unreachable() {
    let relay = Relay::start(&FOR_TESTS);
    let mut client = first(&relay).await;
    client.behaviour_mut().autonat.probe_address(closed());
    let learnt = until(&mut client, |event| match event {
        SwarmEvent::Behaviour(ClientV1Event::Autonat(autonat::v1::Event::StatusChanged {
            new,
            ..
        })) => Some(new),
        _ => None,
    })
    .await;
    assert_eq!(learnt, NatStatus::Private);
}

#[tokio::test]
async fn a_reachable_version_2_client_learns_it_is_reachable() {
    let relay = Relay::start(&FOR_TESTS);
    let mut client = second();
    let address = listen(&mut client).await;
    connect(&mut client, &relay).await;
    let (mut back, mut learnt) = (DialBack::default(), None);
    until(&mut client, |event| {
        back.note(&event, relay.peer);
        if let SwarmEvent::Behaviour(ClientV2Event::Autonat(event)) = event {
            learnt = Some(event);
        }
        (back.closed && learnt.is_some()).then_some(())
    })
    .await;
    let learnt = learnt.unwrap();
    assert!(learnt.result.is_ok(), "{learnt:?}");
    assert_eq!((learnt.tested_addr, learnt.server), (address, relay.peer));
    assert!(back.arrived);
    has_one_connection(&relay).await;
}

#[tokio::test]
async fn an_unreachable_version_2_client_learns_it_is_unreachable() {
    let relay = Relay::start(&FOR_TESTS);
    // It does not listen: the relay reports the port that it connected from.
    let mut client = second();
    connect(&mut client, &relay).await;
    let learnt = until(&mut client, |event| match event {
        SwarmEvent::Behaviour(ClientV2Event::Autonat(event)) => Some(event),
        _ => None,
    })
    .await;
    assert!(learnt.result.is_err(), "{learnt:?}");
}

/// Asserts that a dial-back is not counted as a connection.
async fn has_one_connection(relay: &Relay) {
    let bystander = Client::connect(relay).await;
    let opened = |peer| format!(" opened: peer {peer}");
    // The log is in order: once this line is in it, all earlier ones are.
    relay.wait_for_log(&opened(bystander.peer.to_string())).await;
    let log = relay.log();
    let opened = log.iter().filter(|line| line.contains(&opened(String::new())));
    assert_eq!(opened.count(), 2, "{log:#?}");
}

/// An address at which nothing listens.
fn closed() -> Multiaddr {
    address_of(&TcpListener::bind("127.0.0.1:0").unwrap())
}

fn address_of(listener: &TcpListener) -> Multiaddr {
    let at = listener.local_addr().unwrap();
    format!("/ip4/{}/tcp/{}", at.ip(), at.port()).parse().unwrap()
}

// ---- Requests by hand: the specification's protobuf a second time

#[derive(Clone, PartialEq, Message)]
struct Message1 {
    #[prost(int32, optional, tag = "1")]
    kind: Option<i32>,
    #[prost(message, optional, tag = "2")]
    dial: Option<Dial1>,
    #[prost(message, optional, tag = "3")]
    response: Option<Response1>,
}

#[derive(Clone, PartialEq, Message)]
struct Dial1 {
    #[prost(message, optional, tag = "1")]
    peer: Option<messages::Peer>,
}

#[derive(Clone, PartialEq, Message)]
struct Response1 {
    #[prost(int32, optional, tag = "1")]
    status: Option<i32>,
    #[prost(string, optional, tag = "2")]
    text: Option<String>,
    #[prost(bytes = "vec", optional, tag = "3")]
    address: Option<Vec<u8>>,
}

#[derive(Clone, PartialEq, Message)]
struct Message2 {
    #[prost(message, optional, tag = "1")]
    request: Option<Request2>,
    #[prost(message, optional, tag = "2")]
    response: Option<Response2>,
}

#[derive(Clone, PartialEq, Message)]
struct Request2 {
    #[prost(bytes = "vec", repeated, tag = "1")]
    addresses: Vec<Vec<u8>>,
    #[prost(fixed64, tag = "2")]
    nonce: u64,
}

#[derive(Clone, Copy, PartialEq, Message)]
struct Response2 {
    #[prost(int32, tag = "1")]
    status: i32,
    #[prost(uint32, tag = "2")]
    index: u32,
    #[prost(int32, tag = "3")]
    dial_status: i32,
}

const OK_1: i32 = 0;
const DIAL_ERROR: i32 = 100;
const REFUSED: i32 = 101;
const BAD_REQUEST: i32 = 200;

const REJECTED_2: i32 = 100;
const OK_2: i32 = 200;

async fn request_1(client: &mut Client, addresses: &[Multiaddr]) -> Response1 {
    let peer = client.peer;
    request_1_as(client, peer, addresses).await
}

async fn request_1_as(client: &mut Client, peer: PeerId, addresses: &[Multiaddr]) -> Response1 {
    request_1_on(client.open(VERSION_1).await, peer, addresses).await
}

async fn request_1_on(mut stream: Stream, peer: PeerId, addresses: &[Multiaddr]) -> Response1 {
    let request = Message1 {
        kind: Some(0),
        dial: Some(Dial1 {
            peer: Some(messages::Peer {
                id: Some(peer.to_bytes()),
                addrs: addresses.iter().map(Multiaddr::to_vec).collect(),
            }),
        }),
        response: None,
    };
    messages::write(&mut stream, &request).await;
    let answer: Message1 = messages::read(&mut stream).await;
    assert_eq!(answer.kind, Some(1));
    answer.response.expect("an answer")
}

async fn request_2(client: &mut Client, addresses: &[Multiaddr]) -> Response2 {
    let request = Message2 {
        request: Some(Request2 {
            addresses: addresses.iter().map(Multiaddr::to_vec).collect(),
            nonce: 7,
        }),
        response: None,
    };
    let mut stream = client.open(VERSION_2).await;
    messages::write(&mut stream, &request).await;
    let answer: Message2 = messages::read(&mut stream).await;
    answer.response.expect("an answer")
}

/// Whether the relay has connected to this listener. It dials before it answers, so call this after the answer.
fn was_dialed(listener: &TcpListener) -> bool {
    listener.set_nonblocking(true).unwrap();
    match listener.accept() {
        Ok(_) => true,
        Err(error) => {
            assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
            false
        }
    }
}

#[tokio::test]
async fn loopback_addresses_are_not_dialed_by_default() {
    let relay = Relay::start(&["--autonat"]);
    let mut client = Client::connect(&relay).await;
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = [address_of(&listener)];
    let refused = Response2 { status: REFUSED, ..Response2::default() };
    assert_eq!(request_2(&mut client, &address).await, refused);
    assert_eq!(request_1(&mut client, &address).await.status, Some(REFUSED));
    assert_eq!(request_1(&mut client, &[]).await.status, Some(REFUSED));
    assert!(!was_dialed(&listener));
}

#[tokio::test]
async fn clients_are_dialed_only_at_their_own_ip_address() {
    let relay = Relay::start(&FOR_TESTS);
    let mut client = Client::connect(&relay).await;
    let other = TcpListener::bind("127.0.0.2:0").unwrap();
    let name = format!("/dns4/localhost/tcp/{}", address_of_port(&other));
    for address in [address_of(&other), name.parse().unwrap()] {
        assert_eq!(request_2(&mut client, &[address]).await.status, REFUSED);
    }
    // Version 1 asks about ports only: they are dialed at the client's own address.
    let tried = request_1(&mut client, &[address_of(&other)]).await;
    assert_eq!(tried.status, Some(DIAL_ERROR));
    assert!(!was_dialed(&other));
}

fn address_of_port(listener: &TcpListener) -> u16 {
    listener.local_addr().unwrap().port()
}

#[tokio::test]
async fn undialable_addresses_are_refused_rather_than_called_unreachable() {
    let relay = Relay::start(&FOR_TESTS);
    let mut client = Client::connect(&relay).await;
    let quic: Multiaddr = "/ip4/127.0.0.1/udp/4001/quic-v1".parse().unwrap();
    let unreachable = closed();
    let circuit: Multiaddr = format!("{}/p2p-circuit", relay.address).parse().unwrap();
    let others = [quic, circuit];
    assert_eq!(request_2(&mut client, &others).await.status, REFUSED);
    assert_eq!(request_1(&mut client, &others).await.status, Some(REFUSED));
    assert_eq!(request_2(&mut client, &[]).await.status, REFUSED);
    // Version 1 then dials the address that the client connects from, where nothing listens.
    assert_eq!(request_1(&mut client, &[]).await.status, Some(DIAL_ERROR));
    let expected = Response2 { status: OK_2, index: 2, dial_status: DIAL_ERROR };
    let all = [&others[..], &[unreachable]].concat();
    assert_eq!(request_2(&mut client, &all).await, expected);
}

#[tokio::test]
async fn a_version_1_request_without_addresses_is_answered_by_dialing_the_observed_address() {
    let relay = Relay::start(&FOR_TESTS);
    let reached = async {
        loop {
            // From the port that it listens on; the kernel does not always let it, or refuses the port.
            let mut swarm = swarm(|_| libp2p_stream::Behaviour::new());
            let peer = *swarm.local_peer_id();
            let mut control = swarm.behaviour().new_control();
            let address = listen(&mut swarm).await;
            swarm.dial(relay.address.clone()).unwrap();
            let runs = drive(swarm);
            let Ok(stream) = within(control.open_stream(relay.peer, VERSION_1)).await else {
                runs.abort();
                continue;
            };
            let answer = request_1_on(stream, peer, &[]).await;
            runs.abort();
            if answer.status == Some(OK_1) {
                return assert_eq!(answer.address, Some(address.to_vec()));
            }
            assert_eq!(answer.status, Some(DIAL_ERROR));
        }
    };
    within(reached).await;
}

#[tokio::test]
async fn a_dial_answered_by_another_peer_fails() {
    let relay = Relay::start(&FOR_TESTS);
    let mut other = swarm(|_| libp2p::swarm::dummy::Behaviour);
    let address = listen(&mut other).await;
    drive(other);
    let mut client = Client::connect(&relay).await;
    let address = [address];
    assert_eq!(request_2(&mut client, &address).await.dial_status, DIAL_ERROR);
    assert_eq!(request_1(&mut client, &address).await.status, Some(DIAL_ERROR));
    // Nor may a client ask on behalf of another peer.
    let request = request_1_as(&mut client, PeerId::random(), &address).await;
    assert_eq!(request.status, Some(BAD_REQUEST));
}

#[tokio::test]
async fn hanging_dials_and_unread_dial_back_proofs_time_out() {
    let relay = Relay::start(&FOR_TESTS);
    let mut client = Client::connect(&relay).await;
    // The kernel accepts the connection, and nothing is sent on it.
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let answer = request_2(&mut client, &[address_of(&silent)]).await;
    assert_eq!((answer.status, answer.dial_status), (OK_2, DIAL_ERROR));
    let (stream, _) = silent.accept().expect("a dial");
    stream.set_read_timeout(Some(common::TEST_TIMEOUT)).unwrap();
    let all = io::copy(&mut &stream, &mut io::sink());
    all.expect("the relay closes it within the limit");

    // The client itself listens, but does not support the protocol.
    const DIAL_BACK_ERROR: i32 = 101;
    let keypair = Keypair::generate_ed25519();
    let mut listens = swarm_of(keypair.clone(), |_| libp2p::swarm::dummy::Behaviour);
    let address = listen(&mut listens).await;
    drive(listens);
    let security = common::Security::Noise;
    let mut client = Client::connect_as(keypair, &relay.address, security).await;
    let answer = request_2(&mut client, std::slice::from_ref(&address)).await;
    assert_eq!((answer.status, answer.dial_status), (OK_2, DIAL_BACK_ERROR));
    assert_eq!(request_1(&mut client, &[address]).await.status, Some(OK_1));
}

#[tokio::test]
async fn dial_requests_above_the_rate_are_refused() {
    let relay = Relay::start(&FOR_TESTS);
    let mut client = Client::connect(&relay).await;
    let address = [closed()];
    // Twice as many as the burst.
    let mut dialed = 0;
    for _ in 0..2 * PER_PEER {
        let answer = request_2(&mut client, &address).await;
        match answer.status {
            OK_2 => assert_eq!(answer.dial_status, DIAL_ERROR),
            REJECTED_2 => continue,
            _ => panic!("{answer:?}"),
        }
        dialed += 1;
    }
    // One more is allowed every five seconds.
    assert!((PER_PEER..PER_PEER + 3).contains(&dialed), "{dialed}");
    let refused = request_1(&mut client, &address).await;
    assert_eq!(refused.status, Some(REFUSED), "{refused:?}");
    let mut other = Client::connect(&relay).await;
    assert_eq!(request_2(&mut other, &address).await.status, OK_2);
}

#[tokio::test]
async fn malformed_requests_get_no_answer() {
    let relay = Relay::start(&FOR_TESTS);
    let mut client = Client::connect(&relay).await;
    for protocol in [VERSION_1, VERSION_2] {
        for bytes in [
            &b""[..],
            &[0xff; 64],
            &[0x80, 0x80, 0x01], // the length of a message of 16 KiB
            &[3, 1, 2],
            &[2, 0xff, 0xff],
            &[2, 0x12, 0x00], // a message with an empty dial request
        ] {
            let mut stream = client.open(protocol.clone()).await;
            let _ = stream.write_all(bytes).await;
            let _ = stream.close().await;
            let mut answer = Vec::new();
            let _ = within(stream.read_to_end(&mut answer)).await;
            let is_empty_request = protocol == VERSION_1 && bytes == [2, 0x12, 0x00];
            assert_eq!(answer.is_empty(), !is_empty_request, "{protocol}: {bytes:?}: {answer:?}");
        }
    }
    client.reserve().await;
    assert_eq!(request_2(&mut client, &[closed()]).await.status, OK_2);
}

#[tokio::test]
async fn autonat_is_off_by_default() {
    let relay = Relay::start(&[]);
    let mut swarm = swarm(|_| libp2p_stream::Behaviour::new());
    let mut control = swarm.behaviour().new_control();
    swarm.dial(relay.address.clone()).unwrap();
    drive(swarm);
    for protocol in [VERSION_1, VERSION_2] {
        let opened = within(control.open_stream(relay.peer, protocol)).await;
        assert!(matches!(opened, Err(libp2p_stream::OpenStreamError::UnsupportedProtocol(_))));
    }
}

// ---- The flag

/// What the program prints of its settings, or its error.
fn settings(flags: &[&str], variable: Option<&str>, file: &str) -> String {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("relaylet.toml"), file).unwrap();
    let mut command = common::command(&folder);
    command.args(["--config=relaylet.toml", "--print-config"]);
    command.args(flags).envs(variable.map(|on| ("RELAYLET_AUTONAT", on)));
    let output = common::output(&mut command);
    let (printed, errors) = (output.stdout, output.stderr);
    let status = output.status.code();
    assert_eq!(status, Some(if errors.is_empty() { 0 } else { 2 }));
    String::from_utf8([printed, errors].concat()).expect("text")
}

#[test]
fn autonat_is_enabled_by_flag_environment_or_file() {
    let on = "autonat = true";
    for (flags, variable, file, is_on) in [
        (&[][..], None, "", false),
        (&["--autonat"], None, "", true),
        (&["--autonat=true"], None, "", true),
        (&[], Some("true"), "", true),
        (&[], Some("1"), "", true),
        (&[], None, on, true),
        (&["--autonat=false"], Some("true"), on, false),
        (&[], Some("false"), on, false),
    ] {
        let printed = settings(flags, variable, file);
        let line = format!("autonat = {is_on}");
        assert!(printed.lines().any(|own| own == line), "{line}: {printed}");
    }
    for (flags, variable, file, named) in [
        (&["--autonat=perhaps"][..], None, "", "--autonat"),
        (&[], Some("perhaps"), "", "RELAYLET_AUTONAT: takes true or false"),
        (&[], None, "autonat = 1", "relaylet.toml:1: "),
    ] {
        let line = settings(flags, variable, file);
        assert!(line.contains(named) && line.lines().count() == 1, "{line}");
    }
}
