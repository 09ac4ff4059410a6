//! Other people's clients, as they are: go-libp2p and js-libp2p against the program.
//!
//! Without Go, or Node with npm, they fail, because a client that was not tried is not served.

mod documented;
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

use crate::common::{Relay, http, network::Network, websocket};

/// What a client does, and the flags of the relay that it does it to.
type Scenario = (&'static str, &'static [&'static str]);

const UNLIMITED: Scenario = ("unlimited", &["--circuit-bytes", "0", "--circuit-duration", "0s"]);
const LIMITED: Scenario = ("limited", &["--circuit-bytes", "128KiB", "--circuit-duration", "5s"]);
const STATUSES: Scenario = ("statuses", &["--max-circuits-per-peer", "1"]);
const WEBSOCKET: Scenario = (
    "websocket",
    &[websocket::LISTEN, "--circuit-bytes=0", "--circuit-duration=0s", "--reservation-ttl=5m"],
);

/// A private network's key; the clients find it under this name in their environment.
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
        play(scenario, &mut Command::new(program)).await;
    }
}

/// Three relays, because go-libp2p asks each no more than once in two minutes, and believes version
/// 2 when two have said the same.
#[test]
#[ignore = "needs Go, root, iproute2 and nftables"]
fn go_libp2p_learns_whether_it_can_be_reached() {
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
        let under = host.under();
        run(Command::new(&under[0]).args(&under[1..]).arg(program).arg(scenario).args(&addresses));
    }
}

/// It names no address in version 1, because it has no global one. go-libp2p asks a server that refuses it again only 90 s
/// later.
#[test]
#[ignore = "needs Go, root, iproute2 and nftables"]
fn go_libp2p_behind_a_router_learns_that_it_cannot_be_reached() {
    let program = go_client();
    let mut network = Network::of_global_addresses();
    let relays = [network.host(), network.host()].map(|host| host.relay(&["--autonat"]));
    let router = network.host();
    router.close(4001);
    let under = network.host_behind(&router).under();
    let addresses = relays.each_ref().map(|relay| relay.address.to_string());
    run(Command::new(&under[0]).args(&under[1..]).arg(program).arg("behind").args(&addresses));
}

#[test]
#[ignore = "needs Go"]
fn a_client_that_walks_a_dht_finds_a_relay_of_the_fleet_and_another_when_that_is_gone() {
    let mut client = Talking::start(Command::new(go_client()).arg("fleet"));
    let bootstrap = client.says("bootstrap ");
    let fleet = (0..3).map(|_| Relay::start(&["--dht", "--bootstrap", &bootstrap]));
    let mut fleet: Vec<_> = fleet.collect();
    let first = client.says("reserved ");
    let first = fleet.iter().position(|relay| relay.peer.to_string() == first);
    fleet.remove(first.expect("one of the fleet")).kill();
    client.ends_well();
}

#[test]
#[ignore = "needs Go"]
fn after_kill_9_under_60_clients_with_autorelay_all_are_reserved_again_and_none_is_refused() {
    const CLIENTS: usize = 60;
    let relay = Relay::start(&[]);
    let address = relay.address.to_string();
    let mut clients = Talking::start(Command::new(go_client()).args(["restart", &address]));
    clients.says("reserved");
    let listen = format!("--listen=/ip4/127.0.0.1/tcp/{}", relay.port());
    let killed = Instant::now();
    let relay = Relay::start_in(relay.kill(), &[&listen]);
    clients.says("again");
    println!(
        "kill -9 under {CLIENTS} clients of go-libp2p: all reserved again {:.1} s after it",
        killed.elapsed().as_secs_f64()
    );
    assert_eq!(relay.address.to_string(), address);
    assert_eq!(relay.count_in_log("reservation granted"), CLIENTS);
    for refused in ["refused", "rejected", "connection denied", "answer undelivered"] {
        assert_eq!(relay.count_in_log(refused), 0, "{refused}");
    }
    clients.ends_well();
}

#[tokio::test]
#[ignore = "needs Node and npm"]
async fn js_libp2p_is_served() {
    // js-libp2p asks to reserve again only when little of the term is left.
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
        play(scenario, node.arg("client.mjs").current_dir(folder)).await;
    }
}

#[tokio::test]
#[ignore = "needs Go"]
async fn the_metrics_are_those_that_go_libp2p_counts_and_its_dashboard_asks_for() {
    let go = ["list", "-m", "-f", "{{.Dir}}", "github.com/libp2p/go-libp2p"];
    let listed = Command::new("go").args(go).current_dir(client("go")).output();
    let folder = String::from_utf8(listed.expect("go is installed").stdout).expect("a path");
    let folder = Path::new(folder.trim());
    let read = |path: &str| fs::read_to_string(folder.join(path)).expect("go-libp2p's source");

    let relay = Relay::start(&[http::ANYWHERE]);
    let metrics = http::get(http::port(&relay).await, "/metrics").await;
    let samples = http::samples(&metrics);
    let is_there = |wanted: &str| {
        let there = samples.keys().any(|sample| sample.starts_with(wanted));
        assert!(there, "{wanted}: {metrics}");
    };

    // The names, each with its label; the phrases.
    let source = read("p2p/protocol/circuitv2/relay/metrics.go");
    let mut declared = 0;
    for declaration in source.split("prometheus.New").skip(1) {
        let name = quoted(declaration.split_once("Name:").expect("a name").1);
        let end = declaration.find("\n\t)").expect("the end");
        let label = declaration[..end].split_once("[]string{");
        match label {
            Some((_, label)) => {
                is_there(&format!("libp2p_relaysvc_{name}{{{}=", quoted(label)));
            }
            None if declaration.starts_with("Histogram") => {
                is_there(&format!("libp2p_relaysvc_{name}_sum"));
                is_there(&format!("libp2p_relaysvc_{name}_count"));
                is_there(&format!("libp2p_relaysvc_{name}_bucket{{le="));
            }
            None => is_there(&format!("libp2p_relaysvc_{name}")),
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
        let said = metrics.lines().any(|line| {
            line.starts_with("libp2p_relaysvc_") && line.contains(&format!("=\"{phrase}\"}}"))
        });
        assert!(said, "{phrase}: {metrics}");
    }

    // What the dashboard asks for, but for the instance, which is Prometheus's.
    let dashboard = read("dashboards/relaysvc/relaysvc.json");
    let questions = dashboard.lines().filter(|line| line.contains("\"expr\":"));
    let mut asked = 0;
    for question in questions {
        for metric in question.split("libp2p_relaysvc_").skip(1) {
            let (name, labels) = metric.split_once('{').expect("labels");
            match labels.split_once("type=\\\"") {
                Some((_, kind)) => {
                    let kind = kind.split('\\').next().expect("a value");
                    is_there(&format!("libp2p_relaysvc_{name}{{type=\"{kind}\"}}"));
                }
                None => is_there(&format!("libp2p_relaysvc_{name}")),
            }
            asked += 1;
        }
    }
    assert!(asked >= 14, "{asked}");
}

#[tokio::test]
async fn the_metrics_are_parsed_by_prometheus_own_parser() {
    use std::io::Write;

    let relay = Relay::start(&[http::ANYWHERE]);
    let port = http::port(&relay).await;
    let answer = http::ask_with(port, "GET", "/metrics", "Host: localhost").await;
    assert_eq!(answer.headers["content-type"], "text/plain; version=0.0.4; charset=utf-8");
    let mut parser = Command::new(go_client())
        .arg("metrics")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("it starts");
    let mut input = parser.stdin.take().expect("it is piped");
    input.write_all(answer.body.as_bytes()).expect("it reads");
    drop(input);
    let output = parser.wait_with_output().expect("it ends");
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

/// A client that says when it wants something done.
struct Talking {
    client: Child,
    lines: Lines<BufReader<ChildStdout>>,
}

impl Talking {
    fn start(client: &mut Command) -> Self {
        let mut client = client.stdout(Stdio::piped()).spawn().expect("it starts");
        let output = client.stdout.take().expect("it is piped");
        let lines = BufReader::new(output).lines();
        Self { client, lines }
    }

    /// What it says behind `word`, once it says that. It bounds its steps itself.
    fn says(&mut self, word: &str) -> String {
        let mut lines = self.lines.by_ref().map_while(Result::ok);
        let found = lines.find_map(|line| {
            println!("{line}");
            Some(line.strip_prefix(word)?.to_owned())
        });
        found.unwrap_or_else(|| panic!("the client ended before it said {word:?}"))
    }

    /// One that waits for the end of its input goes now.
    fn ends_well(mut self) {
        drop(self.client.stdin.take());
        let rest = self.lines.by_ref().map_while(Result::ok);
        rest.for_each(|line| println!("{line}"));
        let status = self.client.wait().expect("it ends");
        assert!(status.success(), "{status}");
    }
}

impl Drop for Talking {
    fn drop(&mut self) {
        let _ = self.client.kill();
        let _ = self.client.wait();
    }
}

/// The Go client, built once.
fn go_client() -> &'static Path {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    BUILT.get_or_init(|| {
        let program = Path::new(env!("CARGO_TARGET_TMPDIR")).join("go-client");
        let build = ["build", "-o", program.to_str().expect("a path in UTF-8"), "."];
        run(Command::new("go").args(build).current_dir(client("go")));
        program
    })
}

/// The folder of the JavaScript client, with what it needs, which is installed once.
fn js_client() -> &'static Path {
    static INSTALLED: OnceLock<PathBuf> = OnceLock::new();
    INSTALLED.get_or_init(|| {
        let folder = client("js");
        run(Command::new("npm").args(["ci", "--no-audit", "--no-fund"]).current_dir(&folder));
        folder
    })
}

/// What stands in the first quotes.
fn quoted(text: &str) -> &str {
    text.split('"').nth(1).expect("something in quotes")
}

fn client(language: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/env/interop").join(language)
}

/// Runs a client through one scenario with a relay of its own. It bounds its steps itself.
async fn play((name, flags): Scenario, client: &mut Command) {
    let relay = Relay::start(flags);
    client.env("SWARM_KEY", SWARM_KEY);
    client.args([name, &relay.address.to_string()]);
    if flags.contains(&websocket::LISTEN) {
        client.arg(websocket::address(&relay, "/ws").await.to_string());
    }
    run(client);
}

fn run(command: &mut Command) {
    let status = command.status();
    let status = status.unwrap_or_else(|error| panic!("{command:?}: {error}; is it installed?"));
    assert!(status.success(), "{command:?}: {status}");
}
