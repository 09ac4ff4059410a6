//! The limits that the settings come to.

use bytesize::ByteSize;

use super::Flags;
use crate::program::{
    cli::{
        derived::{
            Given,
            limit::{Derived, Limit},
            memory_estimate::Usage,
        },
        runtime,
        values::Parsed,
    },
    mux::stream_limits::StreamLimits,
    net::{admission::limits::Limits, multiaddr::Layer},
};

impl Flags {
    /// What its limits follow from.
    pub fn given(&self) -> Given {
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
                websocket: self.layers().any(|layer| layer != Layer::Tcp),
            },
        }
    }

    /// The limits that follow from `--memory` or `--max-reservations`, and the explicit ones.
    pub fn derived(&self) -> Derived {
        self.given().derive()
    }

    /// The limits on connections.
    pub fn limits(&self) -> Limits {
        let derived = self.derived();
        Limits {
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
