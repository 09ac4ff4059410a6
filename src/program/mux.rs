//! Streams over one connection: yamux, with budgets for what a peer may have open and have waiting.

mod corked;
pub(crate) mod frames;
pub(crate) mod held;
pub mod ledger;
mod metered;
pub mod muxer;
mod negotiation;
mod pace;
pub(crate) mod places;
pub mod stream_limits;
mod substream;
mod unread;
