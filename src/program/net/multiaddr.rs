//! Multiaddrs that the relay can listen on, dial or announce: parsed into a socket address and what runs over it.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use libp2p::{Multiaddr, multiaddr::Protocol};

use crate::address;

/// What runs over the TCP connections of an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layer {
    /// libp2p directly.
    Tcp,
    /// WebSocket: `/ws`.
    WebSocket,
    /// WebSocket over TLS: `/tls/ws`, or its older form `/wss`.
    SecureWebSocket,
}

/// Parses an address to listen on: an IP address, a TCP port, and optionally WebSocket.
pub fn listen_address(address: &Multiaddr) -> Option<(SocketAddr, Layer)> {
    let mut parts = address.iter();
    let ip = match parts.next()? {
        Protocol::Ip4(ip) => IpAddr::from(ip),
        Protocol::Ip6(ip) => IpAddr::from(ip),
        _ => return None,
    };
    let Some(Protocol::Tcp(port)) = parts.next() else {
        return None;
    };
    let layer = match parts.collect::<Multiaddr>().to_string().as_str() {
        "" => Layer::Tcp,
        "/ws" => Layer::WebSocket,
        "/wss" | "/tls/ws" => Layer::SecureWebSocket,
        _ => return None,
    };
    Some((SocketAddr::new(ip, port), layer))
}

/// Why the relay cannot listen on an address, and the remedy; `None` if its form is supported.
pub fn unsupported(address: &Multiaddr, has_certificate: bool) -> Option<&'static str> {
    const WEBSOCKET: bool = cfg!(feature = "websocket");
    match listen_address(address) {
        Some((_, Layer::Tcp)) => None,
        Some((_, Layer::WebSocket)) if WEBSOCKET => None,
        Some((_, Layer::SecureWebSocket)) if WEBSOCKET && has_certificate => None,
        Some((_, Layer::SecureWebSocket)) if WEBSOCKET => Some(
            "there is no certificate for TLS; name one with --tls-cert and --tls-key, or listen on \
             /ip4/127.0.0.1/tcp/4002/ws behind a proxy that has one",
        ),
        Some(_) => Some(
            "this relay was built without WebSocket (the feature websocket); try \
             /ip4/0.0.0.0/tcp/4001",
        ),
        None if WEBSOCKET => Some(
            "this relay listens on TCP and WebSocket; try /ip4/0.0.0.0/tcp/4001 or \
             /ip4/0.0.0.0/tcp/4002/ws",
        ),
        None => Some("this relay listens on TCP; try /ip4/0.0.0.0/tcp/4001"),
    }
}

/// Parses an address that can be dialed, with or without a peer id at its end. The relay does not dial over WebSocket.
pub(crate) fn dialable(address: &Multiaddr) -> Option<SocketAddr> {
    match listen_address(&without_peer(address))? {
        (to, Layer::Tcp) if to.port() != 0 && !to.ip().is_unspecified() => Some(to),
        _ => None,
    }
}

/// The address without the peer id at its end.
pub(crate) fn without_peer(address: &Multiaddr) -> Multiaddr {
    let mut address = address.clone();
    if let Some(Protocol::P2p(_)) = address.iter().last() {
        address.pop();
    }
    address
}

/// Why clients on the internet cannot use an announced address; `None` if they can.
pub fn unusable(address: &Multiaddr) -> Option<&'static str> {
    let mut parts = address.iter();
    let host = parts.next()?;
    if let Protocol::Dns(name)
    | Protocol::Dns4(name)
    | Protocol::Dns6(name)
    | Protocol::Dnsaddr(name) = &host
        && !is_dns_name(name)
    {
        return Some("its name is not a DNS name");
    }
    let is_transport = |part: &Protocol<'_>| !matches!(part, Protocol::P2p(_) | Protocol::Sni(_));
    let with_any_ip =
        parts.filter(is_transport).fold(Multiaddr::from(Ipv4Addr::LOCALHOST), Multiaddr::with);
    if !matches!(host, Protocol::Dnsaddr(_)) && listen_address(&with_any_ip).is_none() {
        return Some("this relay has no such transport");
    }
    (!address::is_global(address)).then_some("is not global")
}

/// Whether this is a DNS name (RFC 1123, 2.1): labels of letters, digits and hyphens, and of underscores, which some
/// names have all the same.
pub(crate) fn is_dns_name(name: &str) -> bool {
    let is_label = |label: &str| {
        let is_allowed = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
        (1..=63).contains(&label.len())
            && label.chars().all(is_allowed)
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    let labels = name.strip_suffix('.').unwrap_or(name);
    let top = labels.rsplit('.').next().unwrap_or_default();
    let is_numeric = top.chars().all(|c| c.is_ascii_digit()); // an IPv4 address
    labels.len() <= 253 && !is_numeric && labels.split('.').all(is_label)
}

/// The address of this socket, with what runs over TCP in `other`.
pub(crate) fn with_layers_of(other: &Multiaddr, socket: SocketAddr) -> Multiaddr {
    other.iter().skip(2).fold(multiaddr(socket), Multiaddr::with)
}

/// Suggests the multiaddr for a URL, or for a host with or without a port.
pub fn suggest(text: &str) -> Option<String> {
    let (scheme, rest) = text.split_once("://").unwrap_or(("tcp", text));
    let (default_port, layers) = match scheme {
        "tcp" => (4001, ""),
        "ws" | "http" => (80, "/ws"),
        "wss" | "https" => (443, "/tls/ws"),
        _ => return None,
    };
    let rest = rest.split('/').next()?;
    let (host, port) = match rest.rsplit_once(':') {
        Some((host, port)) if !host.contains(':') || host.ends_with(']') => {
            (host, port.parse().ok()?)
        }
        _ => (rest, default_port),
    };
    let host = host.trim_start_matches('[').trim_end_matches(']');
    let host = match host.parse() {
        Ok(IpAddr::V4(ip)) => format!("/ip4/{ip}"),
        Ok(IpAddr::V6(ip)) => format!("/ip6/{ip}"),
        Err(_) if is_dns_name(host) && host.contains('.') => format!("/dns4/{host}"),
        Err(_) => return None,
    };
    Some(format!("{host}/tcp/{port}{layers}"))
}

/// The multiaddr of a TCP socket address.
pub(crate) fn multiaddr(address: SocketAddr) -> Multiaddr {
    Multiaddr::from(address.ip()).with(Protocol::Tcp(address.port()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn announced_addresses_that_clients_on_the_internet_cannot_use_are_found() {
        const TRANSPORT: Option<&str> = Some("this relay has no such transport");
        const NAME: Option<&str> = Some("its name is not a DNS name");
        const LOCAL: Option<&str> = Some("is not global");
        for (text, expected) in [
            ("/ip4/8.8.8.8/tcp/4001", None),
            ("/dns4/relay.example.org/tcp/443/tls/ws", None),
            ("/dns4/relay.example.org/tcp/443/tls/sni/relay.example.org/ws", None),
            ("/dnsaddr/relay.example.org", None),
            ("/ip4/8.8.8.8/udp/4001/quic-v1", TRANSPORT),
            ("/ip4/8.8.8.8/tcp/4001/http", TRANSPORT),
            ("/memory/7", TRANSPORT),
            ("/ip4/127.0.0.1/tcp/4001", LOCAL),
            ("/ip6/fe80::1/tcp/4001", LOCAL),
            ("/dns4/198.51.100.7/tcp/4001", NAME),
            ("/dns4/relay example/tcp/4001", NAME),
            ("/dns4/-relay.example.org/tcp/4001", NAME),
        ] {
            assert_eq!(unusable(&text.parse().unwrap()), expected, "{text}");
        }
    }

    #[test]
    fn a_multiaddr_is_suggested_for_a_host_with_a_port_and_for_a_url() {
        for (text, expected) in [
            ("0.0.0.0:4001", "/ip4/0.0.0.0/tcp/4001"),
            ("198.51.100.7", "/ip4/198.51.100.7/tcp/4001"),
            ("[::]:4002", "/ip6/::/tcp/4002"),
            ("2001:db8::1", "/ip6/2001:db8::1/tcp/4001"),
            ("relay.example.org:4003", "/dns4/relay.example.org/tcp/4003"),
            ("wss://relay.example.org/", "/dns4/relay.example.org/tcp/443/tls/ws"),
            ("ws://198.51.100.7:4002", "/ip4/198.51.100.7/tcp/4002/ws"),
        ] {
            assert_eq!(suggest(text).as_deref(), Some(expected), "{text}");
            assert!(expected.parse::<Multiaddr>().is_ok());
        }
        for text in ["", "here", "/ip4/1.2.3.4", "0.0.0.0:port", "udp://1.2.3.4:5", "a b.c:1"] {
            assert_eq!(suggest(text), None, "{text}");
        }
    }
}
