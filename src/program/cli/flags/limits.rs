//! The limits that the settings come to.

use bytesize::ByteSize;

use super::Flags;
use crate::program::{
    cli::{
        derived::{Derived, Given, Limit, memory_estimate::Usage},
        runtime,
        values::Parsed,
    },
    mux::stream_limits::StreamLimits,
    net::admission::limits,
};

impl Flags {
    /// What its limits follow from.
    fn given(&self) -> Given {
        let number = |value: Option<Parsed<usize>>| value.map(|value| value.0);
        let size = |size: Option<Parsed<ByteSize>>| {
            size.map(|size| usize::try_from(size.0.as_u64()).unwrap_or(usize::MAX))
        };
        Given {
            memory: self.memory.map(|memory| memory.0.as_u64()),
            explicit: [
                number(self.max_reservations),
                number(self.max_circuits),
                number(self.max_circuits_per_peer),
                number(self.max_connections),
                number(self.max_handshakes),
                number(self.max_streams),
                size(self.max_buffered_per_connection),
                size(self.max_buffered),
                number(self.threads),
            ],
            usage: Usage {
                default_threads: runtime::default_threads(),
                dht: self.dht,
                autonat: self.autonat,
                websocket: self.listens_on_websocket(),
            },
        }
    }

    /// The limits that follow from `--memory` or `--max-reservations`, and the explicit ones.
    pub fn derived(&self) -> Derived {
        self.given().derive()
    }

    /// Checks that the explicit limits fit into `--memory`.
    ///
    /// # Errors
    ///
    /// The flag that is too much, with the remedy.
    pub fn check_memory(&self) -> Result<(), String> {
        self.given().check()
    }

    /// The memory that the relay takes at most, in bytes.
    pub fn memory_estimate(&self) -> u64 {
        self.given().estimate()
    }

    /// How many connections may be dialed for the DHT at a time.
    pub fn max_dht_dials(&self) -> usize {
        if self.dht { limits::DIALED_FOR_DHT } else { 0 }
    }

    /// How much freed memory each thread may keep, in bytes.
    pub fn kept_by_thread(&self) -> u64 {
        let given = self.given();
        given.kept_by_thread(given.derive().get(Limit::Threads))
    }

    /// The limits on connections.
    pub fn limits(&self) -> limits::Limits {
        let derived = self.derived();
        limits::Limits {
            max_connections: derived.get(Limit::Connections),
            max_connections_per_peer: self.max_connections_per_peer.0,
            max_connections_per_ip: self.max_connections_per_ip.map(|value| value.0),
            max_connections_per_subnet: self.max_connections_per_subnet.map(|value| value.0),
            max_handshakes: derived.get(Limit::Handshakes),
        }
    }

    /// The limits on streams.
    pub fn stream_limits(&self) -> StreamLimits {
        let derived = self.derived();
        let limits = StreamLimits {
            max_streams: derived.get(Limit::Streams),
            max_streams_per_connection: self.max_streams_per_connection.map(|value| value.0),
            stream_rate: self.stream_rate.0,
            max_buffered: Some(derived.get(Limit::Buffered)),
            max_buffered_per_connection: None,
        };
        // Errors name the limit of one connection only if that is not the default.
        let per_connection = derived.get(Limit::BufferedPerConnection);
        let default = limits.buffered_per_connection(derived.get(Limit::CircuitsPerPeer));
        let is_own = self.max_buffered_per_connection.is_some() || per_connection != default;
        StreamLimits { max_buffered_per_connection: is_own.then_some(per_connection), ..limits }
    }
}
