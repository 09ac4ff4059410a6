//! Requests that are slow, or somebody else's.

use std::{io, time::Duration};

use libp2p::{PeerId, core::SignedEnvelope};
use prost::Message;
use tokio::time::{Instant, sleep_until};

use super::ground::Ground;
use crate::common::{
    HOP, STOP,
    by_hand::{FIN, RST, SYN, data, proposal},
    messages::{HopMessage, Limit, StopMessage, connect, reserve},
    strangers::{AT_A_TIME, Stranger, address, all, each, opening, quick_or_long},
};

const OK: Option<i32> = Some(100);
const CONNECTION_FAILED: Option<i32> = Some(203);
const NO_RESERVATION: Option<i32> = Some(204);
const MALFORMED_MESSAGE: Option<i32> = Some(400);

const SECOND: Duration = Duration::from_secs(1);

#[tokio::test]
async fn a_byte_a_second_on_a_thousand_streams() {
    const STRANGERS: usize = 20;
    const STREAMS: usize = 50; // of each
    // The time for a request is half a minute.
    let seconds = quick_or_long(8, 45);
    let mut ground = Ground::prepare(&[]).await;
    let port = ground.port;
    let attack = async move {
        let start = Instant::now() + SECOND * 2;
        let done = each(STRANGERS, STRANGERS, move |number| async move {
            let mut stranger = Stranger::arrive(port, address(number)).await;
            let streams: Vec<_> = (0..STREAMS).map(|_| stranger.next_stream()).collect();
            // Half of them are slow from the first byte on, the others once it counts.
            let whole = opening(&connect(stranger.peer));
            let negotiated = proposal(HOP.as_ref()).len();
            let mut opened = Vec::new();
            for (nth, stream) in streams.iter().enumerate() {
                let first = [1, negotiated][nth % 2];
                opened.extend(data(SYN, *stream, &whole[..first]));
            }
            stranger.say(&opened).await?;
            for second in 0..seconds {
                sleep_until(start + SECOND * second as u32).await;
                let next = streams.iter().enumerate().flat_map(|(nth, stream)| {
                    let at = [1, negotiated][nth % 2] + second;
                    data(0, *stream, &whole[at..=at])
                });
                let next: Vec<_> = next.collect();
                stranger.say(&next).await?;
            }
            // The connection is there, and whoever is not slow is served.
            let (_, status) = stranger.ask_once(&reserve()).await?;
            Ok((status, stranger.stays()))
        });
        all(done.await)
    };
    let how_hard = format!("{} streams, for {seconds} s", STRANGERS * STREAMS);
    let what = "requests at one byte a second";
    let (strangers, _) = ground.suffer(what, &how_hard, attack).await;
    for (status, _) in &strangers {
        assert_eq!(*status, OK);
    }
    drop(strangers);
    ground.ends_as_it_began().await;
}

#[tokio::test]
async fn forged_and_replayed_requests() {
    let rounds = quick_or_long(20, 1000);
    let flags = ["--connect-rate=0", "--reserve-rate=0"];
    let mut ground = Ground::prepare(&flags).await;
    let (port, relay) = (ground.port, ground.bystanders.relay.peer);
    let attack = async move {
        let done = each(4, AT_A_TIME, move |number| async move {
            let mut victim = Stranger::arrive(port, address(number)).await;
            let granted = victim.ask_whole(&reserve()).await?;
            assert_eq!(granted.status, OK);
            let mut thief = Stranger::arrive(port, address(number)).await;
            for _ in 0..rounds {
                forge(&mut thief, &mut victim, &granted, relay).await?;
            }
            Ok(())
        });
        all(done.await).len()
    };
    let how_hard = format!("{} rounds of each", rounds * 4);
    let what = "vouchers and CONNECTs forged, replayed, to oneself, to the relay";
    ground.suffer(what, &how_hard, attack).await;
    ground.ends_as_it_began().await;
}

/// The thief has heard what the relay answered the victim, and says whatever that is good for.
async fn forge(
    thief: &mut Stranger,
    victim: &mut Stranger,
    granted: &HopMessage,
    relay: PeerId,
) -> io::Result<()> {
    let stolen = granted.reservation.clone();
    assert!(stolen.as_ref().is_some_and(|stolen| stolen.voucher.is_some()));

    // A voucher of the relay's, for somebody else or a little changed, is no slot for its target.
    let mut forged = stolen.clone();
    if let Some(byte) = forged.iter_mut().flat_map(|forged| &mut forged.voucher).flatten().last() {
        *byte ^= 1;
    }
    for reservation in [&stolen, &forged] {
        let to_nobody =
            HopMessage { reservation: reservation.clone(), ..connect(PeerId::random()) };
        assert_eq!(thief.ask_once(&to_nobody).await?.1, NO_RESERVATION);
    }

    // Nor a slot of the victim's: who asks gets one of its own, in its own name.
    let with_voucher = HopMessage { reservation: stolen.clone(), ..reserve() };
    let answer = thief.ask_whole(&with_voucher).await?;
    assert_eq!(answer.status, OK);
    let voucher = answer.reservation.and_then(|reservation| reservation.voucher);
    let envelope = SignedEnvelope::from_protobuf_encoding(&voucher.expect("a voucher"));
    let envelope = envelope.expect("a signed one");
    let signed = envelope.payload_and_signing_key("libp2p-relay-rsvp".into(), &[0x03, 0x02]);
    let (payload, _) = signed.expect("for a relay");
    let names = |peer: PeerId| {
        let peer = peer.to_bytes();
        payload.windows(peer.len()).any(|bytes| bytes == peer)
    };
    assert!(names(thief.peer) && !names(victim.peer));

    // A CONNECT of somebody else's, said again; with a limit that nobody granted, and a status. The
    // target hears who it is that asks, and nothing of the rest.
    let replayed = HopMessage {
        reservation: stolen,
        limit: Some(Limit { duration: Some(u32::MAX), data: Some(u64::MAX) }),
        status: OK,
        ..connect(victim.peer)
    };
    let (answer, question) = tokio::join!(thief.ask_once(&replayed), victim.refuses());
    assert_eq!(answer?.1, CONNECTION_FAILED);
    let question = question?;
    assert_eq!(question.peer.and_then(|peer| peer.id), Some(thief.peer.to_bytes()));
    assert_eq!((question.limit, question.status), (None, None));

    // To oneself, with a slot and by whatever name.
    let mut oneself = connect(thief.peer);
    assert_eq!(thief.ask_once(&oneself).await?.1, MALFORMED_MESSAGE);
    oneself.reservation = granted.reservation.clone();
    assert_eq!(thief.ask_once(&oneself).await?.1, MALFORMED_MESSAGE);

    // The relay is nobody's target, by whatever protocol.
    assert_eq!(thief.ask_once(&connect(relay)).await?.1, NO_RESERVATION);
    let stream = thief.next_stream();
    let question =
        StopMessage { kind: Some(0), peer: connect(victim.peer).peer, ..StopMessage::default() };
    let stop = [proposal(STOP.as_ref()), question.encode_length_delimited_to_vec()].concat();
    thief.say(&data(SYN | FIN, stream, &stop)).await?;
    let mut heard = Vec::new();
    loop {
        let frame = thief.frame().await?;
        if frame.stream == stream {
            heard.extend(&frame.body);
            if frame.has(RST | FIN) {
                break;
            }
        }
    }
    let agreed = proposal(STOP.as_ref());
    assert!(!heard.starts_with(&agreed), "{heard:?}");
    Ok(())
}
