//! A client of the relay's HTTP port: sends exactly the given bytes, and reads the response.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::sleep,
};

use super::{Relay, TEST_TIMEOUT, within};

/// The flag that serves HTTP on any free port.
pub const ON_ANY_PORT: &str = "--http=127.0.0.1:0";

/// An HTTP response.
#[derive(Debug, Default)]
pub struct Response {
    pub status: u16,
    /// By name in lower case.
    pub headers: BTreeMap<String, String>,
    pub body: String,
}

/// The port that the relay serves HTTP on, from its log.
pub async fn port(relay: &Relay) -> u16 {
    let line = relay.wait_for_log("monitoring page: http://").await;
    let (_, rest) = line.split_once("http://127.0.0.1:").expect("an address");
    rest.trim_end_matches('/').parse().expect("a port")
}

/// Opens a connection without sending a request.
pub async fn dial(port: u16) -> TcpStream {
    within(TcpStream::connect(("127.0.0.1", port))).await.expect("the port is open")
}

/// Sends a request with the `Accept` header of Prometheus, and reads the response.
pub async fn fetch(port: u16, method: &str, path: &str) -> Response {
    let headers = "Host: localhost\r\nAccept: application/openmetrics-text, */*;q=0.1";
    fetch_with(port, method, path, headers).await
}

/// Sends a request with these headers, and reads the response.
pub async fn fetch_with(port: u16, method: &str, path: &str, headers: &str) -> Response {
    let request = format!("{method} {path} HTTP/1.1\r\n{headers}\r\nConnection: close\r\n\r\n");
    send_raw(port, request.as_bytes()).await
}

/// Gets a path; panics unless the status is 200.
pub async fn get(port: u16, path: &str) -> String {
    let response = fetch(port, "GET", path).await;
    assert_eq!(response.status, 200, "{path}: {response:?}");
    response.body
}

/// Sends these bytes on one connection, and reads until it is closed or reset.
pub async fn send_raw(port: u16, request: &[u8]) -> Response {
    let mut stream = dial(port).await;
    // The relay may close the connection before it has read the whole request.
    let _ = within(stream.write_all(request)).await;
    read_response(&mut stream).await
}

/// Reads until the connection is closed or reset.
pub async fn read_response(stream: &mut TcpStream) -> Response {
    let mut bytes = Vec::new();
    let _ = within(stream.read_to_end(&mut bytes)).await;
    let text = String::from_utf8(bytes).expect("text");
    let Some((head, body)) = text.split_once("\r\n\r\n") else {
        assert_eq!(text, "", "incomplete response");
        return Response::default();
    };
    let mut lines = head.lines();
    let status = lines.next().expect("a status line");
    let status = status.split(' ').nth(1).expect("a status");
    let headers = lines.map(|line| {
        let (name, value) = line.split_once(": ").expect("a header");
        (name.to_lowercase(), value.to_owned())
    });
    Response {
        status: status.parse().expect("a number"),
        headers: headers.collect(),
        body: body.to_owned(),
    }
}

/// Waits until the metrics have this line.
pub async fn wait_for_sample(relay: &Relay, sample: &str) {
    let port = port(relay).await;
    let family = sample.split('{').next().unwrap();
    let start = Instant::now();
    loop {
        let metrics = get(port, "/metrics").await;
        if metrics.lines().any(|line| line == sample) {
            return;
        }
        let others: Vec<_> = metrics.lines().filter(|line| line.starts_with(family)).collect();
        assert!(start.elapsed() < TEST_TIMEOUT, "{sample}: {others:#?}, {:#?}", relay.log());
        sleep(Duration::from_millis(50)).await;
    }
}

/// The samples of an OpenMetrics text, by their name and labels as written.
///
/// # Panics
///
/// If it is invalid: a sample without a family, a suffix or unit that does not fit, or a duplicate.
pub fn samples(text: &str) -> BTreeMap<String, f64> {
    let mut samples = BTreeMap::new();
    let mut types = BTreeMap::new();
    let text = text.strip_suffix("# EOF\n").expect("the end is marked");
    for line in text.lines() {
        if let Some(comment) = line.strip_prefix("# ") {
            let mut words = comment.splitn(3, ' ');
            let (what, family) = (words.next().unwrap(), words.next().expect("a name"));
            let rest = words.next().expect("a value");
            match what {
                "TYPE" => assert!(types.insert(family, rest).is_none(), "twice: {line}"),
                "UNIT" => assert!(family.ends_with(&format!("_{rest}")), "{line}"),
                "HELP" => {}
                _ => panic!("{line}"),
            }
            continue;
        }
        let (sample, value) = line.rsplit_once(' ').expect("a value");
        let name = sample.split('{').next().unwrap();
        let suffixes = ["", "_total", "_info", "_bucket", "_sum", "_count"];
        let metric_type = suffixes.iter().find_map(|suffix| {
            let metric_type = types.get(name.strip_suffix(suffix)?)?;
            Some((*metric_type, *suffix))
        });
        let fits = matches!(
            metric_type.unwrap_or_else(|| panic!("no family: {line}")),
            ("counter", "_total")
                | ("gauge", "")
                | ("info", "_info")
                | ("histogram", "_bucket" | "_sum" | "_count")
        );
        assert!(fits, "{line}");
        let value = value.parse().expect("a number");
        assert!(samples.insert(sample.to_owned(), value).is_none(), "{line}");
    }
    samples
}
