//! The metrics: those of go-libp2p's relay under its names ([`super::go_metrics`]), those of the process, and
//! our own under `relaylet_*`.
//!
//! Counting adds to an atomic number, so that the relay never waits for a reader.

use std::{
    fmt,
    sync::Arc,
    time::{Duration, SystemTime},
};

use prometheus_client::{
    collector::Collector,
    encoding::DescriptorEncoder,
    metrics::{
        counter::{ConstCounter, Counter},
        family::Family,
        gauge::ConstGauge,
        info::Info,
    },
    registry::{Registry, Unit},
};

use super::{
    counters::{Counters, Label, registered, write, write_each},
    go_metrics::{self, GoMetrics},
    process::Process,
    snapshot::{LatestSnapshot, STUCK_AFTER},
    stats::Stats,
};
use crate::{
    event::Event,
    program::{
        mux::budget::Cut,
        net::admission::handshake_failure::{Reason, Stage},
        node::NodeEvent,
        tally::{self, Tally},
    },
};

/// The failed handshakes that are counted from the start, so that a rate over the first one is right.
const HANDSHAKES: [(Stage, Reason); 6] = [
    (Stage::Multistream, Reason::Http),
    (Stage::Multistream, Reason::Tls),
    (Stage::Multistream, Reason::ProxyHeader),
    (Stage::Multistream, Reason::SwarmKey),
    (Stage::Multistream, Reason::Protocol),
    (Stage::Security, Reason::PeerId),
];

/// The metrics that count events.
pub struct Metrics {
    go: GoMetrics,
    freed: Counters,
    refused: Family<[Label; 2], Counter>,
    unanswered: Counter,
    circuits_closed: Counters,
    connections_denied: Counters,
    handshakes_failed: Family<[Label; 2], Counter>,
    connections_closed: Counters,
}

impl Metrics {
    /// Registers all metrics: those of events, and those of the latest snapshot. Circuits are limited to
    /// `circuit_duration`; zero: no limit.
    pub fn new(circuit_duration: Duration, latest: Arc<LatestSnapshot>) -> (Self, Registry) {
        let mut all = Registry::default();
        all.register_collector(Box::new(Process::default()));
        let relaysvc = all.sub_registry_with_prefix("libp2p_relaysvc");
        let go = GoMetrics::new(relaysvc, circuit_duration);
        let (snapshots, write) = (Arc::clone(&latest), go_metrics::write_stats);
        relaysvc.register_collector(Box::new(SnapshotMetrics { latest: snapshots, write }));
        let own = all.sub_registry_with_prefix("relaylet");
        own.register_collector(Box::new(SnapshotMetrics { latest, write: write_stats }));
        let version = [("version", env!("CARGO_PKG_VERSION"))];
        own.register("build", "The version of the program", Info::new(version));

        let help = "Slots that were freed, by the reason";
        let reasons = ["expired", "grace over", "silent", "taken by a newcomer"];
        let freed = Counters::new(own, "slots_freed", help, "reason", &reasons);
        let help = "RESERVE and CONNECT requests that were refused, by the reason";
        let refused = registered(own, "requests_refused", help);
        let help = "Silent peers that did not answer a probe in time";
        let unanswered = registered(own, "questions_unanswered", help);
        let help = "Circuits that ended, by the reason";
        let ends = [
            "finished",
            "reset",
            "disconnected",
            "data limit",
            "time limit",
            "silent",
            "denied",
            "stalled",
        ];
        let circuits_closed = Counters::new(own, "circuits_closed", help, "end", &ends);
        let help = "Incoming connections that were closed by a limit or a rule, by the reason";
        let reasons = ["too many connections", "too many handshakes"];
        let connections_denied = Counters::new(own, "connections_denied", help, "reason", &reasons);
        let help = "Incoming connections that failed before their first stream, by the stage and the reason";
        let handshakes_failed = registered(own, "handshakes_failed", help);
        let help = "Connections that were closed, by the reason";
        let reasons =
            ["closed by the peer", "idle", "silent", "refusals not taken", "write stalled"];
        let connections_closed = Counters::new(own, "connections_closed", help, "reason", &reasons);

        let metrics = Self {
            go,
            freed,
            refused,
            unanswered,
            circuits_closed,
            connections_denied,
            handshakes_failed,
            connections_closed,
        };
        for (stage, reason) in HANDSHAKES {
            let labels = [("stage", stage.kind()), ("reason", reason.kind())];
            metrics.handshakes_failed.get_or_create(&labels).inc_by(0);
        }
        (metrics, all)
    }

    /// Counts an event.
    pub fn record(&self, event: &NodeEvent) {
        match event {
            NodeEvent::Relay(event) => {
                self.go.record(event);
                if let Event::CircuitClosed { end, .. } = event {
                    self.circuits_closed.count(end.kind());
                }
            }
            NodeEvent::HandshakeFailed { failure, .. } => {
                let labels = [("stage", failure.stage.kind()), ("reason", failure.reason.kind())];
                self.handshakes_failed.get_or_create(&labels).inc();
            }
            NodeEvent::ConnectionClosed { reason } => self.connections_closed.count(reason),
            _ => {}
        }
    }

    /// Counts a refusal, a freed slot, or a probe without an answer.
    pub fn count(&self, tally: &Tally) {
        match tally.what {
            tally::CONNECTION => self.connections_denied.count(tally.why),
            tally::SLOT => self.freed.count(tally.why),
            tally::PEER => {
                self.unanswered.inc();
            }
            request => {
                if let Some(request) = request.metric {
                    let labels = [("request", request), ("reason", tally.why)];
                    self.refused.get_or_create(&labels).inc();
                }
            }
        }
    }
}

/// The metrics that no event reports, read from the latest snapshot.
#[derive(Debug)]
struct SnapshotMetrics {
    latest: Arc<LatestSnapshot>,
    write: fn(&mut DescriptorEncoder<'_>, &Stats) -> fmt::Result,
}

impl Collector for SnapshotMetrics {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let snapshot = self.latest.read();
        let hangs = (snapshot.at.elapsed() > STUCK_AFTER).then_some("the relay hangs");
        let not_serving = snapshot.stats.not_serving.or(hangs);
        (self.write)(&mut encoder, &Stats { not_serving, ..snapshot.stats })
    }
}

/// Writes those under `relaylet_*`.
fn write_stats(out: &mut DescriptorEncoder<'_>, stats: &Stats) -> fmt::Result {
    let Stats { slots, relayed, buffered, .. } = stats;

    // 1. Gauges.
    let help =
        "Slots by state: live, in grace (the peer has disconnected and may come back), free.";
    let states = [("live", slots.live), ("grace", slots.grace), ("free", slots.free)];
    let states = states.map(|(state, count)| ([("state", state)], ConstGauge::new(count)));
    write_each(out, "slots", help, states)?;
    let help =
        "Configured limits by the names of their settings, in bytes and seconds; 0: no limit.";
    let limits = stats.limits;
    let limits = limits.map(|(setting, it)| ([("setting", setting)], ConstGauge::new(it)));
    write_each(out, "limit", help, limits)?;
    let help = "The address that holds the most of a resource, and how much.";
    let busiest = stats.busiest.into_iter().filter_map(|(resource, busiest)| {
        let (address, holds) = busiest?;
        let labels = [("resource", resource.into()), ("address", address.to_string())];
        Some((labels, ConstGauge::new(holds)))
    });
    let busiest: Vec<_> = busiest.collect();
    if !busiest.is_empty() {
        write_each(out, "busiest", help, busiest)?;
    }
    let mut gauge = |name, help, count| write(out, name, help, None, ConstGauge::new(count));
    gauge("circuits", "Circuits that are open or being set up.", stats.circuits)?;
    let help = "Open connections of peers, without those in their handshakes.";
    gauge("connections", help, stats.connections)?;
    let help = "Bytes received and not yet processed, or not yet taken by the peer they go to.";
    gauge("buffered_bytes", help, buffered.bytes)?;
    let help = "Bytes that peers may still send before they are granted more.";
    gauge("credit_bytes", help, buffered.credit)?;
    if let Some(time) = stats.certificate_not_after {
        let help = "When the certificate of --tls-cert expires, in seconds since 1970.";
        let seconds = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
        let (name, seconds) = ("certificate_not_after", ConstGauge::new(seconds));
        write(out, name, help, Some(&Unit::Seconds), seconds)?;
    }

    // 2. Counters.
    let help = "Probes: pings sent to silent peers, to find out whether they are still there.";
    write(out, "questions_asked", help, None, ConstCounter::new(stats.probes))?;
    let help = "Passes over the tables that end what has expired.";
    write(out, "sweeps", help, None, ConstCounter::new(stats.sweeps))?;
    let help = "Time that the passes over the tables took.";
    let swept_for = ConstCounter::new(stats.swept_for.as_secs_f64());
    write(out, "sweep", help, Some(&Unit::Seconds), swept_for)?;
    let help = "Payload bytes that circuits carried, by direction.";
    let relayed = [("to target", relayed.to_target), ("to source", relayed.to_source)];
    let relayed = relayed.map(|(to, bytes)| ([("direction", to)], ConstCounter::new(bytes)));
    write_each(out, "relayed_bytes", help, relayed)?;
    let help =
        "Streams that were reset because too much waited on them, by the limit that was reached.";
    let cut =
        Cut::STREAMS.map(|cut| ([("reason", cut.kind())], ConstCounter::new(buffered.count(cut))));
    write_each(out, "streams_cut", help, cut)?;
    let help = "Streams reset and connections closed because too many bytes waited on them.";
    let given_up = [("stream", Cut::STREAMS), ("connection", Cut::CONNECTIONS)];
    let given_up =
        given_up.map(|(what, cuts)| ([("what", what)], ConstCounter::new(buffered.sum(&cuts))));
    write_each(out, "given_up", help, given_up)
}
