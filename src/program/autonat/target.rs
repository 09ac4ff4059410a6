//! Which of the addresses that a client names are dialed.
//!
//! Only those at the IP address of the client's connection, so that no client can have the relay probe other machines.
//! Version 2 makes clients pay for other addresses with data, which deters a flood but not a port scanner. For the same
//! reason the relay resolves no names and dials no other relays.

use std::net::{IpAddr, SocketAddr};

use libp2p::{Multiaddr, PeerId, multiaddr::Protocol};

use crate::{address, program::net::multiaddr};

/// The peer that asks, and its address.
#[derive(Clone, Copy, Debug)]
pub struct Client {
    pub peer: PeerId,
    /// The only IP address that is dialed for it.
    pub ip: IpAddr,
    /// The TCP port that its connection comes from; `None` over WebSocket.
    pub port: Option<u16>,
}

/// How many addresses of a request are read: as many as in go-libp2p.
const MAX_NAMED: usize = 50;

/// How many addresses version 1 dials, one after the other: the observed one, and three of those that are named.
const MAX_DIALED: usize = 4;

/// What version 2 dials: the first named address that the relay can dial, with its index.
pub fn of_version_2(
    named: &[Vec<u8>],
    client: Client,
    private: bool,
) -> Option<(usize, SocketAddr)> {
    let parsed = named.iter().take(MAX_NAMED).enumerate();
    let mut parsed = parsed.filter_map(|(index, bytes)| Some((index, parse(bytes, client)?)));
    let target = parsed.find(|(_, to)| to.ip() == client.ip);
    target.filter(|(_, to)| may_be_dialed(to.ip(), private))
}

/// What version 1 dials, in the order of go-libp2p's server. First the address that the client's connection comes from: a
/// client behind a NAT may know no global address of its own, and name none. Then the named ports at the same IP address: it
/// may know its address behind the NAT only.
///
/// Nothing if the client names addresses and the relay can dial none of them: the client may be reachable over QUIC.
pub fn of_version_1(named: &[Vec<u8>], client: Client, private: bool) -> Vec<SocketAddr> {
    let parsed = named.iter().take(MAX_NAMED).filter_map(|bytes| parse(bytes, client));
    let mut ports: Vec<_> = parsed.map(|to| to.port()).collect();
    if !may_be_dialed(client.ip, private) || (ports.is_empty() && !named.is_empty()) {
        return Vec::new();
    }
    ports.splice(0..0, client.port);
    let mut targets = Vec::new();
    for to in ports.into_iter().map(|port| SocketAddr::new(client.ip, port)) {
        if targets.len() < MAX_DIALED && !targets.contains(&to) {
            targets.push(to);
        }
    }
    targets
}

/// Parses a TCP address of the client, with or without its peer id at the end.
fn parse(bytes: &[u8], client: Client) -> Option<SocketAddr> {
    let address = Multiaddr::try_from(bytes.to_vec()).ok()?;
    let is_of_another =
        matches!(address.iter().last(), Some(Protocol::P2p(peer)) if peer != client.peer);
    let mut to = multiaddr::dialable(&address).filter(|_| !is_of_another)?;
    to.set_ip(to.ip().to_canonical());
    Some(to)
}

/// Whether this is the address of one machine on the internet.
fn may_be_dialed(ip: IpAddr, private: bool) -> bool {
    private || address::is_global(&Multiaddr::from(ip))
}

#[cfg(test)]
mod tests {
    use super::*;

    const PEER: &str = "12D3KooWPGM3wYKMsTHGEqbhcBft6cPjA2F3rQmyWTEDD3wCGS1g";

    fn client(ip: &str) -> Client {
        Client { peer: PEER.parse().unwrap(), ip: ip.parse().unwrap(), port: None }
    }

    fn bytes(addresses: &[&str]) -> Vec<Vec<u8>> {
        let bytes = |address: &&str| address.parse::<Multiaddr>().unwrap().to_vec();
        addresses.iter().map(bytes).collect()
    }

    fn version_2(ip: &str, addresses: &[&str]) -> Option<(usize, String)> {
        let target = of_version_2(&bytes(addresses), client(ip), false);
        target.map(|(at, to)| (at, to.to_string()))
    }

    fn version_1(ip: &str, addresses: &[&str]) -> Vec<String> {
        let targets = of_version_1(&bytes(addresses), client(ip), false);
        targets.iter().map(SocketAddr::to_string).collect()
    }

    #[test]
    fn version_2_dials_the_first_tcp_address_at_the_clients_ip_address() {
        let addresses = [
            "/ip4/5.5.5.5/udp/4001/quic-v1",
            "/ip4/6.6.6.6/tcp/4001",
            "/dns4/example.org/tcp/4001",
            "/ip4/5.5.5.5/tcp/4001/ws",
            "/ip4/5.5.5.5/tcp/4002",
            "/ip4/5.5.5.5/tcp/4003",
        ];
        let expected = Some((4, "5.5.5.5:4002".into()));
        assert_eq!(version_2("5.5.5.5", &addresses), expected);
        let mapped = ["/ip6/::ffff:5.5.5.5/tcp/4001"];
        assert_eq!(version_2("5.5.5.5", &mapped), Some((0, "5.5.5.5:4001".into())));
        assert_eq!(version_2("7.7.7.7", &addresses), None);
        assert_eq!(version_2("5.5.5.5", &[]), None);
    }

    #[test]
    fn version_1_dials_the_named_ports_at_the_clients_ip_address() {
        let addresses = [
            "/ip4/192.168.1.7/tcp/4001",
            "/ip4/6.6.6.6/tcp/4001",
            "/ip6/2a00::1/tcp/4002",
            "/ip4/5.5.5.5/udp/4003/quic-v1",
            "/dns4/example.org/tcp/4004",
        ];
        let expected = ["5.5.5.5:4001", "5.5.5.5:4002"];
        assert_eq!(version_1("5.5.5.5", &addresses), expected);
        let many: Vec<_> = (1..99).map(|port| format!("/ip4/5.5.5.5/tcp/{port}")).collect();
        let many: Vec<_> = many.iter().map(String::as_str).collect();
        assert_eq!(version_1("5.5.5.5", &many).len(), MAX_DIALED);
        assert!(version_1("5.5.5.5", &[]).is_empty(), "its connection came over WebSocket");
    }

    #[test]
    fn version_1_dials_first_where_the_connection_comes_from_unless_only_others_are_named() {
        let version_1 = |ip, addresses: &[&str]| -> Vec<_> {
            let client = Client { port: Some(50001), ..client(ip) };
            let targets = of_version_1(&bytes(addresses), client, false);
            targets.iter().map(SocketAddr::to_string).collect()
        };
        let observed = "5.5.5.5:50001";
        assert_eq!(version_1("5.5.5.5", &[]), [observed]);
        let behind_a_nat = ["/ip4/192.168.1.7/tcp/4001", "/ip4/192.168.1.7/udp/4001/quic-v1"];
        assert_eq!(version_1("5.5.5.5", &behind_a_nat), [observed, "5.5.5.5:4001"]);
        let many = [4001, 50001, 4002, 4003, 4004].map(|port| format!("/ip4/5.5.5.5/tcp/{port}"));
        let expected = [50001, 4001, 4002, 4003].map(|port| format!("5.5.5.5:{port}"));
        assert_eq!(version_1("5.5.5.5", &many.each_ref().map(String::as_str)), expected);
        assert!(version_1("5.5.5.5", &["/ip4/5.5.5.5/udp/4001/quic-v1"]).is_empty());
        for private in ["10.1.2.3", "192.168.1.1", "127.0.0.1", "100.64.0.1"] {
            assert!(version_1(private, &[]).is_empty());
        }
    }

    #[test]
    fn neither_version_dials_relays_other_peers_or_malformed_addresses() {
        let other = PeerId::random();
        for address in [
            "/ip4/5.5.5.5/tcp/4001/p2p-circuit".into(),
            format!("/ip4/5.5.5.5/tcp/4001/p2p/{other}/p2p-circuit/p2p/{PEER}"),
            format!("/ip4/5.5.5.5/tcp/4001/p2p/{other}"),
            "/dnsaddr/example.org".into(),
            "/dns/example.org/tcp/4001".into(),
            "/ip4/5.5.5.5/tcp/0".into(),
            "/ip4/5.5.5.5".into(),
            "/memory/7".into(),
            String::new(),
        ] {
            assert_eq!(version_2("5.5.5.5", &[&address]), None, "{address}");
            assert!(version_1("5.5.5.5", &[&address]).is_empty(), "{address}");
        }
        let own = format!("/ip4/5.5.5.5/tcp/4001/p2p/{PEER}");
        assert!(version_2("5.5.5.5", &[&own]).is_some());
        assert_eq!(version_1("5.5.5.5", &[&own]).len(), 1);
        let garbage = [vec![255; 9], Vec::new()];
        assert_eq!(of_version_2(&garbage, client("5.5.5.5"), true), None);
        assert!(of_version_1(&garbage, client("5.5.5.5"), true).is_empty());
    }

    #[test]
    fn an_address_that_is_not_global_is_dialed_only_in_tests() {
        for ip in [
            "127.0.0.1",
            "10.1.2.3",
            "172.16.0.1",
            "192.168.1.1",
            "169.254.1.1",
            "100.64.0.1",
            "0.0.0.0",
            "0.1.2.3",
            "192.0.0.8",
            "192.0.2.1",
            "192.88.99.1",
            "198.18.0.1",
            "198.51.100.1",
            "203.0.113.1",
            "224.0.0.1",
            "240.0.0.1",
            "255.255.255.255",
            "::",
            "::1",
            "::ffff:127.0.0.1",
            "64:ff9b::7f00:1",
            "100::1",
            "2001::7f00:1",
            "2001:2::1",
            "2001:db8::1",
            "2002:7f00:1::1",
            "3fff:1::1",
            "fc00::1",
            "fe80::1",
            "ff02::1",
        ] {
            let ip: IpAddr = ip.parse::<IpAddr>().unwrap().to_canonical();
            let client = Client { ip, ..client("5.5.5.5") };
            let address = Multiaddr::from(ip).with(Protocol::Tcp(4001));
            let named = [address.to_vec()];
            assert_eq!(of_version_2(&named, client, false), None, "{ip}");
            assert!(of_version_1(&named, client, false).is_empty(), "{ip}");
            if !ip.is_unspecified() {
                assert!(of_version_2(&named, client, true).is_some(), "{ip}");
                assert_eq!(of_version_1(&named, client, true).len(), 1, "{ip}");
            }
        }
        for ip in ["5.5.5.5", "192.0.1.1", "2a00::1", "2001:4860::1", "2001:200::1"] {
            assert!(may_be_dialed(ip.parse().unwrap(), false), "{ip}");
        }
    }
}
