//! A full table, and newcomers without end.

use std::time::{Duration, Instant};

use tokio::time::sleep;

use super::{
    ground::{Ground, quick_or_long},
    strangers::{AT_A_TIME, Staying, Stranger, address, all, each},
};
use crate::common::{
    by_hand::{RST, SYN, data},
    messages::reserve,
};

const OK: Option<i32> = Some(100);
const RESERVATION_REFUSED: Option<i32> = Some(200);
const RESOURCE_LIMIT_EXCEEDED: Option<i32> = Some(201);

/// How late a peer answers that is slow: of the probe's 3 s the half.
const LATE: Duration = Duration::from_millis(1500);

#[tokio::test]
async fn newcomers_to_a_full_table_of_slow_peers() {
    const SLOTS: usize = 40;
    const NEWCOMERS: usize = 64;
    let patience = Duration::from_secs(quick_or_long(10, 120));
    let slots = format!("--max-reservations={SLOTS}");
    let flags = [
        &slots,
        "--max-reservations-per-ip=0",
        "--probe-after=1s",
        "--idle-timeout=0s",
    ];
    let mut ground = Ground::prepare(&flags).await;
    let port = ground.port;
    let attack = async move {
        // One slot is the target's.
        let holders = each(SLOTS - 1, AT_A_TIME, move |number| async move {
            let mut holder = Stranger::connect(port, address(number % 8)).await?;
            assert_eq!(holder.ask_once(&reserve()).await?.1, OK);
            Ok((holder.peer, slow(holder)))
        });
        let holders = all(holders.await);
        let asking = Instant::now();
        let refused = each(NEWCOMERS, NEWCOMERS, move |number| async move {
            let mut refused = 0;
            while asking.elapsed() < patience {
                // Somebody new each time, because a peer may not ask so often.
                let mut newcomer = Stranger::connect(port, address(8 + number)).await?;
                for _ in 0..20 {
                    let (_, status) = newcomer.ask_once(&reserve()).await?;
                    let refusal = [RESERVATION_REFUSED, RESOURCE_LIMIT_EXCEEDED].contains(&status);
                    assert!(refusal, "{status:?}");
                    refused += 1;
                    if asking.elapsed() >= patience {
                        break;
                    }
                }
            }
            Ok(refused)
        });
        let refused = all(refused.await).into_iter().sum::<usize>();
        (refused, holders)
    };
    let how_hard =
        format!("{NEWCOMERS} at a time, to {SLOTS} slots of peers that answer after 1.5 s");
    let what = "newcomers without end at a full table of slow peers";
    let ((refused, holders), _) = ground.suffer(what, &how_hard, attack).await;
    println!("{refused} RESERVEs were refused");
    assert!(refused >= NEWCOMERS);
    // They were asked, and each has the slot that it had.
    let asked = ground.count("relaylet_questions_asked_total").await;
    assert!(asked >= SLOTS as f64, "{asked} questions");
    let relay = &ground.bystanders.relay;
    assert_eq!(relay.count_in_log("peer silent"), 0);
    for (peer, _) in &holders {
        assert_eq!(relay.count_in_log(&format!("grace began: peer {peer}")), 0);
    }
    ground.until(|counts| counts.live == SLOTS).await;
    drop(holders);
    ground.ends_as_it_began().await;
}

/// Refuses what the relay wants, which is a sign of life, but takes its time.
fn slow(mut stranger: Stranger) -> Staying {
    Staying::as_long_as(async move {
        while let Ok(frame) = stranger.frame().await {
            if frame.has(SYN) {
                sleep(LATE).await;
                if stranger.say(&data(RST, frame.stream, &[])).await.is_err() {
                    break;
                }
            }
        }
    })
}
