//! The relay is killed and started anew under 500 clients, which come back by themselves.
//!
//! Every setting is at its default, so they come from many addresses: a machine has all of
//! 127.0.0.0/8. `interop.rs` has those in Go.

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
    http::{self, ANYWHERE, get, samples},
    tcp_from::TcpFrom,
    within,
};

const CLIENTS: usize = 500;

/// So many share an address, and a subnet.
const PER_ADDRESS: usize = 25;

/// How long a client that cannot come back waits before it tries again: so long at first, then twice
/// as long each time. The first time it tries at once, as all the others do.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_kill_9_under_500_clients_all_are_reserved_again_and_none_is_refused() {
    rlimit::increase_nofile_limit(u64::MAX).expect("a limit of open files");
    let relay = Relay::start(&[]);
    let (tell, mut told) = mpsc::unbounded_channel();
    let clients: HashSet<_> = (0..CLIENTS)
        .map(|n| {
            let (keypair, from) = (Keypair::generate_ed25519(), address(n));
            let peer = keypair.public().to_peer_id();
            tokio::spawn(live(keypair, from, relay.address.clone(), tell.clone()));
            peer
        })
        .collect();
    let start = Instant::now();
    all_reserve(&clients, &mut told).await;
    println!("{CLIENTS} clients came in {:.1} s", start.elapsed().as_secs_f64());
    assert_eq!(relay.count_in_log("refused"), 0);

    let peer = relay.peer;
    let listen = format!("--listen=/ip4/127.0.0.1/tcp/{}", relay.port());
    let killed = Instant::now();
    let relay = Relay::start_in(relay.kill(), &[&listen, ANYWHERE]);
    let down = killed.elapsed();
    assert_eq!(relay.peer, peer);
    all_reserve(&clients, &mut told).await;
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
    let live = async {
        while samples(&get(port, "/metrics").await)[r#"relaylet_slots{state="live"}"#]
            != CLIENTS as f64
        {
            sleep(Duration::from_millis(100)).await;
        }
    };
    within(live).await;
}

/// Waits until each of them has told that it holds a slot.
async fn all_reserve(
    clients: &HashSet<PeerId>,
    told: &mut mpsc::UnboundedReceiver<Result<PeerId, String>>,
) {
    let mut waiting = clients.clone();
    while !waiting.is_empty() {
        let news = within(told.recv()).await.expect("they live");
        let peer = news.unwrap_or_else(|refused| panic!("a client was refused: {refused}"));
        assert!(waiting.remove(&peer), "{peer} lost the slot that it had");
    }
}

/// Where a client comes from.
fn address(n: usize) -> Ipv4Addr {
    let subnet = u8::try_from(n / PER_ADDRESS).expect("not that many");
    Ipv4Addr::new(127, 0, subnet + 1, 1)
}

/// A client: rust-libp2p's, which does not come back by itself, and what every app that wants it to
/// has around it.
async fn live(
    keypair: Keypair,
    from: Ipv4Addr,
    relay: Multiaddr,
    tell: mpsc::UnboundedSender<Result<PeerId, String>>,
) {
    let mut swarm = client(&keypair, from);
    let peer = *swarm.local_peer_id();
    let circuit = relay.clone().with(Protocol::P2pCircuit);
    let mut pause = FIRST_PAUSE;
    swarm.dial(relay.clone()).expect("it can be dialed");
    loop {
        match swarm.select_next_some().await {
            SwarmEvent::ConnectionEstablished { .. } => {
                swarm.listen_on(circuit.clone()).expect("a relay's address");
            }
            SwarmEvent::Behaviour(PartsEvent::Relay(
                relay::client::Event::ReservationReqAccepted { renewal: false, .. },
            )) => {
                pause = FIRST_PAUSE;
                let _ = tell.send(Ok(peer));
            }
            // The connection is there, and yet there is no slot.
            SwarmEvent::ListenerClosed { reason, .. } if swarm.network_info().num_peers() > 0 => {
                let _ = tell.send(Err(format!("{peer}: {reason:?}")));
            }
            SwarmEvent::ConnectionClosed { .. } => {
                swarm.dial(relay.clone()).expect("it can be dialed");
            }
            SwarmEvent::OutgoingConnectionError { .. } => {
                sleep(pause).await;
                pause = LONGEST_PAUSE.min(2 * pause);
                swarm.dial(relay.clone()).expect("it can be dialed");
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
