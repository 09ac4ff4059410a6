//! Monitoring over HTTP: metrics, health, status, and a page.

mod counters;
mod go_metrics;
mod history;
mod hosts;
pub mod metrics;
pub mod monitor;
mod process;
mod refusals;
mod routes;
mod server;
mod snapshot;
mod speeds;
mod stats;
mod status;
mod text_format;
