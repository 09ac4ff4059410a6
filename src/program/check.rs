//! `relaylet check`: from this machine, whether clients can use a relay, and if not, why.
//!
//! Connects layer by layer (`link.rs`), asks identify and for a slot (`requests.rs`), and connects a second identity to
//! the first one through the relay (`circuit.rs`). Each step is a value, [`Step`]; what to do about a failed one is
//! decided sans-IO (`diagnosis.rs`).

mod circuit;
mod diagnosis;
mod link;
mod requests;
mod steps;

use std::io;

use libp2p::{core::muxing::StreamMuxerExt, identity::Keypair};

use self::{
    circuit::Pair,
    diagnosis::Stage,
    link::Link,
    steps::{Failed, Steps},
};
pub use self::{link::Target, steps::Step};

/// Checks a relay, and reports each step that succeeds. With `is_quick` it stops after identify, and takes no slot.
///
/// # Errors
///
/// The step that failed.
pub async fn check(target: &Target, is_quick: bool, report: fn(&Step)) -> Result<(), Failed> {
    let (steps, quiet) = (Steps(report), Steps(|_| {}));
    let (keypair, other) = (Keypair::generate_ed25519(), Keypair::generate_ed25519());

    // 1. A connection.
    let resolve = async {
        let sockets = target.resolve().await?;
        let ips: Vec<_> = sockets.iter().map(|socket| socket.ip().to_string()).collect();
        Ok((sockets, format!("{} is {}", target.host, ips.join(" "))))
    };
    let first = if target.is_name() { &steps } else { &quiet };
    let sockets = first.run(Stage::Resolve, resolve).await?;
    let mut link = Link::open(target, &sockets, &keypair, &steps).await?;
    steps.run(Stage::Identify, requests::identify(&mut link)).await?;
    if is_quick {
        let close =
            async { link.muxer.close().await.map(|()| ((), "the connection is closed".into())) };
        return steps.run(Stage::End, close).await;
    }

    // 2. A slot, and a circuit to its holder.
    let own = keypair.public().to_peer_id();
    steps.run(Stage::Reserve, requests::reserve(&mut link, own)).await?;
    let second = async {
        let second = Link::open(target, &sockets, &other, &quiet).await;
        let second =
            second.map_err(|failed| failed.result.err().unwrap_or(io::ErrorKind::Other.into()))?;
        let pair = Pair::new((link, &keypair), (second, &other))?;
        Ok((pair, format!("connected as {}", other.public().to_peer_id())))
    };
    let mut pair = steps.run(Stage::Second, second).await?;
    steps.run(Stage::Circuit, pair.connect()).await?;
    steps.run(Stage::End, pair.close()).await
}
