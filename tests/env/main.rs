//! Tests that need more than this crate and Rust: root, Go, Node, Python, Chromium, HAProxy, nginx, libfaketime,
//! Prometheus, systemd's tools.
//!
//! Each test is `#[ignore]`d with the tools that it needs, and fails without them. `.ci/env` installs them and
//! runs all of these tests.

#[path = "../common/mod.rs"]
mod common;

mod alerts;
mod browser;
mod deploy;
mod interop;
mod machine;
mod memory_estimate;
mod netns;
mod small_device;
mod wall_clock;
