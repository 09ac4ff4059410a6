//! Those who look on while the relay is ill-treated, and are to notice nothing.

use std::{
    fs,
    time::{Duration, Instant},
};

use libp2p::Stream;
use tokio::time::sleep;

use super::{Client, PATIENCE, Relay, by_hand::send, circuit, read_bytes};

/// The relay, and a circuit between two who have nothing to do with what is sent to it.
pub struct Bystanders {
    pub relay: Relay,
    source: Client,
    target: Client,
    there: Stream,
    back: Stream,
    /// How many lines a log at the default level had when they came.
    lines: usize,
}

impl Bystanders {
    /// With limits that stand in the way of neither them nor a stranger, and these flags.
    pub async fn gather(flags: &[&str]) -> Self {
        let limits = "--max-connections-per-ip=0 --max-handshakes=4096 --idle-timeout=0s \
                      --circuit-duration=0s";
        let relay = Relay::start(&[&limits.split(' ').collect::<Vec<_>>(), flags].concat());
        let mut source = Client::connect(&relay).await;
        let mut target = Client::connect(&relay).await;
        target.reserve().await;
        let (there, back) = circuit(&mut source, &mut target).await;
        // The last that it says by itself.
        relay.wait_for_log("can be dialed from the internet").await;
        let lines = loud(&relay).len();
        Self {
            relay,
            source,
            target,
            there,
            back,
            lines,
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
        comes_to_rest(&self.relay).await;
    }
}

async fn pass(from: &mut Stream, to: &mut Stream) {
    send(from, b"still here").await;
    assert_eq!(read_bytes(to, 10).await, b"still here");
}

/// What the relay logs by default, but for what it sums up each minute: panics, and all that is
/// above debug.
fn loud(relay: &Relay) -> Vec<String> {
    let mut log = relay.log();
    log.retain(|line| !line.contains(" DEBUG relaylet") && !line.contains(" within a minute: "));
    log
}

/// Waits until the relay hardly computes any more, and looks at how much memory it ever took.
pub async fn comes_to_rest(relay: &Relay) {
    const BUSY: u64 = 20; // hundredths of a second
    const MUCH: u64 = 64 * 1024; // KiB, four times what it takes to begin with
    let about = |what| fs::read_to_string(format!("/proc/{}/{what}", relay.pid())).ok();
    let computed = || {
        let stat = about("stat")?;
        let fields = stat.split(' ').skip(13).take(2); // utime and stime
        Some(fields.map(|ticks| ticks.parse::<u64>().unwrap()).sum())
    };
    let start = Instant::now();
    let Some(mut before) = computed() else {
        return; // only Linux says so
    };
    loop {
        sleep(Duration::from_secs(1)).await;
        let now: u64 = computed().unwrap();
        if now - before < BUSY {
            break;
        }
        assert!(start.elapsed() < PATIENCE, "the relay spins");
        before = now;
    }
    let status = about("status").unwrap();
    let peak = status.lines().find(|line| line.starts_with("VmHWM:"));
    let peak = peak.unwrap().split_whitespace().nth(1).unwrap();
    assert!(peak.parse::<u64>().unwrap() < MUCH, "{peak} KiB");
}
