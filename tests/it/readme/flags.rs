//! The table of all flags: compared with `--help`, and with what a reload changes.

use std::{
    collections::BTreeMap,
    fs,
    time::{Duration, Instant},
};

use tempfile::TempDir;
use tokio::time::sleep;

use crate::common::{Relay, TEST_TIMEOUT, command, pages::rows};

const PAGE: &str = "src/doc/flags.md";
const FILE: &str = "relaylet.toml";
const OTHER_PEER: &str = "16Uiu2HAm2iq9DHwUkQRFmWLj4JVH9f6VB4j1K8TZ6qBqpUMwvvNi";
const PEER: &str = "12D3KooWPGM3wYKMsTHGEqbhcBft6cPjA2F3rQmyWTEDD3wCGS1g";

/// The flags with what they take, and their defaults, as `--help` has them.
fn flags_of_help() -> BTreeMap<String, String> {
    let output = command(&TempDir::new().unwrap()).arg("--help").output().unwrap();
    let help = String::from_utf8(output.stdout).unwrap();
    let flag = |line: &str| {
        let usage = line.strip_prefix("    --")?;
        let (usage, default) = usage.split_once("  [default: ").unwrap_or((usage, "]"));
        Some((format!("--{usage}"), default.trim_end_matches(']').to_owned()))
    };
    help.lines().filter_map(flag).collect()
}

#[test]
fn each_flag_of_the_help_is_in_the_table_with_its_default_and_no_other() {
    let rows = rows(PAGE).into_iter().map(|(flag, cells)| (flag, cells[0].replace('`', "")));
    assert_eq!(rows.collect::<BTreeMap<_, _>>(), flags_of_help());
}

#[test]
fn the_readme_says_the_same_of_the_flags_that_it_names() {
    let change_of = |cells: &[String]| cells[1].clone();
    let all: BTreeMap<_, _> = rows(PAGE)
        .into_iter()
        .map(|(flag, cells)| (flag.split(' ').next().unwrap().to_owned(), change_of(&cells)))
        .collect();
    let named: Vec<_> =
        rows("README.md").into_iter().filter(|(flag, _)| flag.starts_with("--")).collect();
    assert_eq!(named.len(), 14);
    for (flag, cells) in named {
        assert_eq!(Some(&change_of(&cells)), all.get(&flag), "{flag}");
    }
}

/// Values that differ from the defaults, and are valid together.
fn changed(name: &str, takes: &str) -> String {
    let special = match name {
        "max-buffered" => "\"800MiB\"",
        "max-buffered-per-connection" => "\"77MiB\"",
        "silence" => "\"5m\"",
        "probe" => "\"2s\"",
        "allow-peer" => "[]",
        "deny-peer" => &format!("\"{OTHER_PEER}\""),
        "deny-subnet" => "\"198.51.100.0/24\"",
        // Enough for all others.
        "memory" => "\"64GiB\"",
        "bootstrap" => &format!("\"/ip4/192.0.2.1/tcp/77/p2p/{PEER}\""),
        _ => "",
    };
    if !special.is_empty() {
        return special.into();
    }
    match takes.trim_end_matches("...") {
        "" => "true",
        "<N>" => "77",
        "<SIZE>" => "\"77MiB\"",
        "<DURATION>" => "\"77s\"",
        "<SUBNET>" => "\"192.0.2.0/24\"",
        "<NAME>" => "\"relay.example.org\"",
        "<MULTIADDR>" => "\"/ip4/192.0.2.1/tcp/77\"",
        "<PEER>" => return format!("\"{PEER}\""),
        "<FILE>" => "\"some.file\"",
        "<PROTOCOL>" => "\"/some/kad/1.0.0\"",
        "<ADDR:PORT>" => "\"127.0.0.1:77\"",
        _ => panic!("{name} {takes}: no value is known"),
    }
    .into()
}

/// Replaces the configuration file of a relay, and has it reloaded.
async fn reload(relay: &Relay, file: &str) {
    let of_any = ["SIGHUP: changed:", "SIGHUP: no setting has changed"];
    let reloads = || of_any.map(|line| relay.count_in_log(line)).iter().sum::<usize>();
    let (so_far, start) = (reloads(), Instant::now());
    fs::write(relay.folder.path().join(FILE), file).unwrap();
    relay.signal("HUP");
    while reloads() == so_far {
        let problems = relay.count_in_log("keeping the previous settings");
        assert!(problems == 0 && start.elapsed() < TEST_TIMEOUT, "{:#?}", relay.log());
        sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn each_setting_is_changed_live_or_by_a_restart_as_the_table_says() {
    // `--config` and `--print-config` are not settings.
    let settings: Vec<_> = rows(PAGE)
        .into_iter()
        .filter(|(flag, _)| flag != "--config <FILE>" && flag != "--print-config")
        .map(|(flag, cells)| {
            let (name, takes) = flag.split_once(' ').unwrap_or((&flag, ""));
            (name.trim_start_matches("--").to_owned(), takes.to_owned(), cells[1].clone())
        })
        .collect();
    let folder = TempDir::new().unwrap();
    // A list of allowed peers that becomes empty: with one, and a denied peer, no other could be allowed to connect.
    let file = format!("listen = \"/ip4/127.0.0.1/tcp/0\"\nallow-peer = \"{OTHER_PEER}\"\n");
    fs::write(folder.path().join(FILE), file).unwrap();
    let relay = Relay::start_in(folder, &["--config", FILE]);

    // AutoNAT and a private network exclude each other.
    for excluded in ["autonat", "swarm-key"] {
        let others = settings.iter().filter(|(name, ..)| name != excluded);
        let lines = others.map(|(name, takes, _)| format!("{name} = {}\n", changed(name, takes)));
        reload(&relay, &lines.collect::<String>()).await;
    }

    let mut found = BTreeMap::new();
    for line in relay.log() {
        let Some((_, said)) = line.split_once("SIGHUP: ") else { continue };
        if let Some(name) = said.strip_suffix(" requires a restart") {
            found.entry(name.to_owned()).or_insert("restart");
        }
        for name in said.strip_prefix("changed: ").into_iter().flat_map(|names| names.split(", ")) {
            found.entry(name.to_owned()).or_insert("live");
        }
    }
    let differing =
        settings.iter().filter(|(name, _, change)| found.get(name) != Some(&&change[..]));
    let differing: Vec<_> = differing.map(|(name, _, change)| (name, change)).collect();
    assert!(differing.is_empty(), "the table says {differing:?}; the relay {found:?}");
}
