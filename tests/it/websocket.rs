//! WebSocket with and without TLS: connections, reverse proxies, certificates, and malformed input.

use std::{
    fs,
    net::Ipv4Addr,
    time::{Duration, Instant},
};

use crate::common::{
    Client, Relay, TEST_TIMEOUT, assert_relayed, by_hand,
    bystanders::Bystanders,
    circuit, command, free_port,
    messages::{self, RESERVATION_REFUSED},
    output,
    websocket::{
        self, BINARY, CERTIFICATE, CLOSE, CONTINUATION, Certificate, LAST, LISTEN, LISTEN_TLS,
        PING, REQUEST, TEXT, address, connect, connect_in_tls, frame, header, port, tcp,
    },
    within,
};
use crate::proxy::{PROXY, from_proxy, read_until_closed, v2};
use futures_rustls::{
    TlsConnector,
    client::TlsStream,
    rustls::{
        self, ClientConfig, ProtocolVersion, RootCertStore, SupportedProtocolVersion,
        version::{TLS12, TLS13},
    },
};
use libp2p::{
    Multiaddr, Stream,
    futures::{AsyncReadExt as _, AsyncWriteExt as _, future},
    multiaddr::Protocol,
};
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::mpsc,
    time::sleep,
};

const TCP: &str = "--listen=/ip4/127.0.0.1/tcp/0";

/// The longest message that the relay accepts, in bytes.
const LONGEST: usize = 256 * 1024;

// ---- Connections

#[tokio::test]
async fn one_relay_serves_tcp_and_websocket() {
    let relay = Relay::start(&[LISTEN]);
    let over_websocket = address(&relay, "/ws").await;
    let mut tcp = Client::connect(&relay).await;
    let mut websocket = connect(&over_websocket).await;
    tcp.reserve().await;
    websocket.reserve().await;
    let opened = format!("opened: peer {} at /ip4/127.0.0.1/tcp/", websocket.peer);
    assert!(relay.wait_for_log(&opened).await.ends_with("/ws"));

    for _ in 0..2 {
        let (mut there, mut back) = circuit(&mut tcp, &mut websocket).await;
        transfer(&mut there, &mut back).await;
        transfer(&mut back, &mut there).await;
        std::mem::swap(&mut tcp, &mut websocket);
    }
}

/// Asserts that 100 KiB arrive.
async fn transfer(from: &mut Stream, to: &mut Stream) {
    let bytes: Vec<_> = (0..100 * 1024).map(|n| n as u8).collect();
    assert_relayed(from, to, &bytes).await;
}

#[tokio::test]
async fn reservations_and_the_log_include_websocket_addresses() {
    let relay = Relay::start(&[LISTEN]);
    let over_websocket = address(&relay, "/ws").await;
    let paste = format!("browsers on this machine reach it at {over_websocket}");
    relay.wait_for_log(&paste).await;
    let reserved = reserved_addresses(&mut connect(&over_websocket).await).await;
    assert!(reserved.contains(&relay.address), "{reserved:?}");
    assert!(reserved.contains(&over_websocket), "{reserved:?}");
}

#[tokio::test]
async fn announced_websocket_addresses_are_used_unchanged() {
    let announced = [
        "/dns4/relay.example.org/tcp/443/tls/ws",
        "/dns6/relay.example.org/tcp/443/wss",
        "/dns/relay.example.org/tcp/80/ws",
        "/dnsaddr/relay.example.org",
        "/ip4/192.0.2.1/tcp/4001",
    ];
    let relay = Relay::start(&[LISTEN, "--announce", &announced.join(",")]);
    let paste = format!("clients reach it at {}/p2p/{}", announced[0], relay.peer);
    relay.wait_for_log(&paste).await;
    let reserved = reserved_addresses(&mut connect(&address(&relay, "/ws").await).await).await;
    let expected = announced.map(|text| format!("{text}/p2p/{}", relay.peer));
    assert_eq!(reserved, expected.map(|text| text.parse().unwrap()));
}

/// The addresses in a reservation.
async fn reserved_addresses(client: &mut Client) -> Vec<Multiaddr> {
    let reservation = client.reserve().await.reservation.expect("a reservation");
    let addresses = reservation.addrs.into_iter();
    addresses.map(|bytes| bytes.try_into().expect("an address")).collect()
}

#[tokio::test]
async fn caps_count_tcp_and_websocket_together() {
    let relay =
        Relay::start(&[LISTEN, "--max-reservations-per-ip=1", "--max-connections-per-ip=2"]);
    let over_websocket = address(&relay, "/ws").await;
    let mut first = connect(&over_websocket).await;
    let mut second = Client::connect(&relay).await;
    first.reserve().await;
    let answer = second.request(&messages::reserve()).await;
    assert_eq!(answer.status, RESERVATION_REFUSED);
    for port in [relay.port(), port(&over_websocket)] {
        assert!(read_until_closed(tcp(port).await).await.is_empty());
    }
    let denied = "/ws: too many connections of 127.0.0.1";
    relay.wait_for_log(denied).await;
}

#[tokio::test]
async fn a_websocket_ping_counts_as_activity() {
    let relay = Relay::start(&[LISTEN, "--heartbeat=4s"]);
    let (injector, through) = Injector::to(&address(&relay, "/ws").await).await;
    let mut chatty = connect(&through).await;
    let mut quiet = connect(&address(&relay, "/ws").await).await;
    chatty.reserve().await;
    quiet.reserve().await;
    let probes = |peer| relay.count_in_log(&format!("probe sent: peer {peer}"));
    let start = Instant::now();
    while probes(quiet.peer) < 2 {
        assert!(start.elapsed() < TEST_TIMEOUT);
        // WebSocket answers this frame: libp2p does not see it.
        injector.inject(frame(LAST | PING, b"")).await;
        sleep(Duration::from_millis(200)).await;
    }
    assert_eq!(probes(chatty.peer), 0);
    chatty.reserve().await;
}

#[tokio::test]
async fn proxy_protocol_headers_work_below_websocket() {
    let relay = Relay::start(&[
        LISTEN,
        "--proxy-protocol-from=127.0.0.3/32",
        "--deny-subnet=198.51.100.0/24",
    ]);
    let direct = address(&relay, "/ws").await;
    let connect_behind = async |client: &str| {
        let (_, through) = Injector::with_header(&direct, v2(client)).await;
        connect(&through).await
    };
    let mut wanted = connect_behind("192.0.2.7:1234").await;
    wanted.reserve().await;
    let opened = format!("opened: peer {} at /ip4/192.0.2.7/tcp/1234/ws", wanted.peer);
    relay.wait_for_log(&opened).await;
    let mut from_denied = from_proxy(port(&direct)).await;
    from_denied
        .write_all(&[&v2("198.51.100.7:1"), REQUEST].concat())
        .await
        .expect("the relay reads");
    assert!(read_until_closed(from_denied).await.is_empty());
    relay.wait_for_log("denied: /ip4/198.51.100.7/tcp/1/ws: the rules do not allow it").await;

    let mut without = from_proxy(port(&direct)).await;
    without.write_all(REQUEST).await.expect("the relay reads");
    assert!(read_until_closed(without).await.is_empty());
    relay.wait_for_log("or remove its address from --proxy-protocol-from").await;
    connect(&direct).await.reserve().await;
}

#[tokio::test]
async fn a_connection_whose_proxy_header_comes_after_the_listener_closed_is_closed() {
    let listen = format!("--listen=/ip4/127.0.0.1/tcp/{}/ws", free_port());
    let relay = Relay::start(&[&listen, "--proxy-protocol-from=127.0.0.3/32"]);
    let over_websocket = address(&relay, "/ws").await;
    let mut late = from_proxy(port(&over_websocket)).await;
    // The relay reads from it once a later connection has been accepted.
    connect(&over_websocket).await.disconnect().await;
    relay.signal("USR1");
    relay.wait_for_log("SIGUSR1: draining").await;
    late.write_all(&v2("192.0.2.7:1")).await.expect("the relay reads");
    assert!(read_until_closed(late).await.is_empty());
    relay.signal("USR1");
    relay.wait_for_log("admitting clients again").await;
    connect(&over_websocket).await.reserve().await;
}

#[tokio::test]
async fn client_addresses_are_taken_from_forwarded_and_x_forwarded_for() {
    let relay = Relay::start(&[
        LISTEN,
        "--trust-forwarded-from=127.0.0.3/32,10.0.0.0/8",
        "--max-reservations-per-ip=1",
        "--deny-subnet=198.51.100.0/24",
    ]);
    let direct = address(&relay, "/ws").await;
    let mut clients = Vec::new();
    let connect_behind =
        async |headers: &str| connect(&through(PROXY, &direct, headers).await).await;
    for (headers, client) in [
        ("X-Forwarded-For: 198.51.100.7, 192.0.2.7, 10.1.1.1\r\n", "/ip4/192.0.2.7/tcp/"),
        (
            "Forwarded: for=198.51.100.7\r\nForwarded: for=\"[2001:db8::1]:1234\";proto=https\r\n",
            "/ip6/2001:db8::1/tcp/1234/ws",
        ),
        ("X-Forwarded-For: 192.0.2.8:4711\r\n", "/ip4/192.0.2.8/tcp/4711/ws"),
    ] {
        let mut behind_proxy = connect_behind(headers).await;
        // Each gets a slot, because each counts towards the cap of an address of its own.
        behind_proxy.reserve().await;
        let opened = format!("opened: peer {} at {client}", behind_proxy.peer);
        relay.wait_for_log(&opened).await;
        clients.push(behind_proxy);
    }
    let mut second = connect_behind("X-Forwarded-For: 192.0.2.7\r\n").await;
    assert_eq!(second.request(&messages::reserve()).await.status, RESERVATION_REFUSED);

    // Access rules apply to the client, before the relay answers.
    let mut denied = from_proxy(port(&direct)).await;
    let request = with_headers("X-Forwarded-For: 198.51.100.7\r\n");
    denied.write_all(&request).await.expect("the relay reads");
    assert!(read_until_closed(denied).await.is_empty());
    let line = relay.wait_for_log("denied: /ip4/198.51.100.7/tcp/").await;
    assert!(line.ends_with("/ws: the rules do not allow it"), "{line}");
    assert_eq!(relay.count_in_log("--trust-forwarded-from"), 0);
}

#[tokio::test]
async fn without_a_forwarded_header_the_proxy_counts_as_the_client_and_each_reason_is_one_warning()
{
    let relay = Relay::start(&[LISTEN, "--trust-forwarded-from=127.0.0.3/32"]);
    let direct = address(&relay, "/ws").await;
    for (headers, reason) in [
        ("", "there is no Forwarded and no X-Forwarded-For header"),
        ("X-Forwarded-For: 192.0.2.7, unknown\r\n", "names no IP address"),
        ("Forwarded: for=_hidden\r\n", "names no IP address"),
    ] {
        for _ in 0..2 {
            let mut client = connect(&through(PROXY, &direct, headers).await).await;
            client.reserve().await;
            let opened = format!("opened: peer {} at /ip4/127.0.0.3/tcp/", client.peer);
            relay.wait_for_log(&opened).await;
        }
        assert_eq!(relay.count_in_log(reason), 1);
        let line = relay.wait_for_log(reason).await;
        assert!(
            line.ends_with(" counts as the client's: have the proxy name the client"),
            "{line}"
        );
    }
    // If both headers name different clients, one of them may be the client's own.
    let both = with_headers("Forwarded: for=192.0.2.1\r\nX-Forwarded-For: 192.0.2.2\r\n");
    let answer = send_and_close(from_proxy(port(&direct)).await, &both).await;
    assert_eq!(status(&answer), 400);
    let line = relay.wait_for_log("name different clients").await;
    assert!(line.ends_with(": have the proxy remove the header that it does not set"), "{line}");
    // The proxy's own health checks need no header.
    let answer =
        send_and_close(from_proxy(port(&direct)).await, b"GET /healthz HTTP/1.1\r\n\r\n").await;
    assert_eq!(status(&answer), 200);
    assert_eq!(relay.count_in_log("--trust-forwarded-from"), 3);
}

#[tokio::test]
async fn a_proxys_health_check_is_answered_although_the_rules_allow_only_its_clients() {
    let flags = ["--trust-forwarded-from=127.0.0.3/32", "--allow-subnet=192.0.2.0/24"];
    let relay = Relay::start(&[&[LISTEN], &flags[..]].concat());
    let direct = address(&relay, "/ws").await;
    let check = b"GET /healthz HTTP/1.1\r\n\r\n";
    assert_eq!(status(&send_and_close(from_proxy(port(&direct)).await, check).await), 200);
    let mut client =
        connect(&through(PROXY, &direct, "X-Forwarded-For: 192.0.2.7\r\n").await).await;
    client.reserve().await;
    // The rules apply to a WebSocket that counts as the proxy's own.
    let mut denied = from_proxy(port(&direct)).await;
    denied.write_all(&with_headers("")).await.expect("the relay reads");
    assert!(read_until_closed(denied).await.is_empty());
}

#[tokio::test]
async fn no_client_uses_up_the_rate_of_its_proxys_health_checks() {
    for headers in [
        "X-Forwarded-For: 192.0.2.7\r\n",
        "Forwarded: for=192.0.2.8\r\nX-Forwarded-For: 192.0.2.7\r\n",
    ] {
        // An address may open eight connections at once. The next forty are delayed, and more are denied.
        let flags = ["--trust-forwarded-from=127.0.0.3/32", "--max-reservations-per-ip=1"];
        let relay = Relay::start(&[&[LISTEN], &flags[..]].concat());
        let port = port(&address(&relay, "/ws").await);
        let request = format!("GET / HTTP/1.1\r\n{headers}\r\n");
        let requests = (0..100).map(|_| async {
            let mut stream = from_proxy(port).await;
            stream.write_all(request.as_bytes()).await.expect("the relay reads");
            stream
        });
        let requests = future::join_all(requests).await;
        relay.wait_for_log("denied: /ip4/127.0.0.3/tcp/").await;
        let check = b"GET /healthz HTTP/1.1\r\n\r\n";
        assert_eq!(status(&send_and_close(from_proxy(port).await, check).await), 200);
        drop(requests);
    }
}

#[tokio::test]
async fn delayed_requests_of_one_client_leave_room_for_others_behind_the_proxy() {
    // An address may open eight connections at once; the next ones are delayed.
    let flags = ["--max-handshakes=8", "--max-reservations-per-ip=1"];
    let trusted = ["--trust-forwarded-from=127.0.0.3/32", LISTEN];
    let relay = Relay::start(&[flags, trusted].concat());
    let direct = address(&relay, "/ws").await;
    let request = b"GET / HTTP/1.1\r\nX-Forwarded-For: 192.0.2.7\r\n\r\n";
    for _ in 0..8 {
        assert_eq!(status(&send_and_close(from_proxy(port(&direct)).await, request).await), 426);
    }
    let mut delayed = Vec::new();
    for _ in 0..20 {
        let mut stream = from_proxy(port(&direct)).await;
        stream.write_all(request).await.expect("the relay reads");
        delayed.push(stream);
    }
    let other = connect(&through(PROXY, &direct, "X-Forwarded-For: 192.0.2.8\r\n").await).await;
    assert_eq!(relay.count_in_log("too many handshakes"), 0, "{:#?}", relay.log());
    drop((other, delayed));
}

#[tokio::test]
async fn forwarded_headers_of_untrusted_clients_are_ignored() {
    let relay = Relay::start(&[LISTEN, "--trust-forwarded-from=127.0.0.4/32"]);
    let direct = address(&relay, "/ws").await;
    let spoofed = "Forwarded: for=192.0.2.7\r\nX-Forwarded-For: 192.0.2.7\r\n";
    let mut client = connect(&through(PROXY, &direct, spoofed).await).await;
    client.reserve().await;
    let opened = format!("opened: peer {} at /ip4/127.0.0.3/tcp/", client.peer);
    relay.wait_for_log(&opened).await;
    assert_eq!(relay.count_in_log("192.0.2.7"), 0);
}

#[tokio::test]
async fn trusted_proxies_may_use_tls_and_are_reloaded_on_sighup() {
    let certificate = Certificate::new();
    let folder = tempfile::tempdir().expect("a temporary folder");
    certificate.write(folder.path());
    let file = folder.path().join("relaylet.toml");
    let write_config = |subnet: &str| {
        let text = format!(
            "tls-cert = \"cert.pem\"\ntls-key = \"key.pem\"\ntrust-forwarded-from = \"{subnet}\"\n"
        );
        fs::write(&file, text).expect("a file");
    };
    write_config("127.0.0.4/32");
    let relay = Relay::start_in(folder, &["--config=relaylet.toml", LISTEN_TLS]);
    let secure = port(&address(&relay, "/tls/ws").await);
    let request = with_headers("X-Forwarded-For: 198.51.100.7\r\n");
    let upgrade = async || {
        let mut stream = in_tls(from_proxy(secure).await, &certificate, &TLS12).await;
        stream.write_all(&request).await.expect("the relay reads");
        let answer = within(read_head(&mut stream)).await;
        assert_eq!(status(&answer), 101);
        drop(stream);
    };
    upgrade().await;
    relay.wait_for_log("connection failed: /ip4/127.0.0.3/tcp/").await;
    write_config("127.0.0.3/32");
    relay.signal("HUP");
    relay.wait_for_log("SIGHUP: changed: trust-forwarded-from").await;
    upgrade().await;
    relay.wait_for_log("connection failed: /ip4/198.51.100.7/tcp/").await;
}

// ---- Certificates

#[tokio::test]
async fn the_configured_certificate_is_served_and_reloaded_on_change() {
    let (first, second, third) = (Certificate::new(), Certificate::new(), Certificate::new());
    let wss = "--listen=/ip4/127.0.0.1/tcp/0/wss";
    let relay = with_certificate(&first, &[TCP, LISTEN_TLS, LISTEN, wss]);
    let secure = address(&relay, "/tls/ws").await;
    let mut open = connect_in_tls(&secure, &first).await;
    open.reserve().await;
    assert!(!second.is_served(&secure).await);
    relay.wait_for_log("the client does not accept the certificate of --tls-cert").await;
    assert_eq!(relay.count_in_log("not libp2p"), 0, "{:#?}", relay.log());

    second.write(relay.folder.path());
    relay.wait_for_log("changed, reloaded").await;
    assert!(second.is_served(&secure).await && !first.is_served(&secure).await);
    connect_in_tls(&secure, &second).await.reserve().await;

    third.write(relay.folder.path());
    relay.signal("HUP");
    relay.wait_for_log("SIGHUP: --tls-cert cert.pem: reloaded").await;
    assert!(third.is_served(&secure).await);
    // Existing connections and those without TLS are not affected.
    open.reserve().await;
    Client::connect(&relay).await.reserve().await;
    connect(&address(&relay, "/ws").await).await.reserve().await;
    connect_in_tls(&address(&relay, "/wss").await, &third).await.reserve().await;
}

#[tokio::test]
async fn an_invalid_certificate_does_not_replace_the_previous_one_and_is_logged_once() {
    let (first, second) = (Certificate::new(), Certificate::new());
    let relay = with_certificate(&first, &[LISTEN_TLS]);
    let secure = address(&relay, "/tls/ws").await;
    let folder = relay.folder.path();
    let errors = || {
        let log = relay.log();
        log.into_iter()
            .filter(|line| line.contains("keeping the previous certificate"))
            .collect::<Vec<_>>()
    };

    fs::write(folder.join("cert.pem"), &second.pem).expect("the file is written");
    relay.wait_for_log("--tls-key key.pem: not the key of --tls-cert cert.pem").await;
    assert!(first.is_served(&secure).await);
    fs::remove_file(folder.join("key.pem")).expect("the file is removed");
    relay.wait_for_log("--tls-key key.pem: No such file").await;
    assert!(first.is_served(&secure).await);
    relay.signal("HUP");
    relay.wait_for_log("SIGHUP: keeping the previous certificate: --tls-key key.pem").await;
    assert!(first.is_served(&secure).await);

    second.write(folder);
    relay.wait_for_log("changed, reloaded").await;
    assert!(second.is_served(&secure).await);
    let errors = errors();
    assert_eq!(errors.len(), 3, "{errors:#?}");
    assert!(errors.iter().all(|line| line.contains(" ERROR ")), "{errors:#?}");
}

#[tokio::test]
async fn sighup_switches_to_renamed_certificate_files() {
    let (first, second) = (Certificate::new(), Certificate::new());
    let folder = tempfile::tempdir().expect("a temporary folder");
    first.write(folder.path());
    let subfolder = folder.path().join("new");
    fs::create_dir(&subfolder).expect("a folder");
    second.write(&subfolder);
    let file = folder.path().join("relaylet.toml");
    fs::write(&file, "tls-cert = \"cert.pem\"\ntls-key = \"key.pem\"\n").expect("a file");
    let relay = Relay::start_in(folder, &["--config=relaylet.toml", LISTEN_TLS]);
    let secure = address(&relay, "/tls/ws").await;
    assert!(first.is_served(&secure).await);
    fs::write(&file, "tls-cert = \"new/cert.pem\"\ntls-key = \"new/key.pem\"\n").expect("a file");
    relay.signal("HUP");
    relay.wait_for_log("SIGHUP: changed: tls-cert, tls-key").await;
    relay.wait_for_log("SIGHUP: --tls-cert new/cert.pem: reloaded").await;
    assert!(second.is_served(&secure).await);
    fs::write(&file, "tls-cert = \"cert.pem\"\n").expect("a file");
    relay.signal("HUP");
    relay
        .wait_for_log("SIGHUP: keeping the previous settings: relaylet.toml:1: --tls-cert cert.pem")
        .await;
    assert!(second.is_served(&secure).await);
}

#[tokio::test]
async fn an_unused_certificate_is_a_warning() {
    let relay = with_certificate(&Certificate::new(), &[TCP, LISTEN]);
    let line = relay.wait_for_log("--tls-cert cert.pem: not in use").await;
    assert!(line.contains(" WARN "), "{line}");
}

#[tokio::test]
async fn a_certificate_without_an_announced_name_is_a_warning_and_its_expiry_a_metric() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    Certificate::new().write(folder.path());
    let mut flags = vec!["--tls-cert=cert.pem", "--tls-key=key.pem", LISTEN_TLS];
    flags.push("--announce=/dns4/relay.example.org/tcp/443/tls/ws");
    if cfg!(feature = "http") {
        flags.push("--http=127.0.0.1:0");
    }
    let relay = Relay::start_in(folder, &flags);
    let warning = "--tls-cert cert.pem: is for no name, and for none of the names that are announced (relay.example.org)";
    relay.wait_for_log(warning).await;
    #[cfg(feature = "http")]
    {
        use std::time::SystemTime;

        use crate::common::http;
        let at = http::port(&relay).await;
        let metrics = http::samples(&http::get(at, "/metrics").await);
        let not_after = metrics["relaylet_certificate_not_after_seconds"];
        assert!(not_after > 1.7e9, "{metrics:?}");
        let status: serde_json::Value =
            serde_json::from_str(&http::get(at, "/status.json").await).expect("JSON");
        let ends_in = status["certificate_ends_in"].as_f64().expect("a number");
        let now = SystemTime::UNIX_EPOCH.elapsed().expect("a clock").as_secs_f64();
        assert!((now + ends_in - not_after).abs() < TEST_TIMEOUT.as_secs_f64(), "{ends_in}");
    }
}

#[test]
fn an_unusable_certificate_is_a_one_line_error() {
    let (one, other) = (Certificate::new(), Certificate::new());
    let garbage = "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n";
    let no_file: Option<&str> = None;
    for (cert, key, expected) in [
        (no_file, no_file, "--tls-cert cert.pem: No such file"),
        (Some(&one.pem[..]), no_file, "--tls-key key.pem: No such file"),
        (Some(""), Some(&one.key[..]), "--tls-cert cert.pem: has no BEGIN CERTIFICATE"),
        (Some(&one.pem), Some(&one.pem), "--tls-key key.pem: has no BEGIN PRIVATE KEY"),
        (Some(&one.pem), Some(garbage), "--tls-key key.pem: holds no usable key"),
        (Some(&one.pem), Some(&other.key), "--tls-key key.pem: not the key of --tls-cert cert.pem"),
    ] {
        let folder = tempfile::tempdir().expect("a temporary folder");
        for (name, contents) in [("cert.pem", cert), ("key.pem", key)] {
            if let Some(contents) = contents {
                fs::write(folder.path().join(name), contents).expect("the file is written");
            }
        }
        let (line, status) = refused(&folder, &[&CERTIFICATE[..], &[LISTEN_TLS]].concat());
        assert!(line.starts_with(&format!("relaylet: {expected}")), "{expected}: {line}");
        assert_eq!(status, Some(1), "{line}");
    }
    let folder = tempfile::tempdir().expect("a temporary folder");
    fs::create_dir(folder.path().join("cert.pem")).expect("a folder");
    let (line, _) = refused(&folder, &[&CERTIFICATE[..], &[LISTEN_TLS]].concat());
    assert!(line.contains("--tls-cert cert.pem: not a regular file"), "{line}");

    for (flags, expected) in [
        (&[LISTEN_TLS][..], "name one with --tls-cert and --tls-key"),
        (&[CERTIFICATE[0]], "--tls-cert cert.pem: requires its private key"),
        (&[CERTIFICATE[1]], "--tls-key key.pem: requires its certificate"),
    ] {
        let (line, status) = refused(&folder, flags);
        assert!(line.contains(expected), "{line}");
        assert_eq!(status, Some(2), "{line}");
    }
}

/// Runs the program with invalid flags; returns its one-line error and its status.
fn refused(folder: &TempDir, flags: &[&str]) -> (String, Option<i32>) {
    let output = output(command(folder).args(flags).env("RUST_LOG", "off"));
    let line = String::from_utf8(output.stderr).expect("text");
    assert!(output.stdout.is_empty());
    assert_eq!(line.lines().count(), 1, "{line}");
    (line, output.status.code())
}

/// Starts a relay with this certificate and these flags.
fn with_certificate(certificate: &Certificate, flags: &[&str]) -> Relay {
    let folder = tempfile::tempdir().expect("a temporary folder");
    certificate.write(folder.path());
    Relay::start_in(folder, &[flags, &CERTIFICATE].concat())
}

/// The stream in TLS of this version, by a client that trusts only this certificate.
async fn in_tls(
    stream: TcpStream,
    certificate: &Certificate,
    version: &'static SupportedProtocolVersion,
) -> TlsStream<libp2p::tcp::tokio::TcpStream> {
    let mut roots = RootCertStore::empty();
    roots.add(certificate.der().into()).expect("a certificate");
    let tls = tls_client(roots, version);
    let stream = libp2p::tcp::tokio::TcpStream(stream);
    let name = "127.0.0.1".try_into().expect("a name");
    within(tls.connect(name, stream)).await.expect("TLS of this version")
}

/// A TLS client that supports only this version, and trusts these roots.
fn tls_client(roots: RootCertStore, version: &'static SupportedProtocolVersion) -> TlsConnector {
    let provider = rustls::crypto::ring::default_provider();
    let config = ClientConfig::builder_with_provider(provider.into())
        .with_protocol_versions(&[version])
        .expect("a version")
        .with_root_certificates(roots)
        .with_no_client_auth();
    TlsConnector::from(std::sync::Arc::new(config))
}

#[tokio::test]
async fn secure_websocket_accepts_tls_1_2_and_1_3_but_not_libp2p_tls() {
    let certificate = Certificate::new();
    let relay = with_certificate(&certificate, &[LISTEN_TLS, TCP]);
    let secure = address(&relay, "/tls/ws").await;
    for (version, expected) in
        [(&TLS12, ProtocolVersion::TLSv1_2), (&TLS13, ProtocolVersion::TLSv1_3)]
    {
        let mut stream = in_tls(tcp(port(&secure)).await, &certificate, version).await;
        assert_eq!(stream.get_ref().1.protocol_version(), Some(expected));
        stream.write_all(REQUEST).await.expect("the relay reads");
        assert_eq!(status(&within(read_head(&mut stream)).await), 101);
        // libp2p's bytes are transferred in both directions.
        let hello = frame(BINARY | LAST, &by_hand::line("/multistream/1.0.0"));
        stream.write_all(&hello).await.expect("the relay reads");
        let mut answer = vec![0; 2 + by_hand::line("/multistream/1.0.0").len()];
        within(stream.read_exact(&mut answer)).await.expect("the relay answers");
        assert_eq!(answer[2..], by_hand::line("/multistream/1.0.0"));
    }
    let plain = {
        let lines = relay.log();
        let listening = lines.iter().filter_map(|line| line.split_once("listening on "));
        let mut tcp = listening.filter(|(_, address)| !address.contains("/ws"));
        port(&tcp.next().expect("TCP").1.parse().expect("an address"))
    };
    for (version, cause) in [(&TLS12, "ProtocolVersion"), (&TLS13, "InvalidCertificate")] {
        let mut stream = libp2p::tcp::tokio::TcpStream(tcp(plain).await);
        by_hand::negotiate(&mut stream, "/tls/1.0.0").await.expect("libp2p's TLS");
        let name = "relay.example.org".try_into().expect("a name");
        let tls = tls_client(RootCertStore::empty(), version);
        let error = within(tls.connect(name, stream)).await.expect_err("no certificate to trust");
        let error = format!("{error:?}");
        assert!(error.contains(cause), "{error}");
    }
}

// ---- Requests

/// A client's upgrade request with these additional headers.
fn with_headers(headers: &str) -> Vec<u8> {
    let request = String::from_utf8(REQUEST.into()).expect("text");
    request.replace("\r\n\r\n", &format!("\r\n{headers}\r\n")).into_bytes()
}

/// The HTTP status of an answer.
fn status(answer: &[u8]) -> u16 {
    let text = String::from_utf8_lossy(answer);
    let status = text.strip_prefix("HTTP/1.1 ").and_then(|text| text.get(..3));
    status.and_then(|status| status.parse().ok()).unwrap_or_else(|| panic!("no answer: {text}"))
}

/// The head of an answer, up to and including the empty line.
async fn read_head(stream: &mut (impl libp2p::futures::AsyncRead + Unpin)) -> Vec<u8> {
    let (mut head, mut byte) = (Vec::new(), [0]);
    while !head.ends_with(b"\r\n\r\n") {
        stream.read_exact(&mut byte).await.expect("an answer");
        head.extend(byte);
    }
    head
}

#[tokio::test]
async fn eighty_headers_and_12_kib_of_cookies_open_a_websocket() {
    let relay = Relay::start(&[LISTEN]);
    let direct = address(&relay, "/ws").await;
    let headers = "X-From-A-CDN: some value\r\n".repeat(70);
    let cookies = format!("Cookie: {}\r\n", "c=0123456; ".repeat(120)).repeat(9);
    assert!(cookies.len() > 11_800, "{}", cookies.len());
    let mut client =
        connect(&through(Ipv4Addr::LOCALHOST, &direct, &(headers + &cookies)).await).await;
    client.reserve().await;
}

#[tokio::test]
async fn requests_that_open_no_websocket_get_a_one_line_answer() {
    let certificate = Certificate::new();
    let relay = with_certificate(&certificate, &[LISTEN, LISTEN_TLS]);
    let plain = port(&address(&relay, "/ws").await);
    let secure = port(&address(&relay, "/tls/ws").await);
    let get = |path: &str| format!("GET {path} HTTP/1.1\r\nHost: relay\r\n\r\n").into_bytes();
    for (request, expected) in [
        (get("/"), 426),
        (get("/healthz"), 200),
        (with_headers(&"X-Header: value\r\n".repeat(200)), 431),
        (with_headers(&format!("Cookie: {}\r\n", "c".repeat(17_000))), 431),
        (with_headers("not a header\r\n"), 400),
    ] {
        let mut in_tls = in_tls(tcp(secure).await, &certificate, &TLS13).await;
        in_tls.write_all(&request).await.expect("the relay reads");
        let mut from_secure = Vec::new();
        within(in_tls.read_to_end(&mut from_secure)).await.expect("a TLS close_notify");
        let from_plain = send_and_close(tcp(plain).await, &request).await;
        for answer in [from_plain, from_secure] {
            assert_eq!(status(&answer), expected);
            let text = String::from_utf8(answer).expect("text");
            let (head, body) = text.split_once("\r\n\r\n").expect("a body");
            assert!(head.contains(&format!("\r\nContent-Length: {}\r\n", body.len())), "{text}");
            assert_eq!(body.lines().count(), 1, "{text}");
            assert_eq!(head.contains("\r\nUpgrade: websocket\r\n"), expected == 426, "{text}");
        }
    }
}

#[tokio::test]
async fn an_open_health_check_connection_learns_of_the_drain() {
    let relay = Relay::start(&[LISTEN]);
    let over_websocket = address(&relay, "/ws").await;
    let mut check = tcp(port(&over_websocket)).await;
    check.write_all(b"GET /healthz HTTP/1.1\r\n").await.expect("the relay reads");
    // The relay has accepted it once a later connection is up.
    let client = connect(&over_websocket).await;
    relay.signal("USR1");
    relay.wait_for_log("SIGUSR1: draining").await;
    let answer = send_and_close(check, b"Host: relay\r\n\r\n").await;
    assert_eq!(status(&answer), 503);
    assert!(answer.ends_with(b"\r\n\r\ndraining\n"));
    client.disconnect().await;
}

// ---- Malformed and slow clients

#[tokio::test]
async fn a_stalled_upgrade_counts_as_a_handshake_and_times_out() {
    let hello = b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03"; // the beginning of a ClientHello
    future::join_all([
        check_stalled_upgrade("/ws", b""),
        check_stalled_upgrade("/ws", &REQUEST[..REQUEST.len() - 1]),
        check_stalled_upgrade("/ws", REQUEST),
        check_stalled_upgrade("/tls/ws", b""),
        check_stalled_upgrade("/tls/ws", hello),
    ])
    .await;
}

#[tokio::test]
async fn a_slow_upgrade_times_out() {
    let endless = with_headers("X-Endless: ");
    let endless = endless[..endless.len() - 2].iter().copied().chain(std::iter::repeat(b'a'));
    // The first request would be complete in 72 s, the second one never.
    future::join(check_slow_upgrade(REQUEST.iter().copied(), 500), check_slow_upgrade(endless, 10))
        .await;
}

/// Sends a request byte by byte with this pause in milliseconds. The connection must time out.
async fn check_slow_upgrade(request: impl Iterator<Item = u8>, pause: u64) {
    let relay = Relay::start(&[LISTEN]);
    let port = port(&address(&relay, "/ws").await);
    let (mut reader, mut writer) = tcp(port).await.into_split();
    let mut answer = Vec::new();
    let write_slowly = async {
        for byte in request {
            if writer.write_all(&[byte]).await.is_err() {
                break;
            }
            sleep(Duration::from_millis(pause)).await;
        }
        future::pending::<()>().await
    };
    tokio::select! {
        _ = within(reader.read_to_end(&mut answer)) => {}
        () = write_slowly => {}
    }
    assert!(answer.is_empty());
    relay.wait_for_log("exceeded its time limit").await;
}

/// Sends these bytes and then nothing, to a relay that allows one handshake. The connection must time out.
async fn check_stalled_upgrade(ending: &str, bytes: &[u8]) {
    let certificate = Certificate::new();
    let relay = with_certificate(&certificate, &[LISTEN, LISTEN_TLS, "--max-handshakes=1"]);
    let address = address(&relay, ending).await;
    let mut stalled = tcp(port(&address)).await;
    stalled.write_all(bytes).await.expect("the relay reads");
    assert!(read_until_closed(tcp(port(&address)).await).await.is_empty());
    relay.wait_for_log("too many handshakes").await;
    read_until_closed(stalled).await;
    relay.wait_for_log("exceeded its time limit").await;
    match ending {
        "/ws" => connect(&address).await.reserve().await,
        _ => connect_in_tls(&address, &certificate).await.reserve().await,
    };
}

#[tokio::test]
async fn malformed_upgrades_and_frames_affect_no_other_connection() {
    // 1. Requests that open no WebSocket, and the status of the answer.
    let mut bystanders = Bystanders::start(&[LISTEN]).await;
    let port = port(&address(&bystanders.relay, "/ws").await);
    let line =
        "X-Long: aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa\r\n";
    let request = String::from_utf8(REQUEST.into()).unwrap();
    let many = with_headers(&line.repeat(110));
    let long = request.replace("\r\n\r\n", &format!("\r\n{}", line.repeat(10_000)));
    for (bytes, expected) in [
        (&b"\r\n\r\n"[..], None),
        (&REQUEST[..REQUEST.len() - 2], None),
        (b"GET / HTTP/1.1\r\n\r\n", Some(426)),
        (&[0xff; 20_000], Some(400)),
        (&[b'\n'; 20_000], Some(431)),
        (request.replace("GET", "POST").as_bytes(), Some(400)),
        (request.replace("HTTP/1.1", "HTTP/1.0").as_bytes(), Some(400)),
        (request.replace("Version: 13", "Version: 8").as_bytes(), Some(426)),
        (request.replace("dGhlIHNhbXBsZSBub25jZQ==", "").as_bytes(), Some(400)),
        (request.replace("relay", "\u{0}").as_bytes(), Some(400)),
        (&many, Some(431)),
        (&[REQUEST, &frame(BINARY | LAST, b"too soon")].concat(), Some(400)),
        (&by_hand::proposal("/noise"), Some(400)),
    ] {
        let answer = send_and_close(tcp(port).await, bytes).await;
        let shown = String::from_utf8_lossy(bytes);
        match expected {
            Some(expected) => assert_eq!(status(&answer), expected, "{shown}"),
            None => assert!(answer.is_empty(), "{shown}"),
        }
    }
    // The relay does not read all of it, so the answer may be lost.
    send_and_close(tcp(port).await, long.as_bytes()).await;

    // 2. Frames on an open WebSocket.
    let noise = by_hand::proposal("/noise");
    for bytes in [
        frame(CONTINUATION | LAST, &noise),
        [frame(BINARY, &noise), frame(BINARY | LAST, &noise)].concat(),
        frame(3 | LAST, &noise),
        frame(0x70 | BINARY | LAST, &noise),
        frame(PING | LAST, &[0; 126]),
        frame(PING, b"a part"),
        frame(CLOSE | LAST, b"\x03\xe8\xff\xff"),
        [frame(CLOSE | LAST, b""), frame(BINARY | LAST, &noise)].concat(),
        [frame(BINARY | LAST, &noise), vec![0xff; 10_000]].concat(),
        frame(TEXT | LAST, b"words"),
        frame(PING | LAST, b"").repeat(20_000),
        frame(BINARY | LAST, b"").repeat(20_000),
        [frame(BINARY, b""), frame(CONTINUATION, b"").repeat(20_000)].concat(),
    ] {
        send_and_close(websocket::by_hand(port).await, &bytes).await;
    }
    bystanders.assert_unharmed().await;
}

#[tokio::test]
async fn websocket_messages_of_more_than_256_kib_are_rejected() {
    let mut bystanders = Bystanders::start(&[LISTEN]).await;
    let port = port(&address(&bystanders.relay, "/ws").await);
    let answered = async |bytes: Vec<u8>| {
        let answer = send_and_close(websocket::by_hand(port).await, &bytes).await;
        answer.windows(3).any(|part| part == b"na\n") // multistream-select's refusal
    };
    let in_two = |length| {
        let proposals = proposals(length);
        let (first, rest) = proposals.split_at(length / 2);
        [frame(BINARY, first), frame(CONTINUATION | LAST, rest)].concat()
    };
    assert!(answered(frame(BINARY | LAST, &proposals(LONGEST))).await);
    assert!(!answered(frame(BINARY | LAST, &proposals(LONGEST + 1))).await);
    assert!(answered(in_two(LONGEST)).await);
    assert!(!answered(in_two(LONGEST + 1)).await);
    for length in [LONGEST as u64 + 1, 1 << 28, 1 << 62, u64::MAX] {
        let mut stream = websocket::by_hand(port).await;
        let announced = header(BINARY | LAST, length);
        stream.write_all(&announced).await.expect("the relay reads");
        // The header alone closes the connection.
        read_until_closed(stream).await;
    }
    // Headers that announce the longest message, without its payload. `assert_unharmed` checks the relay's memory.
    let announced = future::join_all((0..64).map(|_| async {
        let mut stream = websocket::by_hand(port).await;
        let announced = header(BINARY | LAST, LONGEST as u64);
        stream.write_all(&announced).await.expect("the relay reads");
        stream
    }));
    let announced = announced.await;
    bystanders.assert_unharmed().await;
    for stream in announced {
        read_until_closed(stream).await;
    }
}

/// This many bytes of proposals for unknown protocols. The relay answers each with `na`.
fn proposals(length: usize) -> Vec<u8> {
    // Four bytes are the slash, the newline, and the length prefix.
    let proposal = |length: usize| by_hand::line(&format!("/{}", "x".repeat(length - 4)));
    let mut bytes = by_hand::line("/multistream/1.0.0");
    while length - bytes.len() > 2000 {
        bytes.extend(proposal(1000));
    }
    bytes.extend(proposal(length - bytes.len()));
    bytes
}

#[tokio::test]
async fn a_frame_that_is_too_long_or_forged_or_a_close_closes_a_connection_in_use() {
    let relay = Relay::start(&[LISTEN]);
    let over_websocket = address(&relay, "/ws").await;
    for bytes in [
        header(BINARY | LAST, LONGEST as u64 + 1),
        frame(BINARY | LAST, &vec![0; LONGEST]),
        frame(CLOSE | LAST, b""),
    ] {
        let (injector, through) = Injector::to(&over_websocket).await;
        let mut client = connect(&through).await;
        client.reserve().await;
        injector.inject(bytes).await;
        let closed = format!("closed: peer {}", client.peer);
        relay.wait_for_log(&closed).await;
    }
    connect(&over_websocket).await.reserve().await;
}

// ---- Helpers

/// Sends `bytes` and closes the write half; returns what the relay sends until it closes the connection.
async fn send_and_close(stream: TcpStream, bytes: &[u8]) -> Vec<u8> {
    by_hand::send_and_close(libp2p::tcp::tokio::TcpStream(stream), bytes).await
}

/// A forwarder between a client and the relay that can send bytes in the client's place.
struct Injector(mpsc::Sender<Vec<u8>>);

impl Injector {
    /// A forwarder to this address, and the address that the client dials.
    async fn to(relay: &Multiaddr) -> (Self, Multiaddr) {
        let stream = tcp(port(relay)).await;
        Self::over(stream, relay).await
    }

    /// As [`Injector::to`], from the proxy's address and with this header first.
    async fn with_header(relay: &Multiaddr, header: Vec<u8>) -> (Self, Multiaddr) {
        let mut stream = from_proxy(port(relay)).await;
        stream.write_all(&header).await.expect("the relay reads");
        Self::over(stream, relay).await
    }

    /// As [`Injector::to`], over this connection to the relay.
    async fn over(stream: TcpStream, relay: &Multiaddr) -> (Self, Multiaddr) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let own = listener.local_addr().unwrap().port();
        let through = relay.iter().map(|part| match part {
            Protocol::Tcp(_) => Protocol::Tcp(own),
            other => other,
        });
        let (sender, injected) = mpsc::channel(1);
        tokio::spawn(async move {
            let (client, _) = listener.accept().await?;
            forward(client, stream, injected).await
        });
        (Self(sender), through.collect())
    }

    /// Sends these bytes to the relay, between those of the client.
    async fn inject(&self, bytes: Vec<u8>) {
        self.0.send(bytes).await.expect("the connection is up");
    }
}

/// Forwards both ways until both sides have closed, and sends the injected bytes to the relay.
async fn forward(
    client: TcpStream,
    relay: TcpStream,
    mut injected: mpsc::Receiver<Vec<u8>>,
) -> std::io::Result<()> {
    let (mut from_client, mut to_client) = client.into_split();
    let (mut from_relay, mut to_relay) = relay.into_split();
    let client_to_relay = async {
        let mut buffer = [0; 16 * 1024];
        loop {
            tokio::select! {
                Some(bytes) = injected.recv() => to_relay.write_all(&bytes).await?,
                read = from_client.read(&mut buffer) => match read? {
                    0 => return to_relay.shutdown().await,
                    read => to_relay.write_all(&buffer[..read]).await?,
                }
            }
        }
    };
    let relay_to_client = async {
        tokio::io::copy(&mut from_relay, &mut to_client).await?;
        to_client.shutdown().await
    };
    future::try_join(client_to_relay, relay_to_client).await.map(|_| ())
}

/// An HTTP proxy at this address that serves one client and adds headers to its request. Returns the address that the
/// client dials.
async fn through(proxy: Ipv4Addr, relay: &Multiaddr, headers: &str) -> Multiaddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let own = listener.local_addr().unwrap().port();
    let (relay_port, headers) = (port(relay), headers.to_owned());
    tokio::spawn(async move {
        let (mut client, _) = listener.accept().await?;
        let mut to_relay = by_hand::tcp_from(proxy, relay_port).await?.0;
        let mut request = Vec::new();
        while !request.ends_with(b"\r\n\r\n") {
            request.push(client.read_u8().await?);
        }
        request.truncate(request.len() - 2);
        to_relay.write_all(&[&request, headers.as_bytes(), b"\r\n"].concat()).await?;
        tokio::io::copy_bidirectional(&mut client, &mut to_relay).await
    });
    let with_port = |part| if let Protocol::Tcp(_) = part { Protocol::Tcp(own) } else { part };
    relay.iter().map(with_port).collect()
}
