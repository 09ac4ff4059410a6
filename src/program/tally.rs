//! How events are counted: the same for the log summary, the metrics and the status.

use libp2p::{Multiaddr, PeerId};

use super::node::NodeEvent;
use crate::{address::ClientPrefix, event::Event};

/// An event that is counted.
#[derive(Debug)]
pub struct Tally<'a> {
    pub what: What,
    /// The reason in a few words: one of a fixed set.
    pub why: &'static str,
    /// The client prefix that it is counted under.
    pub prefix: Option<ClientPrefix>,
    /// The peer whose request was refused, and the address of its connection.
    pub client: Option<(PeerId, &'a Multiaddr)>,
}

/// The kind of an event, with its name in each place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct What {
    /// In the log summary.
    pub log: &'static str,
    /// In `/status.json`.
    pub json: &'static str,
    /// The label `request` of a metric; `None` if it is not a request.
    pub metric: Option<&'static str>,
}

pub const CONNECTION: What = what("connections denied", "connection", None);
pub const HANDSHAKE: What = what("handshakes failed", "handshake", None);
pub const RESERVE: What = what("reservations refused", "RESERVE", Some("RESERVE"));
pub const CONNECT: What = what("circuits refused", "CONNECT", Some("CONNECT"));
pub const REQUEST: What = what("requests rejected", "request", Some("unreadable"));
pub const PEER: What = what("peers timed out", "peer", None);
pub const SLOT: What = what("slots freed", "slot", None);

const fn what(log: &'static str, json: &'static str, metric: Option<&'static str>) -> What {
    What { log, json, metric }
}

impl<'a> Tally<'a> {
    /// How this event is counted; `None` if it is not.
    pub fn of(event: &'a NodeEvent) -> Option<Self> {
        let (what, why, peer, address) = match event {
            NodeEvent::ConnectionDenied { address, reason } => {
                (CONNECTION, reason.kind(), None, address)
            }
            NodeEvent::HandshakeFailed { address, failure } => {
                (HANDSHAKE, failure.reason.kind(), None, address)
            }
            NodeEvent::Relay(Event::ReservationRefused { peer, address, reason }) => {
                (RESERVE, reason.kind(), Some(*peer), address)
            }
            NodeEvent::Relay(Event::CircuitRefused { source, address, reason, .. }) => {
                (CONNECT, reason.kind(), Some(*source), address)
            }
            NodeEvent::Relay(Event::RequestRejected { peer, address, .. }) => {
                (REQUEST, "not understood", Some(*peer), address)
            }
            NodeEvent::Relay(Event::PeerSilent { address, .. }) => {
                (PEER, "no answer to a probe", None, address)
            }
            NodeEvent::Relay(Event::ReservationFreed { prefix, reason, .. }) => {
                let why = reason.kind();
                return Some(Self { what: SLOT, why, prefix: *prefix, client: None });
            }
            _ => return None,
        };
        let client = peer.map(|peer| (peer, address));
        Some(Self { what, why, prefix: ClientPrefix::of(address), client })
    }
}
