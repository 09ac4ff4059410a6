//! The metrics: those of go-libp2p's relay under its names ([`super::go_metrics`]), those of the process, and
//! our own under `relaylet_*`.
//!
//! Counting adds to an atomic number, so that the relay never waits for a reader.

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, SystemTime},
};

use prometheus_client::{
    metrics::{counter::Counter, family::Family, gauge::Gauge, info::Info},
    registry::{Registry, Unit},
};

use super::{
    counters::{Counters, Label, raise, registered, set},
    go_metrics::RelaySvc,
    process::Process,
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

/// All metrics that the relay updates.
pub struct Metrics {
    relaysvc: RelaySvc,
    slots: Family<[Label; 1], Gauge>,
    limits: Family<[Label; 1], Gauge>,
    freed: Counters,
    refused: Family<[Label; 2], Counter>,
    probes: Counter,
    unanswered: Counter,
    sweeps: Counter,
    sweep_seconds: Counter<f64, AtomicU64>,
    relayed: Counters,
    circuits: Gauge,
    circuits_closed: Counters,
    connections: Gauge,
    connections_denied: Counters,
    handshakes_failed: Family<[Label; 2], Counter>,
    buffered: Gauge,
    credit: Gauge,
    given_up: Counters,
    streams_cut: Counters,
    connections_closed: Counters,
    busiest: Family<[(&'static str, String); 2], Gauge>,
    certificate_not_after: Family<[Label; 0], Gauge>,
}

impl Metrics {
    /// Registers the metrics of a relay whose circuits are limited to `circuit_duration`; zero: no limit.
    pub fn new(circuit_duration: Duration) -> (Self, Registry) {
        let mut all = Registry::default();
        let go = all.sub_registry_with_prefix("libp2p_relaysvc");
        let relaysvc = RelaySvc::new(go, circuit_duration);
        all.register_collector(Box::new(Process::new()));
        let own = all.sub_registry_with_prefix("relaylet");
        let version = [("version", env!("CARGO_PKG_VERSION"))];
        own.register("build", "The version of the program", Info::new(version));
        let sweep_seconds = Counter::default();
        let text = "Time that the passes over the tables took";
        own.register_with_unit("sweep", text, Unit::Seconds, sweep_seconds.clone());
        let certificate_not_after = Family::default();
        let text = "When the certificate of --tls-cert expires, in seconds since 1970";
        let gauge: Family<[Label; 0], Gauge> = certificate_not_after.clone();
        own.register_with_unit("certificate_not_after", text, Unit::Seconds, gauge);
        let metrics = Self {
            relaysvc,
            certificate_not_after,
            slots: registered(
                own,
                "slots",
                "Slots by state: live, in grace (the peer has disconnected and may come back), free",
            ),
            limits: registered(
                own,
                "limit",
                "Configured limits by the names of their settings, in bytes and seconds; 0: no limit",
            ),
            freed: Counters::new(
                own,
                "slots_freed",
                "Slots that were freed, by the reason",
                "reason",
                &["expired", "grace over", "silent", "taken by a newcomer"],
            ),
            refused: registered(
                own,
                "requests_refused",
                "RESERVE and CONNECT requests that were refused, by the reason",
            ),
            probes: registered(
                own,
                "questions_asked",
                "Pings sent to peers that were silent, to learn whether they are still there",
            ),
            unanswered: registered(
                own,
                "questions_unanswered",
                "Peers that did not answer a ping in time and were disconnected",
            ),
            sweeps: registered(own, "sweeps", "Passes over the tables that end what has expired"),
            sweep_seconds,
            relayed: Counters::new(
                own,
                "relayed_bytes",
                "Payload bytes that circuits carried, by direction",
                "direction",
                &["to target", "to source"],
            ),
            circuits: registered(own, "circuits", "Open circuits"),
            circuits_closed: Counters::new(
                own,
                "circuits_closed",
                "Circuits that ended, by the reason",
                "end",
                &[
                    "finished",
                    "reset",
                    "disconnected",
                    "data limit",
                    "time limit",
                    "silent",
                    "denied",
                    "stalled",
                ],
            ),
            connections: registered(
                own,
                "connections",
                "Open connections of peers, without those in their handshakes",
            ),
            connections_denied: Counters::new(
                own,
                "connections_denied",
                "Incoming connections that were closed by a limit or a rule, by the reason",
                "reason",
                &["too many connections", "too many handshakes"],
            ),
            handshakes_failed: registered(
                own,
                "handshakes_failed",
                "Incoming connections that failed before their first stream, by the stage and the reason",
            ),
            buffered: registered(
                own,
                "buffered_bytes",
                "Bytes received and not yet processed, or not yet taken by the peer they go to",
            ),
            credit: registered(
                own,
                "credit_bytes",
                "Bytes that peers may still send before they are granted more",
            ),
            streams_cut: Counters::new(
                own,
                "streams_cut",
                "Streams that were reset because too much waited on them, by the limit that was reached",
                "reason",
                &Cut::STREAMS.map(Cut::kind),
            ),
            connections_closed: Counters::new(
                own,
                "connections_closed",
                "Connections that were closed, by the reason",
                "reason",
                &["closed by the peer", "idle", "silent", "refusals not taken", "write stalled"],
            ),
            given_up: Counters::new(
                own,
                "given_up",
                "Streams reset and connections closed because too many bytes waited on them",
                "what",
                &["stream", "connection"],
            ),
            busiest: registered(
                own,
                "busiest",
                "The address that holds the most of a resource, and how much",
            ),
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
                self.relaysvc.record(event);
                if let Event::CircuitClosed { end, open_for, .. } = event {
                    self.circuits_closed.count(end.kind());
                    self.relaysvc.record_duration(*open_for);
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

    /// Updates what no event reports.
    pub fn update(&self, stats: &Stats) {
        self.relaysvc.update(stats);
        let Stats { slots, relayed, upkeep, buffered, .. } = stats;
        for (state, count) in [("live", slots.live), ("grace", slots.grace), ("free", slots.free)] {
            set(&self.slots.get_or_create(&[("state", state)]), count);
        }
        for (setting, limit) in stats.limits {
            let limit = i64::try_from(limit).unwrap_or(i64::MAX);
            self.limits.get_or_create(&[("setting", setting)]).set(limit);
        }
        raise(&self.probes, upkeep.questions);
        raise(&self.sweeps, upkeep.sweeps);
        let seconds = upkeep.swept_for.as_secs_f64().to_bits();
        self.sweep_seconds.inner().store(seconds, Ordering::Relaxed);
        self.relayed.raise("to target", relayed.to_target);
        self.relayed.raise("to source", relayed.to_source);
        set(&self.circuits, stats.circuits);
        set(&self.connections, stats.connections);
        set(&self.buffered, buffered.bytes);
        set(&self.credit, buffered.credit);
        self.given_up.raise("stream", buffered.sum(&Cut::STREAMS));
        self.given_up.raise("connection", buffered.sum(&Cut::CONNECTIONS));
        Cut::STREAMS
            .iter()
            .for_each(|cut| self.streams_cut.raise(cut.kind(), buffered.count(*cut)));
        if let Some(time) = stats.certificate_not_after {
            let seconds = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
            self.certificate_not_after.get_or_create(&[]).set(seconds as i64);
        }
        self.busiest.clear(); // so that each resource has one address
        for (resource, busiest) in stats.busiest {
            if let Some((address, holds)) = busiest {
                let labels = [("resource", resource.into()), ("address", address.to_string())];
                set(&self.busiest.get_or_create(&labels), holds);
            }
        }
    }
}
