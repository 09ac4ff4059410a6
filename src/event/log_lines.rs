//! The exact lines of the log. They are stable: see [`crate::event`].

use std::io::ErrorKind;

use super::*;

const ALICE: &str = "12D3KooWPGM3wYKMsTHGEqbhcBft6cPjA2F3rQmyWTEDD3wCGS1g";
const BOB: &str = "12D3KooWDpJ7As7BWAwRMfu1VU2WCqNjvq387JEYKDBj4kx6nXTN";
const HOME: &str = "/ip4/192.0.2.1/tcp/4001";

fn alice() -> PeerId {
    ALICE.parse().unwrap()
}

fn bob() -> PeerId {
    BOB.parse().unwrap()
}

fn home() -> Multiaddr {
    HOME.parse().unwrap()
}

fn prefix(address: &str) -> ClientPrefix {
    ClientPrefix::of(&address.parse().unwrap()).unwrap()
}

#[test]
fn each_event_has_this_log_line() {
    let accepted = |renewed| Event::ReservationAccepted { peer: alice(), address: home(), renewed };
    let freed =
        |prefix| Event::ReservationFreed { peer: alice(), prefix, reason: FreedReason::GraceOver };
    let refused =
        Event::ReservationRefused { peer: alice(), address: home(), reason: Refused::TableFull };
    let silent = Event::PeerSilent {
        peer: alice(),
        address: home(),
        silent_for: Duration::from_millis(60_900),
    };
    let rejected = Event::RequestRejected {
        peer: alice(),
        address: home(),
        reason: BadRequest::Malformed("CONNECT to oneself"),
    };
    let opened = Event::CircuitOpened { circuit: CircuitId(1), source: alice(), target: bob() };
    let no_circuit = Event::CircuitRefused {
        source: alice(),
        address: home(),
        target: bob(),
        reason: Refused::NoReservation,
    };
    let closed = Event::CircuitClosed {
        circuit: CircuitId(1),
        source: alice(),
        target: bob(),
        end: CircuitEnd::Finished,
        transferred: BytesTransferred { to_target: 5, to_source: 7 },
        open_for: Duration::from_secs(1),
    };
    let (v4, v6) = (prefix(HOME), prefix("/ip6/2001:db8:1:2:3::4/tcp/1"));
    for (event, line) in [
        (accepted(false), format!("reservation granted: peer {ALICE} at {HOME}")),
        (accepted(true), format!("reservation renewed: peer {ALICE} at {HOME}")),
        (refused, format!("reservation refused: peer {ALICE} at {HOME}: all slots are taken")),
        (silent, format!("peer silent: peer {ALICE} at {HOME}: nothing heard for 60 s")),
        (Event::GraceBegan { peer: alice() }, format!("grace began: peer {ALICE}")),
        (freed(Some(v4)), format!("slot freed: peer {ALICE} at 192.0.2.1: grace over")),
        (freed(Some(v6)), format!("slot freed: peer {ALICE} at 2001:db8:1:2::/64: grace over")),
        (freed(None), format!("slot freed: peer {ALICE}: grace over")),
        (rejected, format!("request rejected: peer {ALICE} at {HOME}: CONNECT to oneself")),
        (opened, format!("circuit 1 opened: {ALICE} to {BOB}")),
        (
            no_circuit,
            format!(
                "circuit refused: peer {ALICE} at {HOME} to {BOB}: the target holds no live \
                 reservation"
            ),
        ),
        (
            closed,
            format!("circuit 1 closed: {ALICE} to {BOB}: finished; 5 bytes to the target, 7 back"),
        ),
    ] {
        // An event without a line above does not compile.
        match event {
            Event::ReservationAccepted { .. }
            | Event::ReservationRefused { .. }
            | Event::PeerSilent { .. }
            | Event::GraceBegan { .. }
            | Event::ReservationFreed { .. }
            | Event::RequestRejected { .. }
            | Event::CircuitOpened { .. }
            | Event::CircuitRefused { .. }
            | Event::CircuitClosed { .. } => assert_eq!(event.to_string(), line),
        }
    }
}

#[test]
fn each_refusal_reason_has_this_text() {
    let home = prefix(HOME);
    for (reason, words) in [
        (Refused::TableFull, "all slots are taken"),
        (Refused::AddressFull(home), "all slots of 192.0.2.1 are taken"),
        (Refused::SubnetFull(home.subnet()), "all slots of 192.0.2.0/24 are taken"),
        (Refused::Relayed, "it came over a relayed connection"),
        (Refused::Denied, "the rules do not allow it"),
        (Refused::TooOften, "the peer asks too often"),
        (Refused::AddressTooOften(home), "the peers of 192.0.2.1 ask too often"),
        (Refused::NoReservation, "the target holds no live reservation"),
        (Refused::TooManyCircuits, "too many circuits"),
        (Refused::TooManyCircuitsOfAddress(home), "too many circuits of 192.0.2.1"),
        (Refused::TooManyCircuitsOfSubnet(home.subnet()), "too many circuits of 192.0.2.0/24"),
        (Refused::TooManyCircuitsOfSource, "too many circuits of the source"),
        (Refused::TooManyCircuitsOfTarget, "too many circuits of the target"),
        (Refused::StopFailed(StopFailed::Gone), "the target is gone"),
        (Refused::Gone, "one of its peers is gone"),
        (Refused::NotSigned, "the voucher could not be signed"),
        (Refused::Draining, "the relay is draining"),
    ] {
        match reason {
            Refused::TableFull
            | Refused::AddressFull(_)
            | Refused::SubnetFull(_)
            | Refused::Relayed
            | Refused::Denied
            | Refused::TooOften
            | Refused::AddressTooOften(_)
            | Refused::NoReservation
            | Refused::TooManyCircuits
            | Refused::TooManyCircuitsOfAddress(_)
            | Refused::TooManyCircuitsOfSubnet(_)
            | Refused::TooManyCircuitsOfSource
            | Refused::TooManyCircuitsOfTarget
            | Refused::StopFailed(_)
            | Refused::Gone
            | Refused::NotSigned
            | Refused::Draining => assert_eq!(reason.to_string(), words),
        }
    }
}

#[test]
fn each_stop_failure_has_this_text() {
    let nonsense = BadRequest::Unexpected("CONNECT as an answer");
    for (failed, words) in [
        (StopFailed::Gone, "the target is gone"),
        (StopFailed::Unsupported, "the target does not support the stop protocol"),
        (StopFailed::Refused(203), "the target refused with status 203"),
        (StopFailed::Nonsense(nonsense), "the target answered with CONNECT as an answer"),
        (StopFailed::Io(ErrorKind::TimedOut), "stop request failed: timed out"),
    ] {
        match failed {
            StopFailed::Gone
            | StopFailed::Unsupported
            | StopFailed::Refused(_)
            | StopFailed::Nonsense(_)
            | StopFailed::Io(_) => assert_eq!(failed.to_string(), words),
        }
    }
}

#[test]
fn each_reason_for_a_freed_slot_has_this_text() {
    for (reason, words) in [
        (FreedReason::Expired, "expired"),
        (FreedReason::GraceOver, "grace over"),
        (FreedReason::Disconnected, "disconnected"),
        (FreedReason::Silent, "silent"),
        (FreedReason::TakenBy { peer: bob() }, &*format!("taken by {BOB}")),
        (FreedReason::Undelivered, "answer undelivered"),
        (FreedReason::Denied, "denied"),
        (FreedReason::Released, "released"),
    ] {
        match reason {
            FreedReason::Expired
            | FreedReason::GraceOver
            | FreedReason::Disconnected
            | FreedReason::Silent
            | FreedReason::TakenBy { .. }
            | FreedReason::Undelivered
            | FreedReason::Denied
            | FreedReason::Released => assert_eq!(reason.to_string(), words),
        }
    }
}

#[test]
fn each_circuit_end_has_this_text() {
    for (end, words) in [
        (CircuitEnd::Finished, "finished"),
        (CircuitEnd::DataLimit, "data limit"),
        (CircuitEnd::TimeLimit, "time limit"),
        (CircuitEnd::Reset(ErrorKind::ConnectionReset), "reset: connection reset"),
        (CircuitEnd::Disconnected, "disconnected"),
        (CircuitEnd::Silent, "silent"),
        (CircuitEnd::Denied, "denied"),
        (CircuitEnd::Released, "released"),
        (CircuitEnd::Preempted, "preempted"),
        (CircuitEnd::Replaced, "connection replaced"),
        (CircuitEnd::Stalled, "stalled"),
    ] {
        match end {
            CircuitEnd::Finished
            | CircuitEnd::DataLimit
            | CircuitEnd::TimeLimit
            | CircuitEnd::Reset(_)
            | CircuitEnd::Disconnected
            | CircuitEnd::Silent
            | CircuitEnd::Denied
            | CircuitEnd::Released
            | CircuitEnd::Preempted
            | CircuitEnd::Replaced
            | CircuitEnd::Stalled => assert_eq!(end.to_string(), words),
        }
    }
}
