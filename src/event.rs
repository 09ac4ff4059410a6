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

use std::{fmt, time::Duration};

use libp2p::{Multiaddr, PeerId};

use crate::{
    address::{BilledTo, Subnet},
    bills,
    circuit::{Carried, CircuitEnd},
    circuits::{self, CircuitId},
    rates::Spent,
    reservations::FreedReason,
    stop::StopFailed,
    wire::{BadRequest, Status},
};

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
        billed_to: Option<BilledTo>,
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
        /// How many payload bytes it delivered each way; see [`crate::accounts`] for the sums.
        carried: Carried,
    },
}

/// Why a request was refused.
#[derive(Debug)]
#[non_exhaustive]
pub enum Refused {
    /// All slots are taken.
    TableFull,
    /// All slots that this address may have are taken.
    AddressFull(BilledTo),
    /// All slots that this subnet may have are taken.
    SubnetFull(Subnet),
    /// It came over a relayed connection.
    Relayed,
    /// The rules do not allow it.
    Denied,
    /// The peer asks more often than it may.
    TooOften,
    /// The peers of this address together ask more often than they may.
    AddressTooOften(BilledTo),
    /// The target holds no live reservation.
    NoReservation,
    /// The relay carries as many circuits as it may.
    TooManyCircuits,
    /// The source is part of as many circuits as it may be.
    TooManyCircuitsOfSource,
    /// The target is part of as many circuits as it may be.
    TooManyCircuitsOfTarget,
    /// The target could not be won.
    StopFailed(StopFailed),
    /// The source went, or the relay gave up one of the two, while the target was being asked.
    Gone,
    /// The relay could not sign the voucher.
    NotSigned,
    /// The relay takes nobody in any more. The peer is not told: its connection is closed.
    Draining,
}

impl Refused {
    /// The status that the client is told; `None`: it is not told anything.
    pub fn status(&self) -> Option<Status> {
        let status = match self {
            Self::TableFull | Self::AddressFull(_) | Self::SubnetFull(_) | Self::NotSigned => {
                Status::ReservationRefused
            }
            Self::Relayed | Self::Denied => Status::PermissionDenied,
            Self::NoReservation => Status::NoReservation,
            Self::TooOften
            | Self::AddressTooOften(_)
            | Self::TooManyCircuits
            | Self::TooManyCircuitsOfSource
            | Self::TooManyCircuitsOfTarget => Status::ResourceLimitExceeded,
            Self::StopFailed(_) | Self::Gone => Status::ConnectionFailed,
            Self::Draining => return None,
        };
        Some(status)
    }
}

impl From<bills::Full> for Refused {
    fn from(full: bills::Full) -> Self {
        match full {
            bills::Full::Table => Self::TableFull,
            bills::Full::Address(address) => Self::AddressFull(address),
            bills::Full::Subnet(subnet) => Self::SubnetFull(subnet),
        }
    }
}

impl From<Spent> for Refused {
    fn from(spent: Spent) -> Self {
        match spent {
            Spent::Peer => Self::TooOften,
            Spent::Address(address) => Self::AddressTooOften(address),
        }
    }
}

impl From<circuits::Full> for Refused {
    fn from(full: circuits::Full) -> Self {
        match full {
            circuits::Full::Total => Self::TooManyCircuits,
            circuits::Full::Source => Self::TooManyCircuitsOfSource,
            circuits::Full::Target => Self::TooManyCircuitsOfTarget,
        }
    }
}

impl Refused {
    /// The reason in a few words, the same for all cases of it.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::TableFull => "all slots are taken",
            Self::AddressFull(_) => "all slots of the address are taken",
            Self::SubnetFull(_) => "all slots of the subnet are taken",
            Self::Relayed => "it came over a relayed connection",
            Self::Denied => "the rules do not allow it",
            Self::TooOften => "the peer asks too often",
            Self::AddressTooOften(_) => "the peers of the address ask too often",
            Self::NoReservation => "the target holds no live reservation",
            Self::TooManyCircuits => "too many circuits",
            Self::TooManyCircuitsOfSource => "too many circuits of the source",
            Self::TooManyCircuitsOfTarget => "too many circuits of the target",
            Self::StopFailed(_) => "the target could not be won",
            Self::Gone => "one of its peers is gone",
            Self::NotSigned => "the voucher could not be signed",
            Self::Draining => "the relay is draining",
        }
    }
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::AddressFull(address) => write!(f, "all slots of {address} are taken"),
            Self::SubnetFull(subnet) => write!(f, "all slots of {subnet} are taken"),
            Self::AddressTooOften(address) => write!(f, "the peers of {address} ask too often"),
            Self::StopFailed(failed) => failed.fmt(f),
            other => f.write_str(other.kind()),
        }
    }
}

impl fmt::Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::ReservationAccepted {
                peer,
                address,
                renewed,
            } => {
                let what = if *renewed { "renewed" } else { "granted" };
                write!(f, "reservation {what}: peer {peer} at {address}")
            }
            Self::ReservationRefused {
                peer,
                address,
                reason,
            } => write!(f, "reservation refused: peer {peer} at {address}: {reason}"),
            Self::PeerSilent {
                peer,
                address,
                silent_for,
            } => write!(
                f,
                "peer silent: peer {peer} at {address}: nothing heard for {} s",
                silent_for.as_secs()
            ),
            Self::GraceBegan { peer } => write!(f, "grace began: peer {peer}"),
            Self::ReservationFreed {
                peer,
                billed_to,
                reason,
            } => match billed_to {
                Some(address) => write!(f, "slot freed: peer {peer} at {address}: {reason}"),
                None => write!(f, "slot freed: peer {peer}: {reason}"),
            },
            Self::RequestRejected {
                peer,
                address,
                reason,
            } => write!(f, "request rejected: peer {peer} at {address}: {reason}"),
            Self::CircuitOpened {
                circuit,
                source,
                target,
            } => write!(f, "circuit {circuit} opened: {source} to {target}"),
            Self::CircuitRefused {
                source,
                address,
                target,
                reason,
            } => write!(
                f,
                "circuit refused: peer {source} at {address} to {target}: {reason}"
            ),
            Self::CircuitClosed {
                circuit,
                source,
                target,
                end,
                carried,
            } => write!(
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
