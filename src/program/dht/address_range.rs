//! Which addresses of a peer are kept in the DHT and dialed. Sans-IO.
//!
//! A node of a DHT dials the addresses that it was sent, and hands them out to other nodes. So only addresses that all
//! of the DHT's nodes can dial are kept.

use libp2p::{Multiaddr, multiaddr::Protocol};

use crate::{
    address,
    program::net::multiaddr::{self, without_peer},
};

/// How many addresses of one peer are kept and dialed.
const MAX_ADDRESSES: usize = 6;

/// The longest address that is kept, in bytes: an answer with twenty peers then stays below 16 KiB, the limit on a
/// message.
const MAX_LENGTH: usize = 80;

/// From where an address can be dialed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum AddressRange {
    /// From the same machine.
    Loopback,
    /// From the same network.
    Private,
    /// From the internet.
    Global,
}

impl AddressRange {
    /// The range of this address.
    pub fn of(address: &Multiaddr) -> Self {
        let is_local_name = dns_name(address).is_some_and(|(name, _)| !is_public(&name));
        match address::ip(address) {
            _ if address::is_global(address) && !is_local_name => Self::Global,
            Some(ip) if ip.is_loopback() => Self::Loopback,
            _ => Self::Private,
        }
    }

    /// Those of a peer's addresses that the relay may hand out in a DHT of this range.
    pub fn shareable(self, addresses: &[Multiaddr]) -> Vec<Multiaddr> {
        self.choose(addresses, is_tcp)
    }

    /// Those of a peer's addresses that the relay may dial. Without names: peers could make the relay look up any name.
    pub fn dialable(self, addresses: &[Multiaddr]) -> Vec<Multiaddr> {
        self.choose(addresses, |address| multiaddr::dialable(address).is_some())
    }

    fn choose(self, addresses: &[Multiaddr], fits: fn(&Multiaddr) -> bool) -> Vec<Multiaddr> {
        let mut chosen: Vec<Multiaddr> = Vec::new();
        for address in addresses.iter().map(without_peer) {
            let is_short = address.len() <= MAX_LENGTH;
            let is_usable = Self::of(&address) >= self && fits(&address) && is_short;
            if is_usable && chosen.len() < MAX_ADDRESSES && !chosen.contains(&address) {
                chosen.push(address);
            }
        }
        chosen
    }
}

/// Whether this is an IP address or a name with a TCP port, and nothing else.
fn is_tcp(address: &Multiaddr) -> bool {
    let is_plain = address.iter().count() == 2; // no peer id
    is_plain && (multiaddr::dialable(address).is_some() || dns_name(address).is_some())
}

/// Whether other networks may know this name. They know no name without a dot, and none in a domain that each network
/// has of its own.
fn is_public(name: &str) -> bool {
    const LOCAL: [&str; 7] = ["localhost", "local", "internal", "lan", "home", "arpa", "test"];
    let name = name.trim_end_matches('.');
    let is_local = |top: &str| LOCAL.iter().any(|local| top.eq_ignore_ascii_case(local));
    let top = name.rsplit_once('.').map(|(_, top)| top);
    multiaddr::is_dns_name(name) && top.is_some_and(|top| !is_local(top))
}

/// The name and the port of an address that has to be looked up.
pub fn dns_name(address: &Multiaddr) -> Option<(String, u16)> {
    let mut parts = address.iter();
    let (Protocol::Dns(name) | Protocol::Dns4(name) | Protocol::Dns6(name)) = parts.next()? else {
        return None;
    };
    match (parts.next(), parts.next()) {
        (Some(Protocol::Tcp(port)), None) if port != 0 => Some((name.into_owned(), port)),
        _ => None,
    }
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
    fn shared_and_dialed_addresses_can_be_dialed_by_all_nodes_of_the_dht() {
        let all = addresses(&OF_ALL_KINDS);
        let global = [OF_ALL_KINDS[3], OF_ALL_KINDS[7], OF_ALL_KINDS[8]];
        assert_eq!(AddressRange::Global.shareable(&all), addresses(&global));
        let global = [OF_ALL_KINDS[3], OF_ALL_KINDS[8]];
        assert_eq!(AddressRange::Global.dialable(&all), addresses(&global));
        let private = [OF_ALL_KINDS[2], OF_ALL_KINDS[3], OF_ALL_KINDS[8]];
        assert_eq!(AddressRange::Private.dialable(&all), addresses(&private));
        assert_eq!(AddressRange::Loopback.dialable(&all).len(), 4);
    }

    #[test]
    fn a_name_that_other_networks_do_not_know_is_shared_within_the_network_only() {
        let local = addresses(&[
            "/dns4/localhost/tcp/22",
            "/dns/relay/tcp/1",
            "/dns4/relay.svc.cluster.local/tcp/1",
            "/dns6/relay.home.ARPA./tcp/1",
            "/dns4/127.0.0.1/tcp/22",
        ]);
        assert_eq!(AddressRange::Global.shareable(&local), []);
        assert_eq!(AddressRange::Private.shareable(&local), local);
        // The nodes of a DHT with such a bootstrap node have private addresses.
        assert!(local.iter().all(|address| AddressRange::of(address) == AddressRange::Private));
        let public = addresses(&["/dns4/relay.example.org/tcp/1", "/dns4/example.org./tcp/1"]);
        assert_eq!(AddressRange::Global.shareable(&public), public);
    }

    #[test]
    fn a_6to4_address_is_neither_shared_nor_dialed_on_the_internet() {
        let of_localhost = addresses(&["/ip6/2002:7f00:1::1/tcp/22"]);
        assert_eq!(AddressRange::Global.shareable(&of_localhost), []);
        assert_eq!(AddressRange::Global.dialable(&of_localhost), []);
    }

    #[test]
    fn a_few_short_addresses_of_a_peer_are_kept_each_once() {
        let peer = PeerId::random();
        let mut many: Vec<_> = (1..100)
            .map(|n| format!("/ip4/8.8.8.8/tcp/{n}").parse::<Multiaddr>().unwrap())
            .collect();
        let long = format!("/dns4/{}.example.org/tcp/1", "x".repeat(80));
        many.insert(0, long.parse().unwrap());
        many.insert(1, many[1].clone().with_p2p(peer).unwrap());
        let shareable = AddressRange::Global.shareable(&many);
        assert_eq!(shareable, many[2..2 + MAX_ADDRESSES]);
    }
}
