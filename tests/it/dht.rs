//! The relay as a DHT server: how it joins, which peers it returns, and that it stores nothing for others.

use std::{collections::BTreeSet, fs, time::Duration};

use crate::common::{
    self, Client, Relay, by_hand::send, child_process::resident, command, free_port, messages,
    output, within,
};
use libp2p::{
    Multiaddr, PeerId, StreamProtocol,
    futures::{AsyncReadExt, AsyncWriteExt},
};
use tempfile::TempDir;
use tokio::time::sleep;

const KAD: StreamProtocol = StreamProtocol::new("/ipfs/kad/1.0.0");
/// The interval at which the log is polled.
const POLL_INTERVAL: Duration = Duration::from_millis(50);
const ABSENT_PEER: &str = "12D3KooWPGM3wYKMsTHGEqbhcBft6cPjA2F3rQmyWTEDD3wCGS1g";

// ---- Flags

#[test]
fn invalid_flags_are_a_one_line_error_with_the_remedy() {
    let node = format!("/ip4/127.0.0.1/tcp/1/p2p/{ABSENT_PEER}");
    let dnsaddr = format!("/dnsaddr/bootstrap.libp2p.io/p2p/{ABSENT_PEER}");
    let quic = format!("/ip4/127.0.0.1/udp/1/quic-v1/p2p/{ABSENT_PEER}");
    let too_long = format!("--dht-protocol=/{}", "a".repeat(126));
    for (arguments, expected) in [
        (
            &["--dht", "--bootstrap=/ip4/127.0.0.1/tcp/1"][..],
            "--bootstrap /ip4/127.0.0.1/tcp/1: lacks the node's peer id; add it at the end",
        ),
        (&["--dht", "--bootstrap=127.0.0.1:1"], "--bootstrap"),
        (&["--dht", "--bootstrap", &quic], "this relay dials TCP"),
        (&["--dht", "--bootstrap", &dnsaddr], "_dnsaddr"),
        (&["--bootstrap", &node], "has no effect without a DHT; add --dht"),
        (&["--dht", "--bootstrap"], "--bootstrap"),
        (
            &["--dht", "--dht-protocol=kad"],
            "--dht-protocol \"kad\": not a protocol of at most 126 characters; try /ipfs/kad/1.0.0",
        ),
        (&["--dht", "--dht-protocol=/a b"], "--dht-protocol"),
        (&["--dht", &too_long], "at most 126 characters"),
        (&["--dht", "--idle-timeout=0s"], "--idle-timeout 0s"),
        (&["--dht=maybe"], "--dht maybe: takes true or false"),
    ] {
        refused(&[], arguments, expected);
    }
    let arguments = &["--dht-protocol=kad"];
    refused(&[("RELAYLET_DHT", "maybe")], arguments, "RELAYLET_DHT");
}

fn refused(environment: &[(&str, &str)], arguments: &[&str], expected: &str) {
    let folder = TempDir::new().unwrap();
    let output = output(command(&folder).args(arguments).envs(environment.iter().copied()));
    let line = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2), "{arguments:?}: {line}");
    assert_eq!(line.lines().count(), 1, "{line}");
    assert!(line.contains(expected), "{expected}: {line}");
}

#[test]
fn the_dht_is_enabled_by_environment_or_file() {
    let prints = |file: &str, environment: &[(&str, &str)], arguments: &[&str]| {
        let folder = TempDir::new().unwrap();
        fs::write(folder.path().join("relay.toml"), file).unwrap();
        let mut command = command(&folder);
        command.args(["--config=relay.toml", "--print-config"]);
        command.args(arguments).envs(environment.iter().copied());
        let output = output(&mut command);
        String::from_utf8([output.stdout, output.stderr].concat()).unwrap()
    };
    for (file, environment, arguments, expected) in [
        ("", &[][..], &[][..], "dht = false"),
        ("", &[], &["--dht"], "dht = true"),
        ("dht = true", &[], &[], "dht = true"),
        ("dht = false", &[], &["--dht"], "dht = true"),
        ("", &[("RELAYLET_DHT", "true")], &[], "dht = true"),
        ("dht = true", &[("RELAYLET_DHT", "0")], &[], "dht = false"),
        ("dht = \"yes\"", &[], &[], "relaylet: relay.toml:1: dht: takes true or false"),
    ] {
        let printed = prints(file, environment, arguments);
        assert!(printed.lines().any(|line| line == expected), "{expected}: {printed}");
    }
}

// ---- Joining

#[tokio::test]
async fn the_dht_is_joined_once_its_bootstrap_node_is_up() {
    let listen = on_free_port();
    let node = Relay::start_listening(&["--dht", &listen]);
    let (address, folder) = (node.address.clone(), node.kill());

    let relay = Relay::start(&["--dht", "--bootstrap", &address.to_string()]);
    Client::connect(&relay).await.reserve().await;
    let warning = relay.wait_for_log("cannot be reached").await;
    assert!(warning.contains("WARN") && warning.contains("refused"), "{warning}");
    relay.wait_for_count("trying --bootstrap peer", 3).await;
    assert_eq!(relay.count_in_log("joined the DHT"), 0);
    assert_eq!(relay.count_in_log("cannot be reached"), 1, "{:#?}", relay.log());

    let node = Relay::start_in(folder, &["--dht", &listen]);
    relay.wait_for_log("answers again").await;
    for (at, other) in [(&node, &relay), (&relay, &node)] {
        wait_until_known(other, at).await;
        at.wait_for_log(&format!("joined the DHT {KAD}: ")).await;
    }
}

#[tokio::test]
async fn a_bootstrap_node_of_another_protocol_is_logged_once() {
    let node = Relay::start(&[]);
    let relay = Relay::start(&["--dht", "--bootstrap", &node.address.to_string()]);
    let line = relay.wait_for_log("does not serve /ipfs/kad/1.0.0").await;
    assert!(line.contains("WARN") && line.contains(&node.peer.to_string()));
    relay.wait_for_count("trying --bootstrap peer", 3).await;
    assert_eq!(relay.count_in_log("does not serve"), 1, "{:#?}", relay.log());
    assert_eq!(relay.count_in_log("joined"), 0);
}

#[tokio::test]
async fn a_custom_dht_uses_its_own_protocol() {
    const OWN: &str = "--dht-protocol=/my/kad/1.0.0";
    let node = Relay::start(&["--dht", OWN]);
    let bootstrap = node.address.to_string();
    let friend = Relay::start(&["--dht", OWN, "--bootstrap", &bootstrap]);
    let stranger = Relay::start(&["--dht", "--bootstrap", &bootstrap]);
    wait_until_known(&friend, &node).await;
    stranger.wait_for_log("does not serve").await;
    let mut walker = Client::connect(&node).await;
    let kad = StreamProtocol::new("/my/kad/1.0.0");
    let found = find(&mut walker, &kad, PeerId::random()).await;
    assert_eq!(ids(&found), [friend.peer].into());
}

// ---- Lookups

#[tokio::test]
async fn relays_that_joined_through_one_node_find_each_other() {
    let node = Relay::start(&["--dht"]);
    let bootstrap = node.address.to_string();
    let fleet = [(); 3].map(|()| {
        let listen = on_free_port();
        let relay = Relay::start_listening(&[&listen]);
        // A fleet may share one list: it contains the relay's own address, and that of an absent node.
        let list = format!("{bootstrap},{},/ip4/127.0.0.1/tcp/1/p2p/{ABSENT_PEER}", relay.address);
        Relay::start_in(relay.kill(), &["--dht", "--bootstrap", &list, &listen])
    });
    let all: BTreeSet<_> = fleet.iter().chain([&node]).map(|relay| relay.peer).collect();
    for at in fleet.iter().chain([&node]) {
        let mut walker = Client::connect(at).await;
        let others: BTreeSet<_> = all.iter().copied().filter(|peer| *peer != at.peer).collect();
        let found = within(async {
            loop {
                let found = find(&mut walker, &KAD, at.peer).await;
                if ids(&found) == others {
                    return found;
                }
                sleep(POLL_INTERVAL).await;
            }
        })
        .await;
        for relay in fleet.iter().filter(|relay| relay.peer != at.peer) {
            let received = addresses(&found, relay.peer);
            assert_eq!(received, std::slice::from_ref(&relay.address));
        }
    }
    for relay in fleet {
        let dials_itself = format!("trying --bootstrap peer {}", relay.peer);
        assert_eq!(relay.count_in_log(&dials_itself), 0, "{:#?}", relay.log());
    }
}

#[tokio::test]
async fn a_lookup_dials_nodes_whose_connection_was_closed_as_idle() {
    const SHORT: &str = "--idle-timeout=1s";
    let node = Relay::start(&["--dht", SHORT]);
    let bootstrap = node.address.to_string();
    let first = Relay::start(&["--dht", SHORT, "--bootstrap", &bootstrap]);
    wait_until_known(&first, &node).await;
    // The connection closes, whichever side dialed.
    first.wait_for_log("closed: peer").await;
    node.wait_for_log("closed: peer").await;
    // A new node causes a lookup, which dials the nodes found before.
    let _second = Relay::start(&["--dht", SHORT, "--bootstrap", &bootstrap]);
    node.wait_for_log(&format!("opened: peer {} at {}", first.peer, first.address)).await;
}

#[tokio::test]
async fn a_resumed_relay_joins_the_dht_again() {
    let node = Relay::start(&["--dht"]);
    let bootstrap = node.address.to_string();
    let flags = ["--dht", "--drain=1s", "--bootstrap", &bootstrap, &on_free_port()];
    let relay = Relay::start_listening(&flags);
    wait_until_known(&relay, &node).await;
    relay.signal("USR1");
    relay.wait_for_log("closed: peer").await;
    relay.signal("USR1");
    // It listens on the same port.
    let back = relay.next_address();
    assert_eq!(back, relay.address);
    let opened = format!("opened: peer {}", relay.peer);
    let mut walker = Client::connect(&node).await;
    node.wait_for_count(&opened, 2).await;
    within(async {
        while addresses(&find(&mut walker, &KAD, relay.peer).await, relay.peer) != [back.clone()] {
            sleep(POLL_INTERVAL).await;
        }
    })
    .await;
}

// ---- What other peers may store

#[tokio::test]
async fn records_of_other_peers_are_not_stored() {
    const MANY: usize = 4000;
    const MIB: u64 = 1024; // in KiB
    let relay = Relay::start(&["--dht", "--max-connections-per-ip=0"]);
    let mut stranger = Client::connect(&relay).await;
    stranger.reserve().await; // else its connection is closed after a minute
    let (mut adds, mut puts) = (stranger.open(KAD).await, stranger.open(KAD).await);
    let mut before = 0;
    for n in 0..MANY {
        // As much as a message may hold: 32 MiB of keys in all, and nearly as much of values.
        let key = [&n.to_be_bytes()[..], &[7; 8 * 1024]].concat();
        let record = Record { key: key.clone(), value: vec![7; 7 * 1024] };
        let put = Message { kind: PUT_VALUE, record: Some(record), ..Message::default() };
        messages::write(&mut puts, &put).await;
        let answer: Message = messages::read(&mut puts).await;
        let stored = answer.record.expect("the record that is stored").value;
        assert!(stored.is_empty(), "nothing is stored, and the answer says so");
        let add = Message {
            kind: ADD_PROVIDER,
            key,
            providers: vec![Peer {
                id: stranger.peer.to_bytes(),
                addrs: vec!["/ip4/8.8.8.8/tcp/1".parse::<Multiaddr>().unwrap().to_vec()],
            }],
            ..Message::default()
        };
        messages::write(&mut adds, &add).await;
        // By now buffers and the allocator have warmed up.
        if n == MANY / 8 {
            before = resident(relay.pid());
        }
    }
    let key = [&0usize.to_be_bytes()[..], &[7; 8 * 1024]].concat();
    for kind in [GET_VALUE, GET_PROVIDERS] {
        let get = Message { kind, key: key.clone(), ..Message::default() };
        let answer = request_node(&mut stranger, &KAD, &get).await;
        assert!(answer.record.is_none() && answer.providers.is_empty());
    }
    let growth = resident(relay.pid()).saturating_sub(before);
    assert!(growth < 6 * MIB, "{growth} KiB");
    // Nothing of it is logged.
    assert!(relay.log().len() < 100, "{:#?}", relay.log());
    stranger.reserve().await;
}

#[tokio::test]
async fn dht_clients_are_not_returned_in_lookups() {
    let relay = Relay::start(&["--dht"]);
    let _client = Client::connect(&relay).await;
    let mut walker = Client::connect(&relay).await;
    assert_eq!(find(&mut walker, &KAD, PeerId::random()).await, []);
}

#[tokio::test]
async fn a_malformed_message_closes_only_its_stream() {
    let relay = Relay::start(&["--dht"]);
    let mut stranger = Client::connect(&relay).await;
    for bytes in [
        &[0xff; 64][..],
        &[5, 1, 2, 3, 4, 5],
        // Longer than the longest message.
        &[0xff, 0xff, 0x7f, 1, 2, 3],
    ] {
        let mut stream = stranger.open(KAD).await;
        send(&mut stream, bytes).await;
        let (answer, _) = common::read_to_end(&mut stream).await;
        assert!(answer.is_empty());
    }
    // More concurrent streams than the relay serves, each with an incomplete message.
    let mut streams = Vec::new();
    for _ in 0..64 {
        let mut stream = stranger.open(KAD).await;
        // The relay resets the last ones at once.
        let _ = stream.write_all(&[200]).await;
        let _ = stream.flush().await;
        streams.push(stream);
    }
    let mut byte = [0];
    let last = within(streams[63].read(&mut byte)).await;
    assert!(matches!(last, Ok(0) | Err(_)), "{last:?}");
    drop(streams);
    assert_eq!(find(&mut stranger, &KAD, PeerId::random()).await, []);
}

/// Any peer could fill the log with them.
#[tokio::test]
async fn warnings_of_the_library_are_not_logged() {
    let relay = Relay::start(&["--dht"]);
    let mut stranger = Client::connect(&relay).await;
    for _ in 0..10 {
        let mut stream = stranger.open(KAD).await;
        let ping = Message { kind: PING, ..Message::default() };
        messages::write(&mut stream, &ping).await;
        assert!(common::read_to_end(&mut stream).await.0.is_empty());
    }
    stranger.reserve().await;
    // The log is in order: once this line is in it, all earlier ones are.
    relay.wait_for_log("reservation granted").await;
    assert_eq!(relay.count_in_log("libp2p_kad"), 0, "{:#?}", relay.log());
}

// ---- Helpers

/// Waits until `relay` is in the routing table of `at`.
async fn wait_until_known(relay: &Relay, at: &Relay) {
    at.wait_for_log(&format!("DHT node known: peer {}", relay.peer)).await;
}

const PUT_VALUE: i32 = 0;
const GET_VALUE: i32 = 1;
const ADD_PROVIDER: i32 = 2;
const GET_PROVIDERS: i32 = 3;
const FIND_NODE: i32 = 4;
const PING: i32 = 5;

/// The specification's message, written independently of libp2p's.
#[derive(Clone, PartialEq, prost::Message)]
struct Message {
    #[prost(int32, tag = "1")]
    kind: i32,
    #[prost(bytes = "vec", tag = "2")]
    key: Vec<u8>,
    #[prost(message, optional, tag = "3")]
    record: Option<Record>,
    #[prost(message, repeated, tag = "8")]
    closer: Vec<Peer>,
    #[prost(message, repeated, tag = "9")]
    providers: Vec<Peer>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Record {
    #[prost(bytes = "vec", tag = "1")]
    key: Vec<u8>,
    #[prost(bytes = "vec", tag = "2")]
    value: Vec<u8>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Peer {
    #[prost(bytes = "vec", tag = "1")]
    id: Vec<u8>,
    #[prost(bytes = "vec", repeated, tag = "2")]
    addrs: Vec<Vec<u8>>,
}

async fn request_node(
    client: &mut Client,
    protocol: &StreamProtocol,
    request: &Message,
) -> Message {
    let mut stream = client.open(protocol.clone()).await;
    messages::write(&mut stream, request).await;
    messages::read(&mut stream).await
}

/// The peers near this key that the relay returns.
async fn find(client: &mut Client, protocol: &StreamProtocol, near: PeerId) -> Vec<Peer> {
    let request = Message { kind: FIND_NODE, key: near.to_bytes(), ..Message::default() };
    request_node(client, protocol, &request).await.closer
}

fn ids(peers: &[Peer]) -> BTreeSet<PeerId> {
    let ids = peers.iter().map(|peer| PeerId::from_bytes(&peer.id));
    ids.collect::<Result<_, _>>().expect("peer ids")
}

/// The addresses of one of these peers.
fn addresses(peers: &[Peer], of: PeerId) -> Vec<Multiaddr> {
    let it = peers.iter().filter(|peer| peer.id == of.to_bytes());
    let addresses = it.flat_map(|peer| &peer.addrs);
    let read = addresses.map(|address| address.clone().try_into());
    read.collect::<Result<_, _>>().expect("multiaddrs")
}

/// The flag to listen on a port that no other test takes while the relay does not listen.
fn on_free_port() -> String {
    format!("--listen=/ip4/127.0.0.1/tcp/{}", free_port())
}
