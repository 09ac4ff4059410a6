//! One command, or one code span, of the documentation.

use std::{fs, path::Path, process::Command};

use libp2p::Multiaddr;
use tempfile::TempDir;

use crate::common::{
    command, output,
    pages::{blocks, exists, read},
};

/// Flags in the pages that are not the relay's: of other programs, and of the benchmarks.
const FLAGS_OF_OTHERS: [&str; 5] =
    ["network", "no-healthcheck", "publish", "quick", "stop-timeout"];

/// Variables with the prefix of settings that belong to no flag.
const OTHER_VARIABLES: [&str; 3] =
    ["RELAYLET_IDENTITY_KEY", "RELAYLET_ATTACKS", "RELAYLET_PROGRAM"];

type Checked = Result<(), String>;

fn ensure(holds: bool, why: impl FnOnce() -> String) -> Checked {
    if holds { Ok(()) } else { Err(why()) }
}

/// Runs the program with these words and variables, and `--print-config`, so that it parses and checks them.
///
/// `relaylet.toml` is the README's, unless there is a `file`.
fn print_config(words: &[&str], variables: &[(&str, &str)], file: Option<&str>) -> Checked {
    let folder = TempDir::new().unwrap();
    let readme = &blocks("toml")[0].text;
    fs::write(folder.path().join("relaylet.toml"), file.unwrap_or(readme)).unwrap();
    let mut command = command(&folder);
    command.args(words);
    if !words.contains(&"--print-config") {
        command.arg("--print-config");
    }
    // Where the service has it.
    command.envs(variables.iter().map(|(name, value)| (name, value.replace("/etc/", ""))));
    let output = output(&mut command);
    let errors = String::from_utf8_lossy(&output.stderr);
    ensure(output.status.success() && errors.is_empty(), || errors.into_owned())
}

/// A configuration: of the relay, or the dependency of a crate that embeds it.
pub fn check_toml(text: &str) -> Checked {
    if !text.contains("[dependencies]") {
        return print_config(&["--config", "relaylet.toml"], &[], Some(text));
    }
    // Cargo resolves it, beside a clone of this repository.
    let folder = TempDir::new().unwrap();
    let path = |name: &str| folder.path().join(name);
    let text = text.replace("../relaylet", env!("CARGO_MANIFEST_DIR"));
    let package = "[package]\nname = \"embedder\"\nversion = \"0.1.0\"\nedition = \"2024\"\n\n";
    fs::write(path("Cargo.toml"), format!("{package}{text}")).unwrap();
    fs::create_dir(path("src")).unwrap();
    fs::write(path("src/lib.rs"), "").unwrap();
    fs::copy(Path::new(env!("CARGO_MANIFEST_DIR")).join("Cargo.lock"), path("Cargo.lock")).unwrap();
    let tree = ["tree", "--offline", "--edges", "normal", "--prefix", "none", "--depth", "1"];
    let output = Command::new(env!("CARGO")).args(tree).current_dir(&folder).output().unwrap();
    let (said, errors) =
        (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    ensure(output.status.success() && said.contains("relaylet v"), || errors.into_owned())
}

/// A line for a shell.
pub fn check_command(line: &str) -> Checked {
    // Two commands that a test runs as they are.
    if line.ends_with("> swarm.key)") {
        return Ok(());
    }
    if line.starts_with("install -m 644 ") {
        return run_the_deploy_hook(line);
    }
    let mut parts = line.split(" && ").map(|part| part.split(" | ").next().unwrap());
    parts.try_for_each(check_one).map_err(|why| format!("{line}: {why}"))
}

fn check_one(line: &str) -> Checked {
    let mut words: Vec<&str> = line.split_whitespace().filter(|word| *word != "sudo").collect();
    let is_variable = |word: &&str| {
        let name = word.split_once('=').map(|(name, _)| name);
        name.is_some_and(|name| name.chars().all(|c| c.is_ascii_uppercase() || c == '_'))
    };
    let assigned = words.iter().take_while(|word| is_variable(word)).count();
    let variables: Vec<_> =
        words.drain(..assigned).filter_map(|word| word.split_once('=')).collect();
    let (program, rest) = words.split_first().ok_or("no command")?;
    let known_file = |path: &str| ensure(exists(path), || format!("there is no {path}"));
    match (*program, rest) {
        ("relaylet", ["check", words @ ..]) => {
            let address = words.iter().find(|word| **word != "--quick").ok_or("no address")?;
            address.parse::<Multiaddr>().map(drop).map_err(|error| error.to_string())
        }
        ("relaylet", ["id"] | ["id", "--import", "FILE"]) => Ok(()),
        ("relaylet", flags) => print_config(flags, &variables, None),
        ("cargo", words) => check_cargo(words),
        ("docker", ["build", options @ .., "--tag", "relaylet", "--file", file, "."]) => {
            known_file(file)?;
            check_build_arguments(options, &read(file))
        }
        ("docker", ["run", words @ .., "relaylet"]) => {
            let settings = words.iter().filter_map(|word| word.split_once('='));
            print_config(&[], &settings.collect::<Vec<_>>(), None)
        }
        ("install", ["target/release/relaylet", "/usr/local/bin/"]) => Ok(()),
        ("cp", [unit, "/etc/systemd/system/"]) => known_file(unit),
        ("systemctl", ["enable", "--now", "relaylet"] | ["status" | "reload", "relaylet"]) => {
            Ok(())
        }
        ("apt", ["install", packages @ ..]) => {
            let installed = read(".ci/env");
            let missing = packages.iter().find(|package| !installed.contains(*package));
            ensure(missing.is_none(), || format!("{missing:?} is not in .ci/env"))
        }
        // `readme.rs` fetches these.
        ("curl", [.., url]) => {
            ensure(url.starts_with("http://127.0.0.1:9180/"), || "no URL".into())
        }
        ("go", ["mod", "init", _] | ["mod", "tidy"] | ["get", _]) => Ok(()),
        ("go", ["run", ".", address]) | ("node", ["main.mjs", address]) => {
            address.parse::<Multiaddr>().map(drop).map_err(|error| error.to_string())
        }
        ("npm", ["install", packages @ ..]) => {
            let tested = read("tests/env/interop/js/package.json");
            let missing = packages.iter().find(|name| !tested.contains(&format!("\"{name}\"")));
            ensure(missing.is_none(), || format!("{missing:?} is not tested"))
        }
        (script, words) if script.starts_with(".ci/") => {
            known_file(script)?;
            match (script, words) {
                (".ci/fuzz", [target, ..]) => known_file(&format!("tests/corpus/{target}")),
                (".ci/compare", [_, bench, ..]) => check_target("bench", bench),
                (".ci/env", [name]) => check_filter("env", name),
                (".ci/attacks", flags) => {
                    ensure(flags.iter().all(|flag| flag.starts_with("--")), || "no flags".into())
                }
                _ => ensure(words.is_empty(), || "words that no test knows".into()),
            }
        }
        _ => Err("a command that no test knows".into()),
    }
}

/// The features, profiles, targets and tests that a command of cargo names exist.
fn check_cargo(words: &[&str]) -> Checked {
    let manifest = read("Cargo.toml");
    let own = words.split(|word| *word == "--").next().unwrap_or_default();
    let (verb, mut own) = own.split_first().ok_or("no verb")?;
    ensure(["bench", "build", "doc", "install", "run", "test", "tree"].contains(verb), || {
        (*verb).into()
    })?;
    let mut target = "";
    while let Some((word, rest)) = own.split_first() {
        own = rest;
        let mut value = || own.split_off_first().copied().ok_or(format!("{word} lacks a value"));
        match *word {
            "--release" | "--locked" | "--all-features" | "--no-default-features" | "--open" => {}
            "--path" => ensure(value()? == ".", || "another path".into())?,
            "--features" => check_features(value()?)?,
            "--profile" => {
                let profile = value()?;
                ensure(manifest.contains(&format!("[profile.{profile}]")), || profile.into())?;
            }
            "--bench" | "--example" | "--test" => {
                target = value()?;
                check_target(word.trim_start_matches('-'), target)?;
            }
            filter if !filter.starts_with('-') && *verb == "test" => check_filter(target, filter)?,
            other => return Err(format!("{other}: no test knows it")),
        }
    }
    let mut behind = words.split(|word| *word == "--").skip(1).flatten();
    match *verb == "test" {
        true => behind
            .find(|word| !word.starts_with("--"))
            .map_or(Ok(()), |filter| check_filter(target, filter)),
        false => Ok(()),
    }
}

fn check_features(names: &str) -> Checked {
    let manifest = read("Cargo.toml");
    let mut names = names.split(',');
    let unknown = names.find(|name| !manifest.contains(&format!("\n{name} = [")));
    ensure(unknown.is_none(), || format!("no feature {unknown:?}"))
}

/// The Dockerfile takes each of these arguments and uses it.
fn check_build_arguments(options: &[&str], dockerfile: &str) -> Checked {
    for option in options.chunks(2) {
        let ["--build-arg", argument] = option else { return Err(format!("{option:?}")) };
        let (name, value) = argument.split_once('=').ok_or("no value")?;
        let uses = [format!("\nARG {name}\n"), format!("\"${name}\"")];
        ensure(uses.iter().all(|text| dockerfile.contains(text)), || {
            format!("{name} is not used")
        })?;
        if name == "FEATURES" {
            check_features(value)?;
        }
    }
    Ok(())
}

fn check_target(kind: &str, name: &str) -> Checked {
    let manifest = read("Cargo.toml");
    let is_declared = manifest.contains(&format!("[[{kind}]]\nname = \"{name}\"\n"));
    ensure(is_declared, || format!("no {kind} {name}"))
}

/// Whether this selects tests of a target: those of a file, or some whose names begin with it.
fn check_filter(target: &str, filter: &str) -> Checked {
    let module = filter.trim_end_matches("::");
    let has = |path: String| {
        exists(&path) && (filter.ends_with("::") || read(&path).contains(&format!("fn {filter}")))
    };
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests").join(target);
    let files = fs::read_dir(folder).map_err(|error| error.to_string())?;
    let mut names = files.map(|file| file.unwrap().file_name().into_string().unwrap());
    let is_file = exists(&format!("tests/{target}/{module}.rs"));
    let is_test = names.any(|name| name.ends_with(".rs") && has(format!("tests/{target}/{name}")));
    let is_found = if filter.ends_with("::") { is_file } else { is_file || is_test };
    ensure(is_found, || format!("no test {filter} in {target}"))
}

/// Runs it with a certificate in a folder, as certbot would.
fn run_the_deploy_hook(line: &str) -> Checked {
    let (lineage, to) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    for name in ["fullchain.pem", "privkey.pem"] {
        fs::write(lineage.path().join(name), name).unwrap();
    }
    let line = line.replace("/var/lib/relaylet/", to.path().to_str().unwrap());
    let status =
        Command::new("sh").args(["-c", &line]).env("RENEWED_LINEAGE", lineage.path()).status();
    ensure(status.unwrap().success() && to.path().join("privkey.pem").exists(), || "fails".into())
}

/// What stands between backticks: a command, flags, a variable, a line of the file, a metric, or a file of the repository,
/// if it looks like one.
pub fn check_span(span: &str) -> Checked {
    let is_example = span.contains(['…', '<']);
    let first = span.split([' ', '=', '{']).next().unwrap_or_default();
    let help = read("tests/surface/help.txt");
    let known = |name: &str| {
        let usage = format!("    --{name}");
        help.lines()
            .filter_map(|line| line.strip_prefix(&usage))
            .any(|rest| !rest.starts_with(name_character))
    };
    if ["relaylet", "cargo", "docker", ".ci/env", ".ci/fuzz", ".ci/attacks"].contains(&first) {
        let is_command = span != first && !span.contains("COMMIT");
        return if is_command { check_command(span) } else { Ok(()) };
    }
    if let Some(name) = first.strip_prefix("--").filter(|name| !name.is_empty()) {
        let is_of_others = FLAGS_OF_OTHERS.contains(&name);
        ensure(known(name) || is_of_others, || "no such flag".into())?;
        let has_value = span != first && !is_example && !is_of_others;
        let words: Vec<_> = span.split(' ').collect();
        return if has_value { print_config(&words, &[], None) } else { Ok(()) };
    }
    if first.starts_with("RELAYLET_") && !is_example && !OTHER_VARIABLES.contains(&first) {
        let name = first.trim_start_matches("RELAYLET_").to_lowercase().replace('_', "-");
        ensure(known(&name), || "no such setting".into())?;
        return match span.split_once('=') {
            Some(setting) => print_config(&[], &[setting], None),
            None => Ok(()),
        };
    }
    if span.contains("relaylet_") {
        return check_metrics(span);
    }
    if known(first) && span.contains(" = ") {
        return check_toml(span);
    }
    let is_path = ["src/", "tests/", ".ci/"].iter().any(|folder| span.starts_with(folder));
    let path = first.trim_end_matches("*.rs");
    ensure(!is_path || exists(path), || "no such file".into())
}

fn name_character(c: char) -> bool {
    c.is_ascii_lowercase() || c == '-'
}

/// Each metric of the relay and of its process exists, with these labels.
pub fn check_metrics(span: &str) -> Checked {
    // The certificate's is there only with one.
    let (golden, source) = (read("tests/surface/metrics.txt"), read("src/program/http/metrics.rs"));
    let word = |c: char| c.is_ascii_lowercase() || c == '_';
    let names = ["relaylet_", "process_"].into_iter().flat_map(|prefix| span.match_indices(prefix));
    for (start, _) in names {
        let part = &span[start..];
        let (name, labels) = part.split_at(part.find(|c| !word(c)).unwrap_or(part.len()));
        let is_sample = |line: &&str| line.trim_start().split('{').next() == Some(name);
        let samples = || golden.lines().filter(is_sample);
        let of_certificate = || {
            let name = name.trim_start_matches("relaylet_").trim_end_matches("_seconds");
            source.contains(&format!("\"{name}\""))
        };
        let is_known = samples().next().is_some() || of_certificate();
        ensure(is_known, || format!("no metric {name}"))?;
        let labels = labels.strip_prefix('{').and_then(|rest| rest.split('}').next()).unwrap_or("");
        for label in labels.split(',').filter(|label| !label.is_empty()) {
            // Of one of Prometheus's patterns, the text in front of the wildcard is looked up.
            let wanted = label.replace("=~", "=").replace(".*\"", "");
            // Prometheus adds the job.
            let is_there = wanted.starts_with("job=") || samples().any(|s| s.contains(&wanted));
            ensure(is_there, || format!("{name} has no {wanted}"))?;
        }
    }
    Ok(())
}
