//! The relay watched over HTTP: metrics, health, status, and a page.

mod counters;
mod go_metrics;
mod history;
mod metrics;
pub mod monitor;
mod open_circuits;
mod refusals;
mod routes;
mod server;
mod snapshot;
mod stats;
mod status;
