//! What the check asks the relay by itself: identify, and a RESERVE whose answer it examines. libp2p's relay client shows
//! neither the status of a refusal nor the term, the addresses and the voucher of a reservation.

use std::{
    io,
    time::{Duration, SystemTime},
};

use bytesize::ByteSize;
use libp2p::{
    Multiaddr, PeerId,
    core::SignedEnvelope,
    futures::{AsyncRead, AsyncReadExt, AsyncWriteExt},
};
use multistream_select::Negotiated;
use prost::Message;

use super::link::Link;
use crate::{
    program::net::identify::Message as Identify,
    wire::{self, HOP_PROTOCOL, VOUCHER_DOMAIN, VOUCHER_TYPE, proto},
};

/// The longest message that is read, in bytes: go-libp2p's limit for identify.
const MAX_MESSAGE: usize = 8192;

/// Asks the relay for its agent, its protocols, and the address that it sees.
pub async fn identify(link: &mut Link) -> io::Result<((), String)> {
    let message: Identify =
        link.exchange("/ipfs/id/1.0.0", async |stream| read(stream).await).await?;
    let observed = message.observed_addr.and_then(|bytes| Multiaddr::try_from(bytes).ok());
    let observed = observed.map_or("no address".into(), |address| address.to_string());
    let agent = message.agent_version.unwrap_or_else(|| "no agent".into());
    Ok(((), format!("{agent}; sees us at {observed}; {}", message.protocols.join(" "))))
}

/// Requests a slot for `own`, and examines what the relay grants.
pub async fn reserve(link: &mut Link, own: PeerId) -> io::Result<((), String)> {
    let request = proto::HopMessage { r#type: Some(proto::HOP_RESERVE), ..Default::default() };
    let request = request.encode_length_delimited_to_vec();
    let exchange = async |mut stream: Negotiated<_>| {
        stream.write_all(&request).await?;
        stream.flush().await?;
        read(stream).await
    };
    let answer = link.exchange(HOP_PROTOCOL.as_ref(), exchange).await?;
    examine(answer, link.peer, own, SystemTime::now()).map(|detail| ((), detail))
}

/// Examines the answer to a RESERVE. Sans-IO. Fails if the relay refuses, or grants what clients cannot use.
pub fn examine(
    answer: proto::HopMessage,
    relay: PeerId,
    own: PeerId,
    now: SystemTime,
) -> io::Result<String> {
    let flaw = |text: &str| Err(io::Error::other(text.to_owned()));
    if (answer.r#type, answer.status) != (Some(proto::HOP_STATUS), Some(wire::Status::Ok as i32)) {
        return flaw(&format!(
            "the relay answers with status {}",
            answer.status.unwrap_or_default()
        ));
    }
    let reservation = answer.reservation.unwrap_or_default();
    let now = now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
    let term = reservation.expire.unwrap_or_default().saturating_sub(now);
    let addresses =
        reservation.addrs.into_iter().filter_map(|bytes| Multiaddr::try_from(bytes).ok());
    let addresses: Vec<_> = addresses.map(|address| address.to_string()).collect();
    let voucher = match &reservation.voucher {
        _ if term == 0 => return flaw("the reservation has expired already"),
        _ if addresses.is_empty() => return flaw("the reservation has no address"),
        Some(voucher) if !is_valid(voucher, relay, own, now) => {
            return flaw("the reservation's voucher is not valid");
        }
        Some(_) => "the voucher is valid",
        None => "no voucher",
    };
    let limit = answer.limit.unwrap_or_default();
    Ok(format!(
        "status 100 (OK) for {}; a circuit may take {} and {} in each direction; {voucher}; at {}",
        humantime::format_duration(Duration::from_secs(term)),
        limit.duration.filter(|it| *it > 0).map_or("any time".into(), |seconds| {
            humantime::format_duration(Duration::from_secs(seconds.into())).to_string()
        }),
        limit
            .data
            .filter(|it| *it > 0)
            .map_or("any bytes".into(), |bytes| ByteSize::b(bytes).to_string()),
        addresses.join(" ")
    ))
}

/// Whether the relay has signed that `own` has a reservation (libp2p RFC 0002).
fn is_valid(voucher: &[u8], relay: PeerId, own: PeerId, now: u64) -> bool {
    let Ok(envelope) = SignedEnvelope::from_protobuf_encoding(voucher) else { return false };
    let signed = envelope.payload_and_signing_key(VOUCHER_DOMAIN.into(), &VOUCHER_TYPE);
    signed.is_ok_and(|(payload, key)| {
        proto::Voucher::decode(payload).is_ok_and(|voucher| {
            key.to_peer_id() == relay
                && voucher.relay == Some(relay.to_bytes())
                && voucher.peer == Some(own.to_bytes())
                && voucher.expiration.is_some_and(|at| at > now)
        })
    })
}

async fn read<M: Message + Default>(mut stream: impl AsyncRead + Unpin) -> io::Result<M> {
    let length = wire::read_length(&mut stream).await?.filter(|length| *length <= MAX_MESSAGE);
    let mut message = vec![0; length.ok_or(io::ErrorKind::InvalidData)?];
    stream.read_exact(&mut message).await?;
    M::decode(&*message).map_err(|_| io::ErrorKind::InvalidData.into())
}

#[cfg(test)]
mod tests {
    use libp2p::identity::Keypair;

    use super::*;

    const EXPIRE: u64 = 1_800_000_000;

    fn answer(addrs: Vec<Vec<u8>>, voucher: Option<Vec<u8>>) -> proto::HopMessage {
        proto::HopMessage {
            r#type: Some(proto::HOP_STATUS),
            status: Some(100),
            reservation: Some(proto::Reservation { expire: Some(EXPIRE), addrs, voucher }),
            limit: Some(proto::Limit { duration: Some(120), data: None }),
            peer: None,
        }
    }

    #[test]
    fn a_reservation_that_clients_cannot_use_is_a_failure() {
        let (relay, other, own) =
            (Keypair::generate_ed25519(), Keypair::generate_ed25519(), PeerId::random());
        let (id, before) = (
            relay.public().to_peer_id(),
            SystemTime::UNIX_EPOCH + Duration::from_secs(EXPIRE - 3600),
        );
        let address = "/ip4/192.0.2.1/tcp/1".parse::<Multiaddr>().unwrap().to_vec();
        let sign = |by: &Keypair, peer, until| wire::sign_voucher(by, peer, until).ok();
        let examine =
            |answer, now| examine(answer, id, own, now).map_err(|error| error.to_string());

        let told =
            examine(answer(vec![address.clone()], sign(&relay, own, EXPIRE)), before).unwrap();
        for part in ["for 1h;", " 2m and any bytes", "the voucher is valid", "/ip4/192.0.2.1/tcp/1"]
        {
            assert!(told.contains(part), "{told}");
        }
        assert!(
            examine(answer(vec![address.clone()], None), before).unwrap().contains("no voucher")
        );

        let after = before + Duration::from_secs(3600);
        assert!(
            examine(answer(vec![address.clone()], None), after).unwrap_err().contains("expired")
        );
        assert!(examine(answer(vec![], None), before).unwrap_err().contains("no address"));
        assert!(
            examine(answer(vec![vec![0xff]], None), before).unwrap_err().contains("no address")
        );
        for voucher in [
            sign(&other, own, EXPIRE),
            sign(&relay, PeerId::random(), EXPIRE),
            sign(&relay, own, EXPIRE - 7200),
            Some(vec![1, 2, 3]),
        ] {
            let told = examine(answer(vec![address.clone()], voucher), before).unwrap_err();
            assert!(told.contains("voucher is not valid"), "{told}");
        }
        let refused = proto::HopMessage { status: Some(200), ..answer(vec![], None) };
        assert!(examine(refused, before).unwrap_err().contains("status 200"));
        assert!(examine(proto::HopMessage::default(), before).unwrap_err().contains("status 0"));
    }
}
