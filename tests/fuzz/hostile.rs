//! A relay between two well-behaved peers and two that are not: what these may do over three
//! connections, byte by byte, is all that a muxer lets anyone do.
//!
//! The relay is the whole behaviour in a swarm, with nothing below it: no socket, no cipher, and a
//! muxer in memory ([`super::memory`]). A history is any bytes: each step is a number and what it
//! needs. After each step nothing may spin, and what the relay holds for a peer is bounded; after
//! the last, when those two are gone, nothing is left of them, and the others did not notice.

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
    memory::{Door, Link, Pipe, Shared, WINDOW},
    protobuf::{self, HOP},
};

const HEADER: &str = "/multistream/1.0.0";
const HOP_PROTOCOL: &str = "/libp2p/circuit/relay/0.2.0/hop";
const STOP_PROTOCOL: &str = "/libp2p/circuit/relay/0.2.0/stop";
const PING_PROTOCOL: &str = "/ipfs/ping/1.0.0";

// Who is who, by the connections. The first two behave: Ben has a circuit to Anna.
const ANNA: usize = 0;
const BEN: usize = 1;
const MALLORY: usize = 2;
const MALLORY_AGAIN: usize = 3;
const MO: usize = 4;
const HOSTILE: [usize; 3] = [MALLORY, MALLORY_AGAIN, MO];

/// How often the swarm may ask to be polled before it has nothing more to do.
const PATIENCE: usize = 100_000;

/// As many requests as one connection may have on their way (`handler.rs`), as many streams as a
/// swarm negotiates at a time, and the pings that are served.
const MOST_OPENED: usize = 128 + 128 + 2;

/// Questions for a sign of life that wait for a stream or an answer.
const MOST_QUESTIONS: usize = 8;

/// The most that one circuit may hold back for a reader that stops, each way (`buffer.rs`).
const HELD_BACK: usize = 64_499;

/// What one stream may have sent before there is an answer: names of protocols and a request.
const UNANSWERED: usize = 16 * 1024;

/// How fast time passes.
#[derive(Clone, Copy, PartialEq)]
enum Tempo {
    /// A pause is two sweeps.
    Fast,
    /// Whoever lets several worlds live through the same pause says how long it is.
    Shared,
}

/// One history, from its bytes.
pub fn check(bytes: &[u8]) {
    let mut world = World::new(bytes, Tempo::Fast);
    while world.live() {
        thread::sleep(2 * SWEEP);
        world.settle();
    }
    world.end();
}

const SWEEP: Duration = Duration::from_millis(2);

/// Histories side by side, which wait together: so these pauses can be long.
pub fn check_together(histories: &[Vec<u8>], pauses: &[Duration]) {
    let mut worlds: Vec<_> =
        histories.iter().map(|history| World::new(history, Tempo::Shared)).collect();
    for pause in pauses {
        for world in &mut worlds {
            world.live();
        }
        let until = Instant::now() + *pause;
        while Instant::now() < until {
            worlds.iter_mut().for_each(World::settle);
            thread::sleep(Duration::from_millis(10));
        }
    }
    for mut world in worlds {
        while world.live() {}
        world.end();
    }
}

/// How many pauses a history has at most.
const MOST_PAUSES: usize = 4;

/// What is yet to happen.
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
    /// Whether those who behave badly do so to the end.
    reform: bool,
    config: Config,
    swarm: Swarm<Behaviour>,
    door: Door,
    remotes: Vec<Remote>,
    /// The circuits that were opened and are not closed.
    open: HashSet<CircuitId>,
    opened: usize,
    /// All streams there ever were of those that behave badly, gone or not.
    gone: Traffic,
    flag: Arc<Flag>,
}

#[derive(Default)]
struct Traffic {
    streams: usize,
    taken: usize,
    given: usize,
}

/// The other end of a connection.
struct Remote {
    peer: PeerId,
    address: Multiaddr,
    link: Shared<Link>,
    lines: Vec<Line>,
    /// Does on the relay's streams what is expected.
    polite: bool,
    /// Reads what the relay sends.
    reads: bool,
}

/// The other end of a stream.
struct Line {
    pipe: Shared<Pipe>,
    by_relay: bool,
    reads: bool,
    got: Vec<u8>,
    /// How many bytes of that were taken care of.
    served: usize,
    stage: Stage,
}

#[derive(Clone, Copy, PartialEq)]
enum Stage {
    Named,
    Asked,
    Echo,
}

#[derive(Default)]
struct Flag(AtomicBool);

impl Wake for Flag {
    fn wake(self: Arc<Self>) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// The two that behave have what they want for as long as they like.
struct Favourites([PeerId; 2]);

impl Access for Favourites {
    fn may_reserve(&self, _: PeerId, _: &Multiaddr) -> Permission {
        Permission::Allow(Terms::default())
    }

    fn may_connect(&self, source: PeerId, _: &Multiaddr, _: PeerId) -> Permission {
        let mut terms = Terms::default();
        if self.0.contains(&source) {
            terms.circuit_bytes = Some(0);
            terms.circuit_duration = Some(Duration::ZERO);
        }
        Permission::Allow(terms)
    }
}

fn peer(number: usize) -> PeerId {
    PeerId::from_bytes(&[&[0, 32][..], &[number as u8 + 1; 32]].concat()).expect("a peer id")
}

/// Both connections of Mallory are hers.
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
        patient.idle_timeout = Duration::ZERO; // until Anna and Ben are there
        let mut behaviour = Behaviour::new(key, patient).expect("it makes sense");
        behaviour.set_access(Favourites([peer(ANNA), peer(BEN)]));
        let door = Door::default();
        let swarm_config = swarm::Config::without_executor()
            .with_substream_upgrade_protocol_override(Version::V1Lazy);
        let mut swarm = Swarm::new(door.clone().boxed(), behaviour, relay, swarm_config);
        swarm.add_external_address("/ip4/1.2.3.4/tcp/4001".parse().expect("a multiaddr"));
        let mut world = Self {
            history: history.to_vec(),
            script,
            pauses: 0,
            reform: other >> 6 & 1 == 1,
            config,
            swarm,
            door,
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
        assert_eq!(world.ask(ANNA, &[8, 0]), Some(100), "Anna reserves");
        let connect = protobuf::connect(&peer(ANNA).to_bytes());
        assert_eq!(world.ask(BEN, &connect), Some(100), "Ben connects");
        let config = world.config.clone();
        assert_eq!(world.swarm.behaviour_mut().set_config(config), Ok(()));
        world
    }

    fn connect(&self, which: usize) -> Remote {
        let peer = peer_of(which);
        let address: Multiaddr = format!("/ip4/10.0.{which}.1/tcp/1").parse().expect("one");
        Remote {
            peer,
            link: self.door.connect(peer, address.clone()),
            address,
            lines: Vec::new(),
            polite: !HOSTILE.contains(&which),
            reads: true,
        }
    }

    /// Asks on a new stream, and says how it was answered.
    fn ask(&mut self, which: usize, request: &[u8]) -> Option<u64> {
        let said = [proposal(HOP_PROTOCOL), framed(request)].concat();
        let line = self.remotes[which].lines.len();
        self.remotes[which].open(WINDOW).say(&said);
        self.settle();
        let line = &self.remotes[which].lines[line];
        let (_, answer) = line.negotiated()?;
        let (prefix, length) = protobuf::length_in_front(answer)?;
        let message = answer.get(prefix..prefix + length)?;
        let fields = protobuf::read(message, HOP)?.ok()?;
        protobuf::number(&fields, &[5])
    }

    /// Lives on to the next pause. Whether there is one, or it was the end.
    fn live(&mut self) -> bool {
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
            // Several steps may come at once.
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
            let gone = std::mem::take(&mut remote.lines);
            self.gone.add(&gone);
            self.remotes[which] = self.connect(which);
            return;
        }
        let script = &mut self.script;
        match step {
            0..4 => {
                let names = [HOP_PROTOCOL, PING_PROTOCOL, STOP_PROTOCOL, "/who/knows/1.0.0"];
                let name = names[usize::from(step)];
                remote.open(WINDOW).say(&proposal(name));
            }
            4..8 => {
                let request = message(script);
                let said = [proposal(HOP_PROTOCOL), framed(&request)].concat();
                remote.open(WINDOW).say(&said);
            }
            8 => drop(remote.open([0, 1, 100, WINDOW][script.below(4)])),
            9 => {
                for _ in 0..script.below(200) {
                    remote.open(WINDOW).say(&proposal(HOP_PROTOCOL));
                }
            }
            10 => {
                let proposal = proposal([HOP_PROTOCOL, PING_PROTOCOL][script.below(2)]);
                for _ in 0..script.below(64) {
                    remote.open(WINDOW).say(&proposal);
                }
            }
            11 => remote.polite = !remote.polite,
            12 => remote.reads = !remote.reads,
            13 => {
                let mut link = remote.link.lock();
                link.lets_open = !link.lets_open;
                link.wake();
            }
            14 => remote.cut(),
            15 => {
                let peer = peer_of(HOSTILE[script.below(HOSTILE.len())]);
                self.settle(); // what it asked for before
                self.swarm.behaviour_mut().release(peer);
                self.settle();
                // A question that waits for a stream is given up only when there is one.
                let left = self.swarm.behaviour().view().circuits.of(&peer);
                let left = left.filter(|(circuit, _)| self.open.contains(circuit));
                assert_eq!(left.count(), 0, "circuits of a peer that was given up");
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
                let count = remote.lines.len();
                // Rather one of the last.
                let back = script.below(8).min(count.saturating_sub(1));
                if let Some(line) = count.checked_sub(1 + back).map(|at| &mut remote.lines[at]) {
                    line.step(step, script);
                }
            }
        }
    }

    /// Lets the relay do all that there is to do, and the other ends what they always do.
    fn settle(&mut self) {
        let waker = Waker::from(Arc::clone(&self.flag));
        let cx = &mut Context::from_waker(&waker);
        for _ in 0..PATIENCE {
            self.flag.0.store(false, Ordering::Relaxed);
            let mut moved = false;
            while let Poll::Ready(event) = Pin::new(&mut self.swarm).poll_next(cx) {
                self.noted(event.expect("a swarm does not end"));
                moved = true;
            }
            for remote in &mut self.remotes {
                moved |= remote.tend();
            }
            if !moved && !self.flag.0.load(Ordering::Relaxed) {
                return self.is_bounded();
            }
        }
        panic!("the relay finds no rest");
    }

    fn noted(&mut self, event: SwarmEvent<Event>) {
        let favourites = [peer(ANNA), peer(BEN)];
        match event {
            SwarmEvent::Behaviour(Event::CircuitOpened { circuit, .. }) => {
                self.opened += 1;
                assert!(self.open.insert(circuit), "it is open already");
            }
            SwarmEvent::Behaviour(Event::CircuitClosed { circuit, source, .. }) => {
                assert!(self.open.remove(&circuit), "it is not open");
                assert!(!favourites.contains(&source), "Ben's circuit ended");
            }
            SwarmEvent::Behaviour(
                Event::PeerSilent { peer, .. }
                | Event::GraceBegan { peer }
                | Event::ReservationFreed { peer, .. },
            )
            | SwarmEvent::ConnectionClosed { peer_id: peer, .. } => {
                assert!(!favourites.contains(&peer), "{event:?}");
            }
            _ => {}
        }
    }

    /// What the relay holds for others is what it said it would.
    fn is_bounded(&self) {
        let behaviour = self.swarm.behaviour();
        let per_peer = self.config.max_circuits_per_peer;
        for which in HOSTILE {
            let remote = &self.remotes[which];
            let (theirs, relays): (Vec<_>, Vec<_>) =
                remote.lines.iter().partition(|line| !line.by_relay);
            // Streams that it did not look at yet are the muxer's.
            let held = |line: &&&Line| {
                let is_alone = line.pipe.is_alone();
                !is_alone && !line.pipe.lock().dropped
            };
            let waiting = remote.link.lock().waiting();
            let opened = theirs.iter().filter(held).count() - waiting;
            assert!(opened <= MOST_OPENED + per_peer, "{opened} streams");
            let asked = relays.iter().filter(held).count();
            assert!(asked <= MOST_QUESTIONS + per_peer, "{asked} streams");
            assert!(behaviour.view().circuits.count_of(&remote.peer) <= per_peer);
        }
        assert!(behaviour.view().circuits.count() <= self.config.max_circuits);
        assert_eq!(behaviour.view().circuits.open().count(), self.open.len());
        assert!(self.open.len() <= behaviour.view().circuits.count());

        let mut traffic = Traffic::default();
        self.remotes.iter().for_each(|remote| traffic.add(&remote.lines));
        let Traffic { streams, taken, given } = &self.gone;
        let held_back = (traffic.taken + taken).saturating_sub(traffic.given + given);
        let most = (traffic.streams + streams) * UNANSWERED + self.opened * 2 * HELD_BACK;
        assert!(held_back <= most, "{held_back} bytes were taken and not given");
    }

    /// Whoever still has a connection, and behaves from now on, is served on it.
    fn reform(&mut self) {
        for which in HOSTILE {
            let remote = &mut self.remotes[which];
            (remote.polite, remote.reads) = (true, true);
            remote.link.lock().lets_open = true;
            remote.lines.iter().for_each(Line::reset);
        }
        self.settle();
        for which in HOSTILE {
            let answer = self.ask(which, &[]);
            let ping = [proposal(PING_PROTOCOL), vec![5; 32]].concat();
            let line = self.remotes[which].lines.len();
            self.remotes[which].open(WINDOW).say(&ping);
            self.settle();
            let remote = &self.remotes[which];
            if remote.link.lock().dropped {
                continue;
            }
            assert_eq!(answer, Some(400), "it is told that this is no request");
            let echo = [proposal(PING_PROTOCOL), vec![5; 32]].concat();
            assert_eq!(remote.lines[line].got == echo, self.config.answer_ping);
        }
    }

    /// Those who behave badly go, and it is as if they had never been there.
    fn end(mut self) {
        if self.reform {
            self.reform();
        }
        for which in HOSTILE {
            self.remotes[which].cut();
        }
        self.settle();
        for which in HOSTILE {
            let remote = &self.remotes[which];
            assert!(remote.link.lock().dropped, "its connection is gone");
            let left = remote.lines.iter().filter(|line| !line.pipe.is_alone());
            assert_eq!(left.count(), 0, "streams are left");
        }
        let behaviour = self.swarm.behaviour_mut();
        assert_eq!(behaviour.view().connections.count(), 2);
        assert_eq!(behaviour.view().circuits.count(), 1, "Ben's, and no other");
        assert_eq!(behaviour.view().circuits.peers(), 2);
        assert_eq!(behaviour.accounts().count(), 2);
        let table = &behaviour.view().reservations;
        assert_eq!(table.taken() - table.in_grace(), 1, "Anna's, and no other");
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
            let billed_to = ClientPrefix::of(&self.remotes[which].address).expect("an address");
            assert_eq!(table.quota.held(Scope::Address(billed_to)), 0);
        }

        // Ben's circuit carries, and whoever comes next gets what it wants.
        let before = self.remotes[BEN].lines[0].got.len();
        self.remotes[BEN].lines[0].say(&[7; 3000]);
        for _ in 0..200 {
            self.settle();
            if self.remotes[BEN].lines[0].got.len() == before + 3000 {
                break;
            }
            thread::sleep(SWEEP); // for its share of the bandwidth
        }
        assert_eq!(self.remotes[BEN].lines[0].got[before..], [7; 3000]);
        assert_eq!(self.ask(ANNA, &[8, 0]), Some(100), "Anna renews");
        let mut config = self.config.clone();
        config.idle_timeout = Duration::ZERO;
        assert_eq!(self.swarm.behaviour_mut().set_config(config), Ok(()));
        self.remotes[MO] = self.connect(MO + 1);
        self.settle();
        assert_eq!(self.ask(MO, &[8, 0]), Some(100), "a newcomer reserves");
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
    fn add(&mut self, lines: &[Line]) {
        self.streams += lines.len();
        for line in lines {
            let pipe = line.pipe.lock();
            self.taken += pipe.taken;
            self.given += pipe.given;
        }
    }
}

impl Remote {
    fn open(&mut self, window: usize) -> &mut Line {
        let pipe = self.link.lock().open(window);
        self.lines.push(Line::new(pipe, false));
        self.lines.last_mut().expect("it is there")
    }

    fn cut(&mut self) {
        self.link.lock().cut();
        self.lines.iter().for_each(Line::reset);
    }

    /// Takes new streams, reads, and serves. Whether there was something to do.
    fn tend(&mut self) -> bool {
        let accepted = std::mem::take(&mut self.link.lock().accepted);
        let mut moved = !accepted.is_empty();
        let accepted = accepted.into_iter().map(|pipe| Line::new(pipe, true));
        self.lines.extend(accepted);
        if self.reads {
            for line in &mut self.lines {
                moved |= line.read();
                if self.polite && line.by_relay {
                    line.serve();
                }
            }
        }
        moved
    }
}

impl Line {
    fn new(pipe: Shared<Pipe>, by_relay: bool) -> Self {
        Self { pipe, by_relay, reads: true, got: Vec::new(), served: 0, stage: Stage::Named }
    }

    fn say(&mut self, bytes: &[u8]) {
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
        self.got.extend(pipe.from_relay.drain(..));
        pipe.wake();
        true
    }

    fn step(&mut self, step: u8, script: &mut Script) {
        match step {
            18 => self.say(&framed(&message(script))),
            19 => {
                let count = script.below(40);
                self.say(&script.bytes(count));
            }
            20 => {
                let many = vec![script.byte(); 1 << script.below(18)];
                self.say(&many);
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
            25 => self.say(&line("na")),
            26 => self.say(&proposal([STOP_PROTOCOL, PING_PROTOCOL][script.below(2)])),
            27 => self.say(&framed(&[8, 1, 32, 100])), // a target agrees
            28 => self.serve(),
            29 => self.say(&[0; 32]),
            _ => {
                let mut cut = framed(&message(script));
                cut.truncate(script.below(cut.len()));
                self.say(&cut);
            }
        }
    }

    /// Does what is expected of a peer on a stream of the relay's: names its protocol, agrees to a
    /// circuit, and sends back what comes.
    fn serve(&mut self) {
        if self.stage == Stage::Named {
            let Some((name, payload)) = self.negotiated() else {
                return;
            };
            let behind = self.got.len() - payload.len();
            self.stage = match &*name {
                STOP_PROTOCOL => Stage::Asked,
                _ => Stage::Echo,
            };
            self.served = behind;
            self.say(&proposal(&name));
        }
        if self.stage == Stage::Asked {
            let payload = &self.got[self.served..];
            let Some((prefix, length)) = protobuf::length_in_front(payload) else {
                return;
            };
            if payload.len() < prefix + length {
                return;
            }
            self.served += prefix + length;
            self.stage = Stage::Echo;
            self.say(&framed(&[8, 1, 32, 100]));
        }
        let payload = self.got.split_off(self.served);
        self.say(&payload);
        let mut pipe = self.pipe.lock();
        if pipe.closed_by_relay && pipe.from_relay.is_empty() && !pipe.closed {
            pipe.closed = true;
            pipe.wake();
        }
    }

    /// The protocol that the relay named on this stream, and what came behind it.
    fn negotiated(&self) -> Option<(String, &[u8])> {
        let (header, rest) = first_line(&self.got)?;
        let (name, rest) = first_line(rest)?;
        (header == HEADER).then_some((name, rest))
    }
}

/// A line of multistream-select, and what is behind it.
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

/// What somebody might say: most of it is right somewhere.
fn message(script: &mut Script) -> Vec<u8> {
    let connect = |to| protobuf::connect(&peer(to).to_bytes());
    let choice = script.byte();
    let mut message = match choice % 16 {
        0..3 => vec![8, 0],
        3 | 4 => connect(ANNA),
        5 | 6 => connect(MALLORY),
        7 | 8 => connect(MO),
        9 => connect(BEN), // who holds no slot
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
