//! Monitoring over HTTP: metrics, health, status, and a page.

mod counters;
mod go_metrics;
mod history;
mod hosts;
mod metrics;
pub mod monitor;
mod process;
mod refusals;
mod routes;
mod server;
mod snapshot;
mod speeds;
pub mod stats;
mod status;
mod text_format;
