//! The relay as a server of a DHT: how it comes into it, whom it tells of, and what strangers may
//! make it keep, which is nothing.

use std::{collections::BTreeSet, fs, process::Stdio, time::Duration};

use crate::common::{self, Client, Relay, command, messages, within};
use libp2p::{
    Multiaddr, PeerId, StreamProtocol,
    futures::{AsyncReadExt, AsyncWriteExt},
    multiaddr::Protocol,
};
use tempfile::TempDir;
use tokio::time::sleep;

const KAD: StreamProtocol = StreamProtocol::new("/ipfs/kad/1.0.0");
/// How often to look for what nobody tells of.
const LOOK: Duration = Duration::from_millis(50);
const NOBODY: &str = "12D3KooWPGM3wYKMsTHGEqbhcBft6cPjA2F3rQmyWTEDD3wCGS1g";

// ---- Flags

#[test]
fn bad_usage_is_one_line_with_the_remedy() {
    let node = format!("/ip4/127.0.0.1/tcp/1/p2p/{NOBODY}");
    let text = format!("/dnsaddr/bootstrap.libp2p.io/p2p/{NOBODY}");
    let quic = format!("/ip4/127.0.0.1/udp/1/quic-v1/p2p/{NOBODY}");
    for (arguments, said) in [
        (
            &["--dht", "--bootstrap=/ip4/127.0.0.1/tcp/1"][..],
            "--bootstrap /ip4/127.0.0.1/tcp/1: lacks the node's peer id; add it at the end",
        ),
        (&["--dht", "--bootstrap=127.0.0.1:1"], "--bootstrap"),
        (&["--dht", "--bootstrap", &quic], "this relay dials TCP"),
        (&["--dht", "--bootstrap", &text], "_dnsaddr"),
        (&["--bootstrap", &node], "has no effect without a DHT; add --dht"),
        (&["--dht", "--bootstrap"], "--bootstrap"),
        (
            &["--dht", "--dht-protocol=kad"],
            "--dht-protocol \"kad\": not a protocol; try /ipfs/kad/1.0.0",
        ),
        (&["--dht", "--dht-protocol=/a b"], "--dht-protocol"),
        (&["--dht", "--idle-timeout=0s"], "--idle-timeout 0s"),
        (&["--dht=maybe"], "--dht maybe: takes true or false"),
    ] {
        refused(&[], arguments, said);
    }
    let idle = &["--dht-protocol=kad"];
    refused(&[("RELAYLET_DHT", "maybe")], idle, "RELAYLET_DHT");
}

fn refused(environment: &[(&str, &str)], arguments: &[&str], said: &str) {
    let folder = TempDir::new().unwrap();
    let mut command = command(&folder);
    command.args(arguments).envs(environment.iter().copied());
    let output = command.output().expect("it can be started");
    let line = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2), "{arguments:?}: {line}");
    assert_eq!(line.lines().count(), 1, "{line}");
    assert!(line.contains(said), "{said}: {line}");
}

#[test]
fn the_switch_is_in_the_environment_and_in_the_file_too() {
    let prints = |file: &str, environment: &[(&str, &str)], arguments: &[&str]| {
        let folder = TempDir::new().unwrap();
        fs::write(folder.path().join("relay.toml"), file).unwrap();
        let mut command = command(&folder);
        command.args(["--config=relay.toml", "--print-config"]);
        command.args(arguments).envs(environment.iter().copied());
        let output = command.stdin(Stdio::null()).output().unwrap();
        String::from_utf8([output.stdout, output.stderr].concat()).unwrap()
    };
    for (file, environment, arguments, is) in [
        ("", &[][..], &[][..], "dht = false"),
        ("", &[], &["--dht"], "dht = true"),
        ("dht = true", &[], &[], "dht = true"),
        ("dht = false", &[], &["--dht"], "dht = true"),
        ("", &[("RELAYLET_DHT", "true")], &[], "dht = true"),
        ("dht = true", &[("RELAYLET_DHT", "0")], &[], "dht = false"),
        ("dht = \"yes\"", &[], &[], "relaylet: relay.toml:1: dht: takes true or false"),
    ] {
        let printed = prints(file, environment, arguments);
        assert!(printed.lines().any(|line| line == is), "{is}: {printed}");
    }
}

// ---- Coming into it

#[tokio::test]
async fn a_node_that_cannot_be_reached_delays_nothing_and_is_joined_once_it_is_there() {
    let node = Relay::start(&["--dht"]);
    let (address, listen) = (node.address.clone(), without_peer(&node.address));
    let folder = node.kill();

    let relay = Relay::start(&["--dht", "--bootstrap", &address.to_string()]);
    Client::connect(&relay).await.reserve().await;
    let news = relay.wait_for_log("cannot be reached").await;
    assert!(news.contains("WARN") && news.contains("refused"), "{news}");
    tries(&relay, 3).await;
    assert_eq!(count(&relay, "joined the DHT"), 0);
    assert_eq!(count(&relay, "cannot be reached"), 1, "{:#?}", relay.log());

    let node = Relay::start_in(folder, &["--dht", "--listen", &listen.to_string()]);
    let relays_peer = format!("joined the DHT {KAD} at peer {}", relay.peer);
    node.wait_for_log(&relays_peer).await;
    relay.wait_for_log("answers again").await;
    let nodes_peer = format!("joined the DHT {KAD} at peer {}", node.peer);
    relay.wait_for_log(&nodes_peer).await;
}

#[tokio::test]
async fn a_node_that_serves_no_such_dht_is_named_once() {
    let node = Relay::start(&[]);
    let relay = Relay::start(&["--dht", "--bootstrap", &node.address.to_string()]);
    let line = relay.wait_for_log("does not serve /ipfs/kad/1.0.0").await;
    assert!(line.contains("WARN") && line.contains(&node.peer.to_string()));
    tries(&relay, 3).await;
    assert_eq!(count(&relay, "does not serve"), 1, "{:#?}", relay.log());
    assert_eq!(count(&relay, "joined"), 0);
}

#[tokio::test]
async fn a_dht_of_ones_own_has_a_protocol_of_its_own() {
    const OWN: &str = "--dht-protocol=/my/kad/1.0.0";
    let node = Relay::start(&["--dht", OWN]);
    let bootstrap = node.address.to_string();
    let friend = Relay::start(&["--dht", OWN, "--bootstrap", &bootstrap]);
    let stranger = Relay::start(&["--dht", "--bootstrap", &bootstrap]);
    node.wait_for_log(&format!("at peer {}", friend.peer)).await;
    stranger.wait_for_log("does not serve").await;
    let mut walker = Client::connect(&node).await;
    let kad = StreamProtocol::new("/my/kad/1.0.0");
    let found = find(&mut walker, &kad, PeerId::random()).await;
    assert_eq!(ids(&found), [friend.peer].into());
}

// ---- Being found

#[tokio::test]
async fn relays_that_joined_by_one_node_are_found_at_it_and_at_each_other() {
    let node = Relay::start(&["--dht"]);
    let bootstrap = node.address.to_string();
    // The node's own address among them: a fleet may share one list.
    let list = format!("{bootstrap},/ip4/127.0.0.1/tcp/1/p2p/{NOBODY}");
    let fleet: Vec<_> = (0..3).map(|_| Relay::start(&["--dht", "--bootstrap", &list])).collect();
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
                sleep(LOOK).await;
            }
        })
        .await;
        for relay in fleet.iter().filter(|relay| relay.peer != at.peer) {
            let told = addresses(&found, relay.peer);
            assert_eq!(told, std::slice::from_ref(&relay.address));
        }
    }
}

#[tokio::test]
async fn a_walk_dials_again_whom_the_sweep_let_go() {
    const SHORT: &str = "--idle-timeout=1s";
    let node = Relay::start(&["--dht", SHORT]);
    let bootstrap = node.address.to_string();
    let first = Relay::start(&["--dht", SHORT, "--bootstrap", &bootstrap]);
    node.wait_for_log(&format!("at peer {}", first.peer)).await;
    // Whoever dialed, it ends.
    first.wait_for_log("closed: peer").await;
    node.wait_for_log("closed: peer").await;
    // A newcomer makes the node walk, and to whom it had met.
    let _second = Relay::start(&["--dht", SHORT, "--bootstrap", &bootstrap]);
    node.wait_for_log(&format!("opened: peer {} at {}", first.peer, first.address)).await;
}

#[tokio::test]
async fn a_relay_that_drained_comes_into_it_anew() {
    let node = Relay::start(&["--dht"]);
    let bootstrap = node.address.to_string();
    let relay = Relay::start(&["--dht", "--drain=1s", "--bootstrap", &bootstrap]);
    node.wait_for_log(&format!("at peer {}", relay.peer)).await;
    relay.signal("USR1");
    relay.wait_for_log("closed: peer").await;
    relay.signal("USR1");
    // On the same port.
    let back = relay.next_address();
    assert_eq!(back, relay.address);
    let came = format!("opened: peer {}", relay.peer);
    let mut walker = Client::connect(&node).await;
    within(async {
        while node.log().iter().filter(|line| line.contains(&came)).count() < 2 {
            sleep(LOOK).await;
        }
        while addresses(&find(&mut walker, &KAD, relay.peer).await, relay.peer) != [back.clone()] {
            sleep(LOOK).await;
        }
    })
    .await;
}

// ---- What strangers may make it keep

#[tokio::test]
async fn what_strangers_bring_is_not_kept() {
    const MANY: usize = 4000;
    const MIB: usize = 1024 * 1024;
    let relay = Relay::start(&["--dht", "--max-connections-per-ip=0"]);
    let mut stranger = Client::connect(&relay).await;
    stranger.reserve().await; // else it has a minute
    let (mut adds, mut puts) = (stranger.open(KAD).await, stranger.open(KAD).await);
    let mut before = 0;
    for n in 0..MANY {
        // As much as a message may hold: in all 32 MiB of keys, and nearly as much of values.
        let key = [&n.to_be_bytes()[..], &[7; 8 * 1024]].concat();
        let record = Record { key: key.clone(), value: vec![7; 7 * 1024] };
        let put = Message { kind: PUT_VALUE, record: Some(record), ..Message::default() };
        messages::write(&mut puts, &put).await;
        let answer: Message = messages::read(&mut puts).await;
        let stored = answer.record.expect("what is stored now").value;
        assert!(stored.is_empty(), "nothing, and it says so");
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
        if n == MANY / 8 {
            before = resident(&relay);
        }
    }
    let key = [&0usize.to_be_bytes()[..], &[7; 8 * 1024]].concat();
    for kind in [GET_VALUE, GET_PROVIDERS] {
        let asked = Message { kind, key: key.clone(), ..Message::default() };
        let answer = ask(&mut stranger, &KAD, &asked).await;
        assert!(answer.record.is_none() && answer.providers.is_empty());
    }
    let grown = resident(&relay).saturating_sub(before);
    assert!(grown < 6 * MIB, "{} KiB", grown / 1024);
    // Nor does it end up in the log.
    assert!(relay.log().len() < 100, "{:#?}", relay.log());
    stranger.reserve().await;
}

#[tokio::test]
async fn a_client_of_the_dht_is_not_told_to_others() {
    let relay = Relay::start(&["--dht"]);
    let _client = Client::connect(&relay).await;
    let mut walker = Client::connect(&relay).await;
    assert_eq!(find(&mut walker, &KAD, PeerId::random()).await, []);
}

#[tokio::test]
async fn what_is_no_message_ends_its_stream_alone() {
    let relay = Relay::start(&["--dht"]);
    let mut stranger = Client::connect(&relay).await;
    for bytes in [
        &[0xff; 64][..],
        &[5, 1, 2, 3, 4, 5],
        // Longer than any message may be.
        &[0xff, 0xff, 0x7f, 1, 2, 3],
    ] {
        let mut stream = stranger.open(KAD).await;
        stream.write_all(bytes).await.unwrap();
        stream.flush().await.unwrap();
        let (answer, _) = common::read_to_end(&mut stream).await;
        assert!(answer.is_empty());
    }
    // More streams at once than it keeps, each in the middle of a message.
    let mut streams = Vec::new();
    for _ in 0..64 {
        let mut stream = stranger.open(KAD).await;
        // The last ones are closed as soon as they are there.
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

// ---- Helpers

const PUT_VALUE: i32 = 0;
const GET_VALUE: i32 = 1;
const ADD_PROVIDER: i32 = 2;
const GET_PROVIDERS: i32 = 3;
const FIND_NODE: i32 = 4;

/// The specification's message once more.
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

async fn ask(client: &mut Client, protocol: &StreamProtocol, question: &Message) -> Message {
    let mut stream = client.open(protocol.clone()).await;
    messages::write(&mut stream, question).await;
    messages::read(&mut stream).await
}

/// Whom the relay knows near this peer.
async fn find(client: &mut Client, protocol: &StreamProtocol, near: PeerId) -> Vec<Peer> {
    let question = Message { kind: FIND_NODE, key: near.to_bytes(), ..Message::default() };
    ask(client, protocol, &question).await.closer
}

fn ids(peers: &[Peer]) -> BTreeSet<PeerId> {
    let ids = peers.iter().map(|peer| PeerId::from_bytes(&peer.id));
    ids.collect::<Result<_, _>>().expect("peer ids")
}

/// Where one of them is said to be.
fn addresses(peers: &[Peer], of: PeerId) -> Vec<Multiaddr> {
    let it = peers.iter().filter(|peer| peer.id == of.to_bytes());
    let addresses = it.flat_map(|peer| &peer.addrs);
    let read = addresses.map(|address| address.clone().try_into());
    read.collect::<Result<_, _>>().expect("multiaddrs")
}

/// Waits until it has begun to try its nodes that often.
async fn tries(relay: &Relay, wanted: usize) {
    within(async {
        while count(relay, "trying --bootstrap peer") < wanted {
            sleep(LOOK).await;
        }
    })
    .await;
}

fn count(relay: &Relay, text: &str) -> usize {
    let log = relay.log();
    log.iter().filter(|line| line.contains(text)).count()
}

fn without_peer(address: &Multiaddr) -> Multiaddr {
    let parts = address.iter();
    parts.filter(|part| !matches!(part, Protocol::P2p(_))).collect()
}

/// The memory of its process, in bytes.
fn resident(relay: &Relay) -> usize {
    let status = fs::read_to_string(format!("/proc/{}/status", relay.pid())).expect("it runs");
    let line = status.lines().find(|line| line.starts_with("VmRSS:"));
    let kib = line.and_then(|line| line.split_whitespace().nth(1));
    kib.expect("a figure").parse::<usize>().expect("a number") * 1024
}
