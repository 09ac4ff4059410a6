//! All tests that need only this crate: the program as a child process, the behaviour in swarms of the tests, and
//! clients that send arbitrary bytes.

#[path = "../common/mod.rs"]
mod common;

mod access;
mod accounts;
mod addresses;
mod admission;
#[cfg(feature = "autonat")]
mod autonat;
mod backpressure;
mod bandwidth;
#[cfg(all(feature = "http", feature = "pnet", feature = "websocket"))]
mod certificates;
#[cfg(feature = "check")]
mod check;
mod concurrency;
mod config;
#[cfg(feature = "dht")]
mod dht;
mod drain;
mod embed;
#[cfg(feature = "http")]
mod ends;
mod faults;
#[cfg(all(feature = "http", feature = "pnet", feature = "websocket"))]
mod handshakes;
mod hostile;
#[cfg(feature = "http")]
mod http;
mod id;
mod identify;
#[cfg(feature = "pnet")]
mod private;
mod program;
mod proxy;
#[cfg(feature = "quic-example")]
mod quic;
#[cfg(target_os = "linux")]
mod readiness;
mod reading;
#[cfg(all(
    feature = "autonat",
    feature = "dht",
    feature = "http",
    feature = "pnet",
    feature = "websocket"
))]
mod readme;
mod restarts;
mod rust_client;
#[cfg(all(target_os = "linux", feature = "pnet", feature = "websocket"))]
mod secrets;
mod spec;
#[cfg(all(
    feature = "autonat",
    feature = "dht",
    feature = "http",
    feature = "pnet",
    feature = "websocket"
))]
mod surface;
#[cfg(feature = "http")]
mod time;
#[cfg(feature = "websocket")]
mod websocket;
