//! What the relay reports about itself over HTTP.

use libp2p::PeerId;
use serde_json::Value;

use crate::{
    common::http::{self, get},
    observer::Report,
};

/// Reads `/status.json`.
pub async fn report(port: u16) -> Report {
    let text = get(port, "/status.json").await;
    let status: Value = serde_json::from_str(&text).expect("JSON");
    let number = |of: &Value| of.as_u64().expect("a number") as usize;
    let slots = &status["slots"];
    let mut report = Report {
        total: number(&slots["total"]),
        counted: (number(&slots["live"]), number(&slots["grace"])),
        circuits: number(&status["circuits"]["count"]),
        connections: number(&status["connections"]),
        ..Report::default()
    };
    let holders = status["holders"]["listed"].as_array().expect("a list");
    for holder in holders {
        let peer = holder["peer"].as_str().expect("a peer");
        let peer: PeerId = peer.parse().expect("a peer id");
        match holder["state"].as_str() {
            Some("live") => report.live.insert(peer),
            _ => report.grace.insert(peer),
        };
    }
    report
}

/// How many slots were freed for each reason, from `/metrics`.
pub async fn freed_slots(port: u16) -> Vec<(String, f64)> {
    let samples = http::samples(&get(port, "/metrics").await);
    let family = r#"relaylet_slots_freed_total{reason=""#;
    let freed = samples.into_iter().filter_map(|(name, count)| {
        let reason = name.strip_prefix(family)?.strip_suffix(r#""}"#)?;
        Some((reason.to_owned(), count))
    });
    freed.collect()
}
