//! Who is let in when all places are taken: whoever holds a slot before a stranger.

use std::time::{Duration, Instant};

use crate::common::{
    Client, PATIENCE, Relay, STOP, Security, agree,
    by_hand::{proposal, say_and_hang_up, tcp},
    circuit,
    messages::connect as connect_to,
    read_bytes,
};
use libp2p::{PeerId, futures::AsyncWriteExt, identity::Keypair};

/// Connects, and waits until the relay knows: a client is through with its handshake before that.
async fn connect(relay: &Relay, keypair: &Keypair) -> Client {
    let opened = format!("opened: peer {}", keypair.public().to_peer_id());
    let before = relay.count_in_log(&opened);
    let client = Client::connect_as(keypair.clone(), &relay.address, Security::Noise).await;
    let start = Instant::now();
    while relay.count_in_log(&opened) == before {
        assert!(start.elapsed() < PATIENCE, "{:#?}", relay.log());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    client
}

/// Somebody new, connected as above.
async fn connect_stranger(relay: &Relay) -> Client {
    connect(relay, &Keypair::generate_ed25519()).await
}

/// Waits until this has happened to that client.
async fn lost(relay: &Relay, client: &Client) {
    relay.wait_for_log(&format!("closed: peer {}", client.peer)).await;
}

#[tokio::test]
async fn who_holds_a_slot_takes_the_place_of_the_stranger_that_was_idle_the_longest() {
    let relay = Relay::start(&["--max-connections=3", "--idle-timeout=0s"]);
    let owner = Keypair::generate_ed25519();
    let mut holder = connect(&relay, &owner).await;
    holder.reserve().await;
    let gone = format!("closed: peer {}", holder.peer);
    holder.leave().await;
    relay.wait_for_log(&gone).await; // into grace

    let mut strangers = Vec::new();
    for _ in 0..3 {
        strangers.push(connect_stranger(&relay).await);
    }
    // Whoever else comes is turned away, once it has said who it is.
    one_more_is_turned_away(&relay).await;

    let mut holder = connect(&relay, &owner).await;
    lost(&relay, &strangers[0]).await;
    holder.reserve().await;
    for stranger in &mut strangers[1..] {
        stranger.wait_for_connections(1).await;
        stranger.reserve().await;
    }
    relay.wait_for_log(&format!("closing connection: peer {}: preempted", strangers[0].peer)).await;
    // All of them hold a slot now: nobody is closed for a stranger.
    one_more_is_turned_away(&relay).await;
    holder.wait_for_connections(1).await;
}

/// A stranger comes, and does not get in.
async fn one_more_is_turned_away(relay: &Relay) {
    let denied = || {
        let lines = relay.log().into_iter();
        lines.filter(|line| line.contains("connection denied")).count()
    };
    let before = denied();
    let (keypair, address) = (Keypair::generate_ed25519(), relay.address.clone());
    let attempt =
        tokio::spawn(async move { Client::connect_as(keypair, &address, Security::Noise).await });
    let start = Instant::now();
    while denied() == before {
        assert!(start.elapsed() < PATIENCE, "{:#?}", relay.log());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    attempt.abort();
}

#[tokio::test]
async fn when_one_has_left_another_gets_in() {
    let relay = Relay::start(&["--max-connections=2"]);
    let (first, _second) = (connect_stranger(&relay).await, connect_stranger(&relay).await);
    one_more_is_turned_away(&relay).await;
    let gone = format!("closed: peer {}", first.peer);
    first.leave().await;
    relay.wait_for_log(&gone).await;
    connect_stranger(&relay).await.reserve().await;
}

#[tokio::test]
async fn those_in_their_handshakes_keep_nobody_out() {
    let relay = Relay::start(&["--max-connections=1"]);
    let mut silent = Vec::new();
    for _ in 0..3 {
        silent.push(tcp(&relay).await);
    }
    say_and_hang_up(tcp(&relay).await, &proposal("/noise")).await;
    connect_stranger(&relay).await.reserve().await;
}

#[tokio::test]
async fn beyond_its_cap_a_holder_replaces_a_connection_of_its_own_and_takes_its_slot_along() {
    let relay = Relay::start(&["--max-connections-per-peer=1"]);
    let owner = Keypair::generate_ed25519();
    let mut before = connect(&relay, &owner).await;
    before.reserve().await;
    let mut bob = connect_stranger(&relay).await;
    bob.reserve().await;
    let mut alice = connect_stranger(&relay).await;
    let (mut there, mut back) = circuit(&mut alice, &mut bob).await;

    let mut after = connect(&relay, &owner).await;
    before.wait_for_connections(0).await;
    // The slot is on the new one at once, without another RESERVE.
    let (mut to, mut from) = circuit(&mut alice, &mut after).await;
    assert!(!relay.log().iter().any(|line| line.contains("grace began")));
    // Nobody else was touched.
    for (there, back) in [(&mut there, &mut back), (&mut to, &mut from)] {
        there.write_all(b"hello").await.unwrap();
        there.flush().await.unwrap();
        assert_eq!(read_bytes(back, 5).await, b"hello");
    }
}

#[tokio::test]
async fn a_stranger_beyond_its_cap_is_turned_away_and_its_others_stay() {
    let relay = Relay::start(&["--max-connections-per-peer=1"]);
    let owner = Keypair::generate_ed25519();
    let mut first = connect(&relay, &owner).await;
    let (keypair, address) = (owner.clone(), relay.address.clone());
    let second =
        tokio::spawn(async move { Client::connect_as(keypair, &address, Security::Noise).await });
    relay.wait_for_log("too many connections of the peer").await;
    second.abort();
    first.reserve().await;
    // What was turned away does not count.
    let gone = format!("closed: peer {}", first.peer);
    first.leave().await;
    relay.wait_for_log(&gone).await;
    connect(&relay, &owner).await.reserve().await;
}

#[tokio::test]
async fn a_third_connection_takes_the_place_of_the_longest_silent_and_others_go_on() {
    let relay = Relay::start(&["--max-connections-per-peer=2"]);
    let mut bob = connect_stranger(&relay).await;
    bob.reserve().await;
    let mut alice = connect_stranger(&relay).await;
    let (mut there, mut back) = circuit(&mut alice, &mut bob).await;

    let owner = Keypair::generate_ed25519();
    let mut first = connect(&relay, &owner).await;
    first.reserve().await;
    let mut second = connect(&relay, &owner).await;
    // It is heard of later than the first, whose slot it leaves alone: nobody is there to be reached.
    let nobody = second.ask(&connect_to(PeerId::random())).await;
    assert_eq!(nobody.status, Some(204), "{nobody:?}");

    let mut third = connect(&relay, &owner).await;
    first.wait_for_connections(0).await;
    let mut stops = [second.accept(STOP), third.accept(STOP)];
    let [of_second, of_third] = &mut stops;
    let request = connect_to(third.peer);
    // Whichever of the two has the slot now is asked.
    let either = async {
        tokio::select! {
            (_, stream) = agree(of_second) => stream,
            (_, stream) = agree(of_third) => stream,
        }
    };
    let ((answer, mut to), mut from) = tokio::join!(alice.ask_for_circuit(&request), either);
    assert_eq!(answer.status, Some(100), "{answer:?}");
    assert_eq!(relay.count_in_log("grace began"), 0);
    for (there, back) in [(&mut there, &mut back), (&mut to, &mut from)] {
        there.write_all(b"hello").await.unwrap();
        there.flush().await.unwrap();
        assert_eq!(read_bytes(back, 5).await, b"hello");
    }
    second.wait_for_connections(1).await;
    assert!(third.kept_its_connection() && alice.kept_its_connection());
    assert!(bob.kept_its_connection());
}

#[tokio::test]
async fn those_that_were_turned_away_leave_no_count_behind() {
    // Whoever comes after one that still counted would be one too many for its address.
    let relay =
        Relay::start(&["--max-connections=1", "--max-connections-per-ip=2", "--max-handshakes=1"]);
    let first = connect_stranger(&relay).await;
    for _ in 0..5 {
        one_more_is_turned_away(&relay).await;
    }
    // Neither for its address nor for its handshake.
    let log = relay.log();
    let mut denied = log.iter().filter(|line| line.contains("connection denied"));
    assert!(denied.all(|line| line.ends_with(": too many connections")), "{log:#?}");
    let gone = format!("closed: peer {}", first.peer);
    first.leave().await;
    relay.wait_for_log(&gone).await;
    connect_stranger(&relay).await.reserve().await;
}
