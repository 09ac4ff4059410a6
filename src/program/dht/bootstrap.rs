//! The nodes by which the relay comes into a DHT: who they are, and when which is tried again.
//!
//! They are asked while nobody else in the DHT is known to answer, each after a pause that grows:
//! one that cannot be reached delays nothing.

use std::{
    io,
    net::SocketAddr,
    time::{Duration, Instant},
};

use async_std::net::ToSocketAddrs;
use libp2p::{Multiaddr, PeerId, multiaddr::Protocol};

use crate::program::net::multiaddr;

/// After which pause a node is tried again: the first time, and at most.
const FIRST_PAUSE: Duration = Duration::from_secs(2);
const LONGEST_PAUSE: Duration = Duration::from_secs(5 * 60);

/// What to do about `/dnsaddr`, which libp2p's own nodes are known by.
const NO_TEXT_RECORDS: &str = "this relay does not read what DNS has as text; name the /ip4 or /dns4 \
                               address with /tcp that `dig +short TXT _dnsaddr.<name>` leads to";

/// How long to leave a node alone that was tried this many times before.
///
/// Twice as long each time, from two seconds to five minutes; `jitter` makes it up to a quarter
/// less, so that a fleet that lost its node does not come back in step.
pub fn pause(attempts: u32, jitter: u8) -> Duration {
    let whole = 2u32
        .checked_pow(attempts)
        .and_then(|times| FIRST_PAUSE.checked_mul(times))
        .map_or(LONGEST_PAUSE, |pause| pause.min(LONGEST_PAUSE));
    whole - whole / 4 * u32::from(jitter) / u32::from(u8::MAX)
}

/// Who and where a node is that was named by this address.
///
/// # Errors
///
/// What is wrong with it and the remedy, to stand behind the address.
pub fn named(address: &Multiaddr) -> Result<(PeerId, Multiaddr), String> {
    let mut at = address.clone();
    let Some(Protocol::P2p(peer)) = at.pop() else {
        return Err(format!(
            "says where and not who; put the node's id behind it: {address}/p2p/12D3KooW…"
        ));
    };
    let begins_with = |wanted: fn(&Protocol) -> bool| at.iter().next().is_some_and(|p| wanted(&p));
    match multiaddr::dialable(&at).is_some() || name(&at).is_some() {
        true => Ok((peer, at)),
        false if begins_with(|part| matches!(part, Protocol::Dnsaddr(_))) => {
            Err(NO_TEXT_RECORDS.into())
        }
        false => Err("this relay dials TCP; try /ip4/…/tcp/4001/p2p/12D3KooW…".into()),
    }
}

/// The name and the port to look up.
fn name(address: &Multiaddr) -> Option<(String, u16)> {
    let mut parts = address.iter();
    let (Protocol::Dns(name) | Protocol::Dns4(name) | Protocol::Dns6(name)) = parts.next()? else {
        return None;
    };
    match (parts.next(), parts.next()) {
        (Some(Protocol::Tcp(port)), None) if port != 0 => Some((name.into_owned(), port)),
        _ => None,
    }
}

/// Whether what was found for a name is of the family that is asked for.
fn is_asked_for(address: &Multiaddr, found: &SocketAddr) -> bool {
    match address.iter().next() {
        Some(Protocol::Dns4(_)) => found.is_ipv4(),
        Some(Protocol::Dns6(_)) => found.is_ipv6(),
        _ => true,
    }
}

/// The addresses to dial for these: as they are, or what the system knows of a name.
///
/// # Errors
///
/// When there is none, because of the last name that could not be looked up.
pub async fn look_up(addresses: Vec<Multiaddr>) -> io::Result<Vec<Multiaddr>> {
    let mut found = Vec::new();
    let mut trouble = None;
    for address in addresses {
        let Some((name, port)) = name(&address) else {
            found.push(address);
            continue;
        };
        match (name.as_str(), port).to_socket_addrs().await {
            Ok(all) => {
                let fit = all.filter(|one| is_asked_for(&address, one));
                found.extend(fit.map(multiaddr::multiaddr));
            }
            Err(error) => trouble = Some(error),
        }
    }
    match (found.is_empty(), trouble) {
        (true, Some(error)) => Err(error),
        _ => Ok(found),
    }
}

/// One node, and how it went with it so far.
#[derive(Debug)]
pub struct Bootstrap {
    /// Who it is.
    pub peer: PeerId,
    /// Where it is, by the operator's word.
    pub addresses: Vec<Multiaddr>,
    attempts: u32,
    /// When to try it; not while it is being tried.
    due: Option<Instant>,
    /// What was last told of it, if that is bad news.
    trouble: Option<String>,
}

/// All of them.
#[derive(Debug)]
pub struct Bootstraps(Vec<Bootstrap>);

impl Bootstraps {
    /// Those at these addresses, all to be tried at `now`, but for `local`, which is the relay: a
    /// fleet may share one list.
    pub fn new(addresses: &[Multiaddr], local: PeerId, now: Instant) -> Self {
        let mut nodes: Vec<Bootstrap> = Vec::new();
        for (peer, address) in addresses.iter().filter_map(|address| named(address).ok()) {
            match nodes.iter_mut().find(|node| node.peer == peer) {
                _ if peer == local => {}
                Some(node) => node.addresses.push(address),
                None => nodes.push(Bootstrap {
                    peer,
                    addresses: vec![address],
                    attempts: 0,
                    due: Some(now),
                    trouble: None,
                }),
            }
        }
        Self(nodes)
    }

    /// All addresses.
    pub fn addresses(&self) -> impl Iterator<Item = &Multiaddr> {
        self.0.iter().flat_map(|node| &node.addresses)
    }

    /// When the next one is to be tried.
    pub fn due(&self) -> Option<Instant> {
        self.0.iter().filter_map(|node| node.due).min()
    }

    /// One that is to be tried now. It is not due again before [`Bootstraps::tried`].
    pub fn next(&mut self, now: Instant) -> Option<&Bootstrap> {
        let due = |node: &&mut Bootstrap| node.due.is_some_and(|due| due <= now);
        let node = self.0.iter_mut().find(due)?;
        node.due = None;
        Some(node)
    }

    /// It is to be tried again after its pause.
    pub fn later(&mut self, peer: &PeerId, jitter: u8, now: Instant) -> Option<&mut Bootstrap> {
        let node = self.0.iter_mut().find(|node| node.peer == *peer)?;
        node.due = Some(now + pause(node.attempts, jitter));
        node.attempts = node.attempts.saturating_add(1);
        Some(node)
    }

    /// It was tried, and came to this. What is new about it, to be told.
    pub fn tried(
        &mut self,
        peer: &PeerId,
        came_to: Result<(), String>,
        jitter: u8,
        now: Instant,
    ) -> Option<Result<(), String>> {
        let node = self.later(peer, jitter, now)?;
        let before = std::mem::replace(&mut node.trouble, came_to.clone().err());
        (node.trouble != before).then_some(came_to)
    }

    /// It takes part in the DHT: when next it is not to be found, it is tried soon.
    pub fn takes_part(&mut self, peer: &PeerId) {
        if let Some(node) = self.0.iter_mut().find(|node| node.peer == *peer) {
            node.attempts = 0;
        }
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
        fn pauses_grow_from_seconds_to_minutes_whatever_the_jitter(
            attempts in 0u32.., jitter: u8, other: u8
        ) {
            let (this, next) = (pause(attempts, jitter), pause(attempts.saturating_add(1), other));
            assert!(this >= FIRST_PAUSE * 3 / 4 && this <= LONGEST_PAUSE);
            assert!(next > this || next >= LONGEST_PAUSE * 3 / 4);
            assert!(pause(attempts, 0) >= this);
        }
    }

    #[test]
    fn the_pauses_are_two_seconds_twice_as_much_each_time_and_five_minutes() {
        let pauses: Vec<_> = (0..10).map(|n| pause(n, 0).as_secs()).collect();
        assert_eq!(pauses, [2, 4, 8, 16, 32, 64, 128, 256, 300, 300]);
        assert_eq!(pause(0, u8::MAX), Duration::from_millis(1500));
    }

    #[test]
    fn a_node_is_an_id_and_where_to_dial() {
        let peer = PeerId::random();
        for at in [
            "/ip4/192.0.2.1/tcp/4001",
            "/ip6/2001:db8::1/tcp/4001",
            "/dns4/node.example.org/tcp/4001",
        ] {
            let whole = address(&format!("{at}/p2p/{peer}"));
            assert_eq!(named(&whole), Ok((peer, address(at))));
            let nobody = named(&address(at)).unwrap_err();
            assert!(nobody.contains(&format!("{at}/p2p/")), "{nobody}");
        }
        for (at, remedy) in [
            ("/dnsaddr/bootstrap.libp2p.io", "dig +short TXT"),
            ("/ip4/192.0.2.1/udp/4001/quic-v1", "dials TCP"),
            ("/ip4/192.0.2.1/tcp/0", "dials TCP"),
            ("/ip4/192.0.2.1/tcp/4001/ws", "dials TCP"),
            ("/dns4/node.example.org", "dials TCP"),
        ] {
            let problem = named(&address(&format!("{at}/p2p/{peer}"))).unwrap_err();
            assert!(problem.contains(remedy), "{at}: {problem}");
        }
    }

    #[test]
    fn a_name_is_looked_up_and_its_family_kept_to() {
        async_std::task::block_on(async {
            let plain = address("/ip4/192.0.2.1/tcp/1");
            let named = address("/dns4/localhost/tcp/2");
            let found = look_up(vec![plain.clone(), named]).await.unwrap();
            assert_eq!(found, [plain, address("/ip4/127.0.0.1/tcp/2")]);
        });
    }

    #[test]
    fn a_node_is_tried_at_once_then_after_pauses_and_news_of_it_told_once() {
        let (alice, local) = (PeerId::random(), PeerId::random());
        let start = Instant::now();
        let named = |at: &str, who: PeerId| address(&format!("{at}/p2p/{who}"));
        let addresses = [
            named("/ip4/192.0.2.1/tcp/1", alice),
            named("/ip4/192.0.2.2/tcp/1", local),
            named("/ip6/2001:db8::1/tcp/1", alice),
        ];
        let mut nodes = Bootstraps::new(&addresses, local, start);
        assert_eq!(nodes.addresses().count(), 2);
        let down = || Err("refused".to_owned());
        let mut now = start;
        for attempts in 0..4 {
            assert_eq!(nodes.next(now).unwrap().peer, alice);
            assert!(nodes.next(now).is_none(), "it is being tried");
            let news = nodes.tried(&alice, down(), 0, now);
            assert_eq!(news, (attempts == 0).then(down));
            let due = nodes.due().unwrap();
            assert_eq!(due, now + pause(attempts, 0));
            now = due;
        }
        assert_eq!(nodes.tried(&alice, Ok(()), 0, now), Some(Ok(())));
        assert_eq!(nodes.tried(&alice, Ok(()), 0, now), None);
        nodes.takes_part(&alice);
        nodes.tried(&alice, down(), 0, now);
        assert_eq!(nodes.due(), Some(now + FIRST_PAUSE));
    }
}
