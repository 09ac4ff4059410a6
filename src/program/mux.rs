//! Streams over one connection: yamux, with limits on what a peer may have open and have waiting.

pub mod budget;
mod chunk;
mod frame;
pub mod muxer;
mod negotiation;
mod pace;
pub(crate) mod places;
mod session;
pub mod stall;
mod stream;
pub mod stream_limits;
mod substream;
