//! Requests without end.

use std::{
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};

use libp2p::{
    PeerId, Stream,
    futures::{AsyncReadExt, AsyncWriteExt, StreamExt, future},
};
use prost::Message;
use tokio::time::sleep;

use super::ground::Ground;
use crate::common::{
    STOP,
    by_hand::{RST, data},
    messages::{HopMessage, connect, reserve, stop_status},
    strangers::{AT_A_TIME, Stranger, address, address_in, all, each, quick_or_long},
};

const OK: Option<i32> = Some(100);
const RESERVATION_REFUSED: Option<i32> = Some(200);
const RESOURCE_LIMIT_EXCEEDED: Option<i32> = Some(201);
const CONNECTION_FAILED: Option<i32> = Some(203);
/// Streams of its address come too fast.
const RESET: Option<i32> = None;

/// How many requests are sent without waiting for the answer of the one before.
const AT_ONCE: usize = 20;

/// Requests of all kinds, those included that are refused before anything is looked up.
#[tokio::test]
async fn requests_from_one_address() {
    const IDENTITIES: usize = 100;
    const SLOTS: usize = 64; // of one address
    const OWN: f64 = 8.0; // what each connection may ask at once, whatever others do
    const OWN_A_SECOND: f64 = 0.4;
    const AT_FIRST: f64 = 1024.0; // what their address may ask at once beside that
    const A_SECOND: f64 = 64.0;
    let rounds = quick_or_long(4, 200);
    let mut ground = Ground::prepare(&[]).await;
    let port = ground.port;
    let mut holder = Stranger::arrive(port, address(0)).await;
    assert_eq!(holder.ask_once(&reserve()).await.expect("an answer").1, OK);
    let flood = async move {
        let start = Instant::now();
        let flood = each(IDENTITIES, AT_A_TIME, move |_| async move {
            let mut stranger = Stranger::arrive(port, address(0)).await;
            let malformed = HopMessage { kind: Some(7), ..HopMessage::default() };
            let to_unknown = connect(PeerId::random());
            let requests = [reserve(), to_unknown, malformed, connect(stranger.peer)];
            let requests: Vec<_> = requests.into_iter().cycle().take(AT_ONCE).collect();
            let mut answered = 0;
            for _ in 0..rounds {
                let answers = stranger.ask(&requests).await?;
                answered += answers.iter().filter(|(_, status)| status.is_some()).count();
            }
            Ok((stranger.stays(), answered))
        });
        // Whatever is heard of the holder keeps its slot, for which the others wait.
        let is_over = AtomicBool::new(false);
        let flood = async {
            let flood = all(flood.await);
            is_over.store(true, Ordering::Relaxed);
            flood
        };
        let is_heard = async {
            while !is_over.load(Ordering::Relaxed) {
                holder.hears_out().await.expect("it is connected");
                sleep(Duration::from_secs(1)).await;
            }
        };
        let (flood, ()) = future::join(flood, is_heard).await;
        assert_eq!(holder.ask_once(&reserve()).await.expect("an answer").1, OK, "it renews");
        (flood, start.elapsed().as_secs_f64(), holder.stays())
    };
    let how_hard = format!("{IDENTITIES} identities, {} each", rounds * AT_ONCE);
    let what = "a flood of requests from one address";
    let ((strangers, took, _holder), _) = ground.suffer(what, &how_hard, flood).await;
    let answered: usize = strangers.iter().map(|(_, answered)| answered).sum();
    let may = AT_FIRST + A_SECOND * took + (OWN + OWN_A_SECOND * took) * IDENTITIES as f64;
    println!("{answered} of {} were answered", IDENTITIES * rounds * AT_ONCE);
    assert!((answered as f64) < may.ceil(), "{answered} were answered, and {may} may be");
    let counts = ground.until(|counts| counts.connections == 3 + IDENTITIES).await;
    assert!((2..=1 + SLOTS).contains(&counts.live), "{counts:?}");
    drop((strangers, _holder));
    ground.ends_as_it_began().await;
}

#[tokio::test]
#[ignore = "takes long: .ci/attacks"]
async fn reserves_from_a_thousand_identities() {
    const SUBNETS: usize = 8;
    const ADDRESSES: usize = 5; // of each
    const IDENTITIES: usize = 1000;
    const SLOTS: usize = 512; // the caps of the subnets leave them all to strangers
    let rounds = quick_or_long(3, 100);
    let slots = format!("--max-reservations={SLOTS}");
    let mut ground = Ground::prepare(&[&slots]).await;
    let port = ground.port;
    let flood = async move {
        let flood = each(IDENTITIES, AT_A_TIME, move |number| async move {
            let from = address_in(number % SUBNETS, number / SUBNETS % ADDRESSES);
            let mut stranger = Stranger::arrive(port, from).await;
            for _ in 0..rounds {
                let (_, status) = stranger.ask_once(&reserve()).await?;
                assert!(
                    [OK, RESERVATION_REFUSED, RESOURCE_LIMIT_EXCEEDED, RESET].contains(&status)
                );
            }
            Ok(stranger.stays())
        });
        all(flood.await)
    };
    let how_hard = format!("{rounds} each, from 40 addresses, for {SLOTS} slots");
    let what = "a flood of RESERVEs from 1,000 identities";
    let (strangers, _) = ground.suffer(what, &how_hard, flood).await;
    // They got all that there was, and not one more.
    let counts = ground.until(|counts| counts.connections == 2 + IDENTITIES).await;
    assert_eq!(counts.live + counts.grace, SLOTS);
    drop(strangers);
    ground.ends_as_it_began().await;
}

#[tokio::test]
async fn connects_to_one_victim() {
    const IDENTITIES: usize = 100;
    const ADDRESSES: usize = 10;
    let rounds = quick_or_long(3, 200);
    let mut ground = Ground::prepare(&[]).await;
    let port = ground.port;
    // One of those who are watched. It agrees to each circuit.
    let victim = &mut ground.bystanders.target;
    let request = connect(victim.peer);
    let mut stops = victim.accept(STOP);
    let agreeing = tokio::spawn(async move {
        let agreed = stop_status(100).encode_length_delimited_to_vec();
        while let Some((_, mut stop)) = stops.next().await {
            let agreed = agreed.clone();
            tokio::spawn(async move {
                // Who asked may be gone.
                let _ = send_if_heard(&mut stop, &agreed).await;
                let _ = stop.read_to_end(&mut Vec::new()).await;
            });
        }
    });
    let flood = async move {
        let flood = each(IDENTITIES, AT_A_TIME, move |number| {
            let request = request.clone();
            async move {
                let mut stranger = Stranger::arrive(port, address(number % ADDRESSES)).await;
                let mut opened = 0;
                for _ in 0..rounds {
                    for (stream, status) in stranger.ask(&vec![request.clone(); AT_ONCE]).await? {
                        let expected = [OK, RESOURCE_LIMIT_EXCEEDED, CONNECTION_FAILED, RESET];
                        assert!(expected.contains(&status));
                        if status == OK {
                            opened += 1;
                            stranger.say(&data(RST, stream, &[])).await?;
                        }
                    }
                }
                Ok(opened)
            }
        });
        all(flood.await).into_iter().sum::<usize>()
    };
    let how_hard = format!("{IDENTITIES} identities, {} each", rounds * AT_ONCE);
    let what = "a flood of CONNECTs to one victim, which agrees to all";
    let (opened, _) = ground.suffer(what, &how_hard, flood).await;
    assert!(opened > 0);
    ground.ends_as_it_began().await;
    agreeing.abort();
}

async fn send_if_heard(stream: &mut Stream, bytes: &[u8]) -> std::io::Result<()> {
    stream.write_all(bytes).await?;
    stream.flush().await
}
