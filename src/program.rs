//! The program: settings, key file, sockets, signals, around the relay's behaviour. Compiled with the feature `program`;
//! its optional parts with their own: `http` (metrics, health and a page over HTTP), `pnet` (private networks),
//! `websocket` (browsers), `autonat`, `dht`, `check` (`relaylet check`).
//!
//! From the lowest layer to the highest: [`net`] (sockets, admission, secure channels), [`mux`] (streams over one
//! connection), `autonat` and `dht`, [`node`] (all of these as one swarm), `http` and `check`, [`cli`].

#[cfg(feature = "autonat")]
mod autonat;
#[cfg(feature = "check")]
pub mod check;
pub mod cli;
mod component;
mod delegate;
#[cfg(feature = "dht")]
pub mod dht;
#[cfg(feature = "http")]
mod http;
pub mod mux;
pub mod net;
pub mod node;
mod secret_file;
// Without `http` only the log summary reads it.
#[cfg_attr(not(feature = "http"), expect(dead_code))]
mod tally;
