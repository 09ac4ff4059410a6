//! What bytes from outside can do to each part that reads them: nothing but what they mean.
//!
//! Each target takes any bytes and holds the relay to more than that it does not panic. Here the
//! bytes are those of `tests/corpus`, and random ones of the right shape: `PROPTEST_CASES=100000
//! cargo test --test fuzz` for more of them. `.ci/fuzz` has libFuzzer make them up by what they
//! make the relay do.

#![cfg_attr(fuzzing, no_main)]

#[path = "fuzz/addresses.rs"]
mod addresses;
#[path = "fuzz/files.rs"]
mod files;
#[path = "fuzz/hostile.rs"]
mod hostile;
#[path = "fuzz/memory.rs"]
mod memory;
#[path = "fuzz/mux.rs"]
mod mux;
#[path = "fuzz/protobuf.rs"]
mod protobuf;
#[path = "fuzz/proxy.rs"]
mod proxy;
#[path = "fuzz/wire.rs"]
mod wire;

use std::{env, fs, path::Path, time::Duration};

use proptest::{
    collection::vec,
    prelude::*,
    strategy::ValueTree,
    test_runner::{RngAlgorithm, TestRunner},
};

type Target = (&'static str, fn(&[u8]));

/// By their names, which are those of the folders in `tests/corpus`.
const TARGETS: &[Target] = &[
    ("addresses", addresses::check),
    ("config", files::check_config),
    ("hostile", hostile::check),
    ("identity", files::check_identity),
    ("mux", mux::check),
    ("proxy", proxy::check),
    #[cfg(feature = "pnet")]
    ("swarm_key", files::check_swarm_key),
    ("wire", wire::check),
];

#[cfg(fuzzing)]
libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    use std::sync::LazyLock;

    static CHECK: LazyLock<fn(&[u8])> = LazyLock::new(|| {
        let name = env::var("FUZZ_TARGET").expect("FUZZ_TARGET names a target");
        let target = TARGETS.iter().find(|(target, _)| *target == name);
        target.unwrap_or_else(|| panic!("{name}: there is no such target")).1
    });
    CHECK(bytes);
});

/// So many cases, unless `PROPTEST_CASES` says otherwise.
fn config(cases: u32) -> ProptestConfig {
    let mut config = ProptestConfig {
        // The usual generator is a cipher, and takes most of the time when it is not optimized.
        rng_algorithm: RngAlgorithm::XorShift,
        failure_persistence: None, // it prints the bytes
        ..ProptestConfig::default()
    };
    if env::var_os("PROPTEST_CASES").is_none() {
        config.cases = cases;
    }
    config
}

fn holds(check: fn(&[u8]), cases: u32, bytes: impl Strategy<Value = Vec<u8>>) {
    let tried = TestRunner::new(config(cases)).run(&bytes, |bytes| {
        check(&bytes);
        Ok(())
    });
    tried.unwrap_or_else(|error| panic!("{error}"));
}

fn any_bytes() -> impl Strategy<Value = Vec<u8>> {
    vec(any::<u8>(), 0..200)
}

#[test]
fn what_was_found_once_holds_still() {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/corpus");
    for (name, check) in TARGETS {
        let folder = corpus.join(name);
        let files = fs::read_dir(&folder).unwrap_or_else(|error| panic!("{name}: {error}"));
        let mut count = 0;
        for file in files {
            let file = file.expect("a file").path();
            println!("{}", file.display());
            check(&fs::read(&file).expect("it can be read"));
            count += 1;
        }
        assert!(count > 0, "{name}: nothing in its corpus");
    }
}

#[test]
fn messages_mean_what_a_naive_reader_makes_of_them() {
    holds(wire::check, 4000, wire::streams());
    holds(wire::check, 4000, protobuf::messages());
    holds(wire::check, 200, wire::long_streams());
    holds(wire::check, 1000, any_bytes());
}

#[test]
fn whatever_the_addresses_an_answer_fits_and_leads_to_the_relay() {
    holds(addresses::check, 1000, addresses::lists());
    holds(addresses::check, 1000, any_bytes());
}

#[test]
fn a_proxys_header_means_the_same_however_it_is_cut() {
    holds(proxy::check, 2000, proxy::headers());
}

#[test]
fn whatever_a_peer_sends_its_muxer_holds_no_more_than_it_may() {
    holds(mux::check, 500, mux::frames());
    holds(mux::check, 1000, any_bytes());
}

#[test]
fn a_key_file_is_a_key_or_one_line() {
    holds(files::check_identity, 300, files::identities());
}

#[cfg(feature = "pnet")]
#[test]
fn a_swarm_key_is_a_key_or_one_line() {
    holds(files::check_swarm_key, 500, files::swarm_keys());
}

#[test]
fn settings_are_printed_as_they_are_read_or_one_line_says_what_is_wrong() {
    holds(files::check_config, 500, files::configs());
    holds(files::check_config, 200, any_bytes());
}

#[test]
fn of_hostile_peers_nothing_is_left_and_nobody_else_notices() {
    holds(hostile::check, 100, histories());
}

/// Time enough for a peer to be judged and a circuit to end; and with `PROPTEST_CASES`, for all
/// limits that a stream has.
#[test]
fn nor_once_their_time_is_over() {
    let mut runner = TestRunner::new(config(40));
    let together = runner.config().cases as usize;
    let histories = vec(histories(), together).new_tree(&mut runner);
    let long = match env::var_os("PROPTEST_CASES") {
        Some(_) => Duration::from_secs(31),
        None => Duration::from_millis(1300),
    };
    let short = [150, 1300].map(Duration::from_millis);
    let pauses = [&short[..], &[long]].concat();
    hostile::check_together(&histories.expect("some").current(), &pauses);
}

fn histories() -> impl Strategy<Value = Vec<u8>> {
    vec(any::<u8>(), 0..400)
}
