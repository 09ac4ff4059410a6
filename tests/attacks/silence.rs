//! Silent connections: stalled handshakes, silent streams, and closes that are not read.

use std::{
    io,
    net::Ipv4Addr,
    time::{Duration, Instant},
};

use libp2p::{
    futures::{
        AsyncReadExt,
        future::{self, BoxFuture},
    },
    identity::Keypair,
};
use tokio::{
    io::{AsyncRead, AsyncWrite, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::{
        mpsc,
        oneshot::{self, error::TryRecvError},
    },
    task::JoinHandle,
    time::{sleep, sleep_until, timeout},
};

use super::testbed::Testbed;
use crate::common::{
    HOP,
    by_hand::{SYN, data, proposal, tcp_from},
    messages::{HopMessage, NO_RESERVATION, OK, connect, reserve},
    raw_peers::{
        AT_A_TIME, Background, RawPeer, address, hold_without_reading, run_each, short_or_long,
    },
    within,
};

/// The metric of connections that were denied because their address opens them too fast.
const DENIED_TOO_FAST: &str =
    r#"relaylet_connections_denied_total{reason="connections come too fast"}"#;

/// The metrics of handshakes that were dropped for others: before the key exchange, during it, and after it.
const DROPPED: [&str; 3] = [
    r#"relaylet_handshakes_failed_total{stage="multistream",reason="too many handshakes"}"#,
    r#"relaylet_handshakes_failed_total{stage="security",reason="too many handshakes"}"#,
    r#"relaylet_handshakes_failed_total{stage="muxer",reason="too many handshakes"}"#,
];

/// The metric of connections that were closed for another one of their peer.
const REPLACED: &str = r#"relaylet_connections_closed_total{reason="replaced"}"#;

/// How many silent streams a connection opens.
const STREAMS: usize = 95;

/// The interval at which a count is polled.
const POLL_INTERVAL: Duration = Duration::from_millis(50);

/// The delay of the slow link in each direction.
const LINK_DELAY: Duration = Duration::from_millis(300);

/// How long a TCP connection may take.
const TCP_TIMEOUT: Duration = Duration::from_millis(300);

/// The pause between two newcomers.
const NEWCOMER_PAUSE: Duration = Duration::from_millis(300);

/// Four addresses connect and send nothing, as fast as they can. None may have more handshakes than its cap, and
/// connections above the rate are denied. A returning owner of a slot, and newcomers of other addresses, must be
/// admitted.
#[tokio::test]
async fn silent_connections_of_four_addresses() {
    const HANDSHAKES: f64 = 32.0; // of one address
    let duration = Duration::from_secs(short_or_long(8, 60));
    let mut testbed = Testbed::start(&[]).await;
    let port = testbed.port;
    let handshakes = testbed.busiest_reader("handshakes");
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
                // Those that the relay has not closed stay open, the oldest first: they hold places.
                if opened.len() > 400 {
                    opened.retain(|tcp| is_open(&tcp.0));
                    opened.truncate(200);
                }
            }
        });
        let silent = tokio::spawn(silent);
        let most_handshakes = MostOf::watch(handshakes);
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
        (newcomers, waits, most_handshakes.stop().await)
    };
    let what = "silent connections of four addresses";
    let size = format!("as fast as they can, for {} s", duration.as_secs());
    let ((newcomers, waits, most_handshakes), _) = testbed.attack(what, &size, attack).await;
    let longest = waits.iter().max().expect("one at least");
    println!("{} newcomers; the longest wait was {longest:?}", waits.len());
    let expected = HANDSHAKES / 2.0..=HANDSHAKES; // fewer would be no attack
    assert!(expected.contains(&most_handshakes), "{most_handshakes} of one address");
    testbed.wait_until_counted(DENIED_TOO_FAST, 1.0).await;
    drop(newcomers);
    testbed.assert_restored().await;
}

/// One silent connection of each of 300 prefixes, reopened whenever it is dropped. Clients with a round trip of 600 ms
/// must be admitted: silent connections are dropped for others, and no client that has begun the key exchange is.
#[tokio::test]
async fn silent_connections_of_300_prefixes_and_slow_clients() {
    const PREFIXES: usize = 300;
    const CLIENTS: usize = 32;
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
        let clients = run_each(CLIENTS, CLIENTS, move |number| async move {
            let slow = slow_link(address(PREFIXES + number), port).await.expect("a port");
            // It retries, as a client would.
            let mut client = RawPeer::connect_with_retry(slow, Ipv4Addr::LOCALHOST).await;
            assert_eq!(client.request(&reserve()).await.expect("an answer").1, OK);
            (client.stay_connected(), start.elapsed())
        });
        let clients = clients.await;
        drop(silent);
        clients
    };
    let what = "silent connections of 300 prefixes";
    let size = format!(
        "one each, and again when it is dropped; {CLIENTS} clients with a round trip of 600 ms"
    );
    let (clients, _) = testbed.attack(what, &size, attack).await;
    let longest = clients.iter().map(|(_, took)| took).max().expect("one at least");
    println!("all slow clients held a slot after {longest:?}");
    let [silent, exchanging, secured] = DROPPED;
    testbed.wait_until_counted(silent, PREFIXES as f64 / 2.0).await;
    for of_clients in [exchanging, secured] {
        assert_eq!(testbed.count(of_clients).await, 0.0, "{of_clients}");
    }
    drop(clients);
    testbed.assert_restored().await;
}

/// A peer with a slot connects again and again and reads none of its connections: replaced ones must be closed within
/// 3 s, and count until then.
#[tokio::test]
async fn connections_that_ignore_their_close() {
    const CAP: usize = 8;
    /// Each close takes 3 s; without that limit it would take a minute, until the kernel gives up.
    const CLOSED: f64 = 4.0;
    let mut testbed = Testbed::start(&[]).await;
    let port = testbed.port;
    let key = Keypair::generate_ed25519();
    let mut holder = RawPeer::connect_as(&key, port, address(1)).await.expect("it is admitted");
    assert_eq!(holder.request(&reserve()).await.expect("an answer").1, OK);
    let (count, mut counts) = mpsc::unbounded_channel();
    let (watched, closed) = (testbed.counts_reader(), testbed.counter(REPLACED));
    let attack = async move {
        let mut unread = vec![Background::spawn(hold_without_reading(holder))];
        let replace = async {
            while closed().await < CLOSED {
                let next = RawPeer::connect_with_small_buffer(&key, port, address(1));
                if let Ok(mut next) = next.await {
                    let _ = next.send_unread_pings().await; // until it is closed
                    unread.push(Background::spawn(hold_without_reading(next)));
                }
                count.send(watched().await.connections).expect("it is counted");
                sleep(POLL_INTERVAL).await;
            }
        };
        within(replace).await;
        unread
    };
    let what = "connections that do not read that they are closed";
    let size =
        format!("of a peer that holds a slot, which may have {CAP}, until {CLOSED} are closed");
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

/// One address opens as many streams as its connections may have, and sends nothing on them: it gets no more than its
/// share. A client of another address must get answers on many streams.
#[tokio::test]
async fn silent_streams_of_one_address() {
    const CONNECTIONS: usize = 48;
    const SHARE: f64 = 512.0;
    let mut testbed = Testbed::start(&[]).await;
    let port = testbed.port;
    let streams = testbed.busiest_reader("streams");
    let attack = async move {
        let connected = run_each(CONNECTIONS, AT_A_TIME, move |_| async move {
            RawPeer::connect_with_retry(port, address(1)).await
        });
        let mut silent = connected.await;
        let share = MostOf::watch(streams);
        open_silent_streams(&mut silent).await?;
        let mut client = RawPeer::connect_with_retry(port, address(2)).await;
        let answers = client.request_all(&many_requests()).await?;
        io::Result::Ok((silent, client, share.stop().await, answers))
    };
    let what = "silent streams of one address";
    let size = format!("{STREAMS} on each of {CONNECTIONS} connections");
    let (attacked, _) = testbed.attack(what, &size, attack).await;
    let (silent, client, share, answers) = attacked.expect("they stay connected");
    let expected = SHARE / 2.0..=SHARE; // fewer would be no attack
    assert!(expected.contains(&share), "{share} streams of one address");
    assert!(answers.iter().all(|(_, status)| *status == NO_RESERVATION), "{answers:?}");
    drop((silent, client));
    testbed.assert_restored().await;
}

/// Nine addresses take all permits for streams: a client of another address must get answers on many streams in place of
/// theirs. The pool is small, so that it is full before the relay resets the first stream for its silence.
#[tokio::test]
async fn silent_streams_of_nine_addresses() {
    const ADDRESSES: usize = 9; // each may have an eighth
    let mut testbed = Testbed::start(&["--max-streams=512"]).await;
    let port = testbed.port;
    let attack = async move {
        // All connect before the first stream is opened.
        let mut client = RawPeer::connect_with_retry(port, address(ADDRESSES)).await;
        let connected = run_each(ADDRESSES, ADDRESSES, move |number| async move {
            RawPeer::connect_with_retry(port, address(number)).await
        });
        let mut silent = connected.await;
        open_silent_streams(&mut silent).await?;
        let answers = client.request_all(&many_requests()).await?;
        io::Result::Ok((silent, client, answers))
    };
    let what = "silent streams of nine addresses";
    let size = format!("{STREAMS} of each, of 512");
    let (attacked, _) = testbed.attack(what, &size, attack).await;
    let (silent, client, answers) = attacked.expect("they stay connected");
    assert!(answers.iter().all(|(_, status)| *status == NO_RESERVATION), "{answers:?}");
    drop((silent, client));
    testbed.assert_restored().await;
}

/// Whether the relay has neither closed this connection nor sent anything.
fn is_open(tcp: &TcpStream) -> bool {
    tcp.try_read(&mut [0]).is_err_and(|error| error.kind() == io::ErrorKind::WouldBlock)
}

/// Polls a count until it is stopped and has been above zero, and keeps the largest.
struct MostOf(JoinHandle<f64>, oneshot::Sender<()>);

impl MostOf {
    fn watch(count: impl Fn() -> BoxFuture<'static, f64> + Send + 'static) -> Self {
        let (stop, mut stopped) = oneshot::channel();
        let most = async move {
            let mut most = 0.0;
            while most == 0.0 || stopped.try_recv() == Err(TryRecvError::Empty) {
                most = count().await.max(most);
                sleep(POLL_INTERVAL).await;
            }
            most
        };
        Self(tokio::spawn(most), stop)
    }

    async fn stop(self) -> f64 {
        drop(self.1);
        within(self.0).await.expect("the relay answers")
    }
}

/// As many requests as the rate limit allows at once, to a peer without a slot.
fn many_requests() -> Vec<HopMessage> {
    const REQUESTS: usize = 25; // the rate limit is 30 a minute
    vec![connect(Keypair::generate_ed25519().public().to_peer_id()); REQUESTS]
}

/// Opens as many streams as each connection may have, and sends nothing but the protocol's name. Returns when the relay
/// has handled them.
async fn open_silent_streams(peers: &mut [RawPeer]) -> io::Result<()> {
    for peer in &mut *peers {
        let open =
            (0..STREAMS).flat_map(|_| data(SYN, peer.next_stream(), &proposal(HOP.as_ref())));
        let open: Vec<_> = open.collect();
        peer.send(&open).await?;
    }
    for peer in peers {
        peer.read_until_pong().await?;
    }
    Ok(())
}

/// Forwards a port of this machine to the relay with a delay of 300 ms each way, from this address.
async fn slow_link(from: Ipv4Addr, relay: u16) -> io::Result<u16> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
    let port = listener.local_addr()?.port();
    tokio::spawn(async move {
        while let Ok((near, _)) = listener.accept().await {
            tokio::spawn(async move {
                let far = tcp_from(from, relay).await?.0;
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
