//! The wall clock is set by a day while the program runs: no slot and no circuit ends early or late, and expirations
//! that are sent to clients follow the new time.
//!
//! libfaketime changes the wall clock and not the monotonic one. A machine that was suspended for a day looks the same
//! to the program: see `src/relay/sweep.rs`.

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
async fn setting_the_clock_a_day_forward_changes_no_timer() {
    check_timers(DAY).await;
}

#[tokio::test]
#[ignore = "needs libfaketime"]
async fn setting_the_clock_a_day_back_changes_no_timer() {
    check_timers(-DAY).await;
}

async fn check_timers(step: i64) {
    let mut clock = WallClock::start();
    let [mut idle, mut renews, mut disconnecting, mut source] = [
        Client::connect(&clock.relay).await,
        Client::connect(&clock.relay).await,
        Client::connect(&clock.relay).await,
        Client::connect(&clock.relay).await,
    ];
    let idle_since = clock.reserve(&mut idle).await;
    clock.reserve(&mut renews).await;
    clock.reserve(&mut disconnecting).await;
    let opened = Instant::now();
    let (mut there, mut back) = circuit(&mut source, &mut renews).await;
    let disconnected = Instant::now();
    let in_grace = disconnecting.peer;
    disconnecting.disconnect().await;
    let began = format!("grace began: peer {in_grace}");
    clock.relay.wait_for_log(&began).await;

    clock.step(step);
    // Slots are kept, and an open circuit continues.
    let renewed = clock.reserve(&mut renews).await;
    let line = format!("reservation renewed: peer {}", renews.peer);
    clock.relay.wait_for_log(&line).await;
    send(&mut there, b"still here").await;
    assert_eq!(read_bytes(&mut back, 10).await, b"still here");
    let mut stops = idle.accept(STOP);
    drop(circuit_to(&mut source, idle.peer, &mut stops).await);
    let mut newcomer = Client::connect(&clock.relay).await;
    let newcomer_since = clock.reserve(&mut newcomer).await;

    // Each timer ends by the monotonic clock.
    clock.freed(in_grace, "grace over", disconnected + GRACE).await;
    let (_, end) = read_to_end(&mut there).await;
    assert!(opened.elapsed() >= CIRCUIT, "{end:?}");
    clock.relay.wait_for_log("time limit").await;
    for (peer, since) in
        [(idle.peer, idle_since), (renews.peer, renewed), (newcomer.peer, newcomer_since)]
    {
        clock.freed(peer, "expired", since + TERM).await;
        let answer = source.request(&connect(peer)).await;
        assert_eq!(answer.status, NO_RESERVATION);
    }
    // No peer timed out, and no suspend was detected.
    for line in ["peer silent", "was suspended", "reservation refused"] {
        assert_eq!(clock.relay.count_in_log(line), 0, "{line}");
    }
}

/// A relay whose wall clock can be set.
struct WallClock {
    relay: Relay,
    /// The file from which libfaketime reads the offset, each time that the clock is read.
    file: PathBuf,
    offset: i64,
}

impl WallClock {
    fn start() -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let file = folder.path().join("offset");
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
        // Without the library the loader only prints a warning.
        let missing = relay.count_in_log("cannot be preloaded");
        assert_eq!(missing, 0, "{LIBRARY}: is libfaketime installed?");
        Self { relay, file, offset: 0 }
    }

    /// Changes the wall clock by this many seconds.
    fn step(&mut self, by: i64) {
        self.offset += by;
        let new = self.file.with_extension("new");
        fs::write(&new, format!("{:+}", self.offset)).expect("room for it");
        // Replaces the file atomically.
        fs::rename(&new, &self.file).expect("it is the same folder");
    }

    /// Reserves a slot, and checks the expiration by the relay's wall clock. Returns the earliest start of the term by
    /// the monotonic clock.
    async fn reserve(&self, client: &mut Client) -> Instant {
        let now = Instant::now();
        let earliest = self.seconds();
        let answer = client.reserve().await;
        let expires = answer.reservation.and_then(|slot| slot.expire);
        let expires = i64::try_from(expires.expect("an end")).expect("not for ever");
        let expected = earliest + TERM.as_secs() as i64..=self.seconds() + TERM.as_secs() as i64;
        assert!(expected.contains(&expires), "{expires} is not in {expected:?}");
        now
    }

    /// The relay's wall clock, in seconds since 1970.
    fn seconds(&self) -> i64 {
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        let now = now.expect("it is later than 1970").as_secs();
        i64::try_from(now).expect("a date") + self.offset
    }

    /// Waits until the slot is freed, and asserts that this is not too early.
    async fn freed(&self, peer: PeerId, reason: &str, not_before: Instant) {
        let freed = format!("slot freed: peer {peer} at 127.0.0.1: {reason}");
        self.relay.wait_for_log(&freed).await;
        let early = not_before.saturating_duration_since(Instant::now());
        assert!(early.is_zero(), "{reason}: {early:?} early");
    }
}
