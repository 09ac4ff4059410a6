//! The accounts, totals and events of a relay, compared with the bytes that its clients received.

use std::{pin::pin, time::Duration};

use crate::common::{Client, assert_relayed, circuit_to, within};
use libp2p::{
    Multiaddr, PeerId, Stream,
    futures::{AsyncReadExt, AsyncWriteExt, future},
    identity::Keypair,
};
use libp2p_stream::IncomingStreams;
use relaylet::{Account, BytesTransferred, CircuitEnd, Config, Event, Node, NodeEvent, Totals};
use tokio::time::timeout;

/// A relay without byte limits, and its address.
async fn relay() -> (Node, Multiaddr) {
    let mut config = Config::default();
    config.circuit_bytes = 0;
    config.connect_rate = 0;
    let mut node = Node::new(Keypair::generate_ed25519(), config).unwrap();
    node.listen_on("/ip4/127.0.0.1/tcp/0".parse().unwrap()).unwrap();
    match within(node.next()).await {
        NodeEvent::Listening(address) => {
            let address = address.with_p2p(node.peer_id()).unwrap();
            (node, address)
        }
        other => panic!("{other:?}"),
    }
}

/// Runs the relay until its clients are done and `enough` events were emitted; returns the output of both.
async fn run<T>(
    node: &mut Node,
    clients: impl Future<Output = T>,
    enough: impl Fn(&[Event]) -> bool,
) -> (T, Vec<Event>) {
    let (mut clients, mut output) = (pin!(clients), None);
    let mut events = Vec::new();
    within(async {
        loop {
            if enough(&events)
                && let Some(output) = output.take()
            {
                return (output, events);
            }
            tokio::select! {
                event = node.next() => if let NodeEvent::Relay(event) = event {
                    events.push(event);
                },
                done = &mut clients, if output.is_none() => output = Some(done),
            }
        }
    })
    .await
}

/// Source and target of a circuit, how it ended, and the bytes it is reported to have transferred.
type Closed = (PeerId, PeerId, CircuitEnd, BytesTransferred);

fn closed(events: &[Event]) -> Vec<Closed> {
    let closed = events.iter().filter_map(|event| match event {
        Event::CircuitClosed { source, target, end, transferred, .. } => {
            Some((*source, *target, *end, *transferred))
        }
        _ => None,
    });
    closed.collect()
}

fn in_grace(events: &[Event], expected: PeerId) -> bool {
    events.iter().any(|event| matches!(event, Event::GraceBegan { peer } if *peer == expected))
}

/// A client that holds a reservation.
struct Party {
    client: Client,
    stops: IncomingStreams,
}

impl Party {
    async fn at(relay: &Multiaddr) -> Self {
        let mut client = Client::connect_to(relay).await;
        client.reserve().await;
        let stops = client.accept(crate::common::STOP);
        Self { client, stops }
    }

    async fn connect(&mut self, target: &mut Self) -> (Stream, Stream) {
        circuit_to(&mut self.client, target.client.peer, &mut target.stops).await
    }
}

/// Which end reads all that the other sends before it sends anything.
#[derive(Clone, Copy, Debug, PartialEq)]
enum WaitsForOther {
    Neither,
    Source,
    Target,
}

/// How many bytes the source sends, how many the target sends, and which end waits.
type Exchange = (usize, usize, WaitsForOther);

/// Odd sizes, around those of buffers and frames, and some larger than a window.
const EXCHANGES: [Exchange; 8] = [
    (0, 0, WaitsForOther::Neither),
    (1, 0, WaitsForOther::Source),
    (0, 1, WaitsForOther::Target),
    (16_383, 16_385, WaitsForOther::Neither),
    (70_001, 3, WaitsForOther::Target),
    (5, 300_007, WaitsForOther::Source),
    (262_145, 524_289, WaitsForOther::Target),
    (1_000_003, 999_983, WaitsForOther::Neither),
];

/// Exchanges bytes until both ends have closed their half; returns what each received.
async fn exchange(
    source: Stream,
    target: Stream,
    (there, back, waits): Exchange,
) -> BytesTransferred {
    let (to_source, to_target) = within(future::join(
        run_end(source, there, waits == WaitsForOther::Source),
        run_end(target, back, waits == WaitsForOther::Target),
    ))
    .await;
    assert_eq!((to_target, to_source), (there as u64, back as u64));
    bytes(to_target, to_source)
}

/// Runs one end; returns how many bytes it received.
async fn run_end(stream: Stream, to_send: usize, reads_first: bool) -> u64 {
    let (mut reader, mut writer) = stream.split();
    let mut received = Vec::new();
    let read = async {
        reader.read_to_end(&mut received).await.unwrap();
    };
    let write = async {
        writer.write_all(&vec![7; to_send]).await.unwrap();
        writer.close().await.unwrap();
    };
    match reads_first {
        true => {
            read.await;
            write.await;
        }
        false => _ = future::join(read, write).await,
    }
    received.len() as u64
}

/// Adds a circuit to the accounts of its source and target.
fn add(source: &mut Account, target: &mut Account, received: BytesTransferred) {
    source.as_source += 1;
    source.sent += received.to_target;
    source.received += received.to_source;
    target.as_target += 1;
    target.sent += received.to_source;
    target.received += received.to_target;
}

fn bytes(to_target: u64, to_source: u64) -> BytesTransferred {
    let mut bytes = BytesTransferred::default();
    (bytes.to_target, bytes.to_source) = (to_target, to_source);
    bytes
}

fn totals(circuits: &[BytesTransferred]) -> Totals {
    let mut totals = Totals::default();
    totals.opened = circuits.len() as u64;
    totals.closed = totals.opened;
    for transferred in circuits {
        totals.transferred.to_target += transferred.to_target;
        totals.transferred.to_source += transferred.to_source;
    }
    totals
}

#[tokio::test]
async fn events_accounts_and_totals_are_what_the_clients_received() {
    let (mut node, address) = relay().await;
    let parties = async { (Party::at(&address).await, Party::at(&address).await) };
    let ((mut alice, mut bob), _) = run(&mut node, parties, |_| true).await;
    let (a, b) = (alice.client.peer, bob.client.peer);
    assert_eq!(node.relay().account(&a), None, "no circuit yet");
    let (mut alices, mut bobs) = (Account::default(), Account::default());
    let mut all = Vec::new();

    // One after another, from Alice to Bob.
    for plan in EXCHANGES {
        let one = async {
            let (source, target) = alice.connect(&mut bob).await;
            exchange(source, target, plan).await
        };
        let (received, events) = run(&mut node, one, |events| !closed(events).is_empty()).await;
        assert_eq!(closed(&events), [(a, b, CircuitEnd::Finished, received)], "{plan:?}");
        add(&mut alices, &mut bobs, received);
        all.push(received);
        let relay = node.relay();
        assert_eq!(relay.account(&a), Some(alices), "{plan:?}");
        assert_eq!(relay.account(&b), Some(bobs), "{plan:?}");
        assert_eq!(relay.totals(), totals(&all));
    }

    // All at once, both ways.
    let at_once = async {
        let mut exchanges = Vec::new();
        for plan in EXCHANGES {
            let (source, target) = alice.connect(&mut bob).await;
            exchanges.push(tokio::spawn(exchange(source, target, plan)));
            let (source, target) = bob.connect(&mut alice).await;
            exchanges.push(tokio::spawn(exchange(source, target, plan)));
        }
        let exchanges = future::join_all(exchanges).await;
        exchanges.into_iter().map(Result::unwrap).collect::<Vec<_>>()
    };
    let count = 2 * EXCHANGES.len();
    let (received, events) = run(&mut node, at_once, |events| closed(events).len() == count).await;
    let mut expected = Vec::new();
    for both in received.chunks(2) {
        add(&mut alices, &mut bobs, both[0]);
        add(&mut bobs, &mut alices, both[1]);
        expected.push((a, b, CircuitEnd::Finished, both[0]));
        expected.push((b, a, CircuitEnd::Finished, both[1]));
    }
    let in_order = |mut list: Vec<Closed>| {
        list.sort_by_key(|(source, _, _, transferred)| {
            (*source, transferred.to_target, transferred.to_source)
        });
        list
    };
    assert_eq!(in_order(closed(&events)), in_order(expected));
    all.extend(received);
    let relay = node.relay();
    assert_eq!(relay.account(&a), Some(alices));
    assert_eq!(relay.account(&b), Some(bobs));
    assert_eq!(relay.accounts().count(), 2);
    assert_eq!(relay.totals(), totals(&all));
    assert_eq!(relay.view().accounts.relayed(), relay.totals().transferred);
}

/// Transfers these bytes, and leaves the circuit open.
async fn transfer(source: &mut Stream, target: &mut Stream, transferred: BytesTransferred) {
    assert_relayed(source, target, &vec![7; transferred.to_target as usize]).await;
    assert_relayed(target, source, &vec![7; transferred.to_source as usize]).await;
}

#[tokio::test]
async fn an_open_circuit_reports_the_bytes_transferred_so_far() {
    const POLL_INTERVAL: Duration = Duration::from_millis(5);
    let (mut node, address) = relay().await;
    let so_far = [(123_457, 0), (123_457, 679), (200_000, 70_000)];
    let so_far = so_far.map(|(to_target, to_source)| bytes(to_target, to_source));
    let open = async {
        let (mut alice, mut bob) = (Party::at(&address).await, Party::at(&address).await);
        let streams = alice.connect(&mut bob).await;
        (alice, bob, streams)
    };
    let ((_alice, _bob, (mut source, mut target)), _) = run(&mut node, open, |_| true).await;
    let mut before = BytesTransferred::default();
    for transferred in so_far {
        let to_target = transferred.to_target - before.to_target;
        let more = bytes(to_target, transferred.to_source - before.to_source);
        before = transferred;
        let transfer = transfer(&mut source, &mut target, more);
        run(&mut node, transfer, |_| true).await;
        // The bytes may arrive before the relay reports them.
        within(async {
            let shown = |node: &Node| {
                let open = node.relay().view().circuits.open();
                open.map(|(_, transferred)| transferred).eq([transferred])
                    && node.relay().view().accounts.relayed() == transferred
            };
            while !shown(&node) {
                let _ = timeout(POLL_INTERVAL, node.next()).await;
            }
        })
        .await;
    }
    drop((source, target));
    let ((), events) = run(&mut node, async {}, |events| !closed(events).is_empty()).await;
    assert_eq!(closed(&events)[0].3, before);
    assert_eq!(node.relay().view().circuits.open().count(), 0);
}

#[tokio::test]
async fn a_disconnected_peer_loses_its_account_and_its_bytes_stay_in_the_totals() {
    let (mut node, address) = relay().await;
    let parties = async {
        let (alice, bob) = (Party::at(&address).await, Party::at(&address).await);
        (alice, bob, Party::at(&address).await)
    };
    let ((mut alice, mut bob, mut carol), _) = run(&mut node, parties, |_| true).await;
    let [a, b, c] = [&alice, &bob, &carol].map(|party| party.client.peer);
    let from_alice = bytes(123_457, 679);
    let from_carol = bytes(3, 65_537);
    let (mut alices, mut bobs, mut carols) = Default::default();
    add(&mut alices, &mut bobs, from_alice);

    // The source disconnects: its connection reports the bytes before it is removed.
    let ended = |peer, events: &[Event]| in_grace(events, peer) && !closed(events).is_empty();
    let source_leaves = async {
        let (mut source, mut target) = alice.connect(&mut bob).await;
        transfer(&mut source, &mut target, from_alice).await;
        alice.client.disconnect().await;
    };
    let ((), events) = run(&mut node, source_leaves, |events| ended(a, events)).await;
    assert_eq!(closed(&events)[0].3, from_alice);
    let relay = node.relay();
    assert_eq!(relay.account(&a), None);
    assert_eq!(relay.account(&b), Some(bobs));

    // The target disconnects: the source's connection reports the bytes later.
    add(&mut carols, &mut bobs, from_carol);
    let target_leaves = async {
        let (mut source, mut target) = carol.connect(&mut bob).await;
        transfer(&mut source, &mut target, from_carol).await;
        bob.client.disconnect().await;
    };
    let ((), events) = run(&mut node, target_leaves, |events| ended(b, events)).await;
    assert_eq!(closed(&events)[0].3, from_carol);
    let relay = node.relay();
    assert_eq!(relay.account(&b), None);
    assert_eq!(relay.account(&c), Some(carols));
    assert_eq!(relay.accounts().count(), 1);
    assert_eq!(relay.totals(), totals(&[from_alice, from_carol]));
}
