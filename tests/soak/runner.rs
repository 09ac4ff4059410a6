//! The relay and its clients: starts and ends stays according to the plan, and informs the observer.

use std::{
    collections::{BTreeMap, HashMap},
    net::Ipv4Addr,
    sync::Arc,
    time::Duration,
};

use libp2p::{PeerId, identity::Keypair};
use rand::{RngExt, SeedableRng, rngs::Xoshiro256PlusPlus};
use tokio::{
    sync::mpsc::{self, UnboundedReceiver, UnboundedSender},
    time::{Instant, sleep, sleep_until},
};

use crate::{
    client::{self, Command, Stay},
    common::{
        Relay,
        http::{self, ON_ANY_PORT},
    },
    observer::{Observer, Report, Seen},
    plan::{FACTOR, Plan},
    report::{self, Outcome},
    samples::Sample,
    status,
    trace::Change,
};

/// The interval at which the relay's status is read.
const STATUS_INTERVAL: Duration = Duration::from_secs(1);

/// The interval at which a client opens a circuit to another, and the most bytes that it sends.
const CIRCUIT_INTERVAL: Duration = Duration::from_millis(150);
const MOST_BYTES: usize = 64 * 1024;

/// The interval at which a task checks that tasks are scheduled in time.
const SCHEDULING_INTERVAL: Duration = Duration::from_millis(20);

/// All remaining clients disconnect within this time.
const DISCONNECT_WITHIN: Duration = Duration::from_secs(5);
const DISCONNECT_WITH_FIN: f64 = 0.7;

/// With this many excused checks the machine is too slow to test the relay.
const MOST_EXCUSED: u64 = 20;

/// What the observer is informed of, with the time.
pub enum Observation {
    Seen(Duration, PeerId, u64, Seen),
    Report(Duration, Duration, Box<Report>),
    Suspended(Duration, Duration),
}

/// How often each kind of event happened to clients.
pub type Counts = BTreeMap<&'static str, u64>;

/// A client of the trace.
#[derive(Default)]
struct Client {
    current: Option<(PeerId, UnboundedSender<Command>)>,
    /// Its previous peer, and whether that ended with a FIN.
    before: Option<(PeerId, bool)>,
    networks: u32,
}

struct Soak<'a> {
    plan: &'a Plan,
    seed: u64,
    relay: Relay,
    started: Instant,
    observer: Observer,
    clients: HashMap<usize, Client>,
    stays: u64,
    counts: Counts,
    random: Xoshiro256PlusPlus,
    sender: UnboundedSender<Observation>,
    samples: Vec<Sample>,
}

/// Runs the plan. Returns the report, or the violated law; and the relay's log.
pub async fn run(plan: &Plan, seed: u64) -> (Result<Outcome, String>, Vec<String>) {
    let mut flags = plan.flags();
    flags.push(ON_ANY_PORT.to_owned());
    let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
    let relay = Relay::start(&flags);
    let (sender, observations) = mpsc::unbounded_channel();
    let mut soak = Soak {
        plan,
        seed,
        started: Instant::now(),
        observer: Observer::new(plan.config.clone()),
        clients: HashMap::new(),
        stays: 0,
        counts: Counts::new(),
        random: Xoshiro256PlusPlus::seed_from_u64(seed),
        sender,
        samples: Vec::new(),
        relay,
    };
    let outcome = soak.run(observations).await;
    (outcome, soak.relay.log())
}

impl Soak<'_> {
    async fn run(
        &mut self,
        mut observations: UnboundedReceiver<Observation>,
    ) -> Result<Outcome, String> {
        let port = http::port(&self.relay).await;
        status::report(port).await;
        sleep(STATUS_INTERVAL).await;
        let before = Sample::of(self.relay.pid());
        self.started = Instant::now();
        tokio::spawn(read_status(port, self.started, self.sender.clone()));
        tokio::spawn(watch_scheduling(self.started, self.sender.clone()));

        self.run_plan(&mut observations).await?;
        let end = self.started.elapsed();
        self.disconnect_all(&mut observations).await?;
        let all_freed = Instant::now() + self.observer.all_freed_within();
        while Instant::now() < all_freed {
            self.observe(&mut observations, all_freed).await?;
        }
        // The task that reads the status is stopped first: its connections are descriptors, too.
        observations.close();
        sleep(2 * STATUS_INTERVAL).await;
        let now = self.started.elapsed();
        let report = status::report(port).await;
        let verdict = self.observer.nothing_left(now, &report);
        verdict.map_err(|broken| broken.to_string())?;
        let freed = status::freed_slots(port).await;
        sleep(STATUS_INTERVAL).await;
        let after = Sample::of(self.relay.pid());
        if !self.relay.is_running() {
            return Err("the relay has ended".to_owned());
        }
        Ok(report::of(report::Measured {
            plan: self.plan,
            counts: &self.counts,
            observer: &self.observer,
            freed,
            before,
            samples: &self.samples,
            end,
            after,
        }))
    }

    /// Runs the events of the plan, and opens circuits in between.
    async fn run_plan(
        &mut self,
        observations: &mut UnboundedReceiver<Observation>,
    ) -> Result<(), String> {
        let plan = self.plan;
        let end = self.started + plan.duration;
        let mut events = plan.events.iter().peekable();
        let mut next_circuit = self.started + CIRCUIT_INTERVAL;
        loop {
            let next = events.peek().map_or(end, |(at, ..)| self.started + *at);
            let now = Instant::now();
            if now >= end {
                return Ok(());
            }
            if now >= next {
                let (_, client, what) = events.next().expect("it was peeked");
                self.apply(*client, *what);
            } else if now >= next_circuit {
                next_circuit = now + CIRCUIT_INTERVAL;
                self.open_circuit();
            } else {
                self.observe(observations, next.min(next_circuit).min(end)).await?;
            }
        }
    }

    /// Passes one observation to the observer, or waits until this time.
    async fn observe(
        &mut self,
        observations: &mut UnboundedReceiver<Observation>,
        until: Instant,
    ) -> Result<(), String> {
        let observations = tokio::select! {
            observations = observations.recv() => observations.expect("a sender is held here"),
            () = sleep_until(until) => return Ok(()),
        };
        let verdict = match observations {
            Observation::Seen(now, peer, stay, seen) => {
                self.count_seen(&seen);
                self.observer.on_seen(now, peer, stay, &seen)
            }
            Observation::Report(requested, now, report) => {
                let clients = self.clients.values();
                let clients = clients.filter(|client| client.current.is_some()).count();
                self.samples.push(Sample {
                    at: now,
                    clients: clients as f64,
                    connections: report.connections as f64,
                    circuits: report.circuits as f64,
                    ..Sample::of(self.relay.pid())
                });
                self.observer.report(now, requested, &report)
            }
            Observation::Suspended(now, pause) => {
                self.observer.on_suspended(now, pause);
                Ok(())
            }
        };
        if let Err(broken) = verdict {
            return Err(match self.relay.is_running() {
                true => broken.to_string(),
                false => format!("the relay has ended; {broken}"),
            });
        }
        match self.observer.excused > MOST_EXCUSED {
            true => Err("this machine is too slow to test the relay".into()),
            false => Ok(()),
        }
    }

    fn apply(&mut self, client: usize, what: Change) {
        match what {
            Change::Start { peer } => self.start_stay(client, peer),
            Change::End { fin } => self.end_stay(client, fin),
            Change::Stall { until } => {
                let until = self.started + until;
                let current = self.clients.get(&client).and_then(|c| c.current.as_ref());
                if let Some((_, commands)) = current {
                    let _ = commands.send(Command::Stall(until));
                    self.tally("froze, and thawed");
                }
            }
        }
    }

    fn start_stay(&mut self, number: usize, peer: usize) {
        let keypair = keypair(self.seed, peer);
        let id = keypair.public().to_peer_id();
        let client = self.clients.entry(number).or_default();
        let kind = match client.before.take() {
            None => "started a session",
            Some((before, true)) if before == id => "restarted as the same peer",
            Some((before, false)) if before == id => {
                client.networks += 1;
                "changed networks, the old connection left unpolled"
            }
            Some(_) => "restarted as another peer",
        };
        let (commands, received) = mpsc::unbounded_channel();
        client.current = Some((id, commands));
        let from = address(number, client.networks);
        self.stays += 1;
        let (stay, started, sender) = (self.stays, self.started, self.sender.clone());
        let report_seen = move |seen| {
            let _ = sender.send(Observation::Seen(started.elapsed(), id, stay, seen));
        };
        report_seen(Seen::Started);
        self.tally(kind);
        tokio::spawn(client::run(Stay {
            keypair,
            family: self.plan.trace.clients[number].family,
            from,
            relay: self.relay.address.clone(),
            commands: received,
            report: Arc::new(report_seen),
        }));
    }

    fn end_stay(&mut self, number: usize, fin: bool) {
        let Some(client) = self.clients.get_mut(&number) else {
            return; // it would have started before the soak began
        };
        let Some((peer, commands)) = client.current.take() else {
            return;
        };
        client.before = Some((peer, fin));
        let now = self.started.elapsed();
        // The greatest stay number: no stay of this peer has begun after it.
        let _ = self.sender.send(Observation::Seen(now, peer, u64::MAX, Seen::Ended { fin }));
        let close_after = self.observer.all_freed_within();
        let _ = commands.send(match fin {
            true => Command::Close,
            false => Command::Vanish(close_after),
        });
        self.tally(match fin {
            true => "closed",
            false => "disconnected silently",
        });
    }

    /// Ends all stays, one after another.
    async fn disconnect_all(
        &mut self,
        observations: &mut UnboundedReceiver<Observation>,
    ) -> Result<(), String> {
        self.observer.on_disconnecting_all();
        let current = self.clients.iter();
        let current = current.filter(|(_, client)| client.current.is_some());
        let current: Vec<usize> = current.map(|(number, _)| *number).collect();
        let each = DISCONNECT_WITHIN / current.len().max(1) as u32;
        let mut next = Instant::now();
        for client in current {
            let fin = self.random.random_bool(DISCONNECT_WITH_FIN);
            self.end_stay(client, fin);
            next += each;
            while Instant::now() < next {
                self.observe(observations, next).await?;
            }
        }
        Ok(())
    }

    /// One client connects to another that holds a slot.
    fn open_circuit(&mut self) {
        let current = self.clients.values().filter_map(|c| c.current.as_ref());
        let current: Vec<_> = current.collect();
        let mut holders: Vec<_> = self.observer.holders().collect();
        holders.sort_unstable();
        if current.len() < 2 || holders.is_empty() {
            return;
        }
        let (source, commands) = current[self.random.random_range(0..current.len())];
        let target = holders[self.random.random_range(0..holders.len())];
        let bytes = self.random.random_range(1..MOST_BYTES);
        if *source != target {
            let _ = commands.send(Command::Connect(target, bytes));
            self.tally("called another");
        }
    }

    fn count_seen(&mut self, seen: &Seen) {
        self.tally(match seen {
            Seen::Granted { renewal: false } => "granted a slot",
            Seen::Granted { renewal: true } => "renewed by themselves",
            Seen::Refused(_) => "refused",
            Seen::Lost(_) => "given up while frozen",
            Seen::Closed => "closed as idle",
            Seen::Denied => "could not connect",
            Seen::Echoed { .. } => "received their echo",
            Seen::NoEcho => "received none, or not all of it",
            Seen::NoCircuit("NoReservation") => "got no circuit: the target holds no slot",
            Seen::NoCircuit("ResourceLimitExceeded") => "got no circuit: a limit",
            Seen::NoCircuit(_) => "got no circuit: the target does not answer",
            _ => return,
        });
    }

    fn tally(&mut self, what: &'static str) {
        *self.counts.entry(what).or_default() += 1;
    }
}

/// Reads the status periodically, until its receiver is dropped.
async fn read_status(port: u16, started: Instant, sender: UnboundedSender<Observation>) {
    while !sender.is_closed() {
        let requested = started.elapsed();
        let report = Box::new(status::report(port).await);
        let _ = sender.send(Observation::Report(requested, started.elapsed(), report));
        sleep(STATUS_INTERVAL).await;
    }
}

/// Reports when tasks were not scheduled for a while: clients could not answer then either.
async fn watch_scheduling(started: Instant, sender: UnboundedSender<Observation>) {
    while !sender.is_closed() {
        let before = Instant::now();
        sleep(SCHEDULING_INTERVAL).await;
        let pause = before.elapsed().saturating_sub(SCHEDULING_INTERVAL);
        if pause > SCHEDULING_INTERVAL {
            let _ = sender.send(Observation::Suspended(started.elapsed(), pause));
        }
    }
}

/// The identity of a peer of the trace.
fn keypair(seed: u64, peer: usize) -> Keypair {
    let mut random = Xoshiro256PlusPlus::seed_from_u64(seed ^ (peer as u64) << 32);
    let mut secret: [u8; 32] = random.random();
    Keypair::ed25519_from_bytes(&mut secret).expect("32 bytes")
}

/// The source address of a client that has changed networks this often.
fn address(client: usize, networks: u32) -> Ipv4Addr {
    const OTHERS: usize = 250;
    let network = 1 + (networks % 250) as u8;
    let (high, low) = (client / OTHERS % 256, client % OTHERS);
    Ipv4Addr::new(127, network, high as u8, 1 + low as u8)
}

/// How much of the simulated day passes in this time.
pub fn of_the_day(time: Duration) -> Duration {
    time * FACTOR
}
