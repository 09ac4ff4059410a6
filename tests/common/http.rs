//! A caller of the HTTP port that says exactly what it is told to, and reads whatever comes back.

use std::collections::BTreeMap;

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use super::{Relay, within};

/// Where to ask, and that any port will do.
pub const ANYWHERE: &str = "--http=127.0.0.1:0";

/// An answer.
#[derive(Debug, Default)]
pub struct Answer {
    pub status: u16,
    /// By names in lower case.
    pub headers: BTreeMap<String, String>,
    pub body: String,
}

/// Where the relay is to be watched.
pub async fn port(relay: &Relay) -> u16 {
    let line = relay.wait_for_log("watch it at http://").await;
    let (_, rest) = line.split_once("http://127.0.0.1:").expect("an address");
    rest.trim_end_matches('/').parse().expect("a port")
}

/// A connection without any request yet.
pub async fn call(port: u16) -> TcpStream {
    within(TcpStream::connect(("127.0.0.1", port))).await.expect("the port is open")
}

/// Asks for something as Prometheus does, and reads the answer.
pub async fn ask(port: u16, method: &str, path: &str) -> Answer {
    let headers = "Host: localhost\r\nAccept: application/openmetrics-text, */*;q=0.1";
    ask_with(port, method, path, headers).await
}

/// Asks for something with these headers.
pub async fn ask_with(port: u16, method: &str, path: &str, headers: &str) -> Answer {
    let request = format!("{method} {path} HTTP/1.1\r\n{headers}\r\nConnection: close\r\n\r\n");
    say(port, request.as_bytes()).await
}

/// Gets something, and insists on getting it.
pub async fn get(port: u16, path: &str) -> String {
    let answer = ask(port, "GET", path).await;
    assert_eq!(answer.status, 200, "{path}: {answer:?}");
    answer.body
}

/// Says all of this on one connection, and reads what comes until it is closed or reset.
pub async fn say(port: u16, request: &[u8]) -> Answer {
    let mut stream = call(port).await;
    // It may have heard enough before the end.
    let _ = within(stream.write_all(request)).await;
    hear(&mut stream).await
}

/// Reads what comes until the connection is closed or reset.
pub async fn hear(stream: &mut TcpStream) -> Answer {
    let mut bytes = Vec::new();
    let _ = within(stream.read_to_end(&mut bytes)).await;
    let text = String::from_utf8(bytes).expect("text");
    let Some((head, body)) = text.split_once("\r\n\r\n") else {
        assert_eq!(text, "", "no half answers");
        return Answer::default();
    };
    let mut lines = head.lines();
    let status = lines.next().expect("a status line");
    let status = status.split(' ').nth(1).expect("a status");
    let headers = lines.map(|line| {
        let (name, value) = line.split_once(": ").expect("a header");
        (name.to_lowercase(), value.to_owned())
    });
    Answer {
        status: status.parse().expect("a number"),
        headers: headers.collect(),
        body: body.to_owned(),
    }
}

/// The samples of an OpenMetrics text, by name and labels as they stand there.
///
/// # Panics
///
/// When it is none: a sample without a family, or not of its kind, or twice.
pub fn samples(text: &str) -> BTreeMap<String, f64> {
    let mut samples = BTreeMap::new();
    let mut kinds = BTreeMap::new();
    let text = text.strip_suffix("# EOF\n").expect("the end is marked");
    for line in text.lines() {
        if let Some(comment) = line.strip_prefix("# ") {
            let mut words = comment.splitn(3, ' ');
            let (what, family) = (words.next().unwrap(), words.next().expect("a name"));
            let rest = words.next().expect("something of it");
            match what {
                "TYPE" => assert!(kinds.insert(family, rest).is_none(), "twice: {line}"),
                "UNIT" => assert!(family.ends_with(&format!("_{rest}")), "{line}"),
                "HELP" => {}
                _ => panic!("{line}"),
            }
            continue;
        }
        let (sample, value) = line.rsplit_once(' ').expect("a value");
        let name = sample.split('{').next().unwrap();
        let suffixes = ["", "_total", "_info", "_bucket", "_sum", "_count"];
        let kind = suffixes.iter().find_map(|suffix| {
            let kind = kinds.get(name.strip_suffix(suffix)?)?;
            Some((*kind, *suffix))
        });
        let fits = matches!(
            kind.unwrap_or_else(|| panic!("no family: {line}")),
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
