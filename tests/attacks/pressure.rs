//! A full table, and newcomers without end.

use std::{
    io,
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::{sync::Semaphore, time::sleep};

use super::ground::Ground;
use crate::common::{
    by_hand::{RST, SYN, data},
    messages::reserve,
    strangers::{Staying, Stranger, address, each, quick_or_long},
};

const OK: Option<i32> = Some(100);
const RESERVATION_REFUSED: Option<i32> = Some(200);
const RESOURCE_LIMIT_EXCEEDED: Option<i32> = Some(201);

/// How late a peer answers that is slow: of the probe's 3 s a third, and the machine may be busy.
const LATE: Duration = Duration::from_secs(1);

/// How many newcomers are in their handshakes at a time. It is slots that they are after here.
const ARRIVE: usize = 8;

/// The first stream that the relay opens.
const IDENTIFY: u32 = 2;

#[tokio::test]
async fn newcomers_to_a_full_table_of_slow_peers() {
    const SLOTS: usize = 40;
    const NEWCOMERS: usize = 100;
    let patience = Duration::from_secs(quick_or_long(8, 120));
    let slots = format!("--max-reservations={SLOTS}");
    let flags = [
        &slots,
        "--max-reservations-per-ip=0",
        "--max-connections=1024",
        "--probe-after=1s",
        "--idle-timeout=0s",
    ];
    let mut ground = Ground::prepare(&flags).await;
    let port = ground.port;
    // One slot is the target's. Those who hold the others are no strangers: they have the threads of
    // those who are watched, so that they are no slower than they mean to be.
    let mut holders = Vec::new();
    for number in 0..SLOTS - 1 {
        let mut holder = Stranger::arrive(port, address(number % 8)).await;
        let answer = holder.ask_once(&reserve()).await.expect("an answer");
        assert_eq!(answer.1, OK);
        holders.push((holder.peer, slow(holder)));
    }
    let attack = async move {
        let asking = Instant::now();
        let arriving = Arc::new(Semaphore::new(ARRIVE));
        let refused = each(NEWCOMERS, NEWCOMERS, move |number| {
            let arriving = Arc::clone(&arriving);
            async move {
                let mut refused = 0;
                while asking.elapsed() < patience {
                    // Somebody new each time, because a peer may not ask so often. One whose handshake
                    // takes too long, on a machine that is busy, is turned away.
                    let arrives = arriving.acquire().await;
                    let newcomer = Stranger::connect(port, address(8 + number)).await;
                    drop(arrives);
                    if let Ok(newcomer) = newcomer {
                        let asked = ask_until(newcomer, asking + patience);
                        refused += asked.await.unwrap_or(0);
                    }
                }
                refused
            }
        });
        refused.await.into_iter().sum::<usize>()
    };
    let how_hard =
        format!("{NEWCOMERS} at a time, to {SLOTS} slots of peers that answer after 1 s");
    let what = "newcomers without end at a full table of slow peers";
    let (refused, _) = ground.suffer(what, &how_hard, attack).await;
    println!("{refused} RESERVEs were refused");
    assert!(refused > 0);
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

/// One newcomer's patience: how often it was refused.
async fn ask_until(mut newcomer: Stranger, over: Instant) -> io::Result<usize> {
    let mut refused = 0;
    while refused < 20 && Instant::now() < over {
        let (_, status) = newcomer.ask_once(&reserve()).await?;
        let refusal = [RESERVATION_REFUSED, RESOURCE_LIMIT_EXCEEDED].contains(&status);
        assert!(refusal, "{status:?}");
        refused += 1;
    }
    Ok(refused)
}

/// Refuses what the relay wants, which is a sign of life, but takes its time.
fn slow(mut stranger: Stranger) -> Staying {
    Staying::as_long_as(async move {
        while let Ok(frame) = stranger.frame().await {
            if frame.has(SYN) {
                // Who it is it says at once.
                if frame.stream != IDENTIFY {
                    sleep(LATE).await;
                }
                if stranger.say(&data(RST, frame.stream, &[])).await.is_err() {
                    break;
                }
            }
        }
    })
}
