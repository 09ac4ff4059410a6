//! Clients that freeze, and a relay that does: who keeps its slot, and who loses it.

mod common;

use std::{env, process::Stdio, time::Duration};

use common::{
    Client, HOP, Relay, STOP, Security, agree,
    messages::{HopMessage, connect, read, reserve, write},
    read_to_end, signal, within,
};
use libp2p::{Multiaddr, PeerId, futures::future, identity::Keypair};
use tokio::{
    io::{AsyncBufReadExt, BufReader, Lines},
    process::{Child, ChildStdout, Command},
};

const OK: Option<i32> = Some(100);
const RESERVATION_REFUSED: Option<i32> = Some(200);

/// Judged within seconds.
const QUICK: [&str; 6] = ["--heartbeat", "1s", "--silence", "3s", "--grace", "1s"];

/// Asked within seconds, and never judged.
const PATIENT: [&str; 4] = ["--heartbeat", "1s", "--silence", "1h"];

/// Where a newcomer waits for the one slot, and its holder is asked at once.
const ONE_SLOT: [&str; 6] = [
    "--max-reservations",
    "1",
    "--probe-after",
    "100ms",
    "--reserve-rate",
    "0",
];

#[tokio::test]
async fn a_client_that_freezes_loses_its_slot_to_the_next() {
    let relay = Relay::start(&[&QUICK[..], &["--max-reservations", "1"]].concat());
    let frozen = Process::that_reserves(&relay).await;
    frozen.signal("STOP");
    let judged = format!("peer silent: peer {}", frozen.peer);
    relay.wait_for_log(&judged).await;
    let freed = format!("slot freed: peer {} at 127.0.0.1: grace over", frozen.peer);
    relay.wait_for_log(&freed).await;
    Client::connect(&relay).await.reserve().await;
}

#[tokio::test]
async fn a_client_that_answers_keeps_its_slot() {
    let relay = Relay::start(&[&QUICK[..], &["--max-reservations", "1"]].concat());
    let quiet = Process::that_reserves(&relay).await;
    asked_times(&relay, quiet.peer, 6).await;
    let refused = Client::connect(&relay).await.ask(&reserve()).await;
    assert_eq!(refused.status, RESERVATION_REFUSED);
    assert!(!says(&relay, "peer silent"));
}

#[tokio::test]
async fn a_client_that_answers_late_keeps_its_slot() {
    let relay = Relay::start(&PATIENT);
    let stalled = Process::that_reserves(&relay).await;
    stalled.signal("STOP");
    asked_times(&relay, stalled.peer, 1).await;
    stalled.signal("CONT");
    // It is asked anew only once it has answered.
    asked_times(&relay, stalled.peer, 3).await;
    assert!(!says(&relay, "peer silent"));
    assert!(!says(&relay, "grace began"));
}

#[tokio::test]
async fn a_newcomer_to_a_table_full_of_frozen_clients_gets_a_slot() {
    let relay = Relay::start(&[
        "--max-reservations=2",
        "--probe-after=1s",
        "--reserve-rate=0",
    ]);
    let frozen = [
        Process::that_reserves(&relay).await,
        Process::that_reserves(&relay).await,
    ];
    for client in &frozen {
        client.signal("STOP");
    }
    // Refused for as long as they were heard of lately.
    let mut newcomer = Client::connect(&relay).await;
    let granted = async { while newcomer.ask(&reserve()).await.status != OK {} };
    within(granted).await;
    relay
        .wait_for_log(&format!("taken by {}", newcomer.peer))
        .await;
    // One of them lost its slot: as many as newcomers waited.
    let log = relay.log();
    let judged = log.iter().filter(|line| line.contains("peer silent"));
    assert_eq!(judged.count(), 1, "{log:#?}");
}

#[tokio::test]
async fn a_newcomer_to_a_table_full_of_clients_that_answer_is_refused() {
    let relay = Relay::start(&[&ONE_SLOT[..], &["--heartbeat", "0s"]].concat());
    let quiet = Process::that_reserves(&relay).await;
    let mut newcomer = Client::connect(&relay).await;
    while !says(
        &relay,
        &format!("asked for a sign of life: peer {}", quiet.peer),
    ) {
        let refused = within(newcomer.ask(&reserve())).await;
        assert_eq!(refused.status, RESERVATION_REFUSED);
    }
    assert!(!says(&relay, "peer silent"));
}

#[tokio::test]
async fn a_client_that_answers_within_the_probe_keeps_its_slot() {
    let relay = Relay::start(&ONE_SLOT);
    let stalled = Process::that_reserves(&relay).await;
    stalled.signal("STOP");
    let mut newcomer = Client::connect(&relay).await;
    let refused = async {
        // Silent for a moment at first, for long enough then.
        while !says(&relay, "asked for a sign of life") {
            assert_eq!(newcomer.ask(&reserve()).await.status, RESERVATION_REFUSED);
        }
    };
    let wakes = async {
        asked_times(&relay, stalled.peer, 1).await;
        stalled.signal("CONT");
    };
    future::join(within(refused), wakes).await;
    assert!(!says(&relay, "peer silent"));
}

#[tokio::test]
async fn a_newcomer_that_asks_twice_waits_once() {
    let relay = Relay::start(&["--max-reservations", "1", "--probe-after", "0s"]);
    let frozen = Process::that_reserves(&relay).await;
    frozen.signal("STOP");
    let mut newcomer = Client::connect(&relay).await;
    loop {
        let (mut first, mut second) = (newcomer.open(HOP).await, newcomer.open(HOP).await);
        write(&mut first, &reserve()).await;
        relay.wait_for_log("asked for a sign of life").await;
        write(&mut second, &reserve()).await;
        let answers: [HopMessage; 2] = [read(&mut first).await, read(&mut second).await];
        match answers.map(|answer| answer.status) {
            [RESERVATION_REFUSED, OK] => return,
            // A relay that is starved of time judges nobody in it.
            statuses => assert_eq!(statuses, [RESERVATION_REFUSED; 2]),
        }
    }
}

#[tokio::test]
async fn a_circuit_whose_source_freezes_ends() {
    let relay = Relay::start(&QUICK);
    let mut target = Client::connect(&relay).await;
    target.reserve().await;
    let mut stops = target.accept(STOP);
    let source = Process::that_connects(&relay, target.peer);
    let (source, (_, mut circuit)) = future::join(source, agree(&mut stops)).await;
    source.signal("STOP");
    let judged = format!("peer silent: peer {}", source.peer);
    relay.wait_for_log(&judged).await;
    assert!(read_to_end(&mut circuit).await.0.is_empty());
    relay.wait_for_log("circuit 1 closed").await;
    // The target is well, and keeps its slot.
    assert!(!says(&relay, "grace began"));
}

#[tokio::test]
async fn a_relay_that_stood_still_judges_nobody() {
    const CLIENTS: usize = 20;
    let relay = Relay::start(&QUICK);
    let clients = (0..CLIENTS).map(|_| Client::connect(&relay));
    let mut clients = future::join_all(clients).await;
    for client in &mut clients {
        client.reserve().await;
    }
    relay.signal("STOP");
    // Longer than the silence limit: nobody could be heard meanwhile.
    tokio::time::sleep(Duration::from_secs(6)).await;
    relay.signal("CONT");
    relay.wait_for_log("the relay stood still for").await;
    for client in &clients {
        asked_times(&relay, client.peer, 2).await;
    }
    assert!(!says(&relay, "peer silent"));
    assert!(!says(&relay, "grace began"));
}

/// A client in a process of its own, so that it can be frozen.
struct Process {
    peer: PeerId,
    child: Child,
    /// It may go on talking.
    _output: Lines<BufReader<ChildStdout>>,
}

impl Process {
    async fn that_reserves(relay: &Relay) -> Self {
        Self::start(relay, None).await
    }

    async fn that_connects(relay: &Relay, target: PeerId) -> Self {
        Self::start(relay, Some(target)).await
    }

    async fn start(relay: &Relay, target: Option<PeerId>) -> Self {
        let target = target.map(|target| target.to_string());
        let mut child = Command::new(env::current_exe().expect("this program"))
            .args(["--ignored", "--exact", "--nocapture", "a_client"])
            .env(RELAY, relay.address.to_string())
            .env(TARGET, target.unwrap_or_default())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .expect("it can be started");
        let mut output = BufReader::new(child.stdout.take().expect("it is piped")).lines();
        loop {
            let line = within(output.next_line()).await.expect("text");
            let line = line.expect("it says who it is");
            // The harness writes the name of the test in front of it.
            if let Some((_, peer)) = line.split_once("ready: ") {
                return Self {
                    peer: peer.parse().expect("a peer id"),
                    child,
                    _output: output,
                };
            }
        }
    }

    fn signal(&self, name: &str) {
        signal(self.child.id().expect("it runs"), name);
    }
}

// What a client in a process of its own is told: the relay, and whom to connect to if anyone.
const RELAY: &str = "RELAYLET_TEST_RELAY";
const TARGET: &str = "RELAYLET_TEST_TARGET";

#[tokio::test]
#[ignore = "not a test: the client that the tests above start"]
async fn a_client() {
    let relay: Multiaddr = env::var(RELAY).expect("the relay").parse().unwrap();
    let target = env::var(TARGET).expect("whom to connect to, or nobody");
    let keypair = Keypair::generate_ed25519();
    let mut client = Client::connect_as(keypair, &relay, Security::Noise).await;
    let mut stream = client.open(HOP).await;
    let request = match target.is_empty() {
        true => reserve(),
        false => connect(target.parse().unwrap()),
    };
    write(&mut stream, &request).await;
    let answer: HopMessage = read(&mut stream).await;
    assert_eq!(answer.status, OK);
    println!("ready: {}", client.peer);
    future::pending().await
}

fn says(relay: &Relay, text: &str) -> bool {
    relay.log().iter().any(|line| line.contains(text))
}

/// Waits until a peer has been asked for a sign of life so many times.
async fn asked_times(relay: &Relay, peer: PeerId, times: usize) {
    let asked = format!("asked for a sign of life: peer {peer}");
    let count = || async {
        while relay
            .log()
            .iter()
            .filter(|line| line.contains(&asked))
            .count()
            < times
        {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    within(count()).await;
}
