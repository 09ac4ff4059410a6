//! Many clients at once: whoever looks on from outside counts what they count.

use std::{
    collections::HashSet,
    hash::{BuildHasher, BuildHasherDefault, DefaultHasher},
};

use crate::common::{
    Client, Relay,
    messages::{connect, reserve},
    within,
};
use libp2p::{Multiaddr, PeerId, futures::future, identity::Keypair};

const CLIENTS: usize = 40;
const SLOTS: usize = 25;
const ROUNDS: usize = 12;

const OK: Option<i32> = Some(100);
const RESERVATION_REFUSED: Option<i32> = Some(200);
const NO_RESERVATION: Option<i32> = Some(204);

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn however_many_come_and_go_at_once_the_counts_agree() {
    the_counts_agree("--threads=4").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn with_one_thread_they_do_so_as_well() {
    the_counts_agree("--threads=1").await;
}

async fn the_counts_agree(threads: &str) {
    let flags = "--max-reservations=25 --max-reservations-per-ip=0 --grace=1s --probe=0s \
                 --reserve-rate=0 --connect-rate=0 --max-handshakes=256";
    let relay = Relay::start(&[&flags.split(' ').collect::<Vec<_>>()[..], &[threads]].concat());
    let clients = (0..CLIENTS).map(|n| tokio::spawn(live(n, relay.address.clone())));
    let clients = future::join_all(clients).await;
    let clients: Vec<_> = clients.into_iter().map(|client| client.unwrap()).collect();

    // Some have a slot at the end, some have none, some are gone.
    let everyone: Vec<_> = clients.iter().map(|client| client.peer).collect();
    let holders = clients.iter().filter(|client| client.holds);
    let holders: HashSet<_> = holders.map(|client| client.peer).collect();
    assert!(!holders.is_empty() && holders.len() < CLIENTS);

    // The log is read as a ledger: never more slots than there are, and in the end the same.
    let settled = async {
        while ledger(&relay.log()) != holders {
            tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        }
    };
    within(settled).await;

    // And to whoever asks, those can be reached and nobody else.
    let mut observer = Client::connect(&relay).await;
    let mut reached = HashSet::new();
    for peer in everyone {
        if observer.ask(&connect(peer)).await.status != NO_RESERVATION {
            reached.insert(peer);
        }
    }
    assert_eq!(reached, holders);
}

/// What became of a client.
struct Lived {
    peer: PeerId,
    holds: bool,
    /// Its connection, which keeps its slot.
    _client: Option<Client>,
}

/// One client's life: it reserves, renews, goes and comes back, as chance has it.
async fn live(n: usize, relay: Multiaddr) -> Lived {
    let keypair = Keypair::generate_ed25519();
    let peer = keypair.public().to_peer_id();
    let mut client = None;
    let mut holds = false;
    for round in 0..ROUNDS {
        // The same chances each time, in an order that the machine makes up.
        let chance = BuildHasherDefault::<DefaultHasher>::new().hash_one((n, round)) % 4;
        if chance == 0 {
            if let Some(client) = client.take() {
                Client::leave(client).await;
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
        match client.ask(&reserve()).await.status {
            OK => holds = true,
            status => {
                assert_eq!(status, RESERVATION_REFUSED);
                assert!(!holds, "a renewal is never refused for want of room");
            }
        }
    }
    Lived { peer, holds, _client: client }
}

/// Who holds a slot, in grace or not, by what the log says was granted and freed.
fn ledger(log: &[String]) -> HashSet<PeerId> {
    let mut holders = HashSet::new();
    for line in log {
        let peer = |after: &str| {
            let rest = line.split_once(after)?.1;
            rest.split(' ').next()?.parse::<PeerId>().ok()
        };
        if let Some(peer) = peer("reservation granted: peer ") {
            assert!(holders.insert(peer), "{peer} has one slot");
            assert!(holders.len() <= SLOTS, "no slot too many");
        } else if let Some(peer) = peer("slot freed: peer ") {
            assert!(holders.remove(&peer), "{peer} had one");
        }
    }
    holders
}
