//! The relay is killed and started again with 500 clients, which reconnect by themselves.
//!
//! Every setting is at its default, so the clients use many addresses of 127.0.0.0/8. `interop.rs` does the same with
//! Go clients.

use std::{
    collections::HashSet,
    net::Ipv4Addr,
    time::{Duration, Instant},
};

use libp2p::{
    Multiaddr, PeerId, Swarm, Transport,
    core::upgrade::Version,
    futures::StreamExt,
    identity::Keypair,
    multiaddr::Protocol,
    noise, ping, relay,
    swarm::{Config, NetworkBehaviour, SwarmEvent},
    yamux,
};
use tokio::{sync::mpsc, time::sleep};

use crate::common::{
    Relay,
    http::{self, ON_ANY_PORT, get, samples},
    tcp_from::TcpFrom,
    within,
};

const CLIENTS: usize = 500;

/// How many clients share an address, which is in a subnet of its own.
const PER_ADDRESS: usize = 25;

/// The backoff of a client that cannot reconnect: the first pause, doubled each time up to the longest. The first
/// attempt is immediate, as it is for all clients.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_kill_9_all_500_clients_reserve_again_without_refusal() {
    rlimit::increase_nofile_limit(u64::MAX).expect("a limit of open files");
    let relay = Relay::start(&[]);
    let (sender, mut reports) = mpsc::unbounded_channel();
    let clients: HashSet<_> = (0..CLIENTS)
        .map(|n| {
            let (keypair, from) = (Keypair::generate_ed25519(), address(n));
            let peer = keypair.public().to_peer_id();
            tokio::spawn(run_client(keypair, from, relay.address.clone(), sender.clone()));
            peer
        })
        .collect();
    let start = Instant::now();
    all_reserve(&clients, &mut reports).await;
    println!("{CLIENTS} clients reserved within {:.1} s", start.elapsed().as_secs_f64());
    assert_eq!(relay.count_in_log("refused"), 0);

    let peer = relay.peer;
    let listen = format!("--listen=/ip4/127.0.0.1/tcp/{}", relay.port());
    let killed = Instant::now();
    let relay = Relay::start_in(relay.kill(), &[&listen, ON_ANY_PORT]);
    let down = killed.elapsed();
    assert_eq!(relay.peer, peer);
    all_reserve(&clients, &mut reports).await;
    let denied = relay.count_in_log("connection denied");
    println!(
        "kill -9 under {CLIENTS} clients of rust-libp2p: down for {:.2} s, all reserved again {:.1} s \
         after the kill; {denied} connections were turned away and tried again",
        down.as_secs_f64(),
        killed.elapsed().as_secs_f64(),
    );
    for refused in ["refused", "rejected", "answer undelivered", "slot freed"] {
        assert_eq!(relay.count_in_log(refused), 0, "{refused}");
    }
    assert_eq!(relay.count_in_log("reservation granted"), CLIENTS);
    let port = http::port(&relay).await;
    let all_live = async {
        while samples(&get(port, "/metrics").await)[r#"relaylet_slots{state="live"}"#]
            != CLIENTS as f64
        {
            sleep(Duration::from_millis(100)).await;
        }
    };
    within(all_live).await;
}

/// Waits until each client has reported that it holds a slot.
async fn all_reserve(
    clients: &HashSet<PeerId>,
    reports: &mut mpsc::UnboundedReceiver<Result<PeerId, String>>,
) {
    let mut waiting = clients.clone();
    while !waiting.is_empty() {
        let report = within(reports.recv()).await.expect("the clients run");
        let peer = report.unwrap_or_else(|refused| panic!("a client was refused: {refused}"));
        assert!(waiting.remove(&peer), "{peer} reserved twice");
    }
}

/// The source address of a client.
fn address(n: usize) -> Ipv4Addr {
    let subnet = u8::try_from(n / PER_ADDRESS).expect("fewer than 256 subnets");
    Ipv4Addr::new(127, 0, subnet + 1, 1)
}

/// Runs a rust-libp2p client with the reconnect loop that an app adds to it.
async fn run_client(
    keypair: Keypair,
    from: Ipv4Addr,
    relay: Multiaddr,
    sender: mpsc::UnboundedSender<Result<PeerId, String>>,
) {
    let mut swarm = client(&keypair, from);
    let peer = *swarm.local_peer_id();
    let circuit = relay.clone().with(Protocol::P2pCircuit);
    let mut pause = FIRST_PAUSE;
    swarm.dial(relay.clone()).expect("the relay can be dialed");
    loop {
        match swarm.select_next_some().await {
            SwarmEvent::ConnectionEstablished { .. } => {
                swarm.listen_on(circuit.clone()).expect("a relay's address");
            }
            SwarmEvent::Behaviour(PartsEvent::Relay(
                relay::client::Event::ReservationReqAccepted { renewal: false, .. },
            )) => {
                pause = FIRST_PAUSE;
                let _ = sender.send(Ok(peer));
            }
            // Connected, but the reservation was refused.
            SwarmEvent::ListenerClosed { reason, .. } if swarm.network_info().num_peers() > 0 => {
                let _ = sender.send(Err(format!("{peer}: {reason:?}")));
            }
            SwarmEvent::ConnectionClosed { .. } => {
                swarm.dial(relay.clone()).expect("the relay can be dialed");
            }
            SwarmEvent::OutgoingConnectionError { .. } => {
                sleep(pause).await;
                pause = LONGEST_PAUSE.min(2 * pause);
                swarm.dial(relay.clone()).expect("the relay can be dialed");
            }
            _ => {}
        }
    }
}

#[derive(NetworkBehaviour)]
struct Parts {
    relay: relay::client::Behaviour,
    ping: ping::Behaviour,
}

fn client(keypair: &Keypair, from: Ipv4Addr) -> Swarm<Parts> {
    let peer = keypair.public().to_peer_id();
    let (circuits, relay) = relay::client::new(peer);
    let transport = circuits
        .or_transport(TcpFrom(from))
        .upgrade(Version::V1Lazy)
        .authenticate(noise::Config::new(keypair).expect("a key for Noise"))
        .multiplex(yamux::Config::default())
        .boxed();
    let parts = Parts { relay, ping: ping::Behaviour::default() };
    Swarm::new(transport, parts, peer, Config::with_tokio_executor())
}
