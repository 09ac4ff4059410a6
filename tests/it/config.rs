//! The configuration file: precedence, errors, and reloading while the relay runs.

use std::{fs, process::Command};

use crate::common::{
    Client, Relay, STOP, assert_relayed, circuit_to,
    messages::{PERMISSION_DENIED, RESERVATION_REFUSED, RESOURCE_LIMIT_EXCEEDED, connect, reserve},
    output, source_and_target,
};
use libp2p::Multiaddr;
use tempfile::TempDir;

const NAME: &str = "relaylet.toml";

fn folder_with(file: &str) -> TempDir {
    let folder = tempfile::tempdir().expect("a temporary folder");
    write(&folder, file);
    folder
}

fn write(folder: &TempDir, file: &str) {
    fs::write(folder.path().join(NAME), file).expect("the file is written");
}

fn command(folder: &TempDir, flags: &[&str]) -> Command {
    let mut command = crate::common::command(folder);
    command.args(["--config", NAME]).args(flags);
    command
}

/// Runs the program; returns its standard output, its standard error and its status.
fn run(folder: &TempDir, flags: &[&str]) -> (String, String, Option<i32>) {
    let output = output(&mut command(folder, flags));
    let text = |bytes| String::from_utf8(bytes).expect("text");
    (text(output.stdout), text(output.stderr), output.status.code())
}

/// The configuration that a relay with this file and these flags would use.
fn effective(folder: &TempDir, flags: &[&str]) -> String {
    let (file, errors, status) = run(folder, &[flags, &["--print-config"]].concat());
    assert_eq!((errors.as_str(), status), ("", Some(0)));
    file
}

#[test]
fn a_flag_wins_over_the_environment_and_that_over_the_file() {
    let folder = folder_with(
        "grace = \"1s\"\nsweep = \"2s\"\nprobe = \"1s\"\ndeny-subnet = \"192.0.2.0/24\"\n",
    );
    let mut command = command(&folder, &["--grace", "3s", "--print-config"]);
    command.env("RELAYLET_GRACE", "4s").env("RELAYLET_SWEEP", "5s");
    let output = output(&mut command);
    let file = String::from_utf8(output.stdout).unwrap();
    for line in [
        "grace = \"3s\"",
        "sweep = \"5s\"",
        "probe = \"1s\"",
        "silence = \"1m\"",
        "deny-subnet = [\"192.0.2.0/24\"]",
        "# max-reservations-per-ip = 64",
    ] {
        assert!(file.lines().any(|printed| printed == line), "{line}: {file}");
    }
}

#[test]
fn environment_variables_apply_where_no_flag_is_given() {
    let folder = folder_with("deny-subnet = \"192.0.2.0/24\"");
    let print = |name: &str, value: &str, flags: &[&str]| {
        let mut command = command(&folder, flags);
        let output = output(command.arg("--print-config").env(name, value));
        let text = [output.stdout, output.stderr].concat();
        (String::from_utf8(text).unwrap(), output.status.code())
    };
    let (line, status) = print("RELAYLET_GRACE", "soon", &[]);
    assert_eq!(status, Some(2));
    assert!(line.starts_with("relaylet: RELAYLET_GRACE: "), "{line}");
    assert!(line.contains("\"soon\" is not a duration; try 30s"), "{line}");
    // A value that a flag overrides is checked, too: without the flag it would apply.
    let (line, status) = print("RELAYLET_GRACE", "soon", &["--grace=1s"]);
    assert_eq!(status, Some(2));
    assert!(line.starts_with("relaylet: RELAYLET_GRACE: "), "{line}");
    let (file, _) = print("RELAYLET_GRACE", "2s", &["--grace=1s"]);
    assert!(file.contains("grace = \"1s\""), "{file}");
    // An empty variable counts as unset: it must not override the file.
    assert!(print("RELAYLET_GRACE", "", &[]).0.contains("grace = \"30s\""));
    let (file, _) = print("RELAYLET_DENY_SUBNET", "", &[]);
    assert!(file.contains("deny-subnet = [\"192.0.2.0/24\"]"), "{file}");
    let (line, status) = print("RELAYLET_ALLOW_PEERS", "12D3KooW", &[]);
    assert_eq!(status, Some(2));
    let expected = "relaylet: RELAYLET_ALLOW_PEERS: unknown setting; try RELAYLET_ALLOW_PEER";
    assert_eq!(line.trim(), expected);
    let (line, status) = print("RELAYLET_MAX_CONNECTIONS", "0", &[]);
    assert_eq!(status, Some(2));
    let expected = "relaylet: RELAYLET_MAX_CONNECTIONS: --max-connections 0: admits none";
    assert!(line.starts_with(expected), "{line}");
}

#[test]
fn an_invalid_value_in_the_file_is_an_error_even_if_a_flag_overrides_it() {
    let folder = folder_with("grace = \"soon\"\n");
    let (_, line, status) = run(&folder, &["--grace=1s", "--print-config"]);
    assert_eq!(status, Some(2));
    assert!(line.contains(":1: --grace: \"soon\" is not a duration"), "{line}");
}

#[test]
fn the_printed_configuration_is_an_equivalent_file() {
    let folder = folder_with("");
    let flags = "--max-reservations=7 --max-reservations-per-ip=3 --circuit-bytes=1MiB \
                 --allow-subnet=192.0.2.0/24,2001:db8::/32 --bandwidth=10MB --threads=2 \
                 --listen=/ip4/127.0.0.1/tcp/0 --announce=/dns4/relay.example.org/tcp/4001";
    let flags: Vec<_> = flags.split_whitespace().collect();
    let first = effective(&folder, &flags);
    write(&folder, &first);
    assert_eq!(effective(&folder, &[]), first);
}

/// A service manager runs `--print-config` before a reload.
#[test]
fn the_printed_configuration_comes_with_the_warnings_of_a_start() {
    let folder = tempfile::tempdir().unwrap();
    let peer =
        String::from_utf8(crate::common::command(&folder).arg("id").output().unwrap().stdout);
    let announce = format!("/dns4/relay.example.org/tcp/4001/p2p/{}", peer.unwrap().trim());
    let file =
        format!("reservation-ttl = \"1m\"\nannounce = [\"{announce}\", \"/ip4/10.0.0.1/tcp/1\"]\n");
    write(&folder, &file);
    let mut command = command(&folder, &["--print-config"]);
    let output = command.env("RELAYLET_COLOR", "1").output().unwrap();
    assert!(output.status.success());
    assert!(String::from_utf8(output.stdout).unwrap().contains("\nreservation-ttl = \"1m\"\n"));
    let warnings = String::from_utf8(output.stderr).unwrap();
    let lines: Vec<_> = warnings.lines().collect();
    let expected = [
        "relaylet: RELAYLET_COLOR ignored: ",
        "relaylet: --reservation-ttl 1m: ",
        "relaylet: --announce: clients on the internet cannot use /ip4/10.0.0.1/tcp/1 (is not global)",
    ];
    assert_eq!(lines.len(), expected.len(), "{warnings}");
    for (line, expected) in lines.iter().zip(expected) {
        assert!(line.starts_with(expected), "{line}");
    }
}

#[test]
fn a_config_error_is_one_line_with_file_line_and_remedy() {
    for (file, expected) in [
        ("\ngrase = \"1s\"", "relaylet.toml:2: grase: unknown setting; try grace"),
        ("grace = \"soon\"", "\"soon\" is not a duration; try 30s"),
        ("\ngrace = \"soon\"", "relaylet.toml:2: "),
        ("grace = []", "relaylet.toml:1: grace: takes a string"),
        (
            "deny-peer = [\n \"12D3KooWPGM3wYKMsTHGEqbhcBft6cPjA2F3rQmyWTEDD3wCGS1g\",\n \"al\"]",
            "relaylet.toml:3: ",
        ),
        ("max-reservations = -1", "\"-1\" is not a whole number"),
        (
            "\nannounce = \"/dns4/a/tcp/1/p2p/12D3KooWPGM3wYKMsTHGEqbhcBft6cPjA2F3rQmyWTEDD3wCGS1g\"",
            "relaylet.toml:2: --announce: ",
        ),
        ("drain = \"2y\"", "relaylet.toml:1: --drain: longer than a year"),
        ("max-circuits-per-peer = 70000", "relaylet.toml:1: --max-circuits-per-peer: "),
        (
            "max-circuits-per-peer = 32\nmax-buffered = \"35MiB\"",
            "relaylet.toml:2: --max-buffered: 35.0 MiB is too little for --max-circuits-per-peer 32; try 36MiB or",
        ),
        ("sweep = \"1s\"\n\nsweep = \"1s\"", "relaylet.toml:3: "),
        (
            "# slots\nmax-reservations = 0",
            "relaylet.toml:2: --max-reservations: a relay without slots",
        ),
        ("grace = 1s", "relaylet.toml:1: "),
        ("deny-subnet = [\"192.0.2.1/24\"]", "try 192.0.2.0/24"),
        ("threads = 0", "relaylet.toml:1: --threads 0: try 1"),
        // Names and values may contain any character.
        (r#""\nsweep" = 1"#, r"relaylet.toml:1: \nsweep: unknown setting; try sweep"),
        (r#"grace = "\u001b[2J""#, r"relaylet.toml:1: "),
    ] {
        let (out, errors, status) = run(&folder_with(file), &[]);
        assert_eq!((out.as_str(), status), ("", Some(2)), "{file}");
        assert!(errors.contains(expected), "{file}: {errors}");
        assert_eq!(errors.lines().count(), 1, "{errors}");
        assert!(!errors.trim_end().contains(char::is_control), "{errors:?}");
    }
    let missing = tempfile::tempdir().unwrap();
    let (_, errors, status) = run(&missing, &[]);
    assert_eq!(status, Some(2));
    assert!(errors.starts_with("relaylet: --config relaylet.toml: "), "{errors}");
}

fn start(folder: TempDir) -> Relay {
    let command = command(&folder, &["--listen", "/ip4/127.0.0.1/tcp/0"]);
    Relay::run(command, folder)
}

#[tokio::test]
async fn sighup_applies_limits_and_rules_without_closing_connections() {
    let relay = start(folder_with("max-reservations = 1\nprobe = \"0s\"\n"));
    let mut alice = Client::connect(&relay).await;
    let mut bob = Client::connect(&relay).await;
    alice.reserve().await;
    assert_eq!(bob.request(&reserve()).await.status, RESERVATION_REFUSED);

    let file = format!(
        "max-reservations = 2\nprobe = \"0s\"\ndeny-peer = [\"{}\"]\nthreads = 3\n",
        alice.peer
    );
    write(&relay.folder, &file);
    relay.signal("HUP");
    relay.wait_for_log("SIGHUP: changed: max-reservations, deny-peer").await;
    relay.wait_for_log("SIGHUP: max-reservations: 1 → 2").await;
    relay.wait_for_log("SIGHUP: threads requires a restart").await;
    bob.reserve().await;
    // On their existing connections.
    assert_eq!(alice.request(&reserve()).await.status, PERMISSION_DENIED);
    assert_eq!(alice.request(&connect(bob.peer)).await.status, PERMISSION_DENIED);
    // `threads` was never applied, so restoring its first value changes nothing.
    write(&relay.folder, &file.replace("threads = 3\n", ""));
    relay.signal("HUP");
    relay.wait_for_log("SIGHUP: no setting has changed").await;
}

#[tokio::test]
async fn a_setting_removed_from_the_file_reverts_while_a_circuit_stays_open() {
    let folder = folder_with("connect-rate = 2\n");
    let flags = ["--listen", "/ip4/127.0.0.1/tcp/0", "--grace=1m"];
    let relay = Relay::run(command(&folder, &flags), folder);
    let (mut alice, mut bob) = source_and_target(&relay).await;
    let mut carol = Client::connect(&relay).await;
    let mut stops = bob.accept(STOP);
    let (mut there, mut back) = circuit_to(&mut carol, bob.peer, &mut stops).await;

    let more = "grace = \"1s\"\nlisten = \"/ip4/127.0.0.2/tcp/0\"\nhttp = \"127.0.0.1:0\"\n";
    let address = "/dns4/relay.example.org/tcp/4001";
    let file = format!(
        "announce = \"{address}\"\nreserve-rate = 2\ndeny-peer = [\"{}\"]\n{more}",
        alice.peer
    );
    write(&relay.folder, &file);
    relay.signal("HUP");
    // Flags override grace and the listen address.
    let changed = "SIGHUP: changed: announce, reserve-rate, connect-rate, deny-peer";
    let line = relay.wait_for_log(changed).await;
    assert!(line.ends_with(changed), "{line}");
    relay.wait_for_log("SIGHUP: http requires a restart").await;
    assert_eq!(relay.count_in_log("SIGHUP: listen"), 0);
    let reserved = bob.reserve().await.reservation.unwrap().addrs;
    let announced: Multiaddr = format!("{address}/p2p/{}", relay.peer).parse().unwrap();
    assert_eq!(reserved, [announced.to_vec()]);
    assert_eq!(bob.request(&reserve()).await.status, RESOURCE_LIMIT_EXCEEDED);
    let (status, _) = alice.request_circuit(&connect(bob.peer)).await;
    assert_eq!(status.status, PERMISSION_DENIED);

    write(&relay.folder, "deny-peer = []\n");
    relay.signal("HUP");
    relay.wait_for_log("SIGHUP: changed: announce, reserve-rate, deny-peer").await;
    circuit_to(&mut alice, bob.peer, &mut stops).await;
    assert_relayed(&mut there, &mut back, b"hello").await;

    // When the file is removed, nothing changes.
    fs::remove_file(relay.folder.path().join(NAME)).unwrap();
    relay.signal("HUP");
    relay.wait_for_log("SIGHUP: keeping the previous settings: --config relaylet.toml: ").await;
    carol.reserve().await;
}

#[tokio::test]
async fn an_invalid_file_changes_nothing_and_is_logged() {
    let relay = start(folder_with("max-reservations = 2\n"));
    let mut alice = Client::connect(&relay).await;
    write(&relay.folder, "max-reservations = 1\nprobe = \"1h\"\n");
    relay.signal("HUP");
    let line =
        relay.wait_for_log("SIGHUP: keeping the previous settings: relaylet.toml:2: --probe").await;
    assert!(line.contains("ERROR"), "{line}");
    write(&relay.folder, "max-reservations = 1\nmax-buffered = \"8MiB\"\n");
    relay.signal("HUP");
    relay
        .wait_for_log("SIGHUP: keeping the previous settings: relaylet.toml:2: --max-buffered: 8.0")
        .await;
    alice.reserve().await;
    Client::connect(&relay).await.reserve().await;
}

#[tokio::test]
async fn a_questionable_setting_is_a_warning_on_reload_as_well() {
    let relay = start(folder_with(""));
    let file = "announce = \"/ip4/10.0.0.1/tcp/4001\"\nreservation-ttl = \"1m\"\n\
                proxy-protocol-from = \"0.0.0.0/0\"\n";
    write(&relay.folder, file);
    relay.signal("HUP");
    for warning in [
        "SIGHUP: --announce: clients on the internet cannot use /ip4/10.0.0.1/tcp/4001",
        "SIGHUP: --reservation-ttl 1m: ",
        "SIGHUP: --proxy-protocol-from 0.0.0.0/0: ",
    ] {
        let line = relay.wait_for_log(warning).await;
        assert!(line.contains(" WARN "), "{line}");
    }
}

/// The FIFO's writer is gone: opening it again would block, and an anonymous pipe would be empty.
#[tokio::test]
async fn a_configuration_that_cannot_be_read_twice_is_not_reloaded() {
    let folder = tempfile::tempdir().unwrap();
    let fifo = folder.path().join(NAME);
    assert!(Command::new("mkfifo").arg(&fifo).status().unwrap().success());
    let written = std::thread::spawn(move || fs::write(fifo, "max-reservations = 1\n"));
    let relay = start(folder);
    written.join().unwrap().unwrap();
    relay.wait_for_log("relays for anyone: 1 slots").await;
    relay.signal("HUP");
    let line =
        "SIGHUP: keeping the previous settings: --config relaylet.toml: not a regular file; ";
    relay.wait_for_log(line).await;
    Client::connect(&relay).await.reserve().await;
}

#[cfg(feature = "dht")]
#[tokio::test]
async fn a_reloaded_setting_must_fit_the_running_dht() {
    let relay = start(folder_with("dht = true\n"));
    write(&relay.folder, "idle-timeout = \"0s\"\n");
    relay.signal("HUP");
    let line = "SIGHUP: keeping the previous settings: relaylet.toml:1: --idle-timeout 0s: would never close";
    relay.wait_for_log(line).await;
    write(&relay.folder, "dht = true\nbootstrap = []\ngrace = \"1m\"\n");
    relay.signal("HUP");
    relay.wait_for_log("SIGHUP: changed: grace").await;
}

#[tokio::test]
async fn without_a_file_sighup_changes_nothing() {
    let relay = Relay::start(&[]);
    relay.signal("HUP");
    relay.wait_for_log("SIGHUP: no file to reload").await;
    Client::connect(&relay).await.reserve().await;
}

#[tokio::test]
async fn a_new_memory_limit_changes_slots_on_sighup_and_other_limits_on_restart() {
    let relay = start(folder_with("memory = \"24MiB\"\n"));
    relay.wait_for_log("memory: at most 2").await;
    write(&relay.folder, "memory = \"128MiB\"\n");
    relay.signal("HUP");
    let line = relay.wait_for_log("SIGHUP: requires a restart: max-circuits-per-peer, ").await;
    for name in ["max-connections", "max-handshakes", "max-streams", "max-buffered"] {
        assert!(line.contains(&format!(" {name},")), "{line}");
    }
    assert!(line.ends_with(" (derived from memory)"), "{line}");
    relay.wait_for_log("SIGHUP: changed: max-reservations, ").await;
    relay.wait_for_log("SIGHUP: memory: 25165824 → 134217728").await;
    assert_eq!(relay.count_in_log("requires a restart"), 1);
    write(&relay.folder, "memory = \"5MiB\"\n");
    relay.signal("HUP");
    relay
        .wait_for_log(
            "SIGHUP: keeping the previous settings: relaylet.toml:1: --memory 5MiB: is too",
        )
        .await;
}
