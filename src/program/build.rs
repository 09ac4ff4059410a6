//! What the linker is told: the program's 7,500 relocations in 4 KB instead of 180.

use std::env;

fn main() {
    println!("cargo::rerun-if-changed=src/program/build.rs");
    let program = env::var_os("CARGO_FEATURE_PROGRAM").is_some();
    let os = env::var("CARGO_CFG_TARGET_OS").unwrap_or_default();
    let libc = env::var("CARGO_CFG_TARGET_ENV").unwrap_or_default();
    // Needs glibc 2.36 or musl 1.2.4 where it runs; linkers that do not know it only warn.
    if program && os == "linux" && ["gnu", "musl"].contains(&libc.as_str()) {
        println!("cargo::rustc-link-arg-bins=-Wl,-z,pack-relative-relocs");
    }
    // Beside the tests cargo builds the program. In `.ci/fuzz` nothing counts there, or runs it.
    if env::var_os("CARGO_CFG_FUZZING").is_some() {
        println!("cargo::rustc-link-arg-bins=-Wl,--unresolved-symbols=ignore-all");
    }
}
