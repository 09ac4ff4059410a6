//! yamux, abused within its rules.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use libp2p::futures::{AsyncReadExt, AsyncWriteExt};
use tokio::{task::JoinSet, time::sleep};

use super::ground::{GIVEN_UP, Ground};
use crate::common::{
    by_hand::{ACK, Frame, PING, RST, SYN, WINDOW, WINDOW_UPDATE, data, frame, next_frame},
    messages::{connect, reserve},
    strangers::{AT_A_TIME, ROOM, Stranger, address, all, each, opening, quick_or_long},
    within,
};

const OK: Option<i32> = Some(100);

/// How many attack at once.
const STRANGERS: usize = 8;

/// Frames that open streams, reset them, or ping: a few more than a connection may send at once.
const IN_ORDER: usize = 3000;

/// How often to look how far it is.
const LOOK_AGAIN: Duration = Duration::from_millis(20);

#[tokio::test]
#[ignore = "takes long: .ci/attacks"]
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
    let how_hard = format!("{} of them in {STRANGERS} circuits", STRANGERS * rounds * BYTES);
    ground.suffer("frames of one byte", &how_hard, attack).await;
    ground.ends_as_it_began().await;
}

#[tokio::test]
#[ignore = "takes long: .ci/attacks"]
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
    assert!(frames.iter().all(|single| *single >= bytes / 2), "{frames:?}");
    ground.ends_as_it_began().await;
}

#[tokio::test]
async fn pings_without_end() {
    const PINGS: u32 = 50_000;
    let mut ground = Ground::prepare(&[]).await;
    let port = ground.port;
    let attack = async move {
        let answered = each(STRANGERS, AT_A_TIME, move |number| async move {
            let mut stranger = Stranger::arrive(port, address(number)).await;
            // The first holds a slot, and is only read more slowly: it has to want less. Of several pings that
            // came, only the last is answered.
            let holds = number == 0;
            if holds {
                assert_eq!(stranger.ask_once(&reserve()).await?.1, OK);
            }
            let pings = if holds { IN_ORDER as u32 + 1000 } else { PINGS };
            let (mut reader, mut writer) = stranger.channel.split();
            let flood: Vec<_> = (0..pings).flat_map(|id| frame(PING, SYN, 0, id)).collect();
            let ask = async {
                let _ = writer.write_all(&flood).await; // it may be closed
                writer.flush().await
            };
            let hear = async {
                let mut answered = None;
                while answered != Some(pings - 1)
                    && let Some(frame) = next_frame(&mut reader).await
                {
                    if (frame.kind, frame.flags) == (PING, ACK) {
                        answered = Some(frame.length);
                    }
                }
                answered
            };
            let (_, answered) = tokio::join!(ask, hear);
            assert_eq!(answered == Some(pings - 1), holds, "{answered:?} is answered last");
            Ok(holds.then_some((reader, writer)))
        });
        all(answered.await)
    };
    let how_hard = format!("{PINGS} on each of {STRANGERS} connections");
    let (kept, _) = ground.suffer("yamux's pings", &how_hard, attack).await;
    let counts = ground.until(|counts| counts.connections == 3).await;
    assert_eq!(counts.live, 2, "a holder's slot stays");
    drop(kept);
    ground.ends_as_it_began().await;
}

#[tokio::test]
#[ignore = "takes long: .ci/attacks"]
async fn streams_without_end() {
    const STREAMS: usize = 100_000;
    let mut ground = Ground::prepare(&[]).await;
    let port = ground.port;
    let attack = async move {
        let opened = each(STRANGERS, AT_A_TIME, move |number| async move {
            let mut stranger = Stranger::arrive(port, address(number)).await;
            // The first holds a slot, and is only read more slowly: it has to want less.
            let holds = number == 0;
            if holds {
                assert_eq!(stranger.ask_once(&reserve()).await?.1, OK);
            }
            let streams = if holds { IN_ORDER } else { STREAMS };
            let mut opened = 0;
            let flood = async {
                // Half of them are let go of at once, the others are left to the relay.
                while opened < streams {
                    let open = (0..100).flat_map(|nth| {
                        let stream = stranger.next_stream();
                        let open = data(SYN, stream, b"\x13/multistream/1.0.0\n");
                        match nth % 2 {
                            0 => open,
                            _ => [open, data(RST, stream, &[])].concat(),
                        }
                    });
                    let open: Vec<_> = open.collect();
                    stranger.say(&open).await?;
                    opened += 100;
                }
                stranger.hears_out().await
            };
            let reset = flood.await;
            assert_eq!(reset.is_ok(), holds, "{opened} of {streams} are opened");
            // Beside those that it let go of itself, and as many as an address may open at once.
            assert!(!reset.is_ok_and(|reset| reset < IN_ORDER / 2 - 1100), "too many are served");
            Ok(holds.then(|| stranger.stays()))
        });
        all(opened.await)
    };
    let how_hard = format!("{STREAMS} on each of {STRANGERS} connections");
    let what = "streams opened without end";
    let (kept, _) = ground.suffer(what, &how_hard, attack).await;
    let counts = ground.until(|counts| counts.connections == 3).await;
    assert_eq!(counts.live, 2, "a holder's slot stays");
    drop(kept);
    ground.ends_as_it_began().await;
}

#[tokio::test]
#[ignore = "takes long: .ci/attacks"]
async fn frames_of_one_byte_that_nobody_reads() {
    const STREAMS: usize = 4;
    /// What the relay may hold of them, in KiB: a byte takes a byte.
    const HELD: u64 = 2 * 1024;
    /// What its heap may keep besides.
    const BESIDE: u64 = 8 * 1024;
    let mut ground = Ground::prepare(&[]).await;
    let port = ground.port;
    let before = ground.resident();
    let attack = async move {
        // It never answers, and until then the relay does not read on behind the CONNECT.
        let mut target = Stranger::arrive(port, address(0)).await;
        assert_eq!(target.ask_once(&reserve()).await?.1, OK);
        let mut source = Stranger::arrive(port, address(1)).await;
        let request = opening(&connect(target.peer));
        for _ in 0..STREAMS {
            let stream = source.next_stream();
            source.say(&data(SYN, stream, &request)).await?;
            source.say(&data(0, stream, &[7]).repeat(ROOM)).await?;
        }
        source.hears_out().await?;
        io::Result::Ok((source, target))
    };
    let how_hard = format!("{} in {STREAMS} streams", STREAMS * ROOM);
    let what = "frames of one byte that nobody reads";
    let (held, noticed) = ground.suffer(what, &how_hard, attack).await;
    let held = held.expect("the relay keeps them");
    for given_up in GIVEN_UP {
        assert_eq!(ground.count(given_up).await, 0.0, "all of it has room: {given_up}");
    }
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
    let mut target = Stranger::arrive(port, address(number)).await;
    assert_eq!(target.ask_once(&reserve()).await?.1, OK);
    let request = connect(target.peer);
    let mut targets = JoinSet::new();
    targets.spawn(target.agrees(hears));
    let mut source = Stranger::arrive(port, address(number)).await;
    let answers = source.ask(&vec![request; circuits]).await?;
    let open = answers.into_iter().map(|(circuit, status)| {
        assert_eq!(status, OK);
        circuit
    });
    Ok((source, open.collect(), targets))
}

/// Waits until it has counted so many, for as long as it counts on.
async fn until(count: &AtomicUsize, wanted: usize) {
    let mut counted = count.load(Ordering::Relaxed);
    while counted < wanted {
        counted = within(async {
            loop {
                sleep(LOOK_AGAIN).await;
                let now = count.load(Ordering::Relaxed);
                if now > counted {
                    return now;
                }
            }
        })
        .await;
    }
}
