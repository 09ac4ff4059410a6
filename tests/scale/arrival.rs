//! Peers that connect, reserve, and are then idle.

use std::{
    thread,
    time::{Duration, Instant},
};

use super::{relay::Watched, table::Table};
use crate::{common::Security, idle_clients::IdleClients};

/// Measures a column of the table: this many peers, idle for this long.
pub fn measure(peers: usize, watched: Duration, flags: &str, table: &mut Table) {
    let count = peers as f64;
    let relay = Watched::start(flags);
    let resident_now = || relay.relay.process.resident() as f64;
    let mut idle_clients = IdleClients::of(&relay.relay.address, peers, Security::Noise);
    let (empty, start) = (resident_now(), relay.spent());

    let connect = Instant::now();
    idle_clients.connect_all();
    let connect = connect.elapsed().as_secs_f64();
    let connected = relay.spent();
    table.add("connections a second", count / connect);
    let each = (connected - start) / count * 1e3;
    table.add("CPU of the relay for a connection, ms", each);

    let reserve = Instant::now();
    idle_clients.reserve_all();
    let reserve = reserve.elapsed().as_secs_f64();
    let reserved = relay.spent();
    table.add("RESERVE a second", count / reserve);
    let each = (reserved - connected) / count * 1e3;
    table.add("CPU of the relay for a RESERVE, ms", each);

    let names =
        ["relaylet_questions_asked_total", "relaylet_sweeps_total", "relaylet_sweep_seconds_total"];
    let earlier = relay.metrics(names);
    let before = relay.relay.process.cpu();
    thread::sleep(watched);
    let idle = (relay.relay.process.cpu() - before) as f64 / 1e6;
    let resident = resident_now();
    let later = relay.metrics(names);
    let [probes, sweeps, seconds] = std::array::from_fn(|index| later[index] - earlier[index]);
    let each_minute = |value: f64| value / count / (watched.as_secs_f64() / 60.0);
    table.add("resident memory, MiB", resident / 1024.0);
    let each = (resident - empty) / count;
    table.add("resident memory for a peer, KiB", each);
    table.add("CPU for an idle peer and minute, ms", each_minute(idle));
    table.add("probes for an idle peer and minute", each_minute(probes));
    table.add("a sweep, ms", seconds / sweeps * 1e3);

    drop(idle_clients);
    thread::sleep(watched);
    table.add("resident memory a minute after they left, MiB", resident_now() / 1024.0);
}
