//! The names that users of the program rely on, compared with the files in `tests/surface`: help, messages, flags,
//! variables, configuration keys, metrics, status fields, exit codes.
//!
//! To accept a change run `UPDATE_SURFACE=1 cargo test --all-features --test it surface`, and explain it in the commit.

use std::{
    collections::{BTreeMap, BTreeSet},
    env, fs,
    net::TcpListener,
    path::Path,
    process::Output,
};

use crate::{
    common::{
        Client, Relay, circuit, command,
        http::{get, port},
        output, scenario,
    },
    http::status_when,
};
use serde_json::Value;
use tempfile::TempDir;

const FILES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/surface");

const CONFIG: &str = "relaylet.toml";

/// A value that is invalid except for free text.
const INVALID: &str = "%";

/// Asserts that `actual` equals the file of this name; with `UPDATE_SURFACE` writes the file.
fn assert_golden(name: &str, actual: &str) {
    let file = Path::new(FILES).join(name);
    if env::var_os("UPDATE_SURFACE").is_some() {
        fs::create_dir_all(FILES).unwrap();
        fs::write(&file, actual).unwrap();
    }
    let expected = fs::read_to_string(&file).unwrap_or_default();
    let (before, now): (BTreeSet<_>, BTreeSet<_>) =
        (expected.lines().collect(), actual.lines().collect());
    assert!(
        expected == actual,
        "tests/surface/{name} differs.\nno longer there: {:#?}\nnew: {:#?}",
        before.difference(&now).collect::<Vec<_>>(),
        now.difference(&before).collect::<Vec<_>>()
    );
}

/// Runs the program to its end with these flags, variables, and text of a configuration file.
fn run(flags: &[&str], variables: &[(&str, &str)], file: Option<&[u8]>) -> Output {
    let folder = TempDir::new().unwrap();
    let mut command = command(&folder);
    if let Some(text) = file {
        fs::write(folder.path().join(CONFIG), text).unwrap();
        command.args(["--config", CONFIG]);
    }
    output(command.args(flags).envs(variables.iter().copied()))
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

/// Replaces the number of threads, which depends on the machine.
fn without_threads(printed: &str) -> String {
    let line = |line: &str| match line.starts_with("# threads = ") {
        true => "# threads = (half of the cores)\n".into(),
        false => format!("{line}\n"),
    };
    printed.lines().map(line).collect()
}

fn help() -> String {
    text(&run(&["--help"], &[], None).stdout)
}

/// The name and the value's placeholder of each flag in the help text, and of the hidden one.
fn flags() -> Vec<(String, String)> {
    let help = help();
    let usages = help.lines().filter_map(|line| line.strip_prefix("    "));
    let flag = |usage: &str| {
        let long = usage.split(", ").find_map(|word| word.strip_prefix("--"))?;
        let (name, rest) = long.split_once(' ').unwrap_or((long, ""));
        let takes = rest.split("  ").next().unwrap();
        Some((name.to_owned(), takes.trim_end_matches("...").to_owned()))
    };
    let mut flags: Vec<_> = usages.filter_map(flag).collect();
    flags.push(("autonat-private".into(), String::new()));
    flags
}

/// A valid value for this placeholder.
fn valid(takes: &str) -> &'static str {
    match takes {
        "" => "true",
        "<N>" => "77",
        "<SIZE>" => "77MiB",
        "<DURATION>" => "77s",
        "<SUBNET>" => "192.0.2.0/24",
        "<NAME>" => "relay.example.org",
        "<MULTIADDR>" => "/ip4/192.0.2.1/tcp/77",
        "<PEER>" => "12D3KooWPGM3wYKMsTHGEqbhcBft6cPjA2F3rQmyWTEDD3wCGS1g",
        "<FILE>" => "some.file",
        "<PROTOCOL>" => "/some/kad/1.0.0",
        "<ADDR:PORT>" => "127.0.0.1:77",
        _ => panic!("{takes}: an unknown placeholder"),
    }
}

#[test]
fn help_and_the_printed_configuration() {
    assert_golden("help.txt", &help());
    let printed = run(&["--print-config"], &[], None).stdout;
    assert_golden("print-config.toml", &without_threads(&text(&printed)));
}

#[test]
fn each_setting_as_a_flag_a_variable_and_a_key_of_the_file() {
    let mut settings = String::new();
    for (name, takes) in flags() {
        if ["config", "print-config", "help", "version"].contains(&&name[..]) {
            settings += &format!("--{name} {takes}\n");
            continue;
        }
        let variable = format!("RELAYLET_{}", name.replace('-', "_").to_uppercase());
        settings += &format!("\n--{name} {takes}, {variable}, {name}\n");
        let outcome = |output: Output| {
            let line =
                |line: &str| line.trim_start_matches("# ").starts_with(&format!("{name} = "));
            match output.status.code() {
                Some(0) => without_threads(&text(&output.stdout))
                    .lines()
                    .find(|l| line(l))
                    .unwrap_or("(not shown)")
                    .to_owned(),
                code => format!("{code:?} {}", text(&output.stderr).trim_end()),
            }
        };
        for value in [valid(&takes), INVALID, ""] {
            let flag = format!("--{name}={value}");
            let flag = outcome(run(&["--print-config", &flag], &[], None));
            let variable = outcome(run(&["--print-config"], &[(&variable, value)], None));
            let key = match (&takes[..], value) {
                ("", "true") => format!("{name} = true"),
                _ => format!("{name} = \"{value}\""),
            };
            let key = outcome(run(&["--print-config"], &[], Some(key.as_bytes())));
            settings += &format!(
                "  {value:?}\n    flag: {flag}\n    variable: {variable}\n    file: {key}\n"
            );
        }
    }
    assert_golden("settings.txt", &settings);
}

#[test]
fn errors_of_invalid_settings() {
    const PEER: &str = "12D3KooWPGM3wYKMsTHGEqbhcBft6cPjA2F3rQmyWTEDD3wCGS1g";
    let mut messages = String::new();
    let mut record = |what: String, output: Output| {
        let code = output.status.code().unwrap();
        let out = text(&output.stdout).lines().count();
        messages +=
            &format!("{what}\n  {code}, {out} lines, {}\n", text(&output.stderr).trim_end());
    };
    for flags in [
        "stray",
        "--circuit-bites=1",
        "--max-reservation 5",
        "--grase 5s",
        "-x",
        "--",
        "--listen",
        "--grace",
        "--grace --sweep 2s",
        "--grace 1s --grace 2s",
        "--grace soon",
        "--sweep 0s",
        "--circuit-bytes 99999999TiB",
        "--bandwidth-per-peer -1",
        "--reserve-rate 4294967296",
        "--max-reservations 0",
        "--max-reservations -1",
        "--max-circuits 99999999999999999999",
        "--max-connections 0",
        "--max-handshakes 0",
        "--threads 0",
        "--threads 1025",
        "--http 9180",
        "--http localhost:9180",
        "--autonat=perhaps",
        "--autonat true",
        "--autonat=false --autonat",
        "--autonat --autonat",
        "--autonat --swarm-key=some.key",
        "--dht=0",
        "--dht --idle-timeout=0s",
        "--bootstrap=/ip4/192.0.2.1/tcp/1",
        "--dht --bootstrap=/ip4/192.0.2.1/tcp/1",
        "--dht --bootstrap=/dnsaddr/bootstrap.libp2p.io",
        "--dht-protocol=kad",
        "--deny-subnet 192.0.2.1/24",
        "--proxy-protocol-from 10.0.0.1/8",
        "--proxy-protocol-from 10.0.0.1",
        "--probe 4s",
        "--heartbeat 1m",
        "--silence 30s",
        "--listen /ip4/0.0.0.0/udp/4001",
        "--listen /ip4/0.0.0.0/tcp/4001/ws/ws",
        "--listen /ip4/0.0.0.0/tcp/4001/tls",
        "--listen /dns4/example.org/tcp/4001/ws",
        "--listen /ip4/0.0.0.0/tcp/4001/tls/ws",
        "--listen 127.0.0.1:4001",
        "--tls-cert cert.pem",
        "--tls-key key.pem",
        "--announce /ip4/0.0.0.0/tcp/4001",
        "--drain 500000000000y",
        "--drain 2y",
        "--max-circuits-per-peer 70000",
        "--max-streams-per-connection 2",
        "--max-streams-per-connection 70000",
        "--max-buffered 1MB",
        "--max-buffered 67MiB",
        "--max-buffered 8MiB --max-circuits-per-peer 4",
        "--max-buffered 79MiB --max-buffered-per-connection 20MiB",
        "--max-buffered-per-connection 0",
        "--config none.toml",
        "--identity identity",
        "--identity dht=1",
        "--tls-cert tls-cert --tls-key tls-key",
        "--help --grace soon",
        "--version",
    ] {
        // `--print-config` ends the program even where nothing is wrong.
        let words: Vec<_> = std::iter::once("--print-config").chain(flags.split(' ')).collect();
        record(format!("relaylet {flags}"), run(&words, &[], None));
    }
    let both = [format!("--allow-peer={PEER}"), format!("--deny-peer={PEER}")];
    record(
        format!("relaylet {}", both.join(" ")),
        run(&["--print-config", &both[0], &both[1]], &[], None),
    );
    for (name, value) in [
        ("RELAYLET_GRACE", "soon"),
        ("RELAYLET_GRACE", ""),
        ("RELAYLET_SWEEP", "0s"),
        ("RELAYLET_MAX_CONNECTIONS", "0"),
        ("RELAYLET_LISTEN", "/ip4/127.0.0.1/tcp/0,/ip4/127.0.0.1/udp/0"),
        ("RELAYLET_DENY_SUBNET", ""),
        ("RELAYLET_DENY_SUBNET", "192.0.2.0/24,192.0.2.1/24"),
        ("RELAYLET_AUTONAT", "perhaps"),
        ("RELAYLET_AUTONAT", "1"),
        ("RELAYLET_CONFIG", "none.toml"),
        ("RELAYLET_PRINT_CONFIG", "true"),
        ("RELAYLET_GRASE", "1s"),
    ] {
        let print = &["--print-config"];
        record(
            format!("{name}={value} relaylet --print-config"),
            run(print, &[(name, value)], None),
        );
    }
    for file in [
        "\ngrase = \"1s\"",
        "\n\ngrace = 1s\n",
        "grace =",
        "grace = \"1s",
        "grace = \"1s\"\ngrace = \"2s\"",
        "grace = 5",
        "grace = true",
        "grace = 1.5",
        "grace = { a = 1 }",
        "grace = 1979-05-27",
        "grace = []",
        "grace = 0x1F",
        "[grace]\nx = 1",
        "grace = \"\\u001b[2J\"",
        "\"\\nsweep\" = 1",
        "max-reservations = -1",
        "max-reservations = 99999999999999999999",
        "# slots\nmax-reservations = 0",
        "max-reservations = 5_00",
        "max-reservations = \"500\"",
        "dht = 1",
        "dht = \"true\"",
        "deny-subnet = [true]",
        "deny-subnet = [7]",
        "deny-subnet = []",
        "deny-subnet = [[]]",
        "deny-subnet = \"192.0.2.0/24,198.51.100.0/24\"",
        "deny-subnet = [\n \"192.0.2.0/24\",\n \"192.0.2.1/24\"]",
        "deny-peer = [\n \"al\"]",
        "drain = \"2y\"",
        "max-circuits-per-peer = 70000",
        "autonat-private = true",
        "config = \"other.toml\"",
        "print-config = true",
        "\u{feff}grace = \"1s\"",
    ] {
        let output = run(&["--print-config"], &[], Some(file.as_bytes()));
        record(format!("{CONFIG}: {file:?}"), output);
    }
    record("bytes".into(), run(&["--print-config"], &[], Some(b"grace = \"1s\"\n# \xff")));
    assert_golden("messages.txt", &messages);
}

/// The name of each metric with its type, and the labels of its samples.
fn metrics(text: &str) -> String {
    let mut families: BTreeMap<&str, (&str, BTreeSet<&str>)> = BTreeMap::new();
    let mut family = "";
    for line in text.lines() {
        if let Some(declared) = line.strip_prefix("# TYPE ") {
            let (name, kind) = declared.split_once(' ').unwrap();
            (family, families.entry(name).or_default().0) = (name, kind);
        } else if !line.starts_with('#') {
            let sample = line.rsplit_once(' ').unwrap().0;
            families.get_mut(family).unwrap().1.insert(sample);
        }
    }
    let version = env!("CARGO_PKG_VERSION");
    let lines = families.into_iter().flat_map(|(name, (kind, samples))| {
        let samples =
            samples.into_iter().map(|s| format!("  {}\n", s.replace(version, "(version)")));
        std::iter::once(format!("{name} {kind}\n")).chain(samples).collect::<Vec<_>>()
    });
    lines.collect()
}

/// The paths and types of all fields of a JSON value.
fn fields(value: &Value, path: &str, found: &mut BTreeSet<String>) {
    match value {
        Value::Object(members) => {
            for (name, value) in members {
                fields(value, &format!("{path}.{name}"), found);
            }
        }
        Value::Array(items) if items.is_empty() => drop(found.insert(format!("{path}[]"))),
        Value::Array(items) => {
            items.iter().for_each(|item| fields(item, &format!("{path}[]"), found))
        }
        Value::String(_) => drop(found.insert(format!("{path}: text"))),
        Value::Number(_) => drop(found.insert(format!("{path}: number"))),
        Value::Bool(_) => drop(found.insert(format!("{path}: true or false"))),
        Value::Null => drop(found.insert(format!("{path}: null"))),
    }
}

#[tokio::test]
async fn metrics_and_status_fields() {
    let relay = scenario::relay();
    let port = port(&relay).await;
    let _still_there = scenario::run(&relay).await;
    // Fields that do not come from events are updated once a second.
    let status = status_when(port, |status| {
        status["relayed"]["to_target"] == 1704 && status["slots"]["free"] == 1
    })
    .await;
    let mut found = BTreeSet::new();
    fields(&status, "", &mut found);
    assert_golden("status.txt", &found.into_iter().map(|line| line + "\n").collect::<String>());
    assert_golden("metrics.txt", &metrics(&get(port, "/metrics").await));
}

#[tokio::test]
async fn exit_codes() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let taken = taken.local_addr().unwrap();
    let here = "--listen=/ip4/127.0.0.1/tcp/0";
    let mut codes = String::new();
    for (what, flags) in [
        ("help", &["--help"][..]),
        ("version", &["--version"]),
        ("printed configuration", &["--print-config"]),
        ("unknown flag", &["--nothing"]),
        ("bad value", &["--grace=soon"]),
        ("no configuration file", &["--config=none.toml"]),
        ("address in use", &[&format!("--listen=/ip4/127.0.0.1/tcp/{}", taken.port())]),
        ("HTTP address in use", &[here, &format!("--http={taken}")]),
        ("identity cannot be read", &[here, "--identity=."]),
        ("swarm key cannot be read", &[here, "--swarm-key=none.key"]),
        ("certificate cannot be read", &[here, "--tls-cert=none.pem", "--tls-key=none.pem"]),
    ] {
        let code = run(flags, &[], None).status.code();
        codes += &format!("{what}: {}\n", code.unwrap());
    }
    for (what, signals, with_circuit) in [
        ("SIGINT", &["INT"][..], false),
        ("SIGTERM", &["TERM"], false),
        ("second SIGTERM beside a circuit", &["TERM", "TERM"], true),
        ("SIGINT beside a circuit", &["INT"], true),
        ("SIGTERM while drained by SIGUSR1", &["USR1", "TERM"], false),
    ] {
        // With a circuit, the signal must end the drain.
        let drain = if with_circuit { "--drain=10m" } else { "--drain=1s" };
        let mut relay = Relay::start(&[drain]);
        let mut peers = (Client::connect(&relay).await, Client::connect(&relay).await);
        peers.1.reserve().await;
        let _ends = match with_circuit {
            true => Some(circuit(&mut peers.0, &mut peers.1).await),
            false => None,
        };
        for (sent, signal) in signals.iter().enumerate() {
            relay.signal(signal);
            if sent + 1 < signals.len() {
                relay.wait_for_log(&format!("SIG{signal}: draining")).await;
            }
        }
        codes += &format!("{what}: {}\n", relay.wait().code().unwrap());
    }
    assert_golden("exit-codes.txt", &codes);
}
