//! How many streams there may be, and how much may wait on them.

use bytesize::ByteSize;

use super::{
    muxer::{LONGEST_FRAME, MOST_STREAMS},
    places::OWN,
};
use crate::config::ConfigError;

/// The least that may be held: a window that is as large as it can get, and as much on its way out.
pub const LEAST_BUFFERED: usize = 2 * LONGEST_FRAME;

/// The limits themselves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StreamLimits {
    /// How many streams the peers may have open together, beside four of each connection.
    /// Default 4096.
    ///
    /// One beyond that is reset.
    pub max_streams: usize,
    /// How many streams a peer may have open on one connection. Default: 32 more than
    /// [`crate::Config::max_circuits_per_peer`].
    ///
    /// One beyond that is reset.
    pub max_streams_per_connection: Option<usize>,
    /// How many bytes may wait in the relay, of all circuits and requests: that came and nobody has
    /// read yet, or are to go and nobody takes. Default 80 MiB.
    ///
    /// Beyond it nobody reads on before something was given up: the stream is reset on which most has
    /// been waiting for the longest; or a connection is closed that takes nothing.
    pub max_buffered: usize,
    /// How many of them one connection may hold. Default 8 MiB.
    ///
    /// Beyond it the same goes for that one.
    pub max_buffered_per_connection: usize,
}

impl Default for StreamLimits {
    fn default() -> Self {
        Self {
            max_streams: 4096,
            max_streams_per_connection: None,
            max_buffered: 80 * 1024 * 1024,
            max_buffered_per_connection: 8 * 1024 * 1024,
        }
    }
}

impl StreamLimits {
    /// Whether they make sense.
    ///
    /// # Errors
    ///
    /// The first that does not.
    pub fn check(&self) -> Result<(), ConfigError> {
        let per_connection = self.max_streams_per_connection.unwrap_or(OWN);
        if !(OWN..=MOST_STREAMS).contains(&per_connection) {
            let problem = format!("{per_connection} cannot be; try {OWN} to {MOST_STREAMS}");
            return Err(ConfigError::new("max_streams_per_connection", problem));
        }
        for (name, bytes) in [
            ("max_buffered", self.max_buffered),
            (
                "max_buffered_per_connection",
                self.max_buffered_per_connection,
            ),
        ] {
            if bytes < LEAST_BUFFERED {
                let least = ByteSize::b(LEAST_BUFFERED as u64);
                let problem = format!("a single circuit may need more; try {least} or more");
                return Err(ConfigError::new(name, problem));
            }
        }
        Ok(())
    }

    /// How many streams the peers can have open on so many connections.
    pub fn most(&self, connections: usize) -> usize {
        connections
            .saturating_mul(OWN)
            .saturating_add(self.max_streams)
    }
}
