//! A client in a process of its own, which can be frozen, killed, and put into another network namespace.
//!
//! The process is the test program itself, started to run the "test" `a_client`.

use std::{env, ffi::OsString, process::Stdio};

use libp2p::{
    Multiaddr, PeerId,
    futures::{AsyncWriteExt, StreamExt, io},
    identity::Keypair,
};
use tokio::{
    io::{AsyncBufReadExt, BufReader, Lines},
    process::{Child, ChildStdout, Command},
};

use super::{
    Client, HOP, STOP, Security,
    messages::{HopMessage, OK, StopMessage, connect, read, reserve, stop_status, write},
    signal,
    swarms::{ECHO, echo},
    within,
};

// The environment variables that configure the process: relay, target if any, key, behaviour.
const RELAY: &str = "RELAYLET_TEST_RELAY";
const TARGET: &str = "RELAYLET_TEST_TARGET";
const KEY: &str = "RELAYLET_TEST_KEY";
const PINGS: &str = "RELAYLET_TEST_PINGS";
const CARRIES: &str = "RELAYLET_TEST_CARRIES";

/// A running client process.
pub struct Process {
    pub peer: PeerId,
    /// The status of the relay's answer.
    pub status: Option<i32>,
    child: Child,
    /// Kept open: the process may still write to it.
    _output: Lines<BufReader<ChildStdout>>,
}

/// What a client does, its identity, and how it is run.
#[derive(Clone, Default)]
pub struct Role {
    /// The peer to connect to. `None`: it reserves, and accepts every circuit.
    pub target: Option<PeerId>,
    /// Its identity; a new one unless given.
    pub keypair: Option<Keypair>,
    /// Whether it pings every 15 s, as rust-libp2p does by default, rather than only answering.
    pub pings: bool,
    /// Whether it writes to its circuit without pause, and reads from those that it accepts.
    pub carries: bool,
    /// The command that runs the process, if it is not run directly.
    pub command_prefix: Vec<OsString>,
}

impl Process {
    /// Starts a client that holds a slot.
    pub async fn start_and_reserve(relay: &Multiaddr) -> Self {
        let process = Self::start(relay, Role::default()).await;
        assert_eq!(process.status, OK);
        process
    }

    /// Starts a client that is the source of a circuit.
    pub async fn start_and_connect(relay: &Multiaddr, target: PeerId) -> Self {
        let role = Role { target: Some(target), ..Role::default() };
        let process = Self::start(relay, role).await;
        assert_eq!(process.status, OK);
        process
    }

    /// Starts a client, and waits until its request is answered.
    pub async fn start(relay: &Multiaddr, role: Role) -> Self {
        let program = env::current_exe().expect("this program");
        let mut command = role.command_prefix;
        command.push(program.into());
        let target = role.target.map(|target| target.to_string());
        let keypair = role.keypair.unwrap_or_else(Keypair::generate_ed25519);
        let key = keypair.to_protobuf_encoding().expect("a key");
        let key: String = key.iter().map(|byte| format!("{byte:02x}")).collect();
        let (_, module) = module_path!().split_once("::").expect("within a crate");
        let name = format!("{module}::a_client");
        let mut child = Command::new(&command[0])
            .args(&command[1..])
            .args(["--ignored", "--exact", "--nocapture", &name])
            .env(RELAY, relay.to_string())
            .env(TARGET, target.unwrap_or_default())
            .env(KEY, key)
            .env(PINGS, role.pings.to_string())
            .env(CARRIES, role.carries.to_string())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .expect("the program starts");
        let mut output = BufReader::new(child.stdout.take().expect("a pipe")).lines();
        loop {
            let line = within(output.next_line()).await.expect("text");
            let line = line.expect("the status");
            // The test harness prints the name of the test before it.
            if let Some((_, status)) = line.split_once("answered: ") {
                return Self {
                    peer: keypair.public().to_peer_id(),
                    status: status.parse().ok(),
                    child,
                    _output: output,
                };
            }
        }
    }

    /// Sends it a signal, by its name for `kill`.
    pub fn signal(&self, name: &str) {
        signal(self.child.id().expect("a running process"), name);
    }
}

#[tokio::test]
#[ignore = "not a test: the client process that tests start"]
async fn a_client() {
    // Without the variable it was run among the ignored tests.
    if env::var_os(RELAY).is_some() {
        run().await;
    }
}

/// The body of the client process.
async fn run() {
    let relay: Multiaddr = env::var(RELAY).expect("the relay").parse().unwrap();
    let target = env::var(TARGET).expect("a target, or an empty string");
    let key = env::var(KEY).expect("a key");
    let key: Vec<u8> = (0..key.len())
        .step_by(2)
        .map(|at| u8::from_str_radix(&key[at..at + 2], 16).unwrap())
        .collect();
    let keypair = Keypair::from_protobuf_encoding(&key).unwrap();
    let mut client = match env::var(PINGS).as_deref() {
        Ok("true") => Client::connect_pinging(keypair, &relay).await,
        _ => Client::connect_as(keypair, &relay, Security::Noise).await,
    };
    let mut stops = client.accept(STOP);
    echo(client.accept(ECHO));
    let mut stream = client.open(HOP).await;
    let request = match target.is_empty() {
        true => reserve(),
        false => connect(target.parse().unwrap()),
    };
    write(&mut stream, &request).await;
    let answer: HopMessage = read(&mut stream).await;
    println!("answered: {}", answer.status.expect("a status"));
    let carries = env::var(CARRIES).is_ok_and(|carries| carries == "true");
    if carries && !target.is_empty() {
        while stream.write_all(&[7; 16 * 1024]).await.is_ok() {}
    }
    let mut circuits = Vec::new();
    while let Some((_, mut circuit)) = stops.next().await {
        let _: StopMessage = read(&mut circuit).await;
        write(&mut circuit, &stop_status(100)).await;
        match carries {
            true => drop(tokio::spawn(async move { io::copy(circuit, &mut io::sink()).await })),
            false => circuits.push(circuit),
        }
    }
}
