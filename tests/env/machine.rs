//! Unusual machines: with hundreds of addresses, without a list of their addresses, without options of TCP, without random
//! numbers, or with a read-only disk.

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

/// What a rust-libp2p client receives from a relay.
struct ClientView {
    /// The client's own address, as the relay sees it.
    observed: Multiaddr,
    /// The circuit address at which the client listens.
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

/// Reserves with a rust-libp2p client.
async fn reserve(relay: &Multiaddr) -> ClientView {
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
    let opening = control.open_stream(server, StreamProtocol::new("/ipfs/id/1.0.0"));
    let mut stream = within(opening).await.expect("the relay supports identify");
    let mut message = Vec::new();
    within(stream.read_to_end(&mut message)).await.expect("an answer");
    ClientView { observed, circuit, identify: message.len() }
}

const RELAY: &str = "RELAYLET_TEST_MACHINE";

#[tokio::test]
#[ignore = "not a test: another test runs this as a client in a network namespace"]
async fn a_client() {
    // Without the variable it runs as one of the ignored tests, and does nothing.
    if let Ok(relay) = env::var(RELAY) {
        let ClientView { observed, circuit, identify } = reserve(&relay.parse().unwrap()).await;
        println!("\nclient view: {observed} {circuit} {identify}");
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
        let view = output.lines().find_map(|line| line.strip_prefix("client view: "));
        let view: Vec<_> = view.expect(&output).split(' ').collect();
        assert!(view[0].starts_with(&format!("/ip4/{}/tcp/", there.address)), "{view:?}");
        assert!(view[1].contains("/p2p-circuit/p2p/"), "{view:?}");
        let identify: usize = view[2].parse().expect("a length");
        assert!(identify <= MAX_IDENTIFY, "{identify}");
    };
    // Once while the relay still learns its addresses one by one, and once it has all of them.
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
async fn without_a_list_of_addresses_a_client_gets_the_address_at_which_it_reached_the_relay() {
    let relay = relay_without("netlink", "/ip4/0.0.0.0/tcp/0");
    relay.wait_for_log("listing this machine's addresses failed").await;
    let reached = format!("/ip4/127.0.0.1/tcp/{}/p2p/{}", relay.port(), relay.peer);
    let view = reserve(&reached.parse().unwrap()).await;
    let circuit = view.circuit.to_string();
    assert!(circuit.starts_with(&format!("{reached}/p2p-circuit/p2p/")), "{circuit}");
    assert!(view.observed.to_string().starts_with("/ip4/127.0.0.1/tcp/"));
}

#[tokio::test]
#[ignore = "needs Python"]
async fn a_kernel_without_options_of_tcp_serves_clients_too() {
    let relay = relay_without("options", "/ip4/127.0.0.1/tcp/0");
    let circuit = reserve(&relay.address).await.circuit.to_string();
    assert!(circuit.starts_with(&relay.address.to_string()), "{circuit}");
}

/// A relay without one facility of the kernel, which listens on this address.
fn relay_without(what: &str, listen: &str) -> Relay {
    let folder = TempDir::new().unwrap();
    let mut command = withheld(what, &folder);
    command.arg(format!("--listen={listen}"));
    Relay::run(command, folder)
}

/// The command that runs the program without one facility of the kernel (see `tests/env/withhold`).
fn withheld(what: &str, folder: &TempDir) -> Command {
    let program = command(folder).get_program().to_owned();
    let mut command = Command::new(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/env/withhold"));
    command.current_dir(folder.path()).arg(what).arg(program);
    command
}

// ---- Random numbers and the disk

/// The command that runs `command` in a mount namespace of its own, after the shell commands `mounts`; `$0` in them is
/// the folder.
fn with_mounts(mounts: &str, command: &Command, folder: &TempDir) -> Command {
    let script = format!("{mounts} && cd \"$0\" && exec \"$@\"");
    let mut shell = Command::new("unshare");
    shell.args(["--mount", "--propagation=private", "sh", "-c", &script]).arg(folder.path());
    shell.arg(command.get_program()).args(command.get_args());
    shell
}

/// Runs a command that must fail with one line on standard error, and returns that line.
fn failure(command: &mut Command) -> String {
    let output = command.output().expect("it starts");
    assert_eq!(output.status.code(), Some(1));
    assert!(output.stdout.is_empty());
    let errors = String::from_utf8(output.stderr).expect("text");
    assert_eq!(errors.lines().count(), 1, "{errors}");
    errors
}

#[test]
#[ignore = "needs root and Python"]
fn without_random_numbers_the_program_fails_with_one_line() {
    let folder = TempDir::new().unwrap();
    let program = withheld("random", &folder);
    let line = failure(&mut with_mounts("mount -t tmpfs none /dev", &program, &folder));
    assert!(line.starts_with("relaylet: reading random numbers failed: "), "{line}");
    assert!(line.ends_with("; provide /dev/urandom\n"), "{line}");
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0, "no key was created");
}

#[tokio::test]
#[ignore = "needs root"]
async fn on_a_read_only_disk_an_existing_key_is_read_and_creating_one_fails() {
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
    // The warning does not suggest chmod, which fails on a read-only disk.
    let warning = relay.wait_for_log("other users can read this key").await;
    assert!(warning.ends_with("(in Kubernetes: defaultMode: 0400)"), "{warning}");
}
