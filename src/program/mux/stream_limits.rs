//! Limits on streams, and on the bytes buffered for them.

use bytesize::ByteSize;

use super::{
    frame::{INITIAL_WINDOW, MAX_STREAMS, MAX_WINDOW},
    permits::OWN,
};
use crate::config::ConfigError;

/// Streams of a connection besides those of its circuits: requests, pings, identify, and some to spare.
pub const SPARE: usize = 32;

/// How many streams a connection may have in each direction, for this many circuits.
///
/// # Errors
///
/// When yamux cannot number this many.
pub fn per_connection(circuits: usize) -> Result<usize, ConfigError> {
    const MAX_CIRCUITS: usize = MAX_STREAMS - SPARE;
    match circuits {
        0..=MAX_CIRCUITS => Ok(circuits + SPARE),
        _ => {
            let problem =
                format!("one connection cannot carry so many; try {MAX_CIRCUITS} or less");
            Err(ConfigError::new("max_circuits_per_peer", problem))
        }
    }
}

/// The pool is at least so many times what one connection may hold: a few that hold all they may are pushed out
/// before all others have to share the rest.
const CONNECTIONS_IN_POOL: usize = 4;

const KIB: usize = 1024;

/// The lowest default of [`StreamLimits::max_buffered`], in bytes.
const LEAST_DEFAULT: usize = 80 * 1024 * 1024;

/// The limits on streams.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StreamLimits {
    /// How many streams all peers together may have open, not counting four of each connection. Default 4096.
    ///
    /// A stream beyond that is reset.
    pub max_streams: usize,
    /// How many streams a peer may have open on one connection. Default: 32 more than
    /// [`crate::Config::max_circuits_per_peer`].
    ///
    /// A stream beyond that is reset.
    pub max_streams_per_connection: Option<usize>,
    /// How many streams a second the connections of one address may open together, besides a few of each connection; a
    /// subnet four times as many. The burst is the number for 16 s. Default 64; zero: no limit.
    ///
    /// A stream beyond that is reset. Frames that open streams, reset them or ping have four times that rate: a connection
    /// above it is read more slowly, and closed unless it has a slot or a circuit.
    pub stream_rate: u32,
    /// How many bytes may be buffered for all streams: received and not read yet, or not sent yet. Default, and the least:
    /// four times [`StreamLimits::max_buffered_per_connection`]; the default is 80 MiB or more.
    ///
    /// Above it, streams of the heaviest connection of the heaviest client prefix are reset, those first whose bytes have
    /// waited the longest, until nine tenths are left. No connection is read more slowly because of another one.
    pub max_buffered: Option<usize>,
    /// How many received bytes may be buffered for one connection. Default: a window of 256 KiB for each of
    /// [`crate::Config::max_circuits_per_peer`], and 1 MiB. The least: such a window for each, and another one. Windows grow
    /// by what is above that, at most by 768 KiB in all.
    ///
    /// Above it, streams of that connection are reset.
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
    /// Checks the limits, for this many circuits of a peer.
    ///
    /// # Errors
    ///
    /// The first invalid one.
    pub fn check(&self, circuits: usize) -> Result<(), ConfigError> {
        let per_connection = self.max_streams_per_connection.unwrap_or(OWN);
        if !(OWN..=MAX_STREAMS).contains(&per_connection) {
            let problem = format!("{per_connection} is out of range; try {OWN} to {MAX_STREAMS}");
            return Err(ConfigError::new("max_streams_per_connection", problem));
        }
        // Each circuit may fill the window that it has from the start, and so may another stream.
        let (held, least) = (self.buffered_per_connection(circuits), initial_windows(circuits));
        if held < least {
            let fit = (held / INITIAL_WINDOW).saturating_sub(1);
            let problem = too_little(held, least, circuits, fit);
            return Err(ConfigError::new("max_buffered_per_connection", problem));
        }
        let (pool, least) = (self.buffered(circuits), held.saturating_mul(CONNECTIONS_IN_POOL));
        if pool < least {
            let one = pool / CONNECTIONS_IN_POOL;
            let problem = match self.max_buffered_per_connection {
                Some(_) => format!(
                    "{} is below four times --max-buffered-per-connection; try {} or more, or lower that to {}",
                    ByteSize::b(pool as u64),
                    in_kib(least.div_ceil(KIB)),
                    in_kib(one / KIB)
                ),
                None => {
                    let fit = one.saturating_sub(MAX_WINDOW) / INITIAL_WINDOW;
                    too_little(pool, least, circuits, fit)
                }
            };
            return Err(ConfigError::new("max_buffered", problem));
        }
        Ok(())
    }

    /// The limit on the received bytes of one connection, for this many circuits of a peer.
    pub fn buffered_per_connection(&self, circuits: usize) -> usize {
        let default = || initial_windows(circuits).saturating_add(MAX_WINDOW - INITIAL_WINDOW);
        self.max_buffered_per_connection.unwrap_or_else(default)
    }

    /// By how much the windows of one connection may grow in all, for this many circuits of a peer: so that they fit into
    /// the limit on its received bytes.
    pub fn growth(&self, circuits: usize) -> usize {
        let left = self.buffered_per_connection(circuits).saturating_sub(initial_windows(circuits));
        left.min(MAX_WINDOW - INITIAL_WINDOW)
    }

    /// The limit on the bytes of all connections, for this many circuits of a peer.
    pub fn buffered(&self, circuits: usize) -> usize {
        let one = self.buffered_per_connection(circuits);
        let default = || one.saturating_mul(CONNECTIONS_IN_POOL).max(LEAST_DEFAULT);
        self.max_buffered.unwrap_or_else(default)
    }
}

/// How many bytes a connection holds whose circuits are all full, and one more stream.
fn initial_windows(circuits: usize) -> usize {
    circuits.saturating_add(1).saturating_mul(INITIAL_WINDOW)
}

/// Why `bytes` do not suffice for so many circuits, and for how many they would; and the remedy.
fn too_little(bytes: usize, least: usize, circuits: usize, fit: usize) -> String {
    let or_lower = match fit {
        0 => String::new(),
        fit => format!(", or lower --max-circuits-per-peer to {fit}"),
    };
    format!(
        "{} is too little for --max-circuits-per-peer {circuits}; try {} or more{or_lower}",
        ByteSize::b(bytes as u64),
        in_kib(least.div_ceil(KIB))
    )
}

/// A size as the flags take it, unrounded.
pub fn in_kib(kib: usize) -> String {
    if kib.is_multiple_of(KIB) { format!("{}MiB", kib / KIB) } else { format!("{kib}KiB") }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: usize = KIB * KIB;

    fn problem(pool: Option<usize>, one: Option<usize>, circuits: usize) -> Option<String> {
        let limits = StreamLimits {
            max_buffered: pool,
            max_buffered_per_connection: one,
            ..StreamLimits::default()
        };
        let error = limits.check(circuits).err()?;
        Some(format!("{}: {}", error.setting(), error.problem()))
    }

    #[test]
    fn the_sizes_that_are_named_as_a_remedy_are_one() {
        for circuits in [1, 2, 63, 64, 65] {
            let line = problem(Some(0), None, circuits).unwrap();
            let (_, named) = line.split_once("try ").unwrap();
            let bytes: ByteSize = named.split(' ').next().unwrap().parse().unwrap();
            let least = bytes.as_u64() as usize;
            assert_eq!(problem(Some(least), None, circuits), None, "{line}");
            assert!(problem(Some(least - 1), None, circuits).is_some(), "{line}");
        }
    }

    #[test]
    fn a_connection_holds_all_windows_of_its_circuits_and_the_pool_four_connections() {
        for circuits in [0, 1, 64, 4096, usize::MAX] {
            assert_eq!(problem(None, None, circuits), None);
        }
        assert_eq!(problem(Some(68 * MIB), Some(17 * MIB), 64), None);
        assert_eq!(problem(Some(5 * MIB), None, 1), None);
        for (pool, one, circuits, expected) in [
            (
                None,
                Some(65 * MIB / 4 - 1),
                64,
                "max_buffered_per_connection: 16.2 MiB is too little for --max-circuits-per-peer 64; try 16640KiB \
                 or more, or lower --max-circuits-per-peer to 63",
            ),
            (
                None,
                Some(MIB / 4),
                64,
                "max_buffered_per_connection: 256.0 KiB is too little for --max-circuits-per-peer 64; try 16640KiB \
                 or more",
            ),
            (
                Some(8 * MIB),
                None,
                64,
                "max_buffered: 8.0 MiB is too little for --max-circuits-per-peer 64; try 68MiB or more, or \
                 lower --max-circuits-per-peer to 4",
            ),
            (
                Some(79 * MIB),
                Some(20 * MIB),
                64,
                "max_buffered: 79.0 MiB is below four times --max-buffered-per-connection; try 80MiB or more, \
                 or lower that to 20224KiB",
            ),
        ] {
            assert_eq!(problem(pool, one, circuits).as_deref(), Some(expected));
        }
    }
}
