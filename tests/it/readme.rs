//! The documentation: every command and every configuration in it is run, or checked with the parser of the program
//! that it is for. A block of an unknown kind fails. Go, JavaScript and the configurations of proxies are run by
//! `tests/env`.

mod commands;
mod flags;

use std::{fs, path::Path};

use libp2p::{
    Multiaddr,
    relay::outbound::hop::{ConnectError, ReserveError},
};
use tempfile::TempDir;

use self::commands::{check_command, check_metrics, check_toml};
use crate::common::{
    Relay,
    http::{self, fetch},
    pages::{PAGES, blocks, commands, exists, parse, read, rows, spans, table_rows},
};

/// The most lines of the README.
const MOST_LINES: usize = 220;

#[test]
fn the_readme_is_short() {
    let lines = read("README.md").lines().count();
    assert!(lines <= MOST_LINES, "{lines} lines, at most {MOST_LINES}");
}

#[tokio::test]
async fn each_block_is_run_or_checked() {
    let mut problems = Vec::new();
    for page in PAGES {
        let (blocks, prose) = parse(page);
        let pairs = prose.lines().zip(prose.lines().skip(1));
        let unfenced = pairs.filter(|(one, next)| one.is_empty() && next.starts_with("    "));
        problems
            .extend(unfenced.map(|(_, line)| format!("{page}: a block without a fence: {line}")));
        for block in blocks {
            let text = &block.text;
            let found = match &block.language[..] {
                "sh" => {
                    commands(text).iter().filter_map(|line| check_command(line).err()).collect()
                }
                "toml" => Vec::from_iter(check_toml(text).err()),
                "text" => Vec::from_iter(check_text(text).await.err()),
                // tests/env: interop.rs, deploy.rs and alerts.rs
                "go" | "js" if page == "src/doc/clients.md" => vec![],
                "haproxy" | "nginx" | "yaml" if page == "src/doc/operating.md" => vec![],
                other => vec![format!("{other:?} is not known to any test")],
            };
            problems.extend(found.into_iter().map(|why| format!("{}: {why}", block.place)));
        }
    }
    assert!(problems.is_empty(), "{problems:#?}");
    let kinds = ["go", "js", "haproxy", "nginx", "yaml"];
    assert_eq!(kinds.map(|kind| blocks(kind).len()), [1, 1, 1, 2, 1]);
}

/// What the relay logs, or a figure.
async fn check_text(text: &str) -> Result<(), String> {
    let (line, rest) = text.split_once('\n').ok_or("is empty")?;
    if line.contains('→') {
        return Ok(()); // a figure
    }
    let steps = ["tcp ", "secure ", "identify ", "reserve ", "  "];
    if text.lines().all(|line| steps.iter().any(|step| line.starts_with(step))) {
        return Ok(()); // steps of `relaylet check`: see check.rs
    }
    if !rest.is_empty() {
        return Err("more than one line of the log".into());
    }
    let address = line.rsplit(' ').next().unwrap_or_default();
    if !address.starts_with('/') {
        Relay::start(&["--threads", "1"]).wait_for_log(line).await;
        return Ok(());
    }
    // On this machine no client is in the same network.
    let _: Multiaddr = address.parse().map_err(|error| format!("{address}: {error}"))?;
    let source = read("src/program/cli/startup_log.rs");
    let parts = ["\" in the same network\"", "{clients} reach it at {address}"];
    let is_as_logged = line.starts_with("clients in the same network reach it at /");
    match is_as_logged && parts.iter().all(|part| source.contains(part)) {
        true => Ok(()),
        false => Err(format!("not logged: {line}")),
    }
}

#[test]
fn the_alerts_are_those_of_the_documentation_and_about_metrics_that_exist() {
    let alerts = read("tests/deploy/alerts.yml");
    let values = |key: &str| {
        let value = |line: &str| line.trim_start().strip_prefix(key).map(str::to_owned);
        alerts.lines().filter_map(value).collect::<Vec<_>>()
    };
    let documented = rows("src/doc/operating.md").into_iter().map(|(name, _)| name);
    let documented: Vec<_> = documented.filter(|name| name.starts_with("Relaylet")).collect();
    assert_eq!(values("- alert: "), documented);
    let expressions = values("expr: ");
    assert_eq!(expressions.len(), documented.len());
    let problems: Vec<_> = expressions.iter().filter_map(|e| check_metrics(e).err()).collect();
    assert!(problems.is_empty(), "{problems:#?}");
}

#[test]
fn each_code_span_names_something_that_exists() {
    let all = PAGES.iter().flat_map(|page| spans(page).into_iter().map(move |span| (page, span)));
    let problem = |(page, span): (_, String)| {
        let why = commands::check_span(&span).err()?;
        Some(format!("{page}: `{span}`: {why}"))
    };
    let problems: Vec<_> = all.filter_map(problem).collect();
    assert!(problems.is_empty(), "{problems:#?}");
}

#[test]
fn each_link_to_a_file_leads_somewhere() {
    for page in PAGES {
        let folder = Path::new(page).parent().unwrap();
        let text = read(page);
        let inline = text.split("](").skip(1).filter_map(|rest| rest.split(')').next());
        let definitions =
            text.lines().filter_map(|line| line.strip_prefix('[')?.split("]: ").nth(1));
        for target in inline.chain(definitions).filter(|target| !target.contains("://")) {
            let path = folder.join(target);
            assert!(exists(path.to_str().unwrap()), "{page}: {target}");
        }
    }
}

#[tokio::test]
async fn the_endpoints_are_served() {
    let relay = Relay::start(&[http::ON_ANY_PORT]);
    let port = http::port(&relay).await;
    let mut asked = 0;
    for command in blocks("sh").iter().flat_map(|block| commands(&block.text)) {
        if let Some((_, path)) = command.split_once("curl").and(command.split_once(":9180")) {
            assert_eq!(fetch(port, "GET", path).await.status, 200, "{command}");
            asked += 1;
        }
    }
    assert!(asked >= 3, "{asked}");
}

#[test]
fn the_errors_listed_for_rust_clients_are_those_of_the_library() {
    let texts = [
        ConnectError::NoReservation.to_string(),
        ConnectError::PermissionDenied.to_string(),
        ConnectError::ResourceLimitExceeded.to_string(),
        ReserveError::Refused.to_string(),
    ];
    let rows = table_rows("src/doc/clients.md").into_iter();
    let rows = rows.skip_while(|cells| cells[0] != "the target holds no slot");
    let documented: Vec<_> = rows.take(4).map(|cells| cells[3].replace('`', "")).collect();
    assert_eq!(documented, texts);
}

#[tokio::test]
async fn the_limits_of_a_small_device_fit_into_its_memory() {
    let readme = parse("README.md");
    let all = readme.0.iter().flat_map(|block| commands(&block.text));
    let command = all.into_iter().find(|command| command.contains("--memory 24MiB")).unwrap();
    let flags: Vec<_> = command.split_whitespace().skip(1).collect();
    let line = Relay::start(&flags).wait_for_log(" MiB under these limits").await;
    let (_, rest) = line.split_once("at most ").unwrap();
    let mib: u64 = rest.split(' ').next().unwrap().parse().unwrap();
    assert!((22..=24).contains(&mib), "{line}");
}

#[cfg(unix)]
#[tokio::test]
async fn the_documented_commands_make_swarm_keys_that_the_relay_accepts() {
    use std::os::unix::fs::PermissionsExt;

    let all = blocks("sh");
    let all = all.iter().flat_map(|block| commands(&block.text));
    let made: Vec<_> = all.filter(|command| command.ends_with("> swarm.key)")).collect();
    assert_eq!(made.len(), 2, "{made:#?}");
    let mut keys = Vec::new();
    for command in made {
        let folder = TempDir::new().unwrap();
        let shell =
            std::process::Command::new("sh").args(["-c", &command]).current_dir(&folder).status();
        assert!(shell.unwrap().success(), "{command}");
        let file = folder.path().join("swarm.key");
        assert_eq!(fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);
        keys.push(fs::read(file).unwrap());
        let relay =
            Relay::start_in(folder, &["--listen=/ip4/127.0.0.1/tcp/0", "--swarm-key=swarm.key"]);
        relay.wait_for_log("private network ").await;
        assert_eq!(relay.count_in_log("WARN"), 0, "{:#?}", relay.log());
    }
    assert_ne!(keys[0], keys[1]);
}
