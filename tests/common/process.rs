//! A client in a process of its own, so that it can be frozen, killed, and put into a network.
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
    messages::{HopMessage, StopMessage, connect, read, reserve, stop_status, write},
    signal,
    swarms::{ECHO, echo},
    within,
};

// What the process is told: the relay, whom to connect to if anyone, and who it is.
const RELAY: &str = "RELAYLET_TEST_RELAY";
const TARGET: &str = "RELAYLET_TEST_TARGET";
const KEY: &str = "RELAYLET_TEST_KEY";
const PINGS: &str = "RELAYLET_TEST_PINGS";
const CARRIES: &str = "RELAYLET_TEST_CARRIES";

/// A client that runs.
pub struct Process {
    pub peer: PeerId,
    /// How the relay answered what it asked.
    pub status: Option<i32>,
    child: Child,
    /// It may go on talking.
    _output: Lines<BufReader<ChildStdout>>,
}

/// What a client is to do, who it is, and where it runs.
#[derive(Clone, Default)]
pub struct Role {
    /// Whom to connect to; else it reserves, and agrees to every circuit.
    pub target: Option<PeerId>,
    /// Somebody new unless given.
    pub keypair: Option<Keypair>,
    /// Whether it pings by itself, every 15 s, as rust-libp2p does; else it only answers.
    pub pings: bool,
    /// Whether it writes to the circuit that it connects by, and reads from those that it agrees to, all the time.
    pub carries: bool,
    /// The command that runs it, where it is not to run as this process does.
    pub under: Vec<OsString>,
}

impl Process {
    /// One that holds a slot.
    pub async fn that_reserves(relay: &Multiaddr) -> Self {
        let process = Self::start(relay, Role::default()).await;
        assert_eq!(process.status, Some(100));
        process
    }

    /// One that is the source of a circuit.
    pub async fn that_connects(relay: &Multiaddr, target: PeerId) -> Self {
        let role = Role { target: Some(target), ..Role::default() };
        let process = Self::start(relay, role).await;
        assert_eq!(process.status, Some(100));
        process
    }

    /// One that has asked, and been answered.
    pub async fn start(relay: &Multiaddr, role: Role) -> Self {
        let program = env::current_exe().expect("this program");
        let mut command = role.under;
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
            .expect("it can be started");
        let mut output = BufReader::new(child.stdout.take().expect("it is piped")).lines();
        loop {
            let line = within(output.next_line()).await.expect("text");
            let line = line.expect("it says how it was answered");
            // The harness writes the name of the test in front of it.
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

    /// Sends it a signal, by the name that `kill` knows.
    pub fn signal(&self, name: &str) {
        signal(self.child.id().expect("it runs"), name);
    }
}

#[tokio::test]
#[ignore = "not a test: the client that the tests start"]
async fn a_client() {
    // Without the variable it was run as one of the ignored tests.
    if env::var_os(RELAY).is_some() {
        run().await;
    }
}

/// What the process does.
async fn run() {
    let relay: Multiaddr = env::var(RELAY).expect("the relay").parse().unwrap();
    let target = env::var(TARGET).expect("whom to connect to, or nobody");
    let key = env::var(KEY).expect("who it is");
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
