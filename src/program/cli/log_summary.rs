//! What was refused, who was given up and what came back, for whoever reads the log: a line a minute
//! for each reason.
//!
//! Pure. Each single case is a line at debug; at info that would be the stranger's to fill.

use std::collections::{BTreeMap, HashMap, HashSet};

use crate::{
    address::ClientPrefix,
    event::{Event, Refused},
    program::{
        mux::budget::{Buffered, Cut},
        net::admission::limits::Denied,
        node::NodeEvent,
        tally::Tally,
    },
    relay::quota::Busiest,
};

/// How many addresses are told apart under one reason. The busiest is among them unless as many
/// others came before it.
const MOST_ADDRESSES: usize = 1000;

/// What happened since the last lines.
#[derive(Debug, Default)]
pub struct Digest {
    counts: BTreeMap<Key, Count>,
    /// The flags that somebody has run into.
    warned: HashSet<&'static str>,
    /// What had been given up by then.
    given_up: u64,
}

/// What happened, and why.
type Key = (&'static str, &'static str);

#[derive(Debug, Default)]
struct Count {
    total: usize,
    from: HashMap<ClientPrefix, usize>,
}

impl Digest {
    /// Counts an event; returns the warning that it calls for, if it is the first of its kind.
    pub fn note(&mut self, event: &NodeEvent) -> Option<String> {
        let tally = Tally::of(event)?;
        self.count((tally.what.log, tally.why), tally.prefix);
        match event {
            NodeEvent::ConnectionDenied { reason: Denied::Address(address), .. } => {
                self.warn(address, "as many connections as it may", "--max-connections-per-ip")
            }
            NodeEvent::ConnectionDenied { reason: Denied::Subnet(subnet), .. } => {
                self.warn(subnet, "as many connections as it may", "--max-connections-per-subnet")
            }
            NodeEvent::ConnectionDenied { address, reason: Denied::NoHeader(why) } => {
                self.once("--proxy-protocol-from", |flag| {
                    format!(
                        "{address}: no PROXY protocol header: {why}; {flag} says that a proxy is \
                         there: make it send one, or leave the address out"
                    )
                })
            }
            NodeEvent::Relay(Event::ReservationRefused { reason, .. }) => {
                self.warn_of(reason, "--reserve-rate")
            }
            NodeEvent::Relay(Event::CircuitRefused { reason, .. }) => {
                self.warn_of(reason, "--connect-rate")
            }
            _ => None,
        }
    }

    /// A line for each reason that there was since the last time, and for what was given up; if there was
    /// any, one more says which address holds the most of each resource.
    pub fn lines(
        &mut self,
        buffered: Buffered,
        busiest: impl IntoIterator<Item = (&'static str, Option<Busiest>)>,
    ) -> Vec<String> {
        let given_up = buffered.sum(&[Cut::STREAMS, Cut::CONNECTIONS].concat());
        let more = given_up.saturating_sub(self.given_up);
        self.given_up = given_up;
        if more > 0 {
            let key = ("streams given up", "more waited than --max-buffered");
            self.counts.entry(key).or_default().total = usize::try_from(more).unwrap_or(usize::MAX);
        }
        let counts = std::mem::take(&mut self.counts);
        let lines = counts.into_iter().map(|((what, why), count)| {
            let line = format!("{what} within a minute: {}: {why}", count.total);
            match count.from.into_iter().max_by_key(|(_, count)| *count) {
                Some((address, count)) => format!("{line}; most of {address}: {count}"),
                None => line,
            }
        });
        let mut lines: Vec<_> = lines.collect();
        let busiest = busiest.into_iter().filter_map(|(resource, busiest)| {
            let (address, holds) = busiest?;
            Some(format!("{resource}: {address} ({holds})"))
        });
        let busiest: Vec<_> = busiest.collect();
        if !lines.is_empty() && !busiest.is_empty() {
            lines.push(format!("busiest addresses within a minute: {}", busiest.join(", ")));
        }
        lines
    }

    fn count(&mut self, key: Key, from: Option<ClientPrefix>) {
        let count = self.counts.entry(key).or_default();
        count.total += 1;
        let Some(address) = from else {
            return;
        };
        let known = count.from.contains_key(&address);
        if known || count.from.len() < MOST_ADDRESSES {
            *count.from.entry(address).or_default() += 1;
        }
    }

    fn warn_of(&mut self, reason: &Refused, rate: &'static str) -> Option<String> {
        match reason {
            Refused::AddressFull(address) => {
                self.warn(address, "as many slots as it may", "--max-reservations-per-ip")
            }
            Refused::SubnetFull(subnet) => {
                self.warn(subnet, "as many slots as it may", "--max-reservations-per-subnet")
            }
            Refused::TooManyCircuitsOfAddress(address) => {
                self.warn(address, "as many circuits as it may", "--max-circuits-per-ip")
            }
            Refused::TooManyCircuitsOfSubnet(subnet) => {
                self.warn(subnet, "as many circuits as it may", "--max-circuits-per-subnet")
            }
            Refused::AddressTooOften(address) => {
                self.warn(address, "sent as many requests as it may", rate)
            }
            _ => None,
        }
    }

    fn warn(
        &mut self,
        address: &impl std::fmt::Display,
        has: &str,
        flag: &'static str,
    ) -> Option<String> {
        self.once(flag, |flag| {
            format!(
                "{address} has {has}, and was refused: is it a proxy? Then name it with \
                 --proxy-protocol-from; one address for many people? Then raise {flag}"
            )
        })
    }

    fn once(&mut self, flag: &'static str, warning: impl Fn(&str) -> String) -> Option<String> {
        let first = self.warned.insert(flag);
        first.then(|| format!("{}; this is said once", warning(flag)))
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use libp2p::{Multiaddr, PeerId};

    use super::*;
    use crate::event::FreedReason;
    use crate::program::net::admission::proxy_header::NoHeader;

    fn freed(from: &str, reason: FreedReason) -> NodeEvent {
        NodeEvent::Relay(Event::ReservationFreed {
            peer: PeerId::random(),
            billed_to: ClientPrefix::of(&address(from)),
            reason,
        })
    }

    fn refused(from: &str, reason: Refused) -> NodeEvent {
        NodeEvent::Relay(Event::ReservationRefused {
            peer: PeerId::random(),
            address: address(from),
            reason,
        })
    }

    fn address(ip: &str) -> Multiaddr {
        format!("/ip4/{ip}/tcp/1").parse().unwrap()
    }

    #[test]
    fn a_reason_is_one_line_with_its_count_and_the_busiest_address() {
        let mut digest = Digest::default();
        for from in ["192.0.2.1", "192.0.2.2", "192.0.2.2"] {
            assert_eq!(digest.note(&freed(from, FreedReason::GraceOver)), None);
        }
        let taken = FreedReason::TakenBy { peer: PeerId::random() };
        digest.note(&freed("192.0.2.3", taken));
        let lines = [
            "slots freed within a minute: 3: grace over; most of 192.0.2.2: 2",
            "slots freed within a minute: 1: taken by a newcomer; most of 192.0.2.3: 1",
        ];
        assert_eq!(digest.lines(Buffered::default(), []), lines);
        assert!(digest.lines(Buffered::default(), []).is_empty(), "a minute later");
    }

    #[test]
    fn peers_that_were_judged_silent_are_one_line_as_well() {
        let mut digest = Digest::default();
        for from in ["192.0.2.1", "192.0.2.2", "192.0.2.2"] {
            let silent = Event::PeerSilent {
                peer: PeerId::random(),
                address: address(from),
                silent_for: Duration::from_secs(60),
            };
            assert_eq!(digest.note(&NodeEvent::Relay(silent)), None);
        }
        let line = "peers judged silent within a minute: 3: no sign of life when asked; most of \
                    192.0.2.2: 2";
        assert_eq!(digest.lines(Buffered::default(), []), [line]);
    }

    #[test]
    fn the_first_refusal_by_an_address_cap_is_a_warning() {
        let mut digest = Digest::default();
        assert_eq!(digest.note(&refused("192.0.2.1", Refused::TableFull)), None);
        let home = ClientPrefix::of(&address("192.0.2.1")).unwrap();
        let mut full = || digest.note(&refused("192.0.2.1", Refused::AddressFull(home)));
        let warning = full().expect("a warning");
        for word in ["192.0.2.1", "--max-reservations-per-ip", "proxy"] {
            assert!(warning.contains(word), "{warning}");
        }
        assert_eq!(full(), None);
        let subnet = digest.note(&refused("192.0.2.1", Refused::SubnetFull(home.subnet())));
        assert!(subnet.is_some_and(|line| line.contains("192.0.2.0/24")));
    }

    #[test]
    fn the_first_connection_of_a_proxy_without_a_header_is_a_warning() {
        let mut digest = Digest::default();
        let mut denied = || {
            digest.note(&NodeEvent::ConnectionDenied {
                address: address("192.0.2.1"),
                reason: Denied::NoHeader(NoHeader::SomethingElse),
            })
        };
        let warning = denied().expect("a warning");
        for word in ["192.0.2.1", "--proxy-protocol-from", "something else"] {
            assert!(warning.contains(word), "{warning}");
        }
        assert_eq!(denied(), None);
        let line = "connections denied within a minute: 2: no PROXY protocol header; most of \
                    192.0.2.1: 2";
        assert_eq!(digest.lines(Buffered::default(), []), [line]);
    }

    #[test]
    fn in_a_minute_with_refusals_the_busiest_address_of_each_resource_is_named() {
        let mut digest = Digest::default();
        let home = "192.0.2.1".parse::<std::net::IpAddr>().unwrap().into();
        let busiest =
            [("slots", Some((home, 12))), ("circuits", None), ("streams", Some((home, 3)))];
        assert!(digest.lines(Buffered::default(), busiest).is_empty());
        digest.note(&refused("192.0.2.9", Refused::TableFull));
        let lines = digest.lines(Buffered::default(), busiest);
        assert_eq!(
            lines[1..],
            ["busiest addresses within a minute: slots: 192.0.2.1 (12), streams: 192.0.2.1 (3)"]
        );
    }

    #[test]
    fn a_thousand_addresses_and_no_more_are_told_apart() {
        let mut digest = Digest::default();
        for n in 0..MOST_ADDRESSES + 500 {
            let from = format!("10.0.{}.{}", n / 256, n % 256);
            digest.note(&refused(&from, Refused::TableFull));
        }
        let count = digest.counts.values().next().unwrap();
        assert_eq!(count.total, MOST_ADDRESSES + 500);
        assert_eq!(count.from.len(), MOST_ADDRESSES);
    }
}
