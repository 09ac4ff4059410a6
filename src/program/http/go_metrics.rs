//! What go-libp2p's relay counts, under its names: a dashboard made for that relay shows this one.
//!
//! Names, labels and phrases are those of
//! [its metrics.go](https://github.com/libp2p/go-libp2p/blob/master/p2p/protocol/circuitv2/relay/metrics.go),
//! where a circuit is a connection.

use std::time::Duration;

use prometheus_client::{
    metrics::{counter::Counter, gauge::Gauge, histogram::Histogram},
    registry::{Registry, Unit},
};

use super::{
    counters::{Counters, raise, registered},
    stats::Figures,
};
use crate::{
    event::Event,
    wire::{BadRequest, Status},
};

/// The bounds of the histogram's buckets that go-libp2p leaves to its library, in seconds.
const BUCKETS: [f64; 11] = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0];

/// All of it.
pub(super) struct RelaySvc {
    status: Gauge,
    reservations: Counters,
    reserve: Answers,
    connections: Counters,
    connect: Answers,
    connection_duration: Histogram,
    data_transferred: Counter,
}

/// How requests of one kind were answered.
struct Answers {
    statuses: Counters,
    rejections: Counters,
}

impl RelaySvc {
    /// Nothing has happened yet.
    pub(super) fn new(registry: &mut Registry) -> Self {
        let connection_duration = Histogram::new(BUCKETS);
        registry.register_with_unit(
            "connection_duration",
            "How long circuits were open",
            Unit::Seconds,
            connection_duration.clone(),
        );
        let data_transferred = Counter::default();
        registry.register_with_unit(
            "data_transferred",
            "Payload that circuits carried, both ways",
            Unit::Bytes,
            data_transferred.clone(),
        );
        Self {
            status: registered(registry, "status", "Whether the relay serves"),
            reservations: Counters::new(
                registry,
                "reservations",
                "Reservations",
                "type",
                &["opened", "renewed", "closed"],
            ),
            reserve: Answers {
                statuses: Counters::new(
                    registry,
                    "reservation_request_response_status",
                    "Answers to RESERVE",
                    "status",
                    &["ok", "rejected", "error"],
                ),
                rejections: Counters::new(
                    registry,
                    "reservation_rejections",
                    "Why RESERVE was rejected",
                    "reason",
                    &["ip constraint violation", "resource limit exceeded", "permission denied"],
                ),
            },
            connections: Counters::new(
                registry,
                "connections",
                "Circuits",
                "type",
                &["opened", "closed"],
            ),
            connect: Answers {
                statuses: Counters::new(
                    registry,
                    "connection_request_response_status",
                    "Answers to CONNECT",
                    "status",
                    &["ok", "rejected", "error"],
                ),
                rejections: Counters::new(
                    registry,
                    "connection_rejections",
                    "Why CONNECT was rejected",
                    "reason",
                    &[
                        "resource limit exceeded",
                        "permission denied",
                        "no reservation",
                        "malformed message",
                    ],
                ),
            },
            connection_duration,
            data_transferred,
        }
    }

    /// Counts an event.
    pub(super) fn note(&self, event: &Event) {
        match event {
            Event::ReservationAccepted { renewed, .. } => {
                let kind = if *renewed { "renewed" } else { "opened" };
                self.reservations.count(kind);
                self.reserve.count(Status::Ok);
            }
            Event::ReservationRefused { reason, .. } => self.reserve.count_told(reason.status()),
            Event::ReservationFreed { .. } => self.reservations.count("closed"),
            Event::CircuitOpened { .. } => {
                self.connections.count("opened");
                self.connect.count(Status::Ok);
            }
            Event::CircuitRefused { reason, .. } => self.connect.count_told(reason.status()),
            // Of what it cannot read go-libp2p counts what it knows to be a CONNECT.
            Event::RequestRejected { reason, .. } => {
                if let BadRequest::BadTarget(_) = reason {
                    self.connect.count(reason.status());
                }
            }
            Event::CircuitClosed { .. } => self.connections.count("closed"),
            Event::PeerSilent { .. } | Event::GraceBegan { .. } => {}
        }
    }

    /// A circuit has ended, after so much time.
    pub(super) fn circuit_lasted(&self, time: Duration) {
        self.connection_duration.observe(time.as_secs_f64());
    }

    /// Shows what no event tells.
    pub(super) fn show(&self, figures: &Figures) {
        self.status.set((!figures.draining).into());
        let relayed = figures.relayed.to_target + figures.relayed.to_source;
        raise(&self.data_transferred, relayed);
    }
}

impl Answers {
    /// Whoever is not told a status is not answered.
    fn count_told(&self, status: Option<Status>) {
        if let Some(status) = status {
            self.count(status);
        }
    }

    fn count(&self, status: Status) {
        let reason = match status {
            Status::Ok => return self.statuses.count("ok"),
            Status::ConnectionFailed | Status::UnexpectedMessage => {
                return self.statuses.count("error");
            }
            Status::ReservationRefused => "ip constraint violation",
            Status::ResourceLimitExceeded => "resource limit exceeded",
            Status::PermissionDenied => "permission denied",
            Status::NoReservation => "no reservation",
            Status::MalformedMessage => "malformed message",
        };
        self.statuses.count("rejected");
        self.rejections.count(reason);
    }
}
