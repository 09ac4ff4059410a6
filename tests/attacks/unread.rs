//! More unread data than the relay may buffer.

use std::{io, net::Ipv4Addr, time::Duration};

use libp2p::{futures::future, identity::Keypair};
use tokio::time::{sleep, timeout};

use super::testbed::{FREED_FOR_MEMORY, SMALL_BUDGET, Testbed};
use crate::common::{
    by_hand::{RST, SYN, WINDOW_UPDATE, data, frame},
    messages::{OK, connect, reserve},
    raw_peers::{
        AT_A_TIME, Background, RawPeer, address, expect_all, hold_without_reading, hop_opening,
        run_each, short_or_long,
    },
    within,
};

/// How long a stream is watched for a reset.
const RESET_TIMEOUT: Duration = Duration::from_secs(2);

/// The interval at which the metrics are polled.
const POLL_INTERVAL: Duration = Duration::from_millis(100);

/// A window larger than all that is sent.
const LARGE_WINDOW: u32 = 1 << 30;

/// The relay reads nothing of a source until its target answers; it resets the streams whose bytes have waited the
/// longest.
#[tokio::test]
async fn more_unread_data_than_the_budget_allows() {
    const ATTACKERS: usize = 48;
    /// So few that each address buffers more than the bystanders.
    const ADDRESSES: usize = 8;
    const FRAMES: usize = 2500; // of 100 bytes: a quarter of a MiB
    /// The budget, and what the allocator may retain beyond it, in KiB.
    const MEMORY: u64 = (8 + 16) * 1024;
    let rounds = short_or_long(1, 20);
    let [circuits, buffered] = SMALL_BUDGET;
    // The targets read nothing between two rounds, and so answer no probe.
    let mut testbed = Testbed::start(&[circuits, buffered, "--heartbeat=0s"]).await;
    let port = testbed.port;
    let resident_before = testbed.resident();
    let freed = testbed.counter(FREED_FOR_MEMORY[0]);
    let attack = async move {
        let pairs = run_each(ATTACKERS, AT_A_TIME, move |number| async move {
            let mut target = RawPeer::connect_with_retry(port, address(number % ADDRESSES)).await;
            assert_eq!(target.request(&reserve()).await?.1, OK);
            let source = RawPeer::connect_with_retry(port, address(number % ADDRESSES)).await;
            Ok((source, target))
        });
        let mut pairs = expect_all(pairs.await);
        let mut reset = 0;
        for _ in 0..rounds {
            // All send at once, and wait for resets only once the relay has freed a stream.
            let freed_before = freed().await;
            let sent = pairs.into_iter().map(|(mut source, target)| async move {
                let stream = source.next_stream();
                let request = hop_opening(&connect(target.peer));
                source.send(&data(SYN, stream, &request)).await?;
                source.send(&data(0, stream, &[7; 100]).repeat(FRAMES)).await?;
                Ok((source, target, stream))
            });
            let sent = expect_all(future::join_all(sent).await);
            within(async {
                while freed().await == freed_before {
                    sleep(POLL_INTERVAL).await;
                }
            })
            .await;
            let ended = sent.into_iter().map(|(mut source, target, stream)| async move {
                let is_reset = source.is_reset(stream, RESET_TIMEOUT * 5).await?;
                source.send(&data(RST, stream, &[])).await?;
                Ok((is_reset, (source, target)))
            });
            let ended = expect_all(future::join_all(ended).await);
            reset += ended.iter().filter(|(is_reset, _)| *is_reset).count();
            pairs = ended.into_iter().map(|(_, pair)| pair).collect();
        }
        let stay = pairs
            .into_iter()
            .map(|(source, target)| [source.stay_connected(), target.stay_connected()]);
        (reset, stay.collect::<Vec<_>>())
    };
    let streams = ATTACKERS * rounds;
    let size = format!("{} MiB in {streams} streams; budget 8 MiB", streams / 4);
    let what = "more than --max-buffered, unread by the relay's tasks";
    let ((reset, pairs), impact) = testbed.attack(what, &size, attack).await;
    assert!(reset > 0, "no reset was received");
    let growth = impact.peak.saturating_sub(resident_before);
    assert!(growth <= MEMORY, "{growth} KiB");
    drop(pairs);
    testbed.assert_restored().await;
}

/// Targets that open their windows and never read: above three quarters of `--max-buffered` their circuits end as
/// stalled, and their buffers are freed although the targets cannot be notified. A circuit of another address that was
/// stalled before theirs continues.
#[tokio::test]
async fn targets_that_never_read() {
    /// So many that one and a half initial windows (256 KiB) for each exceed the budget.
    const PAIRS: usize = 64;
    /// More than the path's socket buffers hold, in bytes; the targets' are small.
    const OFFER: usize = 24 * 1024 * 1024;
    let mut testbed = Testbed::start(&SMALL_BUDGET).await;
    let port = testbed.port;
    let (mut source, stream, mut other_target) =
        stalled_pair(port, address(1)).await.expect("a circuit");
    let offering = tokio::spawn(async move {
        source.write(stream, OFFER).await.map(|()| source) // it ends once the target reads
    });
    let attack = async move {
        let opened = run_each(PAIRS, AT_A_TIME, move |_| stalled_pair(port, address(0)));
        let opened = expect_all(opened.await).into_iter();
        let offered = opened.map(|(mut source, stream, target)| async move {
            // Until the relay grants no more credit, or resets the stream.
            let _ = timeout(RESET_TIMEOUT * 3, source.write(stream, OFFER)).await;
            let target = Background::spawn(hold_without_reading(target));
            (source.stay_connected(), target)
        });
        future::join_all(offered).await
    };
    let size = format!("{PAIRS} circuits of one address whose targets read nothing; budget 8 MiB");
    let what = "more than --max-buffered, not read by targets";
    let (pairs, _) = testbed.attack(what, &size, attack).await;
    testbed.wait_until_counted(r#"relaylet_circuits_closed_total{end="stalled"}"#, 1.0).await;
    let mut received = 0;
    while received < OFFER {
        let frame = within(other_target.read_frame()).await.expect("a frame");
        assert!(!frame.has(RST), "after {received} bytes");
        received += frame.body.len();
    }
    offering.await.expect("no panic").expect("it was not reset");
    drop((pairs, other_target));
    testbed.assert_restored().await;
}

/// A circuit whose target grants credit and reads nothing more: the source, its stream, and the target.
async fn stalled_pair(port: u16, from: Ipv4Addr) -> io::Result<(RawPeer, u32, RawPeer)> {
    let keypair = Keypair::generate_ed25519();
    let mut target = RawPeer::connect_with_small_buffer(&keypair, port, from).await?;
    assert_eq!(target.request(&reserve()).await?.1, OK);
    let mut source = RawPeer::connect_with_retry(port, from).await;
    let stream = source.next_stream();
    let request = data(SYN, stream, &hop_opening(&connect(target.peer)));
    source.send(&request).await?;
    let circuit = target.accept_count(1).await?[0];
    let window = frame(WINDOW_UPDATE, 0, circuit, LARGE_WINDOW);
    target.send(&window).await?;
    Ok((source, stream, target))
}
