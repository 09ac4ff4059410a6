//! What a failed step means, and what to do about it. Sans-IO.

use std::io::{Error, ErrorKind};

/// A step of the check, in their order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// DNS: the addresses of a name.
    Resolve,
    /// The TCP connection.
    Tcp,
    /// TLS below WebSocket, with the certificate's name.
    Tls,
    /// The WebSocket upgrade.
    WebSocket,
    /// The handshake of a private network.
    Pnet,
    /// Noise or libp2p's TLS, and yamux.
    Secure,
    /// Identify.
    Identify,
    /// RESERVE, by this program's own messages.
    Reserve,
    /// A second connection, under a second identity.
    Second,
    /// A circuit between both, by libp2p's relay client, and a ping through it.
    Circuit,
    /// The connections close.
    End,
}

/// What to do about an error at this stage.
pub fn remedy(stage: Stage, error: &Error) -> &'static str {
    use ErrorKind::{
        ConnectionRefused, HostUnreachable, NetworkUnreachable, NotFound, TimedOut, Unsupported,
    };
    use Stage::{Identify, Pnet, Reserve, Resolve, Second, Secure, Tcp, Tls, WebSocket};

    let text = error.to_string();
    let says = |part: &str| text.contains(part);
    match (stage, kind_of(error)) {
        (Resolve, _) => "correct the name, or its A and AAAA records: dig NAME",
        (Tcp, ConnectionRefused) => {
            "nothing listens there: start the relay, or correct or publish the port"
        }
        (Tcp, HostUnreachable | NetworkUnreachable) => {
            "this machine has no route there: check its network"
        }
        (Tcp, _) => {
            "a firewall drops the packets, or the address is another host's: open or correct it"
        }
        (Tls, NotFound) => "install ca-certificates, or name a file with SSL_CERT_FILE",
        (Tls, _) => {
            "get a certificate for this name, and present its whole chain (relaylet: --tls-cert); to trust another \
             issuer name it with SSL_CERT_FILE"
        }
        (WebSocket, _) => "name the relay's port for WebSocket, or have the proxy pass upgrades on",
        (Pnet, _) => "the relay is in no private network: leave out --swarm-key",
        (Secure, _) if says("another peer") => {
            "correct the peer id, or find out what else listens there"
        }
        // libp2p's negotiation does not tell a refusal of all protocols from a connection that ends.
        (Secure, kind) if is_closed(kind) || kind == Unsupported => {
            "the relay refuses this address (its caps, rates and access rules), drains, is in a private network \
             (--swarm-key), or supports neither /noise nor /tls/1.0.0 over /yamux/1.0.0"
        }
        (Secure, _) => {
            "no libp2p peer: correct the port, name WebSocket (/ws), or the private network's key (--swarm-key)"
        }
        (Identify, kind) if is_closed(kind) => {
            "the relay refuses this peer (access rules, caps): see its log"
        }
        (Identify, _) => "have the relay serve identify, by which clients learn that it is one",
        (Reserve, Unsupported) => {
            "the peer is no relay: make it one (kubo: ipfs config --json Swarm.RelayService.Enabled true; go-libp2p: \
             EnableRelayService and ForceReachabilityPublic)"
        }
        (Reserve, kind) if is_closed(kind) => "the relay drains, or enforces a limit: see its log",
        (Second, kind) if is_closed(kind) || [TimedOut, Unsupported].contains(&kind) => {
            "the relay refuses a second connection from this address: raise its cap (relaylet: \
             --max-connections-per-ip), or check from another address"
        }
        _ => REQUESTS.iter().find(|(part, _)| says(part)).map_or(OTHER, |(_, remedy)| remedy),
    }
}

/// What to do about a request that was refused: a status of the specification, or a text of libp2p's relay client.
const REQUESTS: [(&str, &str); 10] = [
    (
        "status 200",
        "no slot is free: wait, or raise --max-reservations, -per-ip or -per-subnet (relaylet)",
    ),
    ("status 201", "too many requests: wait a minute, or raise --reserve-rate (relaylet)"),
    (
        "status 202",
        "an access rule denies this peer or address: --allow-peer, --deny-subnet (relaylet)",
    ),
    ("no address", "rust-libp2p's clients refuse it: announce a public one, --announce (relaylet)"),
    ("expired", "set the clocks of both machines"),
    ("voucher", "go-libp2p's clients refuse it: update the relay"),
    (
        "resource limit exceeded",
        "wait, or raise --max-circuits, --connect-rate or --reserve-rate (relaylet)",
    ),
    (
        "denied permission",
        "an access rule denies circuits to this peer: --allow-connect-peer (relaylet)",
    ),
    (
        "Relay failed to connect",
        "its stop stream to the first connection failed: see the relay's log",
    ),
    (
        "no reservation",
        "several relays share the address: have each client always reach the same one",
    ),
];
const OTHER: &str =
    "see the relay's log; the limits of a circuit may be below what its handshake takes";

/// The kind of the innermost error: libp2p's muxers wrap those of the connection.
fn kind_of(error: &Error) -> ErrorKind {
    let inner = error.get_ref().and_then(|inner| inner.downcast_ref());
    inner.map_or(error.kind(), kind_of)
}

/// Whether the other side ended the connection.
fn is_closed(kind: ErrorKind) -> bool {
    use ErrorKind::{BrokenPipe, ConnectionAborted, ConnectionReset, NotConnected, UnexpectedEof};
    matches!(kind, BrokenPipe | ConnectionAborted | ConnectionReset | NotConnected | UnexpectedEof)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_failure_has_its_remedy() {
        let of = |kind: ErrorKind| Error::from(kind);
        let text = |text: &str| Error::other(text.to_owned());
        for (stage, error, expected) in [
            (Stage::Resolve, of(ErrorKind::NotFound), "dig NAME"),
            (Stage::Tcp, of(ErrorKind::ConnectionRefused), "nothing listens there"),
            (Stage::Tcp, of(ErrorKind::NetworkUnreachable), "no route"),
            (Stage::Tcp, of(ErrorKind::TimedOut), "a firewall"),
            (Stage::Tls, of(ErrorKind::NotFound), "install ca-certificates"),
            (Stage::Tls, of(ErrorKind::InvalidData), "--tls-cert"),
            (Stage::WebSocket, text("HTTP 400"), "upgrades"),
            (Stage::Pnet, of(ErrorKind::UnexpectedEof), "leave out --swarm-key"),
            (Stage::Secure, text("another peer answers: 12D3"), "correct the peer id"),
            (Stage::Secure, of(ErrorKind::ConnectionReset), "refuses this address"),
            (Stage::Secure, of(ErrorKind::Unsupported), "supports neither"),
            (Stage::Secure, of(ErrorKind::InvalidData), "no libp2p peer"),
            (Stage::Secure, of(ErrorKind::TimedOut), "--swarm-key"),
            (Stage::Identify, of(ErrorKind::ConnectionReset), "access rules"),
            (Stage::Identify, Error::other(of(ErrorKind::NotConnected)), "access rules"),
            (Stage::Identify, of(ErrorKind::Unsupported), "serve identify"),
            (Stage::Reserve, of(ErrorKind::Unsupported), "the peer is no relay"),
            (Stage::Reserve, of(ErrorKind::ConnectionReset), "drains"),
            (Stage::Reserve, text("the relay answers with status 200"), "--max-reservations"),
            (Stage::Reserve, text("the relay answers with status 201"), "--reserve-rate"),
            (Stage::Reserve, text("the relay answers with status 202"), "--allow-peer"),
            (Stage::Reserve, text("the reservation has no address"), "--announce"),
            (Stage::Reserve, text("the reservation has expired already"), "clocks"),
            (Stage::Reserve, text("the reservation's voucher is not valid"), "go-libp2p"),
            (Stage::Second, of(ErrorKind::UnexpectedEof), "--max-connections-per-ip"),
            (Stage::Second, of(ErrorKind::TimedOut), "--max-connections-per-ip"),
            (Stage::Second, text("another peer answers: 12D3"), "see the relay's log"),
            (Stage::Circuit, of(ErrorKind::ConnectionReset), "limits of a circuit"),
            (Stage::End, of(ErrorKind::TimedOut), "see the relay's log"),
        ] {
            let told = remedy(stage, &error);
            assert!(told.contains(expected), "{stage:?}: {error}: {told}");
        }
    }

    /// The texts are libp2p's: another version may have others.
    #[test]
    fn what_libp2ps_relay_client_says_has_its_remedy() {
        use libp2p::relay::outbound::hop::ConnectError;

        for (error, expected) in [
            (ConnectError::ResourceLimitExceeded, "--max-circuits"),
            (ConnectError::PermissionDenied, "--allow-connect-peer"),
            (ConnectError::ConnectionFailed, "stop stream"),
            (ConnectError::NoReservation, "the same one"),
        ] {
            let told = remedy(Stage::Circuit, &Error::other(error));
            assert!(told.contains(expected), "{told}");
        }
    }
}
