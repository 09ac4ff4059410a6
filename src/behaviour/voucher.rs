//! The reservation voucher: the relay's signed word that a peer holds a slot with it.
//!
//! A signed envelope (libp2p RFC 0002) as
//! [the specification](https://github.com/libp2p/specs/blob/master/relay/circuit-v2.md#reservation-vouchers)
//! has it. Go clients check it and fail the reservation when it is wrong.

use libp2p::{
    PeerId,
    core::SignedEnvelope,
    identity::{Keypair, SigningError},
};
use prost::Message;

/// Separates these signatures from any other use of the relay's key.
const DOMAIN: &str = "libp2p-relay-rsvp";
/// The multicodec `libp2p-relay-rsvp`, as the two bytes that implementations write.
const PAYLOAD_TYPE: [u8; 2] = [0x03, 0x02];

#[derive(Clone, PartialEq, Message)]
struct Voucher {
    #[prost(bytes = "vec", optional, tag = "1")]
    relay: Option<Vec<u8>>,
    #[prost(bytes = "vec", optional, tag = "2")]
    peer: Option<Vec<u8>>,
    #[prost(uint64, optional, tag = "3")]
    expiration: Option<u64>,
}

/// Signs that `peer` holds a slot with the owner of `keypair` until `expiration`, in UNIX seconds.
///
/// # Errors
///
/// When the key cannot sign, which none of the key types of libp2p ever reports in practice.
pub fn sign(keypair: &Keypair, peer: PeerId, expiration: u64) -> Result<Vec<u8>, SigningError> {
    let voucher = Voucher {
        relay: Some(keypair.public().to_peer_id().to_bytes()),
        peer: Some(peer.to_bytes()),
        expiration: Some(expiration),
    };
    let envelope = SignedEnvelope::new(
        keypair,
        DOMAIN.to_owned(),
        PAYLOAD_TYPE.to_vec(),
        voucher.encode_to_vec(),
    )?;
    Ok(envelope.into_protobuf_encoding())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_voucher_names_relay_peer_and_expiration_and_is_signed_by_the_relay() {
        let relay = Keypair::generate_ed25519();
        let peer = PeerId::random();
        let bytes = sign(&relay, peer, 1_800_000_000).unwrap();

        let envelope = SignedEnvelope::from_protobuf_encoding(&bytes).unwrap();
        let (payload, signer) =
            envelope.payload_and_signing_key(DOMAIN.to_owned(), &PAYLOAD_TYPE).unwrap();
        assert_eq!(*signer, relay.public());
        let voucher = Voucher::decode(payload).unwrap();
        assert_eq!(voucher.relay, Some(signer.to_peer_id().to_bytes()));
        assert_eq!(voucher.peer, Some(peer.to_bytes()));
        assert_eq!(voucher.expiration, Some(1_800_000_000));
    }
}
