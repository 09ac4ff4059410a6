//! A libp2p circuit relay whose slots come back.
//!
//! A peer behind NAT reserves a *slot* on a relay, so that others can reach it through a *circuit*
//! over that relay ([Circuit Relay v2][spec]). Peers vanish without a word; this relay gets their
//! slots back. It is a program (`relaylet`, see the README), a [`Behaviour`] for any rust-libp2p
//! swarm, and meant to be read whole.
//!
//! # The words
//!
//! Reservation, circuit, hop, stop, voucher, source and target are the specification's. Our own
//! are few, and mean the same in flags, events, logs and tests:
//!
//! - *Slot*: the capacity that one reservation takes up. A peer has one, or none.
//! - *Grace*: the time after a peer's last connection is gone in which its slot still counts as
//!   taken, so that a phone which changes networks finds it again. The reservation is void
//!   meanwhile: nobody is connected to a peer in grace. A newcomer takes a slot in grace only when
//!   no other is free.
//! - *Heartbeat*: the silence after which a peer that holds a slot or is part of a circuit is asked
//!   for a sign of life. Whatever is heard from it counts.
//! - *Silence*: the limit after which a peer that was asked, and of which nothing was heard, is
//!   judged: its circuits end, and what follows is what follows a disconnect.
//! - *Probe*: the short time that a silent peer has to answer when a newcomer waits for its slot.
//! - *Billed*: a slot counts towards the caps of the address that it was reserved from, and of that
//!   address's subnet.
//! - *Share*: what a circuit gets of a link that is too narrow for all, one piece at a time.
//! - *Sweep*: the pass over the tables, once a second and more often while a newcomer waits, that
//!   ends what is over.
//! - *Drain*: to take nobody in any more, and to close connections a few at a time.
//! - *Idle*: a connection that neither holds a reservation nor carries a circuit.
//!
//! # One RESERVE, file by file
//!
//! 1. A client opens a hop stream. The connection's handler (`behaviour/handler.rs`) gives it a task,
//!    `behaviour/hop.rs`, which reads one message, framed and decoded by [`wire`], hands it to the
//!    [behaviour] together with a oneshot for the reply, and awaits that.
//! 2. The behaviour hands it to the [`relay`], which knows neither clock nor socket: `now` comes
//!    in, actions go out. `relay/reserve.rs` is the whole way: [`access`] says whether the peer may
//!    have a slot, [`rates`](relay::rates) whether it asks too often; then it is up to the table in
//!    [`reservations`](relay::reservations). A peer that has a slot keeps it: it is renewed. A
//!    newcomer gets a free slot, or one in grace, under the caps of the table and of the address
//!    and subnet it is billed to ([`quota`](relay::quota)); or it waits while
//!    [`reclaim`](relay::reclaim) finds out which peers under that cap are gone; or it is refused.
//! 3. The behaviour turns a grant into a message: until when, where the relay can be reached
//!    ([`address`]), a signed voucher (`behaviour/voucher.rs`), what a circuit may carry. It sends
//!    that as the reply. `behaviour/hop.rs` writes it and reports whether it arrived: a grant that
//!    was not read is undone.
//! 4. From now on the connection is watched: [`activity`] counts what is heard on it, and
//!    [`heartbeat`](relay::heartbeat) decides which peers to probe (`behaviour/ping.rs`), and which
//!    have timed out.
//! 5. When the connection is lost, or timed out, grace begins. The sweep (`relay/sweep.rs`)
//!    ends it, and the term.
//!
//! # One CONNECT, file by file
//!
//! 1. To the relay as above; `relay/connect.rs` is the way from there. Past [`access`] and the rate:
//!    without a live reservation of the target, it is refused; else the table in
//!    [`circuits`](relay::circuits) adds one record, if source, target and relay have room for it. The
//!    record holds the reply until the target has answered.
//! 2. The handler of the *target's* connection opens a stop stream, on which `behaviour/stop.rs`
//!    asks.
//! 3. The accepted stream comes to the behaviour, which asks the relay what to make of it, and sends
//!    it as the reply, with what the circuit may carry. `behaviour/hop.rs` answers the source. From here
//!    on the two streams are one circuit (`behaviour/circuit.rs`): bytes both ways, limits, half-close,
//!    its share of the link ([`bandwidth`](relay::bandwidth), `behaviour/share.rs`).
//! 4. The relay ends a circuit by dropping the guard in its record, and learns that it has ended from
//!    a report that is sent when its task is dropped. How many bytes it carried is in the counters that
//!    record and task share; they go into the [`accounts`](relay::accounts): both peers' while they are
//!    connected, and the totals since the start.
//!
//! # In a swarm of one's own
//!
//! Where `libp2p::relay::Behaviour` would stand, on any executor, beside any other behaviour:
//!
//! ```
//! use libp2p::{SwarmBuilder, identify, noise, swarm::NetworkBehaviour, tcp, yamux};
//!
//! #[derive(NetworkBehaviour)]
//! struct MyBehaviour {
//!     relay: relaylet::Behaviour,
//!     identify: identify::Behaviour,
//! }
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let mut config = relaylet::Config::default();
//! config.max_reservations = 100;
//! config.circuit_bytes = 0; // no limit
//!
//! let mut swarm = SwarmBuilder::with_new_identity()
//!     .with_tokio()
//!     .with_tcp(tcp::Config::default(), noise::Config::new, yamux::Config::default)?
//!     .with_behaviour(|keypair| {
//!         let identify = identify::Config::new("my/1.0.0".into(), keypair.public());
//!         Ok(MyBehaviour {
//!             relay: relaylet::Behaviour::new(keypair.clone(), config)?,
//!             identify: identify::Behaviour::new(identify),
//!         })
//!     })?
//!     .build();
//! swarm.listen_on("/ip4/127.0.0.1/tcp/0".parse()?)?;
//! # Ok(())
//! # }
//! ```
//!
//! Drive it with `swarm.select_next_some()`. Two things are yours: to tell the relay where it can
//! be reached (`swarm.add_external_address`, [`Config::announce`], or [`Behaviour::reported`] with
//! what identify observes), and to switch [`Config::answer_ping`] off if you have a ping behaviour
//! and want that one to answer. Who used the relay for how much is in [`Behaviour::accounts`].
//! Without default features the crate is this behaviour alone.
//!
//! [spec]: https://github.com/libp2p/specs/blob/master/relay/circuit-v2.md

// Nothing from the network, from a file or from the command line may panic.
#![cfg_attr(
    not(test),
    deny(
        clippy::expect_used,
        clippy::indexing_slicing,
        clippy::panic,
        clippy::unreachable,
        clippy::unwrap_used
    )
)]

pub mod access;
pub mod activity;
pub mod address;
pub mod behaviour;
pub mod config;
mod delegate;
pub mod event;
#[cfg(feature = "program")]
pub mod program;
pub mod relay;
pub mod wire;

pub use access::{Access, Permission, Terms};
pub use behaviour::{Behaviour, Upkeep};
pub use config::{Config, ConfigError};
pub use event::{Carried, CircuitEnd, CircuitId, Event, FreedReason, Refused, StopFailed};
#[cfg(feature = "program")]
pub use program::node::{Node, NodeEvent};
pub use relay::accounts::{Account, Totals};
