//! sd_notify: what the relay reports to a service manager, as systemd expects of `Type=notify`.

use std::{
    fs,
    io::ErrorKind,
    net::TcpStream,
    os::{
        linux::net::SocketAddrExt,
        unix::net::{SocketAddr, UnixDatagram},
    },
    time::Duration,
};

use crate::common::{Client, Relay, TEST_TIMEOUT, circuit, command, free_port, source_and_target};
use tempfile::TempDir;

#[test]
fn sd_notify_reports_ready_and_stopping() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("notify");
    let name = format!("relaylet-test-{}", std::process::id());
    let address = SocketAddr::from_abstract_name(&name).unwrap();
    for (bound, path) in [
        (UnixDatagram::bind(&path), path.to_str().unwrap()),
        (UnixDatagram::bind_addr(&address), &format!("@{name}")),
    ] {
        let socket = bound.unwrap();
        socket.set_read_timeout(Some(TEST_TIMEOUT)).unwrap();
        let mut relay = run(path, &["--drain=2m"]);
        let ready = format!("READY=1\nSTATUS=0 of 1024 slots, 0 circuits; peer id {}", relay.peer);
        assert_eq!(receive(&socket), ready);
        relay.signal("TERM");
        assert_eq!(receive(&socket), "STOPPING=1\nEXTEND_TIMEOUT_USEC=130000000");
        assert!(relay.wait().success());
    }
}

#[tokio::test]
async fn sd_notify_reports_usage() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("notify");
    let socket = UnixDatagram::bind(&path).unwrap();
    socket.set_read_timeout(Some(TEST_TIMEOUT)).unwrap();
    let relay = run(path.to_str().unwrap(), &[]);
    let (mut source, mut target) = source_and_target(&relay).await;
    let _circuit = circuit(&mut source, &mut target).await;
    let used = format!("STATUS=1 of 1024 slots, 1 circuit; peer id {}", relay.peer);
    let received = tokio::task::spawn_blocking(move || while receive(&socket) != used {});
    received.await.expect("the status is sent");
}

#[test]
fn ready_is_sent_once_all_addresses_are_bound() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("notify");
    let socket = UnixDatagram::bind(&path).unwrap();
    socket.set_read_timeout(Some(TEST_TIMEOUT)).unwrap();
    // The test does not wait for the addresses on standard output.
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
    let ready = receive(&socket);
    let connections = ["127.0.0.1", "127.0.0.2"].map(|ip| TcpStream::connect((ip, port)));
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(ready.starts_with("READY=1\n"), "{ready}");
    assert!(connections.iter().all(Result::is_ok), "{connections:?}");
}

#[test]
fn the_watchdog_is_pinged_while_the_relay_runs() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("notify");
    let socket = UnixDatagram::bind(&path).unwrap();
    let start = |pid: Option<&str>| {
        let folder = TempDir::new().unwrap();
        let mut command = command(&folder);
        command.args(["--listen", "/ip4/127.0.0.1/tcp/0"]).env("NOTIFY_SOCKET", &path);
        command.env("WATCHDOG_USEC", "1000000").envs(pid.map(|pid| ("WATCHDOG_PID", pid)));
        Relay::run(command, folder)
    };
    let is_silent = |within: Duration| {
        socket.set_read_timeout(Some(within)).unwrap();
        socket.recv(&mut [0; 1024]).is_err()
    };
    let relay = start(None);
    socket.set_read_timeout(Some(TEST_TIMEOUT)).unwrap();
    assert!(receive(&socket).starts_with("READY=1\n"));
    for _ in 0..3 {
        assert_eq!(receive(&socket), "WATCHDOG=1");
    }
    relay.signal("STOP");
    // Some may have been sent before.
    while !is_silent(Duration::from_millis(100)) {}
    assert!(is_silent(Duration::from_secs(2)));
    relay.signal("CONT");
    socket.set_read_timeout(Some(TEST_TIMEOUT)).unwrap();
    assert_eq!(receive(&socket), "WATCHDOG=1");
    drop(relay);

    // WATCHDOG_PID names another process: no pings are sent.
    while !is_silent(Duration::from_millis(100)) {}
    let _relay = start(Some("1"));
    socket.set_read_timeout(Some(TEST_TIMEOUT)).unwrap();
    assert!(receive(&socket).starts_with("READY=1\n"));
    assert!(is_silent(Duration::from_secs(2)));
}

#[tokio::test]
async fn the_unit_allows_the_estimated_memory_and_a_watchdog_delay() {
    let unit = fs::read_to_string("tests/deploy/relaylet.service").unwrap();
    let setting = |name: &str| {
        let line = unit.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('='));
        line.unwrap_or_else(|| panic!("the unit has no {name}")).to_owned()
    };
    // The estimate with one thread and the default limits.
    let relay = Relay::start(&["--threads=1"]);
    let estimate = relay.wait_for_log("at most ").await;
    let (_, estimate) = estimate.split_once("at most ").unwrap();
    let estimate: u64 = estimate.split_once(" MiB").unwrap().0.parse().unwrap();
    let most = setting("MemoryMax");
    let most = most.strip_suffix('G').expect("GiB").parse::<u64>().unwrap() * 1024;
    assert!((estimate + estimate / 2..4 * estimate).contains(&most), "{most} MiB for {estimate}");
    let watchdog: humantime::Duration = setting("WatchdogSec").parse().unwrap();
    assert!(*watchdog >= Duration::from_secs(60), "{watchdog}");
}

#[tokio::test]
async fn an_unreachable_service_manager_is_a_warning() {
    let relay = run("/nobody/there", &[]);
    let line = relay.wait_for_log("NOTIFY_SOCKET /nobody/there").await;
    assert!(line.contains(" WARN "), "{line}");
    Client::connect(&relay).await.reserve().await;
}

#[tokio::test]
async fn an_empty_name_of_a_socket_counts_as_none() {
    let relay = run("", &[]);
    relay.wait_for_log("reach it at").await; // later than READY=1
    assert_eq!(relay.count_in_log("sd_notify"), 0);
}

fn run(socket: &str, flags: &[&str]) -> Relay {
    let folder = TempDir::new().unwrap();
    let mut command = command(&folder);
    command.args(["--listen", "/ip4/127.0.0.1/tcp/0"]).args(flags).env("NOTIFY_SOCKET", socket);
    Relay::run(command, folder)
}

fn receive(socket: &UnixDatagram) -> String {
    let mut state = [0; 1024];
    let length = loop {
        match socket.recv(&mut state) {
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            received => break received.expect("a message"),
        }
    };
    String::from_utf8(state[..length].into()).unwrap()
}
