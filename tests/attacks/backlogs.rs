//! Backlogs of unread and incomplete data, beside peers that use their limits to the full.

use std::{
    io,
    net::Ipv4Addr,
    time::{Duration, Instant},
};

use libp2p::{
    futures::{AsyncReadExt, AsyncWriteExt, future},
    identity::Keypair,
};
use tokio::time::{interval, sleep};

use super::testbed::{FREED_FOR_MEMORY, SMALL_BUDGET, Testbed};
use crate::common::{
    by_hand::{DATA, RST, SYN, WINDOW, WINDOW_UPDATE, data, frame},
    circuit,
    messages::{OK, connect, reserve},
    raw_peers::{
        AT_A_TIME, Background, CHUNK, RawPeer, address, expect_all, hold_without_reading,
        hop_opening, run_each, short_or_long,
    },
    source_and_target, within,
};

/// How long a connection is left unread before it is replaced.
const UNREAD: Duration = Duration::from_secs(15);

/// Pings on connections that are never read: their echoes exceed the buffer budget. The table is full and newcomers
/// wait, so the holders of slots are probed; each must answer and keep its slot.
#[tokio::test]
async fn unread_ping_echoes_of_four_addresses_at_a_full_table() {
    const SLOTS: usize = 9; // one is the target's
    const NEWCOMERS: usize = 8;
    const CONNECTIONS: usize = 250;
    // More than the 10 s of silence before a peer is probed, and the 3 s of the probe.
    let duration = Duration::from_secs(short_or_long(24, 90));
    let [circuits, buffered] = SMALL_BUDGET;
    let mut testbed = Testbed::start(&[
        &format!("--max-reservations={SLOTS}"),
        "--max-connections=1024",
        "--max-handshakes=256",
        circuits,
        buffered, // the echoes are more
    ])
    .await;
    let port = testbed.port;
    let mut holders = Vec::new();
    for number in 1..SLOTS {
        let mut holder = RawPeer::connect_with_retry(port, address(number)).await;
        assert_eq!(holder.request(&reserve()).await.expect("an answer").1, OK);
        holders.push((holder.peer, holder.stay_connected()));
    }
    let attack = async move {
        let end = Instant::now() + duration;
        let newcomers = tokio::spawn(run_each(NEWCOMERS, NEWCOMERS, move |number| async move {
            while Instant::now() < end {
                // Each time a new peer, because of the rate limit.
                if let Ok(mut newcomer) = RawPeer::connect(port, address(100 + number)).await {
                    assert_ne!(newcomer.request(&reserve()).await.map_or(None, |it| it.1), OK);
                }
            }
        }));
        let unread = run_each(CONNECTIONS, CONNECTIONS, move |number| async move {
            while Instant::now() < end {
                // A closed connection is replaced, and a denied one retried.
                if unread_echoes(port, address(SLOTS + number % 4)).await.is_err() {
                    sleep(Duration::from_millis(500)).await;
                }
            }
        });
        future::join(unread, newcomers).await.1.expect("the newcomers do not panic");
    };
    let size = format!("2 on each of {CONNECTIONS} connections, {NEWCOMERS} newcomers");
    let what = "unread echoes of four addresses, at a full table";
    testbed.attack(what, &size, attack).await;
    let freed = testbed.count(FREED_FOR_MEMORY[0]).await;
    assert!(freed >= CONNECTIONS as f64 / 4.0, "only {freed} streams were freed");
    let probed = testbed.count("relaylet_questions_asked_total").await;
    assert!(probed >= (SLOTS - 1) as f64, "{probed} were probed");
    let relay = &testbed.bystanders.relay;
    for (peer, _) in &holders {
        assert_eq!(relay.count_in_log(&format!("grace began: peer {peer}")), 0);
        assert_eq!(relay.count_in_log(&format!("slot freed: peer {peer}")), 0);
    }
    drop(holders);
    testbed.assert_restored().await;
}

/// Opens a connection with two ping streams whose echoes it leaves unread for a while.
async fn unread_echoes(port: u16, from: Ipv4Addr) -> io::Result<()> {
    let key = Keypair::generate_ed25519();
    let mut peer = RawPeer::connect_with_small_buffer(&key, port, from).await?;
    peer.send_unread_pings().await?;
    sleep(UNREAD).await;
    Ok(())
}

/// Headers that announce a long frame without a body, beside a target that reads 500 kB/s of a source that sends
/// faster.
#[tokio::test]
async fn headers_without_bodies_beside_a_busy_target() {
    /// With as many bodies they would exceed what the relay may buffer.
    const HEADERS: usize = 400;
    const LONGEST: u32 = WINDOW as u32; // more would end the connection
    const READ: usize = 500_000 / 20; // of a second
    let duration = Duration::from_secs(short_or_long(8, 60));
    let mut testbed = Testbed::start(&["--idle-timeout=0s"]).await;
    let port = testbed.port;
    let mut target = RawPeer::connect_with_retry(port, address(1)).await;
    assert_eq!(target.request(&reserve()).await.expect("an answer").1, OK);
    let mut source = RawPeer::connect_with_retry(port, address(2)).await;
    let stream = source.next_stream();
    source
        .send(&data(SYN, stream, &hop_opening(&connect(target.peer))))
        .await
        .expect("it is connected");
    let circuit = target.accept_count(1).await.expect("a stop request")[0];
    // After its initial window it grants credit of 500 kB/s.
    let reads = tokio::spawn(async move {
        let mut each = interval(Duration::from_millis(50));
        let mut read = 0;
        loop {
            tokio::select! {
                _ = each.tick() => {
                    let more = frame(WINDOW_UPDATE, 0, circuit, READ as u32);
                    target.send(&more).await.expect("it is connected");
                }
                received = target.read_frame() => {
                    let received = received.expect("it is connected");
                    assert!(received.stream != circuit || !received.has(RST), "the circuit stays");
                    read += received.body.len();
                    if received.has(SYN) {
                        target.send(&data(RST, received.stream, &[])).await.expect("it is connected");
                    }
                }
            }
            if read > READ * 20 * duration.as_secs() as usize {
                return target;
            }
        }
    });
    let writes = tokio::spawn(async move {
        let _ = source.write(stream, usize::MAX).await;
    });
    let attack = async move {
        let announced = run_each(HEADERS, AT_A_TIME, move |number| async move {
            let mut peer = RawPeer::connect_with_retry(port, address(10 + number % 5)).await;
            let stream = peer.next_stream();
            let header = frame(DATA, 0, stream, LONGEST);
            peer.send(&[frame(DATA, SYN, stream, 0), header].concat()).await?;
            Ok(Background::spawn(hold_without_reading(peer)))
        });
        let announced = expect_all(announced.await);
        within(reads).await.map(|target| (announced, target)).expect("the target reads on")
    };
    let size = format!("{HEADERS} of 12 bytes that announce 256 KiB, a target that reads 500 kB/s");
    let what = "headers without bodies";
    let (peers, _) = testbed.attack(what, &size, attack).await;
    testbed.assert_nothing_freed().await;
    // All stay open, in addition to the bystanders' two, the source and the target.
    testbed.until(|counts| counts.connections == 4 + HEADERS).await;
    writes.abort();
    drop(peers);
    testbed.assert_restored().await;
}

/// Two rust-libp2p peers with as many circuits as a peer may have, which transfer data in both directions on all.
#[tokio::test]
async fn the_most_circuits_a_peer_may_have_in_both_directions() {
    const CIRCUITS: usize = 64;
    let bytes = short_or_long(2, 64) * 1024 * 1024;
    let mut testbed = Testbed::start(&["--connect-rate=0"]).await;
    let (mut source, mut target) = source_and_target(&testbed.bystanders.relay).await;
    let mut circuits = Vec::new();
    for _ in 0..CIRCUITS {
        circuits.push(circuit(&mut source, &mut target).await);
    }
    let attack = async move {
        let transfers = circuits.into_iter().enumerate().flat_map(|(number, (there, back))| {
            [(there, number), (back, number)].map(|(stream, number)| {
                tokio::spawn(async move {
                    let (mut reads, mut writes) = stream.split();
                    let piece: Vec<u8> = (0..CHUNK).map(|nth| (nth + number) as u8).collect();
                    let write = async {
                        for _ in 0..bytes / CHUNK {
                            writes.write_all(&piece).await?;
                        }
                        writes.flush().await
                    };
                    let read = async {
                        let mut received = vec![0; CHUNK];
                        for _ in 0..bytes / CHUNK {
                            reads.read_exact(&mut received).await?;
                            assert!(received == piece, "the received bytes are those sent");
                        }
                        io::Result::Ok(())
                    };
                    let (written, read) = future::join(write, read).await;
                    written.and(read).expect("the circuit stays");
                })
            })
        });
        for transfer in transfers.collect::<Vec<_>>() {
            transfer.await.expect("all bytes arrive");
        }
    };
    let size = format!("{CIRCUITS} circuits of two peers, {} MiB both ways on each", bytes >> 20);
    let what = "as many circuits as a peer may have";
    testbed.attack(what, &size, attack).await;
    assert!(source.kept_its_connection() && target.kept_its_connection());
    testbed.assert_nothing_freed().await;
    source.disconnect().await;
    target.disconnect().await;
    testbed.assert_restored().await;
}
