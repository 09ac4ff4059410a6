//! The HTTP port: its paths and formats, what the metrics and the status mean, and that its clients do not affect those
//! of the relay.

use std::{
    collections::BTreeMap,
    fs,
    net::TcpListener,
    time::{Duration, Instant},
};

use crate::common::{
    Relay, TEST_TIMEOUT, assert_relayed, by_hand,
    bystanders::Bystanders,
    child_process::open_files,
    circuit, command, free_port,
    http::{ON_ANY_PORT, dial, fetch, fetch_with, get, port, read_response, samples, send_raw},
    messages::OK,
    output, scenario, source_and_target, within,
};
use libp2p::{futures::future, identity::Keypair};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    time::sleep,
};

/// How often metrics and status are polled. They change once a second.
const POLL_INTERVAL: Duration = Duration::from_millis(50);

/// How many HTTP connections the relay serves at a time.
const MOST_CONNECTIONS: usize = 32;

// ---- Paths, headers and formats

#[tokio::test]
async fn each_path_has_its_content_type_and_strict_browser_headers() {
    let relay = Relay::start(&[ON_ANY_PORT]);
    let port = port(&relay).await;
    for (path, status, content_type) in [
        ("/", 200, "text/html; charset=utf-8"),
        ("/?from=somewhere", 200, "text/html; charset=utf-8"),
        ("/status.json", 200, "application/json"),
        ("/healthz", 200, "text/plain; charset=utf-8"),
        ("/metrics", 200, "application/openmetrics-text; version=1.0.0; charset=utf-8"),
        ("/nothing", 404, "text/plain; charset=utf-8"),
        ("/../etc/passwd", 404, "text/plain; charset=utf-8"),
    ] {
        let answer = fetch(port, "GET", path).await;
        assert_eq!(answer.status, status, "{path}");
        assert_eq!(answer.headers["content-type"], content_type, "{path}");
        let length: usize = answer.headers["content-length"].parse().unwrap();
        assert_eq!(answer.body.len(), length, "{path}");
        assert_eq!(answer.headers["cache-control"], "no-store");
        assert_eq!(answer.headers["x-content-type-options"], "nosniff");
        assert_eq!(answer.headers["referrer-policy"], "no-referrer");
        let policy = &answer.headers["content-security-policy"];
        assert!(policy.starts_with("default-src 'none'; "), "{policy}");
        assert!(policy.contains("frame-ancestors 'none'"), "{policy}");
        assert!(!policy.contains("unsafe"), "{policy}");

        let head = fetch(port, "HEAD", path).await;
        assert_eq!((head.status, &head.body[..]), (status, ""), "HEAD {path}");
        assert_eq!(head.headers["content-type"], content_type, "HEAD {path}");
    }
    let page = fetch(port, "GET", "/").await;
    let policy = &page.headers["content-security-policy"];
    assert_eq!(policy.matches("'sha256-").count(), 2, "{policy}");
    // The page loads nothing from elsewhere; `browser.rs` tests its style and script.
    for elsewhere in ["http://", "https://", "//cdn", "@import", "src="] {
        let used = page.body.replace("http://www.w3.org/2000/svg", "");
        assert!(!used.contains(elsewhere), "{elsewhere}");
    }
    assert_eq!(get(port, "/healthz").await, "serving\n");
}

#[tokio::test]
async fn a_draining_relay_fails_its_health_check() {
    // A port that nothing else takes while the draining relay does not listen on it.
    let listen = format!("--listen=/ip4/127.0.0.1/tcp/{}", free_port());
    let relay = Relay::start_listening(&[&listen, ON_ANY_PORT, "--drain=10m"]);
    let port = port(&relay).await;
    for (draining, status, body) in [(true, 503, "draining\n"), (false, 200, "serving\n")] {
        relay.signal("USR1");
        status_when(port, |status| status["draining"] == draining).await;
        let health = fetch(port, "GET", "/healthz").await;
        assert_eq!((health.status, &health.body[..]), (status, body));
        let serves = samples(&get(port, "/metrics").await)["libp2p_relaysvc_status"];
        assert_eq!(serves, if draining { 0.0 } else { 1.0 });
    }
    assert_eq!(relay.next_address(), relay.address);
    // After SIGTERM, too, while a circuit keeps the relay from exiting.
    let (mut alice, mut bob) = source_and_target(&relay).await;
    let _ends = circuit(&mut alice, &mut bob).await;
    relay.signal("TERM");
    status_when(port, |status| status["draining"] == true).await;
    assert_eq!(fetch(port, "GET", "/healthz").await.status, 503);
}

#[tokio::test]
async fn methods_other_than_get_and_head_are_refused() {
    let relay = Relay::start(&[ON_ANY_PORT]);
    let port = port(&relay).await;
    for method in ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "BREW"] {
        for path in ["/", "/status.json", "/metrics", "/healthz", "/nothing"] {
            let answer = fetch(port, method, path).await;
            assert_eq!(answer.status, 405, "{method} {path}");
            assert_eq!(answer.headers["allow"], "GET, HEAD");
        }
    }
    let with_body =
        "POST / HTTP/1.1\r\nHost: relay\r\nConnection: close\r\nContent-Length: 6\r\n\r\nplease";
    assert_eq!(send_raw(port, with_body.as_bytes()).await.status, 405);
}

#[tokio::test]
async fn requests_on_one_connection_are_answered_in_order() {
    let relay = Relay::start(&[ON_ANY_PORT]);
    let port = port(&relay).await;
    let mut stream = dial(port).await;
    for path in ["/healthz", "/status.json", "/metrics", "/"] {
        let request = format!("GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            head.push(within(stream.read_u8()).await.unwrap());
        }
        let head = String::from_utf8(head).unwrap();
        let length = head.lines().find_map(|l| l.strip_prefix("content-length: "));
        let mut body = vec![0; length.unwrap().parse().unwrap()];
        within(stream.read_exact(&mut body)).await.unwrap();
    }
    // So are two requests in one write.
    let both = "GET /healthz HTTP/1.1\r\nHost: relay\r\n\r\n\
                GET /nothing HTTP/1.1\r\nHost: relay\r\nConnection: close\r\n\r\n";
    stream.write_all(both.as_bytes()).await.unwrap();
    let mut text = String::new();
    within(stream.read_to_string(&mut text)).await.unwrap();
    let statuses: Vec<_> = text.matches("HTTP/1.1 ").collect();
    assert_eq!(statuses.len(), 2);
    assert!(text.starts_with("HTTP/1.1 200") && text.contains("HTTP/1.1 404"), "{text}");
}

/// `nc -N` closes its write half after the request. The status then takes up to a second.
#[tokio::test]
async fn a_client_that_has_closed_its_write_half_gets_its_answer() {
    let relay = Relay::start(&[ON_ANY_PORT]);
    let port = port(&relay).await;
    for path in ["/healthz", "/status.json", "/"] {
        let mut stream = dial(port).await;
        let request = format!("GET {path} HTTP/1.0\r\nHost: localhost\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        stream.shutdown().await.unwrap();
        assert_eq!(read_response(&mut stream).await.status, 200, "{path}");
    }
}

#[tokio::test]
async fn unknown_host_names_are_refused_against_dns_rebinding() {
    let relay = Relay::start(&[ON_ANY_PORT, "--http-host=relay.example.org,relay.internal"]);
    let port = port(&relay).await;
    for (host, status) in [
        ("localhost", 200),
        (&format!("127.0.0.1:{port}"), 200),
        (&format!("[::1]:{port}"), 200),
        ("Relay.Example.org:80", 200),
        ("relay.internal", 200),
        ("evil.example", 421),
        ("localhost.evil.example", 421),
        ("127.0.0.1.evil.example", 421),
        ("", 421),
    ] {
        let host = format!("Host: {host}");
        for path in ["/", "/status.json"] {
            let answer = fetch_with(port, "GET", path, &host).await;
            assert_eq!(answer.status, status, "{host} {path}");
            let names_flag =
                answer.body.lines().count() == 1 && answer.body.contains("--http-host");
            assert!(status == 200 || names_flag, "{answer:?}");
        }
        // Prometheus and load balancers may use any name.
        for path in ["/metrics", "/healthz"] {
            assert_eq!(fetch_with(port, "GET", path, &host).await.status, 200, "{host} {path}");
        }
    }
    let absolute = "http://evil.example/status.json";
    assert_eq!(fetch(port, "GET", absolute).await.status, 421);
}

#[tokio::test]
async fn metrics_have_the_format_that_the_client_accepts() {
    let relay = Relay::start(&[ON_ANY_PORT]);
    let port = port(&relay).await;
    for (accept, content_type) in [
        ("X-None: none", "text/plain; version=0.0.4; charset=utf-8"),
        ("Accept: */*", "text/plain; version=0.0.4; charset=utf-8"),
        ("Accept: text/plain;version=0.0.4", "text/plain; version=0.0.4; charset=utf-8"),
        (
            "Accept: application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.2",
            "application/openmetrics-text; version=1.0.0; charset=utf-8",
        ),
    ] {
        let answer = fetch_with(port, "GET", "/metrics", &format!("Host: relay\r\n{accept}")).await;
        assert_eq!(answer.headers["content-type"], content_type, "{accept}");
        let is_openmetrics = content_type.starts_with("application");
        for word in ["# EOF", "# UNIT ", " info\n"] {
            assert_eq!(answer.body.contains(word), is_openmetrics, "{word}: {}", answer.body);
        }
        let build =
            if is_openmetrics { "relaylet_build info" } else { "relaylet_build_info gauge" };
        assert!(answer.body.contains(&format!("# TYPE {build}\n")), "{}", answer.body);
    }
}

/// Only on Linux the relay has all of these metrics.
#[cfg(target_os = "linux")]
#[tokio::test]
async fn the_metrics_include_the_process_and_the_configured_limits() {
    let flags =
        [ON_ANY_PORT, "--max-reservations=77", "--max-handshakes=7", "--circuit-duration=90s"];
    let relay = Relay::start(&flags);
    let port = port(&relay).await;
    let text = get(port, "/metrics").await;
    let metrics = samples(&text);
    let files = open_files(relay.pid()) as f64;
    let open = metrics["process_open_fds"];
    assert!((files - 5.0..files + 5.0).contains(&open), "{open} of {files}");
    assert!(metrics["process_max_fds"] > open);
    assert!(metrics["process_cpu_seconds_total"] > 0.0);
    let (resident, address_space) =
        (metrics["process_resident_memory_bytes"], metrics["process_virtual_memory_bytes"]);
    assert!(resident > 1e6 && address_space > resident, "{resident} of {address_space}");
    let now = std::time::SystemTime::UNIX_EPOCH.elapsed().unwrap().as_secs_f64();
    let age = now - metrics["process_start_time_seconds"];
    assert!((-1.0..TEST_TIMEOUT.as_secs_f64()).contains(&age), "{age}");
    for (setting, limit) in [
        ("max-reservations", 77.0),
        ("max-connections", 154.0),
        ("max-handshakes", 7.0),
        ("max-circuits", 154.0),
        ("circuit-duration", 90.0),
        ("circuit-bytes", 131_072.0),
        ("bandwidth", 0.0),
    ] {
        assert_eq!(
            metrics[&format!("relaylet_limit{{setting=\"{setting}\"}}")],
            limit,
            "{setting}"
        );
    }
    let bucket = |le: &str| {
        metrics.contains_key(&format!(
            "libp2p_relaysvc_connection_duration_seconds_bucket{{le=\"{le}\"}}"
        ))
    };
    assert!(bucket("60.0") && bucket("90.0") && !bucket("120.0"), "{text}");
    // Each metric has a help text of several words.
    let helps: Vec<_> = text.lines().filter_map(|line| line.strip_prefix("# HELP ")).collect();
    for help in &helps {
        assert!(help.split(' ').count() > 2, "{help}");
    }
}

#[test]
fn an_unusable_http_address_is_a_one_line_error_that_names_the_flag() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let taken = taken.local_addr().unwrap();
    for (address, status) in [
        (taken.to_string(), 1),
        ("192.0.2.1:9180".into(), 1),
        ("9180".into(), 2),
        ("example.org:9180".into(), 2),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let mut command = command(&folder);
        command.args(["--listen=/ip4/127.0.0.1/tcp/0", "--http", &address]);
        let output = output(command.env("RUST_LOG", "error"));
        let line = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(status), "{line}");
        assert_eq!(line.lines().count(), 1, "{line}");
        assert!(line.contains("--http"), "{line}");
    }
}

// ---- What metrics and status mean

#[tokio::test]
async fn the_metrics_have_go_libp2ps_names_and_count_events() {
    let relay = scenario::relay();
    let port = port(&relay).await;
    let _clients = scenario::run(&relay).await;
    let expected = expected();
    // Metrics that do not come from events are updated once a second.
    let start = Instant::now();
    let samples = loop {
        let samples = samples(&get(port, "/metrics").await);
        let different = expected.iter().find(|(name, value)| samples.get(**name) != Some(value));
        if different.is_none() && samples["relaylet_sweeps_total"] >= 1.0 {
            break samples;
        }
        assert!(start.elapsed() < TEST_TIMEOUT, "{different:?} is missing: {samples:#?}");
        sleep(POLL_INTERVAL).await;
    };
    // All metrics under go-libp2p's prefix are expected, except for the durations.
    let durations = "libp2p_relaysvc_connection_duration_seconds_";
    for name in samples.keys().filter(|name| name.starts_with("libp2p_")) {
        assert!(expected.contains_key(&name[..]) || name.starts_with(durations), "{name}");
    }
    let bucket = |le| samples[&format!("{durations}bucket{{le=\"{le}\"}}")];
    for le in ["0.005", "0.01", "0.025", "0.05", "0.1", "0.25", "0.5", "1.0", "2.5", "5.0", "10.0"]
    {
        assert!(bucket(le) <= 2.0);
    }
    assert_eq!(bucket("+Inf"), 2.0);
    assert!(samples[&format!("{durations}sum")] > 0.0);
    let version = env!("CARGO_PKG_VERSION");
    assert_eq!(samples[&format!("relaylet_build_info{{version=\"{version}\"}}")], 1.0);
    assert!(samples["relaylet_sweep_seconds_total"] > 0.0);
}

/// The metrics after the [`scenario`].
fn expected() -> BTreeMap<&'static str, f64> {
    let samples = [
        ("libp2p_relaysvc_status", 1.0),
        (r#"libp2p_relaysvc_reservations_total{type="opened"}"#, 2.0),
        (r#"libp2p_relaysvc_reservations_total{type="renewed"}"#, 2.0),
        (r#"libp2p_relaysvc_reservations_total{type="closed"}"#, 1.0),
        (r#"libp2p_relaysvc_reservation_request_response_status_total{status="ok"}"#, 4.0),
        (r#"libp2p_relaysvc_reservation_request_response_status_total{status="rejected"}"#, 3.0),
        (r#"libp2p_relaysvc_reservation_request_response_status_total{status="error"}"#, 0.0),
        (r#"libp2p_relaysvc_reservation_rejections_total{reason="ip constraint violation"}"#, 1.0),
        (r#"libp2p_relaysvc_reservation_rejections_total{reason="resource limit exceeded"}"#, 1.0),
        (r#"libp2p_relaysvc_reservation_rejections_total{reason="permission denied"}"#, 1.0),
        (r#"libp2p_relaysvc_connections_total{type="opened"}"#, 3.0),
        (r#"libp2p_relaysvc_connections_total{type="closed"}"#, 2.0),
        (r#"libp2p_relaysvc_connection_request_response_status_total{status="ok"}"#, 3.0),
        (r#"libp2p_relaysvc_connection_request_response_status_total{status="rejected"}"#, 3.0),
        (r#"libp2p_relaysvc_connection_request_response_status_total{status="error"}"#, 1.0),
        (r#"libp2p_relaysvc_connection_rejections_total{reason="no reservation"}"#, 1.0),
        (r#"libp2p_relaysvc_connection_rejections_total{reason="permission denied"}"#, 1.0),
        (r#"libp2p_relaysvc_connection_rejections_total{reason="malformed message"}"#, 1.0),
        (r#"libp2p_relaysvc_connection_rejections_total{reason="resource limit exceeded"}"#, 0.0),
        ("libp2p_relaysvc_connection_duration_seconds_count", 2.0),
        ("libp2p_relaysvc_data_transferred_bytes_total", 1734.0),
        (r#"relaylet_slots{state="live"}"#, 1.0),
        (r#"relaylet_slots{state="grace"}"#, 0.0),
        (r#"relaylet_slots{state="free"}"#, 1.0),
        (r#"relaylet_slots_freed_total{reason="disconnected"}"#, 1.0),
        (r#"relaylet_slots_freed_total{reason="silent"}"#, 0.0),
        (r#"relaylet_connections_denied_total{reason="too many handshakes"}"#, 0.0),
        (r#"relaylet_requests_refused_total{request="RESERVE",reason="all slots are taken"}"#, 1.0),
        (
            r#"relaylet_requests_refused_total{request="RESERVE",reason="the rules do not allow it"}"#,
            1.0,
        ),
        (
            r#"relaylet_requests_refused_total{request="RESERVE",reason="the peer asks too often"}"#,
            1.0,
        ),
        (
            r#"relaylet_requests_refused_total{request="CONNECT",reason="the target holds no live reservation"}"#,
            1.0,
        ),
        (
            r#"relaylet_requests_refused_total{request="CONNECT",reason="the target could not be won"}"#,
            1.0,
        ),
        (r#"relaylet_requests_refused_total{request="unreadable",reason="not understood"}"#, 2.0),
        (r#"relaylet_relayed_bytes_total{direction="to target"}"#, 1704.0),
        (r#"relaylet_relayed_bytes_total{direction="to source"}"#, 30.0),
        ("relaylet_circuits", 1.0),
        (r#"relaylet_circuits_closed_total{end="finished"}"#, 1.0),
        (r#"relaylet_circuits_closed_total{end="data limit"}"#, 1.0),
        (r#"relaylet_circuits_closed_total{end="time limit"}"#, 0.0),
        ("relaylet_connections", 3.0),
        (r#"relaylet_busiest{resource="slots",address="127.0.0.1"}"#, 1.0),
        (r#"relaylet_busiest{resource="connections",address="127.0.0.1"}"#, 3.0),
        (r#"relaylet_busiest{resource="circuits",address="127.0.0.1"}"#, 1.0),
        ("relaylet_questions_asked_total", 0.0),
        ("relaylet_questions_unanswered_total", 0.0),
    ];
    samples.into()
}

/// Polls the status, which is updated once a second, until it is as wanted; returns it then.
pub async fn status_when(port: u16, wanted: impl Fn(&Value) -> bool) -> Value {
    let start = Instant::now();
    loop {
        let status = serde_json::from_str(&get(port, "/status.json").await).expect("JSON");
        if wanted(&status) {
            return status;
        }
        assert!(start.elapsed() < TEST_TIMEOUT, "{status:#}");
        sleep(POLL_INTERVAL).await;
    }
}

#[tokio::test]
async fn the_status_lists_slots_circuits_and_refusals() {
    let relay = scenario::relay();
    let port = port(&relay).await;
    let (bob, carol, mut circuit) = scenario::run(&relay).await;
    // 1. The relay, its limits and its slots.
    let status = status_when(port, |status| {
        status["relayed"]["to_target"] == 1704 && status["slots"]["free"] == 1
    })
    .await;
    assert_eq!(status["version"], env!("CARGO_PKG_VERSION"));
    assert_eq!(status["peer"], relay.peer.to_string());
    assert_eq!(status["draining"], false);
    let address = relay.address.to_string();
    let listens = status["addresses"][0].as_str().unwrap();
    assert!(address.starts_with(listens), "{listens}");
    assert_eq!(status["reachable_at"], json!([address]), "with the peer id");
    let limits = json!({
        "bandwidth": 0, "circuit-bytes": 1000, "circuit-duration": 120, "max-buffered": 16_777_216, "max-circuits": 128,
        "max-circuits-per-peer": 8, "max-connections": 128, "max-connections-per-peer": 8, "max-handshakes": 32,
        "max-reservations": 2, "max-streams": 512, "reservation-ttl": 3600,
    });
    assert_eq!(status["limits"], limits);
    let estimate = status["memory"]["estimate"].as_u64().unwrap();
    let logged = relay.wait_for_log("memory: at most ").await;
    assert!(
        logged.contains(&format!("at most {} MiB", estimate.div_ceil(1024 * 1024))),
        "{logged}"
    );
    if cfg!(target_os = "linux") {
        let resident = status["memory"]["resident"].as_u64().unwrap();
        assert!((1_000_000..estimate).contains(&resident), "{resident} of {estimate}");
    }
    assert_eq!(status["certificate_ends_in"], Value::Null);
    assert_eq!(status["slots"], json!({"total": 2, "live": 1, "grace": 0, "free": 1}));
    for (span, every) in [("hour", 15), ("day", 360)] {
        let curve = &status["history"][span];
        assert_eq!(curve["every"], every);
        assert_eq!(curve["points"][0], json!([0, 0, 2]), "when it started");
    }

    // 2. The peer that holds a slot.
    assert_eq!(status["holders"]["count"], 1);
    let holder = &status["holders"]["listed"][0];
    assert_eq!(holder["peer"], bob.peer.to_string());
    let from = holder["address"].as_str().unwrap();
    assert!(from.starts_with("/ip4/127.0.0.1/tcp/"), "{from}");
    assert_eq!((&holder["state"], &holder["circuits"]), (&json!("live"), &json!(1)));
    assert!((3000..3600).contains(&holder["ends_in"].as_u64().unwrap()));
    assert!(holder["silent_for"].as_u64().unwrap() < TEST_TIMEOUT.as_secs());

    // 3. The open circuit.
    assert_eq!(status["circuits"]["count"], 1);
    let open = &status["circuits"]["listed"][0];
    assert_eq!(open["source"], carol.peer.to_string());
    assert_eq!(open["target"], bob.peer.to_string());
    assert_eq!(open["carried"], json!({"to_target": 4, "to_source": 0}));
    assert_eq!(open["left"], json!({"to_target": 996, "to_source": 1000}));
    for party in ["source_address", "target_address"] {
        let from = open[party].as_str().unwrap();
        assert!(from.starts_with("/ip4/127.0.0.1/tcp/"), "{from}");
    }
    assert_ne!(open["source_address"], open["target_address"]);
    assert_eq!(open["target_address"], holder["address"]);
    let (open_for, ends_in) = (open["open_for"].as_u64(), open["ends_in"].as_u64());
    assert!((119..=120).contains(&(open_for.unwrap() + ends_in.unwrap())), "{open:#}");

    // 4. What was refused and freed, and how often.
    let tally = |list: &str, what: &str, why: &str| {
        let of = |tally: &&Value| tally["what"] == what && tally["why"] == why;
        let list = status[list].as_array().unwrap();
        list.iter().find(of).map_or(0, |tally| tally["count"].as_u64().unwrap())
    };
    assert_eq!(tally("refused", "RESERVE", "all slots are taken"), 1);
    assert_eq!(tally("refused", "CONNECT", "the rules do not allow it"), 1);
    assert_eq!(tally("refused", "request", "not understood"), 2);
    assert_eq!(tally("freed", "slot", "disconnected"), 1);
    let latest = status["latest_refusals"].as_array().unwrap();
    assert_eq!(latest.len(), 8);
    assert_eq!(latest[0]["why"], "not understood", "the last one first");
    assert_eq!(latest[7]["peer"], carol.peer.to_string());
    assert_eq!(latest[7]["why"], "all slots are taken");

    // 5. The rate of a circuit that transfers bytes.
    assert_relayed(&mut circuit.0, &mut circuit.1, &[7; 900]).await;
    status_when(port, |status| {
        let open = &status["circuits"]["listed"][0];
        open["carried"]["to_target"] == 904
            && open["rate"]["to_target"].as_u64() > Some(0)
            && status["rate"]["to_target"].as_u64() > Some(0)
    })
    .await;
}

#[tokio::test]
async fn a_frozen_peer_is_shown_in_grace_with_its_unanswered_probe() {
    let relay = Relay::start(&[
        ON_ANY_PORT,
        "--heartbeat=500ms",
        "--silence=2s",
        "--sweep=100ms",
        "--grace=1h",
    ]);
    let port = port(&relay).await;
    let peer = Keypair::generate_ed25519();
    let mut channel = by_hand::muxed_as(&relay, &peer).await;
    assert_eq!(by_hand::reserve(&mut channel, 1).await, OK);
    // From now on the peer is silent.
    let status = status_when(port, |status| status["slots"]["grace"] == 1).await;
    let holder = &status["holders"]["listed"][0];
    assert_eq!(holder["peer"], peer.public().to_peer_id().to_string());
    assert_eq!(holder["state"], "grace");
    assert_eq!(holder["address"], "/ip4/127.0.0.1");
    assert_eq!(holder["silent_for"], Value::Null);
    assert!((3000..3600).contains(&holder["ends_in"].as_u64().unwrap()));
    let asked = status["questions"]["asked"].as_u64().unwrap();
    assert!(asked >= 1, "no probe was sent"); // more than one if a sweep was late
    assert_eq!(status["questions"]["unanswered"], 1);
    let samples = samples(&get(port, "/metrics").await);
    assert_eq!(samples["relaylet_questions_asked_total"], asked as f64);
    assert_eq!(samples["relaylet_questions_unanswered_total"], 1.0);
    assert_eq!(samples[r#"relaylet_slots{state="grace"}"#], 1.0);
}

// ---- HTTP clients do not affect the relay

#[tokio::test]
async fn malformed_requests_get_an_error_or_are_closed() {
    let mut bystanders = Bystanders::start(&[ON_ANY_PORT]).await;
    let port = port(&bystanders.relay).await;
    let long = "a".repeat(1024 * 1024);
    let many = "X-Header: value\r\n".repeat(10_000);
    for request in [
        "\r\n\r\n\r\n\r\n".into(),
        "\0".repeat(1000),
        "GET".into(),
        "GET /".into(),
        "GET / HTTP/9.9\r\n\r\n".into(),
        "GET nowhere HTTP/1.1\r\n\r\n".into(),
        "GET / HTTP/1.1\r\nHost relay\r\n\r\n".into(),
        "GET / HTTP/1.1\r\nContent-Length: -1\r\n\r\n".into(),
        "GET / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n".into(),
        "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".into(),
        "\u{16}\u{3}\u{1}\u{2}\0\u{1}\0\u{1}\u{fc}\u{3}\u{3}".into(), // a TLS client
        format!("GET /{long} HTTP/1.1\r\n\r\n"),
        format!("GET / HTTP/1.1\r\nX-Long: {long}\r\n\r\n"),
        format!("GET / HTTP/1.1\r\n{many}\r\n"),
        long.clone(),
    ] {
        let shown = &request[..request.len().min(40)];
        let mut stream = dial(port).await;
        // The relay may close the connection before it has read all of it.
        let _ = within(stream.write_all(request.as_bytes())).await;
        let _ = stream.shutdown().await;
        let answer = read_response(&mut stream).await;
        let error = [0, 400, 404, 414, 431, 505].contains(&answer.status);
        assert!(error, "{shown:?}: {answer:?}");
    }
    // A request body is ignored.
    for request in [
        "GET /healthz HTTP/1.1\r\nContent-Length: 99999999999\r\n\r\nand so on".into(),
        format!("GET /healthz HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nfffff\r\n{long}"),
    ] {
        let answer = send_raw(port, request.as_bytes()).await;
        assert!([0, 200].contains(&answer.status), "{answer:?}");
    }
    assert_eq!(get(port, "/healthz").await, "serving\n");
    bystanders.assert_unharmed().await;
}

#[tokio::test]
async fn slow_http_clients_time_out() {
    let mut bystanders = Bystanders::start(&[ON_ANY_PORT]).await;
    let port = port(&bystanders.relay).await;
    let silent_client = async { read_response(&mut dial(port).await).await.status };
    let slow_client = async {
        let mut stream = dial(port).await;
        let start = Instant::now();
        for letter in b"GET /healthz HTTP/1.1\r\nX-Slow: ".iter().chain([b'a'].iter().cycle()) {
            if stream.write_all(&[*letter]).await.is_err() {
                break;
            }
            assert!(start.elapsed() < TEST_TIMEOUT, "the connection does not time out");
            sleep(POLL_INTERVAL).await;
        }
        read_response(&mut stream).await.status
    };
    let client_that_does_not_read = async {
        let mut stream = dial(port).await;
        let requests = "GET / HTTP/1.1\r\nHost: localhost\r\n\r\n".repeat(100);
        while within(stream.write_all(requests.as_bytes())).await.is_ok() {}
    };
    let clients = future::join3(silent_client, slow_client, client_that_does_not_read);
    let (silent, slow, ()) = clients.await;
    assert_eq!((silent, slow), (0, 0), "no status without an answer");
    assert_eq!(get(port, "/healthz").await, "serving\n");
    bystanders.assert_unharmed().await;
}

/// Only Linux lists the open files of a process.
#[cfg(target_os = "linux")]
#[tokio::test]
async fn a_thousand_idle_http_connections_do_not_block_others() {
    let mut bystanders = Bystanders::start(&[ON_ANY_PORT]).await;
    let port = port(&bystanders.relay).await;
    let before = open_files(bystanders.relay.pid());
    let mut idle = Vec::new();
    for _ in 0..1000 {
        idle.push(dial(port).await);
        // Meanwhile requests of others are answered.
        if idle.len() % 100 == 0 {
            assert_eq!(get(port, "/healthz").await, "serving\n");
        }
    }
    assert!(open_files(bystanders.relay.pid()) <= before + MOST_CONNECTIONS);
    bystanders.assert_unharmed().await;
    assert_eq!(get(port, "/healthz").await, "serving\n");
}

/// Only Linux counts the context switches of a thread.
#[cfg(target_os = "linux")]
#[tokio::test]
async fn http_requests_do_not_wake_the_thread_of_the_relay() {
    const REQUESTS: u64 = 1000;
    let relay = Relay::start(&[ON_ANY_PORT, "--threads=1"]);
    let port = port(&relay).await;
    let pid = relay.pid();
    // How often the relay's main thread began to wait.
    let waits = || {
        let status = fs::read_to_string(format!("/proc/{pid}/task/{pid}/status")).unwrap();
        let mut lines = status.lines();
        let line = lines.find(|l| l.starts_with("voluntary_ctxt")).unwrap();
        let number = line.split_whitespace().nth(1).unwrap();
        number.parse::<u64>().unwrap()
    };
    let (before, start) = (waits(), Instant::now());
    for number in 0..REQUESTS {
        let paths = ["/", "/metrics", "/status.json", "/healthz"];
        get(port, paths[number as usize % paths.len()]).await;
    }
    let waited = waits() - before;
    // It wakes by itself for the sweep and the status, once a second each.
    let by_itself = 20 + 5 * start.elapsed().as_secs();
    assert!(waited <= by_itself, "{waited}");
}
