//! What the relay shows of itself, asked for over HTTP.

use libp2p::PeerId;
use serde_json::Value;

use crate::{
    common::http::{self, get},
    observer::Shown,
};

/// What `/status.json` says.
pub async fn shown(port: u16) -> Shown {
    let text = get(port, "/status.json").await;
    let status: Value = serde_json::from_str(&text).expect("JSON");
    let number = |of: &Value| of.as_u64().expect("a number") as usize;
    let slots = &status["slots"];
    let mut shown = Shown {
        total: number(&slots["total"]),
        counted: (number(&slots["live"]), number(&slots["grace"])),
        circuits: number(&status["circuits"]["count"]),
        connections: number(&status["connections"]),
        ..Shown::default()
    };
    let holders = status["holders"]["listed"].as_array().expect("a list");
    for holder in holders {
        let peer = holder["peer"].as_str().expect("a peer");
        let peer: PeerId = peer.parse().expect("its id");
        match holder["state"].as_str() {
            Some("live") => shown.live.insert(peer),
            _ => shown.grace.insert(peer),
        };
    }
    shown
}

/// How many slots came back, and why; from `/metrics`.
pub async fn taken_back(port: u16) -> Vec<(String, f64)> {
    let samples = http::samples(&get(port, "/metrics").await);
    let family = r#"relaylet_slots_freed_total{reason=""#;
    let freed = samples.into_iter().filter_map(|(name, count)| {
        let reason = name.strip_prefix(family)?.strip_suffix(r#""}"#)?;
        Some((reason.to_owned(), count))
    });
    freed.collect()
}
