//! Fuzz targets: each part that reads bytes from outside, on arbitrary input.
//!
//! Each target accepts any bytes and asserts more than the absence of panics. `cargo test` runs the files of
//! `tests/corpus`, and random bytes of a suitable shape: `PROPTEST_CASES=100000 cargo test --test fuzz` for more of
//! them. `.ci/fuzz` runs libFuzzer, which is guided by coverage.

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

/// Each target with its name, which is its folder in `tests/corpus`.
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
        target.unwrap_or_else(|| panic!("{name}: no such target")).1
    });
    CHECK(bytes);
});

/// Runs this many cases, unless `PROPTEST_CASES` is set.
fn config(cases: u32) -> ProptestConfig {
    let mut config = ProptestConfig {
        // The default generator is a cipher, which takes most of the time in an unoptimized build.
        rng_algorithm: RngAlgorithm::XorShift,
        failure_persistence: None, // the bytes are printed
        ..ProptestConfig::default()
    };
    if env::var_os("PROPTEST_CASES").is_none() {
        config.cases = cases;
    }
    config
}

fn check_all(check: fn(&[u8]), cases: u32, bytes: impl Strategy<Value = Vec<u8>>) {
    let result = TestRunner::new(config(cases)).run(&bytes, |bytes| {
        check(&bytes);
        Ok(())
    });
    result.unwrap_or_else(|error| panic!("{error}"));
}

fn any_bytes() -> impl Strategy<Value = Vec<u8>> {
    vec(any::<u8>(), 0..200)
}

#[test]
fn the_corpus_is_replayed() {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/corpus");
    for (name, check) in TARGETS {
        let folder = corpus.join(name);
        let files = fs::read_dir(&folder).unwrap_or_else(|error| panic!("{name}: {error}"));
        let mut count = 0;
        for file in files {
            let file = file.expect("a file").path();
            println!("{}", file.display());
            check(&fs::read(&file).expect("the file is read"));
            count += 1;
        }
        assert!(count > 0, "{name}: its corpus is empty");
    }
}

#[test]
fn messages_decode_as_in_a_naive_decoder() {
    check_all(wire::check, 4000, wire::streams());
    check_all(wire::check, 4000, protobuf::messages());
    check_all(wire::check, 200, wire::long_streams());
    check_all(wire::check, 1000, any_bytes());
}

#[test]
fn any_address_list_yields_an_answer_that_fits_and_names_the_relay() {
    check_all(addresses::check, 1000, addresses::lists());
    check_all(addresses::check, 1000, any_bytes());
}

#[test]
fn a_proxy_header_is_parsed_alike_however_it_is_split() {
    check_all(proxy::check, 2000, proxy::headers());
}

#[test]
fn a_muxer_stays_within_its_budget_for_any_input() {
    check_all(mux::check, 500, mux::frames());
    check_all(mux::check, 1000, any_bytes());
}

#[test]
fn a_key_file_is_a_key_or_a_one_line_error() {
    check_all(files::check_identity, 300, files::identities());
}

#[cfg(feature = "pnet")]
#[test]
fn a_swarm_key_is_a_key_or_a_one_line_error() {
    check_all(files::check_swarm_key, 500, files::swarm_keys());
}

#[test]
fn settings_round_trip_or_are_a_one_line_error() {
    check_all(files::check_config, 500, files::configs());
    check_all(files::check_config, 200, any_bytes());
}

#[test]
fn hostile_peers_leave_no_state_and_do_not_affect_others() {
    check_all(hostile::check, 100, histories());
}

/// The pauses are long enough for peers to time out and circuits to end; with `PROPTEST_CASES`, for all time limits of
/// a stream.
#[test]
fn hostile_peers_leave_no_state_after_their_timeouts() {
    let mut runner = TestRunner::new(config(40));
    let together = runner.config().cases as usize;
    let histories = vec(histories(), together).new_tree(&mut runner);
    let long = match env::var_os("PROPTEST_CASES") {
        Some(_) => Duration::from_secs(31),
        None => Duration::from_millis(1300),
    };
    let short = [150, 1300].map(Duration::from_millis);
    let pauses = [&short[..], &[long]].concat();
    hostile::check_together(&histories.expect("histories").current(), &pauses);
}

fn histories() -> impl Strategy<Value = Vec<u8>> {
    vec(any::<u8>(), 0..400)
}
