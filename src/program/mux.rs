//! yamux: streams over one connection, with limits on streams and on buffered bytes.

pub mod budget;
mod fair_share;
pub(crate) mod frame;
pub mod muxer;
mod negotiation;
pub(crate) mod session;
mod stream;
pub mod stream_limits;
