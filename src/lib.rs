//! A libp2p circuit relay that releases the slots of peers that are gone.
//!
//! A peer behind NAT reserves a *slot* on a relay, so that others can reach it through a *circuit* over that relay
//! ([Circuit Relay v2][spec]). This crate is a program (`relaylet`, see the README) and a [`Behaviour`] for any
//! rust-libp2p swarm, small enough to be read as a whole. Further pages: [all flags](doc::flags),
//! [operating](doc::operating) the program, [clients](doc::clients), [design and simulation](doc::design).
//!
//! # Terms
//!
//! Reservation, circuit, hop, stop, voucher, source and target are the specification's. These are ours, in flags, events,
//! logs and tests alike:
//!
//! - *Slot*: the capacity that one reservation takes. A peer has one, or none.
//! - *Newcomer*: a peer that asks for a slot and has none.
//! - *Grace*: the time after a peer's last connection closed in which its slot is kept for it, so that a phone which
//!   changes networks finds it again. CONNECT finds no reservation meanwhile. A newcomer takes a slot in grace only when
//!   no other is free.
//! - *Heartbeat*: the silence after which a peer that holds a slot or is part of a circuit is probed. Any byte from it is
//!   an answer.
//! - *Silence*: the limit after which a peer that was probed and did not answer has timed out; the relay then treats the
//!   connection as closed. On Linux the limit is eight times as long if the kernel reports that the TCP link loses packets.
//! - *Probe*: a ping to a silent peer; and the short time that the peer has to answer while a newcomer waits.
//! - *Prefix*: the IPv4 address or IPv6 /64 of a client. Its slots count towards its cap and that of its subnet.
//! - *Fair share*: the part of the bandwidth that a circuit gets while there is too little for all, one quantum at a time.
//! - *Sweep*: the pass over the tables that ends what has expired or timed out, once a second, and more often while a
//!   newcomer waits or the relay drains.
//! - *Drain*: to grant no request, and to close the connections a few at a time.
//! - *Idle*: a connection that neither holds a reservation nor carries a circuit.
//!
//! # One RESERVE, file by file
//!
//! 1. `behaviour/handler.rs`: `on_connection_event` gets the client's hop stream and starts a task for it.
//! 2. `behaviour/hop.rs`: `serve`, that task, reads one message. `wire.rs`: `decode_request`. The request goes to the
//!    behaviour with a oneshot for the reply, which the task awaits.
//! 3. `behaviour.rs`: `on_event` passes it to the relay, which has no clock and no socket: time comes in, actions go out.
//! 4. `relay.rs`: `handle_request` finds the connection. `relay/policy.rs`: `check_request` asks `access.rs`
//!    (`may_reserve`) and `relay/rates.rs` (`take`); if the answer comes later, `behaviour/hop.rs` awaits it
//!    (`decide`). `relay/reserve.rs`: `reserve` asks for a slot (`try_reserve`).
//! 5. `relay/reservations.rs`: `reserve` renews the slot of a peer that has one. A newcomer gets a free one, or the oldest
//!    in grace, under the caps of `relay/quota.rs` (`full`). If there is none, it waits while `relay/reclaim.rs`
//!    (`decide`) finds out which silent peers are gone.
//! 6. `relay/reserve.rs`: `apply_changes` marks the connection (`relay/connections.rs`: `update`) and reports what changed.
//! 7. `behaviour.rs`: `carry_out` turns the grant into an answer (`reserve_ok`): until when, where the relay is reachable
//!    (`address.rs`: `for_reservation`), and the voucher (`wire.rs`: `sign_voucher`). It is sent as the reply.
//! 8. `behaviour/hop.rs`: `serve` writes it and reports the delivery. `relay/reserve.rs`: `on_delivered` undoes the grant
//!    if it failed.
//! 9. From now on `relay/sweep.rs` (`sweep`) polls the connection's counter (`activity.rs`) and has `relay/heartbeat.rs`
//!    (`check`) find out whether to probe the peer (`behaviour/ping.rs`: `probe`). When the connection closes or times
//!    out, `relay/reservations.rs` (`settle`) begins the grace; `end_what_is_over` ends it, and the term.
//!
//! # One CONNECT, file by file
//!
//! 1. As above up to `relay/policy.rs`: `check_request`. `relay/connect.rs`: `connect` finds the target's live
//!    reservation. `relay/circuits.rs`: `check_caps`; `add` makes a record, which holds the reply.
//! 2. `behaviour.rs`: `carry_out` commands the handler of the *target's* connection. `behaviour/handler.rs`: `poll` opens
//!    a stop stream. `behaviour/hop.rs`: `ask` asks on it. If there is no answer within 3 s, or the stream fails or the
//!    connection closes before, and the target has another one, `relay/connect.rs` (`ask_elsewhere`) moves the circuit there.
//! 3. `behaviour.rs`: `on_event` gets the accepted stream. `relay/connect.rs`: `on_target_answered` opens the circuit,
//!    which `relay/accounts.rs` (`on_opened`) counts. The stream is sent as the reply.
//! 4. `behaviour/hop.rs`: `serve` answers the source. From here on both streams are one circuit. `behaviour/circuit.rs`:
//!    `transfer` takes its bytes both ways: limits, half-close, fair share (`relay/bandwidth.rs`: `quantum`).
//! 5. The relay ends a circuit by dropping the guard in its record (`relay/circuits.rs`: `end`). The task sends a report
//!    when it ends, even when it is dropped (`behaviour/hop.rs`: `drop`). `relay/connect.rs`: `on_circuit_ended`
//!    removes the record; `relay/accounts.rs` (`on_closed`) adds its bytes to both peers' accounts and the totals.
//!
//! # In another swarm
//!
//! In place of `libp2p::relay::Behaviour`, on any executor, beside any other behaviour. (libp2p 0.57 has TCP for tokio only;
//! the one for async-std comes with the feature `program`, in `Node`.) This needs no default feature of this crate, but
//! libp2p's features `identify`, `macros`, `noise`, `tcp`, `tokio` and `yamux`:
//!
//! ```
//! use libp2p::{SwarmBuilder, Transport, core::upgrade::Version, identify, noise, swarm::NetworkBehaviour, tcp, yamux};
//!
//! #[derive(NetworkBehaviour)]
//! struct MyBehaviour {
//!     relay: relaylet::Behaviour,
//!     identify: identify::Behaviour,
//! }
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let config = relaylet::Config::default().with(|config| config.max_reservations = 100);
//! let mut swarm = SwarmBuilder::with_new_identity()
//!     .with_tokio()
//!     .with_other_transport(|keypair| {
//!         let tcp = tcp::tokio::Transport::new(tcp::Config::default())
//!             .upgrade(Version::V1Lazy)
//!             .authenticate(noise::Config::new(keypair)?)
//!             .multiplex(yamux::Config::default());
//!         Ok(tcp.map(relaylet::count_activity)) // bytes of all protocols show that a peer is alive
//!     })?
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
//! Poll it with `swarm.select_next_some()`. Tell the relay where it is reachable (`swarm.add_external_address`,
//! [`Config::announce`], or [`Behaviour::set_reported_address`] with what identify observes), and switch
//! [`Config::answer_ping`] off if a ping behaviour of yours answers. Without [`count_activity`] the relay notices only its
//! own protocols, unless you call [`Behaviour::record_activity`] or [`Behaviour::track`]. Behind NAT, call
//! [`Behaviour::set_serving`]`(None)`. An app decides who may use the relay with [`Behaviour::set_access`]: at once, or
//! [later](Permission::Later) with the answer of a database or a service. Without default features the crate is this
//! behaviour alone.
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

mod access;
mod activity;
mod behaviour;
mod config;
mod delegate;
#[cfg(doc)]
pub mod doc;
mod event;
mod wall_clock;

// For the tests, benches and fuzz targets of this repository, and no part of the interface.
#[doc(hidden)]
pub mod address;
#[cfg(feature = "program")]
#[doc(hidden)]
pub mod program;
#[doc(hidden)]
pub mod relay;
#[doc(hidden)]
pub mod wire;

pub use access::{Access, Lists, Permission, Terms};
pub use activity::{ActivityCounter, count_activity};
pub use address::{ClientPrefix, Subnet};
pub use behaviour::Behaviour;
pub use config::{Config, ConfigError};
pub use event::{BytesTransferred, CircuitEnd, CircuitId, Event, FreedReason, Refused, StopFailed};
#[cfg(feature = "program")]
pub use program::node::{Node, NodeEvent, Setup};
pub use relay::accounts::{Account, Totals};
pub use wire::BadRequest;
