//! `relaylet check`: from this machine, whether clients can use a relay, and if not, why.
//!
//! Looks up the address (`dnsaddr.rs`, `target.rs`), connects layer by layer (`connection.rs`), reads identify, reserves a slot,
//! and opens a circuit from a second identity to the first one (`requests.rs`). Each step is a value, [`Step`];
//! what to do about a failed one is decided sans-IO (`diagnosis.rs`).

mod connection;
mod diagnosis;
mod dnsaddr;
mod requests;
mod steps;
mod target;

use std::{io, net::IpAddr};

use libp2p::{core::muxing::StreamMuxerExt, identity::Keypair};

use self::{connection::Connection, diagnosis::Stage, steps::Steps};
pub use self::{steps::Step, target::Target};
use crate::wire::HOP_PROTOCOL;

/// Checks a relay, and reports each step, the last one if it fails. With `is_quick` it stops after identify, and takes no
/// slot.
///
/// # Errors
///
/// The error of the step that failed, which is reported already.
pub async fn check(mut target: Target, is_quick: bool, report: fn(&Step<'_>)) -> io::Result<()> {
    let (steps, quiet) = (Steps(report), Steps(|_| {}));
    let (keypair, other) = (Keypair::generate_ed25519(), Keypair::generate_ed25519());

    // 1. A connection.
    if let Some(address) = target.dnsaddr {
        let found = steps.run(Stage::DnsAddr, dnsaddr::look_up(address)).await?;
        target = Target { swarm_key: target.swarm_key, ..found };
    }
    let resolve = if target.host.parse::<IpAddr>().is_ok() { &quiet } else { &steps };
    resolve.run(Stage::Resolve, target.resolve()).await?;
    let mut first = Connection::open(&target, &keypair, &steps).await?;
    steps.run(Stage::Identify, first.exchange("/ipfs/id/1.0.0", requests::identify)).await?;
    if is_quick {
        let close = async { Ok((first.muxer.close().await?, "the connection is closed".into())) };
        return steps.run(Stage::End, close).await;
    }

    // 2. A slot, and a circuit to its holder.
    let (relay, own) = (first.peer, keypair.public().to_peer_id());
    let reserve = async |stream| requests::reserve(stream, [relay, own]).await;
    steps.run(Stage::Reserve, first.exchange(HOP_PROTOCOL, reserve)).await?;
    let second = async {
        let second = Connection::open(&target, &other, &quiet).await?;
        Ok((second, format!("connected as {}", other.public().to_peer_id())))
    };
    let mut second = steps.run(Stage::Second, second).await?;
    let connect = async |stream| requests::connect(stream, own).await;
    let connect = first.run(second.exchange(HOP_PROTOCOL, connect));
    let circuit = steps.run(Stage::Circuit, connect).await?;
    let end = async {
        first.run(second.run(requests::end(circuit))).await?;
        first.muxer.close().await?;
        second.muxer.close().await?;
        Ok(((), "the circuit and both connections are closed".into()))
    };
    steps.run(Stage::End, end).await
}
