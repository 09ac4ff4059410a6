//! The heap use of one entry of the table, including all indices.
//!
//! Each table grows in a process of its own and is measured from outside the allocator, by the writable memory that the
//! process has requested from the system: this includes malloc's overhead, and no counting allocator slows down the
//! other measurements.

use std::{
    env, fs,
    net::{IpAddr, Ipv4Addr},
    process::{Command, ExitCode},
    time::Instant,
};

use relaylet::{
    Config, FreedReason,
    relay::{connections::End, reservations::Reservations},
};

use super::{
    bounds::Bounds,
    peer::{Peer, TERM},
};

/// The argument that makes this program such a process.
pub const ROLE: &str = "a-table";

const MANY: usize = 100_000;

/// A hash map grows at 7/8 of a power of two: with one entry more it has just doubled, and is half empty.
const JUST_DOUBLED: usize = (1 << 17) / 8 * 7 + 1;

const BOUND: f64 = 400.0;

// The cases, as arguments.
const LIVE: &str = "live, one address each";
const LIVE_AT_ONE: &str = "live, one address for all";
const GRACE: &str = "in grace, one address each";
const GRACE_AT_ONE: &str = "in grace, one address for all";

pub fn measure(bounds: &mut Bounds) {
    println!("\nHeap, indices and malloc's own included: bytes an entry.");
    println!("\n| all entries | {MANY} | {JUST_DOUBLED}, the worst fill |");
    println!("| --- | --- | --- |");
    for case in [LIVE, LIVE_AT_ONE, GRACE, GRACE_AT_ONE] {
        let (many, doubled) = (bytes_each(case, MANY), bytes_each(case, JUST_DOUBLED));
        println!("| {case} | {many:.0} | {doubled:.0} |");
        bounds.at_most(&format!("bytes an entry, {case}"), many, BOUND);
    }
}

fn bytes_each(case: &str, count: usize) -> f64 {
    let table = Command::new(env::current_exe().expect("this program"))
        .args([ROLE, case, &count.to_string()])
        // Returns the memory that a growing table frees to the system: glibc would keep some of it.
        .env("MALLOC_MMAP_THRESHOLD_", "131072")
        .output()
        .expect("the process starts");
    let output = String::from_utf8_lossy(&table.stdout);
    let bytes: f64 = output.trim().parse().expect("a number of bytes");
    bytes / count as f64
}

/// The body of that process: a table grows, and the number of bytes is printed.
pub fn role(case: &str, count: &str) -> ExitCode {
    let count: usize = count.parse().expect("a number of entries");
    let mut config = Config::default();
    config.max_reservations = count;
    config.max_reservations_per_ip = Some(0);
    config.max_reservations_per_subnet = Some(0);
    let one_address = [LIVE_AT_ONE, GRACE_AT_ONE].contains(&case);
    let peer = |number| {
        let peer = Peer::number(number);
        let only = IpAddr::from(Ipv4Addr::LOCALHOST);
        let address = if one_address { only } else { peer.address };
        Peer { address, ..peer }
    };

    let (now, before) = (Instant::now(), writable_bytes());
    let mut table = Reservations::new(&config);
    for peer in (0..count).map(peer) {
        let prefix = Some(peer.address.into());
        table.reserve(peer.id, peer.connection, prefix, TERM, now).expect("there is room");
        table.confirm(&peer.id);
        table.changes.clear();
        if [GRACE, GRACE_AT_ONE].contains(&case) {
            let gone = End { peer: peer.id, connection: peer.connection };
            table.on_disconnected(gone, &[], FreedReason::Disconnected, now);
            table.changes.clear();
        }
    }
    println!("{}", writable_bytes() - before);
    assert_eq!(table.taken(), count);
    ExitCode::SUCCESS
}

/// The writable memory that this process has requested from the system.
fn writable_bytes() -> usize {
    let status = fs::read_to_string("/proc/self/status").expect("Linux");
    let data = status.lines().find_map(|line| line.strip_prefix("VmData:"));
    let kibibytes = data.expect("its data").trim().trim_end_matches(" kB");
    kibibytes.parse::<usize>().expect("a number") * 1024
}
