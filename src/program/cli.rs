//! The program: settings, main loop, signals, exit code.

mod derived;
pub mod flags;
mod help;
pub mod identity;
pub mod load;
mod log_summary;
mod reload;
pub mod run;
mod runtime;
mod sd_notify;
mod signals;
mod startup_log;
#[cfg(feature = "websocket")]
mod tls_files;
mod values;
