//! The metrics of go-libp2p's relay, under its names, so that a dashboard made for that relay shows this one.
//!
//! Names, labels and phrases are those of
//! [its metrics.go](https://github.com/libp2p/go-libp2p/blob/master/p2p/protocol/circuitv2/relay/metrics.go),
//! where a circuit is a connection.

use std::{fmt, time::Duration};

use prometheus_client::{
    encoding::DescriptorEncoder,
    metrics::{counter::ConstCounter, gauge::ConstGauge, histogram::Histogram},
    registry::{Registry, Unit},
};

use super::{
    counters::{Counters, write},
    stats::Stats,
};
use crate::{
    event::Event,
    wire::{BadRequest, Status},
};

/// The upper bounds of the buckets, in seconds: the defaults of Prometheus's Go library, which go-libp2p uses, up to
/// 10 s, and above them up to a day.
const BUCKETS: [f64; 20] = [
    0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 900.0,
    3600.0, 14_400.0, 43_200.0, 86_400.0,
];

/// Returns the bounds up to the longest that a circuit may stay open, which is the last one; all of them
/// without a limit.
fn buckets(circuit_duration: Duration) -> Vec<f64> {
    let limit = match circuit_duration.as_secs_f64() {
        0.0 => f64::INFINITY,
        limit => limit.max(10.0), // go-libp2p's buckets are always included
    };
    let last = limit.is_finite().then_some(limit);
    BUCKETS.into_iter().filter(|bound| *bound < limit).chain(last).collect()
}

/// Those of these metrics that count events.
pub(super) struct RelaySvc {
    reservations: Counters,
    reserve: Answers,
    connections: Counters,
    connect: Answers,
    connection_duration: Histogram,
}

/// The answers to requests of one kind.
struct Answers {
    statuses: Counters,
    rejections: Counters,
}

impl RelaySvc {
    /// Registers the metrics.
    pub(super) fn new(registry: &mut Registry, circuit_duration: Duration) -> Self {
        let help = "How long circuits that have ended were open";
        let connection_duration = Histogram::new(buckets(circuit_duration));
        let duration = connection_duration.clone();
        registry.register_with_unit("connection_duration", help, Unit::Seconds, duration);
        let mut counters = |name, help, label, values: &[&'static str]| {
            Counters::new(registry, name, help, label, values)
        };
        let statuses = ["ok", "rejected", "error"];

        let help = "Reservations that were opened, renewed, and closed";
        let types = ["opened", "renewed", "closed"];
        let reservations = counters("reservations", help, "type", &types);
        let (name, help) =
            ("reservation_request_response_status", "Answers to RESERVE requests by their status");
        let reserve_statuses = counters(name, help, "status", &statuses);
        let help = "Rejected RESERVE requests by the reason";
        let reasons = ["ip constraint violation", "resource limit exceeded", "permission denied"];
        let reserve_rejections = counters("reservation_rejections", help, "reason", &reasons);

        let help = "Circuits that were opened, and closed";
        let connections = counters("connections", help, "type", &["opened", "closed"]);
        let (name, help) =
            ("connection_request_response_status", "Answers to CONNECT requests by their status");
        let connect_statuses = counters(name, help, "status", &statuses);
        let help = "Rejected CONNECT requests by the reason";
        let reasons =
            ["resource limit exceeded", "permission denied", "no reservation", "malformed message"];
        let connect_rejections = counters("connection_rejections", help, "reason", &reasons);
        Self {
            reservations,
            reserve: Answers { statuses: reserve_statuses, rejections: reserve_rejections },
            connections,
            connect: Answers { statuses: connect_statuses, rejections: connect_rejections },
            connection_duration,
        }
    }

    /// Counts an event.
    pub(super) fn record(&self, event: &Event) {
        match event {
            Event::ReservationAccepted { renewed, .. } => {
                let kind = if *renewed { "renewed" } else { "opened" };
                self.reservations.count(kind);
                self.reserve.count(Status::Ok);
            }
            Event::ReservationRefused { reason, .. } => self.reserve.count_sent(reason.status()),
            Event::ReservationFreed { .. } => self.reservations.count("closed"),
            Event::CircuitOpened { .. } => {
                self.connections.count("opened");
                self.connect.count(Status::Ok);
            }
            Event::CircuitRefused { reason, .. } => self.connect.count_sent(reason.status()),
            // Of malformed requests go-libp2p counts those that are known to be a CONNECT.
            Event::RequestRejected { reason, .. } => {
                if let BadRequest::BadTarget(_) = reason {
                    self.connect.count(reason.status());
                }
            }
            Event::CircuitClosed { open_for, .. } => {
                self.connections.count("closed");
                self.connection_duration.observe(open_for.as_secs_f64());
            }
            Event::PeerSilent { .. } | Event::GraceBegan { .. } => {}
        }
    }
}

/// Writes the metrics that no event reports.
pub(super) fn write_stats(out: &mut DescriptorEncoder<'_>, stats: &Stats) -> fmt::Result {
    let help = "1 while the relay takes requests, 0 while it drains.";
    let status = ConstGauge::new(i64::from(stats.not_serving.is_none()));
    write(out, "status", help, None, status)?;
    let help = "Payload bytes that circuits carried, both directions together.";
    let relayed = ConstCounter::new(stats.relayed.to_target + stats.relayed.to_source);
    write(out, "data_transferred", help, Some(&Unit::Bytes), relayed)
}

impl Answers {
    /// Counts an answer; without a status there was none.
    fn count_sent(&self, status: Option<Status>) {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_buckets_end_at_the_longest_that_a_circuit_may_stay_open() {
        let last_two = |seconds| {
            let buckets = buckets(Duration::from_secs(seconds));
            assert!(buckets.is_sorted() && buckets.len() >= 11, "{buckets:?}");
            (buckets[buckets.len() - 2], buckets[buckets.len() - 1])
        };
        assert_eq!(last_two(120), (60.0, 120.0));
        assert_eq!(last_two(150), (120.0, 150.0));
        assert_eq!(last_two(1), (5.0, 10.0));
        assert_eq!(last_two(0), (43_200.0, 86_400.0));
    }
}
