//! Monitors the relay for HTTP: counts its events and publishes a [`Snapshot`] once a second.
//!
//! Runs on the relay's thread. The thread that serves HTTP ([`super::server`]) reads the latest snapshot and
//! nothing else. The lists of a status are long, so a snapshot has a status only while one is requested.

use std::{
    net::{SocketAddr, TcpListener},
    sync::{Arc, OnceLock},
    task::{self, Poll},
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use futures_timer::Delay;
use libp2p::futures::FutureExt;

use super::{
    hosts::Hosts,
    metrics::Metrics,
    routes::Routes,
    server,
    snapshot::{LatestSnapshot, Snapshot},
    stats::{StartLimits, Stats},
    status::{Recorder, Status},
};
use crate::program::{
    component::Component,
    net::socket::with_remedy,
    node::{Node, NodeEvent},
    tally::Tally,
};

/// The interval between snapshots.
const INTERVAL: Duration = Duration::from_secs(1);

/// How long snapshots have a status after a request for it: the page requests it every two seconds.
const STATUS_FOR: Duration = Duration::from_secs(5);

/// The component behind `--http`.
pub struct Monitor {
    limits: StartLimits,
    metrics: Metrics,
    recorder: Recorder,
    latest: Arc<LatestSnapshot>,
    /// Until when snapshots have a status.
    status_until: Instant,
    next_snapshot: Delay,
}

impl Monitor {
    /// Listens on the address of `--http` and serves HTTP; the page and the status only under the names that [`Hosts`]
    /// allows.
    ///
    /// # Errors
    ///
    /// When the address cannot be listened on.
    pub fn start(
        address: SocketAddr,
        hosts: Vec<String>,
        limits: StartLimits,
        node: &Node,
    ) -> Result<Self> {
        let listener = TcpListener::bind(address).map_err(|error| with_remedy(&error));
        let listener = listener.with_context(|| format!("--http {address}"))?;
        let address = listener.local_addr().context("--http")?;
        let mut recorder = Recorder::new(Instant::now());
        let snapshot = take_snapshot(node, &limits, false, &mut recorder);
        let latest = Arc::new(LatestSnapshot::new(snapshot));
        let circuit_duration = node.relay().config().circuit_duration;
        let (metrics, registry) = Metrics::new(circuit_duration, Arc::clone(&latest));
        server::start(listener, Routes::new(Arc::clone(&latest), registry, Hosts(hosts)))
            .with_context(|| format!("--http {address}"))?;
        log::info!("monitoring page: http://{address}/");
        if !address.ip().is_loopback() {
            log::warn!(
                "--http {address}: anyone who can reach this address sees the peers that use this relay, and \
                 their addresses"
            );
        }
        Ok(Self {
            limits,
            metrics,
            recorder,
            latest,
            status_until: Instant::now(),
            next_snapshot: Delay::new(INTERVAL),
        })
    }
}

impl Component for Monitor {
    fn poll_due(&mut self, cx: &mut task::Context<'_>) -> Poll<()> {
        self.next_snapshot.poll_unpin(cx)
    }

    fn on_event(&mut self, event: &NodeEvent) {
        let now = Instant::now();
        if let Some(tally) = Tally::of(event) {
            self.metrics.count(&tally);
            self.recorder.refusals.record(&tally, now);
        }
        self.metrics.record(event);
    }

    /// Publishes a snapshot.
    fn on_due(&mut self, node: &mut Node) {
        let now = Instant::now();
        if self.latest.take_request() {
            self.status_until = now + STATUS_FOR;
        }
        let with_status = now < self.status_until;
        let snapshot = take_snapshot(node, &self.limits, with_status, &mut self.recorder);
        self.latest.publish(snapshot);
        self.next_snapshot.reset(INTERVAL);
    }
}

/// Takes a snapshot and records it.
fn take_snapshot(
    node: &Node,
    limits: &StartLimits,
    with_status: bool,
    recorder: &mut Recorder,
) -> Snapshot {
    let now = Instant::now();
    let stats = Stats::of(node, limits);
    recorder.record(&stats, now);
    let status = with_status.then(|| Status::of(node, &stats, recorder, now));
    Snapshot { at: now, stats, status, json: OnceLock::new() }
}

#[cfg(test)]
mod tests {
    use std::{future::poll_fn, pin::pin};

    use hyper::{Request, body::Body};
    use libp2p::{futures::executor::block_on, identity::Keypair};

    use super::*;
    use crate::config::Config;

    /// The snapshot of a relay that published it `ago`, and what is served of it.
    fn published(
        draining: bool,
        with_status: bool,
        ago: Duration,
    ) -> (Arc<LatestSnapshot>, Routes) {
        let keypair = Keypair::generate_ed25519();
        let mut node = Node::new(keypair, Config::default()).unwrap();
        if draining {
            node.drain(Duration::from_secs(120));
        }
        let (limits, mut recorder) = (StartLimits::default(), Recorder::new(Instant::now()));
        let mut snapshot = take_snapshot(&node, &limits, with_status, &mut recorder);
        snapshot.at = snapshot.at.checked_sub(ago).unwrap();
        let latest = Arc::new(LatestSnapshot::new(snapshot));
        let (_, registry) = Metrics::new(Duration::from_secs(120), Arc::clone(&latest));
        (Arc::clone(&latest), Routes::new(latest, registry, Hosts::default()))
    }

    fn routes_of(draining: bool, ago: Duration) -> Routes {
        published(draining, true, ago).1
    }

    /// The status of an answer, and its body.
    fn get(routes: &Routes, path: &str) -> (u16, String) {
        let Poll::Ready(answer) =
            routes.answer(&Request::get(path).header("Host", "localhost").body(()).unwrap())
        else {
            panic!("{path}: no answer yet");
        };
        let status = answer.status().as_u16();
        let mut body = pin!(answer.into_body());
        let frame = block_on(poll_fn(|cx| body.as_mut().poll_frame(cx)));
        let bytes = frame.unwrap().unwrap().into_data().unwrap();
        (status, String::from_utf8(bytes.to_vec()).unwrap())
    }

    #[test]
    fn a_snapshot_includes_the_status_only_on_request() {
        let (latest, routes) = published(false, false, Duration::ZERO);
        assert_eq!(get(&routes, "/healthz").0, 200);
        assert_eq!(get(&routes, "/metrics").0, 200);
        assert!(!latest.take_request(), "not requested");
        let request = Request::get("/status.json").header("Host", "[::1]:80").body(()).unwrap();
        assert!(routes.answer(&request).is_pending());
        assert!(latest.take_request());
    }

    #[test]
    fn a_draining_or_stuck_relay_is_not_healthy() {
        let now = Duration::ZERO;
        assert_eq!(get(&routes_of(false, now), "/healthz"), (200, "serving\n".into()));
        assert_eq!(get(&routes_of(true, now), "/healthz"), (503, "draining\n".into()));
        let (status, text) = get(&routes_of(false, Duration::from_secs(31)), "/healthz");
        assert_eq!(status, 503);
        assert_eq!(text, "the relay has published nothing for 31 s\n");
        // Nor does its page show the last status as if it were current.
        let (status, json) = get(&routes_of(false, Duration::from_secs(31)), "/status.json");
        assert_eq!((status, json), (503, text));
        let (status, metrics) = get(&routes_of(false, Duration::from_secs(31)), "/metrics");
        assert_eq!(status, 200);
        assert!(metrics.contains("\nlibp2p_relaysvc_status 0\n"), "{metrics}");
    }

    #[test]
    fn draining_is_reported_as_a_distinct_status() {
        for (draining, status, reason) in [(false, 1, "null"), (true, 0, "\"draining\"")] {
            let routes = routes_of(draining, Duration::ZERO);
            let (_, metrics) = get(&routes, "/metrics");
            let line = format!("\nlibp2p_relaysvc_status {status}\n");
            assert!(metrics.contains(&line), "{metrics}");
            let (_, json) = get(&routes, "/status.json");
            let fields = format!("\"draining\":{draining},\"not_serving\":{reason}");
            assert!(json.contains(&fields), "{json}");
        }
    }
}
