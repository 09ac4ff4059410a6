//! The wall clock steps by a day under the running program: no slot and no circuit is lost or
//! prolonged, and what clients are told is right by the new time.
//!
//! libfaketime steps it; the clock that only goes forward is left alone. To this program that is what
//! a machine looks like as well that was suspended for a day: see `src/relay/sweep.rs`.

use std::{
    fs,
    path::PathBuf,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use libp2p::PeerId;

use crate::common::{
    Client, Relay, STOP, by_hand::send, circuit, circuit_to, command, messages::connect,
    read_bytes, read_to_end,
};

const NO_RESERVATION: Option<i32> = Some(204);

/// The loader fills in `$LIB`.
const LIBRARY: &str = "/usr/$LIB/faketime/libfaketimeMT.so.1";

const DAY: i64 = 24 * 60 * 60;

/// Long enough for the steps of a test on a busy machine.
const TERM: Duration = Duration::from_secs(20);
const GRACE: Duration = Duration::from_secs(5);
const CIRCUIT: Duration = Duration::from_secs(10);

#[tokio::test]
#[ignore = "needs libfaketime"]
async fn a_day_forward_ends_and_prolongs_nothing() {
    nothing_ends_early_or_late(DAY).await;
}

#[tokio::test]
#[ignore = "needs libfaketime"]
async fn a_day_back_ends_and_prolongs_nothing() {
    nothing_ends_early_or_late(-DAY).await;
}

async fn nothing_ends_early_or_late(step: i64) {
    let mut clock = WallClock::start();
    let [mut idle, mut renews, mut away, mut source] = [
        Client::connect(&clock.relay).await,
        Client::connect(&clock.relay).await,
        Client::connect(&clock.relay).await,
        Client::connect(&clock.relay).await,
    ];
    let idle_since = clock.reserve(&mut idle).await;
    clock.reserve(&mut renews).await;
    clock.reserve(&mut away).await;
    let opened = Instant::now();
    let (mut there, mut back) = circuit(&mut source, &mut renews).await;
    let left = Instant::now();
    let in_grace = away.peer;
    away.leave().await;
    let began = format!("grace began: peer {in_grace}");
    clock.relay.wait_for_log(&began).await;

    clock.step(step);
    // Who held a slot holds it, and a circuit that is open goes on.
    let renewed = clock.reserve(&mut renews).await;
    let line = format!("reservation renewed: peer {}", renews.peer);
    clock.relay.wait_for_log(&line).await;
    send(&mut there, b"still here").await;
    assert_eq!(read_bytes(&mut back, 10).await, b"still here");
    let mut stops = idle.accept(STOP);
    drop(circuit_to(&mut source, idle.peer, &mut stops).await);
    let mut newcomer = Client::connect(&clock.relay).await;
    let newcomer_since = clock.reserve(&mut newcomer).await;

    // Each ends when it would have, by a clock that does not step.
    clock.freed(in_grace, "grace over", left + GRACE).await;
    let (_, end) = read_to_end(&mut there).await;
    assert!(opened.elapsed() >= CIRCUIT, "{end:?}");
    clock.relay.wait_for_log("time limit").await;
    for (peer, since) in
        [(idle.peer, idle_since), (renews.peer, renewed), (newcomer.peer, newcomer_since)]
    {
        clock.freed(peer, "expired", since + TERM).await;
        let answer = source.ask(&connect(peer)).await;
        assert_eq!(answer.status, NO_RESERVATION);
    }
    // Nobody was suspected of anything.
    for line in ["peer silent", "was suspended", "reservation refused"] {
        assert_eq!(clock.relay.count_in_log(line), 0, "{line}");
    }
}

/// A relay, and the wall clock that it goes by.
struct WallClock {
    relay: Relay,
    /// Where libfaketime reads by how much it is off, each time that it is looked at.
    file: PathBuf,
    off: i64,
}

impl WallClock {
    fn start() -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let file = folder.path().join("off");
        fs::write(&file, "+0").expect("room for it");
        let mut command = command(&folder);
        let seconds = |flag: &str, time: Duration| format!("--{flag}={}s", time.as_secs());
        command
            .env("LD_PRELOAD", LIBRARY)
            .env("FAKETIME_TIMESTAMP_FILE", &file)
            .env("FAKETIME_NO_CACHE", "1")
            .env("FAKETIME_DONT_FAKE_MONOTONIC", "1")
            .arg("--listen=/ip4/127.0.0.1/tcp/0")
            .arg(seconds("reservation-ttl", TERM))
            .arg(seconds("grace", GRACE))
            .arg(seconds("circuit-duration", CIRCUIT));
        let relay = Relay::run(command, folder);
        // The loader says so, and goes on without it.
        let missing = relay.count_in_log("cannot be preloaded");
        assert_eq!(missing, 0, "{LIBRARY}: is libfaketime installed?");
        Self { relay, file, off: 0 }
    }

    /// Puts it forward or back by so many seconds.
    fn step(&mut self, by: i64) {
        self.off += by;
        let new = self.file.with_extension("new");
        fs::write(&new, format!("{:+}", self.off)).expect("room for it");
        // At no time is there half a number.
        fs::rename(&new, &self.file).expect("it is the same folder");
    }

    /// Reserves a slot; the term that is told ends when it does by the relay's wall clock. Since when
    /// it runs at the earliest, by the clock that only goes forward.
    async fn reserve(&self, client: &mut Client) -> Instant {
        let now = Instant::now();
        let earliest = self.seconds();
        let answer = client.reserve().await;
        let told = answer.reservation.and_then(|slot| slot.expire);
        let told = i64::try_from(told.expect("an end")).expect("not for ever");
        let right = earliest + TERM.as_secs() as i64..=self.seconds() + TERM.as_secs() as i64;
        assert!(right.contains(&told), "{told} is not in {right:?}");
        now
    }

    /// What the relay's wall clock says, in seconds since 1970.
    fn seconds(&self) -> i64 {
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        let now = now.expect("it is later than 1970").as_secs();
        i64::try_from(now).expect("a date") + self.off
    }

    /// Waits until the slot is free, which it is not before its time.
    async fn freed(&self, peer: PeerId, reason: &str, not_before: Instant) {
        let freed = format!("slot freed: peer {peer} at 127.0.0.1: {reason}");
        self.relay.wait_for_log(&freed).await;
        let early = not_before.saturating_duration_since(Instant::now());
        assert!(early.is_zero(), "{reason}: {early:?} early");
    }
}
