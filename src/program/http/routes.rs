//! What the HTTP port serves. Nothing there changes the relay.
//!
//! The page is one document that loads `/status.json` and nothing else; its policy has the hashes of its script
//! and its style, so that the browser runs no others.

use std::{
    sync::Arc,
    task::{Poll, ready},
    time::Duration,
};

use data_encoding::BASE64;
use http_body_util::Full;
use hyper::{
    HeaderMap, Method, Request, Response, StatusCode,
    body::Bytes,
    header::{self, HeaderName, HeaderValue},
};
use prometheus_client::{encoding::text, registry::Registry};
use sha2::{Digest, Sha256};

use super::{
    hosts::Hosts,
    snapshot::{LatestSnapshot, STUCK_AFTER},
    text_format::{prefers_openmetrics, to_prometheus},
};

/// The page's parts. The first has placeholders for the other two.
const PAGE: &str = include_str!("page/index.html");
const STYLE: &str = include_str!("page/style.css");
const SCRIPT: &str = include_str!("page/script.js");

const HTML: &str = "text/html; charset=utf-8";
const JSON: &str = "application/json";
const TEXT: &str = "text/plain; charset=utf-8";
const OPENMETRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
const PROMETHEUS: &str = "text/plain; version=0.0.4; charset=utf-8";

/// The policy of everything but the page: a browser may load nothing.
const NOTHING: HeaderValue = HeaderValue::from_static("default-src 'none'; frame-ancestors 'none'");

/// Headers of every answer.
const ALWAYS: [(HeaderName, &str); 4] = [
    (header::CACHE_CONTROL, "no-store"),
    (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
    (header::REFERRER_POLICY, "no-referrer"),
    (HeaderName::from_static("cross-origin-resource-policy"), "same-origin"),
];

/// The answers to requests.
pub struct Routes {
    latest: Arc<LatestSnapshot>,
    metrics: Registry,
    hosts: Hosts,
    page: Response<Full<Bytes>>,
}

impl Routes {
    /// Serves this snapshot and this registry; the page and the status under these hosts.
    pub fn new(latest: Arc<LatestSnapshot>, metrics: Registry, hosts: Hosts) -> Self {
        let page = PAGE.replace("/* style.css */", STYLE).replace("/* script.js */", SCRIPT);
        let hash = |text| format!("'sha256-{}'", BASE64.encode(&Sha256::digest(text)));
        let policy = format!(
            "default-src 'none'; connect-src 'self'; img-src data:; script-src {}; style-src {}; \
             base-uri 'none'; form-action 'none'; frame-ancestors 'none'; \
             require-trusted-types-for 'script'",
            hash(SCRIPT),
            hash(STYLE)
        );
        let policy = HeaderValue::try_from(policy).unwrap_or(NOTHING);
        let mut page = answer(StatusCode::OK, HTML, page);
        page.headers_mut().insert(header::CONTENT_SECURITY_POLICY, policy);
        Self { latest, metrics, hosts, page }
    }

    /// Returns the answer to a request; pending until the next snapshot if that is to have a status.
    pub fn answer<B>(&self, request: &Request<B>) -> Poll<Response<Full<Bytes>>> {
        if !matches!(*request.method(), Method::GET | Method::HEAD) {
            let text = "only GET and HEAD are served: nothing can be changed here\n";
            let mut answer = answer(StatusCode::METHOD_NOT_ALLOWED, TEXT, text);
            let allowed = HeaderValue::from_static("GET, HEAD");
            answer.headers_mut().insert(header::ALLOW, allowed);
            return Poll::Ready(answer);
        }
        Poll::Ready(match request.uri().path() {
            "/" | "/status.json" if !self.hosts.contains_host_of(request) => {
                let text = "this host name is not served: use the IP address, or start the relay with \
                            --http-host NAME\n";
                answer(StatusCode::MISDIRECTED_REQUEST, TEXT, text)
            }
            "/" => self.page.clone(),
            "/status.json" | "/healthz" if self.age() > STUCK_AFTER => {
                let age = self.age().as_secs();
                let text = format!("the relay has published nothing for {age} s\n");
                answer(StatusCode::SERVICE_UNAVAILABLE, TEXT, text)
            }
            "/status.json" => answer(StatusCode::OK, JSON, ready!(self.status())),
            "/metrics" => self.metrics(request.headers()),
            "/healthz" => self.health(),
            _ => {
                let text = "not found: try /, /status.json, /metrics or /healthz\n";
                answer(StatusCode::NOT_FOUND, TEXT, text)
            }
        })
    }

    fn status(&self) -> Poll<Bytes> {
        self.latest.request_status();
        let snapshot = self.latest.read();
        let Some(status) = &snapshot.status else {
            return Poll::Pending;
        };
        let json = || Bytes::from(serde_json::to_vec(status).unwrap_or_default());
        Poll::Ready(snapshot.json.get_or_init(json).clone())
    }

    fn metrics(&self, headers: &HeaderMap) -> Response<Full<Bytes>> {
        let mut metrics = String::new();
        // A string takes all that is written to it.
        let _ = text::encode(&mut metrics, &self.metrics);
        let accept = headers.get_all(header::ACCEPT).iter();
        let accept: Vec<_> = accept.filter_map(|value| value.to_str().ok()).collect();
        match prefers_openmetrics(&accept.join(",")) {
            true => answer(StatusCode::OK, OPENMETRICS, metrics),
            false => answer(StatusCode::OK, PROMETHEUS, to_prometheus(&metrics)),
        }
    }

    /// How long ago the latest snapshot was published.
    fn age(&self) -> Duration {
        self.latest.read().at.elapsed()
    }

    fn health(&self) -> Response<Full<Bytes>> {
        match self.latest.read().stats.not_serving {
            Some(reason) => answer(StatusCode::SERVICE_UNAVAILABLE, TEXT, format!("{reason}\n")),
            None => answer(StatusCode::OK, TEXT, "serving\n"),
        }
    }
}

fn answer(status: StatusCode, kind: &'static str, body: impl Into<Bytes>) -> Response<Full<Bytes>> {
    let mut answer = Response::new(Full::new(body.into()));
    *answer.status_mut() = status;
    let headers = answer.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(kind));
    headers.insert(header::CONTENT_SECURITY_POLICY, NOTHING);
    for (name, value) in ALWAYS {
        headers.insert(name, HeaderValue::from_static(value));
    }
    answer
}
