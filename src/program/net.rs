//! Connections below their streams: TCP and WebSocket, admission, secure channels, identify, and the addresses
//! at which peers observe the relay.

pub mod admission;
pub(crate) mod boxed;
pub mod byte_counters;
pub(crate) mod identify;
pub(crate) mod interfaces;
mod listener;
pub(crate) mod multiaddr;
pub(crate) mod observations;
pub(crate) mod protobuf;
pub(crate) mod read_buffer;
pub mod security;
pub(crate) mod socket;
#[cfg(feature = "pnet")]
pub mod swarm_key;
pub mod tcp;
#[cfg(feature = "websocket")]
pub mod websocket;
