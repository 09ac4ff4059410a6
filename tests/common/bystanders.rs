//! Those who look on while the relay is ill-treated, and are to notice nothing.

use std::{
    fs,
    panic::resume_unwind,
    pin::{Pin, pin},
    time::{Duration, Instant},
};

use libp2p::{
    Stream,
    futures::{AsyncReadExt, AsyncWriteExt, future},
};
use tokio::{runtime, time::sleep};

use super::{Client, PATIENCE, Relay, by_hand::send, children, circuit, read_bytes, within};

/// How long they are watched in peace, to know what it is like.
const PEACE: Duration = Duration::from_millis(1500);

/// The pause between two echoes. Whoever computes all the time cannot tell who else does.
const PAUSE: Duration = Duration::from_millis(5);

/// After so many echoes something larger is carried.
const ECHOES: usize = 20;
/// As large as this, in bytes.
const LOAD: usize = 256 * 1024;

/// How often the target renews: a peer may 30 times a minute.
const RENEWAL: Duration = Duration::from_secs(3);

/// What a relay may take at its peak in KiB, four times what it takes to begin with.
const MUCH: u64 = 64 * 1024;

/// The relay, and a circuit between two who have nothing to do with what is sent to it.
pub struct Bystanders {
    pub relay: Relay,
    pub source: Client,
    pub target: Client,
    there: Stream,
    back: Stream,
    /// How many lines a log at the default level had when they came.
    lines: usize,
    /// What the relay may take at its peak, in KiB.
    much: u64,
    strangers: Strangers,
}

/// How the relay served them for a while.
#[derive(Debug, Default)]
pub struct Service {
    /// How long echoes took, there and back.
    echoes: Vec<Duration>,
    /// How long it took to carry so many loads.
    carrying: Duration,
    loads: u32,
    renewals: u32,
    /// The CPU time of the relay meanwhile, in hundredths of a second.
    computed: u64,
}

/// What they noticed of an attack, and what it cost the relay.
#[derive(Debug)]
pub struct Noticed {
    before: Service,
    meanwhile: Service,
    took: Duration,
    /// The most memory that the relay ever took, in KiB.
    pub peak: u64,
}

impl Bystanders {
    /// With limits that stand in the way of neither them nor a stranger, and these flags.
    pub async fn gather(flags: &[&str]) -> Self {
        let limits = "--max-connections-per-ip=0 --max-handshakes=4096 --idle-timeout=0s \
                      --circuit-duration=0s";
        let flags = [&limits.split(' ').collect::<Vec<_>>(), flags].concat();
        Self::gather_at(Relay::start(&flags), MUCH).await
    }

    /// At this relay, which may take so many KiB at its peak.
    pub async fn gather_at(relay: Relay, much: u64) -> Self {
        let mut source = Client::connect(&relay).await;
        let mut target = Client::connect(&relay).await;
        target.reserve().await;
        let (there, back) = circuit(&mut source, &mut target).await;
        // The last that it says by itself.
        relay.wait_for_log("can be dialed from the internet").await;
        let lines = loud(&relay).len();
        Self { relay, source, target, there, back, lines, much, strangers: Strangers(None) }
    }

    /// Lives on while somebody attacks: every echo comes back, and every renewal is granted.
    /// Strangers have threads of their own, until all is over.
    pub async fn live_through<T: Send + 'static>(
        &mut self,
        attack: impl Future<Output = T> + Send + 'static,
    ) -> (T, Noticed) {
        let ((), before) = self.live_until(pin!(sleep(PEACE))).await;
        let start = Instant::now();
        let attack = self.strangers.runtime().spawn(attack);
        let (attacked, meanwhile) = self.live_until(pin!(attack)).await;
        let attacked = attacked.unwrap_or_else(|error| resume_unwind(error.into_panic()));
        let noticed = Noticed {
            before,
            meanwhile,
            took: start.elapsed(),
            peak: children::peak(self.relay.pid()),
        };
        (attacked, noticed)
    }

    async fn live_until<T>(&mut self, mut over: Pin<&mut impl Future<Output = T>>) -> (T, Service) {
        let mut service = Service::default();
        let before = computed(&self.relay);
        let mut renew = Instant::now();
        let mut echoes = 0;
        loop {
            let start = Instant::now();
            pass(&mut self.there, &mut self.back).await;
            pass(&mut self.back, &mut self.there).await;
            service.echoes.push(start.elapsed());
            if echoes % ECHOES == 0 {
                service.carrying += carry(&mut self.there, &mut self.back).await;
                service.loads += 1;
            }
            echoes += 1;
            if Instant::now() >= renew {
                self.target.reserve().await;
                service.renewals += 1;
                renew = Instant::now() + RENEWAL;
            }
            tokio::select! {
                output = &mut over => {
                    service.computed = computed(&self.relay) - before;
                    return (output, service);
                }
                () = sleep(PAUSE) => {}
            }
        }
    }

    /// Their circuit, their slots and their log are as they were, and the relay has come to rest.
    pub async fn are_unharmed(&mut self) {
        pass(&mut self.there, &mut self.back).await;
        pass(&mut self.back, &mut self.there).await;
        self.target.reserve().await;
        self.source.reserve().await;
        let mut newcomer = Client::connect(&self.relay).await;
        newcomer.reserve().await;
        // Once this line is there, all that came before it is.
        let granted = format!("reservation granted: peer {}", newcomer.peer);
        self.relay.wait_for_log(&granted).await;
        let news = loud(&self.relay).split_off(self.lines);
        assert!(news.is_empty(), "{news:#?}");
        newcomer.leave().await;
        self.have_kept_what_they_had();
        rests(&self.relay).await;
        peaked_below(self.much, &self.relay);
    }

    /// Their connections are the first that they had, and the slot is the one that was granted then.
    fn have_kept_what_they_had(&self) {
        assert!(self.source.kept_its_connection());
        assert!(self.target.kept_its_connection());
        let target = self.target.peer;
        let lost = ["slot freed", "grace began", "peer silent"].map(|how| {
            let line = format!("{how}: peer {target}");
            self.relay.count_in_log(&line)
        });
        assert_eq!(lost, [0; 3]);
        let granted = format!("reservation granted: peer {target}");
        assert_eq!(self.relay.count_in_log(&granted), 1);
    }

    /// They go as well.
    pub async fn leave(self) -> Relay {
        self.source.leave().await;
        self.target.leave().await;
        self.relay
    }
}

/// Threads for strangers, from when they are wanted.
struct Strangers(Option<runtime::Runtime>);

impl Strangers {
    fn runtime(&mut self) -> &runtime::Runtime {
        self.0.get_or_insert_with(|| {
            runtime::Builder::new_multi_thread()
                .worker_threads(2)
                .enable_all()
                // They have machines of their own elsewhere. Here they are not to take the cores
                // from those whom they attack.
                .on_thread_start(|| _ = rustix::process::nice(5))
                .build()
                .expect("threads")
        })
    }
}

impl Drop for Strangers {
    fn drop(&mut self) {
        if let Some(runtime) = self.0.take() {
            runtime.shutdown_background();
        }
    }
}

impl Service {
    fn echo(&self, percentile: usize) -> f64 {
        let mut echoes = self.echoes.clone();
        echoes.sort_unstable();
        echoes[(echoes.len() - 1) * percentile / 100].as_secs_f64()
    }

    fn loads_a_second(&self) -> f64 {
        f64::from(self.loads) / self.carrying.as_secs_f64()
    }
}

impl Noticed {
    /// What a well-behaved client sees: by how much its echoes took longer, the median and the
    /// slowest hundredth, how much of its throughput was left, and that it could renew.
    pub fn by_clients(&self) -> String {
        let Self { before, meanwhile, .. } = self;
        format!(
            "echo × {:.1}, slowest hundredth × {:.1}, throughput × {:.2}; {} of {} renewals",
            meanwhile.echo(50) / before.echo(50),
            meanwhile.echo(99) / before.echo(99),
            meanwhile.loads_a_second() / before.loads_a_second(),
            meanwhile.renewals, // else it would have ended there
            meanwhile.renewals,
        )
    }

    /// What the relay spent on it, beside what it spent on them.
    pub fn by_the_relay(&self) -> String {
        let share = self.meanwhile.echoes.len() as f64 / self.before.echoes.len() as f64;
        let for_them = self.before.computed as f64 * share;
        let spent = (self.meanwhile.computed as f64 - for_them).max(0.0) / 100.0;
        format!(
            "{spent:.1} s of CPU in {:.0} s, {} MiB at its peak",
            self.took.as_secs_f64(),
            self.peak / 1024
        )
    }
}

/// Carries a load, and says how long it took.
async fn carry(from: &mut Stream, to: &mut Stream) -> Duration {
    let load = vec![7; LOAD];
    let mut carried = vec![0; LOAD];
    let start = Instant::now();
    let write = async {
        from.write_all(&load).await?;
        from.flush().await
    };
    let (written, read) = within(future::join(write, to.read_exact(&mut carried))).await;
    written.expect("the circuit stays");
    read.expect("the circuit stays");
    assert!(carried == load, "what was said is what was heard");
    start.elapsed()
}

async fn pass(from: &mut Stream, to: &mut Stream) {
    send(from, b"still here").await;
    assert_eq!(read_bytes(to, 10).await, b"still here");
}

/// What the relay logs by default, but for what it sums up each minute or says only once: panics,
/// and all that is above debug.
fn loud(relay: &Relay) -> Vec<String> {
    let quiet = [" DEBUG relaylet", " within a minute: ", "this is logged once"];
    let mut log = relay.log();
    log.retain(|line| !quiet.iter().any(|words| line.contains(words)));
    log
}

/// Waits until the relay hardly computes any more, and looks at how much memory it ever took.
pub async fn comes_to_rest(relay: &Relay) {
    rests(relay).await;
    peaked_below(MUCH, relay);
}

/// Waits until the relay hardly computes any more.
pub async fn rests(relay: &Relay) {
    const BUSY: u64 = 20; // hundredths of a second
    let start = Instant::now();
    if !is_counted(relay) {
        return;
    }
    let mut before = computed(relay);
    loop {
        sleep(Duration::from_secs(1)).await;
        let now = computed(relay);
        if now - before < BUSY {
            return;
        }
        assert!(start.elapsed() < PATIENCE, "the relay spins");
        before = now;
    }
}

fn peaked_below(much: u64, relay: &Relay) {
    if is_counted(relay) {
        let peak = children::peak(relay.pid());
        assert!(peak < much, "{peak} KiB");
    }
}

/// The CPU time of the relay, in hundredths of a second.
fn computed(relay: &Relay) -> u64 {
    let stat = fs::read_to_string(format!("/proc/{}/stat", relay.pid()));
    let stat = stat.expect("it runs, on Linux");
    let fields = stat.split(' ').skip(13).take(2); // utime and stime
    fields.map(|ticks| ticks.parse::<u64>().unwrap()).sum()
}

/// Only Linux says what a process takes.
fn is_counted(relay: &Relay) -> bool {
    fs::exists(format!("/proc/{}/stat", relay.pid())).unwrap_or(false)
}
