//! Identify: what the relay sends, what it uses of its peers' messages, and how large those may be.

use std::time::Instant;

use crate::common::{
    Client, HOP, Relay,
    by_hand::read_until_closed,
    messages::{self, Identify, OK},
    swarms::{drive, swarm, until},
    within,
};
use libp2p::{
    Multiaddr, PeerId, StreamProtocol,
    futures::AsyncWriteExt,
    identify::{self, Info},
    swarm::SwarmEvent,
};
use libp2p_stream::Control;
use prost::Message;
use tokio::task::JoinHandle;

const IDENTIFY: StreamProtocol = StreamProtocol::new("/ipfs/id/1.0.0");
const PUSH: StreamProtocol = StreamProtocol::new("/ipfs/id/push/1.0.0");

// ---- What the relay sends

/// The identify message that rust-libp2p receives from the relay, and the receiver's peer id.
async fn info_of(relay: &Relay) -> (PeerId, Info) {
    let mut swarm = swarm(|keypair| {
        identify::Behaviour::new(identify::Config::new("test".into(), keypair.public()))
    });
    swarm.dial(relay.address.clone()).expect("the relay can be dialed");
    let info = until(&mut swarm, |event| match event {
        SwarmEvent::Behaviour(identify::Event::Received { info, .. }) => Some(info),
        _ => None,
    })
    .await;
    (*swarm.local_peer_id(), info)
}

#[tokio::test]
async fn identify_names_the_relay_its_addresses_and_the_observed_address() {
    let relay = Relay::start(&[]);
    let (client, info) = info_of(&relay).await;
    assert_eq!(info.public_key.to_peer_id(), relay.peer);
    assert_eq!(info.protocol_version, "ipfs/0.1.0");
    assert_eq!(info.agent_version, format!("relaylet/{}", env!("CARGO_PKG_VERSION")));
    let listening: Vec<_> =
        info.listen_addrs.into_iter().map(|own| own.with_p2p(relay.peer).unwrap()).collect();
    assert_eq!(listening, std::slice::from_ref(&relay.address));
    for protocol in [HOP, IDENTIFY, PUSH, StreamProtocol::new("/ipfs/ping/1.0.0")] {
        assert!(info.protocols.contains(&protocol), "{protocol}: {:?}", info.protocols);
    }
    assert!(info.signed_peer_record.is_none());
    let opened = relay.wait_for_log(&format!("opened: peer {client} at")).await;
    assert!(opened.ends_with(&format!(" at {}", info.observed_addr)), "{opened}");
}

#[tokio::test]
async fn announced_addresses_replace_listen_addresses() {
    const ANNOUNCED: &str = "/dns4/relay.example.org/tcp/4001";
    let relay = Relay::start(&["--announce", ANNOUNCED]);
    let (_, info) = info_of(&relay).await;
    assert_eq!(info.listen_addrs, [ANNOUNCED.parse::<Multiaddr>().unwrap()]);
}

#[tokio::test]
async fn addresses_that_do_not_fit_into_the_message_are_left_out() {
    let announced: Vec<_> = (1..=190).map(|n| format!("/ip6/2a00:1450::{n:x}/tcp/4001")).collect();
    let relay = Relay::start(&["--announce", &announced.join(",")]);
    for _ in 0..2 {
        let (_, info) = info_of(&relay).await;
        let sent = info.listen_addrs.iter().map(Multiaddr::to_string);
        assert!((100..190).contains(&sent.len()), "{}", sent.len());
        assert!(sent.eq(announced[..info.listen_addrs.len()].iter().cloned()));
    }
    assert_eq!(relay.count_in_log("addresses left out"), 1, "{:#?}", relay.log());
}

#[tokio::test]
async fn concurrent_requests_are_answered_or_reset() {
    let relay = Relay::start(&[]);
    let mut client = Client::connect(&relay).await;
    let mut streams = Vec::new();
    for _ in 0..20 {
        streams.push(client.open(IDENTIFY).await);
    }
    let mut answered = 0;
    for stream in streams {
        answered += usize::from(!read_until_closed(stream).await.is_empty());
    }
    assert!(answered > 0);
    assert_eq!(client.reserve().await.status, OK);
}

// ---- What the relay receives

fn address(port: u16) -> Multiaddr {
    format!("/ip4/5.5.5.5/tcp/{port}").parse().expect("a multiaddr")
}

#[tokio::test]
async fn a_push_changes_the_address_in_the_next_reservation() {
    let relay = Relay::start(&[]);
    let mut peer = Peer::connect(&relay).await;
    for port in [1, 2] {
        peer.push(&Identify::reached_at(&address(port)).encode_length_delimited_to_vec()).await;
        assert_eq!(peer.reported().await, Some(address(port)));
    }
}

#[tokio::test]
async fn a_push_beside_one_that_is_half_sent_is_reset() {
    let relay = Relay::start(&[]);
    let mut peer = Peer::connect(&relay).await;
    let message = Identify::reached_at(&address(1)).encode_length_delimited_to_vec();
    let (first, second) = message.split_at(5);
    let mut half_sent = peer.open(PUSH).await;
    within(half_sent.write_all(first)).await.expect("the relay reads");
    within(half_sent.flush()).await.expect("the relay reads");
    for _ in 0..3 {
        peer.push(&Identify::reached_at(&address(2)).encode_length_delimited_to_vec()).await;
        assert_eq!(peer.reported().await, None);
    }
    within(half_sent.write_all(second)).await.expect("the relay reads");
    within(half_sent.close()).await.expect("the relay reads");
    read_until_closed(half_sent).await;
    assert_eq!(peer.reported().await, Some(address(1)));
    peer.push(&Identify::reached_at(&address(2)).encode_length_delimited_to_vec()).await;
    assert_eq!(peer.reported().await, Some(address(2)));
}

#[tokio::test]
async fn pushes_above_their_rate_are_reset() {
    const BURST: f64 = 20.0;
    const PER_SECOND: f64 = 1.0 / 3.0;
    let relay = Relay::start(&["--reserve-rate=0"]);
    let mut peer = Peer::connect(&relay).await;
    let (start, mut read) = (Instant::now(), 0_u8);
    for port in 1..=40 {
        peer.push(&Identify::reached_at(&address(port)).encode_length_delimited_to_vec()).await;
        read += u8::from(peer.reported().await == Some(address(port)));
    }
    let limit = BURST + PER_SECOND * start.elapsed().as_secs_f64();
    assert!((BURST..=limit).contains(&read.into()), "{read} were read, at most {limit} may be");
}

#[tokio::test]
async fn oversized_messages_affect_only_their_stream() {
    let relay = Relay::start(&[]);
    let mut peer = Peer::connect(&relay).await;
    // The first is about as large as rust-libp2p sends, 4 kB; the second exceeds the limit and is not used.
    for (addresses, port) in [(2010, 1), (10_000, 2)] {
        let large = Identify {
            listen_addrs: vec![Vec::new(); addresses],
            ..Identify::reached_at(&address(port))
        };
        peer.push(&large.encode_length_delimited_to_vec()).await;
        assert_eq!(peer.reported().await, Some(address(1)));
    }
    assert_eq!(relay.count_in_log(" closed: peer "), 0);
    relay.wait_for_log("can be dialed from the internet").await;
    assert_eq!(relay.count_in_log("WARN"), 1, "{:#?}", relay.log());
}

/// A peer without identify; tests push its messages by hand.
struct Peer {
    relay: PeerId,
    /// The relay's listen address.
    listening: Multiaddr,
    control: Control,
    task: JoinHandle<()>,
}

impl Peer {
    async fn connect(relay: &Relay) -> Self {
        let mut swarm = swarm(|_| libp2p_stream::Behaviour::new());
        let control = swarm.behaviour().new_control();
        swarm.dial(relay.address.clone()).expect("the relay can be dialed");
        let task = drive(swarm);
        Self { relay: relay.peer, listening: relay.address.clone(), control, task }
    }

    async fn open(&mut self, protocol: StreamProtocol) -> libp2p::Stream {
        within(self.control.open_stream(self.relay, protocol))
            .await
            .expect("the relay accepts the stream")
    }

    /// Pushes these bytes, and waits until the relay closes the stream.
    async fn push(&mut self, bytes: &[u8]) {
        let mut stream = self.open(PUSH).await;
        // The relay may reset it meanwhile.
        let _ = within(stream.write_all(bytes)).await;
        let _ = within(stream.close()).await;
        assert!(read_until_closed(stream).await.is_empty());
    }

    /// Reserves, and returns the address of the reservation that was reported to the relay.
    async fn reported(&mut self) -> Option<Multiaddr> {
        let mut stream = self.open(HOP).await;
        messages::write(&mut stream, &messages::reserve()).await;
        let answer: messages::HopMessage = messages::read(&mut stream).await;
        assert_eq!(answer.status, OK);
        let addresses = answer.reservation.expect("a reservation").addrs;
        let addresses = addresses.into_iter().map(|bytes| Multiaddr::try_from(bytes).unwrap());
        let mut reported = addresses.filter(|address| *address != self.listening);
        let first = reported.next().map(|mut address| {
            address.pop();
            address
        });
        assert_eq!(reported.next(), None);
        first
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        self.task.abort();
    }
}
