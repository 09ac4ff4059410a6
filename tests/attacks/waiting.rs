//! More than may wait in the relay, of what its peers are to read.

use std::{io, time::Duration};

use libp2p::futures::future;
use tokio::time::{sleep, timeout};

use super::ground::{GIVEN_UP, Ground};
use crate::common::{
    by_hand::{RST, SYN, WINDOW_UPDATE, data, frame},
    messages::{connect, reserve},
    strangers::{
        AT_A_TIME, Staying, Stranger, address, all, each, opening, quick_or_long, takes_nothing,
    },
    within,
};

/// How long to listen whether a stream is reset.
const BEFORE_LONG: Duration = Duration::from_secs(2);

/// How often to look whether the relay has given a stream up.
const LOOK_AGAIN: Duration = Duration::from_millis(100);

/// The smallest pool for peers that may have four circuits each.
const SMALL_POOL: [&str; 2] = ["--max-circuits-per-peer=4", "--max-buffered=8MiB"];

/// A window that all of it fits into.
const WIDE: u32 = 1 << 30;

/// Until their targets answer nothing of what sources send is read: what waits the longest goes.
#[tokio::test]
async fn more_waits_than_there_is_room_for() {
    const STRANGERS: usize = 48;
    /// So few that each of them holds more than those who are watched.
    const ADDRESSES: usize = 8;
    const FRAMES: usize = 2500; // of 100 bytes: a quarter of a MiB
    /// What it may hold, and what its heap may keep besides, in KiB.
    const HELD: u64 = (8 + 16) * 1024;
    let rounds = quick_or_long(1, 20);
    let mut ground = Ground::prepare(&SMALL_POOL).await;
    let port = ground.port;
    let before = ground.resident();
    let given_up = ground.counting(GIVEN_UP[0]);
    let attack = async move {
        let pairs = each(STRANGERS, AT_A_TIME, move |number| async move {
            let mut target = Stranger::arrive(port, address(number % ADDRESSES)).await;
            assert_eq!(target.ask_once(&reserve()).await?.1, Some(100));
            let source = Stranger::arrive(port, address(number % ADDRESSES)).await;
            Ok((source, target))
        });
        let mut strangers = all(pairs.await);
        let mut reset = 0;
        for _ in 0..rounds {
            // All at once, and none listens before the relay has given one up.
            let before = given_up().await;
            let sent = strangers.into_iter().map(|(mut source, target)| async move {
                let stream = source.next_stream();
                let request = opening(&connect(target.peer));
                source.say(&data(SYN, stream, &request)).await?;
                source.say(&data(0, stream, &[7; 100]).repeat(FRAMES)).await?;
                Ok((source, target, stream))
            });
            let sent = all(future::join_all(sent).await);
            within(async {
                while given_up().await == before {
                    sleep(LOOK_AGAIN).await;
                }
            })
            .await;
            let heard = sent.into_iter().map(|(mut source, target, stream)| async move {
                let is_reset = source.is_reset(stream, BEFORE_LONG * 5).await?;
                source.say(&data(RST, stream, &[])).await?;
                Ok((is_reset, (source, target)))
            });
            let heard = all(future::join_all(heard).await);
            reset += heard.iter().filter(|(is_reset, _)| *is_reset).count();
            strangers = heard.into_iter().map(|(_, pair)| pair).collect();
        }
        let stay = strangers.into_iter().map(|(source, target)| [source.stays(), target.stays()]);
        (reset, stay.collect::<Vec<_>>())
    };
    let how_hard = format!("{} MiB in {STRANGERS} streams, of 8 MiB", STRANGERS * rounds / 4);
    let what = "more than may wait, unread";
    let ((reset, strangers), noticed) = ground.suffer(what, &how_hard, attack).await;
    assert!(reset > 0, "none heard that it was given up");
    let grown = noticed.peak.saturating_sub(before);
    assert!(grown <= HELD, "{grown} KiB");
    drop(strangers);
    ground.ends_as_it_began().await;
}

/// Peers that open their windows and take nothing: above three quarters of the pool their circuits end as stalled,
/// and what waits on them is freed though they cannot be told.
#[tokio::test]
async fn readers_that_take_nothing() {
    const PAIRS: usize = 24;
    /// More than fits into the sockets in between, in bytes.
    const OFFER: usize = 24 * 1024 * 1024;
    let mut ground = Ground::prepare(&SMALL_POOL).await;
    let port = ground.port;
    let attack = async move {
        let offered = each(PAIRS, AT_A_TIME, move |number| async move {
            let mut target = Stranger::arrive(port, address(number)).await;
            assert_eq!(target.ask_once(&reserve()).await?.1, Some(100));
            let mut source = Stranger::arrive(port, address(number)).await;
            let stream = source.next_stream();
            let request = data(SYN, stream, &opening(&connect(target.peer)));
            source.say(&request).await?;
            let circuit = target.agree_to(1).await?[0];
            let wide = frame(WINDOW_UPDATE, 0, circuit, WIDE);
            target.say(&wide).await?;
            // Until it gets nothing away any more, be it that the circuit is gone.
            let _ = timeout(BEFORE_LONG * 3, source.write(stream, OFFER)).await;
            io::Result::Ok((source.stays(), Staying::as_long_as(takes_nothing(target))))
        });
        all(offered.await)
    };
    let how_hard = format!("{PAIRS} circuits whose targets take nothing, of 8 MiB");
    let what = "more than may wait, untaken";
    let (strangers, _) = ground.suffer(what, &how_hard, attack).await;
    ground.until_counted(r#"relaylet_circuits_closed_total{end="stalled"}"#, 1.0).await;
    drop(strangers);
    ground.ends_as_it_began().await;
}
