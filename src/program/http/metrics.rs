//! What there is to count, for Prometheus: what go-libp2p's relay counts too, under its names
//! ([`crate::program::http::go_metrics`]), and what only this relay has, under `relaylet_*`.
//!
//! To count is to add to an atomic number: the relay never waits for whoever reads it.

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::SystemTime,
};

use prometheus_client::{
    metrics::{counter::Counter, family::Family, gauge::Gauge, info::Info},
    registry::{Registry, Unit},
};

use super::{
    counters::{Counters, Label, raise, registered, set},
    go_metrics::RelaySvc,
    stats::Figures,
};
use crate::{
    event::{CircuitEnd, Event},
    program::{
        mux::budget::Cut,
        tally::{self, Tally},
    },
};

/// All that is counted.
pub struct Metrics {
    relaysvc: RelaySvc,
    slots: Family<[Label; 1], Gauge>,
    freed: Counters,
    refused: Family<[Label; 2], Counter>,
    questions: Counter,
    unanswered: Counter,
    sweeps: Counter,
    sweep_seconds: Counter<f64, AtomicU64>,
    relayed: Counters,
    circuits: Gauge,
    circuits_closed: Counters,
    connections: Gauge,
    connections_denied: Counters,
    buffered: Gauge,
    credit: Gauge,
    given_up: Counters,
    streams_cut: Counters,
    connections_closed: Counters,
    busiest: Family<[(&'static str, String); 2], Gauge>,
    certificate_not_after: Family<[Label; 0], Gauge>,
}

impl Metrics {
    /// Nothing has happened yet; and the registry that shows what will.
    pub fn new() -> (Self, Registry) {
        let mut all = Registry::default();
        let relaysvc = RelaySvc::new(all.sub_registry_with_prefix("libp2p_relaysvc"));
        let own = all.sub_registry_with_prefix("relaylet");
        let version = [("version", env!("CARGO_PKG_VERSION"))];
        own.register("build", "The program", Info::new(version));
        let sweep_seconds = Counter::default();
        let text = "Time that the passes over the tables took";
        own.register_with_unit("sweep", text, Unit::Seconds, sweep_seconds.clone());
        let certificate_not_after = Family::default();
        let text = "When the certificate expires, in seconds since 1970";
        let gauge: Family<[Label; 0], Gauge> = certificate_not_after.clone();
        own.register_with_unit("certificate_not_after", text, Unit::Seconds, gauge);
        let metrics = Self {
            relaysvc,
            certificate_not_after,
            slots: registered(own, "slots", "Slots"),
            freed: Counters::new(
                own,
                "slots_freed",
                "Slots that came back",
                "reason",
                &["expired", "grace over", "silent", "taken by a newcomer"],
            ),
            refused: registered(own, "requests_refused", "Requests that were refused"),
            questions: registered(own, "questions_asked", "Peers asked for a sign of life"),
            unanswered: registered(own, "questions_unanswered", "Peers that gave none"),
            sweeps: registered(own, "sweeps", "Passes over the tables"),
            sweep_seconds,
            relayed: Counters::new(
                own,
                "relayed_bytes",
                "Payload that circuits carried",
                "direction",
                &["to target", "to source"],
            ),
            circuits: registered(own, "circuits", "Open circuits"),
            circuits_closed: Counters::new(
                own,
                "circuits_closed",
                "Circuits that ended, and how",
                "end",
                &["data limit", "time limit", CircuitEnd::Stalled.kind()],
            ),
            connections: registered(own, "connections", "Open connections"),
            connections_denied: Counters::new(
                own,
                "connections_denied",
                "Connections that were turned away",
                "reason",
                &["too many connections", "too many handshakes"],
            ),
            buffered: registered(own, "buffered_bytes", "What waits to be read or taken by a peer"),
            credit: registered(
                own,
                "credit_bytes",
                "What peers may still send before they are granted more",
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
                "Connections that were closed because their peers did not take what was sent, by reason",
                "reason",
                &Cut::CONNECTIONS.map(Cut::kind),
            ),
            given_up: Counters::new(
                own,
                "given_up",
                "What was ended because too much waited on it for too long",
                "what",
                &["stream", "connection"],
            ),
            busiest: registered(own, "busiest", "The address that holds the most of a resource"),
        };
        (metrics, all)
    }

    /// Counts an event.
    pub fn note(&self, event: &Event) {
        self.relaysvc.note(event);
        if let Event::CircuitClosed { end, open_for, .. } = event {
            self.circuits_closed.count(end.kind());
            self.relaysvc.circuit_lasted(*open_for);
        }
    }

    /// Counts what was refused, freed or not answered.
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

    /// Shows what no event tells.
    pub fn show(&self, figures: &Figures) {
        self.relaysvc.show(figures);
        let Figures { slots, relayed, upkeep, buffered, .. } = figures;
        for (state, count) in [("live", slots.live), ("grace", slots.grace), ("free", slots.free)] {
            set(&self.slots.get_or_create(&[("state", state)]), count);
        }
        raise(&self.questions, upkeep.questions);
        raise(&self.sweeps, upkeep.sweeps);
        let seconds = upkeep.swept_for.as_secs_f64().to_bits();
        self.sweep_seconds.inner().store(seconds, Ordering::Relaxed);
        self.relayed.raise("to target", relayed.to_target);
        self.relayed.raise("to source", relayed.to_source);
        set(&self.circuits, figures.circuits);
        set(&self.connections, figures.connections);
        set(&self.buffered, buffered.bytes);
        set(&self.credit, buffered.credit);
        self.given_up.raise("stream", buffered.sum(&Cut::STREAMS));
        self.given_up.raise("connection", buffered.sum(&Cut::CONNECTIONS));
        Cut::STREAMS
            .iter()
            .for_each(|cut| self.streams_cut.raise(cut.kind(), buffered.count(*cut)));
        for cut in Cut::CONNECTIONS {
            self.connections_closed.raise(cut.kind(), buffered.count(cut));
        }
        if let Some(time) = figures.certificate_not_after {
            let seconds = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
            self.certificate_not_after.get_or_create(&[]).set(seconds as i64);
        }
        self.busiest.clear(); // one address a resource
        for (resource, busiest) in figures.busiest {
            if let Some((address, holds)) = busiest {
                let labels = [("resource", resource.into()), ("address", address.to_string())];
                set(&self.busiest.get_or_create(&labels), holds);
            }
        }
    }
}
