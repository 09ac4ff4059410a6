//! yamux: streams over one connection, with limits on streams and on buffered bytes.

pub mod budget;
mod chunk;
pub(crate) mod frame;
pub mod muxer;
mod negotiation;
pub(crate) mod permits;
mod rates;
mod session;
pub mod stall;
mod stream;
pub mod stream_limits;
mod substream;
