//! The head of the HTTP request that opens a WebSocket, and the answers to requests that open none.
//!
//! Sans-IO. soketto reads at most 32 headers and 8 KiB, which a browser behind a CDN and a reverse proxy
//! exceeds, and closes the connection without an answer.

use httparse::{EMPTY_HEADER, Error, Status};
use soketto::handshake::WebSocketKey;

use super::forwarded::Forwarded;

/// The longest head that is read, in bytes. Cookies of one site take at most 8 KiB in most browsers.
pub const MAX_BYTES: usize = 16 * 1024;

/// How many headers a head may have.
pub const MAX_HEADERS: usize = 100;

/// The path of health checks by load balancers.
const HEALTH_PATH: &str = "/healthz";

/// The head of a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Head {
    /// The kind of request.
    pub request: Request,
    /// Whether its method is HEAD: the answer has no body.
    is_method_head: bool,
    /// The headers that name the client of a proxy.
    pub forwarded: Forwarded,
}

/// The kind of a request, or why it is invalid.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// A WebSocket (RFC 6455, 4.1), with this `Sec-WebSocket-Key`.
    Upgrade(WebSocketKey),
    /// Whether the relay serves.
    Health,
    /// Something else over HTTP, which is not served here.
    Other,
    /// Not readable as a request, for this reason.
    Bad(&'static str),
    /// More than [`MAX_HEADERS`] or [`MAX_BYTES`].
    TooLarge,
}

impl Head {
    /// Parses the head at the start of a connection. `None`: more bytes are needed.
    pub fn parse(bytes: &[u8]) -> Option<Self> {
        let mut headers = [EMPTY_HEADER; MAX_HEADERS];
        let mut parsed = httparse::Request::new(&mut headers);
        let request = match parsed.parse(bytes) {
            Ok(Status::Complete(length)) if length <= MAX_BYTES => {
                return Some(Self {
                    request: kind_of(&parsed, length < bytes.len()),
                    is_method_head: parsed.method == Some("HEAD"),
                    forwarded: Forwarded {
                        standard: values(&parsed, "Forwarded").map(<[u8]>::to_vec).collect(),
                        de_facto: values(&parsed, "X-Forwarded-For").map(<[u8]>::to_vec).collect(),
                    },
                });
            }
            Ok(Status::Partial) if bytes.len() < MAX_BYTES => return None,
            Ok(_) | Err(Error::TooManyHeaders) => Request::TooLarge,
            Err(_) => Request::Bad("this port speaks WebSocket"),
        };
        Some(Self { request, is_method_head: false, forwarded: Forwarded::default() })
    }

    /// Returns the status of the answer to a request other than [`Request::Upgrade`], and the whole answer.
    pub fn response(&self, not_serving: Option<&'static str>) -> (&'static str, Vec<u8>) {
        let (status, headers, sentence) = match self.request {
            Request::Health => match not_serving {
                Some(reason) => ("503 Service Unavailable", "", reason),
                None => ("200 OK", "", "serving"),
            },
            // RFC 9110, 15.5.22, and RFC 6455, 4.2.2, want these headers.
            Request::Upgrade(_) | Request::Other => (
                "426 Upgrade Required",
                "Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\n",
                "this port is a libp2p relay's: connect with a libp2p client over WebSocket",
            ),
            Request::Bad(reason) => ("400 Bad Request", "", reason),
            Request::TooLarge => (
                "431 Request Header Fields Too Large",
                "",
                "the request has more than 100 headers or 16 KiB",
            ),
        };
        let connection = if headers.is_empty() { "close" } else { "close, upgrade" };
        let length = sentence.len() + 1;
        let body = if self.is_method_head { String::new() } else { format!("{sentence}\n") };
        let response = format!(
            "HTTP/1.1 {status}\r\nContent-Type: text/plain; charset=utf-8\r\nContent-Length: {length}\r\n\
             Cache-Control: no-store\r\n{headers}Connection: {connection}\r\n\r\n{body}"
        );
        (status, response.into_bytes())
    }
}

/// The values of all headers of this name.
fn values<'r>(request: &httparse::Request<'r, '_>, name: &str) -> impl Iterator<Item = &'r [u8]> {
    let headers = request.headers.iter();
    headers.filter(move |header| header.name.eq_ignore_ascii_case(name)).map(|header| header.value)
}

/// Whether one of the comma-separated values of this header is `token`.
fn has_token(request: &httparse::Request<'_, '_>, name: &str, token: &str) -> bool {
    let mut tokens = values(request, name).flat_map(|value| value.split(|byte| *byte == b','));
    tokens.any(|value| value.trim_ascii().eq_ignore_ascii_case(token.as_bytes()))
}

/// RFC 6455, 4.2.1: what a request with these headers asks for.
fn kind_of(request: &httparse::Request<'_, '_>, has_more: bool) -> Request {
    if !has_token(request, "Upgrade", "websocket") {
        let path = request.path.unwrap_or_default();
        let path = path.split_once('?').map_or(path, |(path, _)| path);
        let is_read = matches!(request.method, Some("GET" | "HEAD"));
        return if path == HEALTH_PATH && is_read { Request::Health } else { Request::Other };
    }
    if request.method != Some("GET") || request.version != Some(1) {
        return Request::Bad("a WebSocket is opened by GET and HTTP/1.1");
    }
    if !has_token(request, "Connection", "upgrade") {
        return Request::Bad("the header Connection: Upgrade is missing");
    }
    if !has_token(request, "Sec-WebSocket-Version", "13") {
        return Request::Other; // the answer names the supported version
    }
    if values(request, "Host").next().is_none() {
        return Request::Bad("the header Host is missing");
    }
    let key = values(request, "Sec-WebSocket-Key").next();
    match key.and_then(|key| key.try_into().ok()) {
        None => Request::Bad("the header Sec-WebSocket-Key is missing or malformed"),
        // RFC 6455, 4.1: a client waits for the answer.
        Some(_) if has_more => Request::Bad("data came before the WebSocket was open"),
        Some(key) => Request::Upgrade(key),
    }
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*};

    use super::*;

    const UPGRADE: &str = "GET / HTTP/1.1\r\nHost: relay\r\nUpgrade: websocket\r\nConnection: \
        keep-alive, Upgrade\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n";

    fn request(text: &str) -> Option<Request> {
        Head::parse(text.as_bytes()).map(|head| head.request)
    }

    fn with_headers(more: &str) -> String {
        UPGRADE.replace("\r\n\r\n", &format!("\r\n{more}\r\n"))
    }

    fn upgrade() -> Option<Request> {
        Some(Request::Upgrade(*b"dGhlIHNhbXBsZSBub25jZQ=="))
    }

    #[test]
    fn an_upgrade_may_have_a_hundred_headers_and_16_kib() {
        assert_eq!(request(UPGRADE), upgrade());
        let headers = |count: usize| "X-Header: value\r\n".repeat(count);
        assert_eq!(request(&with_headers(&headers(95))), upgrade());
        assert_eq!(request(&with_headers(&headers(96))), Some(Request::TooLarge));
        let cookie = |length: usize| format!("Cookie: {}\r\n", "c".repeat(length));
        let room = MAX_BYTES - with_headers(&cookie(0)).len();
        assert_eq!(request(&with_headers(&cookie(room))), upgrade());
        assert_eq!(request(&with_headers(&cookie(room + 1))), Some(Request::TooLarge));
        assert_eq!(request(&"a".repeat(MAX_BYTES - 1)), None);
        assert_eq!(request(&"a".repeat(MAX_BYTES)), Some(Request::TooLarge));
    }

    #[test]
    fn an_incomplete_head_needs_more_bytes() {
        for length in 0..UPGRADE.len() {
            assert_eq!(request(&UPGRADE[..length]), None, "{length} bytes");
        }
    }

    #[test]
    fn a_request_without_upgrade_is_answered_with_a_status_and_one_sentence() {
        for (text, is_draining, status) in [
            ("GET / HTTP/1.1\r\n\r\n", false, "426 Upgrade Required"),
            ("POST /healthz HTTP/1.1\r\n\r\n", false, "426 Upgrade Required"),
            (&UPGRADE.replace("13", "8"), false, "426 Upgrade Required"),
            ("GET /healthz HTTP/1.0\r\n\r\n", false, "200 OK"),
            ("GET /healthz?from=proxy HTTP/1.1\r\nHost: relay\r\n\r\n", false, "200 OK"),
            ("HEAD /healthz HTTP/1.1\r\n\r\n", true, "503 Service Unavailable"),
            (&UPGRADE.replace("GET", "POST"), false, "400 Bad Request"),
            (&UPGRADE.replace("HTTP/1.1", "HTTP/1.0"), false, "400 Bad Request"),
            (&UPGRADE.replace("Host", "Most"), false, "400 Bad Request"),
            (&UPGRADE.replace("keep-alive, Upgrade", "close"), false, "400 Bad Request"),
            (&UPGRADE.replace("dGhl", ""), false, "400 Bad Request"),
            (&format!("{UPGRADE}more"), false, "400 Bad Request"),
            ("\u{13}/multistream/1.0.0\n", false, "400 Bad Request"),
            ("\u{16}\u{3}\u{1}\u{2}", false, "400 Bad Request"),
        ] {
            let head = Head::parse(text.as_bytes()).unwrap();
            let (line, response) = head.response(is_draining.then_some("draining"));
            assert_eq!(line, status, "{text}");
            let response = String::from_utf8(response).unwrap();
            assert!(response.starts_with(&format!("HTTP/1.1 {status}\r\n")), "{response}");
            assert_eq!(response.contains("\r\nUpgrade: websocket\r\n"), status.starts_with("426"));
            let (_, body) = response.split_once("\r\n\r\n").unwrap();
            assert_eq!(body.lines().count(), usize::from(!text.starts_with("HEAD")), "{response}");
        }
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_do_not_panic(
            start in prop_oneof![Just(""), Just(UPGRADE), Just("GET / HTTP/1.1\r\nForwarded: ")],
            bytes in vec(any::<u8>(), 0..600),
        ) {
            if let Some(head) = Head::parse(&[start.as_bytes(), &bytes].concat()) {
                head.response(None);
            }
        }
    }
}
