//! Thousands of idle peers that hold a reservation: a relay's memory for each.

use std::{thread, time::Duration};

use super::{contestants::Relay, idle_clients::IdleClients};
use crate::common::Security;

/// After this time the identify messages that follow the handshakes are done.
const SETTLE_TIME: Duration = Duration::from_secs(8);

/// The relay's resident KiB per peer.
pub fn kilobytes_per_peer(relay: &Relay, security: Security, peers: usize) -> f64 {
    let before = relay.process.resident();
    let _idle_clients = IdleClients::start_reserved(&relay.address, peers, security);
    thread::sleep(SETTLE_TIME);
    let after = relay.process.resident();
    (after as f64 - before as f64) / peers as f64
}
