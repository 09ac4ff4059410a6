//! A small device: circuits that transfer data as fast as they can, beside more connections and stalled circuits than
//! its memory allows.

use std::{io, time::Duration};

use libp2p::futures::future;
use tokio::time::timeout;

use super::{MIB, cgroup::Cgroup, estimate, load::grow_read_buffer};
use crate::common::{
    Relay,
    by_hand::{Frame, SYN, WINDOW_UPDATE, data, frame},
    command,
    messages::{OK, connect, reserve},
    raw_peers::{Background, RawPeer, address, hop_opening, run_each},
    within,
};

/// The value of `--memory`, in MiB.
const MEMORY: u64 = 32;
/// How many circuits transfer data as fast as they can.
const FLAT_OUT: usize = 16;
const CONNECTIONS: usize = 200;
/// How many stalled circuits each pair requests, and how many pairs there are.
const STALLED: [usize; 2] = [4, 16];

/// How many bytes each circuit transfers.
const LOAD: usize = 2 * MIB as usize;

/// How many peers connect at a time: half of the limit on handshakes.
const AT_A_TIME: usize = 8;

/// How long a target waits for the next stop request, as some circuits may be refused.
const STOP_TIMEOUT: Duration = Duration::from_secs(2);

#[tokio::test]
#[ignore = "needs root, for a cgroup that limits memory"]
async fn sixteen_busy_circuits_survive_more_connections_and_stalled_circuits_than_memory_allows() {
    let cgroup = Cgroup::make();
    let folder = tempfile::tempdir().expect("a temporary folder");
    let mut start = command(&folder);
    start.args(["--listen=/ip4/127.0.0.1/tcp/0", "--circuit-bytes=0", "--circuit-duration=0s"]);
    start.arg(format!("--memory={MEMORY}MiB"));
    let relay = Relay::run(cgroup.command(&start), folder);
    assert!(estimate(&relay).await <= MEMORY);
    cgroup.limit(MEMORY * MIB);
    let port = relay.port();

    let pairs = run_each(FLAT_OUT, AT_A_TIME, move |number| pair(port, number)).await;
    let peers = run_each(CONNECTIONS, AT_A_TIME, move |number| async move {
        let mut peer = RawPeer::connect(port, address(100 + number / 4)).await?;
        grow_read_buffer(&mut peer).await?;
        io::Result::Ok(peer)
    });
    let (peers, ()) = future::join(peers, transfer(pairs)).await;
    let connected = peers.iter().flatten().count();
    drop(peers);

    let pairs = run_each(FLAT_OUT, AT_A_TIME, move |number| pair(port, number)).await;
    let [circuits, stalled] = STALLED;
    let stall = run_each(stalled, AT_A_TIME, move |number| stall(port, 100 + number, circuits));
    let (stalled, ()) = future::join(stall, transfer(pairs)).await;
    println!(
        "{MEMORY} MiB: {} MiB of its cgroup at its peak; {connected} of {CONNECTIONS} connections, {} stalled circuits",
        cgroup.peak() / MIB,
        stalled.iter().flatten().map(|(_, open)| open).sum::<usize>(),
    );
    assert_eq!(cgroup.killed(), 0);
    assert!(connected > FLAT_OUT && stalled.iter().flatten().count() > 0);
}

/// A circuit between two new peers: the source, its stream, and the target, which reads everything.
async fn pair(port: u16, number: usize) -> (RawPeer, u32, Background) {
    let mut target = RawPeer::connect_with_retry(port, address(number)).await;
    let mut source = RawPeer::connect_with_retry(port, address(number)).await;
    let connected = async {
        assert_eq!(target.request(&reserve()).await?.1, OK);
        let peer = target.peer;
        let reads = |frame: &Frame| match frame.body.len() {
            0 => vec![],
            read => window_update(frame.stream, read),
        };
        let target = Background::spawn(async move { _ = target.accept_circuits(reads).await });
        let (stream, status) = source.request(&connect(peer)).await?;
        assert_eq!(status, OK);
        io::Result::Ok((source, stream, target))
    };
    within(connected).await.expect("the relay keeps both connected")
}

fn window_update(stream: u32, bytes: usize) -> Vec<u8> {
    frame(WINDOW_UPDATE, 0, stream, bytes as u32)
}

/// Each source sends its load to its target.
async fn transfer(pairs: Vec<(RawPeer, u32, Background)>) {
    let transfers = pairs.into_iter().map(|(mut source, stream, target)| async move {
        let written = within(source.write(stream, LOAD)).await;
        written.expect("a circuit whose target reads is not reset");
        drop(target);
    });
    future::join_all(transfers).await;
}

/// Requests circuits to a target that reads nothing. Returns both peers, and how many circuits were opened.
async fn stall(port: u16, number: usize, circuits: usize) -> io::Result<([RawPeer; 2], usize)> {
    let mut target = RawPeer::connect(port, address(number)).await?;
    let mut source = RawPeer::connect(port, address(number)).await?;
    let _ = target.request(&reserve()).await?;
    let streams: Vec<_> = (0..circuits).map(|_| source.next_stream()).collect();
    let request = hop_opening(&connect(target.peer));
    let requests: Vec<_> = streams.iter().flat_map(|stream| data(SYN, *stream, &request)).collect();
    source.send(&requests).await?;
    let mut open = 0;
    while let Ok(accepted) = timeout(STOP_TIMEOUT, target.accept_count(1)).await {
        open += accepted?.len();
    }
    for stream in streams {
        for _ in 0..4 {
            source.send(&data(0, stream, &[7; 60 * 1024])).await?;
        }
    }
    Ok(([source, target], open))
}
