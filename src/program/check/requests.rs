//! What the check asks the relay: identify, a RESERVE whose answer it examines, and a CONNECT to itself. It
//! encodes the messages itself: libp2p's relay client shows neither the status of a refusal nor the contents of a
//! reservation, and with its swarm would make the program a twentieth larger.

use std::io;
use std::time::{Duration, Instant, SystemTime};

use bytesize::ByteSize;
use libp2p::core::{SignedEnvelope, muxing::SubstreamBox};
use libp2p::futures::{AsyncReadExt, AsyncWriteExt};
use libp2p::{Multiaddr, PeerId};
use multistream_select::{Negotiated, listener_select_proto};
use prost::Message;

use super::steps::list;
use crate::program::net::{identify::Message as Identify, protobuf};
use crate::wire::proto::{self, HopMessage, StopMessage};
use crate::wire::{self, STOP_PROTOCOL, VOUCHER_DOMAIN, VOUCHER_TYPE};

/// The bytes that are sent through the circuit and echoed: as many as the handshakes of two clients send each way.
const ECHO: [u8; 1024] = [7; 1024];

/// A stream whose protocol is negotiated.
pub type Stream = Negotiated<SubstreamBox>;

/// Asks the relay for its agent, its protocols, and the address that it sees.
pub async fn identify(mut stream: Stream) -> io::Result<((), String)> {
    let message: Identify = protobuf::read(&mut stream).await?;
    let observed = message.observed_addr.and_then(|bytes| Multiaddr::try_from(bytes).ok());
    let observed = observed.map_or("no address".into(), |address| address.to_string());
    let agent = message.agent_version.unwrap_or_else(|| "no agent".into());
    Ok(((), format!("{agent}; sees us at {observed}; {}", list(message.protocols))))
}

/// Requests a slot and examines what is granted. `peers` are the relay and the peer that requests.
pub async fn reserve(mut stream: Stream, peers: [PeerId; 2]) -> io::Result<((), String)> {
    let reserve = HopMessage { r#type: Some(proto::HOP_RESERVE), ..Default::default() };
    let answer = request(&mut stream, reserve).await?;
    examine(answer, peers, SystemTime::now()).map(|detail| ((), detail))
}

/// Opens a circuit to `target`, sends [`ECHO`] and checks that it comes back.
pub async fn connect(mut stream: Stream, target: PeerId) -> io::Result<(Stream, String)> {
    let peer = Some(proto::Peer { id: Some(target.to_bytes()), addrs: Vec::new() });
    let connect = HopMessage { r#type: Some(proto::HOP_CONNECT), peer, ..Default::default() };
    request(&mut stream, connect).await?;
    let (start, mut echo) = (Instant::now(), [0; ECHO.len()]);
    wire::write_frame(&mut stream, &ECHO).await?;
    stream.read_exact(&mut echo).await?;
    if echo != ECHO {
        return Err(io::Error::other("the circuit carries other bytes than were sent"));
    }
    let millis = start.elapsed().as_secs_f64() * 1000.0;
    Ok((stream, format!("{} bytes to {target} and back in {millis:.1} ms", ECHO.len())))
}

/// Accepts the circuit on a stream that the relay opened, and echoes. Refuses all other protocols.
pub async fn accept_circuit(stream: SubstreamBox) -> io::Result<()> {
    let (_, mut stream) = listener_select_proto(stream, [STOP_PROTOCOL]).await?;
    let _: StopMessage = protobuf::read(&mut stream).await?;
    let (r#type, status) = (Some(proto::STOP_STATUS), Some(wire::Status::Ok as i32));
    let accepted = StopMessage { r#type, status, ..Default::default() };
    wire::write_frame(&mut stream, &accepted.encode_length_delimited_to_vec()).await?;
    let mut echo = [0; ECHO.len()];
    stream.read_exact(&mut echo).await?;
    wire::write_frame(&mut stream, &echo).await?;
    read_end(&mut stream).await?;
    stream.close().await
}

/// Closes the circuit, and waits until its target has closed the other direction.
pub async fn end(mut stream: Stream) -> io::Result<()> {
    stream.close().await?;
    read_end(&mut stream).await
}

async fn read_end(stream: &mut Stream) -> io::Result<()> {
    match stream.read(&mut [0]).await? {
        0 => Ok(()),
        _ => Err(io::Error::other("the circuit carries more bytes than were sent")),
    }
}

/// Sends a request, and reads the answer. Fails if that is a refusal.
async fn request(stream: &mut Stream, request: HopMessage) -> io::Result<HopMessage> {
    wire::write_frame(stream, &request.encode_length_delimited_to_vec()).await?;
    let answer: HopMessage = protobuf::read(stream).await?;
    let status = answer.status.unwrap_or_default();
    match answer.r#type == Some(proto::HOP_STATUS) && status == wire::Status::Ok as i32 {
        true => Ok(answer),
        false => Err(io::Error::other(format!("the relay answers with status {status}"))),
    }
}

/// Examines what the relay grants; fails if clients cannot use it. `peers` as for [`reserve`]. Sans-IO.
fn examine(answer: HopMessage, peers: [PeerId; 2], now: SystemTime) -> io::Result<String> {
    let missing = || io::Error::other("the answer has no reservation");
    let reservation = answer.reservation.ok_or_else(missing)?;
    let now = now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
    let term = reservation.expire.unwrap_or_default().saturating_sub(now);
    let addresses = reservation.addrs.into_iter();
    let addresses = list(addresses.filter_map(|bytes| Multiaddr::try_from(bytes).ok()));
    let is_valid = |voucher: Vec<u8>| verify(&voucher, peers, now).unwrap_or_default();
    let voucher = match reservation.voucher.map(is_valid) {
        _ if term == 0 => Err("the reservation has expired already"),
        _ if addresses.is_empty() => Err("the reservation has no address"),
        Some(false) => Err("the reservation's voucher is not valid"),
        Some(true) => Ok("the voucher is valid"),
        None => Ok("no voucher"),
    };
    let voucher = voucher.map_err(io::Error::other)?;
    let seconds = |seconds| humantime::format_duration(Duration::from_secs(seconds)).to_string();
    let limit = answer.limit.unwrap_or_default();
    let (time, bytes) = (limit.duration.filter(|it| *it > 0), limit.data.filter(|it| *it > 0));
    let time = time.map_or("any time".into(), |it| seconds(it.into()));
    let bytes = bytes.map_or("any bytes".into(), |it| ByteSize::b(it).to_string());
    let limits = format!("a circuit may last {time} and carry {bytes} in each direction");
    Ok(format!("status 100 (OK) for {}; {limits}; {voucher}; at {addresses}", seconds(term)))
}

/// Whether the relay has signed that this side has a reservation (libp2p RFC 0002).
fn verify(voucher: &[u8], [relay, own]: [PeerId; 2], now: u64) -> Option<bool> {
    let envelope = SignedEnvelope::from_protobuf_encoding(voucher).ok()?;
    let signed = envelope.payload_and_signing_key(VOUCHER_DOMAIN.into(), &VOUCHER_TYPE).ok()?;
    let voucher = proto::Voucher::decode(signed.0).ok()?;
    let peers = (voucher.relay, voucher.peer) == (Some(relay.to_bytes()), Some(own.to_bytes()));
    Some(peers && signed.1.to_peer_id() == relay && voucher.expiration > Some(now))
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
            |answer, now| examine(answer, [id, own], now).map_err(|error| error.to_string());

        let told =
            examine(answer(vec![address.clone()], sign(&relay, own, EXPIRE)), before).unwrap();
        for part in
            ["for 1h;", " 2m and carry any bytes", "the voucher is valid", "/ip4/192.0.2.1/tcp/1"]
        {
            assert!(told.contains(part), "{told}");
        }
        assert!(
            examine(answer(vec![address.clone()], None), before).unwrap().contains("no voucher")
        );

        let without = proto::HopMessage { reservation: None, ..answer(vec![], None) };
        assert!(examine(without, before).unwrap_err().contains("no reservation"));
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
    }
}
