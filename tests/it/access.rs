//! Access rules and rate limits, and how changes of both apply while the relay runs.

use std::{net::Ipv4Addr, time::Duration};

use crate::common::{
    STOP, Security, accept_circuit,
    by_hand::{GO_AWAY, mux, next_frame, secure, tcp_from},
    circuit,
    messages::{
        OK, PERMISSION_DENIED, RESERVATION_REFUSED, RESOURCE_LIMIT_EXCEEDED, connect, reserve,
    },
    read_to_end,
    running_node::{Change, RunningNode},
    within,
};
use libp2p::{Multiaddr, PeerId, identity::Keypair, multiaddr::Protocol};
use relaylet::{Access, Config, Event, FreedReason, Permission, Refused, Terms};

// ---- Allow and deny lists

#[tokio::test]
async fn a_denied_peer_is_disconnected_and_is_no_target() {
    let (alice, bob) = (Keypair::generate_ed25519(), Keypair::generate_ed25519());
    let mut config = Config::default();
    config.access.deny_peer.insert(id(&alice));
    let relay = RunningNode::start(config).await;
    assert!(!is_admitted(&relay, &alice).await);
    assert!(is_admitted(&relay, &bob).await);
    let mut bob = relay.connect(bob).await;
    let to_alice = bob.request(&connect(id(&alice))).await;
    assert_eq!(to_alice.status, PERMISSION_DENIED);
}

/// Whether the relay keeps a connection of this peer open: it sends identify on one that it keeps.
async fn is_admitted(relay: &RunningNode, keypair: &Keypair) -> bool {
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

/// A peer that is denied after it has connected is answered PERMISSION_DENIED.
#[tokio::test]
async fn a_peer_denied_while_connected_can_neither_reserve_nor_connect() {
    let relay = RunningNode::start(Config::default()).await;
    let (mut alice, bob) = relay.source_and_target().await;
    let denied = alice.peer;
    relay.change(move |config| _ = config.access.deny_peer.insert(denied)).await.unwrap();
    assert_eq!(alice.request(&reserve()).await.status, PERMISSION_DENIED);
    assert_eq!(alice.request(&connect(bob.peer)).await.status, PERMISSION_DENIED);
}

#[tokio::test]
async fn every_peer_of_a_denied_subnet_is_denied() {
    let mut config = Config::default();
    config.access.deny_subnet = vec!["127.0.0.0/8".parse().unwrap()];
    let relay = RunningNode::start(config).await;
    let tcp = tcp_from(Ipv4Addr::LOCALHOST, relay.port()).await.unwrap();
    assert!(within(secure(tcp, &Keypair::generate_ed25519(), Security::Noise)).await.is_err());
}

#[tokio::test]
async fn a_connect_only_peer_gets_a_circuit_but_no_slot() {
    let (device, app) = (Keypair::generate_ed25519(), Keypair::generate_ed25519());
    let mut config = Config::default();
    config.access.allow_peer.insert(id(&device));
    config.access.allow_connect_peer.insert(id(&app));
    let relay = RunningNode::start(config).await;
    let mut device = relay.connect(device).await;
    let mut app = relay.connect(app).await;
    assert!(!is_admitted(&relay, &Keypair::generate_ed25519()).await);
    assert_eq!(app.request(&reserve()).await.status, PERMISSION_DENIED);
    device.reserve().await;
    circuit(&mut app, &mut device).await;
}

// ---- Rules that change at run time

#[tokio::test]
async fn a_new_deny_rule_frees_the_slot_and_resets_the_circuits() {
    let mut relay = RunningNode::start(Config::default()).await;
    let (mut alice, mut bob) = relay.source_and_target().await;
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
    assert_eq!(bob.request(&reserve()).await.status, PERMISSION_DENIED);
}

#[tokio::test]
async fn a_new_deny_rule_frees_a_slot_in_grace() {
    let mut relay = RunningNode::start(Config::default()).await;
    let mut alice = relay.connect_new().await;
    alice.reserve().await;
    let in_grace = alice.peer;
    alice.disconnect().await;
    let began = |event| matches!(event, Event::GraceBegan { .. }).then_some(());
    relay.until(began).await;
    relay
        .change(|config| config.access.deny_subnet = vec!["127.0.0.1/32".parse().unwrap()])
        .await
        .unwrap();
    let freed = |event| match event {
        Event::ReservationFreed { peer, reason, .. } => Some((peer, reason)),
        _ => None,
    };
    assert_eq!(relay.until(freed).await, (in_grace, FreedReason::Denied));
}

#[tokio::test]
async fn a_circuit_ends_when_its_source_is_denied() {
    let relay = RunningNode::start(Config::default()).await;
    let (mut alice, mut bob) = relay.source_and_target().await;
    let (mut there, _back) = circuit(&mut alice, &mut bob).await;
    let denied = alice.peer;
    relay.change(move |config| _ = config.access.deny_peer.insert(denied)).await.unwrap();
    assert!(read_to_end(&mut there).await.0.is_empty());
    bob.reserve().await;
}

#[tokio::test]
async fn a_lowered_cap_keeps_existing_slots_and_refuses_newcomers() {
    let relay = RunningNode::start(Config::default()).await;
    let mut alice = relay.connect_new().await;
    let mut bob = relay.connect_new().await;
    let mut carol = relay.connect_new().await;
    alice.reserve().await;
    bob.reserve().await;
    relay.change(|config| config.max_reservations = 1).await.unwrap();
    assert_eq!(carol.request(&reserve()).await.status, RESERVATION_REFUSED, "all slots are taken");
    alice.reserve().await;
    bob.reserve().await;
    relay.change(|config| config.max_reservations = 3).await.unwrap();
    carol.reserve().await;
}

#[tokio::test]
async fn an_invalid_configuration_changes_nothing() {
    let relay = RunningNode::start(Config::default()).await;
    let mut alice = relay.connect_new().await;
    for (setting, change) in [
        ("sweep", Box::new(|config: &mut Config| config.sweep = Duration::ZERO) as Change),
        ("probe", Box::new(|config| config.probe = Duration::from_secs(4))),
        ("silence", Box::new(|config| config.heartbeat = config.silence)),
        ("max_circuits_per_peer", Box::new(|config| config.max_circuits_per_peer = 65)),
        ("announce", Box::new(|config| config.announce = vec!["/p2p-circuit".parse().unwrap()])),
    ] {
        let refused = relay
            .change(move |config| {
                config.reserve_rate = 1;
                change(config);
            })
            .await;
        assert_eq!(refused.expect_err(setting).setting(), setting);
    }
    // The rate of 1 a minute was not applied.
    for _ in 0..3 {
        alice.reserve().await;
    }
}

// ---- Rate limits

#[tokio::test]
async fn reserve_requests_above_the_rate_are_refused_until_the_rate_is_lifted() {
    let mut config = Config::default();
    config.reserve_rate = 2;
    let mut relay = RunningNode::start(config).await;
    let mut alice = relay.connect_new().await;
    alice.reserve().await;
    alice.reserve().await;
    let refused = alice.request(&reserve()).await;
    assert_eq!(refused.status, RESOURCE_LIMIT_EXCEEDED);
    let reason = |event| match event {
        Event::ReservationRefused { peer, reason, .. } => Some((peer, reason.to_string())),
        _ => None,
    };
    let too_often = Refused::TooOften.to_string();
    assert_eq!(relay.until(reason).await, (alice.peer, too_often));
    // It keeps its slot.
    circuit(&mut relay.connect_new().await, &mut alice).await;
    relay.change(|config| config.reserve_rate = 0).await.unwrap();
    alice.reserve().await;
}

#[tokio::test]
async fn renewals_are_not_limited_by_the_rate_of_their_address() {
    let mut config = Config::default();
    config.reserve_rate = 3;
    config.max_reservations = 1;
    config.probe = Duration::ZERO;
    let relay = RunningNode::start(config).await;
    let mut alice = relay.connect_new().await;
    alice.reserve().await;
    let mut requests = 1;
    let limited = async {
        loop {
            let status = relay.connect_new().await.request(&reserve()).await.status;
            requests += 1;
            match status {
                RESERVATION_REFUSED => {}
                status => break assert_eq!(status, RESOURCE_LIMIT_EXCEEDED),
            }
        }
    };
    within(limited).await;
    assert!(requests > 30, "only {requests}: less than ten times the rate of one peer");
    alice.reserve().await;
}

#[tokio::test]
async fn connect_requests_above_the_rate_are_refused() {
    let mut config = Config::default();
    config.connect_rate = 1;
    let relay = RunningNode::start(config).await;
    let (mut alice, mut bob) = relay.source_and_target().await;
    circuit(&mut alice, &mut bob).await;
    // The answer does not tell which peers hold slots.
    for target in [bob.peer, PeerId::random()] {
        let refused = alice.request(&connect(target)).await;
        assert_eq!(refused.status, RESOURCE_LIMIT_EXCEEDED);
    }
}

// ---- An embedder's policy

/// One member may reserve over IPv4, for a day and without a limit of bytes. Any peer may connect, only to the member,
/// with 7 bytes for each direction of a circuit.
struct MembersOnly {
    member: PeerId,
}

impl Access for MembersOnly {
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
async fn an_embedder_decides_access_and_terms() {
    let mut config = Config::default();
    config.reservation_ttl = Duration::from_secs(60);
    let relay = RunningNode::start(config).await;
    let mut member = relay.connect_new().await;
    let mut stranger = relay.connect_new().await;
    let policy = MembersOnly { member: member.peer };
    relay.with_node(|node| node.relay_mut().set_access(policy)).await;
    assert_eq!(stranger.request(&reserve()).await.status, PERMISSION_DENIED);
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
    let ((answer, _), (stop_request, _)) =
        tokio::join!(stranger.request_circuit(&request), accept_circuit(&mut stops));
    assert_eq!(answer.status, OK);
    assert_eq!(answer.limit.unwrap().data, Some(7));
    assert_eq!(stop_request.limit.unwrap().data, Some(7));
}

fn id(keypair: &Keypair) -> PeerId {
    keypair.public().to_peer_id()
}
