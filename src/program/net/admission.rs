//! Admission of connections: rates and caps by client prefix and peer, handshakes, PROXY protocol headers.

pub(crate) mod behaviour;
pub mod connection_rates;
pub mod handshake_failure;
pub mod handshakes;
pub mod limits;
pub mod open_files;
pub mod proxies;
pub mod proxy_header;
pub mod scoped_rates;
