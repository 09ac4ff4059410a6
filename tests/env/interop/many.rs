//! All circuits that a peer may have, busy in both directions at once: Go, JavaScript and Rust clients, one pair and
//! two pairs.
//!
//! Every byte must arrive, each circuit end with a close, and no connection be closed. It takes ten seconds, or as
//! many as a variable sets.

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

use super::{ClientProcess, go_client, js_client};
use crate::common::{
    Client, Relay, STOP, accept_circuit, http,
    messages::{OK, connect},
};

/// The default of `--max-circuits-per-peer`.
const CIRCUITS: usize = 64;

/// The variable that sets for how many seconds each side sends.
const SECONDS: &str = "RELAYLET_MANY_SECONDS";

/// The period of a payload in bytes: a prime, so that a lost, duplicated or reordered chunk is noticed.
const PERIOD: usize = 65_521;
const CHUNK: usize = 16 * 1024;

/// The implementation of a client.
#[derive(Clone, Copy, Debug)]
enum Implementation {
    Go,
    Js,
    Rust,
}

/// How many bytes a client sent and received, by circuit.
#[derive(Debug, Default)]
struct Transferred {
    sent: Vec<u64>,
    received: Vec<u64>,
}

/// Disconnects a client and checks that it ended successfully.
type Disconnect = Box<dyn FnOnce() + Send>;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs Go, and Node with npm"]
async fn all_circuits_of_two_clients_carry_data_in_both_directions() {
    for pairs in [
        &[(Implementation::Go, Implementation::Go)][..],
        &[(Implementation::Js, Implementation::Js)],
        &[(Implementation::Rust, Implementation::Rust)],
        &[(Implementation::Go, Implementation::Js), (Implementation::Rust, Implementation::Go)],
        &[(Implementation::Js, Implementation::Rust), (Implementation::Rust, Implementation::Rust)],
    ] {
        let relay = Relay::start(&[
            "--circuit-bytes=0",
            "--circuit-duration=0s",
            "--connect-rate=0",
            http::ON_ANY_PORT,
        ]);
        let port = http::port(&relay).await;
        let transferred = pairs.iter().map(|pair| transfer(&relay.address, *pair));
        let bytes = future::join_all(transferred).await;
        println!("{pairs:?}: {:?} MB", bytes.iter().map(|it| it / 1_000_000).collect::<Vec<_>>());

        let samples = http::samples(&http::get(port, "/metrics").await);
        let given_up = |what| samples[&format!("relaylet_given_up_total{{what=\"{what}\"}}")];
        assert_eq!((given_up("connection"), given_up("stream")), (0.0, 0.0));
        let finished = samples["relaylet_circuits_closed_total{end=\"finished\"}"];
        assert_eq!(finished, (pairs.len() * CIRCUITS) as f64);
        assert_eq!(relay.count_in_log("peer silent"), 0);
    }
}

/// Runs both clients of a pair; returns how many bytes were transferred in both directions.
async fn transfer(relay: &Multiaddr, (source, target): (Implementation, Implementation)) -> u64 {
    let (sender, receiver) = oneshot::channel();
    let target = tokio::spawn(client(target, relay.clone(), None, Some(sender)));
    let to = receiver.await.expect("the target reserves");
    let source = tokio::spawn(client(source, relay.clone(), Some(to), None));
    // One client may have received everything before the other one has: both stay connected until both are done.
    let (source, target) = future::join(source, target).await;
    let (source, disconnect_source) = source.expect("the client does not panic");
    let (target, disconnect_target) = target.expect("the client does not panic");
    spawn_blocking(|| [disconnect_source, disconnect_target].map(|disconnect| disconnect()))
        .await
        .expect("the clients do not panic");
    assert_eq!(source.sent, target.received);
    assert_eq!(target.sent, source.received);
    let all = source.sent.iter().chain(&target.sent);
    assert!(all.clone().all(|bytes| *bytes > 0), "{:?} {:?}", source.sent, target.sent);
    all.sum()
}

/// Runs one client: the source of the circuits if it has a target, else the target.
async fn client(
    of: Implementation,
    relay: Multiaddr,
    to: Option<PeerId>,
    sender: Option<oneshot::Sender<PeerId>>,
) -> (Transferred, Disconnect) {
    let mut command = match of {
        Implementation::Go => Command::new(spawn_blocking(go_client).await.expect("it is built")),
        Implementation::Js => {
            let folder = spawn_blocking(js_client).await.expect("it is installed");
            let mut node = Command::new("node_modules/.bin/node");
            node.arg("many.mjs").current_dir(folder);
            node
        }
        Implementation::Rust => return rust(relay, to, sender).await,
    };
    if matches!(of, Implementation::Go) {
        command.arg("many");
    }
    command.args([relay.to_string(), CIRCUITS.to_string(), seconds().to_string()]);
    command.args(to.map(|to| to.to_string()));
    spawn_blocking(move || {
        let mut client = ClientProcess::start(command.stdin(Stdio::piped()));
        if let Some(sender) = sender {
            let _ = sender.send(client.read_value("peer ").trim().parse().expect("a peer"));
        }
        let mut numbers = |word| {
            let line = client.read_value(word);
            let line = line.trim_matches(['[', ']']);
            line.split(' ').map(|number| number.parse().expect("a number")).collect()
        };
        let transferred = Transferred { sent: numbers("sent "), received: numbers("received ") };
        let disconnect: Disconnect = Box::new(|| client.wait_for_success());
        (transferred, disconnect)
    })
    .await
    .expect("the client does not panic")
}

fn seconds() -> u64 {
    env::var(SECONDS).map_or(10, |seconds| seconds.parse().expect("a number"))
}

async fn rust(
    relay: Multiaddr,
    to: Option<PeerId>,
    sender: Option<oneshot::Sender<PeerId>>,
) -> (Transferred, Disconnect) {
    let mut client = Client::connect_pinging(Keypair::generate_ed25519(), &relay).await;
    let mut circuits = JoinSet::new();
    if let Some(to) = to {
        for circuit in 0..CIRCUITS {
            let (answer, mut stream) = client.request_circuit(&connect(to)).await;
            assert_eq!(answer.status, OK, "{circuit}: {answer:?}");
            stream.write_all(&[circuit as u8]).await.expect("the relay reads");
            circuits.spawn(run_circuit(stream, circuit, true));
        }
    } else {
        client.reserve().await;
        let mut stops = client.accept(STOP);
        sender.expect("it is a target").send(client.peer).expect("the source waits");
        for _ in 0..CIRCUITS {
            let (_, mut stream) = accept_circuit(&mut stops).await;
            circuits.spawn(async move {
                let mut circuit = [0];
                stream.read_exact(&mut circuit).await.expect("the number of the circuit");
                run_circuit(stream, circuit[0].into(), false).await
            });
        }
    }
    let mut transferred = Transferred { sent: vec![0; CIRCUITS], received: vec![0; CIRCUITS] };
    while let Some(done) = circuits.join_next().await {
        let (circuit, sent, received) = done.expect("the circuit does not panic");
        (transferred.sent[circuit], transferred.received[circuit]) = (sent, received);
    }
    (transferred, Box::new(move || assert!(client.kept_its_connection())))
}

/// Sends until its time is over and closes the write half, while it receives until the other side closes.
async fn run_circuit(stream: Stream, circuit: usize, is_source: bool) -> (usize, u64, u64) {
    let (mut reads, mut writes) = stream.split();
    let (own_seed, other_seed) = (2 * circuit, 2 * circuit + 1);
    let (own_seed, other_seed) =
        if is_source { (own_seed, other_seed) } else { (other_seed, own_seed) };
    let send = async {
        let (payload, until) =
            (repeating(own_seed), Instant::now() + Duration::from_secs(seconds()));
        let mut sent = 0;
        while Instant::now() < until {
            let from = sent % PERIOD;
            sent += writes.write(&payload[from..from + CHUNK]).await.expect("the circuit is open");
        }
        writes.close().await.expect("the circuit is open");
        sent as u64
    };
    let receive = async {
        let (payload, mut buffer) = (repeating(other_seed), vec![0; PERIOD]);
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
