//! Admission of connections: limits by prefix and peer, handshakes, and PROXY protocol headers.

pub mod arrivals;
pub(crate) mod door;
pub mod handshakes;
pub mod limits;
pub mod open_files;
pub mod proxies;
pub mod proxy_header;
