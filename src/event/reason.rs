//! The reasons: why a request was refused, why a slot was freed, how a circuit ended, why a target did not accept. `kind`
//! is the same for all values of a variant: it labels metrics.

use std::{fmt, io};

use libp2p::PeerId;

use crate::{
    address::{ClientPrefix, Subnet},
    wire::{BadRequest, Status},
};

/// Why a request was refused.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
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
    /// The source disconnected, or the relay ended the circuit, before the target answered.
    Gone,
    /// The relay could not sign the voucher.
    NotSigned,
    /// The relay drains. There is no answer: the connection is closed.
    Draining,
}

impl Refused {
    /// The status of the answer; `None`: there is no answer.
    pub(crate) fn status(&self) -> Option<Status> {
        self.status_and_kind().0
    }

    /// The reason in a few words, the same for all values of a variant.
    pub(crate) fn kind(&self) -> &'static str {
        self.status_and_kind().1
    }

    fn status_and_kind(&self) -> (Option<Status>, &'static str) {
        let refused = |kind| (Status::ReservationRefused, kind);
        let denied = |kind| (Status::PermissionDenied, kind);
        let limited = |kind| (Status::ResourceLimitExceeded, kind);
        let failed = |kind| (Status::ConnectionFailed, kind);
        let (status, kind) = match self {
            Self::TableFull => refused("all slots are taken"),
            Self::AddressFull(_) => refused("all slots of the address are taken"),
            Self::SubnetFull(_) => refused("all slots of the subnet are taken"),
            Self::NotSigned => refused("the voucher could not be signed"),
            Self::Relayed => denied("it came over a relayed connection"),
            Self::Denied => denied("the rules do not allow it"),
            Self::TooOften => limited("the peer asks too often"),
            Self::AddressTooOften(_) => limited("the peers of the address ask too often"),
            Self::NoReservation => (Status::NoReservation, "the target holds no live reservation"),
            Self::TooManyCircuits => limited("too many circuits"),
            Self::TooManyCircuitsOfAddress(_) => {
                limited("too many circuits of the source's address")
            }
            Self::TooManyCircuitsOfSubnet(_) => limited("too many circuits of the source's subnet"),
            Self::TooManyCircuitsOfSource => limited("too many circuits of the source"),
            Self::TooManyCircuitsOfTarget => limited("too many circuits of the target"),
            Self::StopFailed(_) => failed("the target could not be won"),
            Self::Gone => failed("one of its peers is gone"),
            Self::Draining => return (None, "the relay is draining"),
        };
        (Some(status), kind)
    }
}

/// Why a slot was freed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum FreedReason {
    /// The term was over.
    Expired,
    /// The peer disconnected and did not return within grace.
    GraceOver,
    /// The peer disconnected, and there is no grace.
    Disconnected,
    /// The peer did not answer a probe in time, and there is no grace.
    Silent,
    /// The peer was in grace, and no other slot was free for a newcomer.
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

impl fmt::Display for FreedReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TakenBy { peer } => write!(f, "taken by {peer}"),
            other => f.write_str(other.kind()),
        }
    }
}

/// How a circuit ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum CircuitEnd {
    /// Both peers closed it.
    Finished,
    /// One direction exceeded its limit of bytes.
    DataLimit,
    /// It reached its time limit.
    TimeLimit,
    /// One peer reset it.
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
    /// The relay ended it: memory was scarce, and one direction had transferred nothing for 10 s though bytes waited. Only
    /// in `Node`, which has that memory.
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

impl fmt::Display for CircuitEnd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Reset(kind) => write!(f, "reset: {kind}"),
            other => f.write_str(other.kind()),
        }
    }
}

/// Why a target did not accept a circuit.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
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
