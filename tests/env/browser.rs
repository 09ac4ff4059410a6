//! Tests with Chromium: it opens the relay's page in a desktop and a phone size, in dark and light mode, of a relay that
//! is empty, in use or full; and two pages with js-libp2p connect to each other through the relay.
//!
//! Chromium is `CHROMIUM=…`, else `/usr/bin/chromium`. Screenshots are under `target/tmp/browser`.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::LazyLock,
};

use crate::common::{
    Client, Relay, assert_relayed, by_hand, circuit, free_port, http,
    messages::{self, NO_RESERVATION, OK},
    websocket::{self, CERTIFICATE, Certificate},
};
use libp2p::futures::{StreamExt, stream};
use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines},
    process,
};

/// The folder of the scripts, with their packages installed.
static SCRIPTS: LazyLock<PathBuf> = LazyLock::new(|| {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/env/browser");
    let mut npm = Command::new("npm");
    npm.args(["ci", "--no-audit", "--no-fund"]);
    let status = npm.current_dir(&folder).status().expect("npm is installed");
    assert!(status.success(), "{npm:?}: {status}");
    folder
});

/// A script that controls the browser.
fn script(name: &str) -> process::Command {
    let mut node = process::Command::new("node");
    node.arg(name).current_dir(&*SCRIPTS).kill_on_drop(true);
    node
}

/// Starts a script; returns it with the lines of its output.
fn start(
    script: &mut process::Command,
) -> (process::Child, Lines<BufReader<process::ChildStdout>>) {
    let script = script.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn();
    let mut script = script.expect("node is installed");
    let output = BufReader::new(script.stdout.take().expect("it is piped")).lines();
    (script, output)
}

#[tokio::test]
#[ignore = "needs Chromium, Node and npm"]
async fn two_browsers_connect_through_the_relay_and_again_after_its_restart() {
    let certificate = Certificate::new();
    let folder = tempfile::tempdir().expect("a temporary folder");
    certificate.write(folder.path());
    let listen = ["/ws", "/tls/ws"].map(|ending| {
        let port = free_port();
        format!("--listen=/ip4/127.0.0.1/tcp/{port}{ending}")
    });
    let mut flags = CERTIFICATE.to_vec();
    flags.extend(listen.iter().map(String::as_str));
    let relay = Relay::start_in(folder, &flags);
    let addresses =
        [websocket::address(&relay, "/ws").await, websocket::address(&relay, "/tls/ws").await];

    let (mut pages, mut output) =
        start(script("meet.mjs").args(addresses.map(|address| address.to_string())));
    // The script limits the time of its steps.
    loop {
        match output.next_line().await.expect("text") {
            Some(line) if line == "met" => break,
            Some(line) => println!("{line}"),
            None => panic!("meet.mjs: {}", pages.wait().await.expect("wait succeeds")),
        }
    }
    let mut log = relay.log();
    log.retain(|line| line.contains("reservation granted"));
    let in_tls = |line: &&String| line.ends_with("/tls/ws");
    let over_websocket = |line: &&String| line.ends_with("/ws");
    assert_eq!(log.iter().filter(in_tls).count(), 1, "{log:#?}");
    assert_eq!(log.iter().filter(over_websocket).count(), 2, "{log:#?}");

    let peer = relay.peer;
    let again = Relay::start_in(relay.kill(), &flags);
    assert_eq!(again.peer, peer);
    let mut input = pages.stdin.take().expect("it is piped");
    let restarted = input.write_all(b"restarted\n").await;
    restarted.expect("the script reads its input");
    while let Some(line) = output.next_line().await.expect("text") {
        println!("{line}");
    }
    let status = pages.wait().await.expect("wait succeeds");
    assert!(status.success(), "meet.mjs: {status}");
}

#[tokio::test]
#[ignore = "needs Chromium, Node and npm"]
async fn the_status_page_shows_the_relay() {
    let screenshots = screenshots();
    let relay = Relay::start(&[
        http::ON_ANY_PORT,
        "--max-reservations=8",
        "--grace=1h",
        "--http-host=relay.example",
        "--circuit-bytes=1GiB",
        "--circuit-duration=1h",
    ]);
    let port = http::port(&relay).await;
    let mut target = Client::connect(&relay).await;
    let mut source = Client::connect(&relay).await;
    let mut disconnecting = Client::connect(&relay).await;
    target.reserve().await;
    disconnecting.reserve().await;
    disconnecting.disconnect().await;
    relay.wait_for_log("grace began").await;
    let to_relay_itself = messages::connect(relay.peer);
    assert_eq!(source.request(&to_relay_itself).await.status, NO_RESERVATION);
    let (mut there, mut back) = circuit(&mut source, &mut target).await;
    let traffic = async {
        loop {
            assert_relayed(&mut there, &mut back, &[7; 1024]).await;
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
    };

    let script = script("page.mjs")
        .arg(format!("http://127.0.0.1:{port}/"))
        .arg(target.peer.to_string())
        .arg(&screenshots)
        .status();
    let status = tokio::select! {
        status = script => status.expect("node is installed"),
        () = traffic => unreachable!("the traffic never ends"),
    };
    assert!(status.success(), "page.mjs: {status}");
}

#[tokio::test]
#[ignore = "needs Chromium, Node and npm"]
async fn the_status_page_shows_0_and_3_and_1024_holders() {
    let relay = Relay::start(&[
        http::ON_ANY_PORT,
        "--announce=/dns4/relay.example/tcp/4001",
        "--max-reservations-per-ip=0",
        "--max-reservations-per-subnet=0",
        "--max-connections-per-ip=0",
        "--max-connections-per-subnet=0",
        "--reserve-rate=0",
        "--heartbeat=0s", // most holders answer no probe
    ]);
    let port = http::port(&relay).await;
    let page = format!("http://127.0.0.1:{port}/");
    let (mut script, mut output) = start(script("states.mjs").arg(page).arg(screenshots()));
    let mut input = script.stdin.take().expect("it is piped");
    let (mut clients, mut circuits, mut others) = (Vec::new(), Vec::new(), Vec::new());
    // The script limits the time of its steps.
    while let Some(line) = output.next_line().await.expect("text") {
        match &line[..] {
            "empty" => {
                for _ in 0..3 {
                    let mut client = Client::connect(&relay).await;
                    client.reserve().await;
                    clients.push(client);
                }
                let [source, target, _] = &mut clients[..] else { panic!("three clients") };
                let mut ends = circuit(source, target).await;
                by_hand::send(&mut ends.0, &[7; 40_000]).await;
                circuits.push(ends);
            }
            "three" => {
                let reserve = |_| async {
                    let mut channel = by_hand::muxed(&relay).await;
                    assert_eq!(by_hand::reserve(&mut channel, 1).await, OK);
                    channel
                };
                let all = stream::iter(3..1024).map(reserve).buffer_unordered(16);
                others = all.collect::<Vec<_>>().await;
                input.write_all(b"full\n").await.expect("the script reads its input");
            }
            _ => println!("{line}"),
        }
    }
    let status = script.wait().await.expect("wait succeeds");
    assert!(status.success(), "states.mjs: {status}");
    assert_eq!((circuits.len(), others.len()), (1, 1021));
}

/// The folder for screenshots.
fn screenshots() -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("browser");
    fs::create_dir_all(&folder).expect("a folder for screenshots");
    folder
}
