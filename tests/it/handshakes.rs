//! Failed handshakes are counted by stage and reason, and the log suggests a remedy once. Health checks do not count as
//! failed handshakes.

use std::fs;

use crate::common::{
    Client, Relay, Security, TEST_TIMEOUT,
    by_hand::{self, line, negotiate, proposal, read_until_closed, send_and_close, tcp},
    http::{ON_ANY_PORT, get, port, wait_for_sample},
    swarms::until,
    websocket,
};
use libp2p::{
    PeerId, SwarmBuilder,
    futures::{AsyncReadExt, AsyncWriteExt},
    identity::Keypair,
    multiaddr::Protocol,
    noise,
    pnet::{PnetConfig, PreSharedKey},
    swarm::{SwarmEvent, dummy},
    tcp as tcp_transport, tls, yamux,
};
use std::time::{Duration, Instant};
use tempfile::TempDir;
use tokio::time::sleep;

/// Waits until this many handshakes have failed at this stage and for this reason.
pub async fn count(relay: &Relay, stage: &str, reason: &str, expected: u64) {
    let labels = format!("stage=\"{stage}\",reason=\"{reason}\"");
    let sample = format!("relaylet_handshakes_failed_total{{{labels}}} {expected}");
    wait_for_sample(relay, &sample).await;
}

/// How many handshakes have failed.
async fn sum(relay: &Relay) -> u64 {
    let metrics = get(port(relay).await, "/metrics").await;
    let failed = metrics.lines().filter(|it| it.starts_with("relaylet_handshakes_failed_total{"));
    failed.map(|it| it.rsplit_once(' ').unwrap().1.parse::<u64>().unwrap()).sum()
}

fn hints(relay: &Relay) -> usize {
    relay.count_in_log("handshake failed: /ip4/127.0.0.1/tcp/")
}

#[tokio::test]
async fn an_opening_that_is_not_libp2p_is_counted_and_hinted_at_once() {
    let relay = Relay::start(&[ON_ANY_PORT]);
    let v2 = b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c\x7f\0\0\x01\x7f\0\0\x01\0\x01\0\x02";
    for (reason, openings, hint) in [
        (
            "http",
            [&b"GET / HTTP/1.1\r\nHost: relay\r\n\r\n"[..], b"POST / HTTP/1.1\r\n\r\n"],
            "--http",
        ),
        ("tls", [b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03", b"\x16\x03\x03"], "/tls/ws"),
        (
            "proxy header",
            [b"PROXY TCP4 127.0.0.1 127.0.0.1 1 2\r\n", v2],
            "name it with --proxy-protocol-from",
        ),
        ("protocol", [b"SSH-2.0-OpenSSH_9.9\r\n", &[7; 24]], "--swarm-key"),
    ] {
        for opening in openings {
            send_and_close(tcp(&relay).await, opening).await;
        }
        count(&relay, "multistream", reason, 2).await;
        let warning = relay.wait_for_log(hint).await;
        assert!(
            warning.contains(" WARN ") && warning.contains("handshake failed: /ip4/127.0.0.1/")
        );
        assert_eq!(relay.count_in_log(hint), 1, "{:#?}", relay.log());
    }
    assert_eq!((sum(&relay).await, hints(&relay)), (8, 4));
    Client::connect(&relay).await.reserve().await;
}

#[tokio::test]
async fn a_client_that_disconnects_or_sends_nothing_is_counted_without_a_hint() {
    let relay = Relay::start(&[ON_ANY_PORT]);
    send_and_close(tcp(&relay).await, &line("/multistream/1.0.0")).await;
    count(&relay, "multistream", "closed", 1).await;
    assert!(read_until_closed(tcp(&relay).await).await.is_empty());
    count(&relay, "multistream", "timeout", 1).await;
    assert_eq!((sum(&relay).await, hints(&relay)), (2, 0));
}

#[tokio::test]
async fn another_swarm_key_or_none_is_counted_and_hinted_at_once() {
    let folder = TempDir::new().unwrap();
    let (ours, another) = (PreSharedKey::new([1; 32]), PreSharedKey::new([2; 32]));
    fs::write(folder.path().join("swarm.key"), ours.to_key_file()).unwrap();
    let listen = ["--listen=/ip4/127.0.0.1/tcp/0", "--swarm-key=swarm.key", ON_ANY_PORT];
    let relay = Relay::start_in(folder, &listen);
    let stream = PnetConfig::new(another).handshake(tcp(&relay).await).await.unwrap();
    send_and_close(stream, &proposal("/noise")).await;
    count(&relay, "multistream", "swarm key", 1).await;
    send_and_close(tcp(&relay).await, &proposal("/noise")).await;
    count(&relay, "multistream", "swarm key", 2).await;
    relay.wait_for_log("give it the key in the file of --swarm-key").await;
    // A connection that closes within its nonce.
    send_and_close(tcp(&relay).await, &[7; 5]).await;
    count(&relay, "swarm key", "closed", 1).await;
    assert_eq!((sum(&relay).await, hints(&relay)), (3, 1));
    let stream = PnetConfig::new(ours).handshake(tcp(&relay).await).await.unwrap();
    negotiate(&mut { stream }, "/noise").await.unwrap();
}

#[tokio::test]
async fn a_client_that_expects_another_peer_id_is_counted_and_hinted_at_once() {
    let relay = Relay::start(&[ON_ANY_PORT]);
    // go-libp2p and js-libp2p disconnect before the last message of Noise, once they know the relay's peer id.
    let mut stream = tcp(&relay).await;
    negotiate(&mut stream, "/noise").await.unwrap();
    let first = [&[0, 32][..], &[9; 32]].concat();
    stream.write_all(&first).await.unwrap();
    stream.read_exact(&mut [0; 2]).await.unwrap();
    drop(stream);
    count(&relay, "security", "peer id", 1).await;
    // As go-libp2p does over TLS: the certificate is not the expected peer's.
    let mut stream = tcp(&relay).await;
    negotiate(&mut stream, "/tls/1.0.0").await.unwrap();
    let expected = Some(PeerId::random());
    let tls = tls::make_client_config(&Keypair::generate_ed25519(), expected).unwrap();
    let connector = futures_rustls::TlsConnector::from(std::sync::Arc::new(tls));
    let name = std::net::Ipv4Addr::UNSPECIFIED.to_string().try_into().unwrap();
    assert!(connector.connect(name, stream).await.is_err());
    count(&relay, "security", "peer id", 2).await;
    // rust-libp2p closes the connection once it is up.
    let mut client = SwarmBuilder::with_new_identity()
        .with_tokio()
        .with_tcp(tcp_transport::Config::default(), noise::Config::new, yamux::Config::default)
        .unwrap()
        .with_behaviour(|_| dummy::Behaviour)
        .unwrap()
        .build();
    let mut address = relay.address.clone();
    address.pop();
    client.dial(address.with(Protocol::P2p(PeerId::random()))).unwrap();
    until(&mut client, |event| match event {
        SwarmEvent::OutgoingConnectionError { .. } => Some(()),
        _ => None,
    })
    .await;
    count(&relay, "muxer", "peer id", 1).await;
    relay.wait_for_log("the client left when it saw this relay's peer id").await;
    assert_eq!((sum(&relay).await, hints(&relay)), (3, 1));
    // A client that expects this peer id is served, and its disconnect is no failure.
    let client =
        Client::connect_as(Keypair::generate_ed25519(), &relay.address, Security::Tls).await;
    let closed = format!("closed: peer {}", client.peer);
    relay.wait_for_log(&format!("opened: peer {}", client.peer)).await;
    client.disconnect().await;
    relay.wait_for_log(&closed).await;
}

#[tokio::test]
async fn each_failure_of_a_websocket_upgrade_is_counted() {
    let listen = "--listen=/ip4/127.0.0.1/tcp/0/ws";
    let relay = Relay::start(&[ON_ANY_PORT, listen, "--trust-forwarded-from=127.0.0.3/32"]);
    let websocket = websocket::port(&websocket::address(&relay, "/ws").await);
    let send = async |bytes: &[u8]| {
        let stream = by_hand::tcp_from(std::net::Ipv4Addr::LOCALHOST, websocket).await.unwrap();
        send_and_close(stream, bytes).await
    };
    send(b"GET /healthz HTTP/1.1\r\nHost: relay\r\n\r\n").await;
    send(b"").await;
    send(b"GET / HTTP/1.1\r\nHost: relay\r\n\r\n").await;
    count(&relay, "websocket", "http", 1).await;
    send(b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03").await;
    count(&relay, "websocket", "tls", 1).await;
    send(&proposal("/noise")).await;
    count(&relay, "websocket", "protocol", 1).await;
    // A trusted proxy that sends no request.
    let silent = by_hand::tcp_from([127, 0, 0, 3].into(), websocket).await.unwrap();
    assert!(read_until_closed(silent).await.is_empty());
    count(&relay, "websocket", "timeout", 1).await;
    assert_eq!(sum(&relay).await, 4);
}

#[tokio::test]
async fn health_checks_do_not_count_as_failures_however_frequent() {
    const CHECKS: usize = 300;
    let relay = Relay::start(&[
        ON_ANY_PORT,
        "--max-connections-per-ip=0",
        "--max-connections-per-subnet=0",
    ]);
    relay.wait_for_log("can be dialed from the internet").await;
    port(&relay).await;
    let logged = |relay: &Relay| relay.count_in_log(" INFO ") + relay.count_in_log(" WARN ");
    let before = logged(&relay);
    for check in 0..CHECKS {
        let stream = tcp(&relay).await;
        if check % 2 == 0 {
            stream.0.set_zero_linger().unwrap(); // it resets the connection
        }
        drop(stream);
    }
    // A failure that is counted, after them.
    send_and_close(tcp(&relay).await, b"GET / HTTP/1.1\r\n\r\n").await;
    count(&relay, "multistream", "http", 1).await;
    let start = Instant::now();
    while sum(&relay).await != 1 || logged(&relay) != before + 1 {
        assert!(start.elapsed() < TEST_TIMEOUT, "{:#?}", relay.log());
        sleep(Duration::from_millis(50)).await;
    }
}
