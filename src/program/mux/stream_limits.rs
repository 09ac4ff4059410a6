//! How many streams there may be, and how much may wait on them.

use bytesize::ByteSize;

use super::{
    frame::{INITIAL_WINDOW, MAX_STREAMS, MAX_WINDOW},
    places::OWN,
};
use crate::config::ConfigError;

/// Streams of a connection beside its circuits: requests, pings, identify, and some to spare.
pub const SPARE: usize = 32;

/// How many streams a connection may have in each direction, for so many circuits.
///
/// # Errors
///
/// When that is more than a muxer can tell apart.
pub fn per_connection(circuits: usize) -> Result<usize, ConfigError> {
    const MOST: usize = MAX_STREAMS - SPARE;
    match circuits {
        0..=MOST => Ok(circuits + SPARE),
        _ => {
            let problem = format!("one connection cannot carry so many; try {MOST} or less");
            Err(ConfigError::new("max_circuits_per_peer", problem))
        }
    }
}

/// The least that may be held: a window that is as large as it can get, and as much on its way out.
pub const LEAST_BUFFERED: usize = 2 * MAX_WINDOW;

/// The least that may wait on all connections by default, in bytes.
const LEAST_POOL: usize = 80 * 1024 * 1024;

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
    /// How many streams a second the connections of one address may open together, beside a few of each;
    /// a subnet four times as many. As many as in 16 s may come at once. Default 64; zero: no limit.
    ///
    /// One beyond that is reset. Frames that open streams, reset them or ping may come four times as fast: a
    /// connection that sends more is read no faster, and closed if no slot and no circuit goes over it.
    pub stream_rate: u32,
    /// How many bytes may wait in the relay, of all circuits and requests: that came and were not read
    /// yet, or are to go and were not taken. Default: four times as many as one connection may hold, at
    /// least 80 MiB.
    ///
    /// Above it, down to nine tenths, the heaviest connection of the heaviest client prefix resets streams,
    /// those first that have waited the most, and frees their bytes at once. No connection is read more
    /// slowly for it.
    pub max_buffered: Option<usize>,
    /// How many bytes that came one connection may hold. Default: a window of 256 KiB for each of
    /// [`crate::Config::max_circuits_per_peer`], and 1 MiB.
    ///
    /// Above it the same goes for that one.
    pub max_buffered_per_connection: Option<usize>,
}

impl Default for StreamLimits {
    fn default() -> Self {
        Self {
            max_streams: 4096,
            max_streams_per_connection: None,
            stream_rate: 64,
            max_buffered: None,
            max_buffered_per_connection: None,
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
        if !(OWN..=MAX_STREAMS).contains(&per_connection) {
            let problem = format!("{per_connection} cannot be; try {OWN} to {MAX_STREAMS}");
            return Err(ConfigError::new("max_streams_per_connection", problem));
        }
        for (name, bytes) in [
            ("max_buffered", self.max_buffered),
            ("max_buffered_per_connection", self.max_buffered_per_connection),
        ] {
            if bytes.is_some_and(|bytes| bytes < LEAST_BUFFERED) {
                let least = ByteSize::b(LEAST_BUFFERED as u64);
                let problem = format!("a single circuit may need more; try {least} or more");
                return Err(ConfigError::new(name, problem));
            }
        }
        Ok(())
    }

    /// How many bytes one connection may hold that is made for so many circuits.
    pub fn buffered_per_connection(&self, circuits: usize) -> usize {
        let default = || circuits.saturating_mul(INITIAL_WINDOW).saturating_add(MAX_WINDOW);
        self.max_buffered_per_connection.unwrap_or_else(default)
    }

    /// How many bytes may wait on all connections, made for so many circuits each.
    pub fn buffered(&self, circuits: usize) -> usize {
        let default = || self.buffered_per_connection(circuits).saturating_mul(4).max(LEAST_POOL);
        self.max_buffered.unwrap_or_else(default)
    }

    /// How many streams the peers can have open on so many connections.
    pub fn most(&self, connections: usize) -> usize {
        connections.saturating_mul(OWN).saturating_add(self.max_streams)
    }
}
