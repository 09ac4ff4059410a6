//! The relay as it is watched over HTTP: what it tells of itself, once a second.
//!
//! On the thread of the relay: it counts events, and posts what there is to see on a board. Callers
//! are served by a thread of its own ([`super::http`]), which reads the board and nothing else. The
//! lists are long, so they are only made while somebody asks for them.

use std::{
    mem,
    net::TcpListener,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use futures_timer::Delay;

use super::{
    flags::Flags,
    http,
    metrics::Metrics,
    node::{Node, NodeEvent},
    site::Site,
    status::{Figures, Memory, Status},
    transport::with_remedy,
};
use crate::event::Event;

/// How often to look.
const EVERY: Duration = Duration::from_secs(1);

/// How long somebody is interested who asked for the status: the page asks again after two seconds.
const INTEREST: Duration = Duration::from_secs(5);

/// Where the two threads meet. Each holds it for as long as a pointer takes to copy.
#[derive(Debug)]
pub struct Board {
    posted: Mutex<Arc<Posted>>,
    asked: AtomicBool,
}

/// What the relay told of itself, and when.
#[derive(Debug)]
pub struct Posted {
    pub at: Instant,
    pub draining: bool,
    /// If somebody asked for it lately.
    pub status: Option<Status>,
}

impl Board {
    fn new(posted: Posted) -> Self {
        Self {
            posted: Mutex::new(Arc::new(posted)),
            asked: AtomicBool::new(false),
        }
    }

    fn post(&self, posted: Posted) {
        let before = mem::replace(&mut *self.lock(), Arc::new(posted));
        drop(before); // it may be long: after the lock
    }

    /// What was posted last.
    pub fn read(&self) -> Arc<Posted> {
        Arc::clone(&self.lock())
    }

    /// Asks for the status to be posted, if it is not.
    pub fn ask(&self) {
        self.asked.store(true, Ordering::Relaxed);
    }

    fn lock(&self) -> MutexGuard<'_, Arc<Posted>> {
        self.posted.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The watch that is kept, if the operator asked for it.
pub struct Watch(Option<Kept>);

struct Kept {
    metrics: Metrics,
    memory: Memory,
    board: Arc<Board>,
    /// Until when somebody is interested in the status.
    interest: Option<Instant>,
    next_look: Delay,
}

impl Watch {
    /// Begins, and serves whoever asks.
    ///
    /// # Errors
    ///
    /// When the address cannot be listened on.
    pub fn start(flags: &Flags, node: &Node) -> Result<Self> {
        let Some(address) = flags.http else {
            return Ok(Self(None));
        };
        let listener = TcpListener::bind(address).map_err(|error| with_remedy(&error));
        let listener = listener.with_context(|| format!("--http {address}"))?;
        let address = listener.local_addr().context("--http")?;
        let now = Instant::now();
        let (metrics, registry) = Metrics::new();
        let mut memory = Memory::new(now);
        let posted = look(node, false, false, &metrics, &mut memory);
        let board = Arc::new(Board::new(posted));
        http::start(listener, Site::new(Arc::clone(&board), registry))
            .with_context(|| format!("--http {address}"))?;
        log::info!("watch it at http://{address}/");
        if !address.ip().is_loopback() {
            log::warn!(
                "--http {address}: whoever can reach it sees who uses this relay, and from where"
            );
        }
        Ok(Self(Some(Kept {
            metrics,
            memory,
            board,
            interest: None,
            next_look: Delay::new(EVERY),
        })))
    }

    /// Something happened.
    pub fn note(&mut self, event: &NodeEvent) {
        let Some(kept) = &mut self.0 else {
            return;
        };
        let now = Instant::now();
        kept.metrics.note(event);
        kept.memory.refusals.note(event, now);
        match event {
            NodeEvent::Relay(Event::CircuitOpened {
                circuit,
                source,
                target,
            }) => kept.memory.circuits.opened(*circuit, *source, *target, now),
            NodeEvent::Relay(Event::CircuitClosed { circuit, .. }) => {
                if let Some(lasted) = kept.memory.circuits.closed(*circuit, now) {
                    kept.metrics.circuit_lasted(lasted);
                }
            }
            NodeEvent::Relay(Event::PeerSilent { .. }) => kept.memory.unanswered += 1,
            _ => {}
        }
    }

    /// Resolves when it is time to [`look`](Self::look): never, if there is no watch.
    pub async fn due(&mut self) {
        match &mut self.0 {
            Some(kept) => (&mut kept.next_look).await,
            None => std::future::pending().await,
        }
    }

    /// Tells how it is now.
    pub fn look(&mut self, node: &Node, draining: bool) {
        let Some(kept) = &mut self.0 else {
            return;
        };
        let now = Instant::now();
        if kept.board.asked.swap(false, Ordering::Relaxed) {
            kept.interest = Some(now + INTEREST);
        }
        let whole = kept.interest.is_some_and(|until| now < until);
        let posted = look(node, draining, whole, &kept.metrics, &mut kept.memory);
        kept.board.post(posted);
        kept.next_look.reset(EVERY);
    }
}

/// What there is to be told now: with the whole status, or without.
fn look(
    node: &Node,
    draining: bool,
    whole: bool,
    metrics: &Metrics,
    memory: &mut Memory,
) -> Posted {
    let now = Instant::now();
    let figures = Figures::of(node, draining);
    metrics.show(&figures);
    memory.note(&figures, now);
    Posted {
        at: now,
        draining,
        status: whole.then(|| Status::of(node, &figures, memory, now)),
    }
}

#[cfg(test)]
mod tests {
    use std::{future::poll_fn, pin::pin, task::Poll};

    use hyper::{Request, body::Body};
    use libp2p::{futures::executor::block_on, identity::Keypair};

    use super::*;
    use crate::config::Config;

    /// What there is to be seen of a relay that told of itself `ago`.
    fn posted(draining: bool, whole: bool, ago: Duration) -> (Arc<Board>, Site) {
        let keypair = Keypair::generate_ed25519();
        let node = Node::new(keypair, Config::default()).unwrap();
        let (metrics, registry) = Metrics::new();
        let mut memory = Memory::new(Instant::now());
        let mut posted = look(&node, draining, whole, &metrics, &mut memory);
        posted.at = posted.at.checked_sub(ago).unwrap();
        let board = Arc::new(Board::new(posted));
        (Arc::clone(&board), Site::new(board, registry))
    }

    fn site(draining: bool, ago: Duration) -> Site {
        posted(draining, true, ago).1
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
        let (board, site) = posted(false, false, Duration::ZERO);
        assert_eq!(get(&site, "/healthz").0, 200);
        assert_eq!(get(&site, "/metrics").0, 200);
        assert!(!board.asked.load(Ordering::Relaxed), "nobody wants it");
        let request = Request::get("/status.json").body(()).unwrap();
        assert!(site.answer(&request).is_pending());
        assert!(board.asked.load(Ordering::Relaxed));
    }

    #[test]
    fn a_relay_that_drains_or_is_stuck_does_not_serve() {
        let now = Duration::ZERO;
        assert_eq!(
            get(&site(false, now), "/healthz"),
            (200, "serving\n".into())
        );
        assert_eq!(
            get(&site(true, now), "/healthz"),
            (503, "draining\n".into())
        );
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
