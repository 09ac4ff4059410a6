//! Backlogs: more than the relay may hold, or less than it seems, beside peers that use all of theirs.

use std::{
    io,
    net::Ipv4Addr,
    time::{Duration, Instant},
};

use libp2p::futures::{AsyncReadExt, AsyncWriteExt, future};
use tokio::time::{interval, sleep};

use super::ground::{GIVEN_UP, Ground};
use crate::common::{
    Client,
    by_hand::{RST, SYN, WINDOW_UPDATE, data, frame},
    circuit,
    messages::{connect, reserve},
    strangers::{
        AT_A_TIME, PIECE, Staying, Stranger, address, all, each, opening, quick_or_long,
        takes_nothing,
    },
    within,
};

/// How long a connection is not read before it makes room for another.
const UNREAD: Duration = Duration::from_secs(15);

const OK: Option<i32> = Some(100);

/// Ping streams that are written to, on connections that are never read: their echoes are more than the
/// relay may hold. With the table full, and newcomers waiting, peers are probed; each answers.
#[tokio::test]
async fn unread_echoes_of_four_addresses_at_a_full_table() {
    const SLOTS: usize = 9; // one is the target's
    const NEWCOMERS: usize = 8;
    const CONNECTIONS: usize = 250;
    // More than the 10 s of silence before a peer is probed, and the 3 s of the probe.
    let presses = Duration::from_secs(quick_or_long(24, 90));
    let mut ground = Ground::prepare(&[
        &format!("--max-reservations={SLOTS}"),
        "--max-connections=1024",
        "--max-handshakes=256",
    ])
    .await;
    let port = ground.port;
    let mut holders = Vec::new();
    for number in 1..SLOTS {
        let mut holder = Stranger::arrive(port, address(number)).await;
        assert_eq!(holder.ask_once(&reserve()).await.expect("an answer").1, OK);
        holders.push((holder.peer, holder.stays()));
    }
    let attack = async move {
        let over = Instant::now() + presses;
        let newcomers = tokio::spawn(each(NEWCOMERS, NEWCOMERS, move |number| async move {
            while Instant::now() < over {
                // A peer may not ask often, so each time it is another.
                if let Ok(mut newcomer) = Stranger::connect(port, address(100 + number)).await {
                    assert_ne!(newcomer.ask_once(&reserve()).await.map_or(None, |it| it.1), OK);
                }
            }
        }));
        let unread = each(CONNECTIONS, CONNECTIONS, move |number| async move {
            while Instant::now() < over {
                // One that is closed makes room for the next; one that is turned away comes back.
                if unread_echoes(port, address(SLOTS + number % 4)).await.is_err() {
                    sleep(Duration::from_millis(500)).await;
                }
            }
        });
        future::join(unread, newcomers).await.1.expect("they ask");
    };
    let how_hard = format!("2 on each of {CONNECTIONS} connections, {NEWCOMERS} newcomers");
    let what = "unread echoes of four addresses, at a full table";
    ground.suffer(what, &how_hard, attack).await;
    let given_up = ground.count(GIVEN_UP[0]).await + ground.count(GIVEN_UP[1]).await;
    // None where the kernel's buffers hold all of it.
    println!("{given_up} streams and connections were given up");
    let probed = ground.count("relaylet_questions_asked_total").await;
    assert!(probed >= (SLOTS - 1) as f64, "{probed} were probed");
    let relay = &ground.bystanders.relay;
    for (peer, _) in &holders {
        assert_eq!(relay.count_in_log(&format!("grace began: peer {peer}")), 0);
        assert_eq!(relay.count_in_log(&format!("slot freed: peer {peer}")), 0);
    }
    drop(holders);
    ground.ends_as_it_began().await;
}

/// A connection with two ping streams whose echoes it does not take, for a while.
async fn unread_echoes(port: u16, from: Ipv4Addr) -> io::Result<()> {
    Stranger::connect(port, from).await?.asks_for_echoes().await?;
    sleep(UNREAD).await;
    Ok(())
}

/// Headers that announce a long frame, and nothing behind them; beside a target that reads 500 kB/s of
/// what comes faster.
#[tokio::test]
async fn headers_without_bodies_beside_a_busy_target() {
    const HEADERS: usize = 250;
    const LONGEST: u32 = 1024 * 1024;
    const READ: usize = 500_000 / 20; // of a second
    let lasts = Duration::from_secs(quick_or_long(8, 60));
    let mut ground = Ground::prepare(&[]).await;
    let port = ground.port;
    let mut target = Stranger::arrive(port, address(1)).await;
    assert_eq!(target.ask_once(&reserve()).await.expect("an answer").1, OK);
    let mut source = Stranger::arrive(port, address(2)).await;
    let stream = source.next_stream();
    source.say(&data(SYN, stream, &opening(&connect(target.peer)))).await.expect("it is there");
    let circuit = target.agree_to(1).await.expect("it is asked")[0];
    // It has one window from the start; then it grants as much as it reads.
    let reads = tokio::spawn(async move {
        let mut each = interval(Duration::from_millis(50));
        let mut read = 0;
        loop {
            tokio::select! {
                _ = each.tick() => {
                    let more = frame(WINDOW_UPDATE, 0, circuit, READ as u32);
                    target.say(&more).await.expect("it is connected");
                }
                came = target.frame() => {
                    let came = came.expect("it is connected");
                    assert!(came.stream != circuit || !came.has(RST), "the circuit stays");
                    read += came.body.len();
                    if came.has(SYN) {
                        target.say(&data(RST, came.stream, &[])).await.expect("it is connected");
                    }
                }
            }
            if read > READ * 20 * lasts.as_secs() as usize {
                return target;
            }
        }
    });
    let writes = tokio::spawn(async move {
        let _ = source.write(stream, usize::MAX).await;
    });
    let attack = async move {
        let announced = each(HEADERS, AT_A_TIME, move |number| async move {
            let mut stranger = Stranger::arrive(port, address(10 + number % 5)).await;
            let stream = stranger.next_stream();
            let [open, header] = [0, LONGEST].map(|length| {
                [
                    &[0, 0][..],
                    &(if length == 0 { SYN } else { 0 }).to_be_bytes(),
                    &stream.to_be_bytes(),
                    &length.to_be_bytes(),
                ]
                .concat()
            });
            stranger.say(&[open, header].concat()).await?;
            Ok(Staying::as_long_as(takes_nothing(stranger)))
        });
        let announced = all(announced.await);
        within(reads).await.map(|target| (announced, target)).expect("the target is served")
    };
    let how_hard =
        format!("{HEADERS} of 12 bytes that announce 1 MiB, a target that reads 500 kB/s");
    let what = "headers without bodies";
    let (strangers, _) = ground.suffer(what, &how_hard, attack).await;
    for given_up in GIVEN_UP {
        assert_eq!(ground.count(given_up).await, 0.0, "{given_up}");
    }
    writes.abort();
    drop(strangers);
    ground.ends_as_it_began().await;
}

/// Two rust-libp2p peers with as many circuits as a peer may have, and data both ways on all of them.
#[tokio::test]
async fn as_many_circuits_as_a_peer_may_have_both_ways() {
    const CIRCUITS: usize = 64;
    let bytes = quick_or_long(2, 64) * 1024 * 1024;
    let mut ground = Ground::prepare(&["--connect-rate=0"]).await;
    let mut source = Client::connect(&ground.bystanders.relay).await;
    let mut target = Client::connect(&ground.bystanders.relay).await;
    target.reserve().await;
    let mut circuits = Vec::new();
    for _ in 0..CIRCUITS {
        circuits.push(circuit(&mut source, &mut target).await);
    }
    let attack = async move {
        let carried = circuits.into_iter().enumerate().flat_map(|(number, (there, back))| {
            [(there, number), (back, number)].map(|(stream, number)| {
                tokio::spawn(async move {
                    let (mut reads, mut writes) = stream.split();
                    let piece: Vec<u8> = (0..PIECE).map(|nth| (nth + number) as u8).collect();
                    let write = async {
                        for _ in 0..bytes / PIECE {
                            writes.write_all(&piece).await?;
                        }
                        writes.flush().await
                    };
                    let read = async {
                        let mut came = vec![0; PIECE];
                        for _ in 0..bytes / PIECE {
                            reads.read_exact(&mut came).await?;
                            assert!(came == piece, "what was written is what is read");
                        }
                        io::Result::Ok(())
                    };
                    let (written, read) = future::join(write, read).await;
                    written.and(read).expect("the circuit stays");
                })
            })
        });
        for carried in carried.collect::<Vec<_>>() {
            carried.await.expect("all of it comes");
        }
    };
    let how_hard =
        format!("{CIRCUITS} circuits of two peers, {} MiB both ways on each", bytes >> 20);
    let what = "as many circuits as a peer may have";
    ground.suffer(what, &how_hard, attack).await;
    assert!(source.kept_its_connection() && target.kept_its_connection());
    for given_up in GIVEN_UP {
        assert_eq!(ground.count(given_up).await, 0.0, "{given_up}");
    }
    source.leave().await;
    target.leave().await;
    ground.ends_as_it_began().await;
}
