//! A full table, and newcomers without a pause.

use std::{
    io,
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::{sync::Semaphore, time::sleep};

use super::testbed::Testbed;
use crate::common::{
    by_hand::{RST, SYN, data},
    messages::{OK, RESERVATION_REFUSED, RESOURCE_LIMIT_EXCEEDED, reserve},
    raw_peers::{Background, RawPeer, address, run_each, short_or_long},
};

/// The delay of a slow peer's answer to a probe: a third of the 3 s that it has, as the machine may be busy.
const LATE: Duration = Duration::from_secs(1);

/// How many newcomers are in their handshakes at a time: few, because the attack is on slots, not on handshakes.
const CONNECTING: usize = 8;

/// The first stream that the relay opens.
const IDENTIFY: u32 = 2;

#[tokio::test]
async fn newcomers_to_a_full_table_of_slow_peers() {
    const SLOTS: usize = 40;
    const NEWCOMERS: usize = 100;
    let duration = Duration::from_secs(short_or_long(8, 120));
    let slots = format!("--max-reservations={SLOTS}");
    let flags = [
        &slots,
        "--max-reservations-per-ip=0",
        "--max-connections=1024",
        "--probe-after=1s",
        "--idle-timeout=0s",
    ];
    let mut testbed = Testbed::start(&flags).await;
    let port = testbed.port;
    // One slot is the target's. The holders of the others are not part of the attack: they run on the bystanders'
    // threads, so that they are no slower than intended.
    let mut holders = Vec::new();
    for number in 0..SLOTS - 1 {
        let mut holder = RawPeer::connect_with_retry(port, address(number % 8)).await;
        let answer = holder.request(&reserve()).await.expect("an answer");
        assert_eq!(answer.1, OK);
        holders.push((holder.peer, answer_late(holder)));
    }
    let attack = async move {
        let start = Instant::now();
        let connecting = Arc::new(Semaphore::new(CONNECTING));
        let refused = run_each(NEWCOMERS, NEWCOMERS, move |number| {
            let connecting = Arc::clone(&connecting);
            async move {
                let mut refused = 0;
                while start.elapsed() < duration {
                    // A new peer each time, because of the rate limit. A handshake that takes too long on a busy
                    // machine is denied.
                    let permit = connecting.acquire().await;
                    let newcomer = RawPeer::connect(port, address(8 + number)).await;
                    drop(permit);
                    if let Ok(newcomer) = newcomer {
                        let refusals = reserve_until(newcomer, start + duration);
                        refused += refusals.await.unwrap_or(0);
                    }
                }
                refused
            }
        });
        refused.await.into_iter().sum::<usize>()
    };
    let size = format!("{NEWCOMERS} at a time, to {SLOTS} slots of peers that answer after 1 s");
    let what = "newcomers without a pause at a full table";
    let (refused, _) = testbed.attack(what, &size, attack).await;
    println!("{refused} RESERVEs were refused");
    assert!(refused > 0);
    // The holders were probed, and each has kept its slot.
    let probed = testbed.count("relaylet_questions_asked_total").await;
    assert!(probed >= SLOTS as f64, "{probed} probes");
    let relay = &testbed.bystanders.relay;
    assert_eq!(relay.count_in_log("peer silent"), 0);
    for (peer, _) in &holders {
        assert_eq!(relay.count_in_log(&format!("grace began: peer {peer}")), 0);
    }
    testbed.until(|counts| counts.live == SLOTS).await;
    drop(holders);
    testbed.assert_restored().await;
}

/// Sends RESERVEs of one newcomer until `end`, at most 20. Returns how many were refused.
async fn reserve_until(mut newcomer: RawPeer, end: Instant) -> io::Result<usize> {
    let mut refused = 0;
    while refused < 20 && Instant::now() < end {
        let (_, status) = newcomer.request(&reserve()).await?;
        let refusal = [RESERVATION_REFUSED, RESOURCE_LIMIT_EXCEEDED].contains(&status);
        assert!(refusal, "{status:?}");
        refused += 1;
    }
    Ok(refused)
}

/// Stays connected and answers probes late.
fn answer_late(mut peer: RawPeer) -> Background {
    Background::spawn(async move {
        while let Ok(frame) = peer.read_frame().await {
            if frame.has(SYN) {
                // Identify is answered at once.
                if frame.stream != IDENTIFY {
                    sleep(LATE).await;
                }
                if peer.send(&data(RST, frame.stream, &[])).await.is_err() {
                    break;
                }
            }
        }
    })
}
