//! Peers by number: each with an id, a connection, an address and a subnet of its own.

use std::{
    net::{IpAddr, Ipv4Addr},
    time::Duration,
};

use libp2p::PeerId;

/// For how long they reserve.
pub const TERM: Duration = Duration::from_secs(3600);

/// What stands in front of the 32 bytes of an Ed25519 key in the id of its owner.
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
        // Nobody has that key; as an id it is as good as any, and made a thousand times faster.
        let mut key = [0; 32];
        key[..8].copy_from_slice(&number.to_be_bytes());
        let id = PeerId::from_bytes(&[&ED25519[..], &key].concat()).expect("an id");
        Self {
            id,
            connection: number,
            // With all caps to count towards, none of them shared.
            address: Ipv4Addr::from_bits((number as u32) << 8).into(),
        }
    }
}
