//! Connections that do not speak, or do not go: handshakes that stand still, and closes that are not read.

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

use super::ground::Ground;
use crate::common::{
    HOP,
    by_hand::{SYN, data, proposal, tcp_from},
    messages::{connect, reserve},
    strangers::{
        AT_A_TIME, Staying, Stranger, address, address_in, all, each, quick_or_long, takes_nothing,
    },
    within,
};

const OK: Option<i32> = Some(100);
const NO_RESERVATION: Option<i32> = Some(204);

/// Half of a round trip of 600 ms.
const HALF: Duration = Duration::from_millis(300);

/// Four addresses connect and send nothing, as fast as they can. A slot's owner that comes back, and
/// newcomers from elsewhere, are let in.
#[tokio::test]
async fn silent_connections_of_four_addresses() {
    let lasts = Duration::from_secs(quick_or_long(8, 60));
    let mut ground = Ground::prepare(&[]).await;
    let port = ground.port;
    let owner = Keypair::generate_ed25519();
    let mut holder = Stranger::connect_as(&owner, port, address(9)).await.expect("there is room");
    assert_eq!(holder.ask_once(&reserve()).await.expect("an answer").1, OK);
    let attack = async move {
        let over = Instant::now() + lasts;
        let silent = each(4, 4, move |number| async move {
            let mut opened = Vec::new();
            while Instant::now() < over {
                // A kernel's backlog may be full.
                if let Ok(Ok(tcp)) = timeout(HALF, tcp_from(address(number), port)).await {
                    opened.push(tcp);
                }
                opened.drain(..opened.len().saturating_sub(200));
            }
        });
        let silent = tokio::spawn(silent);
        sleep(lasts / 4).await;
        drop(holder);
        let mut waits = Vec::new();
        let asked = Instant::now();
        let mut holder = within(async {
            loop {
                if let Ok(holder) = Stranger::connect_as(&owner, port, address(9)).await {
                    return holder;
                }
            }
        })
        .await;
        assert_eq!(holder.ask_once(&reserve()).await.expect("an answer").1, OK);
        waits.push(asked.elapsed());
        let mut number = 100;
        let mut newcomers = vec![holder];
        while Instant::now() < over {
            let asked = Instant::now();
            number += 1;
            let mut newcomer = Stranger::arrive(port, address(number)).await;
            assert_eq!(newcomer.ask_once(&reserve()).await.expect("an answer").1, OK);
            waits.push(asked.elapsed());
            newcomers.push(newcomer);
            sleep(HALF).await;
        }
        silent.await.expect("they connect");
        (newcomers, waits)
    };
    let what = "silent connections of four addresses";
    let how_hard = format!("as fast as they can, for {} s", lasts.as_secs());
    let ((newcomers, waits), _) = ground.suffer(what, &how_hard, attack).await;
    let longest = waits.iter().max().expect("one at least");
    println!("{} came; the longest wait was {longest:?}", waits.len());
    drop(newcomers);
    ground.ends_as_it_began().await;
}

/// One silent connection of each of 300 prefixes, and again as soon as it is dropped. A client with a round
/// trip of 600 ms is let in.
#[tokio::test]
async fn silent_connections_of_300_prefixes_and_a_slow_client() {
    const PREFIXES: usize = 300;
    let mut ground = Ground::prepare(&[]).await;
    let port = ground.port;
    let attack = async move {
        let silent = (0..PREFIXES).map(|number| {
            Staying::as_long_as(async move {
                loop {
                    if let Ok(mut tcp) = tcp_from(address(number), port).await {
                        let _ = tcp.read(&mut [0]).await; // until it is dropped
                    }
                    sleep(Duration::from_millis(10)).await;
                }
            })
        });
        let silent: Vec<_> = silent.collect();
        sleep(Duration::from_secs(4)).await;
        let asked = Instant::now();
        let slow = slow_link(address_in(999, 0), port).await.expect("a port");
        // As a client would, it tries again.
        let mut client = within(async {
            loop {
                if let Ok(client) = Stranger::connect(slow, Ipv4Addr::LOCALHOST).await {
                    return client;
                }
            }
        })
        .await;
        assert_eq!(client.ask_once(&reserve()).await.expect("an answer").1, OK);
        let took = asked.elapsed();
        drop(silent);
        (client, took)
    };
    let what = "silent connections of 300 prefixes";
    let how_hard = "one each, and again when it is dropped; a client with a round trip of 600 ms";
    let ((client, took), _) = ground.suffer(what, how_hard, attack).await;
    println!("the slow client held a slot after {took:?}");
    drop(client);
    ground.ends_as_it_began().await;
}

/// A peer with a slot connects again and again and reads none of its connections: those that make room
/// for the next are gone after 3 s, and count until then.
#[tokio::test]
async fn connections_that_do_not_read_that_they_are_closed() {
    const CAP: usize = 8;
    const CONNECTIONS: usize = 30;
    let mut ground = Ground::prepare(&[]).await;
    let port = ground.port;
    let key = Keypair::generate_ed25519();
    let mut holder = Stranger::connect_as(&key, port, address(1)).await.expect("there is room");
    assert_eq!(holder.ask_once(&reserve()).await.expect("an answer").1, OK);
    let (counted, mut most) = (mpsc::unbounded_channel(), 0);
    let (count, mut counts) = counted;
    let watched = ground.watch();
    let attack = async move {
        let mut unread = vec![Staying::as_long_as(takes_nothing(holder))];
        for _ in 0..CONNECTIONS {
            if let Ok(mut next) = Stranger::connect_as(&key, port, address(1)).await {
                let _ = next.asks_for_echoes().await; // until it is closed
                unread.push(Staying::as_long_as(takes_nothing(next)));
            }
            count.send(watched().await.connections).expect("it is counted");
        }
        unread
    };
    let what = "connections that do not read that they are closed";
    let how_hard = format!("{CONNECTIONS} of a peer that holds a slot, which may have {CAP}");
    let (unread, _) = ground.suffer(what, &how_hard, attack).await;
    while let Ok(count) = counts.try_recv() {
        most = most.max(count);
    }
    // Beside the two that are watched, and one that is being closed.
    assert!(most <= 2 + CAP + 1, "{most}");
    // All but those that it may have are gone although none of them was read.
    ground.until(|counts| counts.connections <= 2 + CAP).await;
    drop(unread);
    ground.ends_as_it_began().await;
}

/// One address opens as many streams as its connections may have, and asks for nothing on them. A client
/// from elsewhere gets answers on as many streams as it likes.
#[tokio::test]
async fn silent_streams_of_one_address() {
    const CONNECTIONS: usize = 48;
    const STREAMS: usize = 95;
    const REQUESTS: usize = 25; // in a minute a client may send 30
    let mut ground = Ground::prepare(&[]).await;
    let port = ground.port;
    let attack = async move {
        let opened = each(CONNECTIONS, AT_A_TIME, move |_| async move {
            let mut stranger = Stranger::arrive(port, address(1)).await;
            let streams = (0..STREAMS)
                .flat_map(|_| data(SYN, stranger.next_stream(), &proposal(HOP.as_ref())));
            let streams: Vec<_> = streams.collect();
            stranger.say(&streams).await?;
            io::Result::Ok(stranger)
        });
        let silent = opened.await;
        let mut client = Stranger::arrive(port, address(2)).await;
        let nobody = connect(Keypair::generate_ed25519().public().to_peer_id());
        let answers = client.ask(&vec![nobody; REQUESTS]).await?;
        io::Result::Ok((all(silent), client, answers))
    };
    let what = "silent streams of one address";
    let how_hard = format!("{STREAMS} on each of {CONNECTIONS} connections");
    let (attacked, _) = ground.suffer(what, &how_hard, attack).await;
    let (silent, client, answers) = attacked.expect("they stay connected");
    assert!(answers.iter().all(|(_, status)| *status == NO_RESERVATION), "{answers:?}");
    drop((silent, client));
    ground.ends_as_it_began().await;
}

/// A port of this machine behind which the relay is 300 ms away; connections reach it from this address.
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

/// Passes on what comes, each piece 300 ms later.
async fn delayed(mut from: impl AsyncRead + Unpin + Send, mut to: impl AsyncWrite + Unpin) {
    let (send, mut pieces) = mpsc::unbounded_channel();
    let read = async move {
        let mut buffer = vec![0; 64 * 1024];
        while let Ok(read @ 1..) = tokio::io::AsyncReadExt::read(&mut from, &mut buffer).await {
            if send.send((tokio::time::Instant::now() + HALF, buffer[..read].to_vec())).is_err() {
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
