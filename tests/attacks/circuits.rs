//! Attacks with circuits that are opened only for their cost.

use std::{io, time::Duration};

use libp2p::PeerId;
use rand::{RngExt, SeedableRng, rngs::Xoshiro256PlusPlus as Random};
use tokio::{
    task::JoinSet,
    time::{sleep, timeout},
};

use super::testbed::Testbed;
use crate::common::{
    STOP,
    by_hand::{ACK, FIN, RST, SYN, WINDOW_UPDATE, data, frame},
    messages::{CONNECTION_FAILED, OK, RESOURCE_LIMIT_EXCEEDED, StopMessage, connect, reserve},
    raw_peers::{
        AT_A_TIME, Background, CHUNK, FREE_WINDOW, RawPeer, Received, address, expect_all,
        hop_opening, run_each, short_or_long, stop_acceptance,
    },
    within,
};

/// The metric of CONNECTs that were refused because their target has as many circuits as it may have.
const TARGET_FULL: &str = r#"relaylet_requests_refused_total{request="CONNECT",reason="too many circuits of the target"}"#;

/// The interval at which the counts are polled.
const POLL_INTERVAL: Duration = Duration::from_millis(100);

/// How many circuits one peer may have.
const PER_PEER: usize = 64;

/// How many CONNECTs one peer may send at once.
const CONNECTS: usize = 30;

#[tokio::test]
async fn targets_that_never_answer() {
    const TARGETS: usize = 8;
    const SOURCES: usize = 20;
    // A target has half a minute to answer.
    let duration = Duration::from_secs(short_or_long(5, 35));
    let mut testbed = Testbed::start(&[]).await;
    let port = testbed.port;
    let (counts, refused) = (testbed.counts_reader(), testbed.counter(TARGET_FULL));
    let attack = async move {
        let targets = expect_all(
            run_each(TARGETS, AT_A_TIME, move |number| async move {
                let mut target = RawPeer::connect_with_retry(port, address(number)).await;
                assert_eq!(target.request(&reserve()).await?.1, OK);
                Ok(target)
            })
            .await,
        );
        let peers: Vec<_> = targets.iter().map(|target| target.peer).collect();
        let requesting: Vec<_> = (0..SOURCES)
            .map(|number| {
                let peers = peers.clone();
                tokio::spawn(async move {
                    let mut source =
                        RawPeer::connect_with_retry(port, address(TARGETS + number)).await;
                    let requests =
                        (0..CONNECTS).map(|nth| connect(peers[(number + nth) % TARGETS]));
                    source.request_all(&requests.collect::<Vec<_>>()).await
                })
            })
            .collect();
        let pending = within(async {
            loop {
                let pending = counts().await.circuits - 1; // without the bystanders'
                if pending + refused().await as usize >= SOURCES * CONNECTS {
                    return pending;
                }
                sleep(POLL_INTERVAL).await;
            }
        })
        .await;
        sleep(duration).await;
        let mut answers = Vec::new();
        for requesting in requesting {
            match requesting.is_finished() {
                true => {
                    answers.extend(requesting.await.expect("it does not panic").expect("answers"))
                }
                false => requesting.abort(),
            }
        }
        drop(targets);
        (pending, answers)
    };
    let size = format!("{TARGETS} targets, {} CONNECTs", SOURCES * CONNECTS);
    let what = "targets that never answer";
    let ((pending, answers), _) = testbed.attack(what, &size, attack).await;
    assert!(pending <= TARGETS * PER_PEER, "{pending} circuits wait for their targets");
    for (_, status) in &answers {
        assert!([CONNECTION_FAILED, RESOURCE_LIMIT_EXCEEDED].contains(status), "{status:?}");
    }
    // In a short attack, no target has been given up yet.
    if short_or_long(false, true) {
        assert_eq!(answers.len(), SOURCES * CONNECTS);
    }
    testbed.assert_restored().await;
}

#[tokio::test]
async fn idle_circuits_up_to_the_cap() {
    const CAP: usize = 1024;
    const TARGETS: usize = CAP / PER_PEER + 2;
    const SOURCES: usize = TARGETS * PER_PEER / CONNECTS + 1;
    // Circuits of silent peers are closed after a minute.
    let duration = Duration::from_secs(short_or_long(3, 50));
    let mut testbed = Testbed::start(&[]).await;
    let port = testbed.port;
    let attack = async move {
        let mut targets = JoinSet::new();
        let mut peers = Vec::new();
        for number in 0..TARGETS {
            let target = accepting_target(port, number, &mut targets).await;
            peers.push(target);
        }
        let sources = run_each(SOURCES, AT_A_TIME, move |number| {
            let peers = peers.clone();
            async move {
                let mut source = RawPeer::connect_with_retry(port, address(TARGETS + number)).await;
                let first = number * CONNECTS;
                let to = (first..first + CONNECTS).map(|nth| connect(peers[nth % TARGETS]));
                let answers = source.request_all(&to.collect::<Vec<_>>()).await?;
                Ok((source.stay_connected(), answers))
            }
        });
        let sources = expect_all(sources.await);
        sleep(duration).await;
        let mut opened = 0;
        for (_, status) in sources.iter().flat_map(|(_, answers)| answers) {
            assert!([OK, RESOURCE_LIMIT_EXCEEDED].contains(status), "{status:?}");
            opened += usize::from(*status == OK);
        }
        (opened, sources, targets)
    };
    let size = format!("{} CONNECTs to {TARGETS} targets that accept", SOURCES * CONNECTS);
    let what = "circuits left idle, up to the cap";
    let ((opened, sources, targets), _) = testbed.attack(what, &size, attack).await;
    // One less for the bystanders' circuit. A source with many may lose some to a source that comes later.
    assert!(opened >= CAP - 1, "{opened}");
    testbed.until(|counts| counts.circuits == CAP).await;
    drop((sources, targets));
    testbed.assert_restored().await;
}

/// A target that accepts all circuits; returns its peer id.
async fn accepting_target(
    port: u16,
    number: usize,
    targets: &mut JoinSet<io::Result<()>>,
) -> PeerId {
    let mut target = RawPeer::connect_with_retry(port, address(number)).await;
    let answer = target.request(&reserve()).await.expect("an answer");
    assert_eq!(answer.1, OK);
    let peer = target.peer;
    targets.spawn(target.accept_circuits(|_| Vec::new()));
    peer
}

#[tokio::test]
async fn readers_that_stall() {
    const PAIRS: usize = 16;
    const CIRCUITS: usize = 2; // of each
    /// How much the relay may buffer of a circuit, in KiB: what `it/backpressure.rs` derives, and a margin.
    const BUFFERED: u64 = 2560;
    const MARGIN: u64 = 16 * 1024;
    let duration = Duration::from_secs(short_or_long(3, 25));
    let mut testbed = Testbed::start(&[]).await;
    let port = testbed.port;
    let before = testbed.resident();
    let attack = async move {
        let pairs = run_each(PAIRS, AT_A_TIME, move |number| async move {
            let from = address(number);
            let mut target = RawPeer::connect_with_retry(port, from).await;
            assert_eq!(target.request(&reserve()).await?.1, OK);
            let mut source = RawPeer::connect_with_retry(port, from).await;
            let requests = vec![connect(target.peer); CIRCUITS];
            let (open, answers) =
                tokio::join!(target.accept_count(CIRCUITS), source.request_all(&requests));
            // Half of the targets open their windows, and none reads.
            if number % 2 == 0 {
                for circuit in open? {
                    let window = frame(WINDOW_UPDATE, 0, circuit, 1 << 30);
                    target.send(&window).await?;
                }
            }
            let circuits = answers?.into_iter().map(|(circuit, status)| {
                assert_eq!(status, OK);
                circuit
            });
            let written = write_until_stalled(&mut source, circuits.collect()).await?;
            Ok((written, source, target))
        });
        let pairs = expect_all(pairs.await);
        sleep(duration).await;
        pairs
    };
    let size = format!("{} circuits, whose sources continue to write", PAIRS * CIRCUITS);
    let what = "readers that stall";
    let (pairs, impact) = testbed.attack(what, &size, attack).await;
    for (written, ..) in &pairs {
        assert!(*written >= CIRCUITS * FREE_WINDOW, "each circuit was written to: {written}");
    }
    // No source got more credit than the relay may buffer for its stream.
    testbed.assert_nothing_freed().await;
    let growth = impact.peak.saturating_sub(before);
    let most = (PAIRS * CIRCUITS) as u64 * BUFFERED + MARGIN;
    assert!(growth <= most, "{growth} KiB");
    drop(pairs);
    testbed.assert_restored().await;
}

/// Writes to all circuits in turn, for as long as the relay grants credit. Returns how many bytes were written.
async fn write_until_stalled(source: &mut RawPeer, circuits: Vec<u32>) -> io::Result<usize> {
    /// A source that gets no credit for this long counts as stalled.
    const STALLED: Duration = Duration::from_secs(2);
    let mut window: Vec<_> = circuits.into_iter().map(|circuit| (circuit, FREE_WINDOW)).collect();
    let mut written = 0;
    loop {
        for (circuit, window) in &mut window {
            while *window > 0 {
                let piece = CHUNK.min(*window);
                let next = data(0, *circuit, &vec![7; piece]);
                let Ok(sent) = timeout(STALLED, source.send(&next)).await else {
                    return Ok(written);
                };
                sent?;
                *window -= piece;
                written += piece;
            }
        }
        let Ok(received) = timeout(STALLED, source.read_frame()).await else {
            return Ok(written);
        };
        let received = received?;
        if let Some((_, window)) =
            window.iter_mut().find(|(circuit, _)| *circuit == received.stream)
            && received.kind == WINDOW_UPDATE
        {
            *window += received.length as usize;
        }
    }
}

#[tokio::test]
#[ignore = "takes long: .ci/attacks"]
async fn streams_reset_at_random_points() {
    const PAIRS: usize = 16;
    const COUNT: usize = 4000; // in a round
    let rounds = short_or_long(2, 25);
    let mut testbed = Testbed::start(&["--connect-rate=0"]).await;
    let port = testbed.port;
    let attack = |rounds: std::ops::Range<usize>| async move {
        let mut opened = 0;
        for round in rounds {
            let pairs = run_each(PAIRS, PAIRS, move |number| async move {
                let random = Random::seed_from_u64((round * PAIRS + number) as u64);
                reset_at_random(port, number, COUNT / PAIRS, random).await
            });
            opened += expect_all(pairs.await).into_iter().sum::<usize>();
        }
        opened
    };
    // Freed memory is not all returned to the system: the baseline is taken after a first round.
    testbed.bystanders.watch_during(attack(0..1)).await;
    testbed.wait_until_idle().await;
    let before = testbed.resident();

    let what = "circuits reset at random points, by either end";
    let size = format!("{} circuits", rounds * COUNT);
    let (opened, _) = testbed.attack(what, &size, attack(1..1 + rounds)).await;
    assert!(opened > rounds * COUNT / 10, "{opened} were open");
    testbed.wait_until_idle().await;
    let after = testbed.resident();
    println!("{opened} of them were opened; {before} KiB before, {after} KiB after");
    assert!(after * 10 <= before * 11, "{before} KiB before, {after} KiB after");
    testbed.assert_restored().await;
}

/// Requests this many circuits, each of which either end resets at a random point. Returns how many were opened.
async fn reset_at_random(
    port: u16,
    number: usize,
    count: usize,
    mut random: Random,
) -> io::Result<usize> {
    let mut target = RawPeer::connect_with_retry(port, address(number)).await;
    assert_eq!(target.request(&reserve()).await?.1, OK);
    let mut source = RawPeer::connect_with_retry(port, address(number)).await;
    let request = connect(target.peer);
    let mut targets = JoinSet::new();
    targets.spawn(accept_at_random(target, Random::from_rng(&mut random)));

    let mut opened = 0;
    let mut requested = 0;
    while requested < count {
        let whole = hop_opening(&request);
        match random.random_range(0..8) {
            // A part of the request, or none of it.
            0 => {
                let stream = source.next_stream();
                let part = random.random_range(0..whole.len());
                source.send(&data(SYN, stream, &whole[..part])).await?;
                source.send(&data(RST, stream, &[])).await?;
            }
            // The whole request; the answer is not read.
            1 | 2 => {
                requested += 1;
                let stream = source.next_stream();
                source.send(&data(SYN, stream, &whole)).await?;
                source.send(&data(RST, stream, &[])).await?;
            }
            // The answer is read, and some bytes are sent on the circuit.
            _ => {
                requested += 1;
                let (stream, status) = source.request(&request).await?;
                if status != OK {
                    continue;
                }
                opened += 1;
                let piece = vec![7; random.random_range(0..2000)];
                let end = [0, FIN, RST][random.random_range(0..3)];
                source.send(&data(end, stream, &piece)).await?;
                source.send(&data(RST, stream, &[])).await?;
            }
        }
    }
    Ok(opened)
}

/// Answers stop requests in full or in part, and resets some streams at once or after some bytes.
async fn accept_at_random(mut target: RawPeer, mut random: Random) -> io::Result<()> {
    let mut received = Received::default();
    loop {
        let frame = target.read_frame().await?;
        let id = frame.stream;
        if frame.has(RST | FIN) {
            received.remove(id);
        }
        let requested = received.message::<StopMessage>(&STOP, &frame).is_some();
        let chance = random.random_range(0..16);
        if !requested {
            // In the middle of the stop request, or of the circuit.
            if chance == 0 && !frame.body.is_empty() {
                target.send(&data(RST, id, &[])).await?;
            }
            continue;
        }
        received.remove(id);
        let whole = stop_acceptance();
        let answer = match chance {
            0 => &whole[..random.random_range(0..whole.len())],
            _ => &whole,
        };
        target.send(&data(ACK, id, answer)).await?;
        if chance < 4 {
            let last = vec![8; random.random_range(0..2000)];
            target.send(&data([0, FIN][chance % 2], id, &last)).await?;
            target.send(&data(RST, id, &[])).await?;
        }
    }
}

/// One address opens all circuits that a target may have and keeps them open: a client of another address must still
/// reach the target.
#[tokio::test]
async fn circuits_of_one_address_to_one_target() {
    const CIRCUITS: usize = 64;
    const IDENTITIES: usize = 4; // each may send 30 CONNECTs a minute
    let mut testbed = Testbed::start(&[]).await;
    let port = testbed.port;
    let attack = async move {
        let mut target = RawPeer::connect_with_retry(port, address(1)).await;
        assert_eq!(target.request(&reserve()).await?.1, OK);
        let request = connect(target.peer);
        let accepts = Background::spawn(async move {
            let _ = target.accept_circuits(|_| Vec::new()).await;
        });
        let mut sources = Vec::new();
        for _ in 0..IDENTITIES {
            let mut source = RawPeer::connect_with_retry(port, address(2)).await;
            let answers = source.request_all(&vec![request.clone(); CIRCUITS / IDENTITIES]).await?;
            assert!(answers.iter().all(|(_, status)| *status == OK), "{answers:?}");
            sources.push(source.stay_connected());
        }
        let mut same = RawPeer::connect_with_retry(port, address(2)).await;
        let same = same.request(&request).await?.1;
        let mut other = RawPeer::connect_with_retry(port, address(3)).await;
        let answer = other.request(&request).await?.1;
        io::Result::Ok((accepts, sources, other, same, answer))
    };
    let size = format!("all {CIRCUITS} that it may have; a client of another address gets one");
    let what = "circuits of one address to one target";
    let (attacked, _) = testbed.attack(what, &size, attack).await;
    let (accepts, sources, other, same, answer) = attacked.expect("they stay connected");
    assert_eq!((same, answer), (RESOURCE_LIMIT_EXCEEDED, OK));
    drop((accepts, sources, other));
    testbed.assert_restored().await;
}
