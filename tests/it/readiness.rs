//! What a service manager is told, as systemd is by services of `Type=notify`.

use std::{
    fs,
    net::TcpStream,
    os::{
        linux::net::SocketAddrExt,
        unix::net::{SocketAddr, UnixDatagram},
    },
    time::Duration,
};

use crate::common::{Client, PATIENCE, Relay, circuit, command};
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
        let ready = format!("READY=1\nSTATUS=0 of 1024 slots, 0 circuits; peer id {}", relay.peer);
        assert_eq!(hear(&told), ready);
        relay.signal("TERM");
        assert_eq!(hear(&told), "STOPPING=1\nEXTEND_TIMEOUT_USEC=130000000");
        assert!(relay.wait().success());
    }
}

#[tokio::test]
async fn a_service_manager_is_told_how_much_is_used() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("notify");
    let told = UnixDatagram::bind(&path).unwrap();
    told.set_read_timeout(Some(PATIENCE)).unwrap();
    let relay = run(path.to_str().unwrap(), &[]);
    let (mut source, mut target) = (Client::connect(&relay).await, Client::connect(&relay).await);
    target.reserve().await;
    let _circuit = circuit(&mut source, &mut target).await;
    let used = format!("STATUS=1 of 1024 slots, 1 circuit; peer id {}", relay.peer);
    let hears = tokio::task::spawn_blocking(move || while hear(&told) != used {});
    hears.await.expect("it is told");
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

#[test]
fn a_watchdog_is_pinged_while_the_relay_runs() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("notify");
    let told = UnixDatagram::bind(&path).unwrap();
    let start = |pid: Option<&str>| {
        let folder = TempDir::new().unwrap();
        let mut command = command(&folder);
        command.args(["--listen", "/ip4/127.0.0.1/tcp/0"]).env("NOTIFY_SOCKET", &path);
        command.env("WATCHDOG_USEC", "1000000").envs(pid.map(|pid| ("WATCHDOG_PID", pid)));
        Relay::run(command, folder)
    };
    let is_silent = |within: Duration| {
        told.set_read_timeout(Some(within)).unwrap();
        told.recv(&mut [0; 1024]).is_err()
    };
    let relay = start(None);
    told.set_read_timeout(Some(PATIENCE)).unwrap();
    assert!(hear(&told).starts_with("READY=1\n"));
    for _ in 0..3 {
        assert_eq!(hear(&told), "WATCHDOG=1");
    }
    relay.signal("STOP");
    // One may have been on its way.
    let _ = is_silent(Duration::from_millis(100));
    assert!(is_silent(Duration::from_secs(2)));
    relay.signal("CONT");
    told.set_read_timeout(Some(PATIENCE)).unwrap();
    assert_eq!(hear(&told), "WATCHDOG=1");
    drop(relay);

    // It was another process that was to be watched.
    while !is_silent(Duration::from_millis(100)) {}
    let _relay = start(Some("1"));
    told.set_read_timeout(Some(PATIENCE)).unwrap();
    assert!(hear(&told).starts_with("READY=1\n"));
    assert!(is_silent(Duration::from_secs(2)));
}

#[tokio::test]
async fn the_unit_leaves_room_for_what_the_relay_may_take_and_patience_for_one_that_stands_still() {
    let unit = fs::read_to_string("tests/deploy/relaylet.service").unwrap();
    let setting = |name: &str| {
        let line = unit.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('='));
        line.unwrap_or_else(|| panic!("the unit has no {name}")).to_owned()
    };
    // What it says with one thread, and the default limits.
    let relay = Relay::start(&["--threads=1"]);
    let said = relay.wait_for_log("at most ").await;
    let (_, said) = said.split_once("at most ").unwrap();
    let said: u64 = said.split_once(" MiB").unwrap().0.parse().unwrap();
    let most = setting("MemoryMax");
    let most = most.strip_suffix('G').expect("GiB").parse::<u64>().unwrap() * 1024;
    assert!((said + said / 2..4 * said).contains(&most), "{most} MiB for {said}");
    let watchdog: humantime::Duration = setting("WatchdogSec").parse().unwrap();
    assert!(*watchdog >= Duration::from_secs(60), "{watchdog}");
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
    command.args(["--listen", "/ip4/127.0.0.1/tcp/0"]).args(flags).env("NOTIFY_SOCKET", socket);
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
