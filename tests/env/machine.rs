//! Machines that have more of something than others, or withhold it: hundreds of addresses, no list of them, no random
//! numbers, no disk that can be written to.

use std::{
    env, fs,
    os::unix::fs::PermissionsExt,
    path::Path,
    process::{Command, Stdio},
};

use crate::{
    common::{
        Relay, command,
        network::Network,
        swarms::{drive, until},
        within,
    },
    interop::{go_client, js_client, run},
};
use libp2p::{
    Multiaddr, StreamProtocol, SwarmBuilder,
    futures::AsyncReadExt,
    identify,
    multiaddr::Protocol,
    noise, relay,
    swarm::{NetworkBehaviour, SwarmEvent},
    tcp, yamux,
};
use tempfile::TempDir;

/// The largest message of identify that rust-libp2p reads, with the length in front of it.
const MAX_IDENTIFY: usize = 4096 + 2;

// ---- Addresses

/// What rust-libp2p's client learns from a relay.
struct Learnt {
    /// Its own address, as the relay sees it.
    observed: Multiaddr,
    /// Where it can be reached through the relay.
    circuit: Multiaddr,
    /// The length of the relay's identify message, in bytes.
    identify: usize,
}

#[derive(NetworkBehaviour)]
struct Parts {
    relay: relay::client::Behaviour,
    identify: identify::Behaviour,
    stream: libp2p_stream::Behaviour,
}

/// Has rust-libp2p's client reserve.
async fn client_of(relay: &Multiaddr) -> Learnt {
    let mut swarm = SwarmBuilder::with_new_identity()
        .with_tokio()
        .with_tcp(tcp::Config::default(), noise::Config::new, yamux::Config::default)
        .unwrap()
        .with_relay_client(noise::Config::new, yamux::Config::default)
        .unwrap()
        .with_behaviour(|keypair, relay| Parts {
            relay,
            identify: identify::Behaviour::new(identify::Config::new(
                "test".into(),
                keypair.public(),
            )),
            stream: libp2p_stream::Behaviour::new(),
        })
        .unwrap()
        .build();
    swarm.listen_on(relay.clone().with(Protocol::P2pCircuit)).expect("it can be dialed");
    let (mut observed, mut circuit) = (None, None);
    let (server, observed, circuit) = until(&mut swarm, |event| {
        match event {
            SwarmEvent::Behaviour(PartsEvent::Identify(event)) => match event {
                identify::Event::Received { peer_id, info, .. } => {
                    observed = Some((peer_id, info.observed_addr));
                }
                identify::Event::Error { error, .. } => panic!("{error}"),
                _ => {}
            },
            SwarmEvent::NewListenAddr { address, .. } => circuit = Some(address),
            SwarmEvent::ListenerClosed { reason, .. } => panic!("{reason:?}"),
            _ => {}
        }
        let (server, observed) = observed.clone()?;
        Some((server, observed, circuit.clone()?))
    })
    .await;
    let mut control = swarm.behaviour().stream.new_control();
    drive(swarm);
    let asked = control.open_stream(server, StreamProtocol::new("/ipfs/id/1.0.0"));
    let mut stream = within(asked).await.expect("it is served");
    let mut message = Vec::new();
    within(stream.read_to_end(&mut message)).await.expect("an answer");
    Learnt { observed, circuit, identify: message.len() }
}

const RELAY: &str = "RELAYLET_TEST_MACHINE";

#[tokio::test]
#[ignore = "not a test: the client that a test starts"]
async fn a_client() {
    // Without the variable it was run as one of the ignored tests.
    if let Ok(relay) = env::var(RELAY) {
        let Learnt { observed, circuit, identify } = client_of(&relay.parse().unwrap()).await;
        println!("\nlearnt: {observed} {circuit} {identify}");
    }
}

#[test]
#[ignore = "needs Go, Node with npm, root and iproute2"]
fn a_relay_with_380_addresses_is_found_by_rust_go_and_javascript() {
    let mut network = Network::of_global_addresses();
    let (here, there) = (network.host(), network.host());
    here.add_addresses(380);
    let relay = here.relay_everywhere(&[]);
    let address = relay.address.to_string();
    let under = there.command_prefix();
    let client = |program: &Path| {
        let mut client = Command::new(&under[0]);
        client.args(&under[1..]).arg(program);
        client
    };

    let rust = || {
        let mut rust = client(&env::current_exe().expect("this program"));
        rust.args(["--ignored", "--exact", "--nocapture", "machine::a_client"]);
        let output = rust.env(RELAY, &address).stderr(Stdio::inherit()).output();
        let output = String::from_utf8(output.expect("it starts").stdout).expect("text");
        let learnt = output.lines().find_map(|line| line.strip_prefix("learnt: "));
        let learnt: Vec<_> = learnt.expect(&output).split(' ').collect();
        assert!(learnt[0].starts_with(&format!("/ip4/{}/tcp/", there.address)), "{learnt:?}");
        assert!(learnt[1].contains("/p2p-circuit/p2p/"), "{learnt:?}");
        let identify: usize = learnt[2].parse().expect("a length");
        assert!(identify <= MAX_IDENTIFY, "{identify}");
    };
    // While the addresses come one by one, and when they are all there.
    rust();
    while !relay.next_address().to_string().contains("/2a00:1450::17c/") {}
    rust();
    run(client(go_client()).args(["discover", &address]));
    let node = client(Path::new("node_modules/.bin/node"));
    run({ node }.args(["client.mjs", "discover", &address]).current_dir(js_client()));
    assert_eq!(relay.count_in_log("addresses left out"), 1);
}

#[tokio::test]
#[ignore = "needs Python"]
async fn where_the_system_lists_no_addresses_a_client_is_told_the_one_that_it_reached() {
    let folder = TempDir::new().unwrap();
    let mut command = withheld("netlink", &folder);
    command.arg("--listen=/ip4/0.0.0.0/tcp/0");
    let relay = Relay::run(command, folder);
    relay.wait_for_log("listing this machine's addresses failed").await;
    let reached = format!("/ip4/127.0.0.1/tcp/{}/p2p/{}", relay.port(), relay.peer);
    let learnt = client_of(&reached.parse().unwrap()).await;
    let circuit = learnt.circuit.to_string();
    assert!(circuit.starts_with(&format!("{reached}/p2p-circuit/p2p/")), "{circuit}");
    assert!(learnt.observed.to_string().starts_with("/ip4/127.0.0.1/tcp/"));
}

/// The program, from which the kernel withholds this.
fn withheld(what: &str, folder: &TempDir) -> Command {
    let program = command(folder).get_program().to_owned();
    let mut command = Command::new(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/env/withhold"));
    command.current_dir(folder.path()).arg(what).arg(program);
    command
}

// ---- Random numbers and the disk

/// Runs `command` in a shell that sees mounts of its own, after `mounts`, of which `$0` is its folder.
fn with_mounts(mounts: &str, command: &Command, folder: &TempDir) -> Command {
    let script = format!("{mounts} && cd \"$0\" && exec \"$@\"");
    let mut shell = Command::new("unshare");
    shell.args(["--mount", "--propagation=private", "sh", "-c", &script]).arg(folder.path());
    shell.arg(command.get_program()).args(command.get_args());
    shell
}

/// The only line that it says before it fails.
fn failure(command: &mut Command) -> String {
    let output = command.output().expect("it starts");
    assert_eq!(output.status.code(), Some(1));
    assert!(output.stdout.is_empty());
    let said = String::from_utf8(output.stderr).expect("text");
    assert_eq!(said.lines().count(), 1, "{said}");
    said
}

#[test]
#[ignore = "needs root and Python"]
fn without_random_numbers_it_says_so_in_one_line() {
    let folder = TempDir::new().unwrap();
    let program = withheld("random", &folder);
    let line = failure(&mut with_mounts("mount -t tmpfs none /dev", &program, &folder));
    assert!(line.starts_with("relaylet: reading random numbers failed: "), "{line}");
    assert!(line.ends_with("; provide /dev/urandom\n"), "{line}");
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0, "no key was made");
}

#[tokio::test]
#[ignore = "needs root"]
async fn on_a_read_only_disk_a_key_is_read_and_a_new_one_an_error() {
    const READ_ONLY: &str = "mount --bind \"$0\" \"$0\" && mount -o remount,ro,bind \"$0\"";
    let folder = TempDir::new().unwrap();
    let mut program = command(&folder);
    program.arg("--listen=/ip4/127.0.0.1/tcp/0");
    let line = failure(&mut with_mounts(READ_ONLY, &program, &folder));
    let remedy =
        "relaylet: --identity relaylet.key: cannot be written; name a file in a writable folder: ";
    assert!(line.starts_with(remedy) && line.contains("Read-only file system"), "{line}");

    let relay = Relay::start_in(folder, &["--listen=/ip4/127.0.0.1/tcp/0"]);
    let (peer, folder) = (relay.peer, relay.kill());
    let key = folder.path().join("relaylet.key");
    fs::set_permissions(&key, fs::Permissions::from_mode(0o644)).unwrap();
    let relay = Relay::run(with_mounts(READ_ONLY, &program, &folder), folder);
    assert_eq!(relay.peer, peer);
    // No chmod helps here.
    let warning = relay.wait_for_log("other users can read this key").await;
    assert!(warning.ends_with("(in Kubernetes: defaultMode: 0400)"), "{warning}");
}
