//! What the relay reports to the embedder, each refusal and each freed slot with its reason.
//!
//! [`Display`](std::fmt::Display) is the line in the log. These lines are stable: changing one is a breaking change.
//!
//! ```text
//! reservation granted: peer <id> at <multiaddr>
//! reservation renewed: peer <id> at <multiaddr>
//! reservation refused: peer <id> at <multiaddr>: <reason>
//! peer silent: peer <id> at <multiaddr>: nothing heard for <seconds> s
//! grace began: peer <id>
//! slot freed: peer <id> at <prefix>: <reason>
//! request rejected: peer <id> at <multiaddr>: <reason>
//! circuit <number> opened: <source's id> to <target's id>
//! circuit refused: peer <source's id> at <multiaddr> to <target's id>: <reason>
//! circuit <number> closed: <source's id> to <target's id>: <end>; <bytes> bytes to the target, <bytes> back
//! ```
//!
//! The multiaddr is the one that the connection comes from. A slot outlives connections: its line has the prefix that it
//! counted towards, an IPv4 address or an IPv6 /64, if any. The reasons are the `Display` of [`Refused`],
//! [`FreedReason`], [`CircuitEnd`] and [`BadRequest`].

mod reason;

use std::{fmt, time::Duration};

use libp2p::{Multiaddr, PeerId};

pub use self::reason::{CircuitEnd, FreedReason, Refused, StopFailed};
use crate::{address::ClientPrefix, wire::BadRequest};

/// Something that happened at the relay.
///
/// The events of [`libp2p::relay::Event`](https://docs.rs/libp2p-relay) have these names:
///
/// | `libp2p::relay::Event` | here |
/// | --- | --- |
/// | `ReservationReqAccepted` | [`ReservationAccepted`](Self::ReservationAccepted) |
/// | `ReservationReqDenied` | [`ReservationRefused`](Self::ReservationRefused) |
/// | `ReservationClosed`, `ReservationTimedOut` | [`ReservationFreed`](Self::ReservationFreed), whose reason tells them apart |
/// | `CircuitReqAccepted` | [`CircuitOpened`](Self::CircuitOpened), once the target has accepted |
/// | `CircuitReqDenied`, `CircuitReqOutboundConnectFailed` | [`CircuitRefused`](Self::CircuitRefused) |
/// | `CircuitClosed` | [`CircuitClosed`](Self::CircuitClosed) |
/// | `StatusChanged` | none: the relay serves from the start, unless [`Behaviour::set_serving`](crate::Behaviour::set_serving) says otherwise |
#[derive(Debug)]
#[non_exhaustive]
pub enum Event {
    /// A peer got a slot, or a new term for the one it holds; or its slot in grace is live again, because it was heard
    /// over the connection that it had timed out on ([`Config::close_silent`](crate::Config::close_silent)).
    ReservationAccepted {
        /// The peer.
        peer: PeerId,
        /// Where it came from.
        address: Multiaddr,
        /// Whether it already held the slot.
        renewed: bool,
    },
    /// A RESERVE was refused.
    ReservationRefused {
        /// The peer.
        peer: PeerId,
        /// Where it came from.
        address: Multiaddr,
        /// The reason.
        reason: Refused,
    },
    /// A peer with a slot or a circuit did not answer a probe in time: its circuits over that connection end, and its
    /// slot moves to another connection of it or enters grace.
    PeerSilent {
        /// The peer.
        peer: PeerId,
        /// Where it came from.
        address: Multiaddr,
        /// How long it has been silent.
        silent_for: Duration,
    },
    /// The last connection of a peer with a slot closed; the peer may return until its grace is over.
    GraceBegan {
        /// The peer.
        peer: PeerId,
    },
    /// A slot was freed.
    ReservationFreed {
        /// The peer that held it.
        peer: PeerId,
        /// The prefix that it counted towards.
        prefix: Option<ClientPrefix>,
        /// The reason.
        reason: FreedReason,
    },
    /// A request could not be decoded, and was refused.
    RequestRejected {
        /// The peer that sent it.
        peer: PeerId,
        /// Where it came from.
        address: Multiaddr,
        /// What was wrong with it.
        reason: BadRequest,
    },
    /// A circuit was opened: the target accepted, and the source is being told.
    CircuitOpened {
        /// The circuit.
        circuit: CircuitId,
        /// The peer that asked for it.
        source: PeerId,
        /// The peer that it leads to.
        target: PeerId,
    },
    /// A CONNECT was refused.
    CircuitRefused {
        /// The peer that asked for it.
        source: PeerId,
        /// Where that peer came from.
        address: Multiaddr,
        /// The peer that it should have led to.
        target: PeerId,
        /// The reason.
        reason: Refused,
    },
    /// A circuit ended.
    CircuitClosed {
        /// The circuit.
        circuit: CircuitId,
        /// The peer that asked for it.
        source: PeerId,
        /// The peer that it led to.
        target: PeerId,
        /// How it ended.
        end: CircuitEnd,
        /// The payload bytes that it delivered; see [`Totals`](crate::Totals) and [`Account`](crate::Account) for the sums.
        transferred: BytesTransferred,
        /// How long it was open.
        open_for: Duration,
    },
}

/// Payload bytes that one circuit, or all circuits, delivered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct BytesTransferred {
    /// Bytes delivered from the source to the target.
    pub to_target: u64,
    /// Bytes delivered from the target to the source.
    pub to_source: u64,
}

/// Identifies a circuit, from its CONNECT to its end. Never used twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct CircuitId(pub(crate) u64);

impl fmt::Display for CircuitId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::ReservationAccepted { peer, address, renewed } => {
                let what = if *renewed { "renewed" } else { "granted" };
                write!(f, "reservation {what}: peer {peer} at {address}")
            }
            Self::ReservationRefused { peer, address, reason } => {
                write!(f, "reservation refused: peer {peer} at {address}: {reason}")
            }
            Self::PeerSilent { peer, address, silent_for } => write!(
                f,
                "peer silent: peer {peer} at {address}: nothing heard for {} s",
                silent_for.as_secs()
            ),
            Self::GraceBegan { peer } => write!(f, "grace began: peer {peer}"),
            Self::ReservationFreed { peer, prefix, reason } => match prefix {
                Some(prefix) => write!(f, "slot freed: peer {peer} at {prefix}: {reason}"),
                None => write!(f, "slot freed: peer {peer}: {reason}"),
            },
            Self::RequestRejected { peer, address, reason } => {
                write!(f, "request rejected: peer {peer} at {address}: {reason}")
            }
            Self::CircuitOpened { circuit, source, target } => {
                write!(f, "circuit {circuit} opened: {source} to {target}")
            }
            Self::CircuitRefused { source, address, target, reason } => {
                write!(f, "circuit refused: peer {source} at {address} to {target}: {reason}")
            }
            Self::CircuitClosed { circuit, source, target, end, transferred, .. } => write!(
                f,
                "circuit {circuit} closed: {source} to {target}: {end}; {} bytes to the target, \
                 {} back",
                transferred.to_target, transferred.to_source
            ),
        }
    }
}

#[cfg(test)]
mod log_lines;
