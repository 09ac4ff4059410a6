//! One stay of a client: rust-libp2p's swarm and relay client, which can be left unpolled with all
//! its connections.
//!
//! The swarm's tasks are run by the client itself, and by no runtime: whatever is not polled here
//! neither reads nor answers, as a process that is stopped.

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

use crate::{common::tcp_from::TcpFrom, observer::Saw, plan::FACTOR, trace::Family};

const ECHO: StreamProtocol = StreamProtocol::new("/soak/echo/1.0.0");

/// Longer than any soak.
const NEVER: Duration = Duration::from_secs(365 * 24 * 60 * 60);

/// A client that was turned away at the door tries again.
const DOOR: Duration = Duration::from_millis(500);

/// How long an echo may take, both ends being there.
const ECHOED_WITHIN: Duration = Duration::from_secs(5);

/// What a stay is told to do.
pub enum Order {
    /// Neither reads nor answers until then.
    Stall(Instant),
    /// Connects to this peer through the relay, and has so many bytes come back.
    Call(PeerId, usize),
    /// Its process ends: the kernel closes its connection.
    Close,
    /// It is gone without a word: nothing is read any more, and the socket is closed when nobody
    /// can mind any more.
    Vanish(Duration),
}

/// Who stays, and where.
pub struct Stay {
    pub keypair: Keypair,
    pub family: Family,
    pub from: Ipv4Addr,
    pub relay: Multiaddr,
    pub orders: UnboundedReceiver<Order>,
    /// Says what it saw.
    pub tell: Arc<dyn Fn(Saw) + Send + Sync>,
}

type Task = BoxFuture<'static, ()>;

#[derive(NetworkBehaviour)]
struct Parts {
    relay: relay::client::Behaviour,
    ping: ping::Behaviour,
    stream: libp2p_stream::Behaviour,
}

/// A swarm and the tasks of its connections.
struct Body {
    swarm: Swarm<Parts>,
    tasks: FuturesUnordered<Task>,
    new: UnboundedReceiver<Task>,
    spawn: UnboundedSender<Task>,
}

impl Body {
    fn of(stay: &Stay) -> Self {
        let peer = stay.keypair.public().to_peer_id();
        let (circuits, relay) = relay::client::new(peer);
        let transport = circuits
            .or_transport(TcpFrom(stay.from))
            .upgrade(Version::V1Lazy)
            .authenticate(noise::Config::new(&stay.keypair).expect("a key for Noise"))
            .multiplex(yamux::Config::default())
            .boxed();
        let talks = stay.family.talks_every().map(|every| every / FACTOR);
        let ping = ping::Config::new().with_interval(talks.unwrap_or(NEVER));
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

    /// Runs until the swarm has something to say.
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

/// A stay as it goes on.
struct Life {
    stay: Stay,
    body: Body,
    relay: PeerId,
    holds: bool,
    refusals: u32,
    /// When it tries again.
    again: Option<Instant>,
    calls: Vec<(PeerId, usize)>,
    over: (UnboundedSender<PeerId>, UnboundedReceiver<PeerId>),
}

/// Lives it to its end.
pub async fn live(stay: Stay) {
    let body = Body::of(&stay);
    let Some(Protocol::P2p(relay)) = stay.relay.iter().last() else {
        panic!("{} names no peer", stay.relay);
    };
    let mut life = Life {
        stay,
        body,
        relay,
        holds: false,
        refusals: 0,
        again: None,
        calls: Vec::new(),
        over: mpsc::unbounded_channel(),
    };
    life.answers_echoes();
    life.tries();
    life.goes_on().await;
}

impl Life {
    async fn goes_on(&mut self) {
        loop {
            let again = self.again;
            let waits = async move {
                match again {
                    Some(again) => sleep_until(again).await,
                    None => pending().await,
                }
            };
            tokio::select! {
                biased;
                order = self.stay.orders.recv() => if let Some(buried_after) = self.does(order).await {
                    return sleep(buried_after).await;
                },
                () = waits => {
                    self.again = None;
                    self.tries();
                }
                Some(peer) = self.over.1.recv() => {
                    let _ = self.body.swarm.disconnect_peer_id(peer);
                }
                event = self.body.next() => self.hears(event),
            }
        }
    }

    /// Does as told. If that was the end: after how long its sockets are closed.
    async fn does(&mut self, order: Option<Order>) -> Option<Duration> {
        match order {
            Some(Order::Stall(until)) => self.stalls(until).await,
            Some(Order::Call(peer, bytes)) => {
                self.calls(peer, bytes);
                None
            }
            Some(Order::Vanish(buried_after)) => Some(buried_after),
            Some(Order::Close) | None => Some(Duration::ZERO),
        }
    }

    /// Is not there until then, but for its end.
    async fn stalls(&mut self, until: Instant) -> Option<Duration> {
        (self.stay.tell)(Saw::Froze);
        loop {
            let order = tokio::select! {
                () = sleep_until(until) => break,
                order = self.stay.orders.recv() => order,
            };
            match order {
                Some(Order::Stall(_) | Order::Call(..)) => {}
                Some(Order::Vanish(buried_after)) => return Some(buried_after),
                Some(Order::Close) | None => return Some(Duration::ZERO),
            }
        }
        (self.stay.tell)(Saw::Thawed);
        None
    }

    /// Connects if it is not, and asks for a slot.
    fn tries(&mut self) {
        if self.body.swarm.is_connected(&self.relay) {
            return self.asks();
        }
        if self.body.swarm.dial(self.stay.relay.clone()).is_err() {
            self.again = Some(Instant::now() + DOOR);
        }
    }

    fn asks(&mut self) {
        (self.stay.tell)(Saw::Asks);
        let circuit = self.stay.relay.clone().with(Protocol::P2pCircuit);
        let listening = self.body.swarm.listen_on(circuit);
        listening.expect("a relay's address");
    }

    fn comes_back_after(&mut self, pause: Option<Duration>) {
        self.again = pause.map(|pause| Instant::now() + pause / FACTOR);
    }

    fn hears(&mut self, event: SwarmEvent<PartsEvent>) {
        match event {
            SwarmEvent::ConnectionEstablished { peer_id, .. } if peer_id == self.relay => {
                self.asks();
            }
            SwarmEvent::ConnectionEstablished { peer_id, .. } => self.is_connected_to(peer_id),
            SwarmEvent::Behaviour(PartsEvent::Relay(
                relay::client::Event::ReservationReqAccepted { renewal, .. },
            )) => {
                self.holds = true;
                self.refusals = 0;
                (self.stay.tell)(Saw::Granted { renewal });
            }
            SwarmEvent::ListenerClosed { reason: Err(why), .. }
                if self.body.swarm.is_connected(&self.relay) =>
            {
                let Some(why) = refusal(&why) else {
                    return; // the connection is on its way out
                };
                (self.stay.tell)(Saw::Refused(why));
                self.holds = false;
                self.refusals += 1;
                self.comes_back_after(self.stay.family.asks_again_after(self.refusals));
            }
            SwarmEvent::ConnectionClosed { peer_id, num_established: 0, cause, .. }
                if peer_id == self.relay =>
            {
                if std::mem::take(&mut self.holds) {
                    (self.stay.tell)(Saw::Lost(format!("{cause:?}")));
                    self.comes_back_after(self.stay.family.returns_after());
                } else if self.again.is_none() {
                    (self.stay.tell)(Saw::Closed);
                    self.comes_back_after(self.stay.family.returns_after());
                }
            }
            SwarmEvent::OutgoingConnectionError { peer_id, error, .. } => {
                if peer_id.is_none_or(|peer| peer == self.relay) {
                    (self.stay.tell)(Saw::TurnedAway);
                    self.again = Some(Instant::now() + DOOR);
                    return;
                }
                let before = self.calls.len();
                self.calls.retain(|(called, _)| Some(*called) != peer_id);
                if self.calls.len() < before {
                    (self.stay.tell)(Saw::NoCircuit(no_circuit(&error)));
                }
            }
            _ => {}
        }
    }

    fn calls(&mut self, peer: PeerId, bytes: usize) {
        let through = self.stay.relay.clone().with(Protocol::P2pCircuit);
        if self.body.swarm.dial(through.with(Protocol::P2p(peer))).is_ok() {
            self.calls.push((peer, bytes));
        }
    }

    fn is_connected_to(&mut self, peer: PeerId) {
        let Some(at) = self.calls.iter().position(|(called, _)| *called == peer) else {
            return; // the other side called
        };
        let (_, bytes) = self.calls.swap_remove(at);
        let control = self.body.swarm.behaviour().stream.new_control();
        let (over, tell) = (self.over.0.clone(), Arc::clone(&self.stay.tell));
        let echo = async move {
            match timeout(ECHOED_WITHIN, echoed(control, peer, bytes)).await {
                Ok(Ok(right)) => tell(Saw::Echoed { right }),
                _ => tell(Saw::NoEcho),
            }
            let _ = over.send(peer);
        };
        let _ = self.body.spawn.send(echo.boxed());
    }

    /// Gives back whatever comes.
    fn answers_echoes(&mut self) {
        let mut control = self.body.swarm.behaviour().stream.new_control();
        let mut incoming = control.accept(ECHO).expect("it is not taken yet");
        let spawn = self.body.spawn.clone();
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
        let _ = self.body.spawn.send(answers.boxed());
    }
}

/// Whether so many bytes come back as they were sent.
async fn echoed(mut control: Control, peer: PeerId, bytes: usize) -> io::Result<bool> {
    let opened = control.open_stream(peer, ECHO).await;
    let stream = opened.map_err(io::Error::other)?;
    let (mut reader, mut writer) = stream.split();
    let sent: Vec<u8> = (0..bytes).map(|at| (at * 7 + at / 251) as u8).collect();
    let mut heard = Vec::new();
    let sending = async {
        writer.write_all(&sent).await?;
        writer.close().await
    };
    future::try_join(sending, reader.read_to_end(&mut heard)).await?;
    // The end may come early, by a limit of the circuit or with its other side; other bytes may not.
    match sent.starts_with(&heard) {
        true if heard.len() < sent.len() => Err(io::ErrorKind::UnexpectedEof.into()),
        right => Ok(right),
    }
}

/// How the relay put it, if it did.
fn refusal(error: &io::Error) -> Option<&'static str> {
    let text = format!("{error:?}");
    ["Refused", "ResourceLimitExceeded"]
        .into_iter()
        .find(|status| text.contains(&format!("Reservation({status})")))
}

/// Why a circuit is none, as the relay put it.
fn no_circuit(error: &DialError) -> &'static str {
    let text = format!("{error:?}");
    ["NoReservation", "ResourceLimitExceeded", "ConnectionFailed"]
        .into_iter()
        .find(|status| text.contains(status))
        .unwrap_or("no answer")
}
