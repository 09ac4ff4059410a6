//! The relay as it is watched over HTTP: what it tells of itself, once a second.
//!
//! Runs on the thread of the relay: counts events and publishes a [`Snapshot`]. A thread of its own
//! ([`super::server`]) serves the callers and reads the latest snapshot, nothing else. The lists are
//! long, so they are only made while the status is requested.

use std::{
    net::{SocketAddr, TcpListener},
    sync::Arc,
    task::{self, Poll},
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use futures_timer::Delay;
use libp2p::futures::FutureExt;

use super::{
    metrics::Metrics,
    routes::Site,
    server,
    snapshot::{LatestSnapshot, Snapshot},
    stats::Figures,
    status::{Memory, Status},
};
use crate::program::{
    component::Component,
    net::socket::with_remedy,
    node::{Node, NodeEvent},
    tally::Tally,
};

/// How often to look.
const EVERY: Duration = Duration::from_secs(1);

/// How long somebody is interested who asked for the status: the page asks again after two seconds.
const INTEREST: Duration = Duration::from_secs(5);

/// What serves `--http`, on the relay's thread.
pub struct Watch {
    metrics: Metrics,
    memory: Memory,
    latest: Arc<LatestSnapshot>,
    /// Until when somebody is interested in the status.
    interest: Option<Instant>,
    next_look: Delay,
}

impl Watch {
    /// Listens on the address of `--http` and serves it.
    ///
    /// # Errors
    ///
    /// When the address cannot be listened on.
    pub fn start(address: SocketAddr, node: &Node) -> Result<Self> {
        let listener = TcpListener::bind(address).map_err(|error| with_remedy(&error));
        let listener = listener.with_context(|| format!("--http {address}"))?;
        let address = listener.local_addr().context("--http")?;
        let now = Instant::now();
        let (metrics, registry) = Metrics::new();
        let mut memory = Memory::new(now);
        let snapshot = look(node, false, false, &metrics, &mut memory);
        let latest = Arc::new(LatestSnapshot::new(snapshot));
        server::start(listener, Site::new(Arc::clone(&latest), registry))
            .with_context(|| format!("--http {address}"))?;
        log::info!("watch it at http://{address}/");
        if !address.ip().is_loopback() {
            log::warn!(
                "--http {address}: whoever can reach it sees who uses this relay, and from where"
            );
        }
        Ok(Self { metrics, memory, latest, interest: None, next_look: Delay::new(EVERY) })
    }
}

impl Component for Watch {
    fn poll_due(&mut self, cx: &mut task::Context<'_>) -> Poll<()> {
        self.next_look.poll_unpin(cx)
    }

    fn on_event(&mut self, event: &NodeEvent) {
        let now = Instant::now();
        if let Some(tally) = Tally::of(event) {
            self.metrics.count(&tally);
            self.memory.refusals.note(&tally, now);
        }
        if let NodeEvent::Relay(event) = event {
            self.metrics.note(event);
        }
    }

    /// Publishes how the relay is now.
    fn on_due(&mut self, node: &mut Node) {
        let now = Instant::now();
        if self.latest.take_request() {
            self.interest = Some(now + INTEREST);
        }
        let whole = self.interest.is_some_and(|until| now < until);
        let snapshot =
            look(node, node.relay().is_draining(), whole, &self.metrics, &mut self.memory);
        self.latest.publish(snapshot);
        self.next_look.reset(EVERY);
    }
}

/// What there is to be told now: with the whole status, or without.
fn look(
    node: &Node,
    draining: bool,
    whole: bool,
    metrics: &Metrics,
    memory: &mut Memory,
) -> Snapshot {
    let now = Instant::now();
    let figures = Figures::of(node, draining);
    metrics.show(&figures);
    memory.note(&figures, now);
    Snapshot { at: now, draining, status: whole.then(|| Status::of(node, &figures, memory, now)) }
}

#[cfg(test)]
mod tests {
    use std::{future::poll_fn, pin::pin};

    use hyper::{Request, body::Body};
    use libp2p::{futures::executor::block_on, identity::Keypair};

    use super::*;
    use crate::config::Config;

    /// What there is to be seen of a relay that told of itself `ago`.
    fn published(draining: bool, whole: bool, ago: Duration) -> (Arc<LatestSnapshot>, Site) {
        let keypair = Keypair::generate_ed25519();
        let node = Node::new(keypair, Config::default()).unwrap();
        let (metrics, registry) = Metrics::new();
        let mut memory = Memory::new(Instant::now());
        let mut snapshot = look(&node, draining, whole, &metrics, &mut memory);
        snapshot.at = snapshot.at.checked_sub(ago).unwrap();
        let latest = Arc::new(LatestSnapshot::new(snapshot));
        (Arc::clone(&latest), Site::new(latest, registry))
    }

    fn site(draining: bool, ago: Duration) -> Site {
        published(draining, true, ago).1
    }

    /// The status of an answer, and what it says.
    fn get(site: &Site, path: &str) -> (u16, String) {
        let Poll::Ready(answer) = site.answer(&Request::get(path).body(()).unwrap()) else {
            panic!("{path} is not there yet");
        };
        let status = answer.status().as_u16();
        let mut body = pin!(answer.into_body());
        let frame = block_on(poll_fn(|cx| body.as_mut().poll_frame(cx)));
        let bytes = frame.unwrap().unwrap().into_data().unwrap();
        (status, String::from_utf8(bytes.to_vec()).unwrap())
    }

    #[test]
    fn the_status_is_made_for_those_who_ask() {
        let (latest, site) = published(false, false, Duration::ZERO);
        assert_eq!(get(&site, "/healthz").0, 200);
        assert_eq!(get(&site, "/metrics").0, 200);
        assert!(!latest.take_request(), "nobody wants it");
        let request = Request::get("/status.json").body(()).unwrap();
        assert!(site.answer(&request).is_pending());
        assert!(latest.take_request());
    }

    #[test]
    fn a_relay_that_drains_or_is_stuck_does_not_serve() {
        let now = Duration::ZERO;
        assert_eq!(get(&site(false, now), "/healthz"), (200, "serving\n".into()));
        assert_eq!(get(&site(true, now), "/healthz"), (503, "draining\n".into()));
        let (status, text) = get(&site(false, Duration::from_secs(31)), "/healthz");
        assert_eq!(status, 503);
        assert_eq!(text, "the relay has not been heard of for 31 s\n");
    }

    #[test]
    fn draining_is_a_status_of_its_own() {
        for (draining, status) in [(false, 1), (true, 0)] {
            let site = site(draining, Duration::ZERO);
            let (_, metrics) = get(&site, "/metrics");
            let line = format!("\nlibp2p_relaysvc_status {status}\n");
            assert!(metrics.contains(&line), "{metrics}");
            let (_, json) = get(&site, "/status.json");
            assert!(json.contains(&format!("\"draining\":{draining}")), "{json}");
        }
    }
}
