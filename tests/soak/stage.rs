//! The relay and its clients: who comes and goes by the plan, and what the observer is told.

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
    client::{self, Order, Stay},
    common::{
        Relay,
        http::{self, ON_ANY_PORT},
    },
    observer::{Observer, Saw, Shown},
    plan::{FACTOR, Plan},
    report::{self, Soaked},
    samples::Sample,
    trace::What,
    watching,
};

/// How often the relay is asked what it shows.
const LOOK: Duration = Duration::from_secs(1);

/// How often a client calls another, and how much it says at most.
const CALL: Duration = Duration::from_millis(150);
const LONGEST_CALL: usize = 64 * 1024;

/// How often it is looked whether everybody gets a turn.
const TURN: Duration = Duration::from_millis(20);

/// All leave within this time.
const LEAVING: Duration = Duration::from_secs(5);
const LEAVE_WITH_FIN: f64 = 0.7;

/// A machine on which so many of all checks have to be excused says nothing about the relay.
const EXCUSED: u64 = 20;

/// What the observer is told, and when it was.
pub enum Told {
    Saw(Duration, PeerId, u64, Saw),
    Shown(Duration, Duration, Box<Shown>),
    StoodStill(Duration, Duration),
}

/// What the clients lived through, by its name.
pub type Lived = BTreeMap<&'static str, u64>;

/// A client of the trace.
#[derive(Default)]
struct Client {
    here: Option<(PeerId, UnboundedSender<Order>)>,
    /// It was somebody before, and left so.
    before: Option<(PeerId, bool)>,
    networks: u32,
}

struct Stage<'a> {
    plan: &'a Plan,
    seed: u64,
    relay: Relay,
    began: Instant,
    observer: Observer,
    clients: HashMap<usize, Client>,
    stays: u64,
    lived: Lived,
    random: Xoshiro256PlusPlus,
    tell: UnboundedSender<Told>,
    samples: Vec<Sample>,
}

/// Lives the plan. What was measured, or the law that was broken; and what the relay logged.
pub async fn live(plan: &Plan, seed: u64) -> (Result<Soaked, String>, Vec<String>) {
    let mut flags = plan.flags();
    flags.push(ON_ANY_PORT.to_owned());
    let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
    let relay = Relay::start(&flags);
    let (tell, told) = mpsc::unbounded_channel();
    let mut stage = Stage {
        plan,
        seed,
        began: Instant::now(),
        observer: Observer::new(plan.config.clone()),
        clients: HashMap::new(),
        stays: 0,
        lived: Lived::new(),
        random: Xoshiro256PlusPlus::seed_from_u64(seed),
        tell,
        samples: Vec::new(),
        relay,
    };
    let soaked = stage.live(told).await;
    (soaked, stage.relay.log())
}

impl Stage<'_> {
    async fn live(&mut self, mut told: UnboundedReceiver<Told>) -> Result<Soaked, String> {
        let port = http::port(&self.relay).await;
        watching::shown(port).await;
        sleep(LOOK).await;
        let before = Sample::of(self.relay.pid());
        self.began = Instant::now();
        tokio::spawn(look(port, self.began, self.tell.clone()));
        tokio::spawn(turns(self.began, self.tell.clone()));

        self.play(&mut told).await?;
        let end = self.began.elapsed();
        self.all_leave(&mut told).await?;
        let all_back = Instant::now() + self.observer.all_back_within();
        while Instant::now() < all_back {
            self.hear(&mut told, all_back).await?;
        }
        // The one that looks is asked to look away: its connections are descriptors, too.
        told.close();
        sleep(2 * LOOK).await;
        let now = self.began.elapsed();
        let shown = watching::shown(port).await;
        let verdict = self.observer.nothing_left(now, &shown);
        verdict.map_err(|broken| broken.to_string())?;
        let taken_back = watching::taken_back(port).await;
        sleep(LOOK).await;
        let after = Sample::of(self.relay.pid());
        if !self.relay.is_running() {
            return Err("the relay has ended".to_owned());
        }
        Ok(report::of(report::Measured {
            plan: self.plan,
            lived: &self.lived,
            observer: &self.observer,
            taken_back,
            before,
            samples: &self.samples,
            end,
            after,
        }))
    }

    /// The trace, and calls beside it.
    async fn play(&mut self, told: &mut UnboundedReceiver<Told>) -> Result<(), String> {
        let plan = self.plan;
        let end = self.began + plan.lasts;
        let mut events = plan.events.iter().peekable();
        let mut call = self.began + CALL;
        loop {
            let next = events.peek().map_or(end, |(at, ..)| self.began + *at);
            let now = Instant::now();
            if now >= end {
                return Ok(());
            }
            if now >= next {
                let (_, client, what) = events.next().expect("it was seen");
                self.happens(*client, *what);
            } else if now >= call {
                call = now + CALL;
                self.somebody_calls();
            } else {
                self.hear(told, next.min(call).min(end)).await?;
            }
        }
    }

    /// Hears what the clients say until then, or until one has said something.
    async fn hear(
        &mut self,
        told: &mut UnboundedReceiver<Told>,
        until: Instant,
    ) -> Result<(), String> {
        let told = tokio::select! {
            told = told.recv() => told.expect("the stage holds one end"),
            () = sleep_until(until) => return Ok(()),
        };
        let verdict = match told {
            Told::Saw(now, peer, stay, saw) => {
                self.count(&saw);
                self.observer.saw(now, peer, stay, &saw)
            }
            Told::Shown(asked, now, shown) => {
                let clients = self.clients.values();
                let clients = clients.filter(|client| client.here.is_some()).count();
                self.samples.push(Sample {
                    at: now,
                    clients: clients as f64,
                    connections: shown.connections as f64,
                    circuits: shown.circuits as f64,
                    ..Sample::of(self.relay.pid())
                });
                self.observer.shown(now, asked, &shown)
            }
            Told::StoodStill(now, pause) => {
                self.observer.stood_still(now, pause);
                Ok(())
            }
        };
        if let Err(broken) = verdict {
            return Err(match self.relay.is_running() {
                true => broken.to_string(),
                false => format!("the relay has ended; {broken}"),
            });
        }
        match self.observer.excused > EXCUSED {
            true => Err("this machine stood still too often to say anything of the relay".into()),
            false => Ok(()),
        }
    }

    fn happens(&mut self, client: usize, what: What) {
        match what {
            What::Comes { peer } => self.comes(client, peer),
            What::Goes { fin } => self.goes(client, fin),
            What::Stalls { until } => {
                let until = self.began + until;
                let here = self.clients.get(&client).and_then(|c| c.here.as_ref());
                if let Some((_, orders)) = here {
                    let _ = orders.send(Order::Stall(until));
                    self.lived("froze, and thawed");
                }
            }
        }
    }

    fn comes(&mut self, number: usize, peer: usize) {
        let keypair = keypair(self.seed, peer);
        let id = keypair.public().to_peer_id();
        let client = self.clients.entry(number).or_default();
        let kind = match client.before.take() {
            None => "began a session",
            Some((before, true)) if before == id => "restarted as the same peer",
            Some((before, false)) if before == id => {
                client.networks += 1;
                "changed networks, the old connection left unpolled"
            }
            Some(_) => "restarted as another peer",
        };
        let (orders, ordered) = mpsc::unbounded_channel();
        client.here = Some((id, orders));
        let from = address(number, client.networks);
        self.stays += 1;
        let (stay, began, tell) = (self.stays, self.began, self.tell.clone());
        let says = move |saw| {
            let _ = tell.send(Told::Saw(began.elapsed(), id, stay, saw));
        };
        says(Saw::Comes);
        self.lived(kind);
        tokio::spawn(client::live(Stay {
            keypair,
            family: self.plan.trace.clients[number].family,
            from,
            relay: self.relay.address.clone(),
            orders: ordered,
            tell: Arc::new(says),
        }));
    }

    fn goes(&mut self, number: usize, fin: bool) {
        let Some(client) = self.clients.get_mut(&number) else {
            return; // it was to come when the soak began, and had no time to
        };
        let Some((peer, orders)) = client.here.take() else {
            return;
        };
        client.before = Some((peer, fin));
        let now = self.began.elapsed();
        // No stay has begun after it: the number of the last is as good as its own.
        let _ = self.tell.send(Told::Saw(now, peer, u64::MAX, Saw::Leaves { fin }));
        let buried_after = self.observer.all_back_within();
        let _ = orders.send(match fin {
            true => Order::Close,
            false => Order::Vanish(buried_after),
        });
        self.lived(match fin {
            true => "closed",
            false => "were gone without a word",
        });
    }

    /// One after the other.
    async fn all_leave(&mut self, told: &mut UnboundedReceiver<Told>) -> Result<(), String> {
        self.observer.all_leave();
        let here = self.clients.iter();
        let here = here.filter(|(_, client)| client.here.is_some());
        let here: Vec<usize> = here.map(|(number, _)| *number).collect();
        let each = LEAVING / here.len().max(1) as u32;
        let mut next = Instant::now();
        for client in here {
            let fin = self.random.random_bool(LEAVE_WITH_FIN);
            self.goes(client, fin);
            next += each;
            while Instant::now() < next {
                self.hear(told, next).await?;
            }
        }
        Ok(())
    }

    /// One client calls another that holds a slot.
    fn somebody_calls(&mut self) {
        let here = self.clients.values().filter_map(|c| c.here.as_ref());
        let here: Vec<_> = here.collect();
        let mut holders: Vec<_> = self.observer.holders().collect();
        holders.sort_unstable();
        if here.len() < 2 || holders.is_empty() {
            return;
        }
        let (source, orders) = here[self.random.random_range(0..here.len())];
        let target = holders[self.random.random_range(0..holders.len())];
        let bytes = self.random.random_range(1..LONGEST_CALL);
        if *source != target {
            let _ = orders.send(Order::Call(target, bytes));
            self.lived("called another");
        }
    }

    fn count(&mut self, saw: &Saw) {
        self.lived(match saw {
            Saw::Granted { renewal: false } => "granted a slot",
            Saw::Granted { renewal: true } => "renewed by themselves",
            Saw::Refused(_) => "refused",
            Saw::Lost(_) => "given up while frozen",
            Saw::Closed => "closed as strangers who were idle",
            Saw::TurnedAway => "could not connect",
            Saw::Echoed { .. } => "heard their echo",
            Saw::NoEcho => "heard none, or not all of it",
            Saw::NoCircuit("NoReservation") => "got no circuit: who was called holds no slot",
            Saw::NoCircuit("ResourceLimitExceeded") => "got no circuit: a limit",
            Saw::NoCircuit(_) => "got no circuit: who was called does not answer",
            _ => return,
        });
    }

    fn lived(&mut self, what: &'static str) {
        *self.lived.entry(what).or_default() += 1;
    }
}

/// Looks every second, until nobody wants to hear of it.
async fn look(port: u16, began: Instant, tell: UnboundedSender<Told>) {
    while !tell.is_closed() {
        let asked = began.elapsed();
        let shown = Box::new(watching::shown(port).await);
        let _ = tell.send(Told::Shown(asked, began.elapsed(), shown));
        sleep(LOOK).await;
    }
}

/// Tells when nobody got a turn for long: then nobody could answer either.
async fn turns(began: Instant, tell: UnboundedSender<Told>) {
    while !tell.is_closed() {
        let before = Instant::now();
        sleep(TURN).await;
        let pause = before.elapsed().saturating_sub(TURN);
        if pause > TURN {
            let _ = tell.send(Told::StoodStill(began.elapsed(), pause));
        }
    }
}

/// The identity of a peer of the trace.
fn keypair(seed: u64, peer: usize) -> Keypair {
    let mut random = Xoshiro256PlusPlus::seed_from_u64(seed ^ (peer as u64) << 32);
    let mut secret: [u8; 32] = random.random();
    Keypair::ed25519_from_bytes(&mut secret).expect("32 bytes")
}

/// Where a client comes from, who has changed networks so often.
fn address(client: usize, networks: u32) -> Ipv4Addr {
    const OTHERS: usize = 250;
    let network = 1 + (networks % 250) as u8;
    let (high, low) = (client / OTHERS % 256, client % OTHERS);
    Ipv4Addr::new(127, network, high as u8, 1 + low as u8)
}

/// So much of the day passes in this time.
pub fn of_the_day(time: Duration) -> Duration {
    time * FACTOR
}
