//! One stay of a client: rust-libp2p's swarm and relay client, which can stop being polled together with all its
//! connections.
//!
//! The client itself runs the swarm's tasks, without a runtime: while they are not polled, nothing is read or answered,
//! as in a stopped process.

use std::{
    future::{pending, poll_fn},
    io,
    net::Ipv4Addr,
    pin::Pin,
    sync::Arc,
    task::Poll,
    time::Duration,
};

use libp2p::{
    Multiaddr, PeerId, StreamProtocol, Swarm, Transport,
    core::upgrade::Version,
    futures::{
        AsyncReadExt, AsyncWriteExt, FutureExt, StreamExt,
        future::{self, BoxFuture},
        stream::FuturesUnordered,
    },
    identity::Keypair,
    multiaddr::Protocol,
    noise, ping, relay,
    swarm::{Config, DialError, NetworkBehaviour, SwarmEvent},
    yamux,
};
use libp2p_stream::Control;
use tokio::{
    sync::mpsc::{self, UnboundedReceiver, UnboundedSender},
    time::{Instant, sleep, sleep_until, timeout},
};

use crate::{
    common::{peer_of, tcp_from::TcpFrom},
    observer::Seen,
    plan::FACTOR,
    trace::Family,
};

const ECHO: StreamProtocol = StreamProtocol::new("/soak/echo/1.0.0");

/// Longer than any soak.
const NEVER: Duration = Duration::from_secs(365 * 24 * 60 * 60);

/// The pause before a denied connection is tried again.
const RETRY_DELAY: Duration = Duration::from_millis(500);

/// How long an echo may take while both ends are live.
const ECHO_TIMEOUT: Duration = Duration::from_secs(5);

/// A command to a stay.
pub enum Command {
    /// Stops reading and answering until this time.
    Stall(Instant),
    /// Connects to this peer through the relay, and has this many bytes echoed.
    Connect(PeerId, usize),
    /// Exits: the kernel closes the connection.
    Close,
    /// Disappears silently: nothing is read any more, and the socket is closed after this time, when it no longer
    /// matters.
    Vanish(Duration),
}

/// The identity, the address and the channels of a stay.
pub struct Stay {
    pub keypair: Keypair,
    pub family: Family,
    pub from: Ipv4Addr,
    pub relay: Multiaddr,
    pub commands: UnboundedReceiver<Command>,
    /// Reports what the client sees.
    pub report: Arc<dyn Fn(Seen) + Send + Sync>,
}

type Task = BoxFuture<'static, ()>;

#[derive(NetworkBehaviour)]
struct Parts {
    relay: relay::client::Behaviour,
    ping: ping::Behaviour,
    stream: libp2p_stream::Behaviour,
}

/// A swarm and the tasks of its connections.
struct ClientSwarm {
    swarm: Swarm<Parts>,
    tasks: FuturesUnordered<Task>,
    new: UnboundedReceiver<Task>,
    spawn: UnboundedSender<Task>,
}

impl ClientSwarm {
    fn of(stay: &Stay) -> Self {
        let peer = stay.keypair.public().to_peer_id();
        let (circuits, relay) = relay::client::new(peer);
        let transport = circuits
            .or_transport(TcpFrom(stay.from))
            .upgrade(Version::V1Lazy)
            .authenticate(noise::Config::new(&stay.keypair).expect("a key for Noise"))
            .multiplex(yamux::Config::default())
            .boxed();
        let keepalive = stay.family.keepalive_interval().map(|every| every / FACTOR);
        let ping = ping::Config::new().with_interval(keepalive.unwrap_or(NEVER));
        let parts = Parts {
            relay,
            ping: ping::Behaviour::new(ping),
            stream: libp2p_stream::Behaviour::new(),
        };
        let (spawn, new) = mpsc::unbounded_channel();
        let own = spawn.clone();
        let executor = move |task: Pin<Box<dyn Future<Output = ()> + Send>>| {
            let _ = own.send(task);
        };
        let config = Config::with_executor(executor).with_idle_connection_timeout(NEVER);
        Self {
            swarm: Swarm::new(transport, parts, peer, config),
            tasks: FuturesUnordered::new(),
            new,
            spawn,
        }
    }

    /// Runs the tasks until the swarm emits an event.
    async fn next(&mut self) -> SwarmEvent<PartsEvent> {
        poll_fn(|cx| {
            loop {
                while let Poll::Ready(Some(task)) = self.new.poll_recv(cx) {
                    self.tasks.push(task);
                }
                let ended = matches!(self.tasks.poll_next_unpin(cx), Poll::Ready(Some(())));
                if let Poll::Ready(Some(event)) = self.swarm.poll_next_unpin(cx) {
                    return Poll::Ready(event);
                }
                if !ended {
                    return Poll::Pending;
                }
            }
        })
        .await
    }
}

/// A running stay.
struct RunningStay {
    stay: Stay,
    swarm_with_tasks: ClientSwarm,
    relay: PeerId,
    holds: bool,
    refusals: u32,
    /// When it connects or reserves again.
    retry_at: Option<Instant>,
    dialing: Vec<(PeerId, usize)>,
    done: (UnboundedSender<PeerId>, UnboundedReceiver<PeerId>),
}

/// Runs a stay to its end.
pub async fn run(stay: Stay) {
    let swarm_with_tasks = ClientSwarm::of(&stay);
    let relay = peer_of(&stay.relay);
    let mut running = RunningStay {
        stay,
        swarm_with_tasks,
        relay,
        holds: false,
        refusals: 0,
        retry_at: None,
        dialing: Vec::new(),
        done: mpsc::unbounded_channel(),
    };
    running.accept_echoes();
    running.connect_or_reserve();
    running.run_loop().await;
}

impl RunningStay {
    async fn run_loop(&mut self) {
        loop {
            let retry_at = self.retry_at;
            let retry = async move {
                match retry_at {
                    Some(retry_at) => sleep_until(retry_at).await,
                    None => pending().await,
                }
            };
            tokio::select! {
                biased;
                command = self.stay.commands.recv() => if let Some(close_after) = self.handle_command(command).await {
                    return sleep(close_after).await;
                },
                () = retry => {
                    self.retry_at = None;
                    self.connect_or_reserve();
                }
                Some(peer) = self.done.1.recv() => {
                    let _ = self.swarm_with_tasks.swarm.disconnect_peer_id(peer);
                }
                event = self.swarm_with_tasks.next() => self.handle_event(event),
            }
        }
    }

    /// Handles a command. If it ends the stay: returns after how long the sockets are closed.
    async fn handle_command(&mut self, command: Option<Command>) -> Option<Duration> {
        match command {
            Some(Command::Stall(until)) => self.stall(until).await,
            Some(Command::Connect(peer, bytes)) => {
                self.connect(peer, bytes);
                None
            }
            Some(Command::Vanish(close_after)) => Some(close_after),
            Some(Command::Close) | None => Some(Duration::ZERO),
        }
    }

    /// Does nothing until this time, except for a command that ends the stay.
    async fn stall(&mut self, until: Instant) -> Option<Duration> {
        (self.stay.report)(Seen::Froze);
        loop {
            let command = tokio::select! {
                () = sleep_until(until) => break,
                command = self.stay.commands.recv() => command,
            };
            match command {
                Some(Command::Stall(_) | Command::Connect(..)) => {}
                Some(Command::Vanish(close_after)) => return Some(close_after),
                Some(Command::Close) | None => return Some(Duration::ZERO),
            }
        }
        (self.stay.report)(Seen::Thawed);
        None
    }

    /// Connects, or reserves if it is connected.
    fn connect_or_reserve(&mut self) {
        if self.swarm_with_tasks.swarm.is_connected(&self.relay) {
            return self.reserve();
        }
        if self.swarm_with_tasks.swarm.dial(self.stay.relay.clone()).is_err() {
            self.retry_at = Some(Instant::now() + RETRY_DELAY);
        }
    }

    fn reserve(&mut self) {
        (self.stay.report)(Seen::Requested);
        let circuit = self.stay.relay.clone().with(Protocol::P2pCircuit);
        let listening = self.swarm_with_tasks.swarm.listen_on(circuit);
        listening.expect("a relay's address");
    }

    fn retry_after(&mut self, pause: Option<Duration>) {
        self.retry_at = pause.map(|pause| Instant::now() + pause / FACTOR);
    }

    fn handle_event(&mut self, event: SwarmEvent<PartsEvent>) {
        match event {
            SwarmEvent::ConnectionEstablished { peer_id, .. } if peer_id == self.relay => {
                self.reserve();
            }
            SwarmEvent::ConnectionEstablished { peer_id, .. } => self.request_echo(peer_id),
            SwarmEvent::Behaviour(PartsEvent::Relay(
                relay::client::Event::ReservationReqAccepted { renewal, .. },
            )) => {
                self.holds = true;
                self.refusals = 0;
                (self.stay.report)(Seen::Granted { renewal });
            }
            SwarmEvent::ListenerClosed { reason: Err(why), .. }
                if self.swarm_with_tasks.swarm.is_connected(&self.relay) =>
            {
                let Some(why) = refusal(&why) else {
                    return; // the connection is closing
                };
                (self.stay.report)(Seen::Refused(why));
                self.holds = false;
                self.refusals += 1;
                self.retry_after(self.stay.family.retry_after_refusal(self.refusals));
            }
            SwarmEvent::ConnectionClosed { peer_id, num_established: 0, cause, .. }
                if peer_id == self.relay =>
            {
                if std::mem::take(&mut self.holds) {
                    (self.stay.report)(Seen::Lost(format!("{cause:?}")));
                    self.retry_after(self.stay.family.reconnect_after_close());
                } else if self.retry_at.is_none() {
                    (self.stay.report)(Seen::Closed);
                    self.retry_after(self.stay.family.reconnect_after_close());
                }
            }
            SwarmEvent::OutgoingConnectionError { peer_id, error, .. } => {
                if peer_id.is_none_or(|peer| peer == self.relay) {
                    (self.stay.report)(Seen::Denied);
                    self.retry_at = Some(Instant::now() + RETRY_DELAY);
                    return;
                }
                let before = self.dialing.len();
                self.dialing.retain(|(dialed, _)| Some(*dialed) != peer_id);
                if self.dialing.len() < before {
                    (self.stay.report)(Seen::NoCircuit(no_circuit(&error)));
                }
            }
            _ => {}
        }
    }

    fn connect(&mut self, peer: PeerId, bytes: usize) {
        let through = self.stay.relay.clone().with(Protocol::P2pCircuit);
        if self.swarm_with_tasks.swarm.dial(through.with(Protocol::P2p(peer))).is_ok() {
            self.dialing.push((peer, bytes));
        }
    }

    fn request_echo(&mut self, peer: PeerId) {
        let Some(at) = self.dialing.iter().position(|(dialed, _)| *dialed == peer) else {
            return; // the other side dialed
        };
        let (_, bytes) = self.dialing.swap_remove(at);
        let control = self.swarm_with_tasks.swarm.behaviour().stream.new_control();
        let (done, report) = (self.done.0.clone(), Arc::clone(&self.stay.report));
        let echo = async move {
            match timeout(ECHO_TIMEOUT, check_echo(control, peer, bytes)).await {
                Ok(Ok(correct)) => report(Seen::Echoed { correct }),
                _ => report(Seen::NoEcho),
            }
            let _ = done.send(peer);
        };
        let _ = self.swarm_with_tasks.spawn.send(echo.boxed());
    }

    /// Echoes what arrives.
    fn accept_echoes(&mut self) {
        let mut control = self.swarm_with_tasks.swarm.behaviour().stream.new_control();
        let mut incoming = control.accept(ECHO).expect("accept is called once");
        let spawn = self.swarm_with_tasks.spawn.clone();
        let answers = async move {
            while let Some((_, stream)) = incoming.next().await {
                let echo = async move {
                    let (reader, mut writer) = stream.split();
                    let _ = libp2p::futures::io::copy(reader, &mut writer).await;
                    let _ = writer.close().await;
                };
                let _ = spawn.send(echo.boxed());
            }
        };
        let _ = self.swarm_with_tasks.spawn.send(answers.boxed());
    }
}

/// Sends this many bytes; returns whether the same ones come back.
async fn check_echo(mut control: Control, peer: PeerId, bytes: usize) -> io::Result<bool> {
    let opened = control.open_stream(peer, ECHO).await;
    let stream = opened.map_err(io::Error::other)?;
    let (mut reader, mut writer) = stream.split();
    let sent: Vec<u8> = (0..bytes).map(|at| (at * 7 + at / 251) as u8).collect();
    let mut received = Vec::new();
    let sending = async {
        writer.write_all(&sent).await?;
        writer.close().await
    };
    future::try_join(sending, reader.read_to_end(&mut received)).await?;
    // The stream may end early, by a limit of the circuit or with the other end; the bytes must be correct.
    match sent.starts_with(&received) {
        true if received.len() < sent.len() => Err(io::ErrorKind::UnexpectedEof.into()),
        correct => Ok(correct),
    }
}

/// The status of the relay's refusal, if it is one.
fn refusal(error: &io::Error) -> Option<&'static str> {
    let text = format!("{error:?}");
    ["Refused", "ResourceLimitExceeded"]
        .into_iter()
        .find(|status| text.contains(&format!("Reservation({status})")))
}

/// The status of the relay's answer to CONNECT.
fn no_circuit(error: &DialError) -> &'static str {
    let text = format!("{error:?}");
    ["NoReservation", "ResourceLimitExceeded", "ConnectionFailed"]
        .into_iter()
        .find(|status| text.contains(status))
        .unwrap_or("no answer")
}
