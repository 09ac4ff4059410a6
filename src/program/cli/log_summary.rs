//! The log summary: once a minute a line for each kind of refusal and timeout, with its count.
//!
//! Sans-IO. Each single event is a line at debug; at info, peers could fill the log.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    fmt::Display,
};

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

/// How many addresses are counted separately for one reason. The busiest one is among them unless that many others came
/// first.
const MAX_ADDRESSES: usize = 1000;

/// The counts since the last summary.
#[derive(Debug, Default)]
pub struct LogSummary {
    counts: BTreeMap<Key, Count>,
    /// The flags, and the reasons for failed handshakes, about which a warning was logged.
    warned: HashSet<&'static str>,
    /// The streams and connections that had been reset or closed to free memory at the last summary.
    buffered: Buffered,
}

/// What happened, and the reason.
type Key = (&'static str, &'static str);

#[derive(Debug, Default)]
struct Count {
    total: u64,
    by_address: HashMap<ClientPrefix, usize>,
}

impl LogSummary {
    /// Counts an event. Returns a warning if it is the first one to reach the limit of a flag, or the first handshake
    /// to fail for a reason.
    pub fn on_event(&mut self, event: &NodeEvent) -> Option<String> {
        let tally = Tally::of(event)?;
        self.count((tally.what.log, tally.why), tally.prefix);
        let (subject, warning) = match event {
            NodeEvent::ConnectionDenied { reason: Denied::ProxyHeader(error), address } => {
                let flag = "--proxy-protocol-from";
                let warning = format!(
                    "connection denied: {address}: no PROXY protocol header: {error}; have the proxy send one, \
                     or remove its address from {flag}"
                );
                (flag, warning)
            }
            NodeEvent::HandshakeFailed { address, failure } => {
                let hint = failure.reason.hint()?;
                (failure.reason.kind(), format!("handshake failed: {address}: {hint}"))
            }
            _ => {
                let (client, resource, flag) = limit_reached(event)?;
                let warning = format!(
                    "limit reached: {client} has as many {resource} as {flag} allows; if it is a proxy, name it with \
                     --proxy-protocol-from; if many clients share it, raise {flag}"
                );
                (flag, warning)
            }
        };
        self.warned.insert(subject).then(|| format!("{warning}; this is logged once"))
    }

    /// Returns the summary and resets the counts: a line for each reason, then, if there is any, one with the busiest
    /// address of each resource.
    pub fn take_lines(
        &mut self,
        buffered: Buffered,
        busiest: impl IntoIterator<Item = (&'static str, Option<Busiest>)>,
    ) -> Vec<String> {
        let streams = Cut::STREAMS.map(|cut| ("streams reset", cut));
        let connections = Cut::CONNECTIONS.map(|cut| ("connections closed", cut));
        for (what, cut) in streams.into_iter().chain(connections) {
            let total = buffered.count(cut).saturating_sub(self.buffered.count(cut));
            if total > 0 {
                self.counts.entry((what, cut.kind())).or_default().total = total;
            }
        }
        self.buffered = buffered;
        let counts = std::mem::take(&mut self.counts);
        let mut lines = Vec::new();
        for ((what, why), count) in counts {
            let most = count.by_address.into_iter().max_by_key(|(_, count)| *count);
            let most = most.map(|(address, count)| format!("; most from {address}: {count}"));
            let most = most.unwrap_or_default();
            lines.push(format!("{what} within a minute: {}: {why}{most}", count.total));
        }
        let busiest = busiest.into_iter().filter_map(|(resource, busiest)| {
            let (address, holds) = busiest?;
            Some(format!("{resource}: {address} ({holds})"))
        });
        let busiest: Vec<_> = busiest.collect();
        if !lines.is_empty() && !busiest.is_empty() {
            lines.push(format!("busiest addresses now: {}", busiest.join(", ")));
        }
        lines
    }

    fn count(&mut self, key: Key, prefix: Option<ClientPrefix>) {
        let count = self.counts.entry(key).or_default();
        count.total += 1;
        let Some(address) = prefix else {
            return;
        };
        if count.by_address.contains_key(&address) || count.by_address.len() < MAX_ADDRESSES {
            *count.by_address.entry(address).or_default() += 1;
        }
    }
}

/// The address or subnet that has reached a limit, the limited resource, and the flag that sets the limit.
fn limit_reached(event: &NodeEvent) -> Option<(&dyn Display, &'static str, &'static str)> {
    let (reason, rate) = match event {
        NodeEvent::ConnectionDenied { reason: Denied::Address(from), .. } => {
            return Some((from, "connections", "--max-connections-per-ip"));
        }
        NodeEvent::ConnectionDenied { reason: Denied::Subnet(from), .. } => {
            return Some((from, "connections", "--max-connections-per-subnet"));
        }
        NodeEvent::Relay(Event::ReservationRefused { reason, .. }) => (reason, "--reserve-rate"),
        NodeEvent::Relay(Event::CircuitRefused { reason, .. }) => (reason, "--connect-rate"),
        _ => return None,
    };
    Some(match reason {
        Refused::AddressFull(from) => (from, "slots", "--max-reservations-per-ip"),
        Refused::SubnetFull(from) => (from, "slots", "--max-reservations-per-subnet"),
        Refused::TooManyCircuitsOfAddress(from) => (from, "circuits", "--max-circuits-per-ip"),
        Refused::TooManyCircuitsOfSubnet(from) => (from, "circuits", "--max-circuits-per-subnet"),
        Refused::AddressTooOften(from) => (from, "requests", rate),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use std::{sync::Weak, time::Duration};

    use libp2p::{Multiaddr, PeerId};

    use super::*;
    use crate::event::FreedReason;
    use crate::program::{
        mux::{budget::MemoryBudget, session::Shared},
        net::admission::{
            handshake_failure::{HandshakeFailure, Reason, Stage},
            proxy_header::HeaderError,
        },
    };

    fn freed(from: &str, reason: FreedReason) -> NodeEvent {
        NodeEvent::Relay(Event::ReservationFreed {
            peer: PeerId::random(),
            prefix: ClientPrefix::of(&address(from)),
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
    fn each_reason_is_summarized_with_its_count_and_the_busiest_address() {
        let mut summary = LogSummary::default();
        for from in ["192.0.2.1", "192.0.2.2", "192.0.2.2"] {
            assert_eq!(summary.on_event(&freed(from, FreedReason::GraceOver)), None);
        }
        let taken = FreedReason::TakenBy { peer: PeerId::random() };
        summary.on_event(&freed("192.0.2.3", taken));
        let lines = [
            "slots freed within a minute: 3: grace over; most from 192.0.2.2: 2",
            "slots freed within a minute: 1: taken by a newcomer; most from 192.0.2.3: 1",
        ];
        assert_eq!(summary.take_lines(Buffered::default(), []), lines);
        assert!(summary.take_lines(Buffered::default(), []).is_empty(), "a minute later");
    }

    #[test]
    fn what_was_reset_or_closed_to_free_memory_is_summarized_by_the_limit() {
        let budget = MemoryBudget::new(1, 1, 0);
        let account = budget.open(None, Weak::<Shared>::new());
        let mut summary = LogSummary::default();
        for cut in [Cut::Pool, Cut::Connection, Cut::WriteStalled, Cut::WriteStalled] {
            account.count(cut);
        }
        let lines = [
            "connections closed within a minute: 2: write stalled",
            "streams reset within a minute: 1: max-buffered",
            "streams reset within a minute: 1: max-buffered-per-connection",
        ];
        assert_eq!(summary.take_lines(budget.buffered(), []), lines);
        account.count(Cut::Refusals);
        let lines = ["connections closed within a minute: 1: refusals not taken"];
        assert_eq!(summary.take_lines(budget.buffered(), []), lines);
        assert!(summary.take_lines(budget.buffered(), []).is_empty(), "a minute later");
    }

    #[test]
    fn timed_out_peers_are_summarized_in_one_line() {
        let mut summary = LogSummary::default();
        for from in ["192.0.2.1", "192.0.2.2", "192.0.2.2"] {
            let silent = Event::PeerSilent {
                peer: PeerId::random(),
                address: address(from),
                silent_for: Duration::from_secs(60),
            };
            assert_eq!(summary.on_event(&NodeEvent::Relay(silent)), None);
        }
        let line = "peers timed out within a minute: 3: no answer to a probe; most from \
                    192.0.2.2: 2";
        assert_eq!(summary.take_lines(Buffered::default(), []), [line]);
    }

    #[test]
    fn the_first_refusal_by_an_address_cap_is_a_warning() {
        let mut summary = LogSummary::default();
        assert_eq!(summary.on_event(&refused("192.0.2.1", Refused::TableFull)), None);
        let home = ClientPrefix::of(&address("192.0.2.1")).unwrap();
        let mut full = || summary.on_event(&refused("192.0.2.1", Refused::AddressFull(home)));
        let warning = full().expect("a warning");
        for word in ["192.0.2.1", "--max-reservations-per-ip", "proxy"] {
            assert!(warning.contains(word), "{warning}");
        }
        assert_eq!(full(), None);
        let subnet = summary.on_event(&refused("192.0.2.1", Refused::SubnetFull(home.subnet())));
        assert!(subnet.is_some_and(|line| line.contains("192.0.2.0/24")));
    }

    #[test]
    fn the_first_connection_of_a_proxy_without_a_header_is_a_warning() {
        let mut summary = LogSummary::default();
        let mut denied = || {
            summary.on_event(&NodeEvent::ConnectionDenied {
                address: address("192.0.2.1"),
                reason: Denied::ProxyHeader(HeaderError::NotAHeader),
            })
        };
        let warning = denied().expect("a warning");
        for word in ["192.0.2.1", "--proxy-protocol-from", "not a header"] {
            assert!(warning.contains(word), "{warning}");
        }
        assert_eq!(denied(), None);
        let line = "connections denied within a minute: 2: no PROXY protocol header; most from \
                    192.0.2.1: 2";
        assert_eq!(summary.take_lines(Buffered::default(), []), [line]);
    }

    #[test]
    fn the_first_handshake_to_fail_for_a_reason_is_a_warning_if_there_is_a_remedy() {
        let mut summary = LogSummary::default();
        let mut failed = |stage, reason| {
            summary.on_event(&NodeEvent::HandshakeFailed {
                address: address("192.0.2.1"),
                failure: HandshakeFailure { stage, reason },
            })
        };
        let warning = failed(Stage::Multistream, Reason::Http).expect("a warning");
        let begins = "handshake failed: /ip4/192.0.2.1/tcp/1: an HTTP request came to";
        assert!(warning.starts_with(begins), "{warning}");
        assert_eq!(failed(Stage::WebSocket, Reason::Http), None);
        assert!(failed(Stage::Security, Reason::PeerId).is_some());
        assert_eq!(failed(Stage::Multistream, Reason::Closed), None);
        let lines = ["closed; most from 192.0.2.1: 1", "http; most from 192.0.2.1: 2"];
        for (line, end) in summary.take_lines(Buffered::default(), []).iter().zip(lines) {
            assert!(line.starts_with("handshakes failed within a minute: "), "{line}");
            assert!(line.ends_with(end), "{line}");
        }
    }

    #[test]
    fn in_a_minute_with_refusals_the_busiest_address_of_each_resource_is_named() {
        let mut summary = LogSummary::default();
        let home = "192.0.2.1".parse::<std::net::IpAddr>().unwrap().into();
        let busiest =
            [("slots", Some((home, 12))), ("circuits", None), ("streams", Some((home, 3)))];
        assert!(summary.take_lines(Buffered::default(), busiest).is_empty());
        summary.on_event(&refused("192.0.2.9", Refused::TableFull));
        let lines = summary.take_lines(Buffered::default(), busiest);
        assert_eq!(
            lines[1..],
            ["busiest addresses now: slots: 192.0.2.1 (12), streams: 192.0.2.1 (3)"]
        );
    }

    #[test]
    fn at_most_a_thousand_addresses_are_counted_separately() {
        let mut summary = LogSummary::default();
        for n in 0..MAX_ADDRESSES + 500 {
            let from = format!("10.0.{}.{}", n / 256, n % 256);
            summary.on_event(&refused(&from, Refused::TableFull));
        }
        let count = summary.counts.values().next().unwrap();
        assert_eq!(count.total, MAX_ADDRESSES as u64 + 500);
        assert_eq!(count.by_address.len(), MAX_ADDRESSES);
    }
}
