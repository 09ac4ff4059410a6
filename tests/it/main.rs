//! All that needs nothing but this crate: the program as a child process, the behaviour in swarms of the
//! tests' own, and clients that say what they like.

#[path = "../common/mod.rs"]
mod common;

mod access;
mod accounts;
mod addresses;
mod backpressure;
mod bandwidth;
mod config;
mod crowd;
mod door;
mod drain;
mod embed;
mod faults;
mod hostile;
#[cfg(feature = "http")]
mod http;
mod identify;
#[cfg(feature = "pnet")]
mod private;
mod program;
mod proxy;
#[cfg(target_os = "linux")]
mod readiness;
mod restarts;
mod rust_client;
#[cfg(all(target_os = "linux", feature = "pnet", feature = "websocket"))]
mod secrets;
mod spec;
#[cfg(feature = "websocket")]
mod websocket;
