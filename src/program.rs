//! What makes the relay a program: flags, key file, sockets, signals. Each part in a file of its
//! own; none of it is compiled without the feature `program`, nor an optional part without its own:
//! `http` for what is shown over HTTP, `pnet` for private networks, `websocket` for what browsers
//! connect over, `autonat` for AutoNAT, `dht` for the DHT.

mod apart;
#[cfg(feature = "autonat")]
mod autonat;
mod boxed;
mod ceiling;
pub mod command_line;
mod config_file;
pub mod connection_limits;
mod corked;
mod digest;
mod door;
pub mod flags;
mod frames;
mod greeting;
mod heap;
mod held;
mod help;
pub mod identity;
mod interfaces;
pub mod ledger;
mod listener;
mod metered;
pub mod muxer;
mod negotiation;
pub mod node;
mod observed;
pub mod open_files;
mod orders;
mod places;
pub mod proxies;
pub mod proxy_header;
mod read_ahead;
mod readiness;
mod reload;
pub mod run;
pub mod security;
mod settings;
pub mod stream_limits;
mod substream;
mod threads;
pub mod traffic;
pub mod transport;
mod unread;
mod values;

#[cfg(feature = "dht")]
mod bootstrap;
#[cfg(feature = "dht")]
pub mod dht;
#[cfg(feature = "dht")]
mod routable;
#[cfg(feature = "dht")]
mod visits;

#[cfg(feature = "http")]
mod history;
#[cfg(feature = "http")]
mod http;
#[cfg(feature = "http")]
mod metrics;
#[cfg(feature = "http")]
mod open_circuits;
#[cfg(feature = "http")]
mod refusals;
#[cfg(feature = "http")]
mod relaysvc;
#[cfg(feature = "http")]
mod site;
#[cfg(feature = "http")]
mod status;
#[cfg(feature = "pnet")]
pub mod swarm_key;
#[cfg(not(feature = "http"))]
mod unwatched;
#[cfg(feature = "http")]
mod watch;

#[cfg(feature = "websocket")]
pub mod certificate;
#[cfg(feature = "websocket")]
mod certificates;
#[cfg(feature = "websocket")]
mod joined;
#[cfg(not(feature = "websocket"))]
mod uncertified;
#[cfg(feature = "websocket")]
mod websocket;
