//! What the tests share: the relay as a child process, and a client that can send arbitrary messages.

#![allow(dead_code)] // each test file uses its own part

pub mod bench_client;
pub mod by_hand;
pub mod bystanders;
pub mod child_process;
pub mod client_process;
pub mod http;
pub mod log_recorder;
pub mod messages;
pub mod network;
pub mod pages;
pub mod permits;
pub mod raw_peers;
pub mod running_node;
pub mod scenario;
pub mod swarms;
pub mod tcp_from;
#[cfg(feature = "websocket")]
pub mod websocket;

use std::{
    env,
    io::{BufRead, BufReader},
    net::TcpListener,
    path::PathBuf,
    process::{self, Child, ChildStdout, Command, ExitStatus, Output, Stdio},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU16, Ordering},
        mpsc,
    },
    thread,
    time::{Duration, Instant},
};

use libp2p::{
    Multiaddr, PeerId, Stream, StreamProtocol, Swarm, SwarmBuilder, Transport,
    core::{muxing::StreamMuxerBox, transport::Boxed, upgrade::Version},
    futures::{AsyncReadExt, AsyncWriteExt, StreamExt},
    identify,
    identity::Keypair,
    multiaddr::Protocol,
    noise, ping,
    swarm::{NetworkBehaviour, SwarmEvent, behaviour::toggle::Toggle},
    tcp, tls, yamux,
};
use libp2p_stream::{Control, IncomingStreams};
use tempfile::TempDir;
use tokio::{sync::watch, task::JoinHandle};

use messages::{HopMessage, OK, StopMessage};
use tcp_from::{TcpFrom, address_of};

/// How long a test waits for an event before it fails: generous, because machines are shared.
pub const TEST_TIMEOUT: Duration = Duration::from_secs(180);

/// Longer than any test or bench takes.
pub const NEVER: Duration = Duration::from_secs(365 * 24 * 60 * 60);

pub const HOP: StreamProtocol = StreamProtocol::new("/libp2p/circuit/relay/0.2.0/hop");
pub const STOP: StreamProtocol = StreamProtocol::new("/libp2p/circuit/relay/0.2.0/stop");

/// The relay program, running in a folder of its own with an identity of its own. Killed when dropped.
pub struct Relay {
    pub address: Multiaddr,
    pub peer: PeerId,
    pub folder: TempDir,
    child: Child,
    /// The lines of standard error and standard output so far.
    log: Arc<Mutex<Vec<String>>>,
    /// The lines of standard output that no test has taken yet.
    output: mpsc::Receiver<String>,
}

impl Relay {
    /// Starts it on a free port of 127.0.0.1 and waits until it listens.
    pub fn start(flags: &[&str]) -> Self {
        let mut all = vec!["--listen", "/ip4/127.0.0.1/tcp/0"];
        all.extend(flags);
        Self::start_listening(&all)
    }

    /// Starts it with these flags, which include `--listen`.
    pub fn start_listening(flags: &[&str]) -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        Self::start_in(folder, flags)
    }

    /// As [`Relay::start_listening`], with the identity in `folder`.
    pub fn start_in(folder: TempDir, flags: &[&str]) -> Self {
        let mut command = command(&folder);
        command.args(flags);
        Self::run(command, folder)
    }

    /// Runs this command in `folder` and waits until the relay listens. First acquires a permit ([`permits`]).
    pub fn run(mut command: Command, folder: TempDir) -> Self {
        permits::acquire();
        let mut child = command
            .env("RUST_LOG", "info,relaylet=debug,soketto=off,yamux=off")
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the relay can be started");
        let log = Arc::new(Mutex::new(Vec::new()));
        let stderr = child.stderr.take().expect("its log is piped");
        let copy = Arc::clone(&log);
        thread::spawn(move || {
            for line in BufReader::new(stderr).lines().map_while(Result::ok) {
                copy.lock().unwrap().push(line);
            }
        });
        let output = lines_of(child.stdout.take().expect("its output is piped"), Arc::clone(&log));
        let mut relay = Self {
            address: Multiaddr::empty(),
            peer: PeerId::random(),
            folder,
            child,
            log,
            output,
        };
        relay.address = relay.next_address();
        relay.peer = peer_of(&relay.address);
        relay
    }

    /// Waits for the next address that the relay prints on standard output, and takes it.
    pub fn next_address(&self) -> Multiaddr {
        let line = self.output.recv_timeout(TEST_TIMEOUT).unwrap_or_else(|_| {
            panic!("the relay prints no (further) address; its log: {:#?}", self.log())
        });
        let address = line.strip_prefix("listening on ").expect("a `listening on` line");
        address.parse().expect("a multiaddr")
    }

    /// The lines on standard output that [`Relay::next_address`] has not taken. Blocks until the relay has exited.
    pub fn rest_of_output(&self) -> Vec<String> {
        self.output.iter().collect()
    }

    /// The TCP port of [`Relay::address`].
    pub fn port(&self) -> u16 {
        tcp_port(&self.address)
    }

    /// The lines of the log and of standard output so far: a container's log has both.
    pub fn log(&self) -> Vec<String> {
        self.log.lock().unwrap().clone()
    }

    /// How many lines of the log contain `text`.
    pub fn count_in_log(&self, text: &str) -> usize {
        let log = self.log.lock().unwrap();
        log.iter().filter(|line| line.contains(text)).count()
    }

    /// Waits for a line of the log that contains `text`, and returns it.
    pub async fn wait_for_log(&self, text: &str) -> String {
        self.wait_for_count(text, 1).await;
        let log = self.log.lock().unwrap();
        log.iter().find(|line| line.contains(text)).expect("a counted line").clone()
    }

    /// Waits until this many lines of the log contain `text`.
    pub async fn wait_for_count(&self, text: &str, wanted: usize) {
        let start = Instant::now();
        while self.count_in_log(text) < wanted {
            assert!(
                start.elapsed() < TEST_TIMEOUT,
                "fewer than {wanted} lines with {text:?} in the log: {:#?}",
                self.log()
            );
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Waits until this peer has been probed this many times.
    pub async fn wait_for_probes(&self, peer: PeerId, wanted: usize) {
        self.wait_for_count(&format!("probe sent: peer {peer}"), wanted).await;
    }

    /// The process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Sends it a signal, by its name for `kill`.
    pub fn signal(&self, name: &str) {
        signal(self.pid(), name);
    }

    /// Kills it as `kill -9` does, and keeps the folder with its identity.
    pub fn kill(mut self) -> TempDir {
        self.child.kill().expect("kill succeeds");
        self.child.wait().expect("wait succeeds");
        std::mem::replace(&mut self.folder, tempfile::tempdir().expect("a temporary folder"))
    }

    /// Waits until it exits by itself.
    pub fn wait(&mut self) -> ExitStatus {
        wait_for(&mut self.child)
    }

    /// Whether the process is still running.
    pub fn is_running(&mut self) -> bool {
        self.child.try_wait().expect("wait succeeds").is_none()
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if thread::panicking() {
            eprintln!("the relay's log: {:#?}", self.log());
        }
    }
}

/// The TCP port of an address.
pub fn tcp_port(address: &Multiaddr) -> u16 {
    let port = address.iter().find_map(|part| match part {
        Protocol::Tcp(port) => Some(port),
        _ => None,
    });
    port.expect("a TCP address")
}

/// The peer id at the end of an address.
pub fn peer_of(address: &Multiaddr) -> PeerId {
    match address.iter().last() {
        Some(Protocol::P2p(peer)) => peer,
        _ => panic!("{address} names no peer"),
    }
}

/// A port on which nothing listens, and which no other test of this process gets.
pub fn free_port() -> u16 {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    // Below the ephemeral ports: connections of other tests do not take it meanwhile.
    let first = 10_000 + (process::id() % 10_000) as u16;
    loop {
        let port = first + NEXT.fetch_add(1, Ordering::Relaxed);
        if TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
    }
}

/// The program that is tested: the one built with the tests, or the one that `RELAYLET_PROGRAM` names.
fn program() -> PathBuf {
    let named = env::var_os("RELAYLET_PROGRAM").map(PathBuf::from);
    named.unwrap_or_else(|| env!("CARGO_BIN_EXE_relaylet").into())
}

/// The command that runs the program in `folder` with an empty environment.
pub fn command(folder: &TempDir) -> Command {
    let mut command = Command::new(program());
    command.current_dir(folder.path()).env_clear();
    command
}

/// Waits until a process exits by itself.
pub fn wait_for(child: &mut Child) -> ExitStatus {
    let start = Instant::now();
    loop {
        if let Some(status) = child.try_wait().expect("wait succeeds") {
            return status;
        }
        if start.elapsed() > TEST_TIMEOUT {
            child.kill().expect("kill succeeds");
            panic!("the process does not exit");
        }
        thread::sleep(Duration::from_millis(10));
    }
}

/// Runs a command until it exits by itself, and returns its output, which has to fit into a pipe: it is read
/// afterwards.
pub fn output(command: &mut Command) -> Output {
    let piped = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = piped.spawn().expect("it can be started");
    wait_for(&mut child);
    child.wait_with_output().expect("wait succeeds")
}

/// Sends a signal to a process, by its name for `kill`.
pub fn signal(pid: u32, name: &str) {
    let status = Command::new("kill")
        .args([&format!("-{name}"), &pid.to_string()])
        .status()
        .expect("kill can be run");
    assert!(status.success());
}

/// The lines of standard output. They are copied to the log, as in a container.
fn lines_of(output: ChildStdout, log: Arc<Mutex<Vec<String>>>) -> mpsc::Receiver<String> {
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || {
        for line in BufReader::new(output).lines().map_while(Result::ok) {
            log.lock().unwrap().push(line.clone());
            if sender.send(line).is_err() {
                break;
            }
        }
    });
    receiver
}

/// The one secure channel that a client offers.
#[derive(Clone, Copy, Debug)]
pub enum Security {
    Noise,
    Tls,
}

/// rust-libp2p with raw streams of any protocol, connected to a relay.
///
/// It pings once, when it connects. After that it sends nothing unless a test or the relay requests it.
pub struct Client {
    pub peer: PeerId,
    relay: PeerId,
    control: Control,
    /// How many connections to the relay are up.
    connections: watch::Receiver<usize>,
    task: JoinHandle<()>,
}

#[derive(NetworkBehaviour)]
struct Parts {
    stream: libp2p_stream::Behaviour,
    identify: identify::Behaviour,
    ping: Toggle<ping::Behaviour>,
}

impl Parts {
    fn of(keypair: &Keypair, ping: Option<ping::Behaviour>) -> Self {
        let identify = identify::Config::new("test".into(), keypair.public());
        Self {
            stream: libp2p_stream::Behaviour::new(),
            identify: identify::Behaviour::new(identify),
            ping: ping.into(),
        }
    }
}

impl Client {
    /// A new peer, connected to `relay` over Noise.
    pub async fn connect(relay: &Relay) -> Self {
        Self::connect_to(&relay.address).await
    }

    /// A new peer, connected over Noise to the relay at this address.
    pub async fn connect_to(relay: &Multiaddr) -> Self {
        Self::connect_as(Keypair::generate_ed25519(), relay, Security::Noise).await
    }

    /// The owner of `keypair`, connected to the relay at this address.
    pub async fn connect_as(keypair: Keypair, relay: &Multiaddr, security: Security) -> Self {
        Self::connect_with(keypair, relay, security, yamux::Config::default).await
    }

    /// As [`Client::connect_as`], with this configuration of yamux.
    pub async fn connect_with(
        keypair: Keypair,
        relay: &Multiaddr,
        security: Security,
        muxer: fn() -> yamux::Config,
    ) -> Self {
        let ping = ping::Behaviour::new(ping::Config::new().with_interval(NEVER));
        Self::connect_with_behaviours(keypair, relay, security, muxer, Some(ping)).await
    }

    /// As [`Client::connect_as`], over Noise, and it pings at rust-libp2p's default interval.
    pub async fn connect_pinging(keypair: Keypair, relay: &Multiaddr) -> Self {
        let muxer = yamux::Config::default;
        let ping = ping::Behaviour::default();
        Self::connect_with_behaviours(keypair, relay, Security::Noise, muxer, Some(ping)).await
    }

    /// A new peer that does not support `/ipfs/ping/1.0.0`: it refuses the relay's probes.
    pub async fn connect_without_ping(relay: &Multiaddr) -> Self {
        let keypair = Keypair::generate_ed25519();
        let muxer = yamux::Config::default;
        Self::connect_with_behaviours(keypair, relay, Security::Noise, muxer, None).await
    }

    async fn connect_with_behaviours(
        keypair: Keypair,
        relay: &Multiaddr,
        security: Security,
        muxer: fn() -> yamux::Config,
        ping: Option<ping::Behaviour>,
    ) -> Self {
        let builder = SwarmBuilder::with_existing_identity(keypair).with_tokio();
        let tcp = tcp::Config::default();
        let behaviour = |keypair: &Keypair| Parts::of(keypair, ping);
        let idle =
            |config: libp2p::swarm::Config| config.with_idle_connection_timeout(TEST_TIMEOUT * 10);
        let swarm = match security {
            Security::Noise => builder
                .with_tcp(tcp, noise::Config::new, muxer)
                .unwrap()
                .with_behaviour(behaviour)
                .unwrap()
                .with_swarm_config(idle)
                .build(),
            Security::Tls => builder
                .with_tcp(tcp, tls::Config::new, muxer)
                .unwrap()
                .with_behaviour(behaviour)
                .unwrap()
                .with_swarm_config(idle)
                .build(),
        };
        Self::run(swarm, relay).await
    }

    /// A new peer, connected to the relay at this address over this transport.
    pub async fn connect_over(
        relay: &Multiaddr,
        transport: impl FnOnce(&Keypair) -> Boxed<(PeerId, StreamMuxerBox)>,
    ) -> Self {
        let keypair = Keypair::generate_ed25519();
        let config = libp2p::swarm::Config::with_tokio_executor()
            .with_idle_connection_timeout(TEST_TIMEOUT * 10);
        let parts = Parts::of(&keypair, None);
        let peer = keypair.public().to_peer_id();
        Self::run(Swarm::new(transport(&keypair), parts, peer, config), relay).await
    }

    /// The owner of `keypair`, connected from the address [`address_of`] this number; each number has a /24 of its own.
    pub async fn connect_from(number: usize, keypair: Keypair, relay: &Multiaddr) -> Self {
        let ping = ping::Behaviour::new(ping::Config::new().with_interval(NEVER));
        let swarm = SwarmBuilder::with_existing_identity(keypair)
            .with_tokio()
            .with_other_transport(|keypair| {
                let noise = noise::Config::new(keypair).expect("a key for Noise");
                let tcp = TcpFrom(address_of(number)).upgrade(Version::V1Lazy);
                tcp.authenticate(noise).multiplex(yamux::Config::default())
            })
            .unwrap()
            .with_behaviour(|keypair| Parts::of(keypair, Some(ping)))
            .unwrap()
            .with_swarm_config(|config| config.with_idle_connection_timeout(TEST_TIMEOUT * 10))
            .build();
        Self::run(swarm, relay).await
    }

    async fn run(mut swarm: Swarm<Parts>, relay: &Multiaddr) -> Self {
        let relay_peer = peer_of(relay);
        let peer = *swarm.local_peer_id();
        let control = swarm.behaviour().stream.new_control();
        swarm.dial(relay.clone()).expect("the relay can be dialed");
        let (count, connections) = watch::channel(0);
        let task = tokio::spawn(async move {
            loop {
                match swarm.select_next_some().await {
                    SwarmEvent::ConnectionEstablished { .. } => {
                        count.send_modify(|count| *count += 1);
                    }
                    SwarmEvent::ConnectionClosed { .. } => count.send_modify(|count| *count -= 1),
                    SwarmEvent::OutgoingConnectionError { error, .. } => {
                        panic!("the relay cannot be reached: {error}")
                    }
                    _ => {}
                }
            }
        });
        let mut client = Self { peer, relay: relay_peer, control, connections, task };
        client.wait_for_connections(1).await;
        client
    }

    /// Waits until exactly `wanted` connections to the relay are up.
    pub async fn wait_for_connections(&mut self, wanted: usize) {
        within(self.connections.wait_for(|count| *count == wanted)).await.expect("the client runs");
    }

    /// Whether the client still has the connection that it had at first.
    pub fn kept_its_connection(&self) -> bool {
        // `wait_for` has seen the count; it has not changed since.
        self.connections.has_changed().is_ok_and(|changed| !changed)
    }

    /// Opens a stream to the relay.
    pub async fn open(&mut self, protocol: StreamProtocol) -> Stream {
        let stream = within(self.control.open_stream(self.relay, protocol)).await;
        stream.expect("the relay accepts the stream")
    }

    /// Opens streams of this protocol until the relay accepts them, or refuses them if `is_supported` is false.
    pub async fn wait_for_support(&mut self, protocol: StreamProtocol, is_supported: bool) {
        let accepted = async || {
            let mut control = self.control.clone();
            control.open_stream(self.relay, protocol.clone()).await.is_ok()
        };
        within(async {
            while accepted().await != is_supported {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        })
        .await;
    }

    /// The streams of this protocol that the relay opens.
    pub fn accept(&mut self, protocol: StreamProtocol) -> IncomingStreams {
        self.control.accept(protocol).expect("accept is called once")
    }

    /// Sends a request on a hop stream and reads the answer.
    pub async fn request(&mut self, request: &HopMessage) -> HopMessage {
        self.request_circuit(request).await.0
    }

    /// As [`Client::request`]. If the request is granted, the returned stream is the circuit.
    pub async fn request_circuit(&mut self, request: &HopMessage) -> (HopMessage, Stream) {
        let mut stream = self.open(HOP).await;
        messages::write(&mut stream, request).await;
        (messages::read(&mut stream).await, stream)
    }

    /// Sends these bytes on a hop stream and reads the answer.
    pub async fn send_raw(&mut self, bytes: &[u8]) -> HopMessage {
        let mut stream = self.open(HOP).await;
        stream.write_all(bytes).await.expect("the relay reads");
        stream.flush().await.expect("the relay reads");
        messages::read(&mut stream).await
    }

    /// Reserves a slot; panics if the relay refuses.
    pub async fn reserve(&mut self) -> HopMessage {
        let answer = self.request(&messages::reserve()).await;
        assert_eq!(answer.status, OK, "{answer:?}");
        answer
    }

    /// Closes every connection.
    pub async fn disconnect(self) {
        self.task.abort();
        let _ = self.task.await;
    }
}

/// Two clients, the second of which holds a slot.
pub async fn source_and_target(relay: &Relay) -> (Client, Client) {
    source_and_target_at(&relay.address).await
}

/// As [`source_and_target`], of the relay at this address.
pub async fn source_and_target_at(relay: &Multiaddr) -> (Client, Client) {
    let (source, mut target) = (Client::connect_to(relay).await, Client::connect_to(relay).await);
    target.reserve().await;
    (source, target)
}

/// Opens a circuit from `source` to `target`, which holds a reservation. Returns both ends.
pub async fn circuit(source: &mut Client, target: &mut Client) -> (Stream, Stream) {
    let mut stops = target.accept(STOP);
    circuit_to(source, target.peer, &mut stops).await
}

/// As [`circuit`], for a target that already accepts stop streams.
pub async fn circuit_to(
    source: &mut Client,
    target: PeerId,
    stops: &mut IncomingStreams,
) -> (Stream, Stream) {
    let connect = messages::connect(target);
    let (answered, accepted) =
        tokio::join!(source.request_circuit(&connect), accept_circuit(stops));
    let ((answer, source), (_, target)) = (answered, accepted);
    assert_eq!(answer.status, OK, "{answer:?}");
    (source, target)
}

/// Reads the next stop request and accepts the circuit.
pub async fn accept_circuit(stops: &mut IncomingStreams) -> (StopMessage, Stream) {
    let (_, mut stream) = within(stops.next()).await.expect("the client runs");
    let request: StopMessage = messages::read(&mut stream).await;
    messages::write(&mut stream, &messages::stop_status(100)).await;
    (request, stream)
}

/// Awaits `future`; panics after [`TEST_TIMEOUT`].
pub async fn within<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(TEST_TIMEOUT, future).await.expect("it finishes within three minutes")
}

/// Reads exactly `count` bytes.
pub async fn read_bytes(stream: &mut Stream, count: usize) -> Vec<u8> {
    let mut bytes = vec![0; count];
    within(stream.read_exact(&mut bytes)).await.expect("the stream has as many bytes");
    bytes
}

/// Sends these bytes at one end of a circuit, and asserts that they arrive at the other.
pub async fn assert_relayed(from: &mut Stream, to: &mut Stream, bytes: &[u8]) {
    let ((), read) = tokio::join!(by_hand::send(from, bytes), read_bytes(to, bytes.len()));
    assert!(read == bytes, "the received bytes are those sent");
}

/// Reads until the stream is closed (`Ok`) or reset (`Err`). Returns the bytes as well.
pub async fn read_to_end(stream: &mut Stream) -> (Vec<u8>, std::io::Result<()>) {
    let mut bytes = Vec::new();
    let mut buffer = [0; 4096];
    loop {
        match within(stream.read(&mut buffer)).await {
            Ok(0) => return (bytes, Ok(())),
            Ok(read) => bytes.extend_from_slice(&buffer[..read]),
            Err(error) => return (bytes, Err(error)),
        }
    }
}
