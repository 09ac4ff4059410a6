//! Who may use the relay and how often, and what happens when that changes while it runs.

use std::{net::Ipv4Addr, time::Duration};

use crate::common::{
    STOP, Security, agree,
    by_hand::{GO_AWAY, mux, next_frame, secure, tcp_from},
    circuit,
    messages::{connect, reserve},
    read_to_end,
    running::{Change, Running},
    within,
};
use libp2p::{Multiaddr, PeerId, identity::Keypair, multiaddr::Protocol};
use relaylet::{Access, Config, Event, FreedReason, Permission, Refused, Terms};

const OK: Option<i32> = Some(100);
const RESERVATION_REFUSED: Option<i32> = Some(200);
const RESOURCE_LIMIT_EXCEEDED: Option<i32> = Some(201);
const PERMISSION_DENIED: Option<i32> = Some(202);

// ---- Lists

#[tokio::test]
async fn a_peer_that_is_denied_cannot_stay_connected_nor_be_connected_to() {
    let (alice, bob) = (Keypair::generate_ed25519(), Keypair::generate_ed25519());
    let mut config = Config::default();
    config.access.deny_peer.insert(id(&alice));
    let relay = Running::start(config).await;
    assert!(!may_enter(&relay, &alice).await);
    assert!(may_enter(&relay, &bob).await);
    let mut bob = relay.connect(bob).await;
    let to_alice = bob.ask(&connect(id(&alice))).await;
    assert_eq!(to_alice.status, PERMISSION_DENIED);
}

/// Whether the relay keeps a connection of this peer: it identifies itself on one that it keeps.
async fn may_enter(relay: &Running, keypair: &Keypair) -> bool {
    let Ok(tcp) = tcp_from(Ipv4Addr::LOCALHOST, relay.port()).await else {
        return false;
    };
    let Ok(secured) = within(secure(tcp, keypair, Security::Noise)).await else {
        return false;
    };
    let Ok(mut channel) = within(mux(secured)).await else {
        return false;
    };
    within(next_frame(&mut channel)).await.is_some_and(|frame| frame.kind != GO_AWAY)
}

/// A denied peer that was connected before the rules changed is answered.
#[tokio::test]
async fn a_peer_that_is_denied_later_can_neither_reserve_nor_connect() {
    let relay = Running::start(Config::default()).await;
    let mut alice = relay.connect_somebody().await;
    let mut bob = relay.connect_somebody().await;
    bob.reserve().await;
    let denied = alice.peer;
    relay.change(move |config| _ = config.access.deny_peer.insert(denied)).await.unwrap();
    assert_eq!(alice.ask(&reserve()).await.status, PERMISSION_DENIED);
    assert_eq!(alice.ask(&connect(bob.peer)).await.status, PERMISSION_DENIED);
}

#[tokio::test]
async fn a_subnet_that_is_denied_is_denied_whoever_comes_from_it() {
    let mut config = Config::default();
    config.access.deny_subnet = vec!["127.0.0.0/8".parse().unwrap()];
    let relay = Running::start(config).await;
    let tcp = tcp_from(Ipv4Addr::LOCALHOST, relay.port()).await.unwrap();
    assert!(within(secure(tcp, &Keypair::generate_ed25519(), Security::Noise)).await.is_err());
}

#[tokio::test]
async fn who_may_only_connect_gets_a_circuit_and_no_slot() {
    let (device, app) = (Keypair::generate_ed25519(), Keypair::generate_ed25519());
    let mut config = Config::default();
    config.access.allow_peer.insert(id(&device));
    config.access.allow_connect_peer.insert(id(&app));
    let relay = Running::start(config).await;
    let mut device = relay.connect(device).await;
    let mut app = relay.connect(app).await;
    assert!(!may_enter(&relay, &Keypair::generate_ed25519()).await);
    assert_eq!(app.ask(&reserve()).await.status, PERMISSION_DENIED);
    device.reserve().await;
    circuit(&mut app, &mut device).await;
}

// ---- Rules that change

#[tokio::test]
async fn a_rule_that_is_added_frees_the_slot_and_resets_the_circuits() {
    let mut relay = Running::start(Config::default()).await;
    let mut alice = relay.connect_somebody().await;
    let mut bob = relay.connect_somebody().await;
    bob.reserve().await;
    let (mut there, mut back) = circuit(&mut alice, &mut bob).await;
    let denied = bob.peer;
    relay.change(move |config| _ = config.access.deny_peer.insert(denied)).await.unwrap();
    let freed = |event| match event {
        Event::ReservationFreed { peer, reason, .. } => Some((peer, reason)),
        _ => None,
    };
    assert_eq!(relay.until(freed).await, (denied, FreedReason::Denied));
    assert!(read_to_end(&mut there).await.0.is_empty());
    assert!(read_to_end(&mut back).await.0.is_empty());
    assert_eq!(bob.ask(&reserve()).await.status, PERMISSION_DENIED);
}

#[tokio::test]
async fn a_rule_that_is_added_frees_the_slot_of_a_peer_that_is_away() {
    let mut relay = Running::start(Config::default()).await;
    let mut alice = relay.connect_somebody().await;
    alice.reserve().await;
    let away = alice.peer;
    alice.leave().await;
    let left = |event| matches!(event, Event::GraceBegan { .. }).then_some(());
    relay.until(left).await;
    relay
        .change(|config| config.access.deny_subnet = vec!["127.0.0.1/32".parse().unwrap()])
        .await
        .unwrap();
    let freed = |event| match event {
        Event::ReservationFreed { peer, reason, .. } => Some((peer, reason)),
        _ => None,
    };
    assert_eq!(relay.until(freed).await, (away, FreedReason::Denied));
}

#[tokio::test]
async fn a_circuit_whose_source_is_denied_ends() {
    let relay = Running::start(Config::default()).await;
    let mut alice = relay.connect_somebody().await;
    let mut bob = relay.connect_somebody().await;
    bob.reserve().await;
    let (mut there, _back) = circuit(&mut alice, &mut bob).await;
    let denied = alice.peer;
    relay.change(move |config| _ = config.access.deny_peer.insert(denied)).await.unwrap();
    assert!(read_to_end(&mut there).await.0.is_empty());
    bob.reserve().await;
}

#[tokio::test]
async fn a_lowered_cap_drops_nobody_and_admits_nobody() {
    let relay = Running::start(Config::default()).await;
    let mut alice = relay.connect_somebody().await;
    let mut bob = relay.connect_somebody().await;
    let mut carol = relay.connect_somebody().await;
    alice.reserve().await;
    bob.reserve().await;
    relay.change(|config| config.max_reservations = 1).await.unwrap();
    assert_eq!(carol.ask(&reserve()).await.status, RESERVATION_REFUSED, "there is no room");
    alice.reserve().await;
    bob.reserve().await;
    relay.change(|config| config.max_reservations = 3).await.unwrap();
    carol.reserve().await;
}

#[tokio::test]
async fn what_makes_no_sense_changes_nothing() {
    let relay = Running::start(Config::default()).await;
    let mut alice = relay.connect_somebody().await;
    for (setting, change) in [
        ("sweep", Box::new(|config: &mut Config| config.sweep = Duration::ZERO) as Change),
        ("probe", Box::new(|c| c.probe = Duration::from_secs(4))),
        ("silence", Box::new(|c| c.heartbeat = c.silence)),
        ("max_circuits_per_peer", Box::new(|c| c.max_circuits_per_peer = 65)),
        ("announce", Box::new(|c| c.announce = vec!["/p2p-circuit".parse().unwrap()])),
    ] {
        let refused = relay
            .change(move |config| {
                config.reserve_rate = 1;
                change(config);
            })
            .await;
        assert_eq!(refused.expect_err(setting).setting(), setting);
    }
    for _ in 0..3 {
        alice.reserve().await;
    }
}

// ---- Rates

#[tokio::test]
async fn who_asks_too_often_is_told_so_and_can_ask_again_later() {
    let mut config = Config::default();
    config.reserve_rate = 2;
    let mut relay = Running::start(config).await;
    let mut alice = relay.connect_somebody().await;
    alice.reserve().await;
    alice.reserve().await;
    let refused = alice.ask(&reserve()).await;
    assert_eq!(refused.status, RESOURCE_LIMIT_EXCEEDED);
    let reason = |event| match event {
        Event::ReservationRefused { peer, reason, .. } => Some((peer, reason.to_string())),
        _ => None,
    };
    let too_often = Refused::TooOften.to_string();
    assert_eq!(relay.until(reason).await, (alice.peer, too_often));
    // What it has it keeps.
    circuit(&mut relay.connect_somebody().await, &mut alice).await;
    relay.change(|config| config.reserve_rate = 0).await.unwrap();
    alice.reserve().await;
}

#[tokio::test]
async fn an_address_that_asks_too_often_does_not_stop_renewals_from_it() {
    let mut config = Config::default();
    config.reserve_rate = 3;
    config.max_reservations = 1;
    config.probe = Duration::ZERO;
    let relay = Running::start(config).await;
    let mut alice = relay.connect_somebody().await;
    alice.reserve().await;
    let mut asked = 1;
    loop {
        let status = relay.connect_somebody().await.ask(&reserve()).await.status;
        asked += 1;
        match status {
            RESERVATION_REFUSED => {}
            status => break assert_eq!(status, RESOURCE_LIMIT_EXCEEDED),
        }
    }
    assert!(asked > 30, "ten times what one peer may, but {asked}");
    alice.reserve().await;
}

#[tokio::test]
async fn who_connects_too_often_is_told_so() {
    let mut config = Config::default();
    config.connect_rate = 1;
    let relay = Running::start(config).await;
    let mut alice = relay.connect_somebody().await;
    let mut bob = relay.connect_somebody().await;
    bob.reserve().await;
    circuit(&mut alice, &mut bob).await;
    let refused = alice.ask(&connect(bob.peer)).await;
    assert_eq!(refused.status, RESOURCE_LIMIT_EXCEEDED);
}

// ---- An app that decides

/// Members get a day and any number of bytes; nobody else gets in.
struct Club {
    member: PeerId,
}

impl Access for Club {
    fn may_reserve(&self, peer: PeerId, address: &Multiaddr) -> Permission {
        if peer != self.member || !matches!(address.iter().next(), Some(Protocol::Ip4(_))) {
            return Permission::Deny;
        }
        let mut terms = Terms::default();
        terms.reservation_ttl = Some(Duration::from_secs(24 * 60 * 60));
        terms.circuit_bytes = Some(0);
        Permission::Allow(terms)
    }

    fn may_connect(&self, _: PeerId, _: &Multiaddr, target: PeerId) -> Permission {
        if target != self.member {
            return Permission::Deny;
        }
        let mut terms = Terms::default();
        terms.circuit_bytes = Some(7);
        Permission::Allow(terms)
    }
}

#[tokio::test]
async fn an_app_decides_who_gets_in_and_on_what_terms() {
    let mut config = Config::default();
    config.reservation_ttl = Duration::from_secs(60);
    let relay = Running::start(config).await;
    let mut member = relay.connect_somebody().await;
    let mut stranger = relay.connect_somebody().await;
    let club = Club { member: member.peer };
    relay.order(|node| node.relay_mut().set_access(club)).await;
    assert_eq!(stranger.ask(&reserve()).await.status, PERMISSION_DENIED);
    let reservation = member.reserve().await;
    assert_eq!(reservation.limit.and_then(|limit| limit.data), None);
    let hours = |expire: u64| {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        (expire - now.unwrap().as_secs()) / 3600
    };
    let expire = reservation.reservation.unwrap().expire.unwrap();
    assert!((23..=24).contains(&hours(expire)), "{expire}");

    let mut stops = member.accept(STOP);
    let request = connect(member.peer);
    let ((answer, _), (question, _)) =
        tokio::join!(stranger.ask_for_circuit(&request), agree(&mut stops));
    assert_eq!(answer.status, OK);
    assert_eq!(answer.limit.unwrap().data, Some(7));
    assert_eq!(question.limit.unwrap().data, Some(7));
}

fn id(keypair: &Keypair) -> PeerId {
    keypair.public().to_peer_id()
}
