//! The accounts of a whole relay beside what its clients received, to the byte.

use std::{pin::pin, time::Duration};

use crate::common::{Client, Security, circuit_to, read_bytes, within};
use libp2p::{
    Multiaddr, PeerId, Stream,
    futures::{AsyncReadExt, AsyncWriteExt, future},
    identity::Keypair,
};
use libp2p_stream::IncomingStreams;
use relaylet::{Account, BytesTransferred, CircuitEnd, Config, Event, Node, NodeEvent, Totals};
use tokio::time::timeout;

/// A relay whose circuits may carry anything, and where it listens.
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

/// Runs the relay until its clients are done and it told enough; yields what came of both.
async fn run<T>(
    node: &mut Node,
    clients: impl Future<Output = T>,
    enough: impl Fn(&[Event]) -> bool,
) -> (T, Vec<Event>) {
    let (mut clients, mut came) = (pin!(clients), None);
    let mut told = Vec::new();
    within(async {
        loop {
            if enough(&told)
                && let Some(came) = came.take()
            {
                return (came, told);
            }
            tokio::select! {
                event = node.next() => if let NodeEvent::Relay(event) = event {
                    told.push(event);
                },
                done = &mut clients, if came.is_none() => came = Some(done),
            }
        }
    })
    .await
}

/// Whom a circuit connected, how it ended and what it is said to have carried.
type Closed = (PeerId, PeerId, CircuitEnd, BytesTransferred);

fn closed(told: &[Event]) -> Vec<Closed> {
    let closed = told.iter().filter_map(|event| match event {
        Event::CircuitClosed { source, target, end, transferred: carried, .. } => {
            Some((*source, *target, *end, *carried))
        }
        _ => None,
    });
    closed.collect()
}

fn in_grace(told: &[Event], who: PeerId) -> bool {
    told.iter().any(|event| matches!(event, Event::GraceBegan { peer } if *peer == who))
}

/// A client that holds a reservation.
struct Party {
    client: Client,
    stops: IncomingStreams,
}

impl Party {
    async fn at(relay: &Multiaddr) -> Self {
        let keypair = Keypair::generate_ed25519();
        let mut client = Client::connect_as(keypair, relay, Security::Noise).await;
        client.reserve().await;
        let stops = client.accept(crate::common::STOP);
        Self { client, stops }
    }

    async fn connect(&mut self, target: &mut Self) -> (Stream, Stream) {
        circuit_to(&mut self.client, target.client.peer, &mut target.stops).await
    }
}

/// Who hears the other out before it says anything.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Polite {
    Nobody,
    Source,
    Target,
}

/// What the source says, what the target says, and in which order the circuit is half closed.
type Talk = (usize, usize, Polite);

/// Odd ones, around the sizes of buffers and frames, and some larger than a window.
const TALKS: [Talk; 8] = [
    (0, 0, Polite::Nobody),
    (1, 0, Polite::Source),
    (0, 1, Polite::Target),
    (16_383, 16_385, Polite::Nobody),
    (70_001, 3, Polite::Target),
    (5, 300_007, Polite::Source),
    (262_145, 524_289, Polite::Target),
    (1_000_003, 999_983, Polite::Nobody),
];

/// Talks until both have closed their half; yields what each received.
async fn talk(source: Stream, target: Stream, (there, back, polite): Talk) -> BytesTransferred {
    let (to_source, to_target) = within(future::join(
        converse(source, there, polite == Polite::Source),
        converse(target, back, polite == Polite::Target),
    ))
    .await;
    assert_eq!((to_target, to_source), (there as u64, back as u64));
    bytes(to_target, to_source)
}

/// One side of it: yields how many bytes it received.
async fn converse(stream: Stream, to_say: usize, listens_first: bool) -> u64 {
    let (mut reader, mut writer) = stream.split();
    let mut received = Vec::new();
    let listen = async {
        reader.read_to_end(&mut received).await.unwrap();
    };
    let say = async {
        writer.write_all(&vec![7; to_say]).await.unwrap();
        writer.close().await.unwrap();
    };
    match listens_first {
        true => {
            listen.await;
            say.await;
        }
        false => _ = future::join(listen, say).await,
    }
    received.len() as u64
}

/// What the two accounts of one circuit are, the source's first.
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
    for carried in circuits {
        totals.transferred.to_target += carried.to_target;
        totals.transferred.to_source += carried.to_source;
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
    for plan in TALKS {
        let one = async {
            let (source, target) = alice.connect(&mut bob).await;
            talk(source, target, plan).await
        };
        let (received, told) = run(&mut node, one, |told| !closed(told).is_empty()).await;
        assert_eq!(closed(&told), [(a, b, CircuitEnd::Finished, received)], "{plan:?}");
        add(&mut alices, &mut bobs, received);
        all.push(received);
        let relay = node.relay();
        assert_eq!(relay.account(&a), Some(alices), "{plan:?}");
        assert_eq!(relay.account(&b), Some(bobs), "{plan:?}");
        assert_eq!(relay.totals(), totals(&all));
    }

    // All at once, both ways.
    let at_once = async {
        let mut talks = Vec::new();
        for plan in TALKS {
            let (source, target) = alice.connect(&mut bob).await;
            talks.push(tokio::spawn(talk(source, target, plan)));
            let (source, target) = bob.connect(&mut alice).await;
            talks.push(tokio::spawn(talk(source, target, plan)));
        }
        let talks = future::join_all(talks).await;
        talks.into_iter().map(Result::unwrap).collect::<Vec<_>>()
    };
    let count = 2 * TALKS.len();
    let (received, told) = run(&mut node, at_once, |told| closed(told).len() == count).await;
    let mut expected = Vec::new();
    for both in received.chunks(2) {
        add(&mut alices, &mut bobs, both[0]);
        add(&mut bobs, &mut alices, both[1]);
        expected.push((a, b, CircuitEnd::Finished, both[0]));
        expected.push((b, a, CircuitEnd::Finished, both[1]));
    }
    let in_order = |mut list: Vec<Closed>| {
        list.sort_by_key(|(source, _, _, carried)| (*source, carried.to_target, carried.to_source));
        list
    };
    assert_eq!(in_order(closed(&told)), in_order(expected));
    all.extend(received);
    let relay = node.relay();
    assert_eq!(relay.account(&a), Some(alices));
    assert_eq!(relay.account(&b), Some(bobs));
    assert_eq!(relay.accounts().count(), 2);
    assert_eq!(relay.totals(), totals(&all));
    assert_eq!(relay.view().accounts.relayed(), relay.totals().transferred);
}

/// Carries these, and leaves the circuit open.
async fn carry(source: &mut Stream, target: &mut Stream, carried: BytesTransferred) {
    let ways = [(true, carried.to_target), (false, carried.to_source)];
    for (there, bytes) in ways {
        let (from, to) = match there {
            true => (&mut *source, &mut *target),
            false => (&mut *target, &mut *source),
        };
        let send = async {
            from.write_all(&vec![7; bytes as usize]).await.unwrap();
            from.flush().await.unwrap();
        };
        future::join(send, read_bytes(to, bytes as usize)).await;
    }
}

#[tokio::test]
async fn the_meter_of_an_open_circuit_shows_what_it_has_carried_so_far() {
    const LOOK_AGAIN: Duration = Duration::from_millis(5);
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
    for carried in so_far {
        let to_target = carried.to_target - before.to_target;
        let more = bytes(to_target, carried.to_source - before.to_source);
        before = carried;
        let carry = carry(&mut source, &mut target, more);
        run(&mut node, carry, |_| true).await;
        // The bytes may be there before the meter shows them.
        within(async {
            let shown = |node: &Node| {
                let open = node.relay().view().circuits.open();
                open.map(|(_, carried)| carried).eq([carried])
                    && node.relay().view().accounts.relayed() == carried
            };
            while !shown(&node) {
                let _ = timeout(LOOK_AGAIN, node.next()).await;
            }
        })
        .await;
    }
    drop((source, target));
    let ((), told) = run(&mut node, async {}, |told| !closed(told).is_empty()).await;
    assert_eq!(closed(&told)[0].3, before);
    assert_eq!(node.relay().view().circuits.open().count(), 0);
}

#[tokio::test]
async fn who_leaves_in_the_middle_is_forgotten_and_what_was_carried_is_not() {
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

    // The source leaves: its connection says what it carried before it is gone.
    let gone = |who, told: &[Event]| in_grace(told, who) && !closed(told).is_empty();
    let source_leaves = async {
        let (mut source, mut target) = alice.connect(&mut bob).await;
        carry(&mut source, &mut target, from_alice).await;
        alice.client.leave().await;
    };
    let ((), told) = run(&mut node, source_leaves, |told| gone(a, told)).await;
    assert_eq!(closed(&told)[0].3, from_alice);
    let relay = node.relay();
    assert_eq!(relay.account(&a), None);
    assert_eq!(relay.account(&b), Some(bobs));

    // The target leaves: it is the source's connection that says so, later.
    add(&mut carols, &mut bobs, from_carol);
    let target_leaves = async {
        let (mut source, mut target) = carol.connect(&mut bob).await;
        carry(&mut source, &mut target, from_carol).await;
        bob.client.leave().await;
    };
    let ((), told) = run(&mut node, target_leaves, |told| gone(b, told)).await;
    assert_eq!(closed(&told)[0].3, from_carol);
    let relay = node.relay();
    assert_eq!(relay.account(&b), None);
    assert_eq!(relay.account(&c), Some(carols));
    assert_eq!(relay.accounts().count(), 1);
    assert_eq!(relay.totals(), totals(&[from_alice, from_carol]));
}
