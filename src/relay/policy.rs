//! What may change while the relay runs: its configuration, and who may use it.

use std::{hash::Hash, mem, time::Instant};

use libp2p::{Multiaddr, PeerId};

use super::{
    AccessCheck, Action, Relay,
    circuits::Circuit,
    connections::{End, PendingRequest},
    reclaim::PendingReservation,
};
use crate::{
    access::{ANSWER_TIMEOUT, Access, Permission},
    config::{Config, ConfigError},
    event::{CircuitEnd, FreedReason, Refused},
    wire::Request,
};

impl<C: Copy + Ord + Hash, R> Relay<C, R> {
    /// Replaces the configuration: [`crate::Behaviour::set_config`].
    ///
    /// # Errors
    ///
    /// As [`Relay::new`]. Nothing has changed then.
    pub fn set_config(&mut self, config: Config, now: Instant) -> Result<(), ConfigError> {
        config.validate()?;
        self.reservations.configure(&config, now);
        self.circuits.quota.caps = config.circuit_caps();
        self.circuits.max_per_peer = config.max_circuits_per_peer;
        self.heartbeat.checked_at = now; // the time since the last check does not count as a pause
        self.reserve_rates.per_minute = config.reserve_rate;
        self.connect_rates.per_minute = config.connect_rate;
        self.link.lock().configure(&config, now);
        // Never later than before: otherwise a change every second would postpone the sweep for ever.
        self.sweep_due = self.sweep_due.min(now + config.sweep);
        let before = mem::replace(&mut self.config, config);
        // Unchanged lists are not asked again: of a peer in grace only the prefix is known now, which they may deny.
        let is_changed = before.access != self.config.access;
        if is_changed {
            self.lists = self.config.access.sorted();
        }
        if is_changed || self.embedder_access.is_some() {
            self.recheck_access(now);
        }
        Ok(())
    }

    /// Has `access` decide who may use the relay, instead of the configuration's lists.
    pub fn set_access(&mut self, access: Box<dyn Access>, now: Instant) {
        self.embedder_access = Some(access);
        self.recheck_access(now);
    }

    /// The rules that decide who may use the relay: the embedder's, or else the lists of the configuration.
    pub fn access(&self) -> &dyn Access {
        self.embedder_access.as_deref().unwrap_or(&self.lists)
    }

    /// Asks the access rules about a request, and charges its rate unless it is denied.
    pub(super) fn check_request(&mut self, request: PendingRequest<C, R>, now: Instant) {
        let (End { peer, connection }, address) = (request.from, &request.origin.address);
        let is_holder = self.reservations.get(&peer).is_some_and(|slot| now < slot.ends);
        let is_renewal = is_holder && request.request == Request::Reserve;
        // 1. Access.
        let (permission, rates) = match request.request {
            Request::Reserve => (self.access().may_reserve(peer, address), &mut self.reserve_rates),
            Request::Connect(target) => {
                (self.access().may_connect(peer, address, target), &mut self.connect_rates)
            }
        };
        // 2. Request rate, before the look-up: a peer must not find out quickly which peers hold slots. A renewal is
        //    charged to the peer and not to its address.
        let prefix = request.origin.prefix.filter(|_| !is_renewal);
        let is_denied = matches!(permission, Permission::Deny);
        if !is_denied && let Err(reason) = rates.take(peer, prefix, now) {
            return self.refuse(request, reason);
        }
        // 3. A request that waits for its answer keeps its slot, and does not leave its connection idle.
        if let Permission::Later(_) = permission {
            if is_renewal {
                self.reservations.keep(&peer, now + ANSWER_TIMEOUT);
            }
            self.connections.update(connection, now, |up| up.idle_since = now);
        }
        self.on_access_checked(AccessCheck::Request(request, self.rule_changes), permission, now);
    }

    /// Handles the answer to an [`Action::CheckAccess`], or one that came at once: admits or refuses a request, ends a
    /// slot or circuit that is denied. Queues an [`Action::CheckAccess`] for an answer that comes later.
    pub fn on_access_checked(
        &mut self,
        check: AccessCheck<C, R>,
        permission: Permission,
        now: Instant,
    ) {
        if let Permission::Later(_) = permission {
            return self.actions.push_back(Action::CheckAccess(check, permission));
        }
        let is_denied = matches!(permission, Permission::Deny);
        // Only answers about slots and circuits are counted.
        if !matches!(check, AccessCheck::Request(..)) {
            self.open_checks -= 1;
        }
        match check {
            AccessCheck::Request(request, rule_changes) => match permission {
                _ if self.connections.get(request.from.connection).is_none() => {}
                _ if self.is_draining() => self.refuse(request, Refused::Draining),
                Permission::Allow(terms) => {
                    let peer = request.from.peer;
                    match request.request {
                        Request::Reserve => self.reserve(request, terms, now),
                        Request::Connect(target) => self.connect(request, target, terms, now),
                    }
                    // The answer may be from before the rules changed.
                    if rule_changes != self.rule_changes {
                        self.recheck(Some(peer), now);
                    }
                }
                _ => self.refuse(request, Refused::Denied),
            },
            AccessCheck::Circuit(id) if is_denied => self.end_circuit(id, CircuitEnd::Denied),
            AccessCheck::Slot(peer, over) if is_denied => {
                // A slot that points at another connection by now was allowed there, or is checked again.
                let slot = self.reservations.get(&peer);
                if slot.is_some_and(|slot| slot.connection.or(over) == over) {
                    self.release(peer, FreedReason::Denied, now);
                }
            }
            _ => {}
        }
        // After the last open check: `None`, which is first, stands for all peers.
        if self.open_checks == 0 {
            let again = mem::take(&mut self.check_again);
            let count = if again.first() == Some(&None) { 1 } else { again.len() };
            again.into_iter().take(count).for_each(|only| self.ask_about(only, false, now));
        }
    }

    /// Asks the access rules again about all slots, circuits and newcomers that wait, and ends or refuses what is
    /// denied.
    ///
    /// A slot or circuit whose answer comes later stays until then. While such answers have yet to come, no more are
    /// requested: all slots and circuits are asked about once more after the last of them.
    pub fn recheck_access(&mut self, now: Instant) {
        self.rule_changes += 1;
        self.recheck(None, now);
    }

    /// As [`Relay::recheck_access`]; if a peer is given, only about its slot, the circuits that it opened, and its
    /// request.
    pub(super) fn recheck(&mut self, only: Option<PeerId>, now: Instant) {
        let is_busy = self.open_checks > 0;
        if is_busy && let Err(at) = self.check_again.binary_search(&only) {
            self.check_again.insert(at, only);
        }
        self.ask_about(only, is_busy, now);
    }

    /// Asks about one peer as [`Relay::recheck`] does, or about all. If `is_busy`, because answers have yet to come,
    /// acts only on those that come at once.
    fn ask_about(&mut self, only: Option<PeerId>, is_busy: bool, now: Instant) {
        let is_meant = |peer: PeerId| only.is_none_or(|only| only == peer);
        // 1. Slots. A peer in grace has no connection: the first address of the prefix that its slot counts towards
        //    stands for it. The cost for one peer does not depend on the number of slots: peers reconnect often.
        let slots = match only {
            Some(peer) => Vec::from_iter(self.reservations.get(&peer).map(|slot| (peer, slot))),
            None => self.reservations.iter().collect(),
        };
        let slots = slots.into_iter().map(|(peer, slot)| {
            let first = slot.prefix.map_or_else(Multiaddr::empty, |prefix| prefix.ip().into());
            let address = slot.connection.map_or(first, |up| self.address_of(up));
            (AccessCheck::Slot(peer, slot.connection), self.access().may_reserve(peer, &address))
        });
        // 2. Circuits. The target may hold no slot any more, or hold it over another connection.
        let circuits = self.circuits.iter().filter(|(_, it)| is_meant(it.source.peer));
        let circuits = circuits.flat_map(|(id, Circuit { source, target, .. })| {
            let [from, at] = [source, target].map(|end| self.address_of(end.connection));
            let may_connect = self.access().may_connect(source.peer, &from, target.peer);
            let may_be_target = self.access().may_reserve(target.peer, &at);
            [may_connect, may_be_target].map(|permission| (AccessCheck::Circuit(id), permission))
        });
        let answers = slots.chain(circuits).filter(|(_, it)| !matches!(it, Permission::Allow(_)));
        for (check, permission) in answers.collect::<Vec<_>>() {
            if !(is_busy && matches!(permission, Permission::Later(_))) {
                self.open_checks += 1;
                self.on_access_checked(check, permission, now);
            }
        }
        // 3. Newcomers that wait for a slot.
        for newcomer in mem::take(&mut self.waiting) {
            let PendingRequest { from, origin, .. } = &newcomer.request;
            let ask = || self.access().may_reserve(from.peer, &origin.address);
            match is_meant(from.peer).then(ask) {
                None => self.waiting.push_back(newcomer),
                Some(Permission::Allow(terms)) => {
                    self.waiting.push_back(PendingReservation { terms, ..newcomer });
                }
                Some(permission) => {
                    let check = AccessCheck::Request(newcomer.request, self.rule_changes);
                    self.on_access_checked(check, permission, now);
                }
            }
        }
    }

    /// The connections of `peer` that its slot may move to, oldest first: those over which it may reserve, or for which
    /// the answer comes later; not those on which it timed out and has not been active since. Asks the rules only about
    /// those for which `is_meant` is true.
    pub(super) fn fit_for_a_slot(&self, peer: PeerId, is_meant: &dyn Fn(C) -> bool) -> Vec<C> {
        let fit = self.connections.of(&peer).filter(|(id, up)| {
            let permission = || self.access().may_reserve(peer, &up.origin.address);
            let is_silent = up.closing.is_some() || up.liveness.heard_since_timeout == Some(false);
            let is_usable = !up.origin.relayed && !is_silent && is_meant(*id);
            is_usable && !matches!(permission(), Permission::Deny)
        });
        fit.map(|(id, _)| id).collect()
    }

    /// The address of a connection's peer; empty if the connection closed.
    pub(super) fn address_of(&self, connection: C) -> Multiaddr {
        let up = self.connections.get(connection);
        up.map_or_else(Multiaddr::empty, |up| up.origin.address.clone())
    }
}

#[cfg(test)]
mod tests {
    use std::{
        sync::{Arc, Mutex},
        time::Duration,
    };

    use super::*;
    use crate::{
        access::Terms,
        event::{Event, StopFailed},
        relay::{
            CircuitParameters,
            connections::{CloseReason, Connection},
            rates::Rates,
        },
        wire::{Limit, Status},
    };

    const MINUTE: Duration = Duration::from_secs(60);

    const SOURCE: u32 = 1;
    const TARGET: u32 = 2;

    /// A relay with two connections, the target's from 192.0.2.1.
    fn relay(now: Instant) -> (Relay<u32, u32>, [End<u32>; 2]) {
        let mut relay = Relay::new(Config::default(), now).unwrap();
        let ends = [(SOURCE, "/ip4/198.51.100.1/tcp/1"), (TARGET, "/ip4/192.0.2.1/tcp/1")];
        let ends = ends.map(|(connection, address)| {
            let peer = PeerId::random();
            let address = address.parse().unwrap();
            let up = Connection::new(peer, address, false, 0, now);
            relay.connections.add(connection, up);
            End { peer, connection }
        });
        (relay, ends)
    }

    fn actions(relay: &mut Relay<u32, u32>) -> Vec<Action<u32, u32>> {
        std::iter::from_fn(|| relay.actions.pop_front()).collect()
    }

    /// Opens a circuit to a peer that holds a slot.
    fn open_circuit(
        relay: &mut Relay<u32, u32>,
        source: End<u32>,
        target: End<u32>,
        now: Instant,
    ) -> Box<CircuitParameters> {
        relay.handle_request(source, Ok(Request::Connect(target.peer)), 2, now);
        let asked = actions(relay).into_iter().find_map(|action| match action {
            Action::AskTarget(_, parameters) => Some(parameters),
            _ => None,
        });
        let parameters = asked.expect("a STOP request to the target");
        let opened = relay.on_target_answered(parameters.id, target.connection, Ok(()), now);
        assert!(opened.is_some(), "an open circuit");
        parameters
    }

    #[test]
    fn a_circuit_ends_when_its_target_is_denied_after_losing_its_slot() {
        let start = Instant::now();
        let (mut relay, [source, target]) = relay(start);
        relay.handle_request(target, Ok(Request::Reserve), 1, start);
        let mut parameters = open_circuit(&mut relay, source, target, start);
        let later = start + Duration::from_secs(2 * 60 * 60);
        relay.connections.record_activity(&target.peer, later);
        relay.connections.record_activity(&source.peer, later);
        relay.sweep(later);
        assert_eq!(relay.reservations.taken(), 0, "the reservation has expired");
        assert_eq!(parameters.ended.try_recv(), Ok(None));

        let mut config = relay.config.clone();
        config.access.deny_subnet = vec!["192.0.2.0/24".parse().unwrap()];
        relay.set_config(config, later).unwrap();
        assert!(parameters.ended.try_recv().is_err());
        actions(&mut relay);
        relay.on_circuit_ended(parameters.id, CircuitEnd::Disconnected, later); // as its task reports
        let ended = actions(&mut relay);
        let [Action::Report(Event::CircuitClosed { end: CircuitEnd::Denied, .. })] = ended[..]
        else {
            panic!("{ended:?}");
        };
    }

    #[test]
    fn a_connect_that_waits_is_refused_as_denied_once_its_target_is_denied() {
        let start = Instant::now();
        let (mut relay, [source, target]) = relay(start);
        relay.handle_request(target, Ok(Request::Reserve), 1, start);
        relay.handle_request(source, Ok(Request::Connect(target.peer)), 2, start);
        actions(&mut relay);
        let mut config = relay.config.clone();
        config.access.deny_peer.insert(target.peer);
        relay.set_config(config, start).unwrap();
        let refused = actions(&mut relay).into_iter().find_map(|action| match action {
            Action::Report(Event::CircuitRefused { reason, .. }) => Some(reason),
            _ => None,
        });
        assert_eq!(refused, Some(Refused::Denied));
    }

    #[test]
    fn a_slot_in_grace_stays_when_another_setting_changes() {
        let start = Instant::now();
        let (mut relay, _) = relay(start);
        let holder = End { peer: PeerId::random(), connection: 3 };
        let address = "/ip6/2001:db8::5/tcp/1".parse().unwrap();
        relay.connections.add(3, Connection::new(holder.peer, address, false, 0, start));
        let mut config = relay.config.clone();
        config.access.allow_subnet = vec!["2001:db8::5/128".parse().unwrap()];
        relay.set_config(config.clone(), start).unwrap();
        reserve(&mut relay, holder, start);
        relay.on_disconnected(holder, start);
        assert_eq!(relay.reservations.in_grace(), 1);
        config.bandwidth = 1;
        relay.set_config(config, start).unwrap();
        assert_eq!(relay.reservations.in_grace(), 1);
    }

    #[test]
    fn a_slot_does_not_move_to_a_connection_that_may_not_reserve() {
        let start = Instant::now();
        let (mut relay, [_, holder]) = relay(start);
        reserve(&mut relay, holder, start);
        let address = "/ip4/203.0.113.1/tcp/1".parse().unwrap();
        relay.connections.add(3, Connection::new(holder.peer, address, false, 0, start));
        let mut config = relay.config.clone();
        config.access.deny_subnet = vec!["203.0.113.0/24".parse().unwrap()];
        relay.set_config(config, start).unwrap();
        relay.on_disconnected(holder, start);
        assert_eq!(relay.reservations.get(&holder.peer).unwrap().connection, None);
        assert_eq!(relay.reservations.in_grace(), 1);
    }

    /// Allows everything, and records which peers it is asked about.
    #[derive(Default)]
    struct RecordingAccess(Arc<Mutex<Vec<PeerId>>>);

    impl Access for RecordingAccess {
        fn may_reserve(&self, peer: PeerId, _: &Multiaddr) -> Permission {
            self.0.lock().unwrap().push(peer);
            true.into()
        }

        fn may_connect(&self, source: PeerId, address: &Multiaddr, _: PeerId) -> Permission {
            self.may_reserve(source, address)
        }
    }

    #[test]
    fn only_the_peer_that_is_rechecked_is_asked_about() {
        let start = Instant::now();
        let (mut relay, [newcomer, holder]) = relay(start);
        let config = Config { max_reservations: 1, ..relay.config.clone() };
        relay.set_config(config, start).unwrap();
        reserve(&mut relay, holder, start);
        // The holder is silent, so the newcomer waits while it is probed.
        let later = start + Duration::from_secs(60);
        relay.handle_request(newcomer, Ok(Request::Reserve), 2, later);
        assert_eq!(relay.waiting.len(), 1);
        let access = RecordingAccess::default();
        let asked = Arc::clone(&access.0);
        relay.set_access(Box::new(access), later);
        assert_eq!(mem::take(&mut *asked.lock().unwrap()), [holder.peer, newcomer.peer]);
        relay.recheck(Some(holder.peer), later);
        assert_eq!(mem::take(&mut *asked.lock().unwrap()), [holder.peer]);
    }

    #[test]
    fn the_rules_are_asked_only_about_connections_to_which_something_may_move() {
        let start = Instant::now();
        let (mut relay, [source, target]) = relay(start);
        reserve(&mut relay, target, start);
        let _circuit = open_circuit(&mut relay, source, target, start);
        for (peer, connection) in [(source.peer, 3), (target.peer, 4), (target.peer, 5)] {
            connect_again(&mut relay, peer, connection);
        }
        let access = RecordingAccess::default();
        let asked = Arc::clone(&access.0);
        relay.set_access(Box::new(access), start);
        mem::take(&mut *asked.lock().unwrap());
        // Neither of these holds a slot or a stop request.
        relay.on_disconnected(source, start);
        relay.on_disconnected(End { connection: 5, ..target }, start);
        assert_eq!(mem::take(&mut *asked.lock().unwrap()), []);
        // The slot moves, and the rules are asked once more when it has.
        relay.on_disconnected(target, start);
        assert_eq!(mem::take(&mut *asked.lock().unwrap()), [target.peer; 2]);
    }

    /// Answers later; the test gives the answers.
    struct AnswerLater;

    impl Access for AnswerLater {
        fn may_reserve(&self, _: PeerId, _: &Multiaddr) -> Permission {
            Permission::Later(Box::pin(std::future::pending()))
        }

        fn may_connect(&self, source: PeerId, address: &Multiaddr, _: PeerId) -> Permission {
            self.may_reserve(source, address)
        }
    }

    type Check = AccessCheck<u32, u32>;

    /// Takes all actions; returns the checks that wait for an answer.
    fn take_checks(relay: &mut Relay<u32, u32>) -> Vec<Check> {
        let checks = actions(relay).into_iter().filter_map(|action| match action {
            Action::CheckAccess(check, Permission::Later(_)) => Some(check),
            _ => None,
        });
        checks.collect()
    }

    /// As [`take_checks`], of which there is one.
    fn take_check(relay: &mut Relay<u32, u32>) -> Check {
        let mut checks = take_checks(relay);
        assert_eq!(checks.len(), 1, "{checks:?}");
        checks.remove(0)
    }

    fn freed(relay: &mut Relay<u32, u32>) -> Option<(PeerId, FreedReason)> {
        actions(relay).into_iter().find_map(|action| match action {
            Action::Report(Event::ReservationFreed { peer, reason, .. }) => Some((peer, reason)),
            _ => None,
        })
    }

    /// Asks for a slot, and has it granted.
    fn reserve(relay: &mut Relay<u32, u32>, holder: End<u32>, now: Instant) {
        relay.handle_request(holder, Ok(Request::Reserve), 1, now);
        let granted = actions(relay).into_iter().find_map(|action| match action {
            Action::Grant { receipt, .. } => Some(receipt),
            _ => None,
        });
        relay.on_delivered(holder.peer, granted.expect("a slot is free"), true, now);
    }

    /// Sweeps while these peers are active.
    fn sweep_active(relay: &mut Relay<u32, u32>, peers: [End<u32>; 2], now: Instant) {
        peers.iter().for_each(|end| relay.connections.record_activity(&end.peer, now));
        relay.sweep(now);
    }

    #[test]
    fn a_renewal_that_waits_for_its_answer_keeps_the_slot_beyond_its_term_once() {
        let start = Instant::now();
        let (mut relay, ends @ [_, holder]) = relay(start);
        reserve(&mut relay, holder, start);
        relay.set_access(Box::new(AnswerLater), start);
        let slot = take_check(&mut relay);
        relay.on_access_checked(slot, true.into(), start);
        let over = start + relay.config.reservation_ttl;
        let second = Duration::from_secs(1);

        relay.handle_request(holder, Ok(Request::Reserve), 2, over - second);
        let renewal = take_check(&mut relay);
        sweep_active(&mut relay, ends, over + 8 * second);
        assert_eq!(relay.reservations.taken(), 1);
        relay.on_access_checked(renewal, true.into(), over + 8 * second);
        let granted = actions(&mut relay).into_iter().find_map(|action| match action {
            Action::Report(Event::ReservationAccepted { renewed, .. }) => Some(renewed),
            _ => None,
        });
        assert_eq!(granted, Some(true));

        let over = over + 8 * second + relay.config.reservation_ttl;
        for before in [second, Duration::ZERO] {
            relay.handle_request(holder, Ok(Request::Reserve), 3, over - before);
            let renewal = take_check(&mut relay);
            relay.on_access_checked(renewal, false.into(), over - before);
        }
        sweep_active(&mut relay, ends, over);
        assert_eq!(relay.reservations.taken(), 1, "once in each term");
        sweep_active(&mut relay, ends, over - second + ANSWER_TIMEOUT);
        assert_eq!(freed(&mut relay), Some((holder.peer, FreedReason::Expired)));
    }

    #[test]
    fn no_newcomer_takes_a_slot_in_grace_while_its_owner_waits_for_an_answer() {
        let start = Instant::now();
        let (mut relay, [newcomer, owner]) = relay(start);
        relay.set_config(Config { max_reservations: 1, ..Config::default() }, start).unwrap();
        reserve(&mut relay, owner, start);
        relay.on_disconnected(owner, start);
        let back = End { connection: 3, ..owner };
        let address = "/ip4/192.0.2.1/tcp/2".parse().unwrap();
        relay.connections.add(3, Connection::new(owner.peer, address, false, 0, start));
        relay.set_access(Box::new(AnswerLater), start);
        let slot = take_check(&mut relay);
        relay.on_access_checked(slot, true.into(), start);
        relay.handle_request(back, Ok(Request::Reserve), 2, start);
        let renewal = take_check(&mut relay);
        relay.handle_request(newcomer, Ok(Request::Reserve), 3, start);
        let other = take_check(&mut relay);
        relay.on_access_checked(other, true.into(), start);
        assert_eq!(relay.reservations.get(&newcomer.peer), None);
        relay.on_access_checked(renewal, true.into(), start + ANSWER_TIMEOUT / 2);
        assert_eq!(relay.reservations.get(&owner.peer).unwrap().connection, Some(3));
    }

    #[test]
    fn slots_and_circuits_stay_until_a_later_answer_denies_them() {
        let start = Instant::now();
        let (mut relay, [source, target]) = relay(start);
        reserve(&mut relay, target, start);
        relay.handle_request(source, Ok(Request::Connect(target.peer)), 2, start);
        actions(&mut relay);
        relay.set_access(Box::new(AnswerLater), start);
        let open = take_checks(&mut relay);
        assert_eq!(open.len(), 3, "the slot, and the circuit for each of its peers: {open:?}");
        // Meanwhile no more answers are requested.
        relay.recheck_access(start);
        assert!(take_checks(&mut relay).is_empty());
        for check in open {
            relay.on_access_checked(check, true.into(), start);
        }
        assert_eq!((relay.reservations.taken(), relay.circuits.count()), (1, 1));
        // After the last answer all three are asked about again.
        let open = take_checks(&mut relay);
        assert_eq!(open.len(), 3, "{open:?}");
        let mut ended = Vec::new();
        for check in open {
            let is_circuit = matches!(check, AccessCheck::Circuit(_));
            relay.on_access_checked(check, is_circuit.into(), start);
            ended.extend(actions(&mut relay));
        }
        let is_freed = |action: &Action<u32, u32>| {
            let reason = FreedReason::Denied;
            matches!(action, Action::Report(Event::ReservationFreed { reason: it, .. }) if *it == reason)
        };
        let is_refused = |action: &Action<u32, u32>| {
            let reason = Refused::Denied;
            matches!(action, Action::Report(Event::CircuitRefused { reason: it, .. }) if *it == reason)
        };
        assert!(ended.iter().any(is_freed) && ended.iter().any(is_refused), "{ended:?}");
        relay.recheck_access(start);
        assert_eq!(relay.open_checks, 2, "the circuit counts until its target reports");
    }

    #[test]
    fn a_slot_that_moves_while_others_are_asked_about_is_the_only_one_that_is_checked_again() {
        let start = Instant::now();
        let (mut relay, holders) = relay(start);
        holders.iter().for_each(|holder| reserve(&mut relay, *holder, start));
        let [moves, _] = holders;
        let other = connect_again(&mut relay, moves.peer, 3);
        relay.set_access(Box::new(AnswerLater), start);
        let open = take_checks(&mut relay);
        assert_eq!(open.len(), 2);
        relay.on_disconnected(moves, start);
        assert!(take_checks(&mut relay).is_empty());
        for check in open {
            relay.on_access_checked(check, true.into(), start);
        }
        let again = take_check(&mut relay);
        let expected = Some(other.connection);
        assert!(
            matches!(again, AccessCheck::Slot(peer, over) if (peer, over) == (moves.peer, expected))
        );
    }

    #[test]
    fn a_request_that_is_allowed_by_rules_that_have_changed_since_is_checked_again() {
        let start = Instant::now();
        let (mut relay, [_, client]) = relay(start);
        relay.set_access(Box::new(AnswerLater), start);
        relay.handle_request(client, Ok(Request::Reserve), 1, start);
        let request = take_check(&mut relay);
        relay.recheck_access(start);
        relay.on_access_checked(request, true.into(), start);
        assert_eq!(relay.reservations.taken(), 1);
        let slot = take_check(&mut relay);
        relay.on_access_checked(slot, false.into(), start);
        assert_eq!(freed(&mut relay), Some((client.peer, FreedReason::Denied)));
    }

    #[test]
    fn an_answer_for_a_connection_that_closed_has_no_effect() {
        let start = Instant::now();
        let (mut relay, [_, client]) = relay(start);
        relay.set_access(Box::new(AnswerLater), start);
        relay.handle_request(client, Ok(Request::Reserve), 1, start);
        let request = take_check(&mut relay);
        relay.on_disconnected(client, start);
        relay.on_access_checked(request, true.into(), start);
        assert!(actions(&mut relay).is_empty());
        assert_eq!(relay.reservations.taken(), 0);
    }

    #[test]
    fn requests_pay_their_rate_before_a_later_answer_is_awaited() {
        let start = Instant::now();
        let (mut relay, [_, client]) = relay(start);
        relay.set_config(Config { reserve_rate: 1, ..Config::default() }, start).unwrap();
        relay.set_access(Box::new(AnswerLater), start);
        relay.handle_request(client, Ok(Request::Reserve), 1, start);
        take_check(&mut relay);
        relay.handle_request(client, Ok(Request::Reserve), 2, start);
        let refused = actions(&mut relay).into_iter().any(|action| match action {
            Action::CheckAccess(..) => panic!("{action:?}"),
            Action::Refuse(reply, _) => reply == 2,
            _ => false,
        });
        assert!(refused);
    }

    #[test]
    fn a_slot_that_moves_to_another_connection_is_checked_again() {
        let start = Instant::now();
        let (mut relay, [_, holder]) = relay(start);
        reserve(&mut relay, holder, start);
        let other = connect_again(&mut relay, holder.peer, 3);
        relay.set_access(Box::new(AnswerLater), start);
        let slot = take_check(&mut relay);
        relay.on_access_checked(slot, true.into(), start);
        relay.on_disconnected(holder, start);
        let slot = relay.reservations.get(&holder.peer).expect("its slot");
        assert_eq!(slot.connection, Some(other.connection));
        let moved = take_check(&mut relay);
        relay.on_access_checked(moved, false.into(), start);
        assert_eq!(freed(&mut relay), Some((holder.peer, FreedReason::Denied)));
    }

    /// Opens one more connection of this peer, from another subnet.
    fn connect_again(relay: &mut Relay<u32, u32>, peer: PeerId, connection: u32) -> End<u32> {
        let address = "/ip4/203.0.113.1/tcp/1".parse().unwrap();
        let up = Connection::new(peer, address, false, 0, Instant::now());
        relay.connections.add(connection, up);
        End { peer, connection }
    }

    #[test]
    fn a_late_denial_of_the_address_that_a_slot_has_left_does_not_free_it() {
        let start = Instant::now();
        let (mut relay, [_, holder]) = relay(start);
        reserve(&mut relay, holder, start);
        let elsewhere = connect_again(&mut relay, holder.peer, 3);
        relay.set_access(Box::new(AnswerLater), start);
        let old = take_check(&mut relay);
        relay.handle_request(elsewhere, Ok(Request::Reserve), 2, start);
        let renewal = take_check(&mut relay);
        relay.on_access_checked(renewal, true.into(), start);
        relay.on_access_checked(old, false.into(), start);
        let slot = relay.reservations.get(&holder.peer).expect("its slot");
        assert_eq!(slot.connection, Some(elsewhere.connection));
    }

    #[test]
    fn a_slot_that_an_undelivered_answer_moves_is_checked_again() {
        let start = Instant::now();
        let (mut relay, [_, holder]) = relay(start);
        reserve(&mut relay, holder, start);
        let renewing = connect_again(&mut relay, holder.peer, 3);
        relay.set_access(Box::new(AnswerLater), start);
        let slot = take_check(&mut relay);
        relay.on_access_checked(slot, true.into(), start);
        relay.handle_request(renewing, Ok(Request::Reserve), 2, start);
        let renewal = take_check(&mut relay);
        relay.on_access_checked(renewal, true.into(), start);
        let receipt = actions(&mut relay).into_iter().find_map(|action| match action {
            Action::Grant { receipt, .. } => Some(receipt),
            _ => None,
        });
        let newest = connect_again(&mut relay, holder.peer, 4);
        relay.on_disconnected(holder, start);
        relay.on_delivered(holder.peer, receipt.expect("a renewal"), false, start);
        let slot = relay.reservations.get(&holder.peer).expect("its slot");
        assert_eq!(slot.connection, Some(newest.connection));
        let moved = take_check(&mut relay);
        relay.on_access_checked(moved, false.into(), start);
        assert_eq!(freed(&mut relay), Some((holder.peer, FreedReason::Denied)));
    }

    /// Allows everything, but answers later about peers at 203.0.113.1.
    struct LaterElsewhere;

    impl Access for LaterElsewhere {
        fn may_reserve(&self, peer: PeerId, address: &Multiaddr) -> Permission {
            match address.to_string().starts_with("/ip4/203.0.113.1/") {
                true => AnswerLater.may_reserve(peer, address),
                false => true.into(),
            }
        }

        fn may_connect(&self, _: PeerId, _: &Multiaddr, _: PeerId) -> Permission {
            true.into()
        }
    }

    #[test]
    fn a_circuit_whose_target_is_asked_at_another_address_is_checked_again() {
        let start = Instant::now();
        let (mut relay, [source, target]) = relay(start);
        relay.set_access(Box::new(LaterElsewhere), start);
        reserve(&mut relay, target, start);
        relay.handle_request(source, Ok(Request::Connect(target.peer)), 2, start);
        let (id, _) = relay.circuits.iter().next().expect("a circuit");
        actions(&mut relay);
        connect_again(&mut relay, target.peer, 3);
        let failed = Err::<(), _>(StopFailed::Io(std::io::ErrorKind::ConnectionReset));
        relay.on_target_answered(id, target.connection, failed, start);
        let moved = take_check(&mut relay);
        relay.on_access_checked(moved, false.into(), start);
        assert_eq!(refusals(&mut relay), [Status::PermissionDenied]);
    }

    #[test]
    fn a_slot_that_is_live_again_over_a_connection_that_was_silent_is_checked_again() {
        let start = Instant::now();
        let (mut relay, [_, holder]) = relay(start);
        reserve(&mut relay, holder, start);
        relay.time_out(holder.connection, start);
        relay.set_access(Box::new(AnswerLater), start);
        let in_grace = take_check(&mut relay);
        relay.on_access_checked(in_grace, true.into(), start);
        relay.connections.record_activity(&holder.peer, start);
        relay.sweep(start);
        let slot = relay.reservations.get(&holder.peer).expect("its slot");
        assert_eq!(slot.connection, Some(holder.connection));
        take_check(&mut relay);
    }

    #[test]
    fn a_slot_in_grace_is_not_live_again_over_a_connection_that_may_not_reserve() {
        let start = Instant::now();
        let (mut relay, [_, holder]) = relay(start);
        let max_reservations_per_ip = Some(1);
        let config = Config { max_reservations_per_ip, ..relay.config.clone() };
        relay.set_config(config, start).unwrap();
        reserve(&mut relay, holder, start);
        // Its slot still counts towards its first address: another peer has the one of the second.
        let neighbour = connect_again(&mut relay, PeerId::random(), 3);
        reserve(&mut relay, neighbour, start);
        let silent = connect_again(&mut relay, holder.peer, 4);
        reserve(&mut relay, silent, start);
        relay.on_disconnected(holder, start);
        relay.time_out(silent.connection, start);
        let mut config = relay.config.clone();
        config.access.deny_subnet = vec!["203.0.113.0/24".parse().unwrap()];
        relay.set_config(config, start).unwrap();
        relay.connections.record_activity(&holder.peer, start);
        relay.sweep(start);
        let slot = relay.reservations.get(&holder.peer).expect("its slot");
        assert_eq!(slot.connection, None);
    }

    #[test]
    fn a_peer_that_may_now_only_connect_loses_its_slot_and_keeps_the_circuits_that_it_opened() {
        let start = Instant::now();
        let (mut relay, [source, target]) = relay(start);
        reserve(&mut relay, source, start);
        reserve(&mut relay, target, start);
        let mut parameters = open_circuit(&mut relay, source, target, start);
        let mut config = relay.config.clone();
        config.access.allow_peer.insert(target.peer);
        config.access.allow_connect_peer.insert(source.peer);
        relay.set_config(config, start).unwrap();
        assert_eq!(freed(&mut relay), Some((source.peer, FreedReason::Denied)));
        assert_eq!(parameters.ended.try_recv(), Ok(None), "the circuit continues");
    }

    /// Allows everything on these terms.
    struct AllowOn(Terms);

    impl Access for AllowOn {
        fn may_reserve(&self, _: PeerId, _: &Multiaddr) -> Permission {
            Permission::Allow(self.0)
        }

        fn may_connect(&self, source: PeerId, address: &Multiaddr, _: PeerId) -> Permission {
            self.may_reserve(source, address)
        }
    }

    #[test]
    fn terms_apply_within_the_limits_of_the_wire() {
        let (start, second) = (Instant::now(), Duration::from_secs(1));
        let (mut relay, [_, client]) = relay(start);
        let year = 365 * 24 * 60 * 60 * second;
        for (given, granted) in
            [(Duration::ZERO, second), (90 * second, 90 * second), (Duration::MAX, year)]
        {
            let limit = Some(given).filter(|given| !given.is_zero());
            let terms = Terms {
                reservation_ttl: Some(given),
                circuit_duration: limit.or(Some(second / 2)),
                circuit_bytes: Some(7),
            };
            relay.set_access(Box::new(AllowOn(terms)), start);
            relay.handle_request(client, Ok(Request::Reserve), 1, start);
            let answer = actions(&mut relay).into_iter().find_map(|action| match action {
                Action::Grant { expires, limit, .. } => Some((expires - start, limit)),
                _ => None,
            });
            let limit = Limit { duration: Some(granted), bytes: Some(7) };
            assert_eq!(answer, Some((granted, limit)), "{given:?}");
        }
    }

    #[test]
    fn a_grant_that_cannot_be_signed_is_undone_and_refused() {
        let start = Instant::now();
        let (mut relay, [_, client]) = relay(start);
        relay.handle_request(client, Ok(Request::Reserve), 7, start);
        let granted = actions(&mut relay).into_iter().find_map(|action| match action {
            Action::Grant { request, receipt, .. } => Some((request, receipt)),
            _ => None,
        });
        let (request, receipt) = granted.expect("a slot is free");
        relay.on_sign_failed(request, receipt, start);
        assert_eq!(relay.reservations.taken(), 0);
        let refused = actions(&mut relay).into_iter().find_map(|action| match action {
            Action::Refuse(reply, status) => Some((reply, status)),
            _ => None,
        });
        assert_eq!(refused, Some((7, Status::ReservationRefused)));
    }

    /// The statuses of the refusals among the actions.
    fn refusals(relay: &mut Relay<u32, u32>) -> Vec<Status> {
        let refusals = actions(relay).into_iter().filter_map(|action| match action {
            Action::Refuse(_, status) => Some(status),
            _ => None,
        });
        refusals.collect()
    }

    #[test]
    fn a_new_configuration_applies_from_the_next_request_quantum_and_sweep_on() {
        let start = Instant::now();
        let (mut relay, [source, target]) = relay(start);
        let (sweep, no_circuits) = (Duration::from_millis(100), 0);
        let config = Config { sweep, connect_rate: 1, bandwidth: 1000, ..Config::default() };
        let config = Config { max_circuits_per_peer: no_circuits, ..config };
        relay.set_config(config, start).unwrap();
        assert_eq!(relay.sweep_due, start + sweep);
        assert!(relay.link.lock().quantum([source.peer, target.peer]).is_some());
        reserve(&mut relay, target, start);
        for reason in [Refused::TooManyCircuitsOfSource, Refused::TooOften] {
            relay.handle_request(source, Ok(Request::Connect(target.peer)), 2, start);
            let refused = actions(&mut relay).into_iter().find_map(|action| match action {
                Action::Report(Event::CircuitRefused { reason, .. }) => Some(reason),
                _ => None,
            });
            assert_eq!(refused, Some(reason));
        }
    }

    #[test]
    fn a_renewal_is_charged_to_its_address_only_once_the_term_is_over() {
        let start = Instant::now();
        let (mut relay, [_, holder]) = relay(start);
        relay.set_config(Config { reserve_rate: 1, ..relay.config.clone() }, start).unwrap();
        reserve(&mut relay, holder, start);
        let address = relay.connections.get(holder.connection).unwrap().origin.prefix;
        let over = start + relay.config.reservation_ttl;
        for (now, expected) in [(over, Some(Status::ResourceLimitExceeded)), (over - MINUTE, None)]
        {
            // Other peers at its address have used up the address's rate.
            relay.reserve_rates = Rates::new(1);
            while relay.reserve_rates.take(PeerId::random(), address, now).is_ok() {}
            relay.handle_request(holder, Ok(Request::Reserve), 2, now);
            assert_eq!(refusals(&mut relay).pop(), expected);
        }
    }

    #[test]
    fn a_newcomer_that_waits_gets_the_terms_of_the_latest_rules() {
        let start = Instant::now();
        let (mut relay, [newcomer, holder]) = relay(start);
        relay.set_config(Config { max_reservations: 1, ..relay.config.clone() }, start).unwrap();
        reserve(&mut relay, holder, start);
        let later = start + relay.config.probe_after;
        relay.handle_request(newcomer, Ok(Request::Reserve), 2, later);
        let terms = Terms { reservation_ttl: Some(MINUTE), ..Terms::default() };
        relay.set_access(Box::new(AllowOn(terms)), later);
        relay.release(holder.peer, FreedReason::Released, later);
        relay.sweep(later);
        let granted = actions(&mut relay).into_iter().find_map(|action| match action {
            Action::Grant { expires, .. } => Some(expires),
            _ => None,
        });
        assert_eq!(granted, Some(later + MINUTE));
    }

    #[test]
    fn a_slot_does_not_move_to_a_connection_that_is_being_closed() {
        let start = Instant::now();
        let (mut relay, [_, holder]) = relay(start);
        reserve(&mut relay, holder, start);
        let closing = connect_again(&mut relay, holder.peer, 3);
        relay.close(closing.connection, CloseReason::Idle);
        relay.on_disconnected(holder, start);
        assert_eq!(relay.reservations.in_grace(), 1);
    }

    #[test]
    fn the_rules_for_a_slot_in_grace_are_those_for_the_prefix_that_it_counts_towards() {
        for (denied, is_freed) in [("192.0.2.0/24", true), ("198.51.100.0/24", false)] {
            let start = Instant::now();
            let (mut relay, [_, holder]) = relay(start);
            reserve(&mut relay, holder, start);
            relay.on_disconnected(holder, start);
            let mut config = relay.config.clone();
            config.access.deny_subnet = vec![denied.parse().unwrap()];
            relay.set_config(config, start).unwrap();
            assert_eq!(relay.reservations.taken() == 0, is_freed, "{denied}");
        }
    }

    #[test]
    fn a_request_over_a_relayed_connection_is_denied() {
        let start = Instant::now();
        let (mut relay, [source, target]) = relay(start);
        reserve(&mut relay, target, start);
        let address = "/ip4/192.0.2.9/tcp/1".parse().unwrap();
        relay.connections.add(3, Connection::new(source.peer, address, true, 0, start));
        let relayed = End { connection: 3, ..source };
        for request in [Request::Reserve, Request::Connect(target.peer)] {
            relay.handle_request(relayed, Ok(request), 2, start);
            assert_eq!(refusals(&mut relay), [Status::PermissionDenied]);
        }
    }

    #[test]
    fn a_newcomer_that_disconnects_waits_no_longer() {
        let start = Instant::now();
        let (mut relay, [newcomer, holder]) = relay(start);
        relay.set_config(Config { max_reservations: 1, ..relay.config.clone() }, start).unwrap();
        reserve(&mut relay, holder, start);
        let later = start + relay.config.probe_after;
        relay.handle_request(newcomer, Ok(Request::Reserve), 2, later);
        assert_eq!(relay.waiting.len(), 1);
        relay.on_disconnected(newcomer, later);
        assert_eq!(relay.waiting.len(), 0);
    }

    #[test]
    fn a_denied_request_is_not_charged() {
        let start = Instant::now();
        let (mut relay, [_, client]) = relay(start);
        let mut config = Config { reserve_rate: 1, ..relay.config.clone() };
        config.access.deny_peer.insert(client.peer);
        relay.set_config(config, start).unwrap();
        for _ in 0..2 {
            relay.handle_request(client, Ok(Request::Reserve), 1, start);
            assert_eq!(refusals(&mut relay), [Status::PermissionDenied]);
        }
    }

    #[test]
    fn a_connection_is_not_idle_while_its_request_waits_for_an_answer() {
        let (start, second) = (Instant::now(), Duration::from_secs(1));
        let (mut relay, [_, client]) = relay(start);
        let config = Config { idle_timeout: 4 * second, ..relay.config.clone() };
        relay.set_config(config, start).unwrap();
        relay.set_access(Box::new(AnswerLater), start);
        relay.handle_request(client, Ok(Request::Reserve), 1, start + 3 * second);
        relay.sweep(start + 6 * second);
        assert_eq!(relay.connections.get(client.connection).unwrap().closing, None);
    }

    #[test]
    fn a_request_that_is_allowed_while_the_relay_drains_is_not_granted() {
        let start = Instant::now();
        let (mut relay, [_, client]) = relay(start);
        relay.set_access(Box::new(AnswerLater), start);
        relay.handle_request(client, Ok(Request::Reserve), 1, start);
        let request = take_check(&mut relay);
        relay.drain(start, start);
        relay.on_access_checked(request, true.into(), start);
        assert_eq!(relay.reservations.taken(), 0);
    }

    #[test]
    fn frequent_policy_changes_do_not_delay_the_sweep() {
        let start = Instant::now();
        let (mut relay, _) = relay(start);
        let due = relay.sweep_due;
        for later in 1..9 {
            let now = start + Duration::from_millis(later * 100);
            relay.set_config(relay.config.clone(), now).unwrap();
        }
        assert_eq!(relay.sweep_due, due);
    }
}
