//! Why a handshake failed: at which stage, and for which reason.
//!
//! Sans-IO: decides by the error and by the client's first bytes. Stage and reason are labels of metrics, from fixed sets.
//! A connection that closes without a byte is a load balancer's health check, and no failure.

use std::{error::Error, fmt, io, iter};

#[cfg(feature = "pnet")]
use libp2p::pnet::PnetError;
use libp2p::{
    core::{transport::TransportError, upgrade::NegotiationError},
    noise,
    swarm::ListenError,
};

use super::{
    handshakes::Progress,
    limits::Denied,
    proxy_header::{SIGNATURE_V1, SIGNATURE_V2},
};
use crate::program::net::multiaddr::Layer;

/// The start of a TLS record with a handshake message, of any version of TLS.
const TLS: &[u8] = b"\x16\x03";

/// The first bytes of multistream-select, as many as [`Progress`] keeps.
const MULTISTREAM: &[u8] = b"\x13/multistrea";

/// How requests of HTTP/1 begin, and a connection of HTTP/2.
const HTTP: [&[u8]; 8] =
    [b"GET ", b"HEAD ", b"POST ", b"PUT ", b"DELETE ", b"OPTIONS ", b"CONNECT ", b"PRI * "];

/// A handshake that failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HandshakeFailure {
    /// The stage at which it failed.
    pub stage: Stage,
    /// The reason.
    pub reason: Reason,
}

/// The stages of a handshake, in their order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// TLS and the HTTP request that open a WebSocket.
    WebSocket,
    /// The exchange of nonces in a private network.
    SwarmKey,
    /// Agreeing on a secure channel.
    Multistream,
    /// The key exchange.
    Security,
    /// Agreeing on a muxer, and the first stream.
    Muxer,
}

/// Why a handshake failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// The client exceeded a time limit.
    Timeout,
    /// The client closed the connection.
    Closed,
    /// The client sent an HTTP request that opens no WebSocket.
    Http,
    /// The client began TLS where none is spoken.
    Tls,
    /// The client ended TLS because of the certificate of `--tls-cert`.
    Certificate,
    /// The client sent a PROXY protocol header, and is not a trusted proxy.
    ProxyHeader,
    /// The client has another swarm key, or none.
    SwarmKey,
    /// The client left when it saw the relay's peer id, or has the same.
    PeerId,
    /// The client does not follow the protocols.
    Protocol,
    /// The relay dropped the handshake for another one.
    Preempted,
    /// No failure: a health check.
    HealthCheck,
}

impl Stage {
    /// The stage in a few words: a label of metrics.
    pub fn kind(self) -> &'static str {
        match self {
            Self::WebSocket => "websocket",
            Self::SwarmKey => "swarm key",
            Self::Multistream => "multistream",
            Self::Security => "security",
            Self::Muxer => "muxer",
        }
    }
}

impl Reason {
    /// The reason in a few words: a label of metrics.
    pub fn kind(self) -> &'static str {
        match self {
            Self::Timeout => "timeout",
            Self::Closed => "closed",
            Self::Http => "http",
            Self::Tls => "tls",
            Self::Certificate => "certificate",
            Self::ProxyHeader => "proxy header",
            Self::SwarmKey => "swarm key",
            Self::PeerId => "peer id",
            Self::Protocol => "protocol",
            Self::Preempted => "too many handshakes",
            Self::HealthCheck => "health check",
        }
    }

    /// What went wrong, and the remedy; `None` if an operator has none.
    pub fn hint(self) -> Option<&'static str> {
        Some(match self {
            Self::Timeout | Self::Closed | Self::Preempted | Self::HealthCheck => return None,
            Self::Http => {
                "an HTTP request came to a port for libp2p; send it to the port of --http, and WebSocket to that of \
                 --listen /…/ws"
            }
            Self::Tls => {
                "TLS came to a port without TLS; use the port of --listen /…/tls/ws, or have the proxy in front end \
                 TLS, or send none"
            }
            Self::Certificate => {
                "the client does not accept the certificate of --tls-cert; get one for the name that it dials, from an \
                 issuer that it trusts, with the whole chain in the file"
            }
            Self::ProxyHeader => {
                "a PROXY protocol header came from an untrusted address; name it with --proxy-protocol-from, or have \
                 the proxy send no header"
            }
            Self::SwarmKey => {
                "the client has another swarm key, or none; give it the key in the file of --swarm-key"
            }
            Self::PeerId => {
                "the client left when it saw this relay's peer id; give it the address from a \"listening on\" line, \
                 or restore the key that it expects to --identity"
            }
            Self::Protocol => {
                "the client sent what is not libp2p over Noise or TLS 1.3 and yamux; if it is in a private network, \
                 give this relay the same --swarm-key"
            }
        })
    }
}

/// An error and the stage that it belongs to. A transport reports it, wrapped, as its own error.
#[derive(Debug)]
pub struct StageError {
    stage: Stage,
    /// The reason; `None`: it follows from the error.
    reason: Option<Reason>,
    error: io::Error,
}

/// An error whose source is a [`StageError`]: libp2p's transports drop an error and keep its source.
#[derive(Debug, thiserror::Error)]
#[error("{} failed", .0.stage.kind())]
struct Wrapped(#[source] StageError);

impl StageError {
    /// The error of this stage; without a reason, it follows from the error.
    pub fn wrap(stage: Stage, reason: Option<Reason>, error: io::Error) -> io::Error {
        io::Error::new(error.kind(), Wrapped(Self { stage, reason, error }))
    }
}

impl fmt::Display for StageError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.error.fmt(f)
    }
}

impl Error for StageError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        self.error.source()
    }
}

/// What is known of a handshake besides its error.
#[derive(Clone, Debug)]
pub struct HandshakeInfo {
    /// Whether the secure channel was up, and what the client sent first.
    pub progress: Progress,
    /// Why the relay dropped it, if it did.
    pub dropped: Option<Reason>,
    /// What the listener speaks.
    pub layer: Layer,
    /// Whether the relay is in a private network.
    pub is_private: bool,
}

impl HandshakeFailure {
    /// Why a handshake failed; `None` if it did not: the relay denied the connection, or it was a health check.
    pub fn of(error: &ListenError, known: &HandshakeInfo) -> Option<Self> {
        let cause = match error {
            _ if Denied::of(error).is_some() => return None,
            ListenError::Transport(TransportError::Other(cause)) => cause,
            ListenError::WrongPeerId { .. } | ListenError::LocalPeerId { .. } => {
                return Some(Self { stage: Stage::Muxer, reason: Reason::PeerId });
            }
            _ => return None,
        };
        let stage = match stages(cause).next() {
            _ if known.progress.is_secured() => Stage::Muxer,
            Some(error) => error.stage,
            None => Stage::Multistream,
        };
        let reason = reason(cause, stage, known);
        (reason != Reason::HealthCheck).then_some(Self { stage, reason })
    }
}

fn stages(cause: &io::Error) -> impl Iterator<Item = &StageError> {
    causes(cause).filter_map(|cause| cause.downcast_ref())
}

fn reason(cause: &io::Error, stage: Stage, known: &HandshakeInfo) -> Reason {
    let first_bytes = known.progress.first_bytes();
    if known.dropped != Some(Reason::Preempted) {
        // 1. The first bytes, if they are of another protocol: how such a connection ends afterwards does not matter.
        if let Some(reason) = reason_of_first_bytes(&first_bytes, known) {
            return reason;
        }
        // 2. In a private network, all that follows the nonces is unreadable with another key.
        if known.is_private && stage == Stage::Multistream && !first_bytes.is_empty() {
            return Reason::SwarmKey;
        }
    }
    // 3. The reason for which the relay dropped it, or that the stage knows.
    if let Some(reason) = known.dropped.or_else(|| stages(cause).find_map(|error| error.reason)) {
        return reason;
    }
    // 4. The error. The only one that comes from neither a stage nor a negotiation is the transport's own time limit.
    let is_own_timeout =
        stages(cause).next().is_none() && !causes(cause).any(|it| it.is::<NegotiationError>());
    match causes(cause).any(is_closed) {
        true if first_bytes.is_empty() => Reason::HealthCheck,
        // rust-libp2p compares the peer id once the secure channel is up, and closes the connection.
        true if stage == Stage::Muxer => Reason::PeerId,
        true => Reason::Closed,
        false if is_own_timeout => Reason::Timeout,
        false if stage == Stage::WebSocket && causes(cause).any(is_certificate_rejected) => {
            Reason::Certificate
        }
        false => Reason::Protocol,
    }
}

/// The reason, if these first bytes are of a protocol that this listener does not speak.
fn reason_of_first_bytes(first_bytes: &[u8], known: &HandshakeInfo) -> Option<Reason> {
    let begins_with =
        |signatures: &[&[u8]]| signatures.iter().any(|it| first_bytes.starts_with(it));
    match known.layer {
        _ if known.progress.is_secured() => None,
        _ if begins_with(&[SIGNATURE_V1, SIGNATURE_V2]) => Some(Reason::ProxyHeader),
        Layer::Tcp | Layer::WebSocket if begins_with(&[TLS]) => Some(Reason::Tls),
        Layer::Tcp | Layer::SecureWebSocket if begins_with(&HTTP) => Some(Reason::Http),
        Layer::Tcp if !known.is_private && !MULTISTREAM.starts_with(first_bytes) => {
            Some(Reason::Protocol)
        }
        _ => None,
    }
}

/// Whether this is the error of a connection that its peer closed.
pub fn is_closed(cause: &(dyn Error + 'static)) -> bool {
    use io::ErrorKind::{
        BrokenPipe, ConnectionAborted, ConnectionReset, NotConnected, UnexpectedEof, WriteZero,
    };

    // multistream-select reports an end of file as if no protocol was agreed on.
    let is_end_of_file = matches!(cause.downcast_ref(), Some(NegotiationError::Failed));
    let closed =
        [BrokenPipe, ConnectionAborted, ConnectionReset, NotConnected, UnexpectedEof, WriteZero];
    is_end_of_file || cause.downcast_ref().is_some_and(|it: &io::Error| closed.contains(&it.kind()))
}

/// Whether this is the alert with which a client of `/tls/ws` rejects the relay's certificate.
#[cfg(feature = "websocket")]
fn is_certificate_rejected(cause: &(dyn Error + 'static)) -> bool {
    use futures_rustls::rustls::{AlertDescription as Alert, Error as Tls};

    let Some(Tls::AlertReceived(alert)) = cause.downcast_ref() else { return false };
    matches!(
        alert,
        Alert::BadCertificate
            | Alert::UnsupportedCertificate
            | Alert::CertificateRevoked
            | Alert::CertificateExpired
            | Alert::CertificateUnknown
            | Alert::UnknownCA
            | Alert::DecryptError // its signature is not the issuer's
    )
}

#[cfg(not(feature = "websocket"))]
fn is_certificate_rejected(_: &(dyn Error + 'static)) -> bool {
    false
}

/// An error and its causes.
pub fn causes<'a>(
    error: &'a (dyn Error + 'static),
) -> impl Iterator<Item = &'a (dyn Error + 'static)> {
    iter::successors(Some(error), |error| cause(*error))
}

/// The innermost cause, which is the most specific one.
pub fn innermost<'a>(error: &'a (dyn Error + 'static)) -> &'a (dyn Error + 'static) {
    causes(error).last().unwrap_or(error)
}

/// The cause of an error. `source` leaves out those that some errors pass on as their own.
fn cause<'a>(error: &'a (dyn Error + 'static)) -> Option<&'a (dyn Error + 'static)> {
    if let Some(error) = error.downcast_ref::<io::Error>() {
        return error.get_ref().map(|inner| inner as _);
    }
    if let Some(error) = error.downcast_ref::<StageError>() {
        return Some(&error.error);
    }
    if let Some(noise::Error::Io(inner)) = error.downcast_ref() {
        return Some(inner);
    }
    #[cfg(feature = "pnet")]
    if let Some(PnetError::HandshakeError(inner) | PnetError::IoError(inner)) = error.downcast_ref()
    {
        return Some(inner);
    }
    error.source()
}

#[cfg(test)]
mod tests {
    use either::Either;
    use libp2p::core::{transport::timeout::TransportTimeoutError, upgrade::ProtocolError};

    use super::*;

    /// As libp2p's transports report it.
    fn reported(error: impl Error + Send + Sync + 'static) -> ListenError {
        let error = io::Error::other(TransportTimeoutError::Other(error));
        ListenError::Transport(TransportError::Other(error))
    }

    /// As they report an error of one of two transports, of which only the source is left.
    fn of_either(error: io::Error) -> ListenError {
        reported(Either::<_, io::Error>::Left(error))
    }

    fn negotiation(error: ProtocolError) -> ListenError {
        reported(NegotiationError::from(error))
    }

    fn eof() -> io::Error {
        io::ErrorKind::UnexpectedEof.into()
    }

    fn known(first_bytes: &[u8]) -> HandshakeInfo {
        let progress = Progress::default();
        first_bytes.iter().for_each(|byte| _ = progress.record(&[*byte]));
        HandshakeInfo { progress, dropped: None, layer: Layer::Tcp, is_private: false }
    }

    fn kinds(error: &ListenError, known: &HandshakeInfo) -> Option<(&'static str, &'static str)> {
        let failure = HandshakeFailure::of(error, known)?;
        Some((failure.stage.kind(), failure.reason.kind()))
    }

    #[test]
    fn the_first_bytes_tell_what_is_not_libp2p_however_the_connection_ends() {
        for (first_bytes, reason) in [
            (&b"GET / HTTP/1.1\r\n"[..], "http"),
            (b"POST /x HTTP/1.1", "http"),
            (b"PRI * HTTP/2.0\r\n", "http"),
            (b"\x16\x03\x01\x02\x00\x01", "tls"),
            (b"PROXY TCP4 192.0.2.7 ", "proxy header"),
            (b"\r\n\r\n\0\r\nQUIT\n\x21\x11", "proxy header"),
            (b"SSH-2.0-OpenSSH_9.9\r\n", "protocol"),
        ] {
            for is_overdue in [false, true] {
                let dropped = is_overdue.then_some(Reason::Timeout);
                let known = HandshakeInfo { dropped, ..known(first_bytes) };
                for error in [ProtocolError::InvalidMessage, ProtocolError::IoError(eof())] {
                    let expected = Some(("multistream", reason));
                    assert_eq!(kinds(&negotiation(error), &known), expected, "{first_bytes:?}");
                }
            }
        }
        // HTTP is expected on a WebSocket port, and TLS on a secure one.
        let with = |first_bytes: &[u8], layer| HandshakeInfo { layer, ..known(first_bytes) };
        for (known, reason) in [
            (with(b"GET / HTTP/1.1", Layer::WebSocket), "protocol"),
            (with(b"\x16\x03\x01\x02", Layer::SecureWebSocket), "protocol"),
            (with(b"\x16\x03\x01\x02", Layer::WebSocket), "tls"),
            (with(b"GET / HTTP/1.1", Layer::SecureWebSocket), "http"),
            (with(b"\x13/multistream", Layer::Tcp), "protocol"),
        ] {
            let error = StageError::wrap(Stage::WebSocket, None, io::Error::other("what is this"));
            let expected = Some(("websocket", reason));
            assert_eq!(kinds(&of_either(error), &known), expected, "{known:?}");
        }
    }

    #[test]
    fn a_connection_that_closes_without_a_byte_is_a_health_check() {
        let reset = io::Error::from(io::ErrorKind::ConnectionReset);
        let errors = [eof(), reset].map(|error| negotiation(ProtocolError::IoError(error)));
        for error in errors.into_iter().chain([reported(NegotiationError::Failed)]) {
            assert_eq!(kinds(&error, &known(b"")), None);
            let private = HandshakeInfo { is_private: true, ..known(b"") };
            assert_eq!(kinds(&error, &private), None);
            assert_eq!(kinds(&error, &known(b"\x13")), Some(("multistream", "closed")));
            // A connection that stays silent is dropped: that is a failure.
            let overdue = HandshakeInfo { dropped: Some(Reason::Timeout), ..known(b"") };
            assert_eq!(kinds(&error, &overdue), Some(("multistream", "timeout")));
        }
        let asked = StageError::wrap(Stage::WebSocket, Some(Reason::HealthCheck), eof());
        let websocket = HandshakeInfo { layer: Layer::WebSocket, ..known(b"GET /healthz") };
        assert_eq!(kinds(&of_either(asked), &websocket), None);
    }

    #[test]
    fn in_a_private_network_unreadable_bytes_count_as_another_swarm_key() {
        let private = HandshakeInfo { is_private: true, ..known(&[7; 24]) };
        let expected = Some(("multistream", "swarm key"));
        for error in [ProtocolError::InvalidMessage, ProtocolError::IoError(eof())] {
            let overdue = HandshakeInfo { dropped: Some(Reason::Timeout), ..private.clone() };
            assert_eq!(kinds(&negotiation(error), &private), expected);
            assert_eq!(kinds(&negotiation(ProtocolError::InvalidMessage), &overdue), expected);
        }
        let nonce = StageError::wrap(Stage::SwarmKey, None, eof());
        let expected = Some(("swarm key", "closed"));
        assert_eq!(kinds(&of_either(nonce), &private), expected);
    }

    #[test]
    fn a_stage_follows_from_the_error_and_from_whether_the_channel_is_secure() {
        let hello = known(b"\x13/multistream/1.0.0\n");
        let of_security = |reason, error: noise::Error| {
            let error = StageError::wrap(Stage::Security, reason, io::Error::other(error));
            reported(error)
        };
        let secured = known(b"\x13/multistream/1.0.0\n");
        secured.progress.set_secured();
        let timeout = io::Error::other(TransportTimeoutError::<io::Error>::Timeout);
        let timeout = ListenError::Transport(TransportError::Other(timeout));
        let seen = StageError::wrap(Stage::Security, Some(Reason::PeerId), eof());
        let myself = ListenError::LocalPeerId { address: "/memory/1".parse().unwrap() };
        for (error, known, expected) in [
            (of_security(None, noise::Error::Io(eof())), &hello, ("security", "closed")),
            (of_security(None, noise::Error::BadSignature), &hello, ("security", "protocol")),
            (of_security(None, noise::Error::Io(seen)), &hello, ("security", "peer id")),
            (negotiation(ProtocolError::InvalidMessage), &secured, ("muxer", "protocol")),
            (negotiation(ProtocolError::IoError(eof())), &secured, ("muxer", "peer id")),
            (timeout, &secured, ("muxer", "timeout")),
            (myself, &secured, ("muxer", "peer id")),
        ] {
            assert_eq!(kinds(&error, known), Some(expected), "{error:?}");
        }
    }

    #[test]
    fn a_denied_connection_is_not_counted_and_a_preempted_one_has_its_own_reason() {
        let denied = of_either(Denied::Rate.into());
        assert_eq!(kinds(&denied, &known(b"")), None);
        let within = StageError::wrap(Stage::WebSocket, None, Denied::Rate.into());
        assert_eq!(kinds(&of_either(within), &known(b"GET ")), None);
        assert_eq!(kinds(&ListenError::Aborted, &known(b"")), None);
        let dropped = HandshakeInfo { dropped: Some(Reason::Preempted), ..known(b"GET ") };
        let expected = Some(("multistream", "too many handshakes"));
        assert_eq!(kinds(&negotiation(ProtocolError::IoError(eof())), &dropped), expected);
    }
}
