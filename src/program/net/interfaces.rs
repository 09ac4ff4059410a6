//! The addresses of this machine, and how they change: what a wildcard listener can be reached at.
//!
//! Looked up again and again rather than watched: it works the same everywhere, costs a few system
//! calls, and an address that is a few seconds old has no clients yet.

use std::{
    collections::{BTreeSet, VecDeque},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, UdpSocket},
    sync::Once,
    task::{Context, Poll, ready},
    time::Duration,
};

use futures_timer::Delay;
use libp2p::futures::FutureExt;

/// What stands for the machine's addresses where the system does not tell them, as on Android.
const UNSPECIFIED_IPV4: IpAddr = IpAddr::V4(Ipv4Addr::UNSPECIFIED);
const UNSPECIFIED_IPV6: IpAddr = IpAddr::V6(Ipv6Addr::UNSPECIFIED);

/// How often to look.
const INTERVAL: Duration = Duration::from_secs(5);

/// An address of this machine that came or went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Change {
    Up(IpAddr),
    Down(IpAddr),
}

/// The addresses as they were last seen.
pub(crate) struct Interfaces {
    known: BTreeSet<IpAddr>,
    changes: VecDeque<Change>,
    next_look: Delay,
}

impl Interfaces {
    pub(crate) fn new() -> Self {
        Self {
            known: BTreeSet::new(),
            changes: VecDeque::new(),
            next_look: Delay::new(Duration::ZERO),
        }
    }

    /// The next change. At first every address is one.
    pub(crate) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Change> {
        loop {
            if let Some(change) = self.changes.pop_front() {
                return Poll::Ready(change);
            }
            ready!(self.next_look.poll_unpin(cx));
            self.next_look.reset(INTERVAL);
            match if_addrs::get_if_addrs() {
                Ok(found) => self.seen(found.iter().map(if_addrs::Interface::ip).collect()),
                Err(error) if self.known.is_empty() => {
                    // Once for all listeners.
                    static TOLD: Once = Once::new();
                    TOLD.call_once(|| {
                        log::warn!(
                            "this system does not tell the machine's addresses: {error}; each client is told the one \
                             that it reached, and none is in the log; give others with --announce"
                        );
                    });
                    self.seen([UNSPECIFIED_IPV4, UNSPECIFIED_IPV6].into());
                }
                Err(error) => log::debug!("the machine does not tell its addresses: {error}"),
            }
        }
    }

    fn seen(&mut self, mut found: BTreeSet<IpAddr>) {
        found.retain(is_dialable);
        let gone = self.known.difference(&found).copied().map(Change::Down);
        self.changes.extend(gone);
        let new = found.difference(&self.known).copied().map(Change::Up);
        self.changes.extend(new);
        self.known = found;
    }
}

/// Whether the machine has any address of the same family as `ip`.
///
/// Where IPv6 is switched off, sockets can be bound to `::` all the same.
pub(crate) fn has_one_like(ip: IpAddr) -> bool {
    let found = if_addrs::get_if_addrs();
    found.map_or(true, |found| found.iter().any(|own| own.ip().is_ipv6() == ip.is_ipv6()))
}

/// The IPv4 address with which this machine goes out, if it has a way out.
pub(crate) fn way_out() -> Option<IpAddr> {
    let socket = UdpSocket::bind("0.0.0.0:0").ok()?;
    // Nothing is sent; connecting a datagram socket is to look up the route.
    socket.connect("192.0.2.1:9").ok()?;
    socket.local_addr().ok().map(|address| address.ip())
}

/// An IPv6 link-local address means nothing without the interface's name, which a multiaddr lacks.
fn is_dialable(ip: &IpAddr) -> bool {
    match ip {
        IpAddr::V4(_) => true,
        IpAddr::V6(ip) => !ip.is_unicast_link_local(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_told_when_they_come_and_when_they_go() {
        let [home, work, local] =
            ["192.168.1.2", "10.0.0.2", "fe80::1"].map(|ip| ip.parse().unwrap());
        let mut interfaces = Interfaces::new();
        interfaces.seen([home, local].into());
        assert_eq!(interfaces.changes, [Change::Up(home)]);
        interfaces.changes.clear();
        interfaces.seen([home, local].into());
        assert!(interfaces.changes.is_empty());
        interfaces.seen([work].into());
        assert_eq!(interfaces.changes, [Change::Down(home), Change::Up(work)]);
    }
}
