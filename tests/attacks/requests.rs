//! Slow requests, and requests with another peer's vouchers.

use std::{io, time::Duration};

use libp2p::{PeerId, core::SignedEnvelope};
use prost::Message;
use tokio::time::{Instant, sleep, sleep_until};

use super::testbed::Testbed;
use crate::common::{
    HOP, STOP,
    by_hand::{FIN, RST, SYN, data, proposal},
    messages::{
        CONNECTION_FAILED, HopMessage, Limit, MALFORMED_MESSAGE, NO_RESERVATION, OK, StopMessage,
        connect, reserve,
    },
    raw_peers::{AT_A_TIME, RawPeer, address, expect_all, hop_opening, run_each, short_or_long},
};

const SECOND: Duration = Duration::from_secs(1);

/// The interval at which a peer looks for resets.
const POLL_INTERVAL: Duration = Duration::from_millis(100);

#[tokio::test]
async fn a_byte_a_second_on_a_thousand_streams() {
    const ATTACKERS: usize = 20;
    const STREAMS: usize = 50; // of each
    // A client has 5 s to negotiate the protocol, and 5 s to send its request.
    let seconds = short_or_long(8, 45);
    let mut testbed = Testbed::start(&[]).await;
    let port = testbed.port;
    let attack = async move {
        let start = Instant::now() + SECOND * 2;
        let done = run_each(ATTACKERS, ATTACKERS, move |number| async move {
            let mut peer = RawPeer::connect_with_retry(port, address(number)).await;
            let streams: Vec<_> = (0..STREAMS).map(|_| peer.next_stream()).collect();
            // Half of them are slow from the first byte, the others after the negotiation.
            let whole = hop_opening(&connect(peer.peer));
            let negotiated = proposal(HOP.as_ref()).len();
            let mut opened = Vec::new();
            for (nth, stream) in streams.iter().enumerate() {
                let first = [1, negotiated][nth % 2];
                opened.extend(data(SYN, *stream, &whole[..first]));
            }
            peer.send(&opened).await?;
            for second in 0..seconds {
                sleep_until(start + SECOND * second as u32).await;
                let next = streams.iter().enumerate().flat_map(|(nth, stream)| {
                    let at = [1, negotiated][nth % 2] + second;
                    data(0, *stream, &whole[at..=at])
                });
                let next: Vec<_> = next.collect();
                peer.send(&next).await?;
            }
            // The relay has given up all of them.
            let mut reset = 0;
            while reset < STREAMS {
                reset += peer.read_until_pong().await?;
                sleep(POLL_INTERVAL).await;
            }
            // The connection is still up, and a fast request on it is served.
            let (_, status) = peer.request(&reserve()).await?;
            Ok((status, peer.stay_connected()))
        });
        expect_all(done.await)
    };
    let size = format!("{} streams, for {seconds} s", ATTACKERS * STREAMS);
    let what = "requests at one byte a second";
    let (peers, _) = testbed.attack(what, &size, attack).await;
    for (status, _) in &peers {
        assert_eq!(*status, OK);
    }
    drop(peers);
    testbed.assert_restored().await;
}

#[tokio::test]
async fn forged_and_replayed_requests() {
    let rounds = short_or_long(20, 1000);
    let flags = ["--connect-rate=0", "--reserve-rate=0"];
    let mut testbed = Testbed::start(&flags).await;
    let (port, relay) = (testbed.port, testbed.bystanders.relay.peer);
    let attack = async move {
        let done = run_each(4, AT_A_TIME, move |number| async move {
            let mut victim = RawPeer::connect_with_retry(port, address(number)).await;
            let granted = victim.request_message(&reserve()).await?;
            assert_eq!(granted.status, OK);
            let mut attacker = RawPeer::connect_with_retry(port, address(number)).await;
            for _ in 0..rounds {
                forge(&mut attacker, &mut victim, &granted, relay).await?;
            }
            Ok(())
        });
        expect_all(done.await).len()
    };
    let size = format!("{} rounds of each", rounds * 4);
    let what = "vouchers and CONNECTs forged, replayed, to oneself, to the relay";
    testbed.attack(what, &size, attack).await;
    testbed.assert_restored().await;
}

/// Sends requests that contain the relay's answer to the victim.
async fn forge(
    attacker: &mut RawPeer,
    victim: &mut RawPeer,
    granted: &HopMessage,
    relay: PeerId,
) -> io::Result<()> {
    let copied = granted.reservation.clone();
    assert!(copied.as_ref().is_some_and(|copied| copied.voucher.is_some()));

    // The relay's voucher, unchanged or modified, does not give its target a slot.
    let mut forged = copied.clone();
    if let Some(byte) = forged.iter_mut().flat_map(|forged| &mut forged.voucher).flatten().last() {
        *byte ^= 1;
    }
    for reservation in [&copied, &forged] {
        let to_unknown =
            HopMessage { reservation: reservation.clone(), ..connect(PeerId::random()) };
        assert_eq!(attacker.request(&to_unknown).await?.1, NO_RESERVATION);
    }

    // Nor does it give a slot of the victim: the requester gets one of its own, in its own name.
    let with_voucher = HopMessage { reservation: copied.clone(), ..reserve() };
    let answer = attacker.request_message(&with_voucher).await?;
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
    assert!(names(attacker.peer) && !names(victim.peer));

    // A CONNECT with another peer's reservation, with an invented limit and a status: the target learns the true
    // source, and nothing of the rest.
    let replayed = HopMessage {
        reservation: copied,
        limit: Some(Limit { duration: Some(u32::MAX), data: Some(u64::MAX) }),
        status: OK,
        ..connect(victim.peer)
    };
    let (answer, stop_request) = tokio::join!(attacker.request(&replayed), victim.refuse_circuit());
    assert_eq!(answer?.1, CONNECTION_FAILED);
    let stop_request = stop_request?;
    assert_eq!(stop_request.peer.and_then(|peer| peer.id), Some(attacker.peer.to_bytes()));
    assert_eq!((stop_request.limit, stop_request.status), (None, None));

    // A CONNECT to oneself, without and with a voucher.
    let mut oneself = connect(attacker.peer);
    assert_eq!(attacker.request(&oneself).await?.1, MALFORMED_MESSAGE);
    oneself.reservation = granted.reservation.clone();
    assert_eq!(attacker.request(&oneself).await?.1, MALFORMED_MESSAGE);

    // The relay itself is no target, whichever protocol is used.
    assert_eq!(attacker.request(&connect(relay)).await?.1, NO_RESERVATION);
    let stream = attacker.next_stream();
    let stop_request =
        StopMessage { kind: Some(0), peer: connect(victim.peer).peer, ..StopMessage::default() };
    let stop = [proposal(STOP.as_ref()), stop_request.encode_length_delimited_to_vec()].concat();
    attacker.send(&data(SYN | FIN, stream, &stop)).await?;
    let mut received = Vec::new();
    loop {
        let frame = attacker.read_frame().await?;
        if frame.stream == stream {
            received.extend(&frame.body);
            if frame.has(RST | FIN) {
                break;
            }
        }
    }
    let accepted = proposal(STOP.as_ref());
    assert!(!received.starts_with(&accepted), "{received:?}");
    Ok(())
}
