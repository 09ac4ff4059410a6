//! The reasons: why a request was refused, why a slot came back, how a circuit ended, and why a target could not be
//! reached. `kind` is the same few words for all cases of one.

use std::{fmt, io};

use libp2p::PeerId;

use crate::{
    address::{ClientPrefix, Subnet},
    wire::{BadRequest, Status},
};

/// Why a request was refused.
#[derive(Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Refused {
    /// All slots are taken.
    TableFull,
    /// All slots that this address may have are taken.
    AddressFull(ClientPrefix),
    /// All slots that this subnet may have are taken.
    SubnetFull(Subnet),
    /// It came over a relayed connection.
    Relayed,
    /// The rules do not allow it.
    Denied,
    /// The peer asks more often than it may.
    TooOften,
    /// The peers of this address together ask more often than they may.
    AddressTooOften(ClientPrefix),
    /// The target holds no live reservation.
    NoReservation,
    /// The relay carries as many circuits as it may.
    TooManyCircuits,
    /// The sources of this address have as many circuits as they may.
    TooManyCircuitsOfAddress(ClientPrefix),
    /// The sources of this subnet have as many circuits as they may.
    TooManyCircuitsOfSubnet(Subnet),
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
    /// The relay is draining. The peer gets no answer: its connection is closed.
    Draining,
}

impl Refused {
    /// The status that the client is told; `None`: it is not told anything.
    pub fn status(&self) -> Option<Status> {
        self.told().0
    }

    /// The reason in a few words, the same for all cases of it.
    pub fn kind(&self) -> &'static str {
        self.told().1
    }

    fn told(&self) -> (Option<Status>, &'static str) {
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

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::AddressFull(address) => write!(f, "all slots of {address} are taken"),
            Self::SubnetFull(subnet) => write!(f, "all slots of {subnet} are taken"),
            Self::AddressTooOften(address) => write!(f, "the peers of {address} ask too often"),
            Self::TooManyCircuitsOfAddress(address) => write!(f, "too many circuits of {address}"),
            Self::TooManyCircuitsOfSubnet(subnet) => write!(f, "too many circuits of {subnet}"),
            Self::StopFailed(failed) => failed.fmt(f),
            other => f.write_str(other.kind()),
        }
    }
}

/// Why a slot came back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum FreedReason {
    /// The term was over.
    Expired,
    /// The peer left and did not come back in time.
    GraceOver,
    /// The peer left, and there is no grace.
    Disconnected,
    /// The peer did not answer a probe in time, and there is no grace.
    Silent,
    /// The peer was in grace, and a newcomer found no other slot free.
    TakenBy {
        /// The newcomer.
        peer: PeerId,
    },
    /// The answer that granted it could not be delivered.
    Undelivered,
    /// The rules do not let the peer hold a slot any more.
    Denied,
    /// Given up by command: [`crate::Behaviour::release`].
    Released,
}

impl FreedReason {
    /// The reason in a few words, the same for all cases of it.
    pub fn kind(&self) -> &'static str {
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
    /// Both ends closed it.
    Finished,
    /// One direction carried as many bytes as it may, and there was one more.
    DataLimit,
    /// It was open for as long as it may be.
    TimeLimit,
    /// One end reset it, or its connection failed.
    Reset(io::ErrorKind),
    /// The relay ended it: a peer's slot was given up, or its connection went.
    Ended,
    /// The relay ended it: memory was scarce, and one direction had moved nothing for 10 s though bytes waited.
    Stalled,
}

impl CircuitEnd {
    /// How in a few words, the same for all cases of it.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Finished => "finished",
            Self::DataLimit => "data limit",
            Self::TimeLimit => "time limit",
            Self::Reset(_) => "reset",
            Self::Ended => "ended by the relay",
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

/// Why a target could not be won for a circuit.
#[derive(Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum StopFailed {
    /// It is not connected any more.
    Gone,
    /// It does not speak the stop protocol.
    Unsupported,
    /// It refused, with this status.
    Refused(i32),
    /// It answered with something that is no answer.
    Nonsense(BadRequest),
    /// The stream failed, or the time was up.
    Io(io::ErrorKind),
}

impl fmt::Display for StopFailed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Gone => f.write_str("the target is gone"),
            Self::Unsupported => f.write_str("the target does not speak the stop protocol"),
            Self::Refused(status) => write!(f, "the target refused with status {status}"),
            Self::Nonsense(what) => write!(f, "the target answered with {what}"),
            Self::Io(kind) => write!(f, "the target was asked in vain: {kind}"),
        }
    }
}
