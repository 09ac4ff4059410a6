//! The Go and JavaScript programs in the documentation, unchanged: they reserve and ping through the relay, and print the
//! documented errors when they are refused.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    sync::OnceLock,
};

use libp2p::identity::Keypair;

use super::{ClientProcess, SWARM_KEY, client, js_client, run};
use crate::common::{
    Client, Relay, circuit,
    pages::{blocks, table_rows},
};

const PAGE: &str = "src/doc/clients.md";

/// A program of the page, and the command that starts it there.
struct Program {
    start: Vec<PathBuf>,
    as_documented: &'static str,
    folder: PathBuf,
}

impl Program {
    /// The Go program, with the releases that the client beside it is tested with.
    fn go() -> &'static Self {
        static BUILT: OnceLock<Program> = OnceLock::new();
        BUILT.get_or_init(|| {
            let folder = folder("documented-go");
            fs::write(folder.join("main.go"), source("go")).expect("room for it");
            for file in ["go.mod", "go.sum"] {
                fs::copy(client("go").join(file), folder.join(file)).expect("a copy");
            }
            run(Command::new("go").args(["build", "-o", "program"]).current_dir(&folder));
            let unformatted =
                output(Command::new("gofmt").args(["-l", "main.go"]).current_dir(&folder));
            assert_eq!(printed_text(&unformatted), "");
            Self { start: vec![folder.join("program")], as_documented: "go run . ", folder }
        })
    }

    /// The JavaScript program, with the packages that the client beside it is tested with.
    #[cfg(unix)]
    fn js() -> &'static Self {
        static INSTALLED: OnceLock<Program> = OnceLock::new();
        INSTALLED.get_or_init(|| {
            let (folder, packages) = (folder("documented-js"), js_client().join("node_modules"));
            fs::write(folder.join("main.mjs"), source("js")).expect("room for it");
            let _ = std::os::unix::fs::symlink(&packages, folder.join("node_modules"));
            let start = vec![packages.join(".bin/node"), "main.mjs".into()];
            Self { start, as_documented: "node main.mjs ", folder }
        })
    }

    fn command(&self, address: &str) -> Command {
        let mut command = Command::new(&self.start[0]);
        command.args(&self.start[1..]).arg(address).current_dir(&self.folder).stdin(Stdio::null());
        command
    }

    /// A peer that holds a slot, and the address that it prints.
    fn reserve(&self, relay: &str) -> (ClientProcess, String) {
        let mut target = ClientProcess::start(&mut self.command(relay));
        let address = target.read_value(&format!("reach me: {}", self.as_documented));
        (target, address)
    }

    /// Pings the peer at this address.
    fn ping(&self, address: &str) {
        let output = output(&mut self.command(address));
        assert!(output.status.success(), "{}", printed_text(&output));
        assert!(
            printed_text(&output).contains("through the relay and back in "),
            "{}",
            printed_text(&output)
        );
    }

    /// What it prints when it fails.
    fn failure(&self, address: &str) -> String {
        let output = output(&mut self.command(address));
        assert!(!output.status.success(), "{}", printed_text(&output));
        printed_text(&output)
    }
}

fn folder(name: &str) -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    fs::create_dir_all(&folder).expect("a folder");
    folder
}

fn source(language: &str) -> String {
    blocks(language).remove(0).text
}

fn output(command: &mut Command) -> Output {
    command.output().unwrap_or_else(|error| panic!("{command:?}: {error}; is it installed?"))
}

fn printed_text(output: &Output) -> String {
    String::from_utf8_lossy(&[&output.stdout[..], &output.stderr].concat()).into_owned()
}

#[test]
#[ignore = "needs Go"]
fn the_go_program_reserves_and_pings_through_the_relay() {
    let (program, relay) = (Program::go(), Relay::start(&[]));
    let (_target, address) = program.reserve(&relay.address.to_string());
    program.ping(&address);
}

#[cfg(unix)]
#[test]
#[ignore = "needs Node and npm"]
fn the_js_program_reserves_and_pings_through_the_relay_and_again_after_its_restart() {
    let (program, relay) = (Program::js(), Relay::start(&[]));
    let (mut target, address) = program.reserve(&relay.address.to_string());
    program.ping(&address);
    let listen = format!("--listen=/ip4/127.0.0.1/tcp/{}", relay.port());
    let folder = relay.kill();
    target.read_value("no slot");
    let _relay = Relay::start_in(folder, &[&listen]);
    assert_eq!(target.read_value(&format!("reach me: {}", program.as_documented)), address);
    program.ping(&address);
}

/// The cell of the documented table in the row that begins with `situation` (column 1: Go, 2: JavaScript).
fn documented(situation: &str, column: usize) -> String {
    let rows = table_rows(PAGE);
    let row = rows.iter().find(|cells| cells[0].starts_with(situation));
    let row = row.unwrap_or_else(|| panic!("{PAGE} has no row {situation:?}"));
    row[column].trim_matches('`').to_owned()
}

/// Rows of the table, each with the flags of a relay that refuses a CONNECT for that reason.
const REFUSED_CONNECTS: [(&str, &[&str]); 3] = [
    ("the target holds no slot", &[]),
    (
        "the lists allow no CONNECT",
        &["--allow-connect-peer=12D3KooWPGM3wYKMsTHGEqbhcBft6cPjA2F3rQmyWTEDD3wCGS1g"],
    ),
    ("too many circuits", &["--max-circuits=1"]),
];

/// The circuit address of a target: a peer without a slot if the situation requires that, else a client with one.
async fn target(relay: &Relay, situation: &str) -> (Option<Client>, String) {
    let (client, peer) = match situation.contains("no slot") {
        true => (None, Keypair::generate_ed25519().public().to_peer_id()),
        false => {
            let mut client = Client::connect(relay).await;
            client.reserve().await;
            let peer = client.peer;
            (Some(client), peer)
        }
    };
    (client, format!("{}/p2p-circuit/p2p/{peer}", relay.address))
}

#[tokio::test]
#[ignore = "needs Go"]
async fn a_refused_go_client_prints_what_the_documentation_says() {
    let program = Program::go();
    check_refused_connects(program, 1).await;
    let swarm_key = format!("--swarm-key={SWARM_KEY}");
    for (situation, flag) in [
        ("all slots are taken", "--max-reservations=1"),
        ("the subnet is denied", "--deny-subnet=127.0.0.0/8"),
        ("another swarm key", &swarm_key),
    ] {
        let relay = Relay::start(&[flag]);
        let mut holder = None;
        if situation.contains("taken") {
            holder = Some(Client::connect(&relay).await);
            holder.as_mut().unwrap().reserve().await;
        }
        let output = program.failure(&relay.address.to_string());
        assert!(output.contains(&documented(situation, 1)), "{situation}: {output}");
        drop(holder);
    }
}

#[cfg(unix)]
#[tokio::test]
#[ignore = "needs Node and npm"]
async fn a_refused_js_client_prints_what_the_documentation_says() {
    check_refused_connects(Program::js(), 2).await;
}

/// The program prints what this column of the documentation says when a CONNECT is refused.
async fn check_refused_connects(program: &Program, column: usize) {
    for (situation, flags) in REFUSED_CONNECTS {
        let relay = Relay::start(flags);
        let (mut client, address) = target(&relay, situation).await;
        let mut source = Client::connect(&relay).await;
        let _only_one = match &mut client {
            Some(client) if situation == "too many circuits" => {
                Some(circuit(&mut source, client).await)
            }
            _ => None,
        };
        let (output, expected) = (program.failure(&address), documented(situation, column));
        assert!(output.contains(&expected), "{situation}: {output}");
    }
}
