//! Many clients at once: the log, the clients and CONNECT must agree on which peers hold a slot.

use std::{
    collections::HashSet,
    hash::{BuildHasher, BuildHasherDefault, DefaultHasher},
};

use crate::common::{
    Client, Relay,
    messages::{NO_RESERVATION, OK, RESERVATION_REFUSED, connect, reserve},
    within,
};
use libp2p::{Multiaddr, PeerId, futures::future, identity::Keypair};

const CLIENTS: usize = 40;
const SLOTS: usize = 25;
const ROUNDS: usize = 12;

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn counts_match_while_many_clients_come_and_go() {
    assert_counts_match("--threads=4").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn counts_match_with_one_thread() {
    assert_counts_match("--threads=1").await;
}

async fn assert_counts_match(threads: &str) {
    let flags = "--max-reservations=25 --max-reservations-per-ip=0 --grace=1s --probe=0s \
                 --reserve-rate=0 --connect-rate=0 --max-handshakes=256";
    let relay = Relay::start(&[&flags.split(' ').collect::<Vec<_>>()[..], &[threads]].concat());
    let clients = (0..CLIENTS).map(|n| tokio::spawn(run_client(n, relay.address.clone())));
    let clients = future::join_all(clients).await;
    let clients: Vec<_> = clients.into_iter().map(|client| client.unwrap()).collect();

    // At the end some clients hold a slot, some have none, some are disconnected.
    let all_peers: Vec<_> = clients.iter().map(|client| client.peer).collect();
    let holders = clients.iter().filter(|client| client.holds);
    let holders: HashSet<_> = holders.map(|client| client.peer).collect();
    assert!(!holders.is_empty() && holders.len() < CLIENTS);

    // Never more slots than configured, and at the end exactly the holders' according to the log.
    let settled = async {
        while holders_in_log(&relay.log()) != holders {
            tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        }
    };
    within(settled).await;

    // CONNECT reaches those peers and no others.
    let mut observer = Client::connect(&relay).await;
    let mut reached = HashSet::new();
    for peer in all_peers {
        if observer.request(&connect(peer)).await.status != NO_RESERVATION {
            reached.insert(peer);
        }
    }
    assert_eq!(reached, holders);
}

/// The state of a client at the end.
struct Outcome {
    peer: PeerId,
    holds: bool,
    /// Its connection, which keeps its slot.
    _client: Option<Client>,
}

/// Runs a client that reserves, renews, disconnects and connects again at random.
async fn run_client(n: usize, relay: Multiaddr) -> Outcome {
    let keypair = Keypair::generate_ed25519();
    let peer = keypair.public().to_peer_id();
    let mut client = None;
    let mut holds = false;
    for round in 0..ROUNDS {
        // The same choices in each run; their interleaving is up to the machine.
        let chance = BuildHasherDefault::<DefaultHasher>::new().hash_one((n, round)) % 4;
        if chance == 0 {
            if let Some(client) = client.take() {
                Client::disconnect(client).await;
            }
            holds = false;
            continue;
        }
        if client.is_none() {
            client = Some(Client::connect_from(n, keypair.clone(), &relay).await);
        }
        let Some(client) = &mut client else {
            continue;
        };
        match client.request(&reserve()).await.status {
            OK => holds = true,
            status => {
                assert_eq!(status, RESERVATION_REFUSED);
                assert!(!holds, "a renewal is never refused for lack of room");
            }
        }
    }
    Outcome { peer, holds, _client: client }
}

/// The peers that hold a slot, live or in grace, according to the grants and releases in the log.
fn holders_in_log(log: &[String]) -> HashSet<PeerId> {
    let mut holders = HashSet::new();
    for line in log {
        let peer = |after: &str| {
            let rest = line.split_once(after)?.1;
            rest.split(' ').next()?.parse::<PeerId>().ok()
        };
        if let Some(peer) = peer("reservation granted: peer ") {
            assert!(holders.insert(peer), "{peer} has one slot");
            assert!(holders.len() <= SLOTS, "too many slots");
        } else if let Some(peer) = peer("slot freed: peer ") {
            assert!(holders.remove(&peer), "{peer} had one");
        }
    }
    holders
}
