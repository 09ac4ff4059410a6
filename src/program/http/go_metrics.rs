//! The metrics of go-libp2p's relay under its names, so that a dashboard made for that relay shows this one.
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

/// The metrics that count events. [`write_stats`] writes the others.
pub(super) struct GoMetrics {
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

impl GoMetrics {
    /// Registers the metrics. Circuits are limited to `circuit_duration`; zero: no limit.
    pub(super) fn new(registry: &mut Registry, circuit_duration: Duration) -> Self {
        let help = "Reservations that were opened, renewed, and closed";
        let types = ["opened", "renewed", "closed"];
        let reservations = Counters::new(registry, "reservations", help, "type", &types);
        let reasons = ["ip constraint violation", "resource limit exceeded", "permission denied"];
        let reserve = Answers::new(registry, "reservation", "RESERVE", &reasons);

        let help = "Circuits that were opened, and closed";
        let types = ["opened", "closed"];
        let connections = Counters::new(registry, "connections", help, "type", &types);
        let reasons =
            ["resource limit exceeded", "permission denied", "no reservation", "malformed message"];
        let connect = Answers::new(registry, "connection", "CONNECT", &reasons);
        let help = "How long circuits that have ended were open";
        let connection_duration = Histogram::new(buckets(circuit_duration));
        let duration = connection_duration.clone();
        registry.register_with_unit("connection_duration", help, Unit::Seconds, duration);
        Self { reservations, reserve, connections, connect, connection_duration }
    }

    /// Counts an event.
    pub(super) fn record(&self, event: &Event) {
        match event {
            Event::ReservationAccepted { renewed, .. } => {
                let kind = if *renewed { "renewed" } else { "opened" };
                self.reservations.count(kind);
                self.reserve.count(Some(Status::Ok));
            }
            Event::ReservationRefused { reason, .. } => self.reserve.count(reason.status()),
            Event::ReservationFreed { .. } => self.reservations.count("closed"),
            Event::CircuitOpened { .. } => {
                self.connections.count("opened");
                self.connect.count(Some(Status::Ok));
            }
            Event::CircuitRefused { reason, .. } => self.connect.count(reason.status()),
            // Of malformed requests go-libp2p counts those that are known to be a CONNECT.
            Event::RequestRejected { reason, .. } => {
                if let BadRequest::BadTarget(_) = reason {
                    self.connect.count(Some(reason.status()));
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
    let help = "1 while the relay serves, 0 while it drains, hangs or its clock is not set.";
    let status = ConstGauge::new(i64::from(stats.not_serving.is_none()));
    write(out, "status", help, None, status)?;
    let help = "Payload bytes that circuits carried, both directions together.";
    let relayed = ConstCounter::new(stats.relayed.to_target + stats.relayed.to_source);
    write(out, "data_transferred", help, Some(&Unit::Bytes), relayed)
}

impl Answers {
    /// Registers `<name>_request_response_status` and `<name>_rejections`, for answers to this request.
    fn new(registry: &mut Registry, name: &str, request: &str, reasons: &[&'static str]) -> Self {
        let help = format!("Answers to {request} requests by their status");
        let (status, values) =
            (format!("{name}_request_response_status"), ["ok", "rejected", "error"]);
        let statuses = Counters::new(registry, &status, &help, "status", &values);
        let help = format!("Rejected {request} requests by the reason");
        let rejections = format!("{name}_rejections");
        let rejections = Counters::new(registry, &rejections, &help, "reason", reasons);
        Self { statuses, rejections }
    }

    /// Counts an answer with this status; `None`: there was no answer.
    fn count(&self, status: Option<Status>) {
        let Some(status) = status else { return };
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
