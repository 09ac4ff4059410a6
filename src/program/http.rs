//! The relay watched over HTTP: metrics, health, status, and a page.

mod counters;
mod go_metrics;
mod history;
mod metrics;
pub mod monitor;
mod refusals;
mod routes;
mod server;
mod snapshot;
mod speeds;
mod stats;
mod status;
