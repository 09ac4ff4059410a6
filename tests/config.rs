//! The configuration file: what it says holds, what is wrong with it is told, and it can be changed
//! while the relay runs.

mod common;

use std::{fs, process::Command};

use common::{
    Client, Relay,
    messages::{connect, reserve},
};
use tempfile::TempDir;

const PERMISSION_DENIED: Option<i32> = Some(202);
const RESERVATION_REFUSED: Option<i32> = Some(200);

const NAME: &str = "relaylet.toml";

fn folder_with(file: &str) -> TempDir {
    let folder = tempfile::tempdir().expect("a temporary folder");
    write(&folder, file);
    folder
}

fn write(folder: &TempDir, file: &str) {
    fs::write(folder.path().join(NAME), file).expect("it can be written");
}

fn command(folder: &TempDir, flags: &[&str]) -> Command {
    let mut command = common::command(folder);
    command.args(["--config", NAME]).args(flags);
    command
}

/// What it says on standard output, on standard error, and its status.
fn run(folder: &TempDir, flags: &[&str]) -> (String, String, Option<i32>) {
    let output = command(folder, flags).output().expect("it can be started");
    let text = |bytes| String::from_utf8(bytes).expect("text");
    (
        text(output.stdout),
        text(output.stderr),
        output.status.code(),
    )
}

/// What a relay with this file would run with.
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
    command
        .env("RELAYLET_GRACE", "4s")
        .env("RELAYLET_SWEEP", "5s");
    let output = command.output().expect("it can be started");
    let file = String::from_utf8(output.stdout).unwrap();
    for line in [
        "grace = \"3s\"",
        "sweep = \"5s\"",
        "probe = \"1s\"",
        "silence = \"1m\"",
        "deny-subnet = [\"192.0.2.0/24\"]",
        "# max-reservations-per-ip = 64",
    ] {
        assert!(file.lines().any(|is| is == line), "{line}: {file}");
    }
}

#[test]
fn what_is_printed_is_a_file_that_means_the_same() {
    let folder = folder_with("");
    let flags = "--max-reservations=7 --max-reservations-per-ip=3 --circuit-bytes=1MiB \
                 --allow-subnet=192.0.2.0/24,2001:db8::/32 --bandwidth=10MB --threads=2 \
                 --listen=/ip4/127.0.0.1/tcp/0 --announce=/dns4/relay.example.org/tcp/4001";
    let flags: Vec<_> = flags.split_whitespace().collect();
    let first = effective(&folder, &flags);
    write(&folder, &first);
    assert_eq!(effective(&folder, &[]), first);
}

#[test]
fn what_is_wrong_is_one_line_with_the_file_the_line_and_the_remedy() {
    for (file, said) in [
        (
            "\ngrase = \"1s\"",
            "relaylet.toml:2: grase: there is no such setting; try grace",
        ),
        ("grace = \"soon\"", "relaylet.toml:1: "),
        ("sweep = \"1s\"\n\nsweep = \"1s\"", "relaylet.toml:3: "),
        (
            "# slots\nmax-reservations = 0",
            "relaylet.toml:2: --max-reservations: a relay without slots",
        ),
        ("grace = 1s", "relaylet.toml:1: "),
        ("deny-subnet = [\"192.0.2.1/24\"]", "try 192.0.2.0/24"),
        ("threads = 0", "relaylet.toml:1: --threads 0: try 1"),
    ] {
        let (out, errors, status) = run(&folder_with(file), &[]);
        assert_eq!((out.as_str(), status), ("", Some(2)), "{file}");
        assert!(errors.contains(said), "{file}: {errors}");
        assert_eq!(errors.lines().count(), 1, "{errors}");
    }
    let missing = tempfile::tempdir().unwrap();
    let (_, errors, status) = run(&missing, &[]);
    assert_eq!(status, Some(2));
    assert!(
        errors.starts_with("relaylet: --config relaylet.toml: "),
        "{errors}"
    );
}

fn start(folder: TempDir) -> Relay {
    let command = command(&folder, &["--listen", "/ip4/127.0.0.1/tcp/0"]);
    Relay::run(command, folder)
}

#[tokio::test]
async fn limits_and_rules_change_with_sighup_and_no_connection_is_dropped() {
    let relay = start(folder_with("max-reservations = 1\nprobe = \"0s\"\n"));
    let mut alice = Client::connect(&relay).await;
    let mut bob = Client::connect(&relay).await;
    alice.reserve().await;
    assert_eq!(bob.ask(&reserve()).await.status, RESERVATION_REFUSED);

    let file = format!(
        "max-reservations = 2\nprobe = \"0s\"\ndeny-peer = [\"{}\"]\nthreads = 3\n",
        alice.peer
    );
    write(&relay.folder, &file);
    relay.signal("HUP");
    relay
        .wait_for_log("SIGHUP: changed: max-reservations, deny-peer")
        .await;
    relay
        .wait_for_log("SIGHUP: threads holds from the next start on")
        .await;
    bob.reserve().await;
    // On the connections that they had.
    assert_eq!(alice.ask(&reserve()).await.status, PERMISSION_DENIED);
    assert_eq!(
        alice.ask(&connect(bob.peer)).await.status,
        PERMISSION_DENIED
    );
}

#[tokio::test]
async fn a_file_that_is_wrong_changes_nothing_and_the_relay_says_so() {
    let relay = start(folder_with("max-reservations = 2\n"));
    let mut alice = Client::connect(&relay).await;
    write(&relay.folder, "max-reservations = 1\nprobe = \"1h\"\n");
    relay.signal("HUP");
    let line = relay
        .wait_for_log("SIGHUP: nothing has changed: relaylet.toml:2: --probe")
        .await;
    assert!(line.contains("ERROR"), "{line}");
    alice.reserve().await;
    Client::connect(&relay).await.reserve().await;
}

#[tokio::test]
async fn without_a_file_sighup_changes_nothing() {
    let relay = Relay::start(&[]);
    relay.signal("HUP");
    relay
        .wait_for_log("SIGHUP: there is no file to read again")
        .await;
    Client::connect(&relay).await.reserve().await;
}
