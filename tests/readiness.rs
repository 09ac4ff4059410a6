//! What a service manager is told, as systemd is by services of `Type=notify`.

#![cfg(target_os = "linux")]

mod common;

use std::{
    net::TcpStream,
    os::{
        linux::net::SocketAddrExt,
        unix::net::{SocketAddr, UnixDatagram},
    },
};

use common::{Client, PATIENCE, Relay, command};
use tempfile::TempDir;

#[test]
fn a_service_manager_is_told_when_it_is_ready_and_when_it_ends() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("notify");
    let name = format!("relaylet-test-{}", std::process::id());
    let address = SocketAddr::from_abstract_name(&name).unwrap();
    for (told, socket) in [
        (UnixDatagram::bind(&path), path.to_str().unwrap()),
        (UnixDatagram::bind_addr(&address), &format!("@{name}")),
    ] {
        let told = told.unwrap();
        told.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut relay = run(socket, &["--drain=2m"]);
        let ready = format!("READY=1\nSTATUS=relaying as {}", relay.peer);
        assert_eq!(hear(&told), ready);
        relay.signal("TERM");
        assert_eq!(hear(&told), "STOPPING=1\nEXTEND_TIMEOUT_USEC=130000000");
        assert!(relay.wait().success());
    }
}

#[test]
fn it_is_ready_once_all_its_addresses_are_bound() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("notify");
    let told = UnixDatagram::bind(&path).unwrap();
    told.set_read_timeout(Some(PATIENCE)).unwrap();
    // Nothing here waits for what the relay says on its standard output.
    let port = free_port();
    let listen = format!("/ip4/127.0.0.1/tcp/{port},/ip4/127.0.0.2/tcp/{port}");
    let folder = TempDir::new().unwrap();
    let mut child = command(&folder)
        .args(["--listen", &listen])
        .env("NOTIFY_SOCKET", path)
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::null())
        .spawn()
        .unwrap();
    let ready = hear(&told);
    let connections = ["127.0.0.1", "127.0.0.2"].map(|ip| TcpStream::connect((ip, port)));
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(ready.starts_with("READY=1\n"), "{ready}");
    assert!(connections.iter().all(Result::is_ok), "{connections:?}");
}

#[tokio::test]
async fn a_service_manager_that_is_not_there_is_a_warning() {
    let relay = run("/nobody/there", &[]);
    let line = relay.wait_for_log("NOTIFY_SOCKET /nobody/there").await;
    assert!(line.contains(" WARN "), "{line}");
    Client::connect(&relay).await.reserve().await;
}

fn run(socket: &str, flags: &[&str]) -> Relay {
    let folder = TempDir::new().unwrap();
    let mut command = command(&folder);
    command
        .args(["--listen", "/ip4/127.0.0.1/tcp/0"])
        .args(flags)
        .env("NOTIFY_SOCKET", socket);
    Relay::run(command, folder)
}

fn hear(told: &UnixDatagram) -> String {
    let mut state = [0; 1024];
    let length = told.recv(&mut state).expect("it says something");
    String::from_utf8(state[..length].into()).unwrap()
}

fn free_port() -> u16 {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().port()
}
