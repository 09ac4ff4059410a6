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
//! The multiaddr is the one that the connection comes from. A slot outlives connections: its line has the prefix that
//! it counted towards, an IPv4 address or an IPv6 /64, if any. The reasons are the `Display` of [`Refused`],
//! [`FreedReason`], [`CircuitEnd`] and [`BadRequest`]. `kind` of a reason is the same for all values of a variant: it
//! labels metrics.

use std::{io, time::Duration};

use libp2p::{Multiaddr, PeerId};

use crate::{
    address::{ClientPrefix, Subnet},
    wire::{BadRequest, Status},
};

/// Something that happened at the relay.
///
/// The events of [`libp2p::relay::Event`](https://docs.rs/libp2p-relay) have these names:
///
/// | `libp2p::relay::Event` | here |
/// | --- | --- |
/// | `ReservationReqAccepted` | [`ReservationAccepted`](Self::ReservationAccepted) |
/// | `ReservationReqDenied` | [`ReservationRefused`](Self::ReservationRefused) |
/// | `ReservationClosed`, `ReservationTimedOut` | [`ReservationFreed`](Self::ReservationFreed), with its reason |
/// | `CircuitReqAccepted` | [`CircuitOpened`](Self::CircuitOpened), once the target has accepted |
/// | `CircuitReqDenied`, `CircuitReqOutboundConnectFailed` | [`CircuitRefused`](Self::CircuitRefused) |
/// | `CircuitClosed` | [`CircuitClosed`](Self::CircuitClosed) |
/// | `StatusChanged` | none; see [`Behaviour::set_serving`](crate::Behaviour::set_serving) |
#[derive(Clone, Debug, derive_more::Display)]
#[non_exhaustive]
pub enum Event {
    /// A peer got a slot, or a new term for the one it holds; or its slot in grace is live again, because it was heard
    /// over the connection that it had timed out on ([`Config::close_silent`](crate::Config::close_silent)).
    #[display("reservation {}: peer {peer} at {address}", if *renewed { "renewed" } else { "granted" })]
    ReservationAccepted {
        /// The peer.
        peer: PeerId,
        /// Where it came from.
        address: Multiaddr,
        /// Whether it already held the slot.
        renewed: bool,
    },
    /// A RESERVE was refused.
    #[display("reservation refused: peer {peer} at {address}: {reason}")]
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
    #[display("peer silent: peer {peer} at {address}: nothing heard for {} s", silent_for.as_secs())]
    PeerSilent {
        /// The peer.
        peer: PeerId,
        /// Where it came from.
        address: Multiaddr,
        /// How long it has been silent.
        silent_for: Duration,
    },
    /// The last connection of a peer with a slot closed or timed out; the peer may return until its grace is over.
    #[display("grace began: peer {peer}")]
    GraceBegan {
        /// The peer.
        peer: PeerId,
    },
    /// A slot was freed.
    #[display("slot freed: peer {peer}{}: {reason}", prefix.map(|prefix| format!(" at {prefix}")).unwrap_or_default())]
    ReservationFreed {
        /// The peer that held it.
        peer: PeerId,
        /// The prefix that it counted towards.
        prefix: Option<ClientPrefix>,
        /// The reason.
        reason: FreedReason,
    },
    /// A request could not be decoded, and was refused.
    #[display("request rejected: peer {peer} at {address}: {reason}")]
    RequestRejected {
        /// The peer that sent it.
        peer: PeerId,
        /// Where it came from.
        address: Multiaddr,
        /// What was wrong with it.
        reason: BadRequest,
    },
    /// A circuit was opened: the target accepted, and the source is being told.
    #[display("circuit {circuit} opened: {source} to {target}")]
    CircuitOpened {
        /// The circuit.
        circuit: CircuitId,
        /// The peer that asked for it.
        source: PeerId,
        /// The peer that it leads to.
        target: PeerId,
    },
    /// A CONNECT was refused.
    #[display("circuit refused: peer {source} at {address} to {target}: {reason}")]
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
    #[display(
        "circuit {circuit} closed: {source} to {target}: {end}; {} bytes to the target, {} back",
        transferred.to_target, transferred.to_source
    )]
    CircuitClosed {
        /// The circuit.
        circuit: CircuitId,
        /// The peer that asked for it.
        source: PeerId,
        /// The peer that it led to.
        target: PeerId,
        /// How it ended.
        end: CircuitEnd,
        /// The payload bytes that it delivered; see [`Totals`](crate::Totals) and [`Account`](crate::Account) for the
        /// sums.
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
#[derive(Clone, Copy, Debug, derive_more::Display, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct CircuitId(pub(crate) u64);

/// Why a request was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}", self.kind())]
#[non_exhaustive]
pub enum Refused {
    /// All slots are taken.
    TableFull,
    /// The cap on slots of this address is reached.
    #[error("all slots of {0} are taken")]
    AddressFull(ClientPrefix),
    /// The cap on slots of this subnet is reached.
    #[error("all slots of {0} are taken")]
    SubnetFull(Subnet),
    /// The request came over a relayed connection.
    Relayed,
    /// The access rules deny it.
    Denied,
    /// The request rate of the peer is exceeded.
    TooOften,
    /// The request rate of this address is exceeded.
    #[error("the peers of {0} ask too often")]
    AddressTooOften(ClientPrefix),
    /// The target holds no live reservation.
    NoReservation,
    /// The cap on circuits is reached.
    TooManyCircuits,
    /// The cap on circuits of this address's sources is reached.
    #[error("too many circuits of {0}")]
    TooManyCircuitsOfAddress(ClientPrefix),
    /// The cap on circuits of this subnet's sources is reached.
    #[error("too many circuits of {0}")]
    TooManyCircuitsOfSubnet(Subnet),
    /// The cap on circuits of the source is reached.
    TooManyCircuitsOfSource,
    /// The cap on circuits of the target is reached.
    TooManyCircuitsOfTarget,
    /// The target did not accept the circuit.
    #[error("{0}")]
    StopFailed(StopFailed),
    /// Before the target answered, one of its peers disconnected, timed out or replaced its connection, or the embedder
    /// released one of them ([`Behaviour::release`](crate::Behaviour::release)).
    Gone,
    /// The relay could not sign the voucher.
    NotSigned,
    /// The relay drains. There is no answer: the connection is closed.
    Draining,
}

impl Refused {
    /// The status of the answer; `None`: there is no answer.
    pub(crate) fn status(&self) -> Option<Status> {
        Some(match self {
            Self::TableFull | Self::AddressFull(_) | Self::SubnetFull(_) | Self::NotSigned => {
                Status::ReservationRefused
            }
            Self::Relayed | Self::Denied => Status::PermissionDenied,
            Self::NoReservation => Status::NoReservation,
            Self::StopFailed(_) | Self::Gone => Status::ConnectionFailed,
            Self::Draining => return None,
            _ => Status::ResourceLimitExceeded, // a request rate, or a cap on circuits
        })
    }

    /// The reason in a few words, the same for all values of a variant.
    pub(crate) fn kind(&self) -> &'static str {
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
            Self::TooManyCircuitsOfAddress(_) => "too many circuits of the source's address",
            Self::TooManyCircuitsOfSubnet(_) => "too many circuits of the source's subnet",
            Self::TooManyCircuitsOfSource => "too many circuits of the source",
            Self::TooManyCircuitsOfTarget => "too many circuits of the target",
            Self::StopFailed(_) => "the target could not be won",
            Self::Gone => "one of its peers is gone",
            Self::NotSigned => "the voucher could not be signed",
            Self::Draining => "the relay is draining",
        }
    }
}

/// Why a slot was freed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}", self.kind())]
#[non_exhaustive]
pub enum FreedReason {
    /// The term was over.
    Expired,
    /// The peer disconnected or timed out, and did not return within grace.
    GraceOver,
    /// The peer disconnected, and there is no grace.
    Disconnected,
    /// The peer did not answer a probe in time, and there is no grace.
    Silent,
    /// The peer was in grace, and no other slot was free for a newcomer.
    #[error("taken by {peer}")]
    TakenBy {
        /// The newcomer.
        peer: PeerId,
    },
    /// The answer that granted it could not be delivered.
    Undelivered,
    /// The access rules deny the peer a slot now.
    Denied,
    /// The embedder released it: [`Behaviour::release`](crate::Behaviour::release).
    Released,
}

impl FreedReason {
    /// The reason in a few words, the same for all values of a variant.
    pub(crate) fn kind(&self) -> &'static str {
        match self {
            Self::Expired => "expired",
            Self::GraceOver => "grace over",
            Self::Disconnected => "disconnected",
            Self::Silent => "silent",
            Self::TakenBy { .. } => "taken by a newcomer",
            Self::Undelivered => "answer undelivered",
            Self::Denied => "denied",
            Self::Released => "released",
        }
    }
}

/// How a circuit ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}", self.kind())]
#[non_exhaustive]
pub enum CircuitEnd {
    /// Both peers closed it.
    Finished,
    /// One direction exceeded its limit of bytes.
    DataLimit,
    /// It reached its time limit.
    TimeLimit,
    /// One peer reset it.
    #[error("reset: {0}")]
    Reset(io::ErrorKind),
    /// The connection of one peer closed.
    Disconnected,
    /// One peer did not answer a probe in time.
    Silent,
    /// The access rules deny it now.
    Denied,
    /// The embedder released one peer: [`Behaviour::release`](crate::Behaviour::release).
    Released,
    /// A client whose prefix has fewer circuits needed the room.
    Preempted,
    /// A newer connection of one peer replaced the one that it used.
    Replaced,
    /// The relay ended it: memory was scarce for the client prefix of one peer, and one direction had transferred
    /// nothing for 10 s though bytes waited. Only in `Node`, which has that memory.
    Stalled,
}

impl CircuitEnd {
    /// The end in a few words, the same for all values of a variant.
    pub(crate) fn kind(&self) -> &'static str {
        match self {
            Self::Finished => "finished",
            Self::DataLimit => "data limit",
            Self::TimeLimit => "time limit",
            Self::Reset(_) => "reset",
            Self::Disconnected => "disconnected",
            Self::Silent => "silent",
            Self::Denied => "denied",
            Self::Released => "released",
            Self::Preempted => "preempted",
            Self::Replaced => "connection replaced",
            Self::Stalled => "stalled",
        }
    }
}

/// Why a target did not accept a circuit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum StopFailed {
    /// It disconnected.
    #[error("the target is gone")]
    Gone,
    /// It does not support the stop protocol.
    #[error("the target does not support the stop protocol")]
    Unsupported,
    /// It refused, with this status.
    #[error("the target refused with status {0}")]
    Refused(i32),
    /// Its answer could not be decoded.
    #[error("the target answered with {0}")]
    Nonsense(BadRequest),
    /// The stream failed, or the time limit was reached.
    #[error("stop request failed: {0}")]
    Io(io::ErrorKind),
}

#[cfg(test)]
mod log_lines;
