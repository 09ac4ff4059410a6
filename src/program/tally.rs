//! What of an event is counted: the same for the log's summary, the metrics and the status.

use libp2p::{Multiaddr, PeerId};

use super::node::NodeEvent;
use crate::{address::ClientPrefix, event::Event};

/// An event that is counted.
#[derive(Debug)]
pub struct Tally<'a> {
    pub what: What,
    /// The reason in a few words, the same for all cases of it.
    pub why: &'static str,
    /// The client prefix that it is counted under.
    pub prefix: Option<ClientPrefix>,
    /// Which peer's request was refused, and the address of its connection.
    pub client: Option<(PeerId, &'a Multiaddr)>,
}

/// What happened, by its names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct What {
    /// In the log's summary.
    pub log: &'static str,
    /// In `/status.json`.
    pub json: &'static str,
    /// Value of the label `request` of a metric; only requests have it.
    pub metric: Option<&'static str>,
}

pub const CONNECTION: What = what("connections denied", "connection", None);
pub const RESERVE: What = what("reservations refused", "RESERVE", Some("RESERVE"));
pub const CONNECT: What = what("circuits refused", "CONNECT", Some("CONNECT"));
pub const REQUEST: What = what("requests rejected", "request", Some("unreadable"));
pub const PEER: What = what("peers judged silent", "peer", None);
pub const SLOT: What = what("slots freed", "slot", None);

const fn what(log: &'static str, json: &'static str, metric: Option<&'static str>) -> What {
    What { log, json, metric }
}

impl<'a> Tally<'a> {
    /// How this event is counted; `None`: it is not.
    pub fn of(event: &'a NodeEvent) -> Option<Self> {
        let (what, why, peer, address) = match event {
            NodeEvent::ConnectionDenied { address, reason } => {
                (CONNECTION, reason.kind(), None, address)
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
                (PEER, "no sign of life when asked", None, address)
            }
            NodeEvent::Relay(Event::ReservationFreed { billed_to: prefix, reason, .. }) => {
                let why = reason.kind();
                return Some(Self { what: SLOT, why, prefix: *prefix, client: None });
            }
            _ => return None,
        };
        let client = peer.map(|peer| (peer, address));
        Some(Self { what, why, prefix: ClientPrefix::of(address), client })
    }
}
