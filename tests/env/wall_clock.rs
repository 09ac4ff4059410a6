//! The wall clock is set by a day while the program runs: no slot and no circuit ends early or late, and expirations
//! that are sent to clients follow the new time. A clock before 2026 counts as not set: the relay does not serve.
//!
//! libfaketime changes the wall clock and not the monotonic one. A machine that was suspended for a day looks the same
//! to the program: see `src/relay/sweep.rs`.

use std::{
    fs,
    path::PathBuf,
    process::Command,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use libp2p::PeerId;
use tokio::time::sleep;

use crate::{
    common::{
        Client, HOP, Relay, STOP, assert_relayed, circuit, circuit_to, command, http,
        messages::{NO_RESERVATION, connect},
        read_to_end, source_and_target, within,
    },
    interop::{ClientProcess, go_client},
};

/// The loader fills in `$LIB`.
const LIBRARY: &str = "/usr/$LIB/faketime/libfaketimeMT.so.1";

/// The warning of a relay whose clock is not set.
const NOT_SET: &str = "this machine's clock is not set";

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
    let seconds = |flag: &str, time: Duration| format!("--{flag}={}s", time.as_secs());
    let mut clock = WallClock::start(
        0,
        &[
            &seconds("reservation-ttl", TERM),
            &seconds("grace", GRACE),
            &seconds("circuit-duration", CIRCUIT),
        ],
    );
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
    assert_relayed(&mut there, &mut back, b"still here").await;
    let mut stops = idle.accept(STOP);
    drop(circuit_to(&mut source, idle.peer, &mut stops).await);
    let mut newcomer = Client::connect(&clock.relay).await;
    let newcomer_since = clock.reserve(&mut newcomer).await;

    // Each timer ends by the monotonic clock.
    clock.wait_until_freed(in_grace, "grace over", disconnected + GRACE).await;
    let (_, end) = read_to_end(&mut there).await;
    assert!(opened.elapsed() >= CIRCUIT, "{end:?}");
    clock.relay.wait_for_log("time limit").await;
    for (peer, since) in
        [(idle.peer, idle_since), (renews.peer, renewed), (newcomer.peer, newcomer_since)]
    {
        clock.wait_until_freed(peer, "expired", since + TERM).await;
        let answer = source.request(&connect(peer)).await;
        assert_eq!(answer.status, NO_RESERVATION);
    }
    // No peer timed out, and no suspend was detected.
    for line in ["peer silent", "was suspended", "reservation refused"] {
        assert_eq!(clock.relay.count_in_log(line), 0, "{line}");
    }
}

/// AutoRelay looks for the hop protocol every 30 s. After a RESERVE that failed it would stay away for an hour.
#[tokio::test]
#[ignore = "needs libfaketime and Go"]
async fn a_relay_that_starts_in_1970_serves_autorelay_once_the_clock_is_set() {
    let back = seconds_since_1970() - 60;
    let mut clock = WallClock::start(-back, &[http::ON_ANY_PORT]);
    let port = http::port(&clock.relay).await;
    let health = http::fetch(port, "GET", "/healthz").await;
    assert_eq!((health.status, &health.body[..]), (503, "clock not set\n"));
    let address = clock.relay.address.to_string();
    let mut client = ClientProcess::start(Command::new(go_client()).args(["clock", &address]));
    client.read_value("waiting");
    clock.step(back);
    let set = Instant::now();
    clock.relay.wait_for_log("serving clients").await;
    client.read_value("reserved");
    println!("AutoRelay reserved {:.1} s after the clock was set", set.elapsed().as_secs_f64());
    client.wait_for_success();
    within(async {
        while http::fetch(port, "GET", "/healthz").await.status != 200 {
            sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
    for (line, count) in
        [(NOT_SET, 1), ("not serving clients", 1), ("serving clients", 2), ("refused", 0)]
    {
        assert_eq!(clock.relay.count_in_log(line), count, "{line}: {:#?}", clock.relay.log());
    }
}

#[tokio::test]
#[ignore = "needs libfaketime"]
async fn a_clock_that_falls_back_to_1970_ends_no_slot_and_no_circuit() {
    let mut clock = WallClock::start(0, &[]);
    let (mut source, mut target) = source_and_target(&clock.relay).await;
    let (mut there, mut back) = circuit(&mut source, &mut target).await;

    let step = seconds_since_1970() - 60;
    clock.step(-step);
    clock.relay.wait_for_log("not serving clients").await;
    target.wait_for_support(HOP, false).await;
    assert_relayed(&mut there, &mut back, b"still here").await;

    clock.step(step);
    target.wait_for_support(HOP, true).await;
    target.reserve().await;
    let renewed = format!("reservation renewed: peer {}", target.peer);
    clock.relay.wait_for_log(&renewed).await;
    assert_relayed(&mut there, &mut back, b"still here").await;
    for (line, count) in [(NOT_SET, 1), ("slot freed", 0), ("grace began", 0), ("closed", 0)] {
        assert_eq!(clock.relay.count_in_log(line), count, "{line}: {:#?}", clock.relay.log());
    }
}

fn seconds_since_1970() -> i64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("it is later than 1970");
    i64::try_from(now.as_secs()).expect("a date")
}

/// A relay whose wall clock can be set.
struct WallClock {
    relay: Relay,
    /// The file from which libfaketime reads the offset, each time that the clock is read.
    file: PathBuf,
    offset: i64,
}

impl WallClock {
    /// Starts a relay with these flags, whose clock differs by this many seconds.
    fn start(offset: i64, flags: &[&str]) -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let file = folder.path().join("offset");
        fs::write(&file, format!("{offset:+}")).expect("room for it");
        let mut command = command(&folder);
        command
            .env("LD_PRELOAD", LIBRARY)
            .env("FAKETIME_TIMESTAMP_FILE", &file)
            .env("FAKETIME_NO_CACHE", "1")
            .env("FAKETIME_DONT_FAKE_MONOTONIC", "1")
            .arg("--listen=/ip4/127.0.0.1/tcp/0")
            .args(flags);
        let relay = Relay::run(command, folder);
        // Without the library the loader only prints a warning.
        let missing = relay.count_in_log("cannot be preloaded");
        assert_eq!(missing, 0, "{LIBRARY}: is libfaketime installed?");
        Self { relay, file, offset }
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
        seconds_since_1970() + self.offset
    }

    /// Waits until the slot is freed, and asserts that this is not too early.
    async fn wait_until_freed(&self, peer: PeerId, reason: &str, not_before: Instant) {
        let freed = format!("slot freed: peer {peer} at 127.0.0.1: {reason}");
        self.relay.wait_for_log(&freed).await;
        let early = not_before.saturating_duration_since(Instant::now());
        assert!(early.is_zero(), "{reason}: {early:?} early");
    }
}
