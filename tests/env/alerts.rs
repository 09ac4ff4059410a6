//! `tests/deploy/alerts.yml`, tested with promtool, and with a Prometheus that scrapes a relay as the documentation says.

use std::{fs, process::Command, time::Instant};

use serde_json::Value;
use tempfile::TempDir;
use tokio::time::{Duration, sleep};

use crate::{
    common::{Client, Relay, TEST_TIMEOUT, free_port, http},
    deploy::{Server, documented, run},
};

const RULES: &str = "tests/deploy/alerts.yml";

#[test]
#[ignore = "needs promtool"]
fn each_alert_fires_for_its_condition_and_no_other() {
    run(Command::new("promtool").args(["check", "rules", "--lint-fatal", RULES]));
    let passed =
        run(Command::new("promtool").args(["test", "rules", "tests/deploy/alerts_test.yml"]));
    assert!(passed.contains("SUCCESS"), "{passed}");
    // If an alert never fires, a test fails.
    let rules = fs::read_to_string(RULES).unwrap();
    let folder = TempDir::new().unwrap();
    fs::copy("tests/deploy/alerts_test.yml", folder.path().join("test.yml")).unwrap();
    for line in rules.lines().filter(|line| line.contains("expr: ")) {
        let never = rules.replace(line, "        expr: vector(1) > 2");
        fs::write(folder.path().join("alerts.yml"), never).unwrap();
        let mut test = Command::new("promtool");
        let output = test.args(["test", "rules"]).arg(folder.path().join("test.yml")).output();
        assert!(!output.unwrap().status.success(), "no test fails without {line}");
    }
}

#[tokio::test]
#[ignore = "needs prometheus"]
async fn prometheus_alerts_that_a_relay_is_full_and_that_it_is_down() {
    let relay = Relay::start(&[http::ON_ANY_PORT, "--max-reservations=1"]);
    let prometheus = start_prometheus(http::port(&relay).await);
    let mut client = Client::connect(&relay).await;
    client.reserve().await;
    until_alerting(&prometheus, &["RelayletFull"]).await;
    drop(relay);
    until_alerting(&prometheus, &["RelayletDown"]).await;
}

/// Starts a Prometheus that scrapes this port of a relay every second, by the configuration in the documentation, and whose
/// alerts fire without a delay.
fn start_prometheus(relay: u16) -> Server {
    let folder = TempDir::new().unwrap();
    let rules = fs::read_to_string(RULES).unwrap().replace("for: 10m", "for: 0s");
    fs::write(folder.path().join("alerts.yml"), rules).unwrap();
    let scrape = documented("yaml", "scrape_configs:").replace("9180", &relay.to_string());
    let every_second = "global: { scrape_interval: 1s, evaluation_interval: 1s }\n";
    let file = folder.path().join("prometheus.yml");
    fs::write(&file, format!("{every_second}{scrape}")).unwrap();
    run(Command::new("promtool").args(["check", "config"]).arg(&file));
    let port = free_port();
    let mut prometheus = Command::new("prometheus");
    prometheus
        .arg(format!("--config.file={}", file.display()))
        .arg(format!("--storage.tsdb.path={}", folder.path().join("data").display()))
        .arg(format!("--web.listen-address=127.0.0.1:{port}"));
    Server::start(&mut prometheus, folder, port)
}

/// Waits until these alerts fire, and no other.
async fn until_alerting(prometheus: &Server, expected: &[&str]) {
    let start = Instant::now();
    loop {
        let answer = http::fetch(prometheus.port, "GET", "/api/v1/alerts").await;
        // 503 while it starts.
        let body = if answer.status == 200 { &answer.body } else { "null" };
        let alerts: Value = serde_json::from_str(body).expect("JSON");
        let firing = alerts["data"]["alerts"].as_array().map(|alerts| {
            let names = alerts.iter().filter(|alert| alert["state"] == "firing");
            names.map(|alert| alert["labels"]["alertname"].as_str().unwrap()).collect::<Vec<_>>()
        });
        if firing.as_deref() == Some(expected) {
            return;
        }
        assert!(start.elapsed() < TEST_TIMEOUT, "{expected:?}: {answer:?}");
        sleep(Duration::from_millis(200)).await;
    }
}
