//! What the relay tells its owner: each fact in the past tense, each refusal and each freed slot
//! with its reason.
//!
//! [`Display`](std::fmt::Display) is the line that stands in the log. These lines are stable, for
//! whoever searches and counts them: a release that changes one is a breaking one.
//!
//! ```text
//! reservation granted: peer <id> at <multiaddr>
//! reservation renewed: peer <id> at <multiaddr>
//! reservation refused: peer <id> at <multiaddr>: <reason>
//! peer silent: peer <id> at <multiaddr>: nothing heard for <seconds> s
//! grace began: peer <id>
//! slot freed: peer <id> at <address>: <reason>
//! request rejected: peer <id> at <multiaddr>: <reason>
//! circuit <number> opened: <source's id> to <target's id>
//! circuit refused: peer <source's id> at <multiaddr> to <target's id>: <reason>
//! circuit <number> closed: <source's id> to <target's id>: <end>; <bytes> bytes to the target, <bytes> back
//! ```
//!
//! The multiaddr is the one that the connection comes from. A slot outlives connections: it is freed
//! at the address it is billed to, an IPv4 address or an IPv6 /64, and at none if it is billed to
//! none. The reasons, in their words, are [`Refused`], [`FreedReason`], [`CircuitEnd`] and
//! [`BadRequest`].

mod reason;

use std::{fmt, time::Duration};

use libp2p::{Multiaddr, PeerId};

pub use self::reason::{CircuitEnd, FreedReason, Refused, StopFailed};
use crate::{address::ClientPrefix, wire::BadRequest};

/// Something that happened at the relay.
///
/// Who comes from [`libp2p::relay::Event`](https://docs.rs/libp2p-relay) finds its events here:
///
/// | `libp2p::relay::Event` | here |
/// | --- | --- |
/// | `ReservationReqAccepted` | [`ReservationAccepted`](Self::ReservationAccepted) |
/// | `ReservationReqDenied` | [`ReservationRefused`](Self::ReservationRefused) |
/// | `ReservationClosed`, `ReservationTimedOut` | [`ReservationFreed`](Self::ReservationFreed), whose reason tells them apart |
/// | `CircuitReqAccepted` | [`CircuitOpened`](Self::CircuitOpened), once the target agreed |
/// | `CircuitReqDenied`, `CircuitReqOutboundConnectFailed` | [`CircuitRefused`](Self::CircuitRefused) |
/// | `CircuitClosed` | [`CircuitClosed`](Self::CircuitClosed) |
/// | `StatusChanged` | none: the relay serves from the start, whatever addresses are confirmed |
#[derive(Debug)]
#[non_exhaustive]
pub enum Event {
    /// A peer got a slot, or a new term for the one it holds.
    ReservationAccepted {
        /// Who.
        peer: PeerId,
        /// Where it came from.
        address: Multiaddr,
        /// Whether it held the slot already.
        renewed: bool,
    },
    /// A peer got no slot.
    ReservationRefused {
        /// Who.
        peer: PeerId,
        /// Where it came from.
        address: Multiaddr,
        /// Why.
        reason: Refused,
    },
    /// A peer with a slot or a circuit was asked for a sign of life and gave none: its circuits
    /// over that connection end, and its slot moves to another connection of it or enters grace.
    PeerSilent {
        /// Who.
        peer: PeerId,
        /// Where it came from.
        address: Multiaddr,
        /// For how long nothing was heard from it.
        silent_for: Duration,
    },
    /// The last connection of a peer with a slot is gone; it may come back until its grace is over.
    GraceBegan {
        /// Who.
        peer: PeerId,
    },
    /// A slot came back.
    ReservationFreed {
        /// Who held it.
        peer: PeerId,
        /// The address that it was billed to.
        billed_to: Option<ClientPrefix>,
        /// Why it came back.
        reason: FreedReason,
    },
    /// A request was not understood, and was answered with the status for that.
    RequestRejected {
        /// Whose.
        peer: PeerId,
        /// Where it came from.
        address: Multiaddr,
        /// What was wrong with it.
        reason: BadRequest,
    },
    /// A circuit was set up: the target agreed, and the source is being told.
    CircuitOpened {
        /// Its name.
        circuit: CircuitId,
        /// Who asked for it.
        source: PeerId,
        /// Whom it leads to.
        target: PeerId,
    },
    /// A circuit was asked for and not set up.
    CircuitRefused {
        /// Who asked for it.
        source: PeerId,
        /// Where that peer came from.
        address: Multiaddr,
        /// Whom it should have led to.
        target: PeerId,
        /// Why not.
        reason: Refused,
    },
    /// A circuit ended.
    CircuitClosed {
        /// Its name.
        circuit: CircuitId,
        /// Who had asked for it.
        source: PeerId,
        /// Whom it led to.
        target: PeerId,
        /// How it ended.
        end: CircuitEnd,
        /// How many payload bytes it delivered each way; see [`crate::relay::accounts`] for the sums.
        carried: Carried,
        /// For how long it was open.
        open_for: Duration,
    },
}

/// What a circuit carried.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Carried {
    /// Bytes delivered from the source to the target.
    pub to_target: u64,
    /// Bytes delivered from the target to the source.
    pub to_source: u64,
}

/// Names a circuit, from the CONNECT that asks for it to its end. Never used twice.
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
            Self::ReservationFreed { peer, billed_to, reason } => match billed_to {
                Some(address) => write!(f, "slot freed: peer {peer} at {address}: {reason}"),
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
            Self::CircuitClosed { circuit, source, target, end, carried, .. } => write!(
                f,
                "circuit {circuit} closed: {source} to {target}: {end}; {} bytes to the target, \
                 {} back",
                carried.to_target, carried.to_source
            ),
        }
    }
}

#[cfg(test)]
mod log_lines;
