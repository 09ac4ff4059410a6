//! The address of a relay, parsed into the parts that the steps of the check need.

use std::{io, net::SocketAddr};

use async_std::net::ToSocketAddrs;
use libp2p::{Multiaddr, PeerId, multiaddr::Protocol, pnet::PreSharedKey};

use super::steps::list;

/// The address of a relay: a host, a TCP port, and what runs over TCP.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Target {
    /// A `/dnsaddr` address, which has to be looked up first; the other fields are then empty.
    pub dnsaddr: Option<Multiaddr>,
    /// An IP address or a DNS name.
    pub host: String,
    /// Whether an IPv4 address may be used, and whether an IPv6 address may.
    pub versions: [bool; 2],
    /// The TCP port.
    pub port: u16,
    /// The addresses of the host, once they are resolved.
    pub sockets: Vec<SocketAddr>,
    /// The path of the WebSocket, if there is one.
    pub websocket: Option<String>,
    /// The name in the certificate of TLS below WebSocket.
    pub tls: Option<String>,
    /// The relay's peer id, if it is known.
    pub peer: Option<PeerId>,
    /// The key of its private network, if it is in one.
    pub swarm_key: Option<PreSharedKey>,
}

impl Target {
    /// Parses `/ip4/…/tcp/…` with an optional `/ws` or `/tls/ws`, and an optional `/p2p/…`; the same with a DNS name; or
    /// `/dnsaddr/…`. `None` for any other address.
    pub fn parse(address: &Multiaddr) -> Option<Self> {
        use Protocol::{Dns, Dns4, Dns6, Dnsaddr, Ip4, Ip6, P2p, Sni, Tcp, Tls, Ws, Wss};

        let parts: Vec<_> = address.iter().collect();
        let (parts, peer) = match &*parts {
            [Dnsaddr(_), ..] => {
                return Some(Self { dnsaddr: Some(address.clone()), ..Self::default() });
            }
            [parts @ .., P2p(peer)] => (parts, Some(*peer)),
            parts => (parts, None),
        };
        let [host, Tcp(port), layers @ ..] = parts else { return None };
        let (host, versions) = match host {
            Ip4(ip) => (ip.to_string(), [true, false]),
            Ip6(ip) => (ip.to_string(), [false, true]),
            Dns4(name) => (name.to_string(), [true, false]),
            Dns6(name) => (name.to_string(), [false, true]),
            Dns(name) => (name.to_string(), [true; 2]),
            _ => return None,
        };
        let (tls, path) = match layers {
            [] => (None, None),
            [Ws(path)] => (None, Some(path)),
            [Wss(path)] | [Tls, Ws(path)] => (Some(host.clone()), Some(path)),
            [Tls, Sni(name), Ws(path)] => (Some(name.to_string()), Some(path)),
            _ => return None,
        };
        let (port, websocket) = (*port, path.map(ToString::to_string));
        Some(Self { host, versions, port, websocket, tls, peer, ..Self::default() })
    }

    /// The host and the port, as in a URL.
    pub fn authority(&self) -> String {
        let Self { host, port, .. } = self;
        if host.contains(':') { format!("[{host}]:{port}") } else { format!("{host}:{port}") }
    }

    /// Resolves the addresses of the host; fails if there are none.
    pub async fn resolve(&mut self) -> io::Result<((), String)> {
        let [ip4, ip6] = self.versions;
        let fits = |socket: &SocketAddr| if socket.is_ipv4() { ip4 } else { ip6 };
        self.sockets = (&*self.host, self.port).to_socket_addrs().await?.filter(fits).collect();
        let ips = list(self.sockets.iter().map(SocketAddr::ip));
        if ips.is_empty() {
            let problem = format!("it has no {} address", if ip4 { "IPv4" } else { "IPv6" });
            return Err(io::Error::new(io::ErrorKind::NotFound, problem));
        }
        Ok(((), format!("{} is {ips}", self.host)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_over_tcp_or_websocket_is_parsed() {
        let peer = "12D3KooWPGM3wYKMsTHGEqbhcBft6cPjA2F3rQmyWTEDD3wCGS1g";
        let parse = |text: &str| Target::parse(&text.parse().unwrap());
        let (ip4, ip6, root) = ([true, false], [false, true], Some("/".to_owned()));
        let target = |host: &str, versions, port| Target {
            host: host.into(),
            versions,
            port,
            ..Target::default()
        };
        for (text, expected) in [
            ("/ip4/192.0.2.1/tcp/4001", target("192.0.2.1", ip4, 4001)),
            ("/ip6/2001:db8::1/tcp/1", target("2001:db8::1", ip6, 1)),
            ("/dns/a.example/tcp/1", target("a.example", [true; 2], 1)),
            (
                "/dns6/a.example/tcp/1/ws",
                Target { websocket: root.clone(), ..target("a.example", ip6, 1) },
            ),
            (
                "/dns4/a.example/tcp/443/tls/sni/b.example/ws",
                Target {
                    websocket: root.clone(),
                    tls: Some("b.example".into()),
                    ..target("a.example", ip4, 443)
                },
            ),
            (
                "/dns4/a.example/tcp/443/wss",
                Target {
                    websocket: root,
                    tls: Some("a.example".into()),
                    ..target("a.example", ip4, 443)
                },
            ),
        ] {
            let with_peer = Target { peer: peer.parse().ok(), ..expected.clone() };
            assert_eq!(parse(text), Some(expected), "{text}");
            assert_eq!(parse(&format!("{text}/p2p/{peer}")), Some(with_peer), "{text}");
        }
        for text in [
            "/ip4/192.0.2.1",
            "/ip4/192.0.2.1/udp/4001/quic-v1",
            "/ip4/192.0.2.1/tcp/4001/tls",
            "/ip4/192.0.2.1/tcp/4001/ws/ws",
            "/ip4/192.0.2.1/tcp/4001/sni/a.example/ws",
            "/memory/7",
        ] {
            assert_eq!(parse(text), None, "{text}");
        }
        assert_eq!(parse(&format!("/ip4/192.0.2.1/tcp/4001/p2p/{peer}/p2p-circuit")), None);
        for (text, authority) in [
            ("/ip6/2001:db8::1/tcp/1/ws", "[2001:db8::1]:1"),
            ("/dns/a.example/tcp/80/ws", "a.example:80"),
        ] {
            assert_eq!(parse(text).unwrap().authority(), authority);
        }
        let dnsaddr = format!("/dnsaddr/a.example/p2p/{peer}");
        assert_eq!(parse(&dnsaddr).unwrap().dnsaddr.unwrap().to_string(), dnsaddr);
    }

    #[test]
    fn a_name_without_an_address_of_the_ip_version_that_is_asked_for_is_an_error_that_says_so() {
        async_std::task::block_on(async {
            let host = "127.0.0.1".into(); // resolves to itself
            let mut target = Target { host, versions: [false, true], ..Target::default() };
            let error = target.resolve().await.unwrap_err();
            assert!(error.to_string().contains("no IPv6 address"), "{error}");
        });
    }
}
