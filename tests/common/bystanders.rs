//! Two clients with a circuit that must not be affected while the relay is attacked.

use std::{
    fs,
    panic::resume_unwind,
    pin::{Pin, pin},
    time::{Duration, Instant},
};

use libp2p::Stream;
use tokio::{runtime, time::sleep};

use super::{
    Client, Relay, TEST_TIMEOUT, assert_relayed, child_process, circuit, source_and_target,
};

/// How long the clients are measured before the attack, as the baseline.
const BASELINE: Duration = Duration::from_millis(1500);

/// The pause between two echoes: without it the clients would compete for the CPU that they measure.
const PAUSE: Duration = Duration::from_millis(5);

/// A bulk transfer follows each time after this many echoes.
const ECHOES_PER_BULK: usize = 20;
/// The size of a bulk transfer, in bytes.
const BULK: usize = 256 * 1024;

/// The interval of the target's renewals: a peer may send 30 requests a minute.
const RENEWAL: Duration = Duration::from_secs(3);

/// The limit on the relay's peak memory, in KiB.
const MEMORY_LIMIT: u64 = 64 * 1024;

/// The relay, and a circuit between two clients that take no part in the attack.
pub struct Bystanders {
    pub relay: Relay,
    pub source: Client,
    pub target: Client,
    there: Stream,
    back: Stream,
    /// How many lines [`visible_log`] had when the circuit was open.
    lines: usize,
    /// In KiB.
    memory_limit: u64,
    attackers: AttackerThreads,
}

/// How the relay served the two clients for a while.
#[derive(Debug, Default)]
pub struct Service {
    /// Round-trip times of echoes through the circuit.
    echoes: Vec<Duration>,
    /// How long all bulk transfers took together.
    bulk_time: Duration,
    bulks: u32,
    /// The CPU time of the relay in that time, in hundredths of a second.
    cpu_time: u64,
}

/// What an attack did to the two clients, and what it cost the relay.
#[derive(Debug)]
pub struct Impact {
    before: Service,
    during: Service,
    took: Duration,
    /// The relay's peak resident memory so far, in KiB.
    pub peak: u64,
}

impl Bystanders {
    /// Starts a relay with these flags, and with limits that affect neither the clients nor an attacker.
    pub async fn start(flags: &[&str]) -> Self {
        let limits = "--max-connections-per-ip=0 --max-handshakes=4096 --idle-timeout=0s \
                      --circuit-duration=0s";
        let flags = [&limits.split(' ').collect::<Vec<_>>(), flags].concat();
        Self::start_with(Relay::start(&flags), MEMORY_LIMIT).await
    }

    /// Connects both clients to this relay, whose peak memory may be `memory_limit` KiB.
    pub async fn start_with(relay: Relay, memory_limit: u64) -> Self {
        let (mut source, mut target) = source_and_target(&relay).await;
        let (there, back) = circuit(&mut source, &mut target).await;
        // The last line that the relay logs at its start.
        relay.wait_for_log("can be dialed from the internet").await;
        let lines = visible_log(&relay).len();
        Self {
            relay,
            source,
            target,
            there,
            back,
            lines,
            memory_limit,
            attackers: AttackerThreads(None),
        }
    }

    /// Measures the baseline, then runs the attack: every echo must come back and every renewal be granted. The attack
    /// runs on threads of its own, which stay until this is dropped.
    pub async fn watch_during<T: Send + 'static>(
        &mut self,
        attack: impl Future<Output = T> + Send + 'static,
    ) -> (T, Impact) {
        let ((), before) = self.watch_until(pin!(sleep(BASELINE))).await;
        let start = Instant::now();
        let attack = self.attackers.runtime().spawn(attack);
        let (attacked, during) = self.watch_until(pin!(attack)).await;
        let attacked = attacked.unwrap_or_else(|error| resume_unwind(error.into_panic()));
        let impact = Impact {
            before,
            during,
            took: start.elapsed(),
            peak: child_process::peak(self.relay.pid()),
        };
        (attacked, impact)
    }

    async fn watch_until<T>(&mut self, mut end: Pin<&mut impl Future<Output = T>>) -> (T, Service) {
        let mut service = Service::default();
        let before = cpu_time(&self.relay);
        let mut renew = Instant::now();
        let mut echoes = 0;
        loop {
            let start = Instant::now();
            assert_relayed(&mut self.there, &mut self.back, b"still here").await;
            assert_relayed(&mut self.back, &mut self.there, b"still here").await;
            service.echoes.push(start.elapsed());
            if echoes % ECHOES_PER_BULK == 0 {
                service.bulk_time += transfer(&mut self.there, &mut self.back).await;
                service.bulks += 1;
            }
            echoes += 1;
            if Instant::now() >= renew {
                self.target.reserve().await;
                renew = Instant::now() + RENEWAL;
            }
            tokio::select! {
                output = &mut end => {
                    service.cpu_time = cpu_time(&self.relay) - before;
                    return (output, service);
                }
                () = sleep(PAUSE) => {}
            }
        }
    }

    /// Asserts that the circuit, the slots and the log are unaffected, and that the relay becomes idle.
    pub async fn assert_unharmed(&mut self) {
        assert_relayed(&mut self.there, &mut self.back, b"still here").await;
        assert_relayed(&mut self.back, &mut self.there, b"still here").await;
        self.target.reserve().await;
        self.source.reserve().await;
        let mut newcomer = Client::connect(&self.relay).await;
        newcomer.reserve().await;
        // The log is in order: once this line is in it, all earlier ones are.
        let granted = format!("reservation granted: peer {}", newcomer.peer);
        self.relay.wait_for_log(&granted).await;
        let new_lines = visible_log(&self.relay).split_off(self.lines);
        assert!(new_lines.is_empty(), "{new_lines:#?}");
        newcomer.disconnect().await;
        self.assert_kept();
        wait_until_idle(&self.relay).await;
        assert_peak_below(self.memory_limit, &self.relay);
    }

    /// Asserts that both clients still have their first connections, and the target its first slot.
    fn assert_kept(&self) {
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

    /// Disconnects both clients.
    pub async fn disconnect(self) -> Relay {
        self.source.disconnect().await;
        self.target.disconnect().await;
        self.relay
    }
}

/// The threads of attackers, started on first use.
struct AttackerThreads(Option<runtime::Runtime>);

impl AttackerThreads {
    fn runtime(&mut self) -> &runtime::Runtime {
        self.0.get_or_insert_with(|| {
            runtime::Builder::new_multi_thread()
                .worker_threads(2)
                .enable_all()
                // Real attackers have machines of their own: these must not take the CPU from the
                // relay and the clients.
                .on_thread_start(|| _ = rustix::process::nice(5))
                .build()
                .expect("threads")
        })
    }
}

impl Drop for AttackerThreads {
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

    fn bulks_a_second(&self) -> f64 {
        f64::from(self.bulks) / self.bulk_time.as_secs_f64()
    }
}

impl Impact {
    /// The impact on well-behaved clients: how much longer echoes took (median and 99th percentile), and which
    /// fraction of the throughput was left.
    pub fn on_clients(&self) -> String {
        let Self { before, during, .. } = self;
        format!(
            "p50 × {:.1}, p99 × {:.1}, throughput × {:.2}",
            during.echo(50) / before.echo(50),
            during.echo(99) / before.echo(99),
            during.bulks_a_second() / before.bulks_a_second(),
        )
    }

    /// What the attack cost the relay, without what it spent on the two clients.
    pub fn on_relay(&self) -> String {
        let share = self.during.echoes.len() as f64 / self.before.echoes.len() as f64;
        let for_clients = self.before.cpu_time as f64 * share;
        let spent = (self.during.cpu_time as f64 - for_clients).max(0.0) / 100.0;
        format!(
            "{spent:.1} s of CPU in {:.0} s, {} MiB at its peak",
            self.took.as_secs_f64(),
            self.peak / 1024
        )
    }
}

/// Transfers one bulk of bytes, and returns how long it took.
async fn transfer(from: &mut Stream, to: &mut Stream) -> Duration {
    let bulk = vec![7; BULK];
    let start = Instant::now();
    assert_relayed(from, to, &bulk).await;
    start.elapsed()
}

/// The log at the default level and panics, without lines that are logged once a minute or only once.
fn visible_log(relay: &Relay) -> Vec<String> {
    let quiet =
        [" DEBUG relaylet", " within a minute: ", "busiest addresses now: ", "this is logged once"];
    let mut log = relay.log();
    log.retain(|line| !quiet.iter().any(|words| line.contains(words)));
    log
}

/// Waits until the relay is idle, and asserts that its peak memory is below [`MEMORY_LIMIT`].
pub async fn assert_idle_within_memory(relay: &Relay) {
    wait_until_idle(relay).await;
    assert_peak_below(MEMORY_LIMIT, relay);
}

/// Waits until the relay uses almost no CPU.
pub async fn wait_until_idle(relay: &Relay) {
    const BUSY: u64 = 20; // hundredths of a second
    let start = Instant::now();
    if !has_proc(relay) {
        return;
    }
    let mut before = cpu_time(relay);
    loop {
        sleep(Duration::from_secs(1)).await;
        let now = cpu_time(relay);
        if now - before < BUSY {
            return;
        }
        assert!(start.elapsed() < TEST_TIMEOUT, "the relay spins");
        before = now;
    }
}

fn assert_peak_below(memory_limit: u64, relay: &Relay) {
    if has_proc(relay) {
        let peak = child_process::peak(relay.pid());
        assert!(peak < memory_limit, "{peak} KiB");
    }
}

/// The CPU time of the relay, in hundredths of a second.
fn cpu_time(relay: &Relay) -> u64 {
    let stat = fs::read_to_string(format!("/proc/{}/stat", relay.pid()));
    let stat = stat.expect("it runs, on Linux");
    let fields = stat.split(' ').skip(13).take(2); // utime and stime
    fields.map(|ticks| ticks.parse::<u64>().unwrap()).sum()
}

/// Whether there is a `/proc`, as on Linux.
fn has_proc(relay: &Relay) -> bool {
    fs::exists(format!("/proc/{}/stat", relay.pid())).unwrap_or(false)
}
