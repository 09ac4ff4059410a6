//! Which addresses of others make sense in a DHT: whoever is in it hands out what it was told, to
//! all the world, and dials it. Pure.

use libp2p::{Multiaddr, multiaddr::Protocol};

use crate::{address, program::net::multiaddr};

/// How many addresses of one peer are kept, and dialed.
const MOST: usize = 6;

/// How many bytes one may have, so that the answer to a question, twenty peers, stays below the
/// 16 KiB that a message may have.
const MOST_BYTES: usize = 80;

/// From where an address can be dialed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Reach {
    /// From the same machine.
    Machine,
    /// From the same network.
    Network,
    /// From everywhere.
    World,
}

impl Reach {
    /// From where this one can be.
    pub fn of(at: &Multiaddr) -> Self {
        match address::ip(at) {
            _ if address::is_global(at) => Self::World,
            Some(ip) if ip.is_loopback() => Self::Machine,
            _ => Self::Network,
        }
    }

    /// Those of a peer's addresses that others can be told, in a DHT that reaches this far: never
    /// one of a network that not all of them are in.
    pub fn tellable(self, addresses: &[Multiaddr]) -> Vec<Multiaddr> {
        self.first(addresses, is_tcp)
    }

    /// Those of them that this relay can dial, too. Not names: a stranger is not to make it look up
    /// any it likes.
    pub fn dialable(self, addresses: &[Multiaddr]) -> Vec<Multiaddr> {
        self.first(addresses, |at| multiaddr::dialable(at).is_some())
    }

    fn first(self, addresses: &[Multiaddr], fit: fn(&Multiaddr) -> bool) -> Vec<Multiaddr> {
        let mut chosen: Vec<Multiaddr> = Vec::new();
        for at in addresses {
            if chosen.len() == MOST {
                break;
            }
            let at = without_peer(at);
            if Self::of(&at) >= self && fit(&at) && at.len() <= MOST_BYTES && !chosen.contains(&at)
            {
                chosen.push(at);
            }
        }
        chosen
    }
}

/// The address without the id at its end.
pub fn without_peer(at: &Multiaddr) -> Multiaddr {
    let mut at = at.clone();
    if let Some(Protocol::P2p(_)) = at.iter().last() {
        at.pop();
    }
    at
}

/// An IP address or a name, and a TCP port.
fn is_tcp(at: &Multiaddr) -> bool {
    let mut parts = at.iter();
    let host = match parts.next() {
        Some(Protocol::Ip4(ip)) => !ip.is_unspecified(),
        Some(Protocol::Ip6(ip)) => !ip.is_unspecified(),
        Some(Protocol::Dns(_) | Protocol::Dns4(_) | Protocol::Dns6(_)) => true,
        _ => false,
    };
    host && matches!((parts.next(), parts.next()), (Some(Protocol::Tcp(port)), None) if port != 0)
}

#[cfg(test)]
mod tests {
    use libp2p::PeerId;

    use super::*;

    fn addresses(texts: &[&str]) -> Vec<Multiaddr> {
        let parsed = texts.iter().map(|text| text.parse());
        parsed.collect::<Result<_, _>>().expect("multiaddrs")
    }

    const OF_ALL_KINDS: [&str; 10] = [
        "/ip4/127.0.0.1/tcp/1",
        "/ip4/0.0.0.0/tcp/1",
        "/ip4/192.168.1.7/tcp/1",
        "/ip4/8.8.8.8/tcp/1",
        "/ip4/8.8.8.8/tcp/0",
        "/ip4/8.8.8.8/udp/1/quic-v1",
        "/ip4/8.8.8.8/tcp/1/ws",
        "/dns4/relay.example.org/tcp/1",
        "/ip6/2a00:1450::1/tcp/1",
        "/memory/7",
    ];

    #[test]
    fn what_is_told_and_dialed_can_be_reached_by_all_of_the_dht() {
        let all = addresses(&OF_ALL_KINDS);
        let world = [OF_ALL_KINDS[3], OF_ALL_KINDS[7], OF_ALL_KINDS[8]];
        assert_eq!(Reach::World.tellable(&all), addresses(&world));
        let world = [OF_ALL_KINDS[3], OF_ALL_KINDS[8]];
        assert_eq!(Reach::World.dialable(&all), addresses(&world));
        let network = [OF_ALL_KINDS[2], OF_ALL_KINDS[3], OF_ALL_KINDS[8]];
        assert_eq!(Reach::Network.dialable(&all), addresses(&network));
        assert_eq!(Reach::Machine.dialable(&all).len(), 4);
    }

    #[test]
    fn a_peer_has_a_few_short_addresses_each_once() {
        let peer = PeerId::random();
        let mut many: Vec<_> = (1..100)
            .map(|n| format!("/ip4/8.8.8.8/tcp/{n}").parse::<Multiaddr>().unwrap())
            .collect();
        let long = format!("/dns4/{}.example.org/tcp/1", "x".repeat(80));
        many.insert(0, long.parse().unwrap());
        many.insert(1, many[1].clone().with_p2p(peer).unwrap());
        let told = Reach::World.tellable(&many);
        assert_eq!(told, many[2..2 + MOST]);
    }
}
