//! The watch of a program that was built without the feature `http`: nobody's.

use anyhow::Result;

use super::{
    flags::Flags,
    node::{Node, NodeEvent},
};

/// Nothing.
pub struct Watch;

impl Watch {
    /// There is nothing to start.
    #[expect(clippy::unnecessary_wraps, reason = "the other one may fail")]
    pub fn start(_: &Flags, _: &Node) -> Result<Self> {
        Ok(Self)
    }

    /// Nobody wants to know.
    pub fn note(&mut self, _: &NodeEvent) {}

    /// Never.
    pub async fn due(&mut self) {
        std::future::pending().await
    }

    /// Nobody looks.
    pub fn look(&mut self, _: &Node, _: bool) {}
}
