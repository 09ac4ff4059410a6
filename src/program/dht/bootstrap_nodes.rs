//! The bootstrap nodes: the operator's way into a DHT, and when each is dialed again.
//!
//! They are dialed while no node of the DHT is known to answer, each with an exponential backoff of its own, so that
//! one that cannot be reached does not delay the others.

use std::{
    io,
    net::SocketAddr,
    time::{Duration, Instant},
};

use async_std::net::ToSocketAddrs;
use libp2p::{Multiaddr, PeerId, multiaddr::Protocol};

use super::address_range::dns_name;
use crate::program::net::multiaddr;

/// The backoff of a node: the first one, and the longest.
const FIRST_BACKOFF: Duration = Duration::from_secs(2);
const MAX_BACKOFF: Duration = Duration::from_secs(5 * 60);

/// The remedy for `/dnsaddr`, the form in which libp2p's public nodes are published.
const NO_TEXT_RECORDS: &str = "this relay does not look up DNS TXT records; name the /ip4 or /dns4 \
                               address with /tcp that `dig +short TXT _dnsaddr.<name>` leads to";

/// The backoff of a node after this many attempts.
///
/// It doubles from two seconds to five minutes. `jitter` takes off up to a quarter, so that relays that lost the same
/// node do not dial it in step.
pub fn backoff(attempts: u32, jitter: u8) -> Duration {
    let whole = FIRST_BACKOFF.saturating_mul(2u32.saturating_pow(attempts)).min(MAX_BACKOFF);
    whole - whole / 4 * u32::from(jitter) / u32::from(u8::MAX)
}

/// Parses the address of a bootstrap node: its peer id, and where to dial it.
///
/// # Errors
///
/// The problem and the remedy, to follow the address in a message.
pub fn parse(address: &Multiaddr) -> Result<(PeerId, Multiaddr), String> {
    let mut at = address.clone();
    let Some(Protocol::P2p(peer)) = at.pop() else {
        return Err(format!(
            "lacks the node's peer id; add it at the end: {address}/p2p/12D3KooW…"
        ));
    };
    if multiaddr::dialable(&at).is_some() || dns_name(&at).is_some() {
        return Ok((peer, at));
    }
    match at.iter().next() {
        Some(Protocol::Dnsaddr(_)) => Err(NO_TEXT_RECORDS.into()),
        _ => Err("this relay dials TCP; try /ip4/…/tcp/4001/p2p/12D3KooW…".into()),
    }
}

/// Whether a resolved address is of the IP version that `address` names.
fn is_of_version(address: &Multiaddr, resolved: &SocketAddr) -> bool {
    match address.iter().next() {
        Some(Protocol::Dns4(_)) => resolved.is_ipv4(),
        Some(Protocol::Dns6(_)) => resolved.is_ipv6(),
        _ => true,
    }
}

/// Resolves the names in these addresses. Keeps the other addresses as they are.
///
/// # Errors
///
/// If there is no address to dial: the last failed lookup, or that no name has an address of its IP version.
pub async fn resolve(addresses: Vec<Multiaddr>) -> io::Result<Vec<Multiaddr>> {
    let mut resolved = Vec::new();
    let mut failure = None;
    for address in addresses {
        let Some((name, port)) = dns_name(&address) else {
            resolved.push(address);
            continue;
        };
        match (name.as_str(), port).to_socket_addrs().await {
            Ok(all) => {
                let of_version = all.filter(|one| is_of_version(&address, one));
                resolved.extend(of_version.map(multiaddr::multiaddr));
            }
            Err(error) => failure = Some(error),
        }
    }
    let none = || io::Error::other("the name has no address of its IP version");
    if resolved.is_empty() { Err(failure.unwrap_or_else(none)) } else { Ok(resolved) }
}

/// A bootstrap node.
#[derive(Debug)]
pub struct BootstrapNode {
    /// Its peer id.
    pub peer: PeerId,
    /// Its addresses without the peer id, names not resolved.
    pub addresses: Vec<Multiaddr>,
    attempts: u32,
    /// When to dial it; `None` while it is being dialed.
    due: Option<Instant>,
    /// The problem that was reported last; `None` before the first attempt and after a success.
    problem: Option<String>,
}

/// All bootstrap nodes.
#[derive(Debug)]
pub struct BootstrapNodes(Vec<BootstrapNode>);

impl BootstrapNodes {
    /// The nodes at these addresses, all due at `now`. Skips `local`, which is the relay, so that several relays can
    /// share one list.
    pub fn new(addresses: &[Multiaddr], local: PeerId, now: Instant) -> Self {
        let mut nodes: Vec<BootstrapNode> = Vec::new();
        for (peer, address) in addresses.iter().filter_map(|address| parse(address).ok()) {
            match nodes.iter_mut().find(|node| node.peer == peer) {
                _ if peer == local => {}
                Some(node) => node.addresses.push(address),
                None => nodes.push(BootstrapNode {
                    peer,
                    addresses: vec![address],
                    attempts: 0,
                    due: Some(now),
                    problem: None,
                }),
            }
        }
        Self(nodes)
    }

    /// The addresses of all nodes.
    pub fn addresses(&self) -> impl Iterator<Item = &Multiaddr> {
        self.0.iter().flat_map(|node| &node.addresses)
    }

    /// When the next node is due.
    pub fn due(&self) -> Option<Instant> {
        self.0.iter().filter_map(|node| node.due).min()
    }

    /// Returns a node that is due. It is not due again before [`Self::on_attempt`] or [`Self::back_off`].
    pub fn next(&mut self, now: Instant) -> Option<&BootstrapNode> {
        let is_due = |node: &&mut BootstrapNode| node.due.is_some_and(|due| due <= now);
        let node = self.0.iter_mut().find(is_due)?;
        node.due = None;
        Some(node)
    }

    /// Makes a node due after its backoff, which grows. Returns it; `None` if there is no such node.
    pub fn back_off(
        &mut self,
        peer: &PeerId,
        jitter: u8,
        now: Instant,
    ) -> Option<&mut BootstrapNode> {
        let node = self.node(peer)?;
        node.due = Some(now + backoff(node.attempts, jitter));
        node.attempts = node.attempts.saturating_add(1);
        Some(node)
    }

    /// Handles the result of an attempt. Returns it if it is to be logged: a new problem, or a success after a problem.
    pub fn on_attempt(
        &mut self,
        peer: &PeerId,
        result: Result<(), String>,
        jitter: u8,
        now: Instant,
    ) -> Option<Result<(), String>> {
        let node = self.back_off(peer, jitter, now)?;
        let last = std::mem::replace(&mut node.problem, result.clone().err());
        (node.problem != last).then_some(result)
    }

    /// Resets the backoff of a node that serves the DHT: when it is lost, it is dialed soon.
    pub fn reset_backoff(&mut self, peer: &PeerId, now: Instant) {
        if let Some(node) = self.node(peer) {
            node.attempts = 0;
            node.due = node.due.map(|due| due.min(now + FIRST_BACKOFF));
        }
    }

    fn node(&mut self, peer: &PeerId) -> Option<&mut BootstrapNode> {
        self.0.iter_mut().find(|node| node.peer == *peer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(text: &str) -> Multiaddr {
        text.parse().expect("a multiaddr")
    }

    proptest::proptest! {
        #[test]
        fn the_backoff_grows_from_seconds_to_minutes_with_any_jitter(
            attempts in 0u32.., jitter: u8, other: u8
        ) {
            let (this, next) = (backoff(attempts, jitter), backoff(attempts.saturating_add(1), other));
            assert!(this >= FIRST_BACKOFF * 3 / 4 && this <= MAX_BACKOFF);
            assert!(next > this || next >= MAX_BACKOFF * 3 / 4);
            assert!(backoff(attempts, 0) >= this);
        }
    }

    #[test]
    fn the_backoff_doubles_from_two_seconds_to_five_minutes() {
        let backoffs: Vec<_> = (0..10).map(|n| backoff(n, 0).as_secs()).collect();
        assert_eq!(backoffs, [2, 4, 8, 16, 32, 64, 128, 256, 300, 300]);
        assert_eq!(backoff(0, u8::MAX), Duration::from_millis(1500));
    }

    #[test]
    fn an_address_with_a_peer_id_that_can_be_dialed_is_a_node() {
        let peer = PeerId::random();
        for at in [
            "/ip4/192.0.2.1/tcp/4001",
            "/ip6/2001:db8::1/tcp/4001",
            "/dns4/node.example.org/tcp/4001",
        ] {
            let whole = address(&format!("{at}/p2p/{peer}"));
            assert_eq!(parse(&whole), Ok((peer, address(at))));
            let problem = parse(&address(at)).unwrap_err();
            assert!(problem.contains(&format!("{at}/p2p/")), "{problem}");
        }
        for (at, remedy) in [
            ("/dnsaddr/bootstrap.libp2p.io", "dig +short TXT"),
            ("/ip4/192.0.2.1/udp/4001/quic-v1", "dials TCP"),
            ("/ip4/192.0.2.1/tcp/0", "dials TCP"),
            ("/ip4/192.0.2.1/tcp/4001/ws", "dials TCP"),
            ("/dns4/node.example.org", "dials TCP"),
        ] {
            let problem = parse(&address(&format!("{at}/p2p/{peer}"))).unwrap_err();
            assert!(problem.contains(remedy), "{at}: {problem}");
        }
    }

    #[test]
    fn a_name_is_resolved_to_the_ip_version_that_it_names() {
        async_std::task::block_on(async {
            let plain = address("/ip4/192.0.2.1/tcp/1");
            let named = address("/dns4/localhost/tcp/2");
            let found = resolve(vec![plain.clone(), named]).await.unwrap();
            assert_eq!(found, [plain, address("/ip4/127.0.0.1/tcp/2")]);
            let none = resolve(vec![address("/dns6/127.0.0.1/tcp/2")]).await.unwrap_err();
            assert!(none.to_string().contains("no address of its IP version"), "{none}");
        });
    }

    #[test]
    fn a_node_is_dialed_at_once_then_with_backoff_and_a_changed_result_is_reported_once() {
        let (alice, local) = (PeerId::random(), PeerId::random());
        let start = Instant::now();
        let named = |at: &str, peer: PeerId| address(&format!("{at}/p2p/{peer}"));
        let addresses = [
            named("/ip4/192.0.2.1/tcp/1", alice),
            named("/ip4/192.0.2.2/tcp/1", local),
            named("/ip6/2001:db8::1/tcp/1", alice),
        ];
        let mut nodes = BootstrapNodes::new(&addresses, local, start);
        assert_eq!(nodes.addresses().count(), 2);
        let down = || Err("refused".to_owned());
        let mut now = start;
        for attempts in 0..4 {
            assert_eq!(nodes.next(now).unwrap().peer, alice);
            assert!(nodes.next(now).is_none(), "it is being dialed");
            let reported = nodes.on_attempt(&alice, down(), 0, now);
            assert_eq!(reported, (attempts == 0).then(down));
            let due = nodes.due().unwrap();
            assert_eq!(due, now + backoff(attempts, 0));
            now = due;
        }
        assert_eq!(nodes.on_attempt(&alice, Ok(()), 0, now), Some(Ok(())));
        assert_eq!(nodes.on_attempt(&alice, Ok(()), 0, now), None);
        assert!(nodes.due() > Some(now + FIRST_BACKOFF), "its backoff had grown");
        nodes.reset_backoff(&alice, now);
        assert_eq!(nodes.due(), Some(now + FIRST_BACKOFF));
        nodes.on_attempt(&alice, down(), 0, now);
        assert_eq!(nodes.due(), Some(now + FIRST_BACKOFF));
    }
}
