//! Network failures between the relay and its clients, at realistic durations.
//!
//! It creates network namespaces, and takes two minutes and a half: `.ci/env netns`.
//!
//! The clients send nothing by themselves: one that keeps its slot has answered the relay's probes.

use std::{
    env,
    net::Ipv4Addr,
    time::{Duration, Instant},
};

use crate::common::{
    Relay,
    by_hand::{FIN, RST, SYN, WINDOW_UPDATE, data, frame},
    client_process::{Process, Role},
    messages::{NO_RESERVATION, OK, RESERVATION_REFUSED, connect, reserve},
    network::{Host, Network},
    raw_peers::{RawPeer, hop_opening},
    within,
};
use libp2p::{PeerId, futures::future, identity::Keypair};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, copy},
    net::{TcpListener, TcpSocket},
    time::sleep,
};

/// Longer than the default heartbeat: a silent peer has been probed by then.
const A_HEARTBEAT: Duration = Duration::from_secs(35);

#[tokio::test]
#[ignore = "needs root, iproute2 and nftables"]
async fn an_unplugged_client_loses_its_slot() {
    let mut network = Network::new();
    let (here, there) = (network.host(), network.host());
    let relay = here.relay(&["--heartbeat=1s", "--silence=3s", "--grace=1s"]);
    let client = start_reserved(&there, &relay).await;
    there.set_cable(false);
    relay.wait_for_log(&timed_out(client.peer)).await;
    relay.wait_for_log("grace over").await;
}

#[tokio::test]
#[ignore = "needs root, iproute2 and nftables"]
async fn a_newcomer_gets_the_slot_of_an_unplugged_client() {
    let mut network = Network::new();
    let (here, there, elsewhere) = (network.host(), network.host(), network.host());
    let relay = here.relay(&["--max-reservations=1"]);
    let client = start_reserved(&there, &relay).await;
    there.set_cable(false);
    let unplugged = Instant::now();
    let newcomer = loop {
        let newcomer = start(&elsewhere, &relay, Role::default()).await;
        if newcomer.status == OK {
            break newcomer;
        }
        assert_eq!(newcomer.status, RESERVATION_REFUSED);
        assert!(unplugged.elapsed() < Duration::from_secs(40), "long before the silence limit");
    };
    relay.wait_for_log(&timed_out(client.peer)).await;
    relay.wait_for_log(&format!("taken by {}", newcomer.peer)).await;
}

#[tokio::test]
#[ignore = "needs root, iproute2 and nftables"]
async fn no_slot_is_lost_in_two_minutes_of_30_percent_packet_loss() {
    let mut network = Network::new();
    let (here, there) = (network.host(), network.host());
    let relay = here.relay(&[]);
    // Clients ping at rust-libp2p's default interval. One that only answers has half a minute to do so, in which TCP
    // retransmits eight times: of forty probes in both directions, one would now and then be lost for that long.
    let pinging = Role { pings: true, ..Role::default() };
    let clients = (0..10).map(|_| start(&there, &relay, pinging.clone()));
    let clients = future::join_all(clients).await;
    let to_unknown = Role { target: Some(PeerId::random()), ..Role::default() };
    let refused = start(&there, &relay, to_unknown).await;
    assert_eq!(refused.status, NO_RESERVATION);
    here.lose(30);
    sleep(Duration::from_secs(120)).await;
    here.lose(0);
    assert_unharmed(&clients, &there, &relay).await;
    // As this test takes more than a minute, it also checks the summary that is logged once a minute.
    let summary = "circuits refused within a minute: 1: the target holds no live reservation";
    let summary = format!("{summary}; most from {}: 1", there.address);
    relay.wait_for_log(&summary).await;
}

#[tokio::test]
#[ignore = "needs root, iproute2 and nftables"]
async fn no_peer_times_out_while_the_relay_itself_is_unplugged() {
    let mut network = Network::new();
    let (here, there) = (network.host(), network.host());
    let relay = here.relay(&[]);
    let clients = reserve_all(20, &there, &relay).await;
    here.set_cable(false);
    sleep(Duration::from_secs(40)).await;
    assert_probed(&clients, 1, &relay);
    here.set_cable(true);
    sleep(A_HEARTBEAT).await;
    assert_unharmed(&clients, &there, &relay).await;
}

#[tokio::test]
#[ignore = "needs root, iproute2 and nftables"]
async fn no_peer_times_out_after_the_relay_was_stopped_for_90_s() {
    let mut network = Network::new();
    let (here, there) = (network.host(), network.host());
    let relay = here.relay(&[]);
    let clients = reserve_all(20, &there, &relay).await;
    relay.signal("STOP");
    sleep(Duration::from_secs(90)).await;
    relay.signal("CONT");
    relay.wait_for_log("process was suspended for").await;
    sleep(A_HEARTBEAT).await;
    assert_probed(&clients, 1, &relay);
    assert_unharmed(&clients, &there, &relay).await;
}

/// The rate of the slow link, in bytes a second. The test must transfer more than all buffers of the path hold.
const SLOW: usize = 20_000;

/// Longer than the 60 s after which a stalled peer is closed; with `RELAYLET_NETNS=long` five minutes.
fn duration() -> Duration {
    let is_long = env::var("RELAYLET_NETNS").is_ok_and(|how| how == "long");
    Duration::from_secs(if is_long { 300 } else { 100 })
}

#[tokio::test]
#[ignore = "needs root, iproute2 and nftables"]
async fn a_peer_on_a_20_kb_per_second_link_is_not_closed() {
    let mut network = Network::new();
    let (here, there, elsewhere) = (network.host(), network.host(), network.host());
    let relay = here.relay(&["--circuit-bytes=0", "--circuit-duration=0s"]);
    let carries = Role { carries: true, ..Role::default() };
    let target = start(&there, &relay, carries.clone()).await;
    assert_eq!(target.status, OK);
    there.slow_down(SLOW);
    let sends = Role { target: Some(target.peer), ..carries };
    let source = within(start(&elsewhere, &relay, sends)).await;
    assert_eq!(source.status, OK);
    sleep(duration()).await;
    for peer in [source.peer, target.peer] {
        for line in [timed_out(peer), format!("closed: peer {peer}")] {
            assert_eq!(relay.count_in_log(&line), 0, "{line}");
        }
    }
    assert_eq!(["grace began", "circuit 1 closed"].map(|line| relay.count_in_log(line)), [0; 2]);
    drop(source);
    relay.wait_for_log(" bytes to the target").await;
    let transferred = relay.log().iter().find_map(|line| {
        let (before, _) = line.split_once(" bytes to the target")?;
        before.rsplit(' ').next()?.parse::<u64>().ok()
    });
    // Half of the link's capacity.
    let least = SLOW as u64 / 2 * duration().as_secs();
    assert!(transferred.is_some_and(|bytes| bytes > least), "{transferred:?} of {least}");
}

/// A forwarder to the relay's port that reads slowly what the relay sends. Returns its port.
async fn read_slowly(relay: u16) -> u16 {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.expect("a port");
    let port = listener.local_addr().expect("a port").port();
    tokio::spawn(async move {
        let (client, _) = listener.accept().await.expect("a connection");
        let socket = TcpSocket::new_v4().expect("a socket");
        // A smaller window than the relay would fill.
        socket.set_recv_buffer_size(8 * 1024).expect("the option is set");
        let relay = socket.connect((Ipv4Addr::LOCALHOST, relay).into()).await;
        let relay = relay.expect("the relay listens");
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

/// Its TCP window is small and mostly closed: with TCP_USER_TIMEOUT at 60 s the kernel would close the connection after
/// that time.
#[tokio::test]
#[ignore = "needs root, iproute2 and nftables"]
async fn a_peer_that_reads_20_kb_per_second_is_not_closed() {
    let relay = Relay::start(&["--circuit-bytes=0", "--circuit-duration=0s"]);
    let (port, here) = (relay.port(), Ipv4Addr::LOCALHOST);
    let slow = read_slowly(port).await;
    let mut target = RawPeer::connect(slow, here).await.expect("an admitted connection");
    assert_eq!(target.request(&reserve()).await.expect("an answer").1, OK);
    let mut source = RawPeer::connect(port, here).await.expect("an admitted connection");
    let stream = source.next_stream();
    source
        .send(&data(SYN, stream, &hop_opening(&connect(target.peer))))
        .await
        .expect("an open connection");
    let circuit = target.accept_count(1).await.expect("a stop request")[0];
    target.send(&frame(WINDOW_UPDATE, 0, circuit, 1 << 30)).await.expect("an open connection");
    let writes = tokio::spawn(async move { source.write(stream, usize::MAX).await });
    let start = Instant::now();
    while start.elapsed() < duration() {
        let received = target.read_frame().await.expect("an open connection");
        assert!(received.stream != circuit || !received.has(RST | FIN), "the circuit stays");
        // It sends frames, so it is not silent.
        target.send(&frame(WINDOW_UPDATE, 0, circuit, 1)).await.expect("an open connection");
    }
    assert!(!writes.is_finished(), "the circuit stays");
    writes.abort();
}

#[tokio::test]
#[ignore = "needs root, iproute2 and nftables"]
async fn a_client_keeps_its_slot_when_it_changes_networks() {
    let mut network = Network::new();
    let (here, old, new, elsewhere) =
        (network.host(), network.host(), network.host(), network.host());
    // The table is full, and so is the quota of the client's new address.
    let relay = here.relay(&["--max-reservations=2", "--max-reservations-per-ip=1"]);
    let phone = Role { keypair: Some(Keypair::generate_ed25519()), ..Role::default() };
    let before = start(&old, &relay, phone.clone()).await;
    let _other = start_reserved(&new, &relay).await;
    assert_eq!(before.status, OK);
    old.lose(100);

    let after = start(&new, &relay, phone).await;
    assert_eq!(after.status, OK, "it reconnects while the old path hangs");
    relay.wait_for_log("reservation renewed").await;
    let reaches = async |peer: PeerId| {
        let role = Role { target: Some(peer), ..Role::default() };
        start(&elsewhere, &relay, role).await.status
    };
    assert_eq!(reaches(after.peer).await, OK);

    // The old connection closes later.
    before.signal("KILL");
    old.lose(0);
    relay.wait_for_log(&format!("closed: peer {}", after.peer)).await;
    assert_eq!(reaches(after.peer).await, OK);
    assert_eq!(relay.count_in_log("grace began"), 0);
    assert_eq!(relay.count_in_log("slot freed"), 0);
}

#[tokio::test]
#[ignore = "needs root, iproute2 and nftables"]
async fn a_relay_behind_a_router_learns_its_address_from_its_clients() {
    let mut network = Network::of_global_addresses();
    let router = network.host();
    let relay = router.relay_behind(&[]);
    let reached = format!("/ip4/{}/tcp/4001", router.address);
    let address = format!("{reached}/p2p/{}", relay.peer).parse().unwrap();
    let line = format!("reached the relay at {reached}");
    let mut clients = Vec::new();
    for _ in 0..4 {
        assert_eq!(relay.count_in_log(&line), 0, "with {} clients", clients.len());
        let role = Role { command_prefix: network.host().command_prefix(), ..Role::default() };
        clients.push(Process::start(&address, role).await);
    }
    relay.wait_for_log(&line).await;
}

async fn start(host: &Host, relay: &Relay, role: Role) -> Process {
    let role = Role { command_prefix: host.command_prefix(), ..role };
    Process::start(&relay.address, role).await
}

async fn start_reserved(host: &Host, relay: &Relay) -> Process {
    let client = start(host, relay, Role::default()).await;
    assert_eq!(client.status, OK);
    client
}

async fn reserve_all(count: usize, host: &Host, relay: &Relay) -> Vec<Process> {
    future::join_all((0..count).map(|_| start_reserved(host, relay))).await
}

/// Asserts that each client was probed at least this often.
fn assert_probed(clients: &[Process], times: usize, relay: &Relay) {
    for client in clients {
        let probes = relay.count_in_log(&format!("probe sent: peer {}", client.peer));
        assert!(probes >= times, "{} was probed {probes} times", client.peer);
    }
}

/// Asserts that no client has lost its slot at any time, and that CONNECT reaches each.
async fn assert_unharmed(clients: &[Process], from: &Host, relay: &Relay) {
    for bad in ["peer silent", "grace began", "slot freed"] {
        assert_eq!(relay.count_in_log(bad), 0, "{bad}");
    }
    for client in clients {
        let role = Role { target: Some(client.peer), ..Role::default() };
        let source = within(start(from, relay, role)).await;
        assert_eq!(source.status, OK);
    }
}

fn timed_out(peer: PeerId) -> String {
    format!("peer silent: peer {peer}")
}
