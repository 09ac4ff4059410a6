//! A libp2p circuit relay whose slots come back.

pub mod address;
pub mod behaviour;
pub mod circuit;
pub mod circuits;
pub mod config;
pub mod connections;
pub mod event;
mod handler;
mod hop;
mod ping;
pub mod reservations;
mod stop;
pub mod sweep;
mod timeout;
mod voucher;
pub mod wire;

pub use behaviour::Behaviour;
pub use config::{Config, ConfigError};
pub use event::Event;
#[cfg(feature = "program")]
pub mod program;
#[cfg(feature = "program")]
pub use program::node::{Node, NodeEvent};
