//! Floods of valid yamux frames.

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

use super::testbed::Testbed;
use crate::common::{
    by_hand::{ACK, Frame, PING, RST, SYN, WINDOW, WINDOW_UPDATE, data, frame, next_frame},
    messages::{OK, connect, reserve},
    raw_peers::{
        AT_A_TIME, FREE_WINDOW, RawPeer, address, expect_all, hop_opening, run_each, short_or_long,
    },
    within,
};

/// How many connections attack at once.
const ATTACKERS: usize = 8;

/// How many streams the connection that holds a slot opens. It resets half of them: its frames are slightly more than its
/// burst of 4,224.
const HOLDER_STREAMS: usize = 3000;

/// How many pings the connection that holds a slot sends: slightly more than its burst.
const HOLDER_PINGS: u32 = 5000;

/// The interval at which a count is polled.
const POLL_INTERVAL: Duration = Duration::from_millis(20);

#[tokio::test]
#[ignore = "takes long: .ci/attacks"]
async fn frames_of_one_byte() {
    const BYTES: usize = 50_000;
    let rounds = short_or_long(1, 20);
    let mut testbed = Testbed::start(&[]).await;
    let port = testbed.port;
    let attack = async move {
        let written = run_each(ATTACKERS, AT_A_TIME, move |number| async move {
            let received = Arc::new(AtomicUsize::new(0));
            let counted = Arc::clone(&received);
            let (mut source, circuits, _targets) = pair(port, number, rounds, move |frame| {
                counted.fetch_add(frame.body.len(), Ordering::Relaxed);
                Vec::new()
            })
            .await?;
            for circuit in circuits {
                let before = received.load(Ordering::Relaxed);
                source.send(&data(0, circuit, &[7]).repeat(BYTES)).await?;
                until(&received, before + BYTES).await;
                source.send(&data(RST, circuit, &[])).await?;
            }
            Ok(())
        });
        expect_all(written.await);
    };
    let size = format!("{} of them in {ATTACKERS} circuits", ATTACKERS * rounds * BYTES);
    testbed.attack("frames of one byte", &size, attack).await;
    testbed.assert_restored().await;
}

#[tokio::test]
#[ignore = "takes long: .ci/attacks"]
async fn window_updates_of_one_byte() {
    let bytes = short_or_long(5000, 20_000);
    let mut testbed = Testbed::start(&[]).await;
    let port = testbed.port;
    let attack = async move {
        let frames = run_each(ATTACKERS, AT_A_TIME, move |number| async move {
            let received = Arc::new(AtomicUsize::new(0));
            let single = Arc::new(AtomicUsize::new(0));
            let counted = [Arc::clone(&received), Arc::clone(&single)];
            let (mut source, circuits, _targets) = pair(port, number, 1, move |received| {
                let length = received.body.len();
                let taken = length + counted[0].fetch_add(length, Ordering::Relaxed);
                if length == 0 || taken < FREE_WINDOW {
                    return Vec::new();
                }
                // Once the window is exhausted, grants credit of one byte at a time.
                counted[1].fetch_add(usize::from(length == 1), Ordering::Relaxed);
                frame(WINDOW_UPDATE, 0, received.stream, 1)
            })
            .await?;
            source.write(circuits[0], WINDOW + bytes).await?;
            until(&received, WINDOW + bytes).await;
            Ok(single.load(Ordering::Relaxed))
        });
        expect_all(frames.await)
    };
    let size = format!("{bytes} one after the other in each of {ATTACKERS} circuits");
    let what = "windows of one byte";
    let (frames, _) = testbed.attack(what, &size, attack).await;
    assert!(frames.iter().all(|single| *single >= bytes / 2), "{frames:?}");
    testbed.assert_restored().await;
}

#[tokio::test]
async fn an_endless_flood_of_pings() {
    const PINGS: u32 = 50_000;
    let mut testbed = Testbed::start(&[]).await;
    let port = testbed.port;
    let attack = async move {
        let answered = run_each(ATTACKERS, AT_A_TIME, move |number| async move {
            let mut peer = RawPeer::connect_with_retry(port, address(number)).await;
            // The first one holds a slot: it is read more slowly instead of closed. Of several pings received, only the
            // newest is answered.
            let holds_slot = number == 0;
            if holds_slot {
                assert_eq!(peer.request(&reserve()).await?.1, OK);
            }
            let pings = if holds_slot { HOLDER_PINGS } else { PINGS };
            let (mut reader, mut writer) = peer.channel.split();
            let flood: Vec<_> = (0..pings).flat_map(|id| frame(PING, SYN, 0, id)).collect();
            let write = async {
                let _ = writer.write_all(&flood).await; // the relay may close it
                writer.flush().await
            };
            let read = async {
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
            let (_, answered) = tokio::join!(write, read);
            assert_eq!(answered == Some(pings - 1), holds_slot, "{answered:?} is answered last");
            Ok(holds_slot.then_some((reader, writer)))
        });
        expect_all(answered.await)
    };
    let size = format!("{PINGS} on each of {ATTACKERS} connections");
    let (kept, _) = testbed.attack("yamux's pings", &size, attack).await;
    let counts = testbed.until(|counts| counts.connections == 3).await;
    let flooding = r#"relaylet_connections_closed_total{reason="flooding"}"#;
    testbed.wait_until_counted(flooding, (ATTACKERS - 1) as f64).await;
    assert_eq!(counts.live, 2, "a holder's slot stays");
    drop(kept);
    testbed.assert_restored().await;
}

#[tokio::test]
#[ignore = "takes long: .ci/attacks"]
async fn an_endless_flood_of_streams() {
    const STREAMS: usize = 100_000;
    let mut testbed = Testbed::start(&[]).await;
    let port = testbed.port;
    let attack = async move {
        let opened = run_each(ATTACKERS, AT_A_TIME, move |number| async move {
            let mut peer = RawPeer::connect_with_retry(port, address(number)).await;
            // The first one holds a slot: it is read more slowly instead of closed, so it opens fewer.
            let holds_slot = number == 0;
            if holds_slot {
                assert_eq!(peer.request(&reserve()).await?.1, OK);
            }
            let streams = if holds_slot { HOLDER_STREAMS } else { STREAMS };
            let mut opened = 0;
            let flood = async {
                // Half of the streams are reset at once, the others are left to the relay.
                while opened < streams {
                    let open = (0..100).flat_map(|nth| {
                        let stream = peer.next_stream();
                        let open = data(SYN, stream, b"\x13/multistream/1.0.0\n");
                        match nth % 2 {
                            0 => open,
                            _ => [open, data(RST, stream, &[])].concat(),
                        }
                    });
                    let open: Vec<_> = open.collect();
                    peer.send(&open).await?;
                    opened += 100;
                }
                peer.read_until_pong().await
            };
            let reset = flood.await;
            assert_eq!(reset.is_ok(), holds_slot, "{opened} of {streams} are opened");
            // Not counting those that it reset itself, and the burst of an address.
            assert!(
                !reset.is_ok_and(|reset| reset < HOLDER_STREAMS / 2 - 1100),
                "too many are served"
            );
            Ok(holds_slot.then(|| peer.stay_connected()))
        });
        expect_all(opened.await)
    };
    let size = format!("{STREAMS} on each of {ATTACKERS} connections");
    let what = "streams opened without a pause";
    let (kept, _) = testbed.attack(what, &size, attack).await;
    let counts = testbed.until(|counts| counts.connections == 3).await;
    assert_eq!(counts.live, 2, "a holder's slot stays");
    drop(kept);
    testbed.assert_restored().await;
}

#[tokio::test]
#[ignore = "takes long: .ci/attacks"]
async fn unread_frames_of_one_byte() {
    const STREAMS: usize = 4;
    /// What the relay may buffer of them, in KiB: one byte for each byte.
    const BUFFERED: u64 = 2 * 1024;
    /// What its heap may keep in addition.
    const MARGIN: u64 = 8 * 1024;
    let mut testbed = Testbed::start(&[]).await;
    let port = testbed.port;
    let before = testbed.resident();
    let attack = async move {
        // The target never answers, and until it does the relay reads nothing after the CONNECT.
        let mut target = RawPeer::connect_with_retry(port, address(0)).await;
        assert_eq!(target.request(&reserve()).await?.1, OK);
        let mut source = RawPeer::connect_with_retry(port, address(1)).await;
        let request = hop_opening(&connect(target.peer));
        for _ in 0..STREAMS {
            let stream = source.next_stream();
            source.send(&data(SYN, stream, &request)).await?;
            source.send(&data(0, stream, &[7]).repeat(FREE_WINDOW)).await?;
        }
        source.read_until_pong().await?;
        io::Result::Ok((source, target))
    };
    let size = format!("{} in {STREAMS} streams", STREAMS * FREE_WINDOW);
    let what = "unread frames of one byte";
    let (peers, impact) = testbed.attack(what, &size, attack).await;
    let peers = peers.expect("the relay keeps them connected");
    testbed.assert_nothing_freed().await; // all of it fits
    let growth = impact.peak.saturating_sub(before);
    assert!(growth <= BUFFERED + MARGIN, "{growth} KiB");
    drop(peers);
    testbed.assert_restored().await;
}

/// Opens this many circuits; `on_frame` gets the frames that the target receives.
async fn pair(
    port: u16,
    number: usize,
    circuits: usize,
    on_frame: impl FnMut(&Frame) -> Vec<u8> + Send + 'static,
) -> io::Result<(RawPeer, Vec<u32>, JoinSet<io::Result<()>>)> {
    let mut target = RawPeer::connect_with_retry(port, address(number)).await;
    assert_eq!(target.request(&reserve()).await?.1, OK);
    let request = connect(target.peer);
    let mut targets = JoinSet::new();
    targets.spawn(target.accept_circuits(on_frame));
    let mut source = RawPeer::connect_with_retry(port, address(number)).await;
    let answers = source.request_all(&vec![request; circuits]).await?;
    let open = answers.into_iter().map(|(circuit, status)| {
        assert_eq!(status, OK);
        circuit
    });
    Ok((source, open.collect(), targets))
}

/// Waits until the count reaches `wanted`; panics when it does not change for a while.
async fn until(count: &AtomicUsize, wanted: usize) {
    let mut counted = count.load(Ordering::Relaxed);
    while counted < wanted {
        counted = within(async {
            loop {
                sleep(POLL_INTERVAL).await;
                let now = count.load(Ordering::Relaxed);
                if now > counted {
                    return now;
                }
            }
        })
        .await;
    }
}
