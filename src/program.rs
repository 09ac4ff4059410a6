//! What makes the relay a program: flags, key file, sockets, signals. None of it is compiled without the
//! feature `program`, nor an optional part without its own: `http` for what is shown over HTTP, `pnet` for
//! private networks, `websocket` for what browsers connect over, `autonat` for AutoNAT, `dht` for the DHT.
//!
//! From the lowest to the highest: [`net`] (sockets, admission, secure channels), [`mux`] (streams over one
//! connection), `autonat` and `dht`, [`node`] (all of these as one swarm), `http`, [`cli`].

#[cfg(feature = "autonat")]
mod autonat;
pub mod cli;
mod component;
#[cfg(feature = "dht")]
pub mod dht;
#[cfg(feature = "http")]
mod http;
pub mod mux;
pub mod net;
pub mod node;
mod secret_file;
// Without `http` only the log's summary reads it.
#[cfg_attr(not(feature = "http"), expect(dead_code))]
mod tally;
