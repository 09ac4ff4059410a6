//! Peers by number: each with an id, a connection, an address and a subnet of its own.

use std::{
    net::{IpAddr, Ipv4Addr},
    time::Duration,
};

use libp2p::PeerId;

/// The term of a reservation.
pub const TERM: Duration = Duration::from_secs(3600);

/// The bytes in front of an Ed25519 key of 32 bytes in a peer id.
const ED25519: [u8; 6] = [0, 36, 8, 1, 18, 32];

#[derive(Clone, Copy)]
pub struct Peer {
    pub id: PeerId,
    pub connection: usize,
    pub address: IpAddr,
}

impl Peer {
    /// Any number below 2^24.
    pub fn number(number: usize) -> Self {
        // Such a key does not exist; as an id it is as good as any, and created a thousand times faster.
        let mut key = [0; 32];
        key[..8].copy_from_slice(&number.to_be_bytes());
        let id = PeerId::from_bytes(&[&ED25519[..], &key].concat()).expect("an id");
        Self {
            id,
            connection: number,
            // It counts towards all caps, and shares none with another peer.
            address: Ipv4Addr::from_bits((number as u32) << 8).into(),
        }
    }
}
