//! Interoperability: unmodified go-libp2p and js-libp2p clients against the program.
//!
//! Without Go, or Node with npm, the tests fail rather than being skipped.

mod documented;
mod embedded;
mod loss;
mod many;
mod yamux;

use std::{
    fs,
    io::{BufRead, BufReader, Lines},
    path::{Path, PathBuf},
    process::{Child, ChildStdout, Command, Stdio},
    sync::OnceLock,
    time::Instant,
};

use tempfile::TempDir;

use crate::common::{Relay, command, http, network::Network, websocket};

/// The name of a client's scenario, and the flags of its relay.
type Scenario = (&'static str, &'static [&'static str]);

const UNLIMITED: Scenario = ("unlimited", &["--circuit-bytes", "0", "--circuit-duration", "0s"]);
const LIMITED: Scenario = ("limited", &["--circuit-bytes", "128KiB", "--circuit-duration", "5s"]);
const STATUSES: Scenario = ("statuses", &["--max-circuits-per-peer", "1"]);
const WEBSOCKET: Scenario = (
    "websocket",
    &[websocket::LISTEN, "--circuit-bytes=0", "--circuit-duration=0s", "--reservation-ttl=5m"],
);

/// The key of a private network; the clients get its path in the environment.
const SWARM_KEY: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/env/interop/swarm.key");
const PRIVATE: Scenario = (
    "private",
    &[concat!("--swarm-key=", env!("CARGO_MANIFEST_DIR"), "/tests/env/interop/swarm.key")],
);

#[tokio::test]
#[ignore = "needs Go"]
async fn go_libp2p_is_served() {
    let program = go_client();
    for scenario in [
        ("reserve", &[][..]),
        ("autorelay", &[]),
        UNLIMITED,
        LIMITED,
        STATUSES,
        ("full", &["--max-reservations", "1"]),
        PRIVATE,
        WEBSOCKET,
    ] {
        run_scenario(scenario, &mut Command::new(program)).await;
    }
}

/// Three relays, because go-libp2p sends each at most one request in two minutes, and version 2 needs two equal
/// answers.
#[test]
#[ignore = "needs Go, root, iproute2 and nftables"]
fn go_libp2p_learns_its_reachability_over_autonat() {
    let program = go_client();
    let mut network = Network::of_global_addresses();
    let relays = [network.host(), network.host(), network.host()];
    let relays = relays.map(|host| host.relay(&["--autonat"]));
    let addresses = relays.each_ref().map(|relay| relay.address.to_string());
    for scenario in ["reachable", "unreachable"] {
        let host = network.host();
        if scenario == "unreachable" {
            host.close(4001); // the port that it listens on
        }
        let prefix = host.command_prefix();
        run(Command::new(&prefix[0])
            .args(&prefix[1..])
            .arg(program)
            .arg(scenario)
            .args(&addresses));
    }
}

/// The host has no global address, so its AutoNAT version 1 request names none. go-libp2p asks a server again only 90 s
/// after a refusal.
#[test]
#[ignore = "needs Go, root, iproute2 and nftables"]
fn go_libp2p_behind_a_router_learns_that_it_cannot_be_reached() {
    let program = go_client();
    let mut network = Network::of_global_addresses();
    let relays = [network.host(), network.host()].map(|host| host.relay(&["--autonat"]));
    let router = network.host();
    router.close(4001);
    let under = network.host_behind(&router).command_prefix();
    let addresses = relays.each_ref().map(|relay| relay.address.to_string());
    run(Command::new(&under[0]).args(&under[1..]).arg(program).arg("behind").args(&addresses));
}

#[test]
#[ignore = "needs Go"]
fn a_dht_client_finds_a_relay_and_moves_to_another_when_that_is_killed() {
    let mut client = ClientProcess::start(Command::new(go_client()).arg("fleet"));
    let bootstrap = client.read_value("bootstrap ");
    let fleet = (0..3).map(|_| Relay::start(&["--dht", "--bootstrap", &bootstrap]));
    let mut fleet: Vec<_> = fleet.collect();
    let first = client.read_value("reserved ");
    let first = fleet.iter().position(|relay| relay.peer.to_string() == first);
    fleet.remove(first.expect("one of the fleet")).kill();
    client.wait_for_success();
}

#[test]
#[ignore = "needs Go"]
fn after_kill_9_all_60_autorelay_clients_reserve_again_without_refusal() {
    const CLIENTS: usize = 60;
    let relay = Relay::start(&[]);
    let address = relay.address.to_string();
    let mut clients = ClientProcess::start(Command::new(go_client()).args(["restart", &address]));
    clients.read_value("reserved");
    let listen = format!("--listen=/ip4/127.0.0.1/tcp/{}", relay.port());
    let killed = Instant::now();
    let relay = Relay::start_in(relay.kill(), &[&listen]);
    clients.read_value("again");
    println!(
        "kill -9 under {CLIENTS} clients of go-libp2p: all reserved again {:.1} s after it",
        killed.elapsed().as_secs_f64()
    );
    assert_eq!(relay.address.to_string(), address);
    assert_eq!(relay.count_in_log("reservation granted"), CLIENTS);
    for refused in ["refused", "rejected", "connection denied", "answer undelivered"] {
        assert_eq!(relay.count_in_log(refused), 0, "{refused}");
    }
    clients.wait_for_success();
}

#[tokio::test]
#[ignore = "needs Node and npm"]
async fn js_libp2p_is_served() {
    // js-libp2p renews only when little of the term is left.
    const SHORT: &str = "--reservation-ttl=5m";
    let folder = js_client();
    for scenario in [
        ("reserve", &[SHORT][..]),
        UNLIMITED,
        LIMITED,
        STATUSES,
        ("full", &[SHORT, "--max-reservations=1"]),
        PRIVATE,
        WEBSOCKET,
    ] {
        let mut node = Command::new("node_modules/.bin/node");
        run_scenario(scenario, node.arg("client.mjs").current_dir(folder)).await;
    }
}

#[test]
#[ignore = "needs Node and npm"]
fn relaylet_check_passes_with_js_libp2ps_relay() {
    let mut node = Command::new("node_modules/.bin/node");
    node.arg("relay.mjs").current_dir(js_client()).stdin(Stdio::piped());
    let mut relay = ClientProcess::start(&mut node);
    let address = relay.read_value("relay ");
    let folder = TempDir::new().expect("a folder");
    let checked = command(&folder).args(["check", &address]).output().expect("it can be run");
    let said = String::from_utf8_lossy(&checked.stdout);
    assert!(checked.status.success(), "{said}");
    let steps: Vec<_> = said.lines().filter_map(|line| line.split(' ').next()).collect();
    let expected = ["tcp", "secure", "identify", "reserve", "second", "circuit", "end"];
    assert_eq!(steps, expected, "{said}");
    assert!(said.contains("the voucher is valid"), "{said}");
    relay.wait_for_success();
}

#[tokio::test]
#[ignore = "needs Go"]
async fn the_metrics_match_go_libp2ps_and_its_dashboards() {
    let go = ["list", "-m", "-f", "{{.Dir}}", "github.com/libp2p/go-libp2p"];
    let listed = Command::new("go").args(go).current_dir(client("go")).output();
    let folder = String::from_utf8(listed.expect("go is installed").stdout).expect("a path");
    let folder = Path::new(folder.trim());
    let read = |path: &str| fs::read_to_string(folder.join(path)).expect("go-libp2p's source");

    let relay = Relay::start(&[http::ON_ANY_PORT]);
    let metrics = http::get(http::port(&relay).await, "/metrics").await;
    let samples = http::samples(&metrics);
    let assert_exported = |wanted: &str| {
        let there = samples.keys().any(|sample| sample.starts_with(wanted));
        assert!(there, "{wanted}: {metrics}");
    };

    // The metric names with their labels, and the label values.
    let source = read("p2p/protocol/circuitv2/relay/metrics.go");
    let mut declared = 0;
    for declaration in source.split("prometheus.New").skip(1) {
        let name = quoted(declaration.split_once("Name:").expect("a name").1);
        let end = declaration.find("\n\t)").expect("the end");
        let label = declaration[..end].split_once("[]string{");
        match label {
            Some((_, label)) => {
                assert_exported(&format!("libp2p_relaysvc_{name}{{{}=", quoted(label)));
            }
            None if declaration.starts_with("Histogram") => {
                assert_exported(&format!("libp2p_relaysvc_{name}_sum"));
                assert_exported(&format!("libp2p_relaysvc_{name}_count"));
                assert_exported(&format!("libp2p_relaysvc_{name}_bucket{{le="));
            }
            None => assert_exported(&format!("libp2p_relaysvc_{name}")),
        }
        declared += 1;
    }
    assert_eq!(declared, 9);
    let phrases = ["*tags = append(*tags, ", "reason = ", "requestStatus"];
    let phrases = source.lines().filter_map(|line| {
        let line = line.trim();
        phrases.iter().any(|start| line.starts_with(start)).then(|| line.split('"').nth(1))?
    });
    let phrases: Vec<_> = phrases.collect();
    assert_eq!(phrases.len(), 13, "{phrases:?}");
    for phrase in phrases {
        let exported = metrics.lines().any(|line| {
            line.starts_with("libp2p_relaysvc_") && line.contains(&format!("=\"{phrase}\"}}"))
        });
        assert!(exported, "{phrase}: {metrics}");
    }

    // The metrics of the dashboard's queries, without the label `instance`, which Prometheus adds.
    let dashboard = read("dashboards/relaysvc/relaysvc.json");
    let queries = dashboard.lines().filter(|line| line.contains("\"expr\":"));
    let mut queried = 0;
    for query in queries {
        for metric in query.split("libp2p_relaysvc_").skip(1) {
            let (name, labels) = metric.split_once('{').expect("labels");
            match labels.split_once("type=\\\"") {
                Some((_, kind)) => {
                    let kind = kind.split('\\').next().expect("a value");
                    assert_exported(&format!("libp2p_relaysvc_{name}{{type=\"{kind}\"}}"));
                }
                None => assert_exported(&format!("libp2p_relaysvc_{name}")),
            }
            queried += 1;
        }
    }
    assert!(queried >= 14, "{queried}");
}

#[tokio::test]
#[ignore = "needs Go"]
async fn the_metrics_are_parsed_by_prometheus() {
    use std::io::Write;

    let relay = Relay::start(&[http::ON_ANY_PORT]);
    let port = http::port(&relay).await;
    let answer = http::fetch_with(port, "GET", "/metrics", "Host: localhost").await;
    assert_eq!(answer.headers["content-type"], "text/plain; version=0.0.4; charset=utf-8");
    let mut parser = Command::new(go_client())
        .arg("metrics")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("the process starts");
    let mut input = parser.stdin.take().expect("it is piped");
    input.write_all(answer.body.as_bytes()).expect("the process reads");
    drop(input);
    let output = parser.wait_with_output().expect("wait succeeds");
    assert!(output.status.success(), "{}", answer.body);
    let families = String::from_utf8(output.stdout).expect("text");
    for family in [
        "libp2p_relaysvc_connection_duration_seconds HISTOGRAM 1",
        "libp2p_relaysvc_reservations_total COUNTER 3",
        "process_cpu_seconds_total COUNTER 1",
        "process_open_fds GAUGE 1",
        "relaylet_build_info GAUGE 1",
        "relaylet_limit GAUGE 12",
        "relaylet_slots GAUGE 3",
        "relaylet_sweep_seconds_total COUNTER 1",
    ] {
        assert!(families.lines().any(|line| line == family), "{family}: {families}");
    }
}

/// As its users build it: without an address that is global it grants what rust-libp2p's clients refuse.
#[test]
#[ignore = "needs Go"]
fn the_check_passes_go_libp2ps_relay() {
    let program = Path::new(env!("CARGO_TARGET_TMPDIR")).join("go-relay");
    let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/peers/go");
    run(Command::new("go").args(["build", "-o"]).arg(&program).current_dir(sources));
    for (announced, expected) in
        [("/ip4/8.8.8.8/tcp/4001", "\nend "), ("", "FAILED: the reservation has no address; ")]
    {
        let mut relay = ClientProcess::start(Command::new(&program).env("ANNOUNCE", announced));
        let address = format!("/ip4/127.0.0.1{}", relay.read_value("listening on /ip4/127.0.0.1"));
        let mut check = command(&TempDir::new().expect("a folder"));
        let output =
            check.current_dir("/").args(["check", &address]).output().expect("it can be run");
        let printed = String::from_utf8(output.stdout).expect("text");
        println!("{printed}");
        assert_eq!(output.status.success(), !announced.is_empty(), "{printed}");
        for part in [expected, "go-libp2p", "sees us at /ip4/127.0.0.1/tcp/"] {
            assert!(printed.contains(part), "{part}: {printed}");
        }
        assert!(announced.is_empty() || printed.contains("the voucher is valid"), "{printed}");
    }
}

/// A client that runs beside the test, which reads what it prints.
pub struct ClientProcess {
    client: Child,
    lines: Lines<BufReader<ChildStdout>>,
}

impl ClientProcess {
    pub fn start(client: &mut Command) -> Self {
        let mut client = client.stdout(Stdio::piped()).spawn().expect("the process starts");
        let output = client.stdout.take().expect("it is piped");
        let lines = BufReader::new(output).lines();
        Self { client, lines }
    }

    /// Reads lines until one begins with `word`, and returns the rest of it. The client limits the time of its steps.
    pub fn read_value(&mut self, word: &str) -> String {
        let mut lines = self.lines.by_ref().map_while(Result::ok);
        let found = lines.find_map(|line| {
            println!("{line}");
            Some(line.strip_prefix(word)?.to_owned())
        });
        found.unwrap_or_else(|| panic!("the client exited before it printed {word:?}"))
    }

    /// Closes its standard input and waits until it exits successfully.
    pub fn wait_for_success(mut self) {
        drop(self.client.stdin.take());
        let rest = self.lines.by_ref().map_while(Result::ok);
        rest.for_each(|line| println!("{line}"));
        let status = self.client.wait().expect("wait succeeds");
        assert!(status.success(), "{status}");
    }
}

impl Drop for ClientProcess {
    fn drop(&mut self) {
        let _ = self.client.kill();
        let _ = self.client.wait();
    }
}

/// The Go client, built once.
pub fn go_client() -> &'static Path {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    BUILT.get_or_init(|| {
        let program = Path::new(env!("CARGO_TARGET_TMPDIR")).join("go-client");
        let build = ["build", "-o", program.to_str().expect("a path in UTF-8"), "."];
        run(Command::new("go").args(build).current_dir(client("go")));
        program
    })
}

/// The folder of the JavaScript client, whose packages are installed once.
pub fn js_client() -> &'static Path {
    static INSTALLED: OnceLock<PathBuf> = OnceLock::new();
    INSTALLED.get_or_init(|| {
        let folder = client("js");
        run(Command::new("npm").args(["ci", "--no-audit", "--no-fund"]).current_dir(&folder));
        folder
    })
}

/// The text within the first pair of quotes.
fn quoted(text: &str) -> &str {
    text.split('"').nth(1).expect("something in quotes")
}

fn client(language: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/env/interop").join(language)
}

/// Runs a client through one scenario with a relay of its own. The client limits the time of its steps.
async fn run_scenario((name, flags): Scenario, client: &mut Command) {
    let relay = Relay::start(flags);
    client.env("SWARM_KEY", SWARM_KEY);
    client.args([name, &relay.address.to_string()]);
    if flags.contains(&websocket::LISTEN) {
        client.arg(websocket::address(&relay, "/ws").await.to_string());
    }
    run(client);
}

pub fn run(command: &mut Command) {
    let status = command.status();
    let status = status.unwrap_or_else(|error| panic!("{command:?}: {error}; is it installed?"));
    assert!(status.success(), "{command:?}: {status}");
}
