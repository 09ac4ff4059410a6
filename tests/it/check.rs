//! `relaylet check`: each of its steps, and what it says where one fails.

use std::{
    fs,
    io::{Read, Write},
    net::TcpListener,
    path::Path,
    process::Output,
    thread,
};

use libp2p::{
    Multiaddr, PeerId, Stream,
    futures::{
        AsyncReadExt, AsyncWriteExt, StreamExt,
        future::{self, BoxFuture},
        io,
    },
    identify,
    identity::Keypair,
    multiaddr::Protocol,
    pnet::PreSharedKey,
    relay,
    swarm::{NetworkBehaviour, dummy},
};
use tempfile::TempDir;
use tokio::task::spawn_blocking;

use crate::common::{
    Client, HOP, Relay, STOP, command,
    messages::{self, HopMessage, OK, Reservation, StopMessage},
    output,
    swarms::{drive, listen, swarm},
    tcp_port,
    websocket::{self, CERTIFICATE, Certificate, LISTEN, LISTEN_TLS},
};

const LISTEN_TCP: &str = "/ip4/127.0.0.1/tcp/0";

/// What a check printed, and its exit code.
struct CheckOutput {
    code: Option<i32>,
    lines: Vec<String>,
}

impl CheckOutput {
    /// The first words of the lines: the steps.
    fn steps(&self) -> Vec<&str> {
        self.lines.iter().filter_map(|line| line.split_whitespace().next()).collect()
    }

    /// The line of this step.
    fn line_of(&self, step: &str) -> &str {
        let line = self.lines.iter().find(|line| line.starts_with(step));
        line.unwrap_or_else(|| panic!("no {step}: {:#?}", self.lines))
    }

    /// Asserts that this step failed, with this cause and this remedy, and that all before it succeeded.
    fn assert_failed_at(&self, step: &str, cause: &str, remedy: &str) {
        let line = self.lines.last().expect("a line");
        assert_eq!(self.code, Some(1), "{:#?}", self.lines);
        assert!(line.starts_with(step), "{step}: {:#?}", self.lines);
        let (_, failure) = line.split_once("FAILED: ").expect(line);
        let (actual_cause, actual_remedy) = failure.split_once("; ").expect(line);
        assert!(actual_cause.contains(cause), "{cause}: {line}");
        assert!(actual_remedy.contains(remedy), "{remedy}: {line}");
        let failed = self.lines.iter().filter(|line| line.contains("FAILED")).count();
        assert_eq!(failed, 1, "{:#?}", self.lines);
    }
}

/// Runs the check with these arguments, in this folder.
async fn check_in(folder: &Path, arguments: &[&str]) -> CheckOutput {
    let mut command = command(&TempDir::new().expect("a folder"));
    command.current_dir(folder).arg("check").args(arguments).env("SSL_CERT_FILE", "cert.pem");
    let output = spawn_blocking(move || output(&mut command)).await;
    let Output { status, stdout, stderr } = output.expect("it ends");
    assert!(stderr.is_empty(), "{}", String::from_utf8_lossy(&stderr));
    let stdout = String::from_utf8(stdout).expect("text");
    let lines = stdout.lines().map(str::to_owned).collect();
    CheckOutput { code: status.code(), lines }
}

async fn check(address: &Multiaddr) -> CheckOutput {
    check_in(Path::new("."), &[&address.to_string()]).await
}

/// Runs a rust-libp2p peer with this behaviour. Returns its address.
async fn peer<B>(behaviour: impl FnOnce(&Keypair) -> B) -> Multiaddr
where
    B: NetworkBehaviour<ToSwarm: Send> + Send,
{
    let mut swarm = swarm(behaviour);
    let address = listen(&mut swarm, LISTEN_TCP.parse().unwrap()).await;
    swarm.add_external_address(address.clone());
    let peer = *swarm.local_peer_id();
    drive(swarm);
    address.with(Protocol::P2p(peer))
}

#[derive(NetworkBehaviour)]
struct RustRelay {
    relay: relay::Behaviour,
    identify: identify::Behaviour,
}

#[derive(NetworkBehaviour)]
struct Streams {
    stream: libp2p_stream::Behaviour,
    identify: identify::Behaviour,
}

fn identify(keypair: &Keypair) -> identify::Behaviour {
    identify::Behaviour::new(identify::Config::new("test".into(), keypair.public()))
}

// ---- Relays that work

#[tokio::test]
async fn all_steps_succeed_over_tcp_and_the_circuit_and_the_connection_end() {
    let relay = Relay::start(&[]);
    let checked = check(&relay.address).await;
    assert_eq!(checked.code, Some(0), "{:#?}", checked.lines);
    let steps = ["tcp", "secure", "identify", "reserve", "second", "circuit", "end"];
    assert_eq!(checked.steps(), steps);
    assert!(checked.line_of("secure").contains(&relay.peer.to_string()));
    let identify = checked.line_of("identify");
    assert!(identify.contains("relaylet/0.1.0; sees us at /ip4/127.0.0.1/tcp/"), "{identify}");
    assert!(identify.contains("/libp2p/circuit/relay/0.2.0/hop"), "{identify}");
    let reserve = checked.line_of("reserve");
    for part in ["status 100 (OK) for ", "2m and carry 128.0 KiB", "the voucher is valid", "/tcp/"]
    {
        assert!(reserve.contains(part), "{reserve}");
    }
    assert!(checked.line_of("circuit").contains("1024 bytes to "));
    relay.wait_for_log("circuit 1 closed").await;
    relay.wait_for_log("grace began").await;
}

#[tokio::test]
async fn a_quick_check_takes_no_slot() {
    let relay = Relay::start(&[]);
    let checked = check_in(Path::new("."), &["--quick", &relay.address.to_string()]).await;
    assert_eq!(checked.code, Some(0), "{:#?}", checked.lines);
    assert_eq!(checked.steps(), ["tcp", "secure", "identify", "end"]);
    relay.wait_for_log(" closed: peer ").await;
    assert_eq!(relay.count_in_log("reservation"), 0);
}

#[tokio::test]
async fn dns_websocket_tls_and_a_private_network_are_steps() {
    let folder = TempDir::new().unwrap();
    let certificate = Certificate::new();
    certificate.write(folder.path());
    fs::write(folder.path().join("swarm.key"), PreSharedKey::new([1; 32]).to_key_file()).unwrap();
    let mut flags = vec!["--listen", LISTEN_TCP, LISTEN, LISTEN_TLS, "--swarm-key=swarm.key"];
    flags.extend(CERTIFICATE);
    let relay = Relay::start_in(folder, &flags);
    let path = relay.folder.path();
    let rest = ["pnet", "secure", "identify", "reserve", "second", "circuit", "end"];
    let [ws, tls] =
        [websocket::address(&relay, "/ws").await, websocket::address(&relay, "/tls/ws").await];
    let name = format!("/dns4/localhost/tcp/{}", relay.port());
    for (address, first) in [
        (ws.to_string(), &["tcp", "websocket"][..]),
        (tls.to_string(), &["tcp", "tls", "websocket"]),
        (name, &["resolve", "tcp"]),
    ] {
        let checked = check_in(path, &[&address, "--swarm-key=swarm.key"]).await;
        assert_eq!(checked.code, Some(0), "{:#?}", checked.lines);
        assert_eq!(checked.steps(), [first, &rest].concat());
    }

    // Without the key, and with another one.
    let address = relay.address.to_string();
    check_in(path, &[&address]).await.assert_failed_at("secure", "", "--swarm-key");
    fs::write(path.join("other.key"), PreSharedKey::new([2; 32]).to_key_file()).unwrap();
    let other = check_in(path, &[&address, "--swarm-key=other.key"]).await;
    other.assert_failed_at("secure", "", "--swarm-key");

    // A certificate for another name.
    let elsewhere = format!("/dns4/localhost/tcp/{}/tls/ws", tcp_port(&tls));
    let checked = check_in(path, &[&elsewhere]).await;
    checked.assert_failed_at("tls", "certificate", "--tls-cert");
    // Without cert.pem as a root, the check does not trust the relay's certificate.
    let elsewhere = TempDir::new().unwrap();
    check_in(elsewhere.path(), &[&tls.to_string()]).await.assert_failed_at(
        "tls",
        "certificate",
        "SSL_CERT_FILE",
    );
}

#[tokio::test]
async fn rust_libp2ps_relay_passes() {
    let relay = peer(|keypair| RustRelay {
        relay: relay::Behaviour::new(keypair.public().to_peer_id(), relay::Config::default()),
        identify: identify(keypair),
    });
    let checked = check(&relay.await).await;
    assert_eq!(checked.code, Some(0), "{:#?}", checked.lines);
    assert!(checked.line_of("reserve").contains("no voucher"));
}

// ---- A failure at each step

#[tokio::test]
async fn what_fails_before_the_relay_is_reached_is_named() {
    let unlisted = "/dnsaddr/nowhere.invalid".parse().unwrap();
    check(&unlisted).await.assert_failed_at("dnsaddr", "", "dig TXT _dnsaddr.NAME");
    let nowhere = "/dns4/nowhere.invalid/tcp/4001".parse().unwrap();
    check(&nowhere).await.assert_failed_at("resolve", "", "dig NAME");
    let address = |port: u16| format!("/ip4/127.0.0.1/tcp/{port}").parse::<Multiaddr>().unwrap();
    check(&address(1)).await.assert_failed_at("tcp", "refused", "nothing listens there");

    // A program that closes each connection.
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    thread::spawn(move || listener.incoming().for_each(drop));
    check(&address(port)).await.assert_failed_at("secure", "", "refuses this address");
}

#[tokio::test]
async fn another_transport_and_another_peer_are_named() {
    let relay = Relay::start_listening(&["--listen", LISTEN_TCP, LISTEN]);
    let ws = websocket::address(&relay, "/ws").await;
    let plain: Multiaddr = format!("/ip4/127.0.0.1/tcp/{}", tcp_port(&ws)).parse().unwrap();
    check(&plain).await.assert_failed_at("secure", "", "add /ws for WebSocket");
    let plain: Multiaddr = format!("/ip4/127.0.0.1/tcp/{}", relay.port()).parse().unwrap();
    let upgrade = plain.clone().with(Protocol::Ws("/".into()));
    check(&upgrade).await.assert_failed_at("websocket", "", "port for WebSocket");
    let other = plain.clone().with(Protocol::P2p(PeerId::random()));
    check(&other).await.assert_failed_at(
        "secure",
        &format!("another peer answers: {}", relay.peer),
        "peer id",
    );
    // A relay in no private network.
    let folder = TempDir::new().unwrap();
    fs::write(folder.path().join("swarm.key"), PreSharedKey::new([1; 32]).to_key_file()).unwrap();
    let private = check_in(folder.path(), &[&plain.to_string(), "--swarm-key=swarm.key"]).await;
    private.assert_failed_at("pnet", "", "leave out --swarm-key");
}

#[tokio::test]
async fn a_peer_without_identify_and_one_without_a_relay_are_named() {
    let mute = peer(|_| dummy::Behaviour).await;
    check(&mute).await.assert_failed_at("identify", "negotiation failed", "serve identify");
    let no_relay = peer(identify).await;
    check(&no_relay).await.assert_failed_at("reserve", "negotiation failed", "RelayService");
}

#[tokio::test]
async fn a_refusal_is_named_with_its_remedy() {
    let relay = Relay::start(&["--max-reservations=1"]);
    let mut holder = Client::connect(&relay).await;
    holder.reserve().await;
    check(&relay.address).await.assert_failed_at("reserve", "status 200", "--max-reservations");
    let other_peer = PeerId::random();
    let relay = Relay::start(&[&format!("--allow-peer={other_peer}")]);
    check(&relay.address).await.assert_failed_at("identify", "", "access rules");
    let relay = Relay::start(&["--deny-subnet=127.0.0.0/8"]);
    check(&relay.address).await.assert_failed_at("secure", "", "access rules");
    let relay = Relay::start(&["--proxy-protocol-from=127.0.0.0/8"]);
    check(&relay.address).await.assert_failed_at("secure", "", "proxy's header");
    let relay = Relay::start(&["--max-connections-per-ip=1"]);
    check(&relay.address).await.assert_failed_at("second", "", "--max-connections-per-ip");
    let relay = Relay::start(&[&format!("--allow-connect-peer={other_peer}")]);
    check(&relay.address).await.assert_failed_at("circuit", "status 202", "--allow-connect-peer");
    let relay = Relay::start(&["--circuit-bytes=16"]);
    check(&relay.address).await.assert_failed_at("circuit", "", "limits of a circuit");
}

/// The relay closes the connection at once, whichever protocol would come first.
#[tokio::test]
async fn a_refused_address_is_named_at_each_step_that_may_be_the_first() {
    let folder = TempDir::new().unwrap();
    Certificate::new().write(folder.path());
    fs::write(folder.path().join("swarm.key"), PreSharedKey::new([1; 32]).to_key_file()).unwrap();
    let mut flags = vec!["--listen", LISTEN_TCP, LISTEN, LISTEN_TLS, "--swarm-key=swarm.key"];
    flags.extend(CERTIFICATE);
    flags.push("--deny-subnet=127.0.0.0/8");
    let relay = Relay::start_in(folder, &flags);
    let tcp: Multiaddr = format!("/ip4/127.0.0.1/tcp/{}", relay.port()).parse().unwrap();
    let ws = websocket::address(&relay, "/ws").await;
    let tls = websocket::address(&relay, "/tls/ws").await;
    for (address, step) in [(tcp, "pnet"), (ws, "websocket"), (tls, "tls")] {
        let arguments = [&*address.to_string(), "--swarm-key=swarm.key"];
        let checked = check_in(relay.folder.path(), &arguments).await;
        checked.assert_failed_at(step, "", "refuses this address");
    }
}

/// A proxy in front of a relay that is not there.
#[tokio::test]
async fn a_proxy_that_does_not_reach_the_relay_is_named() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    thread::spawn(move || {
        let (mut stream, _) = listener.accept().expect("the check connects");
        let _ = stream.read(&mut [0; 1024]);
        let answer = b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\n\r\n";
        stream.write_all(answer).expect("the check reads");
    });
    let address = format!("/ip4/127.0.0.1/tcp/{port}/ws").parse().unwrap();
    check(&address).await.assert_failed_at("websocket", "HTTP 502", "does not reach the relay");
}

#[tokio::test]
async fn a_relay_whose_circuits_carry_nothing_is_named() {
    let relay =
        relay_with_circuits(|source, target| Box::pin(async { drop((source, target)) })).await;
    check(&relay).await.assert_failed_at("circuit", "", "limits of a circuit");
}

#[tokio::test]
async fn a_relay_that_changes_what_it_carries_is_named() {
    let change = |mut source: Stream, mut target: Stream| -> BoxFuture<'static, ()> {
        Box::pin(async move {
            let mut bytes = [0; 1024];
            source.read_exact(&mut bytes).await.expect("the check writes");
            target.write_all(&bytes).await.expect("the check reads");
            target.read_exact(&mut bytes).await.expect("the check echoes");
            bytes[1023] ^= 1;
            source.write_all(&bytes).await.expect("the check reads");
            let _ = source.read(&mut bytes).await; // until it ends
        })
    };
    let relay = relay_with_circuits(change).await;
    check(&relay).await.assert_failed_at("circuit", "other bytes", "changes what it carries");
}

/// The check waits for the end as long as for any step: 20 s.
#[tokio::test]
async fn a_relay_that_keeps_circuits_of_which_one_side_ended_is_named() {
    let keep = |source: Stream, target: Stream| -> BoxFuture<'static, ()> {
        let ((from_source, mut to_source), (from_target, mut to_target)) =
            (source.split(), target.split());
        Box::pin(async move {
            let forth = async {
                io::copy(from_source, &mut to_target).await.expect("the source ends");
                std::future::pending::<()>().await // never closes `to_target`
            };
            let _ = future::join(forth, io::copy(from_target, &mut to_source)).await;
        })
    };
    let relay = relay_with_circuits(keep).await;
    check(&relay).await.assert_failed_at("end", "timed out", "does not pass the end");
}

/// A relay that grants all requests; `carry` gets both ends of each circuit.
async fn relay_with_circuits(carry: fn(Stream, Stream) -> BoxFuture<'static, ()>) -> Multiaddr {
    let mut swarm = swarm(|keypair| Streams {
        stream: libp2p_stream::Behaviour::new(),
        identify: identify(keypair),
    });
    let address = listen(&mut swarm, LISTEN_TCP.parse().unwrap()).await;
    let (peer, addrs) = (*swarm.local_peer_id(), vec![address.to_vec()]);
    let mut control = swarm.behaviour().stream.new_control();
    let mut requests = control.accept(HOP).expect("accept is called once");
    drive(swarm);
    let reservation = Some(Reservation { expire: Some(u64::MAX), addrs, voucher: None });
    let granted = HopMessage { kind: Some(2), status: OK, reservation, ..HopMessage::default() };
    tokio::spawn(async move {
        while let Some((client, mut source)) = requests.next().await {
            let request: HopMessage = messages::read(&mut source).await;
            let Some(target) = request.peer.and_then(|peer| peer.id) else {
                messages::write(&mut source, &granted).await;
                continue;
            };
            let target = PeerId::from_bytes(&target).expect("a peer id");
            let mut target = control.open_stream(target, STOP).await.expect("it accepts circuits");
            let stop_request = StopMessage {
                kind: Some(0),
                peer: messages::connect(client).peer,
                ..StopMessage::default()
            };
            messages::write(&mut target, &stop_request).await;
            let accepted: StopMessage = messages::read(&mut target).await;
            assert_eq!(accepted.status, OK);
            messages::write(&mut source, &granted).await;
            tokio::spawn(carry(source, target));
        }
    });
    address.with(Protocol::P2p(peer))
}

#[test]
fn an_address_that_cannot_be_checked_is_an_error_of_one_line() {
    let folder = TempDir::new().unwrap();
    for (arguments, expected) in [
        (&[][..], "<MULTIADDR>"),
        (&["127.0.0.1:4001"], "try /ip4/127.0.0.1/tcp/4001"),
        (&["/ip4/127.0.0.1/udp/4001/quic-v1"], "not an address over TCP or WebSocket"),
        (&["/ip4/127.0.0.1/tcp/4001", "--quack"], "--quack"),
    ] {
        let output = output(command(&folder).arg("check").args(arguments));
        let error = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{error}");
        assert!(error.starts_with("relaylet: ") && error.contains(expected), "{error}");
        assert_eq!(error.lines().count(), 1, "{error}");
    }
}
