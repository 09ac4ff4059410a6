//! All circuits that a peer may have, busy both ways at once: clients in Go, JavaScript and Rust, one pair and two.
//!
//! Every byte arrives, each circuit ends in good order, no connection is closed. Ten seconds of it, unless a variable
//! says how many.

use std::{
    env,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use libp2p::{
    Multiaddr, PeerId, Stream,
    futures::{AsyncReadExt, AsyncWriteExt, channel::oneshot, future},
    identity::Keypair,
};
use tokio::task::{JoinSet, spawn_blocking};

use super::{Talking, go_client, js_client};
use crate::common::{Client, Relay, STOP, agree, http, messages::connect};

/// The default of `--max-circuits-per-peer`.
const CIRCUITS: usize = 64;

/// For how many seconds each side sends.
const SECONDS: &str = "RELAYLET_MANY_SECONDS";

/// How many bytes of a payload come before it begins anew: a prime, so that no piece that is lost, doubled or moved
/// goes unnoticed.
const PERIOD: usize = 65_521;
const PIECE: usize = 16 * 1024;

/// Whose client it is.
#[derive(Clone, Copy, Debug)]
enum Of {
    Go,
    Js,
    Rust,
}

/// What a party sent and received, by circuit.
#[derive(Debug, Default)]
struct Carried {
    sent: Vec<u64>,
    received: Vec<u64>,
}

/// Ends a party.
type Leave = Box<dyn FnOnce() + Send>;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs Go, and Node with npm"]
async fn all_circuits_of_two_clients_are_busy_both_ways_and_nothing_is_lost_or_closed() {
    for pairs in [
        &[(Of::Go, Of::Go)][..],
        &[(Of::Js, Of::Js)],
        &[(Of::Rust, Of::Rust)],
        &[(Of::Go, Of::Js), (Of::Rust, Of::Go)],
        &[(Of::Js, Of::Rust), (Of::Rust, Of::Rust)],
    ] {
        let relay = Relay::start(&[
            "--circuit-bytes=0",
            "--circuit-duration=0s",
            "--connect-rate=0",
            http::ANYWHERE,
        ]);
        let port = http::port(&relay).await;
        let carried = pairs.iter().map(|pair| carry(&relay.address, *pair));
        let bytes = future::join_all(carried).await;
        println!("{pairs:?}: {:?} MB", bytes.iter().map(|it| it / 1_000_000).collect::<Vec<_>>());

        let samples = http::samples(&http::get(port, "/metrics").await);
        let given_up = |what| samples[&format!("relaylet_given_up_total{{what=\"{what}\"}}")];
        assert_eq!((given_up("connection"), given_up("stream")), (0.0, 0.0));
        let finished = samples["relaylet_circuits_closed_total{end=\"finished\"}"];
        assert_eq!(finished, (pairs.len() * CIRCUITS) as f64);
        assert_eq!(relay.count_in_log("timed out"), 0);
    }
}

/// Has the two carry what they can; yields how many bytes that were, both ways.
async fn carry(relay: &Multiaddr, (source, target): (Of, Of)) -> u64 {
    let (tells, told) = oneshot::channel();
    let target = tokio::spawn(party(target, relay.clone(), None, Some(tells)));
    let to = told.await.expect("the target reserves");
    let source = tokio::spawn(party(source, relay.clone(), Some(to), None));
    // What one has sent may still be on its way when it has heard all: both stay until both are through.
    let (source, target) = future::join(source, target).await;
    let (source, leave_first) = source.expect("it works");
    let (target, leave_last) = target.expect("it works");
    spawn_blocking(|| [leave_first, leave_last].map(|leave| leave())).await.expect("they end well");
    assert_eq!(source.sent, target.received);
    assert_eq!(target.sent, source.received);
    let all = source.sent.iter().chain(&target.sent);
    assert!(all.clone().all(|bytes| *bytes > 0), "{:?} {:?}", source.sent, target.sent);
    all.sum()
}

/// One client: the source of the circuits if it has a target, else the target.
async fn party(
    of: Of,
    relay: Multiaddr,
    to: Option<PeerId>,
    tells: Option<oneshot::Sender<PeerId>>,
) -> (Carried, Leave) {
    let mut command = match of {
        Of::Go => Command::new(spawn_blocking(go_client).await.expect("it is built")),
        Of::Js => {
            let folder = spawn_blocking(js_client).await.expect("it is installed");
            let mut node = Command::new("node_modules/.bin/node");
            node.arg("many.mjs").current_dir(folder);
            node
        }
        Of::Rust => return rust(relay, to, tells).await,
    };
    if matches!(of, Of::Go) {
        command.arg("many");
    }
    command.args([relay.to_string(), CIRCUITS.to_string(), seconds().to_string()]);
    command.args(to.map(|to| to.to_string()));
    spawn_blocking(move || {
        let mut party = Talking::start(command.stdin(Stdio::piped()));
        if let Some(tells) = tells {
            let _ = tells.send(party.says("peer ").trim().parse().expect("a peer"));
        }
        let mut numbers = |word| {
            let line = party.says(word);
            let line = line.trim_matches(['[', ']']);
            line.split(' ').map(|number| number.parse().expect("a number")).collect()
        };
        let carried = Carried { sent: numbers("sent "), received: numbers("received ") };
        let leave: Leave = Box::new(|| party.ends_well());
        (carried, leave)
    })
    .await
    .expect("it works")
}

fn seconds() -> u64 {
    env::var(SECONDS).map_or(10, |seconds| seconds.parse().expect("a number"))
}

async fn rust(
    relay: Multiaddr,
    to: Option<PeerId>,
    tells: Option<oneshot::Sender<PeerId>>,
) -> (Carried, Leave) {
    let mut client = Client::connect_pinging(Keypair::generate_ed25519(), &relay).await;
    let mut circuits = JoinSet::new();
    if let Some(to) = to {
        for circuit in 0..CIRCUITS {
            let (answer, mut stream) = client.ask_for_circuit(&connect(to)).await;
            assert_eq!(answer.status, Some(100), "{circuit}: {answer:?}");
            stream.write_all(&[circuit as u8]).await.expect("the relay reads");
            circuits.spawn(converse(stream, circuit, true));
        }
    } else {
        client.reserve().await;
        let mut stops = client.accept(STOP);
        tells.expect("it is a target").send(client.peer).expect("the source waits");
        for _ in 0..CIRCUITS {
            let (_, mut stream) = agree(&mut stops).await;
            circuits.spawn(async move {
                let mut circuit = [0];
                stream.read_exact(&mut circuit).await.expect("the source says which one");
                converse(stream, circuit[0].into(), false).await
            });
        }
    }
    let mut carried = Carried { sent: vec![0; CIRCUITS], received: vec![0; CIRCUITS] };
    while let Some(conversation) = circuits.join_next().await {
        let (circuit, sent, received) = conversation.expect("it ends well");
        (carried.sent[circuit], carried.received[circuit]) = (sent, received);
    }
    (carried, Box::new(move || assert!(client.kept_its_connection())))
}

/// Sends for as long as it lasts and closes its half, while it receives up to the other's end.
async fn converse(stream: Stream, circuit: usize, is_source: bool) -> (usize, u64, u64) {
    let (mut reads, mut writes) = stream.split();
    let (mine, theirs) = (2 * circuit, 2 * circuit + 1);
    let (mine, theirs) = if is_source { (mine, theirs) } else { (theirs, mine) };
    let send = async {
        let (payload, until) = (repeating(mine), Instant::now() + Duration::from_secs(seconds()));
        let mut sent = 0;
        while Instant::now() < until {
            let from = sent % PERIOD;
            sent += writes.write(&payload[from..from + PIECE]).await.expect("it goes on");
        }
        writes.close().await.expect("it goes on");
        sent as u64
    };
    let receive = async {
        let (payload, mut buffer) = (repeating(theirs), vec![0; PERIOD]);
        let mut received = 0;
        loop {
            let read = reads.read(&mut buffer).await.expect("no reset");
            if read == 0 {
                return received as u64;
            }
            let from = received % PERIOD;
            assert!(buffer[..read] == payload[from..from + read], "{circuit}: after {received}");
            received += read;
        }
    };
    let (sent, received) = future::join(send, receive).await;
    (circuit, sent, received)
}

/// The payload of a seed, twice.
fn repeating(seed: usize) -> Vec<u8> {
    let mut number = seed as u32;
    let once: Vec<_> = std::iter::repeat_with(|| {
        number = number.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (number >> 24) as u8
    })
    .take(PERIOD)
    .collect();
    once.repeat(2)
}
