//! WebSocket, by itself and in TLS: who connects over it, which certificate it shows, and what it
//! takes from strangers.

use std::{
    fs,
    net::SocketAddr,
    time::{Duration, Instant},
};

use crate::common::{
    Client, PATIENCE, Relay, by_hand,
    bystanders::Bystanders,
    circuit, command, messages, read_bytes,
    websocket::{
        self, BINARY, CERTIFICATE, CLOSE, CONTINUATION, Certificate, LAST, LISTEN, LISTEN_TLS,
        PING, REQUEST, TEXT, address, connect, connect_in_tls, frame, header, port, tcp,
    },
    within,
};
use libp2p::{
    Multiaddr, Stream,
    futures::{AsyncWriteExt as _, future},
    multiaddr::Protocol,
};
use proxy_header::{ProxiedAddress, ProxyHeader};
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpSocket, TcpStream},
    sync::mpsc,
    time::sleep,
};

const TCP: &str = "--listen=/ip4/127.0.0.1/tcp/0";
const RESERVATION_REFUSED: Option<i32> = Some(200);

/// The longest message that the relay reads.
const LONGEST: usize = 256 * 1024;

// ---- Who connects

#[tokio::test]
async fn tcp_and_websocket_are_served_at_once_and_by_one_relay() {
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
        passes(&mut there, &mut back).await;
        passes(&mut back, &mut there).await;
        std::mem::swap(&mut tcp, &mut websocket);
    }
}

async fn passes(from: &mut Stream, to: &mut Stream) {
    let bytes: Vec<_> = (0..100 * 1024).map(|n| n as u8).collect();
    let send = async {
        within(from.write_all(&bytes)).await.expect("it is read");
        within(from.flush()).await.expect("it is read");
    };
    let (read, ()) = future::join(read_bytes(to, bytes.len()), send).await;
    assert_eq!(read, bytes);
}

#[tokio::test]
async fn reservations_say_that_browsers_reach_it_and_so_does_the_log() {
    let relay = Relay::start(&[LISTEN]);
    let over_websocket = address(&relay, "/ws").await;
    let paste = format!("browsers on this machine reach it at {over_websocket}");
    relay.wait_for_log(&paste).await;
    let told = told(&mut connect(&over_websocket).await).await;
    assert!(told.contains(&relay.address), "{told:?}");
    assert!(told.contains(&over_websocket), "{told:?}");
}

#[tokio::test]
async fn announced_addresses_are_taken_as_they_are() {
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
    let told = told(&mut connect(&address(&relay, "/ws").await).await).await;
    let expected = announced.map(|text| format!("{text}/p2p/{}", relay.peer));
    assert_eq!(told, expected.map(|text| text.parse().unwrap()));
}

/// The addresses in a reservation.
async fn told(client: &mut Client) -> Vec<Multiaddr> {
    let reservation = client.reserve().await.reservation.expect("a reservation");
    let addresses = reservation.addrs.into_iter();
    addresses.map(|bytes| bytes.try_into().expect("an address")).collect()
}

#[tokio::test]
async fn caps_count_both_together() {
    let relay =
        Relay::start(&[LISTEN, "--max-reservations-per-ip=1", "--max-connections-per-ip=2"]);
    let over_websocket = address(&relay, "/ws").await;
    let mut first = connect(&over_websocket).await;
    let mut second = Client::connect(&relay).await;
    first.reserve().await;
    let answer = second.ask(&messages::reserve()).await;
    assert_eq!(answer.status, RESERVATION_REFUSED);
    for port in [relay.port(), port(&over_websocket)] {
        assert!(heard_until_closed(tcp(port).await).await.is_empty());
    }
    let denied = "/ws: too many connections of 127.0.0.1";
    relay.wait_for_log(denied).await;
}

#[tokio::test]
async fn whatever_comes_in_over_websocket_is_a_sign_of_life() {
    let relay = Relay::start(&[LISTEN, "--heartbeat=4s"]);
    let (line, through) = Line::to(&address(&relay, "/ws").await).await;
    let mut chatty = connect(&through).await;
    let mut quiet = connect(&address(&relay, "/ws").await).await;
    chatty.reserve().await;
    quiet.reserve().await;
    let asked = |peer| {
        let asked = format!("asked for a sign of life: peer {peer}");
        let log = relay.log();
        log.iter().filter(|line| line.contains(&asked)).count()
    };
    let start = Instant::now();
    while asked(quiet.peer) < 2 {
        assert!(start.elapsed() < PATIENCE);
        // Nobody but the transport hears of it.
        line.say(frame(LAST | PING, b"")).await;
        sleep(Duration::from_millis(200)).await;
    }
    assert_eq!(asked(chatty.peer), 0);
    chatty.reserve().await;
}

#[tokio::test]
async fn a_proxy_says_whose_connection_it_brings_over_websocket_too() {
    let relay = Relay::start(&[
        LISTEN,
        "--proxy-protocol-from=127.0.0.3/32",
        "--deny-subnet=198.51.100.0/24",
    ]);
    let direct = address(&relay, "/ws").await;
    let reach = async |client: &str| {
        let (_, through) = Line::with_header(&direct, v2(client)).await;
        connect(&through).await
    };
    let mut wanted = reach("192.0.2.7:1234").await;
    wanted.reserve().await;
    let opened = format!("opened: peer {} at /ip4/192.0.2.7/tcp/1234/ws", wanted.peer);
    relay.wait_for_log(&opened).await;
    let mut unwanted = from_proxy(port(&direct)).await;
    unwanted.write_all(&[&v2("198.51.100.7:1"), REQUEST].concat()).await.expect("it is read");
    assert!(heard_until_closed(unwanted).await.is_empty());
    relay.wait_for_log("denied: /ip4/198.51.100.7/tcp/1/ws: the rules do not allow it").await;

    let mut without = from_proxy(port(&direct)).await;
    without.write_all(REQUEST).await.expect("it is read");
    assert!(heard_until_closed(without).await.is_empty());
    relay.wait_for_log("or remove its address from --proxy-protocol-from").await;
    connect(&direct).await.reserve().await;
}

#[tokio::test]
async fn a_header_that_comes_when_nobody_listens_any_more_is_late() {
    let listen = format!("--listen=/ip4/127.0.0.1/tcp/{}/ws", free_port());
    let relay = Relay::start(&[&listen, "--proxy-protocol-from=127.0.0.3/32"]);
    let over_websocket = address(&relay, "/ws").await;
    let mut late = from_proxy(port(&over_websocket)).await;
    // It is waited for once a later one has come.
    connect(&over_websocket).await.leave().await;
    relay.signal("USR1");
    relay.wait_for_log("SIGUSR1: draining").await;
    late.write_all(&v2("192.0.2.7:1")).await.expect("it is read");
    assert!(heard_until_closed(late).await.is_empty());
    relay.signal("USR1");
    relay.wait_for_log("admitting clients again").await;
    connect(&over_websocket).await.reserve().await;
}

/// Where nobody listens.
fn free_port() -> u16 {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().port()
}

// ---- Certificates

#[tokio::test]
async fn in_tls_the_certificate_of_the_flags_is_shown_and_a_new_one_once_it_is_there() {
    let (first, second, third) = (Certificate::new(), Certificate::new(), Certificate::new());
    let wss = "--listen=/ip4/127.0.0.1/tcp/0/wss";
    let relay = with_certificate(&first, &[TCP, LISTEN_TLS, LISTEN, wss]);
    let secure = address(&relay, "/tls/ws").await;
    let mut open = connect_in_tls(&secure, &first).await;
    open.reserve().await;
    assert!(!second.is_shown(&secure).await);

    second.write(relay.folder.path());
    relay.wait_for_log("changed, reloaded").await;
    assert!(second.is_shown(&secure).await && !first.is_shown(&secure).await);
    connect_in_tls(&secure, &second).await.reserve().await;

    third.write(relay.folder.path());
    relay.signal("HUP");
    relay.wait_for_log("SIGHUP: --tls-cert cert.pem: reloaded").await;
    assert!(third.is_shown(&secure).await);
    // On the connection that it had, and without TLS.
    open.reserve().await;
    Client::connect(&relay).await.reserve().await;
    connect(&address(&relay, "/ws").await).await.reserve().await;
    connect_in_tls(&address(&relay, "/wss").await, &third).await.reserve().await;
}

#[tokio::test]
async fn a_bad_certificate_leaves_the_old_one_serving_and_is_told_once() {
    let (first, second) = (Certificate::new(), Certificate::new());
    let relay = with_certificate(&first, &[LISTEN_TLS]);
    let secure = address(&relay, "/tls/ws").await;
    let folder = relay.folder.path();
    let told = || {
        let log = relay.log();
        log.into_iter()
            .filter(|line| line.contains("keeping the previous certificate"))
            .collect::<Vec<_>>()
    };

    fs::write(folder.join("cert.pem"), &second.pem).expect("it can be written");
    relay.wait_for_log("--tls-key key.pem: not the key of --tls-cert cert.pem").await;
    assert!(first.is_shown(&secure).await);
    fs::remove_file(folder.join("key.pem")).expect("it can be removed");
    relay.wait_for_log("--tls-key key.pem: No such file").await;
    assert!(first.is_shown(&secure).await);
    relay.signal("HUP");
    relay.wait_for_log("SIGHUP: keeping the previous certificate: --tls-key key.pem").await;
    assert!(first.is_shown(&secure).await);

    second.write(folder);
    relay.wait_for_log("changed, reloaded").await;
    assert!(second.is_shown(&secure).await);
    let told = told();
    assert_eq!(told.len(), 3, "{told:#?}");
    assert!(told.iter().all(|line| line.contains(" ERROR ")), "{told:#?}");
}

#[tokio::test]
async fn sighup_takes_up_files_under_other_names() {
    let (first, second) = (Certificate::new(), Certificate::new());
    let folder = tempfile::tempdir().expect("a temporary folder");
    first.write(folder.path());
    let elsewhere = folder.path().join("new");
    fs::create_dir(&elsewhere).expect("a folder");
    second.write(&elsewhere);
    let file = folder.path().join("relaylet.toml");
    fs::write(&file, "tls-cert = \"cert.pem\"\ntls-key = \"key.pem\"\n").expect("a file");
    let relay = Relay::start_in(folder, &["--config=relaylet.toml", LISTEN_TLS]);
    let secure = address(&relay, "/tls/ws").await;
    assert!(first.is_shown(&secure).await);
    fs::write(&file, "tls-cert = \"new/cert.pem\"\ntls-key = \"new/key.pem\"\n").expect("a file");
    relay.signal("HUP");
    relay.wait_for_log("SIGHUP: changed: tls-cert, tls-key").await;
    relay.wait_for_log("SIGHUP: --tls-cert new/cert.pem: reloaded").await;
    assert!(second.is_shown(&secure).await);
    fs::write(&file, "tls-cert = \"cert.pem\"\n").expect("a file");
    relay.signal("HUP");
    relay
        .wait_for_log("SIGHUP: keeping the previous settings: relaylet.toml:1: --tls-cert cert.pem")
        .await;
    assert!(second.is_shown(&secure).await);
}

#[tokio::test]
async fn a_certificate_that_nobody_gets_to_see_is_a_warning() {
    let relay = with_certificate(&Certificate::new(), &[TCP, LISTEN]);
    let line = relay.wait_for_log("--tls-cert cert.pem: not in use").await;
    assert!(line.contains(" WARN "), "{line}");
}

#[tokio::test]
async fn a_certificate_that_is_for_no_announced_name_is_a_warning_and_its_end_a_metric() {
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
        use crate::common::http;
        let at = http::port(&relay).await;
        let metrics = http::samples(&http::get(at, "/metrics").await);
        assert!(metrics["relaylet_certificate_not_after_seconds"] > 1.7e9, "{metrics:?}");
    }
}

#[test]
fn what_keeps_a_certificate_from_being_shown_is_one_line() {
    let (one, other) = (Certificate::new(), Certificate::new());
    let garbage = "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n";
    let no_file: Option<&str> = None;
    for (cert, key, said) in [
        (no_file, no_file, "--tls-cert cert.pem: No such file"),
        (Some(&one.pem[..]), no_file, "--tls-key key.pem: No such file"),
        (Some(""), Some(&one.key[..]), "--tls-cert cert.pem: has no BEGIN CERTIFICATE"),
        (Some(&one.pem), Some(&one.pem), "--tls-key key.pem: has no BEGIN PRIVATE KEY"),
        (Some(&one.pem), Some(garbage), "--tls-key key.pem: holds a key of no use"),
        (Some(&one.pem), Some(&other.key), "--tls-key key.pem: not the key of --tls-cert cert.pem"),
    ] {
        let folder = tempfile::tempdir().expect("a temporary folder");
        for (name, contents) in [("cert.pem", cert), ("key.pem", key)] {
            if let Some(contents) = contents {
                fs::write(folder.path().join(name), contents).expect("it can be written");
            }
        }
        let (line, status) = refused(&folder, &[&CERTIFICATE[..], &[LISTEN_TLS]].concat());
        assert!(line.starts_with(&format!("relaylet: {said}")), "{said}: {line}");
        assert_eq!(status, Some(1), "{line}");
    }
    let folder = tempfile::tempdir().expect("a temporary folder");
    fs::create_dir(folder.path().join("cert.pem")).expect("a folder");
    let (line, _) = refused(&folder, &[&CERTIFICATE[..], &[LISTEN_TLS]].concat());
    assert!(line.contains("--tls-cert cert.pem: not a regular file"), "{line}");

    for (flags, said) in [
        (&[LISTEN_TLS][..], "name one with --tls-cert and --tls-key"),
        (&[CERTIFICATE[0]], "--tls-cert cert.pem: requires its private key"),
        (&[CERTIFICATE[1]], "--tls-key key.pem: requires its certificate"),
    ] {
        let (line, status) = refused(&folder, flags);
        assert!(line.contains(said), "{line}");
        assert_eq!(status, Some(2), "{line}");
    }
}

/// The one line that says why there is no relay, and its status.
fn refused(folder: &TempDir, flags: &[&str]) -> (String, Option<i32>) {
    let mut command = command(folder);
    command.args(flags).env("RUST_LOG", "off");
    let output = command.output().expect("it can be started");
    let line = String::from_utf8(output.stderr).expect("text");
    assert!(output.stdout.is_empty());
    assert_eq!(line.lines().count(), 1, "{line}");
    (line, output.status.code())
}

fn with_certificate(certificate: &Certificate, listen: &[&str]) -> Relay {
    let folder = tempfile::tempdir().expect("a temporary folder");
    certificate.write(folder.path());
    Relay::start_in(folder, &[listen, &CERTIFICATE].concat())
}

// ---- What it takes from strangers

#[tokio::test]
async fn an_upgrade_that_never_ends_is_one_handshake_and_ends_after_its_time() {
    let hello = b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03"; // the beginning of one
    future::join_all([
        stalls("/ws", b""),
        stalls("/ws", &REQUEST[..REQUEST.len() - 1]),
        stalls("/ws", REQUEST),
        stalls("/tls/ws", b""),
        stalls("/tls/ws", hello),
    ])
    .await;
}

#[tokio::test]
async fn an_upgrade_that_dribbles_in_ends_after_its_time_too() {
    let relay = Relay::start(&[LISTEN]);
    let port = port(&address(&relay, "/ws").await);
    let (mut reader, mut writer) = tcp(port).await.into_split();
    let mut heard = Vec::new();
    let dribble = async {
        for byte in REQUEST {
            if writer.write_all(&[*byte]).await.is_err() {
                break;
            }
            sleep(Duration::from_millis(500)).await;
        }
        future::pending::<()>().await
    };
    tokio::select! {
        _ = within(reader.read_to_end(&mut heard)) => {}
        () = dribble => {}
    }
    assert!(heard.is_empty());
    relay.wait_for_log("exceeded its time limit").await;
}

/// A client says this, and then nothing, to a relay that has time for one handshake.
async fn stalls(ending: &str, bytes: &[u8]) {
    let certificate = Certificate::new();
    let relay = with_certificate(&certificate, &[LISTEN, LISTEN_TLS, "--max-handshakes=1"]);
    let address = address(&relay, ending).await;
    let mut stalled = tcp(port(&address)).await;
    stalled.write_all(bytes).await.expect("it is read");
    assert!(heard_until_closed(tcp(port(&address)).await).await.is_empty());
    relay.wait_for_log("too many handshakes").await;
    heard_until_closed(stalled).await;
    relay.wait_for_log("exceeded its time limit").await;
    match ending {
        "/ws" => connect(&address).await.reserve().await,
        _ => connect_in_tls(&address, &certificate).await.reserve().await,
    };
}

#[tokio::test]
async fn what_is_no_upgrade_and_what_is_no_frame_harms_nobody() {
    let mut bystanders = Bystanders::gather(&[LISTEN]).await;
    let port = port(&address(&bystanders.relay, "/ws").await);
    let line =
        "X-Long: aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa\r\n";
    let request = String::from_utf8(REQUEST.into()).unwrap();
    let many = request.replace("\r\n\r\n", &format!("\r\n{}\r\n", line.repeat(40)));
    let long = request.replace("\r\n\r\n", &format!("\r\n{}", line.repeat(10_000)));
    for bytes in [
        &b"\r\n\r\n"[..],
        b"GET / HTTP/1.1\r\n\r\n",
        &[0xff; 20_000],
        &[b'\n'; 20_000],
        request.replace("GET", "POST").as_bytes(),
        request.replace("HTTP/1.1", "HTTP/1.0").as_bytes(),
        request.replace("Version: 13", "Version: 8").as_bytes(),
        request.replace("dGhlIHNhbXBsZSBub25jZQ==", "").as_bytes(),
        request.replace("relay", "\u{0}").as_bytes(),
        many.as_bytes(),
        long.as_bytes(),
        &by_hand::proposal("/noise"),
    ] {
        let heard = said(tcp(port).await, bytes).await;
        assert!(heard.is_empty(), "{}", String::from_utf8_lossy(bytes));
    }

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
        said(websocket::by_hand(port).await, &bytes).await;
    }
    bystanders.are_unharmed().await;
}

#[tokio::test]
async fn a_message_has_the_length_that_clients_send_and_no_more() {
    let mut bystanders = Bystanders::gather(&[LISTEN]).await;
    let port = port(&address(&bystanders.relay, "/ws").await);
    let answered = async |bytes: Vec<u8>| {
        let heard = said(websocket::by_hand(port).await, &bytes).await;
        heard.windows(3).any(|part| part == b"na\n")
    };
    let in_two = |length| {
        let questions = questions(length);
        let (first, rest) = questions.split_at(length / 2);
        [frame(BINARY, first), frame(CONTINUATION | LAST, rest)].concat()
    };
    assert!(answered(frame(BINARY | LAST, &questions(LONGEST))).await);
    assert!(!answered(frame(BINARY | LAST, &questions(LONGEST + 1))).await);
    assert!(answered(in_two(LONGEST)).await);
    assert!(!answered(in_two(LONGEST + 1)).await);
    for length in [LONGEST as u64 + 1, 1 << 28, 1 << 62, u64::MAX] {
        let mut stream = websocket::by_hand(port).await;
        let announced = header(BINARY | LAST, length);
        stream.write_all(&announced).await.expect("it is read");
        // Without a word more.
        heard_until_closed(stream).await;
    }
    // As long as may be, and never there. It is looked at how much memory that took.
    let announced = future::join_all((0..64).map(|_| async {
        let mut stream = websocket::by_hand(port).await;
        let announced = header(BINARY | LAST, LONGEST as u64);
        stream.write_all(&announced).await.expect("it is read");
        stream
    }));
    let announced = announced.await;
    bystanders.are_unharmed().await;
    for stream in announced {
        heard_until_closed(stream).await;
    }
}

/// So many bytes of questions for protocols that nobody speaks, each of which is answered.
fn questions(length: usize) -> Vec<u8> {
    // Beside the name: its slash, its end, and how long it is.
    let question = |length: usize| by_hand::line(&format!("/{}", "x".repeat(length - 4)));
    let mut bytes = by_hand::line("/multistream/1.0.0");
    while length - bytes.len() > 2000 {
        bytes.extend(question(1000));
    }
    bytes.extend(question(length - bytes.len()));
    bytes
}

#[tokio::test]
async fn who_sends_too_much_at_once_later_on_loses_its_connection() {
    let relay = Relay::start(&[LISTEN]);
    let over_websocket = address(&relay, "/ws").await;
    for bytes in [
        header(BINARY | LAST, LONGEST as u64 + 1),
        frame(BINARY | LAST, &vec![0; LONGEST]),
        frame(CLOSE | LAST, b""),
    ] {
        let (line, through) = Line::to(&over_websocket).await;
        let mut client = connect(&through).await;
        client.reserve().await;
        line.say(bytes).await;
        let closed = format!("closed: peer {}", client.peer);
        relay.wait_for_log(&closed).await;
    }
    connect(&over_websocket).await.reserve().await;
}

// ---- Helpers

/// Says all of it and closes its half; yields what the relay said until it closed its own.
async fn said(stream: TcpStream, bytes: &[u8]) -> Vec<u8> {
    by_hand::say_and_hang_up(libp2p::tcp::tokio::TcpStream(stream), bytes).await
}

async fn heard_until_closed(stream: TcpStream) -> Vec<u8> {
    by_hand::until_closed(libp2p::tcp::tokio::TcpStream(stream)).await
}

/// Somebody between a client and the relay, who can say something in the client's place.
struct Line(mpsc::Sender<Vec<u8>>);

impl Line {
    /// To this address, and what a client dials to get through.
    async fn to(relay: &Multiaddr) -> (Self, Multiaddr) {
        let stream = tcp(port(relay)).await;
        Self::over(stream, relay).await
    }

    /// As [`Line::to`], from where the proxy is and with its header in front.
    async fn with_header(relay: &Multiaddr, header: Vec<u8>) -> (Self, Multiaddr) {
        let mut stream = from_proxy(port(relay)).await;
        stream.write_all(&header).await.expect("it is read");
        Self::over(stream, relay).await
    }

    async fn over(stream: TcpStream, relay: &Multiaddr) -> (Self, Multiaddr) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let own = listener.local_addr().unwrap().port();
        let through = relay.iter().map(|part| match part {
            Protocol::Tcp(_) => Protocol::Tcp(own),
            other => other,
        });
        let (say, said) = mpsc::channel(1);
        tokio::spawn(async move {
            let (client, _) = listener.accept().await?;
            pass_on(client, stream, said).await
        });
        (Self(say), through.collect())
    }

    async fn say(&self, bytes: Vec<u8>) {
        self.0.send(bytes).await.expect("the line holds");
    }
}

async fn pass_on(
    client: TcpStream,
    relay: TcpStream,
    mut said: mpsc::Receiver<Vec<u8>>,
) -> std::io::Result<()> {
    let (mut from_client, mut to_client) = client.into_split();
    let (mut from_relay, mut to_relay) = relay.into_split();
    let there = async {
        let mut buffer = [0; 16 * 1024];
        loop {
            tokio::select! {
                Some(bytes) = said.recv() => to_relay.write_all(&bytes).await?,
                read = from_client.read(&mut buffer) => match read? {
                    0 => return to_relay.shutdown().await,
                    read => to_relay.write_all(&buffer[..read]).await?,
                }
            }
        }
    };
    let back = async {
        tokio::io::copy(&mut from_relay, &mut to_client).await?;
        to_client.shutdown().await
    };
    future::try_join(there, back).await.map(|_| ())
}

/// A connection from where the proxy is.
async fn from_proxy(port: u16) -> TcpStream {
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind(([127, 0, 0, 3], 0).into()).unwrap();
    let connecting = socket.connect(([127, 0, 0, 1], port).into());
    within(connecting).await.expect("the relay listens")
}

fn v2(client: &str) -> Vec<u8> {
    let client: SocketAddr = client.parse().unwrap();
    let address = ProxiedAddress::stream(client, "203.0.113.1:4001".parse().unwrap());
    let mut bytes = Vec::new();
    ProxyHeader::with_address(address).encode_v2(&mut bytes).unwrap();
    bytes
}
