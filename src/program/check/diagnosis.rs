//! The steps of the check, and what to do when one fails. Sans-IO.

use std::io::{Error, ErrorKind};

use crate::program::net::admission::handshake_failure::causes;

/// The steps of the check, in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// DNS: the addresses in the TXT records of a name.
    DnsAddr,
    /// DNS: the IP addresses of a name.
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
    /// RESERVE, and what it grants.
    Reserve,
    /// A second connection, under a second identity.
    Second,
    /// A circuit between both, and bytes through it in both directions.
    Circuit,
    /// The circuit and the connections close.
    End,
}

/// What to do about an error at this stage: the remedy in the first row of [`REMEDIES`] that fits.
pub fn remedy(stage: Stage, error: &Error) -> &'static str {
    let (stage, kind) = (format!("{stage:?}").to_lowercase(), format!("{:?}", kind_of(error)));
    let error = format!("{}: {error}", if CLOSED.contains(&kind) { "Closed" } else { &kind });
    let mut rows = REMEDIES.lines().filter_map(|row| {
        let mut columns = row.splitn(3, " | ");
        let is_of_stage = columns.next()? == stage;
        let fits = columns.next()?.split(", ").any(|part| error.contains(part));
        columns.next().filter(|_| is_of_stage && fits)
    });
    rows.next().unwrap_or("see the relay's log")
}

/// The kinds of errors that mean that the other side ended the connection; rows name them all `Closed`.
const CLOSED: &str = "BrokenPipe ConnectionAborted ConnectionReset NotConnected UnexpectedEof";

/// A row has three columns: a step; texts, one of which the error's kind or message contains (none: any error); and the
/// remedy. The statuses are the specification's.
const REMEDIES: &str = "\
dnsaddr | NotFound | its TXT records list no address over TCP or WebSocket: dig TXT _dnsaddr.NAME
dnsaddr |  | no name server of /etc/resolv.conf answers over TCP; check one of the addresses in dig TXT _dnsaddr.NAME
resolve | Temporary failure, TimedOut | no name server answers: correct /etc/resolv.conf, and try dig NAME
resolve |  | correct the name, or its A and AAAA records: dig NAME
tcp | ConnectionRefused | nothing listens there: start the relay, or correct or publish the port (while a relay drains, it does not listen)
tcp | Unreachable | this machine has no route there: check its network
tcp | InvalidInput | a link-local address needs an interface, which this check cannot name: check another address
tcp |  | a firewall drops the packets, or the address is another host's: open or correct it
tls | NotFound | install ca-certificates, or name a file with SSL_CERT_FILE
tls | Closed, TimedOut, corrupt message | that port speaks no TLS: use the relay's port for /tls/ws, or leave out /tls; or the relay refuses this \
    address (caps, rates, access rules)
tls | Expired, expired, NotValidYet, not valid yet | renew the certificate, and set the clock of this machine
tls |  | get a certificate for this name, and present its whole chain (relaylet: --tls-cert); to trust another issuer name it \
    with SSL_CERT_FILE
websocket | HTTP 502, HTTP 503, HTTP 504 | the proxy does not reach the relay: start it, or correct the proxy's upstream
websocket | Closed | use the relay's port for WebSocket; or the relay refuses this address (caps, rates, access rules)
websocket |  | use the relay's port for WebSocket, or have the proxy pass on upgrades
pnet |  | the relay is in no private network: leave out --swarm-key; or it refuses this address (caps, rates, access rules)
secure | another peer | correct the peer id, or find out what else listens there
secure | Closed, negotiation failed | the relay refuses this address (caps, rates, access rules), expects a proxy's header, drains, has a \
    swarm key that this check has not (--swarm-key), supports neither /noise nor /tls/1.0.0, or not /yamux/1.0.0
secure |  | no libp2p peer answers: correct the port, add /ws for WebSocket, or give the private network's key (--swarm-key)
identify | Closed | the relay refuses this peer (access rules, caps): see its log
identify | negotiation failed | have the relay serve identify, by which clients learn that it is one
reserve | negotiation failed | the peer is no relay: make it one (kubo: ipfs config --json Swarm.RelayService.Enabled true; go-libp2p: \
    EnableRelayService and ForceReachabilityPublic)
reserve | Closed | the relay drains, or enforces a limit: see its log
reserve | status 200 | no slot is free: wait, or raise --max-reservations, -per-ip or -per-subnet (relaylet)
reserve | status 201 | too many requests: wait a minute, or raise --reserve-rate (relaylet)
reserve | status 202 | an access rule denies this peer or address: --allow-peer, --deny-subnet (relaylet)
reserve | no address | rust-libp2p's clients refuse it: announce a public one, --announce (relaylet)
reserve | expired | set the clocks of both machines
reserve | voucher | go-libp2p's clients refuse it: update the relay
second | Closed, TimedOut, negotiation failed | the relay refuses a second connection from this address: raise its cap (relaylet: \
    --max-connections-per-ip), or check from another address
circuit | status 201 | wait, or raise --max-circuits, --connect-rate or --reserve-rate (relaylet)
circuit | status 202 | an access rule denies circuits to this peer: --allow-connect-peer (relaylet)
circuit | status 203 | its stop stream to the first connection failed: see the relay's log
circuit | status 204 | several relays share the address: have each client always reach the same one
circuit | other bytes | the relay changes what it carries: update it
circuit |  | see the relay's log; the limits of a circuit may be below what the handshakes of two clients take
end |  | the relay does not pass the end of a circuit on, so that clients keep dead circuits: update it";

/// The kind of the innermost I/O error: muxers and protocols wrap those of the connection.
fn kind_of(error: &Error) -> ErrorKind {
    let kinds = causes(error).filter_map(|cause| cause.downcast_ref()).map(Error::kind);
    kinds.last().unwrap_or(error.kind())
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use futures_rustls::rustls::{self, CertificateError, pki_types::UnixTime};

    use super::*;

    #[test]
    fn each_failure_has_its_remedy() {
        let of = |kind: ErrorKind| Error::from(kind);
        let refused = || Error::from(multistream_select::NegotiationError::Failed);
        let text = |text: &str| Error::other(text.to_owned());
        let tls = |it| Error::new(ErrorKind::InvalidData, rustls::Error::InvalidCertificate(it));
        let [time, not_before] =
            [0, 1].map(|secs| UnixTime::since_unix_epoch(Duration::from_secs(secs)));
        let not_yet = CertificateError::NotValidYetContext { time, not_before };
        for (stage, error, expected) in [
            (Stage::DnsAddr, of(ErrorKind::ConnectionRefused), "dig TXT _dnsaddr.NAME"),
            (Stage::Resolve, of(ErrorKind::NotFound), "correct the name"),
            (Stage::Resolve, text("Temporary failure in name resolution"), "no name server"),
            (Stage::Resolve, of(ErrorKind::TimedOut), "no name server"),
            (Stage::Tcp, of(ErrorKind::ConnectionRefused), "nothing listens there"),
            (Stage::Tcp, of(ErrorKind::NetworkUnreachable), "no route"),
            (Stage::Tcp, of(ErrorKind::TimedOut), "a firewall"),
            (Stage::Tcp, of(ErrorKind::InvalidInput), "link-local"),
            (Stage::Tls, of(ErrorKind::NotFound), "install ca-certificates"),
            (Stage::Tls, of(ErrorKind::UnexpectedEof), "speaks no TLS"),
            (Stage::Tls, text("received corrupt message of type X"), "speaks no TLS"),
            (Stage::Tls, of(ErrorKind::InvalidData), "--tls-cert"),
            (Stage::Tls, of(ErrorKind::ConnectionReset), "refuses this address"),
            (Stage::Tls, of(ErrorKind::TimedOut), "speaks no TLS"),
            (Stage::Tls, tls(CertificateError::Expired), "renew"),
            (Stage::Tls, tls(CertificateError::UnknownIssuer), "whole chain"),
            (Stage::Tls, tls(not_yet), "set the clock"),
            (Stage::WebSocket, text("HTTP 400"), "upgrades"),
            (Stage::WebSocket, text("HTTP 503"), "the proxy does not reach the relay"),
            (Stage::WebSocket, of(ErrorKind::UnexpectedEof), "refuses this address"),
            (Stage::Pnet, of(ErrorKind::UnexpectedEof), "leave out --swarm-key"),
            (Stage::Pnet, of(ErrorKind::UnexpectedEof), "refuses this address"),
            (Stage::Secure, text("another peer answers: 12D3"), "correct the peer id"),
            (Stage::Secure, of(ErrorKind::ConnectionReset), "refuses this address"),
            (Stage::Secure, refused(), "supports neither"),
            (Stage::Secure, of(ErrorKind::InvalidData), "no libp2p peer"),
            (Stage::Secure, of(ErrorKind::TimedOut), "--swarm-key"),
            (Stage::Identify, of(ErrorKind::ConnectionReset), "access rules"),
            (Stage::Identify, Error::other(of(ErrorKind::NotConnected)), "access rules"),
            (Stage::Identify, refused(), "serve identify"),
            (Stage::Identify, of(ErrorKind::TimedOut), "see the relay's log"),
            (Stage::Reserve, refused(), "the peer is no relay"),
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
            (Stage::Circuit, text("the relay answers with status 201"), "--max-circuits"),
            (Stage::Circuit, text("the relay answers with status 202"), "--allow-connect-peer"),
            (Stage::Circuit, text("the relay answers with status 203"), "stop stream"),
            (Stage::Circuit, text("the relay answers with status 204"), "the same one"),
            (Stage::Circuit, of(ErrorKind::ConnectionReset), "limits of a circuit"),
            (Stage::Circuit, text("the circuit carries other bytes"), "changes what it carries"),
            (Stage::End, of(ErrorKind::TimedOut), "does not pass the end"),
        ] {
            let found = remedy(stage, &error);
            assert!(found.contains(expected), "{stage:?}: {error}: {found}");
        }
    }
}
