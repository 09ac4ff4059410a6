//! The program as an operator uses it: flags, environment, key file, output, signals, limits.

use std::{
    fs::{self, File},
    io::{BufRead, BufReader, Read},
    net::TcpListener,
    os::{
        fd::OwnedFd,
        unix::fs::{MetadataExt, PermissionsExt},
    },
    process::{Command, Output, Stdio},
    time::{Duration, Instant},
};

use crate::common::{
    Client, Relay, Security, TEST_TIMEOUT, assert_relayed,
    by_hand::{self, proposal, read_until_closed, send_and_close},
    bystanders::assert_idle_within_memory,
    circuit, command, free_port, messages, output, signal, source_and_target, wait_for,
};
use libp2p::{
    Multiaddr, futures::future, identity::Keypair, multiaddr::Protocol, tcp::tokio::TcpStream,
};
use tempfile::TempDir;
use tokio::time::sleep;

/// Each flag that takes a value, with an invalid one.
const FLAGS: &[(&str, &str)] = &[
    ("--config", "/there/is/none.toml"),
    ("--listen", "/ip4/0.0.0.0/udp/4001"),
    ("--announce", "/ip4/0.0.0.0/tcp/4001"),
    ("--proxy-protocol-from", "10.0.0.1/8"),
    #[cfg(feature = "websocket")]
    ("--trust-forwarded-from", "10.0.0.1/8"),
    #[cfg(feature = "websocket")]
    ("--tls-cert", "without-its-key.pem"),
    #[cfg(feature = "websocket")]
    ("--tls-key", "without-its-certificate.pem"),
    ("--identity", "/"),
    ("--max-reservations", "0"),
    ("--max-reservations-per-ip", "some"),
    ("--max-reservations-per-subnet", "a few"),
    ("--reserve-rate", "-1"),
    ("--connect-rate", "30/min"),
    ("--allow-peer", "alice"),
    ("--deny-peer", "12D3KooW"),
    ("--allow-subnet", "192.0.2.1"),
    ("--deny-subnet", "192.0.2.1/24"),
    ("--allow-connect-peer", "bob"),
    #[cfg(feature = "pnet")]
    ("--swarm-key", "/"),
    ("--reservation-ttl", "0s"),
    ("--grace", "soon"),
    ("--heartbeat", "often"),
    ("--silence", "30s"),
    ("--probe", "4s"),
    ("--probe-after", "later"),
    ("--sweep", "0s"),
    ("--idle-timeout", "1"),
    ("--max-circuits", "-1"),
    ("--max-circuits-per-peer", "1.5"),
    ("--max-circuits-per-ip", "half"),
    ("--max-circuits-per-subnet", "-2"),
    ("--circuit-duration", "2 months ago"),
    ("--bandwidth", "fast"),
    ("--bandwidth-per-peer", "fast"),
    ("--drain", "soon"),
    ("--circuit-bytes", "99999999999EiB"),
    ("--max-connections", "0"),
    ("--max-connections-per-peer", "one"),
    ("--max-connections-per-ip", "99999999999999999999"),
    ("--max-connections-per-subnet", "all"),
    ("--max-handshakes", "0"),
    ("--max-streams", "many"),
    ("--max-streams-per-connection", "3"),
    ("--stream-rate", "fast"),
    ("--memory", "much"),
    ("--max-buffered", "1MiB"),
    ("--max-buffered-per-connection", "0"),
    ("--threads", "0"),
    #[cfg(feature = "http")]
    ("--http", "127.0.0.1"),
    #[cfg(feature = "http")]
    ("--http-host", "relay.example.org:9180"),
    #[cfg(feature = "dht")]
    ("--bootstrap", "127.0.0.1:4001"),
    #[cfg(feature = "dht")]
    ("--dht-protocol", "kad"),
];

// ---- Flags and environment

#[test]
fn an_invalid_flag_is_a_one_line_error_that_names_it() {
    for &(flag, value) in FLAGS {
        // With `=`, because -1 alone would be parsed as a flag.
        let line = setting_error(&[&format!("{flag}={value}")], &[]);
        assert!(line.contains(flag), "{flag} {value}: {line}");
    }
    for arguments in
        [&["--listen"][..], &["--circuit-bites=1"], &["--print-config=json"], &["stray"]]
    {
        let line = setting_error(arguments, &[]);
        assert!(line.contains(arguments[0].split('=').next().unwrap()), "{line}");
    }
    let line = setting_error(&["--max-reservation=4"], &[]);
    assert!(line.contains("unknown flag; try --max-reservations"), "{line}");
    for word in ["chek", "stray", "help"] {
        let line = setting_error(&[word], &[]);
        assert_eq!(
            line.trim(),
            format!("relaylet: {word}: unknown command; try check or id, or see relaylet --help")
        );
    }
    let line = setting_error(&["--listen=0.0.0.0:4001"], &[]);
    assert!(line.contains("try /ip4/0.0.0.0/tcp/4001"), "{line}");
}

#[test]
fn each_flag_has_an_environment_variable() {
    for &(flag, value) in FLAGS {
        let name = flag.trim_start_matches("--").replace('-', "_").to_uppercase();
        let line = setting_error(&[], &[(&format!("RELAYLET_{name}"), value)]);
        assert!(line.contains(flag), "{flag} {value}: {line}");
    }
}

#[cfg(not(feature = "dht"))]
#[test]
fn a_flag_of_a_missing_feature_names_the_feature() {
    for flag in ["--dht", "--bootstrap=/ip4/127.0.0.1/tcp/1", "--dht-protocol=x"] {
        let line = setting_error(&[flag], &[]);
        let expected = "this relay was built without it; build it with the feature dht";
        assert!(line.contains(expected), "{flag}: {line}");
    }
}

#[tokio::test]
async fn a_flag_wins_over_the_environment_and_lists_have_commas() {
    let folder = TempDir::new().unwrap();
    let mut command = command(&folder);
    command
        .env("RELAYLET_LISTEN", "/ip4/127.0.0.1/tcp/0,/ip4/127.0.0.2/tcp/0")
        .env("RELAYLET_CIRCUIT_BYTES", "1MiB")
        .env("RELAYLET_CIRCUIT_DURATION", "1h")
        .args(["--circuit-duration", "30s"]);
    let relay = Relay::run(command, folder);
    let both = [&relay.address, &relay.next_address()].map(|address| address.to_string());
    assert!(both.iter().any(|address| address.starts_with("/ip4/127.0.0.1/tcp/")));
    assert!(both.iter().any(|address| address.starts_with("/ip4/127.0.0.2/tcp/")));
    let mut client = Client::connect(&relay).await;
    let limit = client.reserve().await.limit.unwrap();
    assert_eq!((limit.data, limit.duration), (Some(1024 * 1024), Some(30)));
}

#[test]
fn help_lists_every_flag_and_version_is_printed() {
    let help = run(&["--help"], &[]);
    assert!(help.status.success() && help.stderr.is_empty());
    let help = String::from_utf8(help.stdout).unwrap();
    assert!(help.contains("RELAYLET_NAME in the environment"), "{help}");
    let with_value = help.lines().filter_map(|line| line.strip_prefix("    --")?.split_once(" <"));
    let mut listed: Vec<_> = with_value.map(|(name, _)| format!("--{name}")).collect();
    let mut known: Vec<_> = FLAGS.iter().map(|(flag, _)| flag.to_string()).collect();
    listed.sort();
    known.sort();
    assert_eq!(listed, known);
    for heading in ["\nSlots:\n", "\nCircuits:\n", "\nAccess:\n"] {
        assert!(help.contains(heading), "{help}");
    }
    assert_eq!(run(&["-h"], &[]).stdout, help.as_bytes());
    let version = run(&["--version"], &[]);
    let version = String::from_utf8(version.stdout).unwrap();
    let expected = format!("relaylet {} (features:", env!("CARGO_PKG_VERSION"));
    assert!(version.starts_with(&expected) && version.lines().count() == 1, "{version}");
    for (feature, is_built_in) in
        [("check", cfg!(feature = "check")), ("dht", cfg!(feature = "dht"))]
    {
        assert_eq!(version.contains(feature), is_built_in, "{version}");
    }
}

#[test]
fn help_and_version_are_printed_whatever_the_environment_holds() {
    for flag in ["--help", "--version"] {
        let output = run(&[flag], &[("RELAYLET_ALLOW_PEERS", "12D3KooW")]);
        assert!(output.status.success() && output.stderr.is_empty(), "{output:?}");
    }
}

#[test]
fn a_text_that_cannot_be_printed_is_an_error() {
    for argument in ["--help", "--version", "--print-config", "id"] {
        let full = File::create("/dev/full").unwrap();
        let folder = TempDir::new().unwrap();
        let mut command = command(&folder);
        let output = command.arg(argument).stdout(full).output().unwrap();
        assert_eq!(output.status.code(), Some(1));
        let line = one_line(&output);
        assert!(line.starts_with("relaylet: standard output cannot be written: "), "{line}");

        // As in a pipe to `head`, which does not read all of it.
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let output = command.stdout(writer).output().unwrap();
        assert!(output.status.success() && output.stderr.is_empty(), "{output:?}");
    }
}

#[test]
fn an_error_that_quotes_a_line_break_is_one_line() {
    let line = start_error(&["--identity=no\nsuch/relaylet.key"], &TempDir::new().unwrap());
    assert!(line.contains(r"--identity no\nsuch/relaylet.key: cannot be"), "{line}");
}

// ---- Listen addresses, and their log lines

#[tokio::test]
async fn the_log_starts_with_identity_addresses_and_circuit_limits() {
    let relay = Relay::start(&[]);
    relay.wait_for_log("can be dialed from the internet").await;
    // With all features libp2p logs lines as well.
    let is_own = |it: &String| it.contains(" relaylet::") || it.starts_with("listening on ");
    let log: Vec<_> = relay.log().into_iter().filter(is_own).collect();
    let first = |text: &str| log.iter().position(|line| line.contains(text));
    let (identity, key) = (first(&format!("is {}", relay.peer)), first("identity created: /"));
    let limits =
        first("relays for anyone: 1024 slots, 1024 circuits at a time; a circuit may carry");
    let listening = first(&format!("listening on {}", relay.address));
    let paste = first(&format!("clients on this machine reach it at {}", relay.address));
    for line in [identity, key, limits, listening, paste] {
        assert!(line.is_some_and(|line| line < 6), "{log:#?}");
    }
}

#[tokio::test]
async fn announced_addresses_are_logged_in_full_without_warning() {
    let announce =
        ["--announce=/dns4/relay.example.org/tcp/4001", "--announce=/ip4/8.8.8.8/tcp/4001"];
    let first = Relay::start(&announce);
    first.wait_for_log("WARN").await;
    let warning = "--announce with a new identity: clients that know the relay by another peer id";
    assert!(first.count_in_log(warning) > 0);
    let relay = Relay::start_in(
        first.kill(),
        &[&["--listen=/ip4/127.0.0.1/tcp/0"], &announce[..]].concat(),
    );
    let paste = format!("clients reach it at /dns4/relay.example.org/tcp/4001/p2p/{}", relay.peer);
    relay.wait_for_log(&paste).await;
    relay
        .wait_for_log(&format!("clients also reach it at /ip4/8.8.8.8/tcp/4001/p2p/{}", relay.peer))
        .await;
    assert_eq!(relay.count_in_log("WARN"), 0);
}

#[tokio::test]
async fn risky_settings_are_warned_about_with_the_remedy() {
    let folder = TempDir::new().unwrap();
    let mut command = command(&folder);
    command.env("RELAYLET_COLOR", "1").args([
        "--listen=/ip4/127.0.0.1/tcp/0",
        "--announce=/ip4/10.0.0.1/tcp/4001,/ip4/8.8.8.8/udp/4001/quic-v1",
        "--reservation-ttl=1m",
        "--proxy-protocol-from=0.0.0.0/0",
        "--max-connections=100000000",
    ]);
    let relay = Relay::run(command, folder);
    for warning in [
        "RELAYLET_COLOR ignored",
        "--announce: clients on the internet cannot use /ip4/10.0.0.1/tcp/4001 (is not global), /ip4/8.8.8.8/udp",
        "--reservation-ttl 1m: ",
        "--proxy-protocol-from 0.0.0.0/0: any client can claim any address",
        "MiB available; lower --max-connections or --max-buffered",
    ] {
        relay.wait_for_log(warning).await;
    }
}

#[tokio::test]
async fn both_wildcards_listen_on_one_port_at_once() {
    let port = free_port();
    let listen = format!("/ip4/0.0.0.0/tcp/{port},/ip6/::/tcp/{port}");
    let relay = Relay::start_listening(&["--listen", &listen]);
    let mut missing: Vec<Multiaddr> =
        [format!("/ip4/127.0.0.1/tcp/{port}"), format!("/ip6/::1/tcp/{port}")]
            .map(|address| address.parse::<Multiaddr>().unwrap().with(Protocol::P2p(relay.peer)))
            .into();
    let mut printed = relay.address.clone();
    for address in missing.clone() {
        Client::connect_to(&address).await.reserve().await;
    }
    loop {
        missing.retain(|address| *address != printed);
        if missing.is_empty() {
            break;
        }
        printed = relay.next_address();
    }
}

#[test]
fn standard_output_contains_only_the_addresses() {
    let mut relay = Relay::start_listening(&["--listen", "/ip4/0.0.0.0/tcp/0"]);
    relay.signal("TERM");
    assert!(relay.wait().success());
    for line in relay.rest_of_output() {
        let address = line.strip_prefix("listening on /ip4/").unwrap();
        assert!(address.ends_with(&format!("/tcp/{}/p2p/{}", relay.port(), relay.peer)));
    }
}

/// A container's log collects both streams.
#[tokio::test]
async fn an_address_is_logged_once_where_both_streams_are_collected() {
    let relay = Relay::start(&[]);
    relay.wait_for_log("reach it at").await;
    assert_eq!(relay.count_in_log("listening on "), 1, "{:#?}", relay.log());
}

/// Runs the program with a standard error that `JOURNAL_STREAM` declares to be the journal or not, and returns what it
/// writes there.
fn stderr_of(flags: &[&str], is_journal: bool) -> String {
    let (mut reader, writer) = std::io::pipe().unwrap();
    let writer = File::from(OwnedFd::from(writer));
    let pipe = writer.metadata().unwrap();
    let inode = pipe.ino() + u64::from(!is_journal);
    let folder = TempDir::new().unwrap();
    let mut command = command(&folder);
    command
        .args(flags)
        .env("JOURNAL_STREAM", format!("{}:{inode}", pipe.dev()))
        .stdout(Stdio::null())
        .stderr(writer);
    let mut child = command.spawn().unwrap();
    drop(command); // closes the writing end
    let mut lines = String::new();
    let mut stderr = BufReader::new(&mut reader);
    // It runs until its startup log is complete.
    while stderr.read_line(&mut lines).unwrap() > 0 {
        if lines.contains("can be dialed from the internet") {
            signal(child.id(), "INT");
            break;
        }
    }
    stderr.read_to_string(&mut lines).unwrap();
    wait_for(&mut child);
    lines
}

#[test]
fn lines_have_priorities_in_the_journal_and_times_elsewhere() {
    let flags = ["--listen=/ip4/127.0.0.1/tcp/0"];
    let journal = stderr_of(&flags, true);
    let mut priorities: Vec<_> = journal.lines().map(|line| line.split_at(3).0).collect();
    priorities.sort_unstable();
    priorities.dedup();
    assert_eq!(priorities, ["<4>", "<6>"], "{journal}");
    assert_eq!(journal.matches("<6>listening on /ip4/127.0.0.1/tcp/").count(), 1, "{journal}");
    assert!(journal.contains("\n<4>no public address: "), "{journal}");
    assert!(!journal.contains("relaylet::"), "{journal}");
    let elsewhere = stderr_of(&flags, false);
    assert!(elsewhere.lines().all(|line| line.starts_with("[20")), "{elsewhere}");
    let flags = ["--listen=/ip4/192.0.2.1/tcp/1"];
    assert!(
        stderr_of(&flags, true).lines().last().unwrap().starts_with("<3>relaylet: --listen /ip4/")
    );
    assert!(
        stderr_of(&flags, false).lines().last().unwrap().starts_with("relaylet: --listen /ip4/")
    );
}

#[tokio::test]
async fn a_closed_standard_output_does_not_stop_the_relay() {
    let folder = TempDir::new().unwrap();
    let port = free_port();
    let listen = format!("/ip4/127.0.0.1/tcp/{port}");
    let mut child = command(&folder)
        .args(["--listen", &listen])
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let start = Instant::now();
    while tokio::net::TcpStream::connect(("127.0.0.1", port)).await.is_err() {
        assert!(start.elapsed() < TEST_TIMEOUT, "the relay does not listen");
        sleep(Duration::from_millis(20)).await;
    }
    signal(child.id(), "INT");
    assert!(wait_for(&mut child).success());
}

#[test]
fn an_unusable_listen_address_is_a_one_line_error() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let taken = format!("/ip4/127.0.0.1/tcp/{}", taken.local_addr().unwrap().port());
    for address in [taken.as_str(), "/ip4/203.0.113.1/tcp/0"] {
        let line = start_error(&["--listen", address], &TempDir::new().unwrap());
        assert!(line.contains(&format!("--listen {address}: ")), "{line}");
    }
}

// ---- Identity

#[tokio::test]
async fn the_key_is_created_once_and_only_its_owner_can_read_it() {
    let relay = Relay::start(&[]);
    let file = relay.folder.path().canonicalize().unwrap().join("relaylet.key");
    relay.wait_for_log(&format!("identity created: {}", file.display())).await;
    assert_eq!(fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);
    let key = fs::read(&file).unwrap();
    let keypair = Keypair::from_protobuf_encoding(&key).unwrap();
    assert_eq!(keypair.public().to_peer_id(), relay.peer);

    let peer = relay.peer;
    let again = Relay::start_in(relay.kill(), &["--listen", "/ip4/127.0.0.1/tcp/0"]);
    assert_eq!(again.peer, peer);
    assert_eq!(fs::read(&file).unwrap(), key);
    assert_eq!(again.count_in_log("identity created"), 0);
}

#[tokio::test]
async fn keys_of_every_type_are_accepted() {
    for keypair in [Keypair::generate_secp256k1(), Keypair::generate_ecdsa()] {
        let folder = with_key(&keypair.to_protobuf_encoding().unwrap());
        let relay = Relay::start_in(folder, &["--listen", "/ip4/127.0.0.1/tcp/0"]);
        assert_eq!(relay.peer, keypair.public().to_peer_id());
        for security in [Security::Noise, Security::Tls] {
            let client = Keypair::generate_ed25519();
            Client::connect_as(client, &relay.address, security).await.reserve().await;
        }
    }
}

#[test]
fn a_corrupt_key_is_never_overwritten() {
    let folder = with_key(b"no key");
    let line = start_error(&["--listen", "/ip4/127.0.0.1/tcp/0"], &folder);
    assert!(line.contains("relaylet.key") && line.contains("backup"), "{line}");
    assert_eq!(fs::read(folder.path().join("relaylet.key")).unwrap(), b"no key");
}

#[test]
fn an_unreadable_or_unwritable_key_is_a_one_line_error() {
    for identity in [".", "no/such/folder/relaylet.key", "/proc/relaylet.key"] {
        let line = start_error(&["--identity", identity], &TempDir::new().unwrap());
        assert!(line.contains(&format!("--identity {identity}: ")), "{line}");
    }
}

#[tokio::test]
async fn a_key_readable_by_others_is_a_warning() {
    let folder = with_key(&Keypair::generate_ed25519().to_protobuf_encoding().unwrap());
    let file = folder.path().join("relaylet.key");
    fs::set_permissions(file, fs::Permissions::from_mode(0o644)).unwrap();
    let relay = Relay::start_in(folder, &["--listen", "/ip4/127.0.0.1/tcp/0"]);
    relay.wait_for_log("chmod 600 relaylet.key").await;
}

// ---- Exit and restart

#[tokio::test]
async fn sigint_and_sigterm_exit_cleanly() {
    for (name, line) in [("INT", "exiting: SIGINT"), ("TERM", "exiting: no connections are left")] {
        let mut relay = Relay::start(&[]);
        Client::connect(&relay).await.reserve().await;
        relay.signal(name);
        assert!(relay.wait().success());
        relay.wait_for_log(line).await;
    }
}

#[tokio::test]
async fn after_kill_9_under_a_hundred_connections_its_port_is_bound_again_at_once() {
    let listen = format!("/ip4/127.0.0.1/tcp/{}", free_port());
    let no_caps = ["--max-connections-per-ip=0", "--max-connections-per-subnet=0"];
    let relay = Relay::start_listening(&[&["--listen", &listen][..], &no_caps].concat());
    let connections = future::join_all((0..100).map(|_| by_hand::muxed(&relay))).await;
    let peer = relay.peer;
    let again = Relay::start_in(relay.kill(), &["--listen", &listen]);
    assert_eq!(again.peer, peer);
    Client::connect(&again).await.reserve().await;
    drop(connections);
}

// ---- Limits on connections

#[tokio::test]
async fn connections_are_limited_per_address() {
    let relay = Relay::start(&["--max-connections-per-ip", "1"]);
    let _first = Client::connect(&relay).await;
    assert!(!is_served(by_hand::tcp(&relay).await).await);
    let elsewhere = by_hand::tcp_from([127, 0, 0, 2].into(), relay.port()).await;
    assert!(is_served(elsewhere.expect("the relay listens")).await);
}

#[tokio::test]
async fn the_first_refusal_by_an_address_cap_is_a_warning() {
    let relay = Relay::start(&["--max-reservations-per-ip=1", "--max-connections-per-ip=2"]);
    let mut first = Client::connect(&relay).await;
    let mut second = Client::connect(&relay).await;
    first.reserve().await;
    second.request(&messages::reserve()).await;
    assert!(!is_served(by_hand::tcp(&relay).await).await);
    for flag in ["--max-reservations-per-ip", "--max-connections-per-ip"] {
        let line = relay.wait_for_log(flag).await;
        let warns = line.contains(" WARN ") && line.contains("127.0.0.1") && line.contains("proxy");
        assert!(warns, "{line}");
    }
}

#[tokio::test]
async fn handshakes_are_limited_and_time_out() {
    let relay = Relay::start(&["--max-handshakes", "1"]);
    let mut silent = by_hand::tcp(&relay).await;
    assert!(!is_served(by_hand::tcp(&relay).await).await);
    read_until_closed(&mut silent).await;
    relay.wait_for_log("exceeded its time limit").await;
    Client::connect(&relay).await.reserve().await;
}

#[tokio::test]
async fn out_of_file_descriptors_the_relay_keeps_serving_and_logs_once() {
    let folder = TempDir::new().unwrap();
    let mut limited = Command::new("sh");
    let program = command(&folder).get_program().to_owned();
    let script = r#"ulimit -n 40; exec "$0" --listen /ip4/127.0.0.1/tcp/0"#;
    limited.args(["-c", script]).arg(program).current_dir(folder.path());
    let relay = Relay::run(limited, folder);
    relay.wait_for_log("--max-connections 2048 needs").await;
    let (mut source, mut target) = source_and_target(&relay).await;
    let (mut there, mut back) = circuit(&mut source, &mut target).await;

    let connections = future::join_all((0..60).map(|_| by_hand::tcp(&relay))).await;
    let error = "accepting connections failed";
    relay.wait_for_log(error).await;
    assert_relayed(&mut there, &mut back, b"still here").await;
    target.reserve().await;
    assert_idle_within_memory(&relay).await;
    drop(connections);
    Client::connect(&relay).await.reserve().await;
    assert!(source.kept_its_connection() && target.kept_its_connection());
    assert_eq!(relay.count_in_log(error), 1);
}

// ---- Helpers

/// Whether the relay answers a proposal of Noise on this connection.
pub async fn is_served(connection: TcpStream) -> bool {
    !send_and_close(connection, &proposal("/noise")).await.is_empty()
}

fn run(arguments: &[&str], environment: &[(&str, &str)]) -> Output {
    let folder = TempDir::new().unwrap();
    output(command(&folder).args(arguments).envs(environment.iter().copied()))
}

/// Runs the program with invalid settings, and returns its one-line error. An unusable file of a key is not a usage
/// error, so its status is 1.
fn setting_error(arguments: &[&str], environment: &[(&str, &str)]) -> String {
    let output = run(arguments, environment);
    let line = one_line(&output);
    let of_key = ["--identity", "--swarm-key"].iter().any(|flag| line.contains(flag));
    let status = if of_key { 1 } else { 2 };
    assert_eq!(output.status.code(), Some(status), "{line}");
    line
}

/// Runs the program in `folder`, where it cannot start, and returns its one-line error.
fn start_error(arguments: &[&str], folder: &TempDir) -> String {
    // The log begins with the identity; only the error is of interest.
    let output = output(command(folder).args(arguments).env("RUST_LOG", "off"));
    assert_eq!(output.status.code(), Some(1));
    one_line(&output)
}

fn one_line(output: &Output) -> String {
    let line = String::from_utf8(output.stderr.clone()).unwrap();
    assert!(output.stdout.is_empty());
    assert_eq!(line.lines().count(), 1, "{line}");
    line
}

fn with_key(key: &[u8]) -> TempDir {
    let folder = TempDir::new().unwrap();
    let file = folder.path().join("relaylet.key");
    fs::write(&file, key).unwrap();
    fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).unwrap();
    folder
}
