//! What there is to be had on the HTTP port, and nothing there changes anything.
//!
//! The page stands in one document, which loads nothing but the JSON beside it: the browser is told
//! the hashes of its script and its style, and to run no others.

use std::{
    cell::RefCell,
    sync::Arc,
    task::{Poll, ready},
    time::{Duration, Instant},
};

use data_encoding::BASE64;
use http_body_util::Full;
use hyper::{
    Method, Request, Response, StatusCode,
    body::Bytes,
    header::{self, HeaderName, HeaderValue},
};
use prometheus_client::{encoding::text, registry::Registry};
use sha2::{Digest, Sha256};

use super::snapshot::LatestSnapshot;

/// The page's parts. The first has room for the other two.
const PAGE: &str = include_str!("page/index.html");
const STYLE: &str = include_str!("page/style.css");
const SCRIPT: &str = include_str!("page/script.js");

/// If the relay has not been heard of for so long, it does not serve.
const STUCK: Duration = Duration::from_secs(30);

const HTML: &str = "text/html; charset=utf-8";
const JSON: &str = "application/json";
const TEXT: &str = "text/plain; charset=utf-8";
const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// What a browser may do with anything but the page: nothing.
const NOTHING: HeaderValue = HeaderValue::from_static("default-src 'none'; frame-ancestors 'none'");

/// What stands in the head of every answer.
const ALWAYS: [(HeaderName, &str); 4] = [
    (header::CACHE_CONTROL, "no-store"),
    (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
    (header::REFERRER_POLICY, "no-referrer"),
    (HeaderName::from_static("cross-origin-resource-policy"), "same-origin"),
];

/// All of it.
pub struct Site {
    latest: Arc<LatestSnapshot>,
    metrics: Registry,
    page: Bytes,
    page_policy: HeaderValue,
    /// The JSON that was made last, and from which snapshot.
    json: RefCell<Option<(Instant, Bytes)>>,
}

impl Site {
    /// What this snapshot and this registry show.
    pub fn new(latest: Arc<LatestSnapshot>, metrics: Registry) -> Self {
        let page = PAGE.replace("/* style.css */", STYLE).replace("/* script.js */", SCRIPT);
        let hash = |text| format!("'sha256-{}'", BASE64.encode(&Sha256::digest(text)));
        let policy = format!(
            "default-src 'none'; connect-src 'self'; img-src data:; script-src {}; style-src {}; \
             base-uri 'none'; form-action 'none'; frame-ancestors 'none'; \
             require-trusted-types-for 'script'",
            hash(SCRIPT),
            hash(STYLE)
        );
        Self {
            latest,
            metrics,
            page: page.into(),
            page_policy: HeaderValue::try_from(policy).unwrap_or(NOTHING),
            json: RefCell::new(None),
        }
    }

    /// The answer to a request. If it is not there yet, to be asked for again.
    pub fn answer<B>(&self, request: &Request<B>) -> Poll<Response<Full<Bytes>>> {
        if !matches!(*request.method(), Method::GET | Method::HEAD) {
            let text = "nothing can be changed here: GET and HEAD only\n";
            let mut answer = answer(StatusCode::METHOD_NOT_ALLOWED, TEXT, text);
            let allowed = HeaderValue::from_static("GET, HEAD");
            answer.headers_mut().insert(header::ALLOW, allowed);
            return Poll::Ready(answer);
        }
        Poll::Ready(match request.uri().path() {
            "/" => {
                let mut answer = answer(StatusCode::OK, HTML, self.page.clone());
                let policy = self.page_policy.clone();
                let headers = answer.headers_mut();
                headers.insert(header::CONTENT_SECURITY_POLICY, policy);
                answer
            }
            "/status.json" => answer(StatusCode::OK, JSON, ready!(self.status())),
            "/metrics" => answer(StatusCode::OK, OPEN_METRICS, self.metrics()),
            "/healthz" => self.health(),
            _ => {
                let text = "nothing here: try /, /status.json, /metrics or /healthz\n";
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
        let mut json = self.json.borrow_mut();
        if let Some((of, json)) = &*json
            && *of == snapshot.at
        {
            return Poll::Ready(json.clone());
        }
        let made = Bytes::from(serde_json::to_vec(status).unwrap_or_default());
        *json = Some((snapshot.at, made.clone()));
        Poll::Ready(made)
    }

    fn metrics(&self) -> String {
        let mut metrics = String::new();
        // A string takes all that is written to it.
        let _ = text::encode(&mut metrics, &self.metrics);
        metrics
    }

    fn health(&self) -> Response<Full<Bytes>> {
        let snapshot = self.latest.read();
        let age = snapshot.at.elapsed();
        if age > STUCK {
            let text = format!("the relay has not been heard of for {} s\n", age.as_secs());
            return answer(StatusCode::SERVICE_UNAVAILABLE, TEXT, text);
        }
        if snapshot.draining {
            return answer(StatusCode::SERVICE_UNAVAILABLE, TEXT, "draining\n");
        }
        answer(StatusCode::OK, TEXT, "serving\n")
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
