//! What a node reports.

use libp2p::{Multiaddr, core::ConnectedPoint, swarm::ConnectionError};

use crate::{
    event::Event,
    program::{
        mux::budget::Cut,
        net::admission::{
            handshake_failure::{
                HandshakeFailure, Reason, Stage, StageError, causes, innermost, is_closed,
            },
            limits::Denied,
        },
    },
    relay::connections::CloseReason,
};

/// An event of a [`Node`](super::Node).
#[derive(Debug)]
#[non_exhaustive]
pub enum NodeEvent {
    /// The relay listens on this address now.
    Listening(Multiaddr),
    /// The relay listens on this address no longer.
    NotListening(Multiaddr),
    /// A connection was denied.
    ConnectionDenied {
        /// The client's address.
        address: Multiaddr,
        /// The limit or rule that denied it.
        reason: Denied,
    },
    /// A connection failed in its handshake, or was closed by its peer before the first stream.
    HandshakeFailed {
        /// The client's address.
        address: Multiaddr,
        /// The stage and the reason.
        failure: HandshakeFailure,
    },
    /// A connection was closed.
    ConnectionClosed {
        /// The reason in a few words: one of a fixed set.
        reason: &'static str,
    },
    /// An event of the relay's behaviour.
    Relay(Event),
}

impl NodeEvent {
    /// The event of a closed connection, and why it was closed, for the log. `by_relay`: the relay's reason, if the
    /// relay closed it.
    pub(super) fn closed(
        endpoint: &ConnectedPoint,
        by_relay: Option<CloseReason>,
        cause: Option<&ConnectionError>,
    ) -> (Self, String) {
        let reason = close_reason(by_relay, cause);
        let Some(cause) = cause else {
            return (Self::ConnectionClosed { reason }, reason.into());
        };
        let why = innermost(cause).to_string();
        let why = if why.starts_with(reason) { why } else { format!("{reason}: {why}") };
        // The muxer wraps the error if the peer closed the connection without having opened a stream: it expected
        // another peer id.
        if causes(cause).any(|cause| cause.is::<StageError>()) {
            let address = endpoint.get_remote_address().clone();
            let failure = HandshakeFailure { stage: Stage::Muxer, reason: Reason::PeerId };
            return (Self::HandshakeFailed { address, failure }, why);
        }
        (Self::ConnectionClosed { reason }, why)
    }
}

fn close_reason(by_relay: Option<CloseReason>, cause: Option<&ConnectionError>) -> &'static str {
    let Some(cause) = cause else {
        return by_relay.map_or("closed by the relay", CloseReason::kind);
    };
    let text = innermost(cause).to_string();
    let cut = Cut::CONNECTIONS.map(Cut::kind).into_iter().find(|kind| text.starts_with(kind));
    match (cut, by_relay) {
        (Some(cut), _) => cut,
        (None, Some(reason)) => reason.kind(),
        (None, None) if causes(cause).any(is_closed) => "closed by the peer",
        (None, None) => "failed",
    }
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;

    #[test]
    fn each_way_a_connection_closes_has_its_reason() {
        // As libp2p boxes the muxer's errors.
        let of = |error: io::Error| ConnectionError::IO(io::Error::other(error));
        let stalled = "write stalled: no progress for 60 s";
        let stalled = of(io::Error::new(io::ErrorKind::TimedOut, stalled));
        let refusals = of(io::Error::other(Cut::Refusals.kind()));
        let aborted = of(io::ErrorKind::ConnectionAborted.into());
        let reset = of(io::ErrorKind::ConnectionReset.into());
        let broken = of(io::Error::other("a frame is longer than any window"));
        for (by_relay, cause, reason) in [
            (None, Some(stalled), "write stalled"),
            (None, Some(refusals), "refusals not taken"),
            (None, Some(aborted), "closed by the peer"),
            (None, Some(reset), "closed by the peer"),
            (None, Some(broken), "failed"),
            (Some(CloseReason::Silent), Some(of(io::ErrorKind::TimedOut.into())), "silent"),
            (Some(CloseReason::Idle), None, "idle"),
            (None, None, "closed by the relay"),
        ] {
            assert_eq!(close_reason(by_relay, cause.as_ref()), reason, "{cause:?}");
        }
    }

    fn endpoint() -> ConnectedPoint {
        let [local_addr, send_back_addr] =
            ["/ip4/192.0.2.1/tcp/1", "/ip4/192.0.2.2/tcp/2"].map(|it| it.parse().unwrap());
        ConnectedPoint::Listener { local_addr, send_back_addr }
    }

    #[test]
    fn the_log_names_the_reason_of_a_closed_connection_once() {
        for (error, logged) in [
            ("write stalled: no progress for 60 s", "write stalled: no progress for 60 s"),
            (Cut::Refusals.kind(), "refusals not taken"),
            ("a window overflows", "failed: a window overflows"),
        ] {
            let cause = ConnectionError::IO(io::Error::other(io::Error::other(error)));
            assert_eq!(NodeEvent::closed(&endpoint(), None, Some(&cause)).1, logged);
        }
    }

    #[test]
    fn a_connection_that_its_peer_closed_unused_has_failed() {
        let endpoint = endpoint();
        let is_failure = |error: io::Error| {
            let cause = ConnectionError::IO(io::Error::other(error));
            let (event, _) = NodeEvent::closed(&endpoint, None, Some(&cause));
            matches!(event, NodeEvent::HandshakeFailed { .. })
        };
        let closed = || io::Error::from(io::ErrorKind::ConnectionAborted);
        assert!(!is_failure(closed()));
        assert!(is_failure(StageError::wrap(Stage::Muxer, Some(Reason::PeerId), closed())));
    }
}
