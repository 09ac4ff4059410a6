//! Networks that fail under the relay and its clients, for as long as networks do.
//!
//! It makes namespaces, and takes two minutes and a half: `.ci/env netns`.
//!
//! The clients say nothing by themselves: whoever keeps its slot here answered the relay's questions.

use std::{
    env,
    net::Ipv4Addr,
    time::{Duration, Instant},
};

use crate::common::{
    Relay,
    by_hand::{FIN, RST, SYN, WINDOW_UPDATE, data, frame},
    messages::{connect, reserve},
    network::{Host, Network},
    process::{Process, Role},
    strangers::{Stranger, opening},
    within,
};
use libp2p::{PeerId, futures::future, identity::Keypair};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, copy},
    net::{TcpListener, TcpSocket},
    time::sleep,
};

const OK: Option<i32> = Some(100);
const RESERVATION_REFUSED: Option<i32> = Some(200);
const NO_RESERVATION: Option<i32> = Some(204);

/// Longer than a heartbeat at its default: whoever is silent has been asked by then.
const A_HEARTBEAT: Duration = Duration::from_secs(35);

#[tokio::test]
#[ignore = "needs root, iproute2 and nftables"]
async fn a_client_whose_cable_is_pulled_loses_its_slot() {
    let mut network = Network::new();
    let (here, there) = (network.host(), network.host());
    let relay = here.relay(&["--heartbeat=1s", "--silence=3s", "--grace=1s"]);
    let client = reserves(&there, &relay).await;
    there.set_cable(false);
    relay.wait_for_log(&judged(client.peer)).await;
    relay.wait_for_log("grace over").await;
}

#[tokio::test]
#[ignore = "needs root, iproute2 and nftables"]
async fn a_newcomer_gets_the_slot_of_a_client_whose_cable_is_pulled() {
    let mut network = Network::new();
    let (here, there, elsewhere) = (network.host(), network.host(), network.host());
    let relay = here.relay(&["--max-reservations=1"]);
    let client = reserves(&there, &relay).await;
    there.set_cable(false);
    let pulled = Instant::now();
    let newcomer = loop {
        let newcomer = start(&elsewhere, &relay, Role::default()).await;
        if newcomer.status == OK {
            break newcomer;
        }
        assert_eq!(newcomer.status, RESERVATION_REFUSED);
        assert!(pulled.elapsed() < Duration::from_secs(40), "long before it is judged anyway");
    };
    relay.wait_for_log(&judged(client.peer)).await;
    relay.wait_for_log(&format!("taken by {}", newcomer.peer)).await;
}

#[tokio::test]
#[ignore = "needs root, iproute2 and nftables"]
async fn two_minutes_of_thirty_percent_loss_cost_nobody_its_slot() {
    let mut network = Network::new();
    let (here, there) = (network.host(), network.host());
    let relay = here.relay(&[]);
    // As rust-libp2p's come. One that only answers has half a minute for it, in which TCP tries eight
    // times: of forty questions each way, one would now and then be lost for as long.
    let pinging = Role { pings: true, ..Role::default() };
    let clients = (0..10).map(|_| start(&there, &relay, pinging.clone()));
    let clients = future::join_all(clients).await;
    let in_vain = Role { target: Some(PeerId::random()), ..Role::default() };
    let refused = start(&there, &relay, in_vain).await;
    assert_eq!(refused.status, NO_RESERVATION);
    here.lose(30);
    sleep(Duration::from_secs(120)).await;
    here.lose(0);
    are_unharmed(&clients, &there, &relay).await;
    // Since it takes so long anyway: what the log says once a minute.
    let summed_up = "circuits refused within a minute: 1: the target holds no live reservation";
    let most = format!("{summed_up}; most from {}: 1", there.address);
    relay.wait_for_log(&most).await;
}

#[tokio::test]
#[ignore = "needs root, iproute2 and nftables"]
async fn while_the_relays_own_cable_is_out_nobody_is_given_up() {
    let mut network = Network::new();
    let (here, there) = (network.host(), network.host());
    let relay = here.relay(&[]);
    let clients = reserve_all(20, &there, &relay).await;
    here.set_cable(false);
    sleep(Duration::from_secs(40)).await;
    were_asked(&clients, 1, &relay);
    here.set_cable(true);
    sleep(A_HEARTBEAT).await;
    are_unharmed(&clients, &there, &relay).await;
}

#[tokio::test]
#[ignore = "needs root, iproute2 and nftables"]
async fn a_relay_that_was_stopped_for_ninety_seconds_gives_nobody_up() {
    let mut network = Network::new();
    let (here, there) = (network.host(), network.host());
    let relay = here.relay(&[]);
    let clients = reserve_all(20, &there, &relay).await;
    relay.signal("STOP");
    sleep(Duration::from_secs(90)).await;
    relay.signal("CONT");
    relay.wait_for_log("process was suspended for").await;
    sleep(A_HEARTBEAT).await;
    were_asked(&clients, 1, &relay);
    are_unharmed(&clients, &there, &relay).await;
}

/// As slow as a modem. What is carried must be more than all buffers on the way hold.
const SLOW: usize = 20_000; // bytes a second

/// Longer than the 60 s for which a peer may take nothing; with `RELAYLET_NETNS=long` five minutes.
fn a_while() -> Duration {
    let is_long = env::var("RELAYLET_NETNS").is_ok_and(|how| how == "long");
    Duration::from_secs(if is_long { 300 } else { 100 })
}

#[tokio::test]
#[ignore = "needs root, iproute2 and nftables"]
async fn a_peer_behind_20_kilobytes_a_second_that_goes_on_taking_bytes_is_never_closed() {
    let mut network = Network::new();
    let (here, there, elsewhere) = (network.host(), network.host(), network.host());
    let relay = here.relay(&["--circuit-bytes=0", "--circuit-duration=0s"]);
    let carries = Role { carries: true, ..Role::default() };
    let target = start(&there, &relay, carries.clone()).await;
    assert_eq!(target.status, OK);
    there.slow_down(SLOW);
    let downloads = Role { target: Some(target.peer), ..carries };
    let source = within(start(&elsewhere, &relay, downloads)).await;
    assert_eq!(source.status, OK);
    sleep(a_while()).await;
    for peer in [source.peer, target.peer] {
        assert!(!says(&relay, &judged(peer)) && !says(&relay, &format!("closed: peer {peer}")));
    }
    assert!(!says(&relay, "grace began") && !says(&relay, "circuit 1 closed"));
    drop(source);
    relay.wait_for_log(" bytes to the target").await;
    let carried = relay.log().iter().find_map(|line| {
        let (before, _) = line.split_once(" bytes to the target")?;
        before.rsplit(' ').next()?.parse::<u64>().ok()
    });
    // Half of what the path could have brought.
    let least = SLOW as u64 / 2 * a_while().as_secs();
    assert!(carried.is_some_and(|bytes| bytes > least), "{carried:?} of {least}");
}

/// A port on the way to the relay's, where what the relay says is read slowly.
async fn read_slowly(relay: u16) -> u16 {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.expect("a port");
    let port = listener.local_addr().expect("a port").port();
    tokio::spawn(async move {
        let (client, _) = listener.accept().await.expect("it is dialed");
        let socket = TcpSocket::new_v4().expect("a socket");
        // A window smaller than what the relay would like to send at once.
        socket.set_recv_buffer_size(8 * 1024).expect("it takes that");
        let relay = socket.connect((Ipv4Addr::LOCALHOST, relay).into()).await;
        let relay = relay.expect("it listens");
        let (mut from_client, mut to_client) = client.into_split();
        let (mut from_relay, mut to_relay) = relay.into_split();
        tokio::spawn(async move { copy(&mut from_client, &mut to_relay).await });
        let mut piece = vec![0; SLOW / 10];
        while let Ok(read) = from_relay.read(&mut piece).await
            && read > 0
            && to_client.write_all(&piece[..read]).await.is_ok()
        {
            sleep(Duration::from_secs_f64(read as f64 / SLOW as f64)).await;
        }
    });
    port
}

/// Its window in TCP is small, and closed most of the time: where the kernel is told to give up what is not
/// acknowledged for 60 s (TCP_USER_TIMEOUT), it gives up this one after 60 s.
#[tokio::test]
#[ignore = "needs root, iproute2 and nftables"]
async fn a_peer_that_reads_20_kilobytes_a_second_is_never_closed() {
    let relay = Relay::start(&["--circuit-bytes=0", "--circuit-duration=0s"]);
    let (port, here) = (relay.port(), Ipv4Addr::LOCALHOST);
    let slow = read_slowly(port).await;
    let mut target = Stranger::connect(slow, here).await.expect("there is room");
    assert_eq!(target.ask_once(&reserve()).await.expect("an answer").1, OK);
    let mut source = Stranger::connect(port, here).await.expect("there is room");
    let stream = source.next_stream();
    source.say(&data(SYN, stream, &opening(&connect(target.peer)))).await.expect("it is there");
    let circuit = target.agree_to(1).await.expect("it is asked")[0];
    target.say(&frame(WINDOW_UPDATE, 0, circuit, 1 << 30)).await.expect("it is there");
    let writes = tokio::spawn(async move { source.write(stream, usize::MAX).await });
    let start = Instant::now();
    while start.elapsed() < a_while() {
        let came = target.frame().await.expect("it stays connected");
        assert!(came.stream != circuit || !came.has(RST | FIN), "the circuit stays");
        // It says something, and is no silent peer.
        target.say(&frame(WINDOW_UPDATE, 0, circuit, 1)).await.expect("it stays connected");
    }
    assert!(!writes.is_finished(), "the circuit stays");
    writes.abort();
}

#[tokio::test]
#[ignore = "needs root, iproute2 and nftables"]
async fn a_client_that_changes_networks_takes_its_slot_along() {
    let mut network = Network::new();
    let (here, old, new, elsewhere) =
        (network.host(), network.host(), network.host(), network.host());
    // The table is full, and so is the address that the client moves to.
    let relay = here.relay(&["--max-reservations=2", "--max-reservations-per-ip=1"]);
    let phone = Role { keypair: Some(Keypair::generate_ed25519()), ..Role::default() };
    let before = start(&old, &relay, phone.clone()).await;
    let _other = reserves(&new, &relay).await;
    assert_eq!(before.status, OK);
    old.lose(100);

    let after = start(&new, &relay, phone).await;
    assert_eq!(after.status, OK, "it comes back while the old path hangs");
    relay.wait_for_log("reservation renewed").await;
    let reaches = async |peer: PeerId| {
        let role = Role { target: Some(peer), ..Role::default() };
        start(&elsewhere, &relay, role).await.status
    };
    assert_eq!(reaches(after.peer).await, OK);

    // The old connection ends at last.
    before.signal("KILL");
    old.lose(0);
    relay.wait_for_log(&format!("closed: peer {}", after.peer)).await;
    assert_eq!(reaches(after.peer).await, OK);
    assert!(!says(&relay, "grace began"));
    assert!(!says(&relay, "slot freed"));
}

#[tokio::test]
#[ignore = "needs root, iproute2 and nftables"]
async fn a_relay_behind_a_router_learns_its_address_from_its_clients() {
    let mut network = Network::of_global_addresses();
    let router = network.host();
    let relay = router.relay_behind(&[]);
    let reached = format!("/ip4/{}/tcp/4001", router.address);
    let address = format!("{reached}/p2p/{}", relay.peer).parse().unwrap();
    let learnt = format!("reached the relay at {reached}");
    let mut clients = Vec::new();
    for _ in 0..4 {
        assert!(!says(&relay, &learnt), "with {} clients", clients.len());
        let role = Role { under: network.host().under(), ..Role::default() };
        clients.push(Process::start(&address, role).await);
    }
    relay.wait_for_log(&learnt).await;
}

async fn start(host: &Host, relay: &Relay, role: Role) -> Process {
    let role = Role { under: host.under(), ..role };
    Process::start(&relay.address, role).await
}

async fn reserves(host: &Host, relay: &Relay) -> Process {
    let client = start(host, relay, Role::default()).await;
    assert_eq!(client.status, OK);
    client
}

async fn reserve_all(count: usize, host: &Host, relay: &Relay) -> Vec<Process> {
    future::join_all((0..count).map(|_| reserves(host, relay))).await
}

/// Each was probed, so many times or more often.
fn were_asked(clients: &[Process], times: usize, relay: &Relay) {
    let log = relay.log();
    for client in clients {
        let asked = format!("probe sent: peer {}", client.peer);
        let asked = log.iter().filter(|line| line.contains(&asked)).count();
        assert!(asked >= times, "{} was asked {asked} times", client.peer);
    }
}

/// All have their slots, had them all the time, and can be reached.
async fn are_unharmed(clients: &[Process], from: &Host, relay: &Relay) {
    for bad in ["peer silent", "grace began", "slot freed"] {
        assert!(!says(relay, bad), "{bad}");
    }
    for client in clients {
        let role = Role { target: Some(client.peer), ..Role::default() };
        let source = within(start(from, relay, role)).await;
        assert_eq!(source.status, OK);
    }
}

fn judged(peer: PeerId) -> String {
    format!("peer silent: peer {peer}")
}

fn says(relay: &Relay, text: &str) -> bool {
    relay.log().iter().any(|line| line.contains(text))
}
