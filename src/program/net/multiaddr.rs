//! Multiaddrs that this relay can listen on and dial, as socket addresses and what runs over them.

use std::net::{IpAddr, SocketAddr};

use libp2p::{Multiaddr, multiaddr::Protocol};

/// What runs over the TCP connections of an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layer {
    /// Nothing: libp2p itself does.
    Tcp,
    /// `/ws`
    WebSocket,
    /// `/tls/ws`, or `/wss`, which is the same.
    SecureWebSocket,
}

/// The socket address to listen on, and for what: an IP address, a TCP port, and WebSocket or
/// nothing behind them.
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
    let at_root = |path: &str| path == "/";
    let layer = match (parts.next(), parts.next(), parts.next()) {
        (None, ..) => Layer::Tcp,
        (Some(Protocol::Ws(path)), None, _) if at_root(&path) => Layer::WebSocket,
        (Some(Protocol::Wss(path)), None, _) if at_root(&path) => Layer::SecureWebSocket,
        (Some(Protocol::Tls), Some(Protocol::Ws(path)), None) if at_root(&path) => {
            Layer::SecureWebSocket
        }
        _ => return None,
    };
    Some((SocketAddr::new(ip, port), layer))
}

/// Why an address cannot be listened on, and what can; `None` if its form is supported.
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

/// The socket address of one side of a connection, and what runs over it: as [`listen_address`],
/// with the peer's id behind it or not.
pub(crate) fn remote_address(address: &Multiaddr) -> Option<(SocketAddr, Layer)> {
    let mut address = address.clone();
    if let Some(Protocol::P2p(_)) = address.iter().last() {
        address.pop();
    }
    listen_address(&address).filter(|(to, _)| to.port() != 0 && !to.ip().is_unspecified())
}

/// The socket address of a TCP address that can be dialed: nothing is dialed over WebSocket.
pub(crate) fn dialable(address: &Multiaddr) -> Option<SocketAddr> {
    match remote_address(address)? {
        (to, Layer::Tcp) => Some(to),
        _ => None,
    }
}

pub(crate) fn multiaddr(address: SocketAddr) -> Multiaddr {
    Multiaddr::from(address.ip()).with(Protocol::Tcp(address.port()))
}
