//! Thousands of peers that hold a reservation and say nothing: what a relay holds for each.

use std::{thread, time::Duration};

use super::{contestants::Relay, crowd::Crowd};
use crate::common::Security;

/// What identify says after the handshake is over by then.
const SETTLES: Duration = Duration::from_secs(8);

/// The relay's resident KiB for a peer.
pub fn kilobytes_per_peer(relay: &Relay, security: Security, peers: usize) -> f64 {
    let before = relay.process.resident();
    let _crowd = Crowd::arrives(&relay.address, peers, security);
    thread::sleep(SETTLES);
    let after = relay.process.resident();
    (after as f64 - before as f64) / peers as f64
}
