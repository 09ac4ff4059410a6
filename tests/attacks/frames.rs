//! yamux, abused within its rules.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use libp2p::futures::AsyncReadExt;
use tokio::{task::JoinSet, time::sleep};

use super::{
    ground::{Ground, quick_or_long},
    strangers::{AT_A_TIME, ROOM, Stranger, address, all, each, opening},
};
use crate::common::{
    by_hand::{ACK, Frame, PING, RST, SYN, WINDOW, WINDOW_UPDATE, data, frame, next_frame, send},
    messages::{connect, reserve},
    within,
};

const OK: Option<i32> = Some(100);

/// How many attack at once.
const STRANGERS: usize = 8;

/// How often to look how far it is.
const LOOK_AGAIN: Duration = Duration::from_millis(20);

#[tokio::test]
async fn frames_of_one_byte() {
    const BYTES: usize = 50_000;
    let rounds = quick_or_long(1, 20);
    let mut ground = Ground::prepare(&[]).await;
    let port = ground.port;
    let attack = async move {
        let said = each(STRANGERS, AT_A_TIME, move |number| async move {
            let heard = Arc::new(AtomicUsize::new(0));
            let counted = Arc::clone(&heard);
            let (mut source, circuits, _targets) = pair(port, number, rounds, move |frame| {
                counted.fetch_add(frame.body.len(), Ordering::Relaxed);
                Vec::new()
            })
            .await?;
            for circuit in circuits {
                let before = heard.load(Ordering::Relaxed);
                source.say(&data(0, circuit, &[7]).repeat(BYTES)).await?;
                until(&heard, before + BYTES).await;
                source.say(&data(RST, circuit, &[])).await?;
            }
            Ok(())
        });
        all(said.await);
    };
    let how_hard = format!(
        "{} of them in {STRANGERS} circuits",
        STRANGERS * rounds * BYTES
    );
    ground.suffer("frames of one byte", &how_hard, attack).await;
    ground.ends_as_it_began().await;
}

#[tokio::test]
async fn windows_of_one_byte() {
    let bytes = quick_or_long(5000, 20_000);
    let mut ground = Ground::prepare(&[]).await;
    let port = ground.port;
    let attack = async move {
        let frames = each(STRANGERS, AT_A_TIME, move |number| async move {
            let heard = Arc::new(AtomicUsize::new(0));
            let single = Arc::new(AtomicUsize::new(0));
            let counted = [Arc::clone(&heard), Arc::clone(&single)];
            let (mut source, circuits, _targets) = pair(port, number, 1, move |heard| {
                let length = heard.body.len();
                let taken = length + counted[0].fetch_add(length, Ordering::Relaxed);
                if length == 0 || taken < ROOM {
                    return Vec::new();
                }
                // Once there is no more room, room for one byte, and then for another.
                counted[1].fetch_add(usize::from(length == 1), Ordering::Relaxed);
                frame(WINDOW_UPDATE, 0, heard.stream, 1)
            })
            .await?;
            source.write(circuits[0], WINDOW + bytes).await?;
            until(&heard, WINDOW + bytes).await;
            Ok(single.load(Ordering::Relaxed))
        });
        all(frames.await)
    };
    let how_hard = format!("{bytes} one after the other in each of {STRANGERS} circuits");
    let what = "windows of one byte";
    let (frames, _) = ground.suffer(what, &how_hard, attack).await;
    assert!(
        frames.iter().all(|single| *single >= bytes / 2),
        "{frames:?}"
    );
    ground.ends_as_it_began().await;
}

#[tokio::test]
async fn pings_without_end() {
    let pings: u32 = quick_or_long(50_000, 200_000);
    let mut ground = Ground::prepare(&[]).await;
    let port = ground.port;
    let attack = async move {
        let answered = each(STRANGERS, AT_A_TIME, move |number| async move {
            let stranger = Stranger::connect(port, address(number)).await?;
            let (mut reader, mut writer) = stranger.channel.split();
            let flood: Vec<_> = (0..pings).flat_map(|id| frame(PING, SYN, 0, id)).collect();
            let ask = send(&mut writer, &flood);
            let count = async {
                let mut answered = 0;
                while answered < pings {
                    let frame = next_frame(&mut reader).await.expect("it goes on");
                    answered += u32::from((frame.kind, frame.flags) == (PING, ACK));
                }
            };
            tokio::join!(ask, count);
            Ok(())
        });
        all(answered.await);
    };
    let how_hard = format!("{pings} on each of {STRANGERS} connections");
    ground.suffer("yamux's pings", &how_hard, attack).await;
    ground.ends_as_it_began().await;
}

#[tokio::test]
async fn streams_without_end() {
    let streams: usize = quick_or_long(10_000, 100_000);
    let mut ground = Ground::prepare(&[]).await;
    let port = ground.port;
    let attack = async move {
        let opened = each(STRANGERS, AT_A_TIME, move |number| async move {
            let mut stranger = Stranger::connect(port, address(number)).await?;
            // Half of them are let go of at once, the others are left to the relay.
            for _ in 0..streams / 100 {
                let opened = (0..100).flat_map(|nth| {
                    let stream = stranger.next_stream();
                    let open = data(SYN, stream, b"\x13/multistream/1.0.0\n");
                    match nth % 2 {
                        0 => open,
                        _ => [open, data(RST, stream, &[])].concat(),
                    }
                });
                let opened: Vec<_> = opened.collect();
                stranger.say(&opened).await?;
            }
            let reset = stranger.hears_out().await?;
            Ok((stranger.stays(), reset))
        });
        all(opened.await)
    };
    let how_hard = format!("{streams} on each of {STRANGERS} connections");
    let what = "streams opened without end";
    let (strangers, _) = ground.suffer(what, &how_hard, attack).await;
    for (_, reset) in &strangers {
        assert!(*reset > streams / 4, "{reset} were too many");
    }
    drop(strangers);
    ground.ends_as_it_began().await;
}

#[tokio::test]
async fn frames_of_one_byte_that_nobody_reads() {
    const STREAMS: usize = 4;
    /// What the relay may hold for one connection, in KiB; these would be 65 MiB.
    const HELD: u64 = 8 * 1024;
    /// What its heap may keep besides.
    const BESIDE: u64 = 8 * 1024;
    let mut ground = Ground::prepare(&[]).await;
    let port = ground.port;
    let before = ground.resident();
    let attack = async move {
        // It never answers, and until then the relay does not read on behind the CONNECT.
        let mut target = Stranger::connect(port, address(0)).await?;
        assert_eq!(target.ask_once(&reserve()).await?.1, OK);
        let mut source = Stranger::connect(port, address(1)).await?;
        let request = opening(&connect(target.peer));
        for _ in 0..STREAMS {
            let stream = source.next_stream();
            source.say(&data(SYN, stream, &request)).await?;
            source.say(&data(0, stream, &[7]).repeat(ROOM)).await?;
        }
        let reset = source.hears_out().await?;
        io::Result::Ok((source, target, reset))
    };
    let how_hard = format!("{} in {STREAMS} streams", STREAMS * ROOM);
    let what = "frames of one byte that nobody reads";
    let (held, noticed) = ground.suffer(what, &how_hard, attack).await;
    let held = held.expect("the relay keeps them");
    assert!(held.2 > 0, "not all of it has room");
    let grown = noticed.peak.saturating_sub(before);
    assert!(grown <= HELD + BESIDE, "{grown} KiB");
    drop(held);
    ground.ends_as_it_began().await;
}

/// The source of so many circuits, and what its target is told.
async fn pair(
    port: u16,
    number: usize,
    circuits: usize,
    hears: impl FnMut(&Frame) -> Vec<u8> + Send + 'static,
) -> io::Result<(Stranger, Vec<u32>, JoinSet<io::Result<()>>)> {
    let mut target = Stranger::connect(port, address(number)).await?;
    assert_eq!(target.ask_once(&reserve()).await?.1, OK);
    let request = connect(target.peer);
    let mut targets = JoinSet::new();
    targets.spawn(target.agrees(hears));
    let mut source = Stranger::connect(port, address(number)).await?;
    let answers = source.ask(&vec![request; circuits]).await?;
    let open = answers.into_iter().map(|(circuit, status)| {
        assert_eq!(status, OK);
        circuit
    });
    Ok((source, open.collect(), targets))
}

async fn until(count: &AtomicUsize, wanted: usize) {
    within(async {
        while count.load(Ordering::Relaxed) < wanted {
            sleep(LOOK_AGAIN).await;
        }
    })
    .await;
}
