//! What needs more than this crate and Rust: root, Go, Node, Chromium, HAProxy, nginx, libfaketime, systemd's tools.
//!
//! Each test is `#[ignore]`d with the tools that it needs, and fails without them. `.ci/env` installs them and
//! runs all of these tests.

#[path = "../common/mod.rs"]
mod common;

mod browser;
mod ceiling;
mod deploy;
mod interop;
mod netns;
mod wall_clock;
