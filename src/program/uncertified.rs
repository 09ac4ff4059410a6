//! The certificates of a program that was built without the feature `websocket`: none.

use anyhow::Result;

use super::{flags::Flags, node::Node};

/// None.
pub struct Certificates;

impl Certificates {
    /// There is nothing to read.
    #[expect(clippy::unnecessary_wraps, reason = "the other one may fail")]
    pub fn start(_: &Flags, _: &mut Node) -> Result<Self> {
        Ok(Self)
    }

    /// Never.
    pub async fn due(&mut self) {
        std::future::pending().await
    }

    /// Nothing changes.
    pub fn look(&mut self, _: &mut Node) {}

    /// There is nothing to read.
    pub fn read_again(&mut self, _: &Flags, _: &mut Node) {}
}
