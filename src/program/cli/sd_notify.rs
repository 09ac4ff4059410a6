//! [sd_notify][spec]: tells the service manager that the relay is ready, alive or stopping, and how much of it is used.
//!
//! Each message is a datagram to the socket that the environment names. Not a library, because this takes a few lines and
//! the maintained crate does not support abstract sockets.
//!
//! [spec]: https://www.freedesktop.org/software/systemd/man/latest/sd_notify.html

use std::{
    env,
    ffi::OsStr,
    io, process,
    task::{Context, Poll},
    time::{Duration, SystemTime},
};

use futures_timer::Delay;
use libp2p::futures::FutureExt;
use socket2::{Domain, SockAddr, Socket, Type};

use crate::{
    program::{component::Component, node::Node},
    wall_clock,
};

/// How much longer than configured shutting down may take on a busy machine.
const SLACK: Duration = Duration::from_secs(10);

/// How long a message may wait for a service manager that does not read; the main loop waits as well.
const SEND_TIMEOUT: Duration = Duration::from_secs(1);

/// How often the status is sent, if it has changed.
const STATUS_INTERVAL: Duration = Duration::from_secs(5);

fn status(node: &Node, now: SystemTime) -> String {
    let (relay, peer) = (node.relay(), node.peer_id());
    let (slots, circuits) = (&relay.view().reservations, relay.view().circuits.open().count());
    let (taken, most) = (slots.taken(), relay.config().max_reservations);
    let plural = if circuits == 1 { "" } else { "s" };
    let not_serving = wall_clock::not_serving(relay.view().is_draining(), now);
    let state = not_serving.map(|reason| format!("{reason}; ")).unwrap_or_default();
    format!("{state}{taken} of {most} slots, {circuits} circuit{plural}; peer id {peer}")
}

/// Keeps the service manager informed: of the status that `systemctl status` shows, and, if it has a watchdog, that the
/// main loop runs. It restarts a relay whose main loop hangs.
pub struct ServiceManager {
    /// The status that was sent last.
    status: String,
    has_watchdog: bool,
    interval: Duration,
    next: Delay,
}

impl ServiceManager {
    /// Reports that every listener is open, also while the clock is not set: the manager would stop a relay that waits
    /// longer than its timeout for a start. `None` if there is no service manager.
    pub fn report_ready(node: &Node) -> Option<Self> {
        let status = status(node, SystemTime::now());
        let variable = |name| env::var(name).ok();
        let (timeout, pid) = (variable("WATCHDOG_USEC"), variable("WATCHDOG_PID"));
        let watchdog = timeout.and_then(|usec| ping_period(&usec, pid.as_deref(), process::id()));
        let interval = watchdog.unwrap_or(STATUS_INTERVAL).min(STATUS_INTERVAL);
        notify(&format!("READY=1\nSTATUS={status}")).then(|| Self {
            status,
            has_watchdog: watchdog.is_some(),
            interval,
            next: Delay::new(interval),
        })
    }
}

impl Component for ServiceManager {
    fn poll_due(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        self.next.poll_unpin(cx)
    }

    fn on_due(&mut self, node: &mut Node) {
        self.next.reset(self.interval);
        if self.has_watchdog {
            notify("WATCHDOG=1");
        }
        let status = status(node, SystemTime::now());
        if status != self.status {
            notify(&format!("STATUS={status}"));
            self.status = status;
        }
    }
}

/// Reports that the relay stops within this time. systemd's own timeout is 90 s.
pub fn report_stopping(within: Duration) {
    let timeout = within.saturating_add(SLACK).as_micros();
    notify(&format!("STOPPING=1\nEXTEND_TIMEOUT_USEC={timeout}"));
}

/// The longest time between two pings: half of the watchdog's timeout of `usec` microseconds. `None` if that is not a time, or
/// `pid` is not `this`, the id of this process.
fn ping_period(usec: &str, pid: Option<&str>, this: u32) -> Option<Duration> {
    let is_for_this = pid.is_none_or(|pid| pid.parse() == Ok(this));
    let usec = usec.parse().ok().filter(|usec| *usec > 0 && is_for_this)?;
    Some(Duration::from_micros(usec) / 2)
}

/// Sends a message, if there is a service manager; whether it was sent. The relay keeps running if not, but the manager
/// may stop it.
fn notify(state: &str) -> bool {
    let Some(socket) = env::var_os("NOTIFY_SOCKET").filter(|socket| !socket.is_empty()) else {
        return false;
    };
    let sent = send(state, &socket);
    if let Err(error) = &sent {
        let socket = socket.display();
        log::warn!("sd_notify failed: {state:?} to NOTIFY_SOCKET {socket}: {error}");
    }
    sent.is_ok()
}

/// Sends a datagram to the socket of this path, or to the abstract one of this name after an `@`.
fn send(state: &str, socket: &OsStr) -> io::Result<()> {
    let address = match socket.to_str().and_then(|socket| socket.strip_prefix('@')) {
        Some(name) => SockAddr::unix(format!("\0{name}"))?,
        None => SockAddr::unix(socket)?,
    };
    let sender = Socket::new(Domain::UNIX, Type::DGRAM, None)?;
    sender.set_write_timeout(Some(SEND_TIMEOUT))?;
    sender.send_to(state.as_bytes(), &address)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use libp2p::identity::Keypair;

    use super::*;
    use crate::config::Config;

    #[test]
    fn the_status_says_why_the_relay_does_not_serve() {
        let mut node = Node::new(Keypair::generate_ed25519(), Config::default()).unwrap();
        let (unset, set) = (SystemTime::UNIX_EPOCH, SystemTime::now());
        let used = format!("0 of 1024 slots, 0 circuits; peer id {}", node.peer_id());
        assert_eq!(status(&node, set), used);
        assert_eq!(status(&node, unset), format!("clock not set; {used}"));
        node.drain(Duration::from_secs(60));
        assert_eq!(status(&node, set), format!("draining; {used}"));
    }

    #[test]
    fn a_message_does_not_wait_for_ever_for_a_manager_that_does_not_read() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("notify");
        let _unread = std::os::unix::net::UnixDatagram::bind(&path).unwrap();
        let mut sent = (0..10_000).map(|_| send("WATCHDOG=1", path.as_os_str()));
        let full = sent.find_map(Result::err).expect("the queue of the socket is bounded");
        assert_eq!(full.kind(), io::ErrorKind::WouldBlock);
    }

    #[test]
    fn the_watchdog_interval_is_half_the_timeout_of_this_process() {
        let minute = Some(Duration::from_secs(60));
        for (usec, pid, expected) in [
            ("120000000", None, minute),
            ("120000000", Some("7"), minute),
            ("120000000", Some("8"), None),
            ("120000000", Some(""), None),
            ("0", None, None),
            ("", None, None),
            ("-1", None, None),
            ("2min", None, None),
        ] {
            assert_eq!(ping_period(usec, pid, 7), expected, "{usec} {pid:?}");
        }
    }
}
