//! Peers that connect, reserve, and say nothing more.

use std::{
    thread,
    time::{Duration, Instant},
};

use super::{relay::Watched, table::Table};
use crate::{common::Security, crowd::Crowd};

/// A column of the table: so many peers, idle for so long.
pub fn measure(peers: usize, watched: Duration, flags: &str, table: &mut Table) {
    let count = peers as f64;
    let relay = Watched::start(flags);
    let resident = || relay.relay.process.resident() as f64;
    let mut crowd = Crowd::of(&relay.relay.address, peers, Security::Noise);
    let (empty, start) = (resident(), relay.spent());

    let connect = Instant::now();
    crowd.connects();
    let connect = connect.elapsed().as_secs_f64();
    let connected = relay.spent();
    table.add("connections a second", count / connect);
    let each = (connected - start) / count * 1e3;
    table.add("CPU of the relay for a connection, ms", each);

    let reserve = Instant::now();
    crowd.reserves();
    let reserve = reserve.elapsed().as_secs_f64();
    let reserved = relay.spent();
    table.add("RESERVE a second", count / reserve);
    let each = (reserved - connected) / count * 1e3;
    table.add("CPU of the relay for a RESERVE, ms", each);

    let (before, sweeps) = (relay.relay.process.cpu(), relay.sweeps().len());
    thread::sleep(watched);
    let idle = (relay.relay.process.cpu() - before) as f64 / 1e6;
    let per_minute = idle / count / (watched.as_secs_f64() / 60.0);
    let resident = resident();
    table.add("resident memory, MiB", resident / 1024.0);
    let each = (resident - empty) / count;
    table.add("resident memory for a peer, KiB", each);
    table.add("CPU for an idle peer and minute, ms", per_minute);
    let mut sweeps = relay.sweeps().split_off(sweeps);
    sweeps.sort_by(f64::total_cmp);
    table.add("a sweep (the median), ms", sweeps[sweeps.len() / 2]);
}
