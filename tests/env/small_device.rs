//! The build for small devices: its size and its memory, idle and with a few slots and circuits (the figures in
//! `src/doc/operating.md`). And builds for other processors, which have to serve a go-libp2p client.

use std::{fs, path::PathBuf, process::Command};

use libp2p::futures::future;
use tempfile::TempDir;

use super::interop::{go_client, run};
use crate::common::{Client, Relay, assert_relayed, child_process::resident, circuit};

/// The limits: on the size of the program, in bytes, and on its resident memory, in KiB.
const LARGEST: u64 = 2_500_000;
const IDLE: u64 = 5 * 1024;
const IN_USE: u64 = 8 * 1024;

const SLOTS: usize = 32;
const CIRCUITS: usize = 16;

/// How many bytes each circuit transfers first, and then.
const LOADS: [usize; 2] = [1024, 64 * 1024];

/// The path in this environment variable.
fn path_in(variable: &str) -> PathBuf {
    let path = std::env::var_os(variable);
    path.unwrap_or_else(|| panic!("{variable} names no file")).into()
}

#[tokio::test]
#[ignore = "needs a program in RELAYLET_SMALL: .ci/small"]
async fn the_program_for_small_devices_is_small() {
    let program = path_in("RELAYLET_SMALL");
    let size = fs::metadata(&program).expect("a file").len();
    let folder = TempDir::new().expect("a temporary folder");
    let mut start = Command::new(program);
    start.current_dir(folder.path()).env_clear();
    start.args(["--listen=/ip4/127.0.0.1/tcp/0", "--memory=24MiB", "--max-reservations=33"]);
    start.args(["--max-reservations-per-ip=0", "--max-connections-per-ip=0"]);
    let relay = Relay::run(start, folder);
    relay.wait_for_log("memory: at most").await;
    let idle = resident(relay.pid());

    let mut clients = Vec::new();
    for _ in 0..SLOTS {
        let mut client = Client::connect(&relay).await;
        client.reserve().await;
        clients.push(client);
    }
    let (sources, targets) = clients.split_at_mut(CIRCUITS);
    let pairs = sources.iter_mut().zip(targets);
    let mut circuits =
        future::join_all(pairs.map(|(source, target)| circuit(source, target))).await;
    let mut in_use = [0; LOADS.len()];
    for (load, in_use) in LOADS.into_iter().zip(&mut in_use) {
        for (source, target) in &mut circuits {
            assert_relayed(source, target, &vec![7; load]).await;
        }
        *in_use = resident(relay.pid());
    }
    let mib = |kib: u64| kib as f64 / 1024.0;
    println!(
        "{:.2} MB; {:.1} MiB resident idle, {:.1} MiB with {SLOTS} slots and {CIRCUITS} circuits, {:.1} MiB once each \
         circuit has transferred {} KiB",
        size as f64 / 1e6,
        mib(idle),
        mib(in_use[0]),
        mib(in_use[1]),
        LOADS[1] / 1024
    );
    let [in_use, _] = in_use;
    assert!(size <= LARGEST && idle <= IDLE && in_use <= IN_USE);
}

#[test]
#[ignore = "needs Go, and a program in RELAYLET_CROSS with the emulator that runs it in RELAYLET_QEMU: .ci/cross"]
fn a_build_for_another_processor_serves_a_go_libp2p_client() {
    let (emulator, program) = (path_in("RELAYLET_QEMU"), path_in("RELAYLET_CROSS"));
    let folder = TempDir::new().expect("a temporary folder");
    let mut start = Command::new(emulator);
    start.arg(program).current_dir(folder.path()).env_clear();
    start.args(["--listen=/ip4/127.0.0.1/tcp/0", "--memory=24MiB"]);
    start.args(["--circuit-bytes=0", "--circuit-duration=0s"]);
    let relay = Relay::run(start, folder);
    let address = relay.address.to_string();
    run(Command::new(go_client()).args(["device", &address]));
}
