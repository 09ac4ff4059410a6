//! Silent connections: stalled handshakes, silent streams, and closes that are not read.

use std::{
    io,
    net::Ipv4Addr,
    time::{Duration, Instant},
};

use libp2p::{
    futures::{AsyncReadExt, future},
    identity::Keypair,
};
use tokio::{
    io::{AsyncRead, AsyncWrite, AsyncWriteExt},
    net::{TcpListener, TcpSocket},
    sync::mpsc,
    time::{sleep, sleep_until, timeout},
};

use super::testbed::Testbed;
use crate::common::{
    HOP,
    by_hand::{SYN, data, proposal, tcp_from},
    messages::{connect, reserve},
    raw_peers::{
        AT_A_TIME, Background, RawPeer, address, address_in, expect_all, hold_without_reading,
        run_each, short_or_long,
    },
    within,
};

const OK: Option<i32> = Some(100);
const NO_RESERVATION: Option<i32> = Some(204);

/// The delay of the slow link in each direction.
const LINK_DELAY: Duration = Duration::from_millis(300);

/// How long a TCP connection may take.
const TCP_TIMEOUT: Duration = Duration::from_millis(300);

/// The pause between two newcomers.
const NEWCOMER_PAUSE: Duration = Duration::from_millis(300);

/// Four addresses connect and send nothing, as fast as they can. A returning owner of a slot, and newcomers of other
/// addresses, must be admitted.
#[tokio::test]
async fn silent_connections_of_four_addresses() {
    let duration = Duration::from_secs(short_or_long(8, 60));
    let mut testbed = Testbed::start(&[]).await;
    let port = testbed.port;
    let owner = Keypair::generate_ed25519();
    let mut holder = RawPeer::connect_as(&owner, port, address(9)).await.expect("there is room");
    assert_eq!(holder.request(&reserve()).await.expect("an answer").1, OK);
    let attack = async move {
        let end = Instant::now() + duration;
        let silent = run_each(4, 4, move |number| async move {
            let mut opened = Vec::new();
            while Instant::now() < end {
                // The kernel's accept backlog may be full.
                if let Ok(Ok(tcp)) = timeout(TCP_TIMEOUT, tcp_from(address(number), port)).await {
                    opened.push(tcp);
                }
                opened.drain(..opened.len().saturating_sub(200));
            }
        });
        let silent = tokio::spawn(silent);
        sleep(duration / 4).await;
        drop(holder);
        let mut waits = Vec::new();
        let start = Instant::now();
        let mut holder = within(async {
            loop {
                if let Ok(holder) = RawPeer::connect_as(&owner, port, address(9)).await {
                    return holder;
                }
            }
        })
        .await;
        assert_eq!(holder.request(&reserve()).await.expect("an answer").1, OK);
        waits.push(start.elapsed());
        let mut number = 100;
        let mut newcomers = vec![holder];
        while Instant::now() < end {
            let start = Instant::now();
            number += 1;
            let mut newcomer = RawPeer::connect_with_retry(port, address(number)).await;
            assert_eq!(newcomer.request(&reserve()).await.expect("an answer").1, OK);
            waits.push(start.elapsed());
            newcomers.push(newcomer);
            sleep(NEWCOMER_PAUSE).await;
        }
        silent.await.expect("the attackers do not panic");
        (newcomers, waits)
    };
    let what = "silent connections of four addresses";
    let size = format!("as fast as possible, for {} s", duration.as_secs());
    let ((newcomers, waits), _) = testbed.attack(what, &size, attack).await;
    let longest = waits.iter().max().expect("one at least");
    println!("{} newcomers; the longest wait was {longest:?}", waits.len());
    drop(newcomers);
    testbed.assert_restored().await;
}

/// One silent connection of each of 300 prefixes, reopened whenever it is dropped. A client with a round trip of 600 ms
/// must be admitted.
#[tokio::test]
async fn silent_connections_of_300_prefixes_and_a_slow_client() {
    const PREFIXES: usize = 300;
    let mut testbed = Testbed::start(&[]).await;
    let port = testbed.port;
    let attack = async move {
        let silent = (0..PREFIXES).map(|number| {
            Background::spawn(async move {
                loop {
                    if let Ok(mut tcp) = tcp_from(address(number), port).await {
                        let _ = tcp.read(&mut [0]).await; // until the relay drops it
                    }
                    sleep(Duration::from_millis(10)).await;
                }
            })
        });
        let silent: Vec<_> = silent.collect();
        sleep(Duration::from_secs(4)).await;
        let start = Instant::now();
        let slow = slow_link(address_in(999, 0), port).await.expect("a port");
        // It retries, as a client would.
        let mut client = within(async {
            loop {
                if let Ok(client) = RawPeer::connect(slow, Ipv4Addr::LOCALHOST).await {
                    return client;
                }
            }
        })
        .await;
        assert_eq!(client.request(&reserve()).await.expect("an answer").1, OK);
        let took = start.elapsed();
        drop(silent);
        (client, took)
    };
    let what = "silent connections of 300 prefixes";
    let size = "one each, opened again when it is dropped; a client with a round trip of 600 ms";
    let ((client, took), _) = testbed.attack(what, size, attack).await;
    println!("the slow client held a slot after {took:?}");
    drop(client);
    testbed.assert_restored().await;
}

/// A peer with a slot connects again and again and reads none of its connections: replaced ones must be closed within
/// 3 s, and count until then.
#[tokio::test]
async fn connections_that_ignore_their_close() {
    const CAP: usize = 8;
    const CONNECTIONS: usize = 30;
    let mut testbed = Testbed::start(&[]).await;
    let port = testbed.port;
    let key = Keypair::generate_ed25519();
    let mut holder = RawPeer::connect_as(&key, port, address(1)).await.expect("it is admitted");
    assert_eq!(holder.request(&reserve()).await.expect("an answer").1, OK);
    let (sender, mut counts) = mpsc::unbounded_channel();
    let read_counts = testbed.counts_reader();
    let attack = async move {
        let mut unread = vec![Background::spawn(hold_without_reading(holder))];
        for _ in 0..CONNECTIONS {
            if let Ok(mut next) = RawPeer::connect_as(&key, port, address(1)).await {
                let _ = next.send_unread_pings().await; // until it is closed
                unread.push(Background::spawn(hold_without_reading(next)));
            }
            sender.send(read_counts().await.connections).expect("the receiver is open");
        }
        unread
    };
    let what = "connections that do not read the relay's close";
    let size = format!("{CONNECTIONS} of a peer that holds a slot, which may have {CAP}");
    let (unread, _) = testbed.attack(what, &size, attack).await;
    let mut most = 0;
    while let Ok(count) = counts.try_recv() {
        most = most.max(count);
    }
    // In addition to the bystanders' two, and one that is being closed.
    assert!(most <= 2 + CAP + 1, "{most}");
    // All connections above the cap are closed although none was read.
    testbed.until(|counts| counts.connections <= 2 + CAP).await;
    drop(unread);
    testbed.assert_restored().await;
}

/// One address opens as many streams as its connections may have, and sends nothing on them. A client of another
/// address must get answers on many streams.
#[tokio::test]
async fn silent_streams_of_one_address() {
    const CONNECTIONS: usize = 48;
    const STREAMS: usize = 95;
    const REQUESTS: usize = 25; // the rate limit is 30 a minute
    let mut testbed = Testbed::start(&[]).await;
    let port = testbed.port;
    let attack = async move {
        let opened = run_each(CONNECTIONS, AT_A_TIME, move |_| async move {
            let mut peer = RawPeer::connect_with_retry(port, address(1)).await;
            let streams =
                (0..STREAMS).flat_map(|_| data(SYN, peer.next_stream(), &proposal(HOP.as_ref())));
            let streams: Vec<_> = streams.collect();
            peer.send(&streams).await?;
            io::Result::Ok(peer)
        });
        let silent = opened.await;
        let mut client = RawPeer::connect_with_retry(port, address(2)).await;
        let unknown = connect(Keypair::generate_ed25519().public().to_peer_id());
        let answers = client.request_all(&vec![unknown; REQUESTS]).await?;
        io::Result::Ok((expect_all(silent), client, answers))
    };
    let what = "silent streams of one address";
    let size = format!("{STREAMS} on each of {CONNECTIONS} connections");
    let (attacked, _) = testbed.attack(what, &size, attack).await;
    let (silent, client, answers) = attacked.expect("they stay connected");
    assert!(answers.iter().all(|(_, status)| *status == NO_RESERVATION), "{answers:?}");
    drop((silent, client));
    testbed.assert_restored().await;
}

/// Forwards a port of this machine to the relay with a delay of 300 ms each way, from this address.
async fn slow_link(from: Ipv4Addr, relay: u16) -> io::Result<u16> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
    let port = listener.local_addr()?.port();
    tokio::spawn(async move {
        while let Ok((near, _)) = listener.accept().await {
            tokio::spawn(async move {
                let socket = TcpSocket::new_v4()?;
                socket.bind((from, 0).into())?;
                let far = socket.connect((Ipv4Addr::LOCALHOST, relay).into()).await?;
                let (near_in, near_out) = near.into_split();
                let (far_in, far_out) = far.into_split();
                future::join(delayed(near_in, far_out), delayed(far_in, near_out)).await;
                io::Result::Ok(())
            });
        }
    });
    Ok(port)
}

/// Forwards bytes, each chunk 300 ms later.
async fn delayed(mut from: impl AsyncRead + Unpin + Send, mut to: impl AsyncWrite + Unpin) {
    let (send, mut pieces) = mpsc::unbounded_channel();
    let read = async move {
        let mut buffer = vec![0; 64 * 1024];
        while let Ok(read @ 1..) = tokio::io::AsyncReadExt::read(&mut from, &mut buffer).await {
            if send
                .send((tokio::time::Instant::now() + LINK_DELAY, buffer[..read].to_vec()))
                .is_err()
            {
                break;
            }
        }
    };
    let write = async move {
        while let Some((at, piece)) = pieces.recv().await {
            sleep_until(at).await;
            if to.write_all(&piece).await.is_err() {
                break;
            }
        }
        let _ = to.shutdown().await;
    };
    future::join(read, write).await;
}
