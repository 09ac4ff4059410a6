//! The page as it is seen: a real Chromium looks at a real relay, at the sizes of a desk and a phone,
//! in dark and light.
//!
//! It needs Chromium (`CHROMIUM=…`, else `/usr/bin/chromium`), and Node with npm. Without those it
//! fails. What it saw is under `target/tmp/browser`.

mod common;

use std::{fs, path::Path, process::Command};

use common::{Client, Relay, circuit, http, messages, read_bytes};
use libp2p::futures::{AsyncWriteExt, future};
use tokio::process;

#[tokio::test]
async fn the_page_shows_the_relay_to_whoever_looks_at_it() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/browser");
    let mut npm = Command::new("npm");
    npm.args(["ci", "--no-audit", "--no-fund"]);
    let status = npm.current_dir(&folder).status().expect("npm is installed");
    assert!(status.success(), "{npm:?}: {status}");
    let screenshots = Path::new(env!("CARGO_TARGET_TMPDIR")).join("browser");
    fs::create_dir_all(&screenshots).expect("a folder for what is seen");

    let relay = Relay::start(&[
        http::ANYWHERE,
        "--max-reservations=8",
        "--grace=1h",
        "--circuit-bytes=0",
        "--circuit-duration=0s",
    ]);
    let port = http::port(&relay).await;
    let mut target = Client::connect(&relay).await;
    let mut source = Client::connect(&relay).await;
    let mut leaves = Client::connect(&relay).await;
    target.reserve().await;
    leaves.reserve().await;
    leaves.leave().await;
    relay.wait_for_log("grace began").await;
    let nobody = messages::connect(relay.peer);
    assert_eq!(source.ask(&nobody).await.status, Some(204));
    let (mut there, mut back) = circuit(&mut source, &mut target).await;
    let chatter = async {
        loop {
            let send = async {
                there.write_all(&[7; 1024]).await.expect("it is read");
                there.flush().await.expect("it is read");
            };
            future::join(send, read_bytes(&mut back, 1024)).await;
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
    };

    let look = process::Command::new("node")
        .arg("page.mjs")
        .arg(format!("http://127.0.0.1:{port}/"))
        .arg(target.peer.to_string())
        .arg(&screenshots)
        .current_dir(&folder)
        .kill_on_drop(true)
        .status();
    let status = tokio::select! {
        status = look => status.expect("node is installed"),
        () = chatter => unreachable!("it goes on"),
    };
    assert!(status.success(), "page.mjs: {status}");
}
