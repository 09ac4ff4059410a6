//! Floods of requests.

use std::{
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};

use libp2p::{
    PeerId, Stream,
    futures::{AsyncReadExt, AsyncWriteExt, FutureExt, StreamExt, future},
};
use prost::Message;
use tokio::time::sleep;

use super::testbed::Testbed;
use crate::common::{
    STOP,
    by_hand::{RST, data},
    messages::{
        CONNECTION_FAILED, HopMessage, OK, RESERVATION_REFUSED, RESOURCE_LIMIT_EXCEEDED, connect,
        reserve, stop_status,
    },
    raw_peers::{AT_A_TIME, RawPeer, address, address_in, expect_all, run_each, short_or_long},
    within,
};

/// The stream was reset: streams of its address arrive too fast.
const RESET: Option<i32> = None;

/// The metrics of CONNECTs that were refused because of their rate.
const TOO_OFTEN: [&str; 2] = [
    r#"relaylet_requests_refused_total{request="CONNECT",reason="the peer asks too often"}"#,
    r#"relaylet_requests_refused_total{request="CONNECT",reason="the peers of the address ask too often"}"#,
];

/// The interval at which a count is polled.
const POLL_INTERVAL: Duration = Duration::from_millis(100);

/// How many requests are sent before their answers are read.
const AT_ONCE: usize = 20;

/// Requests of all kinds, including those that are refused without a lookup.
#[tokio::test]
async fn requests_from_one_address() {
    const IDENTITIES: usize = 100;
    const SLOTS: usize = 64; // of one address
    const OWN_BURST: f64 = 8.0; // the burst of each connection, whatever others do
    const OWN_RATE: f64 = 0.4;
    const SHARED_BURST: f64 = 1024.0; // the burst that their address shares
    const SHARED_RATE: f64 = 64.0;
    // Those that hold a slot are not closed, and are read more slowly: a second or so for each round.
    let rounds = short_or_long(4, 20);
    let mut testbed = Testbed::start(&[]).await;
    let port = testbed.port;
    let mut holder = RawPeer::connect_with_retry(port, address(0)).await;
    assert_eq!(holder.request(&reserve()).await.expect("an answer").1, OK);
    let flood = async move {
        let start = Instant::now();
        let flood = run_each(IDENTITIES, AT_A_TIME, move |_| async move {
            let mut peer = RawPeer::connect_with_retry(port, address(0)).await;
            let malformed = HopMessage { kind: Some(7), ..HopMessage::default() };
            let to_unknown = connect(PeerId::random());
            let requests = [reserve(), to_unknown, malformed, connect(peer.peer)];
            let requests: Vec<_> = requests.into_iter().cycle().take(AT_ONCE).collect();
            let mut answered = 0;
            for _ in 0..rounds {
                // It holds no slot: if it goes on for long, it is closed.
                let Ok(answers) = peer.request_all(&requests).await else {
                    return (None, answered);
                };
                answered += answers.iter().filter(|(_, status)| status.is_some()).count();
            }
            (Some(peer.stay_connected()), answered)
        });
        // The newcomers wait for the holder's slot: its activity keeps it.
        let is_over = AtomicBool::new(false);
        let flood = flood.inspect(|_| is_over.store(true, Ordering::Relaxed));
        let keep_alive = async {
            while !is_over.load(Ordering::Relaxed) {
                holder.read_until_pong().await.expect("it is connected");
                sleep(Duration::from_secs(1)).await;
            }
        };
        let (flood, ()) = future::join(flood, keep_alive).await;
        assert_eq!(holder.request(&reserve()).await.expect("an answer").1, OK, "it renews");
        (flood, start.elapsed().as_secs_f64(), holder.stay_connected())
    };
    let size = format!("{IDENTITIES} identities, {} each", rounds * AT_ONCE);
    let what = "requests from one address";
    let ((peers, took, _holder), _) = testbed.attack(what, &size, flood).await;
    let answered: usize = peers.iter().map(|(_, answered)| answered).sum();
    let limit =
        SHARED_BURST + SHARED_RATE * took + (OWN_BURST + OWN_RATE * took) * IDENTITIES as f64;
    println!("{answered} of {} were answered", IDENTITIES * rounds * AT_ONCE);
    assert!((answered as f64) < limit.ceil(), "{answered} were answered, at most {limit} may be");
    let counts = testbed.until(|counts| counts.connections <= 3 + IDENTITIES).await;
    // In a long flood only those that hold a slot stay connected.
    let least = short_or_long(3 + IDENTITIES, 2 + SLOTS);
    assert!(counts.connections >= least, "{counts:?}");
    assert!((2..=1 + SLOTS).contains(&counts.live), "{counts:?}");
    drop((peers, _holder));
    testbed.assert_restored().await;
}

#[tokio::test]
#[ignore = "takes long: .ci/attacks"]
async fn reserves_from_a_thousand_identities() {
    const SUBNETS: usize = 8;
    const ADDRESSES: usize = 5; // of each
    const IDENTITIES: usize = 1000;
    const SLOTS: usize = 512; // the caps by subnet allow the attackers all of them
    let rounds = short_or_long(3, 100);
    let slots = format!("--max-reservations={SLOTS}");
    let mut testbed = Testbed::start(&[&slots]).await;
    let port = testbed.port;
    let flood = async move {
        let flood = run_each(IDENTITIES, AT_A_TIME, move |number| async move {
            let from = address_in(number % SUBNETS, number / SUBNETS % ADDRESSES);
            let mut peer = RawPeer::connect_with_retry(port, from).await;
            for _ in 0..rounds {
                let (_, status) = peer.request(&reserve()).await?;
                assert!(
                    [OK, RESERVATION_REFUSED, RESOURCE_LIMIT_EXCEEDED, RESET].contains(&status)
                );
            }
            Ok(peer.stay_connected())
        });
        expect_all(flood.await)
    };
    let size = format!("{rounds} each, from 40 addresses, for {SLOTS} slots");
    let what = "RESERVEs from 1,000 identities";
    let (peers, _) = testbed.attack(what, &size, flood).await;
    // They got all slots and no more than those.
    let counts = testbed.until(|counts| counts.connections == 2 + IDENTITIES).await;
    assert_eq!(counts.live + counts.grace, SLOTS);
    drop(peers);
    testbed.assert_restored().await;
}

#[tokio::test]
async fn connects_to_one_victim() {
    const IDENTITIES: usize = 100;
    const ADDRESSES: usize = 10;
    const BURST: f64 = 30.0; // of each identity
    const RATE: f64 = 0.5; // a second
    let rounds = short_or_long(3, 200);
    let mut testbed = Testbed::start(&[]).await;
    let port = testbed.port;
    // The target of the bystanders. It accepts each circuit.
    let victim = &mut testbed.bystanders.target;
    let request = connect(victim.peer);
    let mut stops = victim.accept(STOP);
    let accepting = tokio::spawn(async move {
        let accepted = stop_status(100).encode_length_delimited_to_vec();
        while let Some((_, mut stop)) = stops.next().await {
            let accepted = accepted.clone();
            tokio::spawn(async move {
                // The source may be gone.
                let _ = write_and_flush(&mut stop, &accepted).await;
                let _ = stop.read_to_end(&mut Vec::new()).await;
            });
        }
    });
    let flood = async move {
        let flood = run_each(IDENTITIES, AT_A_TIME, move |number| {
            let request = request.clone();
            async move {
                let mut peer = RawPeer::connect_with_retry(port, address(number % ADDRESSES)).await;
                let start = Instant::now();
                let (mut opened, mut answered) = (0, 0);
                for _ in 0..rounds {
                    let requests = vec![request.clone(); AT_ONCE];
                    let Ok(answers) = peer.request_all(&requests).await else {
                        assert!(short_or_long(false, true), "closed after a short flood");
                        break;
                    };
                    for (stream, status) in answers {
                        let expected = [OK, RESOURCE_LIMIT_EXCEEDED, CONNECTION_FAILED, RESET];
                        assert!(expected.contains(&status));
                        answered += usize::from(status != RESET);
                        if status == OK {
                            opened += 1;
                            let _ = peer.send(&data(RST, stream, &[])).await; // unless it is closed
                        }
                    }
                }
                (opened, answered, start.elapsed().as_secs_f64())
            }
        });
        flood.await
    };
    let size = format!("{IDENTITIES} identities, {} each", rounds * AT_ONCE);
    let what = "CONNECTs to one victim, which accepts all";
    let (flood, _) = testbed.attack(what, &size, flood).await;
    assert!(flood.iter().any(|(opened, ..)| *opened > 0));
    // Of those that are answered, each above the rate is refused.
    let limit: f64 = flood.iter().map(|(.., took)| BURST + RATE * took).sum();
    let answered: usize = flood.iter().map(|(_, answered, _)| answered).sum();
    let least = answered as f64 - limit.ceil();
    within(async {
        loop {
            let [of_peers, of_addresses] = TOO_OFTEN.map(|refused| testbed.count(refused));
            if of_peers.await + of_addresses.await >= least {
                break;
            }
            sleep(POLL_INTERVAL).await;
        }
    })
    .await;
    testbed.assert_restored().await;
    accepting.abort();
}

async fn write_and_flush(stream: &mut Stream, bytes: &[u8]) -> std::io::Result<()> {
    stream.write_all(bytes).await?;
    stream.flush().await
}
