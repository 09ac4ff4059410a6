//! The IP addresses of this machine, and their changes: a wildcard listener can be reached at them.
//!
//! Polled every few seconds rather than watched: that works on every system and costs a few system calls, and an address
//! that is a few seconds old has no clients yet.

use std::{
    collections::{BTreeSet, VecDeque},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, UdpSocket},
    sync::Once,
    task::{Context, Poll, ready},
    time::Duration,
};

use futures_timer::Delay;
use libp2p::futures::FutureExt;

/// How often the addresses are listed.
const POLL_INTERVAL: Duration = Duration::from_secs(5);

/// A change of the machine's addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Change {
    Up(IpAddr),
    Down(IpAddr),
}

/// The addresses as they were last listed.
#[derive(Default)]
pub(crate) struct Interfaces {
    known: BTreeSet<IpAddr>,
    changes: VecDeque<Change>,
    /// `None`: they were not listed yet.
    next_poll: Option<Delay>,
}

impl Interfaces {
    /// Returns the next change. At first every address is one.
    pub(crate) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Change> {
        loop {
            if let Some(change) = self.changes.pop_front() {
                return Poll::Ready(change);
            }
            if let Some(next_poll) = &mut self.next_poll {
                ready!(next_poll.poll_unpin(cx));
            }
            self.next_poll = Some(Delay::new(POLL_INTERVAL));
            match if_addrs::get_if_addrs() {
                Ok(found) => self.update(found.iter().map(if_addrs::Interface::ip).collect()),
                Err(error) if self.known.is_empty() => {
                    // Logged once for all listeners.
                    static LOGGED: Once = Once::new();
                    LOGGED.call_once(|| {
                        log::warn!(
                            "listing this machine's addresses failed: {error}; the relay sends each client the one \
                             that it connected to, and logs none; name others with --announce"
                        );
                    });
                    // The system does not list them, as on Android.
                    let any = [Ipv4Addr::UNSPECIFIED.into(), Ipv6Addr::UNSPECIFIED.into()];
                    self.update(any.into());
                }
                Err(error) => log::debug!("listing this machine's addresses failed: {error}"),
            }
        }
    }

    fn update(&mut self, mut found: BTreeSet<IpAddr>) {
        // A multiaddr cannot name the interface, without which an IPv6 link-local address cannot be dialed.
        found.retain(|ip| !matches!(ip, IpAddr::V6(ip) if ip.is_unicast_link_local()));
        self.changes.extend(self.known.difference(&found).copied().map(Change::Down));
        self.changes.extend(found.difference(&self.known).copied().map(Change::Up));
        self.known = found;
    }
}

/// Whether the machine has an address of the same IP version.
///
/// With IPv6 switched off, a socket can be bound to `::` all the same.
pub(crate) fn has_version_of(ip: IpAddr) -> bool {
    let found = if_addrs::get_if_addrs();
    found.map_or(true, |found| found.iter().any(|own| own.ip().is_ipv6() == ip.is_ipv6()))
}

/// The IPv4 address from which this machine reaches the internet, if it has a route there.
pub(crate) fn outbound_ip() -> Option<IpAddr> {
    let socket = UdpSocket::bind("0.0.0.0:0").ok()?;
    // Sends nothing: connecting a datagram socket only looks up the route.
    socket.connect("192.0.2.1:9").ok()?;
    socket.local_addr().ok().map(|address| address.ip())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn new_and_gone_addresses_are_reported() {
        let [home, work, local] =
            ["192.168.1.2", "10.0.0.2", "fe80::1"].map(|ip| ip.parse().unwrap());
        let mut interfaces = Interfaces::default();
        interfaces.update([home, local].into());
        assert_eq!(interfaces.changes, [Change::Up(home)]);
        interfaces.changes.clear();
        interfaces.update([home, local].into());
        assert!(interfaces.changes.is_empty());
        interfaces.update([work].into());
        assert_eq!(interfaces.changes, [Change::Down(home), Change::Up(work)]);
    }
}
