//! A relay with two well-behaved peers, and two hostile ones that use their three connections, byte by byte, in every
//! way that a muxer allows.
//!
//! The relay is the whole behaviour in a swarm on a muxer in memory ([`super::memory`]), without sockets and
//! encryption. A history is any bytes: each step is a number and its arguments. After each step nothing may spin, and
//! the relay's state for a peer must be bounded. At the end the hostile peers disconnect: nothing of them may be left,
//! and the well-behaved peers must not be affected.

use std::{
    collections::HashSet,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, Wake, Waker},
    thread,
    time::{Duration, Instant},
};

use libp2p::{
    Multiaddr, PeerId, Swarm, Transport,
    core::upgrade::Version,
    futures::Stream,
    identity::Keypair,
    swarm::{self, SwarmEvent},
};
use relaylet::{
    Access, Behaviour, CircuitId, Config, Event, Permission, Terms, address::ClientPrefix,
    relay::quota::Scope,
};

use super::{
    memory::{Link, MemoryTransport, Pipe, Shared, WINDOW},
    protobuf::{self, HOP},
};

const HEADER: &str = "/multistream/1.0.0";
const HOP_PROTOCOL: &str = "/libp2p/circuit/relay/0.2.0/hop";
const STOP_PROTOCOL: &str = "/libp2p/circuit/relay/0.2.0/stop";
const PING_PROTOCOL: &str = "/ipfs/ping/1.0.0";

// The connections. The first two peers are well-behaved: Ben has a circuit to Anna.
const ANNA: usize = 0;
const BEN: usize = 1;
const MALLORY: usize = 2;
const MALLORY_AGAIN: usize = 3;
const MO: usize = 4;
const HOSTILE: [usize; 3] = [MALLORY, MALLORY_AGAIN, MO];

/// How often the swarm may be polled again before it has to be idle.
const MOST_POLLS: usize = 100_000;

/// The most streams of a peer: the requests of a connection (`handler.rs`), the streams that a swarm negotiates at a
/// time, and the ping streams.
const MOST_OPENED: usize = 128 + 128 + 2;

/// The most probes that wait for a stream or an answer.
const MOST_PROBES: usize = 8;

/// The most bytes that one circuit buffers for a reader that stops, in each direction (`circuit.rs`).
const BUFFERED_BY_CIRCUIT: usize = 64_499;

/// The most bytes that one stream may send before it gets an answer: protocol names and a request.
const UNANSWERED: usize = 16 * 1024;

/// How time passes.
#[derive(Clone, Copy, PartialEq)]
enum Tempo {
    /// A pause is two sweeps.
    Fast,
    /// Several histories pause together, for as long as the caller sets.
    Shared,
}

/// Runs one history.
pub fn check(bytes: &[u8]) {
    let mut world = World::new(bytes, Tempo::Fast);
    while world.run_to_pause() {
        thread::sleep(2 * SWEEP);
        world.settle();
    }
    world.end();
}

const SWEEP: Duration = Duration::from_millis(2);

/// Runs several histories that pause together, so that the pauses can be long.
pub fn check_together(histories: &[Vec<u8>], pauses: &[Duration]) {
    let mut worlds: Vec<_> =
        histories.iter().map(|history| World::new(history, Tempo::Shared)).collect();
    for pause in pauses {
        for world in &mut worlds {
            world.run_to_pause();
        }
        let until = Instant::now() + *pause;
        while Instant::now() < until {
            worlds.iter_mut().for_each(World::settle);
            thread::sleep(Duration::from_millis(10));
        }
    }
    for mut world in worlds {
        while world.run_to_pause() {}
        world.end();
    }
}

/// The most pauses of a history.
const MOST_PAUSES: usize = 4;

/// The rest of the history.
struct Script(std::vec::IntoIter<u8>);

impl Script {
    fn byte(&mut self) -> u8 {
        self.0.next().unwrap_or_default()
    }

    fn below(&mut self, count: usize) -> usize {
        usize::from(self.byte()) % count.max(1)
    }

    fn bytes(&mut self, count: usize) -> Vec<u8> {
        self.0.by_ref().take(count).collect()
    }
}

struct World {
    history: Vec<u8>,
    script: Script,
    pauses: usize,
    /// Whether the hostile peers behave well at the end.
    behave_well: bool,
    config: Config,
    swarm: Swarm<Behaviour>,
    transport: MemoryTransport,
    remotes: Vec<Remote>,
    /// The circuits that are open according to the events.
    open: HashSet<CircuitId>,
    opened: usize,
    /// The traffic of the hostile peers' former connections.
    gone: Traffic,
    flag: Arc<Flag>,
}

#[derive(Default)]
struct Traffic {
    streams: usize,
    /// Bytes that the relay has read.
    read: usize,
    /// Bytes that the relay has written.
    written: usize,
}

/// The other end of a connection.
struct Remote {
    peer: PeerId,
    address: Multiaddr,
    link: Shared<Link>,
    streams: Vec<RemoteStream>,
    /// Whether it follows the protocols on streams that the relay opened.
    follows_protocols: bool,
    /// Whether it reads what the relay sends.
    reads: bool,
}

/// The other end of a stream.
struct RemoteStream {
    pipe: Shared<Pipe>,
    by_relay: bool,
    reads: bool,
    received: Vec<u8>,
    /// How many of these bytes were handled.
    served: usize,
    stage: Stage,
}

#[derive(Clone, Copy, PartialEq)]
enum Stage {
    Negotiating,
    AwaitingStop,
    Echo,
}

#[derive(Default)]
struct Flag(AtomicBool);

impl Wake for Flag {
    fn wake(self: Arc<Self>) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Gives the well-behaved peers circuits without limits. Answers about CONNECT come later.
struct UnlimitedFor([PeerId; 2]);

impl Access for UnlimitedFor {
    fn may_reserve(&self, _: PeerId, _: &Multiaddr) -> Permission {
        Permission::Allow(Terms::default())
    }

    fn may_connect(&self, source: PeerId, _: &Multiaddr, _: PeerId) -> Permission {
        let mut terms = Terms::default();
        if self.0.contains(&source) {
            terms.circuit_bytes = Some(0);
            terms.circuit_duration = Some(Duration::ZERO);
        }
        Permission::Later(Box::pin(std::future::ready(Permission::Allow(terms))))
    }
}

fn peer(number: usize) -> PeerId {
    PeerId::from_bytes(&[&[0, 32][..], &[number as u8 + 1; 32]].concat()).expect("a peer id")
}

/// Two of the connections are Mallory's.
fn peer_of(which: usize) -> PeerId {
    peer(if which == MALLORY_AGAIN { MALLORY } else { which })
}

fn config(choice: u8, other: u8, tempo: Tempo) -> Config {
    let bit = |at: u32| choice >> at & 1 == 1;
    let mut config = Config::default();
    config.max_reservations = if bit(0) { 2 } else { 100 };
    config.max_circuits_per_peer = if bit(1) { 2 } else { 64 };
    config.max_circuits = if bit(2) { 4 } else { 1024 };
    config.grace = Duration::from_secs(if bit(3) { 30 } else { 0 });
    config.close_silent = bit(4);
    config.answer_ping = !bit(5);
    config.probe = Duration::from_secs(if bit(6) { 3 } else { 0 });
    config.bandwidth = if bit(7) { 1 << 20 } else { 0 };
    config.circuit_bytes = [0, 1, 1000, 100_000][usize::from(other & 3)];
    config.circuit_duration = Duration::from_secs(u64::from(other >> 2 & 1));
    config.reserve_rate = if other >> 3 & 1 == 1 { 5 } else { 0 };
    config.connect_rate = config.reserve_rate;
    config.bandwidth_per_peer = if other >> 4 & 1 == 1 { 1 << 20 } else { 0 };
    (config.sweep, config.heartbeat) = match tempo {
        Tempo::Fast => (SWEEP, 2 * SWEEP),
        Tempo::Shared => (Duration::from_millis(20), Duration::from_millis(100)),
    };
    config.silence = config.heartbeat + Duration::from_secs(1);
    config.probe_after = config.heartbeat;
    config.idle_timeout = match other >> 5 & 1 {
        1 => 3 * config.heartbeat,
        _ => Duration::ZERO,
    };
    config
}

impl World {
    /// The first two bytes of the history choose the configuration.
    fn new(history: &[u8], tempo: Tempo) -> Self {
        let mut script = Script(Vec::from(history).into_iter());
        let (choice, other) = (script.byte(), script.byte());
        let config = config(choice, other, tempo);
        let key = Keypair::ed25519_from_bytes([9; 32]).expect("a key");
        let relay = key.public().to_peer_id();
        let mut patient = config.clone();
        patient.idle_timeout = Duration::ZERO; // until Anna and Ben have what they need
        let mut behaviour = Behaviour::new(key, patient).expect("a valid configuration");
        behaviour.set_access(UnlimitedFor([peer(ANNA), peer(BEN)]));
        let transport = MemoryTransport::default();
        let swarm_config = swarm::Config::without_executor()
            .with_substream_upgrade_protocol_override(Version::V1Lazy);
        let mut swarm = Swarm::new(transport.clone().boxed(), behaviour, relay, swarm_config);
        swarm.add_external_address("/ip4/1.2.3.4/tcp/4001".parse().expect("a multiaddr"));
        let mut world = Self {
            history: history.to_vec(),
            script,
            pauses: 0,
            behave_well: other >> 6 & 1 == 1,
            config,
            swarm,
            transport,
            remotes: Vec::new(),
            open: HashSet::new(),
            opened: 0,
            gone: Traffic::default(),
            flag: Arc::default(),
        };
        for which in [ANNA, BEN, MALLORY, MALLORY_AGAIN, MO] {
            let remote = world.connect(which);
            world.remotes.push(remote);
        }
        world.settle();
        assert_eq!(world.request(ANNA, &[8, 0]), Some(100), "Anna reserves");
        let connect = protobuf::connect(&peer(ANNA).to_bytes());
        assert_eq!(world.request(BEN, &connect), Some(100), "Ben connects");
        let config = world.config.clone();
        assert_eq!(world.swarm.behaviour_mut().set_config(config), Ok(()));
        world
    }

    fn connect(&self, which: usize) -> Remote {
        let peer = peer_of(which);
        let address: Multiaddr = format!("/ip4/10.0.{which}.1/tcp/1").parse().expect("one");
        Remote {
            peer,
            link: self.transport.connect(peer, address.clone()),
            address,
            streams: Vec::new(),
            follows_protocols: !HOSTILE.contains(&which),
            reads: true,
        }
    }

    /// Sends a request on a new stream, and returns the status of the answer.
    fn request(&mut self, which: usize, request: &[u8]) -> Option<u64> {
        let bytes = [proposal(HOP_PROTOCOL), framed(request)].concat();
        let stream = self.remotes[which].streams.len();
        self.remotes[which].open(WINDOW).send(&bytes);
        self.settle();
        let stream = &self.remotes[which].streams[stream];
        let (_, answer) = stream.negotiated()?;
        let (prefix, length) = protobuf::length_in_front(answer)?;
        let message = answer.get(prefix..prefix + length)?;
        let fields = protobuf::read(message, HOP)?.ok()?;
        protobuf::number(&fields, &[5])
    }

    /// Runs steps up to the next pause. Returns false at the end of the history.
    fn run_to_pause(&mut self) -> bool {
        while let Some(step) = self.script.0.next() {
            let which = HOSTILE[self.script.below(HOSTILE.len())];
            if step % 32 == 31 {
                self.settle();
                if self.pauses < MOST_PAUSES {
                    self.pauses += 1;
                    return true;
                }
                continue;
            }
            self.step(step % 32, which);
            // Several steps may happen before the relay is polled.
            if step & 0x80 == 0 {
                self.settle();
            }
        }
        self.settle();
        false
    }

    fn step(&mut self, step: u8, which: usize) {
        let remote = &mut self.remotes[which];
        if remote.link.lock().dropped {
            let gone = std::mem::take(&mut remote.streams);
            self.gone.add(&gone);
            self.remotes[which] = self.connect(which);
            return;
        }
        let script = &mut self.script;
        match step {
            0..4 => {
                let names = [HOP_PROTOCOL, PING_PROTOCOL, STOP_PROTOCOL, "/who/knows/1.0.0"];
                let name = names[usize::from(step)];
                remote.open(WINDOW).send(&proposal(name));
            }
            4..8 => {
                let request = message(script);
                let bytes = [proposal(HOP_PROTOCOL), framed(&request)].concat();
                remote.open(WINDOW).send(&bytes);
            }
            8 => drop(remote.open([0, 1, 100, WINDOW][script.below(4)])),
            9 => {
                for _ in 0..script.below(200) {
                    remote.open(WINDOW).send(&proposal(HOP_PROTOCOL));
                }
            }
            10 => {
                let proposal = proposal([HOP_PROTOCOL, PING_PROTOCOL][script.below(2)]);
                for _ in 0..script.below(64) {
                    remote.open(WINDOW).send(&proposal);
                }
            }
            11 => remote.follows_protocols = !remote.follows_protocols,
            12 => remote.reads = !remote.reads,
            13 => {
                let mut link = remote.link.lock();
                link.lets_open = !link.lets_open;
                link.wake();
            }
            14 => remote.cut(),
            15 => {
                let peer = peer_of(HOSTILE[script.below(HOSTILE.len())]);
                self.settle(); // its earlier requests
                self.swarm.behaviour_mut().release(peer);
                self.settle();
                // A pending stop request without a stream is abandoned only once there is one.
                let remaining = self.swarm.behaviour().view().circuits.of(&peer);
                let remaining = remaining.filter(|(circuit, _)| self.open.contains(circuit));
                assert_eq!(remaining.count(), 0, "circuits of a released peer");
            }
            16 => self.swarm.behaviour_mut().recheck_access(),
            17 => {
                let mut config = self.config.clone();
                config.max_reservations = 1 + script.below(4);
                config.circuit_bytes = u64::from(script.byte());
                let set = self.swarm.behaviour_mut().set_config(config);
                assert_eq!(set, Ok(()));
            }
            _ => {
                let count = remote.streams.len();
                // Mostly one of the newest.
                let back = script.below(8).min(count.saturating_sub(1));
                if let Some(stream) = count.checked_sub(1 + back).map(|at| &mut remote.streams[at])
                {
                    stream.step(step, script);
                }
            }
        }
    }

    /// Polls the relay until it is idle, and lets the other ends read and serve.
    fn settle(&mut self) {
        let waker = Waker::from(Arc::clone(&self.flag));
        let cx = &mut Context::from_waker(&waker);
        for _ in 0..MOST_POLLS {
            self.flag.0.store(false, Ordering::Relaxed);
            let mut moved = false;
            while let Poll::Ready(event) = Pin::new(&mut self.swarm).poll_next(cx) {
                self.on_event(event.expect("a swarm does not end"));
                moved = true;
            }
            for remote in &mut self.remotes {
                moved |= remote.serve_streams();
            }
            if !moved && !self.flag.0.load(Ordering::Relaxed) {
                return self.assert_bounded();
            }
        }
        panic!("the relay never becomes idle");
    }

    fn on_event(&mut self, event: SwarmEvent<Event>) {
        let well_behaved = [peer(ANNA), peer(BEN)];
        match event {
            SwarmEvent::Behaviour(Event::CircuitOpened { circuit, .. }) => {
                self.opened += 1;
                assert!(self.open.insert(circuit), "a circuit opened twice");
            }
            SwarmEvent::Behaviour(Event::CircuitClosed { circuit, source, .. }) => {
                assert!(self.open.remove(&circuit), "a circuit closed that was not open");
                assert!(!well_behaved.contains(&source), "Ben's circuit ended");
            }
            SwarmEvent::Behaviour(
                Event::PeerSilent { peer, .. }
                | Event::GraceBegan { peer }
                | Event::ReservationFreed { peer, .. },
            )
            | SwarmEvent::ConnectionClosed { peer_id: peer, .. } => {
                assert!(!well_behaved.contains(&peer), "{event:?}");
            }
            _ => {}
        }
    }

    /// Asserts that the relay's state for the hostile peers is within its limits.
    fn assert_bounded(&self) {
        let behaviour = self.swarm.behaviour();
        let per_peer = self.config.max_circuits_per_peer;
        for which in HOSTILE {
            let remote = &self.remotes[which];
            let (theirs, relays): (Vec<_>, Vec<_>) =
                remote.streams.iter().partition(|stream| !stream.by_relay);
            // Streams that were not accepted yet belong to the muxer.
            let held = |stream: &&&RemoteStream| {
                let is_alone = stream.pipe.is_alone();
                !is_alone && !stream.pipe.lock().dropped
            };
            let waiting = remote.link.lock().waiting();
            let opened = theirs.iter().filter(held).count() - waiting;
            assert!(opened <= MOST_OPENED + per_peer, "{opened} streams");
            let opened_by_relay = relays.iter().filter(held).count();
            assert!(opened_by_relay <= MOST_PROBES + per_peer, "{opened_by_relay} streams");
            assert!(behaviour.view().circuits.count_of(&remote.peer) <= per_peer);
        }
        assert!(behaviour.view().circuits.count() <= self.config.max_circuits);
        assert_eq!(behaviour.view().circuits.open().count(), self.open.len());
        assert!(self.open.len() <= behaviour.view().circuits.count());

        let mut traffic = Traffic::default();
        self.remotes.iter().for_each(|remote| traffic.add(&remote.streams));
        let Traffic { streams, read, written } = &self.gone;
        let buffered = (traffic.read + read).saturating_sub(traffic.written + written);
        let most = (traffic.streams + streams) * UNANSWERED + self.opened * 2 * BUFFERED_BY_CIRCUIT;
        assert!(buffered <= most, "{buffered} bytes are buffered");
    }

    /// Hostile peers behave well from now on: those that are still connected must be served.
    fn behave_well(&mut self) {
        for which in HOSTILE {
            let remote = &mut self.remotes[which];
            (remote.follows_protocols, remote.reads) = (true, true);
            remote.link.lock().lets_open = true;
            remote.streams.iter().for_each(RemoteStream::reset);
        }
        self.settle();
        for which in HOSTILE {
            let answer = self.request(which, &[]);
            let ping = [proposal(PING_PROTOCOL), vec![5; 32]].concat();
            let stream = self.remotes[which].streams.len();
            self.remotes[which].open(WINDOW).send(&ping);
            self.settle();
            let remote = &self.remotes[which];
            if remote.link.lock().dropped {
                continue;
            }
            assert_eq!(answer, Some(400), "MALFORMED_MESSAGE");
            let echo = [proposal(PING_PROTOCOL), vec![5; 32]].concat();
            assert_eq!(remote.streams[stream].received == echo, self.config.answer_ping);
        }
    }

    /// Disconnects the hostile peers: nothing of them is left.
    fn end(mut self) {
        if self.behave_well {
            self.behave_well();
        }
        for which in HOSTILE {
            self.remotes[which].cut();
        }
        self.settle();
        for which in HOSTILE {
            let remote = &self.remotes[which];
            assert!(remote.link.lock().dropped, "the connection is dropped");
            let remaining = remote.streams.iter().filter(|stream| !stream.pipe.is_alone());
            assert_eq!(remaining.count(), 0, "streams of a disconnected peer");
        }
        let behaviour = self.swarm.behaviour_mut();
        assert_eq!(behaviour.view().connections.count(), 2);
        assert_eq!(behaviour.view().circuits.count(), 1, "Ben's");
        assert_eq!(behaviour.view().circuits.by_peer.len(), 2);
        assert_eq!(behaviour.accounts().count(), 2);
        let table = &behaviour.view().reservations;
        assert_eq!(table.taken() - table.in_grace(), 1, "Anna's");
        let totals = behaviour.totals();
        assert_eq!((totals.opened, totals.closed + 1), (self.opened as u64, totals.opened));
        for which in [MALLORY, MO] {
            let in_grace = behaviour.view().reservations.get(&peer(which)).is_some();
            assert!(!in_grace || !self.config.grace.is_zero());
            assert_eq!(behaviour.release(peer(which)), in_grace);
        }
        self.settle();
        let table = &self.swarm.behaviour().view().reservations;
        assert_eq!((table.taken(), table.in_grace()), (1, 0));
        assert!(table.iter().map(|(holder, _)| holder).eq([peer(ANNA)]));
        for which in HOSTILE {
            let prefix = ClientPrefix::of(&self.remotes[which].address).expect("an address");
            assert_eq!(table.quota.held(Scope::Address(prefix)), 0);
        }

        // Ben's circuit still relays, and a newcomer gets a slot.
        let before = self.remotes[BEN].streams[0].received.len();
        self.remotes[BEN].streams[0].send(&[7; 3000]);
        for _ in 0..200 {
            self.settle();
            if self.remotes[BEN].streams[0].received.len() == before + 3000 {
                break;
            }
            thread::sleep(SWEEP); // until it gets bandwidth
        }
        assert_eq!(self.remotes[BEN].streams[0].received[before..], [7; 3000]);
        assert_eq!(self.request(ANNA, &[8, 0]), Some(100), "Anna renews");
        let mut config = self.config.clone();
        config.idle_timeout = Duration::ZERO;
        assert_eq!(self.swarm.behaviour_mut().set_config(config), Ok(()));
        self.remotes[MO] = self.connect(MO + 1);
        self.settle();
        assert_eq!(self.request(MO, &[8, 0]), Some(100), "a newcomer reserves");
    }
}

impl Drop for World {
    fn drop(&mut self) {
        if thread::panicking() {
            eprintln!("the history was {:?}", self.history);
        }
    }
}

impl Traffic {
    fn add(&mut self, streams: &[RemoteStream]) {
        self.streams += streams.len();
        for stream in streams {
            let pipe = stream.pipe.lock();
            self.read += pipe.read_by_relay;
            self.written += pipe.written_by_relay;
        }
    }
}

impl Remote {
    fn open(&mut self, window: usize) -> &mut RemoteStream {
        let pipe = self.link.lock().open(window);
        self.streams.push(RemoteStream::new(pipe, false));
        self.streams.last_mut().expect("the new stream")
    }

    fn cut(&mut self) {
        self.link.lock().cut();
        self.streams.iter().for_each(RemoteStream::reset);
    }

    /// Accepts new streams, reads, and serves. Returns whether there was anything to do.
    fn serve_streams(&mut self) -> bool {
        let accepted = std::mem::take(&mut self.link.lock().accepted);
        let mut moved = !accepted.is_empty();
        let accepted = accepted.into_iter().map(|pipe| RemoteStream::new(pipe, true));
        self.streams.extend(accepted);
        if self.reads {
            for stream in &mut self.streams {
                moved |= stream.read();
                if self.follows_protocols && stream.by_relay {
                    stream.serve();
                }
            }
        }
        moved
    }
}

impl RemoteStream {
    fn new(pipe: Shared<Pipe>, by_relay: bool) -> Self {
        Self {
            pipe,
            by_relay,
            reads: true,
            received: Vec::new(),
            served: 0,
            stage: Stage::Negotiating,
        }
    }

    fn send(&mut self, bytes: &[u8]) {
        let mut pipe = self.pipe.lock();
        if !bytes.is_empty() && !pipe.closed && !pipe.reset {
            pipe.to_relay.extend(bytes);
            pipe.wake();
        }
    }

    fn reset(&self) {
        let mut pipe = self.pipe.lock();
        pipe.reset = true;
        pipe.wake();
    }

    fn read(&mut self) -> bool {
        let mut pipe = self.pipe.lock();
        if !self.reads || pipe.from_relay.is_empty() {
            return false;
        }
        self.received.extend(pipe.from_relay.drain(..));
        pipe.wake();
        true
    }

    fn step(&mut self, step: u8, script: &mut Script) {
        match step {
            18 => self.send(&framed(&message(script))),
            19 => {
                let count = script.below(40);
                self.send(&script.bytes(count));
            }
            20 => {
                let many = vec![script.byte(); 1 << script.below(18)];
                self.send(&many);
            }
            21 => {
                let mut pipe = self.pipe.lock();
                pipe.closed = true;
                pipe.wake();
            }
            22 => self.reset(),
            23 => self.reads = !self.reads,
            24 => {
                let mut pipe = self.pipe.lock();
                pipe.window = [0, 1, 1000, WINDOW][script.below(4)];
                pipe.wake();
            }
            25 => self.send(&line("na")),
            26 => self.send(&proposal([STOP_PROTOCOL, PING_PROTOCOL][script.below(2)])),
            27 => self.send(&framed(&[8, 1, 32, 100])), // a target accepts
            28 => self.serve(),
            29 => self.send(&[0; 32]),
            _ => {
                let mut cut = framed(&message(script));
                cut.truncate(script.below(cut.len()));
                self.send(&cut);
            }
        }
    }

    /// Does what the protocols require on a stream that the relay opened: negotiates, accepts a circuit, and echoes.
    fn serve(&mut self) {
        if self.stage == Stage::Negotiating {
            let Some((name, payload)) = self.negotiated() else {
                return;
            };
            let negotiated = self.received.len() - payload.len();
            self.stage = match &*name {
                STOP_PROTOCOL => Stage::AwaitingStop,
                _ => Stage::Echo,
            };
            self.served = negotiated;
            self.send(&proposal(&name));
        }
        if self.stage == Stage::AwaitingStop {
            let payload = &self.received[self.served..];
            let Some((prefix, length)) = protobuf::length_in_front(payload) else {
                return;
            };
            if payload.len() < prefix + length {
                return;
            }
            self.served += prefix + length;
            self.stage = Stage::Echo;
            self.send(&framed(&[8, 1, 32, 100]));
        }
        let payload = self.received.split_off(self.served);
        self.send(&payload);
        let mut pipe = self.pipe.lock();
        if pipe.closed_by_relay && pipe.from_relay.is_empty() && !pipe.closed {
            pipe.closed = true;
            pipe.wake();
        }
    }

    /// The protocol that the relay negotiates on this stream, and the bytes after it.
    fn negotiated(&self) -> Option<(String, &[u8])> {
        let (header, rest) = first_line(&self.received)?;
        let (name, rest) = first_line(rest)?;
        (header == HEADER).then_some((name, rest))
    }
}

/// A line of multistream-select, and the bytes after it.
fn first_line(bytes: &[u8]) -> Option<(String, &[u8])> {
    let (prefix, length) = protobuf::length_in_front(bytes)?;
    let text = bytes.get(prefix..prefix + length)?;
    let text = String::from_utf8_lossy(text.strip_suffix(b"\n")?);
    Some((text.into_owned(), &bytes[prefix + length..]))
}

fn line(text: &str) -> Vec<u8> {
    [&[text.len() as u8 + 1][..], text.as_bytes(), b"\n"].concat()
}

fn proposal(protocol: &str) -> Vec<u8> {
    [line(HEADER), line(protocol)].concat()
}

fn framed(message: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    protobuf::varint(&mut bytes, message.len() as u64, 0);
    bytes.extend(message);
    bytes
}

/// A message, mostly one that is valid in some situation.
fn message(script: &mut Script) -> Vec<u8> {
    let connect = |to| protobuf::connect(&peer(to).to_bytes());
    let choice = script.byte();
    let mut message = match choice % 16 {
        0..3 => vec![8, 0],
        3 | 4 => connect(ANNA),
        5 | 6 => connect(MALLORY),
        7 | 8 => connect(MO),
        9 => connect(BEN), // has no slot
        10 => connect(99),
        11 => vec![8, 2],
        12 => vec![8, 1, 32, 100],
        13 => vec![8, 1, 32, 203, 1],
        14 => vec![],
        _ => {
            let count = script.below(64);
            script.bytes(count)
        }
    };
    if choice >= 0xe0 && !message.is_empty() {
        let at = script.below(message.len());
        message[at] ^= 1 << script.below(8);
    }
    message
}
