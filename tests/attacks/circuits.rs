//! Circuits, for nothing but their cost.

use std::{io, time::Duration};

use libp2p::PeerId;
use rand::{RngExt, SeedableRng, rngs::Xoshiro256PlusPlus as Random};
use tokio::{
    task::JoinSet,
    time::{sleep, timeout},
};

use super::ground::Ground;
use crate::common::{
    STOP,
    by_hand::{ACK, FIN, RST, SYN, WINDOW_UPDATE, data, frame},
    messages::{StopMessage, connect, reserve},
    strangers::{
        AT_A_TIME, Heard, PIECE, ROOM, Staying, Stranger, address, agreement, all, each, opening,
        quick_or_long,
    },
};

const OK: Option<i32> = Some(100);
const RESOURCE_LIMIT_EXCEEDED: Option<i32> = Some(201);
const CONNECTION_FAILED: Option<i32> = Some(203);

/// How many circuits one peer may be part of.
const OF_ONE_PEER: usize = 64;

/// How many CONNECTs one peer may send at once.
const CONNECTS: usize = 30;

#[tokio::test]
async fn targets_that_never_answer() {
    const TARGETS: usize = 8;
    const SOURCES: usize = 20;
    // A target has half a minute.
    let patience = Duration::from_secs(quick_or_long(5, 35));
    let mut ground = Ground::prepare(&[]).await;
    let port = ground.port;
    let attack = async move {
        let targets = all(each(TARGETS, AT_A_TIME, move |number| async move {
            let mut target = Stranger::arrive(port, address(number)).await;
            assert_eq!(target.ask_once(&reserve()).await?.1, OK);
            Ok(target)
        })
        .await);
        let peers: Vec<_> = targets.iter().map(|target| target.peer).collect();
        let asking: Vec<_> = (0..SOURCES)
            .map(|number| {
                let peers = peers.clone();
                tokio::spawn(async move {
                    let mut source = Stranger::arrive(port, address(TARGETS + number)).await;
                    let requests =
                        (0..CONNECTS).map(|nth| connect(peers[(number + nth) % TARGETS]));
                    source.ask(&requests.collect::<Vec<_>>()).await
                })
            })
            .collect();
        sleep(patience).await;
        let mut answers = Vec::new();
        for asking in asking {
            match asking.is_finished() {
                true => answers.extend(asking.await.expect("it asks").expect("it is answered")),
                false => asking.abort(),
            }
        }
        drop(targets);
        answers
    };
    let how_hard = format!("{TARGETS} targets, {} CONNECTs", SOURCES * CONNECTS);
    let what = "targets that never answer";
    let (answers, _) = ground.suffer(what, &how_hard, attack).await;
    for (_, status) in &answers {
        assert!([CONNECTION_FAILED, RESOURCE_LIMIT_EXCEEDED].contains(status), "{status:?}");
    }
    assert_eq!(answers.len(), quick_or_long(answers.len(), SOURCES * CONNECTS));
    ground.ends_as_it_began().await;
}

#[tokio::test]
async fn idle_circuits_up_to_the_cap() {
    const CAP: usize = 1024;
    const TARGETS: usize = CAP / OF_ONE_PEER + 2;
    const SOURCES: usize = TARGETS * OF_ONE_PEER / CONNECTS + 1;
    // Peers without a sign of life lose their circuits after a minute.
    let patience = Duration::from_secs(quick_or_long(3, 50));
    let mut ground = Ground::prepare(&[]).await;
    let port = ground.port;
    let attack = async move {
        let mut targets = JoinSet::new();
        let mut peers = Vec::new();
        for number in 0..TARGETS {
            let target = agreeing(port, number, &mut targets).await;
            peers.push(target);
        }
        let sources = each(SOURCES, AT_A_TIME, move |number| {
            let peers = peers.clone();
            async move {
                let mut source = Stranger::arrive(port, address(TARGETS + number)).await;
                let first = number * CONNECTS;
                let to = (first..first + CONNECTS).map(|nth| connect(peers[nth % TARGETS]));
                let answers = source.ask(&to.collect::<Vec<_>>()).await?;
                Ok((source.stays(), answers))
            }
        });
        let sources = all(sources.await);
        sleep(patience).await;
        let mut opened = 0;
        for (_, status) in sources.iter().flat_map(|(_, answers)| answers) {
            assert!([OK, RESOURCE_LIMIT_EXCEEDED].contains(status), "{status:?}");
            opened += usize::from(*status == OK);
        }
        (opened, sources, targets)
    };
    let how_hard = format!("{} CONNECTs to {TARGETS} targets that agree", SOURCES * CONNECTS);
    let what = "circuits left idle, up to the cap";
    let ((opened, sources, targets), _) = ground.suffer(what, &how_hard, attack).await;
    // Beside the one that is watched; a source that has many cedes some to those that come late.
    assert!(opened >= CAP - 1, "{opened}");
    ground.until(|counts| counts.circuits == CAP).await;
    drop((sources, targets));
    ground.ends_as_it_began().await;
}

/// A target that agrees to all circuits; who it is.
async fn agreeing(port: u16, number: usize, targets: &mut JoinSet<io::Result<()>>) -> PeerId {
    let mut target = Stranger::arrive(port, address(number)).await;
    let answer = target.ask_once(&reserve()).await.expect("an answer");
    assert_eq!(answer.1, OK);
    let peer = target.peer;
    targets.spawn(target.agrees(|_| Vec::new()));
    peer
}

#[tokio::test]
async fn readers_that_stall() {
    const PAIRS: usize = 16;
    const CIRCUITS: usize = 2; // of each
    /// What the relay may hold of one, in KiB: what `backpressure.rs` derives, and a little beside.
    const HELD: u64 = 2560;
    const BESIDE: u64 = 16 * 1024;
    let patience = Duration::from_secs(quick_or_long(3, 25));
    let mut ground = Ground::prepare(&[]).await;
    let port = ground.port;
    let before = ground.resident();
    let attack = async move {
        let pairs = each(PAIRS, AT_A_TIME, move |number| async move {
            let from = address(number);
            let mut target = Stranger::arrive(port, from).await;
            assert_eq!(target.ask_once(&reserve()).await?.1, OK);
            let mut source = Stranger::arrive(port, from).await;
            let requests = vec![connect(target.peer); CIRCUITS];
            let (open, answers) = tokio::join!(target.agree_to(CIRCUITS), source.ask(&requests));
            // Half of them have no more room, the others have, and do not read.
            if number % 2 == 0 {
                for circuit in open? {
                    let wide = frame(WINDOW_UPDATE, 0, circuit, 1 << 30);
                    target.say(&wide).await?;
                }
            }
            let circuits = answers?.into_iter().map(|(circuit, status)| {
                assert_eq!(status, OK);
                circuit
            });
            let said = write_until_halted(&mut source, circuits.collect()).await?;
            Ok((said, source, target))
        });
        let pairs = all(pairs.await);
        sleep(patience).await;
        pairs
    };
    let how_hard = format!("{} circuits, whose sources write on", PAIRS * CIRCUITS);
    let what = "readers that stall";
    let (pairs, noticed) = ground.suffer(what, &how_hard, attack).await;
    for (said, ..) in &pairs {
        assert!(*said >= CIRCUITS * ROOM, "each was written to: {said}");
    }
    let grown = noticed.peak.saturating_sub(before);
    let most = (PAIRS * CIRCUITS) as u64 * HELD + BESIDE;
    assert!(grown <= most, "{grown} KiB");
    drop(pairs);
    ground.ends_as_it_began().await;
}

/// Writes to all of these in turn, for as long as the relay opens their windows. Yields how much.
async fn write_until_halted(source: &mut Stranger, circuits: Vec<u32>) -> io::Result<usize> {
    /// No more room for so long: halted, or on a machine so slow that it will do.
    const HALTED: Duration = Duration::from_secs(2);
    let mut room: Vec<_> = circuits.into_iter().map(|circuit| (circuit, ROOM)).collect();
    let mut said = 0;
    loop {
        for (circuit, room) in &mut room {
            while *room > 0 {
                let piece = PIECE.min(*room);
                let next = data(0, *circuit, &vec![7; piece]);
                let Ok(written) = timeout(HALTED, source.say(&next)).await else {
                    return Ok(said);
                };
                written?;
                *room -= piece;
                said += piece;
            }
        }
        let Ok(heard) = timeout(HALTED, source.frame()).await else {
            return Ok(said);
        };
        let heard = heard?;
        if let Some((_, room)) = room.iter_mut().find(|(circuit, _)| *circuit == heard.stream)
            && heard.kind == WINDOW_UPDATE
        {
            *room += heard.length as usize;
        }
    }
}

#[tokio::test]
#[ignore = "takes long: .ci/attacks"]
async fn streams_reset_at_random_points() {
    const PAIRS: usize = 16;
    const COUNT: usize = 4000; // in a round
    let rounds = quick_or_long(2, 25);
    let mut ground = Ground::prepare(&["--connect-rate=0"]).await;
    let port = ground.port;
    let attack = |rounds: std::ops::Range<usize>| async move {
        let mut opened = 0;
        for round in rounds {
            let pairs = each(PAIRS, PAIRS, move |number| async move {
                let random = Random::seed_from_u64((round * PAIRS + number) as u64);
                reset_at_random(port, number, COUNT / PAIRS, random).await
            });
            opened += all(pairs.await).into_iter().sum::<usize>();
        }
        opened
    };
    // What is freed is not all given back to the system: it is there after the first round.
    ground.bystanders.live_through(attack(0..1)).await;
    ground.is_calm().await;
    let before = ground.resident();

    let what = "streams reset at random points";
    let how_hard = format!("{} circuits", rounds * COUNT);
    let (opened, _) = ground.suffer(what, &how_hard, attack(1..1 + rounds)).await;
    assert!(opened > rounds * COUNT / 10, "{opened} came to be open");
    ground.is_calm().await;
    let after = ground.resident();
    println!("{opened} of them were open once; {before} KiB before, {after} KiB after");
    assert!(after * 10 <= before * 11, "{before} KiB before, {after} KiB after");
    ground.ends_as_it_began().await;
}

/// Asks for so many circuits, each of which either end resets somewhere. How many were ever open.
async fn reset_at_random(
    port: u16,
    number: usize,
    count: usize,
    mut random: Random,
) -> io::Result<usize> {
    let mut target = Stranger::arrive(port, address(number)).await;
    assert_eq!(target.ask_once(&reserve()).await?.1, OK);
    let mut source = Stranger::arrive(port, address(number)).await;
    let request = connect(target.peer);
    let mut targets = JoinSet::new();
    targets.spawn(agree_at_random(target, Random::from_rng(&mut random)));

    let mut opened = 0;
    let mut asked = 0;
    while asked < count {
        let whole = opening(&request);
        match random.random_range(0..8) {
            // Nothing of it, or a part.
            0 => {
                let stream = source.next_stream();
                let part = random.random_range(0..whole.len());
                source.say(&data(SYN, stream, &whole[..part])).await?;
                source.say(&data(RST, stream, &[])).await?;
            }
            // All of it, and not the answer.
            1 | 2 => {
                asked += 1;
                let stream = source.next_stream();
                source.say(&data(SYN, stream, &whole)).await?;
                source.say(&data(RST, stream, &[])).await?;
            }
            // The answer, and something of the circuit.
            _ => {
                asked += 1;
                let (stream, status) = source.ask_once(&request).await?;
                if status != OK {
                    continue;
                }
                opened += 1;
                let piece = vec![7; random.random_range(0..2000)];
                let end = [0, FIN, RST][random.random_range(0..3)];
                source.say(&data(end, stream, &piece)).await?;
                source.say(&data(RST, stream, &[])).await?;
            }
        }
    }
    Ok(opened)
}

/// Answers what it is asked, or a part of it is, and resets that at once or after some bytes.
async fn agree_at_random(mut target: Stranger, mut random: Random) -> io::Result<()> {
    let mut heard = Heard::default();
    loop {
        let frame = target.frame().await?;
        let id = frame.stream;
        if frame.has(RST | FIN) {
            heard.forget(id);
        }
        let asked = heard.message::<StopMessage>(&STOP, &frame).is_some();
        let chance = random.random_range(0..16);
        if !asked {
            // In the midst of the question, or of the circuit.
            if chance == 0 && !frame.body.is_empty() {
                target.say(&data(RST, id, &[])).await?;
            }
            continue;
        }
        heard.forget(id);
        let whole = agreement();
        let answer = match chance {
            0 => &whole[..random.random_range(0..whole.len())],
            _ => &whole,
        };
        target.say(&data(ACK, id, answer)).await?;
        if chance < 4 {
            let last = vec![8; random.random_range(0..2000)];
            target.say(&data([0, FIN][chance % 2], id, &last)).await?;
            target.say(&data(RST, id, &[])).await?;
        }
    }
}

/// One address takes all circuits that a target may have, and keeps them busy with nothing: a client from
/// elsewhere reaches the target all the same.
#[tokio::test]
async fn circuits_of_one_address_to_one_target() {
    const CIRCUITS: usize = 64;
    const IDENTITIES: usize = 4; // each may ask 30 times a minute
    let mut ground = Ground::prepare(&[]).await;
    let port = ground.port;
    let attack = async move {
        let mut target = Stranger::arrive(port, address(1)).await;
        assert_eq!(target.ask_once(&reserve()).await?.1, OK);
        let request = connect(target.peer);
        let agrees = Staying::as_long_as(async move {
            let _ = target.agrees(|_| Vec::new()).await;
        });
        let mut sources = Vec::new();
        for _ in 0..IDENTITIES {
            let mut source = Stranger::arrive(port, address(2)).await;
            let answers = source.ask(&vec![request.clone(); CIRCUITS / IDENTITIES]).await?;
            assert!(answers.iter().all(|(_, status)| *status == OK), "{answers:?}");
            sources.push(source.stays());
        }
        let mut same = Stranger::arrive(port, address(2)).await;
        let same = same.ask_once(&request).await?.1;
        let mut elsewhere = Stranger::arrive(port, address(3)).await;
        let answer = elsewhere.ask_once(&request).await?.1;
        io::Result::Ok((agrees, sources, elsewhere, same, answer))
    };
    let how_hard = format!("all {CIRCUITS} that it may have; a client from elsewhere gets one");
    let what = "circuits of one address to one target";
    let (attacked, _) = ground.suffer(what, &how_hard, attack).await;
    let (agrees, sources, elsewhere, same, answer) = attacked.expect("they stay connected");
    assert_eq!((same, answer), (RESOURCE_LIMIT_EXCEEDED, OK));
    drop((agrees, sources, elsewhere));
    ground.ends_as_it_began().await;
}
