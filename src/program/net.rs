//! Connections below their streams: TCP and WebSocket, admission, secure channels, and the addresses that
//! peers observe.

pub mod admission;
pub(crate) mod boxed;
pub(crate) mod identify;
pub(crate) mod interfaces;
#[cfg(feature = "websocket")]
pub(crate) mod joined;
mod listener;
pub(crate) mod multiaddr;
pub(crate) mod observed;
pub(crate) mod read_ahead;
pub mod security;
pub(crate) mod socket;
#[cfg(feature = "pnet")]
pub mod swarm_key;
pub mod tcp;
pub mod traffic;
#[cfg(feature = "websocket")]
pub mod websocket;
