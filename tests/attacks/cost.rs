//! What an attack from one address costs clients that take no part in it: `cargo bench --bench attacks`.
//!
//! A relay at its defaults relays a circuit whose ends exchange a few bytes, while one address attacks at full speed.
//! The attackers share the machine with the relay, so each attack has a control: the same circuit at the same relay
//! without the attack, while threads burn as much CPU time as the attackers used. There are five rounds, each with the
//! attack first; the medians of the ratios are printed. Meanwhile newcomers from other addresses connect and reserve.
//! `-- NAMES` runs only those attacks.

#[path = "../common/mod.rs"]
mod common;

use std::{
    env, fs, io,
    net::Ipv4Addr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use libp2p::{Multiaddr, PeerId, Stream, futures::future::BoxFuture};
use tokio::{runtime, time::sleep};

use self::common::{
    Client,
    by_hand::{PING, SYN, data, frame, length_prefixed, proposal, send},
    child_process::Process,
    circuit,
    messages::{HopMessage, OK, connect, reserve},
    raw_peers::{RawPeer, address},
    read_bytes, source_and_target_at, tcp_port,
};

const ROUNDS: usize = 5;

/// The duration of an attack, and of its control.
const DURATION: Duration = Duration::from_secs(5);

/// How many connections attack at once, all from one address, and on how many threads.
const ATTACKERS: usize = 32;
const THREADS: usize = 2;
const THREAD_NAME: &str = "attacker";

/// The pause between two echoes.
const PAUSE: Duration = Duration::from_millis(5);
/// The pause between two newcomers.
const NEWCOMER_PAUSE: Duration = Duration::from_millis(250);

type Attack = fn(u16) -> BoxFuture<'static, io::Result<()>>;

const ATTACKS: [(&str, &str, Attack); 6] = [
    ("requests", "RESERVE, CONNECT, malformed", |port| Box::pin(requests(port))),
    ("unknown", "CONNECT to unknown peers", |port| Box::pin(unknown(port))),
    ("pushes", "identify pushes of 4 kB", |port| Box::pin(pushes(port))),
    ("handshakes", "new connections", |port| Box::pin(handshakes(port))),
    ("streams", "streams opened and left idle", |port| Box::pin(streams(port))),
    ("pings", "yamux's pings", |port| Box::pin(pings(port))),
];

fn attackers_address() -> Ipv4Addr {
    address(0)
}

async fn requests(port: u16) -> io::Result<()> {
    let mut peer = RawPeer::connect(port, attackers_address()).await?;
    let malformed = HopMessage { kind: Some(7), ..HopMessage::default() };
    let kinds = [reserve(), connect(PeerId::random()), malformed];
    let requests: Vec<_> = kinds.into_iter().cycle().take(21).collect();
    loop {
        peer.request_all(&requests).await?;
    }
}

async fn unknown(port: u16) -> io::Result<()> {
    let mut peer = RawPeer::connect(port, attackers_address()).await?;
    let requests = vec![connect(PeerId::random()); 20];
    loop {
        peer.request_all(&requests).await?;
    }
}

async fn pushes(port: u16) -> io::Result<()> {
    let mut peer = RawPeer::connect(port, attackers_address()).await?;
    // Field 3 is a protocol that the peer supports.
    let protocols = (0..100).flat_map(|nth| {
        [vec![0x1a], length_prefixed(format!("/a/protocol/of/some/length/{nth:012}").as_bytes())]
            .concat()
    });
    let message = length_prefixed(&protocols.collect::<Vec<_>>());
    let push = [proposal("/ipfs/id/push/1.0.0"), message].concat();
    loop {
        for _ in 0..20 {
            let stream = peer.next_stream();
            peer.send(&data(SYN, stream, &push)).await?;
        }
        peer.read_until_pong().await?;
    }
}

async fn handshakes(port: u16) -> io::Result<()> {
    RawPeer::connect(port, attackers_address()).await.map(drop)
}

async fn streams(port: u16) -> io::Result<()> {
    let mut peer = RawPeer::connect(port, attackers_address()).await?;
    loop {
        let open = (0..100).flat_map(|_| data(SYN, peer.next_stream(), &proposal("/a")));
        let open: Vec<_> = open.collect();
        peer.send(&open).await?;
        peer.read_until_pong().await?;
    }
}

async fn pings(port: u16) -> io::Result<()> {
    let mut peer = RawPeer::connect(port, attackers_address()).await?;
    let flood = frame(PING, SYN, 0, 7).repeat(200);
    loop {
        peer.send(&flood).await?;
        peer.read_until_pong().await?;
    }
}

/// A circuit whose echoes are timed.
struct Bystanders {
    there: Stream,
    back: Stream,
    _clients: [Client; 2],
}

impl Bystanders {
    async fn start(relay: &Multiaddr) -> Self {
        let (mut source, mut target) = source_and_target_at(relay).await;
        let (there, back) = circuit(&mut source, &mut target).await;
        Self { there, back, _clients: [source, target] }
    }

    /// The median and the 99th percentile of its echo times.
    async fn echo_for(&mut self, time: Duration) -> [f64; 2] {
        let (start, mut echoes) = (Instant::now(), Vec::new());
        while start.elapsed() < time {
            let sent = Instant::now();
            send(&mut self.there, b"still here").await;
            read_bytes(&mut self.back, 10).await;
            send(&mut self.back, b"still here").await;
            read_bytes(&mut self.there, 10).await;
            echoes.push(sent.elapsed().as_secs_f64());
            sleep(PAUSE).await;
        }
        echoes.sort_by(f64::total_cmp);
        [50, 99].map(|percentile| echoes[(echoes.len() - 1) * percentile / 100])
    }
}

/// Connects and reserves again and again, each time from another address. Returns the longest time it took.
async fn newcomers(port: u16) -> Duration {
    let (start, mut slowest) = (Instant::now(), Duration::ZERO);
    let mut number = 100;
    while start.elapsed() < DURATION {
        let arrived = Instant::now();
        let newcomer = RawPeer::connect(port, address(number)).await;
        let mut newcomer = newcomer.expect("a newcomer is admitted");
        let (_, status) = newcomer.request(&reserve()).await.expect("a newcomer is answered");
        assert_eq!(status, OK, "a newcomer gets a slot");
        slowest = slowest.max(arrived.elapsed());
        number += 1;
        sleep(NEWCOMER_PAUSE).await;
    }
    slowest
}

/// Low-priority threads: real attackers have machines of their own and take no CPU from the relay.
fn attackers() -> runtime::Runtime {
    runtime::Builder::new_multi_thread()
        .worker_threads(THREADS)
        .thread_name(THREAD_NAME)
        .enable_all()
        .on_thread_start(|| _ = rustix::process::nice(5))
        .build()
        .expect("threads")
}

/// The CPU time of the attackers' threads so far.
fn attackers_cpu() -> Duration {
    let threads = fs::read_dir("/proc/self/task").expect("Linux").flatten();
    let of = |thread: fs::DirEntry| -> Option<u64> {
        let name = fs::read_to_string(thread.path().join("comm")).ok()?;
        let schedstat = fs::read_to_string(thread.path().join("schedstat")).ok()?;
        let on_cpu = schedstat.split_whitespace().next()?.parse().ok()?;
        (name.trim() == THREAD_NAME).then_some(on_cpu)
    };
    Duration::from_nanos(threads.filter_map(of).sum())
}

/// Burns this share of a core, on as many threads as attack, until the flag is set.
fn burn(share: f64, stop: &Arc<AtomicBool>) -> Vec<thread::JoinHandle<()>> {
    const SLICE: Duration = Duration::from_millis(2);
    let burner = || {
        let stop = Arc::clone(stop);
        thread::spawn(move || {
            let _ = rustix::process::nice(5);
            let busy = SLICE.mul_f64((share / THREADS as f64).min(1.0));
            while !stop.load(Ordering::Relaxed) {
                let start = Instant::now();
                while start.elapsed() < busy {
                    std::hint::spin_loop();
                }
                thread::sleep(SLICE - busy);
            }
        })
    };
    (0..THREADS).map(|_| burner()).collect()
}

/// The result of a round.
struct Round {
    /// The median and the 99th percentile of echoes, in seconds.
    attack: [f64; 2],
    control: [f64; 2],
    newcomer: f64,
    /// How many cores the attackers and the relay used.
    attackers: f64,
    relay: f64,
}

async fn round(attack: Attack) -> Round {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let mut command = common::command(&folder);
    let flags = "--listen /ip4/127.0.0.1/tcp/0 --circuit-duration 0s --circuit-bytes 0";
    command.args(flags.split(' ')).env("RUST_LOG", "error");
    let mut relay = Process::start(command);
    let address_of_relay = relay.listen_address();
    let mut bystanders = Bystanders::start(&address_of_relay).await;
    let port = tcp_port(&address_of_relay);

    let (attackers_before, relay_before) = (attackers_cpu(), relay.cpu());
    let all = attackers();
    for _ in 0..ATTACKERS {
        all.spawn(async move {
            loop {
                if attack(port).await.is_err() {
                    sleep(PAUSE).await; // denied or closed
                }
            }
        });
    }
    let newcomers = tokio::spawn(newcomers(port));
    let attacked = bystanders.echo_for(DURATION).await;
    let attackers = (attackers_cpu() - attackers_before).as_secs_f64() / DURATION.as_secs_f64();
    let relay_cpu = Duration::from_nanos(relay.cpu() - relay_before);
    all.shutdown_background();
    let newcomer = newcomers.await.expect("newcomers do not panic").as_secs_f64();
    sleep(Duration::from_secs(2)).await; // until the relay has handled the rest of the attack

    let stop = Arc::new(AtomicBool::new(false));
    let burners = burn(attackers, &stop);
    let control = tokio::spawn(self::newcomers(port));
    let baseline = bystanders.echo_for(DURATION).await;
    control.await.expect("newcomers do not panic");
    stop.store(true, Ordering::Relaxed);
    burners.into_iter().for_each(|burner| burner.join().expect("a burner does not panic"));
    Round {
        attack: attacked,
        control: baseline,
        newcomer,
        attackers,
        relay: relay_cpu.as_secs_f64() / DURATION.as_secs_f64(),
    }
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<_> = values.collect();
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn main() {
    // `cargo test --all-targets` starts benchmarks too, unoptimized, and without this flag.
    if !env::args().any(|argument| argument == "--bench") {
        return;
    }
    rlimit::increase_nofile_limit(u64::MAX).expect("a limit of open files");
    let wanted: Vec<_> = env::args().skip(1).filter(|name| !name.starts_with('-')).collect();
    let runtime = runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
    let runtime = runtime.expect("a thread");
    println!(
        "| one address at full speed | a bystander's echo, median | 99th percentile | slowest admission of a newcomer | cores: attackers, relay |"
    );
    println!("| --- | --- | --- | --- | --- |");
    for (name, what, attack) in ATTACKS {
        if !wanted.is_empty() && !wanted.iter().any(|wanted| wanted == name) {
            continue;
        }
        let rounds: Vec<_> = (0..ROUNDS).map(|_| runtime.block_on(round(attack))).collect();
        let of = |value: fn(&Round) -> f64| median(rounds.iter().map(value));
        println!(
            "| {what} | × {:.1} ({:.0} µs for {:.0}) | × {:.1} ({:.0} µs for {:.0}) | {:.0} ms | {:.2}, {:.2} |",
            of(|round| round.attack[0] / round.control[0]),
            of(|round| round.attack[0]) * 1e6,
            of(|round| round.control[0]) * 1e6,
            of(|round| round.attack[1] / round.control[1]),
            of(|round| round.attack[1]) * 1e6,
            of(|round| round.control[1]) * 1e6,
            of(|round| round.newcomer) * 1e3,
            of(|round| round.attackers),
            of(|round| round.relay),
        );
    }
}
